"""A sparse checkpoint on disk, verified and read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from pins_ext.sparse import compression as zstd
from pins_ext.sparse.encoding import DTYPES, EncodingError, Entry, check, decode
from pins_ext.sparse.index import FILE, Index, SparseFormatError
from pins_ext.sparse.shards import ShardReader


class SparseCheckpoint:
    """A sparse checkpoint, verified, tensor by tensor.

    Args:
        path: the folder.

    Attributes:
        folder: the same.
        index: what it holds.

    Raises:
        SparseFormatError: no sparse checkpoint, an unknown version, or damaged files.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        if not self.folder.is_dir():
            raise SparseFormatError(f"{self.folder} is no folder")
        self.index = Index.read(self.folder)
        self.index.verify(self.folder)

    def arrays(self) -> Iterator[tuple[str, Entry, dict[str, Tensor]]]:
        """(name, entry, arrays by kind as pins_ext.sparse.encoding describes them) of each tensor, one at a time.

        Raises:
            SparseFormatError: arrays that are missing, of another shape, or not announced.
        """
        try:
            for shard in sorted(set(self.index.shards.values())):
                yield from self._arrays_of(shard)
        except ValueError as error:
            raise SparseFormatError(str(error)) from error

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, dense tensor) one at a time, aliases left out. Tensors may share the mapped file: copy to change them.

        Raises:
            SparseFormatError: arrays that are missing or contradict each other.
        """
        for name, entry, arrays in self.arrays():
            # Without a name here, or it would live on while the next one is made.
            yield name, self._decoded(name, entry, arrays)

    def check(self) -> None:
        """Read all arrays, one tensor at a time, without expanding them.

        Raises:
            SparseFormatError: as `tensors`.
        """
        for name, entry, arrays in self.arrays():
            if entry.layout == "rows":
                with self._named(name):
                    check(arrays, entry)

    def _decoded(self, name: str, entry: Entry, arrays: dict[str, Tensor]) -> Tensor:
        with self._named(name):
            return decode(arrays, entry)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except EncodingError as error:
            raise SparseFormatError(f"{name!r} in {self.folder}: {error}") from error

    def _arrays_of(self, shard: str) -> Iterator[tuple[str, Entry, dict[str, Tensor]]]:
        reader = ShardReader(self.folder / shard)
        try:
            here = [name for name, place in self.index.shards.items() if place == shard]
            expected = {array_name(name, kind) for name in here for kind in self.index.entries[name].arrays()}
            if reader.names != expected:
                odd = sorted(reader.names ^ expected)[0]
                raise SparseFormatError(f"{odd!r} is in {self.folder / shard} or in {FILE}, but not in both")
            for name in here:
                entry = self.index.entries[name]
                yield name, entry, {kind: self._read(reader, name, kind, entry) for kind in entry.arrays()}
        finally:
            reader.close()

    def _read(self, reader: ShardReader, name: str, kind: str, entry: Entry) -> Tensor:
        dtype, shape = entry.arrays()[kind]
        if self.index.compression == "none":
            return reader.read(array_name(name, kind), dtype, shape)
        return zstd.decompress(reader.read(array_name(name, kind), "uint8"), DTYPES[dtype], shape)


def array_name(name: str, kind: str) -> str:
    """Name, in a shard, of an array of a tensor. No checkpoint of another format has such names."""
    return name if kind == "dense" else f"{name}.pins_{kind}"
