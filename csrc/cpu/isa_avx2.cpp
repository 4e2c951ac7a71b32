// The loops for CPUs with AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define PINS_AVX2
#pragma GCC target("avx2,fma,bmi,bmi2,lzcnt,popcnt")

namespace pins_ext::cpu {
namespace {
#include "isa.inl"
}  // namespace

const Kernels avx2_kernels = table("avx2");

}  // namespace pins_ext::cpu
#endif
