"""Calls of the operators at a window's boundary, and what the separate ones leave: for the tests of csrc/cuda."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import tensors
from cuda_job import Job, Lists
from torch import Tensor

from pins_ext import ops

pins = torch.ops.pins_ext
BETAS = (0.85, 0.95)
FOLD_RNG = (0x13579BDF, 0x2468ACE0)


@dataclass
class Written:
    """What a call writes beside its lists."""

    stats: Tensor
    threshold: Tensor
    counts: Tensor


@dataclass
class BoundaryJob(Job):
    """A job whose pass also chooses masks, ends a window, or both.

    Attributes:
        chooses: masks, by the averages; by a bracket of few weights, or where it is `given` by the threshold itself.
        folds: the window's mean into the averages.
        counts: their new scores.
        uncertain: whether there is a second average.
        values: of the averages, see cases.tensor.
        keep: share of the weights that is kept.
    """

    chooses: bool = True
    folds: bool = True
    counts: bool = True
    given: bool = False
    uncertain: bool = True
    values: str = "normal"
    keep: float = 0.3
    around: Tensor = field(init=False, repr=False)
    threshold: Tensor = field(init=False, repr=False)
    bracket: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = [p.numel() for p in self.lists["params"]]
        for seed, name in enumerate(("exp_avg_ipt", "exp_avg_unc")):
            wanted = self.uncertain or name == "exp_avg_ipt"
            drawn = tensors(sizes, torch.float32, self.values, seed + 11) if wanted else []
            signed = self.values == "special"
            self.lists[name] = [(x if signed else x.abs()).to(self.state) for x in drawn]
        if self.chooses:  # what a mask holds behind its last weight counts for nothing
            for bits, n in zip(self.lists["masks"], sizes, strict=True):
                bits[-1:] |= 0x80 * (n % 64 != 0)
        total = sum(sizes)
        rank = torch.tensor(min(max(round((1 - self.keep) * total), 0), max(total - 1, 0)))
        cut = pins.select(*self.scores(self.lists), rank).reshape(1, 2)
        self.bracket = ops.bracket_around(cut)
        counts = torch.zeros(1 + ops.BINS, dtype=torch.int64)
        pins.count_(counts, *self.scores(self.lists), self.bracket)
        key = int(cut[0, 0])
        bin_ = pins.narrow(self.bracket, counts, rank)
        self.around = torch.tensor([key, key, 0, -1, 1]) if self.given or not total else bin_
        self.threshold = cut if self.given else torch.full((1, 2), -7)

    def storage(self, name: str) -> torch.dtype:
        return self.state if name in ("exp_avg_ipt", "exp_avg_unc") else super().storage(name)

    def scores(self, lists: Lists) -> tuple[Any, ...]:
        """What the operators that read the averages' score take first."""
        a, b = lists["exp_avg_ipt"], lists["exp_avg_unc"]
        device = self.layout.places.device
        assert device.type == "cpu"
        return a, b, self.layout.places, self.layout.chunks, "product" if b else "identity"

    def written(self, device: str = "cpu") -> Written:
        """What is written beside the lists, as it is before a call."""
        counts = torch.full((1 + ops.BINS,), 5, device=device)
        stats = torch.full((len(self.layout.places), 3), 7, dtype=torch.int64, device=device)
        return Written(stats, self.threshold.clone().to(device), counts)

    def call(self, lists: Lists, **pointers: Tensor) -> Written:
        """Run the operator on placed lists; what it writes beside them."""
        device = str(lists["params"][0].device)
        arguments, scalars = self.arguments({k: v for k, v in lists.items() if k not in ("exp_avg_ipt", "exp_avg_unc")})
        names = [name for name in self.lists if name not in ("exp_avg_ipt", "exp_avg_unc")]
        by_name = dict(zip(names, arguments, strict=False))
        rest = arguments[len(names) :]
        out = self.written(device)
        choice = {"around": self.around.to(device), "stats": out.stats, "threshold": out.threshold}
        fold = {"fold_rng": torch.tensor(FOLD_RNG, device=device), "beta1": BETAS[0], "beta2": BETAS[1]}
        counting = {"bracket": self.bracket.to(device), "counts": out.counts}
        before = [by_name[name] for name in names if name not in ("grads", "masks")]
        operator = getattr(pins, f"boundary_{self.step}_")
        operator(
            *before, by_name["masks"], lists["exp_avg_ipt"], lists["exp_avg_unc"], by_name["grads"], *rest, **scalars,
            **(choice if self.chooses else {}), **(fold if self.folds else {}),
            **(counting if self.folds and self.counts else {}), **pointers,
        )  # fmt: skip
        return out

    def separately(self) -> tuple[Lists, Written]:
        """What the CPU's separate operators leave."""
        lists, out = self.place("cpu"), self.written()
        averages = {name: lists.pop(name) for name in ("exp_avg_ipt", "exp_avg_unc")}
        ipt = [x.clone() for x in lists["ipt"]]
        if self.chooses and self.given:
            pins.pack_(lists["masks"], out.stats, *self.scores(averages), out.threshold)
        elif self.chooses:
            pins.pack_around_(lists["masks"], out.stats, out.threshold, *self.scores(averages), self.around)
        arguments, scalars = self.arguments(lists)
        self.op(*arguments, **scalars)
        if self.folds:
            counting = {"bracket": self.bracket, "counts": out.counts} if self.counts else {}
            a, b, *tables, _ = self.scores(averages)
            rng = torch.tensor(FOLD_RNG)
            pins.fold_(a, b, lists["ipt"], *tables, torch.ones(1), rng, *BETAS, **counting)
            lists["ipt"] = ipt  # the window's mean stays out of memory
        return lists | averages, out

    def check_all(self, lists: Lists, written: Written, separate: tuple[Lists, Written] | None = None) -> None:
        """The same bits as of the separate operators."""
        want, outputs = separate or self.separately()
        for name in ("stats", "threshold", "counts"):
            got, expected = getattr(written, name).cpu(), getattr(outputs, name)
            assert torch.equal(got, expected), (name, got[:9], expected[:9], self)
        masks, expected = lists.pop("masks"), want.pop("masks")
        for bits, right in zip(masks, expected, strict=True):
            assert torch.equal(bits.cpu(), right), self
        self.check(lists, want)

    def pack(self) -> bytes:
        flags = self.chooses | self.folds << 1 | (self.folds and self.counts) << 2
        longs = (flags, *self.around.tolist(), *self.threshold[0].tolist(), *FOLD_RNG, *self.bracket.tolist())
        betas = [b for beta in BETAS for b in (beta, 1 - beta)]
        return super().pack() + struct.pack("<15q4f", *longs, *betas)

    def unpack_all(self, data: bytes) -> tuple[Lists, Written, bytes]:
        """The lists, what is written beside them, and the data of the jobs behind this one."""
        _, lists, data = self.unpack(data)
        n = 3 * len(self.layout.places)
        size = n + 2 + 1 + ops.BINS
        longs = torch.tensor(struct.unpack_from(f"<{size}q", data), dtype=torch.int64)
        before = self.written()
        out = Written(
            longs[:n].view(-1, 3) if self.chooses else before.stats,
            longs[n : n + 2].view(1, 2),
            longs[n + 2 :] if self.folds and self.counts else before.counts,
        )
        return lists, out, data[8 * size :]
