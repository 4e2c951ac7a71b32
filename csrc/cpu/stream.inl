// stream_ of one chunk: what an update in place moves, and nothing else.

inline uint32_t read_words(const uint32_t* __restrict words, int64_t n) {
  uint32_t seen = 0;
  for (int64_t i = 0; i < n; ++i) seen ^= words[i];
  return seen;
}

// `nothing` is 0, which the compiler does not know.
inline void rewrite_words(uint32_t* __restrict words, int64_t n, uint32_t nothing) {
  for (int64_t i = 0; i < n; ++i) words[i] ^= nothing;
}

uint32_t stream(const Streams& streams, int64_t first, int64_t count, uint32_t nothing) {
  uint32_t seen = 0;
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t n = count - at < kBlock ? count - at : kBlock;
    for (int s = 0; s < streams.size; ++s) {
      const int64_t bytes = streams.itemsize[s];
      uint32_t* words = reinterpret_cast<uint32_t*>(streams.data[s] + (first + at) * bytes);
      if (s < streams.written) {
        rewrite_words(words, n * bytes / 4, nothing);
      } else {
        seen ^= read_words(words, n * bytes / 4);
      }
    }
  }
  return seen;
}
