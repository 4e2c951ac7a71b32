// count_regions_ on the CPU: counts against a bracket for each region of tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>

#include "scored.h"

namespace pins_ext::cpu {
namespace {

enum Stage : int64_t { kKeys, kTies };  // what is above is settled

// One row of `brackets`.
struct Row {
  int64_t lo, hi, shift, key, stage;
};
static_assert(sizeof(Row) == 5 * sizeof(int64_t), "a row of the table of brackets");

void check_row(const Row& row, size_t i, int64_t bins) {
  if (row.stage > kTies) return;
  PINS_CHECK(row.stage >= 0, item("brackets", i), " has stage ", row.stage);
  const bool ties = row.stage == kTies;
  const int64_t most = ties ? std::numeric_limits<int64_t>::max() : 0xffffffff;
  PINS_CHECK(0 <= row.lo && row.lo <= row.hi && row.hi <= most && 0 <= row.shift && row.shift < (ties ? 63 : 32) &&
                 (row.hi - row.lo) >> row.shift < bins,
             item("brackets", i), " (", row.lo, ", ", row.hi, ") does not fit ", bins, " bins of 2^", row.shift);
  PINS_CHECK(!ties || (0 <= row.key && row.key <= 0xffffffff), item("brackets", i), " has key ", row.key,
             ", which is no 32-bit key");
}

// Weights of one key in a chunk, by bins of their global index.
void count_ties(const Work& work, const Scored& scored, const Chunk& chunk, const Row& row, Tally& tally) {
  const Run run = work.run(chunk);
  const Place& place = work.places[chunk.tensor];
  const uint32_t key = static_cast<uint32_t>(row.key);
  const int64_t first = global_index(place, run.offset), last = global_index(place, run.offset + run.count - 1);
  if (first > row.hi) return;
  const auto bin_of = [&](int64_t index) { return (index - row.lo) >> row.shift; };
  if (last < row.lo || (first >= row.lo && last <= row.hi && bin_of(first) == bin_of(last))) {
    uint32_t equal = 0;
    Tally own{0, &equal};
    kernels().count[scored.kind](scored.at(work, chunk), {key, key, 0}, own);
    if (last < row.lo) {
      tally.below += equal;
    } else {
      tally.bins[bin_of(first)] += equal;
    }
    return;
  }
  uint32_t keys[kChunk];
  uint16_t places_in_chunk[kChunk];
  int64_t below = 0;
  const Bracket one{key, key, 0};
  const int64_t count = kernels().inside[scored.kind](scored.at(work, chunk), one, keys, places_in_chunk, below);
  const bool consecutive = last - first == run.count - 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = places_in_chunk[i];
    const int64_t index = consecutive ? first + at : global_index(place, run.offset + at);
    if (index > row.hi) break;
    if (index < row.lo) {
      ++tally.below;
    } else {
      ++tally.bins[bin_of(index)];
    }
  }
}

// The counts of a thread for one region, added to those of all when it goes on to the next.
class Counts {
 public:
  Counts(int64_t* total, int64_t bins) : total_(total), own_(bins) {}
  ~Counts() { flush(); }

  Tally& of(int64_t region) {
    // 32 bits are enough for so many chunks.
    constexpr int64_t kChunksAtOnce = (int64_t{1} << 31) / kChunk;
    if (region != region_ || ++chunks_ == kChunksAtOnce) flush();
    region_ = region;
    return tally_;
  }

 private:
  void flush() {
    int64_t* row = total_ + region_ * (1 + static_cast<int64_t>(own_.size()));
    if (tally_.below) __atomic_fetch_add(row, tally_.below, __ATOMIC_RELAXED);
    for (size_t i = 0; i < own_.size(); ++i) {
      if (own_[i]) __atomic_fetch_add(row + 1 + i, own_[i], __ATOMIC_RELAXED);
      own_[i] = 0;
    }
    tally_.below = 0;
    chunks_ = 0;
  }

  int64_t* total_;
  std::vector<uint32_t> own_;
  Tally tally_{0, own_.data()};
  int64_t region_ = 0, chunks_ = 0;
};

void count_regions_(const Tensor& counts, const Tensors& a, const Tensors& b, const Tensor& places,
                    const Tensor& chunks, const std::string& score, const Tensor& regions, const Tensor& brackets,
                    const OptionalTensor& factors, const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const Scored scored = check_scores(work, a, b, score, factors);
  const int64_t n = static_cast<int64_t>(work.tensors());
  const int64_t size = brackets.dim() > 0 ? brackets.size(0) : 0, columns = counts.dim() > 1 ? counts.size(1) : 0;
  check_shape("regions", regions, {n}, ScalarType::Long, kCpu);
  check_shape("brackets", brackets, {size, 5}, ScalarType::Long, kCpu);
  check_shape("counts", counts, {size, columns}, ScalarType::Long, kCpu);
  PINS_CHECK(columns > 1, "counts must have a column of what lies below and one for each bin, got ", columns);
  const Inputs inputs{{"places", &places},
                      {"chunks", &chunks},
                      {"regions", &regions},
                      {"brackets", &brackets},
                      {"factors", if_given(factors)}};
  inputs.check_output([] { return "counts"; }, counts);
  const Row* rows = static_cast<const Row*>(brackets.const_data_ptr());
  const int64_t* region_of = longs_of(regions);
  for (int64_t i = 0; i < size; ++i) check_row(rows[i], i, columns - 1);
  for (int64_t i = 0; i < n; ++i) {
    PINS_CHECK(0 <= region_of[i] && region_of[i] < size, item("regions", i), " must be below ", size, ", got ",
               region_of[i]);
  }
  int64_t* total = static_cast<int64_t*>(counts.data_ptr());
  std::fill(total, total + size * columns, 0);
  const auto count = kernels().count[scored.kind];
  torch::stable::parallel_for(0, work.size, 1, [&](int64_t begin, int64_t end) {
    Counts own(total, columns - 1);
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = work.chunks[i];
      const Row& row = rows[region_of[chunk.tensor]];
      if (row.stage > kTies) continue;
      Tally& tally = own.of(region_of[chunk.tensor]);
      if (row.stage == kTies) {
        count_ties(work, scored, chunk, row, tally);
      } else {
        const Bracket bounds{static_cast<uint32_t>(row.lo), static_cast<uint32_t>(row.hi), static_cast<int>(row.shift)};
        count(scored.at(work, chunk), bounds, tally);
      }
    }
  });
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) { m.impl("count_regions_", TORCH_BOX(&pins_ext::cpu::count_regions_)); }
