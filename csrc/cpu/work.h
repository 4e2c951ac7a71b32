// The work of a list operator on the CPU: checked tables, operands by chunk, and the parallel loop over chunks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "kernels.h"

namespace pins_ext::cpu {

#include "../criterion.inl"
#include "../layout.inl"

inline const Device kCpu(DeviceType::CPU);

struct Work {
  const Place* places;  // [n]
  const Chunk* chunks;  // [m]
  int64_t size;         // m
  std::vector<int64_t> numel;

  size_t tensors() const { return numel.size(); }

  Run run(const Chunk& chunk) const {
    int64_t left = numel[chunk.tensor] - chunk.offset;
    return {&places[chunk.tensor].base, chunk.offset, left < kChunk ? left : kChunk};
  }

  // Of 8-bit storage that is written: the groups that begin in the chunk.
  Run whole_groups(const Chunk& chunk) const {
    Run run = this->run(chunk);
    const int64_t end = run.offset + run.count;
    run.columns = places[chunk.tensor].columns;
    run.offset = next_group(run.columns, run.offset);
    run.count = next_group(run.columns, end) - run.offset;
    return run;
  }
};

// The global index past a full tensor's last weight; refuses a row that lies outside its full tensor or overflows.
inline int64_t check_place(const Place& place, size_t i) {
  int64_t numel = 1, end = 0;
  bool fits = place.base >= 0;
  for (int d = 0; d < 4; ++d) {
    PINS_CHECK(0 <= place.local[d] && place.local[d] <= place.full[d] && 0 <= place.start[d] &&
                   place.start[d] <= place.full[d] - place.local[d],
               item("places", i), " puts ", place.local[d], " at ", place.start[d], " of ", place.full[d],
               " in dimension ", d);
    fits = fits && !__builtin_mul_overflow(numel, place.full[d], &numel);
  }
  fits = fits && !__builtin_add_overflow(place.base, numel, &end);
  PINS_CHECK(fits, item("places", i), " has sizes ", joined(std::vector<int64_t>(place.full, place.full + 4)),
             " from global index ", place.base, " on, which does not fit 63 bits");
  return end;
}

// Both tables with what they hold. No kernel can leave a tensor that has the size its row says, none leaves a weight
// out.
inline Work check_work(const Tensor& places, const Tensor& chunks) {
  const int64_t n = check_tables(places, chunks, kCpu), m = chunks.size(0);
  Work work{
      static_cast<const Place*>(places.const_data_ptr()), static_cast<const Chunk*>(chunks.const_data_ptr()), m, {}};
  work.numel.reserve(n);
  int64_t chunk = 0, end = 0;
  for (int64_t i = 0; i < n; ++i) {
    PINS_CHECK(work.places[i].base >= end, item("places", i), " starts at global index ", work.places[i].base,
               ", inside or before ", item("places", i - 1), ", which ends at ", end);
    end = check_place(work.places[i], i);
    work.numel.push_back(numel_of(work.places[i]));
    for (int64_t offset = 0; offset < work.numel[i]; offset += kChunk, ++chunk) {
      PINS_CHECK(chunk < m, "chunks must go on with (", i, ", ", offset, "), but have only ", m, " rows");
      const Chunk& row = work.chunks[chunk];
      PINS_CHECK(row.tensor == i && row.offset == offset, item("chunks", chunk), " must be (", i, ", ", offset,
                 "), the next chunk of these tensors, got (", row.tensor, ", ", row.offset, ")");
    }
  }
  PINS_CHECK(chunk == m, "chunks must end after ", chunk, " rows, got ", m);
  return work;
}

// Kernels tell by their operands which of them they write; operators, by asking for those as Written.
template <class T>
T* address_of(const ListedTensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

// One operand of the list: addresses by tensor. An empty list gives empty spans.
class Operand {
 public:
  Operand(const Work& work, const Tensors& tensors) : places_(work.places) {
    if (tensors.empty()) return;
    ScalarType dtype = tensors[0].scalar_type();
    dtype_ = dtype == ScalarType::BFloat16 ? Dtype::bfloat16
             : dtype == ScalarType::Half   ? Dtype::float16
             : dtype == ScalarType::Byte   ? Dtype::code8
             : dtype == ScalarType::Char   ? Dtype::signed8
                                           : Dtype::float32;
    data_.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      data_.push_back(address_of<char>(tensors[i]));
      if (coded()) check_rows(tensors[i], i);
    }
  }

  bool coded() const { return dtype_ == Dtype::code8 || dtype_ == Dtype::signed8; }

  Span at(int64_t tensor, int64_t offset) const {
    if (data_.empty()) return {};
    if (coded()) {
      const int64_t columns = places_[tensor].columns, column = offset % columns;
      const int64_t group = offset / columns * groups_of(columns) + column / kGroup;
      return {data_[tensor] + group * kGroupBytes, dtype_, columns, column};
    }
    return {data_[tensor] + offset * (dtype_ == Dtype::float32 ? 4 : 2), dtype_};
  }
  Span at(const Chunk& chunk) const { return at(chunk.tensor, chunk.offset); }

 private:
  // Of a checked list: its rows are those of the table.
  void check_rows(const ListedTensor& tensor, size_t i) const {
    const int64_t weights = numel_of(places_[i]), columns = places_[i].columns;
    const bool fits = weights == 0 || (columns > 0 && weights % columns == 0 && tensor.size(-2) == groups_of(columns));
    PINS_CHECK(fits, item("places", i), " has rows of ", columns, " weights, other ones than its 8-bit storage of ",
               joined(tensor.sizes()));
  }

  const Place* places_;
  std::vector<char*> data_;
  Dtype dtype_ = Dtype::float32;
};

// Packed masks by chunk; chunks are whole bytes. An empty list gives null.
class Masks {
 public:
  explicit Masks(const Tensors& tensors) {
    data_.reserve(tensors.size());
    for (const ListedTensor& tensor : tensors) data_.push_back(address_of<uint8_t>(tensor));
  }

  uint8_t* at(const Chunk& chunk) const { return data_.empty() ? nullptr : data_[chunk.tensor] + chunk.offset / 8; }
  uint8_t* of(int64_t tensor) const { return data_.empty() ? nullptr : data_[tensor]; }

 private:
  std::vector<uint8_t*> data_;
};

// f(chunk, its number) for every chunk, on all threads.
template <class F>
void for_each_chunk(const Work& work, const F& f) {
  torch::stable::parallel_for(0, work.size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(work.chunks[i], i);
  });
}

inline float value_of(const OptionalTensor& scalar, float otherwise) {
  return scalar.has_value() ? *static_cast<const float*>(scalar->const_data_ptr()) : otherwise;
}

inline float value_of(const Tensor& scalar) { return *static_cast<const float*>(scalar.const_data_ptr()); }

inline const int64_t* longs_of(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

// Of a checked `rng`.
inline Rounding rounding_of(const Tensor& rng) {
  return {static_cast<uint32_t>(longs_of(rng)[0]), static_cast<uint32_t>(longs_of(rng)[1])};
}

inline Gradient gradient_of(const OptionalTensor& grad_scale, const OptionalTensor& clip) {
  return {value_of(grad_scale, 1.0f), value_of(clip, 1.0f)};
}

inline bool is_set(const OptionalTensor& flag) { return value_of(flag, 0.0f) != 0.0f; }

}  // namespace pins_ext::cpu
