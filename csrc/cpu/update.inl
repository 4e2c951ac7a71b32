// masked_adamw_, masked_sgd_ and apply_mask_: optimizer, importance and mask of a weight in one pass over memory.

// Of a block whose step is done: what of it was not masked where it was computed.
template <class Weights, class Moments, class States>
void mask_step(const Update& args, const Step<Weights, Moments, States>& step, int64_t at, int64_t n, bool masked) {
  if (!args.mask || (masked && !args.clear_state)) return;
  Bits keep;
  expand_mask(args.mask, args.run.offset + at, n, keep.values);
  if (!masked) mask_block(step.p, keep.values, n);
  if (!args.clear_state) return;
  if (args.first.data) mask_block(step.first, keep.values, n);
  if (args.second.data) mask_block(step.second, keep.values, n);
}

inline void store_shadow(const Span& shadow, int64_t at, int64_t n, Float32s p, const uint32_t* random) {
  store_state(shadow, at, n, p.data, random, 16);
}

inline void store_shadow(const Span& shadow, int64_t at, int64_t n, Bfloat16s p, const uint32_t*) {
  if (shadow.data) __builtin_memcpy(halves(shadow, at), p.data, n * sizeof(uint16_t));
}

// Weights, Moments, States: Bfloat16s where bfloat16 is used in place, Float32s for all else.
template <class Optimizer, int criterion, class Weights, class Moments, class States>
void update_run(const Update& args) {
  // In bfloat16 it is conversions that take the time.
  using Row = std::conditional_t<Weights::kConverts, typename Optimizer::QuickRow, typename Optimizer::Row>;
  const Row row(*reinterpret_cast<const typename Optimizer::Row*>(args.hyper));
  const Gradient& gradient = args.gradient;
  Buffer p_buffer, g_buffer, first_buffer, second_buffer, ipt_buffer, shadow_buffer;
  Bits random, moment_random, bits, all;
  Pending pending;
  const bool in_loop = goes_in_loop<criterion>(args);
  const bool chosen = in_loop && args.boundary->around;
  const bool chooses = args.boundary && args.boundary->around && !in_loop;
  const bool folds = args.boundary && args.boundary->folds && !in_loop;
  // The mean of a window of one step stays out of memory.
  const bool ends = args.boundary && args.boundary->folds;
  const Span ipt_span = ends && begins<criterion>(args) ? Span{} : args.ipt;
  if (folds) __builtin_memset(ipt_buffer.values, 0, sizeof(ipt_buffer));
  // A shadow takes what is stepped before that is masked.
  const bool masks = kMasksInLoop && args.mask && !chosen && !args.shadow.data;
  __builtin_memset(all.values, 0xff, kBlock / 8);
  for (int64_t at = 0, n; at < args.run.count; at += n) {
    n = block_size(args.run, at);
    if (chooses) choose_block(args, at, n);
    random_blocks(args, at, n, random, moment_random);
    const Weights p = Weights::take(args.params, at, n, p_buffer);
    Step<Weights, Moments, States> step{
        p,
        Weights::take_gradient(args.grads, at, n, gradient.scale, g_buffer),
        args.shadow.data ? Weights::take(args.shadow, at, n, shadow_buffer) : p,
        Moments::take(args.first, at, n, first_buffer),
        Moments::take(args.second, at, n, second_buffer),
        States::take(ipt_span, at, n, ipt_buffer),
        random.values,
        moment_random.values,
        masks ? bits_from(args.mask, args.run.offset + at, n, bits) : reinterpret_cast<const uint8_t*>(all.values)};
    if constexpr (States::kConverts) {
      if (folds && step.ipt.data != ipt_buffer.values) {
        __builtin_memcpy(ipt_buffer.values, step.ipt.data, n * sizeof(float));
        step.ipt.data = ipt_buffer.values;
      }
    }
    if (in_loop) {
      if constexpr (can_go_in_loop(criterion)) {
        boundary_block<Optimizer, criterion>(args, step, at, n, row, pending);
      }
    } else {
      step_block<Optimizer, criterion, false, false>(step, {}, n, row, {gradient.clip, args.accepted});
      if constexpr (States::kConverts) {
        if (folds) {
          round_state(args.ipt, n, step.ipt.data, random.values, 0);
          fold_block(args.boundary->fold, at, n, step.ipt, pending);
        } else {
          step.ipt.give(ipt_span, at, n, random.values, 0);
        }
      }
    }
    store_shadow(args.shadow, at, n, p, random.values);
    mask_step(args, step, at, n, chosen || masks);
    p.give(args.params, at, n, random.values, 16);
    step.first.give_moment(args.first, at, n, moment_random.values, 0);
    step.second.give_moment(args.second, at, n, moment_random.values, 16);
  }
  if (args.boundary && args.boundary->folds && args.boundary->fold.tally) {
    pending.flush(args.boundary->fold.bracket, args.boundary->fold.tally->bins);
  }
}

// `criterion` is one of Criterion, or kNoCriterion for a step without importance. bfloat16 is used in place where it
// stores the statistics, these and the moments, or all operands; other combinations would make more code than speed.
template <class Optimizer, int criterion>
void masked_update(const Update& args) {
  const auto in_bfloat16 = [](const Span& span) { return !span.data || span.dtype == Dtype::bfloat16; };
  const bool folds = args.boundary && args.boundary->folds;
  const bool states = in_bfloat16(args.ipt) && (!folds || goes_in_loop<criterion>(args));
  const bool moments = states && args.first.data && in_bfloat16(args.first) && in_bfloat16(args.second);
  if (moments && in_bfloat16(args.params) && args.gradient.scale == 1.0f) {
    return update_run<Optimizer, criterion, Bfloat16s, Bfloat16s, Bfloat16s>(args);
  }
  if (moments) return update_run<Optimizer, criterion, Float32s, Bfloat16s, Bfloat16s>(args);
  if (states) return update_run<Optimizer, criterion, Float32s, Float32s, Bfloat16s>(args);
  update_run<Optimizer, criterion, Float32s, Float32s, Float32s>(args);
}

// p = bit ? p : +0, bit by bit: a kept NaN stays the NaN it was.
void apply_mask(const ApplyMask& args) {
  Bits keep;
  for (int64_t at = 0; at < args.count; at += kBlock) {
    const int64_t n = args.count - at < kBlock ? args.count - at : kBlock;
    expand_mask(args.mask, at, n, keep.values);
    if (args.params.dtype == Dtype::float32) {
      mask_block(Float32s{in_place(args.params, at)}, keep.values, n);
    } else {
      mask_block(Bfloat16s{halves(args.params, at)}, keep.values, n);
    }
  }
}
