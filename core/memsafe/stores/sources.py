"""Where the texts of a corpus come from: iterables, files, folders, tables; read in windows, never as a whole."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from memsafe.errors import ConfigError, InputError, MissingExtraError
from memsafe.stores.files import FolderSource, LinesSource
from memsafe.stores.items import Entry, Fields, Id, entry_of, missing

__all__ = ["Source", "Window", "open_source", "windows"]

_LINES = (".jsonl", ".ndjson", ".txt")
_PARQUET, _ARROW = (".parquet", ".pq"), (".arrow", ".feather", ".ipc")
_BATCH = 1024
"""Rows of a table that are turned into Python objects at a time."""


class Source(Protocol):
    """Entries in an order that does not change. description: what a store remembers of it. total: how many texts, if known.

    Iterating raises :class:`InputError` for what cannot be read, with its place.
    """

    description: dict[str, Any]
    total: int | None

    def __iter__(self) -> Iterator[Entry]: ...

    def where(self, position: int) -> str:
        """What a message calls entry `position`."""
        ...

    def check_unchanged(self) -> None:
        """Raise :class:`InputError` if what is being read is no longer what it was when reading began."""
        ...


@dataclass(frozen=True)
class Window:
    """Texts that follow one another in the source, and are computed together. start: the position of the first."""

    number: int
    start: int
    texts: list[str]
    ids: list[Id] | None


def windows(source: Source, max_texts: int, max_chars: int) -> Iterator[Window]:
    """Windows of `max_texts` texts, ended earlier by the text with which they reach `max_chars` characters.

    Where they end depends on the texts alone. Raises :class:`InputError` where some entries have an id and others none.
    """
    texts: list[str] = []
    ids: list[Id] = []
    number = start = chars = 0
    given: type | None = None
    for position, (name, text) in enumerate(source):
        if position == 0:
            given = type(name)
        elif given is not type(name):
            raise InputError(
                f"{source.where(position)} {_has(name, given)}; give all of them one kind, or none", index=position
            )
        texts.append(text)
        if name is not None:
            ids.append(name)
        chars += len(text)
        if len(texts) >= max_texts or chars >= max_chars:
            yield Window(number, start, texts, ids or None)
            number, start, chars, texts, ids = number + 1, position + 1, 0, [], []
    if texts:
        yield Window(number, start, texts, ids or None)


def _has(name: Id | None, given: Any) -> str:
    """What is wrong with an id among ids of another kind."""
    kinds = {str: "a str", int: "an int", type(None): "none"}
    return f"has {'no' if name is None else kinds[type(name)] + ' as'} id, but those before it have {kinds[given]}"


def open_source(source: Any, text: str = "text", id: str | None = None) -> Source:
    """What `source` is: see :func:`memsafe.embed_corpus`. Raises :class:`InputError` for what cannot be one."""
    fields = Fields(text, "id" if id is None else id, id is not None)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source), fields)
    module = type(source).__module__.split(".")[0]
    if module == "pyarrow":
        return _TableSource(source, fields)
    if module == "datasets" and hasattr(source, "with_format") and hasattr(source, "num_rows"):
        return _DatasetSource(source, fields)
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise InputError(
            f"source: got a {type(source).__name__}; give an iterable of texts, of (id, text) or of dicts, a file, a folder, "
            "an Arrow table or a Hugging Face Dataset",
            index=None,
        )
    if hasattr(source, "columns") and not hasattr(source, "column_names"):
        raise InputError(
            f"source: got a {type(source).__name__}; give pyarrow.Table.from_pandas(frame), or its columns as "
            'zip(frame["id"], frame["text"])',
            index=None,
        )
    return _IterableSource(source, fields)


def _open_path(path: Path, fields: Fields) -> Source:
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise InputError(f"source: {path} does not exist", index=None)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind in _LINES:
        return LinesSource(path, fields, plain=kind == ".txt")
    if kind in _PARQUET or kind in _ARROW:
        return _TableSource(path, fields)
    raise InputError(
        f"source: {path} is none of {', '.join((*_LINES, *_PARQUET, *_ARROW))}, nor a folder of text files; read it yourself "
        "and give an iterator",
        index=None,
    )


class _IterableSource:
    def __init__(self, values: Iterable[Any], fields: Fields) -> None:
        self._values, self._fields = values, fields
        self.total = len(values) if isinstance(values, Sized) else None
        self.description: dict[str, Any] = {"kind": "iterable"}

    def __iter__(self) -> Iterator[Entry]:
        for position, value in enumerate(self._values):
            yield entry_of(value, self._fields, lambda place=position: self.where(place), position)  # type: ignore[misc]

    def where(self, position: int) -> str:
        return f"source: entry {position}"

    def check_unchanged(self) -> None:
        return


class _TableSource:
    """A Parquet or Arrow file, or something of pyarrow's that gives record batches."""

    def __init__(self, table: Any, fields: Fields) -> None:
        self._arrow = _import("pyarrow", "arrow")
        self._fields = fields
        self._path = table if isinstance(table, Path) else None
        self._stat = _stat(table) if isinstance(table, Path) else None
        self._name = str(self._path) if self._path is not None else "source"
        self.description: dict[str, Any] = {"kind": "table"}
        self.total: int | None = None
        self._schema: Any
        self._batches: Callable[[], Iterable[Any]]
        if self._path is not None:
            self.description = {"kind": self._path.suffix.lower().lstrip("."), "bytes": self._path.stat().st_size}
        try:
            self._open(table)
        except (OSError, self._arrow.ArrowException) as error:
            raise InputError(f"source: {self._name} cannot be read: {error}", index=None) from error
        names = list(self._schema.names)
        if fields.text not in names:
            raise InputError(missing(self._name, "column", fields.text, names), index=None)
        self._id = fields.id if fields.id in names else None
        if self._id is None and fields.id_wanted:
            raise InputError(missing(self._name, "column", fields.id, names), index=None)

    def _open(self, table: Any) -> None:
        """Find out what is there, and how to get its batches."""
        if self._path is None:
            self._schema = table.schema
            self.total = getattr(table, "num_rows", None)
            is_batch = isinstance(table, self._arrow.RecordBatch)
            self._batches = lambda: [table] if is_batch else _batches_of(table)
        elif self._path.suffix.lower() in _PARQUET:
            file = importlib.import_module("pyarrow.parquet").ParquetFile(self._path)
            self._schema, self.total = file.schema_arrow, file.metadata.num_rows
            wanted = [name for name in (self._fields.text, self._fields.id) if name in file.schema_arrow.names]
            self._batches = lambda: file.iter_batches(batch_size=_BATCH, columns=wanted)
        else:
            reader = _ipc(self._path, self._arrow)
            self._schema = reader.schema
            count = getattr(reader, "num_record_batches", None)
            self._batches = lambda: (
                iter(reader) if count is None else (reader.get_batch(number) for number in range(count))
            )

    def __iter__(self) -> Iterator[Entry]:
        position = 0
        try:
            for batch in self._batches():
                for start in range(0, len(batch), _BATCH):
                    part = batch.slice(start, _BATCH)
                    texts = part.column(part.schema.get_field_index(self._fields.text)).to_pylist()
                    ids = [None] * len(texts)
                    if self._id is not None:
                        ids = part.column(part.schema.get_field_index(self._id)).to_pylist()
                    for name, text in zip(ids, texts, strict=True):
                        value = {self._fields.text: text} if self._id is None else (name, text)
                        yield entry_of(value, self._fields, lambda place=position: self.where(place), position)  # type: ignore[misc]
                        position += 1
        except (OSError, self._arrow.ArrowException) as error:
            raise InputError(f"{self._name}: cannot be read behind row {position}: {error}", index=position) from error

    def where(self, position: int) -> str:
        return f"{self._name}: row {position}"

    def check_unchanged(self) -> None:
        if self._path is not None and _stat(self._path) != self._stat:
            raise InputError(f"{self._path} was changed while it was read", index=None)


