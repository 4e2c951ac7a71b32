// masked_adamw_, masked_sgd_ and apply_mask_: optimizer, importance and mask of a weight in one pass over memory.

// The masks of a block whose step is done.
template <class Weights, class Moments, class States>
void mask_step(const Update& args, const Step<Weights, Moments, States>& step, int64_t at, int64_t n, bool in_loop) {
  if (!args.mask || (in_loop && !args.clear_state)) return;
  Bits keep;
  expand_mask(args.mask, args.run.offset + at, n, keep.values);
  mask_block(step.p, keep.values, n);
  if (!args.clear_state) return;
  if (args.first.data) mask_block(step.first, keep.values, n);
  if (args.second.data) mask_block(step.second, keep.values, n);
}

// What an update reads ahead: its operands, and the averages where they choose and are folded in its loop.
inline Ahead ahead_of(const Update& args, const Span& ipt, bool in_loop) {
  const Span none;
  return Ahead(args.params, args.grads, args.first, args.second, ipt, args.shadow,
               in_loop ? args.boundary->fold.exp_avg_ipt : none, in_loop ? args.boundary->fold.exp_avg_unc : none);
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
  const typename Optimizer::Row row = *reinterpret_cast<const typename Optimizer::Row*>(args.hyper);
  const Gradient& gradient = args.gradient;
  Buffer p_buffer, g_buffer, first_buffer, second_buffer, ipt_buffer, shadow_buffer;
  Bits random, moment_random;
  Pending pending;
  const bool in_loop = goes_in_loop<criterion>(args);
  const bool chooses = args.boundary && args.boundary->around && !in_loop;
  const bool folds = args.boundary && args.boundary->folds && !in_loop;
  // The mean of a window of one step stays out of memory.
  const Span ipt_span = in_loop || (folds && begins<criterion>(args)) ? Span{} : args.ipt;
  if (folds) __builtin_memset(ipt_buffer.values, 0, sizeof(ipt_buffer));
  const Ahead ahead = ahead_of(args, ipt_span, in_loop);
  for (int64_t at = 0, n; at < args.run.count; at += n) {
    n = block_size(args.run, at);
    if (chooses) choose_block(args, at, n);
    random_blocks(args, at, n, random, moment_random);
    const Weights p = Weights::take(args.params, at, n, p_buffer);
    Step<Weights, Moments, States> step{p,
                                        Weights::take_gradient(args.grads, at, n, gradient.scale, g_buffer),
                                        args.shadow.data ? Weights::take(args.shadow, at, n, shadow_buffer) : p,
                                        Moments::take(args.first, at, n, first_buffer),
                                        Moments::take(args.second, at, n, second_buffer),
                                        States::take(ipt_span, at, n, ipt_buffer),
                                        random.values,
                                        moment_random.values};
    if constexpr (States::kConverts) {
      if (folds && step.ipt.data != ipt_buffer.values) {
        __builtin_memcpy(ipt_buffer.values, step.ipt.data, n * sizeof(float));
        step.ipt.data = ipt_buffer.values;
      }
    }
    if (in_loop) {
      if constexpr (can_go_in_loop(criterion)) {
        boundary_block<Optimizer, criterion>(args, step, ahead, at, n, row, pending);
      }
    } else {
      for_each_part(ahead, at, n, [&](int64_t i, int64_t part) {
        step_part<Optimizer, criterion>(step, i, part, row, gradient.clip, args.accepted);
      });
      if constexpr (States::kConverts) {
        if (folds) {
          round_state(args.ipt, n, step.ipt.data, random.values, 0);
          fold_block(args.boundary->fold, Ahead(), at, n, step.ipt, pending);
        } else {
          step.ipt.give(ipt_span, at, n, random.values, 0);
        }
      }
    }
    store_shadow(args.shadow, at, n, p, random.values);
    mask_step(args, step, at, n, in_loop);
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
  const Ahead ahead(args.params);
  for (int64_t at = 0; at < args.count; at += kBlock) {
    const int64_t n = args.count - at < kBlock ? args.count - at : kBlock;
    expand_mask(args.mask, at, n, keep.values);
    for_each_part(ahead, at, n, [&](int64_t i, int64_t part) {
      if (args.params.dtype == Dtype::float32) {
        mask_block(Float32s{in_place(args.params, at + i)}, keep.values + i, part);
      } else {
        mask_block(Bfloat16s{halves(args.params, at + i)}, keep.values + i, part);
      }
    });
  }
}
