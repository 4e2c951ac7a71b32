"""A training step with the operators in it compiles to one graph and computes the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from pins_ext import ops

OPS = torch.ops.pins_ext


def step(
    params: list[Tensor], states: list[list[Tensor]], grads: list[Tensor], masks: list[Tensor], tables: list[Tensor]
) -> Tensor:
    """Fold, select, pack and the masked update of one boundary step; returns the threshold."""
    exp_avg, exp_avg_sq, ipt, exp_avg_ipt, exp_avg_unc = states
    places, chunks, accepted, rng, hyper, stats, n_prune = tables
    OPS.fold_(exp_avg_ipt, exp_avg_unc, ipt, places, chunks, accepted, rng, 0.85, 0.95)
    threshold = OPS.select(exp_avg_ipt, exp_avg_unc, places, chunks, "product", n_prune)
    OPS.pack_(masks, stats, exp_avg_ipt, exp_avg_unc, places, chunks, "product", threshold.reshape(1, 2))
    OPS.masked_adamw_(params, exp_avg, exp_avg_sq, ipt, [], grads, masks, places, chunks, hyper, accepted, rng, "pins")
    OPS.apply_mask_(params, masks, places, chunks)
    return threshold


def arguments() -> tuple[list[Tensor], list[list[Tensor]], list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator) for n in (100, 3000)]
    states = [[torch.rand(p.shape, generator=generator) for p in params] for _ in range(5)]
    grads = [torch.randn(p.shape, generator=generator) for p in params]
    layout = ops.Layout.of(params)
    hyper = torch.tensor([[1e-3, 1.0, 0.1, 0.999, 0.001, -1e-2, 0.03, 1e-8]] * 2)
    stats = torch.zeros(2, 3, dtype=torch.int64)
    tables = [layout.places, layout.chunks, torch.ones(1), torch.tensor([1, 2]), hyper, stats, torch.tensor(2000)]
    return params, states, grads, [ops.new_mask(p) for p in params], tables


def test_a_step_compiles_without_graph_breaks_and_changes_no_bit() -> None:
    eager, compiled = arguments(), arguments()
    expected = step(*eager)
    threshold = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(threshold, expected)
    for one, other in ((eager[0], compiled[0]), (eager[3], compiled[3]), *zip(eager[1], compiled[1], strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert sum(int((p == 0).sum()) for p in compiled[0]) == 2000
