// boundary_adamw_ and boundary_sgd_ on the CPU: where a window ends, and the step after it, in the optimizer's pass.
//
// The optimizer's kernel does what the separate passes do, block by block: the same bits, and each operand crosses
// memory once. Separate kernels that take turns, even chunk by chunk, took longer than separate passes: whenever one
// begins anew, nothing of its operands is on its way.
#include <torch/csrc/stable/library.h>

#include "candidates.h"
#include "update.h"

namespace pins_ext::cpu {
namespace {

// What a boundary adds to the pass.
struct BoundaryCall {
  const Tensors &exp_avg_ipt, &exp_avg_unc;
  const OptionalTensor &around, &stats, &threshold, &fold_rng;
  double beta1, beta2;
  const OptionalTensor &bracket, &counts;

  bool chooses() const { return around.has_value(); }
  bool folds() const { return fold_rng.has_value(); }
};

void check_boundary(const UpdateCall& call, const BoundaryCall& boundary, const Work& work) {
  const int64_t n = static_cast<int64_t>(work.tensors());
  PINS_CHECK(boundary.chooses() || boundary.folds(),
             "around or fold_rng must be given: nothing happens here otherwise");
  check_list("exp_avg_ipt", boundary.exp_avg_ipt, n, kCpu, kStateDtypes);
  check_optional_list("exp_avg_unc", boundary.exp_avg_unc, n, kCpu, kStateDtypes);
  check_same_dtype("exp_avg_unc", boundary.exp_avg_unc, "exp_avg_ipt", boundary.exp_avg_ipt);
  check_numel("exp_avg_ipt", boundary.exp_avg_ipt, work.numel);
  check_numel("exp_avg_unc", boundary.exp_avg_unc, work.numel);
  const bool given = boundary.stats.has_value() && boundary.threshold.has_value();
  PINS_CHECK(boundary.chooses() ? given : !boundary.stats.has_value() && !boundary.threshold.has_value(),
             "around, stats and threshold come together or not at all");
  PINS_CHECK(boundary.bracket.has_value() == boundary.counts.has_value(),
             "bracket and counts come together or not at all");
  PINS_CHECK(boundary.folds() || !boundary.counts.has_value(), "counts need fold_rng: they are of the new averages");
  for (const List& list : {List{"ipt", call.ipt}, call.moments.front(), call.moments.back()}) {
    PINS_CHECK(!list.given() || !is_coded(list.tensors[0].scalar_type()), list.name,
               " in 8 bits takes separate passes: its groups may begin before a chunk");
  }
  const Inputs inputs{{"places", &call.places},
                      {"chunks", &call.chunks},
                      {"hyper", &call.hyper},
                      {"accepted", &call.accepted},
                      {"rng", &call.rng},
                      {"clip", if_given(call.clip)},
                      {"around", if_given(boundary.around)},
                      {"fold_rng", if_given(boundary.fold_rng)},
                      {"bracket", if_given(boundary.bracket)}};
  inputs.check_outputs({{"params", call.params}, {"ipt", call.ipt}, {"shadow", call.shadow}});
  for (const List& moment : call.moments) inputs.check_outputs({moment});
  inputs.check_outputs({{"masks", call.masks}, {"exp_avg_ipt", boundary.exp_avg_ipt}});
  inputs.check_outputs({{"exp_avg_unc", boundary.exp_avg_unc}});
  if (boundary.chooses()) {
    check_shape("stats", *boundary.stats, {n, 3}, ScalarType::Long, kCpu);
    check_shape("threshold", *boundary.threshold, {1, 2}, ScalarType::Long, kCpu);
    inputs.check_output([] { return "stats"; }, *boundary.stats);
    inputs.check_output([] { return "threshold"; }, *boundary.threshold);
    PINS_CHECK(n == 0 || !call.masks.empty(), "masks must be given: they are chosen here");
  }
  if (boundary.folds()) {
    check_shape("fold_rng", boundary.fold_rng.value(), {2}, ScalarType::Long, kCpu);
    PINS_CHECK(n == 0 || !call.ipt.empty(), "ipt must be given: it is folded here");
    check_same_dtype("ipt", call.ipt, "exp_avg_ipt", boundary.exp_avg_ipt);
    if (boundary.counts.has_value()) {
      check_counts(*boundary.counts);
      inputs.check_output([] { return "counts"; }, *boundary.counts);
    }
  }
}

class BoundaryPass {
 public:
  BoundaryPass(const UpdateCall& call, const BoundaryCall& boundary, const Work& work, UpdateKernel update)
      : call_(call),
        work_(work),
        updates_(call, work),
        masks_(call.masks),
        mean_(work, boundary.exp_avg_ipt),
        unc_(work, boundary.exp_avg_unc),
        update_(update),
        chooses_(boundary.chooses()),
        folds_(boundary.folds()) {
    if (chooses_) {
      around_ = check_bracket(*boundary.around);
      stats_ = static_cast<int64_t*>(boundary.stats->data_ptr());
      std::fill(stats_, stats_ + 3 * work.tensors(), 0);
    }
    if (!folds_) return;
    fold_.beta1 = static_cast<float>(boundary.beta1);
    fold_.one_minus_beta1 = static_cast<float>(1 - boundary.beta1);
    fold_.beta2 = static_cast<float>(boundary.beta2);
    fold_.one_minus_beta2 = static_cast<float>(1 - boundary.beta2);
    fold_.rounding = rounding_of(*boundary.fold_rng);
  }

