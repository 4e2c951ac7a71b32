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
from pins_ext.ops import bracket, grouped
from pins_ext.ops.boundary import boundary_adamw_, boundary_sgd_
from pins_ext.ops.bracket import BINS, MAX_INDEX, MAX_KEY, bracket_around
from pins_ext.ops.coded import (
    CODED,
    by_group,
    check_cut,
    coded_box,
    coded_bytes,
    coded_shape,
    decode,
    encode,
    is_coded,
    new_state,
)
from pins_ext.ops.cpu import cpu_capability, stream_
from pins_ext.ops.eligible import eligible_
from pins_ext.ops.grouped import GroupedWeight, grouped_expand, grouped_linear, grouped_pack
from pins_ext.ops.importance import accumulate_, fold_, fold_moments_
from pins_ext.ops.layout import CHUNK, GROUP, Layout, Shard, Subsets
from pins_ext.ops.masks import apply_mask_, mask_bytes, new_mask, pack_, pack_around_, pack_bits, set_bits, unpack_bits
from pins_ext.ops.norm import clip_factor, sum_of_squares
from pins_ext.ops.regions import Bounds, Count, Regions, Search, count_regions_, search_bytes
from pins_ext.ops.rounding import fold_key, fold_keys, rounding_key, rounding_keys
from pins_ext.ops.select import (
    CANDIDATES,
    bin_of,
    bin_or_cutoff,
    listed_bytes,
    pack_lowest_,
    samples_of,
    score_of_key,
)
from pins_ext.ops.select import select as select_on_any_device
from pins_ext.ops.sparse import PackedWeight, sparse_linear, sparse_linear_int8, sparse_pack

# After the submodule `select`, whose place in this package the function of that name takes.
from pins_ext.ops.threshold import (
    bracket_of,
    collect_,
    count_,
    cutoff,
    narrow,
    sample,
    select,
    settle,
    settle_around,
    tie_index,
)
from pins_ext.ops.transfer import MANY, KeptLists, PointerTables, Uploads, capturing, on_device, to_device
from pins_ext.ops.update import masked_adamw_, masked_sgd_
from pins_ext.triton_kernels import register as register_triton

__all__ = [
    "BINS",
    "CANDIDATES",
    "CHUNK",
    "CODED",
    "CRITERIA",
    "GROUP",
    "MANY",
    "MAX_INDEX",
    "MAX_KEY",
    "SCORES",
    "Bounds",
    "Count",
    "GroupedWeight",
    "KeptLists",
    "Layout",
    "PackedWeight",
    "PointerTables",
    "Regions",
    "Search",
    "Shard",
    "Subsets",
    "Uploads",
    "accumulate_",
    "apply_mask_",
    "bin_of",
    "bin_or_cutoff",
    "boundary_adamw_",
    "boundary_sgd_",
    "bracket_around",
    "bracket_of",
    "by_group",
    "capturing",
    "check_cut",
    "clip_factor",
    "coded_box",
    "coded_bytes",
    "coded_shape",
    "collect_",
    "count_",
    "count_regions_",
    "cpu_capability",
    "cutoff",
    "decode",
    "eligible_",
    "encode",
    "fold_",
    "fold_key",
    "fold_keys",
    "fold_moments_",
    "grouped_expand",
    "grouped_linear",
    "grouped_pack",
    "is_coded",
    "listed_bytes",
    "mask_bytes",
    "masked_adamw_",
    "masked_sgd_",
    "narrow",
    "new_mask",
    "new_state",
    "on_device",
    "pack_",
    "pack_around_",
    "pack_bits",
    "pack_lowest_",
    "rounding_key",
    "rounding_keys",
    "sample",
    "samples_of",
    "score_of_key",
    "search_bytes",
    "select",
    "set_bits",
    "settle",
    "settle_around",
    "sparse_linear",
    "sparse_linear_int8",
    "sparse_pack",
    "stream_",
    "sum_of_squares",
    "tie_index",
    "to_device",
    "unpack_bits",
]

_library = torch.library.Library("pins_ext", "IMPL")
for _key in ("CPU", "CUDA"):
    _library.impl("select", select_on_any_device, _key)
for _op in (bracket.bracket_of, bracket.narrow, bracket.settle, bracket.cutoff):
    _library.impl(_op.__name__, _op, "CPU")
_library.impl("grouped_linear", grouped.linear, "CPU")
_library.impl("grouped_expand", grouped.expand, "CPU")
if not torch._C._dispatch_has_kernel_for_dispatch_key("pins_ext::grouped_expand", "CUDA"):
    _library.impl("grouped_expand", grouped.expand, "CUDA")
# Triton itself is imported when the first CUDA tensor arrives.
register_triton(_library)

from pins_ext.ops import fakes  # noqa: E402, F401  (after the operators that they stand for)
