// sample, count_, collect_, tie_index, pack_ and pack_around_ on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "candidates.h"
#include "scored.h"

namespace pins_ext::cpu {
namespace {

// Position in [0, 1) inside a stratum: a hash of its number, so that regular weights meet no regular grid.
double jitter(int64_t stratum) {
  return random_bits(static_cast<uint64_t>(stratum), 0x243f6a88u, 0x85a308d3u) * 0x1p-32;
}

// Samples whose cache misses overlap: one at a time, a sample of 65536 takes as long as a pass over 85 M weights.
constexpr int64_t kSampleBatch = 64;

Tensor sample(const Tensors& a, const Tensors& b, const Tensor& places, const Tensor& chunks, const std::string& score,
              int64_t size, const OptionalTensor& factors, const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const Scored scored = check_scores(work, a, b, score, factors);
  PINS_CHECK(size >= 1, "size must be at least 1, got ", size);
  Tensor result = torch::stable::new_empty(places, {size}, ScalarType::Long);
  int64_t* target = static_cast<int64_t*>(result.data_ptr());
  // starts[i]: weights before tensor i.
  std::vector<int64_t> starts(1, 0);
  for (int64_t numel : work.numel) starts.push_back(starts.back() + numel);
  const int64_t total = starts.back();
  if (total == 0) {
    std::fill(target, target + size, 0);
    return result;
  }
  auto chunk_of = [&](int64_t stratum) {
    const double position = (static_cast<double>(stratum) + jitter(stratum)) * (static_cast<double>(total) / size);
    const int64_t weight = std::min(static_cast<int64_t>(position), total - 1);
    const int64_t tensor = std::upper_bound(starts.begin(), starts.end(), weight) - starts.begin() - 1;
    return Chunk{tensor, weight - starts[tensor]};
  };
  torch::stable::parallel_for(0, size, kSampleBatch, [&](int64_t begin, int64_t end) {
    Scores batch[kSampleBatch];
    for (int64_t s = begin; s < end; s += kSampleBatch) {
      const int64_t n = std::min(kSampleBatch, end - s);
      for (int64_t i = 0; i < n; ++i) {
        const Chunk at = chunk_of(s + i);
        batch[i] = scored.at(Run{&work.places[at.tensor].base, at.offset, 1}, at);
        __builtin_prefetch(batch[i].a.data);
        __builtin_prefetch(batch[i].b.data);
      }
      for (int64_t i = 0; i < n; ++i) {
        uint32_t key;
        kernels().keys[scored.kind](batch[i], &key);
        target[s + i] = key;
      }
    }
  });
  return result;
}

void count_(const Tensor& counts, const Tensors& a, const Tensors& b, const Tensor& places, const Tensor& chunks,
            const std::string& score, const Tensor& bracket, const OptionalTensor& factors,
            const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const Scored scored = check_scores(work, a, b, score, factors);
  const CheckedBracket checked = check_bracket(bracket);
  check_counts(counts);
  const Inputs inputs{{"places", &places}, {"chunks", &chunks}, {"bracket", &bracket}, {"factors", if_given(factors)}};
  inputs.check_output([] { return "counts"; }, counts);
  if (checked.resolved) return;
  const auto count = kernels().count[scored.kind];
  count_chunks(work, bracket, counts, [&](const Chunk& chunk, const Bracket& bounds, Tally& tally) {
    count(scored.at(work, chunk), bounds, tally);
  });
}

// Keys and global indices of the weights inside the bracket, in any order; past the size nothing is written.
void collect_(const Tensor& found, const Tensor& candidates, const Tensors& a, const Tensors& b, const Tensor& places,
              const Tensor& chunks, const std::string& score, const Tensor& bracket, const OptionalTensor& factors,
              const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const Scored scored = check_scores(work, a, b, score, factors);
  const CheckedBracket checked = check_bracket(bracket);
  const int64_t size = candidates.dim() > 1 ? candidates.size(1) : 0;
  check_shape("found", found, {1}, ScalarType::Long, kCpu);
  check_shape("candidates", candidates, {2, size}, ScalarType::Long, kCpu);
  const Inputs inputs{{"places", &places}, {"chunks", &chunks}, {"bracket", &bracket}, {"factors", if_given(factors)}};
  inputs.check_output([] { return "found"; }, found);
  inputs.check_output([] { return "candidates"; }, candidates);
  Inputs{{"found", &found}}.check_output([] { return "candidates"; }, candidates);
  int64_t* keys_at = static_cast<int64_t*>(candidates.data_ptr());
  int64_t* index_at = keys_at + size;
  const Bracket bounds = checked.bounds;
  std::atomic<int64_t> total{0};
  if (!checked.resolved) {
    for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
      // More than fit: the caller has to narrow the bracket, and the rest need not be read.
      if (total.load(std::memory_order_relaxed) > size) return;
      uint32_t keys[kChunk];
      uint16_t places_in_chunk[kChunk];
      int64_t below = 0;
      const int64_t count = kernels().inside[scored.kind](scored.at(work, chunk), bounds, keys, places_in_chunk, below);
      if (count == 0) return;
      const int64_t begin = total.fetch_add(count, std::memory_order_relaxed);
      if (begin + count > size) return;
      for (int64_t i = 0; i < count; ++i) {
        keys_at[begin + i] = keys[i];
        index_at[begin + i] = global_index(work.places[chunk.tensor], chunk.offset + places_in_chunk[i]);
      }
    });
  }
  *static_cast<int64_t*>(found.data_ptr()) = total.load();
}

