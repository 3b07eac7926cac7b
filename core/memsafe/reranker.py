"""(query, document) pairs to scores, through the same pipeline as embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe import inputs
from memsafe.calls import Model, Options, Prepare, in_thread
from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError, ModelError
from memsafe.events import EventHook, RunReport
from memsafe.long_documents import MAX_WINDOWS, RERANKING, best, check, mean
from memsafe.runtimes import Quantization

__all__ = ["RankedDocument", "RerankRun", "Reranker"]

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """index: position in the list of documents; score: a Python float, higher is better."""

    index: int
    score: float


@dataclass(frozen=True)
class RerankRun:
    """scores: float32, shape (pairs,), or (pairs, labels) for several labels, in the caller's order; report: what it took."""

    scores: Array
    report: RunReport


class Reranker(Model):
    """Scores (query, document) pairs with any model that sentence-transformers can load as a CrossEncoder.

    Numbers are those of ``CrossEncoder.predict``; there is no batch size.

    Args:
        model: folder, hub id such as ``"BAAI/bge-reranker-v2-m3"``, or a loaded CrossEncoder.
        device, dtype, engine, quantization, memory, hooks, show_progress: as for :class:`Embedder`.
        max_length: tokens of a pair after which it is cut; None as the model says.
        num_labels: for a model whose head is to be made anew; None as saved.
        activation_fn: a callable on scores (torch, float32); None as the model says (sigmoid for one label).
        truncation: what a pair that is too long loses: ``"longest_first"`` (sentence-transformers) or ``"only_second"``
            (FlagEmbedding); query_max_length: tokens after which the query alone is cut before that.
        long_documents: what becomes of a document that does not fit beside its query: ``"truncate"``, or it is read in windows of
            tokens, each with the whole query, and has the best (``"max_passage"``) or the mean score (``"mean_passage"``) of
            them. `truncation` then has nothing to do. window_overlap: tokens that two windows share; None for an eighth.
            max_windows: of one document; what is beyond is cut, counted and warned of.
        decoder: ``"flag"`` reads pairs as FlagEmbedding's rerankers of decoders do (bge-reranker-v2-gemma, -minicpm-layerwise), whose
            scores, logits of "Yes", it gives; the prompt of a call is the question put behind the pair. None: as sentence-transformers
            does. cutoff_layer: the layer whose score is taken, of those that have a head at several; None for the last.
        options: whatever else the installed CrossEncoder takes.
    """

    _kind = "reranker"

    def __init__(
        self,
        model: Any,
        *,
        device: Any = None,
        dtype: Any = None,
        engine: str = "torch",
        quantization: Quantization | dict[str, Any] | None = None,
        max_length: int | None = None,
        num_labels: int | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        truncation: str = "longest_first",
        query_max_length: int | None = None,
        long_documents: str = "truncate",
        window_overlap: int | None = None,
        max_windows: int = MAX_WINDOWS,
        decoder: str | None = None,
        cutoff_layer: int | None = None,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        show_progress: bool = False,
        **options: Any,
    ) -> None:
        self._settings = {
            **options,
            "model": model,
            "device": device,
            "dtype": dtype,
            "engine": engine,
            "quantization": quantization,
            "max_length": max_length,
            "num_labels": num_labels,
            "activation_fn": activation_fn,
            "truncation": truncation,
            "query_max_length": query_max_length,
            "long_documents": long_documents,
            "window_overlap": window_overlap,
            "max_windows": max_windows,
            "decoder": decoder,
            "cutoff_layer": cutoff_layer,
            "memory": memory,
            "hooks": hooks,
            "show_progress": show_progress,
        }
        if truncation not in ("longest_first", "only_second"):
            raise ConfigError(f"truncation: got {truncation!r}; choose 'longest_first' or 'only_second'")
        self._long = check(long_documents, RERANKING, window_overlap, max_windows)
        options |= decoder_options(model, decoder, cutoff_layer)
        if num_labels is not None:
            options["num_labels"] = num_labels
        if isinstance(model, str) and activation_fn is not None:
            options["activation_fn"] = activation_fn
        super().__init__(
            model,
            device,
            dtype=dtype,
            engine=engine,
            quantization=quantization,
            max_length=max_length,
            memory=memory,
            hooks=hooks,
            options=options,
            truncation=truncation,
            query_max_length=query_max_length,
        )
        self._activation_fn = activation_fn
        self._show_progress = show_progress

    @property
    def num_labels(self) -> int:
        """Scores per pair."""
        model = self.model
        return int(model.num_labels if hasattr(model, "num_labels") else model.config.num_labels)

    def score(self, query: str, documents: Sequence[str], **options: Any) -> Array:
        """Scores of `documents` for `query`: float32, shape (len(documents),) or (len(documents), labels).

        Someone waits for it: it goes before bulk work, unless ``urgent=False``.
        """
        return self.score_pairs(_pair(query, documents), **{"urgent": True, **options})

    def score_pairs(self, pairs: Sequence[tuple[str, str]], **options: Any) -> Array:
        """Scores of (query, document) `pairs`: float32, shape (len(pairs),) or (len(pairs), labels)."""
        return self.run(pairs, **options).scores

    def rerank(
        self, query: str, documents: Sequence[str], top_n: int | None = None, **options: Any
    ) -> list[RankedDocument]:
        """The `top_n` best documents (None: all), best first; equal scores keep their order, NaN comes last."""
        check_top_n(top_n)
        self._check_single_label()
        return ranked(self.score(query, documents, **options), top_n)

    def run(self, pairs: Sequence[tuple[str, str]], **options: Any) -> RerankRun:
        """Score `pairs` and report what it took.

        Options, all optional: activation_fn (overrides the one of the model), apply_softmax (over several labels),
        prompt, prompt_name, urgent (goes before bulk work), max_rows, fixed_tokens, show_progress, progress, on_report, and what the model's own
        modules take; see :meth:`Embedder.run`.
        """
        call = self._call(options)
        rows, report = self._run(inputs.check_pairs(pairs), call.options, call.scored, call.prepare)
        return call.finish(rows, report)

    async def ascore(self, query: str, documents: Sequence[str], **options: Any) -> Array:
        """:meth:`score` for asyncio; cancelling the task cancels the work."""
        return await self.ascore_pairs(_pair(query, documents), **{"urgent": True, **options})

    async def ascore_pairs(self, pairs: Sequence[tuple[str, str]], **options: Any) -> Array:
        """:meth:`score_pairs` for asyncio."""
        return (await self.arun(pairs, **options)).scores

    async def arerank(
        self, query: str, documents: Sequence[str], top_n: int | None = None, **options: Any
    ) -> list[RankedDocument]:
        """:meth:`rerank` for asyncio."""
        check_top_n(top_n)
        self._check_single_label()
        return ranked(await self.ascore(query, documents, **options), top_n)

    async def arun(self, pairs: Sequence[tuple[str, str]], **options: Any) -> RerankRun:
        """:meth:`run` for asyncio."""
        call = self._call(options)
        rows, report = await self._arun(inputs.check_pairs(pairs), call.options, call.scored, call.prepare)
        return await in_thread(call.finish, rows, report)

    def _check_single_label(self) -> None:
        if self.num_labels != 1:
            raise ModelError(
                f"the model gives {self.num_labels} scores per pair and cannot rank; use score(), or a model with one label"
            )

    def _call(self, options: dict[str, Any]) -> _Call:
        activation_fn = options.pop("activation_fn", None)
        apply_softmax = options.pop("apply_softmax", False)
        if options.get("show_progress") is None:
            options["show_progress"] = self._show_progress
        return _Call(
            self, Options.of(options, self._model_options), activation_fn or self._activation_fn, bool(apply_softmax)
        )


