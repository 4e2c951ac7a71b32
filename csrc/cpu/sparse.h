// A pruned weight matrix packed for multiplication, and what its loops ask of an instruction set.
//
// The matrix is cut into blocks of at most 256 rows × 256 columns, so that a row or a column inside one is a byte.
// Within a block the rows are sorted by their number of weights and taken 16 at a time: a slice. A slice of `count`
// steps holds count × 16 groups of kGroup weights, step by step: the j-th groups of its 16 rows lie side by side. Rows
// with fewer weights are filled up with zeros at column 0. kGroup is 1 for float32, 2 for bfloat16, 4 for int8: as many
// weights as one multiply-add takes.
//
// Sources: sorted, sliced ELLPACK as in Kreutzer et al., A unified sparse matrix data format (SELL-C-σ), SIAM J. Sci.
// Comput. 36(5), 2014; block and slice sizes by measurement (bench/bench_inference.py).
#pragma once

#include <cstdint>

namespace pins_ext::cpu {

enum class Dtype : int;  // kernels.h

constexpr int64_t kSliceRows = 16;
constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockColumns = 256;

// Tokens that are multiplied at once. 32 float32 tokens of a block's columns are 32 KB: they stay in the L1 cache.
constexpr int64_t kTokens = 32;
constexpr int64_t kFewTokens = 16;
constexpr int kTokenTiles = 2;

// The slices of one block.
struct SparseBlock {
  const void* values;      // [steps][16][kGroup]
  const uint8_t* columns;  // [steps][16][kGroup]
  const uint8_t* rows;     // [slices][16]
  const int16_t* counts;   // [slices]: steps of each
  int64_t slices;
};

// Rows of a matrix as a tile: x[token][column] -> tile[column][token], in float32; what is not there is zero.
struct LoadTile {
  const void* x;
  Dtype dtype;
  int64_t stride;   // of a token in x, in elements
  int64_t tokens;   // valid ones, at most the tile's
  int64_t columns;  // valid ones; the tile is filled up to whole blocks
  float* tile;
};

// The way back: out[token][row] = tile[row][token].
struct StoreTile {
  const float* tile;
  void* out;  // at the first row
  Dtype dtype;
  int64_t stride;
  int64_t tokens;
  int64_t rows;
};

// int8: tokens that are multiplied at once. 64 bytes of a column are one vector.
constexpr int64_t kByteTokens = 64;

// Rows of a matrix as bytes, rounded for each token to 255 steps between its least and largest value, zero included:
// x ≈ (byte - zero) * scale. A token that holds NaN or an infinity gets the scale NaN.
struct LoadBytes {
  const void* x;
  Dtype dtype;
  int64_t stride;
  int64_t tokens;   // valid ones, at most kByteTokens
  int64_t columns;  // valid ones
  float* floats;    // scratch of `columns` floats, filled up to whole blocks
  uint8_t* bytes;   // scratch [kByteTokens][columns in whole blocks]
  uint8_t* tile;    // [columns in whole blocks][kByteTokens]; null where the bytes by token are all that is wanted
  float* scales;    // [kByteTokens]
  int32_t* zeros;   // [kByteTokens]
};

// out[token][row] = (sums[row][token] - zero of the token × sum of the row's codes) × both scales + bias.
struct StoreSums {
  const int32_t* sums;  // [rows][kByteTokens], tokens in the order of kPlaceOfToken; or [rows] for one token
  const float* token_scales;
  const int32_t* zeros;
  const float* row_scales;  // from here on at the first row
  const int32_t* row_sums;
  const float* bias;  // or null
  void* out;
  Dtype dtype;
  int64_t stride;
  int64_t tokens;
  int64_t rows;
};

// The sums of 64 tokens lie as the byte shuffles of AVX-512 leave them: by quarters of each 128 bits.
constexpr int64_t place_of_token(int64_t token) { return token % 16 / 4 * 16 + token / 16 * 4 + token % 4; }

struct SparseLoops {
  // By tile: kFewTokens, kTokens.
  void (*load[kTokenTiles])(const LoadTile&);
  void (*store[kTokenTiles])(const StoreTile&);
  // y[row][token] += weights × x[column][token], both aligned to 64 bytes. By values: float32, bfloat16.
  void (*multiply[2][kTokenTiles])(const SparseBlock&, const float* x, float* y);
  // A tile of one token lies as the token does: converted, and filled up or cut.
  void (*load_token)(const LoadTile&);
  void (*store_token)(const StoreTile&);
  // y[row] += weights × x[column], of one token; x and y have 256 elements.
  void (*multiply_token[2])(const SparseBlock&, const float* x, float* y);

  void (*load_bytes)(const LoadBytes&);
  void (*store_sums)(const StoreSums&);
  void (*store_token_sums)(const StoreSums&);
  // The same over int8 codes and bytes, exact in int32. By instructions: plain, VNNI (null where the unit has none).
  void (*multiply_bytes[2])(const SparseBlock&, const uint8_t* x, int32_t* y);
  void (*multiply_token_bytes[2])(const SparseBlock&, const uint8_t* x, int32_t* y);
};

}  // namespace pins_ext::cpu
