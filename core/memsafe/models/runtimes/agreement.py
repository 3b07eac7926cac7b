"""How well a quantised model agrees with itself in float32: texts to measure on, and the measure."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe.models import sbert

__all__ = ["agreement", "inputs_for", "passages", "rows_of"]

Array = NDArray[Any]

_MODULES = ("builtins", "math", "itertools", "sys", "time", "_collections", "_io", "_struct", "_csv", "_datetime", "_socket", "posix", "nt")  # fmt: skip
"""Whose documentation is in the interpreter itself: prose that is always there, also under ``python -OO``."""
_LEAST_CHARS = 60
_MOST_CHARS = 2000


@lru_cache(maxsize=1)
def passages() -> tuple[str, ...]:
    """Passages of documentation, a sentence to a page long, in a fixed order that mixes lengths."""
    found: dict[str, None] = {}
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for text in _documentation(module):
            if len(text) >= _LEAST_CHARS:
                found.setdefault(text)
    texts = list(found)
    # Every third as it is; the others with what follows, so that there are long ones too.
    joined = [" ".join(texts[place : place + 1 + place % 3]) for place in range(len(texts))]
    step = next((step for step in (37, 41, 43) if len(joined) % step), 1)
    return tuple(joined[place * step % len(joined)][:_MOST_CHARS] for place in range(len(joined)))


def _documentation(module: ModuleType) -> Iterator[str]:
    for name in sorted(vars(module)):
        each = getattr(module, name)
        held = [each, *(vars(each).values() if inspect.isclass(each) else ())]
        for one in held:
            text = getattr(one, "__doc__", None)
            if isinstance(text, str):
                yield " ".join(text.split())


def inputs_for(kind: str, texts: Sequence[str], count: int) -> list[Any]:
    """`count` texts, or pairs of a question and a text: each other pair belongs together. texts: (): :func:`passages`."""
    chosen = list(islice(texts or passages(), count))
    if kind != "reranker":
        return chosen
    shifted = chosen[len(chosen) // 2 :] + chosen[: len(chosen) // 2]
    return [
        (" ".join((text if place % 2 else other).split()[:10]), text)
        for place, (text, other) in enumerate(zip(chosen, shifted, strict=True))
    ]


def rows_of(model: Any, inputs: Sequence[Any]) -> Array:
    """Rows of `inputs` by `model`'s own methods, each alone: float32, shape (inputs, dim or labels); scores are raw."""
    rows = sbert.own_rows(model, inputs, prompt="")
    found = np.asarray(rows.detach().float().cpu().numpy(), dtype=np.float32)
    return found.reshape(len(inputs), -1)


def agreement(rows: Array, wanted: Array) -> float:
    """Of rows of several numbers the median cosine; of single ones, which have no direction, their correlation. 0 to 1; 0 if
    anything is not finite."""
    one, other = rows.astype(np.float64), wanted.astype(np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return 0.0
    if one.shape[1] == 1:
        one, other = (each.T - each.mean() for each in (one, other))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines = np.sum(one * other, axis=1) / np.maximum(norms, 1e-30)
    return float(np.clip(np.median(cosines), 0.0, 1.0))
