"""The algorithm in plain PyTorch: the specification that every kernel is held against.

Slow, short, and literal. Tensors are computed in float32 whatever they are stored in; a bfloat16 state is rounded
stochastically with integer arithmetic, so that the result is the same on every device. Source of the formulas:
Ren & Zhu, "Pruning Pre-trained Language Models with Principled Importance and Self-regularization", Findings of
ACL 2023; smoothing and schedule: Zhang et al., "PLATON", ICML 2022. csrc/criterion.inl is the same in C++.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
NAN_KEY = 0xFFFFFFFF


def _scalar(value: float, like: Tensor) -> Tensor:
    """A double rounded once to float32, as a tensor: eager CUDA divides by a Python scalar through its reciprocal."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


# ---- criterion ------------------------------------------------------------------------------------------------------


def instant_score(criterion: str, p: Tensor, p_next: Tensor, g: Tensor, lr: float) -> Tensor:
    """Instant score c_t of each weight, float32, in the evaluation order every kernel keeps.

    Args:
        criterion: "pins" |lr g^2 - p g|, "pins-signed" without the absolute value, "pins-update" |p_next g|, "platon"
            |p g|, "movement" -p g, "precomputed" g itself (a user's own score).
        p: weights before the step.
        p_next: weights after it, before masking.
        g: gradients, same shape.
        lr: learning rate of the coming step.
    """
    p, p_next, g = p.float(), p_next.float(), g.float()
    match criterion:
        case "pins" | "pins-signed":
            signed = ((-p) * g) + ((_scalar(lr, p) * g) * g)
            return signed.abs() if criterion == "pins" else signed
        case "pins-update":
            return (p_next * g).abs()
        case "platon":
            return (p * g).abs()
        case "movement":
            return (-p) * g
        case "precomputed":
            return g
    raise ValueError(f"unknown criterion {criterion!r}")


def next_ipt(criterion: str, ipt: Tensor, c: Tensor, accepted: int) -> Tensor:
    """Mean of the instant scores of this window; `accepted` gradients came before this one. Movement sums instead."""
    if criterion == "movement":
        return ipt.float() + c
    if accepted == 0:
        return c
    return ((ipt.float() * _scalar(accepted, c)) + c) / _scalar(accepted + 1, c)


def fold(
    exp_avg_ipt: Tensor, exp_avg_unc: Tensor | None, ipt: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor | None]:
    """The two running averages at the end of a window, float32, before they are rounded for storage."""
    ipt = ipt.float()
    new_ipt = (_scalar(beta1, ipt) * exp_avg_ipt.float()) + (_scalar(1 - beta1, ipt) * ipt)
    if exp_avg_unc is None:
        return new_ipt, None
    deviation = (ipt - new_ipt).abs()
    return new_ipt, (_scalar(beta2, ipt) * exp_avg_unc.float()) + (_scalar(1 - beta2, ipt) * deviation)


def moments(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Tensor) -> Tensor:
    """|lr v̂ - p m̂|, float32: "pins" with AdamW's moments for the gradient and its square.

    Args:
        p: weights, any shape and floating dtype.
        exp_avg: first moment, not corrected for its bias.
        exp_avg_sq: second moment, not corrected.
        factors: float32 [3]: learning rate, 1 / (1 - beta1^t), 1 / (1 - beta2^t).
    """
    lr, factor, factor_sq = factors
    return (((-p.float()) * (exp_avg.float() * factor)) + (lr * (exp_avg_sq.float() * factor_sq))).abs()


def score(kind: str, a: Tensor, b: Tensor | None = None, factor: Tensor | float = 1.0) -> Tensor:
    """Score of each weight, float32.

    product: a b; identity: a; deviation: a |b - a|; magnitude: |a|; fisher: a² b factor.
    For fisher, a is the weight, b AdamW's second moment and factor 1 / (1 - beta2^t): optimal brain damage (LeCun et
    al. 1989) with the diagonal of the empirical Fisher information.
    """
    a = a.float()
    match kind:
        case "identity":
            return a
        case "magnitude":
            return a.abs()
        case "fisher" if b is not None:
            return (a * a) * (b.float() * factor)
        case "product" | "deviation" if b is not None:
            return a * b.float() if kind == "product" else a * (b.float() - a).abs()
    raise ValueError(f"score {kind!r} is unknown or lacks its second operand")


