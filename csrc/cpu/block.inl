// Blocks of a chunk, small enough that all operands of one stay in the L1 cache. float32 is used in place, and so is
// bfloat16 in the combinations that loops are compiled for; all else is converted into buffers of float32.

// 256 weights. Measured on bfloat16, where an operand's block is loaded as a whole before the formula runs: 128 to 256
// keep several operands' cache misses in flight, 512 and more do not (masked AdamW with ipt: 1.39 against 1.94 ns).
constexpr int64_t kBlock = 256;
// Keys are compared 64 at a time: one word of a mask.
constexpr int64_t kWord = 64;
static_assert(kBlock % kWord == 0 && kChunk % kBlock == 0, "a block is whole words, a chunk whole blocks");

// A call per block costs nothing; inlined, these loops would be compiled a hundred times.
#define PINS_BLOCK __attribute__((noinline)) inline

struct alignas(64) Buffer {
  float values[kBlock];
};

struct alignas(64) Bits {
  uint32_t values[kBlock];
};

inline int64_t block_size(const Run& run, int64_t at) {
  if (run.count - at <= kBlock) return run.count - at;
  if (run.columns % kGroup == 0) return kBlock;
  const int64_t column = (run.offset + at + kBlock) % run.columns;
  return kBlock - column % kGroup;
}

// ---- operands ---------------------------------------------------------------------------------------------------

inline float* in_place(const Span& span, int64_t at) { return static_cast<float*>(span.data) + at; }
inline uint16_t* halves(const Span& span, int64_t at) { return static_cast<uint16_t*>(span.data) + at; }

// f(first weight, one past the last, codes of the group, how many of them lie before) for every group of a block.
template <class F>
inline __attribute__((always_inline)) void for_each_group(const Span& span, int64_t at, int64_t n, const F& f) {
  int64_t column = span.column + at;
  uint8_t* codes = static_cast<uint8_t*>(span.data) - span.column / kGroup * kGroupBytes;
  codes += (column / span.columns * groups_of(span.columns) + column % span.columns / kGroup) * kGroupBytes;
  column %= span.columns;
  for (int64_t begin = 0; begin < n; codes += kGroupBytes) {
    const int64_t before = column % kGroup;
    int64_t size = span.columns - column < kGroup - before ? span.columns - column : kGroup - before;
    size = n - begin < size ? n - begin : size;
    f(begin, begin + size, codes, before);
    begin += size;
    column = column + size == span.columns ? 0 : column + size;
  }
}

PINS_BLOCK void load_codes(const Span& span, int64_t at, int64_t n, float* __restrict target) {
  for_each_group(span, at, n, [&](int64_t begin, int64_t end, const uint8_t* group, int64_t before) {
    uint16_t bits;
    __builtin_memcpy(&bits, group + kGroup, 2);
    const float scale = float_of_bf16(bits);
    const uint8_t* __restrict codes = group + before;
    const int8_t* __restrict signed_codes = reinterpret_cast<const int8_t*>(codes);
    if (span.dtype == Dtype::code8) {
      for (int64_t i = 0; i < end - begin; ++i) target[begin + i] = float_of_code(codes[i], scale);
    } else {
      for (int64_t i = 0; i < end - begin; ++i) target[begin + i] = float_of_signed_code(signed_codes[i], scale);
    }
  });
}

// The bits of what cannot be stored: neither a number nor, in a state that has no sign, zero or above.
inline bool is_odd(float x, bool has_sign) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7fffffffu) >= 0x7f800000u || (!has_sign && bits > 0x80000000u);
}

