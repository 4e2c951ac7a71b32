// Sparse × dense: the loops over the slices of a block, and tiles of tokens in and out. See sparse.h.

// ---- vectors ------------------------------------------------------------------------------------------------------

#if defined(PINS_AVX512)
using Floats = __m512;
constexpr int kLanes = 16;
constexpr int kAccumulators = 16;
inline Floats load_floats(const float* p) { return _mm512_load_ps(p); }
inline void store_floats(float* p, Floats a) { _mm512_store_ps(p, a); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(PINS_AVX2)
using Floats = __m256;
constexpr int kLanes = 8;
constexpr int kAccumulators = 8;
inline Floats load_floats(const float* p) { return _mm256_load_ps(p); }
inline void store_floats(float* p, Floats a) { _mm256_store_ps(p, a); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Floats __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kAccumulators = 8;
inline Floats load_floats(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store_floats(float* p, Floats a) { *reinterpret_cast<Floats*>(p) = a; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

inline float float_value(float value) { return value; }
inline float float_value(uint16_t value) { return float_of_bf16(value); }

#if defined(PINS_AVX512)
// Sixteen, eight or four weights in the lower lanes.
inline __m512 sixteen(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 eight(const float* p) { return _mm512_castps256_ps512(_mm256_loadu_ps(p)); }
inline __m512 four(const float* p) { return _mm512_castps128_ps512(_mm_loadu_ps(p)); }
inline __m512 floats_of_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 sixteen(const uint16_t* p) {
  return floats_of_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 eight(const uint16_t* p) {
  return floats_of_bf16(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline __m512 four(const uint16_t* p) {
  return floats_of_bf16(_mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#endif

// One weight for each of `kRows` rows, broadcast. With AVX-512 they are loaded at once and permuted: loads are what the
// loop waits for, two a cycle, and a broadcast from memory is one.
template <class Value, int kRows>
struct Weights {
#if defined(PINS_AVX512)
  __m512 all;
  explicit Weights(const Value* p) : all(kRows == 8 ? eight(p) : four(p)) {
    static_assert(kRows == 8 || kRows == 4, "a vector of weights");
  }
  Floats operator[](int row) const { return _mm512_permutexvar_ps(_mm512_set1_epi32(row), all); }
#else
  const Value* p;
  explicit Weights(const Value* weights) : p(weights) {}
  Floats operator[](int row) const {
    const float weight = float_value(p[row]);
#if defined(PINS_AVX2)
    return _mm256_set1_ps(weight);
#else
    return Floats{weight, weight, weight, weight};
#endif
  }
#endif
};

// The columns of `kRows` rows in one load.
template <int kRows>
inline uint64_t columns_of(const uint8_t* p) {
  uint64_t columns = 0;
  __builtin_memcpy(&columns, p, kRows);
  // A load per byte is what gcc would make of it.
  asm("" : "+r"(columns));
  return columns;
}

// ---- multiply -----------------------------------------------------------------------------------------------------

// `kRows` rows of a slice, from `row` on, kTile tokens: their accumulators stay in registers.
template <class Value, int kTile, int kRows>
inline __attribute__((always_inline)) void multiply_rows(const Value* values, const uint8_t* columns, int64_t count,
                                                         const uint8_t* rows, const float* x, float* y) {
  constexpr int kVectors = kTile / kLanes;
  Floats sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load_floats(y + rows[r] * kTile + v * kLanes);
  }
  for (int64_t j = 0; j < count; ++j, values += kSliceRows, columns += kSliceRows) {
    const Weights<Value, kRows> weights(values);
    const uint64_t all = columns_of<kRows>(columns);
    for (int r = 0; r < kRows; ++r) {
      const float* tokens = x + ((all >> (8 * r)) & 255) * kTile;
      const Floats weight = weights[r];
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiply_add(weight, load_floats(tokens + v * kLanes), sums[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store_floats(y + rows[r] * kTile + v * kLanes, sums[r][v]);
  }
}

template <class Value, int kTile>
void multiply(const SparseBlock& block, const float* x, float* y) {
  constexpr int kFit = kAccumulators * kLanes / kTile;
  constexpr int kRows = kFit > 8 ? 8 : kFit;
  const Value* values = static_cast<const Value*>(block.values);
  const uint8_t* columns = block.columns;
  for (int64_t s = 0; s < block.slices; ++s) {
    const int64_t count = block.counts[s];
    for (int64_t row = 0; row < kSliceRows; row += kRows) {
      multiply_rows<Value, kTile, kRows>(values + row, columns + row, count, block.rows + s * kSliceRows + row, x, y);
    }
    values += count * kSliceRows;
    columns += count * kSliceRows;
  }
}

#if defined(PINS_AVX512)
// x of 256 columns in 16 registers, looked up by column: eight permutations of 32 entries, then a tree of blends over
// bits 5 to 7. A gather takes a load for each element.
struct Table {
  __m512 x[16];

  explicit Table(const float* p) {
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(p + 16 * i);
  }

  __m512 operator[](__m512i column) const {
    __m512 found[8];
    for (int i = 0; i < 8; ++i) found[i] = _mm512_permutex2var_ps(x[2 * i], column, x[2 * i + 1]);
    const __mmask16 bit5 = _mm512_test_epi32_mask(column, _mm512_set1_epi32(32));
    const __mmask16 bit6 = _mm512_test_epi32_mask(column, _mm512_set1_epi32(64));
    const __mmask16 bit7 = _mm512_test_epi32_mask(column, _mm512_set1_epi32(128));
    for (int i = 0; i < 4; ++i) found[i] = _mm512_mask_blend_ps(bit5, found[2 * i], found[2 * i + 1]);
    for (int i = 0; i < 2; ++i) found[i] = _mm512_mask_blend_ps(bit6, found[2 * i], found[2 * i + 1]);
    return _mm512_mask_blend_ps(bit7, found[0], found[1]);
  }
};
#endif

// The 16 rows of a slice are the lanes: no sum across them.
template <class Value>
void multiply_token(const SparseBlock& block, const float* x, float* y) {
  const Value* values = static_cast<const Value*>(block.values);
  const uint8_t* columns = block.columns;
#if defined(PINS_AVX512)
  const Table table(x);
#endif
  for (int64_t s = 0; s < block.slices; ++s) {
    alignas(64) float sums[kSliceRows];
#if defined(PINS_AVX512)
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < block.counts[s]; ++j, values += kSliceRows, columns += kSliceRows) {
      const __m512i column = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns)));
      sum = _mm512_fmadd_ps(sixteen(values), table[column], sum);
    }
    _mm512_store_ps(sums, sum);
#else
    for (int64_t i = 0; i < kSliceRows; ++i) sums[i] = 0.0f;
    for (int64_t j = 0; j < block.counts[s]; ++j, values += kSliceRows, columns += kSliceRows) {
      for (int64_t i = 0; i < kSliceRows; ++i) sums[i] += float_value(values[i]) * x[columns[i]];
    }
#endif
    const uint8_t* rows = block.rows + s * kSliceRows;
    for (int64_t i = 0; i < kSliceRows; ++i) y[rows[i]] += sums[i];
  }
}

// ---- tiles --------------------------------------------------------------------------------------------------------

constexpr int64_t kSquare = 16;

struct alignas(64) Square {
  float at[kSquare][kSquare];
};

#if defined(PINS_AVX512)
inline __m512 low_pairs(__m512 p, __m512 q) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
}
inline __m512 high_pairs(__m512 p, __m512 q) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
}
#endif

// to[j][i] = from[i][j] for 16 × 16 elements of two matrices with these strides.
PINS_BLOCK void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(PINS_AVX512)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = low_pairs(b[i], b[i + 2]);
    a[i + 1] = high_pairs(b[i], b[i + 2]);
    a[i + 2] = low_pairs(b[i + 1], b[i + 3]);
    a[i + 3] = high_pairs(b[i + 1], b[i + 3]);
  }
  // Rows i to i + 3 of column j are now the j / 4-th quarter of a[i + j % 4].
  for (int j = 0; j < 4; ++j) {
    const __m512 p = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), q = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 r = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd), s = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(p, q, 0x88));
    _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(r, s, 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(p, q, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(r, s, 0xdd));
  }
#else
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  typedef int Order __attribute__((vector_size(16)));
  for (int64_t i = 0; i < kSquare; i += 4) {
    for (int64_t j = 0; j < kSquare; j += 4) {
      Four a[4];
      for (int k = 0; k < 4; ++k) a[k] = *reinterpret_cast<const Four*>(from + (i + k) * from_stride + j);
      const Four p = __builtin_shuffle(a[0], a[1], Order{0, 4, 1, 5});
      const Four q = __builtin_shuffle(a[2], a[3], Order{0, 4, 1, 5});
      const Four r = __builtin_shuffle(a[0], a[1], Order{2, 6, 3, 7});
      const Four s = __builtin_shuffle(a[2], a[3], Order{2, 6, 3, 7});
      *reinterpret_cast<Four*>(to + j * to_stride + i) = __builtin_shuffle(p, q, Order{0, 1, 4, 5});
      *reinterpret_cast<Four*>(to + (j + 1) * to_stride + i) = __builtin_shuffle(p, q, Order{2, 3, 6, 7});
      *reinterpret_cast<Four*>(to + (j + 2) * to_stride + i) = __builtin_shuffle(r, s, Order{0, 1, 4, 5});
      *reinterpret_cast<Four*>(to + (j + 3) * to_stride + i) = __builtin_shuffle(r, s, Order{2, 3, 6, 7});
    }
  }
#endif
}

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline void floats_of(const void* data, Dtype dtype, int64_t n, float* __restrict to) {
  const uint16_t* halves = static_cast<const uint16_t*>(data);
  if (dtype == Dtype::float32) {
    __builtin_memcpy(to, data, n * sizeof(float));
  } else if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of_bf16(halves[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of_fp16(halves[i]);
  }
}

inline void put_floats(const float* __restrict from, Dtype dtype, int64_t n, void* data) {
  uint16_t* __restrict halves = static_cast<uint16_t*>(data);
  if (dtype == Dtype::float32) {
    __builtin_memcpy(data, from, n * sizeof(float));
  } else if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < n; ++i) halves[i] = bf16_of(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) halves[i] = fp16_of(from[i]);
  }
}

template <int kTile>
void load_tile(const LoadTile& to) {
  const int64_t padded = (to.columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns;
  const char* x = static_cast<const char*>(to.x);
  Square square;
  for (int64_t c = 0; c < padded; c += kSquare) {
    const int64_t width = to.columns - c < kSquare ? to.columns - c : kSquare;
    for (int64_t t = 0; t < kTile; t += kSquare) {
      const int64_t height = to.tokens - t < kSquare ? to.tokens - t : kSquare;
      const char* from = x + (t * to.stride + c) * element_size(to.dtype);
      float* target = to.tile + c * kTile + t;
      if (to.dtype == Dtype::float32 && width == kSquare && height == kSquare) {
        transpose(reinterpret_cast<const float*>(from), to.stride, target, kTile);
        continue;
      }
      if (width < kSquare || height < kSquare) __builtin_memset(&square, 0, sizeof(square));
      for (int64_t i = 0; width > 0 && i < height; ++i) {
        floats_of(from + i * to.stride * element_size(to.dtype), to.dtype, width, square.at[i]);
      }
      transpose(square.at[0], kSquare, target, kTile);
    }
  }
}

// By 16 tokens: whole rows of the chunk leave at once, since lines of the output may be a multiple of 4 KB apart.
template <int kTile>
void store_tile(const StoreTile& from) {
  char* out = static_cast<char*>(from.out);
  alignas(64) float tokens[kSquare][kBlockRows];
  for (int64_t t = 0; t < from.tokens; t += kSquare) {
    for (int64_t r = 0; r < from.rows; r += kSquare) {
      transpose(from.tile + r * kTile + t, kTile, &tokens[0][r], kBlockRows);
    }
    const int64_t height = from.tokens - t < kSquare ? from.tokens - t : kSquare;
    for (int64_t i = 0; i < height; ++i) {
      put_floats(tokens[i], from.dtype, from.rows, out + (t + i) * from.stride * element_size(from.dtype));
    }
  }
}

inline void load_token(const LoadTile& to) {
  const int64_t padded = (to.columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns;
  floats_of(to.x, to.dtype, to.columns, to.tile);
  for (int64_t c = to.columns; c < padded; ++c) to.tile[c] = 0.0f;
}

inline void store_token(const StoreTile& from) { put_floats(from.tile, from.dtype, from.rows, from.out); }
