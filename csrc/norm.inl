// The order in which squares are summed, the same on every device and for any number of threads. Include after
// criterion.inl, in the same namespace.
//
// Weight i of a chunk belongs to lane i % kNormLanes, which sums its squares, exact in double, from the first on. The
// lanes of a chunk, and then the chunks, are added halves onto halves. Reference: reference.sum_of_squares.

constexpr int kNormLanes = 512;
// Chunk c is added to the total c % kNormTotals, in order.
constexpr int kNormTotals = 256;

PINS_HD double square_of(float x) { return static_cast<double>(x) * static_cast<double>(x); }

// One level of the tree: the upper half of `width` values onto the lower one.
PINS_HD void add_halves(double* values, int width, int thread, int threads) {
  for (int i = thread; i < width / 2; i += threads) values[i] += values[i + width / 2];
}
