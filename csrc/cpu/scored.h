// The operands of a score: what the operators of a selection read.
#pragma once

#include "work.h"

namespace pins_ext::cpu {

// The operands of a score, checked.
struct Scored {
  int kind;
  Operand a, b;
  const float* factors;  // one for each tensor, or null

  Scores at(const Run& run, const Chunk& chunk) const {
    return {run, a.at(chunk), b.at(chunk), factors ? factors[chunk.tensor] : 1.0f};
  }
  Scores at(const Work& work, const Chunk& chunk) const { return at(work.run(chunk), chunk); }
};

inline Scored check_scores(const Work& work, const Tensors& a, const Tensors& b, const std::string& score,
                           const OptionalTensor& factors) {
  const int kind = option("score", score, kScores);
  const bool states = score == "product" || score == "deviation", fisher = score == "fisher";
  check_list("a", a, work.tensors(), kCpu,
             states                ? kStateDtypes
             : score == "identity" ? kReadableDtypes
                                   : kParamDtypes);
  PINS_CHECK(factors.has_value() == fisher, "factors must be ", fisher ? "given" : "left out", " for the score '",
             score, "'");
  if (fisher) {
    check_list("b", b, work.tensors(), kCpu, kReadableDtypes);
    check_shape("factors", *factors, {static_cast<int64_t>(work.tensors())}, ScalarType::Float, kCpu);
  } else if (states) {
    check_list("b", b, work.tensors(), kCpu, kStateDtypes);
    check_same_dtype("b", b, "a", a);
  } else {
    PINS_CHECK(b.empty(), "b must be empty for the score '", score, "', got ", b.size(), " tensors");
  }
  check_numel("a", a, work.numel);
  check_numel("b", b, work.numel);
  return {kind, Operand(work, a), Operand(work, b),
          fisher ? static_cast<const float*>(factors->const_data_ptr()) : nullptr};
}

}  // namespace pins_ext::cpu
