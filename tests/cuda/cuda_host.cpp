// Runs the source of the CUDA kernels on the CPU: blocks and threads one after another, every operand in an allocation
// of its own, so that AddressSanitizer sees a weight too many and UBSan a misaligned access.
//
// Reads jobs from stdin; writes the number of accesses and the operands after the update to stdout. test_cuda_host.py
// speaks the format.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

#include "host_job.h"

template <typename Step, typename P, typename M>
void run_update(const UpdateArguments& arguments, const Job& job) {
  for (int64_t block = 0; block < job.chunks; ++block) {
    for (int64_t thread = 0; thread < job.threads; ++thread) {
      if (job.state == 0) update_chunk<Step, P, float, M>(arguments, block, thread, job.threads);
      if (job.state == 1) update_chunk<Step, P, BFloat16, M>(arguments, block, thread, job.threads);
    }
  }
}

template <typename P>
void run(const UpdateArguments& arguments, const Job& job) {
  if (job.step == 0 && job.moments == 0) return run_update<AdamWStep, P, float>(arguments, job);
  if (job.step == 0) return run_update<AdamWStep, P, BFloat16>(arguments, job);
  if (job.step == 1) return run_update<SgdStep, P, P>(arguments, job);
  for (int64_t block = 0; block < job.chunks; ++block) {
    for (int64_t thread = 0; thread < job.threads; ++thread) {
      apply_mask_chunk<P>(arguments.work, block, thread, job.threads);
    }
  }
}

}  // namespace

int main() {
  Job job;
  while (receive(&job, sizeof job)) {
    const Received received(job);
    const UpdateArguments arguments = received.arguments();
    if (job.dtype == 0) run<float>(arguments, job);
    if (job.dtype == 1) run<BFloat16>(arguments, job);
    if (job.dtype == 2) run<Float16>(arguments, job);
    received.answer(accesses);
    accesses = 0;
  }
  return 0;
}
