// sample, count_, tie_index and pack_: order keys of a block in the L1 cache, compared 64 at a time.

template <Score score, class A, class B>
void keys_part(A a, B b, float factor, int64_t n, uint32_t* __restrict keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(score_of<score>(a.get(i), b.get(i), factor));
}

// What is read two pages after a block, into the L2 cache: by itself a CPU keeps too few lines of two streams on their
// way. Kernels of more streams do not fetch ahead: it made them slower.
inline void fetch_ahead(const Span& span, int64_t at, int64_t n) {
  constexpr int64_t kBytes = 8192, kLine = 64;
  if (!span.data || span.columns) return;
  const int64_t size = span.dtype == Dtype::float32 ? 4 : 2;
  const uintptr_t first = reinterpret_cast<uintptr_t>(span.data) + static_cast<uintptr_t>(at * size + kBytes);
  for (uintptr_t line = first; line < first + static_cast<uintptr_t>(n * size); line += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
  }
}

// Keys of a block. Scores of one operand read it twice.
template <Score score>
PINS_BLOCK void keys_block(const Scores& scores, int64_t at, int64_t n, uint32_t* keys) {
  fetch_ahead(scores.a, at, n);
  fetch_ahead(scores.b, at, n);
  const float factor = scores.factor;
  const Span& a = scores.a;
  const Span& b = scores.b.data ? scores.b : a;
  if (a.dtype == Dtype::bfloat16 && b.dtype == Dtype::bfloat16) {
    return keys_part<score>(Bfloat16s{halves(a, at)}, Bfloat16s{halves(b, at)}, factor, n, keys);
  }
  Buffer a_buffer, b_buffer;
  const Float32s first{load(a, at, n, a_buffer)};
  keys_part<score>(first, scores.b.data ? Float32s{load(b, at, n, b_buffer)} : first, factor, n, keys);
}

// To whole words with the highest key.
inline void pad_keys(int64_t n, uint32_t* keys) {
  for (int64_t i = n; i < words_of(n) * kWord; ++i) keys[i] = 0xffffffffu;
}

template <Score score>
void load_keys(const Scores& scores, int64_t at, int64_t n, uint32_t* keys) {
  keys_block<score>(scores, at, n, keys);
  pad_keys(n, keys);
}

// The keys of a whole run.
template <Score score>
void keys(const Scores& scores, uint32_t* target) {
  for (int64_t at = 0, n; at < scores.run.count; at += n) {
    n = block_size(scores.run, at);
    keys_block<score>(scores, at, n, target + at);
  }
}

// Keys inside the bracket wait here: counted in bursts, their cache misses overlap.
constexpr int64_t kPending = 1024;

struct Pending {
  uint32_t keys[kPending];
  int64_t size = 0;

  void flush(const Bracket& bracket, uint32_t* bins) {
    for (int64_t i = 0; i < size; ++i) ++bins[(keys[i] - bracket.lo) >> bracket.shift];
    size = 0;
  }

  // Of 64 keys those whose bit is set.
  void append(const uint32_t* word_keys, uint64_t inside) {
#if defined(PINS_AVX512)
    for (int i = 0; i < 4; ++i, inside >>= 16) {
      const __mmask16 mask = static_cast<__mmask16>(inside);
      // Compressed in a register: compressing into memory is microcode on some CPUs.
      _mm512_storeu_si512(keys + size, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(word_keys + 16 * i)));
      size += __builtin_popcount(mask);
    }
#else
    for (; inside; inside &= inside - 1) keys[size++] = word_keys[__builtin_ctzll(inside)];
#endif
  }
};

// Only the few keys inside the bracket reach the histogram: the rest costs two comparisons.
PINS_BLOCK void count_keys(const uint32_t* keys, int64_t n, const Bracket& bracket, Tally& tally, Pending& pending) {
  for (int64_t start = 0; start < n; start += kWord) {
    const uint32_t* word_keys = keys + start;
    const uint64_t valid = low_bits(n - start);
    const uint64_t low = below(word_keys, bracket.lo) & valid;
    const uint64_t inside = up_to(word_keys, bracket.hi) & ~low & valid;
    tally.below += __builtin_popcountll(low);
    if (bracket.lo == bracket.hi) {
      tally.bins[0] += __builtin_popcountll(inside);
      continue;
    }
    if (inside) pending.append(word_keys, inside);
    if (pending.size > kPending - 2 * kWord) pending.flush(bracket, tally.bins);
  }
}

template <Score score>
void count_block(const Scores& scores, int64_t at, int64_t n, const Bracket& bracket, Tally& tally, Pending& pending) {
  Bits block;
  load_keys<score>(scores, at, n, block.values);
  count_keys(block.values, n, bracket, tally, pending);
}

