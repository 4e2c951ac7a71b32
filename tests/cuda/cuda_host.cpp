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

bool receive(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

template <typename T>
std::vector<T> receive_array(int64_t count) {
  std::vector<T> values(count);
  if (!receive(values.data(), count * sizeof(T))) std::abort();
  return values;
}

// Bytes that start `misalignment` after a multiple of 64 and end with their allocation.
struct Operand {
  void* allocation = nullptr;
  char* data;
  int64_t bytes;

  Operand(int64_t misalignment, int64_t size) : bytes(size) {
    if (posix_memalign(&allocation, 64, misalignment + size) != 0) std::abort();
    data = static_cast<char*>(allocation) + misalignment;
  }
};

// Job header, all int64.
struct Job {
  int64_t step;     // 0 AdamW, 1 SGD, 2 mask alone
  int64_t dtype;    // of the parameters: 0 float32, 1 bfloat16, 2 float16
  int64_t state;    // of ipt: 0 float32, 1 bfloat16
  int64_t moments;  // as dtype
  int64_t criterion;
  int64_t clear_state;
  int64_t lists;  // how many
  int64_t given;  // bit k: list k is given
  int64_t tensors;
  int64_t chunks;
  int64_t threads;
  int64_t scalars;  // bit 0 grad_scale, 1 clip, 2 found_inf
};

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
    const auto layout = receive_array<Place>(job.tensors);
    const auto chunks = receive_array<Chunk>(job.chunks);
    const auto hyper = receive_array<float>(8 * job.tensors);
    const auto rng = receive_array<int64_t>(2);
    const auto scalars = receive_array<float>(4);  // accepted, grad_scale, clip, found_inf
    std::vector<Operand> operands;
    std::vector<int64_t> pointers;
    for (int64_t i = 0; i < job.lists * job.tensors; ++i) {
      const auto shape = receive_array<int64_t>(2);
      operands.emplace_back(shape[0], shape[1]);
      if (!receive(operands.back().data, shape[1])) std::abort();
      pointers.push_back(reinterpret_cast<int64_t>(operands.back().data));
    }
    const auto scalar = [&](int k) { return job.scalars >> k & 1 ? &scalars[k + 1] : nullptr; };
    const UpdateArguments arguments{{pointers.data(), job.tensors, layout.data(), chunks.data()},
                                    hyper.data(),
                                    scalars.data(),
                                    rng.data(),
                                    scalar(0),
                                    scalar(1),
                                    scalar(2),
                                    static_cast<uint32_t>(job.given),
                                    static_cast<Criterion>(job.criterion),
                                    job.clear_state != 0};
    if (job.dtype == 0) run<float>(arguments, job);
    if (job.dtype == 1) run<BFloat16>(arguments, job);
    if (job.dtype == 2) run<Float16>(arguments, job);
    std::fwrite(&accesses, sizeof accesses, 1, stdout);
    accesses = 0;
    for (const Operand& operand : operands) {
      std::fwrite(operand.data, 1, operand.bytes, stdout);
      std::free(operand.allocation);
    }
  }
  return 0;
}