// Whole groups. To nearest without random bits. Those of a weight, 16 from `shift` on, make 2^-16 of a level each.
template <bool has_sign, bool vanishes = false>
PINS_BLOCK void store_codes(const Span& span, int64_t at, int64_t n, const float* values, const uint32_t* random,
                            int shift) {
  Buffer magnitudes, parts;
  const float* __restrict source = values;
  float* __restrict magnitude = magnitudes.values;
  float* __restrict part = parts.values;
  for (int64_t i = 0; i < n; ++i) {
    const float x = is_odd(source[i], has_sign) ? 0.0f : abs_of(source[i]);
    magnitude[i] = has_sign ? x : __builtin_sqrtf(x);
    part[i] = 0.5f;
  }
  if (random) {
    for (int64_t i = 0; i < n; ++i) part[i] = static_cast<float>((random[i] >> shift) & 0xffffu) * 0x1p-16f;
  }
  for_each_group(span, at, n, [&](int64_t begin, int64_t end, uint8_t* __restrict codes, int64_t) {
    // Of numbers that are not negative the bits have their order; and integers are compared many at a time.
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = bits_of(magnitude[i]);
      largest = bits > largest ? bits : largest;
    }
    const uint16_t stored = bf16_above(float_of(largest));
    __builtin_memcpy(codes + kGroup, &stored, 2);
    const float scale = float_of_bf16(stored);
    for (int64_t i = begin; i < end; ++i) {
      const float x = source[i];
      const int code = has_sign ? signed_code_of(x, magnitude[i], scale, part[i])
                                : code_of(x, magnitude[i], scale, part[i], vanishes);
      codes[i - begin] = static_cast<uint8_t>(is_odd(x, has_sign) ? (has_sign ? kSignedNanCode : kNanCode) : code);
    }
  });
}

// The block of an operand in fp32: in place, or converted into `buffer`. An operand that is not wanted is `buffer`.
PINS_BLOCK float* load(const Span& span, int64_t at, int64_t n, Buffer& buffer) {
  if (!span.data) return buffer.values;
  if (span.dtype == Dtype::float32) return in_place(span, at);
  if (span.columns) {
    load_codes(span, at, n, buffer.values);
    return buffer.values;
  }
  const uint16_t* __restrict source = halves(span, at);
  float* __restrict target = buffer.values;
  if (span.dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < n; ++i) target[i] = float_of_bf16(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = float_of_fp16(source[i]);
  }
  return target;
}

// Rounds to nearest even into 16-bit storage, to the nearest code into 8-bit storage. float32 values are already where
// they belong if they were loaded there.
PINS_BLOCK void store(const Span& span, int64_t at, int64_t n, const float* values) {
  if (!span.data) return;
  if (span.dtype == Dtype::float32) {
    if (values != in_place(span, at)) __builtin_memcpy(in_place(span, at), values, n * sizeof(float));
    return;
  }
  if (span.dtype == Dtype::code8) return store_codes<false>(span, at, n, values, nullptr, 0);
  if (span.dtype == Dtype::signed8) return store_codes<true>(span, at, n, values, nullptr, 0);
  const float* __restrict source = values;
  uint16_t* __restrict target = halves(span, at);
  if (span.dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < n; ++i) target[i] = bf16_of(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = fp16_of(source[i]);
  }
}

// Rounds stochastically into bfloat16; `shift` chooses the half of the random bits. Other storage as `store`.
PINS_BLOCK void store_state(const Span& span, int64_t at, int64_t n, const float* values, const uint32_t* random,
                            int shift) {
  if (!span.data || span.dtype != Dtype::bfloat16) return store(span, at, n, values);
  const float* __restrict source = values;
  const uint32_t* __restrict bits = random;
  uint16_t* __restrict target = halves(span, at);
  for (int64_t i = 0; i < n; ++i) target[i] = bf16_of(source[i], bits[i] >> shift);
}

// What `store_state` would store, in fp32.
PINS_BLOCK void round_state(const Span& span, int64_t n, float* values, const uint32_t* random, int shift) {
  if (span.dtype != Dtype::bfloat16) return;
  float* __restrict target = values;
  const uint32_t* __restrict bits = random;
  for (int64_t i = 0; i < n; ++i) target[i] = float_of_bf16(bf16_of(target[i], bits[i] >> shift));
}

// A moment: stochastically into 8-bit storage too. A decay of .001 is far below a step of its codes.
PINS_BLOCK void store_moment(const Span& span, int64_t at, int64_t n, const float* values, const uint32_t* random,
                             int shift) {
  if (span.data && span.dtype == Dtype::code8) return store_codes<false>(span, at, n, values, random, shift);
  if (span.data && span.dtype == Dtype::signed8) return store_codes<true>(span, at, n, values, random, shift);
  store_state(span, at, n, values, random, shift);
}

