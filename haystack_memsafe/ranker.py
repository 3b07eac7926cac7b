"""A Haystack ranker that never runs out of memory: :class:`MemsafeRanker`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Literal

from haystack import Document, component
from haystack.utils import ComponentDevice, Secret

from haystack_memsafe._component import MemsafeComponent, WrongInputError, check_documents, texts_of
from memsafe import ConfigError, EventHook, MemoryPolicy, RankedDocument, Reranker

__all__ = ["MemsafeRanker"]

_TOKEN = Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False)


@component
class MemsafeRanker(MemsafeComponent[Reranker]):
    """Drop-in for Haystack's SentenceTransformersSimilarityRanker: the same scores, and the same documents in the same order.

    Args:
        batch_size: the most pairs in a micro-batch; None, the default, leaves it to the planner.
        instruction: what a decoder (Qwen3-Reranker) is told to look for, in the place of the prompt saved with it.
        memory: a ``MemoryPolicy``, or a dict of its fields; dtype, hooks: as for :class:`memsafe.Reranker`.
        model, device, ...: all others as upstream.

    Raises:
        memsafe.ConfigError: `top_k` or another option cannot be used. When used: what :class:`memsafe.Reranker` raises.
    """

    top_k: int
    query_prefix: str
    query_suffix: str
    document_prefix: str
    document_suffix: str
    scale_score: bool
    score_threshold: float | None
    instruction: str | None

    def __init__(
        self,
        *,
        model: str | Path = "cross-encoder/ms-marco-MiniLM-L-6-v2",
        device: ComponentDevice | None = None,
        token: Secret | None = _TOKEN,
        top_k: int = 10,
        query_prefix: str = "",
        query_suffix: str = "",
        document_prefix: str = "",
        document_suffix: str = "",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        scale_score: bool = True,
        score_threshold: float | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: Literal["torch", "onnx", "openvino"] = "torch",
        batch_size: int | None = None,
        instruction: str | None = None,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        dtype: str | None = None,
        hooks: Sequence[EventHook] = (),
    ) -> None:
        given = {**locals(), "model": str(model)}
        _check_top_k(top_k)
        self._take({name: value for name, value in given.items() if name not in ("self", "__class__")})

    @property
    def reranker(self) -> Reranker:
        """The core object that does the work; loaded on first use."""
        return self._core.get(self._build)

    def _build(self) -> Reranker:
        return Reranker(**self._resolved())

    @component.output_types(documents=list[Document])
    def run(
        self,
        *,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """``{"documents": [...]}``: copies of the best `top_k`, best first, each id once, with scores of at least the threshold.

        Raises:
            memsafe.InputError: `query` is no str, or `documents` no list of documents. memsafe.ConfigError: `top_k` is below 1.
        """
        kept, texts = self._begin(query, documents, top_k)
        if not texts:
            return {"documents": []}
        ranked = self.reranker.rerank(self._query(query), texts, **self._options(scale_score))
        return self._documents(kept, ranked, top_k, score_threshold)

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        *,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """:meth:`run` for asyncio; cancelling the task cancels the work."""
        kept, texts = self._begin(query, documents, top_k)
        if not texts:
            return {"documents": []}
        reranker = await self._core.aget(self._build)
        ranked = await reranker.arerank(self._query(query), texts, **self._options(scale_score))
        return self._documents(kept, ranked, top_k, score_threshold)

    def _begin(self, query: Any, documents: Any, top_k: int | None) -> tuple[list[Document], list[str]]:
        """The documents, each id once, the best scored of equal ones; and what the model reads of them."""
        if not isinstance(query, str):
            raise WrongInputError(f"query: got a {type(query).__name__}; give one str", index=None)
        if top_k is not None:
            _check_top_k(top_k)
        best: dict[str, Document] = {}
        for each in check_documents(documents):
            known = best.get(each.id)
            if known is None or _score(each) > _score(known):
                best[each.id] = each
        kept = list(best.values())
        return kept, texts_of(kept, self, self.document_prefix, self.document_suffix)

    def _query(self, query: str) -> str:
        return self.query_prefix + query + self.query_suffix

    def _options(self, scale_score: bool | None) -> dict[str, Any]:
        from torch.nn import Identity, Sigmoid

        scale = self.scale_score if scale_score is None else scale_score
        options: dict[str, Any] = {"activation_fn": Sigmoid() if scale else Identity(), "max_rows": self.batch_size}
        return options if self.instruction is None else {**options, "prompt": self.instruction}

    def _documents(
        self, documents: list[Document], ranked: list[RankedDocument], top_k: int | None, threshold: float | None
    ) -> dict[str, list[Document]]:
        least = self.score_threshold if threshold is None else threshold
        found = [each for each in ranked if least is None or each.score >= least]
        found = found[: self.top_k if top_k is None else top_k]
        return {"documents": [replace(documents[each.index], score=each.score) for each in found]}


def _score(document: Document) -> float:
    return -inf if document.score is None else document.score


def _check_top_k(top_k: Any) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k must be > 0, but got {top_k!r}")
