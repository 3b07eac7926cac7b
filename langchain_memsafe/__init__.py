"""memsafe for LangChain: :class:`MemsafeEmbeddings`, :class:`MemsafeRerank`, :class:`MemsafeCrossEncoder`, :class:`MemsafeByteStore`."""

from __future__ import annotations

try:
    import langchain_core as _langchain_core
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("langchain_core"):
        raise
    from memsafe import MissingExtraError

    raise MissingExtraError(
        'langchain-core is not installed; run: pip install "memsafe[langchain]"', name="langchain_core"
    ) from error

from langchain_memsafe.cross_encoder import MemsafeCrossEncoder
from langchain_memsafe.embeddings import MemsafeEmbeddings
from langchain_memsafe.rerank import MemsafeRerank
from langchain_memsafe.store import MemsafeByteStore

del _langchain_core

__all__ = ["MemsafeByteStore", "MemsafeCrossEncoder", "MemsafeEmbeddings", "MemsafeRerank"]