def wanda(weight: Tensor, inputs: Tensor) -> Tensor:
    """|w| ||x||_2 of each weight, float32 [outputs, features] (Sun et al. 2023).

    Args:
        weight: [outputs, features], as nn.Linear has it.
        inputs: [tokens, features], all that the layer was given.
    """
    return weight.float().abs() * inputs.double().square().sum(0).sqrt().float()


# ---- selection ------------------------------------------------------------------------------------------------------


def order_key(scores: Tensor) -> Tensor:
    """Order-preserving key of a float32 score, int64 in [0, 2^32): -0 == +0, every NaN is 2^32 - 1, the highest."""
    bits = (scores.float() + 0.0).view(torch.int32).to(torch.int64) & MASK32
    flip = torch.where(bits >> 31 == 1, MASK32, 0x80000000)
    return torch.where((bits & 0x7FFFFFFF) > 0x7F800000, NAN_KEY, bits ^ flip)


def score_of_key(key: int) -> float:
    """The score whose order key this is (NaN for 2^32 - 1)."""
    bits = key ^ (0x80000000 if key >> 31 else MASK32)
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).item()


def select(keys: Tensor, index: Tensor, n_prune: int, exact: bool = True) -> tuple[int, int]:
    """Threshold (key, tie_index): a weight is pruned when (its key, its global index) < (key, tie_index).

    Args:
        keys: order keys of all weights, int64 [N].
        index: their global indices, int64 [N].
        n_prune: how many weights to prune.
        exact: prune exactly the first n_prune in stable order. Otherwise the released rule: prune what lies strictly
            below the n_prune-th smallest score, which is fewer under ties.
    """
    total = keys.numel()
    if n_prune <= 0 or total == 0:
        return 0, 0
    if exact and n_prune >= total:
        return MASK32, torch.iinfo(torch.int64).max
    by_index = torch.argsort(index)
    order = by_index[torch.argsort(keys[by_index], stable=True)]
    if exact:
        first_kept = order[n_prune]
        return int(keys[first_kept]), int(index[first_kept])
    key = int(keys[order[n_prune - 1]])
    return (0, 0) if key == NAN_KEY else (key, 0)


def keep_mask(keys: Tensor, index: Tensor, threshold: tuple[int, int]) -> Tensor:
    """Boolean mask, True = keep."""
    key, tie_index = threshold
    return ~((keys < key) | ((keys == key) & (index < tie_index)))


def group_mask(scores: Tensor, keep: int, of: int, axis: int) -> Tensor:
    """N:M: True for the `keep` best of every `of` consecutive weights along an axis, by (score, position).

    Args:
        scores: float32, of any shape; its size along the axis is a multiple of `of`.
        keep: N.
        of: M.
        axis: dimension of the inputs.
    """
    keys = order_key(scores).movedim(axis, -1)
    groups = keys.reshape(-1, of)
    # Positions within a group are in the order of the global index, whatever the axis.
    best = groups.argsort(dim=1, stable=True)[:, of - keep :]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
    return mask.view(keys.shape).movedim(-1, axis).contiguous()


def eligible(scores: Tensor, keep: int, of: int, axis: int) -> Tensor:
    """N:M: the scores by which weights compete for being pruned, NaN for the `keep` best of every group.

    So that no other is NaN, it counts as infinity, and infinity as the largest number.

    Args:
        scores: see `group_mask`.
        keep: N.
        of: M.
        axis: dimension of the inputs.
    """
    others = scores.clamp(max=torch.finfo(torch.float32).max).masked_fill(scores.isnan(), math.inf)
    return others.masked_fill(group_mask(scores, keep, of, axis), math.nan)


