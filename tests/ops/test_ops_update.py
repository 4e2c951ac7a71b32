"""masked_adamw_, masked_sgd_ and apply_mask_ on the CPU: against torch.optim and reference.py, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import pytest
import torch
from cases import FLOATS, LISTS, STATES, assert_all_same, clones, index_of, masks_of, rng_of, tensors
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext


@dataclass(frozen=True)
class AdamW:
    """Hyperparameters, torch's optimizer and the operator's row of them."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    moments = ("exp_avg", "exp_avg_sq")
    op = staticmethod(pins.masked_adamw_)

    def torch(self, params: list[Tensor], **kwargs: bool) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(params, self.lr, betas, self.eps, self.weight_decay, **kwargs)

    def row(self, step: int) -> list[float]:
        size, root = self.lr / (1 - self.beta1**step), math.sqrt(1 - self.beta2**step)
        decay = 1 - self.lr * self.weight_decay
        return [self.lr, decay, 1 - self.beta1, self.beta2, 1 - self.beta2, -size, root, self.eps]


@dataclass(frozen=True)
class SGD:
    """The same for SGD; without momentum there is no buffer."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    op = staticmethod(pins.masked_sgd_)

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def torch(self, params: list[Tensor], **kwargs: bool) -> torch.optim.Optimizer:
        rest = (self.momentum, self.dampening, self.weight_decay, self.nesterov)
        return torch.optim.SGD(params, self.lr, *rest, **kwargs)

    def row(self, step: int) -> list[float]:
        undamped, first = 1 - self.dampening, float(step == 1)
        return [self.lr, self.weight_decay, self.momentum, undamped, first, float(self.nesterov), -self.lr, 0.0]


OPTIMIZERS = [
    AdamW(1e-3),
    AdamW(3e-5, beta2=0.98, eps=1e-6, weight_decay=0.0),
    AdamW(1e-2, beta1=0.4, beta2=0.95, weight_decay=0.1),
    SGD(0.1),
    SGD(0.1, weight_decay=0.01),
    SGD(0.05, momentum=0.9),
    SGD(0.05, momentum=0.9, dampening=0.2, weight_decay=0.01),
    SGD(0.05, momentum=0.9, weight_decay=1e-4, nesterov=True),
]
KINDS = [AdamW(1e-2, weight_decay=0.1), SGD(0.05, momentum=0.9, weight_decay=0.01)]


@pytest.fixture
def exact_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The square root that IEEE 754 asks for: that of torch is MKL's, which is off by one bit on some CPUs (seen on an
    AMD EPYC, a fifth of all values). float64 has more than twice the bits of float32, so rounding it twice is exact."""
    torch_sqrt = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch_sqrt(x.double()).float())


def moments_of(
    optimizer: AdamW | SGD, sizes: list[int], dtype: torch.dtype, values: str = "normal", misaligned: bool = False
) -> list[list[Tensor]]:
    """Moments that are not negative."""
    names = range(len(optimizer.moments))
    return [[m.abs() for m in tensors(sizes, dtype, values, seed=5 + k, misaligned=misaligned)] for k in names]


def stored(kind: str, values: list[Tensor], dtype: torch.dtype, layout: ops.Layout, rng: Tensor) -> list[Tensor]:
    """As the operator stores what it computed in float32; kind: see reference.update_bits."""
    bits = (ref.update_bits(index, *rng.tolist())[kind] for index in index_of(layout))
    return [ref.store(x, dtype, b) for x, b in zip(values, bits, strict=True)]


def pairs_of(optimizer: AdamW | SGD) -> list[tuple[torch.dtype, torch.dtype]]:
    """Storage of weights and of moments that go together."""
    if isinstance(optimizer, SGD):
        return [(dtype, dtype) for dtype in FLOATS]
    return [(dtype, moment) for dtype in FLOATS for moment in STATES]


def zeros_like(params: list[Tensor], count: int) -> list[list[Tensor]]:
    return [[torch.zeros_like(p) for p in params] for _ in range(count)]


