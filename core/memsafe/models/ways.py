"""The three ways from a text to what a forward takes, each for one prompt and one set of call options."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any

import numpy as np

from memsafe.errors import ModelError
from memsafe.models.content import BYTES_PER_CHAR, ContentTokenizer
from memsafe.models.features import FeatureRows, Ids

__all__ = [
    "CHARS_PER_TOKEN",
    "Encoded",
    "Fast",
    "Features",
    "Limits",
    "Opaque",
    "Template",
    "Text",
    "Unfit",
    "Way",
    "frozen",
]

Text = str | tuple[str, str]
_INT = 4  # bytes of an id
CHARS_PER_TOKEN = 3
"""Of a text whose tokens are not known, by which it is planned."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One input. input_ids: int32 (num_tokens,), or None if opaque; token_type_ids likewise, or None if all are zero (or
    the model takes none). raw: what the model's own preprocessing is to see, if opaque."""

    input_ids: Ids | None
    token_type_ids: Ids | None
    num_tokens: int
    truncated: bool
    raw: Any = None


class Unfit(Exception):
    """An input that cannot be encoded. place: in what was given to `encode`; reason: what follows "input 3 "."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(f"input {place} {reason}")
        self.place, self.reason = place, reason


@dataclass(frozen=True)
class Limits:
    """Where inputs are cut. max_length: tokens, specials included; None for nowhere. strategy, left: transformers' names
    for which text of a pair gives way, and at which end. query_max_length: tokens of a query before that."""

    max_length: int | None = None
    strategy: str = "longest_first"
    left: bool = False
    query_max_length: int | None = None


class Way:
    """How inputs of a call are encoded. Thread-safe.

    mode: "fast", "features" or "opaque". extras: what all inputs share beside their tokens; key: what calls must have in
    common for their inputs to run in one micro-batch.
    """

    mode = "opaque"
    cuts_because = "as the model demands"
    """What a warning says of inputs that were cut."""

    def __init__(self, limits: Limits, extras: dict[str, Any], key: Hashable) -> None:
        self.limits = limits
        self.extras = extras
        self.key = key

    @property
    def max_length(self) -> int | None:
        return self.limits.max_length

    def encode(self, inputs: Sequence[Text]) -> list[Encoded]:
        """One for each of `inputs`, in their order."""
        raise NotImplementedError

    def num_bytes(self, chars: int) -> int:
        """What encoding an input of so many characters takes meanwhile: beyond what the model reads, more cost nothing."""
        return BYTES_PER_CHAR * (chars if self.max_length is None else min(chars, 100 * self.max_length + 10_000))


class Template:
    """Where special tokens stand: ids and types of a single text, or of a pair, around the contents.

    Read off the tokenizer's own encoding of one letter, or two; ValueError if that is not of such a form. typed: whether
    the model takes types.
    """

    def __init__(self, tokenizer: ContentTokenizer, parts: int, typed: bool) -> None:
        encoding = tokenizer.whole(*"ab"[:parts])
        self._pieces: list[tuple[int | None, bytes, bytes]] = []  # (which part, or None for a special; ids; type)
        for token, kind, part in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
            if part is None or not self._pieces or self._pieces[-1][0] != part:
                self._pieces.append((part, _bytes(token), _bytes(kind)))
        order = [part for part, _, _ in self._pieces if part is not None]
        if order != list(range(parts)):
            raise ValueError(f"parts in the order {order}")
        self.num_special = sum(part is None for part, _, _ in self._pieces)
        self.num_before = next(place for place, (part, _, _) in enumerate(self._pieces) if part is not None)
        self._typed = typed and any(any(kind) for _, _, kind in self._pieces)

    def fill(self, rows: Sequence[tuple[bytes, ...]]) -> tuple[list[Ids], list[Ids] | None]:
        """(ids, types or None if all are zero) of rows whose contents are given, all in one array of which they are views."""
        ids = b"".join(token if part is None else row[part] for row in rows for part, token, _ in self._pieces)
        lengths = [self.num_special + sum(map(len, row)) // _INT for row in rows]
        ends = list(accumulate(lengths))
        types = None
        if self._typed:
            kinds = b"".join(
                kind if part is None else kind * (len(row[part]) // _INT)
                for row in rows
                for part, _, kind in self._pieces
            )
            types = _views(kinds, ends)
        return _views(ids, ends), types


class Fast(Way):
    """The tokenizer's Rust core, called directly: contents without special tokens, cut and put into the template here."""

    mode = "fast"

    def __init__(
        self,
        limits: Limits,
        extras: dict[str, Any],
        tokenizer: ContentTokenizer,
        template: Template,
        normalise: Callable[[str], str],
        prompt: str,
    ) -> None:
        super().__init__(limits, extras, frozen(extras))
        self._tokenizer = tokenizer
        self._template = template
        self._normalise = normalise
        self._prompt = prompt
        self._room = None if limits.max_length is None else max(limits.max_length - template.num_special, 0)

    def with_limits(self, limits: Limits) -> Fast:
        return Fast(limits, self.extras, self._tokenizer, self._template, self._normalise, self._prompt)

    def without_prompt(self) -> Fast:
        return Fast(self.limits, self.extras, self._tokenizer, self._template, self._normalise, "")

    @property
    def template(self) -> Template:
        """Where special tokens stand."""
        return self._template

    @property
    def room(self) -> int | None:
        """Tokens beside the special ones; None for any number."""
        return self._room

    def whole(self, inputs: Sequence[Any], need: int | None) -> list[tuple[bytes, ...]]:
        """Contents of `inputs` without special tokens: (ids,) of texts, (query ids, document ids) of pairs; not cut to the room,
        but after `need` tokens and some more. The prompt is in the text, or in the query; a query is cut where it is to be."""
        if not inputs or not isinstance(inputs[0], tuple):
            return [(ids,) for ids in self._all([self._prompt + str(text) for text in inputs], need)]
        queries = list(dict.fromkeys(query for query, _ in inputs))
        limit = self.limits.query_max_length
        firsts = dict(zip(queries, self._all([self._prompt + query for query in queries], need), strict=True))
        seconds = self._all([document for _, document in inputs], need)
        return [
            (firsts[query] if limit is None else firsts[query][: limit * _INT], second)
            for (query, _), second in zip(inputs, seconds, strict=True)
        ]

    def head(self) -> bytes:
        """Contents of the prompt alone."""
        return self._all([self._prompt], None)[0] if self._prompt else b""

    def located(self, text: str) -> tuple[bytes, list[tuple[int, int]]]:
        """(ids, from which to which character of `text` each token stands) of the prompt and `text`, not cut. Tokens of the prompt
        end at 0 or before. Raises :class:`Unfit` where what the model makes of the text cannot be found in it again."""
        given = self._prompt + text
        told = self._normalise(given)
        shift = -len(self._prompt)
        if len(told) == len(given.strip()) != len(given):
            shift += len(given) - len(given.lstrip())
        elif len(told) != len(given):
            raise Unfit(0, "has letters that change their number when the model makes them small; use embed_documents")
        ids, places = self._tokenizer.located(told)
        return ids, [(start + shift, stop + shift) for start, stop in places]

    def _all(self, texts: Sequence[str], need: int | None) -> list[bytes]:
        return self._tokenizer.ids([self._normalise(text) for text in texts], need)

    def encode(self, inputs: Sequence[Text]) -> list[Encoded]:
        rows = self._pairs(inputs) if isinstance(inputs[0], tuple) else self._singles(inputs)
        ids, types = self._template.fill([row for row, _ in rows])
        return [
            Encoded(row, kinds, len(row), truncated)
            for row, kinds, (_, truncated) in zip(ids, types or repeat(None), rows, strict=False)
        ]

    def _singles(self, inputs: Sequence[Any]) -> list[tuple[tuple[bytes, ...], bool]]:
        contents = self._contents([self._prompt + text for text in inputs], self._room)
        return [((self._kept(ids, self._room),), self._overflows(ids)) for ids in contents]

    def _pairs(self, inputs: Sequence[Any]) -> list[tuple[tuple[bytes, ...], bool]]:
        """A query is mostly that of many pairs, and tokenised once."""
        need = None if self._room is None else self._room + 1
        queries = dict.fromkeys(query for query, _ in inputs)
        firsts = self._contents([self._prompt + query for query in queries], need)
        limit = self.limits.query_max_length
        cut = {query: ids if limit is None else ids[: limit * _INT] for query, ids in zip(queries, firsts, strict=True)}
        seconds = self._contents([document for _, document in inputs], need)
        rows: list[tuple[tuple[bytes, ...], bool]] = []
        for place, ((query, _), second) in enumerate(zip(inputs, seconds, strict=True)):
            first = cut[query]
            room = self._rooms(len(first) // _INT, len(second) // _INT, place)
            rows.append(((self._kept(first, room[0]), self._kept(second, room[1])), self._overflows(first + second)))
        return rows

    def _contents(self, texts: Sequence[str], need: int | None) -> list[bytes]:
        return self._tokenizer.ids([self._normalise(text) for text in texts], need, self.limits.left)

    def _rooms(self, first: int, second: int, place: int) -> tuple[int, int]:
        """Tokens that are left of each text of a pair; as tokenizers' ``truncate_encodings`` does it."""
        room, strategy = self._room, self.limits.strategy
        if room is None or first + second <= room:
            return first, second
        over = first + second - room
        if strategy == "longest_first":
            short, long = min(first, second), max(first, second)
            long = short if short > room else max(short, room - short)
            if short + long > room:
                short = room // 2
                long = short + room % 2
            return (long, short) if first > second else (short, long)
        kept = (first - over, second) if strategy == "only_first" else (first, second - over)
        if kept[strategy == "only_second"] <= 0:
            what = "document" if strategy == "only_first" else "query"
            raise Unfit(
                place,
                f"has a {what} of {second if what == 'document' else first} tokens, which alone fill max_length, "
                f"{self.max_length}, and only the other text may be cut ({strategy}); shorten it, raise max_length, or use "
                "truncation='longest_first'",
            )
        return kept

    def _kept(self, ids: bytes, room: int | None) -> bytes:
        if room is None or len(ids) <= room * _INT:
            return ids
        return ids[len(ids) - room * _INT :] if self.limits.left else ids[: room * _INT]

    def _overflows(self, ids: bytes) -> bool:
        return self._room is not None and len(ids) > self._room * _INT


class Features(Way):
    """The model's own preprocessing under a lock, its padding removed (chat templates, slow tokenizers, remote code)."""

    mode = "features"

    def __init__(
        self,
        limits: Limits,
        expected: FeatureRows,
        preprocess: Callable[[Sequence[Text]], Mapping[str, Any]],
        lock: threading.Lock,
        shorten: Callable[[Sequence[Text]], list[Any]],
        cuts: Callable[[], list[bool]] | None = None,
    ) -> None:
        """cuts: which inputs of the last preprocessing lost tokens; None where the length shows it."""
        super().__init__(limits, expected.constants, frozen(expected.constants))
        self._names = expected.names
        self._preprocess = preprocess
        self._lock = lock
        self._shorten = shorten
        self._cuts = cuts

    def encode(self, inputs: Sequence[Text]) -> list[Encoded]:
        inputs = self._shorten(inputs)
        with self._lock:
            rows = FeatureRows.of(self._preprocess(inputs))
            told = self._cuts() if self._cuts is not None else None
        if rows is None or rows.constants != self.extras or rows.names != self._names:
            raise ModelError("the model's preprocessing gives these inputs other features than it gave samples at load")
        limit = self.max_length
        cut = [limit is not None and len(ids) >= limit for ids in rows.ids] if told is None else told
        types = rows.types if rows.types is not None and any(kinds.any() for kinds in rows.types) else None
        return [
            Encoded(ids, kinds, len(ids), lost)
            for ids, kinds, lost in zip(rows.ids, types or repeat(None), cut, strict=False)
        ]


class Opaque(Way):
    """No token ids: the raw input travels to the forward, planned by its characters."""

    def __init__(
        self,
        limits: Limits,
        prompt: str | None,
        options: Mapping[str, Any],
        shorten: Callable[[Sequence[Text]], list[Any]],
    ) -> None:
        super().__init__(limits, {"prompt": prompt, "options": dict(options)}, ("opaque", prompt, frozen(options)))
        self._shorten = shorten

    def encode(self, inputs: Sequence[Text]) -> list[Encoded]:
        return [Encoded(None, None, _estimate(raw, self.max_length), False, raw=raw) for raw in self._shorten(inputs)]


def frozen(values: Mapping[str, Any]) -> Hashable:
    """`values` as a key: equal keys have equal values. What cannot be hashed is taken by its contents, if it is made of
    dicts and lists, and else by its identity."""
    return tuple(sorted((name, _frozen(value)) for name, value in values.items()))


@dataclass(frozen=True)
class _Frozen:
    """Ordered by nothing, so that sorting by name never compares values."""

    value: Hashable

    def __lt__(self, other: object) -> bool:
        return False


def _frozen(value: Any) -> _Frozen:
    if isinstance(value, Mapping):
        return _Frozen(("dict", frozen({str(name): each for name, each in value.items()})))
    if isinstance(value, (list, tuple)):
        return _Frozen((type(value).__name__, tuple(_frozen(each) for each in value)))
    try:
        hash(value)
    except TypeError:
        return _Frozen(("object", id(value)))
    return _Frozen((type(value).__name__, value))


def _bytes(value: int) -> bytes:
    return np.int32(value).tobytes()


def _views(flat: bytes, ends: Sequence[int]) -> list[Ids]:
    whole = np.frombuffer(flat, dtype=np.int32)
    return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _estimate(text: Any, max_length: int | None) -> int:
    chars = sum(map(len, text)) if isinstance(text, tuple) else len(text)
    return max(1, min(chars // CHARS_PER_TOKEN + 2, max_length or 10**9))
