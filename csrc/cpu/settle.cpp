// settle_around on the CPU: the weight at a rank in one pass over the scores, those near it written down on the way.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <mutex>
#include <numeric>
#include <vector>

#include "bracket.h"
#include "scored.h"

namespace pins_ext::cpu {
namespace {

// Weights that are written down at most, 6 bytes each; pins_ext/ops/select.py LISTED.
constexpr int64_t kMostInside = int64_t{1} << 22;

// A histogram of what is written down that stays in the L1 cache.
constexpr int kCoarseBits = 11;

// The weights of a chunk inside the bracket.
struct Listed {
  std::vector<uint32_t> keys;
  std::vector<uint16_t> places;
};

// What one pass over the scores finds of a bracket.
class Around {
 public:
  Around(const Work& work, const Scored& scored, const Bracket& bracket)
      : work_(work), lo_(bracket.lo), listed_(work.size) {
    while ((bracket.hi - lo_) >> shift_ >> kCoarseBits) ++shift_;
    bins_.assign(((bracket.hi - lo_) >> shift_) + size_t{1}, 0);
    std::mutex mutex;
    torch::stable::parallel_for(0, work.size, 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> bins(bins_.size());
      const int64_t below = read(scored, bracket, begin, end, bins);
      const std::lock_guard<std::mutex> lock(mutex);
      below_ += below;
      std::transform(bins.begin(), bins.end(), bins_.begin(), bins_.begin(), std::plus<>());
    });
  }

  // More are inside than are written down: nothing else is known then.
  bool full() const { return inside_.load(std::memory_order_relaxed) > kMostInside; }

  int64_t below() const { return below_; }

  // The coarse bin with this rank among the weights inside, which becomes the rank in it; -1: there are fewer.
  int64_t bin_of(int64_t& rank) const {
    for (size_t bin = 0; bin < bins_.size(); rank -= bins_[bin++]) {
      if (rank < bins_[bin]) return static_cast<int64_t>(bin);
    }
    return -1;
  }

  // Keys of the weights in a coarse bin.
  std::vector<uint32_t> keys_of(int64_t bin) const {
    std::vector<uint32_t> found;
    found.reserve(bins_[bin]);
    for (const Listed& listed : listed_) {
      std::copy_if(listed.keys.begin(), listed.keys.end(), std::back_inserter(found),
                   [&](uint32_t key) { return (key - lo_) >> shift_ == bin; });
    }
    return found;
  }

  // Global indices of the weights with a key.
  std::vector<int64_t> indices_of(uint32_t key) const {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < work_.size; ++i) {
      const Chunk& chunk = work_.chunks[i];
      const Listed& listed = listed_[i];
      for (size_t k = 0; k < listed.keys.size(); ++k) {
        if (listed.keys[k] != key) continue;
        found.push_back(global_index(work_.places[chunk.tensor], chunk.offset + listed.places[k]));
      }
    }
    return found;
  }

 private:
  // Of these chunks; returns how many weights are below the bracket.
  int64_t read(const Scored& scored, const Bracket& bracket, int64_t begin, int64_t end, std::vector<int64_t>& bins) {
    uint32_t keys[kChunk];
    uint16_t places[kChunk];
    int64_t below = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Scores scores = scored.at(work_, work_.chunks[i]);
      const int64_t count = kernels().inside[scored.kind](scores, bracket, keys, places, below);
      if (inside_.fetch_add(count, std::memory_order_relaxed) + count > kMostInside) break;
      for (int64_t k = 0; k < count; ++k) ++bins[(keys[k] - lo_) >> shift_];
      listed_[i].keys.assign(keys, keys + count);
      listed_[i].places.assign(places, places + count);
    }
    return below;
  }

  const Work& work_;
  uint32_t lo_;
  int shift_ = 0;
  int64_t below_ = 0;
  std::atomic<int64_t> inside_{0};
  std::vector<int64_t> bins_;
  std::vector<Listed> listed_;  // of each chunk
};

