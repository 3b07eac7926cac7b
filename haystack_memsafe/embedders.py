"""Haystack embedders that never run out of memory: :class:`MemsafeTextEmbedder`, :class:`MemsafeDocumentEmbedder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from haystack import Document, component
from haystack.utils import ComponentDevice, Secret

from haystack_memsafe._component import MemsafeComponent, WrongInputError, check_documents, texts_of
from memsafe import ConfigError, Embedder, EventHook, MemoryPolicy, in_thread

__all__ = ["MemsafeDocumentEmbedder", "MemsafeTextEmbedder"]

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
_TOKEN = Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False)
_RENAMED = {"normalize_embeddings": "normalize", "batch_size": "max_rows", "show_progress_bar": "show_progress"}
_REFUSED = ("convert_to_numpy", "convert_to_tensor", "device", "output_value", "pool")


class _Embedding(MemsafeComponent[Embedder]):
    """What both embedders do."""

    prefix: str
    suffix: str
    progress_bar: bool
    normalize_embeddings: bool
    truncate_dim: int | None
    precision: str
    encode_kwargs: dict[str, Any] | None
    quantization_ranges: list[list[float]] | None
    local_files_only: bool

    @property
    def embedder(self) -> Embedder:
        """The core object that does the work; loaded on first use."""
        return self._core.get(self._build)

    def _build(self) -> Embedder:
        return Embedder(**self._resolved())

    def _settings(self) -> dict[str, Any]:
        own = {"local_files_only": self.local_files_only, "truncate_dim": self.truncate_dim}
        return {**super()._settings(), **own}

    def _checked_options(self) -> None:
        for name in _REFUSED:
            if name in (self.encode_kwargs or {}):
                raise ConfigError(f"encode_kwargs: {name!r} cannot be had here; a component gives lists of numbers")

    def _options(self) -> dict[str, Any]:
        """Of ``Embedder.run``. Without a kind it does as ``SentenceTransformer.encode``, which upstream calls."""
        options: dict[str, Any] = {"max_rows": self.batch_size, "show_progress": self.progress_bar}
        options |= {"normalize": self.normalize_embeddings, "precision": self.precision}
        if self._ranged:
            options["precision"] = "float32"
        return options | {_RENAMED.get(name, name): value for name, value in (self.encode_kwargs or {}).items()}

    @property
    def _ranged(self) -> bool:
        return self.quantization_ranges is not None and self.precision in ("int8", "uint8")

    def _lists(self, rows: Any) -> list[list[float]]:
        if self._ranged:
            from sentence_transformers import quantize_embeddings

            ranges = np.asarray(self.quantization_ranges)
            rows = quantize_embeddings(rows, precision=self.precision, ranges=ranges)
        lists: list[list[float]] = rows.tolist()
        return lists


@component
class MemsafeTextEmbedder(_Embedding):
    """Drop-in for Haystack's SentenceTransformersTextEmbedder: a query to its embedding, with the same numbers.

    Args:
        batch_size: the most texts in a micro-batch; None, the default, leaves it to the planner.
        memory: a ``MemoryPolicy``, or a dict of its fields; dtype, hooks: as for :class:`memsafe.Embedder`.
        model, device, ...: all others as upstream.

    Raises:
        memsafe.ConfigError: an option cannot be used. When used: what :class:`memsafe.Embedder` raises.
    """

    def __init__(
        self,
        *,
        model: str = "sentence-transformers/all-mpnet-base-v2",
        device: ComponentDevice | None = None,
        token: Secret | None = _TOKEN,
        prefix: str = "",
        suffix: str = "",
        batch_size: int | None = None,
        progress_bar: bool = True,
        normalize_embeddings: bool = False,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        truncate_dim: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        precision: Precision = "float32",
        encode_kwargs: dict[str, Any] | None = None,
        backend: Literal["torch", "onnx", "openvino"] = "torch",
        revision: str | None = None,
        quantization_ranges: list[list[float]] | None = None,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        dtype: str | None = None,
        hooks: Sequence[EventHook] = (),
    ) -> None:
        given = dict(locals())
        self._take({name: value for name, value in given.items() if name not in ("self", "__class__")})
        self._checked_options()

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """``{"embedding": [...]}`` of `text`, which overtakes documents that wait. Raises :class:`memsafe.InputError` for no str."""
        rows = self.embedder.run([self._text(text)], urgent=True, **self._options()).embeddings
        return {"embedding": self._lists(rows)[0]}

    @component.output_types(embedding=list[float])
    async def run_async(self, text: str) -> dict[str, Any]:
        """:meth:`run` for asyncio; cancelling the task cancels the work."""
        given = self._text(text)
        embedder = await self._core.aget(self._build)
        run = await embedder.arun([given], urgent=True, **self._options())
        return {"embedding": self._lists(run.embeddings)[0]}

    def _text(self, text: Any) -> str:
        if not isinstance(text, str):
            raise WrongInputError(
                f"text: got a {type(text).__name__}; give one str, or Documents to MemsafeDocumentEmbedder", index=None
            )
        return self.prefix + text + self.suffix


@component
class MemsafeDocumentEmbedder(_Embedding):
    """Drop-in for Haystack's SentenceTransformersDocumentEmbedder: documents with their embeddings, in their order.

    The documents that are returned are copies. Args and errors: as for :class:`MemsafeTextEmbedder`, and

    Args:
        meta_fields_to_embed, embedding_separator: as upstream.
    """

    def __init__(
        self,
        *,
        model: str = "sentence-transformers/all-mpnet-base-v2",
        device: ComponentDevice | None = None,
        token: Secret | None = _TOKEN,
        prefix: str = "",
        suffix: str = "",
        batch_size: int | None = None,
        progress_bar: bool = True,
        normalize_embeddings: bool = False,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        truncate_dim: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        precision: Precision = "float32",
        encode_kwargs: dict[str, Any] | None = None,
        backend: Literal["torch", "onnx", "openvino"] = "torch",
        revision: str | None = None,
        quantization_ranges: list[list[float]] | None = None,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        dtype: str | None = None,
        hooks: Sequence[EventHook] = (),
    ) -> None:
        given = dict(locals())
        self._take({name: value for name, value in given.items() if name not in ("self", "__class__")})
        self._checked_options()

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """``{"documents": [...]}``: copies with embeddings. Raises :class:`memsafe.InputError` for what is no list of documents."""
        texts = texts_of(check_documents(documents), self, self.prefix, self.suffix)
        return self._embedded(documents, self.embedder.run(texts, **self._options()).embeddings)

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, list[Document]]:
        """:meth:`run` for asyncio; cancelling the task cancels the work."""
        texts = texts_of(check_documents(documents), self, self.prefix, self.suffix)
        embedder = await self._core.aget(self._build)
        run = await embedder.arun(texts, **self._options())
        return await in_thread(self._embedded, documents, run.embeddings)

    def _embedded(self, documents: list[Document], rows: Any) -> dict[str, list[Document]]:
        lists = self._lists(rows) if documents else []
        return {"documents": [replace(each, embedding=row) for each, row in zip(documents, lists, strict=True)]}
