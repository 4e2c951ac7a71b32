// What the list operators ask of an instruction set: one chunk of one tensor at a time, plain pointers, no torch.
//
// isa_default.cpp, isa_avx2.cpp and isa_avx512.cpp compile the same loops ({importance,select,update,norm}.inl) and
// each export one table; dispatch.cpp chooses among them once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../criteria.h"
#include "sparse.h"

namespace pins_ext::cpu {

// code8, signed8: see criterion.inl.
enum class Dtype : int { float32, bfloat16, float16, code8, signed8 };

// One operand of a chunk, at the chunk's first weight. No data: the operand is not wanted.
struct Span {
  void* data = nullptr;  // of 8-bit storage: the group of the first weight
  Dtype dtype = Dtype::float32;
  int64_t columns = 0, column = 0;  // of 8-bit storage: of a row, and that of the first weight
};

// The weights of a chunk: `count` from local index `offset` on of the tensor with this row of places.
struct Run {
  const int64_t* place;
  int64_t offset;
  int64_t count;
  int64_t columns = 0;  // of a row, where blocks must hold whole groups of 8-bit storage
};

struct Rounding {
  uint32_t key0 = 0;
  uint32_t key1 = 0;
};

// How a stored gradient becomes the one that is used: g / scale * clip.
struct Gradient {
  float scale = 1.0f;
  float clip = 1.0f;
};

struct Accumulate {
  Run run;
  Span ipt, params, grads;
  Gradient gradient;
  float lr, accepted;
  Rounding rounding;
};

struct Bracket {
  uint32_t lo, hi;
  int shift;
};

// Keys counted against a bracket: those below it, and a histogram of those inside.
struct Tally {
  int64_t below;
  uint32_t* bins;  // of less than 2^32 weights
};

// The window's score: ipt, or where that has no data, that of params and the optimizer's moments.
struct Fold {
  Run run;
  Span exp_avg_ipt, exp_avg_unc, ipt;
  Span params, exp_avg, exp_avg_sq;
  const float* factors;  // lr, and what corrects the bias of each moment
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  Rounding rounding;
  Bracket bracket;
  Tally* tally;  // of the new scores; null to count nothing
};

struct Scores {
  Run run;
  Span a, b;
  float factor = 1.0f;  // of the tensor, for the scores that have one
};

// Groups N:M. Operands and scores are at the tensor's first weight; those of a group are `stride` apart.
struct Eligible {
  Run run;
  Span a, b;
  float factor;
  float* scores;
  int64_t keep, of, stride;
};

struct Pack {
  uint8_t* mask;  // at the chunk's first weight
  uint32_t key;
  int64_t ties;  // weights of this chunk whose global index is below the tie index
};

struct PackStats {
  int64_t kept, flipped, nan;
};

// Weights of a chunk inside a bracket, one entry each; room for a whole chunk.
struct Inside {
  uint32_t* keys;
  uint16_t* places;
  uint8_t* kept;
};

// A window's boundary in an optimizer's pass: masks are chosen by the averages before it, and the window's mean, which
// then stays out of memory, is folded after it.
struct Boundary {
  const Bracket* around;  // a few weights around the threshold; null: the masks stay
  PackStats stats;
  Inside found;
  int64_t size;  // of found
  bool folds;
  Fold fold;  // without its ipt
};

// AdamW: first = exp_avg, second = exp_avg_sq. SGD: first = momentum_buffer.
struct Update {
  Run run;
  Span params, grads, first, second, ipt, shadow;
  uint8_t* mask;       // of the whole tensor, or null
  const float* hyper;  // the tensor's row
  Gradient gradient;
  float accepted;
  bool clear_state;
  Rounding rounding;
  Boundary* boundary;  // or null; not of 8-bit storage
};

struct ApplyMask {
  Span params;
  int64_t count;
  const uint8_t* mask;
};

// Tensors of one size, those that are written first.
struct Streams {
  static constexpr int kMost = 16;
  char* data[kMost];
  int64_t itemsize[kMost];
  int size, written;
};

#define PINS_ONE(id, name, formula) +1
constexpr int kCriterionCount = PINS_CRITERIA(PINS_ONE);
constexpr int kScoreCount = PINS_SCORES(PINS_ONE);
#undef PINS_ONE
constexpr int kNoCriterion = kCriterionCount;  // an update without importance

struct Kernels {
  const char* name;
  void (*accumulate[kCriterionCount])(const Accumulate&);
  void (*fold)(const Fold&);
  void (*keys[kScoreCount])(const Scores&, uint32_t* keys);
  void (*count[kScoreCount])(const Scores&, const Bracket&, Tally&);
  int64_t (*inside[kScoreCount])(const Scores&, const Bracket&, uint32_t* keys, uint16_t* places, int64_t& below);
  void (*pack[kScoreCount])(const Scores&, const Pack&, PackStats&);
  int64_t (*eligible[kScoreCount])(const Eligible&);
  int64_t (*pack_around[kScoreCount])(const Scores&, const Bracket&, uint8_t* mask, PackStats&, Inside&);
  void (*masked_adamw[kCriterionCount + 1])(const Update&);
  void (*masked_sgd[kCriterionCount + 1])(const Update&);
  void (*apply_mask)(const ApplyMask&);
  SparseLoops sparse;
  double (*sum_of_squares)(const Span&, int64_t count);
  uint32_t (*stream)(const Streams&, int64_t first, int64_t count, uint32_t nothing);
};

extern const Kernels default_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

// The table in use: the widest this CPU has, or what PINS_EXT_CPU_CAPABILITY names. Raises std::runtime_error when it
// names one that does not exist or that this CPU lacks.
const Kernels& kernels();

}  // namespace pins_ext::cpu
