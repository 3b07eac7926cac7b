"""The files of a store: rows and digests of texts as plain ``.npy``, ids as JSON lines; written by appending, read by mapping.

Dense rows are one file. Sparse rows are three, data, indices and indptr as of a CSR matrix; rows of a vector for every token are two,
values and offsets: row i is ``values[offsets[i]:offsets[i + 1]]``.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from memsafe.errors import StoreError
from memsafe.stores.manifest import Header, sync_folder
from memsafe.stores.segments import Part, Rows, Segments, parts_of

__all__ = ["TEXT_BYTES", "Array", "Id", "Shard", "ShardWriter", "checksum", "rows_bytes", "rows_sum", "text_digests"]

Array = NDArray[Any]
Id = str | int

TEXT_BYTES = 16
"""BLAKE2b of a text in UTF-8: two different ones meet with a chance of 1e-19 among 1e9 texts."""
_HEADER = 128
_SURROGATES = "surrogatepass"  # what is no Unicode is refused by whoever tokenises it, with its place


def checksum(content: Any) -> str:
    """BLAKE2b of a buffer, 32 hexadecimal digits: about a gigabyte a second."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def text_digests(texts: Iterable[str]) -> Array:
    """uint8, shape (texts, 16)."""
    joined = b"".join(hashlib.blake2b(text.encode("utf-8", _SURROGATES), digest_size=16).digest() for text in texts)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, TEXT_BYTES)


def id_lines(ids: Sequence[Id]) -> bytes:
    """One JSON string or number a line."""
    return "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in ids).encode("utf-8", _SURROGATES)


def rows_sum(rows: Rows) -> str:
    """:func:`checksum` of all arrays of `rows`, one after the other; offsets from 0."""
    digest = hashlib.blake2b(digest_size=16)
    for array in _arrays(rows):
        content: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        digest.update(content)
    return digest.hexdigest()


def rows_bytes(rows: Rows) -> int:
    """What `rows` take on the disk."""
    return sum(array.nbytes for array in _arrays(rows))


def _arrays(rows: Rows) -> list[Array]:
    """What is appended to each of the files; of offsets all but the first, which is where the rows before ended."""
    return [*rows.values, rows.offsets[1:]] if isinstance(rows, Segments) else [rows]


def _npy_header(dtype: np.dtype[Any], rows: int, width: int | None) -> bytes:
    """Always :data:`_HEADER` bytes, so that it can be replaced when rows are added."""
    shape = f"({rows},)" if width is None else f"({rows}, {width})"
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + text.ljust(_HEADER - 11).encode() + b"\n"


class _Growing:
    """A ``.npy`` file that is appended to. Its header never promises what is not on the disk. rows: entries along the first axis."""

    def __init__(self, path: Path, dtype: np.dtype[Any], width: int | None, rows: int) -> None:
        self._dtype, self._width, self.rows = dtype, width, rows
        self._file: IO[bytes] = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        have = os.fstat(self._file.fileno()).st_size
        if rows and have < self._end:
            self._file.close()
            raise StoreError(f"{path} has {have} bytes where {self._end} were written; restore it", path=str(path))
        self.cut()

    @property
    def num_bytes(self) -> int:
        return self.rows * (1 if self._width is None else self._width) * self._dtype.itemsize

    @property
    def _end(self) -> int:
        return _HEADER + self.num_bytes

    def cut(self) -> None:
        """Nothing but the rows that count, and a header that says so."""
        self._file.truncate(self._end if self.rows else 0)
        _write(self._file, 0, _npy_header(self._dtype, self.rows, self._width))

    def append(self, rows: Array) -> None:
        _write(self._file, self._end, np.ascontiguousarray(rows, self._dtype).reshape(-1).view(np.uint8))
        os.fsync(self._file.fileno())

    def count(self, rows: int) -> None:
        """So many more are now promised by the manifest."""
        self.rows += rows
        _write(self._file, 0, _npy_header(self._dtype, self.rows, self._width))

    def close(self, *, sync: bool = True) -> None:
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()


class ShardWriter:
    """Appends blocks to one shard. What :meth:`append` wrote counts once :meth:`count` was called, after the manifest's line.

    rows, values, ids_bytes: what the manifest promises of it already.
    """

    def __init__(
        self, folder: Path, number: int, header: Header, *, rows: int = 0, values: int = 0, ids_bytes: int = 0
    ) -> None:
        paths = shard_paths(folder, number, header)
        self.number, self.rows, self.values, self.ids_bytes = number, rows, values, ids_bytes
        self._parts = parts_of(header.kind, header.dtype, header.dimension)
        self._files: list[_Growing] = []
        for part in self._parts:
            self._files.append(_Growing(paths[part.name], part.dtype, part.width, _entries(header, part, rows, values)))
        if header.kind != "dense" and not self._files[-1].rows:  # offsets begin with 0
            self._files[-1].append(np.zeros(1, np.int64))
            self._files[-1].count(1)
        self._texts = _Growing(paths["texts"], np.dtype(np.uint8), TEXT_BYTES, rows)
        self._ids: IO[bytes] | None = None
        if header.ids != "positions":
            path = paths["ids"]
            self._ids = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
            have = os.fstat(self._ids.fileno()).st_size
            if have < ids_bytes:
                raise StoreError(f"{path} has {have} bytes where {ids_bytes} were written; restore it", path=str(path))
            self._ids.truncate(ids_bytes)
        sync_folder(folder)

    @property
    def num_bytes(self) -> int:
        """Of rows."""
        return sum(file.num_bytes for file in self._files)

    def append(self, rows: Rows, texts: Array, ids: bytes) -> None:
        """Put a block behind the others, on the disk when this returns."""
        arrays = _arrays(rows)
        if isinstance(rows, Segments):
            arrays[-1] = arrays[-1] + self.values
        for file, array in zip(self._files, arrays, strict=True):
            file.append(array)
        self._texts.append(texts)
        if self._ids is not None:
            _write(self._ids, self.ids_bytes, ids)
            os.fsync(self._ids.fileno())

    def count(self, rows: int, values: int, ids_bytes: int) -> None:
        for part, file in zip(self._parts, self._files, strict=True):
            file.count(rows if part.per_row else values)
        self._texts.count(rows)
        self.rows, self.values, self.ids_bytes = self.rows + rows, self.values + values, self.ids_bytes + ids_bytes

    def cut(self) -> None:
        """Drop what was appended and never counted, as far as the disk lets us."""
        for file in (*self._files, self._texts):
            file.cut()
        if self._ids is not None:
            self._ids.truncate(self.ids_bytes)

    def close(self, *, sync: bool = True) -> None:
        for file in (*self._files, self._texts):
            file.close(sync=sync)
        if self._ids is not None:
            self._ids.close()


