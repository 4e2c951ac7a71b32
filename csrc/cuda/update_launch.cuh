// What the launches of a checked update's call share: its arguments on the device, and the kernel for how its operands
// are stored. Included after update.cuh, in the same namespace.

uint32_t bits_of_given(const std::vector<List>& lists) {
  uint32_t bits = 0;
  for (size_t k = 0; k < lists.size(); ++k) bits |= static_cast<uint32_t>(lists[k].given()) << k;
  return bits;
}

Work work_of(const Tensor& pointers, const Tensor& places, const Tensor& chunks) {
  return {data_of<int64_t>(pointers), places.size(0), data_of<Place>(places), data_of<Chunk>(chunks)};
}

// `lists`: those of `pointers`.
UpdateArguments arguments_of(const UpdateCall& call, const std::vector<List>& lists, const Tensor& pointers,
                             int criterion) {
  return {work_of(pointers, call.places, call.chunks),
          data_of<float>(call.hyper),
          data_of<float>(call.accepted),
          data_of<int64_t>(call.rng),
          data_of(call.grad_scale),
          data_of(call.clip),
          data_of(call.found_inf),
          bits_of_given(lists),
          static_cast<Criterion>(criterion),
          call.clear_state};
}

// Dtypes of the operands: `state` of importance, `moments` of the first.
struct Storage {
  ScalarType params, state, moments;

  Storage(const UpdateCall& call, const Tensors& states)
      : params(dtype_of(call.params, ScalarType::Float)),
        state(dtype_of(states, ScalarType::Float)),
        moments(dtype_of(call.moments[0].tensors, params)) {}

  bool coded() const { return is_coded(state) || is_coded(moments); }

 private:
  static ScalarType dtype_of(const Tensors& tensors, ScalarType otherwise) {
    return tensors.empty() ? otherwise : tensors[0].scalar_type();
  }
};

// Kernels::of<P, S, M>() is the kernel for parameters, state and moments of these types.
template <class Kernels, typename P, typename M>
auto kernel_for(ScalarType state) {
  return state == ScalarType::BFloat16 ? Kernels::template of<P, BFloat16, M>() : Kernels::template of<P, float, M>();
}

// Both moments of AdamW may be stored apart from the parameters; SGD's buffer is stored as they are.
template <class Kernels, typename P>
auto kernel_for(const Storage& storage) {
  if constexpr (Kernels::kMoments == 2) {
    return storage.moments == ScalarType::Float ? kernel_for<Kernels, P, float>(storage.state)
                                                : kernel_for<Kernels, P, BFloat16>(storage.state);
  } else {
    return kernel_for<Kernels, P, P>(storage.state);
  }
}

template <class Kernels>
auto kernel_for(const Storage& storage) {
  return storage.params == ScalarType::Float      ? kernel_for<Kernels, float>(storage)
         : storage.params == ScalarType::BFloat16 ? kernel_for<Kernels, BFloat16>(storage)
                                                  : kernel_for<Kernels, Float16>(storage);
}
