// The maths of one weight, in fp32: criterion, smoothing, score, order, stochastic rounding.
//
// Every kernel in every language computes these formulas and no others: csrc/cpu and csrc/cuda include this file,
// triton_kernels/criterion.py mirrors it function by function, pins_ext/reference.py is the readable truth.
//
// Compile with contraction off (-ffp-contract=off, --fmad=false): one rounding per operation, written order.
// No includes here: ISA units include this file inside an anonymous namespace, after the standard headers
// (<cstdint>), so that no weak symbol compiled for a newer CPU escapes.
#ifndef PINS_HD
#ifdef __CUDACC__
#define PINS_HD __host__ __device__ __forceinline__
#else
#define PINS_HD inline __attribute__((always_inline))
#endif
#endif

// The lists are in criteria.h, which is included before this file, outside of any namespace.
#define PINS_ENUMERATOR(id, name, formula) id,
enum class Criterion : int { PINS_CRITERIA(PINS_ENUMERATOR) };
enum class Score : int { PINS_SCORES(PINS_ENUMERATOR) };
#undef PINS_ENUMERATOR

PINS_HD uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

PINS_HD float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

PINS_HD float abs_of(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

// ---- instant score c_t ------------------------------------------------------------------------------------------

// c = lr g^2 - p g, evaluated ((-p) g) + ((lr g) g). Ren & Zhu 2023, eq. of the 0-1 integer linear program.
PINS_HD float score_pins_signed(float p, float g, float lr) { return ((-p) * g) + ((lr * g) * g); }

PINS_HD float score_pins(float p, float g, float lr) { return abs_of(score_pins_signed(p, g, lr)); }

// |p g|: PLATON with p the weight before the step; `pins_update` with p the weight the optimizer produced.
PINS_HD float score_platon(float p, float g) { return abs_of(p * g); }

// -p g: movement pruning (Sanh et al. 2020); accumulated, not averaged.
PINS_HD float score_movement(float p, float g) { return (-p) * g; }

template <Criterion criterion>
PINS_HD float instant_score(float p, float p_next, float g, float lr) {
#define PINS_FORMULA(id, name, formula) \
  if (criterion == Criterion::id) return formula;
  PINS_CRITERIA(PINS_FORMULA)
#undef PINS_FORMULA
  return 0.0f;
}

// |lr v̂ - p m̂|: pins with AdamW's moments for the gradient and its square. The factors correct their bias: 1 / (1 -
// beta^t).
PINS_HD float score_moments(float p, float exp_avg, float exp_avg_sq, float lr, float factor, float factor_sq) {
  return abs_of(((-p) * (exp_avg * factor)) + (lr * (exp_avg_sq * factor_sq)));
}

// ---- window and averages ----------------------------------------------------------------------------------------

// Mean over the gradients accepted in this window; n counts those before this one.
PINS_HD float window_mean(float ipt, float c, float n) { return n == 0.0f ? c : ((ipt * n) + c) / (n + 1.0f); }

// Movement sums, the rest averages.
template <Criterion criterion>
PINS_HD float next_ipt(float ipt, float c, float n) {
  return criterion == Criterion::movement ? ipt + c : window_mean(ipt, c, n);
}

// exp_avg_ipt = b1 exp_avg_ipt + (1 - b1) ipt. Both factors are rounded once, on the host, from double.
PINS_HD float smooth_ipt(float exp_avg_ipt, float ipt, float beta1, float one_minus_beta1) {
  return (beta1 * exp_avg_ipt) + (one_minus_beta1 * ipt);
}

// exp_avg_unc = b2 exp_avg_unc + (1 - b2) |ipt - exp_avg_ipt|, with the new exp_avg_ipt before it is rounded for
// storage.
PINS_HD float smooth_unc(float exp_avg_unc, float ipt, float exp_avg_ipt, float beta2, float one_minus_beta2) {
  return (beta2 * exp_avg_unc) + (one_minus_beta2 * abs_of(ipt - exp_avg_ipt));
}

// ---- score and its order ----------------------------------------------------------------------------------------

template <Score score>
PINS_HD float score_of(float a, float b, float factor) {
#define PINS_FORMULA(id, name, formula) \
  if (score == Score::id) return formula;
  PINS_SCORES(PINS_FORMULA)
#undef PINS_FORMULA
  return 0.0f;
}

// Order-preserving key: fp32 order, -0 == +0, every NaN highest.
PINS_HD uint32_t order_key(float score) {
  uint32_t bits = bits_of(score + 0.0f);
  uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return score != score ? 0xffffffffu : key;
}

// The score by which a weight of a group N:M competes. The N best are NaN, which no cutoff reaches; so that no other
// is, NaN counts as infinity and infinity as the largest number.
PINS_HD float eligible_score(float score, bool best) {
  const float finite = score > 0x1.fffffep127f ? 0x1.fffffep127f : score;
  return float_of(best ? 0x7fc00000u : score != score ? 0x7f800000u : bits_of(finite));
}

// ---- 16-bit storage ---------------------------------------------------------------------------------------------

PINS_HD float float_of_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// Round to nearest, ties to even; NaN becomes the quiet NaN 0x7fc0.
PINS_HD uint16_t bf16_of(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// Stochastic rounding: add 16 random bits below the kept ones, truncate. Exact values and infinities never move.
PINS_HD uint16_t bf16_of(float x, uint32_t random16) {
  uint32_t bits = bits_of(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + (random16 & 0xffffu)) >> 16);
}

// Exact: shift the 15 low bits into place and rescale by 2^112, which also normalises fp16 subnormals.
PINS_HD float float_of_fp16(uint16_t x) {
  uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
  float scaled = float_of(magnitude) * float_of(0x77800000u);
  uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits_of(scaled);
  return float_of(bits | (static_cast<uint32_t>(x & 0x8000u) << 16));
}

// Round to nearest, ties to even, subnormals and overflow included; NaN becomes 0x7e00 with its sign.
PINS_HD uint16_t fp16_of(float x) {
  uint32_t bits = bits_of(x);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the subnormal's last bit (2^-24) with fp32's last bit at exponent -1.
  uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | sign);
}

