"""The maths of one weight in Triton: csrc/criterion.inl function by function, same names, same order of operations.

Launch every kernel with `enable_fp_fusion=False`. bfloat16 crosses memory as uint16 and is converted and rounded with
integer operations on the fp32 bits, which the interpreter, the compiler and C++ do alike. The header's rounding to
nearest is missing here: it serves the masked update, which is not Triton's.
"""

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def abs_of(x):
    return float_of(bits_of(x) & 0x7FFFFFFF)


@triton.jit
def negative_of(x):
    """-x. Triton's own unary minus is 0 - x, which loses the sign of zero."""
    return float_of(bits_of(x) ^ 0x80000000)


# ---- instant score c_t ---------------------------------------------------------------------------


@triton.jit
def score_pins_signed(p, g, lr):
    """c = lr g^2 - p g, evaluated ((-p) g) + ((lr g) g). Ren & Zhu 2023, eq. of the 0-1 integer linear program."""
    return (negative_of(p) * g) + ((lr * g) * g)


@triton.jit
def score_pins(p, g, lr):
    return abs_of(score_pins_signed(p, g, lr))


@triton.jit
def score_platon(p, g):
    """|p g|: PLATON with p the weight before the step; "pins-update" with p the weight the optimizer produced."""
    return abs_of(p * g)


@triton.jit
def score_movement(p, g):
    """-p g: movement pruning (Sanh et al. 2020); accumulated, not averaged."""
    return negative_of(p) * g


@triton.jit
def instant_score(p, p_next, g, lr, CRITERION: tl.constexpr):
    """`p` is the weight before the step, `p_next` the one after it. "precomputed": g already is c."""
    if CRITERION == "pins":
        return score_pins(p, g, lr)
    elif CRITERION == "pins-signed":
        return score_pins_signed(p, g, lr)
    elif CRITERION == "pins-update":
        return score_platon(p_next, g)
    elif CRITERION == "platon":
        return score_platon(p, g)
    elif CRITERION == "movement":
        return score_movement(p, g)
    else:
        tl.static_assert(CRITERION == "precomputed")
        return g


@triton.jit
def score_moments(p, exp_avg, exp_avg_sq, lr, factor, factor_sq):
    """|lr v̂ - p m̂|: pins with AdamW's moments; the factors correct their bias."""
    return abs_of((negative_of(p) * (exp_avg * factor)) + (lr * (exp_avg_sq * factor_sq)))


# ---- window and averages -------------------------------------------------------------------------


@triton.jit
def window_mean(ipt, c, n):
    """Mean over the gradients accepted in this window; n counts those before this one."""
    return tl.where(n == 0.0, c, tl.div_rn((ipt * n) + c, n + 1.0))


@triton.jit
def next_ipt(ipt, c, n, CRITERION: tl.constexpr):
    """Movement sums, the rest averages."""
    if CRITERION == "movement":
        return ipt + c
    else:
        return window_mean(ipt, c, n)


@triton.jit
def smooth_ipt(exp_avg_ipt, ipt, beta1, one_minus_beta1):
    """exp_avg_ipt = b1 exp_avg_ipt + (1 - b1) ipt. Both factors are rounded once, on the host, from double."""
    return (beta1 * exp_avg_ipt) + (one_minus_beta1 * ipt)


@triton.jit
def smooth_unc(exp_avg_unc, ipt, exp_avg_ipt, beta2, one_minus_beta2):
    """exp_avg_unc = b2 exp_avg_unc + (1 - b2) |ipt - exp_avg_ipt|, with the new exp_avg_ipt not yet rounded."""
    return (beta2 * exp_avg_unc) + (one_minus_beta2 * abs_of(ipt - exp_avg_ipt))


# ---- score and its order -------------------------------------------------------------------------


@triton.jit
def score_of(a, b, factor, SCORE: tl.constexpr):
    """product: a b | identity: a | deviation: a |b - a| | magnitude: |a| | fisher: a² b factor."""
    if SCORE == "product":
        return a * b
    elif SCORE == "identity":
        return a
    elif SCORE == "deviation":
        return a * abs_of(b - a)
    elif SCORE == "fisher":
        return (a * a) * (b * factor)
    else:
        tl.static_assert(SCORE == "magnitude")
        return abs_of(a)


