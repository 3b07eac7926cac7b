"""Several outputs of one pass: dense rows, weights of words and a vector for every token, as BGE-M3 gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError
from memsafe.events import EventHook, RunReport
from memsafe.multi_vector import checked_precision
from memsafe.ragged import RaggedArray
from memsafe.texts import TextModel

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["HybridEmbedder", "HybridRun"]

OUTPUTS = ("dense", "sparse", "multi_vector")


@dataclass(frozen=True)
class HybridRun:
    """In the caller's order, None for what was not asked for. dense: float32, shape (texts, dim), of length 1. sparse:
    ``scipy.sparse.csr_array`` of float32, shape (texts, vocabulary). multi_vector: a row of vectors for each text. report:
    what it took."""

    dense: NDArray[np.float32] | None
    sparse: csr_array | None
    multi_vector: RaggedArray | None
    report: RunReport


class HybridEmbedder(TextModel[HybridRun]):
    """Embeds texts with BGE-M3 and its kin: every output of one pass, inside the memory that is really there.

    Numbers are those of FlagEmbedding's ``BGEM3FlagModel.encode``: ``dense_vecs``, ``lexical_weights`` and ``colbert_vecs``.

    Args:
        model: folder, or hub id such as ``"BAAI/bge-m3"``, with ``sparse_linear.pt`` and ``colbert_linear.pt``.
        outputs: which of ``"dense"``, ``"sparse"``, ``"multi_vector"``.
        precision: of the vectors of tokens: ``"float32"``, or ``"float16"``, which halves what is kept of them.
        device, dtype, max_length, memory, hooks, show_progress: as for :class:`memsafe.Embedder`.
        options: whatever else the installed SentenceTransformer takes.
    """

    _kind = "hybrid"

    def __init__(
        self,
        model: Any,
        *,
        outputs: Sequence[str] = OUTPUTS,
        device: Any = None,
        dtype: Any = None,
        max_length: int | None = None,
        precision: str = "float32",
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        show_progress: bool = False,
        **options: Any,
    ) -> None:
        self._settings = {
            **options,
            "model": model,
            "outputs": outputs,
            "device": device,
            "dtype": dtype,
            "max_length": max_length,
            "precision": precision,
            "memory": memory,
            "hooks": hooks,
            "show_progress": show_progress,
        }
        given = tuple(outputs) if isinstance(outputs, (list, tuple)) else ()
        if not given or len(set(given)) < len(given) or not set(given) <= set(OUTPUTS):
            raise ConfigError(f"outputs: got {outputs!r}; give a tuple of some of {', '.join(OUTPUTS)}, each once")
        self._outputs, self._precision = given, checked_precision(precision)
        super().__init__(
            model,
            device,
            dtype=dtype,
            max_length=max_length,
            memory=memory,
            hooks=hooks,
            options=options,
            outputs=given,
        )
        self._show_progress = show_progress

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a run gives."""
        return self._outputs

    def embed_documents(self, texts: Sequence[str], **options: Any) -> HybridRun:
        """Every output of `texts` as documents. Options as for :meth:`run`."""
        return self.run(texts, kind="document", **options)

    def embed_queries(self, texts: Sequence[str], **options: Any) -> HybridRun:
        """Every output of `texts` as queries, which overtake documents that wait."""
        return self.run(texts, kind="query", **options)

    async def aembed_documents(self, texts: Sequence[str], **options: Any) -> HybridRun:
        """:meth:`embed_documents` for asyncio."""
        return await self.arun(texts, kind="document", **options)

    async def aembed_queries(self, texts: Sequence[str], **options: Any) -> HybridRun:
        """:meth:`embed_queries` for asyncio."""
        return await self.arun(texts, kind="query", **options)

    def _keep(self, options: dict[str, Any]) -> Callable[[Any], Any] | None:
        return None if self._precision == "float32" else partial(_kept, precision=self._precision)

    def _finish(self, rows: Any, report: RunReport) -> HybridRun:
        if rows is None:
            some = self.run(["a"])
            none = np.zeros(0, np.int64)
            every: Any = (some.dense, some.sparse, some.multi_vector)
            dense, sparse, vectors = (None if each is None else each[none] for each in every)
            return HybridRun(dense, sparse, vectors, report)
        named = rows.named if hasattr(rows, "named") else {self._outputs[0]: rows}
        return HybridRun(named.get("dense"), named.get("sparse"), named.get("multi_vector"), report)


def _kept(rows: Any, *, precision: str) -> Any:
    """`rows` with the vectors of tokens in `precision`."""
    if hasattr(rows, "named"):
        return type(rows)({name: _kept(each, precision=precision) for name, each in rows.named.items()})
    return RaggedArray(rows.values.astype(precision), rows.offsets) if isinstance(rows, RaggedArray) else rows
