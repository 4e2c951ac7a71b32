// accumulate_ and fold_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "bracket.h"
#include "work.h"

namespace pins_ext::cpu {
namespace {

void accumulate_(const Written& ipt, const Tensors& params, const Tensors& grads, const Tensor& places,
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
  for (const List& list : {List{"ipt", ipt}, {"params", params}, {"grads", grads}}) {
    check_numel(list.name, list.tensors, work.numel);
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

  const Operand ipt_at(work, ipt), params_at(work, params), grads_at(work, grads);
  const float* lrs = static_cast<const float*>(lr.const_data_ptr());
  const float count = value_of(accepted);
  const Gradient gradient = gradient_of(grad_scale, clip);
  const Rounding rounding = rounding_of(rng);
  for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
    const Run run = ipt_at.coded() ? work.whole_groups(chunk) : work.run(chunk);
    if (run.count == 0) return;
    const Chunk at{chunk.tensor, run.offset};
    kernels().accumulate[kind](
        {run, ipt_at.at(at), params_at.at(at), grads_at.at(at), gradient, lrs[chunk.tensor], count, rounding});
  });
}

// What fold_ and fold_moments_ share.
struct FoldCall {
  const Tensors &exp_avg_ipt, &exp_avg_unc;
  const Tensor &places, &chunks, &accepted, &rng;
  double beta1, beta2;
  const OptionalTensor &bracket, &counts;
};

Work check_fold(const FoldCall& call, const Tensor* factors) {
  const Work work = check_work(call.places, call.chunks);
  check_list("exp_avg_ipt", call.exp_avg_ipt, work.tensors(), kCpu, kStateDtypes);
  check_optional_list("exp_avg_unc", call.exp_avg_unc, work.tensors(), kCpu, kStateDtypes);
  check_same_dtype("exp_avg_unc", call.exp_avg_unc, "exp_avg_ipt", call.exp_avg_ipt);
  check_numel("exp_avg_ipt", call.exp_avg_ipt, work.numel);
  check_numel("exp_avg_unc", call.exp_avg_unc, work.numel);
  check_scalar("accepted", call.accepted, ScalarType::Float, kCpu);
  check_shape("rng", call.rng, {2}, ScalarType::Long, kCpu);
  PINS_CHECK(call.bracket.has_value() == call.counts.has_value(), "bracket and counts come together or not at all");
  const Inputs inputs{{"places", &call.places}, {"chunks", &call.chunks}, {"accepted", &call.accepted},
                      {"rng", &call.rng},       {"factors", factors},     {"bracket", if_given(call.bracket)}};
  inputs.check_outputs({{"exp_avg_ipt", call.exp_avg_ipt}, {"exp_avg_unc", call.exp_avg_unc}});
  if (call.counts.has_value()) {
    check_counts(*call.counts);
    inputs.check_output([] { return "counts"; }, *call.counts);
    Inputs{{"counts", &*call.counts}}.check_outputs(
        {{"exp_avg_ipt", call.exp_avg_ipt}, {"exp_avg_unc", call.exp_avg_unc}});
  }
  return work;
}

// `fill` adds the operands of the window's score to a chunk's.
template <class Fill>
void fold(const FoldCall& call, const Work& work, const Fill& fill) {
  const Operand mean_at(work, call.exp_avg_ipt), unc_at(work, call.exp_avg_unc);
  const bool moves = value_of(call.accepted) != 0.0f;
  const auto run_of = [&](const Chunk& chunk) { return mean_at.coded() ? work.whole_groups(chunk) : work.run(chunk); };
  const auto args_of = [&](const Run& run, const Chunk& chunk) {
    Fold args{};
    args.run = run;
    args.exp_avg_ipt = mean_at.at(chunk);
    args.exp_avg_unc = unc_at.at(chunk);
    args.beta1 = static_cast<float>(call.beta1);
    args.one_minus_beta1 = static_cast<float>(1 - call.beta1);
    args.beta2 = static_cast<float>(call.beta2);
    args.one_minus_beta2 = static_cast<float>(1 - call.beta2);
    args.rounding = rounding_of(call.rng);
    fill(args, chunk);
    return args;
  };
  if (!call.bracket.has_value() || check_bracket(*call.bracket).resolved) {
    for_each_chunk(work, [&](const Chunk& chunk, int64_t) {
      const Run run = run_of(chunk);
      if (moves && run.count > 0) kernels().fold(args_of(run, {chunk.tensor, run.offset}));
    });
    return;
  }
  const auto count = kernels().count[static_cast<int>(call.exp_avg_unc.empty() ? Score::identity : Score::product)];
  count_chunks(work, *call.bracket, *call.counts, [&](const Chunk& chunk, const Bracket& bounds, Tally& tally) {
    const Run run = run_of(chunk);
    const Chunk at{chunk.tensor, run.offset};
    if (run.count == 0) return;
    if (!moves) return count({run, mean_at.at(at), unc_at.at(at)}, bounds, tally);
    Fold args = args_of(run, at);
    args.bracket = bounds;
    args.tally = &tally;
    kernels().fold(args);
  });
}

void fold_(const Written& exp_avg_ipt, const Written& exp_avg_unc, const Tensors& ipt, const Tensor& places,
           const Tensor& chunks, const Tensor& accepted, const Tensor& rng, double beta1, double beta2,
           const OptionalTensor& bracket, const OptionalTensor& counts, const OptionalTensor& /*pointers*/) {
  const FoldCall call{exp_avg_ipt, exp_avg_unc, places, chunks, accepted, rng, beta1, beta2, bracket, counts};
  const Work work = check_fold(call, nullptr);
  check_list("ipt", ipt, work.tensors(), kCpu, kStateDtypes);
  check_same_dtype("ipt", ipt, "exp_avg_ipt", exp_avg_ipt);
  check_numel("ipt", ipt, work.numel);
  const Operand ipt_at(work, ipt);
  fold(call, work, [&](Fold& args, const Chunk& chunk) { args.ipt = ipt_at.at(chunk); });
}

void fold_moments_(const Written& exp_avg_ipt, const Written& exp_avg_unc, const Tensors& params,
                   const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensor& places, const Tensor& chunks,
                   const Tensor& factors, const Tensor& accepted, const Tensor& rng, double beta1, double beta2,
                   const OptionalTensor& bracket, const OptionalTensor& counts, const OptionalTensor& /*pointers*/) {
  const FoldCall call{exp_avg_ipt, exp_avg_unc, places, chunks, accepted, rng, beta1, beta2, bracket, counts};
  const Work work = check_fold(call, &factors);
  check_list("params", params, work.tensors(), kCpu, kParamDtypes);
  check_list("exp_avg", exp_avg, work.tensors(), kCpu, kReadableFirstDtypes);
  check_list("exp_avg_sq", exp_avg_sq, work.tensors(), kCpu, kReadableDtypes);
  for (const List& list : {List{"params", params}, {"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}}) {
    check_numel(list.name, list.tensors, work.numel);
  }
  check_moments(exp_avg, exp_avg_sq);
  check_shape("factors", factors, {static_cast<int64_t>(work.tensors()), 3}, ScalarType::Float, kCpu);
  const Operand params_at(work, params), mean_at(work, exp_avg), square_at(work, exp_avg_sq);
  const float* rows = static_cast<const float*>(factors.const_data_ptr());
  fold(call, work, [&](Fold& args, const Chunk& chunk) {
    args.params = params_at.at(chunk);
    args.exp_avg = mean_at.at(chunk);
    args.exp_avg_sq = square_at.at(chunk);
    args.factors = rows + 3 * chunk.tensor;
  });
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("accumulate_", TORCH_BOX(&pins_ext::cpu::accumulate_));
  m.impl("fold_", TORCH_BOX(&pins_ext::cpu::fold_));
  m.impl("fold_moments_", TORCH_BOX(&pins_ext::cpu::fold_moments_));
}
