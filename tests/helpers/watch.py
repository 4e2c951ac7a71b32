"""Counts what a GPU's host would do: operator calls, reads of device values, uploads."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pins_ext import ops
from pins_ext.pruning.selection import Selection

SELECT = import_module("pins_ext.ops.select")
REGIONS = import_module("pins_ext.ops.regions")
PACKAGE = Path(ops.__file__).parents[1]

# What copies from the device and waits for it, or lets the size of a result depend on values. `tolist` and `numpy`
# read a CPU tensor without any operator and are watched by name.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item", "allclose")

ADDRESSED = tuple(
    f"pins_ext.{name}"
    for name in (
        *("accumulate_", "fold_", "fold_moments_", "pack_", "apply_mask_"),
        *("select", "sample", "count_", "count_regions_", "collect_", "tie_index"),
        *("masked_adamw_", "masked_sgd_", "boundary_adamw_", "boundary_sgd_", "sum_of_squares"),
    )
)

# Tables that are still the host's. What bracket.py does on the CPU, kernels do on a GPU.
HOST = ("layout.py:_laid_out",)


class Watch:
    """What happens while it is on.

    Attributes:
        calls: operator calls by name.
        reads: of device values by the host, by place in the package: "masks.py:91".
        uploads: through ops.to_device.
        tables: those of them that are tables of addresses.
        unaddressed: calls of operators of pruning that were given no such table.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.uploads = self.tables = 0
        self.unaddressed: Counter[str] = Counter()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch all operators called from Python in here."""
        with _Mode(self), _named(self):
            yield

    def inside(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """An operator's implementation, watched, too: around an operator a dispatch mode sees one call."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with _Mode(self):
                return f(*args, **kwargs)

        return watched

    def read(self) -> None:
        place = _place()
        if place not in HOST and not place.startswith("bracket.py:"):
            self.reads[place] += 1


class _Mode(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(f.overloadpacket).removeprefix("aten.")
        self.watch.calls[name] += 1
        if name in ADDRESSED and (kwargs or {}).get("pointers") is None:
            self.watch.unaddressed[name] += 1
        if name in READS or (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.watch.read()
        return f(*args, **(kwargs or {}))


@contextmanager
def _named(watch: Watch) -> Iterator[None]:
    """Watch tolist, numpy and uploads."""
    saved = {name: getattr(Tensor, name) for name in ("tolist", "numpy")}
    upload = ops.to_device

    def reading(name: str) -> Callable[..., Any]:
        def read(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            watch.read()
            return saved[name](x, *args, **kwargs)

        return read

    def uploading(values: Tensor, device: torch.device) -> Tensor:
        watch.uploads += 1
        watch.tables += traceback.extract_stack(limit=2)[0].filename.endswith("transfer.py")
        return upload(values, device)

    homes = [m for m in vars(ops).values() if getattr(m, "to_device", None) is upload]
    try:
        for name in saved:
            setattr(Tensor, name, reading(name))
        for home in [ops, *homes]:
            home.to_device = uploading
        yield
    finally:
        for name, method in saved.items():
            setattr(Tensor, name, method)
        for home in [ops, *homes]:
            home.to_device = upload


def _place() -> str:
    """The innermost place in the package."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "test"


@contextmanager
def like_a_gpu(watch: Watch | None = None) -> Iterator[None]:
    """CPU tensors take the branches of a GPU's: the host looks at nothing. `watch`: also inside of `select`."""
    on_host = SELECT.Scored.on_host
    library = torch.library.Library("pins_ext", "IMPL")
    select = SELECT.select
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.impl("select", watch.inside(select) if watch else select, "CPU", allow_override=True)
    readers = [import_module(f"pins_ext.optim.{name}") for name in ("adamw", "sgd", "step")]
    host_rate = readers[0].host_rate
    SELECT.Scored.on_host = property(lambda self: False)
    settled, REGIONS.settled = REGIONS.settled, lambda brackets: False
    packs = Selection.packs
    Selection.packs = property(lambda self: False)  # type: ignore[assignment, method-assign]
    read_on = ops.PointerTables.read_on
    ops.PointerTables.read_on = staticmethod(lambda device: True)
    for module in readers:
        module.host_rate = lambda lr: None if isinstance(lr, Tensor) else float(lr)
    try:
        yield
    finally:
        SELECT.Scored.on_host = on_host
        REGIONS.settled = settled
        Selection.packs = packs  # type: ignore[method-assign]
        ops.PointerTables.read_on = staticmethod(read_on)
        for module in readers:
            module.host_rate = host_rate
        library._destroy()
