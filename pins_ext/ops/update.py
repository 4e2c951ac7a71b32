"""An optimizer's step, the importance of its weights and their mask in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_adamw_(
    params: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    ipt: Sequence[Tensor],
    shadow: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    hyper: Tensor,
    accepted: Tensor,
    rng: Tensor,
    criterion: str,
    clear_state: bool = False,
    *,
    grad_scale: Tensor | None = None,
    clip: Tensor | None = None,
    found_inf: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """A step of AdamW after which masked weights are zero, in place; importance is added as `accumulate_` adds it.

    p = (1 - lr weight_decay) p - lr m̂ / (sqrt(v̂) + eps), with m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2)
    g², and both corrected for their bias (Loshchilov & Hutter, ICLR 2019; the arithmetic of torch's fused AdamW).

    Args:
        params: float32, bfloat16 or float16 [n tensors], weights; written.
        exp_avg: float32, bfloat16 or int8 as `encode` stores it [n tensors], m; written.
        exp_avg_sq: [n tensors], v, in the dtype of exp_avg, uint8 for int8; written.
        ipt: float32, bfloat16 or uint8 as `encode` stores it [n tensors], mean score of the window; written. Empty for
            a step without importance.
        shadow: [n tensors], unmasked weights, in the dtype of params, which the score reads instead of params; written.
            Empty for none.
        grads: [n tensors], gradients in the dtype of params.
        masks: uint8 [n tensors of `mask_bytes`], a bit of 1 for each weight that is kept. Empty to mask nothing.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        hyper: float32 [n, 8]: lr, 1 - lr weight_decay, 1 - beta1, beta2, 1 - beta2, -lr / (1 - beta1^t),
            sqrt(1 - beta2^t), eps; each best computed in float64 and rounded once.
        accepted: float32 [1], gradients accepted in this window before this one.
        rng: int64 [2], `rounding_key`: whatever is stored in bfloat16 is rounded stochastically, so that steps
            far below its resolution add up.
        criterion: one of `CRITERIA`; ignored without ipt.
        clear_state: also zero exp_avg and exp_avg_sq of masked weights.
        grad_scale: float32 [1], what the gradients were multiplied with; None for 1.
        clip: float32 [1], what the unscaled gradients are multiplied with; None for 1.
        found_inf: float32 [1]; where it is not zero, nothing is written.
        pointers: int64 [7, n], on a GPU: addresses of the seven lists in their order; None to look them up, except
            while a CUDA graph is captured.

    Raises:
        RuntimeError: an unknown criterion, an argument of another dtype, shape or device, not contiguous, an output
            that autograd records or that shares memory with a table.
    """
    torch.ops.pins_ext.masked_adamw_(
        params,
        exp_avg,
        exp_avg_sq,
        ipt,
        shadow,
        grads,
        masks,
        places,
        chunks,
        hyper,
        accepted,
        rng,
        criterion,
        clear_state,
        grad_scale=grad_scale,
        clip=clip,
        found_inf=found_inf,
        pointers=pointers,
    )


def masked_sgd_(
    params: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    ipt: Sequence[Tensor],
    shadow: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    hyper: Tensor,
    accepted: Tensor,
    rng: Tensor,
    criterion: str,
    clear_state: bool = False,
    *,
    grad_scale: Tensor | None = None,
    clip: Tensor | None = None,
    found_inf: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """A step of SGD after which masked weights are zero, in place; importance is added as `accumulate_` adds it.

    g = g + weight_decay p, b = momentum b + (1 - dampening) g, p = p - lr b; for Nesterov's momentum p = p - lr (g +
    momentum b) (Sutskever et al., ICML 2013; the arithmetic of torch.optim.SGD).

    Args:
        params: float32, bfloat16 or float16 [n tensors], weights; written.
        momentum_buffer: [n tensors], b, in the dtype of params; written. Empty where no tensor has momentum.
        ipt: float32, bfloat16 or uint8 as `encode` stores it [n tensors], mean score of the window; written. Empty for
            a step without importance.
        shadow: [n tensors], unmasked weights, in the dtype of params, which the score reads instead of params; written.
            Empty for none.
        grads: [n tensors], gradients in the dtype of params.
        masks: uint8 [n tensors of `mask_bytes`], a bit of 1 for each weight that is kept. Empty to mask nothing.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        hyper: float32 [n, 8]: lr, weight_decay, momentum, 1 - dampening, 1 at the first step (b becomes g) or 0, 1 for
            Nesterov's momentum or 0, -lr, 0.
        accepted: float32 [1], gradients accepted in this window before this one.
        rng: int64 [2], `rounding_key`: whatever is stored in bfloat16 is rounded stochastically, so that steps
            far below its resolution add up.
        criterion: one of `CRITERIA`; ignored without ipt.
        clear_state: also zero momentum_buffer of masked weights.
        grad_scale: float32 [1], what the gradients were multiplied with; None for 1.
        clip: float32 [1], what the unscaled gradients are multiplied with; None for 1.
        found_inf: float32 [1]; where it is not zero, nothing is written.
        pointers: int64 [6, n], on a GPU: addresses of the six lists in their order; None to look them up, except while
            a CUDA graph is captured.

    Raises:
        RuntimeError: an unknown criterion, an argument of another dtype, shape or device, not contiguous, on the CPU
            momentum without a buffer, an output that autograd records or that shares memory with a table.
    """
    torch.ops.pins_ext.masked_sgd_(
        params,
        momentum_buffer,
        ipt,
        shadow,
        grads,
        masks,
        places,
        chunks,
        hyper,
        accepted,
        rng,
        criterion,
        clear_state,
        grad_scale=grad_scale,
        clip=clip,
        found_inf=found_inf,
        pointers=pointers,
    )
