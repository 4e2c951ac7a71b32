"""boundary_adamw_ and boundary_sgd_ against the operators that do the same one after another, to the last bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pins_ext import ops

SHAPES = [(130, 71), (1,), (64,), (17001,), (0,), (9, 33)]
pins = torch.ops.pins_ext
KEEP = 8000
DTYPES = {"F": torch.float32, "B": torch.bfloat16, "H": torch.float16}


class States:
    """Random operands of one step; each call of `copy` gives the same ones."""

    def __init__(
        self, seed: int, dtype: torch.dtype, moments: torch.dtype, state: torch.dtype, scores_alike: bool
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(dtype: torch.dtype, positive: bool = False) -> list[Tensor]:
            drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
            return [(x.abs() if positive else x).to(dtype) for x in drawn]

        self.lists = {name: draw(dtype) for name in ("params", "grads", "shadow", "momentum")}
        self.lists |= {"exp_avg": draw(moments), "exp_avg_sq": draw(moments, True)}
        self.lists |= {name: draw(state, True) for name in ("ipt", "mean", "unc")}
        if scores_alike:  # ties, and scores that are not numbers
            for x in self.lists["mean"] + self.lists["unc"]:
                x.fill_(0.5)
                x.view(-1)[5::7] = torch.nan
        self.lists["masks"] = [
            torch.randint(0, 256, (ops.mask_bytes(x.numel()),), generator=generator, dtype=torch.uint8)
            for x in self.lists["params"]
        ]

    def copy(self) -> dict[str, list[Tensor]]:
        return {name: [x.clone() for x in tensors] for name, tensors in self.lists.items()}


def run(states: States, one: bool, sgd: bool, criterion: str, accepted: float, flags: dict[str, bool]) -> list[Tensor]:
    """The step, in one call or in several; everything that is written."""
    x = states.copy()
    layout = ops.Layout.of(x["params"])
    tables = (layout.places, layout.chunks)
    unc = x["unc"] if flags["uncertain"] else []
    score = "product" if unc else "identity"
    hyper = torch.tensor([[3e-2, 0.99, 0.1, 0.999, 0.001, -3e-2, 0.3, 1e-8]]).repeat(len(SHAPES), 1)
    if sgd:
        hyper = torch.tensor([[3e-2, 0.01, 0.9, 1.0, 0.0, 1.0, -3e-2, 0.0]]).repeat(len(SHAPES), 1)
    moments = [x["momentum"]] if sgd else [x["exp_avg"], x["exp_avg_sq"]]
    shadow = x["shadow"] if flags["shadow"] else []
    rest = [*tables, hyper, torch.tensor([accepted]), torch.tensor([7, 8]), criterion, flags["clear"]]
    stats, threshold = torch.zeros(len(SHAPES), 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64)
    cut = pins.select(x["mean"], unc, *tables, score, torch.tensor(KEEP)).reshape(1, 2)
    bracket = ops.bracket_around(cut)
    pins.count_(counts, x["mean"], unc, *tables, score, bracket)
    around = pins.narrow(bracket, counts, torch.tensor(KEEP))
    counts.zero_()
    counting: dict[str, Any] = {"bracket": bracket, "counts": counts} if flags["counts"] else {}
    folding = torch.tensor([9, 10])
    if one:
        chosen = {"around": around, "stats": stats, "threshold": threshold} if flags["chooses"] else {}
        folded = {"fold_rng": folding, "beta1": 0.85, "beta2": 0.95, **counting} if flags["folds"] else {}
        operator = pins.boundary_sgd_ if sgd else pins.boundary_adamw_
        operator(x["params"], *moments, x["ipt"], shadow, x["masks"], x["mean"], unc, x["grads"], *rest,
                 clip=torch.tensor([0.37]), **chosen, **folded)  # fmt: skip
    else:
        if flags["chooses"]:
            pins.pack_around_(x["masks"], stats, threshold, x["mean"], unc, *tables, score, around)
        operator = pins.masked_sgd_ if sgd else pins.masked_adamw_
        operator(x["params"], *moments, x["ipt"], shadow, x["grads"], x["masks"], *rest, clip=torch.tensor([0.37]))
        if flags["folds"]:
            pins.fold_(x["mean"], unc, x["ipt"], *tables, torch.ones(1), folding, 0.85, 0.95, **counting)
    kept = [] if flags["folds"] else x["ipt"]  # the window's mean stays out of memory
    masks = [ops.unpack_bits(bits, p.shape) for bits, p in zip(x["masks"], x["params"], strict=True)]
    return [
        *x["params"],
        *itertools.chain(*moments),
        *shadow,
        *masks,
        *x["mean"],
        *unc,
        *kept,
        stats,
        threshold,
        counts,
    ]


NAMES = ("chooses", "folds", "counts", "uncertain", "shadow", "clear")
FLAGS = [dict(zip(NAMES, values, strict=True)) for values in itertools.product([False, True], repeat=len(NAMES))]
FLAGS = [flags for flags in FLAGS if (flags["chooses"] or flags["folds"]) and (flags["folds"] or not flags["counts"])]


@pytest.mark.parametrize("sgd", [False, True], ids=["adamw", "sgd"])
@pytest.mark.parametrize(
    "dtypes", ["F F F", "F F B", "F B F", "F B B", "B F F", "B F B", "B B F", "B B B", "H F F", "H B B"]
)
def test_one_call_is_what_several_are(dtypes: str, sgd: bool) -> None:
    """Storage of weights, AdamW's moments and statistics."""
    for seed, flags in enumerate(FLAGS):
        criterion = ("pins", "pins-update", "platon", "movement")[seed % 4]
        accepted = (0.0, 0.0, 3.0)[seed % 3]
        states = States(seed, *(DTYPES[d] for d in dtypes.split()), scores_alike=seed % 5 == 0)
        one, several = (run(states, way, sgd, criterion, accepted, flags) for way in (True, False))
        for a, b in zip(one, several, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (flags, criterion, accepted)
