// What a lane of a warp does with a row of a grouped matrix: its share of the products with one to four tokens, or of
// the row itself. Host and device: the tests run this source on the CPU, lane by lane. Include after criterion.inl,
// layout.inl, optimizer.inl and walk.cuh, in the same namespace.
//
// A group is eight weights of a row whose columns lie within 256 from the first of them, its base: 8 values, 8 bytes of
// columns and 2 bytes of base, so that a lane needs neither the mask's bits nor its neighbours' counts. A row's groups
// follow one another. A group that is not full ends with zeros at the first column after its base that is none of its
// own: a dense row multiplies that column by zero, too, or it is the one after the last.

constexpr int kGroupWeights = 8;
constexpr int kLanes = 32;
constexpr int kMostTokens = 4;

struct Grouped {
  const void* values;      // [groups][8]
  const uint8_t* columns;  // [groups][8]
  const uint16_t* bases;   // [groups]
  const int64_t* starts;   // [rows + 1]: first group of each row
  int64_t rows;
  int64_t columns_of_row;
};

// ---- tokens -------------------------------------------------------------------------------------------------------

struct Tokens {
  const void* x;  // [count][columns_of_row]
  void* y;        // [count][rows]
  int dtype;      // of both: 0 float32, 1 bfloat16, 2 float16
  int64_t count;  // at most the kernel's kTokens
};

template <typename T>
PINS_HD float element(const void* x, int64_t i) {
  return load(read<1>(static_cast<const T*>(x) + i).at[0]);
}

template <typename T>
PINS_HD void set_element(void* y, int64_t i, float value) {
  Pack<T, 1> rounded;
  store(rounded.at[0], value);
  write(static_cast<T*>(y) + i, rounded);
}

PINS_HD float load_as(int dtype, const void* x, int64_t i) {
  return dtype == 0 ? element<float>(x, i) : dtype == 1 ? element<BFloat16>(x, i) : element<Float16>(x, i);
}

PINS_HD void store_as(int dtype, void* y, int64_t i, float value) {
  if (dtype == 0) return set_element<float>(y, i, value);
  if (dtype == 1) return set_element<BFloat16>(y, i, value);
  set_element<Float16>(y, i, value);
}

// staged[column][token] in float32 and a column of zeros: a full row's last group ends with it.
template <int kTokens>
PINS_HD void stage(const Tokens& in, int64_t columns, float* staged, int64_t thread, int64_t threads) {
  for (int64_t c = thread; c <= columns; c += threads) {
    Pack<float, kTokens> token = {};
    for (int t = 0; t < kTokens; ++t) {
      if (c < columns && t < in.count) token.at[t] = load_as(in.dtype, in.x, t * columns + c);
    }
    *reinterpret_cast<Pack<float, kTokens>*>(staged + c * kTokens) = token;
  }
}

// Bytes of a staged column, in each of the four places of a word. A parameter of the kernel: as constants of the code
// they would be moved into registers again in each turn of its loop.
struct Strides {
  uint32_t at[4];

  explicit Strides(int tokens) {
    for (int i = 0; i < 4; ++i) at[i] = static_cast<uint32_t>(tokens * sizeof(float)) << (8 * i);
  }
};

// The staged tokens by place: an address of shared memory; on the host, bytes from the start.
template <int kTokens>
struct Staged {
  const Strides& strides;
#ifdef __CUDA_ARCH__
  uint32_t start;

  // Through a shuffle the start stays in a register; the compiler would work it out again for every group.
  PINS_HD Staged(const float* staged, const Strides& strides)
      : strides(strides), start(__shfl_sync(0xffffffffu, static_cast<uint32_t>(__cvta_generic_to_shared(staged)), 0)) {}

  PINS_HD Pack<float, kTokens> operator[](uint32_t place) const {
    return *static_cast<const Pack<float, kTokens>*>(__cvta_shared_to_generic(place));
  }
#else
  const char* memory;
  uint32_t start = 0;

  PINS_HD Staged(const float* staged, const Strides& strides)
      : strides(strides), memory(reinterpret_cast<const char*>(staged)) {}

  PINS_HD Pack<float, kTokens> operator[](uint32_t place) const {
    return *reinterpret_cast<const Pack<float, kTokens>*>(memory + place);
  }
#endif

  PINS_HD uint32_t place_of(uint32_t column) const {
    return start + column * static_cast<uint32_t>(kTokens * sizeof(float));
  }
};

// ---- groups -------------------------------------------------------------------------------------------------------

// Groups that a lane has on their way: 104 bytes. 32 warps of them are 106 KB on a multiprocessor; by its datasheet an
// H200 (4.8 TB/s, 132 multiprocessors) needs 25 KB at 700 ns.
template <typename Value>
constexpr int kFlight = sizeof(Value) == 4 ? 2 : 4;

// Eight values and their columns as they lie in memory: taken apart they would fill twelve registers more.
template <typename Value>
struct alignas(16) Values {
  uint32_t at[kGroupWeights * sizeof(Value) / 4];
};

struct alignas(8) Columns {
  uint32_t at[2];
};

PINS_HD float weight_of(const Values<float>& values, int w) { return float_of(values.at[w]); }
PINS_HD float weight_of(const Values<BFloat16>& values, int w) {
  const uint32_t two = values.at[w / 2];
  return float_of(w % 2 == 0 ? two << 16 : two & 0xffff0000u);
}
PINS_HD float weight_of(const Values<Float16>& values, int w) {
  return load(Float16{static_cast<uint16_t>(values.at[w / 2] >> (w % 2 * 16))});
}