def run(
    optimizer: AdamW | SGD,
    step: int,
    params: list[Tensor],
    moments: list[list[Tensor]],
    grads: list[Tensor],
    layout: ops.Layout,
    ipt: list[Tensor] | None = None,
    shadow: list[Tensor] | None = None,
    masks: list[Tensor] | None = None,
    accepted: float = 0.0,
    rng: Tensor | None = None,
    criterion: str = "pins",
    clear_state: bool = False,
    **scalars: Tensor,
) -> None:
    """Call the operator of this optimizer."""
    hyper = torch.tensor([optimizer.row(step)] * len(params), dtype=torch.float64).float().view(-1, 8)
    if isinstance(optimizer, SGD) and not moments:
        moments = [[]]
    rng = rng_of(step) if rng is None else rng
    tables = (layout.places, layout.chunks, hyper, torch.tensor([accepted]), rng)
    lists = (params, *moments, ipt or [], shadow or [], grads, masks or [])
    optimizer.op(*lists, *tables, criterion, clear_state, **scalars)


def torch_step(
    optimizer: AdamW | SGD, step: int, params: list[Tensor], moments: list[list[Tensor]], grads: list[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """One step of torch.optim in float32 from these weights and moments, as float32."""
    weights = [torch.nn.Parameter(p.float().clone()) for p in params]
    reference = optimizer.torch(weights, foreach=False)
    for i, p in enumerate(weights):
        p.grad = grads[i].float()
        if isinstance(optimizer, AdamW):
            reference.state[p]["step"] = torch.tensor(float(step - 1))
        if step > 1 or isinstance(optimizer, AdamW):
            for name, moment in zip(optimizer.moments, moments, strict=True):
                reference.state[p][name] = moment[i].float().clone()
    reference.step()
    return [p.detach() for p in weights], [[reference.state[p][name] for p in weights] for name in optimizer.moments]


@pytest.mark.parametrize("sizes", [*LISTS, "each"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.usefixtures("exact_sqrt")
def test_float32_equals_torch_to_the_last_bit(optimizer: AdamW | SGD, sizes: str) -> None:
    """Five steps; `each`: all sizes up to 70, where torch's vectors end in tails."""
    params = tensors(LISTS.get(sizes, list(range(70))), torch.float32, seed=1, misaligned=sizes == "block")
    weights = [torch.nn.Parameter(p.clone()) for p in params]
    reference = optimizer.torch(weights, foreach=False) if params else None
    moments, layout = zeros_like(params, len(optimizer.moments)), ops.Layout.of(params)
    for step in range(1, 6):
        grads = [g * 10 ** g.roll(1) for g in tensors([p.numel() for p in params], torch.float32, seed=step)]
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.clone()
        if reference:
            reference.step()
        run(optimizer, step, params, moments, grads, layout)
        assert_all_same(params, [w.detach() for w in weights])
        for name, moment in zip(optimizer.moments, moments, strict=True):
            assert_all_same(moment, [reference.state[w][name] for w in weights])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_float32_equals_torch_with_torchs_own_square_root(optimizer: AdamW | SGD) -> None:
    """To the last bit where torch's square root is exact; elsewhere the update may carry its one bit, 2^-23 of it."""
    x = torch.rand(10000)
    exact = isinstance(optimizer, SGD) or torch.equal(x.sqrt(), x.double().sqrt().float())
    params, grads = tensors([5001], torch.float32, seed=1), tensors([5001], torch.float32, seed=2)
    moments, before = zeros_like(params, len(optimizer.moments)), clones(params)
    expected, _ = torch_step(optimizer, 1, params, moments, grads)
    run(optimizer, 1, params, moments, grads, ops.Layout.of(params))
    if exact:
        assert_all_same(params, expected)
    else:
        update = (params[0] - before[0]).abs()
        assert ((params[0] - expected[0]).abs() <= 2**-22 * update + 2**-23 * params[0].abs()).all()


@pytest.mark.parametrize("values", ["normal", "special", "zeros"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.usefixtures("exact_sqrt")
def test_a_step_is_float32_rounded_once(optimizer: AdamW | SGD, values: str) -> None:
    sizes, rng = [1, 0, 700, 17000], rng_of(5)
    for dtype, moment_dtype in pairs_of(optimizer):
        params, grads = tensors(sizes, dtype, values, seed=1), tensors(sizes, dtype, values, seed=2)
        moments, layout = moments_of(optimizer, sizes, moment_dtype, values), ops.Layout.of(params)
        stepped, new_moments = torch_step(optimizer, 3, params, moments, grads)
        run(optimizer, 3, params, moments, grads, layout, rng=rng)
        assert_all_same(params, stored("params", stepped, dtype, layout, rng))
        for kind, moment, expected in zip(("first", "second"), moments, new_moments, strict=False):
            assert_all_same(moment, stored(kind, expected, moment_dtype, layout, rng))


def test_every_second_moment_is_divided_to_the_last_bit() -> None:
    """Bit patterns of all magnitudes, and biases at both ends of a binade, against NumPy's root and division."""
    patterns = torch.randint(0, 2**31, (20000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    ends = torch.tensor([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    v = torch.cat((patterns, ends)).view(torch.float32)
    roots = [math.sqrt(1 - b**t) for b in (0.0, 0.9, 0.999, 0.9999999) for t in (1, 2, 7, 100, 12345)]
    roots += [2.0**-50, *(end - k * 2.0**-24 for end in (1.0, 0.75) for k in range(5)), 0.5 + 2.0**-24]
    biases = torch.tensor(roots, dtype=torch.float64).float()
    params, grads = ([torch.zeros_like(v) for _ in biases] for _ in range(2))
    moments, layout = [[-torch.ones_like(v) for _ in biases], [v.clone() for _ in biases]], ops.Layout.of(params)
    hyper = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, -1.0, bias, 0.0] for bias in biases.tolist()])
    pins.masked_adamw_(
        params, *moments, [], [], grads, [], layout.places, layout.chunks, hyper, torch.zeros(1), rng_of(0), "pins"
    )
    with np.errstate(all="ignore"):
        expected = [torch.from_numpy(np.float32(1) / (np.sqrt(v.numpy()) / bias)) for bias in biases.numpy()]
    assert_all_same(params, expected)


@pytest.mark.parametrize("criterion", ops.CRITERIA)
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("optimizer", KINDS, ids=lambda o: type(o).__name__)
@pytest.mark.usefixtures("exact_sqrt")
def test_masks_and_importance_ride_along(
    optimizer: AdamW | SGD, dtype: torch.dtype, state: torch.dtype, criterion: str
) -> None:
    sizes = [1, 0, 65, 511, 17000]
    moment_dtypes = [moment for own, moment in pairs_of(optimizer) if own == dtype]
    for (accepted, with_shadow, with_masks, clear), moment_dtype in zip(
        ((0, False, False, False), (2, True, True, True), (3, False, True, False)), cycle(moment_dtypes), strict=False
    ):
        params, grads, shadow = (tensors(sizes, dtype, seed=s, misaligned=clear) for s in (1, 2, 3))
        ipt, rng, layout = tensors(sizes, state, seed=4), rng_of(accepted), ops.Layout.of(params)
        moments = moments_of(optimizer, sizes, moment_dtype)
        keep, masks = masks_of(params)
        if not with_masks:
            keep, masks = [torch.ones_like(k) for k in keep], []
        stepped, new_moments = torch_step(optimizer, 3, params, moments, grads)
        expected_ipt = []
        for i in range(len(params)):
            q = shadow[i] if with_shadow else params[i]
            c = ref.instant_score(criterion, q, stepped[i], grads[i], optimizer.lr)
            expected_ipt.append(ref.next_ipt(criterion, ipt[i], c, accepted))
        kwargs = {"accepted": float(accepted), "rng": rng, "criterion": criterion, "clear_state": clear}
        given = shadow if with_shadow else []
        run(optimizer, 3, params, moments, grads, layout, ipt=ipt, shadow=given, masks=masks, **kwargs)
        assert_all_same(ipt, stored("ipt", expected_ipt, state, layout, rng))
        zeroed = [torch.where(k, p, 0.0) for k, p in zip(keep, stepped, strict=True)]
        assert_all_same(params, stored("params", zeroed, dtype, layout, rng))
        if with_shadow:
            assert_all_same(shadow, stored("params", stepped, dtype, layout, rng))
        for kind, moment, expected in zip(("first", "second"), moments, new_moments, strict=False):
            kept = [torch.where(k, m, 0.0) if clear else m for k, m in zip(keep, expected, strict=True)]
            assert_all_same(moment, stored(kind, kept, moment_dtype, layout, rng))


@pytest.mark.parametrize("names", [("grad_scale",), ("clip",), ("grad_scale", "clip")], ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("optimizer", KINDS, ids=lambda o: type(o).__name__)
@pytest.mark.usefixtures("exact_sqrt")
def test_gradients_are_unscaled_and_clipped_first(
    optimizer: AdamW | SGD, state: torch.dtype, names: tuple[str, ...]
) -> None:
    scalars = {name: torch.tensor([{"grad_scale": 48.0, "clip": 0.7}[name]]) for name in names}
    scale, clip = (scalars.get(name, torch.ones(1)) for name in ("grad_scale", "clip"))
    for dtype, moment_dtype in pairs_of(optimizer):
        params, grads = (tensors([3000], dtype, seed=s) for s in (1, 2))
        ipt, moments = tensors([3000], state, seed=3), moments_of(optimizer, [3000], moment_dtype)
        layout, rng = ops.Layout.of(params), rng_of(3)
        used = [(g.float() / scale) * clip for g in grads]
        stepped, new_moments = torch_step(optimizer, 3, params, moments, used)
        c = ref.instant_score("pins-update", params[0], stepped[0], used[0], optimizer.lr)
        expected = [ref.next_ipt("pins-update", ipt[0], c, 1)]
        kwargs = {"ipt": ipt, "accepted": 1.0, "criterion": "pins-update", "rng": rng, **scalars}
        run(optimizer, 3, params, moments, grads, layout, **kwargs)
        assert_all_same(params, stored("params", stepped, dtype, layout, rng))
        assert_all_same(ipt, stored("ipt", expected, state, layout, rng))
        for kind, moment, values in zip(("first", "second"), moments, new_moments, strict=False):
            assert_all_same(moment, stored(kind, values, moment_dtype, layout, rng))


@pytest.mark.parametrize("optimizer", KINDS, ids=lambda o: type(o).__name__)
def test_a_skipped_step_touches_nothing(optimizer: AdamW | SGD) -> None:
    params, grads, ipt, shadow = (tensors([700], torch.float32, seed=s) for s in (1, 2, 3, 4))
    moments, (_, masks) = zeros_like(params, len(optimizer.moments)), masks_of(params)
    everything = [*params, *ipt, *shadow, *(m for moment in moments for m in moment)]
    before = clones(everything)
    kwargs = {"ipt": ipt, "shadow": shadow, "masks": masks, "clear_state": True, "found_inf": torch.ones(1)}
    run(optimizer, 1, params, moments, grads, ops.Layout.of(params), **kwargs)
    assert_all_same(everything, before)


def test_rows_differ_by_tensor() -> None:
    params, grads = tensors([300, 20000], torch.float32, seed=1), tensors([300, 20000], torch.float32, seed=2)
    layout = ops.Layout.of(params)
    hyper = torch.tensor([SGD(0.5).row(1), SGD(0.25, weight_decay=0.5).row(1)])
    expected = [
        torch_step(o, 1, [p], [], [g])[0][0]
        for o, p, g in zip((SGD(0.5), SGD(0.25, weight_decay=0.5)), params, grads, strict=True)
    ]
    pins.masked_sgd_(
        params, [], [], [], grads, [], layout.places, layout.chunks, hyper, torch.zeros(1), rng_of(0), "pins"
    )
    assert_all_same(params, expected)


@pytest.mark.parametrize("values", ["normal", "special"])
@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_apply_mask(dtype: torch.dtype, sizes: str, values: str) -> None:
    params = tensors(LISTS[sizes], dtype, values, misaligned=True)
    keep, masks = masks_of(params)
    expected = [torch.where(k, p, torch.zeros((), dtype=dtype)) for k, p in zip(keep, params, strict=True)]
    layout = ops.Layout.of(params)
    pins.apply_mask_(params, masks, layout.places, layout.chunks)
    assert_all_same(params, expected)


def test_both_optimizers_are_the_ones_that_torch_names() -> None:
    """The rows above are those of pins_ext.optim, which the Pruner drives."""
    from pins_ext.optim import PinsAdamW, PinsSGD

    def after(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Tensor:
        p = torch.nn.Parameter(tensors([900], torch.float32, seed=1)[0])
        optimizer = make([p])
        for step in range(3):
            p.grad = tensors([900], torch.float32, seed=step)[0]
            optimizer.step()
        return p.detach()

    def by_op(optimizer: AdamW | SGD) -> Tensor:
        params = tensors([900], torch.float32, seed=1)
        moments = zeros_like(params, len(optimizer.moments))
        for step in range(3):
            run(optimizer, step + 1, params, moments, tensors([900], torch.float32, seed=step), ops.Layout.of(params))
        return params[0]

    adamw, sgd = AdamW(1e-2, weight_decay=0.1), SGD(0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    assert torch.equal(after(lambda p: PinsAdamW(p, lr=1e-2, weight_decay=0.1)), by_op(adamw))
    kwargs = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    assert torch.equal(after(lambda p: PinsSGD(p, lr=0.05, **kwargs)), by_op(sgd))
