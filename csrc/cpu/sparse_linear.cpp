// sparse_linear on the CPU: tokens through a packed matrix.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "sparse_call.h"

namespace pins_ext::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Up to this many tokens are multiplied one by one: a tile of 16 costs as much as two of them.
constexpr int64_t kOneByOne = 2;

// Products below which one thread is faster than two, and much faster where another process has the second core.
constexpr int64_t kWorthAThread = 32768;

struct Call {
  const SparseMatrix& matrix;
  const char* x;
  const float* bias;
  char* y;
  Dtype dtype;
  int values;  // of the packed matrix: 0 float32, 1 bfloat16
  int64_t tokens, in_features, out_features;

  const char* token(int64_t t) const { return x + t * in_features * element_bytes(dtype); }
  char* out(int64_t t, int64_t row) const { return y + (t * out_features + row) * element_bytes(dtype); }

  LoadTile load(int64_t first, int64_t count, float* tile) const {
    return {token(first), dtype, in_features, count, in_features, tile};
  }
  StoreTile store(int64_t first, int64_t count, int64_t chunk, const float* tile) const {
    const int64_t row = matrix.first_row(chunk);
    return {tile, out(first, row), dtype, out_features, count, matrix.rows(chunk)};
  }

  // Sums begin with the bias.
  void begin(int64_t chunk, int64_t tokens, float* sums) const {
    const int64_t row = matrix.first_row(chunk);
    const int64_t rows = bias ? matrix.rows(chunk) : 0;
    for (int64_t r = 0; r < rows; ++r) std::fill_n(sums + r * tokens, tokens, bias[row + r]);
    std::fill_n(sums + rows * tokens, (kBlockRows - rows) * tokens, 0.0f);
  }
};

// Tokens one by one; threads share the rows.
void run_tokens(const Call& call) {
  const SparseLoops& loops = kernels().sparse;
  const int64_t padded = call.matrix.blocks() * kBlockColumns;
  Scratch x(padded * call.tokens);
  for (int64_t t = 0; t < call.tokens; ++t) {
    // A tile of one token lies as the token does: converted and filled up.
    loops.load_token({call.token(t), call.dtype, call.in_features, 1, call.in_features, x.data() + t * padded});
  }
  const int64_t grain = call.matrix.chunks_with(kWorthAThread, call.tokens);
  torch::stable::parallel_for(0, call.matrix.chunks(), grain, [&](int64_t begin, int64_t end) {
    alignas(64) float y[kOneByOne][kBlockRows];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t t = 0; t < call.tokens; ++t) call.begin(chunk, 1, y[t]);
      for (int64_t k = 0; k < call.matrix.blocks(); ++k) {
        for (int64_t t = 0; t < call.tokens; ++t) {
          loops.multiply_token[call.values](call.matrix.block(chunk, k), x.data() + t * padded + k * kBlockColumns,
                                            y[t]);
        }
      }
      for (int64_t t = 0; t < call.tokens; ++t) loops.store_token(call.store(t, 1, chunk, y[t]));
    }
  });
}

// Tiles of tokens.
void run_tiles(const Call& call) {
  const SparseLoops& loops = kernels().sparse;
  const int64_t padded = call.matrix.blocks() * kBlockColumns;
  const int64_t tiles = (call.tokens + kTokens - 1) / kTokens;
  const int64_t shares = shares_of(tiles, call.matrix.chunks());
  torch::stable::parallel_for(0, tiles * shares, 1, [&](int64_t begin, int64_t end) {
    Scratch x(padded * kTokens);
    alignas(64) float y[kBlockRows * kTokens];
    int64_t loaded = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / shares, share = i % shares;
      const int64_t first = tile * kTokens;
      const int64_t count = std::min(kTokens, call.tokens - first);
      const int width = count <= kFewTokens ? 0 : 1;
      if (tile != loaded) loops.load[width](call.load(first, count, x.data()));
      loaded = tile;
      const int64_t size = width == 0 ? kFewTokens : kTokens;
      const int64_t end_chunk = (share + 1) * call.matrix.chunks() / shares;
      for (int64_t chunk = share * call.matrix.chunks() / shares; chunk < end_chunk; ++chunk) {
        call.begin(chunk, size, y);
        for (int64_t k = 0; k < call.matrix.blocks(); ++k) {
          loops.multiply[call.values][width](call.matrix.block(chunk, k), x.data() + k * kBlockColumns * size, y);
        }
        loops.store[width](call.store(first, count, chunk, y));
      }
    }
  });
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& rows,
                     const Tensor& counts, const Tensor& starts, const OptionalTensor& bias, int64_t out_features) {
  check_tensor([] { return "x"; }, x, kSparseDevice, kParamDtypes);
  PINS_CHECK(x.dim() >= 1, "x must have at least one dimension");
  PINS_CHECK(out_features >= 0, "out_features must not be negative, got ", out_features);
  const int64_t in_features = x.size(x.dim() - 1);
  check_tensor([] { return "values"; }, values, kSparseDevice, {ScalarType::Float, ScalarType::BFloat16});
  const ScalarType dtype = values.scalar_type();
  const SparseMatrix matrix(values, columns, rows, counts, starts, out_features, in_features, dtype, 1);
  if (bias.has_value()) check_shape("bias", *bias, {out_features}, ScalarType::Float, kSparseDevice);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const Call call{matrix,
                  static_cast<const char*>(x.const_data_ptr()),
                  bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                  static_cast<char*>(y.data_ptr()),
                  kernel_dtype(x),
                  dtype == ScalarType::Float ? 0 : 1,
                  y.numel() / out_features,
                  in_features,
                  out_features};
  call.tokens <= kOneByOne ? run_tokens(call) : run_tiles(call);
  return y;
}

}  // namespace
}  // namespace pins_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(pins_ext, CPU, m) { m.impl("sparse_linear", TORCH_BOX(&pins_ext::cpu::sparse_linear)); }
