// masked_adamw_, masked_sgd_ and apply_mask_ on a GPU: one launch for all tensors, one block per chunk.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>

#include "pointers.cuh"

namespace pins_ext::cuda {
namespace {

#include "../criterion.h"
#include "../layout.h"
#include "../optimizer.h"
// In this order: the second is written in terms of the first.
#include "walk.cuh"

#include "update.cuh"

// ---- kernels ----------------------------------------------------------------------------------------------------

// Small blocks end evenly, and every thread makes at least 16 accesses of a full chunk.
constexpr int kThreads = 128;

// Blocks that share a multiprocessor, as many as registers allow without spilling: 72 or 80 a thread. The loads in
// flight, 80 bytes a thread, are then twice what bandwidth times latency asks for.
template <typename P, typename S>
constexpr int kBlocks = sizeof(P) == 4 && sizeof(S) == 4 ? 7 : 6;

template <typename Step, typename P, typename S>
__global__ void __launch_bounds__(kThreads, kBlocks<P, S>)
    update_kernel(const __grid_constant__ UpdateArguments arguments) {
  update_chunk<Step, P, S>(arguments, blockIdx.x, threadIdx.x, blockDim.x);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) apply_mask_kernel(const __grid_constant__ Work work) {
  apply_mask_chunk<T>(work, blockIdx.x, threadIdx.x, blockDim.x);
}

// ---- launchers --------------------------------------------------------------------------------------------------

template <typename Step, typename P>
void (*kernel_for(ScalarType state))(UpdateArguments) {
  return state == ScalarType::BFloat16 ? update_kernel<Step, P, BFloat16> : update_kernel<Step, P, float>;
}

template <typename Step>
void (*kernel_for(ScalarType params, ScalarType state))(UpdateArguments) {
  return params == ScalarType::Float      ? kernel_for<Step, float>(state)
         : params == ScalarType::BFloat16 ? kernel_for<Step, BFloat16>(state)
                                          : kernel_for<Step, Float16>(state);
}

template <typename Step>
void update(const UpdateArguments& arguments, ScalarType params, ScalarType state, unsigned blocks,
            cudaStream_t stream) {
  kernel_for<Step>(params, state)<<<blocks, kThreads, 0, stream>>>(arguments);
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

using OptionalTensor = std::optional<Tensor>;

// The checks of one call. What the tables and scalars hold stays on the device.
class Checks {
 public:
  Checks(const Device& device, const Tensors& params) : device_(device) {
    for (const Tensor& tensor : params) numel_.push_back(tensor.numel());
    list({"params", params}, kParamDtypes);
  }

  int64_t tensors() const { return static_cast<int64_t>(numel_.size()); }

  // Returns the number of chunks.
  unsigned tables(const Tensor& layout, const Tensor& chunks) const {
    table("layout", layout, {tensors(), 13}, ScalarType::Long);
    const int64_t count = chunks.dim() > 0 ? chunks.size(0) : 0;
    table("chunks", chunks, {count, 2}, ScalarType::Long);
    PINS_CHECK(count <= 0x7fffffff, "chunks must have at most 2^31 - 1 rows, got ", count);
    return static_cast<unsigned>(count);
  }

  void table(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType dtype) const {
    check_shape(name, tensor, shape, dtype, kCuda);
    device_.check_holds([&] { return name; }, tensor);
  }

  void scalar(const char* name, const OptionalTensor& tensor) const {
    check_scalar(name, tensor, ScalarType::Float, kCuda);
    if (tensor.has_value()) device_.check_holds([&] { return name; }, *tensor);
  }

  void list(const Operand& list, Dtypes dtypes) const {
    check_list(list.name, list.tensors, numel_.size(), kCuda, dtypes);
    check_numel(list.name, list.tensors, numel_);
    on_device(list);
  }

  void masks(const Operand& list) const {
    check_list(list.name, list.tensors, numel_.size(), kCuda, {ScalarType::Byte});
    check_masks(list.tensors, numel_);
    on_device(list);
  }

 private:
  void on_device(const Operand& list) const {
    for (size_t i = 0; i < list.tensors.size(); ++i) {
      device_.check_holds([&] { return item(list.name, i); }, list.tensors[i]);
    }
  }

  const Device& device_;
  std::vector<int64_t> numel_;
};

// The arguments that both optimizers share.
struct UpdateCall {
  const Tensors &params, &ipt, &shadow, &grads, &masks;
  const Tensor &layout, &chunks, &hyper, &accepted, &rng;
  const std::string& criterion;
  bool clear_state;
  const OptionalTensor &grad_scale, &clip, &found_inf, &pointers;
};

template <typename Step>
void masked_update(const UpdateCall& call, const std::array<Operand, Step::kMoments>& moments) {
  const Device device(call.layout);
  const Checks check(device, call.params);
  const unsigned blocks = check.tables(call.layout, call.chunks);
  std::vector<Operand> lists{{"params", call.params}};
  for (const Operand& moment : moments) lists.push_back(moment);
  lists.push_back({"ipt", call.ipt});
  lists.push_back({"shadow", call.shadow});
  lists.push_back({"grads", call.grads});
  lists.push_back({"masks", call.masks});
  using L = Lists<Step>;
  uint32_t given = 0;
  for (int k = 0; k < L::count; ++k) {
    // SGD without momentum has no buffer; AdamW has both moments.
    const bool optional = k == L::ipt || k == L::shadow || k == L::masks || (k == L::moments && Step::kMoments == 1);
    if (optional && !lists[k].given()) continue;
    given |= 1u << k;
    if (k == L::masks) {
      check.masks(lists[k]);
    } else {
      check.list(lists[k], k == L::ipt ? kStateDtypes : kParamDtypes);
      if (k != L::ipt) check_same_dtype(lists[k].name, lists[k].tensors, "params", call.params);
    }
  }
  check.table("hyper", call.hyper, {check.tensors(), 8}, ScalarType::Float);
  check.table("rng", call.rng, {2}, ScalarType::Long);
  check.scalar("accepted", call.accepted);
  check.scalar("grad_scale", call.grad_scale);
  check.scalar("clip", call.clip);
  check.scalar("found_inf", call.found_inf);
  const int criterion = option("criterion", call.criterion, kCriteria);
  if (blocks == 0) return;

  const Tensor pointers = pointer_table(device, call.layout, lists, call.pointers);
  const UpdateArguments arguments{{data_of<int64_t>(pointers), check.tensors(), data_of<Place>(call.layout),
                                   data_of<Chunk>(call.chunks)},
                                  data_of<float>(call.hyper),
                                  data_of<float>(call.accepted),
                                  data_of<int64_t>(call.rng),
                                  data_of(call.grad_scale),
                                  data_of(call.clip),
                                  data_of(call.found_inf),
                                  given,
                                  static_cast<Criterion>(criterion),
                                  call.clear_state};
  const ScalarType state = call.ipt.empty() ? ScalarType::Float : call.ipt[0].scalar_type();
  update<Step>(arguments, call.params[0].scalar_type(), state, blocks, device.stream());
}

void masked_adamw_(const Tensors& params, const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& ipt,
                   const Tensors& shadow, const Tensors& grads, const Tensors& masks, const Tensor& layout,
                   const Tensor& chunks, const Tensor& hyper, const Tensor& accepted, const Tensor& rng,
                   const std::string& criterion, bool clear_state, const OptionalTensor& grad_scale,
                   const OptionalTensor& clip, const OptionalTensor& found_inf, const OptionalTensor& pointers) {
  masked_update<AdamWStep>({params, ipt, shadow, grads, masks, layout, chunks, hyper, accepted, rng, criterion,
                            clear_state, grad_scale, clip, found_inf, pointers},
                           {{{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}}});
}

// Without momentum_buffer every row of hyper must have momentum 0; that is on the device and can't be checked here.
void masked_sgd_(const Tensors& params, const Tensors& momentum_buffer, const Tensors& ipt, const Tensors& shadow,
                 const Tensors& grads, const Tensors& masks, const Tensor& layout, const Tensor& chunks,
                 const Tensor& hyper, const Tensor& accepted, const Tensor& rng, const std::string& criterion,
                 bool clear_state, const OptionalTensor& grad_scale, const OptionalTensor& clip,
                 const OptionalTensor& found_inf, const OptionalTensor& pointers) {
  masked_update<SgdStep>({params, ipt, shadow, grads, masks, layout, chunks, hyper, accepted, rng, criterion,
                          clear_state, grad_scale, clip, found_inf, pointers},
                         {{{"momentum_buffer", momentum_buffer}}});
}

void apply_mask_(const Tensors& params, const Tensors& masks, const Tensor& layout, const Tensor& chunks,
                 const OptionalTensor& pointers) {
  const Device device(layout);
  const Checks check(device, params);
  const unsigned blocks = check.tables(layout, chunks);
  check.masks({"masks", masks});
  if (blocks == 0) return;
  const Tensor table = pointer_table(device, layout, {{"params", params}, {"masks", masks}}, pointers);
  const Work work{data_of<int64_t>(table), check.tensors(), data_of<Place>(layout),
                  data_of<Chunk>(chunks)};
  apply_mask(work, params[0].scalar_type(), blocks, device.stream());
}

}  // namespace
}  // namespace pins_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CUDA, m) {
  m.impl("masked_adamw_", TORCH_BOX(&pins_ext::cuda::masked_adamw_));
  m.impl("masked_sgd_", TORCH_BOX(&pins_ext::cuda::masked_sgd_));
  m.impl("apply_mask_", TORCH_BOX(&pins_ext::cuda::apply_mask_));
}
