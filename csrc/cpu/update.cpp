// masked_adamw_, masked_sgd_ and apply_mask_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "update.h"

namespace pins_ext::cpu {
namespace {

template <size_t count>
void masked_update(const UpdateCall& call, void (*const (&table)[count])(const Update&)) {
  const int criterion = check_update(call, kCpu);
  check_hyper(call);
  const Work work = check_work(call.places, call.chunks);
  check_numel("params", call.params, work.numel);
  if (is_set(call.found_inf)) return;
  const Updates updates(call, work);
  const UpdateKernel kernel = update_kernel(call, criterion, table);
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    const Run run = updates.coded() ? work.whole_groups(chunk) : work.run(chunk);
    if (run.count > 0) kernel(updates.at(run, chunk.tensor));
  });
}

void masked_adamw(const UpdateCall& call) { masked_update(call, kernels().masked_adamw); }

void masked_sgd(const UpdateCall& call) { masked_update(call, kernels().masked_sgd); }

void apply_mask_(const Written& params, const Tensors& masks, const Tensor& places, const Tensor& chunks,
                 const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  check_list("params", params, work.tensors(), kCpu, kParamDtypes);
  check_numel("params", params, work.numel);
  check_list("masks", masks, work.tensors(), kCpu, {ScalarType::Byte});
  check_masks(masks, work.numel);
  Inputs{{"places", &places}, {"chunks", &chunks}}.check_outputs({{"params", params}});
  const Operand params_at(work, params);
  const Masks masks_at(masks);
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    kernels().apply_mask({params_at.at(chunk), work.run(chunk).count, masks_at.at(chunk)});
  });
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&pins_ext::masked_adamw_<pins_ext::cpu::masked_adamw>));
  m.impl("masked_sgd_", TORCH_BOX(&pins_ext::masked_sgd_<pins_ext::cpu::masked_sgd>));
  m.impl("apply_mask_", TORCH_BOX(&pins_ext::cpu::apply_mask_));
}
