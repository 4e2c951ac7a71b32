// What one thread of a block does to its share of a chunk: the masked optimizer step, and the mask alone.
//
// Host and device: the tests run this source on the CPU, thread by thread. Include after criterion.inl, optimizer.inl,
// layout.inl and walk.cuh, in the same namespace.

struct AdamWStep {
  using Row = AdamWRow;
  static constexpr int kMoments = 2;
  static PINS_HD float next(float p, float g, float (&moments)[2], const Row& row) {
    return adamw(p, g, moments[0], moments[1], row);
  }
};

struct SgdStep {
  using Row = SgdRow;
  static constexpr int kMoments = 1;
  static PINS_HD float next(float p, float g, float (&moments)[1], const Row& row) {
    return sgd(p, g, moments[0], row);
  }
};

// Rows of the pointer table: the list arguments in their order. The row of an empty list is not read.
template <typename Step>
struct Lists {
  static constexpr int params = 0, moments = 1, ipt = 1 + Step::kMoments, shadow = ipt + 1, grads = ipt + 2,
                       masks = ipt + 3, count = ipt + 4;
};

// All pointers are device memory; scalars have shape [1].
struct UpdateArguments {
  Work work;
  const float* hyper;  // [tensors, 8]
  const float* accepted;
  const int64_t* rng;       // [2]
  const float* grad_scale;  // null if not given, as the next two
  const float* clip;
  const float* found_inf;
  uint32_t lists;  // bit k: list k is not empty
  Criterion criterion;
  bool clear_state;
};

// ipt[w] becomes the window's mean, or sum, that includes this step's instant score.
template <Criterion criterion, int width>
PINS_HD void accumulate(float (&ipt)[width], const float (&p)[width], const float (&p_next)[width],
                        const float (&g)[width], float lr, float accepted) {
  for (int w = 0; w < width; ++w) {
    ipt[w] = next_ipt<criterion>(ipt[w], instant_score<criterion>(p[w], p_next[w], g[w], lr), accepted);
  }
}

// The same, one branch for all the weights of an access.
template <int width>
PINS_HD void accumulate(Criterion criterion, float (&ipt)[width], const float (&p)[width], const float (&p_next)[width],
                        const float (&g)[width], float lr, float accepted) {
  switch (criterion) {
#define PINS_CASE(id, name, formula) \
  case Criterion::id: return accumulate<Criterion::id>(ipt, p, p_next, g, lr, accepted);
    PINS_CRITERIA(PINS_CASE)
#undef PINS_CASE
  }
}

// Of an update where no window ends, see boundary.cuh.
struct Within {
  static constexpr bool kEnds = false;
};

// P: storage of parameters, gradients and shadow. S: of ipt. M: of the moments. bf16 is rounded stochastically.
template <typename Step, typename P, typename S, typename M, typename Ends = Within>
class Update {
 public:
  PINS_HD Update(const UpdateArguments& a, const Chunk& chunk, const Ends& ends = {})
      : a_(a),
        ends_(ends),
        place_(a.work.places[chunk.tensor]),
        offset_(chunk.offset),
        n_(weights_of(place_, chunk)),
        params_(stream<P>(L::params, chunk)),
        ipt_(stream<S>(L::ipt, chunk)),
        shadow_(stream<P>(L::shadow, chunk)),
        grads_(stream<const P>(L::grads, chunk)),
        mask_(has(L::masks) ? a.work.stream<const uint8_t>(L::masks, chunk.tensor) + chunk.offset / 8 : nullptr),
        row_(reinterpret_cast<const typename Step::Row*>(a.hyper)[chunk.tensor]),
        accepted_(a.accepted[0]),
        grad_scale_(a.grad_scale != nullptr ? a.grad_scale[0] : 1.0f),
        clip_(a.clip != nullptr ? a.clip[0] : 1.0f) {
    for (int m = 0; m < Step::kMoments; ++m) moments_[m] = stream<M>(L::moments + m, chunk);
    if constexpr (kRounds) {
      key_[0] = static_cast<uint32_t>(a.rng[0]);
      key_[1] = static_cast<uint32_t>(a.rng[1]);
      first_ = global_index(place_, offset_);
      one_run_ = run_length(place_, offset_) >= n_;
    }
  }

