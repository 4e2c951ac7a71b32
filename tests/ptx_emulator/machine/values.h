// Register contents as numbers. A register is 64 bits, zero above its type; a NaN result is NVIDIA's canonical one.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "launch.h"

namespace ptx {

inline float f32(uint64_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x)); }
inline double f64(uint64_t x) { return std::bit_cast<double>(x); }
inline uint64_t bits(float x) { return x != x ? 0x7fffffffu : std::bit_cast<uint32_t>(x); }
inline uint64_t bits(double x) { return x != x ? 0xfff8000000000000ull : std::bit_cast<uint64_t>(x); }
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float of_f16(uint16_t h) { return static_cast<float>(std::bit_cast<_Float16>(h)); }
inline uint16_t to_f16(float x) { return x != x ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline float of_bf16(uint16_t h) { return f32(static_cast<uint32_t>(h) << 16); }
inline uint16_t to_bf16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline bool is_signed(int ty) { return ty == T_s8 || ty == T_s16 || ty == T_s32 || ty == T_s64; }
inline bool is_float(int ty) { return ty >= T_f16 && ty <= T_f64; }
inline uint64_t mask_of(int ty) { return kBits[ty] >= 64 ? ~0ull : (1ull << kBits[ty]) - 1; }
inline uint64_t zext(uint64_t x, int ty) { return x & mask_of(ty); }
inline int64_t sext(uint64_t x, int ty) {
  const int unused = 64 - kBits[ty];
  return unused <= 0 ? int64_t(x) : int64_t(x << unused) >> unused;
}
// The value of a scalar floating-point type; exact.
inline double number(uint64_t x, int ty) {
  if (ty == T_f64) return f64(x);
  if (ty == T_f32) return f32(x);
  return ty == T_f16 ? of_f16(uint16_t(x)) : of_bf16(uint16_t(x));
}

// `size` bytes of memory as a register holds them.
inline uint64_t read(const uint8_t* p, int size, bool with_sign) {
  uint64_t x = 0;
  std::memcpy(&x, p, size);
  const int unused = 64 - 8 * size;
  return with_sign ? uint64_t(int64_t(x << unused) >> unused) : x;
}
inline void put(uint8_t* p, int size, uint64_t x) { std::memcpy(p, &x, size); }

template <typename T>
bool ordered(int comparison, T a, T b) {
  switch (comparison) {
    case C_eq:
    case C_equ: return a == b;
    case C_ne:
    case C_neu: return a != b;
    case C_lt:
    case C_lo:
    case C_ltu: return a < b;
    case C_le:
    case C_ls:
    case C_leu: return a <= b;
    case C_gt:
    case C_hi:
    case C_gtu: return a > b;
    case C_ge:
    case C_hs:
    case C_geu: return a >= b;
  }
  return false;
}

inline bool compare(int comparison, int ty, uint64_t x, uint64_t y) {
  if (is_signed(ty)) return ordered(comparison, sext(x, ty), sext(y, ty));
  if (!is_float(ty)) return ordered(comparison, zext(x, ty), zext(y, ty));
  const double a = number(x, ty), b = number(y, ty);
  const bool nan = a != a || b != b;
  if (comparison == C_nan) return nan;
  if (comparison == C_num) return !nan;
  if (nan) return comparison >= C_equ;  // the unordered ones
  return ordered(comparison, a, b);
}

// What an atomic or a reduction leaves: of `old` and x, for cas of x (expected) and y (new).
inline uint64_t combine(int kind, int ty, uint64_t old, uint64_t x, uint64_t y) {
  switch (kind) {
    case A_add:
      if (ty == T_f32) return bits(f32(old) + f32(x));
      if (ty == T_f64) return bits(f64(old) + f64(x));
      return old + x;
    case A_min:
      if (is_signed(ty)) return uint64_t(std::min(sext(old, ty), sext(x, ty)));
      return std::min(zext(old, ty), zext(x, ty));
    case A_max:
      if (is_signed(ty)) return uint64_t(std::max(sext(old, ty), sext(x, ty)));
      return std::max(zext(old, ty), zext(x, ty));
    case A_and: return old & x;
    case A_or: return old | x;
    case A_xor: return old ^ x;
    case A_exch: return x;
    case A_cas: return zext(old, ty) == zext(x, ty) ? y : old;
    case A_inc: return zext(old, ty) >= zext(x, ty) ? 0 : old + 1;
    case A_dec: return zext(old, ty) == 0 || zext(old, ty) > zext(x, ty) ? x : old - 1;
  }
  return 0;
}

inline double integral(double x, int rounding) {
  switch (rounding) {
    case R_rni:
    case R_rn: return std::nearbyint(x);
    case R_rzi:
    case R_rz: return std::trunc(x);
    case R_rmi:
    case R_rm: return std::floor(x);
    case R_rpi:
    case R_rp: return std::ceil(x);
  }
  return x;
}

// Saturates, as cvt does.
inline uint64_t to_integer(double v, int ty) {
  const int b = kBits[ty];
  if (v != v) return 0;
  if (is_signed(ty)) {
    const double low = -std::ldexp(1.0, b - 1), high = std::ldexp(1.0, b - 1);
    if (v < low) return uint64_t(int64_t(1ull << 63) >> (64 - b));
    return v >= high ? (1ull << (b - 1)) - 1 : uint64_t(int64_t(v));
  }
  return v <= 0 ? 0 : v >= std::ldexp(1.0, b) ? mask_of(ty) : uint64_t(v);
}

// cvt.<rounding>.<to>.<from>; false if these types and this rounding are not implemented.
inline bool convert(int to, int from, int rounding, bool saturate, bool flushing, uint64_t x, uint64_t* result) {
  if (!is_float(to) && !is_float(from)) {
    if (saturate) return false;
    // The value of the source, then extended as the destination says.
    x = is_signed(from) ? uint64_t(sext(x, from)) : zext(x, from);
    *result = is_signed(to) ? uint64_t(sext(x, to)) : zext(x, to);
    return true;
  }
  if (!is_float(from)) {
    if (rounding != R_rn || (to != T_f32 && to != T_f64)) return false;
    if (to == T_f64) *result = is_signed(from) ? bits(double(sext(x, from))) : bits(double(zext(x, from)));
    if (to == T_f32) *result = is_signed(from) ? bits(float(sext(x, from))) : bits(float(zext(x, from)));
    return true;
  }
  double v = number(x, from);
  if (flushing && from == T_f32) v = flush(float(v));
  if (!is_float(to)) {
    *result = to_integer(integral(v, rounding), to);
    return true;
  }
  if (rounding >= R_rni) {
    v = integral(v, rounding);
  } else if (rounding != R_none && rounding != R_rn && kBits[to] < kBits[from]) {
    return false;
  }
  if (saturate) v = v != v ? 0.0 : std::min(1.0, std::max(0.0, v));
  if (to == T_f64) {
    *result = bits(v);
  } else if (to == T_f32) {
    *result = bits(float(v));
  } else {
    if (from == T_f64) return false;  // through float32 it would round twice
    *result = to == T_f16 ? to_f16(float(v)) : to_bf16(float(v));
  }
  return true;
}

}  // namespace ptx
