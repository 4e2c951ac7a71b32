// What a launch needs beside its kernel: the device, its current stream, error checks.
//
// Stable headers and cuda_runtime.h alone. A CPU-only torch loads the same module: the one symbol that only a CUDA
// torch has is weak.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace pins_ext::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  PINS_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

#define PINS_CUDA_CHECK(call) check_cuda(call, #call)
// A launch reports its errors through the last error of the thread.
#define PINS_LAUNCH_CHECK(kernel) check_cuda(cudaGetLastError(), "the launch of " #kernel)

// Makes the device of the tables the current one while this lives, and knows its current stream.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& places) : guard_(checked(places).get_device_index()) {
    PINS_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    index_ = places.get_device_index();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }
  int index() const { return index_; }

  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    PINS_CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  static const Tensor& checked(const Tensor& places) {
    PINS_CHECK(places.is_cuda(), "places must be on the GPU like the rest");
    return places;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int index_ = 0;
};

// One block for each row of the checked work list.
inline unsigned blocks_of(const Tensor& chunks) {
  PINS_CHECK(chunks.size(0) <= 0x7fffffff, "chunks must have at most 2^31 - 1 rows, got ", chunks.size(0));
  return static_cast<unsigned>(chunks.size(0));
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline const float* data_of(const OptionalTensor& scalar) {
  return scalar.has_value() ? data_of<float>(*scalar) : nullptr;
}

}  // namespace pins_ext::cuda
