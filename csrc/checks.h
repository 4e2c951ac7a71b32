// Checks of the list operators, for CPU and CUDA. They name the argument: "params[3] must be contiguous, got strides
// (1, 64)". They read metadata alone; what the tables hold is checked by csrc/cpu/work.h, on the CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "criteria.h"
#include "tensors.h"

namespace pins_ext {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Device = torch::stable::Device;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Raises RuntimeError with the parts of the message joined, unless `ok`. A macro: a passing check builds no strings.
#define PINS_CHECK(ok, ...)                            \
  do {                                                 \
    if (__builtin_expect(!(ok), 0)) fail(__VA_ARGS__); \
  } while (0)

inline std::string item(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

template <class Range>
std::string joined(const Range& values) {
  std::ostringstream text;
  const char* separator = "(";
  for (int64_t value : values) {
    text << separator << value;
    separator = ", ";
  }
  text << (values.size() == 0 ? "()" : values.size() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string device_name(const Device& device) {
  if (device.type() == DeviceType::CPU) return "the CPU";
  if (device.type() == DeviceType::CUDA) return "cuda:" + std::to_string(device.index());
  return "device type " + std::to_string(static_cast<int>(device.type()));
}

using Dtypes = std::initializer_list<ScalarType>;
constexpr Dtypes kParamDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
// 8-bit storage, criterion.inl: Byte where nothing is negative, Char with a sign.
constexpr Dtypes kStateDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Byte};
constexpr Dtypes kFirstMomentDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Char};
constexpr Dtypes kReadableDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Byte};
constexpr Dtypes kReadableFirstDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char};

constexpr int64_t kBins = 65536;  // of a counting pass; pins_ext/ops/bracket.py BINS

inline bool is_coded(ScalarType dtype) { return dtype == ScalarType::Byte || dtype == ScalarType::Char; }

inline bool is_one_of(ScalarType dtype, Dtypes allowed) {
  for (ScalarType one : allowed) {
    if (dtype == one) return true;
  }
  return false;
}

inline std::string dtype_names(Dtypes allowed) {
  std::string names;
  for (ScalarType one : allowed) names += std::string(names.empty() ? "" : " or ") + dtype_name(one);
  return names;
}

// A contiguous tensor on the device of the tables; sparse ones have a dispatch key of their own and never get here.
// `name` is a callable, so that a passing check builds no string.
template <class Name, class AnyTensor>
void check_tensor(const Name& name, const AnyTensor& tensor, const Device& device, Dtypes allowed) {
  PINS_CHECK(tensor.device() == device, name(), " must be on ", device_name(device), " like places, got ",
             device_name(tensor.device()));
  ScalarType dtype = tensor.scalar_type();
  PINS_CHECK(is_one_of(dtype, allowed), name(), " must be ", dtype_names(allowed), ", got ", dtype_name(dtype));
  PINS_CHECK(tensor.is_contiguous(), name(), " must be contiguous, got strides ", joined(tensor.strides()));
}

// A list argument under its name; empty where it is not wanted.
struct List {
  const char* name;
  const Tensors& tensors;

  bool given() const { return !tensors.empty(); }
};

// A list of n tensors of one dtype.
inline void check_list(const char* list, const Tensors& tensors, size_t n, const Device& device, Dtypes allowed) {
  PINS_CHECK(tensors.size() == n, list, " must have ", n, " tensors, one per row of places, got ", tensors.size());
  for (size_t i = 0; i < n; ++i) {
    check_tensor([&] { return item(list, i); }, tensors[i], device, allowed);
    PINS_CHECK(tensors[i].scalar_type() == tensors[0].scalar_type(), item(list, i), " is ",
               dtype_name(tensors[i].scalar_type()), " but ", item(list, 0), " is ",
               dtype_name(tensors[0].scalar_type()));
  }
}

// The same, or an empty list where this operand is not wanted. Returns whether it is there.
inline bool check_optional_list(const char* list, const Tensors& tensors, size_t n, const Device& device,
                                Dtypes allowed) {
  if (tensors.empty()) return false;
  check_list(list, tensors, n, device, allowed);
  return true;
}

// Both moments of AdamW: alike, or each in the 8-bit storage that is its own.
inline void check_moments(const Tensors& first, const Tensors& second) {
  if (first.empty() || second.empty()) return;
  const ScalarType one = first[0].scalar_type(), other = second[0].scalar_type();
  PINS_CHECK(one == other || (one == ScalarType::Char && other == ScalarType::Byte),
             "exp_avg_sq must have the dtype of exp_avg (", dtype_name(one),
             one == ScalarType::Char ? " needs uint8" : "", "), got ", dtype_name(other));
}

inline void check_same_dtype(const char* list, const Tensors& tensors, const char* like_list, const Tensors& like) {
  if (tensors.empty() || like.empty()) return;
  PINS_CHECK(tensors[0].scalar_type() == like[0].scalar_type(), list, " must have the dtype of ", like_list, " (",
             dtype_name(like[0].scalar_type()), "), got ", dtype_name(tensors[0].scalar_type()));
}

inline std::vector<int64_t> numels_of(const Tensors& tensors) {
  std::vector<int64_t> numel;
  numel.reserve(tensors.size());
  for (const ListedTensor& tensor : tensors) numel.push_back(tensor.numel());
  return numel;
}

