"""``MemsafeRerank``: what SentenceTransformerRerank and FlagEmbeddingReranker do, with memory planned by the core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # no __all__ there
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.utils import infer_torch_device

from llama_index_memsafe._devices import device_list, own_device
from llama_index_memsafe._reports import collected, tags, tell
from llama_index_memsafe._state import CoreHolder, Reloadable, is_overridden
from memsafe import ConfigError, EventHook, MemoryPolicy, RankedDocument, Reranker, in_thread

__all__ = ["MemsafeRerank"]

dispatcher = get_dispatcher(__name__)

_MAX_LENGTH = 512
"""Tokens of a pair when the caller says nothing: the default of both replaced classes."""


_OWN = (
    "dtype", "hooks", "long_documents", "max_windows", "memory", "query_max_length", "show_progress", "truncation",
    "window_overlap",
)  # fmt: skip
"""Options of ours and of the core's. In `cross_encoder_kwargs` they would be lost in silence."""


class MemsafeRerank(Reloadable, BaseNodePostprocessor):
    """Drop-in for ``llama_index.postprocessor.sbert_rerank.SentenceTransformerRerank`` that plans memory by tokens.

    The positional arguments are upstream's, in upstream's order. What is ours is keyword-only:

    Args:
        memory: What memsafe may take and do; a ``MemoryPolicy``, a dict of its fields, or None. Not part of ``to_dict``.
        dtype: None keeps the checkpoint's; ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        hooks: Called with the core's events.
        parity: True edits the caller's nodes as upstream does; False returns copies and leaves the input alone.
        raw_scores: True returns the model's logits; False applies the model's activation (a sigmoid, usually).
        truncation: ``"longest_first"``, or ``"only_second"``: only the passage is cut, never the query.
        query_max_length: Tokens to which a query is cut before it meets a passage. None: not on its own.
        long_documents: ``"truncate"``, or passages that do not fit beside the query are read in windows and have their best
            (``"max_passage"``) or mean (``"mean_passage"``) score; see ``memsafe.Reranker``.
        instruction: What a decoder (Qwen3-Reranker) is told to look for, in the place of the prompt saved with it.
        callback_manager: as in ``BaseNodePostprocessor`` (upstream's constructor refuses it).

    :meth:`from_flag` builds the replacement of FlagEmbeddingReranker.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=("pydantic_model_",))

    model: str = Field(description="Sentence transformer model name.")
    top_n: int = Field(description="Number of nodes to return sorted by score.")
    keep_retrieval_score: bool = Field(default=False, description="Whether to keep the retrieval score in metadata.")
    cross_encoder_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the CrossEncoder, without device and model."
    )
    dtype: str | None = Field(default=None, description="Data type of the weights; None keeps the checkpoint's.")
    parity: bool = Field(default=False, description="Edit the caller's nodes, as upstream.")
    raw_scores: bool = Field(default=False, description="Return logits.")
    truncation: str = Field(default="longest_first", description="Which side of a long pair is cut.")
    query_max_length: int | None = Field(default=None, description="Tokens to which a query is cut.", gt=0)
    long_documents: str = Field(default="truncate", description="What becomes of passages that are too long.")
    instruction: str | None = Field(default=None, description="The prompt of a decoder; None for the saved one.")
    memory: Any = Field(default=None, description="A memsafe.MemoryPolicy, or a dict of its fields.", exclude=True)
    hooks: Any = Field(default=(), description="Called with the core's events.", exclude=True)

    _core: CoreHolder[Reranker] = PrivateAttr()
    _device: str = PrivateAttr()

    def __init__(
        self,
        model: str = "cross-encoder/stsb-distilroberta-base",
        device: str | None = None,
        cache_folder: str | Path | None = None,
        top_n: int = 2,
        keep_retrieval_score: bool | None = False,
        cross_encoder_kwargs: dict[str, Any] | None = None,
        *,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        dtype: str | None = None,
        hooks: Sequence[EventHook] = (),
        parity: bool = False,
        raw_scores: bool = False,
        truncation: Literal["longest_first", "only_second"] = "longest_first",
        query_max_length: int | None = None,
        long_documents: Literal["truncate", "max_passage", "mean_passage"] = "truncate",
        instruction: str | None = None,
        callback_manager: CallbackManager | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            top_n=top_n,
            keep_retrieval_score=keep_retrieval_score,
            cross_encoder_kwargs=cross_encoder_kwargs or {},
            memory=memory,
            dtype=dtype,
            hooks=tuple(hooks),
            parity=parity,
            raw_scores=raw_scores,
            truncation=truncation,
            query_max_length=query_max_length,
            long_documents=long_documents,
            instruction=instruction,
            callback_manager=callback_manager or CallbackManager([]),
        )
        self._check_top_n()
        options = dict(self.cross_encoder_kwargs)
        own = [name for name in _OWN if name in options]
        if own:
            raise ConfigError(
                f"cross_encoder_kwargs: {own[0]!r} is not an option of CrossEncoder; give it to {type(self).__name__} itself"
            )
        if "device" in options or "model" in options:
            raise ValueError(
                "'device' and 'model' should not be specified in 'cross_encoder_kwargs'. "
                "Use the top-level 'device' and 'model' parameters instead."
            )
        self._device = own_device(options) or infer_torch_device() if device is None else device
        options.setdefault("max_length", _MAX_LENGTH)
        options.update(
            model=model,
            device=list(devices) if devices else self._device,
            dtype=dtype,
            truncation=truncation,
            query_max_length=query_max_length,
            long_documents=long_documents,
            hooks=self.hooks,
            memory=memory,
        )
        if cache_folder:
            options["cache_folder"] = cache_folder
        if raw_scores:
            options["activation_fn"] = _no_activation
        self._core = CoreHolder(Reranker, options)
        self._core.get()

    @classmethod
    def from_flag(
        cls,
        top_n: int = 2,
        model: str = "BAAI/bge-reranker-large",
        use_fp16: bool = False,
        *,
        device: str | None = None,
        cache_folder: str | Path | None = None,
        keep_retrieval_score: bool = False,
        cross_encoder_kwargs: dict[str, Any] | None = None,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        parity: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> MemsafeRerank:
        """The replacement of ``FlagEmbeddingReranker(top_n, model, use_fp16)``: its argument order and its numbers.

        Scores are logits. Pairs have at most 512 tokens; a query is cut at 3/4 of that, then only the passage gives way
        (FlagEmbedding 1.4.2, inference/reranker/encoder_only/base.py). `use_fp16` is ignored on a CPU, and without a
        `device` all CUDA devices are used, both as there.
        """
        options = {"max_length": _MAX_LENGTH, **(cross_encoder_kwargs or {})}
        devices = device_list() if device is None and infer_torch_device() == "cuda" else None
        return cls(
            model,
            device,
            cache_folder,
            top_n,
            keep_retrieval_score,
            options,
            memory=memory,
            dtype="float16" if use_fp16 and (device or infer_torch_device()) != "cpu" else None,
            hooks=hooks,
            parity=parity,
            raw_scores=True,
            truncation="only_second",
            query_max_length=int(options["max_length"]) * 3 // 4,
            callback_manager=callback_manager,
            devices=devices,
        )

    @classmethod
    def class_name(cls) -> str:
        return "MemsafeRerank"

    @property
    def reranker(self) -> Reranker:
        """The core object that does the work; loaded anew after unpickling, on first use."""
        return self._core.get()

    @property
    def _model(self) -> Any:
        """The CrossEncoder, under upstream's name."""
        return self.reranker.model

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = self._begin(nodes, query_bundle)
        if not nodes:
            return []
        with self._callback(nodes, query) as event, collected() as reports:
            ranked = self._translate(nodes, self.reranker.rerank(query, _contents(nodes), **self._options()))
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked, tags=tags(reports)))
        return ranked

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """As the synchronous method; the core waits, the event loop does not."""
        if is_overridden(self, _OURS, "_postprocess_nodes"):
            return await in_thread(self._postprocess_nodes, nodes, query_bundle)
        query = self._begin(nodes, query_bundle)
        if not nodes:
            return []
        with self._callback(nodes, query) as event, collected() as reports:
            reranker = await self._core.aget()
            ranked = self._translate(nodes, await reranker.arerank(query, _contents(nodes), **self._options()))
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked, tags=tags(reports)))
        return ranked

    def _options(self) -> dict[str, Any]:
        """Someone waits for a ranking: it goes before bulk work; its figures go into the span."""
        options: dict[str, Any] = {"urgent": True, "on_report": tell}
        return options if self.instruction is None else {**options, "prompt": self.instruction}

    def _begin(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> str:
        """Send the start event, then check, in upstream's order."""
        self._check_top_n()
        dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=self.top_n, model_name=self.model))
        if query_bundle is None:
            raise ValueError("Missing query bundle in extra info.")
        return query_bundle.query_str

    @contextmanager
    def _callback(self, nodes: list[NodeWithScore], query: str) -> Iterator[Any]:
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield event

    def _translate(self, nodes: list[NodeWithScore], ranked: list[RankedDocument]) -> list[NodeWithScore]:
        """The best `top_n` nodes, best first. All get their score: upstream edits those that it drops, too."""
        return [self._with_score(nodes[document.index], document.score) for document in ranked][: self.top_n]

    def _with_score(self, node: NodeWithScore, score: float) -> NodeWithScore:
        if self.parity:
            if self.keep_retrieval_score:
                node.node.metadata["retrieval_score"] = node.score
            node.score = score
            return node
        changes: dict[str, Any] = {"score": score}
        if self.keep_retrieval_score:
            metadata = {**node.node.metadata, "retrieval_score": node.score}
            changes["node"] = node.node.model_copy(update={"metadata": metadata})
        return node.model_copy(update=changes)

    def _check_top_n(self) -> None:
        if self.top_n < 0 and not self.parity:
            raise ConfigError(
                f"top_n: got {self.top_n}; give 0 or more (upstream would drop nodes from the end: parity=True)"
            )


_OURS = dict(vars(MemsafeRerank))


def _contents(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]


def _no_activation(logits: Any) -> Any:
    """Logits as they are; a plain function, so that a configuration can be pickled."""
    return logits
