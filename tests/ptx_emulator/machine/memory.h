// Registers and memory of one block at a time, every access checked: inside an allocation, aligned, and no two threads
// at one byte, one of them writing another value, without a barrier between.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "launch.h"
#include "values.h"

namespace ptx {

// The last thread that touched a byte: in which epoch, by which instruction.
struct Touch {
  uint32_t who = 0, epoch = 0;
  int32_t ins = 0;
};

// Two readers are kept: a write races with either.
struct Cell {
  Touch write, read, other_read;
  uint8_t atomic = 0, initialised = 0;
};

// An operand for all threads: a register, or a constant (stride 0).
struct In {
  const uint64_t* p;
  int stride;
  uint64_t operator[](int t) const { return p[t * stride]; }
};

struct Memory {
  Launch& L;
  const int T;                      // threads of a block
  std::vector<uint64_t> registers;  // [register][thread]
  std::vector<uint64_t> sink;       // for results that nobody wants
  std::vector<uint8_t> shared;
  std::vector<Cell> shared_cells;
  std::vector<std::vector<Cell>> cells;  // per allocation, made when it is first touched
  std::vector<uint32_t> warp_epoch;
  uint32_t epoch = 0;
  int cta = 0;
  int last_allocation = 0;
  bool fatal = false;
  const uint8_t* incoming = nullptr;  // what a store is about to write

  explicit Memory(Launch& l)
      : L(l),
        T(l.threads),
        registers(size_t(l.n_regs) * l.threads),
        sink(l.threads),
        shared(l.shared_bytes),
        shared_cells(l.shared_bytes),
        cells(l.n_alloc),
        warp_epoch((l.threads + 31) / 32) {}

  // ---- findings ----

  void report(int kind, int ins, int thread, uint64_t address, int size, int ins2 = -1, int cta2 = -1,
              int thread2 = -1) {
    for (int i = 0; i < L.n_reports; ++i) {
      Report& r = L.reports[i];
      if (r.kind == kind && r.ins == ins && r.ins2 == ins2) {
        ++r.count;
        return;
      }
    }
    if (L.n_reports < L.max_reports) {
      L.reports[L.n_reports++] = {kind, ins, ins2, cta, thread, cta2, thread2, size, address, 1};
    }
  }

  // The launch ends here.
  uint8_t* fault(int kind, int ins, int thread, uint64_t address, int size) {
    report(kind, ins, thread, address, size);
    fatal = true;
    return nullptr;
  }

  // ---- registers ----

  In in(int operand) const {
    if (operand >= kConst) return {L.consts + (operand - kConst), 0};
    return {registers.data() + size_t(operand) * T, 1};
  }
  uint64_t* out(int operand) { return operand < 0 ? sink.data() : registers.data() + size_t(operand) * T; }

  // ---- races ----

  uint32_t who(int t) const { return static_cast<uint32_t>(cta) * 1024u + t + 1; }
  uint32_t now(int t) const { return epoch << 12 | (warp_epoch[t / 32] & 0xfff); }

  // Whether nothing orders an earlier access before one of thread t now.
  bool concurrent(const Touch& before, int t) const {
    if (before.who == 0 || before.who == who(t)) return false;
    const uint32_t block = (before.who - 1) / 1024, thread = (before.who - 1) % 1024;
    if (block != static_cast<uint32_t>(cta)) return true;
    if (before.epoch >> 12 != epoch) return false;
    return thread / 32 != static_cast<uint32_t>(t) / 32 || (before.epoch & 0xfff) == (warp_epoch[t / 32] & 0xfff);
  }

  void race(int kind, const Touch& with, int t, int ins, uint64_t address, int size) {
    report(kind, ins, t, address, size, with.ins, (with.who - 1) / 1024, (with.who - 1) % 1024);
  }

  void touched(Cell* cell, int size, bool write, bool atomic, int t, int ins, uint64_t address, const uint8_t* old) {
    const Touch touch{who(t), now(t), ins};
    for (int i = 0; i < size; ++i) {
      Cell& c = cell[i];
      // Two writes of one value are no race that anyone could notice: replicated layouts do that.
      const bool same = write && !atomic && incoming != nullptr && incoming[i] == old[i];
      if (!same && !(atomic && c.atomic) && concurrent(c.write, t)) {
        race(!write ? kRaceWR : c.write.ins == ins ? kSameInsWW : kRaceWW, c.write, t, ins, address + i, size);
      }
      if (write) {
        if (concurrent(c.read, t)) race(kRaceRW, c.read, t, ins, address + i, size);
        if (concurrent(c.other_read, t)) race(kRaceRW, c.other_read, t, ins, address + i, size);
        c.write = touch, c.atomic = atomic;
      } else {
        (c.read.who == 0 || c.read.who == touch.who ? c.read : c.other_read) = touch;
      }
    }
  }

  // ---- memory: the host's address for an access, or null after a fault ----

  uint8_t* global(uint64_t address, int size, bool write, bool atomic, int t, int ins) {
    auto holds = [&](int a) { return a >= 0 && a < L.n_alloc && address >= L.lo[a] && address + size <= L.hi[a]; };
    if (address % size) return fault(kMisaligned, ins, t, address, size);
    int a = last_allocation;
    if (!holds(a)) {
      a = static_cast<int>(std::upper_bound(L.lo, L.lo + L.n_alloc, address) - L.lo) - 1;
      if (!holds(a)) return fault(kOutside, ins, t, address, size);
      last_allocation = a;
    }
    uint8_t* p = reinterpret_cast<uint8_t*>(address);
    if (L.races) {
      if (cells[a].empty()) cells[a].resize(L.hi[a] - L.lo[a]);
      touched(cells[a].data() + (address - L.lo[a]), size, write, atomic, t, ins, address, p);
    }
    return p;
  }

  uint8_t* of_block(uint64_t address, int size, bool write, bool atomic, int t, int ins) {
    address &= 0xffffffffu;
    if (address % size) return fault(kMisaligned, ins, t, address, size);
    const uint64_t offset = address - kSharedBase;
    if (address < kSharedBase || offset + size > shared.size()) return fault(kSharedOutside, ins, t, offset, size);
    Cell* cell = shared_cells.data() + offset;
    if (write) {
      for (int i = 0; i < size; ++i) cell[i].initialised = 1;
    } else if (!std::all_of(cell, cell + size, [](const Cell& c) { return c.initialised; })) {
      report(kUninitShared, ins, t, offset, size);
    }
    if (L.races) touched(cell, size, write, atomic, t, ins, offset, shared.data() + offset);
    return shared.data() + offset;
  }

  uint8_t* memory(int space, uint64_t address, int size, bool write, bool atomic, int t, int ins) {
    if (space == S_global || space == S_generic) return global(address, size, write, atomic, t, ins);
    if (space == S_shared) return of_block(address, size, write, atomic, t, ins);
    if (space != S_param || write) return fault(kUnimplemented, ins, t, address, size);
    if (address % size) return fault(kMisaligned, ins, t, address, size);
    if (address + size > static_cast<uint64_t>(L.param_bytes)) return fault(kParamOutside, ins, t, address, size);
    return const_cast<uint8_t*>(L.params) + address;
  }
};

}  // namespace ptx
