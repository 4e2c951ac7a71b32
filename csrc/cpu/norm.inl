// sum_of_squares of one chunk.

template <class Values>
void add_squares(double* __restrict lanes, Values values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) lanes[i] += square_of(values.get(i));
}

template <class Values>
double sum_of_squares_run(const Span& span, int64_t count) {
  static_assert(kNormLanes % kBlock == 0, "a block has one lane a weight");
  alignas(64) double lanes[kNormLanes] = {};
  Buffer buffer;
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t n = count - at < kBlock ? count - at : kBlock;
    const Values values = Values::take(span, at, n, buffer);
    add_squares(lanes + at % kNormLanes, values, n);
  }
  for (int width = kNormLanes; width > 1; width /= 2) add_halves(lanes, width, 0, 1);
  return lanes[0];
}

double sum_of_squares(const Span& span, int64_t count) {
  return span.dtype == Dtype::bfloat16 ? sum_of_squares_run<Bfloat16s>(span, count)
                                       : sum_of_squares_run<Float32s>(span, count);
}