class Shard:
    """One shard as it is read: rows and digests mapped, ids found by line. rows, values, ids_bytes: how many count."""

    def __init__(self, folder: Path, number: int, header: Header, *, rows: int, values: int, ids_bytes: int) -> None:
        self.paths = shard_paths(folder, number, header)
        self.rows = rows
        parts = parts_of(header.kind, header.dtype, header.dimension)
        self._views = {part.name: self._map(part, _entries(header, part, rows, values)) for part in parts}
        self.texts = self._map(Part("texts", np.dtype(np.uint8), TEXT_BYTES), rows)
        self.rows_view: Any  # Rows
        first, *others = self._views.values()
        self.rows_view = Segments([first, *others[:-1]], others[-1]) if others else first
        self._lines: mmap.mmap | None = None
        self._starts: Array | None = None
        self._ids_bytes = ids_bytes
        if header.ids != "positions":
            with self._open("ids", ids_bytes) as file:
                self._lines = mmap.mmap(file.fileno(), ids_bytes, access=mmap.ACCESS_READ)

    def _map(self, part: Part, entries: int) -> Array:
        shape = (entries,) if part.width is None else (entries, part.width)
        with self._open(part.name, _HEADER + int(np.prod(shape)) * part.dtype.itemsize):
            return np.memmap(self.paths[part.name], part.dtype, "r", offset=_HEADER, shape=shape)

    def _open(self, name: str, least_bytes: int) -> IO[bytes]:
        path = self.paths[name]
        try:
            file = open(path, "rb")  # noqa: SIM115 - whoever asked closes it
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}", path=str(path)) from error
        have = os.fstat(file.fileno()).st_size
        if have < least_bytes:
            file.close()
            raise StoreError(f"{path} has {have} bytes where {least_bytes} were written; restore it", path=str(path))
        return file

    def ids(self, start: int, stop: int) -> list[Id]:
        """Of rows ``start:stop``, which must exist. Where lines begin is looked for once: 8 bytes a row."""
        if self._lines is None:
            raise IndexError("this store has no ids but positions")
        if start >= stop:
            return []
        if self._starts is None:
            ends = np.flatnonzero(np.frombuffer(self._lines, np.uint8) == ord("\n")) + 1
            self._starts = np.concatenate(([0], ends))
        content = self._lines[int(self._starts[start]) : int(self._starts[stop])]
        return [json.loads(line) for line in content.decode("utf-8", _SURROGATES).split("\n")[:-1]]

    def rows_are(self, start: int, stop: int, due: str) -> bool:
        """Whether rows ``start:stop`` have the sum `due`."""
        try:
            return rows_sum(self.rows_view[start:stop]) == due
        except (IndexError, ValueError):  # offsets that lead nowhere
            return False

    @property
    def rows_names(self) -> str:
        """Of the files of rows."""
        return " or ".join(self.paths[name].name for name in self._views)

    def header_problems(self) -> list[str]:
        """What the headers of the ``.npy`` files, which are for others, say wrongly."""
        problems = []
        for name, view in (*self._views.items(), ("texts", self.texts)):
            with open(self.paths[name], "rb") as file:
                width = view.shape[1] if view.ndim == 2 else None
                if file.read(_HEADER) != _npy_header(view.dtype, len(view), width):
                    problems.append(f"{self.paths[name].name}: its header does not say what it holds")
        return problems

    def id_bytes(self, start: int, stop: int) -> bytes:
        return b"" if self._lines is None else self._lines[start:stop]


def shard_paths(folder: Path, number: int, header: Header) -> dict[str, Path]:
    """Files by name: those of rows (see :func:`parts_of`); texts: uint8, (rows, 16), digests; ids: a JSON value a line, if ids were
    given."""
    names = [part.name for part in parts_of(header.kind, header.dtype, header.dimension)]
    paths = {name: folder / f"{name}-{number:05d}.npy" for name in (*names, "texts")}
    return {**paths, "ids": folder / f"ids-{number:05d}.jsonl"}


def _entries(header: Header, part: Part, rows: int, values: int) -> int:
    """How many entries `part` has where so many rows and values count; of a shard that is about to begin, none."""
    if not part.per_row:
        return values
    return rows + 1 if rows and header.kind != "dense" else rows


def _write(file: IO[bytes], place: int, content: Any) -> None:
    """All of `content` at `place`; a disk that takes only a part says on the next try why."""
    view = memoryview(content)
    file.seek(place)
    while len(view):
        view = view[file.write(view) :]
