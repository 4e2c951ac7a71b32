"""The operators: `torch.ops.pins_ext.*` for CPU and CUDA, their fake versions, and typed wrappers.

Schemas are defined in csrc/ops.cpp, CPU kernels in csrc/cpu, the CUDA update in csrc/cuda; the other CUDA kernels are
Triton's and are registered here. Every operator works on a list of tensors of any size in one call, and knows each
tensor's place in the concatenation of all full, unsharded tensors (its global index), which decides ties and seeds
stochastic rounding; so results depend neither on sharding nor on launch order.
"""

from __future__ import annotations

import torch

from pins_ext import _C  # noqa: F401  (loads the library; its operators register themselves)
from pins_ext.criteria import INSTANT as CRITERIA
from pins_ext.criteria import SCORES
from pins_ext.ops import bracket
from pins_ext.ops.bracket import BINS, MAX_INDEX, MAX_KEY, bracket_around
from pins_ext.ops.layout import CHUNK, Layout, Shard, Subsets
from pins_ext.ops.masks import mask_bytes, new_mask, pack_bits, unpack_bits
from pins_ext.ops.norm import clip_factor
from pins_ext.ops.rounding import rounding_key
from pins_ext.ops.select import CANDIDATES, SAMPLES, score_of_key, select
from pins_ext.ops.transfer import to_device
from pins_ext.triton_kernels import register as register_triton

__all__ = [
    "BINS",
    "CANDIDATES",
    "CHUNK",
    "CRITERIA",
    "MAX_INDEX",
    "MAX_KEY",
    "SAMPLES",
    "SCORES",
    "Layout",
    "Shard",
    "Subsets",
    "bracket_around",
    "clip_factor",
    "mask_bytes",
    "new_mask",
    "pack_bits",
    "rounding_key",
    "score_of_key",
    "to_device",
    "unpack_bits",
]

_library = torch.library.Library("pins_ext", "IMPL")
for _key in ("CPU", "CUDA"):
    _library.impl("select", select, _key)
for _op in (bracket.bracket_of, bracket.narrow, bracket.settle, bracket.cutoff):
    _library.impl(_op.__name__, _op, "CPU")
# Triton itself is imported when the first CUDA tensor arrives.
register_triton(_library)

from pins_ext.ops import fakes  # noqa: E402, F401  (after the operators that they stand for)
