"""memsafe for LlamaIndex: :class:`MemsafeEmbedding` and :class:`MemsafeRerank`, two lines to change in a pipeline."""

from __future__ import annotations

try:
    import llama_index.core as _llama_index_core
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("llama_index"):
        raise
    from memsafe import MissingExtraError

    raise MissingExtraError(
        'llama-index-core is not installed; run: pip install "memsafe[llama-index]"', name="llama_index"
    ) from error

from llama_index_memsafe.embedding import MemsafeEmbedding
from llama_index_memsafe.kvstore import MemsafeKVStore
from llama_index_memsafe.rerank import MemsafeRerank

del _llama_index_core

__all__ = ["MemsafeEmbedding", "MemsafeKVStore", "MemsafeRerank"]
