// Executes one launch of a PTX kernel over all threads of each block. Compile with -ffp-contract=off.
//
// The threads at the lowest instruction run, together, until another thread's instruction comes first: a valid schedule
// of a GPU's, in which threads that parted meet again. The whole block at once, or warps in random turns.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "warp.h"

namespace ptx {
namespace {

constexpr int32_t kNowhere = std::numeric_limits<int32_t>::max();

enum State : uint8_t { kRuns, kAtBarrier, kAtWarpWide, kGone };

struct Block : Warp {
  std::vector<int32_t> pc;
  std::vector<uint8_t> state;
  std::vector<int32_t> together, some;  // threads at one instruction, and those its guard lets execute it
  uint64_t budget = 0;
  std::mt19937_64 random;

  explicit Block(Launch& l) : Warp(l), pc(l.threads), state(l.threads), random(l.seed) {}

  void run(int index) {
    reset(index);
    if (L.warp_mode) {
      in_random_turns();
    } else {
      advance(0, T, std::numeric_limits<int64_t>::max());
    }
    for (int t = 0; t < T && !fatal; ++t) {
      if (state[t] != kGone) fault(kDeadlock, pc[t], t, 0, 0);
    }
  }

 private:
  void reset(int index) {
    cta = index;
    epoch = 0;
    // Registers and shared memory hold rubbish until they are written.
    std::fill(registers.begin(), registers.end(), 0xfedcba9876543210ull);
    std::fill(shared.begin(), shared.end(), 0xcd);
    std::fill(shared_cells.begin(), shared_cells.end(), Cell{});
    std::fill(warp_epoch.begin(), warp_epoch.end(), 0);
    std::fill(pc.begin(), pc.end(), 0);
    std::fill(state.begin(), state.end(), kRuns);
    budget = L.steps + L.max_steps;
    const uint64_t gx = L.grid[0], gy = L.grid[1], gz = L.grid[2];
    const uint64_t x = index % gx, y = index / gx % gy, z = index / gx / gy;
    for (int t = 0; t < T; ++t) {
      const uint64_t lane = t % 32, all = 0xffffffff, below = (1ull << lane) - 1, until = (2ull << lane) - 1;
      // In the order of instructions.py SPECIAL.
      const uint64_t special[kSpecial] = {uint64_t(t),
                                          0,
                                          0,  // tid
                                          uint64_t(T),
                                          1,
                                          1,  // ntid
                                          x,
                                          y,
                                          z,
                                          gx,
                                          gy,
                                          gz,  // ctaid, nctaid
                                          lane,
                                          uint64_t(t / 32),
                                          uint64_t((T + 31) / 32),  // laneid, warpid, nwarpid
                                          below,
                                          until,
                                          all & ~until,
                                          all & ~below,
                                          1ull << lane,  // lanemasks
                                          0,
                                          0,
                                          0,  // clocks
                                          0,
                                          1,  // smid, nsmid
                                          0,
                                          0,
                                          0};  // cluster
      for (int i = 0; i < kSpecial; ++i) registers[size_t(i) * T + t] = special[i];
    }
  }

  void in_random_turns() {
    while (!fatal) {
      std::vector<int> ready;
      for (int first = 0; first < T; first += 32) {
        const int last = std::min(T, first + 32);
        wake(first, last);
        if (std::find(state.begin() + first, state.begin() + last, kRuns) != state.begin() + last) {
          ready.push_back(first);
        }
      }
      if (ready.empty()) return;
      const int first = ready[random() % ready.size()];
      const int64_t burst = random() % 4 ? int64_t(random() % 60 + 1) : std::numeric_limits<int64_t>::max();
      advance(first, std::min(T, first + 32), burst);
    }
  }

  // Runs threads first .. last - 1 until none can go on, or `burst` instructions.
  void advance(int first, int last, int64_t burst) {
    while (!fatal) {
      wake(first, last);
      int32_t p = kNowhere;
      for (int t = first; t < last; ++t) {
        if (state[t] == kRuns) p = std::min(p, pc[t]);
      }
      if (p == kNowhere) return;
      int32_t next = kNowhere;  // where the first of the others is
      together.clear();
      for (int t = first; t < last; ++t) {
        if (state[t] != kRuns) continue;
        if (pc[t] == p) {
          together.push_back(t);
        } else {
          next = std::min(next, pc[t]);
        }
      }
      while (p != kNowhere && p < next && !fatal) {
        if (burst-- <= 0) return stay(p);
        p = step(p, first, last);
      }
      if (p != kNowhere) stay(p);
    }
  }

  void stay(int32_t p) {
    for (int t : together) pc[t] = p;
  }