def block_scores(scores: Tensor, rows: int, columns: int) -> Tensor:
    """Sum of the scores of each block, float32 [.., n / rows, m / columns], in float64 by halves onto halves.

    Args:
        scores: float32 [.., n, m], multiples of the sizes of a block.
        rows: size of a block in the last dimension but one.
        columns: in the last one.
    """
    *lead, n, m = scores.shape
    blocks = scores.double().reshape(*lead, n // rows, rows, m // columns, columns)
    of_rows = _folded(list(blocks.unbind(-1)))
    return _folded(list(of_rows.unbind(-2))).float()


def _folded(parts: list[Tensor]) -> Tensor:
    """Their sum: the second half is added onto the first, which is longer by one where their number is odd."""
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        low, high = parts[:half], parts[half:]
        parts = [a + b for a, b in zip(low, high, strict=False)] + low[len(high) :]
    return parts[0]


def pack_bits(mask: Tensor) -> Tensor:
    """Boolean mask to bits, least significant first, padded with zeros to whole 64-bit words: uint8 [8 ceil(n/64)]."""
    flat = mask.flatten()
    padded = torch.zeros(-(-flat.numel() // 64) * 64, dtype=torch.bool, device=flat.device)
    padded[: flat.numel()] = flat
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=flat.device)
    return (padded.view(-1, 8) * weights).sum(1).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The boolean mask of this shape that `pack_bits` packed."""
    n = 1
    for size in shape:
        n *= size
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[:n].view(shape).bool()


# ---- stochastic rounding --------------------------------------------------------------------------------------------


def rounding_key(seed: int, step: int, stream: int) -> tuple[int, int]:
    """Two 32-bit keys of the counter-based generator for one (seed, step, stream): splitmix64's finaliser."""
    mask64 = (1 << 64) - 1
    z = (
        seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7 + 0x2545F4914F6CDD1D
    ) & mask64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask64
    z ^= z >> 31
    return z & MASK32, z >> 32


def random_bits(index: Tensor, key0: int, key1: int) -> Tensor:
    """32 random bits for each global index, int64 in [0, 2^32)."""
    x = (index & MASK32) ^ ((key0 + (index >> 32) * 0x9E3779B9) & MASK32)
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15)
    x = (x + key1) & MASK32
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def update_bits(index: Tensor, key0: int, key1: int) -> dict[str, Tensor]:
    """The random bits, in the low 16, with which an optimizer's pass rounds what it stores in bfloat16.

    ipt and the weights (the shadow with the same bits) take the two halves of the bits of (key0, key1), the first and
    the second moment those of (key1, key0).
    """
    own, moments = random_bits(index, key0, key1), random_bits(index, key1, key0)
    return {"ipt": own, "params": own >> 16, "first": moments, "second": moments >> 16}


def store(x: Tensor, dtype: torch.dtype, random16: Tensor) -> Tensor:
    """float32 to storage: bfloat16 by stochastic rounding with the low 16 bits of random16, float16 to nearest."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    bits = x.contiguous().view(torch.int32).to(torch.int64) & MASK32
    rounded = (bits + (random16.view(bits.shape) & 0xFFFF)) >> 16
    rounded = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded) & 0xFFFF
    return torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(torch.bfloat16)


# ---- 8-bit storage --------------------------------------------------------------------------------------------------

GROUP = 32
"""Weights that share a scale."""


def fold_bits(shape: Sequence[int], key0: int) -> tuple[Tensor, Tensor]:
    """The bits, in the low 16, by which a fold rounds the mean and the uncertainty in 8 bits, each int64 [shape].

    They are the same for all weights of a fold. To nearest, a decay below half a step of codes would be lost, and what
    gets no gradient any more would keep its importance; with bits of their own weights would change places by chance.
    """
    return torch.full(tuple(shape), key0), torch.full(tuple(shape), key0 >> 16)


def coded_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a tensor in 8 bits, [.., groups of a row, 34]: the codes of a group, then its scale.

    A row is what the last dimension counts, or as many of the last ones as hold a group, but the first is left out: a
    row of a matrix, the weights of one output channel of a convolution. A tensor of one dimension is one row.
    """
    first = max(len(shape) - 1, 0)
    while first > 1 and math.prod(shape[first:]) < GROUP:
        first -= 1
    return (*shape[:first], -(-math.prod(shape[first:]) // GROUP), GROUP + 2)


def encode(x: Tensor, signed: bool = False, random16: Tensor | None = None, vanishes: bool = False) -> Tensor:
    """float32 to 8-bit storage: for each weight a softsign of its share in the scale of its group.

    Groups are 32 weights that follow each other in a row, from its first on; the last may be shorter. The magnitude of
    a weight is its square root, or itself where `signed`; the scale the group's largest magnitude, rounded up to
    bfloat16. With
    q = magnitude / scale the code is 2 q / (1 + q) of 254, or of 127 with the sign. A weight above zero never becomes
    zero without a sign, but in averages (`vanishes`). 255, or -128, stands for what is not finite, and without a sign
    for what is below zero; the scale passes over it.

    Args:
        x: any shape, float32.
        signed: for the first moment; otherwise x is not negative.
        random16: 16 bits of each weight in the low bits, int64, for stochastic rounding (in a fold: `fold_bits`); None
            rounds to nearest.
        vanishes: what is above zero may become zero, as in the averages of a fold: it would stay above them for ever.

    Returns:
        uint8, or int8 where signed, [coded_shape]: of each group its codes, zeros up to 32, and its bfloat16 scale.
    """
    odd = ~x.isfinite() | ((x < 0) & (not signed))
    magnitude = torch.where(odd, 0.0, x.abs())
    # Through float64: torch's float32 square root may be one that is not rounded correctly.
    magnitude = magnitude if signed else magnitude.double().sqrt().float()
    largest = _by_group(magnitude).amax(-1, keepdim=True).view(torch.int32)
    scales = ((largest + 0xFFFF) >> 16).clamp(max=0x7F7F).to(torch.int16)
    scale = _by_weight(scales.view(torch.bfloat16).float().expand(*largest.shape[:-1], GROUP), x.shape)
    q = magnitude / torch.where(scale > 0, scale, 1.0)
    levels = 127 if signed else 254
    part = torch.full_like(q, 0.5) if random16 is None else (random16.view(x.shape) & 0xFFFF).float() * 2.0**-16
    level = (((2.0 * levels) * q) / (1.0 + q) + part).to(torch.int32).clamp(max=levels)
    if not signed and not vanishes:
        level = torch.where((level == 0) & (x > 0), 1, level)
    code = torch.where(x < 0, -level, level)
    code = torch.where(odd, -128 if signed else 255, code)
    dtype = torch.int8 if signed else torch.uint8
    return torch.cat([_by_group(code.to(dtype)), scales.view(torch.uint8).view(dtype)], -1)


def decode(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """What `encode` stored of a tensor of this shape, float32."""
    signed = packed.dtype == torch.int8
    code = packed[..., :GROUP].to(torch.int32)
    scale = packed[..., GROUP:].clone().view(torch.bfloat16).float()
    levels = 127 if signed else 254
    x = (code.float() / (2 * levels - code.abs()).float()) * scale
    x = x if signed else x * x
    return _by_weight(torch.where(code == (-128 if signed else 255), torch.nan, x), shape)


def _by_group(x: Tensor) -> Tensor:
    """[.., groups of a row, 32], rows filled up with zeros."""
    *rows, groups, _ = coded_shape(x.shape)
    x = x.reshape(math.prod(rows), math.prod(x.shape[len(rows) :]))
    return torch.nn.functional.pad(x, (0, groups * GROUP - x.shape[1])).view(*rows, groups, GROUP)


def _by_weight(groups: Tensor, shape: Sequence[int]) -> Tensor:
    """The weights that `_by_group` filled up."""
    *rows, of_row, _ = groups.shape
    columns = math.prod(shape[len(rows) :])
    return groups.reshape(math.prod(rows), of_row * GROUP)[:, :columns].reshape(tuple(shape))


# ---- gradient norm --------------------------------------------------------------------------------------------------


def sum_of_squares(tensors: Sequence[Tensor], chunk: int = 16384, lanes: int = 512, totals: int = 256) -> Tensor:
    """Sum of the squares of all elements, float64 [1], in the order that every kernel keeps. Each square is exact.

    Args:
        tensors: of any floating dtype and shape.
        chunk: elements summed together. Element i of a chunk belongs to lane i % lanes.
        lanes: sums of a chunk, each in order, then added halves onto halves.
        totals: chunk c is added to total c % totals in order; these too are added halves onto halves.
    """
    chunks = [part for x in tensors for part in x.float().flatten().split(chunk) if part.numel()]
    total = torch.zeros(totals, dtype=torch.float64)
    for c, part in enumerate(chunks):
        rows = torch.zeros(-(-part.numel() // lanes) * lanes, dtype=torch.float64)
        rows[: part.numel()] = part.double() ** 2
        sums = torch.zeros(lanes, dtype=torch.float64)
        for row in rows.view(-1, lanes):
            sums = sums + row
        total[c % totals] += _halves(sums)
    return _halves(total).reshape(1)


def _halves(values: Tensor) -> Tensor:
    while values.numel() > 1:
        values = values[: values.numel() // 2] + values[values.numel() // 2 :]
    return values[0]


# ---- sharding -------------------------------------------------------------------------------------------------------


def global_index(layout_row: Tensor) -> Tensor:
    """Global index of every local weight of one tensor, int64 [local numel], from its row of the layout table.

    Args:
        layout_row: int64 [14]: base, full sizes [4], local sizes [4], start per dimension [4], right-aligned; columns.
    """
    base, *sizes, _ = layout_row.tolist()
    full, local, start = sizes[:4], sizes[4:8], sizes[8:]
    index = torch.zeros(1, dtype=torch.int64)
    for f, n, s in zip(full, local, start, strict=True):
        index = (index[:, None] * f + (s + torch.arange(n))).flatten()
    return base + index


# ---- schedule -------------------------------------------------------------------------------------------------------


def cubic_remaining_ratio(
    t: int, total: int, initial_warmup: int, final_cooldown: int, r0: float, r_final: float
) -> float:
    """Remaining ratio at step t: r0 up to the warm-up's end, then cubic, then r_final (Zhu & Gupta 2017)."""
    if t <= initial_warmup:
        return r0
    if t > total - final_cooldown:
        return r_final
    progress = (t - initial_warmup) / (total - initial_warmup - final_cooldown)
    return r_final + (r0 - r_final) * (1 - progress) ** 3


class EagerPins:
    """The released algorithm (METHOD: criterion, smoothing, schedule, selection, masking), one eager step at a time.

    The peer of the benchmarks and the oracle of the tests: it concatenates every score and calls kthvalue, as the
    authors' code does. Call `before_step` with gradients in place, step the optimizer, call `after_step`.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        total: int,
        initial_warmup: int,
        final_cooldown: int,
        r_final: float,
        r0: float = 1.0,
        beta1: float = 0.85,
        beta2: float = 0.95,
        delta_t: int = 10,
    ) -> None:
        self.parameters = parameters
        self.schedule = (total, initial_warmup, final_cooldown, r0, r_final)
        self.beta1, self.beta2, self.delta_t = beta1, beta2, delta_t
        self.ipt = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.exp_avg_ipt = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.exp_avg_unc = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.threshold: float | None = None
        self.t = 0

    @torch.no_grad()
    def before_step(self, lr: float) -> None:
        """Importance of the coming step, from weights and gradients before it."""
        for name, p in self.parameters.items():
            ipt, ea, eu = self.ipt[name], self.exp_avg_ipt[name], self.exp_avg_unc[name]
            g = p.grad if p.grad is not None else torch.zeros_like(p)
            c = ((-p * g) + (lr * g * g)).abs()
            local_step = self.t % self.delta_t
            if local_step == 0:
                ea.mul_(self.beta1).add_((1 - self.beta1) * ipt)
                if 0 < self.beta2 < 1:
                    eu.mul_(self.beta2).add_((1 - self.beta2) * (ipt - ea).abs())
                ipt.copy_(c)
            else:
                ipt.mul_(local_step).add_(c).div_(torch.tensor(float(local_step + 1)))

    def scores(self) -> dict[str, Tensor]:
        """The smoothed score of every weight."""
        if self.beta2 == 1:
            return self.exp_avg_ipt
        if self.beta2 == 0:
            return {n: self.exp_avg_ipt[n] * (self.ipt[n] - self.exp_avg_ipt[n]).abs() for n in self.ipt}
        return {n: self.exp_avg_ipt[n] * self.exp_avg_unc[n] for n in self.ipt}

    @torch.no_grad()
    def after_step(self) -> None:
        """Zero what the schedule asks for."""
        total, initial_warmup, final_cooldown, r0, r_final = self.schedule
        ratio = cubic_remaining_ratio(self.t, total, initial_warmup, final_cooldown, r0, r_final)
        final = self.t > total - final_cooldown
        due = self.t > initial_warmup and (final or self.t % self.delta_t == 0)
        self.t += 1
        if not due:
            return
        scores = self.scores()
        everything = torch.cat([s.flatten() for s in scores.values()])
        k = int(everything.numel() * (1 - ratio))
        if k == 0:
            return
        threshold = torch.kthvalue(everything, k).values
        for name, p in self.parameters.items():
            p.masked_fill_(scores[name] < threshold, 0.0)
        self.threshold = threshold.item()