// A running average: by random bits into 8-bit storage too, and down to zero, or what is small beside the largest of
// its group would stay above it for ever.
PINS_BLOCK void store_average(const Span& span, int64_t at, int64_t n, const float* values, const uint32_t* random,
                              int shift) {
  if (span.data && span.dtype == Dtype::code8) return store_codes<false, true>(span, at, n, values, random, shift);
  store_state(span, at, n, values, random, shift);
}

// Random bits of a block by global index, in pieces that are consecutive and have one high word.
PINS_BLOCK void random_block(const Run& run, int64_t at, int64_t n, const Rounding& rounding,
                             uint32_t* __restrict bits) {
  const Place& place = *reinterpret_cast<const Place*>(run.place);
  const uint32_t key0 = rounding.key0, key1 = rounding.key1;
  // The divisions of a part's index took half as long as the bits of a block.
  const bool whole = is_whole(place);
  int64_t local = run.offset + at;
  while (n > 0) {
    const uint64_t index = static_cast<uint64_t>(whole ? place.base + local : global_index(place, local));
    const uint32_t low = static_cast<uint32_t>(index);
    const uint32_t high = static_cast<uint32_t>(index >> 32);
    const int64_t to_next_high = static_cast<int64_t>((uint64_t{1} << 32) - low);
    int64_t piece = whole ? n : run_length(place, local);
    piece = piece < n ? piece : n;
    piece = piece < to_next_high ? piece : to_next_high;
    for (int64_t i = 0; i < piece; ++i) {
      bits[i] = random_bits(high, low + static_cast<uint32_t>(i), key0, key1);
    }
    bits += piece;
    local += piece;
    n -= piece;
  }
}

// Bits that all weights of a fold have in common: their order stays, and a decay below a step of codes is not lost.
inline void shared_block(int64_t n, const Rounding& rounding, uint32_t* bits) {
  for (int64_t i = 0; i < n; ++i) bits[i] = rounding.key0;
}

// g / scale, in place where there is nothing to do: dividing by one changes no bit.
PINS_BLOCK float* load_gradient(const Span& span, int64_t at, int64_t n, float scale, Buffer& buffer) {
  float* source = load(span, at, n, buffer);
  if (scale == 1.0f) return source;
  for (int64_t i = 0; i < n; ++i) buffer.values[i] = source[i] / scale;
  return buffer.values;
}

// ---- operands of a loop -----------------------------------------------------------------------------------------

// One weight at a time. float32, in place or converted into a buffer: `take` and `give` load and store a block.
struct Float32s {
  static constexpr bool kConverts = true;
  float* data;
  PINS_HD float get(int64_t i) const { return data[i]; }
  PINS_HD void set(int64_t i, float x, uint32_t) const { data[i] = x; }
  // What `set` stores.
  static PINS_HD float stored(float x, uint32_t) { return x; }

  static Float32s take(const Span& span, int64_t at, int64_t n, Buffer& buffer) { return {load(span, at, n, buffer)}; }
  static Float32s take_gradient(const Span& span, int64_t at, int64_t n, float scale, Buffer& buffer) {
    return {load_gradient(span, at, n, scale, buffer)};
  }
  void give(const Span& span, int64_t at, int64_t n, const uint32_t* random, int shift) const {
    store_state(span, at, n, data, random, shift);
  }
  void give_moment(const Span& span, int64_t at, int64_t n, const uint32_t* random, int shift) const {
    store_moment(span, at, n, data, random, shift);
  }
  void give_average(const Span& span, int64_t at, int64_t n, const uint32_t* random, int shift) const {
    store_average(span, at, n, data, random, shift);
  }
};

// bfloat16 in place, converted and rounded stochastically where a loop computes: conversions in passes of their own
// took longer than the formula. An operand that is not wanted lies in the buffer.
struct Bfloat16s {
  static constexpr bool kConverts = false;
  uint16_t* data;
  PINS_HD float get(int64_t i) const { return float_of_bf16(data[i]); }
  // By the lower 16 random bits.
  PINS_HD void set(int64_t i, float x, uint32_t random) const { data[i] = bf16_of(x, random); }
  static PINS_HD float stored(float x, uint32_t random) { return float_of_bf16(bf16_of(x, random)); }