// Global index of the weight of this rank among those of one key in a chunk.
int64_t index_of_tie(const Work& work, const Scored& scored, const Chunk& chunk, uint32_t key, int64_t rank) {
  const Run run = work.run(chunk);
  std::vector<uint32_t> keys(run.count);
  kernels().keys[scored.kind](scored.at(work, chunk), keys.data());
  int64_t i = 0;
  for (; keys[i] != key || rank-- > 0; ++i) {
  }
  return global_index(work.places[chunk.tensor], chunk.offset + i);
}

Tensor tie_index(const Tensors& a, const Tensors& b, const Tensor& places, const Tensor& chunks,
                 const std::string& score, const Tensor& bracket, const OptionalTensor& factors,
                 const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const Scored scored = check_scores(work, a, b, score, factors);
  const CheckedBracket checked = check_bracket(bracket);
  Tensor result = torch::stable::new_empty(places, {1}, ScalarType::Long);
  int64_t& index = *static_cast<int64_t*>(result.data_ptr());
  index = 0;
  if (checked.rank <= 0) return result;
  const uint32_t key = checked.bounds.lo;
  const auto count = kernels().count[scored.kind];
  std::vector<uint32_t> equal(work.size);
  for_each_chunk(work, [&](const Chunk& chunk, int64_t i) {
    Tally tally{0, &equal[i]};
    count(scored.at(work, chunk), {key, key, 0}, tally);
  });
  int64_t rank = checked.rank;
  index = std::numeric_limits<int64_t>::max();
  for (int64_t i = 0; i < work.size; ++i) {
    if (rank < equal[i]) {
      index = index_of_tie(work, scored, work.chunks[i], key, rank);
      break;
    }
    rank -= equal[i];
  }
  return result;
}

// What the operators that write masks share.
Scored check_packing(const Work& work, const Tensors& masks, const Tensor& stats, const Tensors& a, const Tensors& b,
                     const std::string& score, const OptionalTensor& factors, const Inputs& inputs) {
  const Scored scored = check_scores(work, a, b, score, factors);
  check_list("masks", masks, work.tensors(), kCpu, {ScalarType::Byte});
  check_masks(masks, work.numel);
  check_shape("stats", stats, {static_cast<int64_t>(work.tensors()), 3}, ScalarType::Long, kCpu);
  inputs.check_outputs({{"masks", masks}});
  inputs.check_output([] { return "stats"; }, stats);
  Inputs{{"stats", &stats}}.check_outputs({{"masks", masks}});
  return scored;
}

