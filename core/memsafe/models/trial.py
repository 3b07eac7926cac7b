"""What a model's own preprocessing does with samples, under given call options: what every other way must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from memsafe.models import sbert
from memsafe.models.content import ContentTokenizer, Cutter
from memsafe.models.features import FeatureRows
from memsafe.models.samples import long_samples, pairs_about, samples
from memsafe.models.ways import Fast, Limits, Template, Text

__all__ = ["Preprocess", "Trial"]

Preprocess = Callable[[Sequence[Text], str | None, Mapping[str, Any]], Mapping[str, Any]]

_NORMALISERS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: text.strip(),
    lambda text: text.lower(),
    lambda text: text.strip().lower(),
)
"""What the versions of sentence-transformers do to a text before they tokenise it."""
_MOST_TOKENS = 200_000
"""A limit beyond this is believed; up to this it is seen, by a text that is longer."""


class Trial:
    """How inputs are to be treated with `options`, whatever the prompt.

    texts: the samples. limits: where long ones were seen to be cut. readable: whether long ones can be read as rows. core:
    the tokenizer's, if texts go straight to a fast tokenizer by code that is known.
    """

    def __init__(
        self,
        model: Any,
        pairs: bool,
        options: Mapping[str, Any],
        preprocess: Preprocess,
        core_of: Callable[[Any], ContentTokenizer],
    ) -> None:
        self._tokenizer = sbert.hf_tokenizer(model, options)
        self._pairs = pairs
        self.texts = samples(self._tokenizer, pairs)
        rust = sbert.rust_tokenizer(model, options)
        self._any_core = core_of(rust) if rust is not None else None
        known = self._tokenizer is not None and not sbert.has_own_preprocessing(model, options)
        self.core = self._any_core if known else None
        self._long: list[tuple[Text, FeatureRows]] = []
        self.readable = True
        self._seen = False
        self._told = sbert.reported_cuts(model, options) is not None
        self.limits = self._look(sbert.declared_lengths(model, options), lambda given: preprocess(given, None, options))

    def _look(self, declared: Sequence[int], preprocess: Callable[[Sequence[Text]], Mapping[str, Any]]) -> Limits:
        limits = Limits(
            declared[0] if declared else None, left=getattr(self._tokenizer, "truncation_side", "right") == "left"
        )
        most = max(declared, default=512)
        if most > _MOST_TOKENS or self._told:
            return limits
        widths = [width for sample in long_samples(most, self._pairs) if (width := self._add(sample, preprocess))]
        if not widths:
            return limits
        self._seen = True
        limit = min(widths) if min(widths) <= most else None
        for sample in pairs_about(limit) if limit is not None and self._pairs else []:
            self._add(sample, preprocess)
        return replace(limits, max_length=limit)

    def _add(self, sample: Text, preprocess: Callable[[Sequence[Text]], Mapping[str, Any]]) -> int | None:
        """Note what the model makes of `sample`; returns its number of tokens, None if it makes nothing of it."""
        try:
            features = preprocess([sample])
            width = features["input_ids"].shape[-1]  # of one text, also where ids of all texts lie end to end
        except Exception:  # its own reasons: a query that may not be cut; or no ids at all
            return None
        rows = FeatureRows.of(features)
        if rows is None:
            self.readable = False
        else:
            self._long.append((sample, rows))
        return int(width)

    def candidates(self, expected: FeatureRows, prompt: str) -> Iterator[Fast]:
        """Fast ways that may be equal, the likeliest first."""
        if self.core is None:
            return
        try:
            template = Template(self.core, 2 if self._pairs else 1, typed=expected.types is not None)
        except ValueError:
            return
        for normalise in _NORMALISERS:
            for strategy in ("longest_first", "only_second", "only_first") if self._pairs else ("longest_first",):
                limits = replace(self.limits, strategy=strategy)
                yield Fast(limits, expected.constants, self.core, template, normalise, prompt)

    def confirms(self, fast: Fast, expected: FeatureRows) -> bool:
        """Whether `fast` gives what the model gave for :attr:`texts` with a prompt, and for long ones without."""
        bare = fast.without_prompt()
        return _same(fast, self.texts, expected) and all(_same(bare, [text], rows) for text, rows in self._long)

    def shorten(self, inputs: Sequence[Text], encode: Callable[[Sequence[str]], list[bytes]]) -> list[Any]:
        """`inputs`, giant texts cut where they overflow by themselves what the model takes. encode: of a slow tokenizer."""
        need = self.limits.max_length
        longest = max(
            (len(text) for each in inputs for text in ((each,) if isinstance(each, str) else each)), default=0
        )
        known = self._tokenizer is not None or self._any_core is not None
        if need is None or not self._seen or not known or longest <= 8 * need:
            return list(inputs)
        flat = [text for each in inputs for text in ((each,) if isinstance(each, str) else each)]
        if self._any_core is not None:
            pieces = self._any_core.pieces(flat, need, self.limits.left)
        else:
            pieces = [piece for piece, _ in Cutter(encode).cut(flat, need, self.limits.left, encode_short=False)]
        if not self._pairs:
            return pieces
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def slow_ids(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of a slow tokenizer, without special tokens, four bytes a token."""
        if self._tokenizer is None:
            return [b""] * len(texts)
        return [
            np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32).tobytes()
            for text in texts
        ]


def _same(fast: Fast, texts: Sequence[Text], expected: FeatureRows) -> bool:
    try:
        encoded = fast.encode(texts)
    except Exception:  # a candidate that cannot do it is none
        return False
    for place, row in enumerate(encoded):
        if not np.array_equal(row.input_ids, expected.ids[place]):  # type: ignore[arg-type]
            return False
        types = expected.types[place] if expected.types is not None else np.zeros(row.num_tokens, np.int32)
        if not np.array_equal(np.zeros_like(types) if row.token_type_ids is None else row.token_type_ids, types):
            return False
    return True
