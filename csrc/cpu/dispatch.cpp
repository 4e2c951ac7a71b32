// Which instruction set the kernels use: chosen once, by CPUID or by PINS_EXT_CPU_CAPABILITY.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace pins_ext::cpu {
namespace {

struct Capability {
  const Kernels* kernels;
  bool supported;
};

const Kernels& choose() {
  // Widest last.
  const Capability capabilities[] = {
      {&default_kernels, true},
#if defined(__x86_64__)
      {&avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")},
      {&avx512_kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
#endif
  };
  const char* wanted = std::getenv("PINS_EXT_CPU_CAPABILITY");
  const Kernels* best = nullptr;
  std::string names;
  for (const Capability& one : capabilities) {
    if (!one.supported) continue;
    if (wanted && std::string(wanted) == one.kernels->name) return *one.kernels;
    names += std::string(names.empty() ? "" : ", ") + one.kernels->name;
    best = one.kernels;
  }
  if (wanted && *wanted) {
    throw std::runtime_error("PINS_EXT_CPU_CAPABILITY is '" + std::string(wanted) + "', but this CPU and build have " +
                             names);
  }
  return *best;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&pins_ext::cpu::cpu_capability));
}
