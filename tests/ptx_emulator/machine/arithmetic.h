// One instruction for some of a block's threads: all but branches, barriers and what is warp-wide.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "memory.h"

namespace ptx {

struct Arithmetic : Memory {
  using Memory::Memory;

  // The threads that execute it.
  const int32_t* active = nullptr;
  int n_active = 0;

#define EACH for (int k_ = 0, t = 0; k_ < n_active && (t = active[k_], true); ++k_)

  template <class F>
  bool unary(const Ins& I, F f) {
    const In a = in(I.src[0]);
    uint64_t* d = out(I.dst[0]);
    EACH d[t] = f(a[t]);
    return true;
  }
  template <class F>
  bool binary(const Ins& I, F f) {
    const In a = in(I.src[0]), b = in(I.src[1]);
    uint64_t* d = out(I.dst[0]);
    EACH d[t] = f(a[t], b[t]);
    return true;
  }
  template <class F>
  bool ternary(const Ins& I, F f) {
    const In a = in(I.src[0]), b = in(I.src[1]), c = in(I.src[2]);
    uint64_t* d = out(I.dst[0]);
    EACH d[t] = f(a[t], b[t], c[t]);
    return true;
  }
  template <class F>
  bool quaternary(const Ins& I, F f) {
    const In a = in(I.src[0]), b = in(I.src[1]), c = in(I.src[2]), e = in(I.src[3]);
    uint64_t* d = out(I.dst[0]);
    EACH d[t] = f(a[t], b[t], c[t], e[t]);
    return true;
  }

  // Runs the instruction; false: not implemented for these types.
  bool execute(const Ins& I, int ip) {
    switch (I.op) {
      case OP_nop: return true;
      case OP_ld: return load(I, ip);
      case OP_st: return store(I, ip);
      case OP_cpasync: return copy(I, ip);
      case OP_atom: return atomic(I, ip);
      case OP_movpack: return pack(I);
      case OP_movunpack: return unpack(I);
      case OP_setp: return set_predicate(I);
      case OP_cvt: return converted(I);
      case OP_cvt2: return converted_pair(I);
      case OP_div:
      case OP_rem: return divide(I, ip);
      case OP_activemask: return active_mask(I);
      case OP_trap:
        EACH report(kTrap, ip, t, 0, 0);
        fatal = true;
        return true;
    }
    if (is_float(I.ty) && (I.op == OP_neg || I.op == OP_abs)) return sign(I);
    if (I.ty == T_f32 || I.ty == T_f64) return floating(I) || any_type(I);
    return (!is_float(I.ty) && integer(I)) || any_type(I);
  }

 private:
  // ---- moves and selections ----

  bool any_type(const Ins& I) {
    const uint64_t m = mask_of(I.ty);
    switch (I.op) {
      case OP_mov: return unary(I, [=](uint64_t x) { return x & m; });
      case OP_selp: return ternary(I, [=](uint64_t x, uint64_t y, uint64_t p) { return (p ? x : y) & m; });
      case OP_set: {
        const uint64_t yes = is_float(I.ty) ? bits(1.0f) : m;
        return binary(I, [&](uint64_t x, uint64_t y) { return compare(I.mod, I.ty2, x, y) ? yes : 0; });
      }
    }
    return false;
  }

  bool pack(const Ins& I) {
    const int part = kBits[I.ty] / I.ns;
    uint64_t* d = out(I.dst[0]);
    EACH {
      uint64_t x = 0;
      for (int i = 0; i < I.ns; ++i) x |= (in(I.src[i])[t] & ((1ull << part) - 1)) << (part * i);
      d[t] = x;
    }
    return true;
  }

  bool unpack(const Ins& I) {
    const In a = in(I.src[0]);
    const int part = kBits[I.ty] / I.nd;
    EACH {
      const uint64_t x = a[t];
      for (int i = 0; i < I.nd; ++i) out(I.dst[i])[t] = x >> (part * i) & ((1ull << part) - 1);
    }
    return true;
  }

  bool set_predicate(const Ins& I) {
    const In x = in(I.src[0]), y = in(I.src[1]);
    uint64_t *d = out(I.dst[0]), *e = out(I.nd > 1 ? I.dst[1] : -1);
    auto join = [&](bool r, bool c) { return I.mod2 == B_and ? r && c : I.mod2 == B_or ? r || c : r != c; };
    EACH {
      bool r = compare(I.mod, I.ty, x[t], y[t]), not_r = !r;
      if (I.mod2) {
        const bool c = bool(in(I.src[2])[t]) != bool(I.imm);
        r = join(r, c), not_r = join(not_r, c);
      }
      d[t] = r, e[t] = not_r;
    }
    return true;
  }

