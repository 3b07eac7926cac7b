"""``MemsafeEmbedding``: what HuggingFaceEmbedding does, with memory planned by the core."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.constants import DEFAULT_EMBED_BATCH_SIZE
from llama_index.core.utils import get_cache_dir, infer_torch_device

from llama_index_memsafe._cache import COLLECTION, CachedWork, turn
from llama_index_memsafe._devices import device_list, own_device
from llama_index_memsafe._events import (
    current_progress,
    emit_batch,
    event_groups,
    fail_batch,
    finish_batch,
    progress_bar,
    start_batch,
)
from llama_index_memsafe._instructions import DEFAULT_MODEL, QUERY_INSTRUCTIONS, TEXT_INSTRUCTIONS
from llama_index_memsafe._reports import collected, tell
from llama_index_memsafe._state import CoreHolder, Reloadable, is_overridden
from memsafe import ConfigError, Embedder, EventHook, InputError, InputTooLargeError, MemoryPolicy, in_thread

__all__ = ["MemsafeEmbedding"]

_DOCUMENT_PROMPTS = ("text", "document", "passage", "corpus")
_PER_CALL = (
    "fixed_tokens", "kind", "max_rows", "model", "normalize", "on_report", "precision", "progress", "prompt", "prompt_name", "show_progress",
    "truncate_dim", "urgent", "warn",
)  # fmt: skip
"""What a call decides by itself, or a field of this class does."""
_ROWS_PER_TURN = 512
"""Rows turned into lists by an async call before it lets the event loop run."""


class _Unset(int):
    """An int that remembers that nobody chose it, so that signatures show upstream's default."""


_DEFAULT_GROUP = _Unset(DEFAULT_EMBED_BATCH_SIZE)


