"""One run over a corpus: blocks are read, computed and written at the same time, each in its turn."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from memsafe.embedder import Embedder
from memsafe.errors import CancelledError, ConfigError, InputError, InputTooLargeError, StoreError
from memsafe.events import RunReport
from memsafe.multi_vector import MultiVectorEmbedder
from memsafe.sparse import SparseEmbedder
from memsafe.stores.known import KnownRows, SeenIds
from memsafe.stores.reader import Store
from memsafe.stores.reports import CorpusProgress, CorpusReport, Totals
from memsafe.stores.segments import Rows, as_stored, in_dtype, lost_row, placed
from memsafe.stores.shards import Array, checksum, id_lines, text_digests
from memsafe.stores.sources import Source, Window
from memsafe.stores.writer import StoreWriter

__all__ = ["CorpusRun"]

_AT_ONCE = 2
"""Blocks that are with the embedder: while one is computed the next is tokenised, and follows without a gap."""


@dataclass
class _Block:
    """A block under way. known: (places, rows) of what was known of it. missing: places of what is computed."""

    window: Window
    digests: Array
    known: list[tuple[Array, Rows]]
    missing: list[int]
    future: Future[tuple[Rows, RunReport]] | None = None


class CorpusRun:
    """Takes windows from a source to a store. tell: called with how far it is."""

    def __init__(
        self,
        embedder: Embedder | SparseEmbedder | MultiVectorEmbedder,
        writer: StoreWriter,
        source: Source,
        options: Mapping[str, Any],
        *,
        stop: Callable[[], bool] | None,
        tell: Callable[[CorpusProgress], None] | None,
        started: float,
    ) -> None:
        self._embedder, self._writer, self._source, self._options = embedder, writer, source, dict(options)
        self._stop, self._tell, self._started = stop, tell, started
        self._finished = list(writer.blocks)  # by an earlier run
        self._seen = SeenIds()
        self._base, self._broken = (
            None if m is None else KnownRows(writer.path, m) for m in (writer.base, writer.broken_off)
        )
        self._diverged = False  # whether an update that was broken off had another source
        self._totals = Totals()
        self._done = 0  # texts of whole blocks
        self._lock = threading.Lock()
        self._flying = 0  # texts of micro-batches of blocks under way
        self._abandoned = False
        self._under_way: deque[_Block] = deque()

    def go(self, reading: Iterable[Window]) -> CorpusReport:
        """Until the source ends, or `stop` says so."""
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="memsafe-corpus")
        try:
            stopped = self._through(reading, pool)
        finally:
            self._abandoned = True  # blocks under way end with their next micro-batch
            pool.shutdown(wait=True, cancel_futures=True)
        dropped = 0
        if not stopped:
            self._check_end()
            dropped = self._writer.foreign_rows if self._base is None else self._base.dropped()
            rows = sum(block.rows for block in self._writer.blocks)
            self._writer.finish({"rows": rows, "blocks": len(self._writer.blocks)})
        return self._report(complete=not stopped, dropped=dropped)

    def _through(self, reading: Iterable[Window], pool: ThreadPoolExecutor) -> bool:
        """Whether it was stopped before the end."""
        for window in reading:
            self._check_ids(window)
            digests = text_digests(window.texts)
            if window.number < len(self._finished):
                self._skip(window, digests)
                continue
            if self._writer.manifest.end is not None:
                raise self._other_source(window, "the store has no more")
            if self._stop is not None and self._stop():
                self._finish_first()
                return True
            self._begin(window, digests, pool)
            while len(self._under_way) >= _AT_ONCE:
                self._finish_first()
        while self._under_way:
            self._finish_first()
            if self._under_way and self._stop is not None and self._stop():
                return True
        return False

    # one block

    def _skip(self, window: Window, digests: Array) -> None:
        """A block that is finished already, if it is the same one."""
        block = self._finished[window.number]
        ids = b"" if window.ids is None else id_lines(window.ids)
        if block.rows != len(window.texts):
            raise self._other_source(window, f"the store has {block.rows:,} there")
        if block.texts_sum != checksum(digests):
            raise self._other_source(window, "their content differs")
        if block.ids_sum != checksum(ids):
            raise self._other_source(window, "their ids differ")
        self._done += block.rows
        self._totals.skipped += block.rows
        self._say()

    def _begin(self, window: Window, digests: Array, pool: ThreadPoolExecutor) -> None:
        known, missing = self._reusable(window, digests)
        block = _Block(window, digests, known, missing)
        if missing:
            texts = [window.texts[place] for place in missing]
            block.future = pool.submit(self._compute, texts)
        self._under_way.append(block)

    def _compute(self, texts: list[str]) -> tuple[Rows, RunReport]:
        run = self._embedder.run(texts, **self._options, progress=self._count)
        return as_stored(run.embeddings), run.report

    def _count(self, texts: int) -> None:
        """Of micro-batches, as they end; in a lane's thread."""
        if self._abandoned:
            raise CancelledError("the run over the corpus has ended")
        with self._lock:
            self._flying += texts
        self._say()

    def _finish_first(self) -> None:
        """Wait for the oldest block under way, and write it."""
        if not self._under_way:
            return
        block = self._under_way[0]
        window, parts = block.window, list(block.known)
        tokens = truncated = 0
        if block.future is not None:
            try:
                computed, report = block.future.result()
            except (InputError, InputTooLargeError) as error:
                raise self._placed(error, block) from error
            parts.append((np.asarray(block.missing), self._converted(computed, block)))
            if report.truncated and not self._totals.truncated:  # once, not once a block
                length = self._embedder.max_length or 0
                warnings.warn(
                    f"texts longer than {length:,} tokens are cut there, as the model demands; the report counts them",
                    stacklevel=6,
                )
            self._totals.add(report)
            tokens, truncated = report.tokens, report.truncated
            with self._lock:
                self._flying = max(self._flying - report.distinct_texts, 0)
        self._under_way.popleft()
        self._writer.write(window, placed(parts), block.digests, tokens=tokens, truncated=truncated)
        self._done += len(window.texts)
        self._totals.computed += len(block.missing)
        self._totals.reused += len(window.texts) - len(block.missing)
        self._say()

    def _converted(self, rows: Rows, block: _Block) -> Rows:
        """`rows` in the store's dtype, if it can hold them."""
        converted = in_dtype(rows, self._writer.manifest.header.dtype)
        lost = lost_row(rows, converted)
        if lost is not None:
            position = block.window.start + block.missing[lost]
            raise ConfigError(
                f"dtype: {self._source.where(position)} has a row that float16 cannot hold (beyond 65,504); take float32, or "
                "normalize=True"
            )
        return converted

    # updates

    def _reusable(self, window: Window, digests: Array) -> tuple[list[tuple[Array, Rows]], list[int]]:
        """(places, rows) that are known, and the places of those that are not."""
        everywhere = np.arange(len(window.texts))
        for each in (self._broken, self._base):  # what was broken off had taken, or computed, whole blocks already
            rows = None if each is None else each.same_block(window, digests)
            if rows is not None:
                if self._base is not None:
                    self._base.find(digests)  # so that they do not count as dropped
                return [(everywhere, rows)], []
        self._diverged |= self._broken is not None and window.number < self._broken.num_blocks
        known, left = [], everywhere
        # What was broken off knows nothing more, if its source was this one; and then what is computed together stays the same.
        for each in (self._base, self._broken if self._diverged else None):
            if each is not None and len(left):
                found = each.find(digests[left])
                known.append((left[found >= 0], each.rows(found[found >= 0])))
                left = left[found < 0]
        return [part for part in known if len(part[0])], left.tolist()

    # what is wrong

    def _check_ids(self, window: Window) -> None:
        if window.ids is None:
            return
        for place in self._seen.suspects(window.ids):
            name = window.ids[place]
            first = self._first_place(name, window, place)
            if first is not None:
                position = window.start + place
                raise InputError(
                    f"{self._source.where(position)} has the id {name!r}, which entry {first} has already; ids must differ",
                    index=position,
                )

    def _first_place(self, name: Any, window: Window, place: int) -> int | None:
        """Where `name` came before; None if only their digests are equal."""
        earlier: Iterator[Any] = iter(Store(self._writer.path, self._writer.manifest).ids)
        for position, other in enumerate(earlier):
            if other == name and position < window.start + place:
                return position
        for block in (*self._under_way, _Block(window, np.empty(0), [], [])):
            for at, other in enumerate(block.window.ids or []):
                if other == name and block.window.start + at < window.start + place:
                    return block.window.start + at
        return None

    def _other_source(self, window: Window, how: str) -> StoreError:
        stop = window.start + len(window.texts) - 1
        found = f"source: entries {window.start:,} to {stop:,} are not those that the store was made of; {how}"
        return StoreError(
            f"{self._writer.path}: {found}; give the same source, another path, or update=True",
            path=str(self._writer.path),
            differences=[found],
        )

    def _check_end(self) -> None:
        """The source has ended: is it all that the store has, and what it was when reading began?"""
        self._source.check_unchanged()
        have = sum(block.rows for block in self._writer.blocks)
        if have > self._done:
            found = f"source: it ends after {self._done:,} entries, and the store has {have:,}"
            raise StoreError(
                f"{self._writer.path}: {found}; give the same source, another path, or update=True",
                path=str(self._writer.path),
                differences=[found],
            )

    def _placed(self, error: InputError | InputTooLargeError, block: _Block) -> Exception:
        """`error` with the place of the entry in the source."""
        if error.index is None:
            return error
        position = block.window.start + block.missing[error.index]
        message = error.message.replace(f"input {error.index} ", f"{self._source.where(position)} ", 1)
        details = {**error.details, "index": position}
        if isinstance(error, InputTooLargeError):
            details |= {"partial": None, "failed": [block.window.start + block.missing[at] for at in error.failed]}
        return type(error)(message, **details)

    # what is told

    def _say(self) -> None:
        if self._tell is not None:
            self._tell(self._now())

    def _now(self) -> CorpusProgress:
        with self._lock:
            flying = self._flying
        seconds = time.perf_counter() - self._started
        computed = self._totals.computed + flying
        return CorpusProgress(
            self._done + flying, self._source.total, computed, self._totals.tokens, seconds, len(self._writer.blocks)
        )

    def _report(self, *, complete: bool, dropped: int) -> CorpusReport:
        totals = self._totals
        return CorpusReport(
            path=str(self._writer.path),
            complete=complete,
            texts=self._done,
            skipped=totals.skipped,
            reused=totals.reused,
            computed=totals.computed,
            dropped=dropped,
            blocks=len(self._writer.blocks),
            tokens=totals.tokens,
            truncated=totals.truncated,
            micro_batches=totals.micro_batches,
            out_of_memory=totals.out_of_memory,
            splits=totals.splits,
            fallbacks=totals.fallbacks,
            **totals.peaks,
            seconds=time.perf_counter() - self._started,
        )