class _DatasetSource(_TableSource):
    """A ``datasets.Dataset``, read as Arrow tables."""

    def __init__(self, dataset: Any, fields: Fields) -> None:
        self._dataset = dataset.with_format("arrow")
        super().__init__(dataset, fields)
        self.description = {"kind": "dataset", "rows": dataset.num_rows}

    def _open(self, table: Any) -> None:
        self._schema, self.total = table.features.arrow_schema, table.num_rows
        self._batches = lambda: self._dataset.iter(batch_size=_BATCH)


def _batches_of(table: Any) -> Iterator[Any]:
    if hasattr(table, "to_batches"):  # a table, or a dataset
        return iter(table.to_batches())
    return iter(table)  # a reader


def _ipc(path: Path, arrow: Any) -> Any:
    ipc = importlib.import_module("pyarrow.ipc")
    file = arrow.memory_map(str(path), "r")
    try:
        return ipc.open_file(file)
    except arrow.ArrowInvalid:
        file.seek(0)
        return ipc.open_stream(file)  # as Hugging Face writes them


def _stat(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise MissingExtraError(
            f'{module} is not installed; run: pip install "memsafe[{extra}]"', name=module
        ) from error


def check_window(max_texts: Any, max_chars: Any) -> None:
    """Raise :class:`ConfigError` for what is no size of a window."""
    for name, value in (("block_texts", max_texts), ("block_chars", max_chars)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: got {value!r}; give an int of at least 1")