class MemsafeEmbedding(Reloadable, BaseEmbedding):
    """Drop-in for ``llama_index.embeddings.huggingface.HuggingFaceEmbedding`` that plans memory instead of counting texts.

    The positional arguments are upstream's, in upstream's order. What is ours is keyword-only:

    Args:
        memory: What memsafe may take and do; a ``MemoryPolicy``, a dict of its fields, or None. Not part of ``to_dict`` or of cache keys.
        dtype: None keeps the checkpoint's; ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        hooks: Called with the core's events.
        parity: True embeds exactly as upstream, even where it ignores prompts that are saved in the model.
        prompts: Prompts by name, as in sentence-transformers. ``{"query": ""}`` switches a query prompt off.
        encode_kwargs, query_encode_kwargs: what the model's own modules take in ``encode``, such as ``{"task": "retrieval"}``;
            those of queries replace the others, if not empty. Without a ``task``, queries and texts are ``"query"`` and
            ``"document"`` to a model that knows these.
        num_workers, embeddings_cache, rate_limiter: as in ``BaseEmbedding`` (upstream's constructor refuses them).
        revision, truncate_dim, **model_kwargs: as in ``SentenceTransformer``; and ``engine``, ``quantization`` of the core's ``Embedder``.

    ``embed_batch_size`` groups events and callbacks. It caps the rows of a micro-batch only if you set it.

    Raises:
        ValueError: a deprecated argument was used, or a value is out of range.
        memsafe.MemsafeError: the model cannot be loaded, an option is unknown or an input cannot be used.
    """

    max_length: int | None = Field(default=512, description="Maximum length of input, in tokens.", gt=0)
    normalize: bool = Field(default=True, description="Normalize embeddings or not.")
    query_instruction: str | None = Field(default=None, description="Instruction to prepend to query text.")
    text_instruction: str | None = Field(default=None, description="Instruction to prepend to text.")
    cache_folder: str | None = Field(default=None, description="Cache folder for Hugging Face files.")
    show_progress_bar: bool = Field(default=False, description="Whether to show a progress bar.")
    rate_limiter: Any | None = Field(default=None, description="Throttles calls.", exclude=True)
    prompts: dict[str, str] | None = Field(default=None, description="Prompts by name.")
    revision: str | None = Field(default=None, description="Revision of the model on the hub.")
    truncate_dim: int | None = Field(default=None, description="Dimensions to keep of each embedding.")
    encode_kwargs: dict[str, Any] = Field(default_factory=dict, description="Keywords of the model's own for encode.")
    query_encode_kwargs: dict[str, Any] = Field(default_factory=dict, description="The same for queries.")
    dtype: str | None = Field(default=None, description="Data type of the weights; None keeps the checkpoint's.")
    parity: bool = Field(default=False, description="Embed exactly as HuggingFaceEmbedding.")
    memory: Any = Field(default=None, description="A memsafe.MemoryPolicy, or a dict of its fields.", exclude=True)
    hooks: Any = Field(default=(), description="Called with the core's events.", exclude=True)

    _core: CoreHolder[Embedder] = PrivateAttr()
    _device: str = PrivateAttr()
    _batch_size_unset: bool = PrivateAttr(default=False)
    _exact: bool = PrivateAttr(default=False)

    def __init__(
        self,
        model_name: str = DEFAULT_MODEL,
        tokenizer_name: str | None = "deprecated",
        pooling: str = "deprecated",
        max_length: int | None = None,
        query_instruction: str | None = None,
        text_instruction: str | None = None,
        normalize: bool = True,
        model: Any | None = "deprecated",
        tokenizer: Any | None = "deprecated",
        embed_batch_size: int = _DEFAULT_GROUP,
        cache_folder: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        callback_manager: CallbackManager | None = None,
        parallel_process: bool = False,
        target_devices: list[str] | None = None,
        show_progress_bar: bool = False,
        *,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        dtype: str | None = None,
        hooks: Sequence[EventHook] = (),
        parity: bool = False,
        prompts: dict[str, str] | None = None,
        revision: str | None = None,
        truncate_dim: int | None = None,
        encode_kwargs: dict[str, Any] | None = None,
        query_encode_kwargs: dict[str, Any] | None = None,
        num_workers: int | None = None,
        embeddings_cache: Any | None = None,
        rate_limiter: Any | None = None,
        **model_kwargs: Any,
    ) -> None:
        deprecated = {"model": model, "tokenizer": tokenizer, "pooling": pooling, "tokenizer_name": tokenizer_name}
        for variable, value in deprecated.items():
            if value != "deprecated":
                raise ValueError(f"{variable} is deprecated. Please remove it from the arguments.")
        if model_name is None:
            raise ValueError("The `model_name` argument must be provided.")
        if "show_progress" in model_kwargs:  # an option of the core's, not of SentenceTransformer
            raise ConfigError(
                "show_progress: unknown argument; give show_progress_bar, or show_progress to a batch call"
            )
        fields: dict[str, Any] = {} if not max_length else {"max_length": max_length}
        super().__init__(
            model_name=model_name,
            embed_batch_size=embed_batch_size,
            callback_manager=callback_manager,
            num_workers=num_workers,
            embeddings_cache=embeddings_cache,
            rate_limiter=rate_limiter,
            normalize=normalize,
            query_instruction=query_instruction,
            text_instruction=text_instruction,
            show_progress_bar=show_progress_bar,
            prompts=prompts,
            revision=revision,
            truncate_dim=truncate_dim,
            encode_kwargs=encode_kwargs or {},
            query_encode_kwargs=query_encode_kwargs or {},
            dtype=dtype,
            parity=parity,
            memory=memory,
            hooks=tuple(hooks),
            **fields,
        )
        self._exact = parity
        self._batch_size_unset = isinstance(embed_batch_size, _Unset)
        self._device = device or own_device(model_kwargs) or infer_torch_device()
        settings: dict[str, Any] = {
            **model_kwargs,
            "model": model_name,
            "device": device_list(target_devices) if parallel_process else self._device,
            "dtype": dtype,
            "max_length": max_length or None,
            "cache_folder": cache_folder or get_cache_dir(),
            "trust_remote_code": trust_remote_code,
            "prompts": self._resolve_prompts(),
            "revision": revision,
            "truncate_dim": truncate_dim,
            "hooks": self.hooks,
            "memory": memory,
        }
        self._core = CoreHolder(Embedder, settings)
        self.max_length = self._core.get().max_length

    @classmethod
    def class_name(cls) -> str:
        return "MemsafeEmbedding"

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> MemsafeEmbedding:
        """As upstream. The default group size in `data` counts as unset; what cannot be in a dict comes by keyword."""
        data = {name: value for name, value in data.items() if name != "class_name"}
        if data.get("embed_batch_size") == DEFAULT_EMBED_BATCH_SIZE:
            del data["embed_batch_size"]
        return cls(**{**data, **kwargs})

    @property
    def embedder(self) -> Embedder:
        """The core object that does the work; loaded anew after unpickling, on first use."""
        return self._core.get()

    @property
    def _model(self) -> Any:
        """The SentenceTransformer, under upstream's name."""
        return self.embedder.model

    def _resolve_prompts(self) -> dict[str, str]:
        """Prompts that replace the model's saved ones.

        Order: the instruction, `prompts`, the table by model name. Then upstream's "no prompt at all" if `parity` or if
        the instruction is "", else the prompt saved in the model (by leaving its name out).
        """
        given = self.prompts or {}
        texts = [given[name] for name in _DOCUMENT_PROMPTS if name in given]
        query = self.query_instruction or given.get("query", QUERY_INSTRUCTIONS.get(self.model_name))
        text = self.text_instruction or (texts[0] if texts else TEXT_INSTRUCTIONS.get(self.model_name))
        if query is None and (self.parity or self.query_instruction is not None):
            query = ""
        if text is None and (self.parity or self.text_instruction is not None):
            text = ""
        resolved = dict(given)
        if query is not None:
            resolved["query"] = query
        if text is not None:
            resolved |= {"text": text} if self.parity else {"text": text, "document": text}
        return resolved

    def _options(self, prompt_name: str | None) -> dict[str, Any]:
        """Options of one core call for what upstream calls prompt "query", "text", or None (no prompt)."""
        if self.parity is not self._exact:
            raise ConfigError(f"parity: set to {self.parity} after construction; construct a new object with it")
        kinds = {} if self.parity else {"query": "query", "text": "document"}
        options: dict[str, Any] = {"kind": kinds.get(prompt_name or "")}
        if options["kind"] is None:
            options["prompt_name"] = prompt_name
        elif self._core.settings.get("prompts", {}).get(options["kind"]) == "":
            options["prompt"] = ""  # sentence-transformers 5 would put the saved prompt in its place
        own = self.query_encode_kwargs if prompt_name == "query" and self.query_encode_kwargs else self.encode_kwargs
        taken = [name for name in own if name in _PER_CALL]
        if taken:
            raise ConfigError(f"encode_kwargs: {taken[0]!r} is no option of the model; see the fields of this class")
        unset = self._batch_size_unset and self.embed_batch_size == DEFAULT_EMBED_BATCH_SIZE
        return {
            **own,
            **options,
            "urgent": prompt_name == "query",  # a question goes before bulk work that waits, with parity too
            "normalize": self.normalize,
            "max_rows": None if unset else self.embed_batch_size,
            "show_progress": self.show_progress_bar,
            "progress": current_progress(),
        }

    def identity(self) -> dict[str, Any]:
        """What decides the embeddings of texts beside the texts; see :meth:`memsafe.Embedder.identity`."""
        return self.embedder.identity(**self._options("text"))

    def _embed(self, inputs: list[str], prompt_name: str | None = None) -> list[Embedding]:
        """Embeddings of `inputs`, in their order, as lists of python floats (32 bytes each, so convert late)."""
        run = self.embedder.run(inputs, **self._options(prompt_name))
        tell(run.report)
        rows: list[Embedding] = run.embeddings.tolist()
        return rows

    async def _aembed(self, inputs: list[str], prompt_name: str | None = None) -> list[Embedding]:
        embedder = await self._core.aget()
        run = await embedder.arun(inputs, **self._options(prompt_name))
        tell(run.report)
        rows = run.embeddings
        embeddings: list[Embedding] = []
        for start in range(0, len(rows), _ROWS_PER_TURN):
            if start:
                await asyncio.sleep(0)
            embeddings.extend(rows[start : start + _ROWS_PER_TURN].tolist())
        return embeddings

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._embed([query], prompt_name="query")[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._embed([text], prompt_name="text")[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._embed(texts, prompt_name="text")

    async def _aget_query_embedding(self, query: str) -> Embedding:
        if is_overridden(self, _OURS, "_embed", "_get_query_embedding"):
            return await in_thread(self._get_query_embedding, query)
        return (await self._aembed([query], prompt_name="query"))[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        if is_overridden(self, _OURS, "_embed", "_get_text_embedding"):
            return await in_thread(self._get_text_embedding, text)
        return (await self._aembed([text], prompt_name="text"))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        if is_overridden(self, _OURS, "_embed", "_get_text_embeddings"):
            return await in_thread(self._get_text_embeddings, texts)
        return await self._aembed(texts, prompt_name="text")

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **kwargs: Any) -> list[Embedding]:
        """As upstream, in one call of the core. `show_progress` shows a bar; other keywords are ignored, as upstream."""
        texts = _checked(texts)

        def compute(num_groups: int) -> list[Embedding]:
            for _ in range(num_groups if self.rate_limiter is not None else 0):
                self.rate_limiter.acquire()  # type: ignore[union-attr]
            with progress_bar(show_progress, len(texts)):
                return (
                    self._get_text_embeddings_cached(texts)
                    if self.embeddings_cache
                    else (self._get_text_embeddings(texts))
                )

        return emit_batch(self, texts, compute)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """As upstream, in one call of the core that never blocks the event loop. ``num_workers`` changes nothing."""
        texts = _checked(texts)
        groups = event_groups(texts, self.embed_batch_size)
        event_ids: list[str] = []
        try:
            await start_batch(self, len(groups), event_ids)
            with progress_bar(show_progress, len(texts)), collected() as reports:
                if self.embeddings_cache:
                    embeddings = await self._aget_text_embeddings_cached(texts)
                else:
                    for _ in range(len(groups) if self.rate_limiter is not None else 0):
                        await self.rate_limiter.async_acquire()  # type: ignore[union-attr]
                    embeddings = await self._aget_text_embeddings(texts) if texts else []
        except BaseException as error:
            fail_batch(self, event_ids, error)
            raise
        await finish_batch(self, texts, embeddings, groups, event_ids, reports)
        return embeddings

    def _get_text_embeddings_cached(self, texts: list[str]) -> list[Embedding]:
        cache: Any = self.embeddings_cache
        work = CachedWork(texts)
        for text in work.distinct:
            work.take(text, cache.get(key=text, collection=COLLECTION))
        for part in work.parts():
            done: Iterable[tuple[str, Embedding]]
            try:
                done = zip(part, self._get_text_embeddings(part), strict=False)
            except InputTooLargeError as error:
                done = work.rescued(error, part)
            for text, embedding in done:
                cache.put(key=text, val=work.add(text, embedding), collection=COLLECTION)
            work.check()
        return work.embeddings()

    async def _aget_text_embeddings_cached(self, texts: list[str]) -> list[Embedding]:
        cache: Any = self.embeddings_cache
        work = CachedWork(texts)
        for number, text in enumerate(work.distinct):
            work.take(text, await cache.aget(key=text, collection=COLLECTION))
            await turn(number)
        for part in work.parts():
            done: Iterable[tuple[str, Embedding]]
            try:
                done = zip(part, await self._aget_text_embeddings(part), strict=False)
            except InputTooLargeError as error:
                done = work.rescued(error, part)
            for number, (text, embedding) in enumerate(done):
                await cache.aput(key=text, val=work.add(text, embedding), collection=COLLECTION)
                await turn(number)
            work.check()
        return work.embeddings()


_OURS = dict(vars(MemsafeEmbedding))


def _checked(texts: Any) -> list[str]:
    if isinstance(texts, (str, bytes)):
        raise InputError(f"texts: got one {type(texts).__name__}; give a list of texts", index=None)
    return list(texts)
