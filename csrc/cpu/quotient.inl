// Division by what many numbers are divided by, to the last bit, without the unit that divides: it takes six cycles for
// 16 numbers, and with the root sets the pace of a step where memory does not.

struct Divisor {
  float value, reciprocal;
  PINS_HD explicit Divisor(float x) : value(x), reciprocal(1.0f / x) {}
};

// x / by (Markstein 1990; Brisebarre, Muller & Raina 2004): a quotient from the rounded reciprocal is corrected by its
// own remainder, which is exact where nothing underflows or overflows: of x = 0 and of 2^-75 <= x <= 2^64, by `by` from
// 2^-50 to 1.
PINS_HD float quotient(float x, const Divisor& by) {
  const float near = x * by.reciprocal;
  const float remainder = fused_multiply_add(-near, by.value, x);
  return fused_multiply_add(remainder, by.reciprocal, near);
}