@triton.jit
def order_key(score):
    """Order-preserving key, uint32: fp32 order, -0 == +0, every NaN highest."""
    bits = bits_of(score + 0.0)
    key = bits ^ ((bits.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True) | 0x80000000)
    return tl.where(score != score, 0xFFFFFFFF, key)


@triton.jit
def eligible_score(score, best):
    """The score by which a weight of a group N:M competes: NaN for the N best, which no cutoff reaches.

    So that no other is, NaN counts as infinity, and infinity as the largest number.
    """
    bits = bits_of(score)
    bits = tl.where(bits == 0x7F800000, 0x7F7FFFFF, bits)
    bits = tl.where(score != score, 0x7F800000, bits)
    return float_of(tl.where(best, 0x7FC00000, bits).to(tl.uint32))


# ---- 16-bit storage ------------------------------------------------------------------------------


@triton.jit
def float_of_bf16(x):
    return float_of(x.to(tl.uint32) << 16)


@triton.jit
def bf16_of(x, random16):
    """Stochastic rounding to bfloat16 bits: add 16 random bits below the kept ones, truncate. NaN becomes 0x7fc0."""
    return (tl.where(x != x, 0x7FC00000, bits_of(x) + (random16 & 0xFFFF)) >> 16).to(tl.uint16)


@triton.jit
def float_of_fp16(x):
    """Exact in hardware and in the interpreter, subnormals included."""
    return x.to(tl.float16, bitcast=True).to(tl.float32)


# ---- 8-bit storage -------------------------------------------------------------------------------

LEVELS = tl.constexpr(254)
NAN_CODE = tl.constexpr(255)
SIGNED_LEVELS = tl.constexpr(127)
SIGNED_NAN_CODE = tl.constexpr(-128)


@triton.jit
def bf16_above(x):
    """x >= 0 and finite to bfloat16 bits, uint32, away from zero, but never to infinity."""
    return tl.minimum((bits_of(x) + 0xFFFF) >> 16, 0x7F7F)


@triton.jit
def level_of(magnitude, scale, levels: tl.constexpr, part):
    """`part`: .5 rounds to nearest, a random part of 1 stochastically."""
    q = tl.div_rn(magnitude, tl.where(scale > 0.0, scale, 1.0))
    level = (tl.div_rn(q * (2.0 * levels), 1.0 + q) + part).to(tl.int32)
    return tl.minimum(level, levels)


@triton.jit
def code_of(x, root, scale, part, VANISHES: tl.constexpr):
    """VANISHES: what is above zero may become zero, as in averages."""
    level = level_of(root, scale, LEVELS, part)
    return level if VANISHES else tl.where((level == 0) & (x > 0.0), 1, level)


@triton.jit
def signed_code_of(x, magnitude, scale, part):
    level = level_of(magnitude, scale, SIGNED_LEVELS, part)
    return tl.where(x < 0.0, 0 - level, level)


@triton.jit
def float_of_code(code, scale):
    root = tl.div_rn(code.to(tl.float32), ((0 - code) + 2 * LEVELS).to(tl.float32)) * scale
    return tl.where(code == NAN_CODE, float_of(tl.full(code.shape, 0x7FC00000, tl.uint32)), root * root)


@triton.jit
def float_of_signed_code(code, scale):
    level = tl.where(code < 0, 0 - code, code)
    x = tl.div_rn(code.to(tl.float32), ((0 - level) + 2 * SIGNED_LEVELS).to(tl.float32)) * scale
    return tl.where(code == SIGNED_NAN_CODE, float_of(tl.full(code.shape, 0x7FC00000, tl.uint32)), x)


@triton.jit
def random_bits(global_index, key0, key1):
    """32 random bits of one weight at one step, uint32: a keyed hash of its int64 index (C. Wellons' lowbias32)."""
    x = global_index.to(tl.uint32) ^ (key0 + (global_index >> 32).to(tl.uint32) * 0x9E3779B9)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x + key1
    x = x * 0x846CA68B
    return x ^ (x >> 16)