// 8-bit storage of this many weights: [.., groups of a row, 34], where rows are equally long, see layout.inl kGroup.
template <class Name>
void check_coded(const Name& name, const ListedTensor& tensor, int64_t weights) {
  const auto sizes = tensor.sizes();
  bool fits = sizes.size() >= 2 && sizes[sizes.size() - 1] == 34;
  if (fits && weights > 0) {
    const int64_t groups = sizes[sizes.size() - 2], rows = groups > 0 ? tensor.numel() / 34 / groups : 0;
    fits = rows > 0 && weights % rows == 0 && (weights / rows + 31) / 32 == groups;
  }
  PINS_CHECK(fits, name(), " must be [.., groups of a row, 34] for ", weights, " weights in 8 bits, got ",
             joined(sizes));
}

// `numel[i]` weights in tensor i.
inline void check_numel(const char* list, const Tensors& tensors, const std::vector<int64_t>& numel) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (is_coded(tensors[i].scalar_type())) {
      check_coded([&] { return item(list, i); }, tensors[i], numel[i]);
      continue;
    }
    PINS_CHECK(tensors[i].numel() == numel[i], item(list, i), " must have ", numel[i], " elements, got ",
               tensors[i].numel());
  }
}

// Packed masks: one bit per weight, whole 64-bit words.
inline void check_masks(const Tensors& masks, const std::vector<int64_t>& numel) {
  for (size_t i = 0; i < masks.size(); ++i) {
    int64_t bytes = (numel[i] + 63) / 64 * 8;
    PINS_CHECK(masks[i].numel() == bytes, item("masks", i), " must have ", bytes, " bytes for ", numel[i],
               " weights, got ", masks[i].numel());
  }
}

// A tensor of known shape, or nothing.
inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType dtype,
                        const Device& device) {
  check_tensor([&] { return name; }, tensor, device, {dtype});
  auto sizes = tensor.sizes();
  bool same = static_cast<size_t>(tensor.dim()) == shape.size();
  for (size_t d = 0; same && d < shape.size(); ++d) same = sizes[d] == shape.begin()[d];
  PINS_CHECK(same, name, " must have shape ", joined(shape), ", got ", joined(sizes));
}

// A scalar: one element, whatever its number of dimensions.
inline void check_scalar(const char* name, const OptionalTensor& tensor, ScalarType dtype, const Device& device) {
  if (!tensor.has_value()) return;
  check_tensor([&] { return name; }, *tensor, device, {dtype});
  PINS_CHECK(tensor->numel() == 1, name, " must have one element, got ", tensor->numel());
}

// The shapes of the two tables that every list operator takes. Returns the number of tensors.
inline int64_t check_tables(const Tensor& places, const Tensor& chunks, const Device& device) {
  const int64_t n = places.dim() > 0 ? places.size(0) : 0;
  check_shape("places", places, {n, 14}, ScalarType::Long, device);
  const int64_t m = chunks.dim() > 0 ? chunks.size(0) : 0;
  check_shape("chunks", chunks, {m, 2}, ScalarType::Long, device);
  PINS_CHECK(n > 0 || m == 0, "chunks must have no rows where places has none, got ", m);
  return n;
}

inline const Tensor* if_given(const OptionalTensor& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

// Of a checked tensor: whether autograd records the operations that made it.
template <class AnyTensor>
bool is_recorded(const AnyTensor& tensor) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  std::array<StableIValue, 1> stack{torch::stable::detail::from(handle)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return !torch::stable::detail::to<bool>(stack[0]);
}

// Tables and scalars that a kernel reads while it writes: what it writes shares no memory with them.
class Inputs {
 public:
  Inputs(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
    for (const auto& [name, tensor] : tensors) add(name, tensor);
  }

  // Null: nothing.
  void add(const char* name, const Tensor* tensor) {
    if (tensor && tensor->numel() > 0) extents_.push_back({name, begin_of(*tensor), end_of(*tensor)});
  }

  // A checked output. Autograd would not see that it changes: its gradient would be wrong without a word.
  template <class Name, class AnyTensor>
  void check_output(const Name& name, const AnyTensor& output) const {
    PINS_CHECK(
        !grad_mode_ || !is_recorded(output), name(),
        " is the result of operations that autograd records: call this operator under torch.no_grad(), or on the "
        "leaf tensors");
    if (output.numel() == 0) return;
    const char *begin = begin_of(output), *end = end_of(output);
    for (const Extent& input : extents_) {
      PINS_CHECK(end <= input.begin || input.end <= begin, name(), " is written and shares memory with ", input.name);
    }
  }

  void check_outputs(std::initializer_list<List> lists) const {
    for (const List& list : lists) {
      for (size_t i = 0; i < list.tensors.size(); ++i)
        check_output([&] { return item(list.name, i); }, list.tensors[i]);
    }
  }

 private:
  struct Extent {
    const char *name, *begin, *end;
  };

  template <class AnyTensor>
  static const char* begin_of(const AnyTensor& tensor) {
    return static_cast<const char*>(tensor.const_data_ptr());
  }
  template <class AnyTensor>
  static const char* end_of(const AnyTensor& tensor) {
    return begin_of(tensor) + tensor.numel() * static_cast<int64_t>(tensor.element_size());
  }

  std::vector<Extent> extents_;
  bool grad_mode_ = aoti_torch_grad_mode_is_enabled();
};

// The position of `value` among the names of an option; their order is that of the enum.
template <size_t count>
int option(const char* name, const std::string& value, const char* const (&names)[count]) {
  std::string all;
  for (size_t i = 0; i < count; ++i) {
    if (value == names[i]) return static_cast<int>(i);
    all += std::string(all.empty() ? "" : ", ") + names[i];
  }
  fail(name, " must be one of ", all, "; got '", value, "'");
}

#define PINS_NAME(id, name, formula) name,
constexpr const char* kCriteria[] = {PINS_CRITERIA(PINS_NAME)};
constexpr const char* kScores[] = {PINS_SCORES(PINS_NAME)};
#undef PINS_NAME

}  // namespace pins_ext
