// eligible_ on the CPU: the scores of what groups N:M can lose.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "scored.h"

namespace pins_ext::cpu {
namespace {

// One row of `groups`.
struct Group {
  int64_t keep, of, stride;
};

constexpr int64_t kMostOfGroup = 32;  // eligible.inl

void check_groups(const Tensor& groups, const Work& work) {
  check_shape("groups", groups, {static_cast<int64_t>(work.tensors()), 3}, ScalarType::Long, kCpu);
  const Group* rows = static_cast<const Group*>(groups.const_data_ptr());
  for (size_t i = 0; i < work.tensors(); ++i) {
    const auto [keep, of, stride] = rows[i];
    PINS_CHECK(0 < keep && keep < of && of <= kMostOfGroup, item("groups", i), " keeps ", keep, " of ", of,
               ": at least 1 and fewer than all, of at most ", kMostOfGroup);
    const int64_t numel = work.numel[i];
    PINS_CHECK(0 < stride && (numel == 0 || (stride <= numel && numel % (of * stride) == 0)), item("groups", i),
               " has weights ", stride, " apart in groups of ", of, ", which do not fill ", numel, " weights");
  }
}

void eligible_(const Written& scores, const Tensor& nans, const Tensors& a, const Tensors& b, const Tensor& places,
               const Tensor& chunks, const std::string& score, const Tensor& groups, const OptionalTensor& factors,
               const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const Scored scored = check_scores(work, a, b, score, factors);
  check_groups(groups, work);
  check_list("scores", scores, work.tensors(), kCpu, {ScalarType::Float});
  check_numel("scores", scores, work.numel);
  check_shape("nans", nans, {static_cast<int64_t>(work.tensors())}, ScalarType::Long, kCpu);
  const Inputs inputs{{"places", &places}, {"chunks", &chunks}, {"groups", &groups}, {"factors", if_given(factors)}};
  inputs.check_outputs({{"scores", scores}});
  inputs.check_output([] { return "nans"; }, nans);
  Inputs{{"nans", &nans}}.check_outputs({{"scores", scores}});
  int64_t* counts = static_cast<int64_t*>(nans.data_ptr());
  std::fill(counts, counts + work.tensors(), 0);
  const Group* rows = static_cast<const Group*>(groups.const_data_ptr());
  const Operand target(work, scores);
  const auto eligible = kernels().eligible[scored.kind];
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    const auto [keep, of, stride] = rows[chunk.tensor];
    // Groups that begin in a chunk may end beyond it.
    const Scores whole = scored.at(work.run(chunk), {chunk.tensor, 0});
    float* to = static_cast<float*>(target.at(chunk.tensor, 0).data);
    const int64_t found = eligible({whole.run, whole.a, whole.b, whole.factor, to, keep, of, stride});
    if (found > 0) __atomic_fetch_add(counts + chunk.tensor, found, __ATOMIC_RELAXED);
  });
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) { m.impl("eligible_", TORCH_BOX(&pins_ext::cpu::eligible_)); }
