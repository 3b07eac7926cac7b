"""A batch that goes through an ``embeddings_cache``: what is known, what is missing, what a failure leaves."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator

import numpy as np
from llama_index.core.base.embeddings.base import Embedding

from memsafe import InputError, InputTooLargeError

__all__ = ["COLLECTION", "CachedWork", "turn"]

_CACHED_AT_ONCE = 1024
"""Texts embedded before they are put into the cache: what is finished survives whatever comes after."""
COLLECTION = "embeddings"
_ENTRIES_PER_TURN = 256
"""Entries of a cache that an async call handles before it lets the event loop run: 15 microseconds each in memory."""


class CachedWork:
    """What of `texts` is in a cache, what is missing, and what an error leaves. Values are upstream's: {uuid: embedding}."""

    def __init__(self, texts: list[str]) -> None:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts: entry {index} is a {type(text).__name__}, not a str", index=index)
        self._texts = texts
        self._known: dict[str, dict[str, Embedding] | None] = dict.fromkeys(texts)
        self._error: InputTooLargeError | None = None

    @property
    def distinct(self) -> list[str]:
        return list(self._known)

    def take(self, text: str, value: dict[str, Embedding] | None) -> None:
        self._known[text] = value

    def parts(self) -> Iterator[list[str]]:
        """The missing texts, some at a time, so that what is finished is kept whatever happens to the rest."""
        missing = [text for text, value in self._known.items() if value is None]
        for start in range(0, len(missing), _CACHED_AT_ONCE):
            yield missing[start : start + _CACHED_AT_ONCE]

    def add(self, text: str, embedding: Embedding) -> dict[str, Embedding]:
        value = {str(uuid.uuid4()): embedding}
        self._known[text] = value
        return value

    def rescued(self, error: InputTooLargeError, part: list[str]) -> Iterator[tuple[str, Embedding]]:
        """What of `part` was done when one of it turned out not to fit; :meth:`check` raises `error` later."""
        self._error = error
        failed = {part[place] for place in error.failed}
        error.failed = [place for place, text in enumerate(self._texts) if text in failed]
        index = self._texts.index(part[error.index])
        error.args = (error.message.replace(f"input {error.index} ", f"input {index} ", 1),)
        error.index, error.message = index, error.args[0]
        rows = error.partial
        return (
            (text, row.tolist())
            for text, row in zip(part, rows if rows is not None else [], strict=False)
            if text not in failed
        )

    def check(self) -> None:
        """Raise the error that was met, as one of all texts."""
        if self._error is None:
            return
        rows = [next(iter(value.values())) if (value := self._known[text]) else None for text in self._texts]
        width = max((len(row) for row in rows if row is not None), default=0)
        nothing = [float("nan")] * width
        self._error.partial = np.array([row or nothing for row in rows], dtype=np.float32) if width else None
        raise self._error

    def embeddings(self) -> list[Embedding]:
        return [next(iter(value.values())) for text in self._texts if (value := self._known[text])]


async def turn(number: int) -> None:
    """Let the event loop run now and then: a cache in memory never does."""
    if number % _ENTRIES_PER_TURN == 0:
        await asyncio.sleep(0)