  PINS_HD void run(int64_t thread, int64_t threads) const {
    const int64_t head = head_of(params_);
    bool shared = shares(L::params, params_, head) && shares(L::ipt, ipt_, head) && shares(L::shadow, shadow_, head) &&
                  shares(L::grads, grads_, head);
    for (int m = 0; m < Step::kMoments; ++m) shared = shared && shares(L::moments + m, moments_[m], head);
    if constexpr (Ends::kEnds) shared = shared && ends_.template shares<kWidth<P>>(head);
    walk<kWidth<P>>(n_, shared ? head : n_, thread, threads, *this);
  }

  // Weights [i, i + width) of the chunk.
  template <int width>
  PINS_HD void at(int64_t i) const {
    constexpr int kMoments = Step::kMoments;
    const Pack<P, width> params = read<width>(params_ + i);
    const Pack<P, width> grads = read<width>(grads_ + i);
    Pack<M, width> moments[kMoments] = {};
    for (int m = 0; m < kMoments; ++m) {
      if (has(L::moments + m)) moments[m] = read<width>(moments_[m] + i);
    }
    // The first score of a window replaces what ipt holds.
    Pack<S, width> ipts = {};
    if (has(L::ipt) && (accepted_ != 0.0f || a_.criterion == Criterion::movement)) ipts = read<width>(ipt_ + i);
    Pack<P, width> shadow = params;
    if (has(L::shadow)) shadow = read<width>(shadow_ + i);
    const auto averages = averages_at<width>(i);
    const uint32_t keep = keep_at<width>(averages, i);

    float g[width];
    for (int w = 0; w < width; ++w) g[w] = load(grads.at[w]);
    if (a_.grad_scale != nullptr) {
      for (int w = 0; w < width; ++w) g[w] = g[w] / grad_scale_;
    }
    if (a_.clip != nullptr) {
      for (int w = 0; w < width; ++w) g[w] = g[w] * clip_;
    }

    float p_next[width], p_kept[width], moment[kMoments][width];
    for (int w = 0; w < width; ++w) {
      const bool pruned = !(keep >> w & 1);
      float next[kMoments];
      for (int m = 0; m < kMoments; ++m) next[m] = load(moments[m].at[w]);
      p_next[w] = Step::next(load(params.at[w]), g[w], next, row_);
      p_kept[w] = pruned ? 0.0f : p_next[w];
      for (int m = 0; m < kMoments; ++m) moment[m][w] = pruned && a_.clear_state ? 0.0f : next[m];
    }
    uint32_t random[width] = {};
    if constexpr (kIsBFloat16<M>) random_at(i, key_[1], key_[0], random);
    for (int m = 0; m < kMoments; ++m) {
      if (has(L::moments + m)) write(moments_[m] + i, rounded<M>(moment[m], random, 16 * m));
    }
    float ipt[width] = {};
    if (has(L::ipt)) {
      float p[width];
      for (int w = 0; w < width; ++w) {
        ipt[w] = load(ipts.at[w]);
        p[w] = load(shadow.at[w]);
      }
      accumulate(a_.criterion, ipt, p, p_next, g, row_.lr, accepted_);
    }
    // Late: computed before the score, these bits would spill.
    if constexpr (kIsBFloat16<P> || kIsBFloat16<S>) random_at(i, key_[0], key_[1], random);
    const Pack<S, width> mean = rounded<S>(ipt, random, 0);
    if (has(L::ipt) && !folds()) write(ipt_ + i, mean);
    if (has(L::shadow)) write(shadow_ + i, rounded<P>(p_next, random, 16));
    write(params_ + i, rounded<P>(p_kept, random, 16));
    if constexpr (Ends::kEnds) {
      if (!folds()) return;
      if constexpr (kIsBFloat16<S>) random_at(i, ends_.fold_key(0), ends_.fold_key(1), random);
      ends_.fold(i, averages, mean, random);
    }
  }

 private:
  using L = Lists<Step>;
  static constexpr bool kRounds = kIsBFloat16<P> || kIsBFloat16<S> || kIsBFloat16<M>;

