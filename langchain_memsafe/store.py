"""``MemsafeByteStore``: embeddings kept between runs, for ``CacheBackedEmbeddings``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from typing import Any

from langchain_core.stores import ByteStore

from langchain_memsafe.embeddings import MemsafeEmbeddings
from memsafe import CacheFile, ConfigError

__all__ = ["MemsafeByteStore"]

_KEYS_AT_ONCE = 500


class MemsafeByteStore(ByteStore):
    """A ``ByteStore`` in a sqlite file.

    With `embeddings`, only what that model computed, with its prompt, normalisation and dimension, is ever found, whatever
    namespace is chosen::

        embeddings = MemsafeEmbeddings(model_name="BAAI/bge-m3")
        cached = CacheBackedEmbeddings.from_bytes_store(embeddings, MemsafeByteStore("cache.db", embeddings))

    Args:
        path: the file; the same one serves several models, and LlamaIndex (``llama_index_memsafe.MemsafeKVStore``).
        embeddings: whose rows these are; None for bytes of any other kind.
        kind: ``"document"``, or ``"query"`` for a ``query_embedding_cache`` of its own: one text may have two embeddings.

    Raises:
        memsafe.StoreError: the file cannot be used.
    """

    def __init__(
        self, path: str | os.PathLike[str], embeddings: MemsafeEmbeddings | None = None, *, kind: str = "document"
    ) -> None:
        if kind not in ("document", "query"):
            raise ConfigError(f"kind: got {kind!r}; choose 'document' or 'query'")
        scope: Any = "langchain"
        if embeddings is not None:
            scope = {"langchain": embeddings.identity(kind)}
        self._file = CacheFile(path, scope)

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key, None where there is none."""
        return self._file.get(list(keys))

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Keep these values."""
        self._file.set(key_value_pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Forget these keys."""
        self._file.delete(list(keys))

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """All keys that begin with `prefix`."""
        return (key for key, _ in self._file.items(prefix or ""))

    # in threads of the file's own, so that the event loop stays free while the disk is waited for

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        """:meth:`mget` for asyncio."""
        return await self._file.in_thread(self.mget, keys)

    async def amset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """:meth:`mset` for asyncio."""
        await self._file.in_thread(self.mset, key_value_pairs)

    async def amdelete(self, keys: Sequence[str]) -> None:
        """:meth:`mdelete` for asyncio."""
        await self._file.in_thread(self.mdelete, keys)

    async def ayield_keys(self, *, prefix: str | None = None) -> AsyncIterator[str]:
        """:meth:`yield_keys` for asyncio."""
        keys = iter(self.yield_keys(prefix=prefix))
        while some := await self._file.in_thread(lambda: list(islice(keys, _KEYS_AT_ONCE))):
            for key in some:
                yield key
