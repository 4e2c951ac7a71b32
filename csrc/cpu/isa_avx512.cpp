// The loops for CPUs with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
// gcc 12 sees undefined operands in its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels.h"

#define PINS_AVX512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512")

namespace pins_ext::cpu {
namespace {
#include "isa.inl"
}  // namespace

const Kernels avx512_kernels = table("avx512");

}  // namespace pins_ext::cpu
#endif
