// boundary_adamw_ and boundary_sgd_ on the CPU: where a window ends, and the step after it, in the optimizer's pass.
//
// The optimizer's kernel does what the separate passes do, block by block: the same bits, and each operand crosses
// memory once. Separate kernels that take turns, even chunk by chunk, took longer than separate passes: whenever one
// begins anew, nothing of its operands is on its way.
#include <torch/csrc/stable/library.h>

#include "../boundary_call.h"
#include "candidates.h"
#include "update.h"

namespace pins_ext::cpu {
namespace {

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
      if (around_.rank < 0) given_ = check_threshold(*boundary.threshold);
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
    if (given_) pack(chunk, update.run);
    const bool searches = chooses_ && !given_;
    boundary.around = searches ? &around_.bounds : nullptr;
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
    if (!searches) return;
    add_stats(stats_ + 3 * chunk.tensor, boundary.stats);
    candidates_.add(work_, chunk.tensor, chunk.offset, boundary.found, boundary.size);
  }

  // The weights of the threshold's bin, which the pass has left unmasked: as many as must go.
  void finish(int64_t* threshold) {
    if (given_) return;
    const size_t item = call_.params.empty() ? 0 : call_.params[0].element_size();
    candidates_.settle(around_, masks_, stats_, threshold, [&](const Candidate& loser) {
      zero(call_.params, loser, item);
      for (const List& moment : call_.moments) {
        if (call_.clear_state && moment.given()) zero(moment.tensors, loser, moment.tensors[0].element_size());
      }
    });
  }

 private:
  static const int64_t* check_threshold(const Tensor& threshold) {
    const int64_t* row = longs_of(threshold);
    PINS_CHECK(row[0] >= 0 && row[0] <= 0xffffffff, "threshold has key ", row[0], ", which is no 32-bit key");
    return row;
  }

  // The masks of a chunk by the threshold that is given.
  void pack(const Chunk& chunk, const Run& run) {
    const Scores scores{run, mean_.at(chunk), unc_.at(chunk)};
    const Score kind = scores.b.data ? Score::product : Score::identity;
    PackStats own{0, 0, 0};
    kernels().pack[static_cast<int>(kind)](
        scores,
        {masks_.at(chunk), static_cast<uint32_t>(given_[0]),
         weights_before(work_.places[chunk.tensor], run.offset, run.count, given_[1])},
        own);
    add_stats(stats_ + 3 * chunk.tensor, own);
  }

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
  const int64_t* given_ = nullptr;  // the threshold, where the bracket has no rank
  int64_t* stats_ = nullptr;
  Fold fold_{};
  Candidates candidates_;
};

template <size_t count>
void run(const UpdateCall& call, const BoundaryCall& boundary, void (*const (&table)[count])(const Update&)) {
  const int criterion = check_update(call, kCpu);
  check_hyper(call);
  const Work work = check_work(call.places, call.chunks);
  check_numel("params", call.params, work.numel);
  check_boundary(call, boundary, kCpu);
  BoundaryPass pass(call, boundary, work, update_kernel(call, criterion, table));
  if (boundary.counts.has_value()) {
    count_chunks(work, *boundary.bracket, *boundary.counts,
                 [&](const Chunk& chunk, const Bracket& bounds, Tally& tally) { pass.run(chunk, bounds, &tally); });
  } else {
    for_each_chunk(work, [&](const Chunk& chunk, int64_t) { pass.run(chunk, {}, nullptr); });
  }
  if (boundary.chooses()) pass.finish(static_cast<int64_t*>(boundary.threshold->data_ptr()));
}

void boundary_adamw(const UpdateCall& call, const BoundaryCall& boundary) {
  run(call, boundary, kernels().masked_adamw);
}

void boundary_sgd(const UpdateCall& call, const BoundaryCall& boundary) { run(call, boundary, kernels().masked_sgd); }

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("boundary_adamw_", TORCH_BOX(&pins_ext::boundary_adamw_<pins_ext::cpu::boundary_adamw>));
  m.impl("boundary_sgd_", TORCH_BOX(&pins_ext::boundary_sgd_<pins_ext::cpu::boundary_sgd>));
}
