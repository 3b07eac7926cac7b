"""A fast tokenizer's Rust core: texts to token ids without special tokens, and no more of a text than can matter.

Ids travel as bytes, four a token (int32, native order): slices and joins of them cost no Python object per token.
"""

from __future__ import annotations

import copy
import logging
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from memsafe.models.words import Words

__all__ = ["BYTES_PER_CHAR", "ContentTokenizer", "Cutter"]

log = logging.getLogger("memsafe")

BYTES_PER_CHAR = 400
"""What tokenising takes meanwhile, at most: 95 were measured for English and BERT's tokenizer, 375 for Chinese, where each
character is a token."""
_CHARS_PER_TOKEN = 8
"""Characters that are looked at first for each token that is needed; English has four to five."""
_FIRST_CHARS = 1024
_INT = 4  # bytes of an id
_LONG_RUN = 4096
"""Runs of one kind of character may be shortened to this many where the tokenizer is seen not to care."""
_RUNS = {
    re.compile(
        f"(?<!{unit}){unit}{{{_LONG_RUN},}}"
    ): probe  # tried where a run begins only: else it takes the square of one
    for unit, probe in ((r"\s", " \n\t\r\u00a0\u3000"), ("[A-Za-z0-9]", "a1B2z9"))
}
"""Long runs of one kind of character -> a probe of that kind."""
_REPEATED = re.compile(f"(.)(?<!\\1\\1)\\1{{{_LONG_RUN - 1}}}", re.DOTALL)
_PROBES = 8
"""Different characters whose long runs are looked at in one text."""
_MOST_PROBES = 1024
"""Characters of which it is remembered whether long runs of them matter."""
_MOST_CHARS = 1 << 18
"""Of a text in which so many characters, long runs shortened, give fewer tokens than are needed, this many at a time are
tokenised: some 100 MB."""

_SHIFTS = (1, 3)
"""A cut is sure if these many characters less give the same tokens: what depends on where a text ends shows then."""

Encode = Callable[[Sequence[str]], list[bytes]]


class ContentTokenizer:
    """A private copy of a tokenizer's core, without padding and truncation, so that threads may share it."""

    def __init__(self, backend: Any) -> None:
        self._rust = copy.deepcopy(backend)
        self._rust.no_padding()
        self._rust.no_truncation()
        self._words = Words.of(self._rust, self._encode)
        self._runs = Runs(self._encode)

    def ids(self, texts: Sequence[str], need: int | None = None, left: bool = False) -> list[bytes]:
        """Ids of each text's tokens, four bytes each: all of them, or at least the first `need` (the last, if `left`) and
        more than that if there are more. Those are the ones that the whole text has: see :class:`Cutter`."""
        encode = self._words.ids if self._words is not None else self._encode
        if need is None:
            return encode(texts)
        return [ids for _, ids in self._cutter(encode).cut(texts, need, left)]

    def pieces(self, texts: Sequence[str], need: int, left: bool) -> list[str]:
        """Each text, cut where more than `need` of its tokens are kept."""
        return [piece for piece, _ in self._cutter(self._encode).cut(texts, need, left, encode_short=False)]

    def whole(self, *parts: str) -> Any:
        """The tokenizer's own encoding of a text or a pair, special tokens included."""
        return self._rust.encode(*parts)

    def located(self, text: str) -> tuple[bytes, list[tuple[int, int]]]:
        """Ids of `text` without special tokens, and the characters that each token stands for: (first, behind the last)."""
        encoding = self._rust.encode(text, add_special_tokens=False)
        return array("i", encoding.ids).tobytes(), [(int(start), int(stop)) for start, stop in encoding.offsets]

    def _cutter(self, encode: Encode) -> Cutter:
        return Cutter(encode, self._runs, words_apart=self._words is not None)

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("i", encoding.ids).tobytes() for encoding in encodings]


