// A window of one step in an optimizer's pass: masks by the averages that are there, step, score and fold of a weight
// in one loop.

constexpr bool can_go_in_loop(int criterion) {
  return criterion != kNoCriterion && criterion != static_cast<int>(Criterion::movement);
}

// Whether the step begins a window's mean anew; a sum goes on.
template <int criterion>
bool begins(const Update& args) {
  return args.accepted == 0.0f && criterion != static_cast<int>(Criterion::movement);
}

// Of a step that begins a window and ends it.
template <int criterion>
bool goes_in_loop(const Update& args) {
  return can_go_in_loop(criterion) && begins<criterion>(args) && args.boundary && args.boundary->around &&
         args.boundary->folds && args.boundary->fold.exp_avg_unc.data && !args.shadow.data;
}

// What a boundary adds to the operands of a step.
template <class States>
struct Averages {
  States exp_avg_ipt, exp_avg_unc;
  const uint32_t* random;
  uint32_t *before, *after;  // order keys of the scores that choose, and of the new ones
};

// What scores below `lowest` is pruned; the window's mean, which is the score, stays out of memory.
template <class Optimizer, int criterion, class Weights, class Moments, class States>
void boundary_step(const Step<Weights, Moments, States>& block, const Averages<States>& averages, int64_t n,
                   const typename Optimizer::Row& given, float clip, uint32_t lowest, const Fold& fold) {
  // Copies, which no store can change.
  const typename Optimizer::Row row = given;
  const float beta1 = fold.beta1, one_minus_beta1 = fold.one_minus_beta1;
  const float beta2 = fold.beta2, one_minus_beta2 = fold.one_minus_beta2;
  const Step<Weights, Moments, States> step = block;
  const States exp_avg_ipt = averages.exp_avg_ipt, exp_avg_unc = averages.exp_avg_unc;
  const uint32_t* fold_random = averages.random;
  uint32_t *before = averages.before, *after = averages.after;
  // Each weight has its own place in every operand.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t random = step.random[i], moment_random = step.moment_random[i], random_fold = fold_random[i];
    const float p = step.p.get(i), g = step.g.get(i) * clip;
    float m = step.first.get(i), v = step.second.get(i);
    const float stepped = Optimizer::step(p, g, m, v, row);
    const float exact = instant_score<static_cast<Criterion>(criterion)>(p, stepped, g, row.lr);
    const float score = States::stored(exact, random);
    step.first.set(i, m, moment_random);
    step.second.set(i, v, moment_random >> 16);
    const float old_mean = exp_avg_ipt.get(i), old_uncertain = exp_avg_unc.get(i);
    const uint32_t key = order_key(score_of<Score::product>(old_mean, old_uncertain, 1.0f));
    before[i] = key;
    step.p.set(i, key < lowest ? 0.0f : stepped, random >> 16);
    const float mean = smooth_ipt(old_mean, score, beta1, one_minus_beta1);
    const float uncertain = smooth_unc(old_uncertain, score, mean, beta2, one_minus_beta2);
    exp_avg_ipt.set(i, mean, random_fold);
    exp_avg_unc.set(i, uncertain, random_fold >> 16);
    const float stored_mean = States::stored(mean, random_fold);
    const float stored_uncertain = States::stored(uncertain, random_fold >> 16);
    after[i] = order_key(score_of<Score::product>(stored_mean, stored_uncertain, 1.0f));
  }
}

inline void choose_by_keys(const Update& args, uint32_t* keys, int64_t at, int64_t n) {
  Boundary& boundary = *args.boundary;
  pad_keys(n, keys);
  pack_around_keys(keys, at, n, *boundary.around, args.mask + args.run.offset / 8, boundary.stats, boundary.found,
                   boundary.size);
}

// The masks of a block, by the averages as they are before the window's end.
PINS_BLOCK void choose_block(const Update& args, int64_t at, int64_t n) {
  const Scores scores{args.run, args.boundary->fold.exp_avg_ipt, args.boundary->fold.exp_avg_unc};
  Bits keys;
  if (scores.b.data) {
    keys_block<Score::product>(scores, at, n, keys.values);
  } else {
    keys_block<Score::identity>(scores, at, n, keys.values);
  }
  choose_by_keys(args, keys.values, at, n);
}

// A block of such a step, but for moments that its masks zero.
template <class Optimizer, int criterion, class Weights, class Moments, class States>
void boundary_block(const Update& args, const Step<Weights, Moments, States>& step, int64_t at, int64_t n,
                    const typename Optimizer::Row& row, Pending& pending) {
  const Fold& fold = args.boundary->fold;
  Buffer mean_buffer, unc_buffer;
  Bits random, before, after;
  if (fold.exp_avg_ipt.dtype == Dtype::bfloat16) random_block(args.run, at, n, fold.rounding, random.values);
  const Averages<States> averages{States::take(fold.exp_avg_ipt, at, n, mean_buffer),
                                  States::take(fold.exp_avg_unc, at, n, unc_buffer), random.values, before.values,
                                  after.values};
  boundary_step<Optimizer, criterion>(step, averages, n, row, args.gradient.clip, args.boundary->around->lo, fold);
  choose_by_keys(args, before.values, at, n);
  if (!fold.tally) return;
  pad_keys(n, after.values);
  count_keys(after.values, n, fold.bracket, *fold.tally, pending);
}
