"""A LangChain cross-encoder that never runs out of memory: :class:`MemsafeCrossEncoder`."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from langchain_memsafe._callbacks import Reports
from langchain_memsafe._core import is_overridden
from langchain_memsafe._reranking import RerankerModel, relevance
from memsafe import in_thread

if TYPE_CHECKING:
    from langchain_core.cross_encoders import BaseCrossEncoder

    from memsafe import Reranker

__all__ = ["MemsafeCrossEncoder"]

# Newest first. Before langchain-core had the interface, `langchain` (0.x) and `langchain-classic` (1.0) each held one.
_HOMES = (
    "langchain_core.cross_encoders",
    "langchain_classic.retrievers.document_compressors.cross_encoder",
    "langchain.retrievers.document_compressors.cross_encoder",
)


def _interface() -> Any:
    for home in _HOMES:
        try:
            return importlib.import_module(home).BaseCrossEncoder
        except ImportError:
            continue

    class BaseCrossEncoder(ABC):
        """Interface for cross encoder models, where no LangChain package has one."""

        @abstractmethod
        def score(self, text_pairs: list[tuple[str, str]]) -> list[float]: ...

    return BaseCrossEncoder


if not TYPE_CHECKING:
    BaseCrossEncoder = _interface()


class MemsafeCrossEncoder(RerankerModel, BaseCrossEncoder):
    """Scores pairs of texts, with the arguments and numbers of ``HuggingFaceCrossEncoder``.

    For ``CrossEncoderReranker(model=MemsafeCrossEncoder(...))``; :class:`MemsafeRerank` does both in one and is also
    asynchronous.

    Raises:
        memsafe.ModelError: The model is missing, broken or not a cross-encoder.
        pydantic.ValidationError: An unknown field, or a value of the wrong type.
    """

    client: Any = None
    """The loaded ``CrossEncoder``. None in an unpickled copy until it first scores."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _accept_in_other_homes()

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return a score per pair, higher is more relevant: float32 array ``(n,)``, as upstream returns.

        With more than one label it is the second label's.

        Raises:
            memsafe.InputError: An entry is not a pair of strings; ``index`` says which.
        """
        reranker = self.reranker
        reports = Reports()
        scores = reranker.score_pairs(text_pairs, **self._options(reranker), on_report=reports)
        reports.tell()
        return cast("list[float]", relevance(scores))

    async def ascore(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """As :meth:`score`; the event loop stays free, and cancelling the task cancels the work."""
        if is_overridden(self, _score, "score"):
            return await in_thread(self.score, text_pairs)
        reranker = await self._shared.aget(self._build)
        reports = Reports()
        scores = await reranker.ascore_pairs(text_pairs, **self._options(reranker), on_report=reports)
        await reports.atell()
        return cast("list[float]", relevance(scores))

    def _build(self) -> Reranker:
        reranker = super()._build()
        self.client = reranker.model
        return reranker

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "client": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> MemsafeCrossEncoder:
        memo = {} if memo is None else memo
        memo[id(self.client)] = self.client  # copies share the weights
        return super().__deepcopy__(memo)


_score = MemsafeCrossEncoder.score


def _accept_in_other_homes() -> None:
    """Pass ``isinstance`` for the interface of an older package that is loaded beside a newer langchain-core."""
    for home in _HOMES:
        other = getattr(sys.modules.get(home), "BaseCrossEncoder", None)
        if other is not None and not issubclass(MemsafeCrossEncoder, other):
            other.register(MemsafeCrossEncoder)
