// Sparse × dense over int8 codes and activations rounded to bytes: exact sums in int32. See sparse.h.

// ---- activations --------------------------------------------------------------------------------------------------

// One token as bytes: 255 steps from its least to its largest value, zero included, so that zero is exact. n is a
// multiple of 16.
inline void round_token(const float* __restrict x, int64_t n, uint8_t* __restrict bytes, float& scale, int32_t& zero) {
  // Sixteen of each side by side: gcc turns no single minimum or sum into vectors, since their order would change.
  alignas(64) float low[kSquare] = {}, high[kSquare] = {}, wrong[kSquare] = {};
  for (int64_t i = 0; i < n; i += kSquare) {
    for (int64_t k = 0; k < kSquare; ++k) {
      low[k] = x[i + k] < low[k] ? x[i + k] : low[k];
      high[k] = x[i + k] > high[k] ? x[i + k] : high[k];
      wrong[k] += x[i + k] * 0.0f;
    }
  }
  float least = 0.0f, largest = 0.0f, bad = 0.0f;
  for (int64_t k = 0; k < kSquare; ++k) {
    least = low[k] < least ? low[k] : least;
    largest = high[k] > largest ? high[k] : largest;
    bad += wrong[k];
  }
  const float range = largest - least;
  // A range past the largest float ends the same way as one that holds NaN.
  if (!(bad == 0.0f) || !(range - range == 0.0f)) {
    scale = __builtin_nanf("");
    zero = 0;
    __builtin_memset(bytes, 0, n);
    return;
  }
  scale = range > 0.0f ? range / 255.0f : 1.0f;
  // Ranges so small that 255 / range is no number are told apart by no byte.
  const float steps = range > 1e-36f ? 255.0f / range : 0.0f;
  const float shift = -least * steps;
  zero = static_cast<int32_t>(shift + 0.5f);
  const float offset = static_cast<float>(zero) + 0.5f;
  for (int64_t i = 0; i < n; ++i) {
    float place = x[i] * steps + offset;
    place = place < 0.0f ? 0.0f : place;
    place = place > 255.0f ? 255.0f : place;
    bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(place));
  }
}

// bytes[token][column] -> tile[column][token], four columns at a time as 32-bit words.
inline void turn_bytes(const uint8_t* bytes, int64_t padded, uint8_t* tile) {
  alignas(64) uint32_t words[kSquare][kByteTokens];
  for (int64_t c = 0; c < padded; c += 4 * kSquare) {
    for (int64_t t = 0; t < kByteTokens; t += kSquare) {
      transpose(reinterpret_cast<const float*>(bytes + t * padded + c), padded / 4,
                reinterpret_cast<float*>(&words[0][t]), kByteTokens);
    }
    for (int64_t w = 0; w < kSquare; ++w) {
      uint8_t* __restrict columns = tile + (c + 4 * w) * kByteTokens;
#if defined(PINS_AVX512)
      for (int64_t t = 0; t < kByteTokens; t += 16) {
        const __m512i four = _mm512_load_si512(&words[w][t]);
        const auto to = [&](int column) { return reinterpret_cast<__m128i*>(columns + column * kByteTokens + t); };
        _mm_store_si128(to(0), _mm512_cvtepi32_epi8(four));
        _mm_store_si128(to(1), _mm512_cvtepi32_epi8(_mm512_srli_epi32(four, 8)));
        _mm_store_si128(to(2), _mm512_cvtepi32_epi8(_mm512_srli_epi32(four, 16)));
        _mm_store_si128(to(3), _mm512_cvtepi32_epi8(_mm512_srli_epi32(four, 24)));
      }
#else
      for (int shift = 0; shift < 4; ++shift) {
        for (int64_t t = 0; t < kByteTokens; ++t) {
          columns[shift * kByteTokens + t] = static_cast<uint8_t>(words[w][t] >> (8 * shift));
        }
      }
#endif
    }
  }
}

