// sparse_pack on the CPU: a weight matrix with zeros into slices. See sparse.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "sparse_call.h"

namespace pins_ext::cpu {
namespace {

struct Shape {
  int64_t rows, columns, chunks, chunk_rows, blocks;
};

// One (rows of a chunk × 256 columns) block while it is packed: its rows, sorted, and the steps of its slices.
struct Sorted {
  std::array<uint8_t, kBlockRows> row;
  std::array<int16_t, kBlockRows / kSliceRows> steps;
  int64_t slices = 0;
  int64_t total = 0;
};

template <class T>
bool is_zero(T weight) {
  return weight == 0;
}
// 16-bit floats as bits: both zeros.
template <>
bool is_zero<uint16_t>(uint16_t weight) {
  return (weight & 0x7fff) == 0;
}

template <class T, int kGroup>
struct Packing {
  const T* weight;
  Shape shape;

  int64_t chunk_size(int64_t chunk) const { return std::min(shape.chunk_rows, shape.rows - chunk * shape.chunk_rows); }

  // The non-zero columns of a row within a block: f(column in the block, weight).
  template <class F>
  void each(int64_t row, int64_t block, const F& f) const {
    const int64_t first = block * kBlockColumns;
    const int64_t n = std::min(kBlockColumns, shape.columns - first);
    const T* weights = weight + row * shape.columns + first;
    for (int64_t c = 0; c < n; ++c) {
      if (!is_zero(weights[c])) f(static_cast<uint8_t>(c), weights[c]);
    }
  }

  // Rows by falling number of weights; equal ones in their own order, so that packing has one result.
  Sorted sorted(int64_t chunk, int64_t block) const {
    const int64_t n = chunk_size(chunk);
    std::array<int16_t, kBlockRows> steps{};
    for (int64_t r = 0; r < n; ++r) {
      int64_t weights = 0;
      each(chunk * shape.chunk_rows + r, block, [&](uint8_t, T) { ++weights; });
      steps[r] = static_cast<int16_t>((weights + kGroup - 1) / kGroup);
    }
    Sorted result;
    const int64_t padded = (n + kSliceRows - 1) / kSliceRows * kSliceRows;
    for (int64_t i = 0; i < padded; ++i) result.row[i] = static_cast<uint8_t>(i);
    std::stable_sort(result.row.begin(), result.row.begin() + padded,
                     [&](uint8_t a, uint8_t b) { return steps[a] > steps[b]; });
    for (int64_t i = 0; i < padded && steps[result.row[i]] > 0; i += kSliceRows) {
      result.steps[result.slices++] = steps[result.row[i]];
      result.total += steps[result.row[i]];
    }
    return result;
  }

  void fill(int64_t chunk, int64_t block, const Sorted& order, T* values, uint8_t* columns) const {
    for (int64_t s = 0; s < order.slices; ++s) {
      for (int64_t i = 0; i < kSliceRows; ++i) {
        const int64_t r = order.row[s * kSliceRows + i];
        if (r >= chunk_size(chunk)) continue;
        int64_t k = 0;
        each(chunk * shape.chunk_rows + r, block, [&](uint8_t column, T weight) {
          const int64_t at = (k / kGroup * kSliceRows + i) * kGroup + k % kGroup;
          values[at] = weight;
          columns[at] = column;
          ++k;
        });
      }
      values += order.steps[s] * kSliceRows * kGroup;
      columns += order.steps[s] * kSliceRows * kGroup;
    }
  }
};

using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T, int kGroup>
Packed packed(const Tensor& weight, const Shape& shape) {
  const Packing<T, kGroup> packing{static_cast<const T*>(weight.const_data_ptr()), shape};
  const int64_t n = shape.chunks * shape.blocks;
  std::vector<Sorted> order(n);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) order[i] = packing.sorted(i / shape.blocks, i % shape.blocks);
  });
  Tensor starts = torch::stable::new_empty(weight, {n + 1, 2}, ScalarType::Long);
  int64_t* start = static_cast<int64_t*>(starts.data_ptr());
  start[0] = start[1] = 0;
  for (int64_t i = 0; i < n; ++i) {
    start[2 * i + 2] = start[2 * i] + order[i].slices;
    start[2 * i + 3] = start[2 * i + 1] + order[i].total;
  }
  const int64_t slices = start[2 * n], steps = start[2 * n + 1];
  Tensor values = torch::stable::new_zeros(weight, {steps * kSliceRows * kGroup}, weight.scalar_type());
  Tensor columns = torch::stable::new_zeros(weight, {steps * kSliceRows * kGroup}, ScalarType::Byte);
  Tensor rows = torch::stable::new_empty(weight, {slices, kSliceRows}, ScalarType::Byte);
  Tensor counts = torch::stable::new_empty(weight, {slices}, ScalarType::Short);
  T* to_values = static_cast<T*>(values.data_ptr());
  uint8_t* to_columns = static_cast<uint8_t*>(columns.data_ptr());
  uint8_t* to_rows = static_cast<uint8_t*>(rows.data_ptr());
  int16_t* to_counts = static_cast<int16_t*>(counts.data_ptr());
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = start[2 * i + 1] * kSliceRows * kGroup;
      packing.fill(i / shape.blocks, i % shape.blocks, order[i], to_values + at, to_columns + at);
      std::copy_n(order[i].row.begin(), order[i].slices * kSliceRows, to_rows + start[2 * i] * kSliceRows);
      std::copy_n(order[i].steps.begin(), order[i].slices, to_counts + start[2 * i]);
    }
  });
  return {values, columns, rows, counts, starts};
}

Packed sparse_pack(const Tensor& weight) {
  check_tensor([] { return "weight"; }, weight, kSparseDevice,
               {ScalarType::Float, ScalarType::BFloat16, ScalarType::Char});
  PINS_CHECK(weight.dim() == 2, "weight must have two dimensions, got ", weight.dim());
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t chunks = chunks_of(rows);
  const Shape shape{rows, columns, chunks, chunk_rows_of(rows), blocks_of(columns)};
  switch (weight.scalar_type()) {
    case ScalarType::Float: return packed<float, 1>(weight, shape);
    case ScalarType::BFloat16: return packed<uint16_t, 1>(weight, shape);
    default: return packed<int8_t, 4>(weight, shape);
  }
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) { m.impl("sparse_pack", TORCH_BOX(&pins_ext::cpu::sparse_pack)); }
