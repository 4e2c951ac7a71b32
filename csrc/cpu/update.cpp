// masked_adamw_, masked_sgd_ and apply_mask_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "../update_call.h"
#include "work.h"

namespace pins_ext::cpu {
namespace {

#include "../optimizer.inl"

template <size_t count>
void masked_update(const UpdateCall& call, void (*const (&table)[count])(const Update&)) {
  const int criterion = check_update(call, kCpu);
  const Work work = check_work(call.places, call.chunks);
  check_numel("params", call.params, work.numel);
  if (is_set(call.found_inf)) return;
  const Operand params_at(work, call.params), grads_at(work, call.grads), first_at(work, call.moments[0].tensors),
      second_at(work, call.moments.size() > 1 ? call.moments[1].tensors : Tensors{}), ipt_at(work, call.ipt),
      shadow_at(work, call.shadow);
  const bool coded = first_at.coded() || second_at.coded() || ipt_at.coded();
  const Masks masks_at(call.masks);
  const float* hyper = static_cast<const float*>(call.hyper.const_data_ptr());
  const float accepted = value_of(call.accepted);
  const Gradient gradient = gradient_of(call.grad_scale, call.clip);
  const Rounding rounding = rounding_of(call.rng);
  const auto kernel = table[call.ipt.empty() ? kNoCriterion : criterion];
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    const Run run = coded ? work.whole_groups(chunk) : work.run(chunk);
    if (run.count == 0) return;
    const Chunk at{chunk.tensor, run.offset};
    kernel({run, params_at.at(at), grads_at.at(at), first_at.at(at), second_at.at(at), ipt_at.at(at), shadow_at.at(at),
            masks_at.of(chunk.tensor), hyper + 8 * chunk.tensor, gradient, accepted, call.clear_state, rounding});
  });
}

void masked_adamw(const UpdateCall& call) { masked_update(call, kernels().masked_adamw); }

void masked_sgd(const UpdateCall& call) {
  check_update(call, kCpu);
  const SgdRow* rows = static_cast<const SgdRow*>(call.hyper.const_data_ptr());
  for (size_t i = 0; !call.moments[0].given() && i < call.params.size(); ++i) {
    PINS_CHECK(rows[i].momentum == 0.0f, "momentum_buffer is empty, but ", item("hyper", i), " has momentum ",
               rows[i].momentum);
  }
  masked_update(call, kernels().masked_sgd);
}

void apply_mask_(const Tensors& params, const Tensors& masks, const Tensor& places, const Tensor& chunks,
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