void pack_(const Written& masks, const Tensor& stats, const Tensors& a, const Tensors& b, const Tensor& places,
           const Tensor& chunks, const std::string& score, const Tensor& threshold, const OptionalTensor& factors,
           const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const int64_t n = static_cast<int64_t>(work.tensors());
  const Inputs inputs{
      {"places", &places}, {"chunks", &chunks}, {"threshold", &threshold}, {"factors", if_given(factors)}};
  const Scored scored = check_packing(work, masks, stats, a, b, score, factors, inputs);
  const int64_t rows = threshold.dim() > 0 && threshold.size(0) == n ? n : 1;
  check_shape("threshold", threshold, {rows, 2}, ScalarType::Long, kCpu);
  const int64_t* thresholds = longs_of(threshold);
  for (int64_t i = 0; i < rows; ++i) {
    PINS_CHECK(thresholds[2 * i] >= 0 && thresholds[2 * i] <= 0xffffffff, item("threshold", i), " has key ",
               thresholds[2 * i], ", which is no 32-bit key");
  }
  int64_t* totals = static_cast<int64_t*>(stats.data_ptr());
  std::fill(totals, totals + 3 * n, 0);
  const Masks masks_at(masks);
  const auto pack = kernels().pack[scored.kind];
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    const int64_t* row = thresholds + (rows == 1 ? 0 : 2 * chunk.tensor);
    const Run run = work.run(chunk);
    PackStats own{0, 0, 0};
    pack(scored.at(work, chunk),
         {masks_at.at(chunk), static_cast<uint32_t>(row[0]),
          weights_before(work.places[chunk.tensor], run.offset, run.count, row[1])},
         own);
    add_stats(totals + 3 * chunk.tensor, own);
  });
}

// Masks from a bracket: what lies below is pruned, what lies above is kept, and of the weights inside, in the order of
// (key, index), the bracket's rank says how many are pruned. threshold is then that of `settle`.
void pack_around_(const Written& masks, const Tensor& stats, const Tensor& threshold, const Tensors& a,
                  const Tensors& b, const Tensor& places, const Tensor& chunks, const std::string& score,
                  const Tensor& bracket, const OptionalTensor& factors) {
  const Work work = check_work(places, chunks);
  const Inputs inputs{{"places", &places}, {"chunks", &chunks}, {"bracket", &bracket}, {"factors", if_given(factors)}};
  const Scored scored = check_packing(work, masks, stats, a, b, score, factors, inputs);
  const CheckedBracket checked = check_bracket(bracket);
  check_shape("threshold", threshold, {1, 2}, ScalarType::Long, kCpu);
  inputs.check_output([] { return "threshold"; }, threshold);
  Inputs{{"stats", &stats}}.check_output([] { return "threshold"; }, threshold);
  Inputs{{"threshold", &threshold}}.check_outputs({{"masks", masks}});
  int64_t* totals = static_cast<int64_t*>(stats.data_ptr());
  std::fill(totals, totals + 3 * work.tensors(), 0);
  const Masks masks_at(masks);
  const auto pack_around = kernels().pack_around[scored.kind];
  Candidates candidates;
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    uint32_t keys[kChunk];
    uint16_t places_in_chunk[kChunk];
    uint8_t kept[kChunk];
    Inside found{keys, places_in_chunk, kept};
    PackStats own{0, 0, 0};
    const int64_t size = pack_around(scored.at(work, chunk), checked.bounds, masks_at.at(chunk), own, found);
    add_stats(totals + 3 * chunk.tensor, own);
    candidates.add(work, chunk.tensor, chunk.offset, found, size);
  });
  candidates.settle(checked, masks_at, totals, static_cast<int64_t*>(threshold.data_ptr()), [](const Candidate&) {});
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("sample", TORCH_BOX(&pins_ext::cpu::sample));
  m.impl("count_", TORCH_BOX(&pins_ext::cpu::count_));
  m.impl("collect_", TORCH_BOX(&pins_ext::cpu::collect_));
  m.impl("tie_index", TORCH_BOX(&pins_ext::cpu::tie_index));
  m.impl("pack_", TORCH_BOX(&pins_ext::cpu::pack_));
  m.impl("pack_around_", TORCH_BOX(&pins_ext::cpu::pack_around_));
}
