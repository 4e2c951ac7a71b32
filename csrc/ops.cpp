// Every schema of pins_ext, once. CPU kernels register in csrc/cpu, CUDA kernels in csrc/cuda, Triton kernels and the
// fake (meta) versions from pins_ext/ops.
//
// Common arguments of a list operator over n tensors:
//   places    int64 [n, 14]  per tensor: global base, full sizes [4], local sizes [4], start per dimension [4],
//                            weights of a row of the local tensor; in ascending order of the base, without overlaps
//   chunks    int64 [m, 2]   work list in order: (tensor, local offset) of every kChunk weights, less at a tensor's end
//   rng       int64 [2]      keys of the stochastic rounding (reference.rounding_key); unused by float32 states
//   factors   float32 [n]    of the score fisher, 1 / (1 - beta2^t) of each tensor
//   accepted  float32 [1]    gradients accepted in this window before this step
//   pointers  int64 [k, n]   CUDA only: the addresses of the k lists in argument order, of boundary_*_ grads and masks
//                            behind shadow, the averages last; uploaded by the op if absent
// All of them live on the tensors' device. A list that is not wanted is empty. What tables hold is checked on the CPU
// alone: reading it on a GPU would wait for the device.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "cpu/kernels.h"
#include "tensors.h"

STABLE_TORCH_LIBRARY(pins_ext, m) {
  m.def(
      "accumulate_(Tensor(a!)[] ipt, Tensor[] params, Tensor[] grads, Tensor places, Tensor chunks, Tensor lr, "
      "Tensor accepted, Tensor rng, str criterion, *, Tensor? grad_scale=None, Tensor? clip=None, "
      "Tensor? found_inf=None, Tensor? pointers=None) -> ()");
  m.def(
      "fold_(Tensor(a!)[] exp_avg_ipt, Tensor(b!)[] exp_avg_unc, Tensor[] ipt, Tensor places, Tensor chunks, "
      "Tensor accepted, Tensor rng, float beta1, float beta2, *, Tensor? bracket=None, Tensor(c!)? counts=None, "
      "Tensor? pointers=None) -> ()");
  // fold_ of |lr v̂ - p m̂|; factors float32 [n, 3]: lr, 1 / (1 - beta1^t), 1 / (1 - beta2^t).
  m.def(
      "fold_moments_(Tensor(a!)[] exp_avg_ipt, Tensor(b!)[] exp_avg_unc, Tensor[] params, Tensor[] exp_avg, "
      "Tensor[] exp_avg_sq, Tensor places, Tensor chunks, Tensor factors, Tensor accepted, Tensor rng, float beta1, "
      "float beta2, *, Tensor? bracket=None, Tensor(c!)? counts=None, Tensor? pointers=None) -> ()");
  m.def(
      "sample(Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, str score, int size, *, Tensor? factors=None, Tensor? pointers=None) "
      "-> Tensor");
  m.def(
      "count_(Tensor(a!) counts, Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, str score, Tensor bracket, *, "
      "Tensor? factors=None, Tensor? pointers=None) -> ()");
  // count_ in regions of tensors: regions int64 [n], the row of each tensor in brackets int64 [r, 5], (lowest, highest,
  // width of a bin as a shift, key, stage), and in counts int64 [r, 1 + bins]. Stage 0 counts order keys; stage 1,
  // among the weights of that key, global indices; of stage 2 and above nothing.
  m.def(
      "count_regions_(Tensor(a!) counts, Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, str score, "
      "Tensor regions, Tensor brackets, *, Tensor? factors=None, Tensor? pointers=None) -> ()");
  m.def(
      "collect_(Tensor(a!) found, Tensor(b!) candidates, Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, "
      "str score, Tensor bracket, *, Tensor? factors=None, Tensor? pointers=None) -> ()");
  m.def(
      "tie_index(Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, str score, Tensor bracket, *, "
      "Tensor? factors=None, Tensor? pointers=None) -> Tensor");
  // The steps of a selection between its passes: pins_ext/ops/bracket.py.
  m.def("bracket_of(Tensor keys, Tensor position, int total) -> Tensor");
  m.def("narrow(Tensor bracket, Tensor counts, Tensor position) -> Tensor");
  m.def("settle(Tensor bracket, Tensor candidates, Tensor found) -> (Tensor, Tensor)");
  // collect_ and settle of a wider bracket in one pass; on the CPU alone.
  m.def(
      "settle_around(Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, str score, Tensor bracket, "
      "Tensor position, *, Tensor? factors=None) -> (Tensor, Tensor)");
  m.def("cutoff(Tensor bracket, Tensor tie, Tensor n_prune, int total, bool exact) -> Tensor");
  m.def(
      "select(Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, str score, Tensor n_prune, bool exact=True, *, "
      "Tensor? factors=None, Tensor? bracket=None, Tensor? counts=None, Tensor? pointers=None, int? total=None) -> "
      "Tensor");
  // N:M: the scores of what can be pruned, float32; the N best of a group are NaN, beyond every cutoff. groups int64
  // [n, 3]: N, M, and how far apart the weights of a group lie. nans int64 [n]: scores that were NaN.
  m.def(
      "eligible_(Tensor(a!)[] scores, Tensor(b!) nans, Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, "
      "str score, Tensor groups, *, Tensor? factors=None, Tensor? pointers=None) -> ()");
  m.def(
      "pack_(Tensor(a!)[] masks, Tensor(b!) stats, Tensor[] a, Tensor[] b, Tensor places, Tensor chunks, str score, "
      "Tensor threshold, *, Tensor? factors=None, Tensor? pointers=None) -> ()");
  // select and pack_ in one pass where a bracket has few weights; on the CPU alone.
  m.def(
      "pack_around_(Tensor(a!)[] masks, Tensor(b!) stats, Tensor(c!) threshold, Tensor[] a, Tensor[] b, "
      "Tensor places, Tensor chunks, str score, Tensor bracket, *, Tensor? factors=None) -> ()");
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] ipt, "
      "Tensor(e!)[] shadow, Tensor[] grads, Tensor[] masks, Tensor places, Tensor chunks, Tensor hyper, "
      "Tensor accepted, Tensor rng, str criterion, bool clear_state=False, *, Tensor? grad_scale=None, "
      "Tensor? clip=None, Tensor? found_inf=None, Tensor? pointers=None) -> ()");
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffer, Tensor(c!)[] ipt, Tensor(d!)[] shadow, "
      "Tensor[] grads, Tensor[] masks, Tensor places, Tensor chunks, Tensor hyper, Tensor accepted, Tensor rng, "
      "str criterion, bool clear_state=False, *, Tensor? grad_scale=None, Tensor? clip=None, Tensor? found_inf=None, "
      "Tensor? pointers=None) -> ()");
  // The same where a window ends (fold_rng: fold_ of it and a count, at the end of the pass) or has ended (around:
  // pack_around_ of what the averages hold before it, and the masks it writes).
  m.def(
      "boundary_adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] ipt, "
      "Tensor(e!)[] shadow, Tensor(f!)[] masks, Tensor(g!)[] exp_avg_ipt, Tensor(h!)[] exp_avg_unc, Tensor[] grads, "
      "Tensor places, Tensor chunks, Tensor hyper, Tensor accepted, Tensor rng, str criterion, bool clear_state=False, "
      "*, Tensor? clip=None, Tensor? around=None, Tensor(i!)? stats=None, Tensor(j!)? threshold=None, "
      "Tensor? fold_rng=None, float beta1=0.0, float beta2=0.0, Tensor? bracket=None, Tensor(k!)? counts=None, "
      "Tensor? pointers=None) -> ()");
  m.def(
      "boundary_sgd_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffer, Tensor(c!)[] ipt, Tensor(d!)[] shadow, "
      "Tensor(e!)[] masks, Tensor(f!)[] exp_avg_ipt, Tensor(g!)[] exp_avg_unc, Tensor[] grads, Tensor places, "
      "Tensor chunks, Tensor hyper, Tensor accepted, Tensor rng, str criterion, bool clear_state=False, *, "
      "Tensor? clip=None, Tensor? around=None, Tensor(h!)? stats=None, Tensor(i!)? threshold=None, "
      "Tensor? fold_rng=None, float beta1=0.0, float beta2=0.0, Tensor? bracket=None, Tensor(j!)? counts=None, "
      "Tensor? pointers=None) -> ()");
  m.def(
      "apply_mask_(Tensor(a!)[] params, Tensor[] masks, Tensor places, Tensor chunks, *, Tensor? pointers=None) -> ()");
  // A weight matrix [out, in] with zeros, float32, bfloat16 or int8, packed for sparse_linear: (values, columns, rows,
  // counts, starts); csrc/cpu/sparse.h describes them.
  m.def("sparse_pack(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // y [..., out] = x [..., in] times a packed float32 or bfloat16 matrix, plus bias; computed in float32, in the dtype
  // of x.
  m.def(
      "sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor rows, Tensor counts, Tensor starts, Tensor? bias, "
      "int out_features) -> Tensor");
  // The same over int8 codes: y = (x rounded to bytes, token by token) times codes, exact in int32, times both scales,
  // plus bias. scales float32 [out] and sums int32 [out] are those of the rows of codes. Without `vnni` the plain loops
  // run also where the CPU has instructions for it.
  m.def(
      "sparse_linear_int8(Tensor x, Tensor values, Tensor columns, Tensor rows, Tensor counts, Tensor starts, "
      "Tensor scales, Tensor sums, Tensor? bias, bool vnni=True) -> Tensor");
  // A weight matrix [out, in] with zeros, float32, bfloat16 or float16, in at most 65536, in groups of eight for
  // grouped_linear: (values [groups, 8], columns uint8 [groups, 8], bases int16 [groups] whose bits are unsigned,
  // starts int64 [out + 1]); csrc/cuda/grouped.cuh describes them.
  m.def("grouped_pack(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)");
  // y [..., out] = x [..., in] times a grouped matrix, plus bias; computed in float32, in the dtype of x.
  m.def("grouped_linear(Tensor x, Tensor values, Tensor columns, Tensor bases, Tensor starts, Tensor? bias) -> Tensor");
  // The matrix [out, in] again, in the dtype of values.
  m.def("grouped_expand(Tensor values, Tensor columns, Tensor bases, Tensor starts, int in_features) -> Tensor");
  // float64 [1], summed in an order that depends on neither threads nor device: of gradients, the norm to clip by.
  m.def("sum_of_squares(Tensor[] tensors, Tensor places, Tensor chunks, *, Tensor? pointers=None) -> Tensor");
  // Reads the one and writes the other back as it is: the floor of a kernel that updates in place. On the CPU alone.
  m.def("stream_(Tensor(a!)[] written, Tensor[] read) -> ()");
  // Keeps a list on the CPU that many calls take: a list of the one tensor it returns, int64 [1], stands for it. The
  // tensors live until it is forgotten.
  m.def("keep_list(Tensor[] tensors) -> Tensor");
  m.def("forget_list(Tensor kept) -> ()");
  // The instruction set of the CPU kernels: default, avx2 or avx512.
  m.def("cpu_capability() -> str");
}

namespace {

// Whether two lists hold the very same objects, in order. Python's own loops count references: each object is touched.
PyObject* same_items(PyObject*, PyObject* lists) {
  PyObject *a = nullptr, *b = nullptr;
  if (!PyArg_ParseTuple(lists, "OO:same_items", &a, &b)) return nullptr;
  if (!PyList_Check(a) || !PyList_Check(b)) {
    PyErr_SetString(PyExc_TypeError, "same_items() takes two lists");
    return nullptr;
  }
  const Py_ssize_t size = PyList_Size(a);
  bool same = PyList_Size(b) == size;
  for (Py_ssize_t i = 0; same && i < size; ++i) same = PyList_GetItem(a, i) == PyList_GetItem(b, i);
  return PyBool_FromLong(same);
}

}  // namespace

// `import pins_ext._C` loads the library; the operators register themselves.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  // Asked for an instruction set that is not there: say so now, not at the first operator.
  try {
    pins_ext::cpu::kernels();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  static PyMethodDef functions[] = {{"same_items", same_items, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