  bool active_mask(const Ins& I) {
    std::vector<uint32_t> lanes((T + 31) / 32);
    EACH lanes[t / 32] |= 1u << (t % 32);
    uint64_t* d = out(I.dst[0]);
    EACH d[t] = lanes[t / 32];
    return true;
  }

  // ---- conversions ----

  bool converted(const Ins& I) {
    const In a = in(I.src[0]);
    uint64_t* d = out(I.dst[0]);
    EACH if (!convert(I.ty, I.ty2, I.mod, I.mod2 & 2, I.mod2 & 1, a[t], &d[t])) return false;
    return true;
  }

  bool converted_pair(const Ins& I) {
    if ((I.ty != T_bf16x2 && I.ty != T_f16x2) || I.mod != R_rn || I.mod2) return false;
    auto half = [&](uint64_t x) { return uint64_t(I.ty == T_f16x2 ? to_f16(f32(x)) : to_bf16(f32(x))); };
    return binary(I, [&](uint64_t x, uint64_t y) { return half(x) << 16 | half(y); });
  }

  // ---- floating point; mod2: subnormals are zeros ----

  bool sign(const Ins& I) {
    uint64_t top = 0;
    switch (I.ty) {
      case T_f32: top = 0x80000000u; break;
      case T_f16:
      case T_bf16: top = 0x8000u; break;
      case T_f16x2:
      case T_bf16x2: top = 0x80008000u; break;
      default: return false;
    }
    const uint64_t m = mask_of(I.ty);
    if (I.op == OP_neg) return unary(I, [=](uint64_t x) { return (x ^ top) & m; });
    return unary(I, [=](uint64_t x) { return x & ~top & m; });
  }

  template <class F>
  bool of_two(const Ins& I, F f) {
    if (I.ty == T_f64) return binary(I, [=](uint64_t x, uint64_t y) { return bits(f(f64(x), f64(y))); });
    if (!I.mod2) return binary(I, [=](uint64_t x, uint64_t y) { return bits(f(f32(x), f32(y))); });
    return binary(I, [=](uint64_t x, uint64_t y) { return bits(flush(f(flush(f32(x)), flush(f32(y))))); });
  }

  // float32 of a function that is approximate on the GPU: here the exact result, rounded.
  bool approximate(const Ins& I, double (*f)(double)) {
    return unary(I, [=](uint64_t x) { return bits(float(f(double(f32(x))))); });
  }

  static uint64_t extreme(uint64_t x, uint64_t y, bool largest, bool nan_wins) {
    const float p = f32(x), q = f32(y);
    if (p != p || q != q) return nan_wins || (p != p && q != q) ? 0x7fffffff : bits(p != p ? q : p);
    if (p == q) return bits(std::signbit(p) == largest ? q : p);  // -0 is less than +0
    return bits((p < q) != largest ? p : q);
  }

  bool floating(const Ins& I) {
    switch (I.op) {
      case OP_add: return of_two(I, std::plus<>());
      case OP_sub: return of_two(I, std::minus<>());
      case OP_mul_lo: return of_two(I, std::multiplies<>());
      case OP_fma:
        if (I.mod2) return false;
        if (I.ty == T_f64)
          return ternary(I, [](auto x, auto y, auto z) { return bits(std::fma(f64(x), f64(y), f64(z))); });
        return ternary(I, [](auto x, auto y, auto z) { return bits(std::fma(f32(x), f32(y), f32(z))); });
    }
    if (I.ty != T_f32) return false;
    switch (I.op) {
      case OP_min: return binary(I, [&](auto x, auto y) { return extreme(x, y, false, I.mod); });
      case OP_max: return binary(I, [&](auto x, auto y) { return extreme(x, y, true, I.mod); });
      case OP_copysign: return binary(I, [](auto x, auto y) { return (y & 0x7fffffffu) | (x & 0x80000000u); });
      case OP_sqrt: return unary(I, [](uint64_t x) { return bits(std::sqrt(f32(x))); });
      case OP_rcp: return unary(I, [](uint64_t x) { return bits(1.0f / f32(x)); });
      case OP_rsqrt: return approximate(I, [](double x) { return 1.0 / std::sqrt(x); });
      case OP_ex2: return approximate(I, std::exp2);
      case OP_lg2: return approximate(I, std::log2);
      case OP_sin: return approximate(I, std::sin);
      case OP_cos: return approximate(I, std::cos);
      case OP_tanh: return approximate(I, std::tanh);
    }
    return false;
  }

