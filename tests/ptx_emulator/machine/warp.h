// Instructions of a whole warp: shuffles, votes, reductions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arithmetic.h"

namespace ptx {

struct Warp : Arithmetic {
  using Arithmetic::Arithmetic;

  static bool is_warp_wide(int op) {
    return op == OP_warpsync || op == OP_shfl || op == OP_vote || op == OP_redux || op == OP_match_any ||
           op == OP_match_all;
  }

  // The lanes that an instruction names.
  uint32_t members(const Ins& I, int t) const { return static_cast<uint32_t>(in(I.src[I.ns - 1])[t]); }

  // Runs the instruction for these lanes of a warp, all that it names; false: not implemented.
  bool warp_wide(const Ins& I, int ip, int warp, uint32_t lanes) {
    const int first = warp * 32;
    auto each = [&](auto f) {
      for (int lane = 0; lane < 32; ++lane) {
        if (lanes >> lane & 1) f(lane);
      }
    };
    if (I.op == OP_warpsync) {
      ++warp_epoch[warp];
      return true;
    }
    const In a = in(I.src[0]);
    uint64_t* d = out(I.dst[0]) + first;
    uint64_t* second = out(I.nd > 1 ? I.dst[1] : -1) + first;
    switch (I.op) {
      case OP_shfl: {
        uint64_t value[32] = {};
        each([&](int lane) { value[lane] = a[first + lane]; });
        each([&](int lane) {
          bool valid = false;
          const int from = source_lane(I, first + lane, lane, &valid);
          if (!(lanes >> from & 1)) report(kShflInactive, ip, first + lane, from, 0);
          d[lane] = value[from] & 0xffffffffu;
          second[lane] = valid;
        });
        return true;
      }
      case OP_vote: {
        uint32_t ballot = 0;
        each([&](int lane) { ballot |= uint32_t(bool(a[first + lane]) != bool(I.imm)) << lane; });
        const uint64_t r = I.mod == V_ballot ? ballot
                           : I.mod == V_all  ? ballot == lanes
                           : I.mod == V_any  ? ballot != 0
                                             : ballot == 0 || ballot == lanes;
        each([&](int lane) { d[lane] = r; });
        return true;
      }
      case OP_redux: {
        const int some = std::countr_zero(lanes);
        uint64_t r = a[first + some];
        each([&](int lane) { r = lane == some ? r : combine(I.mod, I.ty, r, a[first + lane], 0); });
        each([&](int lane) { d[lane] = r & mask_of(I.ty); });
        return true;
      }
      case OP_match_any:
      case OP_match_all: {
        uint64_t value[32] = {};
        each([&](int lane) { value[lane] = zext(a[first + lane], I.ty); });
        each([&](int lane) {
          uint32_t same = 0;
          each([&](int other) { same |= uint32_t(value[other] == value[lane]) << other; });
          if (I.op == OP_match_all && same != lanes) same = 0;
          d[lane] = same;
          second[lane] = same != 0;
        });
        return true;
      }
    }
    return false;
  }

 private:
  // The lane that a shuffle reads: its own where the one asked for lies outside the segment.
  int source_lane(const Ins& I, int t, int lane, bool* valid) const {
    const int by = in(I.src[1])[t] & 31, clamp = in(I.src[2])[t] & 31, segment = in(I.src[2])[t] >> 8 & 31;
    const int end = (lane & segment) | (clamp & ~segment);
    int from = lane;
    switch (I.mod) {
      case H_up: from = lane - by; break;
      case H_down: from = lane + by; break;
      case H_bfly: from = lane ^ by; break;
      case H_idx: from = (lane & segment) | (by & ~segment); break;
    }
    *valid = I.mod == H_up ? from >= end : from <= end;
    return *valid ? from : lane;
  }
};

}  // namespace ptx
