// The body of an ISA unit: every loop and the table of them. Included inside an anonymous namespace after the choice of
// instruction set, so that no symbol compiled for a newer CPU can serve an older one.
#include "../criterion.inl"
#include "../optimizer.inl"
#include "../layout.inl"
#include "../norm.inl"
#include "block.inl"
#include "select.inl"
#include "importance.inl"
#include "eligible.inl"
#include "quotient.inl"
#include "step.inl"
#include "boundary.inl"
#include "update.inl"
#include "sparse.inl"
#include "sparse_bytes.inl"
#include "norm.inl"
#include "stream.inl"

#define PINS_ACCUMULATE(id, name, formula) accumulate<Criterion::id>,
#define PINS_KEYS(id, name, formula) keys<Score::id>,
#define PINS_COUNT(id, name, formula) count<Score::id>,
#define PINS_INSIDE(id, name, formula) inside<Score::id>,
#define PINS_PACK(id, name, formula) pack<Score::id>,
#define PINS_ELIGIBLE(id, name, formula) eligible<Score::id>,
#define PINS_PACK_AROUND(id, name, formula) pack_around<Score::id>,
#define PINS_ADAMW(id, name, formula) masked_update<AdamW, static_cast<int>(Criterion::id)>,
#define PINS_SGD(id, name, formula) masked_update<Sgd, static_cast<int>(Criterion::id)>,

constexpr Kernels table(const char* name) {
  return Kernels{
      name,
      {PINS_CRITERIA(PINS_ACCUMULATE)},
      fold,
      {PINS_SCORES(PINS_KEYS)},
      {PINS_SCORES(PINS_COUNT)},
      {PINS_SCORES(PINS_INSIDE)},
      {PINS_SCORES(PINS_PACK)},
      {PINS_SCORES(PINS_ELIGIBLE)},
      {PINS_SCORES(PINS_PACK_AROUND)},
      {PINS_CRITERIA(PINS_ADAMW) masked_update<AdamW, kNoCriterion>},
      {PINS_CRITERIA(PINS_SGD) masked_update<Sgd, kNoCriterion>},
      apply_mask,
      sparse_loops(),
      sum_of_squares,
      stream,
  };
}
