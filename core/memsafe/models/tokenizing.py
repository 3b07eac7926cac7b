"""Inputs to token ids, once each: the same ids that the model's own preprocessing gives, without padding."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from memsafe.errors import ConfigError
from memsafe.models import sbert
from memsafe.models.content import ContentTokenizer
from memsafe.models.features import FeatureRows
from memsafe.models.samples import samples
from memsafe.models.trial import Trial
from memsafe.models.ways import Encoded, Fast, Features, Limits, Opaque, Text, Way, frozen

__all__ = ["Encoded", "InputEncoder", "Way"]

_WAYS_KEPT = 256
"""Prompts and options whose ways are remembered: finding one takes some milliseconds."""

_CANNOT_CUT = "truncation, query_max_length: this model's own preprocessing must run unchanged; leave them out"


class InputEncoder:
    """Turns texts, or (query, document) pairs, into :class:`Encoded`. Safe to call from several threads.

    Three ways, found anew for each prompt and each set of call options, the first that is shown to give what the model's
    own preprocessing gives on samples: ``"fast"``, ``"features"``, ``"opaque"`` (see `models/ways.py`). The fast one is
    for sentence-transformers' own modules: what other code does to a text no samples can show, so it is called.
    What differs from text to text beside its tokens cannot be known from ids: then the raw text goes to the forward.

    mode, max_length: of a call without prompt and options. own: whether inputs go untouched to the model's own ``encode``
    or ``predict`` instead (:meth:`use_own`). pad_id, pad_type_id, pad_left, feature_names: how the model's
    own preprocessing pads, and what it gives.
    """

    def __init__(
        self, model: Any, *, pairs: bool, truncation: str = "longest_first", query_max_length: int | None = None
    ) -> None:
        self._model = model
        self._pairs = pairs
        self._lock = threading.Lock()  # around the model's own tokenizer, which may hold state
        self._choosing = threading.RLock()
        self._query_max_length = query_max_length
        self._only_second = truncation == "only_second"
        self._ways: OrderedDict[Hashable, Way] = OrderedDict()
        self._trials: dict[Hashable, Trial] = {}
        self._cores: dict[int, ContentTokenizer] = {}
        self._accepted: dict[Hashable, bool] = {}
        tokenizer = sbert.hf_tokenizer(model)
        self.pad_id = int(getattr(tokenizer, "pad_token_id", None) or 0)
        self.pad_type_id = int(getattr(tokenizer, "pad_token_type_id", None) or 0)
        self.pad_left = getattr(tokenizer, "padding_side", "right") == "left"
        self.feature_names: tuple[str, ...] = ()
        self.own = self._own_cut = False
        self._look(tokenizer)
        way = self.way()
        self.mode, self.max_length = way.mode, way.max_length

    def use_own(self, own: bool, cut: bool = False) -> None:
        """Whether all ways are opaque from now on, with inputs as they are given: the model's own methods take it from
        there. cut: giant ones without what overflows by itself. Raises :class:`ConfigError` where cutting was asked for,
        which those would not do."""
        if own and self._cuts:
            raise ConfigError(_CANNOT_CUT)
        with self._choosing:
            if (own, cut) != (self.own, self._own_cut):
                self.own, self._own_cut = own, cut
                self._ways.clear()
                self.mode = self.way().mode

    def after_fork(self) -> None:
        """See :meth:`memsafe.models.model.LoadedModel.after_fork`."""
        self._lock, self._choosing = threading.Lock(), threading.RLock()
        self._ways.clear()  # some hold the old lock
        self._trials.clear()

    def way(self, prompt: str | None = None, options: Mapping[str, Any] | None = None) -> Way:
        """How inputs with `prompt` before each (before the query of a pair) are encoded, for a call with `options` (``task``,
        ...). Raises :class:`ConfigError` where cutting was asked for in a way that this model cannot do."""
        way = self.model_way(prompt, options)
        if not self._cuts:
            return way
        if not isinstance(way, Fast):
            raise ConfigError(_CANNOT_CUT)
        return way.with_limits(self._asked(way.limits))

    def model_way(self, prompt: str | None = None, options: Mapping[str, Any] | None = None) -> Way:
        """As :meth:`way`, but inputs are cut as the model itself cuts them, whatever was asked for."""
        options = options or {}
        key = (prompt or None, frozen(options))
        with self._choosing:
            way = self._ways.get(key) or self._find(prompt or "", options)
            self._ways[key] = way
            self._ways.move_to_end(key)
            if len(self._ways) > _WAYS_KEPT:
                self._ways.popitem(last=False)
            return way

    def accepts(self, options: Mapping[str, Any]) -> bool:
        """Whether the model's own preprocessing takes `options`: modules may have tasks of other names, or know none."""
        key = frozen(options)
        with self._choosing:
            if key not in self._accepted:
                try:
                    self._preprocess([("x", "x") if self._pairs else "x"], None, options)
                except Exception:  # whatever it raises for a name that it does not know
                    self._accepted[key] = False
                else:
                    self._accepted[key] = True
            return self._accepted[key]

    def extras(self, prompt: str | None, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Features beside the tokens that the model's preprocessing adds for `prompt` (modality, prompt_length)."""
        return self.way(prompt, options).extras

    def encode(
        self, inputs: Sequence[Text], prompt: str | None = None, options: Mapping[str, Any] | None = None
    ) -> list[Encoded]:
        """Encode `inputs` with `prompt` put before each."""
        return self.way(prompt, options).encode(inputs) if inputs else []

    def preprocess(self, model: Any, inputs: Sequence[Text], extras: Mapping[str, Any]) -> dict[str, Any]:
        """Features of opaque `inputs` by `model`'s own code, padded, on the CPU. extras: of their way."""
        with self._lock:
            return sbert.preprocess(model, inputs, extras["prompt"], extras["options"])

    # finding the way

    def _look(self, tokenizer: Any) -> None:
        """How the model pads, from its own preprocessing of a call without prompt and options."""
        try:
            rows = FeatureRows.of(self._preprocess(samples(tokenizer, self._pairs), None, {}))
        except Exception:  # a model without token features, or without a default route: whatever it raises
            return
        if rows is None:
            return
        self.feature_names = rows.names
        self.pad_id = self.pad_id if rows.pad_id is None else rows.pad_id
        self.pad_type_id = self.pad_type_id if rows.pad_type_id is None else rows.pad_type_id
        self.pad_left = self.pad_left if rows.pad_left is None else rows.pad_left

    @property
    def _cuts(self) -> bool:
        """Whether inputs are to be cut in another way than the model's own."""
        return self._only_second or self._query_max_length is not None

    def _find(self, prompt: str, options: Mapping[str, Any]) -> Way:
        trial = self._trial(options)
        shorten = partial(self._shorten, trial)
        if self.own:
            return Opaque(trial.limits, prompt or None, options, shorten if self._own_cut else list)
        rows = None if sbert.forward_options(self._model, options) else self._rows(trial.texts, prompt, options)
        if rows is not None and trial.readable:
            for fast in trial.candidates(rows, prompt):
                if trial.confirms(fast, rows):
                    return fast
        if rows is None or not trial.readable:
            return Opaque(trial.limits, prompt or None, options, shorten)
        own = partial(sbert.preprocess, self._model, prompt=prompt or None, options=options)
        cuts = sbert.reported_cuts(self._model, options)
        return Features(trial.limits, rows, own, self._lock, shorten, cuts)

    def _trial(self, options: Mapping[str, Any]) -> Trial:
        key = frozen(options)
        if key not in self._trials:
            if len(self._trials) >= _WAYS_KEPT:
                self._trials.clear()
            self._trials[key] = Trial(self._model, self._pairs, options, self._preprocess, self._core)
        return self._trials[key]

    def _rows(self, texts: list[Text], prompt: str, options: Mapping[str, Any]) -> FeatureRows | None:
        """The model's own rows of `texts`; None unless they can be read, and each is the same alone and in company."""
        try:
            rows = FeatureRows.of(self._preprocess(texts, prompt or None, options))
        except Exception:  # a model without token features: whatever it raises here, it is opaque to us
            return None
        if rows is None or rows.names != self.feature_names:
            return None
        ours = (self.pad_id, self.pad_type_id, self.pad_left)
        if any(
            p is not None and p != q for p, q in zip((rows.pad_id, rows.pad_type_id, rows.pad_left), ours, strict=True)
        ):
            return None
        for place in (0, len(texts) // 2, len(texts) - 1):
            alone = FeatureRows.of(self._preprocess([texts[place]], prompt or None, options))
            if alone is None or alone.constants != rows.constants or alone.names != rows.names:
                return None
            if not np.array_equal(alone.ids[0], rows.ids[place]):
                return None
            if rows.types is not None and not np.array_equal(alone.types[0], rows.types[place]):  # type: ignore[index]
                return None
        return rows

    def _asked(self, limits: Limits) -> Limits:
        """`limits` with what the user wants of them."""
        strategy = "only_second" if self._only_second else limits.strategy
        return replace(limits, strategy=strategy, query_max_length=self._query_max_length)

    def _core(self, tokenizer: Any) -> ContentTokenizer:
        if id(tokenizer) not in self._cores:
            self._cores[id(tokenizer)] = ContentTokenizer(tokenizer)
        return self._cores[id(tokenizer)]

    def _preprocess(self, inputs: Sequence[Text], prompt: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            return sbert.preprocess(self._model, inputs, prompt, options)

    def _shorten(self, trial: Trial, inputs: Sequence[Text]) -> list[Any]:
        def slow(texts: Sequence[str]) -> list[bytes]:
            with self._lock:
                return trial.slow_ids(texts)

        return trial.shorten(inputs, slow)


def _after_fork() -> None:
    """In a forked child: the threads that tokenizers would share its batches out to are the parent's, and it would wait
    for them for ever. It sees to that itself, but not where this variable says that it may have threads."""
    if "TOKENIZERS_PARALLELISM" in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
