"""One safetensors file that is whole or absent: named tensors and plain data, checked by hash on reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pins_ext.files.atomic import file_aside


def write(path: str | Path, kind: str, data: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write aside, flush to disk, rename: `path` holds the old file or the new one, never a part.

    Args:
        kind: what the file is, asked for again by `read`. data: anything JSON can hold. tensors: none sharing memory.
    """
    path = Path(path)
    contents = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(data)
    with file_aside(path) as aside:
        save_file(contents, aside, {"format": kind, "data": text, "sha256": _digest(text, contents)})


def read(path: str | Path, kind: str) -> tuple[Any, dict[str, Tensor]]:
    """Data and tensors of a file that `write` wrote.

    Raises:
        ValueError: the file cannot be read, is of another kind, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise ValueError(f"{path} is no {kind} file (format {metadata.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a reader, not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a {kind} file: {error}") from error
    if _digest(metadata.get("data", ""), tensors) != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged: its contents do not match the hash stored with them")
    return json.loads(metadata["data"]), tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over data, names and contents: integrity, not authenticity; safetensors itself has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
