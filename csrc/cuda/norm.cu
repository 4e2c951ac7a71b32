// sum_of_squares on a GPU: one block per chunk, then one block for their sums.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "pointers.cuh"

namespace pins_ext::cuda {
namespace {

#include "../criterion.inl"
#include "../layout.inl"
#include "../norm.inl"
#include "walk.cuh"

#include "norm.cuh"

// All threads of the block; the sum is values[0].
__device__ void sum_tree(double* values, int width) {
  for (; width > 1; width /= 2) {
    __syncthreads();
    add_halves(values, width, threadIdx.x, blockDim.x);
  }
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads) chunk_squares_kernel(const __grid_constant__ Work work, double* sums) {
  __shared__ double values[kNormLanes];
  double lanes[4];
  lane_sums<T>(work, blockIdx.x, threadIdx.x, lanes);
  for (int w = 0; w < 4; ++w) values[4 * threadIdx.x + w] = lanes[w];
  sum_tree(values, kNormLanes);
  if (threadIdx.x == 0) sums[blockIdx.x] = values[0];
}

__global__ void __launch_bounds__(kNormTotals) total_kernel(const double* sums, int64_t count, double* total) {
  __shared__ double values[kNormTotals];
  values[threadIdx.x] = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kNormTotals) values[threadIdx.x] += sums[i];
  sum_tree(values, kNormTotals);
  if (threadIdx.x == 0) total[0] = values[0];
}

void chunk_squares(const Work& work, ScalarType dtype, double* sums, unsigned blocks, cudaStream_t stream) {
  const auto kernel = dtype == ScalarType::Float      ? chunk_squares_kernel<float>
                      : dtype == ScalarType::BFloat16 ? chunk_squares_kernel<BFloat16>
                                                      : chunk_squares_kernel<Float16>;
  kernel<<<blocks, kNormThreads, 0, stream>>>(work, sums);
  PINS_LAUNCH_CHECK(chunk_squares_kernel);
}

Tensor sum_of_squares(const Tensors& tensors, const Tensor& places, const Tensor& chunks,
                      const OptionalTensor& pointers) {
  const CurrentDevice device(places);
  const int64_t n = check_tables(places, chunks, places.device());
  check_list("tensors", tensors, n, places.device(), kParamDtypes);
  const unsigned blocks = blocks_of(chunks);
  const Tensor sums = torch::stable::new_empty(places, {chunks.size(0)}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(places, {1}, ScalarType::Double);
  if (blocks > 0) {
    const Tensor table = pointer_table(device, places, {{"tensors", tensors}}, pointers);
    const Work work{data_of<int64_t>(table), n, data_of<Place>(places), data_of<Chunk>(chunks)};
    chunk_squares(work, tensors[0].scalar_type(), static_cast<double*>(sums.data_ptr()), blocks, device.stream());
  }
  total_kernel<<<1, kNormTotals, 0, device.stream()>>>(data_of<double>(sums), chunks.size(0),
                                                       static_cast<double*>(total.data_ptr()));
  PINS_LAUNCH_CHECK(total_kernel);
  return total;
}

}  // namespace
}  // namespace pins_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CUDA, m) { m.impl("sum_of_squares", TORCH_BOX(&pins_ext::cuda::sum_of_squares)); }
