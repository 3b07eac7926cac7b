"""Token ids by words: for tokenizers that treat the words of a text apart, each different word is tokenised once.

The Rust core takes about a microsecond a token (half a million to a million tokens a second on one core were measured
for BERT's); looking up a word that was seen before and joining its ids takes a tenth of that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Words"]

_MOST_WORDS = 1 << 17
"""Words remembered: about 25 MB. More is forgotten, all at once, which costs what it saved."""
_LONGEST = 48
"""Characters of a word that is worth remembering."""
_MOSTLY_NEW = 0.5
"""Share of words never seen before above which texts go to the tokenizer as they are, and are not remembered."""


class Words:
    """Ids of texts, as bytes, by their words. Threads may share it: the dict is only read and added to, or replaced.

    encode: the tokenizer's own way, for words that are new.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[bytes]]) -> None:
        self._encode = encode
        self._known: dict[str, bytes] = {"": b""}

    @classmethod
    def of(cls, rust: Any, encode: Callable[[Sequence[str]], list[bytes]]) -> Words | None:
        """None unless the tokens of a text are, by the tokenizer's own definition, those of its words one after another.

        So it is with BERT's (WordPiece): its normaliser changes characters one at a time (accents are taken off within
        a word: a space is no base for them) and makes a space of every line break, its pre-tokenizer divides at every
        space, and each part is tokenised alone. What is added to the vocabulary is found in the text as it was
        written, so it must hold no white space and no rule of its own.
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
        return cls(encode) if apart else None

    def ids(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text's tokens, four bytes a token."""
        known = self._known
        words = [text.replace("\n", " ").split(" ") for text in texts]
        found = [list(map(known.get, row)) for row in words]
        lacking = [place for place, row in enumerate(found) if None in row]
        if lacking:
            new = {
                word for place in lacking for word, ids in zip(words[place], found[place], strict=True) if ids is None
            }
            if len(new) > _MOSTLY_NEW * sum(len(words[place]) for place in lacking) + 64:
                whole = dict(zip(lacking, self._encode([texts[place] for place in lacking]), strict=True))
                return [whole[place] if place in whole else b"".join(row) for place, row in enumerate(found)]  # type: ignore[arg-type]
            order = list(new)
            fresh = dict(zip(order, self._encode(order), strict=True))
            for place in lacking:
                found[place] = [
                    fresh[word] if ids is None else ids for word, ids in zip(words[place], found[place], strict=True)
                ]
            if len(known) + len(fresh) > _MOST_WORDS:
                self._known = known = {"": b""}
            known.update((word, ids) for word, ids in fresh.items() if len(word) <= _LONGEST)
        return [b"".join(row) for row in found]  # type: ignore[arg-type]
