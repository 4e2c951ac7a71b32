// sparse_linear_int8 on the CPU: activations rounded to bytes, exact integer sums, scaled back.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "sparse_call.h"

namespace pins_ext::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Up to this many tokens are multiplied one by one.
constexpr int64_t kOneByOneBytes = 4;

// Products below which one thread is faster than two.
constexpr int64_t kWorthAThread = 131072;
// Sums of this many products of a code and a byte fit 31 bits.
constexpr int64_t kMostColumns = int64_t{1} << 15;

bool has_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

struct Call {
  const SparseMatrix& matrix;
  const char* x;
  const float* scales;
  const int32_t* sums;
  const float* bias;
  char* y;
  Dtype dtype;
  int instructions;
  int64_t tokens, in_features, out_features;

  int64_t padded() const { return matrix.blocks() * kBlockColumns; }
  const char* token(int64_t t) const { return x + t * in_features * element_bytes(dtype); }
  StoreSums store(int64_t first, int64_t count, int64_t chunk, const int32_t* found, const float* token_scales,
                  const int32_t* zeros) const {
    const int64_t row = matrix.first_row(chunk);
    char* out = y + (first * out_features + row) * element_bytes(dtype);
    const float* at = bias ? bias + row : nullptr;
    return {found, token_scales, zeros,        scales + row, sums + row,        at,
            out,   dtype,        out_features, count,        matrix.rows(chunk)};
  }
};

// The bytes of up to 64 tokens, and what is needed to make them.
struct Bytes {
  explicit Bytes(int64_t padded)
      : floats(padded), rows(kByteTokens * padded / 4), tile(kByteTokens * padded / 4), padded(padded) {}

  void load(const Call& call, int64_t first, int64_t count, bool turned) {
    kernels().sparse.load_bytes({call.token(first), call.dtype, call.in_features, count, call.in_features,
                                 floats.data(), token(0), turned ? columns(0) : nullptr, scales, zeros});
  }
  uint8_t* token(int64_t t) { return reinterpret_cast<uint8_t*>(rows.data()) + t * padded; }
  uint8_t* columns(int64_t block) {
    return reinterpret_cast<uint8_t*>(tile.data()) + block * kBlockColumns * kByteTokens;
  }

  Scratch floats, rows, tile;
  int64_t padded;
  float scales[kByteTokens];
  int32_t zeros[kByteTokens];
};

void run_tokens(const Call& call) {
  const SparseLoops& loops = kernels().sparse;
  Bytes bytes(call.padded());
  bytes.load(call, 0, call.tokens, false);
  const int64_t grain = call.matrix.chunks_with(kWorthAThread, call.tokens);
  torch::stable::parallel_for(0, call.matrix.chunks(), grain, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t found[kOneByOneBytes][kBlockRows];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill_n(&found[0][0], kOneByOneBytes * kBlockRows, 0);
      for (int64_t k = 0; k < call.matrix.blocks(); ++k) {
        for (int64_t t = 0; t < call.tokens; ++t) {
          loops.multiply_token_bytes[call.instructions](call.matrix.block(chunk, k), bytes.token(t) + k * kBlockColumns,
                                                        found[t]);
        }
      }
      for (int64_t t = 0; t < call.tokens; ++t) {
        loops.store_token_sums(call.store(t, 1, chunk, found[t], bytes.scales + t, bytes.zeros + t));
      }
    }
  });
}

void run_tiles(const Call& call) {
  const SparseLoops& loops = kernels().sparse;
  const int64_t tiles = (call.tokens + kByteTokens - 1) / kByteTokens;
  const int64_t shares = shares_of(tiles, call.matrix.chunks());
  torch::stable::parallel_for(0, tiles * shares, 1, [&](int64_t begin, int64_t end) {
    Bytes bytes(call.padded());
    alignas(64) int32_t found[kBlockRows * kByteTokens];
    int64_t loaded = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / shares, share = i % shares;
      const int64_t first = tile * kByteTokens;
      const int64_t count = std::min(kByteTokens, call.tokens - first);
      if (tile != loaded) bytes.load(call, first, count, true);
      loaded = tile;
      const int64_t end_chunk = (share + 1) * call.matrix.chunks() / shares;
      for (int64_t chunk = share * call.matrix.chunks() / shares; chunk < end_chunk; ++chunk) {
        std::fill_n(found, kBlockRows * kByteTokens, 0);
        for (int64_t k = 0; k < call.matrix.blocks(); ++k) {
          loops.multiply_bytes[call.instructions](call.matrix.block(chunk, k), bytes.columns(k), found);
        }
        loops.store_sums(call.store(first, count, chunk, found, bytes.scales, bytes.zeros));
      }
    }
  });
}

Tensor sparse_linear_int8(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& rows,
                          const Tensor& counts, const Tensor& starts, const Tensor& scales, const Tensor& sums,
                          const OptionalTensor& bias, bool vnni) {
  check_tensor([] { return "x"; }, x, kSparseDevice, kParamDtypes);
  PINS_CHECK(x.dim() >= 1, "x must have at least one dimension");
  const int64_t in_features = x.size(x.dim() - 1);
  PINS_CHECK(in_features <= kMostColumns, "x must have at most ", kMostColumns, " columns, got ", in_features);
  const int64_t out_features = scales.dim() > 0 ? scales.size(0) : 0;
  check_shape("scales", scales, {out_features}, ScalarType::Float, kSparseDevice);
  check_shape("sums", sums, {out_features}, ScalarType::Int, kSparseDevice);
  const SparseMatrix matrix(values, columns, rows, counts, starts, out_features, in_features, ScalarType::Char, 4);
  if (bias.has_value()) check_shape("bias", *bias, {out_features}, ScalarType::Float, kSparseDevice);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const bool fast = vnni && kernels().sparse.multiply_bytes[1] && has_vnni();
  const Call call{matrix,
                  static_cast<const char*>(x.const_data_ptr()),
                  static_cast<const float*>(scales.const_data_ptr()),
                  static_cast<const int32_t*>(sums.const_data_ptr()),
                  bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                  static_cast<char*>(y.data_ptr()),
                  kernel_dtype(x),
                  fast ? 1 : 0,
                  y.numel() / out_features,
                  in_features,
                  out_features};
  call.tokens <= kOneByOneBytes ? run_tokens(call) : run_tiles(call);
  return y;
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) {
  m.impl("sparse_linear_int8", TORCH_BOX(&pins_ext::cpu::sparse_linear_int8));
}
