"""memsafe for Haystack: :class:`MemsafeTextEmbedder`, :class:`MemsafeDocumentEmbedder`, :class:`MemsafeRanker`."""

from __future__ import annotations

try:
    import haystack as _haystack
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("haystack"):
        raise
    from memsafe import MissingExtraError

    raise MissingExtraError(
        'haystack-ai is not installed; run: pip install "memsafe[haystack]"', name="haystack"
    ) from error

from haystack_memsafe.embedders import MemsafeDocumentEmbedder, MemsafeTextEmbedder
from haystack_memsafe.ranker import MemsafeRanker

del _haystack

__all__ = ["MemsafeDocumentEmbedder", "MemsafeRanker", "MemsafeTextEmbedder"]
