"""Embedding and reranking inside the memory that is really there.

    from memsafe import Embedder, MemoryPolicy, Reranker

    embedder = Embedder("BAAI/bge-m3")                # a hub id, a local folder, or a loaded SentenceTransformer
    rows = embedder.embed_documents(texts)            # float32, shape (len(texts), dim), in the order of the texts
    run = embedder.run(texts)                         # run.embeddings, and run.report: bytes, tokens, seconds

    reranker = Reranker("BAAI/bge-reranker-v2-m3", memory=MemoryPolicy(limit="6GiB"))
    best = reranker.rerank("a question", texts, top_n=3)

    print(advise("BAAI/bge-m3", device_memory="16GiB"))   # will it fit, and with which settings: before anything is loaded

Start with help(memsafe.Embedder), help(memsafe.Reranker) and help(memsafe.MemoryPolicy); every error is a MemsafeError that
names its remedy. Importing this imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memsafe.config import GiB, MemoryPolicy, MiB
from memsafe.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ConfigError,
    InputError,
    InputTooLargeError,
    MemsafeError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
    ModelTooLargeError,
    StoreError,
)
from memsafe.events import Event, EventHook, RunReport

if TYPE_CHECKING:
    from memsafe.advice import Advice, advise
    from memsafe.calls import in_thread as in_thread
    from memsafe.corpus import CorpusProgress, CorpusReport, Neighbours, Store, embed_corpus, open_store
    from memsafe.embedder import Embedder, EmbeddingRun
    from memsafe.handle import EmbedBatches, PerProcess, embed_ray_dataset
    from memsafe.hybrid import HybridEmbedder, HybridRun
    from memsafe.multi_vector import LateInteractionReranker, MultiVectorEmbedder, MultiVectorRun
    from memsafe.ragged import RaggedArray
    from memsafe.recording import Recording
    from memsafe.reranker import RankedDocument, Reranker, RerankRun
    from memsafe.runtimes import Quantization
    from memsafe.similarity import maxsim
    from memsafe.sparse import SparseEmbedder, SparseRun
    from memsafe.stores.cache import CacheFile

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "BusyError",
    "CacheFile",
    "CancelledError",
    "ClosedError",
    "ConfigError",
    "CorpusProgress",
    "CorpusReport",
    "EmbedBatches",
    "Embedder",
    "EmbeddingRun",
    "Event",
    "EventHook",
    "GiB",
    "HybridEmbedder",
    "HybridRun",
    "InputError",
    "InputTooLargeError",
    "LateInteractionReranker",
    "MemoryPolicy",
    "MemsafeError",
    "MiB",
    "MissingExtraError",
    "ModelError",
    "ModelNotFoundError",
    "ModelTooLargeError",
    "MultiVectorEmbedder",
    "MultiVectorRun",
    "Neighbours",
    "PerProcess",
    "Quantization",
    "RaggedArray",
    "RankedDocument",
    "Recording",
    "RerankRun",
    "Reranker",
    "RunReport",
    "SparseEmbedder",
    "SparseRun",
    "Store",
    "StoreError",
    "__version__",
    "advise",
    "embed_corpus",
    "embed_ray_dataset",
    "maxsim",
    "open_store",
]

_LATER = {"Embedder": "embedder", "EmbeddingRun": "embedder"}
_LATER |= {"Advice": "advice", "advise": "advice"}
_LATER |= dict.fromkeys(
    ("CorpusProgress", "CorpusReport", "Neighbours", "Store", "embed_corpus", "open_store"), "corpus"
)
_LATER |= {"in_thread": "calls"}  # no public name: for the adapters, which come in by this door only
_LATER |= {"CacheFile": "stores.cache", **dict.fromkeys(("EmbedBatches", "PerProcess", "embed_ray_dataset"), "handle")}
_LATER |= {"Recording": "recording"}
_LATER |= {"RankedDocument": "reranker", "RerankRun": "reranker", "Reranker": "reranker"}
_LATER |= {"SparseEmbedder": "sparse", "SparseRun": "sparse", "HybridEmbedder": "hybrid", "HybridRun": "hybrid"}
_LATER |= dict.fromkeys(("LateInteractionReranker", "MultiVectorEmbedder", "MultiVectorRun"), "multi_vector")
_LATER |= {"Quantization": "runtimes"}
_LATER |= {"RaggedArray": "ragged", "maxsim": "similarity"}


def __getattr__(name: str) -> Any:
    """What brings numpy and asyncio is imported when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
