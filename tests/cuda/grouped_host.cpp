// Runs the source of the CUDA kernels of grouped_linear and grouped_expand on the CPU, lanes one after another, every
// operand in an allocation of its own, so that AddressSanitizer and UBSan see an access too many or misaligned.
//
// Reads one job from stdin: dtype of values and of x (0 float32, 1 bfloat16, 2 float16), rows, columns, groups, tokens,
// whether there is a bias, then values, columns, bases, starts, x and bias. Writes y and the expanded matrix to stdout.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/criteria.h"

namespace {

#include "../../csrc/criterion.inl"
#include "../../csrc/layout.inl"
#include "../../csrc/optimizer.inl"
#include "../../csrc/cuda/walk.cuh"

#include "../../csrc/cuda/grouped.cuh"

struct Job {
  int64_t values, dtype, rows, columns, groups, tokens, bias;
};

// Bytes at a multiple of 64 that end with their allocation.
void* allocated(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
  return memory;
}

void* receive(int64_t bytes) {
  void* memory = allocated(bytes);
  if (bytes > 0 && std::fread(memory, bytes, 1, stdin) != 1) std::abort();
  return memory;
}

// As the kernel: the tree of __shfl_xor_sync over the lanes.
float sum_of_lanes(std::vector<float> x) {
  for (int d = kLanes / 2; d > 0; d /= 2) {
    const std::vector<float> before = x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = before[lane] + before[lane ^ d];
  }
  return x[0];
}

template <typename Value, int kTokens>
void multiply(const Grouped& matrix, const Tokens& tokens, const float* bias) {
  const int64_t columns = matrix.columns_of_row;
  float* staged = static_cast<float*>(allocated((columns + 1) * kTokens * sizeof(float)));
  for (int64_t thread = 0; thread < 48; ++thread) stage<kTokens>(tokens, columns, staged, thread, 48);
  const Strides strides(kTokens);
  const Staged<kTokens> x(staged, strides);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    std::vector<float> lanes[kTokens];
    for (int lane = 0; lane < kLanes; ++lane) {
      float sums[kTokens] = {};
      Flight<Value> flight;
      Course<Value> course(matrix, row, lane);
      take_off(course, flight);
      travel<Value, kTokens>(course, flight, x, sums);
      for (int t = 0; t < kTokens; ++t) lanes[t].push_back(sums[t]);
    }
    float sums[kTokens];
    for (int t = 0; t < kTokens; ++t) sums[t] = sum_of_lanes(lanes[t]);
    finish<kTokens>(matrix, tokens, bias, row, sums);
  }
  if (!Course<Value>(matrix, matrix.rows, 0).none(0)) std::abort();
  std::free(staged);
}

template <typename Value>
void multiply(const Grouped& matrix, const Tokens& tokens, const float* bias) {
  if (tokens.count == 1) return multiply<Value, 1>(matrix, tokens, bias);
  if (tokens.count == 2) return multiply<Value, 2>(matrix, tokens, bias);
  multiply<Value, 4>(matrix, tokens, bias);
}

template <typename Bits>
void expand(const Grouped& matrix, void* weight) {
  for (int64_t row = 0; row < matrix.rows; ++row) {
    for (int lane = 0; lane < kLanes; ++lane) clear(matrix, static_cast<Bits*>(weight), row, lane);
    for (int lane = 0; lane < kLanes; ++lane) scatter(matrix, static_cast<Bits*>(weight), row, lane);
  }
}

int64_t bytes_of(int64_t dtype) { return dtype == 0 ? 4 : 2; }

}  // namespace

int main() {
  Job job;
  if (std::fread(&job, sizeof job, 1, stdin) != 1) std::abort();
  void* values = receive(job.groups * kGroupWeights * bytes_of(job.values));
  void* columns = receive(job.groups * kGroupWeights);
  void* bases = receive(job.groups * 2);
  void* starts = receive((job.rows + 1) * 8);
  void* x = receive(job.tokens * job.columns * bytes_of(job.dtype));
  void* bias = job.bias ? receive(job.rows * 4) : nullptr;
  const Grouped matrix{values,
                       static_cast<uint8_t*>(columns),
                       static_cast<uint16_t*>(bases),
                       static_cast<int64_t*>(starts),
                       job.rows,
                       job.columns};
  const int64_t y_bytes = job.tokens * job.rows * bytes_of(job.dtype);
  void* y = allocated(y_bytes);
  const Tokens tokens{x, y, static_cast<int>(job.dtype), job.tokens};
  if (job.values == 0) multiply<float>(matrix, tokens, static_cast<float*>(bias));
  if (job.values == 1) multiply<BFloat16>(matrix, tokens, static_cast<float*>(bias));
  if (job.values == 2) multiply<Float16>(matrix, tokens, static_cast<float*>(bias));
  std::fwrite(y, 1, y_bytes, stdout);
  const int64_t weight_bytes = job.rows * job.columns * bytes_of(job.values);
  void* weight = allocated(weight_bytes);
  if (job.values == 0) expand<uint32_t>(matrix, weight);
  if (job.values != 0) expand<uint16_t>(matrix, weight);
  std::fwrite(weight, 1, weight_bytes, stdout);
  for (void* memory : {values, columns, bases, starts, x, bias, y, weight}) std::free(memory);
  return 0;
}