inline void load_bytes(const LoadBytes& to) {
  const int64_t padded = (to.columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns;
  const char* x = static_cast<const char*>(to.x);
  for (int64_t t = 0; t < to.tokens; ++t) {
    floats_of(x + t * to.stride * element_size(to.dtype), to.dtype, to.columns, to.floats);
    // No weight reads what is filled up, and zeros change no range.
    for (int64_t c = to.columns; c < padded; ++c) to.floats[c] = 0.0f;
    round_token(to.floats, padded, to.bytes + t * padded, to.scales[t], to.zeros[t]);
  }
  if (!to.tile) return;
  __builtin_memset(to.bytes + to.tokens * padded, 0, (kByteTokens - to.tokens) * padded);
  turn_bytes(to.bytes, padded, to.tile);
}

inline float float_of_sum(int32_t sum, int32_t zero, float token_scale, const StoreSums& from, int64_t row) {
  // The difference fits: |codes| <= 127, bytes <= 255, columns <= 2^15 (checked by the operator). Others wrap
  // around.
  const uint32_t moved = static_cast<uint32_t>(zero) * static_cast<uint32_t>(from.row_sums[row]);
  const int32_t difference = static_cast<int32_t>(static_cast<uint32_t>(sum) - moved);
  const float scaled = static_cast<float>(difference) * (token_scale * from.row_scales[row]);
  return from.bias ? scaled + from.bias[row] : scaled;
}

inline void store_sums(const StoreSums& from) {
  alignas(64) float row[kBlockRows];
  alignas(64) float tokens[kSquare][kBlockRows];
  char* out = static_cast<char*>(from.out);
  // Sixteen places at a time hold the tokens 4 k to 4 k + 3 of each sixteen.
  for (int64_t first = 0; first < kByteTokens; first += kSquare) {
    for (int64_t r = 0; r < from.rows; r += kSquare) {
      transpose(reinterpret_cast<const float*>(from.sums + r * kByteTokens + first), kByteTokens, &tokens[0][r],
                kBlockRows);
    }
    for (int64_t i = 0; i < kSquare; ++i) {
      const int64_t token = i / 4 * 16 + first / 4 + i % 4;
      if (token >= from.tokens) continue;
      const int32_t* __restrict sums = reinterpret_cast<const int32_t*>(tokens[i]);
      for (int64_t r = 0; r < from.rows; ++r) {
        row[r] = float_of_sum(sums[r], from.zeros[token], from.token_scales[token], from, r);
      }
      put_floats(row, from.dtype, from.rows, out + token * from.stride * element_size(from.dtype));
    }
  }
}

inline void store_token_sums(const StoreSums& from) {
  alignas(64) float row[kBlockRows];
  for (int64_t r = 0; r < from.rows; ++r) {
    row[r] = float_of_sum(from.sums[r], from.zeros[0], from.token_scales[0], from, r);
  }
  put_floats(row, from.dtype, from.rows, from.out);
}

// ---- multiply -----------------------------------------------------------------------------------------------------

// A code times a byte fits 16 bits; sums are 32 bits wide from the first on. gcc makes vectors of it.
inline void multiply_bytes(const SparseBlock& block, const uint8_t* x, int32_t* y) {
  const int8_t* values = static_cast<const int8_t*>(block.values);
  const uint8_t* columns = block.columns;
  for (int64_t s = 0; s < block.slices; ++s) {
    for (int64_t i = 0; i < kSliceRows; ++i) {
      alignas(64) int32_t sums[kByteTokens] = {};
      for (int64_t j = 0; j < block.counts[s]; ++j) {
        for (int64_t g = 0; g < 4; ++g) {
          const int64_t at = (j * kSliceRows + i) * 4 + g;
          const int16_t code = values[at];
          const uint8_t* __restrict tokens = x + columns[at] * kByteTokens;
          for (int64_t t = 0; t < kByteTokens; ++t) sums[t] += static_cast<int16_t>(code * tokens[t]);
        }
      }
      int32_t* row = y + block.rows[s * kSliceRows + i] * kByteTokens;
      for (int64_t t = 0; t < kByteTokens; ++t) row[place_of_token(t)] += sums[t];
    }
    values += block.counts[s] * kSliceRows * 4;
    columns += block.counts[s] * kSliceRows * 4;
  }
}

inline void multiply_token_bytes(const SparseBlock& block, const uint8_t* x, int32_t* y) {
  const int8_t* values = static_cast<const int8_t*>(block.values);
  const uint8_t* columns = block.columns;
  for (int64_t s = 0; s < block.slices; ++s) {
    int32_t sums[kSliceRows] = {};
    for (int64_t j = 0; j < block.counts[s]; ++j, values += 4 * kSliceRows, columns += 4 * kSliceRows) {
      for (int64_t i = 0; i < 4 * kSliceRows; ++i) sums[i / 4] += values[i] * x[columns[i]];
    }
    for (int64_t i = 0; i < kSliceRows; ++i) y[block.rows[s * kSliceRows + i]] += sums[i];
  }
}

#if defined(PINS_AVX512)
// GCC's own names for instructions past AVX-512 F, BW, DQ and VL: only the operator calls these, on a CPU that has
// them.
#define PINS_VNNI __attribute__((target("avx512vnni,avx512vbmi")))

// Four weights of a row with the bytes of their four columns: the columns are interleaved for 64 tokens, then four
// vectors of 16 tokens each take a dot product of four.
PINS_VNNI inline void multiply_bytes_vnni(const SparseBlock& block, const uint8_t* x, int32_t* y) {
  constexpr int kRows = 4;
  const int8_t* values = static_cast<const int8_t*>(block.values);
  const uint8_t* columns = block.columns;
  for (int64_t s = 0; s < block.slices; ++s) {
    const int64_t count = block.counts[s];
    for (int64_t row = 0; row < kSliceRows; row += kRows) {
      const uint8_t* rows = block.rows + s * kSliceRows + row;
      __m512i sums[kRows][4];
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < 4; ++v) sums[r][v] = _mm512_load_si512(y + rows[r] * kByteTokens + 16 * v);
      }
      const int8_t* codes = values + 4 * row;
      const uint8_t* places = columns + 4 * row;
      for (int64_t j = 0; j < count; ++j, codes += 4 * kSliceRows, places += 4 * kSliceRows) {
        const __m512i all = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        uint64_t pairs[2];
        __builtin_memcpy(pairs, places, 16);
        asm("" : "+r"(pairs[0]), "+r"(pairs[1]));
        for (int r = 0; r < kRows; ++r) {
          const uint64_t four = pairs[r / 2] >> (32 * (r % 2));
          const __m512i a = _mm512_load_si512(x + (four & 255) * kByteTokens);
          const __m512i b = _mm512_load_si512(x + (four >> 8 & 255) * kByteTokens);
          const __m512i c = _mm512_load_si512(x + (four >> 16 & 255) * kByteTokens);
          const __m512i d = _mm512_load_si512(x + (four >> 24 & 255) * kByteTokens);
          const __m512i ab = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
          const __m512i cd = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
          const __m512i code = _mm512_permutexvar_epi32(_mm512_set1_epi32(r), all);
          sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], _mm512_unpacklo_epi16(ab, cd), code);
          sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], _mm512_unpackhi_epi16(ab, cd), code);
          sums[r][2] = _mm512_dpbusd_epi32(sums[r][2], _mm512_unpacklo_epi16(ab_high, cd_high), code);
          sums[r][3] = _mm512_dpbusd_epi32(sums[r][3], _mm512_unpackhi_epi16(ab_high, cd_high), code);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < 4; ++v) _mm512_store_si512(y + rows[r] * kByteTokens + 16 * v, sums[r][v]);
      }
    }
    values += count * kSliceRows * 4;
    columns += count * kSliceRows * 4;
  }
}

