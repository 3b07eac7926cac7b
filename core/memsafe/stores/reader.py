"""A store as it is read: ids, rows that are mapped and never copied as a whole, batches, a check, a search."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from memsafe.errors import ConfigError, StoreError
from memsafe.stores import export, search
from memsafe.stores.manifest import NAME, Block, Manifest
from memsafe.stores.search import Neighbours
from memsafe.stores.shards import Array, Id, Shard, checksum

__all__ = ["Store", "StoredIds", "StoredRows", "Verification", "open_store"]


def open_store(path: str | os.PathLike[str]) -> Store:
    """The store at `path`, for reading; of one that is still being written, what is finished by now.

    Raises :class:`StoreError` if there is none, or it is damaged or of a newer version.
    """
    folder = Path(path)
    try:
        return Store(folder, Manifest.read(folder / NAME))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{folder}: no store of embeddings is there", path=str(folder)) from error
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror}", path=str(folder)) from error


@dataclass(frozen=True)
class Verification:
    """What :meth:`Store.verify` found. rows, blocks, num_bytes: that were looked at; problems: one sentence each."""

    rows: int
    blocks: int
    num_bytes: int
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


class Store:
    """Embeddings on disk, mapped into memory: what is not looked at takes none. Thread-safe; pickles as its path.

    Files are plain ones: ``<path>/<folder>/rows-00000.npy`` and so on can be read with ``numpy.load(mmap_mode="r")``, ids
    (``ids-00000.jsonl``) with ``json``. A store that is updated meanwhile stays what it was for those who have it open.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        header = manifest.header
        given = header.ids != "positions"
        self.shards: list[Shard] = []
        for number, blocks in enumerate(by_shard(manifest.blocks)):
            rows, ids_bytes = sum(b.rows for b in blocks), sum(b.ids_bytes for b in blocks)
            folder = path / header.folder
            self.shards.append(
                Shard(folder, number, header.dtype, header.dimension, given_ids=given, rows=rows, ids_bytes=ids_bytes)
            )
        self._starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self.rows = StoredRows(self.shards, header.dtype, header.dimension)
        self._norms: list[Array] | None = None

    # what it is

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def ids(self) -> Sequence[Id]:
        """Of each row: as they were given, or its position in the source. Read from the disk when asked for."""
        return StoredIds(self.shards, self._starts) if self._manifest.header.ids != "positions" else range(len(self))

    @property
    def dimension(self) -> int:
        return self._manifest.header.dimension

    @property
    def dtype(self) -> str:
        """``"float32"`` or ``"float16"``."""
        return self._manifest.header.dtype

    @property
    def complete(self) -> bool:
        """Whether the run that makes it has come to its end."""
        return self._manifest.end is not None

    @property
    def info(self) -> dict[str, Any]:
        """Everything known of it, ready for JSON: model, options, source, layout, rows, bytes, tokens."""
        header, blocks = self._manifest.header, self._manifest.blocks
        return {
            "path": str(self.path),
            "schema": header.schema,
            "complete": self.complete,
            "rows": len(self),
            "dimension": self.dimension,
            "dtype": self.dtype,
            "ids": header.ids,
            "blocks": len(blocks),
            "shards": len(self.shards),
            "bytes": sum(
                path.stat().st_size for shard in self.shards for path in shard.paths.values() if path.exists()
            ),
            "tokens": sum(block.tokens for block in blocks),
            "truncated": sum(block.truncated for block in blocks),
            "model": header.model,
            "options": header.options,
            "source": header.source,
            "layout": header.layout,
            "made_with": header.made_with,
        }

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete"
        return f"Store({str(self.path)!r}: {len(self):,} rows of {self.dimension} x {self.dtype}{state})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_store, (str(self.path),))

    # reading

    def iter_batches(self, max_rows: int = 4096) -> Iterator[tuple[Sequence[Id], Array]]:
        """(ids, rows) of at most `max_rows` at a time, in order. rows: a view of the mapped file, (n, dim), read-only."""
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise ConfigError(f"max_rows: got {max_rows!r}; give an int of at least 1")
        ids = self.ids
        for shard, first in zip(self.shards, self._starts, strict=False):
            for start in range(0, shard.rows, max_rows):
                stop = min(start + max_rows, shard.rows)
                yield ids[int(first) + start : int(first) + stop], shard.rows_view[start:stop]

    def search(self, queries: Array, k: int = 10, *, metric: str = "cosine", max_bytes: int = 1 << 25) -> Neighbours:
        """The `k` nearest rows to each query, exactly: a product of matrices over the mapped files, a block at a time.

        queries: float, (queries, dim) or (dim,). metric: ``"cosine"`` or ``"dot"``. max_bytes: of rows and of scores in
        memory at a time. Ties go to the row that comes first.

        Raises :class:`ConfigError` for another width, metric or `k`.
        """
        if metric == "cosine" and self._norms is None:
            self._norms = [search.norms(shard.rows_view, max_bytes) for shard in self.shards]
        positions, scores = search.nearest(
            [shard.rows_view for shard in self.shards],
            np.asarray(queries),
            k,
            self.dimension,
            metric=metric,
            norms=self._norms if metric == "cosine" else None,
            max_bytes=max_bytes,
        )
        ids = self.ids
        return Neighbours([[ids[int(place)] for place in row] for row in positions], positions, scores)

    def export(self, path: str | os.PathLike[str], *, max_rows: int = 65_536) -> int:
        """Write all rows to `path`: ``.parquet``, or ``.arrow`` / ``.feather`` (Arrow IPC), with columns ``id`` and ``embedding``
        (a list of fixed size). A few rows at a time; returns how many. Needs the extra ``arrow``.

        Raises :class:`MissingExtraError`, :class:`ConfigError` for another ending, :class:`StoreError` if it cannot be written.
        """
        return export.export(
            self.iter_batches(max_rows), Path(path), self.dimension, self.dtype, ids=self._manifest.header.ids
        )

    # checking

    def verify(self) -> Verification:
        """Read everything and compare it with the checksums of the manifest. Never raises for what is damaged: it is listed."""
        problems: list[str] = []
        num_bytes = first = 0
        for number, blocks in enumerate(by_shard(self._manifest.blocks)):
            shard, ids_start = self.shards[number], 0
            for block in blocks:
                rows = np.ascontiguousarray(shard.rows_view[block.start : block.start + block.rows])
                texts = np.ascontiguousarray(shard.texts[block.start : block.start + block.rows])
                ids = shard.id_bytes(ids_start, ids_start + block.ids_bytes)
                found = {"rows": (rows, block.rows_sum), "texts": (texts, block.texts_sum), "ids": (ids, block.ids_sum)}
                for name, (content, due) in found.items():
                    if checksum(content) != due:
                        place = f"block {block.number} (rows {first} to {first + block.rows - 1})"
                        problems.append(f"{shard.paths[name].name}: {place} is damaged")
                num_bytes += rows.nbytes + texts.nbytes + len(ids)
                ids_start, first = ids_start + block.ids_bytes, first + block.rows
            problems += shard.header_problems()
        return Verification(first, len(self._manifest.blocks), num_bytes, problems)


