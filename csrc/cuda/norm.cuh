// What one thread of a block adds up of a chunk. Host and device: the tests run this source on the CPU, thread by
// thread. Include after criterion.inl, layout.inl, norm.inl and walk.cuh, in the same namespace.

constexpr int kNormThreads = kNormLanes / 4;

// The sums of the thread's four lanes, of storage T.
template <typename T>
PINS_HD void lane_sums(const Work& work, int64_t block, int thread, double (&lanes)[4]) {
  const Chunk& chunk = work.chunks[block];
  const int64_t n = weights_of(work.places[chunk.tensor], chunk);
  const T* values = work.stream<const T>(0, chunk.tensor) + chunk.offset;
  const bool together = aligned<4>(values);
  for (int w = 0; w < 4; ++w) lanes[w] = 0.0;
  for (int64_t i = 4 * thread; i < n; i += kNormLanes) {
    Pack<T, 4> pack = {};
    if (together && i + 4 <= n) {
      pack = read<4>(values + i);
    } else {
      for (int w = 0; w < 4 && i + w < n; ++w) pack.at[w] = read<1>(values + i + w).at[0];
    }
    for (int w = 0; w < 4; ++w) lanes[w] += square_of(load(pack.at[w]));
  }
}
