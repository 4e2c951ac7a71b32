// masked_adamw_, masked_sgd_ and apply_mask_: optimizer, importance and mask of a weight in one pass over memory.

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

// next = optimizer(p, g, moments), before masking and rounding, and the window's mean with its score. q: the weight
// that the score reads, which is the unmasked one where it is known. next may be p.
template <class Optimizer, int criterion>
void step_part(const float* p, const float* g, const float* q, float* first, float* second, float* ipt, float* next,
               int64_t n, const typename Optimizer::Row& row, float accepted) {
  // Each weight has its own place in every operand.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float m = first[i], v = second[i];
    const float stepped = Optimizer::step(p[i], g[i], m, v, row);
    if constexpr (criterion != kNoCriterion) {
      constexpr Criterion kind = static_cast<Criterion>(criterion);
      ipt[i] = next_ipt<kind>(ipt[i], instant_score<kind>(q[i], stepped, g[i], row.lr), accepted);
    }
    first[i] = m;
    second[i] = v;
    next[i] = stepped;
  }
}

// Bits of their own: the low half rounds the first moment, the high half the second.
inline Rounding for_moments(const Rounding& rounding) { return {rounding.key1, rounding.key0}; }

inline void mask_block(float* __restrict values, const uint32_t* __restrict keep, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = float_of(bits_of(values[i]) & keep[i]);
}

// `criterion` is one of Criterion, or kNoCriterion for a step without importance. at_boundary: see Update::boundary.
template <class Optimizer, int criterion, bool at_boundary>
void masked_update(const Update& args) {
  const typename Optimizer::Row row = *reinterpret_cast<const typename Optimizer::Row*>(args.hyper);
  Buffer p_buffer, g_buffer, first_buffer, second_buffer, ipt_buffer, shadow_buffer, next_buffer;
  Bits keep, random, moment_random, before, after;
  Pending pending;
  // The first step of a window starts its mean anew; a sum goes on.
  constexpr bool is_sum = criterion == static_cast<int>(Criterion::movement);
  const bool begins = args.accepted == 0.0f && !is_sum;
  const bool chooses = at_boundary && args.boundary->around;
  const bool folds = at_boundary && args.boundary->folds;
  const bool in_loop = chooses && folds && begins && criterion != kNoCriterion && goes_in_loop(args);
  const Span none, ipt_read = folds && begins ? none : args.ipt;
  if (folds && begins) __builtin_memset(ipt_buffer.values, 0, sizeof(ipt_buffer));
  const Fold fold = at_boundary ? args.boundary->fold : Fold{};
  const Span at_once[2] = {in_loop ? fold.exp_avg_ipt : none, in_loop ? fold.exp_avg_unc : none};
  const Ahead ahead(args.params, args.grads, args.first, args.second, ipt_read, args.shadow, at_once[0], at_once[1]);
  const Ahead to_choose(in_loop ? none : fold.exp_avg_ipt, in_loop ? none : fold.exp_avg_unc);
  const bool rounds = args.params.dtype == Dtype::bfloat16 || args.ipt.dtype == Dtype::bfloat16;
  for (int64_t at = 0, n; at < args.run.count; at += n) {
    n = block_size(args.run, at);
    if (chooses && !in_loop) choose_block(args, to_choose, at, n);
    if (rounds) random_block(args.run, at, n, args.rounding, random.values);
    const float* p = load(args.params, at, n, p_buffer);
    const float* g = load_gradient(args.grads, at, n, args.gradient, g_buffer);
    float* first = load(args.first, at, n, first_buffer);
    float* second = load(args.second, at, n, second_buffer);
    const float* q = criterion != kNoCriterion && args.shadow.data ? load(args.shadow, at, n, shadow_buffer) : p;
    float* ipt = load(ipt_read, at, n, ipt_buffer);
    float* next = args.params.dtype == Dtype::float32 ? in_place(args.params, at) : next_buffer.values;
    if (in_loop) {
      if constexpr (at_boundary && criterion != kNoCriterion && !is_sum) {
        const BoundaryBlock block{p,
                                  g,
                                  first,
                                  second,
                                  in_place(fold.exp_avg_ipt, at),
                                  in_place(fold.exp_avg_unc, at),
                                  next,
                                  before.values,
                                  after.values};
        boundary_block<Optimizer, criterion>(block, ahead, at, n, row, args.boundary->around->lo, fold);
        choose_by_keys(args, before.values, at, n);
        if (fold.tally) {
          pad_keys(n, after.values);
          count_keys(after.values, n, fold.bracket, *fold.tally, pending);
        }
      }
    } else {
      if (folds && ipt != ipt_buffer.values) {
        __builtin_memcpy(ipt_buffer.values, ipt, n * sizeof(float));
        ipt = ipt_buffer.values;
      }
      for_each_part(ahead, at, n, [&](int64_t i, int64_t part) {
        step_part<Optimizer, criterion>(p + i, g + i, q + i, first + i, second + i, ipt + i, next + i, part, row,
                                        args.accepted);
      });
      if (folds) {
        round_state(args.ipt, n, ipt, random.values, 0);
        fold_block(fold, Ahead(), at, n, ipt, pending);
      } else if (criterion != kNoCriterion) {
        store_state(args.ipt, at, n, ipt, random.values, 0);
      }
    }
    store_state(args.shadow, at, n, next, random.values, 16);
    if (args.mask && (!in_loop || args.clear_state)) {
      expand_mask(args.mask, args.run.offset + at, n, keep.values);
      mask_block(next, keep.values, n);
      if (args.clear_state) {
        mask_block(first, keep.values, n);
        mask_block(second, keep.values, n);
      }
    }
    store_state(args.params, at, n, next, random.values, 16);
    if (args.first.data && args.first.dtype != Dtype::float32 && args.first.dtype != Dtype::float16) {
      random_block(args.run, at, n, for_moments(args.rounding), moment_random.values);
    }
    store_moment(args.first, at, n, first, moment_random.values, 0);
    store_moment(args.second, at, n, second, moment_random.values, 16);
  }
  if (folds && fold.tally) pending.flush(fold.bracket, fold.tally->bins);
}

// p = bit ? p : +0, bit by bit: a kept NaN stays the NaN it was.
void apply_mask(const ApplyMask& args) {
  Bits keep;
  for (int64_t at = 0; at < args.count; at += kBlock) {
    const int64_t n = args.count - at < kBlock ? args.count - at : kBlock;
    expand_mask(args.mask, at, n, keep.values);
    if (args.params.dtype == Dtype::float32) {
      mask_block(in_place(args.params, at), keep.values, n);
    } else {
      uint16_t* __restrict values = halves(args.params, at);
      for (int64_t i = 0; i < n; ++i) values[i] = static_cast<uint16_t>(values[i] & keep.values[i]);
    }
  }
}