  // Runs the threads that are together through one instruction. Returns where they are then, kNowhere if they parted.
  int32_t step(int32_t p, int first, int last) {
    if (++L.steps > budget) {
      fault(kStepLimit, p, together[0], 0, 0);
      return kNowhere;
    }
    const Ins& I = L.code[p];
    const std::vector<int32_t>* run = &together;
    if (I.pred >= 0) {
      const In guard = in(I.pred);
      some.clear();
      for (int t : together) {
        if (bool(guard[t]) != bool(I.pneg)) some.push_back(t);
      }
      run = &some;
    }
    active = run->data(), n_active = static_cast<int>(run->size());
    L.coverage[p] += n_active;
    L.lane_steps += n_active;
    switch (I.op) {
      case OP_bra:
        if (n_active == 0) return p + 1;
        if (n_active == static_cast<int>(together.size())) return I.target;
        stay(p + 1);
        EACH pc[t] = I.target;
        return kNowhere;
      case OP_ret:
        stay(p + 1);
        EACH state[t] = kGone;
        return kNowhere;
      case OP_bar:
        stay(p + 1);
        barrier(p);
        return kNowhere;
    }
    if (is_warp_wide(I.op)) return meet(I, p, first, last);
    if (n_active && !execute(I, p)) fault(kUnimplemented, p, active[0], 0, 0);
    return p + 1;
  }

  void barrier(int32_t p) {
    EACH state[t] = kAtBarrier, pc[t] = p;
    // A whole warp arrives at once, or its threads had parted.
    EACH {
      const int begin = t / 32 * 32, end = std::min(begin + 32, T);
      for (int l = begin; l < end; ++l) {
        if (state[l] == kRuns || (state[l] == kAtBarrier && pc[l] != p)) {
          report(kBarSplitWarp, p, t, 0, 0);
          break;
        }
      }
    }
    int waiting = 0, gone = 0, at = -1;
    bool differ = false;
    for (int t = 0; t < T; ++t) {
      gone += state[t] == kGone;
      if (state[t] != kAtBarrier) continue;
      ++waiting;
      differ |= at >= 0 && pc[t] != at;
      at = pc[t];
    }
    if (!waiting || waiting + gone < T) return;
    if (differ) report(kDivergentBarrier, at, 0, 0, 0);
    for (int t = 0; t < T; ++t) {
      if (state[t] == kAtBarrier) state[t] = kRuns, ++pc[t];
    }
    ++epoch;
  }

  // Warps whose members are all here go on, the others wait.
  int32_t meet(const Ins& I, int32_t p, int first, int last) {
    std::vector<uint32_t> here((T + 31) / 32);
    EACH here[t / 32] |= 1u << (t % 32);
    stay(p + 1);
    bool waiting = false;
    for (int w = first / 32; w * 32 < last; ++w) {
      if (!here[w]) continue;
      const int one = w * 32 + std::countr_zero(here[w]);
      const uint32_t wanted = members(I, one), gone = lanes(w, [&](int t) { return state[t] == kGone; }, true);
      if (wanted & gone) report(kShflExited, p, one, wanted & gone, 0);
      if ((wanted & ~gone & ~here[w]) == 0) {
        if (!warp_wide(I, p, w, here[w])) fault(kUnimplemented, p, one, 0, 0);
        continue;
      }
      waiting = true;
      for (int l = 0; l < 32; ++l) {
        if (here[w] >> l & 1) state[w * 32 + l] = kAtWarpWide, pc[w * 32 + l] = p;
      }
    }
    return waiting ? kNowhere : p + 1;
  }

  // The lanes of a warp for which `f` holds; `missing`: what it says of lanes beyond the block.
  template <class F>
  uint32_t lanes(int warp, F f, bool missing) const {
    uint32_t result = 0;
    for (int l = 0; l < 32; ++l) result |= uint32_t(warp * 32 + l < T ? f(warp * 32 + l) : missing) << l;
    return result;
  }

  // Threads that wait at a warp-wide instruction go on when the others have come.
  void wake(int first, int last) {
    for (int t = first; t < last; ++t) {
      if (state[t] != kAtWarpWide) continue;
      const int w = t / 32;
      const uint32_t gone = lanes(w, [&](int s) { return state[s] == kGone; }, true);
      const uint32_t same =
          lanes(w, [&](int s) { return (state[s] == kAtWarpWide || state[s] == kRuns) && pc[s] == pc[t]; }, false);
      if (members(L.code[pc[t]], t) & ~gone & ~same) continue;
      for (int l = 0; l < 32; ++l) {
        if ((same >> l & 1) && state[w * 32 + l] == kAtWarpWide) state[w * 32 + l] = kRuns;
      }
    }
  }
};

}  // namespace
}  // namespace ptx

extern "C" int emulate(ptx::Launch* launch) {
  ptx::Block block(*launch);
  const int64_t blocks = int64_t(launch->grid[0]) * launch->grid[1] * launch->grid[2];
  for (int64_t i = 0; i < blocks && !block.fatal; ++i) {
    block.run(static_cast<int>(launch->order ? launch->order[i] : i));
  }
  return block.fatal;
}

// Bytes of the structures that Python writes, in the order of launch.py.
extern "C" int sizes(int which) {
  return which == 0 ? sizeof(ptx::Ins) : which == 1 ? sizeof(ptx::Report) : sizeof(ptx::Launch);
}