// The place of a group's column w. A dot product of four bytes is one instruction where taking a byte out, multiplying
// and adding are three.
PINS_HD uint32_t place_of(const Columns& columns, int w, const Strides& strides, uint32_t base) {
#ifdef __CUDA_ARCH__
  return __dp4a(columns.at[w / 4], strides.at[w % 4], base);
#else
  return base + (columns.at[w / 4] >> (w % 4 * 8) & 255u) * strides.at[0];
#endif
}

// A lane's groups of a row, every 32nd. Counted up to the row's end, so that one addition moves on in all three arrays.
template <typename Value>
struct Course {
  const Values<Value>* values = nullptr;  // all three at the row's end
  const Columns* columns = nullptr;
  const uint16_t* bases = nullptr;
  int at = 0;  // the lane's next group, from the row's end: not below zero, there is none

  // Past the last row: none.
  PINS_HD Course(const Grouped& matrix, int64_t row, int lane) {
    if (row >= matrix.rows) return;
    const int64_t end = read<1>(matrix.starts + row + 1).at[0];
    at = static_cast<int>(read<1>(matrix.starts + row).at[0] - end) + lane;
    values = static_cast<const Values<Value>*>(matrix.values) + end;
    columns = reinterpret_cast<const Columns*>(matrix.columns) + end;
    bases = matrix.bases + end;
  }

  PINS_HD bool none(int f) const { return at >= -f * kLanes; }
  PINS_HD void advance() {
    at += kFlight<Value> * kLanes;
#ifdef __CUDA_ARCH__
    asm("" : "+r"(at));  // compared as it is: else the compiler keeps both and moves one over the other
#endif
  }
};

template <typename Value>
struct Flight {
  Values<Value> values[kFlight<Value>];
  Columns columns[kFlight<Value>];
  uint32_t bases[kFlight<Value>];
  bool none[kFlight<Value>];  // kept in predicates, worked out once
};

// All loads before the first use.
template <typename Value>
PINS_HD void take_off(const Course<Value>& course, Flight<Value>& flight) {
#pragma unroll
  for (int f = 0; f < kFlight<Value>; ++f) {
    flight.none[f] = course.none(f);
    if (flight.none[f]) continue;
    PINS_ACCESS(course.values);
    PINS_ACCESS(course.columns);
    flight.values[f] = (course.values + course.at)[f * kLanes];
    flight.columns[f] = (course.columns + course.at)[f * kLanes];
    flight.bases[f] = read<1>(course.bases + course.at + f * kLanes).at[0];
  }
}

template <typename Value, int kTokens>
PINS_HD void multiply(const Values<Value>& values, const Columns& columns, uint32_t base, const Staged<kTokens>& staged,
                      float (&sums)[kTokens]) {
#pragma unroll
  for (int w = 0; w < kGroupWeights; ++w) {
    const float weight = weight_of(values, w);
    const auto x = staged[place_of(columns, w, staged.strides, base)];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[t] = fused_multiply_add(weight, x.at[t], sums[t]);
  }
}

// A lane's part of a row, whose first groups are on their way. From the first group that is missing it leaves at once,
// without waiting for the other lanes.
template <typename Value, int kTokens>
PINS_HD void travel(Course<Value>& course, Flight<Value>& flight, const Staged<kTokens>& staged,
                    float (&sums)[kTokens]) {
  while (true) {
#pragma unroll
    for (int f = 0; f < kFlight<Value>; ++f) {
      if (flight.none[f]) return;
      multiply<Value, kTokens>(flight.values[f], flight.columns[f], staged.place_of(flight.bases[f]), staged, sums);
    }
    course.advance();
    take_off(course, flight);
  }
}

// A row's sums into y.
template <int kTokens>
PINS_HD void finish(const Grouped& matrix, const Tokens& tokens, const float* bias, int64_t row,
                    const float (&sums)[kTokens]) {
  const float start = bias == nullptr ? 0.0f : read<1>(bias + row).at[0];
  for (int t = 0; t < kTokens; ++t) {
    if (t < tokens.count) store_as(tokens.dtype, tokens.y, t * matrix.rows + row, sums[t] + start);
  }
}

// ---- the row itself -----------------------------------------------------------------------------------------------

template <typename Bits>
struct Zeros {
  Bits* row;

  template <int width>
  PINS_HD void at(int64_t i) const {
    write(row + i, Pack<Bits, width>{});
  }
};

// weight[row] = 0, as bits; all lanes of the row before any of them scatters.
template <typename Bits>
PINS_HD void clear(const Grouped& matrix, Bits* weight, int64_t row, int lane) {
  Bits* at = weight + row * matrix.columns_of_row;
  walk<kWidth<Bits>>(matrix.columns_of_row, head_of(at), lane, kLanes, Zeros<Bits>{at});
}

template <typename Bits>
PINS_HD void scatter(const Grouped& matrix, Bits* weight, int64_t row, int lane) {
  Bits* at = weight + row * matrix.columns_of_row;
  const int64_t end = read<1>(matrix.starts + row + 1).at[0];
  for (int64_t g = read<1>(matrix.starts + row).at[0] + lane; g < end; g += kLanes) {
    const auto values = read<kGroupWeights>(static_cast<const Bits*>(matrix.values) + g * kGroupWeights);
    const auto columns = read<kGroupWeights>(matrix.columns + g * kGroupWeights);
    const int64_t base = read<1>(matrix.bases + g).at[0];
    for (int w = 0; w < kGroupWeights; ++w) {
      if (values.at[w] != 0) write(at + base + columns.at[w], Pack<Bits, 1>{values.at[w]});
    }
  }
}
