// Runs the source of the CUDA kernels at a window's boundary on the CPU, as cuda_host.cpp runs those of the update.
//
// Behind a job's operands: flags (1 chooses, 2 folds, 4 counts), around, threshold, fold_rng, bracket; then the betas
// as (beta, 1 - beta) each. The answer goes on with stats, threshold and counts. test_cuda_boundary_host.py speaks it.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../../csrc/criteria.h"

namespace {

int64_t accesses = 0;
#define PINS_ACCESS(stream) ++accesses

#include "../../csrc/criterion.inl"
#include "../../csrc/layout.inl"
#include "../../csrc/optimizer.inl"
#include "../../csrc/cuda/walk.cuh"

#include "../../csrc/cuda/update.cuh"

#include "../../csrc/cuda/boundary.cuh"

#include "host_job.h"

// A block: what its threads do before the barrier, and after it.
template <typename Step, typename P, typename S, typename M>
void run_block(const BoundaryArguments& a, int64_t block, int64_t threads) {
  std::vector<uint32_t> keep(kChunk / 32, 0);
  std::vector<Sums> sums(threads);
  for (int64_t thread = 0; thread < threads; ++thread) {
    boundary_chunk<Step, P, S, M>(a, block, thread, threads, keep.data(), sums[thread]);
  }
  for (int64_t thread = 0; thread < threads; ++thread) {
    if (a.around != nullptr) {
      write_masks(a, Lists<Step>::masks, block, thread, threads, keep.data(), sums[thread]);
    }
    const uint32_t counted = sums[thread].counted;
    commit(a, block, sums[thread], counted & 0x00ff00ffu, counted >> 8 & 0x00ff00ffu);
  }
}

template <typename Step, typename P, typename S, typename M>
void run_all(const BoundaryArguments& a, const Job& job) {
  // From the last one on: their order must not matter.
  for (int64_t block = job.chunks - 1; block >= 0; --block) run_block<Step, P, S, M>(a, block, job.threads);
  if (a.around == nullptr) return;
  const int weight = sizeof(P), moment = sizeof(M);
  const bool moments = a.update.clear_state && (a.update.lists >> 1 & 1);
  const Elements elements{weight, moment, moments ? Step::kMoments : 0};
  for (int64_t i = 0; i < kCandidates; ++i) settle_candidate(a, elements, Lists<Step>::masks, i);
}

template <typename Step, typename P, typename M>
void run_state(const BoundaryArguments& a, const Job& job) {
  if (job.state == 0) run_all<Step, P, float, M>(a, job);
  if (job.state == 1) run_all<Step, P, BFloat16, M>(a, job);
}

template <typename P>
void run(const BoundaryArguments& a, const Job& job) {
  // Half of the combinations, as compiling takes longest: the emulator runs all of them.
  if (job.step == 0) return run_state<AdamWStep, P, std::conditional_t<sizeof(P) == 4, float, BFloat16>>(a, job);
  if constexpr (sizeof(P) == 4) run_state<SgdStep, P, P>(a, job);
}

void write_longs(const std::vector<int64_t>& values) {
  std::fwrite(values.data(), sizeof(int64_t), values.size(), stdout);
}

}  // namespace

int main() {
  Job job;
  while (receive(&job, sizeof job)) {
    const Received received(job);
    const int64_t flags = receive_array<int64_t>(1)[0];
    const auto around = receive_array<int64_t>(5);
    auto threshold = receive_array<int64_t>(2);
    const auto fold_rng = receive_array<int64_t>(2), bracket = receive_array<int64_t>(5);
    const auto betas = receive_array<float>(4);
    std::vector<int64_t> stats(3 * job.tensors), candidates(1 + 4 * kCandidates), counts(1 + 65536);
    const BoundaryArguments arguments{received.arguments(),
                                      flags & 1 ? around.data() : nullptr,
                                      stats.data(),
                                      threshold.data(),
                                      candidates.data(),
                                      flags & 2 ? fold_rng.data() : nullptr,
                                      betas[0],
                                      betas[1],
                                      betas[2],
                                      betas[3],
                                      flags & 4 ? bracket.data() : nullptr,
                                      counts.data()};
    if (job.dtype == 0) run<float>(arguments, job);
    if (job.dtype == 1) run<BFloat16>(arguments, job);
    if (job.dtype == 2) run<Float16>(arguments, job);
    received.answer(accesses);
    accesses = 0;
    write_longs(stats);
    write_longs(threshold);
    write_longs(counts);
  }
  return 0;
}
