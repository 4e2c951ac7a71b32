// The table of addresses that a list operator's kernel reads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "launch.h"

namespace pins_ext::cuda {

// Addresses travel as kernel arguments, at most 4 KB: a copy from pageable memory may wait for the stream.
struct Addresses {
  static constexpr size_t kCount = 500;
  int64_t at[kCount];
};

namespace {

__global__ void write_addresses_kernel(const __grid_constant__ Addresses addresses, int64_t* table, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) table[i] = addresses.at[i];
}

}  // namespace

// The addresses of the lists, a row each in the order of the arguments, zeros for an empty one: int64 [lists, n] on the
// device. `pointers` if the caller keeps such a table, otherwise a new one, written on the stream.
inline Tensor pointer_table(const CurrentDevice& device, const Tensor& places, const std::vector<List>& lists,
                            const OptionalTensor& pointers) {
  const int64_t shape[] = {static_cast<int64_t>(lists.size()), places.size(0)};
  if (pointers.has_value()) {
    check_shape("pointers", *pointers, {shape[0], shape[1]}, ScalarType::Long, places.device());
    return *pointers;
  }
  PINS_CHECK(!device.capturing(),
             "pointers must be given while a CUDA graph is captured: a replay would go on with the addresses of now");
  std::vector<int64_t> addresses;
  for (const List& list : lists) {
    for (const ListedTensor& tensor : list.tensors) addresses.push_back(reinterpret_cast<int64_t>(tensor.data_ptr()));
    if (!list.given()) addresses.insert(addresses.end(), shape[1], 0);
  }
  Tensor table = torch::stable::new_empty(places, {shape, 2}, ScalarType::Long);
  for (size_t first = 0; first < addresses.size(); first += Addresses::kCount) {
    const size_t count = std::min(addresses.size() - first, Addresses::kCount);
    Addresses part{};
    std::copy_n(addresses.begin() + first, count, part.at);
    write_addresses_kernel<<<1, 256, 0, device.stream()>>>(part, static_cast<int64_t*>(table.data_ptr()) + first,
                                                           static_cast<int>(count));
    PINS_LAUNCH_CHECK(write_addresses_kernel);
  }
  return table;
}

}  // namespace pins_ext::cuda
