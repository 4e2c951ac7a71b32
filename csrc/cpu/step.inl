// One step of the optimizer, weight by weight: what every update and every boundary computes.

struct AdamW {
  using Row = AdamWRow;
  static inline __attribute__((always_inline)) float step(float p, float g, float& first, float& second,
                                                          const Row& row) {
    return adamw(p, g, first, second, row);
  }
};

struct Sgd {
  using Row = SgdRow;
  static inline __attribute__((always_inline)) float step(float p, float g, float& first, float&, const Row& row) {
    return sgd(p, g, first, row);
  }
};

// The operands of a step, at the first weight of a block.
template <class Weights, class Moments, class States>
struct Step {
  Weights p, g, q;  // q: the weight that the score reads, which is the unmasked one where it is known
  Moments first, second;
  States ipt;
  const uint32_t *random, *moment_random;
};

// p = optimizer(p, g, moments), before masking, and the window's mean with its score.
template <class Optimizer, int criterion, class Weights, class Moments, class States>
void step_part(const Step<Weights, Moments, States>& given, int64_t begin, int64_t n,
               const typename Optimizer::Row& given_row, float clip, float accepted) {
  // Copies, which no store can change.
  const Step<Weights, Moments, States> block = given;
  const typename Optimizer::Row row = given_row;
  // Each weight has its own place in every operand.
#pragma GCC ivdep
  for (int64_t i = begin; i < begin + n; ++i) {
    const uint32_t random = block.random[i], moment_random = block.moment_random[i];
    const float g = block.g.get(i) * clip;
    float m = block.first.get(i), v = block.second.get(i);
    const float stepped = Optimizer::step(block.p.get(i), g, m, v, row);
    if constexpr (criterion != kNoCriterion) {
      constexpr Criterion kind = static_cast<Criterion>(criterion);
      const float score = instant_score<kind>(block.q.get(i), stepped, g, row.lr);
      block.ipt.set(i, next_ipt<kind>(block.ipt.get(i), score, accepted), random);
    }
    block.first.set(i, m, moment_random);
    block.second.set(i, v, moment_random >> 16);
    block.p.set(i, stepped, random >> 16);
  }
}

// Bits of their own: the low half rounds the first moment, the high half the second.
inline Rounding for_moments(const Rounding& rounding) { return {rounding.key1, rounding.key0}; }

// The random bits of a block's weights, where something is rounded with them.
inline void random_blocks(const Update& args, int64_t at, int64_t n, Bits& random, Bits& moment_random) {
  if (args.params.dtype == Dtype::bfloat16 || args.ipt.dtype == Dtype::bfloat16) {
    random_block(args.run, at, n, args.rounding, random.values);
  }
  if (args.first.data && args.first.dtype != Dtype::float32 && args.first.dtype != Dtype::float16) {
    random_block(args.run, at, n, for_moments(args.rounding), moment_random.values);
  }
}

PINS_BLOCK void mask_block(Float32s block, const uint32_t* __restrict keep, int64_t n) {
  float* __restrict values = block.data;
  for (int64_t i = 0; i < n; ++i) values[i] = float_of(bits_of(values[i]) & keep[i]);
}

PINS_BLOCK void mask_block(Bfloat16s block, const uint32_t* __restrict keep, int64_t n) {
  uint16_t* __restrict values = block.data;
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<uint16_t>(values[i] & keep[i]);
}
