"""The optimizer's pass where a window ends and the next begins: fold, count, masks and step in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def boundary_adamw_(
    params: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    ipt: Sequence[Tensor],
    shadow: Sequence[Tensor],
    masks: Sequence[Tensor],
    exp_avg_ipt: Sequence[Tensor],
    exp_avg_unc: Sequence[Tensor],
    grads: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    hyper: Tensor,
    accepted: Tensor,
    rng: Tensor,
    criterion: str,
    clear_state: bool = False,
    *,
    clip: Tensor | None = None,
    around: Tensor | None = None,
    stats: Tensor | None = None,
    threshold: Tensor | None = None,
    fold_rng: Tensor | None = None,
    beta1: float = 0.0,
    beta2: float = 0.0,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`masked_adamw_` at a window's boundary, with what goes before and after it there.

    With `around`, masks are chosen as `pack_around_` does, by the averages as they stand before the pass, and the step
    ends with pruned weights at zero. With `fold_rng`, the step is its window's last: after it the window's mean is
    folded into the averages as `fold_` does, and their scores are counted. Both may come together. Each weight's
    operands are read and written once.

    Args:
        params: float32, bfloat16 or float16 [n tensors], weights; written.
        exp_avg: float32 or bfloat16 [n tensors], first moments; written.
        exp_avg_sq: [n tensors], second moments, in the dtype of exp_avg; written.
        ipt: float32 or bfloat16 [n tensors], mean score of the window; written, unless the window ends. Empty for a
            step without importance.
        shadow: [n tensors], unmasked weights, in the dtype of params, which the score reads instead of params; written.
            Empty for none.
        masks: uint8 [n tensors of `mask_bytes`], a bit of 1 for each weight that is kept; written with `around`. Empty
            to mask nothing.
        exp_avg_ipt: [n tensors], running averages of importance, in the dtype of ipt; written with `fold_rng`.
        exp_avg_unc: [n tensors], running averages of its uncertainty, likewise. Empty where exp_avg_ipt is the score.
        grads: [n tensors], gradients in the dtype of params.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        hyper: float32 [n, 8], see `masked_adamw_`.
        accepted: float32 [1], gradients accepted in this window before this one.
        rng: int64 [2], `rounding_key` of the step.
        criterion: one of `CRITERIA`; ignored without ipt.
        clear_state: also zero the moments of masked weights.
        clip: float32 [1], what the gradients are multiplied with; None for 1.
        around: int64 [5], a bracket around the threshold with few weights inside, at most CANDIDATES on a GPU, see
            `pack_around_`; its rank is negative where `threshold` is given. None to leave the masks as they are.
            A GPU does not look: where more are inside, or fewer than the rank says, none of them is pruned, and
            `threshold` is (-1, -1).
        stats: int64 [n, 3], of each tensor: weights kept, bits that changed, scores that are NaN; written. Only
            with `around`.
        threshold: int64 [1, 2], (order key, tie index); written, unless the rank of `around` is negative. Only with
            `around`.
        fold_rng: int64 [2], `rounding_key` of the fold; None where the window goes on.
        beta1: decay of exp_avg_ipt.
        beta2: decay of exp_avg_unc.
        bracket: int64 [5], what to count the new scores against, see `count_`; None to count nothing.
        counts: int64 [1 + BINS], keys below the bracket, and in each of its bins; written. Only with `bracket`.
        pointers: int64 [lists, n], addresses of the lists, grads and masks behind shadow, the averages last; for a GPU.

    Raises:
        RuntimeError: see `masked_adamw_`, `pack_around_` and `fold_`.
    """
    torch.ops.pins_ext.boundary_adamw_(
        params,
        exp_avg,
        exp_avg_sq,
        ipt,
        shadow,
        masks,
        exp_avg_ipt,
        exp_avg_unc,
        grads,
        places,
        chunks,
        hyper,
        accepted,
        rng,
        criterion,
        clear_state,
        clip=clip,
        around=around,
        stats=stats,
        threshold=threshold,
        fold_rng=fold_rng,
        beta1=beta1,
        beta2=beta2,
        bracket=bracket,
        counts=counts,
        pointers=pointers,
    )


