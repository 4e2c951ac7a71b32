// grouped_linear and grouped_expand on a GPU: a warp per row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "launch.h"

namespace pins_ext::cuda {
namespace {

#include "../criterion.inl"
#include "../layout.inl"
#include "../optimizer.inl"
#include "walk.cuh"

#include "grouped.cuh"

constexpr int kThreads = 512;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kRowsPerBlock = kThreads / kLanes;

__device__ float sum_of_lanes(float x) {
  for (int d = kLanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

// y[token][row] = sum of weight × x + bias, in float32, tokens staged in shared memory. The first groups are on their
// way while the tokens are staged.
template <typename Value, int kTokens>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    grouped_linear_kernel(const __grid_constant__ Grouped matrix, const __grid_constant__ Tokens tokens,
                          const float* bias, const __grid_constant__ Strides strides) {
  extern __shared__ float4 shared[];
  float* staged = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % kLanes;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kLanes;
  Course<Value> course(matrix, row, lane);
  Flight<Value> flight;
  take_off(course, flight);
  stage<kTokens>(tokens, matrix.columns_of_row, staged, threadIdx.x, kThreads);
  __syncthreads();
  const Staged<kTokens> x(staged, strides);
  while (row < matrix.rows) {
    float sums[kTokens] = {};
    travel<Value, kTokens>(course, flight, x, sums);
    for (int t = 0; t < kTokens; ++t) sums[t] = sum_of_lanes(sums[t]);
    if (lane == 0) finish<kTokens>(matrix, tokens, bias, row, sums);
    row += static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
    course = Course<Value>(matrix, row, lane);
    take_off(course, flight);
  }
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    grouped_expand_kernel(const __grid_constant__ Grouped matrix, Bits* weight) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kLanes;
  if (row >= matrix.rows) return;
  clear(matrix, weight, row, lane);
  __syncwarp();
  scatter(matrix, weight, row, lane);
}

int attribute(cudaDeviceAttr name, const CurrentDevice& device) {
  int value = 0;
  PINS_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device.index()));
  return value;
}

int64_t blocks_for(int64_t rows) { return (rows + kRowsPerBlock - 1) / kRowsPerBlock; }

template <typename Value, int kTokens>
void launch_linear(const Grouped& matrix, const Tokens& tokens, const float* bias, const CurrentDevice& device) {
  const auto kernel = grouped_linear_kernel<Value, kTokens>;
  const int bytes = static_cast<int>((matrix.columns_of_row + 1) * kTokens * sizeof(float));
  // Not these bytes: another thread may launch it with more.
  const int most_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  PINS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes));
  int resident = 0;
  PINS_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes));
  const int64_t most = std::max(resident, 1) * static_cast<int64_t>(attribute(cudaDevAttrMultiProcessorCount, device));
  const auto blocks = static_cast<unsigned>(std::min(blocks_for(matrix.rows), most));
  kernel<<<blocks, kThreads, bytes, device.stream()>>>(matrix, tokens, bias, Strides(kTokens));
  PINS_LAUNCH_CHECK(grouped_linear_kernel);
}

template <typename Value>
void launch_linear(const Grouped& matrix, const Tokens& tokens, int width, const float* bias,
                   const CurrentDevice& device) {
  if (width == 1) return launch_linear<Value, 1>(matrix, tokens, bias, device);
  if (width == 2) return launch_linear<Value, 2>(matrix, tokens, bias, device);
  launch_linear<Value, 4>(matrix, tokens, bias, device);
}

