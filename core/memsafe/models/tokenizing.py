"""Inputs to token ids, once each: the same ids that the model's own preprocessing gives, without padding."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe.models import sbert

__all__ = ["Encoded", "InputEncoder"]

Ids = NDArray[np.int32]
Text = str | tuple[str, str]

# A token rarely spans more than a few characters; text beyond this many characters per token the model takes cannot
# matter and is cut before tokenising, so that a 10 MB text costs no more than a long one.
_CHARS_PER_TOKEN = 64
_MIN_CUT_CHARS = 50_000

# Differences in case, white space and markup are what the versions' own preprocessing treats differently.
_SAMPLES = ("Hello World", "  two  spaces\nand lines ", "", "MiXeD Case ÄÖß 你好 [SEP]", "word " * 40)
_NORMALISERS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: text.strip(),
    lambda text: text.lower(),
    lambda text: text.strip().lower(),
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One input. input_ids: int32 (num_tokens,), or None if opaque; token_type_ids likewise, or None if all zero."""

    input_ids: Ids | None
    token_type_ids: Ids | None
    num_tokens: int
    truncated: bool


class InputEncoder:
    """Turns texts, or (query, document) pairs, into :class:`Encoded`. Safe to call from several threads.

    Three ways, the first that is shown at load to give what the model's own preprocessing gives:
    ``"fast"``: the tokenizer's Rust core, called directly with settings fixed once on a private copy (a shared fast
    tokenizer is silently racy when callers use different lengths);
    ``"features"``: the model's own preprocessing under a lock, padding removed (chat templates, slow tokenizers);
    ``"opaque"``: no token ids; the raw input travels to the forward, planned by its characters.
    """

    def __init__(
        self, model: Any, *, pairs: bool, truncation: str = "longest_first", query_max_length: int | None = None
    ) -> None:
        self._model = model
        self._pairs = pairs
        self._lock = threading.Lock()
        self._extras: dict[str | None, dict[str, Any]] = {}
        self._normalise = _NORMALISERS[0]
        self._query_max_length = query_max_length
        self._only_second = truncation == "only_second"
        tokenizer = sbert.hf_tokenizer(model)
        self.max_length = _max_length(model, tokenizer)
        self.pad_id = int(getattr(tokenizer, "pad_token_id", None) or 0)
        self.pad_type_id = int(getattr(tokenizer, "pad_token_type_id", None) or 0)
        self.pad_left = getattr(tokenizer, "padding_side", "right") == "left"
        self.feature_names: tuple[str, ...] = ()
        self.mode = "opaque"
        self._fast: Any = None
        self._whole: Any = None
        self._cut_side = "right"
        self._choose(tokenizer)

    def after_fork(self) -> None:
        """See :meth:`memsafe.models.model.LoadedModel.after_fork`."""
        self._lock = threading.Lock()

    def extras(self, prompt: str | None) -> dict[str, Any]:
        """Features beside the tokens that the model's preprocessing adds for `prompt` (modality, prompt_length)."""
        with self._lock:
            if prompt not in self._extras:
                features = self._preprocess([("x", "x") if self._pairs else "x"], prompt)
                names = ("input_ids", "token_type_ids", "attention_mask")
                kept = {} if self.mode == "opaque" else {k: v for k, v in features.items() if k not in names}
                self._extras[prompt] = kept
            return self._extras[prompt]

    def encode(self, inputs: Sequence[Text], prompt: str | None = None) -> list[Encoded]:
        """Encode `inputs` with `prompt` put before each (before the query of a pair)."""
        if not inputs:
            return []
        if self.mode == "fast":
            return self._encode_fast(inputs, prompt)
        if self.mode == "features":
            with self._lock:
                features = self._preprocess(inputs, prompt)
            return self._unpadded(features)
        return [Encoded(None, None, _estimate(text, self.max_length), False) for text in inputs]

    # choosing the way

    def _choose(self, tokenizer: Any) -> None:
        samples: list[Text] = [(s, _SAMPLES[1]) for s in _SAMPLES] if self._pairs else list(_SAMPLES)
        try:
            reference = self._unpadded(self._preprocess(samples, None))
        except Exception:  # a model without token features: whatever it raises here, it is opaque to us
            return
        self.mode = "features"
        if not getattr(tokenizer, "is_fast", False):
            return
        self._fast = copy.deepcopy(tokenizer.backend_tokenizer)
        self._fast.no_padding()
        self._cut_side = getattr(tokenizer, "truncation_side", "right")
        self._truncate("longest_first")  # as the reference does
        for normalise in _NORMALISERS:
            self._normalise = normalise
            if all(_same(a, b) for a, b in zip(self._encode_fast(samples, None), reference, strict=True)):
                self._truncate("only_second" if self._only_second else "longest_first")
                self.mode = "fast"
                if self._query_max_length is not None:
                    self._whole = copy.deepcopy(self._fast)
                    self._whole.no_truncation()
                return
        self._fast, self._normalise = None, _NORMALISERS[0]

    def _truncate(self, strategy: str) -> None:
        if self.max_length is None:
            self._fast.no_truncation()
        else:
            self._fast.enable_truncation(self.max_length, strategy=strategy, direction=self._cut_side)

    # the ways

    def _encode_fast(self, inputs: Sequence[Text], prompt: str | None) -> list[Encoded]:
        prefix, normalise = prompt or "", self._normalise
        batch: list[Any]
        if self._pairs:
            batch = [(self._query(normalise(prefix + pair[0])), self._cut(normalise(pair[1]))) for pair in inputs]
        else:
            batch = [self._cut(normalise(prefix + str(text))) for text in inputs]
        limit = self.max_length
        typed = "token_type_ids" in self.feature_names
        encoded = []
        for enc in self._fast.encode_batch(batch):
            ids = np.array(enc.ids, dtype=np.int32)
            types = np.array(enc.type_ids, dtype=np.int32) if typed and self._pairs else None
            truncated = limit is not None and len(ids) >= limit and bool(enc.overflowing)
            encoded.append(Encoded(ids, types, len(ids), truncated))
        return encoded

    def _query(self, query: str) -> str:
        """The query, cut to `query_max_length` tokens where that was asked for."""
        if self._query_max_length is None or self._whole is None:
            return query
        enc = self._whole.encode(query, add_special_tokens=False)
        if len(enc.ids) <= self._query_max_length:
            return query
        return query[: enc.offsets[self._query_max_length - 1][1]]

    def _cut(self, text: str) -> str:
        if self.max_length is None or self._cut_side != "right":
            return text
        keep = max(self.max_length * _CHARS_PER_TOKEN, _MIN_CUT_CHARS)
        if len(text) <= keep:
            return text
        space = max(text.rfind(" ", 0, keep), text.rfind("\n", 0, keep))
        head = text[: space if space > keep // 2 else keep]
        # Safe only if what is kept overflows the model by itself; otherwise (long runs of spaces) take the whole text.
        return head if self._fast.encode(head).overflowing else text

    def _preprocess(self, inputs: Sequence[Text], prompt: str | None) -> dict[str, Any]:
        return sbert.preprocess(self._model, inputs, prompt)

    def _unpadded(self, features: dict[str, Any]) -> list[Encoded]:
        ids, mask = features["input_ids"].numpy(), features["attention_mask"].numpy().astype(bool)
        types = features.get("token_type_ids")
        self.feature_names = tuple(n for n in ("input_ids", "token_type_ids", "attention_mask") if n in features)
        encoded = []
        for row, keep in enumerate(mask):
            row_ids = ids[row][keep].astype(np.int32)
            row_types = types[row].numpy()[keep].astype(np.int32) if types is not None and self._pairs else None
            full = self.max_length is not None and len(row_ids) >= self.max_length
            encoded.append(Encoded(row_ids, row_types, len(row_ids), full))
        return encoded


def _same(ours: Encoded, theirs: Encoded) -> bool:
    if not np.array_equal(ours.input_ids, theirs.input_ids):  # type: ignore[arg-type]
        return False
    a, b = ours.token_type_ids, theirs.token_type_ids
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


def _max_length(model: Any, tokenizer: Any) -> int | None:
    length = getattr(model, "max_seq_length", None)
    if length is None:
        length = getattr(model, "max_length", None) or getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 10**9 else None  # transformers says 10**30 for "unknown"


def _estimate(text: Any, max_length: int | None) -> int:
    chars = sum(len(part) for part in text) if isinstance(text, tuple) else len(str(text))
    return max(1, min(chars // 3 + 2, max_length or 10**9))


def _after_fork() -> None:
    """In a forked child: the threads that tokenizers would share its batches out to are the parent's, and it would wait
    for them for ever. It sees to that itself, but not where this variable says that it may have threads."""
    if "TOKENIZERS_PARALLELISM" in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