def by_shard(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks of each shard, in order."""
    shards: list[list[Block]] = []
    for block in blocks:
        if block.shard == len(shards):
            shards.append([])
        if block.shard != len(shards) - 1 or block.start != sum(each.rows for each in shards[-1][-1:]) + (
            shards[-1][-1].start if shards[-1] else 0
        ):
            raise StoreError(f"manifest: block {block.number} does not follow the one before it")
        shards[-1].append(block)
    return shards


class StoredRows:
    """All rows as one array that stays on the disk: ``rows[5]``, ``rows[10:20]``, ``rows[[3, 1, 2]]``, ``numpy.asarray(rows)``.

    A slice within one shard is a view of the file; whatever else is asked for is copied, and only that.
    """

    ndim = 2

    def __init__(self, shards: Sequence[Shard], dtype: str, dimension: int) -> None:
        self._arrays = [shard.rows_view for shard in shards]
        self._starts = np.cumsum([0, *map(len, self._arrays)])
        self.dtype, self.shape = np.dtype(dtype), (int(self._starts[-1]), dimension)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        if isinstance(index, tuple):
            return self[index[0]][
                (slice(None), *index[1:]) if np.ndim(index[0]) or isinstance(index[0], slice) else index[1:]
            ]
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        places = np.asarray(index)
        if places.dtype == bool:
            if places.shape != (len(self),):
                raise IndexError(f"a mask of shape {places.shape} for {len(self)} rows")
            places = np.flatnonzero(places)
        if places.size and not np.issubdtype(places.dtype, np.integer):
            raise IndexError(f"rows are chosen by ints, slices or masks, not by {places.dtype}")
        places = places.astype(np.int64)
        if ((places < -len(self)) | (places >= len(self))).any():
            raise IndexError(f"row out of range; there are {len(self)}")
        return self._take(np.where(places < 0, places + len(self), places))

    def _slice(self, start: int, stop: int, step: int) -> Array:
        if step != 1:
            return self._take(np.arange(start, stop, step))
        parts = [
            array[max(start - int(first), 0) : stop - int(first)]
            for array, first in zip(self._arrays, self._starts, strict=False)
            if start < int(first) + len(array) and stop > int(first)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), self.dtype)

    def _take(self, places: Array) -> Array:
        taken = np.empty((*places.shape, self.shape[1]), self.dtype)
        which = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(which):
            here = which == number
            taken[here] = self._arrays[number][places[here] - self._starts[number]]
        return taken

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("rows lie on the disk in several files: one array of them is a copy")
        whole = self._slice(0, len(self), 1)
        return np.array(whole, dtype=dtype or self.dtype)

    def __repr__(self) -> str:
        return f"StoredRows(shape={self.shape}, dtype={self.dtype})"


class StoredIds(Sequence[Id]):
    """Ids, read from the disk when asked for."""

    def __init__(self, shards: Sequence[Shard], starts: Array) -> None:
        self._shards, self._starts = shards, starts

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Id: ...
    @overload
    def __getitem__(self, index: slice) -> list[Id]: ...
    def __getitem__(self, index: int | slice) -> Id | list[Id]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[place] for place in range(start, stop, step)]
            return self._slice(start, stop)
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"id {index} of {len(self)}")
        return self._slice(place, place + 1)[0]

    def _slice(self, start: int, stop: int) -> list[Id]:
        found: list[Id] = []
        for shard, first in zip(self._shards, self._starts, strict=False):
            low, high = max(start - int(first), 0), min(stop - int(first), shard.rows)
            if low < high:
                found += shard.ids(low, high)
        return found

    def __iter__(self) -> Iterator[Id]:
        for start in range(0, len(self), 4096):
            yield from self._slice(start, min(start + 4096, len(self)))

    def __repr__(self) -> str:
        return f"StoredIds({len(self)})"
