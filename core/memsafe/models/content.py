"""A fast tokenizer's Rust core: texts to token ids without special tokens, and no more of a text than can matter.

Ids travel as bytes, four a token (int32, native order): slices and joins of them cost no Python object per token.
"""

from __future__ import annotations

import copy
import re
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from memsafe.models.words import Words

__all__ = ["BYTES_PER_CHAR", "ContentTokenizer", "cut"]

BYTES_PER_CHAR = 400
"""What tokenising takes meanwhile, at most: 95 were measured for English and BERT's tokenizer, 375 for Chinese, where each
character is a token."""
_CHARS_PER_TOKEN = 8
"""Characters that are looked at first for each token that is needed; English has four to five."""
_FIRST_CHARS = 1024
_LONG_RUN = 4096
"""Runs of one kind of character may be shortened to this many where the tokenizer is seen not to care."""
_RUNS = {r"\s": " \n\t\r\u00a0\u3000", r"[A-Za-z0-9]": "a1B2z9"}
"""What a run consists of -> a probe of that kind."""
_REPEATED = re.compile(f"(.)\\1{{{_LONG_RUN},}}", re.DOTALL)

Encode = Callable[[Sequence[str]], list[bytes]]


class ContentTokenizer:
    """A private copy of a tokenizer's core, without padding and truncation, so that threads may share it."""

    def __init__(self, backend: Any) -> None:
        self._rust = copy.deepcopy(backend)
        self._rust.no_padding()
        self._rust.no_truncation()
        self._words = Words.of(self._rust, self._encode)
        self._same: dict[str, bool] = {}

    def ids(self, texts: Sequence[str], need: int | None = None, left: bool = False) -> list[bytes]:
        """Ids of each text's tokens, four bytes each: all of them, or at least the first `need` (the last, if `left`).

        Those are the ones that the whole text would have: see :func:`cut`.
        """
        encode = self._words.ids if self._words is not None else self._encode
        return [ids for _, ids in cut(texts, need, left, encode, self.squeezed)]

    def pieces(self, texts: Sequence[str], need: int | None, left: bool) -> list[str]:
        """Each text, cut where at least `need` of its tokens are kept."""
        return [piece for piece, _ in cut(texts, need, left, self._encode, self.squeezed, measure_short=False)]

    def whole(self, *parts: str) -> Any:
        """The tokenizer's own encoding of a text or a pair, special tokens included."""
        return self._rust.encode(*parts)

    def squeezed(self, text: str) -> str:
        """`text` with endless runs (of white space, of letters and digits, of one character) cut to :data:`_LONG_RUN`, if
        they are of a kind of which this tokenizer makes the same tokens however long they are."""
        for unit, probe in _RUNS.items():
            if self._is_same(probe):
                text = re.sub(f"{unit}{{{_LONG_RUN},}}", lambda found: found.group()[:_LONG_RUN], text)
        return _REPEATED.sub(lambda found: found.group()[: _LONG_RUN if self._is_same(found.group(1)) else None], text)

    def _is_same(self, probe: str) -> bool:
        """Whether runs of `probe` twice as long as :data:`_LONG_RUN` give the same tokens, alone and inside a word."""
        if probe not in self._same:
            runs = [probe * (length // len(probe)) for length in (_LONG_RUN, 2 * _LONG_RUN)]
            alone, alone_too, inside, inside_too = self._encode(
                [f"{before}{run}{after}" for before, after in (("in ", " out"), ("in", "out")) for run in runs]
            )
            self._same[probe] = alone == alone_too and inside == inside_too
        return self._same[probe]

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("i", encoding.ids).tobytes() for encoding in encodings]


def cut(
    texts: Sequence[str],
    need: int | None,
    left: bool,
    encode: Encode,
    squeezed: Callable[[str], str] = lambda text: text,
    *,
    measure_short: bool = True,
) -> list[tuple[str, bytes]]:
    """(as much of it as matters, its ids) for each text. need: tokens; None for all. left: the last ones are needed.

    A text is cut before it is tokenised, next to white space where there is some, and a cut counts only if what is kept
    overflows `need` by itself, and by a quarter and 64 tokens more: what a cut can change are the tokens beside it
    (the word it divides, merges with what follows), and those lie in what is dropped. A text that does not overflow
    is looked at in fourfold pieces until it does. measure_short: whether to tokenise texts that need no cut.
    """
    done: list[tuple[str, bytes]] = [("", b"")] * len(texts)
    limit = None if need is None else max(_CHARS_PER_TOKEN * need, _FIRST_CHARS)
    enough = 0 if need is None else 4 * (need + need // 4 + 64)
    todo, first = list(range(len(texts))), True
    rest = dict(enumerate(texts))
    while todo:
        pieces = [_piece(rest[i], limit, left) for i in todo]
        whole = [len(piece) == len(rest[i]) for i, piece in zip(todo, pieces, strict=True)]
        wanted = [piece for piece, entire in zip(pieces, whole, strict=True) if measure_short or not entire]
        encoded = iter(encode(wanted) if wanted else [])
        again = []
        for i, piece, entire in zip(todo, pieces, whole, strict=True):
            ids = next(encoded) if measure_short or not entire else b""
            if entire or len(ids) >= enough:
                done[i] = (piece, ids)
            else:
                again.append(i)
        if first and again:
            for i in again:
                rest[i] = squeezed(rest[i])
        todo, first = again, False
        limit = None if limit is None else 4 * limit
    return done


def _piece(text: str, limit: int | None, left: bool) -> str:
    """`text`, or its first (last) `limit` characters or a little less, ending where a word ends."""
    if limit is None or len(text) <= limit + limit // 4:
        return text
    if left:
        start = len(text) - limit
        space = min((at for at in (text.find(" ", start), text.find("\n", start)) if at >= 0), default=-1)
        return text[space if 0 <= space < start + limit // 2 else start :]
    space = max(text.rfind(" ", limit // 2, limit), text.rfind("\n", limit // 2, limit))
    return text[: space if space > 0 else limit]