template <Score score>
void count(const Scores& scores, const Bracket& bracket, Tally& tally) {
  Pending pending;
  for (int64_t at = 0, n; at < scores.run.count; at += n) {
    n = block_size(scores.run, at);
    count_block<score>(scores, at, n, bracket, tally, pending);
  }
  pending.flush(bracket, tally.bins);
}

// The keys inside the bracket and their places in the run, at most a chunk; returns how many. Counts those below it.
template <Score score>
int64_t inside(const Scores& scores, const Bracket& bracket, uint32_t* keys, uint16_t* places, int64_t& below_it) {
  static_assert(kChunk <= 1 << 16, "a place in a chunk has 16 bits");
  Bits block;
  int64_t size = 0;
  for (int64_t at = 0, n; at < scores.run.count; at += n) {
    n = block_size(scores.run, at);
    load_keys<score>(scores, at, n, block.values);
    for (int64_t start = 0; start < n; start += kWord) {
      const uint32_t* word_keys = block.values + start;
      const uint64_t valid = low_bits(n - start);
      const uint64_t low = below(word_keys, bracket.lo) & valid;
      below_it += __builtin_popcountll(low);
      for (uint64_t found = up_to(word_keys, bracket.hi) & ~low & valid; found; found &= found - 1) {
        const int i = __builtin_ctzll(found);
        keys[size] = word_keys[i];
        places[size++] = static_cast<uint16_t>(at + start + i);
      }
    }
  }
  return size;
}

// Bit = keep. Pruned: key below the threshold's, or equal to it and before the tie index.
template <Score score>
void pack(const Scores& scores, const Pack& args, PackStats& stats) {
  Bits block;
  for (int64_t at = 0, n; at < scores.run.count; at += n) {
    n = block_size(scores.run, at);
    load_keys<score>(scores, at, n, block.values);
    for (int64_t start = 0; start < n; start += kWord) {
      const uint32_t* word_keys = block.values + start;
      const uint64_t valid = low_bits(n - start);
      const int64_t ties = args.ties - (at + start);
      uint64_t pruned = below(word_keys, args.key);
      if (ties > 0) pruned |= up_to(word_keys, args.key) & low_bits(ties);
      const uint64_t keep = ~pruned & valid;
      uint8_t* bytes = args.mask + (at + start) / 8;
      stats.kept += __builtin_popcountll(keep);
      stats.flipped += __builtin_popcountll(keep ^ (load_word(bytes) & valid));
      stats.nan += __builtin_popcountll(~below(word_keys, 0xffffffffu) & valid);
      store_word(bytes, keep);
    }
  }
}

// Bit = keep, of the weights of a block beside the bracket. Those inside are kept for now, and found: their keys and
// places in the run, and whether they were kept before. mask: the run's.
PINS_BLOCK void pack_around_keys(const uint32_t* keys, int64_t at, int64_t n, const Bracket& bracket, uint8_t* mask,
                                 PackStats& stats, Inside& found, int64_t& size) {
  for (int64_t start = 0; start < n; start += kWord) {
    const uint32_t* word_keys = keys + start;
    const uint64_t valid = low_bits(n - start);
    const uint64_t low = below(word_keys, bracket.lo);
    const uint64_t keep = ~low & valid;
    uint8_t* bytes = mask + (at + start) / 8;
    const uint64_t before = load_word(bytes);
    stats.kept += __builtin_popcountll(keep);
    stats.flipped += __builtin_popcountll(keep ^ (before & valid));
    stats.nan += __builtin_popcountll(~below(word_keys, 0xffffffffu) & valid);
    store_word(bytes, keep);
    for (uint64_t rest = up_to(word_keys, bracket.hi) & keep; rest; rest &= rest - 1) {
      const int i = __builtin_ctzll(rest);
      found.keys[size] = word_keys[i];
      found.kept[size] = static_cast<uint8_t>(before >> i & 1);
      found.places[size++] = static_cast<uint16_t>(at + start + i);
    }
  }
}

template <Score score>
void pack_around_block(const Scores& scores, int64_t at, int64_t n, const Bracket& bracket, uint8_t* mask,
                       PackStats& stats, Inside& found, int64_t& size) {
  Bits block;
  load_keys<score>(scores, at, n, block.values);
  pack_around_keys(block.values, at, n, bracket, mask, stats, found, size);
}

// Returns how many are found.
template <Score score>
int64_t pack_around(const Scores& scores, const Bracket& bracket, uint8_t* mask, PackStats& stats, Inside& found) {
  int64_t size = 0;
  for (int64_t at = 0, n; at < scores.run.count; at += n) {
    n = block_size(scores.run, at);
    pack_around_block<score>(scores, at, n, bracket, mask, stats, found, size);
  }
  return size;
}
