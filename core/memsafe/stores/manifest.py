"""The manifest of a store: JSON lines that are only ever appended, one for the store, one a finished block, one for the end.

What it does not name does not exist: rows behind the last block are what a crash left, and are cut off.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memsafe.errors import StoreError

__all__ = ["SCHEMA", "Block", "Header", "Manifest", "differences", "sync_folder"]

SCHEMA = 2
NAME = "manifest.jsonl"


@dataclass(frozen=True)
class Header:
    """The first line.

    folder: where the files are, beside the manifest. dtype: "float32" or "float16". dimension: of a dense row, of a vector of a
    token, or of the vocabulary. ids: "positions", or of which type they were given: "str", "int". model, options, source, layout:
    what a run that goes on must share. made_with: for the reader of it. kind: "dense", "sparse" or "multi_vector"; stores of
    version 1 are dense.
    """

    folder: str
    dtype: str
    dimension: int
    ids: str
    model: dict[str, Any]
    options: dict[str, Any]
    source: dict[str, Any]
    layout: dict[str, Any]
    made_with: dict[str, Any]
    schema: int = SCHEMA
    kind: str = "dense"


@dataclass(frozen=True)
class Block:
    """Rows that were computed together and are on disk.

    shard, start: where they are. ids_bytes: of their lines. rows_sum, ids_sum, texts_sum: BLAKE2b, 32 hexadecimal digits.
    tokens: that were computed for them. truncated: texts that were longer than the model takes. values: numbers of sparse rows,
    or vectors of tokens; 0 of dense rows.
    """

    number: int
    shard: int
    start: int
    rows: int
    ids_bytes: int
    rows_sum: str
    ids_sum: str
    texts_sum: str
    tokens: int = 0
    truncated: int = 0
    values: int = 0


@dataclass
class Manifest:
    """A manifest as read. end: the last line, of a store that is complete; good_bytes: up to the end of the last whole line."""

    header: Header
    blocks: list[Block] = field(default_factory=list)
    end: dict[str, Any] | None = None
    good_bytes: int = 0

    @property
    def rows(self) -> int:
        return sum(block.rows for block in self.blocks)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest at `path`; what follows the last whole line is ignored, as a crash leaves it.

        Raises :class:`StoreError` for one of a newer version, and for one that is damaged before its end;
        ``FileNotFoundError`` if there is none.
        """
        content = path.read_bytes()
        manifest: Manifest | None = None
        for number, (line, end) in enumerate(_lines(content), 1):
            fields = _parsed(line)
            if fields is None:
                if content.find(b"\n", end) < 0 and manifest is not None:
                    break  # a torn last line: a power cut may leave its end and not its beginning
                raise StoreError(f"{path}, line {number}: damaged; restore it, or embed anew", path=str(path))
            if manifest is None:
                manifest = cls(_header(fields, path))
            elif "end" in fields:
                manifest.end = fields["end"]
            else:
                manifest.blocks.append(_block(fields, len(manifest.blocks), path, number))
            manifest.good_bytes = end
        if manifest is None:
            raise StoreError(f"{path}: empty; remove the folder, or embed into another one", path=str(path))
        return manifest


class ManifestWriter:
    """Appends lines to a manifest; each is on the disk when its method returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "r+b")  # noqa: SIM115 - closed by close()
        self._file.seek(0, os.SEEK_END)

    @classmethod
    def create(cls, path: Path, header: Header) -> ManifestWriter:
        """A new manifest, there as a whole or not at all."""
        temporary = path.with_name(path.name + ".new")
        with open(temporary, "wb") as file:
            file.write(_line(asdict(header)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
        return cls(path)

    @classmethod
    def resume(cls, path: Path, manifest: Manifest) -> ManifestWriter:
        """Go on behind the last whole line."""
        writer = cls(path)
        writer._file.truncate(manifest.good_bytes)
        writer._file.seek(manifest.good_bytes)
        return writer

    def add(self, block: Block) -> None:
        self._append(asdict(block))

    def finish(self, totals: Mapping[str, Any]) -> None:
        self._append({"end": dict(totals)})

    def close(self) -> None:
        self._file.close()

    def _append(self, fields: dict[str, Any]) -> None:
        before = self._file.tell()
        try:
            self._file.write(_line(fields))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._undo(before)
            raise

    def _undo(self, length: int) -> None:
        """A full disk may have taken half a line; the next run would cut it off, and so may we."""
        file = self._file
        self._file = open(self.path, "r+b")  # noqa: SIM115 - a file without what the old one's buffer holds
        self._file.truncate(length)
        self._file.seek(length)
        try:
            file.close()
        except OSError:
            self._file.truncate(length)


def sync_folder(folder: Path) -> None:
    """Let names of new files survive a power cut; where folders cannot be synchronised (Windows), the system does as it does."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def differences(stored: Header, wanted: Header) -> list[str]:
    """What keeps `wanted` from going on with `stored`, each as ``name: the store has X, this run has Y``."""
    found: list[str] = []
    for name in ("model", "options", "source", "layout"):
        found += _differences(name, getattr(stored, name), getattr(wanted, name))
    for name in ("kind", "dtype", "dimension", "ids"):
        found += _differences(name, getattr(stored, name), getattr(wanted, name))
    return found


def _differences(name: str, stored: Any, wanted: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted(stored.keys() | wanted.keys())
        return [each for key in keys for each in _differences(f"{name}.{key}", stored.get(key), wanted.get(key))]
    return [] if stored == wanted else [f"{name}: the store has {stored!r}, this run has {wanted!r}"]


def _line(fields: dict[str, Any]) -> bytes:
    """JSON with a checksum of the rest in front of its last brace."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}\n'.encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    text, found, crc = line.decode("utf-8", "replace").rpartition(', "crc": ')
    try:
        if not found or int(crc.rstrip("}")) != zlib.crc32((text + "}").encode()):
            return None
        fields = json.loads(text + "}")
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _lines(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Whole lines, each with where it ends."""
    start = 0
    while (end := content.find(b"\n", start)) >= 0:
        yield content[start:end], end + 1
        start = end + 1


def _header(fields: dict[str, Any], path: Path) -> Header:
    schema = fields.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise StoreError(
            f"{path}: a store of version {schema!r}; this memsafe reads up to {SCHEMA}: install a newer one",
            path=str(path),
        )
    try:
        header = Header(**fields)
    except TypeError as error:
        raise StoreError(f"{path}, line 1: not a store's ({error})", path=str(path)) from error
    if os.sep in header.folder or header.folder in ("", ".", ".."):
        raise StoreError(f"{path}, line 1: {header.folder!r} is no folder of a store", path=str(path))
    return header


def _block(fields: dict[str, Any], number: int, path: Path, line: int) -> Block:
    try:
        block = Block(**fields)
    except TypeError as error:
        raise StoreError(f"{path}, line {line}: not a block's ({error})", path=str(path)) from error
    if block.number != number:
        raise StoreError(f"{path}, line {line}: block {block.number} where {number} is due", path=str(path))
    return block
