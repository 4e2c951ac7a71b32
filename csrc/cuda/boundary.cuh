// What a window's boundary adds to the update of a chunk: masks by the averages that are there, and, of the window that
// ends, fold and count. Host and device, like update.cuh, after which it is included, in the same namespace.
//
// Weights are read and written once. Those inside the bracket around the threshold stay unmasked until all of them are
// known; then settle_candidate orders them, and takes back those that are pruned.

// Room for the weights inside the bracket; pins_ext/ops/select.py CANDIDATES.
constexpr int64_t kCandidates = 16384;

// All pointers are device memory.
struct BoundaryArguments {
  UpdateArguments update;
  const int64_t* around;  // [5]: lowest and highest key, -, rank, -; null: the masks stay
  int64_t* stats;         // [tensors, 3]: kept, flipped, NaN
  int64_t* threshold;     // [2]: given where the rank is negative, written elsewhere
  int64_t* candidates;    // [1 + 4 kCandidates]: how many; keys, global indices, tensors, 2 local indices + kept before
  const int64_t* fold_rng;  // [2]; null: the window goes on
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  const int64_t* bracket;  // [5]; null: nothing is counted
  int64_t* counts;         // [1 + kBins]
};

// ---- one at a time ----------------------------------------------------------------------------------------------

PINS_HD int64_t fetch_add(int64_t* to, int64_t x) {
#ifdef __CUDA_ARCH__
  PINS_ACCESS(to);
  return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x)));
#else
  const int64_t before = *to;
  *to += x;
  return before;
#endif
}

PINS_HD void set_bits(uint32_t* word, uint32_t bits) {
#ifdef __CUDA_ARCH__
  atomicOr(word, bits);
#else
  *word |= bits;
#endif
}

PINS_HD void clear_bit(uint32_t* word, uint32_t bit) {
#ifdef __CUDA_ARCH__
  PINS_ACCESS(word);
  atomicAnd(word, ~(1u << bit));
#else
  *word &= ~(1u << bit);
#endif
}

