// stream_ on the CPU: the floor of a kernel that updates in place.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "work.h"

namespace pins_ext::cpu {
namespace {

void stream_(const Written& written, const Tensors& read) {
  PINS_CHECK(written.size() + read.size() <= Streams::kMost, "written and read may have ", Streams::kMost,
             " tensors in all, got ", written.size() + read.size());
  Streams streams{};
  int64_t numel = 0;
  for (const List& list : {List{"written", written}, List{"read", read}}) {
    for (size_t i = 0; i < list.tensors.size(); ++i) {
      const ListedTensor& tensor = list.tensors[i];
      check_tensor([&] { return item(list.name, i); }, tensor, kCpu, kParamDtypes);
      if (streams.size == 0) numel = tensor.numel();
      PINS_CHECK(tensor.numel() == numel, item(list.name, i), " must have ", numel, " elements, got ", tensor.numel());
      streams.data[streams.size] = address_of<char>(tensor);
      streams.itemsize[streams.size++] = static_cast<int64_t>(tensor.element_size());
    }
  }
  Inputs{}.check_outputs({{"written", written}});
  streams.written = static_cast<int>(written.size());
  // Read at run time: the compiler must not know that nothing changes.
  volatile uint32_t nothing = 0;
  std::atomic<uint32_t> seen{0};
  torch::stable::parallel_for(0, (numel + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    uint32_t own = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t left = numel - i * kChunk;
      own ^= kernels().stream(streams, i * kChunk, left < kChunk ? left : kChunk, nothing);
    }
    seen.fetch_xor(own);
  });
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) { m.impl("stream_", TORCH_BOX(&pins_ext::cpu::stream_)); }
