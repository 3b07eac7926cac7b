"""Embedding and reranking inside the memory that is really there. Importing this does not import torch."""

from __future__ import annotations

from memsafe.config import GiB, MemoryPolicy, MiB
from memsafe.embedder import Embedder, EmbeddingRun
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
    ModelTooLargeError,
    RecoveryExhaustedError,
    StoreError,
)
from memsafe.events import Event, EventHook, RunReport
from memsafe.reranker import RankedDocument, Reranker, RerankRun

__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ConfigError",
    "Embedder",
    "EmbeddingRun",
    "Event",
    "EventHook",
    "GiB",
    "InputError",
    "InputTooLargeError",
    "MemoryPolicy",
    "MemsafeError",
    "MiB",
    "MissingExtraError",
    "ModelError",
    "ModelTooLargeError",
    "RankedDocument",
    "RecoveryExhaustedError",
    "RerankRun",
    "Reranker",
    "RunReport",
    "StoreError",
    "__version__",
]
