"""The files of a store: rows and digests of texts as plain ``.npy``, ids as JSON lines; written by appending, read by mapping."""

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
from memsafe.stores.manifest import sync_folder

__all__ = ["TEXT_BYTES", "Array", "Id", "Shard", "ShardWriter", "checksum", "text_digests"]

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


def shard_paths(folder: Path, number: int) -> dict[str, Path]:
    """rows: float32 or float16, (rows, dim). texts: uint8, (rows, 16), digests. ids: a JSON value a line, if ids were given."""
    return {
        "rows": folder / f"rows-{number:05d}.npy",
        "texts": folder / f"texts-{number:05d}.npy",
        "ids": folder / f"ids-{number:05d}.jsonl",
    }


def _npy_header(dtype: np.dtype[Any], rows: int, width: int) -> bytes:
    """Always :data:`_HEADER` bytes, so that it can be replaced when rows are added."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + text.ljust(_HEADER - 11).encode() + b"\n"


class _Growing:
    """A two-dimensional ``.npy`` file that rows are appended to. Its header never promises rows that are not on the disk."""

    def __init__(self, path: Path, dtype: np.dtype[Any], width: int, rows: int) -> None:
        self._dtype, self._width, self.rows = dtype, width, rows
        self._file: IO[bytes] = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        have = os.fstat(self._file.fileno()).st_size
        if rows and have < self._end:
            self._file.close()
            raise StoreError(f"{path} has {have} bytes where {self._end} were written; restore it", path=str(path))
        self.cut()

    @property
    def _end(self) -> int:
        return _HEADER + self.rows * self._width * self._dtype.itemsize

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
    """Appends blocks to one shard. What :meth:`append` wrote counts once :meth:`count` was called, after the manifest's line."""

    def __init__(
        self,
        folder: Path,
        number: int,
        dtype: str,
        dimension: int,
        *,
        given_ids: bool,
        rows: int = 0,
        ids_bytes: int = 0,
    ) -> None:
        paths = shard_paths(folder, number)
        self.number, self.ids_bytes = number, ids_bytes
        self._rows = _Growing(paths["rows"], np.dtype(dtype).newbyteorder("<"), dimension, rows)
        self._texts = _Growing(paths["texts"], np.dtype(np.uint8), TEXT_BYTES, rows)
        self._ids: IO[bytes] | None = None
        if given_ids:
            path = paths["ids"]
            self._ids = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
            have = os.fstat(self._ids.fileno()).st_size
            if have < ids_bytes:
                raise StoreError(f"{path} has {have} bytes where {ids_bytes} were written; restore it", path=str(path))
            self._ids.truncate(ids_bytes)
        sync_folder(folder)

    @property
    def rows(self) -> int:
        return self._rows.rows

    def append(self, rows: Array, texts: Array, ids: bytes) -> None:
        """Put a block behind the others, on the disk when this returns."""
        self._rows.append(rows)
        self._texts.append(texts)
        if self._ids is not None:
            _write(self._ids, self.ids_bytes, ids)
            os.fsync(self._ids.fileno())

    def count(self, rows: int, ids_bytes: int) -> None:
        self._rows.count(rows)
        self._texts.count(rows)
        self.ids_bytes += ids_bytes

    def cut(self) -> None:
        """Drop what was appended and never counted, as far as the disk lets us."""
        self._rows.cut()
        self._texts.cut()
        if self._ids is not None:
            self._ids.truncate(self.ids_bytes)

    def close(self, *, sync: bool = True) -> None:
        self._rows.close(sync=sync)
        self._texts.close(sync=sync)
        if self._ids is not None:
            self._ids.close()


class Shard:
    """One shard as it is read: rows and digests mapped, ids found by line. rows: how many count."""

    def __init__(
        self, folder: Path, number: int, dtype: str, dimension: int, *, given_ids: bool, rows: int, ids_bytes: int
    ) -> None:
        self.paths = shard_paths(folder, number)
        self.rows = rows
        self.rows_view = self._map("rows", np.dtype(dtype).newbyteorder("<"), dimension, rows)
        self.texts = self._map("texts", np.dtype(np.uint8), TEXT_BYTES, rows)
        self._lines: mmap.mmap | None = None
        self._starts: Array | None = None
        self._ids_bytes = ids_bytes
        if given_ids:
            with self._open("ids", ids_bytes) as file:
                self._lines = mmap.mmap(file.fileno(), ids_bytes, access=mmap.ACCESS_READ)

    def _map(self, name: str, dtype: np.dtype[Any], width: int, rows: int) -> Array:
        with self._open(name, _HEADER + rows * width * dtype.itemsize):
            return np.memmap(self.paths[name], dtype, "r", offset=_HEADER, shape=(rows, width))

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

    def header_problems(self) -> list[str]:
        """What the headers of the ``.npy`` files, which are for others, say wrongly."""
        problems = []
        for name, view in (("rows", self.rows_view), ("texts", self.texts)):
            with open(self.paths[name], "rb") as file:
                if file.read(_HEADER) != _npy_header(view.dtype, *view.shape):
                    problems.append(f"{self.paths[name].name}: its header does not say what it holds")
        return problems

    def id_bytes(self, start: int, stop: int) -> bytes:
        return b"" if self._lines is None else self._lines[start:stop]


def _write(file: IO[bytes], place: int, content: Any) -> None:
    """All of `content` at `place`; a disk that takes only a part says on the next try why."""
    view = memoryview(content)
    file.seek(place)
    while len(view):
        view = view[file.write(view) :]
