// masked_adamw_, masked_sgd_ and apply_mask_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "work.h"

namespace pins_ext::cpu {
namespace {

#include "../optimizer.h"

using OptionalTensor = std::optional<Tensor>;

// The arguments that both optimizers share.
struct UpdateArguments {
  const Tensors &params, &ipt, &shadow, &grads, &masks;
  const Tensor &layout, &chunks, &hyper, &accepted, &rng;
  const std::string& criterion;
  bool clear_state;
  const OptionalTensor &grad_scale, &clip, &found_inf;
};

Work check_update(const UpdateArguments& args) {
  const Work work = check_work(args.layout, args.chunks);
  const size_t n = work.tensors();
  check_list("params", args.params, n, kCpu, kParamDtypes);
  check_list("grads", args.grads, n, kCpu, kParamDtypes);
  check_optional_list("ipt", args.ipt, n, kCpu, kStateDtypes);
  check_optional_list("shadow", args.shadow, n, kCpu, kParamDtypes);
  check_same_dtype("grads", args.grads, "params", args.params);
  check_same_dtype("shadow", args.shadow, "params", args.params);
  for (auto [name, list] :
       {std::pair{"params", &args.params}, {"grads", &args.grads}, {"ipt", &args.ipt}, {"shadow", &args.shadow}}) {
    check_numel(name, *list, work.numel);
  }
  check_optional_list("masks", args.masks, n, kCpu, {ScalarType::Byte});
  check_masks(args.masks, work.numel);
  check_shape("hyper", args.hyper, {static_cast<int64_t>(n), 8}, ScalarType::Float, kCpu);
  check_scalar("accepted", args.accepted, ScalarType::Float, kCpu);
  return work;
}

void check_moment(const char* name, const Tensors& moment, const Work& work, const Tensors& params) {
  check_list(name, moment, work.tensors(), kCpu, kParamDtypes);
  check_same_dtype(name, moment, "params", params);
  check_numel(name, moment, work.numel);
}

template <size_t count>
void update(const UpdateArguments& args, const Work& work, const Tensors& first, const Tensors& second,
            void (*const (&table)[count])(const Update&)) {
  const int criterion = option("criterion", args.criterion, kCriteria);
  const Rounding rounding = check_rng(args.rng);
  const StepScalars step = check_step_scalars(args.grad_scale, args.clip, args.found_inf);
  if (step.found_inf) return;
  const Operand params_at(args.params), grads_at(args.grads), first_at(first), second_at(second), ipt_at(args.ipt),
      shadow_at(args.shadow);
  const Masks masks_at(args.masks);
  const float* hyper = static_cast<const float*>(args.hyper.const_data_ptr());
  const float accepted = value_of(args.accepted);
  const auto kernel = table[args.ipt.empty() ? kNoCriterion : criterion];
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    kernel({work.run(chunk), params_at.at(chunk), grads_at.at(chunk), first_at.at(chunk), second_at.at(chunk),
            ipt_at.at(chunk), shadow_at.at(chunk), masks_at.at(chunk), hyper + 8 * chunk.tensor, step.gradient,
            accepted, args.clear_state, rounding});
  });
}

void masked_adamw_(const Tensors& params, const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& ipt,
                   const Tensors& shadow, const Tensors& grads, const Tensors& masks, const Tensor& layout,
                   const Tensor& chunks, const Tensor& hyper, const Tensor& accepted, const Tensor& rng,
                   const std::string& criterion, bool clear_state, const OptionalTensor& grad_scale,
                   const OptionalTensor& clip, const OptionalTensor& found_inf, const OptionalTensor& /*pointers*/) {
  const UpdateArguments args{params,   ipt, shadow,    grads,       masks,      layout, chunks,   hyper,
                             accepted, rng, criterion, clear_state, grad_scale, clip,   found_inf};
  const Work work = check_update(args);
  check_moment("exp_avg", exp_avg, work, params);
  check_moment("exp_avg_sq", exp_avg_sq, work, params);
  update(args, work, exp_avg, exp_avg_sq, kernels().masked_adamw);
}

void masked_sgd_(const Tensors& params, const Tensors& momentum_buffer, const Tensors& ipt, const Tensors& shadow,
                 const Tensors& grads, const Tensors& masks, const Tensor& layout, const Tensor& chunks,
                 const Tensor& hyper, const Tensor& accepted, const Tensor& rng, const std::string& criterion,
                 bool clear_state, const OptionalTensor& grad_scale, const OptionalTensor& clip,
                 const OptionalTensor& found_inf, const OptionalTensor& /*pointers*/) {
  const UpdateArguments args{params,   ipt, shadow,    grads,       masks,      layout, chunks,   hyper,
                             accepted, rng, criterion, clear_state, grad_scale, clip,   found_inf};
  const Work work = check_update(args);
  if (!momentum_buffer.empty()) {
    check_moment("momentum_buffer", momentum_buffer, work, params);
  } else {
    const SgdRow* rows = static_cast<const SgdRow*>(hyper.const_data_ptr());
    for (size_t i = 0; i < work.tensors(); ++i) {
      PINS_CHECK(rows[i].momentum == 0.0f, "momentum_buffer is empty, but ", item("hyper", i), " has momentum ",
                 rows[i].momentum);
    }
  }
  update(args, work, momentum_buffer, {}, kernels().masked_sgd);
}

void apply_mask_(const Tensors& params, const Tensors& masks, const Tensor& layout, const Tensor& chunks,
                 const OptionalTensor& /*pointers*/) {
  const Work work = check_work(layout, chunks);
  check_list("params", params, work.tensors(), kCpu, kParamDtypes);
  check_numel("params", params, work.numel);
  check_list("masks", masks, work.tensors(), kCpu, {ScalarType::Byte});
  check_masks(masks, work.numel);
  const Operand params_at(params);
  const Masks masks_at(masks);
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    kernels().apply_mask({params_at.at(chunk), work.run(chunk).count, masks_at.at(chunk)});
  });
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&pins_ext::cpu::masked_adamw_));
  m.impl("masked_sgd_", TORCH_BOX(&pins_ext::cpu::masked_sgd_));
  m.impl("apply_mask_", TORCH_BOX(&pins_ext::cpu::apply_mask_));
}
