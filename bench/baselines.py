"""What others do: the released algorithm in eager PyTorch, its tuned and compiled variants, torch's own selections."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pins_ext import reference

from .protocol import Case

_QUANTILE_LIMIT = 1 << 24

Find = Callable[[Tensor, int], Tensor]


def kthvalue(scores: Tensor, n_prune: int) -> Tensor:
    """The n_prune-th smallest score, as the released code finds it."""
    return torch.kthvalue(scores, n_prune).values


def topk(scores: Tensor, n_prune: int) -> Tensor:
    """The same threshold from the smaller side, unsorted: the quickest that torch offers."""
    n = scores.numel()
    if 2 * n_prune < n:
        return torch.topk(scores, n_prune, largest=False, sorted=False).values.amax()
    return torch.topk(scores, n - n_prune + 1, sorted=False).values.amin()


def sort(scores: Tensor, n_prune: int) -> Tensor:
    """The same from a full sort."""
    return torch.sort(scores).values[n_prune - 1]


def quantile(scores: Tensor, n_prune: int) -> Tensor:
    """The same up to interpolation; torch refuses more than 2^24 elements."""
    return torch.quantile(scores.float(), n_prune / scores.numel(), interpolation="lower")


def seconds_of(find: Find, scores: Tensor, n_prune: int) -> float:
    """How long `find` will take on all scores, from what it takes on a 64th of them."""
    total = scores.numel()
    piece = scores[: min(total, max(1 << 18, total // 64))]

    def once() -> float:
        begin = time.perf_counter()
        find(piece, max(1, n_prune * piece.numel() // total)).item()
        return time.perf_counter() - begin

    return min(once(), once()) * total / piece.numel()


def selection_cases(a: list[Tensor], b: list[Tensor], n_prune: int) -> list[Case]:
    """Peers of `select`: the threshold among materialised scores, and with the scores still to be computed."""
    materialised = torch.cat([(x * y).flatten() for x, y in zip(a, b, strict=True)])
    n, item = materialised.numel(), materialised.element_size()

    def from_states(find: Find, turn: int) -> Tensor:
        scores = {i: x * y for i, (x, y) in enumerate(zip(a, b, strict=True))}
        return find(torch.cat([s.flatten() for s in scores.values()]), n_prune)

    finders: list[tuple[Find, int, bool]] = [
        (kthvalue, item + 8, True),
        (topk, 16 + 12, False),
        (sort, 2 * item + 16, True),
        (quantile, 12, True),
    ]
    cases = []
    for find, beside, slow in finders:
        # Past its limit, quantile fails at once.
        predict = None if find is quantile and n > _QUANTILE_LIMIT else partial(seconds_of, find, materialised, n_prune)
        name = "topk(sorted=False)" if find is topk else str(getattr(find, "__name__", find))
        if find in (kthvalue, topk):
            cases.append(
                Case(
                    f"eager score + cat + {name}",
                    partial(from_states, find),
                    "peer",
                    n,
                    against="select",
                    slow=slow,
                    needs=n * (2 * item + beside),
                    predict=predict,
                )
            )
        cases.append(
            Case(
                f"torch.{name} on scores",
                lambda turn, find=find: find(materialised, n_prune),  # type: ignore[misc]
                "peer",
                n,
                against="select",
                slow=slow,
                needs=n * beside,
                predict=predict,
            )
        )
    return cases


class EagerStep:
    """A training step of the released algorithm: importance, optimizer, cat, a threshold, masked_fill_.

    Args:
        parameters: with gradients in place.
        ratio: remaining ratio, constant.
        fused: torch's fused AdamW and topk in place of its plain one and kthvalue.
        compiled: importance and scores through torch.compile, one graph for tensors of any size.
    """

    def __init__(
        self, parameters: Sequence[Tensor], ratio: float, delta_t: int, lr: float, fused: bool, compiled: bool = False
    ) -> None:
        named = {str(i): p for i, p in enumerate(parameters)}
        # Masks are due from the first step on, as in the middle of a schedule.
        self.eager = reference.EagerPins(named, 1 << 40, -1, 0, ratio, ratio, delta_t=delta_t)
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, fused=fused or None)
        self.lr, self.fused = lr, fused
        self._compile = partial(torch.compile, dynamic=True) if compiled else None
        if self._compile:
            self._inside, self._boundary, self._product = map(self._compile, (_inside, _boundary, torch.mul))

    def step(self) -> None:
        """One step."""
        if self._compile:
            self._importance_compiled()
        else:
            self.eager.before_step(self.lr)
        self.optimizer.step()
        if self.fused:
            self._mask_by_topk()
        else:
            self.eager.after_step()

    @torch.no_grad()
    def _importance_compiled(self) -> None:
        e = self.eager
        place = torch.tensor(float(e.t % e.delta_t))
        for name, p in e.parameters.items():
            assert p.grad is not None
            states = (s[name].view(-1) for s in (e.ipt, e.exp_avg_ipt, e.exp_avg_unc))
            if e.t % e.delta_t:
                self._inside(p.detach().view(-1), p.grad.view(-1), next(states), self.lr, place.to(p))
            else:
                self._boundary(p.detach().view(-1), p.grad.view(-1), *states, self.lr, e.beta1, e.beta2)

    @torch.no_grad()
    def _mask_by_topk(self) -> None:
        e = self.eager
        due = e.t % e.delta_t == 0
        e.t += 1
        if not due:
            return
        ratio = e.schedule[-1]
        scores = (
            {n: self._product(e.exp_avg_ipt[n].view(-1), e.exp_avg_unc[n].view(-1)) for n in e.ipt}
            if (self._compile)
            else e.scores()
        )
        everything = torch.cat([s.flatten() for s in scores.values()])
        threshold = topk(everything, int(everything.numel() * (1 - ratio)))
        for name, p in e.parameters.items():
            p.masked_fill_(scores[name].view(p.shape) < threshold, 0.0)


def _inside(p: Tensor, g: Tensor, ipt: Tensor, lr: float, place: Tensor) -> None:
    c = ((-p * g) + (lr * g * g)).abs()
    ipt.copy_((ipt * place + c) / (place + 1))


def _boundary(
    p: Tensor, g: Tensor, ipt: Tensor, exp_avg_ipt: Tensor, exp_avg_unc: Tensor, lr: float, beta1: float, beta2: float
) -> None:
    exp_avg_ipt.mul_(beta1).add_((1 - beta1) * ipt)
    exp_avg_unc.mul_(beta2).add_((1 - beta2) * (ipt - exp_avg_ipt).abs())
    ipt.copy_(((-p * g) + (lr * g * g)).abs())