Grouped checked(const Tensor& values, const Tensor& columns, const Tensor& bases, const Tensor& starts,
                int64_t in_features, const Device& device) {
  check_tensor([] { return "values"; }, values, device, kParamDtypes);
  const int64_t groups = values.numel() / kGroupWeights;
  check_shape("values", values, {groups, kGroupWeights}, values.scalar_type(), device);
  check_shape("columns", columns, {groups, kGroupWeights}, ScalarType::Byte, device);
  check_shape("bases", bases, {groups}, ScalarType::Short, device);
  PINS_CHECK(starts.dim() == 1 && starts.numel() > 0, "starts must have one dimension and one element more than rows");
  check_shape("starts", starts, {starts.numel()}, ScalarType::Long, device);
  PINS_CHECK(reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(columns.const_data_ptr()) % 8 == 0,
             "values must lie at a multiple of 16 bytes, columns of 8");
  return {values.const_data_ptr(),  data_of<uint8_t>(columns), data_of<uint16_t>(bases),
          data_of<int64_t>(starts), starts.numel() - 1,        in_features};
}

int dtype_index(ScalarType dtype) { return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2; }

// The most tokens of a launch: they must fit in shared memory.
int64_t width_for(int64_t in_features, const CurrentDevice& device) {
  const int64_t bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t token = (in_features + 1) * static_cast<int64_t>(sizeof(float));
  PINS_CHECK(token <= bytes, "x must have at most ", bytes / 4 - 1, " columns on this GPU, got ", in_features);
  return 4 * token <= bytes ? 4 : 2 * token <= bytes ? 2 : 1;
}

Tensor grouped_linear(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& bases,
                      const Tensor& starts, const OptionalTensor& bias) {
  const CurrentDevice device(x);
  check_tensor([] { return "x"; }, x, x.device(), kParamDtypes);
  PINS_CHECK(x.dim() >= 1, "x must have at least one dimension");
  const int64_t in_features = x.size(x.dim() - 1);
  const Grouped matrix = checked(values, columns, bases, starts, in_features, x.device());
  if (bias.has_value()) check_shape("bias", *bias, {matrix.rows}, ScalarType::Float, x.device());
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = matrix.rows;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const int64_t count = y.numel() / matrix.rows, widest = width_for(in_features, device);
  for (int64_t t = 0; t < count; t += widest) {
    const int64_t left = std::min(count - t, widest), size = x.element_size();
    const Tokens tokens{static_cast<const char*>(x.const_data_ptr()) + t * in_features * size,
                        static_cast<char*>(y.data_ptr()) + t * matrix.rows * size, dtype_index(x.scalar_type()), left};
    const int width = left > 2 ? 4 : static_cast<int>(left);
    switch (values.scalar_type()) {
      case ScalarType::Float: launch_linear<float>(matrix, tokens, width, data_of(bias), device); break;
      case ScalarType::BFloat16: launch_linear<BFloat16>(matrix, tokens, width, data_of(bias), device); break;
      default: launch_linear<Float16>(matrix, tokens, width, data_of(bias), device);
    }
  }
  return y;
}

Tensor grouped_expand(const Tensor& values, const Tensor& columns, const Tensor& bases, const Tensor& starts,
                      int64_t in_features) {
  const CurrentDevice device(values);
  PINS_CHECK(in_features >= 0, "in_features must not be negative, got ", in_features);
  const Grouped matrix = checked(values, columns, bases, starts, in_features, values.device());
  Tensor weight = torch::stable::new_empty(values, {matrix.rows, in_features});
  if (weight.numel() == 0) return weight;
  const auto blocks = static_cast<unsigned>(blocks_for(matrix.rows));
  if (values.scalar_type() == ScalarType::Float) {
    grouped_expand_kernel<<<blocks, kThreads, 0, device.stream()>>>(matrix, static_cast<uint32_t*>(weight.data_ptr()));
  } else {
    grouped_expand_kernel<<<blocks, kThreads, 0, device.stream()>>>(matrix, static_cast<uint16_t*>(weight.data_ptr()));
  }
  PINS_LAUNCH_CHECK(grouped_expand_kernel);
  return weight;
}

}  // namespace
}  // namespace pins_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CUDA, m) {
  m.impl("grouped_linear", TORCH_BOX(&pins_ext::cuda::grouped_linear));
  m.impl("grouped_expand", TORCH_BOX(&pins_ext::cuda::grouped_expand));
}
