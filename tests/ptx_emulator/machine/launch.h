// What Python hands to the interpreter and gets back: launch.py says the same, and compares the sizes.
#pragma once

#include <cstdint>

#include "names.h"  // written by names.py

namespace ptx {

struct Ins {
  int32_t op, ty, ty2, pred, pneg, mod, mod2, space, nd, ns, dst[8], src[8], target, line;
  int64_t imm;
};

struct Report {
  int32_t kind, ins, ins2, cta, thread, cta2, thread2, size;
  uint64_t addr;
  uint64_t count;
};

// launch.py KINDS says them in words.
enum Kind {
  kMisaligned = 1,
  kOutside,
  kSharedOutside,
  kParamOutside,
  kUninitShared,
  kRaceWW,
  kRaceRW,
  kRaceWR,
  kDeadlock,
  kDivergentBarrier,
  kDivByZero,
  kUnimplemented,
  kShflExited,
  kTrap,
  kBarSplitWarp,
  kStepLimit,
  kSameInsWW,
  kShflInactive
};

struct Launch {
  const Ins* code;
  int32_t n_ins, n_regs;
  const uint64_t* consts;
  const uint8_t* params;
  int64_t param_bytes;
  int32_t threads, shared_bytes;
  int32_t grid[3];
  int32_t warp_mode;  // 0: the block in lockstep; 1: warps in a random order, one after another in bursts
  uint64_t seed;
  const int64_t* order;  // order of the blocks, or null
  const uint64_t* lo;    // allocations, sorted
  const uint64_t* hi;
  int32_t n_alloc;
  int32_t races;       // whether to look for races
  uint64_t* coverage;  // per instruction: threads that executed it
  uint64_t max_steps;  // per block
  Report* reports;
  int32_t max_reports;
  int32_t n_reports;    // out
  uint64_t steps;       // out
  uint64_t lane_steps;  // out
};

constexpr int kConst = 1 << 30;  // an operand from here on is a constant
constexpr uint64_t kSharedBase = 4096;
constexpr int kSpecial = 28;  // special registers, which come first

}  // namespace ptx
