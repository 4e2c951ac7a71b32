"""The index of a sparse checkpoint: what each tensor is, which file holds it, and each file's size and hash.

It is written last, so a folder without it is no checkpoint, and it ends with its own hash: integrity, not authenticity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path, PurePath
from typing import Any

from pins_ext.files.atomic import sha256
from pins_ext.patterns import Pattern
from pins_ext.sparse.encoding import EncodingError, Entry

FILE = "pins_sparse.json"
FORMAT = "pins_sparse"
VERSION = 1
COMPRESSIONS = ("none", "zstd")

_MAX_BYTES = 256 << 20


class SparseFormatError(ValueError):
    """A folder is no sparse checkpoint, is damaged, or is of a version that this software doesn't know."""


@dataclass(frozen=True)
class Index:
    """The contents of the index file.

    Attributes:
        entries: what each tensor is, by name.
        shards: tensor name -> file.
        aliases: name -> the name of the tensor that it shares its memory with.
        files: every file of the checkpoint but the index -> (size in bytes, SHA-256).
        compression: of each array in the shards.
        patterns: tensor name -> the pattern of its zeros (2:4, 16x16, see pins_ext.patterns), where one was recognised;
            informative.
    """

    entries: Mapping[str, Entry]
    shards: Mapping[str, str]
    aliases: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    compression: str = "none"
    patterns: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path, producer: str) -> None:
        """Write the index file.

        Args:
            folder: the checkpoint.
            producer: the software and its version; informative.
        """
        body = {
            "format": FORMAT,
            "version": VERSION,
            "producer": producer,
            "compression": self.compression,
            "tensors": {name: asdict(entry) | {"shard": self.shards[name]} for name, entry in self.entries.items()},
            "aliases": dict(self.aliases),
            **({"patterns": dict(self.patterns)} if self.patterns else {}),
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()},
        }
        (folder / FILE).write_text(json.dumps(body | {"sha256": digest_of(body)}, indent=1), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Index:
        """Read and check the index file; the files it names are checked by `verify`.

        Raises:
            SparseFormatError: it is missing, damaged or of an unknown version.
        """
        file = folder / FILE
        try:
            if file.stat().st_size > _MAX_BYTES:
                raise ValueError(f"it is larger than {_MAX_BYTES >> 20} MB")
            body = json.loads(file.read_bytes())
            stored = body.pop("sha256")
            kind, version = body.get("format"), body.get("version")
            known = kind == FORMAT and version == VERSION and type(version) is int
        except FileNotFoundError:
            raise SparseFormatError(f"{folder} is no sparse checkpoint: it has no {FILE}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SparseFormatError(f"{file} can't be read: {error}") from error
        if not known:
            raise SparseFormatError(
                f"{file} has format {kind!r} version {version!r}; this software reads {FORMAT} version {VERSION}"
            )
        if stored != digest_of(body):
            raise SparseFormatError(f"{file} is damaged: it does not match its own hash")
        try:
            return _parsed(body)
        except EncodingError as error:
            raise SparseFormatError(f"{file}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SparseFormatError(f"{file} has an entry that can't be read: {error!r}") from error

    def verify(self, folder: Path) -> None:
        """Check that every file is there, whole and unaltered.

        Raises:
            SparseFormatError: the first one that is not.
        """
        for name, (size, _) in self.files.items():
            file = folder / name
            if not file.is_file():
                raise SparseFormatError(f"{folder} lacks {name}")
            if file.stat().st_size != size:
                raise SparseFormatError(f"{file} is damaged: {file.stat().st_size} bytes instead of {size}")
        for name, (_, digest) in self.files.items():
            if sha256(folder / name) != digest:
                raise SparseFormatError(f"{folder / name} is damaged: it does not match the hash in {FILE}")


def digest_of(body: Mapping[str, Any]) -> str:
    """SHA-256 of the index without its own hash, as canonical JSON."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(body: Mapping[str, Any]) -> Index:
    entries, shards = {}, {}
    for name, fields in body["tensors"].items():
        fields = dict(fields)
        shards[name] = fields.pop("shard")
        entries[name] = Entry(**(fields | {"shape": tuple(fields["shape"])}))
    files = {name: (fields["bytes"], fields["sha256"]) for name, fields in body["files"].items()}
    for name, (size, digest) in files.items():
        if PurePath(name).name != name or name in ("", ".", "..", FILE) or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is no file of the folder itself")
        if not isinstance(size, int) or not isinstance(digest, str):
            raise ValueError(f"{name!r} has no size and hash")
    lost = sorted(name for name, shard in shards.items() if shard not in files)
    if lost:
        raise ValueError(f"the shard of {lost[0]!r} is not among the files")
    for name, target in body["aliases"].items():
        if name in entries or target not in entries:
            raise ValueError(f"{name!r} can't stand for {target!r}")
    if body["compression"] not in COMPRESSIONS:
        raise ValueError(f"compression {body['compression']!r}; this software knows {', '.join(COMPRESSIONS)}")
    patterns = dict(body.get("patterns", {}))
    for name, pattern in patterns.items():
        if name not in entries or not isinstance(pattern, str):
            raise ValueError(f"{name!r} can't have the pattern {pattern!r}")
        Pattern.parse(pattern)
    return Index(entries, shards, dict(body["aliases"]), files, body["compression"], patterns)


def sizes(index: Index) -> dict[str, int]:
    """Bytes of the tensors: dense, as they are stored, and of those that are stored densely (the floor).

    Returns:
        "dense", "stored" (before compression), "floor", "on_disk" (the shards' files) and the number of weights
        "weights" and "nonzero" of the sparse tensors.
    """
    entries = index.entries.values()
    sparse = [entry for entry in entries if entry.layout == "rows"]
    return {
        "dense": sum(entry.dense_bytes for entry in entries),
        "stored": sum(entry.bytes for entry in entries),
        "floor": sum(entry.bytes for entry in entries if entry.layout == "dense"),
        "on_disk": sum(index.files[shard][0] for shard in set(index.shards.values())),
        "weights": sum(prod(entry.shape) for entry in sparse),
        "nonzero": sum(entry.nonzero for entry in sparse),
    }
