"""One entry of a corpus, checked: a text and its id, out of whatever an iterable, a line or a row holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memsafe.errors import InputError

__all__ = ["Entry", "Fields", "Id", "entry_of", "missing"]

Id = str | int
Entry = tuple[Id | None, str]


@dataclass(frozen=True)
class Fields:
    """What the text and the id are called. id_wanted: whether the user named the id, so that it must be there."""

    text: str
    id: str
    id_wanted: bool


def entry_of(value: Any, fields: Fields, where: Callable[[], str], position: int) -> Entry:
    """(id or None, text). Raises :class:`InputError`, which says `where`, never what the text was."""
    name: Any = None
    if isinstance(value, str):
        text: Any = value
        if fields.id_wanted:
            raise InputError(f"{where()} is a text without an id {fields.id!r}", index=position)
    elif isinstance(value, Mapping):
        if fields.text not in value:
            raise InputError(missing(where(), "field", fields.text, list(value)), index=position)
        text = value[fields.text]
        if fields.id in value:
            name = _id_of(value[fields.id], where, position)
        elif fields.id_wanted:
            raise InputError(missing(where(), "field", fields.id, list(value)), index=position)
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        name, text = _id_of(value[0], where, position), value[1]
    else:
        what = f"{len(value)} items" if isinstance(value, (tuple, list)) else _kind(value)
        raise InputError(f"{where()} is {what}; give a text, (id, text) or a dict with {fields.text!r}", index=position)
    if not isinstance(text, str):
        raise InputError(
            f"{where()}: the text is {_kind(text)}, not a str; convert it, or leave it out", index=position
        )
    return name, text if type(text) is str else str.__str__(text)


def missing(where: str, kind: str, name: str, names: Sequence[object]) -> str:
    have = ", ".join(repr(each) for each in names[:10]) or "nothing"
    return f"{where} has no {kind} {name!r} but {have}; name the right one (text=..., id=...)"


def _id_of(value: Any, where: Callable[[], str], position: int) -> Id:
    if isinstance(value, str):
        return str.__str__(value)
    if not isinstance(value, bool):
        try:
            return int(operator.index(value))  # numpy's integers too
        except TypeError:
            pass
    raise InputError(f"{where()}: the id is {_kind(value)}; give a str or an int", index=position)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