  bool divide(const Ins& I, int ip) {
    if (I.ty == T_f32 && I.op == OP_div) return binary(I, [](auto x, auto y) { return bits(f32(x) / f32(y)); });
    if (is_float(I.ty)) return false;
    const In x = in(I.src[0]), y = in(I.src[1]);
    const uint64_t m = mask_of(I.ty);
    uint64_t* d = out(I.dst[0]);
    EACH {
      // 128 bits: the smallest integer by -1 does not fit.
      __int128 p = is_signed(I.ty) ? __int128(sext(x[t], I.ty)) : __int128(zext(x[t], I.ty));
      __int128 q = is_signed(I.ty) ? __int128(sext(y[t], I.ty)) : __int128(zext(y[t], I.ty));
      if (q == 0) report(kDivByZero, ip, t, 0, 0);
      d[t] = q == 0 ? m : uint64_t(I.op == OP_div ? p / q : p % q) & m;
    }
    return true;
  }

  // ---- integers ----

  // The product in 128 bits: of two unsigned 64-bit numbers it fits as a bit pattern.
  static unsigned __int128 product(int ty, uint64_t x, uint64_t y) {
    if (is_signed(ty)) return static_cast<unsigned __int128>(__int128(sext(x, ty)) * sext(y, ty));
    return static_cast<unsigned __int128>(zext(x, ty)) * zext(y, ty);
  }

  bool integer(const Ins& I) {
    const int ty = I.ty, b = kBits[ty];
    const uint64_t m = mask_of(ty);
    auto high = [=](uint64_t x, uint64_t y) { return uint64_t(product(ty, x, y) >> b); };
    auto wide = [=](uint64_t x, uint64_t y) { return uint64_t(product(ty, x, y)); };
    auto less = [=](uint64_t x, uint64_t y) { return compare(C_lt, ty, x, y); };
    switch (I.op) {
      case OP_add: return binary(I, [=](uint64_t x, uint64_t y) { return (x + y) & m; });
      case OP_sub: return binary(I, [=](uint64_t x, uint64_t y) { return (x - y) & m; });
      case OP_mul_lo: return binary(I, [=](uint64_t x, uint64_t y) { return (x * y) & m; });
      case OP_mul_hi: return binary(I, [=](uint64_t x, uint64_t y) { return high(x, y) & m; });
      case OP_mul_wide: return binary(I, wide);
      case OP_mad_lo: return ternary(I, [=](uint64_t x, uint64_t y, uint64_t z) { return (x * y + z) & m; });
      case OP_mad_hi: return ternary(I, [=](uint64_t x, uint64_t y, uint64_t z) { return (high(x, y) + z) & m; });
      case OP_mad_wide: return ternary(I, [=](uint64_t x, uint64_t y, uint64_t z) { return wide(x, y) + z; });
      case OP_neg: return unary(I, [=](uint64_t x) { return -x & m; });
      case OP_abs: return unary(I, [=](uint64_t x) { return uint64_t(std::abs(sext(x, ty))) & m; });
      case OP_min: return binary(I, [=](uint64_t x, uint64_t y) { return (less(y, x) ? y : x) & m; });
      case OP_max: return binary(I, [=](uint64_t x, uint64_t y) { return (less(x, y) ? y : x) & m; });
      case OP_and: return binary(I, [=](uint64_t x, uint64_t y) { return x & y & m; });
      case OP_or: return binary(I, [=](uint64_t x, uint64_t y) { return (x | y) & m; });
      case OP_xor: return binary(I, [=](uint64_t x, uint64_t y) { return (x ^ y) & m; });
      case OP_not: return unary(I, [=](uint64_t x) { return ~x & m; });
      case OP_cnot: return unary(I, [=](uint64_t x) { return uint64_t((x & m) == 0); });
      case OP_clz: return unary(I, [=](uint64_t x) { return uint64_t(std::countl_zero(zext(x, ty)) - (64 - b)); });
      case OP_popc: return unary(I, [=](uint64_t x) { return uint64_t(std::popcount(zext(x, ty))); });
    }
    return bit_fields(I);
  }

