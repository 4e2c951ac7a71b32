// The body of an ISA unit: every loop and the table of them. Included inside an anonymous namespace after the choice of
// instruction set, so that no symbol compiled for a newer CPU can serve an older one.
#include "../criterion.inl"
#include "../optimizer.inl"
#include "../layout.inl"
#include "../norm.inl"
#include "block.inl"
#include "importance.inl"
#include "select.inl"
#include "update.inl"
#include "sparse.inl"
#include "norm.inl"

constexpr Kernels table(const char* name) {
  return Kernels{
      name,
      {accumulate<Criterion::pins>, accumulate<Criterion::pins_signed>, accumulate<Criterion::pins_update>,
       accumulate<Criterion::platon>, accumulate<Criterion::movement>, accumulate<Criterion::precomputed>},
      fold,
      {keys<Score::product>, keys<Score::identity>, keys<Score::deviation>, keys<Score::magnitude>},
      {count<Score::product>, count<Score::identity>, count<Score::deviation>, count<Score::magnitude>},
      {pack<Score::product>, pack<Score::identity>, pack<Score::deviation>, pack<Score::magnitude>},
      {masked_update<AdamW, 0>, masked_update<AdamW, 1>, masked_update<AdamW, 2>, masked_update<AdamW, 3>,
       masked_update<AdamW, 4>, masked_update<AdamW, 5>, masked_update<AdamW, kNoCriterion>},
      {masked_update<Sgd, 0>, masked_update<Sgd, 1>, masked_update<Sgd, 2>, masked_update<Sgd, 3>,
       masked_update<Sgd, 4>, masked_update<Sgd, 5>, masked_update<Sgd, kNoCriterion>},
      apply_mask,
      sparse_loops(),
      sum_of_squares,
  };
}
