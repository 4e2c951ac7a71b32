// A counting pass: keys below a bracket and a histogram of those inside, summed over threads.
#pragma once

#include <algorithm>
#include <mutex>

#include "work.h"

namespace pins_ext::cpu {

struct CheckedBracket {
  Bracket bounds;
  int64_t rank;
  bool resolved;
};

// int64 [5]: lowest and highest key, bin width as a shift, rank from the lowest, 1 once it is one key.
inline CheckedBracket check_bracket(const Tensor& bracket) {
  check_shape("bracket", bracket, {5}, ScalarType::Long, kCpu);
  const int64_t* row = longs_of(bracket);
  const int64_t lo = row[0], hi = row[1], shift = row[2];
  PINS_CHECK(0 <= lo && lo <= hi && hi <= 0xffffffff && 0 <= shift && shift < 32 && (hi - lo) >> shift < kBins,
             "bracket (", lo, ", ", hi, ") does not fit ", kBins, " bins of 2^", shift, " keys");
  return {{static_cast<uint32_t>(lo), static_cast<uint32_t>(hi), static_cast<int>(shift)}, row[3], row[4] == 1};
}

inline void check_counts(const Tensor& counts) { check_shape("counts", counts, {1 + kBins}, ScalarType::Long, kCpu); }

// counts[0] = keys below the bracket, counts[1 + i] = keys in its bin i; f counts one chunk.
template <class F>
void count_chunks(const Work& work, const Tensor& bracket, const Tensor& counts, const F& f) {
  const Bracket bounds = check_bracket(bracket).bounds;
  int64_t* total = static_cast<int64_t*>(counts.data_ptr());
  std::fill(total, total + 1 + kBins, 0);
  const size_t bins = ((bounds.hi - bounds.lo) >> bounds.shift) + size_t{1};
  std::mutex mutex;
  torch::stable::parallel_for(0, work.size, 1, [&](int64_t begin, int64_t end) {
    // 32 bits: half as much of the cache, and enough for so many chunks.
    constexpr int64_t kChunksAtOnce = (int64_t{1} << 31) / kChunk;
    std::vector<uint32_t> own(bins);
    for (int64_t first = begin; first < end; first += kChunksAtOnce) {
      Tally tally{0, own.data()};
      for (int64_t i = first; i < std::min(end, first + kChunksAtOnce); ++i) f(work.chunks[i], bounds, tally);
      const std::lock_guard<std::mutex> lock(mutex);
      total[0] += tally.below;
      for (size_t i = 0; i < bins; ++i) total[1 + i] += own[i];
      std::fill(own.begin(), own.end(), 0);
    }
  });
}

}  // namespace pins_ext::cpu
