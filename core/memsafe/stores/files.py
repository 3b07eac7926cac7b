"""Files of texts: JSON lines, plain lines, and folders of text files."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from memsafe.errors import InputError
from memsafe.stores.items import Entry, Fields, entry_of

__all__ = ["FolderSource", "LinesSource"]

_TEXT_FILES = (".md", ".rst", ".text", ".txt")


class LinesSource:
    """A file with an entry a line: JSON (a text, [id, text], or an object), or, `plain`, the text itself. May be gzipped.

    Empty lines are no entries.
    """

    total: int | None = None

    def __init__(self, path: Path, fields: Fields, *, plain: bool) -> None:
        self._path, self._fields, self._plain = path, fields, plain
        self._stat = _stat(path)
        self.description: dict[str, Any] = {"kind": "lines" if plain else "jsonl", "bytes": self._stat[0]}

    def __iter__(self) -> Iterator[Entry]:
        position = number = 0
        file = self._open()
        try:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                place = f"{self._path}, line {number}"
                yield self._entry(line, place, position)
                position += 1
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self._path}: cannot be read behind line {number}: {error}", index=position) from error
        finally:
            file.close()

    def _open(self) -> IO[bytes]:
        try:
            return gzip.open(self._path) if self._path.suffix.lower() == ".gz" else open(self._path, "rb")  # type: ignore[return-value]
        except OSError as error:
            raise InputError(f"source: {self._path} cannot be read: {error.strerror}", index=None) from error

    def _entry(self, line: bytes, place: str, position: int) -> Entry:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: not UTF-8 at byte {error.start}", index=position) from error
        if self._plain:
            return None, text.rstrip("\r\n")
        try:
            value = json.loads(text.strip())
        except (ValueError, RecursionError) as error:
            at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(f"{place}: not JSON{at}; repair it, or leave it out", index=position) from error
        return entry_of(value, self._fields, lambda: place, position)

    def where(self, position: int) -> str:
        return f"{self._path}: entry {position}"

    def check_unchanged(self) -> None:
        if _stat(self._path) != self._stat:
            raise InputError(f"{self._path} was changed while it was read", index=None)


class FolderSource:
    """Each text file below a folder is an entry; its id is its path in it. Hidden ones are left out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in _TEXT_FILES
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if not self._names:
            raise InputError(f"source: {folder} holds no file that ends in {', '.join(_TEXT_FILES)}", index=None)
        self.total: int | None = len(self._names)
        self._stats = {name: _stat(folder / name) for name in self._names}
        self.description: dict[str, Any] = {
            "kind": "folder",
            "files": len(self._names),
            "bytes": sum(size for size, *_ in self._stats.values()),
        }

    def __iter__(self) -> Iterator[Entry]:
        for position, name in enumerate(self._names):
            path = self._folder / name
            try:
                yield name, path.read_text(encoding="utf-8")
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}", index=position) from error
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not UTF-8 at byte {error.start}", index=position) from error

    def where(self, position: int) -> str:
        return str(self._folder / self._names[position])

    def check_unchanged(self) -> None:
        for name, stat in self._stats.items():
            if not (self._folder / name).exists() or _stat(self._folder / name) != stat:
                raise InputError(f"{self._folder / name} was changed while the folder was read", index=None)


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"source: {path} cannot be read: {error.strerror}", index=None) from error
    return found.st_size, found.st_mtime_ns, found.st_ino
