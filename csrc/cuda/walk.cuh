// How the threads of a block walk a chunk: scalar weights up to the first 16-byte boundary that all streams share,
// then 16-byte accesses, then a scalar tail.
//
// Host and device: the tests run this source on the CPU, thread by thread. Include after criterion.inl and layout.inl,
// in the same namespace.

// ---- storage ----------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Consecutive weights of a stream, accessed 16 bytes at a time, or all at once where they are fewer bytes.
template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Pack {
  T at[width];
};

// Storage to fp32, exact, and fp32 to storage, to nearest even. A GPU converts in one instruction where the formulas of
// criterion.inl take six (bf16) or twelve (fp16), and the 16-bit update is short of instructions, not of bandwidth: 830
// against 1020 per 8 weights on sm_90. Same bits, but for a NaN's payload.
PINS_HD float load(float x) { return x; }
PINS_HD float load(BFloat16 x) { return float_of_bf16(x.bits); }
PINS_HD float load(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return float_of_fp16(x.bits);
#endif
}

PINS_HD void store(float& to, float x) { to = x; }
PINS_HD void store(BFloat16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = bf16_of(x);
#endif
}
PINS_HD void store(Float16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = fp16_of(x);
#endif
}

// With 16 random bits: bf16 rounds stochastically, other storage as above.
PINS_HD void store(float& to, float x, uint32_t) { to = x; }
PINS_HD void store(Float16& to, float x, uint32_t) { store(to, x); }
PINS_HD void store(BFloat16& to, float x, uint32_t random16) { to.bits = bf16_of(x, random16); }

template <typename T>
constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

template <typename T, int width>
PINS_HD Pack<T, width> rounded(const float (&x)[width], const uint32_t (&random)[width], int shift) {
  Pack<T, width> to;
  for (int w = 0; w < width; ++w) store(to.at[w], x[w], random[w] >> shift);
  return to;
}

// Streams come out of a table of addresses: unless told that they are global memory, nvcc accesses them as generic.
#ifdef __CUDA_ARCH__
#define PINS_ACCESS(stream) __builtin_assume(__isGlobal(stream))
#elif !defined(PINS_ACCESS)  // the tests count accesses here
#define PINS_ACCESS(stream) static_cast<void>(stream)
#endif

template <int width, typename T>
PINS_HD Pack<T, width> read(const T* stream) {
  PINS_ACCESS(stream);
  return *reinterpret_cast<const Pack<T, width>*>(stream);
}

template <typename T, int width>
PINS_HD void write(T* stream, const Pack<T, width>& values) {
  PINS_ACCESS(stream);
  *reinterpret_cast<Pack<T, width>*>(stream) = values;
}

// Bits [i, i + width) of a mask, width <= 8, in the low bits of the result; the bits above are other weights'.
template <int width>
PINS_HD uint32_t mask_bits(const uint8_t* mask, int64_t i) {
  const uint8_t* byte = mask + i / 8;
  const uint32_t shift = static_cast<uint32_t>(i) % 8;
  uint32_t bits = read<1>(byte).at[0];
  if (shift + width > 8) bits |= static_cast<uint32_t>(read<1>(byte + 1).at[0]) << 8;
  return bits >> shift;
}

// ---- global index -----------------------------------------------------------------------------------------------

// Global indices of consecutive local weights: divisions for the first, additions from there on.
class Indices {
 public:
  PINS_HD Indices(const Place& place, int64_t i) : place_(place), index_(global_index(place, i)) {
    for (int d = 3; d > 0; --d) {
      left_[d - 1] = place.local[d] - i % place.local[d];
      i /= place.local[d];
    }
  }

  PINS_HD int64_t next() {
    const int64_t index = index_++;
    int64_t stride = 1;
    for (int d = 3; d > 0; --d) {
      if (--left_[d - 1] > 0) break;
      left_[d - 1] = place_.local[d];
      index_ += (place_.full[d] - place_.local[d]) * stride;
      stride *= place_.full[d];
    }
    return index;
  }

 private:
  const Place& place_;
  int64_t index_;
  int64_t left_[3];  // how far dimensions 1, 2, 3 are from starting over
};

// ---- the walk ---------------------------------------------------------------------------------------------------

// The tables of a list operator, on the device.
struct Work {
  const int64_t* pointers;  // [lists, tensors]
  int64_t tensors;
  const Place* places;  // [tensors]
  const Chunk* chunks;  // [blocks]

  template <typename T>
  PINS_HD T* stream(int list, int64_t tensor) const {
    return reinterpret_cast<T*>(pointers[list * tensors + tensor]);
  }
};

PINS_HD int64_t weights_of(const Place& place, const Chunk& chunk) {
  const int64_t left = numel_of(place) - chunk.offset;
  return left < kChunk ? left : kChunk;
}

// Weights of type T in 16 bytes.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

template <int width, typename T>
PINS_HD bool aligned(const T* stream) {
  return reinterpret_cast<uintptr_t>(stream) % alignof(Pack<T, width>) == 0;
}

// Weights before the first 16-byte boundary.
template <typename T>
PINS_HD int64_t head_of(const T* stream) {
  return static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(stream) % 16) % 16 / sizeof(T));
}

// Visits [0, n): whole groups of `width` weights from `head` on by body.at<width>(first), the others by body.at<1>(i).
template <int width, typename Body>
PINS_HD void walk(int64_t n, int64_t head, int64_t thread, int64_t threads, const Body& body) {
  if (head > n) head = n;
  const int64_t grouped = (n - head) / width * width;
  for (int64_t i = thread * width; i < grouped; i += threads * width) body.template at<width>(head + i);
  for (int64_t i = thread; i < n - grouped; i += threads) body.template at<1>(i < head ? i : i + grouped);
}