@dataclass(frozen=True)
class _Call:
    """What a call wants done to the model's raw scores."""

    reranker: Reranker
    options: Options
    activation_fn: Callable[[Any], Any] | None
    apply_softmax: bool

    def finish(self, rows: Any, report: RunReport) -> RerankRun:
        if rows is None:
            labels = self.reranker.num_labels
            return RerankRun(np.empty((0,) if labels == 1 else (0, labels), dtype=np.float32), report)
        return RerankRun(self.scored(rows), report)

    @property
    def prepare(self) -> Prepare | None:
        """Windows of long documents; None where they are cut."""
        long = self.reranker._long
        if long is None:
            return None
        fold = best if long.mode == "max_passage" else mean
        return long.prepare(lambda rows, owners, tokens: fold(self.scores(rows), owners, tokens))

    def scored(self, rows: Any) -> Array:
        """:meth:`scores` of raw rows; those of windows were scored before they became one."""
        return self.scores(rows) if self.reranker._long is None else rows

    def scores(self, rows: Any) -> Array:
        """Raw rows, shape (pairs, labels), as what was asked for."""
        import torch

        labels = self.reranker.num_labels
        activation_fn = self.activation_fn or self.reranker.model.activation_fn
        with torch.inference_mode():
            scores = activation_fn(torch.from_numpy(rows)) if activation_fn is not None else torch.from_numpy(rows)
            if labels == 1 and scores.ndim > 1:
                scores = scores.squeeze(-1)
            if self.apply_softmax and scores.ndim > 1:
                scores = torch.nn.functional.softmax(scores, dim=1)
            finished: Array = scores.float().numpy()
        return finished


def decoder_options(model: Any, decoder: Any, cutoff_layer: Any) -> dict[str, Any]:
    """`decoder` and `cutoff_layer` as options of what is loaded. Raises :class:`ConfigError`."""
    if decoder not in (None, "flag"):
        raise ConfigError(
            f"decoder: got {decoder!r}; give 'flag' for FlagEmbedding's way with pairs, or None for the model's own"
        )
    if cutoff_layer is not None and (
        isinstance(cutoff_layer, bool) or not isinstance(cutoff_layer, int) or cutoff_layer < 1
    ):
        raise ConfigError(f"cutoff_layer: got {cutoff_layer!r}; give an int of at least 1, or None for all layers")
    if decoder is None and cutoff_layer is not None:
        raise ConfigError("cutoff_layer: is for FlagEmbedding's layerwise rerankers; give decoder='flag' too")
    if decoder is None:
        return {}
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError(f"decoder: got {decoder!r} with a loaded model; give its folder or hub id")
    return {"decoder": decoder, "cutoff_layer": cutoff_layer}


def _pair(query: Any, documents: Any) -> list[tuple[str, str]]:
    query = inputs.check_query(query)
    return [(query, document) for document in inputs.check_texts(documents, name="documents")]


def ranked(scores: Array, top_n: int | None) -> list[RankedDocument]:
    """The `top_n` best, None for all; equal scores keep their order."""
    order = np.argsort(-scores, kind="stable")  # NaN sorts last
    return [RankedDocument(int(i), float(scores[i])) for i in (order if top_n is None else order[:top_n])]


def check_top_n(top_n: Any) -> None:
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 0):
        raise ConfigError(f"top_n: got {top_n!r}; give an int of at least 0, or None for all")