// The 256 bytes of a block's columns in four registers, looked up 64 at a time.
PINS_VNNI inline void multiply_token_bytes_vnni(const SparseBlock& block, const uint8_t* x, int32_t* y) {
  const __m512i p = _mm512_loadu_si512(x), q = _mm512_loadu_si512(x + 64);
  const __m512i r = _mm512_loadu_si512(x + 128), s = _mm512_loadu_si512(x + 192);
  const int8_t* values = static_cast<const int8_t*>(block.values);
  const uint8_t* columns = block.columns;
  for (int64_t i = 0; i < block.slices; ++i) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t j = 0; j < block.counts[i]; ++j, values += 4 * kSliceRows, columns += 4 * kSliceRows) {
      const __m512i column = _mm512_loadu_si512(columns);
      const __m512i low = _mm512_permutex2var_epi8(p, column, q), high = _mm512_permutex2var_epi8(r, column, s);
      const __m512i bytes = _mm512_mask_blend_epi8(_mm512_movepi8_mask(column), low, high);
      sum = _mm512_dpbusd_epi32(sum, bytes, _mm512_loadu_si512(values));
    }
    alignas(64) int32_t sums[kSliceRows];
    _mm512_store_si512(sums, sum);
    for (int64_t k = 0; k < kSliceRows; ++k) y[block.rows[i * kSliceRows + k]] += sums[k];
  }
}
#endif

constexpr SparseLoops sparse_loops() {
  return {
      {load_tile<kFewTokens>, load_tile<kTokens>},
      {store_tile<kFewTokens>, store_tile<kTokens>},
      {{multiply<float, kFewTokens>, multiply<float, kTokens>},
       {multiply<uint16_t, kFewTokens>, multiply<uint16_t, kTokens>}},
      load_token,
      store_token,
      {multiply_token<float>, multiply_token<uint16_t>},
      load_bytes,
      store_sums,
      store_token_sums,
#if defined(PINS_AVX512)
      {multiply_bytes, multiply_bytes_vnni},
      {multiply_token_bytes, multiply_token_bytes_vnni},
#else
      {multiply_bytes, nullptr},
      {multiply_token_bytes, nullptr},
#endif
  };
}
