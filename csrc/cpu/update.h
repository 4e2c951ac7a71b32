// The optimizer's pass by chunk: what masked_adamw_ and boundary_adamw_ and their SGD versions share.
#pragma once

#include "../update_call.h"
#include "work.h"

namespace pins_ext::cpu {

inline const Tensors kNoTensors;

// The arguments of a checked call, one run of weights at a time.
class Updates {
 public:
  Updates(const UpdateCall& call, const Work& work)
      : params_(work, call.params),
        grads_(work, call.grads),
        first_(work, call.moments[0].tensors),
        second_(work, call.moments.size() > 1 ? call.moments[1].tensors : kNoTensors),
        ipt_(work, call.ipt),
        shadow_(work, call.shadow),
        masks_(call.masks),
        hyper_(static_cast<const float*>(call.hyper.const_data_ptr())),
        gradient_(gradient_of(call.grad_scale, call.clip)),
        accepted_(value_of(call.accepted)),
        clear_state_(call.clear_state),
        rounding_(rounding_of(call.rng)) {}

  // Whether runs must hold whole groups of 8-bit storage.
  bool coded() const { return first_.coded() || second_.coded() || ipt_.coded(); }

  Update at(const Run& run, int64_t tensor) const {
    const Chunk at{tensor, run.offset};
    return {run,
            params_.at(at),
            grads_.at(at),
            first_.at(at),
            second_.at(at),
            ipt_.at(at),
            shadow_.at(at),
            masks_.of(tensor),
            hyper_ + 8 * tensor,
            gradient_,
            accepted_,
            clear_state_,
            rounding_,
            nullptr};
  }

 private:
  const Operand params_, grads_, first_, second_, ipt_, shadow_;
  const Masks masks_;
  const float* hyper_;
  const Gradient gradient_;
  const float accepted_;
  const bool clear_state_;
  const Rounding rounding_;
};

using UpdateKernel = void (*)(const Update&);

template <size_t count>
UpdateKernel update_kernel(const UpdateCall& call, int criterion, void (*const (&table)[count])(const Update&)) {
  return table[call.ipt.empty() ? kNoCriterion : criterion];
}

// Of a call whose metadata are checked: only SGD can be without moments, and AdamW divides by what it is made for.
inline void check_hyper(const UpdateCall& call) {
  constexpr int kMomentum = 2, kBiasSqrt = 6;  // optimizer.inl SgdRow, AdamWRow
  const bool is_adamw = call.moments.size() == 2;
  const float* row = static_cast<const float*>(call.hyper.const_data_ptr());
  for (size_t i = 0; i < call.params.size(); ++i, row += 8) {
    if (is_adamw) {
      PINS_CHECK(row[kBiasSqrt] >= 0x1p-50f && row[kBiasSqrt] <= 1.0f, item("hyper", i), " has ", row[kBiasSqrt],
                 " for sqrt(1 - beta2^t), which is above 0 and at most 1");
    } else if (!call.moments[0].given()) {
      PINS_CHECK(row[kMomentum] == 0.0f, "momentum_buffer is empty, but ", item("hyper", i), " has momentum ",
                 row[kMomentum]);
    }
  }
}

}  // namespace pins_ext::cpu