// ---- 8-bit storage ----------------------------------------------------------------------------------------------

// A byte for each weight and, for every 32 of them, a scale in bf16, no less than the largest magnitude; the square
// root of a state that is never negative, the first moment itself. With q = magnitude / scale the byte is 2 q / (1 + q)
// (a softsign) of kLevels, or of kSignedLevels with the sign: small values keep the finer steps. What is above zero in
// a state that is never negative stays above zero but in averages: a second moment of 0 would make any step endless.
// pins_ext/reference.py encode.
constexpr int kLevels = 254, kNanCode = 255;
constexpr int kSignedLevels = 127, kSignedNanCode = -128;

// x >= 0 and finite to bf16, away from zero, but never to infinity.
PINS_HD uint16_t bf16_above(float x) {
  uint32_t up = (bits_of(x) + 0xffffu) >> 16;
  return static_cast<uint16_t>(up < 0x7f7fu ? up : 0x7f7fu);
}

// `part`: what is added before the fraction is cut off: .5 rounds to nearest, a random part of 1 stochastically. The
// averages of a fold have one random part in common: key0's low half the mean, its high half the uncertainty.
PINS_HD int level_of(float magnitude, float scale, int levels, float part) {
  float q = magnitude / (scale > 0.0f ? scale : 1.0f);
  int level = static_cast<int>(((static_cast<float>(2 * levels) * q) / (1.0f + q)) + part);
  return level < levels ? level : levels;
}

// x is finite and not negative. `vanishes`: what is above zero may become zero, as in averages.
PINS_HD int code_of(float x, float root, float scale, float part, bool vanishes = false) {
  int level = level_of(root, scale, kLevels, part);
  return level == 0 && x > 0.0f && !vanishes ? 1 : level;
}

PINS_HD int signed_code_of(float x, float magnitude, float scale, float part) {
  int level = level_of(magnitude, scale, kSignedLevels, part);
  return x < 0.0f ? -level : level;
}

PINS_HD float float_of_code(int code, float scale) {
  float root = (static_cast<float>(code) / static_cast<float>(2 * kLevels - code)) * scale;
  return code == kNanCode ? float_of(0x7fc00000u) : root * root;
}

PINS_HD float float_of_signed_code(int code, float scale) {
  int level = code < 0 ? -code : code;
  float x = (static_cast<float>(code) / static_cast<float>(2 * kSignedLevels - level)) * scale;
  return code == kSignedNanCode ? float_of(0x7fc00000u) : x;
}

// 32 random bits of one weight at one step: a keyed integer hash of the global index (two multiply-xorshift rounds,
// constants of C. Wellons' lowbias32). key0, key1 come from (seed, step, stream): pins_ext/reference.py rounding_key.
// Low half rounds ipt or exp_avg_ipt, high half rounds exp_avg_unc or, in an optimizer's pass, weights; its moments
// take the bits of the two keys exchanged. The index comes in two words, so that a run of
// weights with the same high word is hashed in 32 bits.
PINS_HD uint32_t random_bits(uint32_t high, uint32_t low, uint32_t key0, uint32_t key1) {
  uint32_t x = low ^ (key0 + high * 0x9e3779b9u);
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x += key1;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

PINS_HD uint32_t random_bits(uint64_t global_index, uint32_t key0, uint32_t key1) {
  return random_bits(static_cast<uint32_t>(global_index >> 32), static_cast<uint32_t>(global_index), key0, key1);
}
