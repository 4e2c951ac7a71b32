"""The importance of weights: instant scores into the mean of a window, the mean into two running averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_(
    ipt: Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    lr: Tensor,
    accepted: Tensor,
    rng: Tensor,
    criterion: str,
    *,
    grad_scale: Tensor | None = None,
    clip: Tensor | None = None,
    found_inf: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """Add the instant score of each weight to the mean of the window, in place.

    ipt = (ipt n + c) / (n + 1), with n gradients accepted before; for the criterion movement, ipt = ipt + c. The score
    c of the criterion pins is |lr g² - p g| (Ren & Zhu, Findings of ACL 2023), of platon |p g| (Zhang et al., ICML
    2022), of movement -p g (Sanh et al., NeurIPS 2020).

    Args:
        ipt: float32, bfloat16 or uint8 as `encode` stores it [n tensors],
            mean score of the window; written.
        params: float32, bfloat16 or float16 [n tensors], weights before the step; empty for the criterion precomputed.
        grads: [n tensors], gradients in the dtype of params.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        lr: float32 [n], learning rate of the coming step for each tensor.
        accepted: float32 [1], gradients accepted in this window before this one.
        rng: int64 [2], `rounding_key`; read for a bfloat16 ipt alone.
        criterion: one of `CRITERIA`.
        grad_scale: float32 [1], what the gradients were multiplied with; None for 1.
        clip: float32 [1], what the unscaled gradients are multiplied with; None for 1.
        found_inf: float32 [1]; where it is not zero, nothing is written.
        pointers: int64 [3, n], on a GPU: addresses of ipt, params and grads; None to look them up, except while a CUDA
            graph is captured.

    Raises:
        RuntimeError: an unknown criterion, an argument of another dtype, shape or device, not contiguous, an ipt that
            autograd records or that shares memory with a table.
    """
    torch.ops.pins_ext.accumulate_(
        ipt,
        params,
        grads,
        places,
        chunks,
        lr,
        accepted,
        rng,
        criterion,
        grad_scale=grad_scale,
        clip=clip,
        found_inf=found_inf,
        pointers=pointers,
    )


def fold_(
    exp_avg_ipt: Sequence[Tensor],
    exp_avg_unc: Sequence[Tensor],
    ipt: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    accepted: Tensor,
    rng: Tensor,
    beta1: float,
    beta2: float,
    *,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """Fold the mean score of a window into the two running averages, in place.

    exp_avg_ipt = beta1 exp_avg_ipt + (1 - beta1) ipt, then exp_avg_unc = beta2 exp_avg_unc + (1 - beta2) |ipt -
    exp_avg_ipt| (Zhang et al., PLATON, ICML 2022). With a bracket the new scores are counted in the same pass, as
    `count_` counts them: of exp_avg_ipt times exp_avg_unc, or of exp_avg_ipt alone where exp_avg_unc is empty.

    Args:
        exp_avg_ipt: float32, bfloat16 or uint8 as `encode` stores it [n tensors],
            average of the score; written.
        exp_avg_unc: [n tensors], average of its deviation, in the dtype of exp_avg_ipt; written. Empty for none.
        ipt: [n tensors], mean score of the window, in the dtype of exp_avg_ipt.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        accepted: float32 [1], gradients accepted in this window; at 0 the averages stay as they are.
        rng: int64 [2], `rounding_key`; read for averages in bfloat16, and for those in 8 bits, where one random part
            rounds all weights.
        beta1: share of exp_avg_ipt that stays.
        beta2: share of exp_avg_unc that stays.
        bracket: int64 [5], what to count against; comes together with counts.
        counts: int64 [1 + BINS], keys below the bracket and in each of its bins; written, but not for a bracket that is
            one key.
        pointers: int64 [3, n], on a GPU: addresses of the three lists in their order; None to look them up, except
            while a CUDA graph is captured.

    Raises:
        RuntimeError: an argument of another dtype, shape or device, not contiguous, bracket without counts, an output
            that autograd records or that shares memory with a table.
    """
    torch.ops.pins_ext.fold_(
        exp_avg_ipt,
        exp_avg_unc,
        ipt,
        places,
        chunks,
        accepted,
        rng,
        beta1,
        beta2,
        bracket=bracket,
        counts=counts,
        pointers=pointers,
    )


def fold_moments_(
    exp_avg_ipt: Sequence[Tensor],
    exp_avg_unc: Sequence[Tensor],
    params: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    factors: Tensor,
    accepted: Tensor,
    rng: Tensor,
    beta1: float,
    beta2: float,
    *,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`fold_` of a score that is computed from the moments of AdamW, so that no window's mean is stored.

    ipt = |lr v̂ - p m̂|, where m̂ = exp_avg / (1 - beta1^t) and v̂ = exp_avg_sq / (1 - beta2^t) with AdamW's betas: the
    criterion pins (Ren & Zhu, Findings of ACL 2023) with both moments for the gradient and its square. The averages
    then follow Zhang et al., PLATON, ICML 2022, as in `fold_`.

    Args:
        exp_avg_ipt: float32, bfloat16 or uint8 as `encode` stores it [n tensors],
            average of the score; written.
        exp_avg_unc: [n tensors], average of its deviation, in the dtype of exp_avg_ipt; written. Empty for none.
        params: float32, bfloat16 or float16 [n tensors], weights.
        exp_avg: float32, bfloat16 or float16 [n tensors], AdamW's first moment, not corrected for its bias.
        exp_avg_sq: [n tensors], its second moment, not corrected, in the dtype of exp_avg.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        factors: float32 [n, 3]: learning rate, 1 / (1 - beta1^t), 1 / (1 - beta2^t), with AdamW's betas.
        accepted: float32 [1], gradients accepted in this window; at 0 the averages stay as they are.
        rng: int64 [2], `rounding_key`; read for averages in bfloat16, and for those in 8 bits, where one random part
            rounds all weights.
        beta1: share of exp_avg_ipt that stays.
        beta2: share of exp_avg_unc that stays.
        bracket: int64 [5], what to count against, see `fold_`; comes together with counts.
        counts: int64 [1 + BINS], keys below the bracket and in each of its bins; written, but not for a bracket that is
            one key.
        pointers: int64 [5, n], on a GPU: addresses of the five lists in their order; None to look them up, except while
            a CUDA graph is captured.

    Raises:
        RuntimeError: an argument of another dtype, shape or device, not contiguous, bracket without counts, an output
            that autograd records or that shares memory with a table.
    """
    torch.ops.pins_ext.fold_moments_(
        exp_avg_ipt,
        exp_avg_unc,
        params,
        exp_avg,
        exp_avg_sq,
        places,
        chunks,
        factors,
        accepted,
        rng,
        beta1,
        beta2,
        bracket=bracket,
        counts=counts,
        pointers=pointers,
    )
