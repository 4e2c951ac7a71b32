// accumulate_ and fold_: the window mean of the instant score, and its running averages.

template <Criterion criterion, class Weights, class States>
void accumulate_block(States ipt, Weights p, Weights g, const uint32_t* random, int64_t n, float clip, float lr,
                      float accepted) {
  // Each weight has its own place in every operand.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float score = instant_score<criterion>(p.get(i), p.get(i), g.get(i) * clip, lr);
    ipt.set(i, next_ipt<criterion>(ipt.get(i), score, accepted), random[i]);
  }
}

template <Criterion criterion, class Weights, class States>
void accumulate_run(const Accumulate& args) {
  Buffer ipt_buffer, p_buffer, g_buffer;
  Bits random;
  const Gradient& gradient = args.gradient;
  for (int64_t at = 0, n; at < args.run.count; at += n) {
    n = block_size(args.run, at);
    if (args.ipt.dtype == Dtype::bfloat16) random_block(args.run, at, n, args.rounding, random.values);
    const States ipt = States::take(args.ipt, at, n, ipt_buffer);
    const Weights g = Weights::take_gradient(args.grads, at, n, gradient.scale, g_buffer);
    const Weights p = criterion == Criterion::precomputed ? g : Weights::take(args.params, at, n, p_buffer);
    accumulate_block<criterion>(ipt, p, g, random.values, n, gradient.clip, args.lr, args.accepted);
    ipt.give(args.ipt, at, n, random.values, 0);
  }
}

template <Criterion criterion>
void accumulate(const Accumulate& args) {
  if (args.ipt.dtype != Dtype::bfloat16) return accumulate_run<criterion, Float32s, Float32s>(args);
  if (args.grads.dtype != Dtype::bfloat16 || args.gradient.scale != 1.0f) {
    return accumulate_run<criterion, Float32s, Bfloat16s>(args);
  }
  accumulate_run<criterion, Bfloat16s, Bfloat16s>(args);
}

// The operands of a fold, at the first weight of a block. Without exp_avg_unc, exp_avg_ipt is the score.
template <class States, class Window>
struct FoldBlock {
  States exp_avg_ipt, exp_avg_unc;
  Window ipt;
  const uint32_t* random;
  uint32_t* keys;  // of the new scores, as they are stored
};

template <bool has_unc, class States, class Window>
void fold_averages(const FoldBlock<States, Window>& given, int64_t n, const Fold& args) {
  // Copies, which no store can change.
  const FoldBlock<States, Window> block = given;
  const float beta1 = args.beta1, one_minus_beta1 = args.one_minus_beta1;
  const float beta2 = args.beta2, one_minus_beta2 = args.one_minus_beta2;
  // Each weight has its own place in every operand.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t random = block.random[i];
    const float ipt = block.ipt.get(i);
    const float mean = smooth_ipt(block.exp_avg_ipt.get(i), ipt, beta1, one_minus_beta1);
    const float stored = States::stored(mean, random);
    if constexpr (has_unc) {
      const float unc = smooth_unc(block.exp_avg_unc.get(i), ipt, mean, beta2, one_minus_beta2);
      block.keys[i] = order_key(score_of<Score::product>(stored, States::stored(unc, random >> 16), 1.0f));
      block.exp_avg_unc.set(i, unc, random >> 16);
    } else {
      block.keys[i] = order_key(score_of<Score::identity>(stored, stored, 1.0f));
    }
    block.exp_avg_ipt.set(i, mean, random);
  }
}

inline void moments_block(float* __restrict ipt, const float* __restrict p, const float* __restrict exp_avg,
                          const float* __restrict exp_avg_sq, int64_t n, const float* factors) {
  const float lr = factors[0], factor = factors[1], factor_sq = factors[2];
  for (int64_t i = 0; i < n; ++i) ipt[i] = score_moments(p[i], exp_avg[i], exp_avg_sq[i], lr, factor, factor_sq);
}

// The window's score of a block.
PINS_BLOCK float* load_ipt(const Fold& args, int64_t at, int64_t n, Buffer& ipt_buffer) {
  if (args.ipt.data) return load(args.ipt, at, n, ipt_buffer);
  Buffer p_buffer, mean_buffer, square_buffer;
  const float* p = load(args.params, at, n, p_buffer);
  const float* mean = load(args.exp_avg, at, n, mean_buffer);
  moments_block(ipt_buffer.values, p, mean, load(args.exp_avg_sq, at, n, square_buffer), n, args.factors);
  return ipt_buffer.values;
}

// The averages of a block take in the window's score and are stored; those that are stored are counted.
template <class States, class Window>
PINS_BLOCK void fold_states(const Fold& args, int64_t at, int64_t n, Window ipt, Pending& pending) {
  Buffer mean_buffer, unc_buffer;
  Bits random, keys;
  if (args.exp_avg_ipt.dtype == Dtype::bfloat16) random_block(args.run, at, n, args.rounding, random.values);
  if (args.exp_avg_ipt.columns) shared_block(n, args.rounding, random.values);
  const FoldBlock<States, Window> block{States::take(args.exp_avg_ipt, at, n, mean_buffer),
                                        States::take(args.exp_avg_unc, at, n, unc_buffer), ipt, random.values,
                                        keys.values};
  args.exp_avg_unc.data ? fold_averages<true>(block, n, args) : fold_averages<false>(block, n, args);
  block.exp_avg_ipt.give_average(args.exp_avg_ipt, at, n, random.values, 0);
  block.exp_avg_unc.give_average(args.exp_avg_unc, at, n, random.values, 16);
  if (!args.tally) return;
  if (args.exp_avg_ipt.columns) {
    // The scores that 8-bit storage holds.
    const Scores scores{args.run, args.exp_avg_ipt, args.exp_avg_unc};
    args.exp_avg_unc.data ? keys_block<Score::product>(scores, at, n, keys.values)
                          : keys_block<Score::identity>(scores, at, n, keys.values);
  }
  pad_keys(n, keys.values);
  count_keys(keys.values, n, args.bracket, *args.tally, pending);
}

template <class Window>
void fold_block(const Fold& args, int64_t at, int64_t n, Window ipt, Pending& pending) {
  args.exp_avg_ipt.dtype == Dtype::bfloat16 ? fold_states<Bfloat16s>(args, at, n, ipt, pending)
                                            : fold_states<Float32s>(args, at, n, ipt, pending);
}

void fold(const Fold& args) {
  Buffer ipt_buffer;
  Pending pending;
  for (int64_t at = 0, n; at < args.run.count; at += n) {
    n = block_size(args.run, at);
    if (args.ipt.data && args.ipt.dtype == Dtype::bfloat16) {
      fold_block(args, at, n, Bfloat16s::take(args.ipt, at, n, ipt_buffer), pending);
    } else {
      fold_block(args, at, n, Float32s{load_ipt(args, at, n, ipt_buffer)}, pending);
    }
  }
  if (args.tally) pending.flush(args.bracket, args.tally->bins);
}
