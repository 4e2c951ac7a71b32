// The arguments of the sparse operators: the packed tensors of one matrix, checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../checks.h"
#include "kernels.h"

namespace pins_ext::cpu {

constexpr DeviceType kSparseDevice = DeviceType::CPU;

inline int64_t blocks_of(int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns; }

// Rows are cut into an even number of chunks of at most kBlockRows rows, so that two threads share one token.
inline int64_t chunks_of(int64_t rows) {
  const int64_t least = (rows + kBlockRows - 1) / kBlockRows;
  return rows <= kSliceRows ? least : (least + 1) / 2 * 2;
}

// A multiple of kSliceRows; the last chunk may have fewer rows.
inline int64_t chunk_rows_of(int64_t rows) {
  const int64_t chunks = chunks_of(rows);
  if (chunks == 0) return kSliceRows;
  const int64_t share = (rows + chunks - 1) / chunks;
  return (share + kSliceRows - 1) / kSliceRows * kSliceRows;
}

inline Dtype kernel_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: return Dtype::float32;
  }
}

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// With fewer tiles than threads the rows of a tile are shared out as well: into this many parts.
inline int64_t shares_of(int64_t tiles, int64_t chunks) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>((threads + tiles - 1) / tiles, 1, chunks);
}

// A packed matrix: the result of sparse_pack.
class SparseMatrix {
 public:
  // Checks that no loop can leave the tensors, whatever they hold: rows and columns are bytes, which stay within a
  // block by themselves; what is left is where each block begins and how many steps its slices have.
  SparseMatrix(const Tensor& values, const Tensor& columns, const Tensor& rows, const Tensor& counts,
               const Tensor& starts, int64_t out_features, int64_t in_features, ScalarType dtype, int64_t group)
      : chunks_(chunks_of(out_features)),
        chunk_rows_(chunk_rows_of(out_features)),
        blocks_(blocks_of(in_features)),
        out_features_(out_features) {
    const int64_t n = chunks_ * blocks_;
    check_shape("starts", starts, {n + 1, 2}, ScalarType::Long, kSparseDevice);
    const int64_t* start = static_cast<const int64_t*>(starts.const_data_ptr());
    const int64_t slices = start[2 * n], steps = start[2 * n + 1];
    const int64_t most = std::numeric_limits<int64_t>::max() / (kSliceRows * group);
    PINS_CHECK(0 <= steps && steps <= most, "starts end at step ", steps, ", which no matrix has");
    stored_ = steps * kSliceRows * group;
    check_shape("rows", rows, {slices, kSliceRows}, ScalarType::Byte, kSparseDevice);
    check_shape("counts", counts, {slices}, ScalarType::Short, kSparseDevice);
    check_shape("values", values, {steps * kSliceRows * group}, dtype, kSparseDevice);
    check_shape("columns", columns, {steps * kSliceRows * group}, ScalarType::Byte, kSparseDevice);
    const char* value = static_cast<const char*>(values.const_data_ptr());
    const int64_t size = dtype == ScalarType::Float ? 4 : dtype == ScalarType::BFloat16 ? 2 : 1;
    const uint8_t* column = static_cast<const uint8_t*>(columns.const_data_ptr());
    const uint8_t* row = static_cast<const uint8_t*>(rows.const_data_ptr());
    const int16_t* count = static_cast<const int16_t*>(counts.const_data_ptr());
    PINS_CHECK(start[0] == 0 && start[1] == 0, "starts must begin with 0, 0");
    blocks_list_.reserve(n);
    for (int64_t i = 0; i < n; ++i, start += 2) {
      PINS_CHECK(start[0] <= start[2] && start[2] <= slices, "starts[", i + 1, "] is no slice");
      int64_t sum = 0;
      for (int64_t s = start[0]; s < start[2]; ++s) {
        PINS_CHECK(count[s] >= 0, "counts[", s, "] is negative");
        sum += count[s];
      }
      PINS_CHECK(start[1] + sum == start[3], "counts contradict starts[", i + 1, "]");
      const int64_t at = start[1] * kSliceRows * group;
      blocks_list_.push_back(
          {value + at * size, column + at, row + start[0] * kSliceRows, count + start[0], start[2] - start[0]});
    }
  }

  int64_t chunks() const { return chunks_; }
  // Chunks that are worth another thread where it should have so many products to compute.
  int64_t chunks_with(int64_t products, int64_t tokens) const {
    const int64_t each = std::max<int64_t>(stored_ * tokens / std::max<int64_t>(chunks_, 1), 1);
    return (products + each - 1) / each;
  }
  int64_t blocks() const { return blocks_; }
  int64_t first_row(int64_t chunk) const { return chunk * chunk_rows_; }
  int64_t rows(int64_t chunk) const {
    const int64_t left = out_features_ - first_row(chunk);
    return left < 0 ? 0 : left < chunk_rows_ ? left : chunk_rows_;
  }
  const SparseBlock& block(int64_t chunk, int64_t k) const { return blocks_list_[chunk * blocks_ + k]; }

 private:
  int64_t chunks_, chunk_rows_, blocks_, out_features_, stored_ = 0;
  std::vector<SparseBlock> blocks_list_;
};

// Memory aligned to a cache line, as the loops ask for.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(floats + 16) {}
  float* data() { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63}); }

 private:
  struct Uninitialised {
    explicit Uninitialised(int64_t n) : data(static_cast<float*>(::operator new(n * sizeof(float)))) {}
    ~Uninitialised() { ::operator delete(data); }
    Uninitialised(const Uninitialised&) = delete;
    Uninitialised& operator=(const Uninitialised&) = delete;
    float* get() const { return data; }
    float* data;
  };
  Uninitialised memory_;
};

}  // namespace pins_ext::cpu
