// The tensors of a list argument.
//
// torch::stable turns a list into a std::vector of its Tensor, and with thousands of small tensors that took longer
// than the kernels: a shared_ptr for each, a call for every question, and Python's lock for every last reference.
// Crossing from Python still takes as long as they do: lists that many calls have in common are kept here, see
// keep_list in ops.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace pins_ext {

// Whether an operator writes a list: a lazy copy that is read stays one.
enum class Use { read, write };

// One tensor of a list. What every operator asks is asked once, the rest when it is wanted.
class ListedTensor {
 public:
  using ScalarType = torch::headeronly::ScalarType;
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  ListedTensor() = default;
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

  // To be written: of a lazy copy, its own. Not for several threads at once: both addresses are kept, without a lock.
  void* data_ptr() const {
    if (!data_) TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data_));
    return data_;
  }
  const void* const_data_ptr() const {
    if (data_) return data_;
    if (!read_) TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &read_));
    return read_;
  }

  // Now, so that it is known later; without an answer it is asked again then.
  void ask_for_memory(Use use) const {
    use == Use::write ? torch_get_mutable_data_ptr(handle_, &data_) : torch_get_const_data_ptr(handle_, &read_);
  }

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

  AtenTensorHandle handle_ = nullptr;
  mutable void* data_ = nullptr;
  mutable const void* read_ = nullptr;
  int64_t numel_ = 0;
  int32_t code_ = 0, device_code_ = 0;  // libtorch's numbers
  ScalarType dtype_ = ScalarType::Undefined;
  torch::stable::Device device_{torch::headeronly::DeviceType::CPU};
  bool is_contiguous_ = false;
};

// The handles of a list, which it owns.
class Handles {
 public:
  Handles() = default;
  // Takes the handles over; the list itself stays the caller's.
  explicit Handles(StableListHandle list);
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  // Takes Python's lock once: the last reference from C++ gives its Python object up under it.
  ~Handles();

  int64_t size() const { return static_cast<int64_t>(handles_.size()); }
  AtenTensorHandle operator[](int64_t i) const { return handles_[i]; }
  // Has what describes some of them come from memory.
  void fetch(int64_t begin, int64_t end) const;

 private:
  std::vector<AtenTensorHandle> handles_;
};

// A whole list, or the one that keep_list has kept behind its only tensor.
class Tensors {
 public:
  Tensors() = default;
  explicit Tensors(StableListHandle list, Use use = Use::read);
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  Tensors(Tensors&&) = default;
  Tensors& operator=(Tensors&&) = delete;

  const std::shared_ptr<const Handles>& handles() const { return handles_; }

  size_t size() const { return tensors_.size(); }
  bool empty() const { return tensors_.empty(); }
  const ListedTensor& operator[](size_t i) const { return tensors_[i]; }
  const ListedTensor* begin() const { return tensors_.data(); }
  const ListedTensor* end() const { return tensors_.data() + tensors_.size(); }

 private:
  void ask(int64_t begin, int64_t end);

  std::shared_ptr<const Handles> handles_;
  std::vector<ListedTensor> tensors_;
};

// A list that an operator writes, of memory that is its own.
struct Written : Tensors {
  explicit Written(StableListHandle list) : Tensors(list, Use::write) {}
};

}  // namespace pins_ext

// How TORCH_BOX makes the argument of an operator.
namespace torch::stable::detail {

template <class T>
struct ListImpl {
  static T call(StableIValue value, uint64_t /*version*/, bool /*is_internal*/) {
    struct List {
      StableListHandle handle;
      ~List() { torch_delete_list(handle); }
    } const list{to<StableListHandle>(value)};
    return T(list.handle);
  }
};

template <>
struct ToImpl<pins_ext::Tensors> : ListImpl<pins_ext::Tensors> {};
template <>
struct ToImpl<pins_ext::Written> : ListImpl<pins_ext::Written> {};

}  // namespace torch::stable::detail