  static Bfloat16s take(const Span& span, int64_t at, int64_t, Buffer& buffer) {
    return {span.data ? halves(span, at) : reinterpret_cast<uint16_t*>(buffer.values)};
  }
  // Of a scale of 1.
  static Bfloat16s take_gradient(const Span& span, int64_t at, int64_t n, float, Buffer& buffer) {
    return take(span, at, n, buffer);
  }
  void give(const Span&, int64_t, int64_t, const uint32_t*, int) const {}
  void give_moment(const Span&, int64_t, int64_t, const uint32_t*, int) const {}
  void give_average(const Span&, int64_t, int64_t, const uint32_t*, int) const {}
};

// ---- masks and comparisons --------------------------------------------------------------------------------------

inline int64_t words_of(int64_t n) { return (n + kWord - 1) / kWord; }

// The lowest n bits, n clamped to [0, 64].
inline uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : (uint64_t{1} << n) - 1; }

inline uint64_t load_word(const uint8_t* bytes) {
  uint64_t word;
  __builtin_memcpy(&word, bytes, 8);
  return word;
}

inline void store_word(uint8_t* bytes, uint64_t word) { __builtin_memcpy(bytes, &word, 8); }

// Bit i of the result: keys[i] < threshold. gcc 12 does not define __AVX2__ after #pragma GCC target: the units say it.
inline uint64_t below(const uint32_t* keys, uint32_t threshold) {
  uint64_t word = 0;
#if defined(PINS_AVX512)
  const __m512i t = _mm512_set1_epi32(static_cast<int>(threshold));
  for (int i = 0; i < 4; ++i) {
    word |= static_cast<uint64_t>(_mm512_cmplt_epu32_mask(_mm512_loadu_si512(keys + 16 * i), t)) << (16 * i);
  }
#elif defined(PINS_AVX2)
  // No unsigned comparison before AVX-512: shift both sides by 2^31.
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i t = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(threshold)), sign);
  for (int i = 0; i < 8; ++i) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * i));
    const __m256i less = _mm256_cmpgt_epi32(t, _mm256_xor_si256(k, sign));
    word |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(less)))) << (8 * i);
  }
#else
  for (int i = 0; i < kWord; ++i) word |= static_cast<uint64_t>(keys[i] < threshold) << i;
#endif
  return word;
}

// Bit i of the result: keys[i] <= threshold.
inline uint64_t up_to(const uint32_t* keys, uint32_t threshold) {
  return threshold == 0xffffffffu ? ~uint64_t{0} : below(keys, threshold + 1);
}

// Where the bits of n weights are from this one on, in whole words of 32: in place, where words begin with it, or in
// `buffer`: other words could reach past the mask's end.
inline const uint8_t* bits_from(const uint8_t* mask, int64_t first, int64_t n, Bits& buffer) {
  if (first % 32 == 0) return mask + first / 8;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(buffer.values);
  __builtin_memset(bytes, 0, kBlock / 8);
  for (int64_t i = 0; i < n; ++i) {
    bytes[i / 8] |= static_cast<uint8_t>((mask[(first + i) / 8] >> (first + i) % 8 & 1) << i % 8);
  }
  return bytes;
}

// Mask bits from one on to one all-ones or all-zeros word per weight; whole words are read.
PINS_BLOCK void expand_mask(const uint8_t* mask, int64_t first, int64_t n, uint32_t* keep) {
  if (first % 32 != 0) {
    for (int64_t i = 0; i < n; ++i) keep[i] = (mask[(first + i) / 8] >> (first + i) % 8 & 1) ? 0xffffffffu : 0u;
    return;
  }
  mask += first / 8;
  for (int64_t start = 0; start < n; start += 32) {
    uint32_t bits;
    __builtin_memcpy(&bits, mask + start / 8, 4);
    for (int i = 0; i < 32; ++i) keep[start + i] = (bits & (uint32_t{1} << i)) ? 0xffffffffu : 0u;
  }
}