class Runs:
    """Endless runs in a text, and of which of them a tokenizer makes the same tokens however long they are.

    encode: the tokenizer's own way.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._same: dict[str, bool] = {}

    def squeezed(self, text: str) -> str:
        """`text` with endless runs (of white space, of letters and digits, of one character) cut to :data:`_LONG_RUN`, if
        they are of a kind that does not matter."""
        for run, probe in _RUNS.items():
            if run.search(text) and self._is_same(probe):
                text = run.sub(lambda found: found.group()[:_LONG_RUN], text)
        kept, at, probed = [], 0, set[str]()
        while repeated := _REPEATED.search(text, at):
            char = repeated.group(1)
            probed.add(char)
            if len(probed) > _PROBES:
                break
            other = re.compile(f"[^{re.escape(char)}]", re.DOTALL).search(text, repeated.end())
            end = other.start() if other else len(text)
            kept.append(text[at : repeated.end() if self._is_same(char) else end])
            at = end
        return "".join([*kept, text[at:]])

    def _is_same(self, probe: str) -> bool:
        """Whether runs of `probe` twice as long as :data:`_LONG_RUN` give the same tokens, alone and inside a word."""
        if probe not in self._same:
            runs = [probe * (length // len(probe)) for length in (_LONG_RUN, 2 * _LONG_RUN)]
            alone, alone_too, inside, inside_too = self._encode(
                [f"{before}{run}{after}" for before, after in (("in ", " out"), ("in", "out")) for run in runs]
            )
            if len(self._same) >= _MOST_PROBES:
                self._same.clear()
            self._same[probe] = alone == alone_too and inside == inside_too
        return self._same[probe]


class Cutter:
    """Cuts texts before they are tokenised, so that the tokens that are kept are those of the whole text.

    A cut counts only if what is left overflows by itself what is needed, by a quarter and 64 tokens more, and
    if it does not matter where it is: next to white space, for a tokenizer that treats words apart; else the same
    tokens must come of a text some characters shorter. (What a cut can change are the tokens beside it, which lie in what
    is dropped; but in a run without a space, how it is divided may depend on how long it is.) A text for which it
    matters, or that does not overflow, is looked at in fourfold pieces, up to the whole.

    A giant text that does not overflow even so (hundreds of thousands of characters that the tokenizer does not know, say) is
    tokenised in parts that end at a space, or where there is none anywhere: then the tokens beside the seam may be others
    than those of the whole. Where text is wanted and not ids, it ends after the first part, with a warning.

    runs: shortens a text that is mostly a run of which nothing comes.
    """

    def __init__(self, encode: Encode, runs: Runs | None = None, *, words_apart: bool = False) -> None:
        self._encode = encode
        self._squeezed = (runs or Runs(encode)).squeezed
        self._words_apart = words_apart

    def cut(self, texts: Sequence[str], need: int, left: bool, *, encode_short: bool = True) -> list[tuple[str, bytes]]:
        """(as much of it as matters, its ids) for each text. need: tokens; left: the last ones are needed. encode_short:
        whether ids of texts that need no cut are wanted too."""
        usual = max(_CHARS_PER_TOKEN * need, _FIRST_CHARS)
        enough = _INT * (need + need // 4 + 64)
        done: list[tuple[str, bytes]] = [(text, b"") for text in texts]
        rest = dict(enumerate(texts))
        limit, longest = usual, usual + usual // 4
        if (
            not encode_short
        ):  # what is kept is tokenised again by others, with all that hangs over: as little as will do
            limit = 2 * need + 128
            rest = {i: text for i, text in rest.items() if len(text) > longest}
        elif not self._words_apart:
            longest = 4 * usual  # up to here it would cost as much to see that a cut does not matter
        squeezed = False
        while rest:
            tries = {i: self._pieces(text, limit, longest, left) for i, text in rest.items()}
            encoded = iter(self._encode([piece for pieces in tries.values() for piece in pieces]))
            for i, (piece, *shorter) in tries.items():
                ids, *others = (next(encoded) for _ in range(1 + len(shorter)))
                sure = all(_wanted(ids, need, left) == _wanted(other, need, left) for other in others)
                if len(piece) == len(rest[i]) or (sure and len(ids) >= enough):
                    done[i] = piece, ids
                    del rest[i]
                elif limit >= usual and not squeezed:
                    rest[i] = self._squeezed(rest[i])
            squeezed = squeezed or limit >= usual
            limit, longest = 4 * limit, max(longest, 5 * limit)
            if limit > max(_MOST_CHARS // 2, usual):  # each with what must give the same beside it
                ends = self._in_parts if encode_short else self._first_part
                done = [ends(rest[i], enough, left) if i in rest else each for i, each in enumerate(done)]
                break
        return done

    def _in_parts(self, text: str, enough: int, left: bool) -> tuple[str, bytes]:
        found: list[bytes] = []
        for part in _parts(text, left):
            found += self._encode([part])
            if sum(map(len, found)) >= enough:
                break
        return text, b"".join(found[::-1] if left else found)

    def _first_part(self, text: str, enough: int, left: bool) -> tuple[str, bytes]:
        part = next(_parts(text, left))
        if len(part) < len(text):
            log.warning(
                "a text of %d characters is cut to %d, which give fewer tokens than the model takes: its own "
                "preprocessing would need memory for all of them",
                len(text),
                len(part),
            )
        return part, b""

    def _pieces(self, text: str, limit: int, longest: int, left: bool) -> list[str]:
        """The piece of `text` to try, and those that must give the same; a text of up to `longest` characters is not cut."""
        if len(text) <= longest:
            return [text]
        piece, at_space = _piece(text, limit, left)
        if at_space and self._words_apart:
            return [piece]
        return [piece, *(piece[shift:] if left else piece[: len(piece) - shift] for shift in _SHIFTS)]


def _wanted(ids: bytes, need: int, left: bool) -> bytes:
    return ids[max(len(ids) - _INT * need, 0) :] if left else ids[: _INT * need]


def _parts(text: str, left: bool) -> Iterator[str]:
    """All of `text`, in parts of :data:`_MOST_CHARS` or a little less, from its beginning (its end, if `left`)."""
    while len(text) > _MOST_CHARS:
        part, _ = _piece(text, _MOST_CHARS, left)
        yield part
        text = text[: len(text) - len(part)] if left else text[len(part) :]
    yield text


def _piece(text: str, limit: int, left: bool) -> tuple[str, bool]:
    """The first (last) `limit` characters of `text`, or a little less so that it ends (begins) where a word does."""
    if left:
        start = len(text) - limit
        space = text.find(" ", start, start + limit // 2)
        return (text[space:], True) if space >= 0 else (text[start:], False)
    space = text.rfind(" ", limit // 2, limit)
    return (text[:space], True) if space >= 0 else (text[:limit], False)
