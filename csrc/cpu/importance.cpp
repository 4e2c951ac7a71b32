// accumulate_ and fold_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "bracket.h"
#include "work.h"

namespace pins_ext::cpu {
namespace {

void accumulate_(const Tensors& ipt, const Tensors& params, const Tensors& grads, const Tensor& places,
                 const Tensor& chunks, const Tensor& lr, const Tensor& accepted, const Tensor& rng,
                 const std::string& criterion, const OptionalTensor& grad_scale, const OptionalTensor& clip,
                 const OptionalTensor& found_inf, const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const size_t n = work.tensors();
  const int kind = option("criterion", criterion, kCriteria);
  check_list("ipt", ipt, n, kCpu, kStateDtypes);
  check_list("grads", grads, n, kCpu, kParamDtypes);
  if (!check_optional_list("params", params, n, kCpu, kParamDtypes)) {
    PINS_CHECK(n == 0 || criterion == "precomputed", "params may be empty only for the criterion 'precomputed', got '",
               criterion, "'");
  }
  check_same_dtype("grads", grads, "params", params);
  for (auto [name, list] : {std::pair{"ipt", &ipt}, {"params", &params}, {"grads", &grads}}) {
    check_numel(name, *list, work.numel);
  }
  check_shape("lr", lr, {static_cast<int64_t>(n)}, ScalarType::Float, kCpu);
  check_scalar("accepted", accepted, ScalarType::Float, kCpu);
  check_shape("rng", rng, {2}, ScalarType::Long, kCpu);
  check_scalar("grad_scale", grad_scale, ScalarType::Float, kCpu);
  check_scalar("clip", clip, ScalarType::Float, kCpu);
  check_scalar("found_inf", found_inf, ScalarType::Float, kCpu);
  const Inputs inputs{{"places", &places},
                      {"chunks", &chunks},
                      {"lr", &lr},
                      {"accepted", &accepted},
                      {"rng", &rng},
                      {"grad_scale", if_given(grad_scale)},
                      {"clip", if_given(clip)},
                      {"found_inf", if_given(found_inf)}};
  inputs.check_outputs({{"ipt", ipt}});
  if (is_set(found_inf)) return;

  const Operand ipt_at(ipt), params_at(params), grads_at(grads);
  const float* lrs = static_cast<const float*>(lr.const_data_ptr());
  const float count = value_of(accepted);
  const Gradient gradient = gradient_of(grad_scale, clip);
  const Rounding rounding = rounding_of(rng);
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    kernels().accumulate[kind]({work.run(chunk), ipt_at.at(chunk), params_at.at(chunk), grads_at.at(chunk), gradient,
                                lrs[chunk.tensor], count, rounding});
  });
}

void fold_(const Tensors& exp_avg_ipt, const Tensors& exp_avg_unc, const Tensors& ipt, const Tensor& places,
           const Tensor& chunks, const Tensor& accepted, const Tensor& rng, double beta1, double beta2,
           const OptionalTensor& bracket, const OptionalTensor& counts, const OptionalTensor& /*pointers*/) {
  const Work work = check_work(places, chunks);
  const size_t n = work.tensors();
  check_list("exp_avg_ipt", exp_avg_ipt, n, kCpu, kStateDtypes);
  const bool with_unc = check_optional_list("exp_avg_unc", exp_avg_unc, n, kCpu, kStateDtypes);
  check_list("ipt", ipt, n, kCpu, kStateDtypes);
  check_same_dtype("exp_avg_unc", exp_avg_unc, "exp_avg_ipt", exp_avg_ipt);
  check_same_dtype("ipt", ipt, "exp_avg_ipt", exp_avg_ipt);
  for (auto [name, list] : {std::pair{"exp_avg_ipt", &exp_avg_ipt}, {"exp_avg_unc", &exp_avg_unc}, {"ipt", &ipt}}) {
    check_numel(name, *list, work.numel);
  }
  check_scalar("accepted", accepted, ScalarType::Float, kCpu);
  check_shape("rng", rng, {2}, ScalarType::Long, kCpu);
  PINS_CHECK(bracket.has_value() == counts.has_value(), "bracket and counts come together or not at all");
  const Inputs inputs{
      {"places", &places}, {"chunks", &chunks}, {"accepted", &accepted}, {"rng", &rng}, {"bracket", if_given(bracket)}};
  inputs.check_outputs({{"exp_avg_ipt", exp_avg_ipt}, {"exp_avg_unc", exp_avg_unc}});
  if (counts.has_value()) {
    check_counts(*counts);
    inputs.check_output([] { return "counts"; }, *counts);
  }

  const Operand mean_at(exp_avg_ipt), unc_at(exp_avg_unc), ipt_at(ipt);
  const Rounding rounding = rounding_of(rng);
  const bool moves = value_of(accepted) != 0.0f;
  auto fold_chunk = [&](const Chunk& chunk) {
    if (!moves) return;
    kernels().fold({work.run(chunk), mean_at.at(chunk), unc_at.at(chunk), ipt_at.at(chunk), static_cast<float>(beta1),
                    static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2), rounding});
  };
  if (!bracket.has_value() || check_bracket(*bracket).resolved) {
    for_each_chunk(work, [&](const Chunk& chunk, int64_t) { fold_chunk(chunk); });
    return;
  }
  // A chunk's new states are still in the L2 cache when they are counted.
  const auto count = kernels().count[static_cast<int>(with_unc ? Score::product : Score::identity)];
  count_chunks(work, *bracket, *counts, [&](const Chunk& chunk, const Bracket& bounds, Tally& tally) {
    fold_chunk(chunk);
    count({work.run(chunk), mean_at.at(chunk), unc_at.at(chunk)}, bounds, tally);
  });
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("accumulate_", TORCH_BOX(&pins_ext::cpu::accumulate_));
  m.impl("fold_", TORCH_BOX(&pins_ext::cpu::fold_));
}
