"""memsafe for Chroma: :class:`MemsafeEmbeddingFunction`. Importing this registers it, so that collections made with it open again."""

from __future__ import annotations

try:
    import chromadb as _chromadb
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("chromadb"):
        raise
    from memsafe import MissingExtraError

    raise MissingExtraError('chromadb is not installed; run: pip install "memsafe[chroma]"', name="chromadb") from error

from chroma_memsafe.embedding import MemsafeEmbeddingFunction

del _chromadb

__all__ = ["MemsafeEmbeddingFunction"]
