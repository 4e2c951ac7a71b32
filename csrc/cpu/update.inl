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

// next = optimizer(p, g, moments), before masking and rounding.
template <class Optimizer>
void step_block(const float* __restrict p, const float* __restrict g, float* __restrict first, float* __restrict second,
                float* __restrict next, int64_t n, const typename Optimizer::Row& row) {
  for (int64_t i = 0; i < n; ++i) {
    float m = first[i], v = second[i];
    next[i] = Optimizer::step(p[i], g[i], m, v, row);
    first[i] = m;
    second[i] = v;
  }
}

// q: the weight that the score reads, which is the unmasked one where it is known.
template <Criterion criterion>
void score_block(float* __restrict ipt, const float* __restrict q, const float* __restrict next,
                 const float* __restrict g, int64_t n, float lr, float accepted) {
  for (int64_t i = 0; i < n; ++i) {
    ipt[i] = next_ipt<criterion>(ipt[i], instant_score<criterion>(q[i], next[i], g[i], lr), accepted);
  }
}

// Bits of their own: the low half rounds the first moment, the high half the second.
inline Rounding for_moments(const Rounding& rounding) { return {rounding.key1, rounding.key0}; }

inline void mask_block(float* __restrict values, const uint32_t* __restrict keep, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = float_of(bits_of(values[i]) & keep[i]);
}

// `criterion` is one of Criterion, or kNoCriterion for a step without importance.
template <class Optimizer, int criterion>
void masked_update(const Update& args) {
  const typename Optimizer::Row row = *reinterpret_cast<const typename Optimizer::Row*>(args.hyper);
  Buffer p_buffer, g_buffer, first_buffer, second_buffer, ipt_buffer, shadow_buffer, next;
  Bits keep, random, moment_random;
  const bool rounds = args.params.dtype == Dtype::bfloat16 || args.ipt.dtype == Dtype::bfloat16;
  for (int64_t at = 0, n; at < args.run.count; at += n) {
    n = block_size(args.run, at);
    if (rounds) random_block(args.run, at, n, args.rounding, random.values);
    const float* p = load(args.params, at, n, p_buffer);
    const float* g = load_gradient(args.grads, at, n, args.gradient, g_buffer);
    float* first = load(args.first, at, n, first_buffer);
    float* second = load(args.second, at, n, second_buffer);
    step_block<Optimizer>(p, g, first, second, next.values, n, row);
    if constexpr (criterion != kNoCriterion) {
      const float* q = args.shadow.data ? load(args.shadow, at, n, shadow_buffer) : p;
      float* ipt = load(args.ipt, at, n, ipt_buffer);
      score_block<static_cast<Criterion>(criterion)>(ipt, q, next.values, g, n, row.lr, args.accepted);
      store_state(args.ipt, at, n, ipt, random.values, 0);
    }
    store_state(args.shadow, at, n, next.values, random.values, 16);
    if (args.mask) {
      expand_mask(args.mask, args.run.offset + at, n, keep.values);
      mask_block(next.values, keep.values, n);
      if (args.clear_state) {
        mask_block(first, keep.values, n);
        mask_block(second, keep.values, n);
      }
    }
    store_state(args.params, at, n, next.values, random.values, 16);
    if (args.first.data && args.first.dtype != Dtype::float32 && args.first.dtype != Dtype::float16) {
      random_block(args.run, at, n, for_moments(args.rounding), moment_random.values);
    }
    store_moment(args.first, at, n, first, moment_random.values, 0);
    store_moment(args.second, at, n, second, moment_random.values, 16);
  }
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
