"""Who writes a store: one at a time, block by block, each on the disk before the manifest names it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from memsafe.errors import StoreError
from memsafe.stores.lock import WriterLock
from memsafe.stores.manifest import NAME, Block, Header, Manifest, ManifestWriter, differences, sync_folder
from memsafe.stores.segments import Rows, Segments
from memsafe.stores.shards import Array, ShardWriter, checksum, id_lines, rows_bytes, rows_sum
from memsafe.stores.sources import Window

__all__ = ["StoreWriter", "layout_of"]


def layout_of(path: Path) -> dict[str, Any] | None:
    """How the store at `path` is cut into blocks, so that a run that was told nothing else goes on so; None if there is none."""
    try:
        return Manifest.read(path / NAME).header.layout
    except (OSError, StoreError):
        return None


class StoreWriter:
    """The store at `path`, for writing: begun, gone on with, or written anew beside the old one (`update`).

    base, broken_off: for an update, the manifests of the store and of an update that was broken off, if their rows may be used
    again. foreign_rows: of a store whose rows may not.
    Raises :class:`StoreError` for a store that another process writes, that was made of something else, or where nothing can
    be written. After any error what is finished is on the disk, and a new writer goes on with it.
    """

    def __init__(self, path: Path, header: Header, *, shard_bytes: int, update: bool = False) -> None:
        self.path, self._shard_bytes = path, shard_bytes
        self._shard: ShardWriter | None = None
        self.base: Manifest | None = None
        self.broken_off: Manifest | None = None
        self.foreign_rows = 0
        with _told(path):
            path.mkdir(parents=True, exist_ok=True)
            if not (path / NAME).exists() and any(each.name != "lock" for each in _others(path)):
                raise StoreError(f"{path} holds other things; give an empty folder, or a new name", path=str(path))
            self._lock = WriterLock(path)
        try:
            with _told(path):
                self.manifest, self._lines = self._update(header) if update else self._begin(header)
        except BaseException:
            self._lock.release()
            raise

    @property
    def blocks(self) -> list[Block]:
        """What is finished."""
        return self.manifest.blocks

    @property
    def folder(self) -> Path:
        return self.path / self.manifest.header.folder

    def _begin(self, header: Header) -> tuple[Manifest, ManifestWriter]:
        path = self.path / NAME
        if not path.exists():
            return self._new(path, header)
        manifest = Manifest.read(path)
        found = differences(manifest.header, header)
        if found:
            name = manifest.header.made_with.get("model")
            raise StoreError(
                f"{self.path} was made of something else, by {name!r}: {'; '.join(found)}; give the same again, another path, or update=True",
                path=str(self.path),
                differences=found,
            )
        lines = ManifestWriter.resume(path, manifest)
        if manifest.end is None and manifest.blocks:
            try:
                self._resume_shard(manifest)
            except BaseException:
                lines.close()
                raise
        return manifest, lines

    def _new(self, path: Path, header: Header) -> tuple[Manifest, ManifestWriter]:
        (self.path / header.folder).mkdir(exist_ok=True)
        sync_folder(self.path)
        return Manifest(header), ManifestWriter.create(path, header)

    def _resume_shard(self, manifest: Manifest) -> None:
        last = manifest.blocks[-1]
        blocks = [block for block in manifest.blocks if block.shard == last.shard]
        rows, values, ids_bytes = (sum(getattr(b, name) for b in blocks) for name in ("rows", "values", "ids_bytes"))
        folder = self.path / manifest.header.folder
        self._shard = ShardWriter(folder, last.shard, manifest.header, rows=rows, values=values, ids_bytes=ids_bytes)

    # updates

    def _update(self, header: Header) -> tuple[Manifest, ManifestWriter]:
        """A new folder and a manifest of its own, which takes the old one's place at the end."""
        path = self.path / NAME
        if not path.exists():
            return self._new(path, header)
        base, broken = Manifest.read(path), self._broken_off()
        if _same_rows(base.header, header):
            self.base = base
        else:
            self.foreign_rows = base.rows
        if broken is not None and _same_rows(broken.header, header):
            self.broken_off = broken
        used = {each.header.folder for each in (base, broken) if each is not None}
        number = next(n for n in range(1, len(used) + 2) if f"data-{n}" not in used)
        self._clean(used)
        return self._new(self.path / f"update-{number}.jsonl", replace(header, folder=f"data-{number}"))

    def _broken_off(self) -> Manifest | None:
        """Of updates that were broken off, the one that came furthest; the others are forgotten."""
        found: list[tuple[Manifest, Path]] = []
        for path in sorted(self.path.glob("update-*.jsonl")):
            with contextlib.suppress(StoreError):
                found.append((Manifest.read(path), path))
        found.sort(key=lambda each: each[0].rows, reverse=True)
        kept = [path for _, path in found[:1]]
        for path in self.path.glob("update-*.jsonl"):
            if path not in kept:
                path.unlink()
        return found[0][0] if found else None

    def _clean(self, used: set[str]) -> None:
        """Remove the folders of data that no manifest names."""
        for folder in self.path.glob("data-*"):
            if folder.name not in used:
                shutil.rmtree(folder, ignore_errors=True)

    # writing

    def write(self, window: Window, rows: Rows, texts: Array, *, tokens: int = 0, truncated: int = 0) -> Block:
        """Put a block on the disk. rows: of the store's kind and dtype, one a text. texts: their digests."""
        ids = b"" if window.ids is None else id_lines(window.ids)
        with _told(self.path):
            shard = self._shard_for(rows_bytes(rows))
            block = Block(
                number=len(self.blocks),
                shard=shard.number,
                start=shard.rows,
                rows=len(rows),
                ids_bytes=len(ids),
                rows_sum=rows_sum(rows),
                ids_sum=checksum(ids),
                texts_sum=checksum(np.ascontiguousarray(texts)),
                tokens=tokens,
                truncated=truncated,
                values=rows.num_values if isinstance(rows, Segments) else 0,
            )
            try:
                shard.append(rows, texts, ids)
                self._lines.add(block)
            except OSError:
                with contextlib.suppress(OSError):
                    shard.cut()
                raise
            shard.count(len(rows), block.values, len(ids))
        self.blocks.append(block)
        return block

    def _shard_for(self, num_bytes: int) -> ShardWriter:
        shard = self._shard
        if shard is not None and shard.rows and shard.num_bytes + num_bytes > self._shard_bytes:
            shard.close()
            shard = self._shard = None
        if shard is None:
            number = self.blocks[-1].shard + 1 if self.blocks else 0
            shard = self._shard = ShardWriter(self.folder, number, self.manifest.header)
        return shard

    def finish(self, totals: Mapping[str, Any]) -> None:
        """The store is complete. An update takes the place of what it was made from."""
        with _told(self.path):
            if self._shard is not None:
                self._shard.close()
                self._shard = None
            if self.manifest.end is None:
                self._lines.finish(totals)
                self.manifest.end = dict(totals)
            if self._lines.path.name != NAME:
                os.replace(self._lines.path, self.path / NAME)
                sync_folder(self.path)
                for path in self.path.glob("update-*.jsonl"):
                    path.unlink()
                self._clean({self.manifest.header.folder})

    def close(self) -> None:
        """Give the store up to others; what is finished stays."""
        with contextlib.suppress(OSError):
            if self._shard is not None:
                self._shard.close(sync=False)
        self._lines.close()
        self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _same_rows(old: Header, new: Header) -> bool:
    """Whether rows of `old` are what `new` would have."""
    return all(getattr(old, name) == getattr(new, name) for name in ("kind", "model", "options", "dtype", "dimension"))


def _others(path: Path) -> Iterator[Path]:
    """What lies in `path` and is not left from a store whose first write was broken off."""
    return (each for each in path.iterdir() if each.name not in ("data-1", f"{NAME}.new"))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror or error}; what is finished is kept: make room, or mend it, and run the "
            "same again",
            path=str(path),
        ) from error