PINS_HD int ones_in(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// ---- counting ---------------------------------------------------------------------------------------------------

// Keys counted against a bracket, as triton_kernels/count.py does: those below it, at its ends and at one special key
// in registers, so that heavy ties do not queue at one address; the few others inside by atomics.
class Counting {
 public:
  PINS_HD Counting(const int64_t* bracket, int64_t* counts) : counts_(counts) {
    if (bracket == nullptr) return;
    lo_ = static_cast<uint32_t>(bracket[0]);
    width_ = static_cast<uint32_t>(bracket[1]) - lo_;
    shift_ = static_cast<uint32_t>(bracket[2]);
    const uint32_t zero = 0x80000000u - lo_;
    special_ = zero < width_ ? zero : width_ >> 1;
  }

  // What the caller adds up: a byte for each of the four counters.
  PINS_HD uint32_t count(uint32_t key) const {
    if (key < lo_) return 1u;
    const uint32_t past = key - lo_;
    if (past > width_) return 0u;
    if (past == 0) return 1u << 8;
    if (past == special_) return 1u << 16;
    if (past == width_) return 1u << 24;
    fetch_add(counts_ + 1 + bin(past), 1);
    return 0u;
  }

  // Sums of the bytes: 16 bits each, of the counters 0 and 2, and 1 and 3.
  PINS_HD void commit(uint32_t even, uint32_t odd) const {
    add(0, even & 0xffffu);
    add(1, odd & 0xffffu);
    add(1 + bin(special_), even >> 16);
    add(1 + bin(width_), odd >> 16);
  }

 private:
  // What a bracket holds is not checked: no bin is outside.
  PINS_HD int64_t bin(uint32_t past) const {
    const uint32_t bin = past >> shift_;
    return bin < 0xffffu ? bin : 0xffffu;
  }

  PINS_HD void add(int64_t at, uint32_t sum) const {
    if (sum != 0) fetch_add(counts_ + at, sum);
  }

  int64_t* counts_;
  uint32_t lo_ = 0, width_ = 0, special_ = 0, shift_ = 0;
};

// ---- choosing ---------------------------------------------------------------------------------------------------

// Of a chunk: keys below `lo` are pruned, those above `hi` kept. Between them lie candidates; or, where the threshold
// is given, its ties, of which the first of the chunk are pruned.
struct Cut {
  uint32_t lo = 0, hi = 0;
  int ties = -1;  // candidates

  PINS_HD Cut(const BoundaryArguments& a, const Place& place, const Chunk& chunk, int64_t n) {
    if (a.around == nullptr) return;
    const bool given = a.around[3] < 0;
    const int64_t* keys = given ? a.threshold : a.around;
    lo = static_cast<uint32_t>(keys[0]);
    hi = given ? lo : static_cast<uint32_t>(keys[1]);
    if (given) ties = static_cast<int>(weights_before(place, chunk.offset, n, a.threshold[1]));
  }
};

// What a thread has to add up when its chunk is done.
struct Sums {
  uint32_t counted = 0;  // see Counting
  uint32_t nan = 0, kept = 0, flipped = 0;
};

// S: storage of the averages.
template <typename S, int width>
struct Averages {
  Pack<S, width> exp_avg_ipt, exp_avg_unc;
};

// Of a chunk. The thread's sums go into `sums`; `keep`, a bit for each weight of the chunk and zero at first, is what
// all threads of the block choose.
template <typename S>
class Boundary {
 public:
  static constexpr bool kEnds = true;

  PINS_HD Boundary(const BoundaryArguments& a, const Chunk& chunk, int list, uint32_t* keep, Sums& sums)
      : a_(a),
        chunk_(chunk),
        exp_avg_ipt_(a.update.work.stream<S>(list, chunk.tensor) + chunk.offset),
        exp_avg_unc_(a.update.lists >> (list + 1) & 1 ? a.update.work.stream<S>(list + 1, chunk.tensor) + chunk.offset
                                                      : nullptr),
        keep_(keep),
        sums_(sums),
        cut_(a, place(), chunk, weights_of(place(), chunk)),
        counting_(a.bracket, a.counts) {}

  PINS_HD bool chooses() const { return a_.around != nullptr; }
  PINS_HD bool folds() const { return a_.fold_rng != nullptr; }
  PINS_HD uint32_t fold_key(int k) const { return static_cast<uint32_t>(a_.fold_rng[k]); }

  // Whether both streams can be accessed like one of `width` weights in 16 bytes, from `head` on.
  template <int width>
  PINS_HD bool shares(int64_t head) const {
    return aligned<width>(exp_avg_ipt_ + head) && (exp_avg_unc_ == nullptr || aligned<width>(exp_avg_unc_ + head));
  }

  template <int width>
  PINS_HD Averages<S, width> read_averages(int64_t i) const {
    Averages<S, width> averages = {};
    averages.exp_avg_ipt = read<width>(exp_avg_ipt_ + i);
    if (exp_avg_unc_ != nullptr) averages.exp_avg_unc = read<width>(exp_avg_unc_ + i);
    return averages;
  }

  // Bits of the weights [i, i + width) of the chunk that are kept, candidates among them. before: the chunk's mask.
  template <int width>
  PINS_HD uint32_t choose(const Averages<S, width>& averages, int64_t i, const uint8_t* before) const {
    uint32_t keep = 0, inside = 0;
    for (int w = 0; w < width; ++w) {
      const uint32_t key = key_of(averages, w);
      const bool between = cut_.lo <= key && key <= cut_.hi;
      keep |= static_cast<uint32_t>(between ? i + w >= cut_.ties : key > cut_.hi) << w;
      inside |= static_cast<uint32_t>(between && cut_.ties < 0) << w;
      sums_.nan += key == 0xffffffffu;
    }
    const uint32_t shift = static_cast<uint32_t>(i) % 32;
    if (keep != 0) set_bits(keep_ + i / 32, keep << shift);
    if (shift + width > 32 && keep >> (32 - shift) != 0) set_bits(keep_ + i / 32 + 1, keep >> (32 - shift));
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (int w = 0; inside >> w != 0; ++w) {
      if (inside >> w & 1) append(i + w, before);
    }
    return keep;
  }

  // The window's mean of weights [i, i + width) joins the averages, whose scores are counted.
  template <int width>
  PINS_HD void fold(int64_t i, Averages<S, width> averages, const Pack<S, width>& ipt,
                    const uint32_t (&random)[width]) const {
    for (int w = 0; w < width; ++w) {
      const float x = load(ipt.at[w]);
      const float mean = smooth_ipt(load(averages.exp_avg_ipt.at[w]), x, a_.beta1, a_.one_minus_beta1);
      const float unc = smooth_unc(load(averages.exp_avg_unc.at[w]), x, mean, a_.beta2, a_.one_minus_beta2);
      store(averages.exp_avg_ipt.at[w], mean, random[w]);
      store(averages.exp_avg_unc.at[w], unc, random[w] >> 16);
    }
    write(exp_avg_ipt_ + i, averages.exp_avg_ipt);
    if (exp_avg_unc_ != nullptr) write(exp_avg_unc_ + i, averages.exp_avg_unc);
    if (a_.bracket == nullptr) return;
    for (int w = 0; w < width; ++w) sums_.counted += counting_.count(key_of(averages, w));
  }

 private:
  PINS_HD const Place& place() const { return a_.update.work.places[chunk_.tensor]; }

  template <int width>
  PINS_HD uint32_t key_of(const Averages<S, width>& averages, int w) const {
    const float a = load(averages.exp_avg_ipt.at[w]), b = load(averages.exp_avg_unc.at[w]);
    return order_key(exp_avg_unc_ != nullptr ? score_of<Score::product>(a, b, 1.0f)
                                             : score_of<Score::identity>(a, b, 1.0f));
  }

  // A candidate: the chunk's weight i, read again, for there are few.
  PINS_HD void append(int64_t i, const uint8_t* before) const {
    const int64_t slot = fetch_add(a_.candidates, 1);
    if (slot >= kCandidates) return;
    const int64_t local = chunk_.offset + i;
    int64_t* at = a_.candidates + 1 + slot;
    PINS_ACCESS(at);
    at[0] = key_of(read_averages<1>(i), 0);
    at[kCandidates] = global_index(place(), local);
    at[2 * kCandidates] = chunk_.tensor;
    at[3 * kCandidates] = 2 * local + (mask_bits<1>(before, i) & 1);
  }

  const BoundaryArguments& a_;
  const Chunk& chunk_;
  S* exp_avg_ipt_;
  S* exp_avg_unc_;  // null where exp_avg_ipt is the score
  uint32_t* keep_;
  Sums& sums_;
  Cut cut_;
  Counting counting_;
};

// ---- a chunk ----------------------------------------------------------------------------------------------------

template <typename Step, typename P, typename S, typename M>
PINS_HD void boundary_chunk(const BoundaryArguments& a, int64_t block, int64_t thread, int64_t threads, uint32_t* keep,
                            Sums& sums) {
  const Chunk& chunk = a.update.work.chunks[block];
  const Boundary<S> boundary(a, chunk, Lists<Step>::count, keep, sums);
  Update<Step, P, S, M, Boundary<S>>(a.update, chunk, boundary).run(thread, threads);
}

// Once all threads of the block have chosen: the chunk's mask. `list`: its place among the lists.
PINS_HD void write_masks(const BoundaryArguments& a, int list, int64_t block, int64_t thread, int64_t threads,
                         const uint32_t* keep, Sums& sums) {
  const Chunk& chunk = a.update.work.chunks[block];
  const int64_t n = weights_of(a.update.work.places[chunk.tensor], chunk);
  uint32_t* mask = a.update.work.stream<uint32_t>(list, chunk.tensor) + chunk.offset / 32;
  for (int64_t i = thread; i < (n + 63) / 64 * 2; i += threads) {
    const int64_t left = n - 32 * i;
    const uint32_t valid = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
    sums.kept += ones_in(keep[i]);
    sums.flipped += ones_in(keep[i] ^ (read<1>(mask + i).at[0] & valid));
    write(mask + i, Pack<uint32_t, 1>{keep[i]});
  }
}

// Sums of the threads; those of `counted` as Counting::commit wants them.
PINS_HD void commit(const BoundaryArguments& a, int64_t block, const Sums& sums, uint32_t even, uint32_t odd) {
  if (a.bracket != nullptr) Counting(a.bracket, a.counts).commit(even, odd);
  if (a.around == nullptr) return;
  int64_t* stats = a.stats + 3 * a.update.work.chunks[block].tensor;
  fetch_add(stats, sums.kept);
  if (sums.flipped != 0) fetch_add(stats + 1, sums.flipped);
  if (sums.nan != 0) fetch_add(stats + 2, sums.nan);
}

// ---- candidates -------------------------------------------------------------------------------------------------

// Bytes of a weight, and of its moments; 0 where they stay.
struct Elements {
  int weight, moment, moments;
};

PINS_HD void zero_element(char* stream, int64_t i, int bytes) {
  if (bytes == 4) write(reinterpret_cast<uint32_t*>(stream) + i, Pack<uint32_t, 1>{});
  if (bytes == 2) write(reinterpret_cast<uint16_t*>(stream) + i, Pack<uint16_t, 1>{});
}

// Candidate i of all, when all chunks are done: as many as the bracket's rank says are pruned, in the order of (key,
// global index), and the first that is kept is the threshold. Each looks at all the others: there are few. Where they
// are more than there is room for, or fewer than the rank says, none is pruned, and the threshold says so.
PINS_HD void settle_candidate(const BoundaryArguments& a, const Elements& elements, int mask_list, int64_t i) {
  const int64_t rank = a.around[3], found = a.candidates[0];
  if (rank < 0) return;
  if (found > kCandidates || rank >= found) {
    const bool none = found == 0 && rank == 0;
    if (i == 0) a.threshold[0] = none ? a.around[0] : -1;
    if (i == 0) a.threshold[1] = none ? 0 : -1;
    return;
  }
  if (i >= found) return;
  const int64_t* keys = a.candidates + 1;
  const int64_t* indices = keys + kCandidates;
  const int64_t key = keys[i], index = indices[i];
  int64_t before = 0, ties = 0;
  for (int64_t j = 0; j < found; ++j) {
    const bool tie = keys[j] == key && indices[j] < index;
    before += keys[j] < key || tie;
    ties += tie;
  }
  if (before == rank) {
    a.threshold[0] = key;
    a.threshold[1] = ties > 0 ? index : 0;
  }
  if (before >= rank) return;
  const Work& work = a.update.work;
  const int64_t tensor = indices[kCandidates + i], place = indices[2 * kCandidates + i], local = place / 2;
  clear_bit(work.stream<uint32_t>(mask_list, tensor) + local / 32, static_cast<uint32_t>(local % 32));
  fetch_add(a.stats + 3 * tensor, -1);
  fetch_add(a.stats + 3 * tensor + 1, place % 2 != 0 ? 1 : -1);
  zero_element(work.stream<char>(0, tensor), local, elements.weight);
  for (int m = 0; m < elements.moments; ++m) zero_element(work.stream<char>(1 + m, tensor), local, elements.moment);
}
