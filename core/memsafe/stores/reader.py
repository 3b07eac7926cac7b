"""A store as it is read: ids, rows that are mapped and never copied as a whole, batches, a check, a search."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memsafe.errors import ConfigError, StoreError
from memsafe.stores import export, search
from memsafe.stores.manifest import NAME, Block, Manifest
from memsafe.stores.search import Neighbours
from memsafe.stores.segments import as_given
from memsafe.stores.shards import Array, Id, Shard, checksum, rows_bytes
from memsafe.stores.views import StoredIds, StoredRows, StoredSegments

__all__ = ["Store", "Verification", "open_store"]


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

    rows: all of them: a :class:`StoredRows` of dense ones, else a :class:`StoredSegments`.
    """

    rows: StoredRows | StoredSegments

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        header = manifest.header
        self.shards: list[Shard] = []
        for number, blocks in enumerate(by_shard(manifest.blocks)):
            rows, values, ids_bytes = (
                sum(getattr(b, name) for b in blocks) for name in ("rows", "values", "ids_bytes")
            )
            self.shards.append(
                Shard(path / header.folder, number, header, rows=rows, values=values, ids_bytes=ids_bytes)
            )
        self._starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        if header.kind == "dense":
            self.rows = StoredRows(self.shards, header.dtype, header.dimension)
        else:
            self.rows = StoredSegments(self.shards, header)
        self._norms: list[Array] | None = None

    # what it is

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def ids(self) -> Sequence[Id]:
        """Of each row: as they were given, or its position in the source. Read from the disk when asked for."""
        return StoredIds(self.shards, self._starts) if self._manifest.header.ids != "positions" else range(len(self))

    @property
    def kind(self) -> str:
        """``"dense"``, ``"sparse"`` or ``"multi_vector"``."""
        return self._manifest.header.kind

    @property
    def dimension(self) -> int:
        """Of a dense row, of a vector of a token; of sparse rows the vocabulary."""
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
            "kind": self.kind,
            "rows": len(self),
            "values": sum(block.values for block in blocks),
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
        kind = "" if self.kind == "dense" else f"{self.kind} "
        return f"Store({str(self.path)!r}: {len(self):,} {kind}rows of {self.dimension} x {self.dtype}{state})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_store, (str(self.path),))

    # reading

    def iter_batches(self, max_rows: int = 4096) -> Iterator[tuple[Sequence[Id], Any]]:
        """(ids, rows) of at most `max_rows` at a time, in order. rows: a view of the mapped file, (n, dim), read-only; of a sparse
        store a ``scipy.sparse.csr_array`` over such views, of vectors of tokens a :class:`RaggedArray`."""
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise ConfigError(f"max_rows: got {max_rows!r}; give an int of at least 1")
        ids = self.ids
        for shard, first in zip(self.shards, self._starts, strict=False):
            for start in range(0, shard.rows, max_rows):
                stop = min(start + max_rows, shard.rows)
                yield (
                    ids[int(first) + start : int(first) + stop],
                    as_given(shard.rows_view[start:stop], self.kind, self.dimension),
                )

    def search(self, queries: Any, k: int = 10, *, metric: str | None = None, max_bytes: int = 1 << 25) -> Neighbours:
        """The `k` nearest rows to each query, exactly: a product of matrices over the mapped files, a block at a time.

        queries: float, (queries, dim) or (dim,); what the embedder of the store's kind gives for queries: of a sparse store a
        ``scipy.sparse.csr_array``, of vectors of tokens a :class:`RaggedArray`, or one query's, (vectors, dim). metric:
        ``"cosine"`` (None) or ``"dot"``; sparse rows have ``"dot"`` alone, vectors of tokens ``"maxsim"``. max_bytes: of rows and
        of scores in memory at a time. Ties go to the row that comes first.

        Raises :class:`ConfigError` for another width, metric or `k`, or queries of another kind.
        """
        if self.kind != "dense":
            ids, batches = self.ids, (rows for _, rows in self.iter_batches(search.ROWS))
            find = search.nearest_sparse if self.kind == "sparse" else search.nearest_vectors
            positions, scores = find(batches, queries, k, self.dimension, metric=metric, max_bytes=max_bytes)
            return Neighbours([[ids[int(place)] for place in row] for row in positions], positions, scores)
        metric = "cosine" if metric is None else metric
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

        Raises :class:`MissingExtraError`, :class:`ConfigError` for another ending or kind of rows, :class:`StoreError` if it cannot
        be written.
        """
        if self.kind != "dense":
            raise ConfigError(
                f"export: the rows are {self.kind}, and only dense ones fit a column of fixed width; read the .npy files of the "
                "store with numpy, or iter_batches()"
            )
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
                stop = block.start + block.rows
                texts = np.ascontiguousarray(shard.texts[block.start : stop])
                ids = shard.id_bytes(ids_start, ids_start + block.ids_bytes)
                good = {
                    shard.rows_names: shard.rows_are(block.start, stop, block.rows_sum),
                    shard.paths["texts"].name: checksum(texts) == block.texts_sum,
                    shard.paths["ids"].name: checksum(ids) == block.ids_sum,
                }
                place = f"block {block.number} (rows {first} to {first + block.rows - 1})"
                problems += [f"{name}: {place} is damaged" for name, whole in good.items() if not whole]
                num_bytes += rows_bytes(shard.rows_view[block.start : stop]) + texts.nbytes + len(ids)
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
