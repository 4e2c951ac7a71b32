// The tensors of a list argument.
//
// torch::stable turns a list into a std::vector of its Tensor, and with thousands of small tensors that took longer
// than the kernels: a shared_ptr for each, a call for every question, and Python's lock for every last reference.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace pins_ext {

// One tensor of a list. What every operator asks is asked once, the rest when it is wanted.
class ListedTensor {
 public:
  using ScalarType = torch::headeronly::ScalarType;
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  // Borrows the handle. `before`: of the same list, which often has the same dtype.
  ListedTensor(AtenTensorHandle handle, const ListedTensor* before) : handle_(handle) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &code_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &numel_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &is_contiguous_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_code_));
    int32_t index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
    const bool same = before && before->code_ == code_ && before->device_code_ == device_code_;
    dtype_ = same ? before->dtype_ : converted<ScalarType>(code_);
    device_ = {same ? before->device_.type() : converted<torch::headeronly::DeviceType>(device_code_), index};
  }

  AtenTensorHandle get() const { return handle_; }
  ScalarType scalar_type() const { return dtype_; }
  const torch::stable::Device& device() const { return device_; }
  int64_t numel() const { return numel_; }
  bool is_contiguous() const { return is_contiguous_; }
  size_t element_size() const { return aoti_torch_dtype_element_size(code_); }

  // Not for several threads at once: it is kept, without a lock.
  void* data_ptr() const {
    if (!data_) TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data_));
    return data_;
  }
  const void* const_data_ptr() const { return data_ptr(); }

  int64_t dim() const {
    int64_t dim = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim));
    return dim;
  }
  Sizes sizes() const {
    int64_t* sizes = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes));
    return {sizes, static_cast<size_t>(dim())};
  }
  Sizes strides() const {
    int64_t* strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
    return {strides, static_cast<size_t>(dim())};
  }
  int64_t size(int64_t d) const {
    int64_t size = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(handle_, d, &size));
    return size;
  }

 private:
  template <class T>
  static T converted(int32_t code) {
    return torch::stable::detail::to<T>(torch::stable::detail::from(code));
  }

  AtenTensorHandle handle_;
  mutable void* data_ = nullptr;
  int64_t numel_ = 0;
  int32_t code_ = 0, device_code_ = 0;  // libtorch's numbers
  ScalarType dtype_ = ScalarType::Undefined;
  torch::stable::Device device_{torch::headeronly::DeviceType::CPU};
  bool is_contiguous_ = false;
};

// Deletes them with Python's lock taken once: the last reference from C++ gives its Python object up under it.
void delete_handles(const std::vector<AtenTensorHandle>& handles);

// A whole list; it owns the handles.
class Tensors {
 public:
  Tensors() = default;
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  Tensors(Tensors&& other) noexcept : handles_(std::move(other.handles_)), tensors_(std::move(other.tensors_)) {
    other.handles_.clear();
    other.tensors_.clear();
  }
  Tensors& operator=(Tensors&&) = delete;
  ~Tensors() { delete_handles(handles_); }

  // Takes the handles over; the list itself stays the caller's.
  explicit Tensors(StableListHandle list) : Tensors() {
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.reserve(size);
    tensors_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
    }
    for (AtenTensorHandle handle : handles_) {
      tensors_.emplace_back(handle, tensors_.empty() ? nullptr : &tensors_.back());
    }
  }

  size_t size() const { return tensors_.size(); }
  bool empty() const { return tensors_.empty(); }
  const ListedTensor& operator[](size_t i) const { return tensors_[i]; }
  const ListedTensor* begin() const { return tensors_.data(); }
  const ListedTensor* end() const { return tensors_.data() + tensors_.size(); }

 private:
  std::vector<AtenTensorHandle> handles_;
  std::vector<ListedTensor> tensors_;
};

}  // namespace pins_ext

// How TORCH_BOX makes the argument of an operator.
namespace torch::stable::detail {

template <>
struct ToImpl<pins_ext::Tensors> {
  static pins_ext::Tensors call(StableIValue value, uint64_t /*version*/, bool /*is_internal*/) {
    struct List {
      StableListHandle handle;
      ~List() { torch_delete_list(handle); }
    } const list{to<StableListHandle>(value)};
    return pins_ext::Tensors(list.handle);
  }
};

}  // namespace torch::stable::detail