  // tally: null where the new scores are not counted.
  void run(const Chunk& chunk, const Bracket& bounds, Tally* tally) {
    uint32_t keys[kChunk];
    uint16_t places[kChunk];
    uint8_t kept[kChunk];
    Update update = updates_.at(work_.run(chunk), chunk.tensor);
    Boundary boundary{};
    boundary.around = chooses_ ? &around_.bounds : nullptr;
    boundary.found = {keys, places, kept};
    boundary.folds = folds_;
    boundary.fold = fold_;
    boundary.fold.run = update.run;
    boundary.fold.exp_avg_ipt = mean_.at(chunk);
    boundary.fold.exp_avg_unc = unc_.at(chunk);
    boundary.fold.bracket = bounds;
    boundary.fold.tally = tally;
    update.boundary = &boundary;
    update_(update);
    if (!chooses_) return;
    add_stats(stats_ + 3 * chunk.tensor, boundary.stats);
    candidates_.add(work_, chunk.tensor, chunk.offset, boundary.found, boundary.size);
  }

  // The weights of the threshold's bin, which the pass has left unmasked: as many as must go.
  void finish(int64_t* threshold) {
    const size_t item = call_.params.empty() ? 0 : call_.params[0].element_size();
    candidates_.settle(around_, masks_, stats_, threshold, [&](const Candidate& loser) {
      zero(call_.params, loser, item);
      for (const List& moment : call_.moments) {
        if (call_.clear_state && moment.given()) zero(moment.tensors, loser, moment.tensors[0].element_size());
      }
    });
  }

 private:
  static void zero(const Tensors& tensors, const Candidate& loser, size_t item) {
    __builtin_memset(static_cast<char*>(tensors[loser.tensor].data_ptr()) + loser.local * item, 0, item);
  }

  const UpdateCall& call_;
  const Work& work_;
  const Updates updates_;
  const Masks masks_;
  const Operand mean_, unc_;
  const UpdateKernel update_;
  const bool chooses_, folds_;
  CheckedBracket around_{};
  int64_t* stats_ = nullptr;
  Fold fold_{};
  Candidates candidates_;
};

template <size_t count>
void run(const UpdateCall& call, const BoundaryCall& boundary, void (*const (&table)[count])(const Update&)) {
  const int criterion = check_update(call, kCpu);
  check_momentum(call);
  const Work work = check_work(call.places, call.chunks);
  check_numel("params", call.params, work.numel);
  check_boundary(call, boundary, work);
  BoundaryPass pass(call, boundary, work, update_kernel(call, criterion, table));
  if (boundary.counts.has_value()) {
    count_chunks(work, *boundary.bracket, *boundary.counts,
                 [&](const Chunk& chunk, const Bracket& bounds, Tally& tally) { pass.run(chunk, bounds, &tally); });
  } else {
    for_each_chunk(work, [&](const Chunk& chunk, int64_t) { pass.run(chunk, {}, nullptr); });
  }
  if (boundary.chooses()) pass.finish(static_cast<int64_t*>(boundary.threshold->data_ptr()));
}

const OptionalTensor kNone;

void boundary_adamw_(const Tensors& params, const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& ipt,
                     const Tensors& shadow, const Tensors& masks, const Tensors& exp_avg_ipt,
                     const Tensors& exp_avg_unc, const Tensors& grads, const Tensor& places, const Tensor& chunks,
                     const Tensor& hyper, const Tensor& accepted, const Tensor& rng, const std::string& criterion,
                     bool clear_state, const OptionalTensor& clip, const OptionalTensor& around,
                     const OptionalTensor& stats, const OptionalTensor& threshold, const OptionalTensor& fold_rng,
                     double beta1, double beta2, const OptionalTensor& bracket, const OptionalTensor& counts) {
  const std::vector<List> moments{{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}};
  run({params, moments, ipt, shadow, grads, masks, places, chunks, hyper, accepted, rng, criterion, clear_state, kNone,
       clip, kNone, kNone},
      {exp_avg_ipt, exp_avg_unc, around, stats, threshold, fold_rng, beta1, beta2, bracket, counts},
      kernels().boundary_adamw);
}

void boundary_sgd_(const Tensors& params, const Tensors& momentum_buffer, const Tensors& ipt, const Tensors& shadow,
                   const Tensors& masks, const Tensors& exp_avg_ipt, const Tensors& exp_avg_unc, const Tensors& grads,
                   const Tensor& places, const Tensor& chunks, const Tensor& hyper, const Tensor& accepted,
                   const Tensor& rng, const std::string& criterion, bool clear_state, const OptionalTensor& clip,
                   const OptionalTensor& around, const OptionalTensor& stats, const OptionalTensor& threshold,
                   const OptionalTensor& fold_rng, double beta1, double beta2, const OptionalTensor& bracket,
                   const OptionalTensor& counts) {
  const std::vector<List> moments{{"momentum_buffer", momentum_buffer}};
  run({params, moments, ipt, shadow, grads, masks, places, chunks, hyper, accepted, rng, criterion, clear_state, kNone,
       clip, kNone, kNone},
      {exp_avg_ipt, exp_avg_unc, around, stats, threshold, fold_rng, beta1, beta2, bracket, counts},
      kernels().boundary_sgd);
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("boundary_adamw_", TORCH_BOX(&pins_ext::cpu::boundary_adamw_));
  m.impl("boundary_sgd_", TORCH_BOX(&pins_ext::cpu::boundary_sgd_));
}
