// grouped_pack on the CPU: a weight matrix with zeros into groups of eight. See csrc/cuda/grouped.cuh.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <tuple>

#include "../checks.h"

namespace pins_ext::cpu {
namespace {

constexpr int64_t kGroup = 8;
constexpr int64_t kReach = 256;
constexpr int64_t kMostColumns = 65536;

// A float of this size as bits; both zeros are zero.
bool is_zero(uint32_t bits) { return (bits & 0x7fffffffu) == 0; }
bool is_zero(uint16_t bits) { return (bits & 0x7fffu) == 0; }

// The groups of a row, in order: f(base, number of weights, their columns).
template <class Bits, class F>
void each_group(const Bits* row, int64_t columns, const F& f) {
  int64_t found[kGroup], n = 0;
  for (int64_t c = 0; c < columns; ++c) {
    if (is_zero(row[c])) continue;
    if (n == kGroup || (n > 0 && c - found[0] >= kReach)) {
      f(found[0], n, found);
      n = 0;
    }
    found[n++] = c;
  }
  if (n > 0) f(found[0], n, found);
}

using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Bits>
Packed packed(const Tensor& weight) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const Bits* weights = static_cast<const Bits*>(weight.const_data_ptr());
  Tensor starts = torch::stable::new_zeros(weight, {rows + 1}, ScalarType::Long);
  int64_t* start = static_cast<int64_t*>(starts.data_ptr());
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t groups = 0;
      each_group(weights + r * columns, columns, [&](int64_t, int64_t, const int64_t*) { ++groups; });
      start[r + 1] = groups;
    }
  });
  for (int64_t r = 0; r < rows; ++r) start[r + 1] += start[r];
  const int64_t groups = start[rows];
  Tensor values = torch::stable::new_zeros(weight, {groups, kGroup}, weight.scalar_type());
  Tensor places = torch::stable::new_empty(weight, {groups, kGroup}, ScalarType::Byte);
  Tensor bases = torch::stable::new_empty(weight, {groups}, ScalarType::Short);
  Bits* value = static_cast<Bits*>(values.data_ptr());
  uint8_t* place = static_cast<uint8_t*>(places.data_ptr());
  uint16_t* base = static_cast<uint16_t*>(bases.data_ptr());
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Bits* row = weights + r * columns;
      int64_t g = start[r];
      each_group(row, columns, [&](int64_t first, int64_t n, const int64_t* found) {
        // The first column after the base that is none of these: among fewer than eight there is one within reach.
        int64_t gap = 1;
        while (gap < n && found[gap] == first + gap) ++gap;
        for (int64_t i = 0; i < kGroup; ++i) {
          place[g * kGroup + i] = static_cast<uint8_t>(i < n ? found[i] - first : gap);
          if (i < n) value[g * kGroup + i] = row[found[i]];
        }
        base[g++] = static_cast<uint16_t>(first);
      });
    }
  });
  return {values, places, bases, starts};
}

Packed grouped_pack(const Tensor& weight) {
  check_tensor([] { return "weight"; }, weight, Device(DeviceType::CPU), kParamDtypes);
  PINS_CHECK(weight.dim() == 2, "weight must have two dimensions, got ", weight.dim());
  PINS_CHECK(weight.size(1) <= kMostColumns, "weight must have at most ", kMostColumns, " columns, got ",
             weight.size(1));
  return weight.scalar_type() == ScalarType::Float ? packed<uint32_t>(weight) : packed<uint16_t>(weight);
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) { m.impl("grouped_pack", TORCH_BOX(&pins_ext::cpu::grouped_pack)); }
