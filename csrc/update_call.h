// The arguments that masked_adamw_ and masked_sgd_ share, and the checks of them, for CPU and CUDA.
#pragma once

#include "checks.h"

namespace pins_ext {

struct UpdateCall {
  const Tensors& params;
  const std::vector<List>& moments;  // AdamW: exp_avg, exp_avg_sq; SGD: momentum_buffer, empty without momentum
  const Tensors &ipt, &shadow, &grads, &masks;
  const Tensor &places, &chunks, &hyper, &accepted, &rng;
  const std::string& criterion;
  bool clear_state;
  const OptionalTensor &grad_scale, &clip, &found_inf, &pointers;

  // In the order of the pointer table, which is that of the arguments of masked_*_.
  std::vector<List> lists() const {
    std::vector<List> lists{{"params", params}};
    for (const List& moment : moments) lists.push_back(moment);
    for (const List& list : {List{"ipt", ipt}, {"shadow", shadow}, {"grads", grads}, {"masks", masks}}) {
      lists.push_back(list);
    }
    return lists;
  }
};

// All that metadata tells. Returns the criterion's number.
inline int check_update(const UpdateCall& call, const Device& device) {
  const int64_t n = check_tables(call.places, call.chunks, device);
  check_list("params", call.params, n, device, kParamDtypes);
  const std::vector<int64_t> numel = numels_of(call.params);
  const auto check_operand = [&](const List& list, Dtypes dtypes) {
    check_list(list.name, list.tensors, n, device, dtypes);
    check_numel(list.name, list.tensors, numel);
  };
  const auto check_like_params = [&](const List& list) {
    check_operand(list, kParamDtypes);
    check_same_dtype(list.name, list.tensors, "params", call.params);
  };
  check_like_params({"grads", call.grads});
  for (const List& moment : call.moments) {
    // SGD without momentum has no buffer, otherwise one stored as its weights; AdamW has both moments.
    if (call.moments.size() == 2) {
      const bool first = &moment == &call.moments[0];
      check_operand(moment, first ? kFirstMomentDtypes : kStateDtypes);
      if (!first) check_moments(call.moments[0].tensors, moment.tensors);
    } else if (moment.given()) {
      check_like_params(moment);
    }
  }
  if (!call.shadow.empty()) check_like_params({"shadow", call.shadow});
  if (!call.ipt.empty()) check_operand({"ipt", call.ipt}, kStateDtypes);
  if (!call.masks.empty()) {
    check_list("masks", call.masks, n, device, {ScalarType::Byte});
    check_masks(call.masks, numel);
  }
  check_shape("hyper", call.hyper, {n, 8}, ScalarType::Float, device);
  check_shape("rng", call.rng, {2}, ScalarType::Long, device);
  check_scalar("accepted", call.accepted, ScalarType::Float, device);
  check_scalar("grad_scale", call.grad_scale, ScalarType::Float, device);
  check_scalar("clip", call.clip, ScalarType::Float, device);
  check_scalar("found_inf", call.found_inf, ScalarType::Float, device);
  const Inputs inputs{{"places", &call.places},
                      {"chunks", &call.chunks},
                      {"hyper", &call.hyper},
                      {"accepted", &call.accepted},
                      {"rng", &call.rng},
                      {"grad_scale", if_given(call.grad_scale)},
                      {"clip", if_given(call.clip)},
                      {"found_inf", if_given(call.found_inf)},
                      {"pointers", if_given(call.pointers)}};
  inputs.check_outputs({{"params", call.params}, {"ipt", call.ipt}, {"shadow", call.shadow}});
  for (const List& moment : call.moments) inputs.check_outputs({moment});
  return option("criterion", call.criterion, kCriteria);
}

// The operators; `run` is what a device makes of the call.
template <void (*run)(const UpdateCall&)>
void masked_adamw_(const Written& params, const Written& exp_avg, const Written& exp_avg_sq, const Written& ipt,
                   const Written& shadow, const Tensors& grads, const Tensors& masks, const Tensor& places,
                   const Tensor& chunks, const Tensor& hyper, const Tensor& accepted, const Tensor& rng,
                   const std::string& criterion, bool clear_state, const OptionalTensor& grad_scale,
                   const OptionalTensor& clip, const OptionalTensor& found_inf, const OptionalTensor& pointers) {
  const std::vector<List> moments{{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}};
  run({params, moments, ipt, shadow, grads, masks, places, chunks, hyper, accepted, rng, criterion, clear_state,
       grad_scale, clip, found_inf, pointers});
}

template <void (*run)(const UpdateCall&)>
void masked_sgd_(const Written& params, const Written& momentum_buffer, const Written& ipt, const Written& shadow,
                 const Tensors& grads, const Tensors& masks, const Tensor& places, const Tensor& chunks,
                 const Tensor& hyper, const Tensor& accepted, const Tensor& rng, const std::string& criterion,
                 bool clear_state, const OptionalTensor& grad_scale, const OptionalTensor& clip,
                 const OptionalTensor& found_inf, const OptionalTensor& pointers) {
  const std::vector<List> moments{{"momentum_buffer", momentum_buffer}};
  run({params, moments, ipt, shadow, grads, masks, places, chunks, hyper, accepted, rng, criterion, clear_state,
       grad_scale, clip, found_inf, pointers});
}

}  // namespace pins_ext
