"""Save and load a pruned model in a form whose size on disk follows its sparsity.

docs/sparse_format.md describes the files, with a reader in NumPy. Dense safetensors with exact zeros, as
`save_pretrained` writes them, remain what other tools load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.files.atomic import folder_aside, sha256
from pins_ext.patterns import recognised
from pins_ext.pruning.patterns import input_axes
from pins_ext.sparse import compression as zstd
from pins_ext.sparse.checkpoint import SparseCheckpoint, array_name
from pins_ext.sparse.encoding import DTYPES, EncodingError, Entry, encode, plan, refuse_overflow
from pins_ext.sparse.index import COMPRESSIONS, Index, SparseFormatError, sizes
from pins_ext.sparse.shards import ShardWriter
from pins_ext.wrappers import unwrapped

PRODUCER = "pins_ext"
SHARD_BYTES = 2 << 30

_FLOATS = ("float32", "bfloat16", "float16")


def save_sparse(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    compression: str = "none",
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, int]:
    """Save a pruned model so that zeros take one bit each.

    The folder appears in one piece when it is complete. Memory beside the model: about one tensor.

    Args:
        model: any module; the configuration of a transformers model is saved too, so that `load_sparse` can build it.
        path: the folder to make.
        dtype: float32, bfloat16 or float16 for all floating point tensors; None keeps each one's own.
        int8: store pruned tensors as int8 codes with a scale per row: each weight returns within half a step.
        compression: "none", or "zstd" (needs the package zstandard).
        tokenizer: a tokenizer or processor to save beside the model.
        shard_bytes: a new file is begun when one would grow past this many bytes.
        overwrite: replace what is at `path`; otherwise it must not exist, or be an empty folder.

    Returns:
        Bytes: see `pins_ext.sparse.index.sizes`.

    Raises:
        FileExistsError: there is something at `path` and `overwrite` is False.
        ValueError: a tensor or an option that the format doesn't hold, or weights that are infinite in a smaller dtype.
        OSError: the folder can't be written; what was at `path` before is untouched.
    """
    folder, model = Path(os.path.abspath(path)), unwrapped(model)
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression must be one of {', '.join(COMPRESSIONS)}; got {compression!r}")
    if dtype is not None and dtype not in [DTYPES[name] for name in _FLOATS]:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16, torch.float16 or None; got {dtype}")
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise ValueError(f"shard_bytes must be a number of bytes, at least 1; got {shard_bytes!r}")
    taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if taken and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another folder, or replace it with overwrite=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(folder, overwrite=overwrite) as aside:
        tensors, aliases = _tensors_of(model, dtype)
        entries, shards = _write_shards(aside, tensors, int8, compression, shard_bytes)
        _write_configuration(model, aside, tokenizer, dtype)
        files = {file.name: (file.stat().st_size, sha256(file)) for file in sorted(aside.iterdir()) if file.is_file()}
        index = Index(entries, shards, aliases, files, compression, _patterns(model, entries))
        index.write(aside, PRODUCER)
    return sizes(index)


def load_sparse(path: str | Path, *, model: nn.Module | None = None) -> Any:
    """Load what `save_sparse` saved: a model with dense weights whose zeros are exact.

    Every file is checked against its hash first. Memory: the dense model and about one tensor.

    Args:
        path: the folder.
        model: the module to load into; None builds the transformers model that the saved configuration names.

    Returns:
        The model, in evaluation mode if it was built here.

    Raises:
        SparseFormatError: the folder is no sparse checkpoint, of an unknown version, damaged, or doesn't fit the model,
            which is then unchanged.
    """
    checkpoint = SparseCheckpoint(path)
    if model is not None:
        # The caller's model keeps its weights if any tensor can't be read.
        checkpoint.check()
        _fill(unwrapped(model), checkpoint, untie=False)
        return model
    built = _built(checkpoint)
    _fill(built, checkpoint, untie=True)
    return built.eval()


def _tensors_of(model: nn.Module, dtype: torch.dtype | None) -> tuple[dict[str, _Source], dict[str, str]]:
    """The model's tensors by name, each piece of memory once, and the further names of those that have several."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, _Source] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} of the model is no tensor but {type(tensor).__name__}: it can't be saved")
        if name.startswith("pins_fill.") or name == "__metadata__":
            raise ValueError(f"{name}: such names belong to the format; rename it")
        if name.rpartition(".")[2] == "_extra_state":
            raise ValueError(
                f"{name} is what a module's get_extra_state() returns, which this format doesn't hold: "
                f"register it as a buffer, or save it beside the model"
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            what = f"quantized ({tensor.dtype})" if tensor.is_quantized else str(tensor.layout)
            raise ValueError(
                f"{name} is a {what} tensor on {tensor.device}, which this format doesn't hold: "
                f"save a model of ordinary tensors"
            )
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = _Source(name, tensor, dtype if dtype is not None and tensor.is_floating_point() else None)
    return tensors, aliases


def _patterns(model: nn.Module, entries: dict[str, Entry]) -> dict[str, str]:
    """The patterns of the zeros of the matrices of which the model says which dimension is the input."""
    axes, parameters = input_axes(model), dict(model.named_parameters())
    found: dict[str, str] = {}
    for name in entries.keys() & axes.keys() & parameters.keys():
        if entries[name].layout == "rows":
            pattern = recognised(parameters[name].detach() != 0, axes[name])
            found |= {} if pattern is None else {name: pattern.name}
    return dict(sorted(found.items()))


class _Source:
    """A tensor that is cast and moved to the CPU only while it is written."""

    def __init__(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
        self._name = name
        self._tensor = tensor
        self._dtype = dtype

    def load(self) -> Tensor:
        tensor = self._tensor.detach()
        if self._dtype is not None and torch.finfo(self._dtype).max < torch.finfo(tensor.dtype).max:
            refuse_overflow(self._name, tensor, self._dtype)
        return tensor.to(device="cpu", dtype=self._dtype or tensor.dtype).contiguous().resolve_neg()


def _write_shards(
    folder: Path, tensors: dict[str, _Source], int8: bool, compression: str, shard_bytes: int
) -> tuple[dict[str, Entry], dict[str, str]]:
    entries: dict[str, Entry] = {}
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, source in tensors.items():
        try:
            entries[name] = plan(source.load(), int8)
        except EncodingError as error:
            raise ValueError(f"{name}: {error}") from error
        size = entries[name].bytes
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    shards: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"pins_sparse-{number:05d}-of-{len(groups):05d}.safetensors"
        names = [array_name(name, kind) for name in group for kind in entries[name].arrays()]
        if len(set(names)) != len(names):
            raise ValueError("two tensors of the model would have arrays of one name")
        with ShardWriter(folder / file, names) as writer:
            for name in group:
                shards[name] = file
                _write_tensor(writer, name, tensors[name].load(), entries[name], compression)
    return entries, shards


def _write_tensor(writer: ShardWriter, name: str, tensor: Tensor, entry: Entry, compression: str) -> None:
    try:
        arrays = encode(tensor, entry)
    except EncodingError as error:
        raise ValueError(f"{name}: {error}") from error
    for kind, array in arrays.items():
        writer.write(array_name(name, kind), zstd.compress(array) if compression == "zstd" else array)


def _write_configuration(model: nn.Module, folder: Path, tokenizer: Any, dtype: torch.dtype | None) -> None:
    """What is needed to build the model again, and its tokenizer."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        # The configuration names the class, as `save_pretrained` of the model would write it, and the dtype.
        written = type(config).from_dict(config.to_dict())
        written.architectures = [type(model).__name__]
        written.dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        written.save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _built(checkpoint: SparseCheckpoint) -> Any:
    """The transformers model that the configuration names, weights not yet set."""
    if "config.json" not in checkpoint.index.files:
        raise SparseFormatError(
            f"{checkpoint.folder} was saved from a module without a transformers configuration: "
            f"build the module and pass it as model="
        )
    import transformers
    from transformers.initialization import no_init_weights

    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise SparseFormatError(
            f"{checkpoint.folder / 'config.json'} can't be read: {' '.join(str(error).split())[:300]}"
        ) from error
    kind = model_class(config, checkpoint.folder)
    try:
        with no_init_weights():
            model = kind(config)
        model.tie_weights()
    except Exception as error:
        # Whatever a class makes of numbers and names that it can't use.
        raise SparseFormatError(
            f"{checkpoint.folder / 'config.json'} makes no {kind.__name__}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    if "generation_config.json" in checkpoint.index.files:
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            checkpoint.folder, local_files_only=True
        )
    return model


def model_class(config: Any, folder: Path) -> Any:
    """The transformers class that a configuration names; code from elsewhere is never run.

    Args:
        config: of the model.
        folder: where it was read, for the error.

    Raises:
        SparseFormatError: transformers doesn't have it.
    """
    import transformers

    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise SparseFormatError(
            f"{folder / 'config.json'} names {names} as its class, which transformers doesn't have: "
            f"build the model and pass it as model="
        )
    return kind


def _fill(model: nn.Module, checkpoint: SparseCheckpoint, untie: bool) -> None:
    """Put the tensors into the model, each with the dtype it was saved in, on the device of the one it replaces.

    Args:
        model: unchanged where it doesn't fit.
        checkpoint: to load.
        untie: give tensors that were saved as different ones, and are one in the model, a place each.
    """
    index = checkpoint.index
    expected = model.state_dict()
    stored = index.entries.keys() | index.aliases.keys()
    odd = sorted(stored ^ expected.keys())
    if odd:
        where = "the model lacks" if odd[0] in stored else "the checkpoint lacks"
        raise SparseFormatError(
            f"{checkpoint.folder} doesn't fit {type(model).__name__}: {where} {odd[0]!r} ({len(odd)} differences)"
        )
    shapes = {name: index.entries[index.aliases.get(name, name)].shape for name in stored}
    wrong = sorted(name for name in stored if shapes[name] != tuple(expected[name].shape))
    if wrong:
        raise SparseFormatError(
            f"{checkpoint.folder} doesn't fit {type(model).__name__}: {wrong[0]!r} is {shapes[wrong[0]]}, "
            f"the model has {tuple(expected[wrong[0]].shape)}"
        )
    nowhere = sorted(name for name, tensor in expected.items() if tensor.is_meta)
    if nowhere:
        raise SparseFormatError(
            f"{nowhere[0]!r} of the model is on the meta device, where there is nothing to load into "
            f'({len(nowhere)} tensors): call model.to_empty(device="cpu") before'
        )
    del expected
    names_of: dict[str, list[str]] = {name: [name] for name in index.entries}
    for name, target in index.aliases.items():
        names_of[target].append(name)
    places = _places(model, names_of, checkpoint.folder, untie)
    for name, tensor in checkpoint.tensors():
        mapped = index.entries[name].layout == "dense"
        done: list[Tensor] = []
        for one in names_of[name]:
            place = places[one]
            if not any(place is other for other in done):
                # A copy where two places have it: tied weights are one place. The file's mapping is not the model's.
                place.data = tensor.to(device=place.device, copy=mapped or bool(done))
                done.append(place)
        # The old memory goes before the next tensor comes.
        del tensor


def _places(model: nn.Module, names_of: Mapping[str, Sequence[str]], folder: Path, untie: bool) -> dict[str, Tensor]:
    """The parameter or buffer of each name; no two that were saved as different tensors are one.

    Raises:
        SparseFormatError: two are, and `untie` is False, or they are one attribute of one module.
    """
    places = {name: _place(model, name) for names in names_of.values() for name in names}
    owners: dict[int, str] = {}
    # A module of several names has one attribute for all of them.
    homes: dict[tuple[nn.Module, str], str] = {}
    for first, names in names_of.items():
        own: Tensor | None = None
        for name in names:
            path, _, leaf = name.rpartition(".")
            home = model.get_submodule(path)
            holder = homes.setdefault((home, leaf), first)
            owner = owners.setdefault(id(places[name]), first)
            if owner == holder == first:
                continue
            if not untie or holder != first:
                other = owner if holder == first else holder
                raise SparseFormatError(
                    f"{folder} doesn't fit {type(model).__name__}: it holds different tensors for {other!r} and "
                    f"{name!r}, which are one in the model: give the model two, or save it with one"
                )
            if own is None:
                own = _like(places[name])
            setattr(home, leaf, own)
            places[name] = own
    return places


def _like(place: Tensor) -> Tensor:
    """Memory of its own for a further parameter or buffer."""
    new = torch.empty_like(place)
    return nn.Parameter(new, requires_grad=place.requires_grad) if isinstance(place, nn.Parameter) else new


def _place(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    found = getattr(module, leaf)
    assert isinstance(found, Tensor)
    return found
