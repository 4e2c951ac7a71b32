// A window of one step in an optimizer's pass: masks by the averages that are there, step, score and fold of a weight
// in one loop, where the statistics are float32.

// One operand each, at the first weight of a block.
struct BoundaryBlock {
  const float *p, *g;
  float *first, *second, *exp_avg_ipt, *exp_avg_unc;
  float* next;               // may be p
  uint32_t *before, *after;  // order keys of the scores that choose, and of the new ones
};

// What scores below `lowest` is pruned; the window's mean, which is the score, stays out of memory.
template <class Optimizer, int criterion>
void boundary_block(const BoundaryBlock& block, const Ahead& ahead, int64_t at, int64_t n,
                    const typename Optimizer::Row& given, uint32_t lowest, const Fold& fold) {
  // Copies, which no store can change.
  const typename Optimizer::Row row = given;
  const float beta1 = fold.beta1, one_minus_beta1 = fold.one_minus_beta1;
  const float beta2 = fold.beta2, one_minus_beta2 = fold.one_minus_beta2;
  const float *p = block.p, *g = block.g;
  float *first = block.first, *second = block.second, *next = block.next;
  float *exp_avg_ipt = block.exp_avg_ipt, *exp_avg_unc = block.exp_avg_unc;
  uint32_t *before = block.before, *after = block.after;
  for_each_part(ahead, at, n, [&](int64_t begin, int64_t part) __attribute__((always_inline)) {
  // Each weight has its own place in every operand.
#pragma GCC ivdep
    for (int64_t i = begin; i < begin + part; ++i) {
      float m = first[i], v = second[i];
      const float stepped = Optimizer::step(p[i], g[i], m, v, row);
      const float score = instant_score<static_cast<Criterion>(criterion)>(p[i], stepped, g[i], row.lr);
      first[i] = m;
      second[i] = v;
      const uint32_t key = order_key(score_of<Score::product>(exp_avg_ipt[i], exp_avg_unc[i], 1.0f));
      before[i] = key;
      next[i] = key < lowest ? 0.0f : stepped;
      const float mean = smooth_ipt(exp_avg_ipt[i], score, beta1, one_minus_beta1);
      const float uncertain = smooth_unc(exp_avg_unc[i], score, mean, beta2, one_minus_beta2);
      exp_avg_ipt[i] = mean;
      exp_avg_unc[i] = uncertain;
      after[i] = order_key(score_of<Score::product>(mean, uncertain, 1.0f));
    }
  });
}

// Of a step that begins a window and ends it.
inline bool goes_in_loop(const Update& args) {
  const Fold& fold = args.boundary->fold;
  return fold.exp_avg_unc.data && !args.shadow.data && args.ipt.dtype == Dtype::float32 &&
         fold.exp_avg_ipt.dtype == Dtype::float32;
}

inline void choose_by_keys(const Update& args, uint32_t* keys, int64_t at, int64_t n) {
  Boundary& boundary = *args.boundary;
  pad_keys(n, keys);
  pack_around_keys(keys, at, n, *boundary.around, args.mask + args.run.offset / 8, boundary.stats, boundary.found,
                   boundary.size);
}

// The masks of a block, by the averages as they are before the window's end.
inline void choose_block(const Update& args, const Ahead& ahead, int64_t at, int64_t n) {
  const Scores scores{args.run, args.boundary->fold.exp_avg_ipt, args.boundary->fold.exp_avg_unc};
  Bits keys;
  if (scores.b.data) {
    keys_block<Score::product>(scores, ahead, at, n, keys.values);
  } else {
    keys_block<Score::identity>(scores, ahead, at, n, keys.values);
  }
  choose_by_keys(args, keys.values, at, n);
}
