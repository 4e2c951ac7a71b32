// Lists of tensors: taken from Python, or kept by keep_list for many calls.
#include "tensors.h"

#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "checks.h"

namespace pins_ext {

constexpr int64_t kStep = 64;  // tensors

Handles::Handles(StableListHandle list) : Handles() {
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  handles_.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
  }
}

// A handle points to an at::Tensor, which holds nothing but the address of what describes the tensor. Here that is a
// hint alone: should it be something else one day, nothing comes early.
void Handles::fetch(int64_t begin, int64_t end) const {
  for (int64_t i = begin; i < end; ++i) {
    const char* description = nullptr;
    std::memcpy(&description, handles_[i], sizeof(description));
    for (int line = 0; line < 3; ++line) __builtin_prefetch(description + 64 * line);
  }
}

Handles::~Handles() {
  if (handles_.empty()) return;
  if (!Py_IsInitialized()) {  // no lock is left to take
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
    return;
  }
  const PyGILState_STATE state = PyGILState_Ensure();
  for (int64_t begin = 0, end; begin < size(); begin = end) {
    end = std::min(begin + kStep, size());
    fetch(begin, end);
    for (int64_t i = begin; i < end; ++i) aoti_torch_delete_tensor_object(handles_[i]);
  }
  PyGILState_Release(state);
}

namespace {

struct Kept {
  std::shared_ptr<const Handles> list;
  Tensor stands_for_it;
};

// By the address of what stands for a list. That lives as long as it is kept: no other tensor has the address.
class KeptLists {
 public:
  void add(Kept kept) {
    const void* key = kept.stands_for_it.const_data_ptr();
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.emplace(key, std::move(kept));
  }

  // Null where the list is one like any other.
  std::shared_ptr<const Handles> behind(const Handles& list) {
    if (list.size() != 1) return nullptr;
    const ListedTensor only(list[0], nullptr);
    if (only.scalar_type() != ScalarType::Long || only.device().type() != DeviceType::CPU) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.find(only.const_data_ptr());
    return found == kept_.end() ? nullptr : found->second.list;
  }

  void forget(const void* key) {
    Kept last;  // given up without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.find(key);
    if (found == kept_.end()) return;
    last = std::move(found->second);
    kept_.erase(found);
  }

  // Never destroyed: when the process ends Python may be gone.
  static KeptLists& all() {
    static KeptLists& lists = *new KeptLists;
    return lists;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, Kept> kept_;
};

// An empty list has no device, and gets no further than the dispatcher.
Tensor keep_list(const Tensors& tensors) {
  AtenTensorHandle first = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensors[0].get(), &first));
  const Tensor kept = torch::stable::new_zeros(Tensor(first), {1}, ScalarType::Long);
  KeptLists::all().add({tensors.handles(), kept});
  return kept;
}

void forget_list(const Tensor& kept) { KeptLists::all().forget(kept.const_data_ptr()); }

}  // namespace

Tensors::Tensors(StableListHandle list, Use use) : handles_(std::make_shared<const Handles>(list)) {
  const auto kept = KeptLists::all().behind(*handles_);
  if (kept) handles_ = kept;
  tensors_.resize(handles_->size());
  // Descriptions lie all over memory, which takes longer to come than an answer: in steps that the L1 cache holds, one
  // question to each tensor at a time. While one waits the CPU goes on with the next.
  const auto ask_in_steps = [&](int64_t begin, int64_t end) {
    for (int64_t last; begin < end; begin = last) {
      last = std::min(begin + kStep, end);
      handles_->fetch(begin, last);
      int64_t bytes = 0;
      for (int64_t i = begin; i < last; ++i) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size((*handles_)[i], &bytes));
      }
      ask(begin, last);
      for (int64_t i = begin; i < last; ++i) tensors_[i].ask_for_memory(use);
    }
  };
  if (kept) {
    torch::stable::parallel_for(0, handles_->size(), 4 * kStep, ask_in_steps);
  } else {
    ask_in_steps(0, handles_->size());
  }
  if (use == Use::read) return;
  // Lazy copies are refused on several threads, and made here.
  for (const ListedTensor& tensor : tensors_) tensor.data_ptr();
}

void Tensors::ask(int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    tensors_[i] = ListedTensor((*handles_)[i], i > begin ? &tensors_[i - 1] : nullptr);
  }
}

}  // namespace pins_ext

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("keep_list", TORCH_BOX(&pins_ext::keep_list));
  m.impl("forget_list", TORCH_BOX(&pins_ext::forget_list));
}
