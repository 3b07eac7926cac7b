"""Two machines side by side: the same in test and production?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Difference", "compare"]

_PASSING = (
    "free_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "used_bytes",
    "held_by",
    "holders unknown",
    "findings",
    "pid",
    "resident_bytes",
)
"""What differs from one minute to the next: never a difference between machines."""


@dataclass(frozen=True)
class Difference:
    """One place where two examinations differ. where: names joined by dots. matters: why it can change what runs; "" if hardly."""

    where: str
    one: Any
    other: Any
    matters: str


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """Where two examinations (:meth:`Examination.to_dict`) differ, what matters first; what changes by the minute is left out."""
    found = [
        Difference(where, a, b, _why(where))
        for where, a, b in _differences("", one, other)
        if not any(part in _PASSING for part in where.split("."))
    ]
    return sorted(found, key=lambda difference: not difference.matters)


def _differences(where: str, one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = list(dict.fromkeys([*one, *other]))
        return [
            found
            for name in names
            for found in _differences(f"{where}.{name}" if where else str(name), one.get(name), other.get(name))
        ]
    if isinstance(one, list) and isinstance(other, list) and any(isinstance(each, Mapping) for each in (*one, *other)):
        longest = max(len(one), len(other))
        pairs = [(each[i] if i < len(each) else None for each in (one, other)) for i in range(longest)]
        return [found for i, (a, b) in enumerate(pairs) for found in _differences(f"{where}.{i}", a, b)]
    plain = [list(each) if isinstance(each, tuple) else each for each in (one, other)]
    return [] if plain[0] == plain[1] else [(where, one, other)]


_MATTERS = {
    "versions.torch": "kernels and allocator",
    "versions.transformers": "attention and which models run packed",
    "versions.sentence-transformers": "prompts and pooling",
    "versions.tokenizers": "token ids",
    "memory.total_bytes": "how much fits",
    "memory.limits": "how much fits, and who kills",
    "cpu.cores to use": "speed",
    "cpu.dtypes": "dtype='auto' chooses by it",
    "devices": "how much fits, which kernels and dtypes there are",
    "allocator.in_force": "fragmentation",
    "settings": "what torch and tokenizers do",
}


def _why(where: str) -> str:
    return next((why for place, why in _MATTERS.items() if where == place or where.startswith(f"{place}.")), "")
