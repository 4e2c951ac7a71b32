// The few weights inside a bracket around the threshold: ordered, and the first of them pruned.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "bracket.h"

namespace pins_ext::cpu {

// A weight inside the bracket, and where its bit is.
struct Candidate {
  int64_t key, index, tensor, local;
  bool kept;  // before

  bool operator<(const Candidate& other) const { return key < other.key || (key == other.key && index < other.index); }
};

class Candidates {
 public:
  // The weights that a kernel found in a part of a tensor from weight `offset` on.
  void add(const Work& work, int64_t tensor, int64_t offset, const Inside& found, int64_t size) {
    if (size == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t local = offset + found.places[i];
      all_.push_back({found.keys[i], global_index(work.places[tensor], local), tensor, local, found.kept[i] != 0});
    }
  }

  // In the order of (key, index) as many as the bracket's rank says are pruned: their bits are cleared, `stats` [n, 3]
  // corrected, and `lose` told of each. Returns the threshold (order key, tie index) through `threshold`.
  template <class Lose>
  void settle(const CheckedBracket& bracket, const Masks& masks, int64_t* stats, int64_t* threshold, const Lose& lose) {
    const int64_t count = static_cast<int64_t>(all_.size());
    threshold[0] = bracket.bounds.lo;
    threshold[1] = 0;
    if (count == 0 && bracket.rank == 0) return;
    PINS_CHECK(0 <= bracket.rank && bracket.rank < count, "bracket has rank ", bracket.rank, ", but only ", count,
               " weights inside");
    std::sort(all_.begin(), all_.end());
    for (int64_t i = 0; i < bracket.rank; ++i) {
      const Candidate& loser = all_[i];
      masks.at({loser.tensor, 0})[loser.local / 8] &= static_cast<uint8_t>(~(1u << (loser.local % 8)));
      int64_t* total = stats + 3 * loser.tensor;
      total[0] -= 1;
      total[1] += loser.kept ? 1 : -1;
      lose(loser);
    }
    const Candidate& first = all_[bracket.rank];
    const bool tied = bracket.rank > 0 && all_[bracket.rank - 1].key == first.key;
    threshold[0] = first.key;
    threshold[1] = tied ? first.index : 0;
  }

 private:
  std::vector<Candidate> all_;
  std::mutex mutex_;
};

// Integer sums: the order of threads cannot be seen.
inline void add_stats(int64_t* total, const PackStats& own) {
  __atomic_fetch_add(total, own.kept, __ATOMIC_RELAXED);
  __atomic_fetch_add(total + 1, own.flipped, __ATOMIC_RELAXED);
  __atomic_fetch_add(total + 2, own.nan, __ATOMIC_RELAXED);
}

}  // namespace pins_ext::cpu
