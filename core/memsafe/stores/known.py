"""Rows that are there already: found by the digest of their text, checked before they are used again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memsafe.stores.manifest import Block, Manifest
from memsafe.stores.reader import Store
from memsafe.stores.segments import Rows
from memsafe.stores.shards import TEXT_BYTES, Array, Id, checksum, id_lines, rows_sum
from memsafe.stores.sources import Window
from memsafe.stores.views import StoredRows

__all__ = ["KnownRows", "SeenIds"]


class KnownRows:
    """The rows of one store, by text. Takes 16 bytes of memory a row, and 1 more."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._store = Store(path, manifest)
        self._blocks = manifest.blocks
        first = np.cumsum([0, *(block.rows for block in self._blocks)])
        self._first: NDArray[np.int64] = first.astype(np.int64)
        self._good: dict[int, bool] = {}  # blocks that were compared with their checksum
        digests = [_prefix(shard.texts) for shard in self._store.shards]
        prefixes = np.concatenate(digests) if digests else np.empty(0, np.uint64)
        self._order = np.argsort(prefixes, kind="stable")
        self._sorted = prefixes[self._order]
        self._used = np.zeros(len(prefixes), bool)

    def find(self, texts: Array) -> NDArray[np.int64]:
        """The row of each text, given digests of shape (texts, 16); -1 where there is none, or a damaged one."""
        found = np.full(len(texts), -1, np.int64)
        wanted = _prefix(texts)
        for place, at in enumerate(np.searchsorted(self._sorted, wanted)):
            while at < len(self._sorted) and self._sorted[at] == wanted[place]:
                row = int(self._order[at])
                if (self._digests(row, row + 1)[0] == texts[place]).all():
                    self._used[row] = True
                    if self._is_good(int(np.searchsorted(self._first, row, side="right")) - 1):
                        found[place] = row
                    break
                at += 1
        return found

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def rows(self, places: NDArray[np.int64] | slice) -> Rows:
        """Those at `places`, as they are stored."""
        rows = self._store.rows
        return rows[places] if isinstance(rows, StoredRows) else rows.segments(places)

    def same_block(self, window: Window, texts: Array) -> Rows | None:
        """The rows of block `window.number`, if it was made of the very same texts and ids; else None."""
        if window.number >= len(self._blocks):
            return None
        block = self._blocks[window.number]
        ids = b"" if window.ids is None else id_lines(window.ids)
        if (block.texts_sum, block.ids_sum) != (checksum(np.ascontiguousarray(texts)), checksum(ids)):
            return None
        if not self._is_good(window.number):
            return None
        start = int(self._first[window.number])
        return self.rows(slice(start, start + block.rows))

    def dropped(self) -> int:
        """How many rows are of texts that were not asked for."""
        count = 0
        for start in range(0, len(self._used), 1 << 16):
            stop = min(start + (1 << 16), len(self._used))
            wanted = _prefix(self._digests(start, stop))
            first = self._order[np.searchsorted(self._sorted, wanted)]
            count += int((~self._used[first]).sum())
        return count

    def _digests(self, start: int, stop: int) -> Array:
        parts, first = [], 0
        for shard in self._store.shards:
            part = shard.texts[max(start - first, 0) : max(stop - first, 0)]
            if len(part):
                parts.append(part)
            first += shard.rows
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _is_good(self, number: int) -> bool:
        if number not in self._good:
            block: Block = self._blocks[number]
            start = int(self._first[number])
            self._good[number] = rows_sum(self.rows(slice(start, start + block.rows))) == block.rows_sum
        return self._good[number]


class SeenIds:
    """Whether an id has come before: 8 bytes each, in sorted runs that are merged as they grow."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def suspects(self, ids: list[Id]) -> list[int]:
        """Places in `ids` whose digest has come before, here or earlier: mostly none. Remembers all of them."""
        digests = np.frombuffer(b"".join(_id_digest(one) for one in ids), dtype=np.uint64)
        order = np.argsort(digests, kind="stable")
        run = digests[order]
        again = np.zeros(len(ids), bool)
        again[order[1:][run[1:] == run[:-1]]] = True
        for other in self._runs:
            at = np.minimum(np.searchsorted(other, digests), len(other) - 1)
            again |= other[at] == digests
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate((self._runs.pop(), run)), kind="stable")
        self._runs.append(run)
        return np.flatnonzero(again).tolist()


def _id_digest(one: Id) -> bytes:
    from hashlib import blake2b

    return blake2b(repr(one).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _prefix(texts: Array) -> NDArray[np.uint64]:
    """The first 8 of 16 bytes of each digest."""
    return np.ascontiguousarray(texts[:, : TEXT_BYTES // 2]).view(np.uint64).reshape(-1)
