"""Fake versions of the operators: what torch.compile and opcheck need to know of shapes."""

from __future__ import annotations

import torch


@torch.library.register_fake("pins_ext::sample")
def _(a, b, places, chunks, score, size, *, pointers=None):  # type: ignore[no-untyped-def]
    return places.new_empty(size)


@torch.library.register_fake("pins_ext::tie_index")
def _(a, b, places, chunks, score, bracket, *, pointers=None):  # type: ignore[no-untyped-def]
    return places.new_empty(1)


@torch.library.register_fake("pins_ext::select")
def _(a, b, places, chunks, score, n_prune, exact=True, *, bracket=None, counts=None, pointers=None):  # type: ignore[no-untyped-def]
    return places.new_empty(2)


def _no_output(*args: object, **kwargs: object) -> None:
    return None


for _name in ("accumulate_", "fold_", "count_", "collect_", "pack_", "masked_adamw_", "masked_sgd_", "apply_mask_"):
    torch.library.register_fake(f"pins_ext::{_name}", _no_output)
