"""Token ids by words: for tokenizers that treat the words of a text apart, each different word is tokenised once.

The Rust core takes about a microsecond a token (half a million to a million tokens a second on one core were measured
for BERT's); looking up a word that was seen before and joining its ids takes a tenth of that.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["Words"]

_MOST_WORDS = 1 << 17
"""Words remembered: about 25 MB. More is forgotten, all at once, which costs what it saved."""
_LONGEST = 48
"""Characters of a word that is worth remembering."""
_DOT = "."
_GROUP = 64
"""New words that go to the tokenizer as one text: a text of its own costs as much as ten tokens."""
_MOSTLY_NEW = 0.5
"""Share of words never seen before above which texts go to the tokenizer as they are, and are not remembered."""
_LONGEST_PAUSE = 31
"""Calls that do not look at words, after such ones: each time twice as many."""


class Words:
    """Ids of texts, as bytes, by their words. Threads may share it: the dict is only read and added to, or replaced.

    encode: the tokenizer's own way, for what is new. marks: characters that are a word of their own wherever they stand.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[bytes]], marks: str = "") -> None:
        self._encode = encode
        self._parts = re.compile(f"[{re.escape(marks)}]|[^{re.escape(marks)}]+" if marks else "(?s).+")
        self._groups = _DOT in marks
        self._known: dict[str, bytes] = {"": b""}
        self._pause = self._backoff = 0

    @classmethod
    def of(cls, rust: Any, encode: Callable[[Sequence[str]], list[bytes]]) -> Words | None:
        """None unless the tokens of a text are, by the tokenizer's own definition, those of its words one after another.

        So it is with BERT's (WordPiece): its normaliser changes characters one at a time (accents are taken off within
        a word: a space is no base for them) and makes a space of every line break, its pre-tokenizer divides at every
        space and around each punctuation mark, and each part is tokenised alone. What is added to the vocabulary is found
        in the text as it was written: it must hold no white space and no rule of its own, and its marks divide nothing.
        """
        parts = json.loads(rust.to_str())
        normaliser, splitter = parts.get("normalizer") or {}, parts.get("pre_tokenizer") or {}
        apart = (
            (parts.get("model") or {}).get("type") == "WordPiece"
            and (normaliser.get("type"), splitter.get("type")) == ("BertNormalizer", "BertPreTokenizer")
            and bool(normaliser.get("clean_text"))
            and all(
                not token["normalized"] and not any(char.isspace() for char in token["content"])
                for token in parts.get("added_tokens") or []
            )
        )
        added = "".join(token["content"] for token in parts.get("added_tokens") or [])
        return cls(encode, "".join(mark for mark in string.punctuation if mark not in added)) if apart else None

    def _new(self, parts: list[str]) -> dict[str, bytes]:
        """Ids of `parts`, by the tokenizer: many in one text, told apart by the dots between them."""
        groups = [parts[start : start + _GROUP] for start in range(0, len(parts), _GROUP)]
        joined = self._encode([_DOT, *(_DOT.join(group) for group in groups)])
        fresh: dict[str, bytes] = {}
        alone: list[str] = []
        for group, ids in zip(groups, joined[1:], strict=True):
            row = np.frombuffer(ids, np.int32)
            ends = 4 * np.flatnonzero(row == np.frombuffer(joined[0], np.int32)[:1])
            if (
                not self._groups or len(joined[0]) != 4 or len(ends) != len(group) - 1
            ):  # one of them holds a dot, or gives one
                alone += group
                continue
            starts = [0, *(ends + 4).tolist()]
            for part, start, end in zip(group, starts, [*ends.tolist(), len(ids)], strict=True):
                fresh[part] = ids[start:end]
        fresh.update(zip(alone, self._encode(alone) if alone else [], strict=True))
        return fresh

    def ids(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text's tokens, four bytes a token."""
        if self._pause:
            self._pause -= 1
            return self._encode(texts)
        known = self._known
        words = [text.replace("\n", " ").split(" ") for text in texts]
        found = [list(map(known.get, row)) for row in words]
        lacking = [place for place, row in enumerate(found) if None in row]
        new = {word for place in lacking for word, ids in zip(words[place], found[place], strict=True) if ids is None}
        divided = {word: self._parts.findall(word) for word in new}
        parts = list({part for each in divided.values() for part in each if part not in known})
        if len(parts) > _MOSTLY_NEW * sum(len(words[place]) for place in lacking) + 64:
            self._backoff = min(2 * self._backoff + 1, _LONGEST_PAUSE)
            self._pause = self._backoff
            return self._encode(texts)
        self._backoff = 0
        fresh = self._new(parts)
        for word, each in divided.items():
            fresh[word] = b"".join([fresh[part] if part in fresh else known[part] for part in each])
        for place in lacking:
            found[place] = [fresh[w] if ids is None else ids for w, ids in zip(words[place], found[place], strict=True)]
        if len(known) + len(fresh) > _MOST_WORDS:
            self._known = known = {"": b""}
        known.update((word, ids) for word, ids in fresh.items() if len(word) <= _LONGEST)
        return [b"".join(row) for row in found]  # type: ignore[arg-type]
