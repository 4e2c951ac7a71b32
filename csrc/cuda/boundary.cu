// boundary_adamw_ and boundary_sgd_ on a GPU: one launch for all tensors, one block per chunk, and one for the few
// weights around the threshold.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "../boundary_call.h"
#include "pointers.cuh"

namespace pins_ext::cuda {
namespace {

#include "../criterion.inl"
#include "../layout.inl"
#include "../optimizer.inl"
// In this order: each is written in terms of the ones before.
#include "walk.cuh"

#include "update.cuh"

#include "update_launch.cuh"

#include "boundary.cuh"

// ---- kernels ----------------------------------------------------------------------------------------------------

constexpr int kThreads = 128;
static_assert(kChunk / kThreads + 1 < 256, "a thread's counters have a byte each");

// Blocks that share a multiprocessor, as many as registers allow without spilling: 96 or 128 a thread. The loads in
// flight, 96 bytes a thread where all is float32, are then more than twice what bandwidth times latency asks for.
template <typename P>
constexpr int kBlocks = sizeof(P) == 2 ? 4 : 5;

// Of the threads of a warp; those that differ are added by the first.
__device__ void add_sums(const BoundaryArguments& a, const Sums& sums) {
  Sums all;
  const uint32_t even = __reduce_add_sync(~0u, sums.counted & 0x00ff00ffu);
  const uint32_t odd = __reduce_add_sync(~0u, sums.counted >> 8 & 0x00ff00ffu);
  all.kept = __reduce_add_sync(~0u, sums.kept);
  all.flipped = __reduce_add_sync(~0u, sums.flipped);
  all.nan = __reduce_add_sync(~0u, sums.nan);
  if (threadIdx.x % 32 == 0) commit(a, blockIdx.x, all, even, odd);
}

template <typename Step, typename P, typename S, typename M>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    boundary_kernel(const __grid_constant__ BoundaryArguments arguments) {
  __shared__ uint32_t keep[kChunk / 32];
  for (int i = threadIdx.x; i < kChunk / 32; i += kThreads) keep[i] = 0;
  __syncthreads();
  Sums sums;
  boundary_chunk<Step, P, S, M>(arguments, blockIdx.x, threadIdx.x, kThreads, keep, sums);
  __syncthreads();
  if (arguments.around != nullptr) {
    write_masks(arguments, Lists<Step>::masks, blockIdx.x, threadIdx.x, kThreads, keep, sums);
  }
  add_sums(arguments, sums);
}

__global__ void __launch_bounds__(kThreads)
    settle_kernel(const __grid_constant__ BoundaryArguments arguments, Elements elements, int mask_list) {
  settle_candidate(arguments, elements, mask_list, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

// ---- launchers --------------------------------------------------------------------------------------------------

template <typename Step>
struct Kernels {
  static constexpr int kMoments = Step::kMoments;

  template <typename P, typename S, typename M>
  static auto of() {
    return &boundary_kernel<Step, P, S, M>;
  }
};

void clear(const Tensor& tensor, int64_t count, const CurrentDevice& device) {
  PINS_CUDA_CHECK(cudaMemsetAsync(tensor.data_ptr(), 0, count * tensor.element_size(), device.stream()));
}

// ---- checked operators ------------------------------------------------------------------------------------------

template <typename T>
T* written(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

const int64_t* longs(const OptionalTensor& tensor) { return tensor.has_value() ? data_of<int64_t>(*tensor) : nullptr; }

void check_words(const Tensors& masks) {
  for (size_t i = 0; i < masks.size(); ++i) {
    PINS_CHECK(reinterpret_cast<uintptr_t>(masks[i].const_data_ptr()) % 4 == 0, item("masks", i),
               " must lie at a multiple of 4 bytes");
  }
}

template <typename Step>
void boundary_update(const UpdateCall& call, const BoundaryCall& boundary) {
  const CurrentDevice device(call.places);
  const int criterion = check_update(call, call.places.device());
  check_boundary(call, boundary, call.places.device());
  const unsigned blocks = blocks_of(call.chunks);
  std::vector<List> lists = call.lists();
  lists.push_back({"exp_avg_ipt", boundary.exp_avg_ipt});
  lists.push_back({"exp_avg_unc", boundary.exp_avg_unc});
  if (boundary.chooses()) check_words(call.masks);
  const Tensor pointers = pointer_table(device, call.places, lists, call.pointers);

  // The candidates live as long as the caching allocator says: until what is on the stream now is over.
  std::optional<Tensor> candidates;
  if (boundary.chooses()) {
    candidates = torch::stable::new_empty(call.places, {1 + 4 * kCandidates}, ScalarType::Long);
    clear(*candidates, 1, device);
    clear(*boundary.stats, boundary.stats->numel(), device);
  }
  if (boundary.counts.has_value()) clear(*boundary.counts, boundary.counts->numel(), device);
  const BoundaryArguments arguments{arguments_of(call, lists, pointers, criterion),
                                    longs(boundary.around),
                                    written<int64_t>(boundary.stats),
                                    written<int64_t>(boundary.threshold),
                                    written<int64_t>(candidates),
                                    longs(boundary.fold_rng),
                                    static_cast<float>(boundary.beta1),
                                    static_cast<float>(1 - boundary.beta1),
                                    static_cast<float>(boundary.beta2),
                                    static_cast<float>(1 - boundary.beta2),
                                    longs(boundary.bracket),
                                    written<int64_t>(boundary.counts)};
  const Storage storage(call, boundary.exp_avg_ipt);
  if (blocks > 0) {
    kernel_for<Kernels<Step>>(storage)<<<blocks, kThreads, 0, device.stream()>>>(arguments);
    PINS_LAUNCH_CHECK(boundary_kernel);
  }
  if (!boundary.chooses()) return;
  const auto bytes = [](ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; };
  const int cleared = call.clear_state && call.moments[0].given() ? Step::kMoments : 0;
  const Elements elements{bytes(storage.params), bytes(storage.moments), cleared};
  settle_kernel<<<kCandidates / kThreads, kThreads, 0, device.stream()>>>(arguments, elements, Lists<Step>::masks);
  PINS_LAUNCH_CHECK(settle_kernel);
}

}  // namespace
}  // namespace pins_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CUDA, m) {
  m.impl("boundary_adamw_",
         TORCH_BOX(&pins_ext::boundary_adamw_<pins_ext::cuda::boundary_update<pins_ext::cuda::AdamWStep>>));
  m.impl("boundary_sgd_",
         TORCH_BOX(&pins_ext::boundary_sgd_<pins_ext::cuda::boundary_update<pins_ext::cuda::SgdStep>>));
}