def boundary_sgd_(
    params: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    ipt: Sequence[Tensor],
    shadow: Sequence[Tensor],
    masks: Sequence[Tensor],
    exp_avg_ipt: Sequence[Tensor],
    exp_avg_unc: Sequence[Tensor],
    grads: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    hyper: Tensor,
    accepted: Tensor,
    rng: Tensor,
    criterion: str,
    clear_state: bool = False,
    *,
    clip: Tensor | None = None,
    around: Tensor | None = None,
    stats: Tensor | None = None,
    threshold: Tensor | None = None,
    fold_rng: Tensor | None = None,
    beta1: float = 0.0,
    beta2: float = 0.0,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`masked_sgd_` at a window's boundary, with what goes before and after it there.

    With `around`, masks are chosen as `pack_around_` does, by the averages as they stand before the pass, and the step
    ends with pruned weights at zero. With `fold_rng`, the step is its window's last: after it the window's mean is
    folded into the averages as `fold_` does, and their scores are counted. Both may come together. Each weight's
    operands are read and written once.

    Args:
        params: float32, bfloat16 or float16 [n tensors], weights; written.
        momentum_buffer: [n tensors], in the dtype of params; written. Empty where no tensor has momentum.
        ipt: float32 or bfloat16 [n tensors], mean score of the window; written, unless the window ends. Empty for a
            step without importance.
        shadow: [n tensors], unmasked weights, in the dtype of params, which the score reads instead of params; written.
            Empty for none.
        masks: uint8 [n tensors of `mask_bytes`], a bit of 1 for each weight that is kept; written with `around`. Empty
            to mask nothing.
        exp_avg_ipt: [n tensors], running averages of importance, in the dtype of ipt; written with `fold_rng`.
        exp_avg_unc: [n tensors], running averages of its uncertainty, likewise. Empty where exp_avg_ipt is the score.
        grads: [n tensors], gradients in the dtype of params.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        hyper: float32 [n, 8], see `masked_sgd_`.
        accepted: float32 [1], gradients accepted in this window before this one.
        rng: int64 [2], `rounding_key` of the step.
        criterion: one of `CRITERIA`; ignored without ipt.
        clear_state: also zero the moments of masked weights.
        clip: float32 [1], what the gradients are multiplied with; None for 1.
        around: int64 [5], a bracket around the threshold with few weights inside, at most CANDIDATES on a GPU, see
            `pack_around_`; its rank is negative where `threshold` is given. None to leave the masks as they are.
            A GPU does not look: where more are inside, or fewer than the rank says, none of them is pruned, and
            `threshold` is (-1, -1).
        stats: int64 [n, 3], of each tensor: weights kept, bits that changed, scores that are NaN; written. Only
            with `around`.
        threshold: int64 [1, 2], (order key, tie index); written, unless the rank of `around` is negative. Only with
            `around`.
        fold_rng: int64 [2], `rounding_key` of the fold; None where the window goes on.
        beta1: decay of exp_avg_ipt.
        beta2: decay of exp_avg_unc.
        bracket: int64 [5], what to count the new scores against, see `count_`; None to count nothing.
        counts: int64 [1 + BINS], keys below the bracket, and in each of its bins; written. Only with `bracket`.
        pointers: int64 [lists, n], addresses of the lists, grads and masks behind shadow, the averages last; for a GPU.

    Raises:
        RuntimeError: see `masked_sgd_`, `pack_around_` and `fold_`.
    """
    torch.ops.pins_ext.boundary_sgd_(
        params,
        momentum_buffer,
        ipt,
        shadow,
        masks,
        exp_avg_ipt,
        exp_avg_unc,
        grads,
        places,
        chunks,
        hyper,
        accepted,
        rng,
        criterion,
        clear_state,
        clip=clip,
        around=around,
        stats=stats,
        threshold=threshold,
        fold_rng=fold_rng,
        beta1=beta1,
        beta2=beta2,
        bracket=bracket,
        counts=counts,
        pointers=pointers,
    )
