"""Latency as sparsity and tokens grow, and where it crosses that of each peer: `pins-ext bench-inference --curves`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
TOKENS = ("1", "4", "16", "64", "128", "512", "4x512")
"""Up to 2048; a BERT's sequence has 512 at most."""

AT = ("1", "1x128")
"""Where sparsity varies."""

SPARSITY = 0.9
"""Where tokens vary."""

SECONDS = 10.0
"""For measuring at a place: the whole of it ends within ten minutes."""

OURS = "pins_ext "


@dataclass(frozen=True)
class Point:
    """What was measured at one place of a curve: milliseconds by runtime."""

    x: float
    milliseconds: dict[str, float]


def crossing(points: Sequence[Point], ours: str, peer: str) -> tuple[str, float | None]:
    """How `ours` meets `peer` along a curve: "everywhere", "nowhere", "from" a place on, "up to" it, or "on and off".

    Between two points the logarithm of the ratio is taken as linear.

    Args:
        points: in rising order, each with both runtimes.
        ours: name of a runtime.
        peer: of another.

    Returns:
        The word, and the place where there is one.
    """
    ahead = [math.log(p.milliseconds[peer] / p.milliseconds[ours]) for p in points]
    signs = [gain > 0 for gain in ahead]
    turns = [i for i in range(1, len(signs)) if signs[i] != signs[i - 1]]
    if not turns:
        return ("everywhere" if signs[0] else "nowhere"), None
    if len(turns) > 1:
        return "on and off", None
    i = turns[0]
    share = ahead[i - 1] / (ahead[i - 1] - ahead[i])
    return ("from" if signs[i] else "up to"), points[i - 1].x + share * (points[i].x - points[i - 1].x)


def summary(over: str, where: str, points: Sequence[Point]) -> dict[str, Any]:
    """A curve with its crossings, for JSON and `lines`.

    Args:
        over: "sparsity" or "tokens".
        where: what stays the same along it, e.g. "1 x 128 tokens".
        points: in rising order.
    """
    names = [name for name in points[0].milliseconds if all(name in p.milliseconds for p in points)]
    ours, peers = ([n for n in names if n.startswith(OURS) == mine] for mine in (True, False))
    crossings = {name: {peer: crossing(points, name, peer) for peer in peers} for name in ours}
    series = {name: [p.milliseconds[name] for p in points] for name in names}
    return {"over": over, "where": where, "x": [p.x for p in points], "series": series, "crossings": crossings}


def lines(curve: dict[str, Any]) -> list[str]:
    """A curve for people."""
    text = _place(curve["over"])
    found = [f"{curve['where']}, ms over {curve['over']}"]
    found.append(f"  {'':<22}" + "".join(f"{text(x):>9}" for x in curve["x"]))
    found += [f"  {name:<22}" + "".join(f"{ms:>9.1f}" for ms in times) for name, times in curve["series"].items()]
    for name, against in curve["crossings"].items():
        words = [f"{peer} {word}{'' if x is None else ' ' + text(x)}" for peer, (word, x) in against.items()]
        found.append(f"  {name} is faster than: " + "; ".join(words))
    return found


def _place(over: str) -> Callable[[float], str]:
    return (lambda x: f"{100 * x:.3g} %") if over == "sparsity" else (lambda x: f"{x:,.0f}")


def draw(curves: Sequence[dict[str, Any]], figure: Any) -> None:
    """One picture a curve, on a matplotlib figure; ours in colour."""
    for curve, axes in zip(curves, figure.subplots(len(curves), 1, squeeze=False)[:, 0], strict=True):
        for name, times in curve["series"].items():
            mine = name.startswith(OURS)
            axes.plot(curve["x"], times, marker=".", label=name, linestyle="-" if mine else "--")
        axes.set_yscale("log")
        if curve["over"] == "tokens":
            axes.set_xscale("log", base=2)
        axes.set_title(curve["where"])
        axes.set_xlabel(curve["over"])
        axes.set_ylabel("ms")
        axes.legend(fontsize="small")
