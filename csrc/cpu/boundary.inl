// A window's boundary in an optimizer's pass: masks by the averages that are there, step, score and fold of a weight in
// one loop.

constexpr bool can_go_in_loop(int criterion) {
  return criterion != kNoCriterion && criterion != static_cast<int>(Criterion::movement);
}

// Whether the step begins a window's mean anew; a sum goes on.
template <int criterion>
bool begins(const Update& args) {
  return args.accepted == 0.0f && criterion != static_cast<int>(Criterion::movement);
}

// Where the score is the averages' product, nothing keeps weights unmasked, and a step that begins a window and ends
// one ends its own: nearly always.
template <int criterion>
bool goes_in_loop(const Update& args) {
  if (!can_go_in_loop(criterion) || !args.boundary || args.shadow.data) return false;
  const Boundary& boundary = *args.boundary;
  if (!boundary.fold.exp_avg_unc.data) return false;
  return boundary.around && boundary.folds ? begins<criterion>(args) : boundary.around || boundary.folds;
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

// A block of such a step, but for what `mask_step` does.
template <class Optimizer, int criterion, class Weights, class Moments, class States>
void boundary_block(const Update& args, const Step<Weights, Moments, States>& step, int64_t at, int64_t n,
                    const typename Optimizer::Row& row, Pending& pending) {
  const Boundary& boundary = *args.boundary;
  const Fold& fold = boundary.fold;
  Buffer mean_buffer, unc_buffer;
  Bits random, before, after;
  const bool rounds = boundary.folds && fold.exp_avg_ipt.dtype == Dtype::bfloat16;
  if (rounds) random_block(args.run, at, n, fold.rounding, random.values);
  const Averages<States> averages{States::take(fold.exp_avg_ipt, at, n, mean_buffer),
                                  States::take(fold.exp_avg_unc, at, n, unc_buffer), random.values, before.values,
                                  after.values};
  const uint32_t lowest = boundary.around ? boundary.around->lo : 0;
  const StepScalars scalars{args.gradient.clip, args.accepted,       lowest, fold.beta1, fold.one_minus_beta1,
                            fold.beta2,         fold.one_minus_beta2};
  if (boundary.around && boundary.folds) {
    step_block<Optimizer, criterion, true, true>(step, averages, n, row, scalars);
  } else if (boundary.around) {
    step_block<Optimizer, criterion, true, false>(step, averages, n, row, scalars);
  } else {
    step_block<Optimizer, criterion, false, true>(step, averages, n, row, scalars);
  }
  if (boundary.around) choose_by_keys(args, before.values, at, n);
  if (!boundary.folds || !fold.tally) return;
  pad_keys(n, after.values);
  count_keys(after.values, n, fold.bracket, *fold.tally, pending);
}
