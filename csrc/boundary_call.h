// The arguments that boundary_adamw_ and boundary_sgd_ add to an update's, and the checks of them, for CPU and CUDA.
#pragma once

#include "update_call.h"

namespace pins_ext {

struct BoundaryCall {
  const Tensors &exp_avg_ipt, &exp_avg_unc;
  const OptionalTensor &around, &stats, &threshold, &fold_rng;
  double beta1, beta2;
  const OptionalTensor &bracket, &counts;

  bool chooses() const { return around.has_value(); }
  bool folds() const { return fold_rng.has_value(); }
};

// Which arguments come together.
inline void check_given(const UpdateCall& call, const BoundaryCall& boundary) {
  PINS_CHECK(boundary.chooses() || boundary.folds(),
             "around or fold_rng must be given: nothing happens here otherwise");
  const bool given = boundary.stats.has_value() && boundary.threshold.has_value();
  PINS_CHECK(boundary.chooses() ? given : !boundary.stats.has_value() && !boundary.threshold.has_value(),
             "around, stats and threshold come together or not at all");
  PINS_CHECK(boundary.bracket.has_value() == boundary.counts.has_value(),
             "bracket and counts come together or not at all");
  PINS_CHECK(boundary.folds() || !boundary.counts.has_value(), "counts need fold_rng: they are of the new averages");
  if (call.params.empty()) return;
  PINS_CHECK(!boundary.chooses() || !call.masks.empty(), "masks must be given: they are chosen here");
  PINS_CHECK(!boundary.folds() || !call.ipt.empty(), "ipt must be given: it is folded here");
}

inline void check_shapes(const UpdateCall& call, const BoundaryCall& boundary, const Device& device) {
  const int64_t n = static_cast<int64_t>(call.params.size());
  const std::vector<int64_t> numel = numels_of(call.params);
  check_list("exp_avg_ipt", boundary.exp_avg_ipt, n, device, kStateDtypes);
  check_optional_list("exp_avg_unc", boundary.exp_avg_unc, n, device, kStateDtypes);
  check_same_dtype("exp_avg_unc", boundary.exp_avg_unc, "exp_avg_ipt", boundary.exp_avg_ipt);
  check_numel("exp_avg_ipt", boundary.exp_avg_ipt, numel);
  check_numel("exp_avg_unc", boundary.exp_avg_unc, numel);
  const List averages{"exp_avg_ipt", boundary.exp_avg_ipt};
  for (const List& list : {List{"ipt", call.ipt}, call.moments.front(), call.moments.back(), averages}) {
    PINS_CHECK(!list.given() || !is_coded(list.tensors[0].scalar_type()), list.name,
               " in 8 bits takes separate passes: its groups may begin before a chunk");
  }
  if (boundary.chooses()) {
    check_shape("around", *boundary.around, {5}, ScalarType::Long, device);
    check_shape("stats", *boundary.stats, {n, 3}, ScalarType::Long, device);
    check_shape("threshold", *boundary.threshold, {1, 2}, ScalarType::Long, device);
  }
  if (!boundary.folds()) return;
  check_shape("fold_rng", *boundary.fold_rng, {2}, ScalarType::Long, device);
  check_same_dtype("ipt", call.ipt, "exp_avg_ipt", boundary.exp_avg_ipt);
  if (!boundary.counts.has_value()) return;
  check_shape("bracket", *boundary.bracket, {5}, ScalarType::Long, device);
  check_shape("counts", *boundary.counts, {1 + kBins}, ScalarType::Long, device);
}

// Of checked shapes: nothing that is written shares memory with what is read or counted in.
inline void check_memory(const UpdateCall& call, const BoundaryCall& boundary) {
  // What check_update has not seen, and all.
  Inputs added{{"around", if_given(boundary.around)},
               {"fold_rng", if_given(boundary.fold_rng)},
               {"bracket", if_given(boundary.bracket)}};
  Inputs all = added;
  all.add("places", &call.places);
  all.add("chunks", &call.chunks);
  all.add("hyper", &call.hyper);
  all.add("accepted", &call.accepted);
  all.add("rng", &call.rng);
  all.add("clip", if_given(call.clip));
  all.add("pointers", if_given(call.pointers));
  const std::pair<const char*, const OptionalTensor&> tallies[] = {
      {"stats", boundary.stats}, {"threshold", boundary.threshold}, {"counts", boundary.counts}};
  for (const auto& [name, tally] : tallies) {
    if (!tally.has_value()) continue;
    all.check_output([&, name = name] { return name; }, *tally);
    // What is counted, too: a weight in its memory would become a count.
    added.add(name, &*tally);
    all.add(name, &*tally);
  }
  added.check_outputs({{"params", call.params}, {"ipt", call.ipt}, {"shadow", call.shadow}});
  for (const List& moment : call.moments) added.check_outputs({moment});
  all.check_outputs({{"masks", call.masks}, {"exp_avg_ipt", boundary.exp_avg_ipt}});
  all.check_outputs({{"exp_avg_unc", boundary.exp_avg_unc}});
}

// All that metadata tells, of a checked update.
inline void check_boundary(const UpdateCall& call, const BoundaryCall& boundary, const Device& device) {
  check_given(call, boundary);
  check_shapes(call, boundary, device);
  check_memory(call, boundary);
}

// The operators; `run` is what a device makes of the call.
template <void (*run)(const UpdateCall&, const BoundaryCall&)>
void boundary_adamw_(const Written& params, const Written& exp_avg, const Written& exp_avg_sq, const Written& ipt,
                     const Written& shadow, const Written& masks, const Written& exp_avg_ipt,
                     const Written& exp_avg_unc, const Tensors& grads, const Tensor& places, const Tensor& chunks,
                     const Tensor& hyper, const Tensor& accepted, const Tensor& rng, const std::string& criterion,
                     bool clear_state, const OptionalTensor& clip, const OptionalTensor& around,
                     const OptionalTensor& stats, const OptionalTensor& threshold, const OptionalTensor& fold_rng,
                     double beta1, double beta2, const OptionalTensor& bracket, const OptionalTensor& counts,
                     const OptionalTensor& pointers) {
  const OptionalTensor none;
  const std::vector<List> moments{{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}};
  run({params, moments, ipt, shadow, grads, masks, places, chunks, hyper, accepted, rng, criterion, clear_state, none,
       clip, none, pointers},
      {exp_avg_ipt, exp_avg_unc, around, stats, threshold, fold_rng, beta1, beta2, bracket, counts});
}

template <void (*run)(const UpdateCall&, const BoundaryCall&)>
void boundary_sgd_(const Written& params, const Written& momentum_buffer, const Written& ipt, const Written& shadow,
                   const Written& masks, const Written& exp_avg_ipt, const Written& exp_avg_unc, const Tensors& grads,
                   const Tensor& places, const Tensor& chunks, const Tensor& hyper, const Tensor& accepted,
                   const Tensor& rng, const std::string& criterion, bool clear_state, const OptionalTensor& clip,
                   const OptionalTensor& around, const OptionalTensor& stats, const OptionalTensor& threshold,
                   const OptionalTensor& fold_rng, double beta1, double beta2, const OptionalTensor& bracket,
                   const OptionalTensor& counts, const OptionalTensor& pointers) {
  const OptionalTensor none;
  const std::vector<List> moments{{"momentum_buffer", momentum_buffer}};
  run({params, moments, ipt, shadow, grads, masks, places, chunks, hyper, accepted, rng, criterion, clear_state, none,
       clip, none, pointers},
      {exp_avg_ipt, exp_avg_unc, around, stats, threshold, fold_rng, beta1, beta2, bracket, counts});
}

}  // namespace pins_ext
