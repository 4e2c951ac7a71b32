// sum_of_squares on the CPU.
#include <torch/csrc/stable/library.h>

#include "work.h"

namespace pins_ext::cpu {
namespace {

#include "../norm.inl"

Tensor sum_of_squares(const Tensors& tensors, const Tensor& places, const Tensor& chunks,
                      const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  check_list("tensors", tensors, work.tensors(), kCpu, kParamDtypes);
  check_numel("tensors", tensors, work.numel);
  Tensor result = torch::stable::new_empty(places, {1}, ScalarType::Double);
  const Operand tensors_at(work, tensors);
  std::vector<double> sums(work.size);
  for_each_chunk(work, [&](const Chunk& chunk, int64_t i) {
    sums[i] = kernels().sum_of_squares(tensors_at.at(chunk), work.run(chunk).count);
  });
  double totals[kNormTotals] = {};
  for (int64_t i = 0; i < work.size; ++i) totals[i % kNormTotals] += sums[i];
  for (int width = kNormTotals; width > 1; width /= 2) add_halves(totals, width, 0, 1);
  *static_cast<double*>(result.data_ptr()) = totals[0];
  return result;
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) { m.impl("sum_of_squares", TORCH_BOX(&pins_ext::cpu::sum_of_squares)); }
