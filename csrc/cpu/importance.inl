// accumulate_ and fold_: the window mean of the instant score, and its running averages.

template <Criterion criterion>
void accumulate_part(float* __restrict ipt, const float* __restrict p, const float* __restrict g, int64_t n, float lr,
                     float accepted) {
  for (int64_t i = 0; i < n; ++i) {
    ipt[i] = next_ipt<criterion>(ipt[i], instant_score<criterion>(p[i], p[i], g[i], lr), accepted);
  }
}

template <Criterion criterion>
void accumulate(const Accumulate& args) {
  Buffer ipt_buffer, p_buffer, g_buffer;
  Bits random;
  const Ahead ahead(args.ipt, args.params, args.grads);
  for (int64_t at = 0, n; at < args.run.count; at += n) {
    n = block_size(args.run, at);
    float* ipt = load(args.ipt, at, n, ipt_buffer);
    const float* g = load_gradient(args.grads, at, n, args.gradient, g_buffer);
    const float* p = criterion == Criterion::precomputed ? g : load(args.params, at, n, p_buffer);
    for_each_part(ahead, at, n, [&](int64_t i, int64_t part) {
      accumulate_part<criterion>(ipt + i, p + i, g + i, part, args.lr, args.accepted);
    });
    if (args.ipt.dtype == Dtype::bfloat16) random_block(args.run, at, n, args.rounding, random.values);
    store_state(args.ipt, at, n, ipt, random.values, 0);
  }
}

inline void fold_part(float* __restrict exp_avg_ipt, float* __restrict exp_avg_unc, const float* __restrict ipt,
                      int64_t n, const Fold& args) {
  const float beta1 = args.beta1, one_minus_beta1 = args.one_minus_beta1;
  const float beta2 = args.beta2, one_minus_beta2 = args.one_minus_beta2;
  for (int64_t i = 0; i < n; ++i) {
    const float mean = smooth_ipt(exp_avg_ipt[i], ipt[i], beta1, one_minus_beta1);
    exp_avg_unc[i] = smooth_unc(exp_avg_unc[i], ipt[i], mean, beta2, one_minus_beta2);
    exp_avg_ipt[i] = mean;
  }
}

inline void fold_ipt_part(float* __restrict exp_avg_ipt, const float* __restrict ipt, int64_t n, const Fold& args) {
  const float beta1 = args.beta1, one_minus_beta1 = args.one_minus_beta1;
  for (int64_t i = 0; i < n; ++i) exp_avg_ipt[i] = smooth_ipt(exp_avg_ipt[i], ipt[i], beta1, one_minus_beta1);
}

inline void moments_block(float* __restrict ipt, const float* __restrict p, const float* __restrict exp_avg,
                          const float* __restrict exp_avg_sq, int64_t n, const float* factors) {
  const float lr = factors[0], factor = factors[1], factor_sq = factors[2];
  for (int64_t i = 0; i < n; ++i) ipt[i] = score_moments(p[i], exp_avg[i], exp_avg_sq[i], lr, factor, factor_sq);
}

// The window's score of a block.
PINS_BLOCK const float* load_ipt(const Fold& args, int64_t at, int64_t n, Buffer& ipt_buffer) {
  if (args.ipt.data) return load(args.ipt, at, n, ipt_buffer);
  Buffer p_buffer, mean_buffer, square_buffer;
  const float* p = load(args.params, at, n, p_buffer);
  const float* mean = load(args.exp_avg, at, n, mean_buffer);
  moments_block(ipt_buffer.values, p, mean, load(args.exp_avg_sq, at, n, square_buffer), n, args.factors);
  return ipt_buffer.values;
}

// The averages of a block take in the window's score and are stored; those that are stored are counted.
PINS_BLOCK void fold_block(const Fold& args, const Ahead& ahead, int64_t at, int64_t n, const float* ipt,
                           Pending& pending) {
  Buffer mean_buffer, unc_buffer;
  Bits random;
  float* exp_avg_ipt = load(args.exp_avg_ipt, at, n, mean_buffer);
  float* exp_avg_unc = load(args.exp_avg_unc, at, n, unc_buffer);
  for_each_part(ahead, at, n, [&](int64_t i, int64_t part) {
    if (args.exp_avg_unc.data) {
      fold_part(exp_avg_ipt + i, exp_avg_unc + i, ipt + i, part, args);
    } else {
      fold_ipt_part(exp_avg_ipt + i, ipt + i, part, args);
    }
  });
  if (args.exp_avg_ipt.dtype == Dtype::bfloat16) random_block(args.run, at, n, args.rounding, random.values);
  store_state(args.exp_avg_ipt, at, n, exp_avg_ipt, random.values, 0);
  if (args.exp_avg_unc.data) store_state(args.exp_avg_unc, at, n, exp_avg_unc, random.values, 16);
  if (!args.tally) return;
  const Ahead nothing;
  const Scores scores{args.run, args.exp_avg_ipt, args.exp_avg_unc};
  if (args.exp_avg_unc.data) {
    count_block<Score::product>(scores, nothing, at, n, args.bracket, *args.tally, pending);
  } else {
    count_block<Score::identity>(scores, nothing, at, n, args.bracket, *args.tally, pending);
  }
}

void fold(const Fold& args) {
  Buffer ipt_buffer;
  const Ahead ahead(args.exp_avg_ipt, args.exp_avg_unc, args.ipt);
  Pending pending;
  for (int64_t at = 0, n; at < args.run.count; at += n) {
    n = block_size(args.run, at);
    fold_block(args, ahead, at, n, load_ipt(args, at, n, ipt_buffer), pending);
  }
  if (args.tally) pending.flush(args.bracket, args.tally->bins);
}
