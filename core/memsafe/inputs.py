"""What a user hands in, checked once: texts, pairs, options. Errors name the position and the remedy, never the text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError, InputError

__all__ = ["Distinct", "check_pairs", "check_query", "check_texts", "devices", "model_name", "policy", "progress_bar"]


def check_texts(texts: Any, *, name: str = "texts") -> list[str]:
    """`texts` as a list of str: a subclass counts by its own value, whatever its ``__str__`` says.

    Raises :class:`InputError` for a bare string, for what is no sequence, for a table, for a non-string.
    """
    checked = _listed(texts, name, "str")
    for index, text in enumerate(checked):
        if type(text) is not str:
            if not isinstance(text, str):
                raise InputError(
                    f"{name}: input {index} is a {type(text).__name__}, not a str; convert it, or leave it out",
                    index=index,
                )
            checked[index] = str.__str__(text)
    return checked


def check_query(query: Any) -> str:
    if not isinstance(query, str):
        raise InputError(f"query: got a {type(query).__name__}; give one str", index=None)
    return str.__str__(query)


def check_pairs(pairs: Any) -> list[tuple[str, str]]:
    """`pairs` as a list of (query, document) tuples; anything else raises :class:`InputError`."""
    checked = []
    for index, pair in enumerate(_listed(pairs, "pairs", "(query, document) pairs")):
        if isinstance(pair, np.ndarray):
            pair = pair.tolist()
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            what = f"{len(pair)} items" if isinstance(pair, (tuple, list)) else f"a {type(pair).__name__}"
            raise InputError(f"pairs: input {index} is {what}; give (query, document)", index=index)
        for part, text in zip(("query", "document"), pair, strict=True):
            if not isinstance(text, str):
                raise InputError(
                    f"pairs: the {part} of input {index} is a {type(text).__name__}, not a str", index=index
                )
        checked.append((str.__str__(pair[0]), str.__str__(pair[1])))
    return checked


def _listed(values: Any, name: str, due: str) -> list[Any]:
    """`values` as a new list. A table is refused: iterating over it gives the names of its columns."""
    if isinstance(values, np.ndarray):
        values = values.tolist()  # of an array without dimensions: what is in it
    if isinstance(values, (str, bytes)):
        remedy = "; write [text]" if due == "str" else ""
        raise InputError(f"{name}: got a bare {type(values).__name__} where a list of {due} is due{remedy}", index=None)
    if hasattr(values, "columns"):
        remedy = (
            'one column, such as df["text"]' if due == "str" else 'its values, such as df[["query", "document"]].values'
        )
        raise InputError(
            f"{name}: got a {type(values).__name__} where a list of {due} is due; give {remedy}", index=None
        )
    if isinstance(values, Mapping) or not hasattr(values, "__iter__"):
        raise InputError(f"{name}: got a {type(values).__name__} where a list of {due} is due", index=None)
    return list(values)


class Distinct:
    """Equal inputs once: `values` are the distinct ones, in order of first appearance, at `positions`."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        rows: dict[Any, int] = {}
        row_of = [rows.setdefault(value, len(rows)) for value in inputs]
        self.values = list(rows)
        self._all_distinct = len(rows) == len(inputs)
        self._row_of = row_of
        self.positions: Sequence[int] | None = None
        if not self._all_distinct:
            first: dict[int, int] = {}
            for position, row in enumerate(row_of):
                first.setdefault(row, position)
            self.positions = [first[row] for row in range(len(rows))]

    def spread(self, rows: Any) -> Any:
        """Rows of the distinct inputs -> rows of all inputs."""
        return rows if self._all_distinct or rows is None else rows[np.asarray(self._row_of)]

    def affected(self, failed: Sequence[int]) -> list[int]:
        """All positions in the caller's list whose distinct input is in `failed`."""
        wanted = set(failed)
        return [position for position, row in enumerate(self._row_of) if row in wanted]


def model_name(model: Any) -> Any:
    """A path or hub id as str; a loaded model as it is. Raises :class:`ConfigError` for nothing at all."""
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    if isinstance(model, str) and model.strip():
        return model
    if model is None or isinstance(model, (str, bytes, int, float)):
        raise ConfigError(f"model: got {model!r}; give a folder, a hub id like 'BAAI/bge-m3', or a loaded model")
    return model


def devices(device: Any) -> list[str | None]:
    """The devices to use: None for the best one, a name, or several names."""
    names = list(device) if isinstance(device, (list, tuple)) else [device]
    if not names:
        raise ConfigError("device: got an empty list; give a name such as 'cuda:0', several, or None for the best one")
    for name in names:
        if name is not None and not isinstance(name, str) and type(name).__name__ != "device":
            raise ConfigError(f"device: got a {type(name).__name__}; give a name such as 'cuda:0', several, or None")
    return [None if name is None else str(name) for name in names]


def policy(memory: Any) -> MemoryPolicy:
    """`memory` as a policy: None for the defaults, a mapping of its fields, or a MemoryPolicy."""
    if memory is None:
        return MemoryPolicy()
    if isinstance(memory, MemoryPolicy):
        return memory
    if isinstance(memory, Mapping):
        return MemoryPolicy().with_options(**memory)
    raise ConfigError(f"memory: got a {type(memory).__name__}; give a MemoryPolicy, or a dict of its fields")


@contextmanager
def progress_bar(
    total: int, show: bool, progress: Callable[[int], None] | None, unit: str
) -> Iterator[Callable[[int], None] | None]:
    """What to call with numbers of finished inputs: the caller's `progress`, a tqdm bar, both or nothing."""
    if not show:
        yield progress
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=unit, desc="memsafe") as bar:

        def update(count: int) -> None:
            bar.update(count)
            if progress is not None:
                progress(count)

        yield update
