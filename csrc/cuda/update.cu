// masked_adamw_, masked_sgd_ and apply_mask_ on a GPU: one launch for all tensors, one block per chunk.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "../update_call.h"
#include "pointers.cuh"

namespace pins_ext::cuda {
namespace {

#include "../criterion.inl"
#include "../layout.inl"
#include "../optimizer.inl"
// In this order: each is written in terms of the ones before.
#include "walk.cuh"

#include "update.cuh"

#include "update_coded.cuh"

#include "update_launch.cuh"

// ---- kernels ----------------------------------------------------------------------------------------------------

// Small blocks end evenly, and every thread makes at least 16 accesses of a full chunk.
constexpr int kThreads = 128;

// Blocks that share a multiprocessor, as many as registers allow without spilling: 72 to 128 a thread. The loads in
// flight, 80 bytes a thread, are then at least 1.3 times what bandwidth times latency asks for.
template <typename P, typename S, typename M>
constexpr int kBlocks = sizeof(P) == 2                     ? (sizeof(M) == 2 ? 4 : 5)
                        : sizeof(S) == 4 && sizeof(M) == 4 ? 7
                                                           : 6;

template <typename Step, typename P, typename S, typename M>
__global__ void __launch_bounds__(kThreads, kBlocks<P, S, M>)
    update_kernel(const __grid_constant__ UpdateArguments arguments) {
  update_chunk<Step, P, S, M>(arguments, blockIdx.x, threadIdx.x, blockDim.x);
}

template <typename Step>
__global__ void __launch_bounds__(kThreads)
    coded_update_kernel(const __grid_constant__ UpdateArguments arguments, const __grid_constant__ Stored stored) {
  if (arguments.found_inf != nullptr && arguments.found_inf[0] != 0.0f) return;
  const Chunk& chunk = arguments.work.chunks[blockIdx.x];
  const int thread = static_cast<int>(threadIdx.x);
  CodedUpdate<Step>(arguments, stored, chunk).run(chunk, thread / 32, kThreads / 32, thread % 32);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) apply_mask_kernel(const __grid_constant__ Work work) {
  apply_mask_chunk<T>(work, blockIdx.x, threadIdx.x, blockDim.x);
}

// ---- launchers --------------------------------------------------------------------------------------------------

Kind kind_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Kind::bfloat16
         : dtype == ScalarType::Half   ? Kind::float16
         : dtype == ScalarType::Byte   ? Kind::code8
         : dtype == ScalarType::Char   ? Kind::signed8
                                       : Kind::float32;
}

template <typename Step>
struct Kernels {
  static constexpr int kMoments = Step::kMoments;

  template <typename P, typename S, typename M>
  static auto of() {
    return &update_kernel<Step, P, S, M>;
  }
};

template <typename Step>
void update(const UpdateArguments& arguments, const Storage& storage, unsigned blocks, cudaStream_t stream) {
  if (storage.coded()) {
    const ScalarType second = storage.moments == ScalarType::Char ? ScalarType::Byte : storage.moments;
    const Stored stored{kind_of(storage.params), kind_of(storage.state), {kind_of(storage.moments), kind_of(second)}};
    coded_update_kernel<Step><<<blocks, kThreads, 0, stream>>>(arguments, stored);
    PINS_LAUNCH_CHECK(coded_update_kernel);
    return;
  }
  kernel_for<Kernels<Step>>(storage)<<<blocks, kThreads, 0, stream>>>(arguments);
  PINS_LAUNCH_CHECK(update_kernel);
}

void apply_mask(const Work& work, ScalarType params, unsigned blocks, cudaStream_t stream) {
  if (params == ScalarType::Float) {
    apply_mask_kernel<float><<<blocks, kThreads, 0, stream>>>(work);
  } else {
    apply_mask_kernel<BFloat16><<<blocks, kThreads, 0, stream>>>(work);  // zeros need no more than the size
  }
  PINS_LAUNCH_CHECK(apply_mask_kernel);
}

// ---- checked operators ------------------------------------------------------------------------------------------

// What the tables and scalars hold stays on the device and is not checked: that chunks fit their tensors, and that SGD
// without momentum_buffer has momentum 0 in every row of hyper.
template <typename Step>
void masked_update(const UpdateCall& call) {
  const CurrentDevice device(call.places);
  const int criterion = check_update(call, call.places.device());
  const unsigned blocks = blocks_of(call.chunks);
  if (blocks == 0) return;

  const std::vector<List> lists = call.lists();
  const Tensor pointers = pointer_table(device, call.places, lists, call.pointers);
  const UpdateArguments arguments = arguments_of(call, lists, pointers, criterion);
  update<Step>(arguments, Storage(call, call.ipt), blocks, device.stream());
}

void apply_mask_(const Written& params, const Tensors& masks, const Tensor& places, const Tensor& chunks,
                 const OptionalTensor& pointers) {
  const CurrentDevice device(places);
  const int64_t n = check_tables(places, chunks, places.device());
  check_list("params", params, n, places.device(), kParamDtypes);
  check_list("masks", masks, n, places.device(), {ScalarType::Byte});
  check_masks(masks, numels_of(params));
  const Inputs inputs{{"places", &places}, {"chunks", &chunks}, {"pointers", if_given(pointers)}};
  inputs.check_outputs({{"params", params}});
  const unsigned blocks = blocks_of(chunks);
  if (blocks == 0) return;
  const Tensor table = pointer_table(device, places, {{"params", params}, {"masks", masks}}, pointers);
  apply_mask(work_of(table, places, chunks), params[0].scalar_type(), blocks, device.stream());
}

}  // namespace
}  // namespace pins_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CUDA, m) {
  m.impl("masked_adamw_",
         TORCH_BOX(&pins_ext::masked_adamw_<pins_ext::cuda::masked_update<pins_ext::cuda::AdamWStep>>));
  m.impl("masked_sgd_", TORCH_BOX(&pins_ext::masked_sgd_<pins_ext::cuda::masked_update<pins_ext::cuda::SgdStep>>));
  m.impl("apply_mask_", TORCH_BOX(&pins_ext::cuda::apply_mask_));
}
