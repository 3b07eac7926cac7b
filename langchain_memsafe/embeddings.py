"""LangChain embeddings that never run out of memory: :class:`MemsafeEmbeddings`."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from langchain_core.embeddings import Embeddings
from pydantic import Field

from langchain_memsafe._callbacks import Reports
from langchain_memsafe._core import CoreModel, is_overridden
from langchain_memsafe._options import all_devices, chosen_device, encode_options, load_options
from memsafe import in_thread

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from memsafe import Embedder

__all__ = ["MemsafeEmbeddings"]

_NUMBERS_AT_ONCE = 1 << 16  # numbers turned into Python floats between two turns of the event loop: about a millisecond


class MemsafeEmbeddings(CoreModel, Embeddings):
    """Embeddings of any sentence-transformers model, with the arguments and numbers of ``HuggingFaceEmbeddings``.

    Every text goes to the core in one call, which plans micro-batches by tokens and by the memory that is free. All
    methods may be called from many threads and tasks at once: they share one model and one memory budget.

    Raises:
        memsafe.ModelError: The model is missing, broken or not a sentence-transformers model.
        pydantic.ValidationError: An unknown field, or a value of the wrong type.

    Example:
        >>> embeddings = MemsafeEmbeddings(model_name="sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> vectors = embeddings.embed_documents(["one text", "another"])  # doctest: +SKIP
    """

    model_name: str = Field(default="sentence-transformers/all-mpnet-base-v2", alias="model")
    """A model on the hub, or a local folder."""

    cache_folder: str | None = None
    """Where downloaded models are kept. None: ``SENTENCE_TRANSFORMERS_HOME``, or the hub's own cache."""

    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``SentenceTransformer``, such as ``device`` (a list uses several), ``prompts``, ``revision``."""

    encode_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``SentenceTransformer.encode``, such as ``normalize_embeddings`` or ``prompt_name``.

    ``batch_size`` caps the rows of a micro-batch; without it the planner decides."""

    query_encode_kwargs: dict[str, Any] = Field(default_factory=dict)
    """As `encode_kwargs`, for queries. If not empty, it replaces `encode_kwargs`: the two are not merged."""

    multi_process: bool = False
    """Use every GPU. As in the class this one replaces, `encode_kwargs` do not apply then; a warning says so."""

    show_progress: bool = False
    """Show a progress bar."""

    max_length: int | None = None
    """Cut texts to this many tokens. None: as the model does."""

    use_saved_prompts: bool = False
    """Use the prompts saved in the model: "query" for queries; "document", "passage" or "corpus" for documents.

    Off by default, because ``HuggingFaceEmbeddings`` does not use them and an index made with it would not match."""

    _built_from: ClassVar[frozenset[str]] = CoreModel._built_from | {"cache_folder", "max_length", "multi_process"}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.model_kwargs.get("backend") == "ipex":
            warnings.warn(
                "`backend='ipex'` is no longer supported; the default `torch` backend will be used instead. Intel GPU "
                "acceleration is natively supported in PyTorch 2.5 and later.",
                UserWarning,
                stacklevel=2,
            )
            self.model_kwargs["backend"] = "torch"
        if self.multi_process and (self.encode_kwargs or self.query_encode_kwargs):
            warnings.warn(
                "multi_process=True ignores encode_kwargs and query_encode_kwargs, as HuggingFaceEmbeddings does. To "
                "have them on several GPUs, leave multi_process out and set model_kwargs={'device': [...]}.",
                UserWarning,
                stacklevel=2,
            )
        self._shared.get(self._build)  # a model that cannot be loaded is refused here, as upstream does

    @property
    def embedder(self) -> Embedder:
        """The core object, for what this interface has no words for: ``embedder.run(texts).report``, ``.dimension``."""
        return cast("Embedder", self._shared.get(self._build))

    @property
    def _client(self) -> SentenceTransformer:
        """The loaded model, under the name that ``HuggingFaceEmbeddings`` keeps it by."""
        return self.embedder.model

    def identity(self, kind: str = "document") -> dict[str, Any]:
        """What decides the embeddings beside the texts; see :meth:`memsafe.Embedder.identity`. kind: or ``"query"``."""
        options = self._query_options(self.embedder) if kind == "query" else self._options(self.encode_kwargs)
        return self.embedder.identity(**options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one embedding per text, in the order of `texts`; ``[]`` for an empty list.

        Raises:
            memsafe.InputError: `texts` is not a list of strings; ``index`` says which one is not.
        """
        run, reports = self.embedder.run(_one_line(texts), **self._options(self.encode_kwargs)), Reports()
        reports(run.report)
        reports.tell()
        return cast("list[list[float]]", run.embeddings.tolist())

    def embed_query(self, text: str) -> list[float]:
        """Return the embedding of `text`.

        Raises:
            memsafe.InputError: `text` is not a string.
        """
        run, reports = self.embedder.run(_one_line([text]), **self._query_options(self.embedder)), Reports()
        reports(run.report)
        reports.tell()
        return cast("list[float]", run.embeddings[0].tolist())

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As :meth:`embed_documents`; the event loop stays free, and cancelling the task cancels the work."""
        if is_overridden(self, _embed_documents, "embed_documents"):
            return await in_thread(self.embed_documents, texts)
        embedder = await self._shared.aget(self._build)
        run, reports = await embedder.arun(_one_line(texts), **self._options(self.encode_kwargs)), Reports()
        reports(run.report)
        await reports.atell()
        return await _to_lists(run.embeddings)

    async def aembed_query(self, text: str) -> list[float]:
        """As :meth:`embed_query`; the event loop stays free, and cancelling the task cancels the work."""
        if is_overridden(self, _embed_query, "embed_query"):
            return await in_thread(self.embed_query, text)
        embedder = await self._shared.aget(self._build)
        run, reports = await embedder.arun(_one_line([text]), **self._query_options(embedder)), Reports()
        reports(run.report)
        await reports.atell()
        return cast("list[float]", run.embeddings[0].tolist())

    def _build(self) -> Embedder:
        from memsafe import Embedder  # brings torch: not needed to import this module

        options = load_options(self.model_kwargs, taken=("cache_folder", "max_length"))
        device = chosen_device(self.encode_kwargs, self.query_encode_kwargs, self.model_kwargs)
        self._shared.device = all_devices(device) if self.multi_process else device
        return Embedder(
            self.model_name,
            **{**options, "device": self._shared.device},
            dtype=self.dtype,
            max_length=self.max_length,
            cache_folder=self.cache_folder,
            memory=self.memory,
            hooks=self.hooks,
        )

    def _options(self, encode_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Options of ``Embedder.run``. Without a kind, ``run`` does as ``SentenceTransformer.encode`` does."""
        options: dict[str, Any] = {"kind": "document" if self.use_saved_prompts else None}
        if self.multi_process:
            return {**options, "show_progress": False}
        options |= encode_options(encode_kwargs, device=self._shared.device, model=self._client)
        return {**options, "show_progress": self.show_progress}

    def _query_options(self, embedder: Embedder) -> dict[str, Any]:
        """Options of ``Embedder.run`` for a query: `query_encode_kwargs` as a whole, or `encode_kwargs`."""
        options = self._options(self.query_encode_kwargs if len(self.query_encode_kwargs) > 0 else self.encode_kwargs)
        return {**options, "kind": "query" if self.use_saved_prompts else None, "urgent": True}


# As they are here: a test that patches the class is obeyed too.
_embed_documents, _embed_query = MemsafeEmbeddings.embed_documents, MemsafeEmbeddings.embed_query


def _one_line(texts: Any) -> Any:
    """Upstream's rule: a line break becomes a space. What is not a list of strings is left for the core to refuse."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        return texts
    return [text.replace("\n", " ") if isinstance(text, str) else text for text in texts]


async def _to_lists(embeddings: np.ndarray) -> list[list[float]]:
    """``embeddings.tolist()``, letting the event loop run in between: millions of floats take seconds."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, embeddings.shape[-1]))
    rows: list[list[float]] = []
    for start in range(0, len(embeddings), step):
        rows.extend(embeddings[start : start + step].tolist())
        await asyncio.sleep(0)
    return rows