  bool bit_fields(const Ins& I) {
    const int ty = I.ty, b = kBits[ty];
    const uint64_t m = mask_of(ty);
    switch (I.op) {
      case OP_shl:
        return binary(I,
                      [=](uint64_t x, uint64_t y) { return uint32_t(y) >= uint32_t(b) ? 0 : (x << uint32_t(y)) & m; });
      case OP_shr:
        return binary(I, [=](uint64_t x, uint64_t y) {
          const uint32_t n = uint32_t(y), most = uint32_t(b);
          if (is_signed(ty)) return uint64_t(sext(x, ty) >> std::min(n, most - 1)) & m;
          return n >= most ? 0 : zext(x, ty) >> n;
        });
      case OP_bfe:
        return ternary(I, [=](uint64_t x, uint64_t p, uint64_t l) {
          const int first = p & 255, length = l & 255;
          const bool minus = is_signed(ty) && length && (zext(x, ty) >> std::min(first + length - 1, b - 1) & 1);
          uint64_t r = 0;
          for (int i = 0; i < b; ++i) {
            r |= (i < length && first + i < b ? zext(x, ty) >> (first + i) & 1 : uint64_t(minus)) << i;
          }
          return r;
        });
      case OP_bfi:
        return quaternary(I, [=](uint64_t x, uint64_t y, uint64_t p, uint64_t l) {
          const int first = p & 255, length = l & 255;
          uint64_t r = zext(y, ty);
          for (int i = 0; i < length && first + i < b; ++i) {
            r = (r & ~(1ull << (first + i))) | (x >> i & 1) << (first + i);
          }
          return r;
        });
      case OP_brev:
        return unary(I, [=](uint64_t x) {
          uint64_t r = 0;
          for (int i = 0; i < b; ++i) r |= (x >> i & 1) << (b - 1 - i);
          return r;
        });
      case OP_prmt:
        return ternary(I, [](uint64_t x, uint64_t y, uint64_t selectors) {
          const uint64_t all = (x & 0xffffffffu) | y << 32;
          uint64_t r = 0;
          for (int i = 0; i < 4; ++i) {
            const int selector = selectors >> (4 * i) & 15;
            uint64_t byte = all >> (8 * (selector & 7)) & 255;
            if (selector & 8) byte = byte & 128 ? 255 : 0;
            r |= byte << (8 * i);
          }
          return r;
        });
      case OP_dp4a:
        return ternary(I, [=](uint64_t x, uint64_t y, uint64_t sum) {
          for (int i = 0; i < 32; i += 8) sum += (x >> i & 255) * (y >> i & 255);
          return sum & m;
        });
      case OP_lop3:
        return quaternary(I, [=](uint64_t x, uint64_t y, uint64_t z, uint64_t table) {
          uint64_t r = 0;
          for (int i = 0; i < 8; ++i) {
            if (table >> i & 1) r |= (i & 4 ? x : ~x) & (i & 2 ? y : ~y) & (i & 1 ? z : ~z);
          }
          return r & m;
        });
      case OP_shf:
        return ternary(I, [&](uint64_t low, uint64_t high, uint64_t n) {
          const uint64_t both = (low & 0xffffffffu) | high << 32;
          const uint32_t by = I.mod2 ? n & 31 : std::min<uint32_t>(uint32_t(n), 32);
          return (I.mod ? both >> by : (both << by) >> 32) & 0xffffffffu;
        });
    }
    return false;
  }

  // ---- memory ----

  bool load(const Ins& I, int ip) {
    const In a = in(I.src[0]);
    const int n = I.nd, each = kBits[I.ty] / 8;
    EACH {
      const uint8_t* p = memory(I.space, a[t] + I.imm, each * n, false, false, t, ip);
      if (!p) return true;
      for (int i = 0; i < n; ++i) out(I.dst[i])[t] = read(p + i * each, each, is_signed(I.ty));
    }
    return true;
  }

  bool store(const Ins& I, int ip) {
    const In a = in(I.src[0]);
    const int n = I.ns - 1, each = kBits[I.ty] / 8;
    uint8_t value[64];
    EACH {
      for (int i = 0; i < n; ++i) put(value + i * each, each, in(I.src[1 + i])[t]);
      incoming = value;
      uint8_t* p = memory(I.space, a[t] + I.imm, each * n, true, false, t, ip);
      incoming = nullptr;
      if (!p) return true;
      std::memcpy(p, value, each * n);
    }
    return true;
  }

  // cp.async, at once.
  bool copy(const Ins& I, int ip) {
    const In to = in(I.src[0]), from = in(I.src[1]), n = in(I.src[2]);
    EACH {
      const int size = int(n[t]), given = I.ns > 3 ? int(in(I.src[3])[t]) : size;
      uint8_t* p = memory(S_shared, to[t] + I.imm, size, true, false, t, ip);
      if (!p) return true;
      std::memset(p, 0, size);
      if (!given) continue;
      const uint8_t* q = memory(S_global, from[t] + I.target, size, false, false, t, ip);
      if (!q) return true;
      std::memcpy(p, q, given);
    }
    return true;
  }

  bool atomic(const Ins& I, int ip) {
    const In a = in(I.src[0]), x = in(I.src[1]);
    uint64_t* d = out(I.dst[0]);
    const int each = kBits[I.ty] / 8;
    EACH {
      uint8_t* p = memory(I.space, a[t] + I.imm, each, true, true, t, ip);
      if (!p) return true;
      const uint64_t old = read(p, each, false);
      put(p, each, combine(I.mod, I.ty, old, x[t], I.ns > 2 ? in(I.src[2])[t] : 0));
      d[t] = old;
    }
    return true;
  }
};

}  // namespace ptx
