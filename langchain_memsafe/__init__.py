"""memsafe for LangChain: :class:`MemsafeEmbeddings`, :class:`MemsafeRerank` and :class:`MemsafeCrossEncoder`."""

try:
    import langchain_core  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "langchain_core":
        raise
    from memsafe import MissingExtraError

    raise MissingExtraError("langchain_memsafe needs langchain-core: pip install 'memsafe[langchain]'") from error

from langchain_memsafe.cross_encoder import MemsafeCrossEncoder
from langchain_memsafe.embeddings import MemsafeEmbeddings
from langchain_memsafe.rerank import MemsafeRerank

__all__ = ["MemsafeCrossEncoder", "MemsafeEmbeddings", "MemsafeRerank"]
