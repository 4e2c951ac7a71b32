// Every criterion and every kind of score, once: enumerator, the name that operators take, formula. Macros only, so
// that the maths (criterion.inl), the checks (checks.h) and each table of kernels expand the same list.
// pins_ext/criteria.py says of each what else a pruner must know.
#pragma once

// The instant score of one weight: `p` is the weight before the step, `p_next` the one after it (before masking), g the
// gradient, lr the learning rate. `precomputed`: g already is the score.
#define PINS_CRITERIA(X)                                     \
  X(pins, "pins", score_pins(p, g, lr))                      \
  X(pins_signed, "pins-signed", score_pins_signed(p, g, lr)) \
  X(pins_update, "pins-update", score_platon(p_next, g))     \
  X(platon, "platon", score_platon(p, g))                    \
  X(movement, "movement", score_movement(p, g))              \
  X(precomputed, "precomputed", g)

// What the selection orders. product: a = exp_avg_ipt, b = exp_avg_unc; deviation: b = ipt. fisher: a = p, b =
// exp_avg_sq and a factor for each tensor, 1 / (1 - beta2^t): optimal brain damage (LeCun et al. 1989) with AdamW's
// second moment for the diagonal of the empirical Fisher information.
#define PINS_SCORES(X)                           \
  X(product, "product", (a * b))                 \
  X(identity, "identity", a)                     \
  X(deviation, "deviation", (a * abs_of(b - a))) \
  X(magnitude, "magnitude", abs_of(a))           \
  X(fisher, "fisher", ((a * a) * (b * factor)))