// How many weights lie below a key, and how many have it.
std::pair<int64_t, int64_t> count_key(const Work& work, const Scored& scored, const Bracket& key) {
  std::atomic<int64_t> below{0}, equal{0};
  const auto count = kernels().count[scored.kind];
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    uint32_t bin = 0;
    Tally tally{0, &bin};
    count(scored.at(work, chunk), key, tally);
    below.fetch_add(tally.below, std::memory_order_relaxed);
    equal.fetch_add(bin, std::memory_order_relaxed);
  });
  return {below.load(), equal.load()};
}

// The bracket, narrowed to the key of the weight at `position`, and the tie index (see `settle`). Where that weight is
// beside it, all keys on its side; where too many are inside, itself in the finest bins; where it is one key, the rank
// among the weights of that key, whose tie index is not looked for.
std::tuple<Tensor, Tensor> settle_around(const Tensors& a, const Tensors& b, const Tensor& places, const Tensor& chunks,
                                         const std::string& score, const Tensor& bracket, const Tensor& position,
                                         const OptionalTensor& factors) {
  const Work work = check_work(places, chunks);
  const Scored scored = check_scores(work, a, b, score, factors);
  const CheckedBracket checked = check_bracket(bracket);
  check_shape("position", position, {}, ScalarType::Long, kCpu);
  Tensor settled = torch::stable::new_empty(bracket, {5}, ScalarType::Long);
  Tensor tie = torch::stable::new_empty(bracket, {1}, ScalarType::Long);
  int64_t* row = static_cast<int64_t*>(settled.data_ptr());
  int64_t& index = *static_cast<int64_t*>(tie.data_ptr());
  index = 0;
  auto leave = [&](int64_t lo, int64_t hi, int64_t rank, bool resolved) {
    int64_t shift = 0;
    while ((hi - lo) >> shift >= kBins) ++shift;
    const int64_t values[] = {lo, hi, shift, rank, resolved};
    std::copy(values, values + 5, row);
    return std::make_tuple(settled, tie);
  };
  const Bracket& bounds = checked.bounds;
  const int64_t total = std::accumulate(work.numel.begin(), work.numel.end(), int64_t{0});
  int64_t rank = *longs_of(position);
  PINS_CHECK(0 <= rank && rank < total, "position must be the rank of one of ", total, " weights, got ", rank);
  if (checked.resolved) return leave(bounds.lo, bounds.hi, checked.rank, true);
  auto leave_below = [&] { return leave(0, int64_t{bounds.lo} - 1, rank, false); };
  auto leave_above = [&] { return leave(int64_t{bounds.hi} + 1, 0xffffffff, rank, false); };
  if (bounds.lo == bounds.hi) {
    const auto [below, equal] = count_key(work, scored, bounds);
    if (rank < below) return leave_below();
    rank -= below;
    if (rank < equal) return leave(bounds.lo, bounds.hi, rank, true);
    rank -= equal;
    return leave_above();
  }
  const Around around(work, scored, bounds);
  if (around.full()) return leave(bounds.lo, bounds.hi, 0, false);
  if (rank < around.below()) return leave_below();
  rank -= around.below();
  const int64_t bin = around.bin_of(rank);
  if (bin < 0) return leave_above();
  std::vector<uint32_t> keys = around.keys_of(bin);
  std::nth_element(keys.begin(), keys.begin() + rank, keys.end());
  const uint32_t key = keys[rank];
  // Among those of its key.
  rank = std::count(keys.begin(), keys.begin() + rank, key);
  if (rank > 0) {
    std::vector<int64_t> indices = around.indices_of(key);
    std::nth_element(indices.begin(), indices.begin() + rank, indices.end());
    index = indices[rank];
  }
  return leave(key, key, 0, true);
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) { m.impl("settle_around", TORCH_BOX(&pins_ext::cpu::settle_around)); }