  PINS_HD bool has(int list) const { return a_.lists >> list & 1; }

  PINS_HD bool folds() const {
    if constexpr (Ends::kEnds) {
      return ends_.folds();
    } else {
      return false;
    }
  }

  template <int width>
  PINS_HD auto averages_at(int64_t i) const {
    if constexpr (Ends::kEnds) {
      return ends_.template read_averages<width>(i);
    } else {
      return Within{};
    }
  }

  // Bits of the weights [i, i + width) of the chunk that are kept.
  template <int width, typename Averages>
  PINS_HD uint32_t keep_at(const Averages& averages, int64_t i) const {
    if constexpr (Ends::kEnds) {
      if (ends_.chooses()) return ends_.choose(averages, i, mask_);
    }
    return has(L::masks) ? mask_bits<width>(mask_, i) : ~0u;
  }

  template <typename T>
  PINS_HD T* stream(int list, const Chunk& chunk) const {
    return has(list) ? a_.work.stream<T>(list, chunk.tensor) + chunk.offset : nullptr;
  }

  // A list that is not given hinders nobody.
  template <typename T>
  PINS_HD bool shares(int list, const T* stream, int64_t head) const {
    return !has(list) || aligned<kWidth<P>>(stream + head);
  }

  // Random bits of weights [i, i + width) of the chunk.
  template <int width>
  PINS_HD void random_at(int64_t i, uint32_t key0, uint32_t key1, uint32_t (&bits)[width]) const {
    const uint64_t first = static_cast<uint64_t>(first_ + i);
    const uint32_t low = static_cast<uint32_t>(first);
    // One high half for all the indices: its share of the hash is computed once.
    if (one_run_ && low <= 0xffffffffu - (width - 1)) {
      for (int w = 0; w < width; ++w) bits[w] = random_bits((first >> 32 << 32) | (low + w), key0, key1);
    } else {
      Indices indices(place_, offset_ + i);
      for (int w = 0; w < width; ++w) bits[w] = random_bits(indices.next(), key0, key1);
    }
  }

  const UpdateArguments& a_;
  const Ends& ends_;
  const Place& place_;
  int64_t offset_;
  int64_t n_;
  P* params_;
  M* moments_[Step::kMoments];
  S* ipt_;
  P* shadow_;
  const P* grads_;
  const uint8_t* mask_;
  typename Step::Row row_;
  float accepted_;
  float grad_scale_;
  float clip_;
  uint32_t key_[2];
  int64_t first_;  // global index of the chunk's first weight
  bool one_run_;   // global indices are consecutive within the chunk
};

template <typename Step, typename P, typename S, typename M>
PINS_HD void update_chunk(const UpdateArguments& a, int64_t chunk, int64_t thread, int64_t threads) {
  if (a.found_inf != nullptr && a.found_inf[0] != 0.0f) return;
  Update<Step, P, S, M>(a, a.work.chunks[chunk]).run(thread, threads);
}

// p = mask ? p : +0, whatever p is. An access without a pruned weight is not written back. T: storage of parameters.
template <typename T>
struct ApplyMask {
  T* params;
  const uint8_t* mask;

  template <int width>
  PINS_HD void at(int64_t i) const {
    Pack<T, width> values = read<width>(params + i);
    const uint32_t keep = mask_bits<width>(mask, i);
    bool pruned = false;
    for (int w = 0; w < width; ++w) {
      if (keep >> w & 1) continue;
      values.at[w] = T{};
      pruned = true;
    }
    if (pruned) write(params + i, values);
  }
};

template <typename T>
PINS_HD void apply_mask_chunk(const Work& work, int64_t block, int64_t thread, int64_t threads) {
  const Chunk& chunk = work.chunks[block];
  const int64_t n = weights_of(work.places[chunk.tensor], chunk);
  const ApplyMask<T> body{work.stream<T>(0, chunk.tensor) + chunk.offset,
                          work.stream<const uint8_t>(1, chunk.tensor) + chunk.offset / 8};
  const int64_t head = head_of(body.params);
  walk<kWidth<T>>(n, aligned<kWidth<T>>(body.params + head) ? head : n, thread, threads, body);
}
