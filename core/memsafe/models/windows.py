"""Long inputs in windows of tokens, and the tokens of spans of a document: what a model never reads by truncation.

Windows are those of transformers' ``return_overflowing_tokens`` with ``stride``: the first starts at the first token, each next one
`overlap` tokens before the last one's end, the last one ends at the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from memsafe.models.ways import Encoded, Fast, Text, Unfit, Way

__all__ = ["ChunkWay", "Cut", "Piece", "WindowWay", "chunks_of", "cut", "starts"]

_INT = 4  # bytes of an id
QUERY_SHARE = 0.5
"""A query may fill at most so much of what a pair has beside special tokens, where its document is read in windows."""
OVERLAP_SHARE = 8
"""One so many-th of a window overlaps with the next, unless told otherwise."""


class Piece(tuple[bytes, ...]):
    """Contents of one window: ids of the text, or of the query and of a part of the document. truncated: the document goes on."""

    truncated = False


@dataclass(frozen=True)
class Cut:
    """pieces: windows of all inputs, those of one input one after the other. owners: the input of each. tokens: of the text, or of the
    document, in each; the prompt and the query not counted."""

    pieces: list[Piece]
    owners: list[int]
    tokens: list[int]

    @property
    def counts(self) -> dict[int, int]:
        """Windows of each input."""
        counts: dict[int, int] = {}
        for owner in self.owners:
            counts[owner] = counts.get(owner, 0) + 1
        return counts


class WindowWay(Way):
    """Encodes :class:`Piece`: puts special tokens around what is tokenised already."""

    mode = "windows"
    cuts_because = "as max_windows demands"

    def __init__(self, fast: Fast, most_tokens: int | None) -> None:
        super().__init__(replace(fast.limits, max_length=most_tokens), fast.extras, fast.key)
        self._template = fast.template

    def encode(self, inputs: Sequence[Any]) -> list[Encoded]:
        ids, types = self._template.fill(inputs)
        kinds = types or repeat(None)
        return [
            Encoded(row, kind, len(row), piece.truncated) for row, kind, piece in zip(ids, kinds, inputs, strict=False)
        ]


class ChunkWay(Way):
    """Encodes one document, tokenised already, whose row is the rows of `chunks` (from which token to which) end to end."""

    mode = "chunks"

    def __init__(self, fast: Fast, chunks: tuple[tuple[int, int], ...]) -> None:
        extras = {
            name: value for name, value in fast.extras.items() if name != "prompt_length"
        }  # no span holds the prompt
        super().__init__(fast.limits, {**extras, "chunks": chunks}, ("chunks", object()))  # alone in its micro-batch
        self._template = fast.template

    def encode(self, inputs: Sequence[Any]) -> list[Encoded]:
        ids, types = self._template.fill(inputs)
        return [Encoded(row, kind, len(row), False) for row, kind in zip(ids, types or repeat(None), strict=False)]


def starts(tokens: int, window: int, overlap: int) -> list[int]:
    """Where windows of `window` tokens start that cover `tokens`, each with the last `overlap` tokens of the one before."""
    found = [0]
    while found[-1] + window < tokens:
        found.append(found[-1] + window - overlap)
    return found


def cut(fast: Fast, inputs: Sequence[Text], overlap: int | None, most: int) -> Cut:
    """Windows of each of `inputs`; what fits is one window, with the very tokens of today. overlap: tokens, None for an eighth.
    most: windows of one input. Raises :class:`Unfit` for a query, or an overlap, that leaves a document no room."""
    room, found = fast.room, Cut([], [], [])
    need = None if room is None else room * most + 1  # no window ends behind that
    head = fast.head()
    for place, contents in enumerate(fast.whole(inputs, need)):
        fixed, text = (contents[0], contents[1]) if len(contents) == 2 else (_common(head, contents[0]), contents[0])
        if len(contents) == 1:
            text = text[len(fixed) :]
        if room is None or (len(fixed) + len(text)) // _INT <= room:
            _add(found, place, Piece(contents), len(text) // _INT)
            continue
        window = room - len(fixed) // _INT
        _check_share(place, len(fixed) // _INT, room, pair=len(contents) == 2)
        shared = window // OVERLAP_SHARE if overlap is None else overlap
        if shared >= window:
            raise Unfit(
                place, f"has windows of {window} tokens, and {shared} of them would overlap; lower window_overlap"
            )
        places = starts(len(text) // _INT, window, shared)
        for number, start in enumerate(places[:most]):
            part = text[start * _INT : (start + window) * _INT]
            piece = Piece((fixed, part) if len(contents) == 2 else (fixed + part,))
            if number == most - 1 and len(places) > most:
                piece.truncated = True
            _add(found, place, piece, len(part) // _INT)
    return found


def chunks_of(fast: Fast, document: str, spans: Sequence[tuple[int, int]]) -> tuple[Piece, tuple[tuple[int, int], ...]]:
    """(contents of `document`, tokens of each span: from which to which, special tokens counted). A token belongs to the span that holds
    its last character. Raises :class:`Unfit` for a document that is too long, or a span without a token."""
    ids, places = fast.located(document)
    if fast.room is not None and len(places) > fast.room:
        raise Unfit(
            0,
            f"has {len(places):,} tokens, and the model reads {fast.room:,} at once; embed parts of it, or use "
            "long_documents='mean_windows'",
        )
    ends = [stop if stop > start else 0 for start, stop in places]  # 0: of the prompt, or of nothing
    found: list[tuple[int, int]] = []
    for number, (start, stop) in enumerate(spans):
        inside = [token for token, end in enumerate(ends) if start < end <= stop]
        if not inside:
            raise Unfit(0, f"has no token in span {number}, characters {start} to {stop}; leave the span out")
        before = fast.template.num_before
        found.append((before + inside[0], before + inside[-1] + 1))
    return Piece((ids,)), tuple(found)


def _check_share(place: int, fixed: int, room: int, *, pair: bool) -> None:
    most = int(room * QUERY_SHARE)
    if fixed > most:
        what, remedy = ("query", "shorten it, give query_max_length") if pair else ("prompt", "shorten it")
        raise Unfit(
            place,
            f"has a {what} of {fixed:,} tokens; where a text is read in windows it may have {most:,}, half of the {room:,} that the "
            f"model reads at once; {remedy}, raise max_length, or use long_documents='truncate'",
        )


def _add(found: Cut, owner: int, piece: Piece, tokens: int) -> None:
    found.pieces.append(piece)
    found.owners.append(owner)
    found.tokens.append(tokens)


def _common(head: bytes, ids: bytes) -> bytes:
    """As many tokens as both begin with: those of the prompt, though its last one may merge with the text."""
    count = 0
    while count < min(len(head), len(ids)) and head[count : count + _INT] == ids[count : count + _INT]:
        count += _INT
    return ids[:count]
