// sum_of_squares of one chunk.

inline void add_squares(double* __restrict lanes, const float* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) lanes[i] += square_of(values[i]);
}

double sum_of_squares(const Span& values, int64_t count) {
  static_assert(kNormLanes % kBlock == 0, "a block has one lane a weight");
  alignas(64) double lanes[kNormLanes] = {};
  Buffer buffer;
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t n = count - at < kBlock ? count - at : kBlock;
    add_squares(lanes + at % kNormLanes, load(values, at, n, buffer), n);
  }
  for (int width = kNormLanes; width > 1; width /= 2) add_halves(lanes, width, 0, 1);
  return lanes[0];
}
