// One step of the optimizer, weight by weight: what every update and every boundary computes.

struct QuickAdamWRow : AdamWRow {
  Divisor bias;
  explicit QuickAdamWRow(const AdamWRow& row) : AdamWRow(row), bias(row.bias_sqrt) {}
};

// A root is zero, between 2^-75 and 2^64, infinite or NaN.
PINS_HD float unbiased(float root, const QuickAdamWRow& row) {
  return root < __builtin_inff() ? quotient(root, row.bias) : root;
}

struct AdamW {
  using Row = AdamWRow;
  using QuickRow = QuickAdamWRow;
  template <class AnyRow>
  static inline __attribute__((always_inline)) float step(float p, float g, float& first, float& second,
                                                          const AnyRow& row) {
    return adamw(p, g, first, second, row);
  }
};

struct Sgd {
  using Row = SgdRow;
  using QuickRow = SgdRow;
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
  const uint8_t* keep;  // bit = keep
};

// The averages that a pass over a boundary chooses masks by, or takes the window into.
template <class States>
struct Averages {
  States exp_avg_ipt, exp_avg_unc;
  const uint32_t* random;
  uint32_t *before, *after;  // order keys of the scores that choose, and of the new ones
};

struct StepScalars {
  float clip, accepted;
  uint32_t lowest;  // what scores below it is pruned, where masks are chosen
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
};

// Whether weights are masked where they are computed. Without registers of bits a pass of its own takes no longer, and
// a step without masks less.
#if defined(PINS_AVX512)
constexpr bool kMasksInLoop = true;
#else
constexpr bool kMasksInLoop = false;
#endif

// Of at most 32 weights, more where masks are chosen: p = keep ? optimizer(p, g, moments) : 0, and the window's mean
// with the score of what is stepped. `chooses`: by the averages as they are; `folds`: the mean stays out of memory, the
// averages take it in.
template <class Optimizer, int criterion, bool chooses, bool folds, class Weights, class Moments, class States,
          class Row>
inline __attribute__((always_inline)) void step_word(const Step<Weights, Moments, States>& block,
                                                     const Averages<States>& averages, int64_t begin, int64_t n,
                                                     const Row& row, const StepScalars& scalars) {
  uint32_t keep;
  __builtin_memcpy(&keep, block.keep + begin / 8, 4);
  // Each weight has its own place in every operand.
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = begin + j;
    const uint32_t random = block.random[i], moment_random = block.moment_random[i];
    const float g = block.g.get(i) * scalars.clip;
    float m = block.first.get(i), v = block.second.get(i);
    const float stepped = Optimizer::step(block.p.get(i), g, m, v, row);
    block.first.set(i, m, moment_random);
    block.second.set(i, v, moment_random >> 16);
    bool pruned = false;
    if constexpr (kMasksInLoop && !chooses) pruned = !(keep & (uint32_t{1} << j));
    float old_mean = 0.0f, old_uncertain = 0.0f;
    if constexpr (chooses || folds) {
      old_mean = averages.exp_avg_ipt.get(i);
      old_uncertain = averages.exp_avg_unc.get(i);
    }
    if constexpr (chooses) {
      const uint32_t key = order_key(score_of<Score::product>(old_mean, old_uncertain, 1.0f));
      averages.before[i] = key;
      pruned = key < scalars.lowest;
    }
    if constexpr (criterion != kNoCriterion) {
      constexpr Criterion kind = static_cast<Criterion>(criterion);
      const float score = instant_score<kind>(block.q.get(i), stepped, g, row.lr);
      // A pass that does both is a window of its own.
      constexpr bool whole = chooses && folds;
      const float ipt = whole ? score : next_ipt<kind>(block.ipt.get(i), score, scalars.accepted);
      if constexpr (folds) {
        const uint32_t fold_random = averages.random[i];
        const float stored = States::stored(ipt, random);
        const float mean = smooth_ipt(old_mean, stored, scalars.beta1, scalars.one_minus_beta1);
        const float uncertain = smooth_unc(old_uncertain, stored, mean, scalars.beta2, scalars.one_minus_beta2);
        averages.exp_avg_ipt.set(i, mean, fold_random);
        averages.exp_avg_unc.set(i, uncertain, fold_random >> 16);
        averages.after[i] = order_key(score_of<Score::product>(States::stored(mean, fold_random),
                                                               States::stored(uncertain, fold_random >> 16), 1.0f));
      } else {
        block.ipt.set(i, ipt, random);
      }
    }
    block.p.set(i, pruned ? 0.0f : stepped, random >> 16);
  }
}

template <class Optimizer, int criterion, bool chooses, bool folds, class Weights, class Moments, class States,
          class Row>
void step_block(const Step<Weights, Moments, States>& given, const Averages<States>& given_averages, int64_t n,
                const Row& given_row, const StepScalars& given_scalars) {
  // Copies, which no store can change.
  const Step<Weights, Moments, States> block = given;
  const Averages<States> averages = given_averages;
  const Row row = given_row;
  const StepScalars scalars = given_scalars;
  int64_t i = 0;
  for (; !chooses && i + 32 <= n; i += 32) {
    step_word<Optimizer, criterion, chooses, folds>(block, averages, i, 32, row, scalars);
  }
  if (i < n) step_word<Optimizer, criterion, chooses, folds>(block, averages, i, n - i, row, scalars);
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
