// Runs the source of the CUDA kernels of sum_of_squares on the CPU, threads one after another, every tensor in an
// allocation of its own, so that AddressSanitizer and UBSan see an access too many or misaligned.
//
// Reads one job from stdin: dtype (0 float32, 1 bfloat16, 2 float16), number of tensors and of chunks, places, chunks,
// and for each tensor its misalignment and size in bytes and its data. Writes the sum to stdout.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/criteria.h"

namespace {

#include "../../csrc/criterion.inl"
#include "../../csrc/layout.inl"
#include "../../csrc/norm.inl"
#include "../../csrc/cuda/walk.cuh"

#include "../../csrc/cuda/norm.cuh"

template <typename T>
std::vector<T> receive(int64_t count) {
  std::vector<T> values(count);
  if (count > 0 && std::fread(values.data(), count * sizeof(T), 1, stdin) != 1) std::abort();
  return values;
}

// What a block of `threads` does between two barriers for each level.
double sum_tree(double* values, int width, int threads) {
  for (; width > 1; width /= 2) {
    for (int thread = 0; thread < threads; ++thread) add_halves(values, width, thread, threads);
  }
  return values[0];
}

template <typename T>
double chunk_squares(const Work& work, int64_t block) {
  double values[kNormLanes];
  for (int thread = 0; thread < kNormThreads; ++thread) {
    double lanes[4];
    lane_sums<T>(work, block, thread, lanes);
    for (int w = 0; w < 4; ++w) values[4 * thread + w] = lanes[w];
  }
  return sum_tree(values, kNormLanes, kNormThreads);
}

}  // namespace

int main() {
  const auto header = receive<int64_t>(3);
  const auto places = receive<Place>(header[1]);
  const auto chunks = receive<Chunk>(header[2]);
  std::vector<int64_t> pointers;
  std::vector<void*> allocations;
  for (int64_t i = 0; i < header[1]; ++i) {
    const auto shape = receive<int64_t>(2);
    void* allocation = nullptr;
    if (posix_memalign(&allocation, 64, shape[0] + shape[1]) != 0) std::abort();
    allocations.push_back(allocation);
    char* data = static_cast<char*>(allocation) + shape[0];
    if (shape[1] > 0 && std::fread(data, shape[1], 1, stdin) != 1) std::abort();
    pointers.push_back(reinterpret_cast<int64_t>(data));
  }
  const Work work{pointers.data(), header[1], places.data(), chunks.data()};
  double totals[kNormTotals] = {};
  for (int64_t block = 0; block < header[2]; ++block) {
    totals[block % kNormTotals] += header[0] == 0   ? chunk_squares<float>(work, block)
                                   : header[0] == 1 ? chunk_squares<BFloat16>(work, block)
                                                    : chunk_squares<Float16>(work, block);
  }
  const double sum = sum_tree(totals, kNormTotals, kNormTotals);
  std::fwrite(&sum, sizeof sum, 1, stdout);
  for (void* allocation : allocations) std::free(allocation);
  return 0;
}
