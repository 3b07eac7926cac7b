"""``MemsafeKVStore``: embeddings kept between runs, for ``embeddings_cache`` and ``IngestionCache``."""

from __future__ import annotations

import json
import os
from typing import Any

from llama_index.core.storage.kvstore.types import DEFAULT_BATCH_SIZE, DEFAULT_COLLECTION, BaseKVStore

from llama_index_memsafe.embedding import MemsafeEmbedding
from memsafe import CacheFile

__all__ = ["MemsafeKVStore"]


class MemsafeKVStore(BaseKVStore):
    """A ``BaseKVStore`` in a sqlite file.

    With `embed_model`, only what that model computed, with its prompt, normalisation and dimension, is ever found::

        embed_model = MemsafeEmbedding("BAAI/bge-m3")
        embed_model.embeddings_cache = MemsafeKVStore("cache.db", embed_model)
        pipeline = IngestionPipeline(transformations=[..., embed_model], cache=IngestionCache(cache=MemsafeKVStore("cache.db")))

    An ``IngestionCache`` needs no `embed_model`: its keys hold the configuration of each transformation. LlamaIndex looks up
    queries in ``embeddings_cache`` too, by their text alone; where the model has a query prompt, give queries an object without.

    Args:
        path: the file; the same one serves several models, and LangChain (``langchain_memsafe.MemsafeByteStore``).
        embed_model: whose rows these are; None for values of any other kind.

    Raises:
        memsafe.StoreError: the file cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], embed_model: MemsafeEmbedding | None = None) -> None:
        self._path = os.fspath(path)
        self._scope = None if embed_model is None else embed_model.identity()
        self._files: dict[str, CacheFile] = {}

    def _file(self, collection: str) -> CacheFile:
        if collection not in self._files:
            self._files[collection] = CacheFile(self._path, {"llama_index": [self._scope, collection]})
        return self._files[collection]

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Keep `val`, which JSON must be able to hold."""
        self.put_all([(key, val)], collection)

    def put_all(
        self,
        kv_pairs: list[tuple[str, dict[str, Any]]],
        collection: str = DEFAULT_COLLECTION,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        """Keep several values, in one transaction whatever `batch_size` says."""
        self._file(collection).set((key, json.dumps(val).encode()) for key, val in kv_pairs)

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """The value of `key`, or None."""
        (value,) = self._file(collection).get([key])
        return None if value is None else json.loads(value)

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """All values, by key."""
        return {key: json.loads(value) for key, value in self._file(collection).items()}

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Forget `key`; whether it was there."""
        return self._file(collection).delete([key]) > 0

    # in a thread, so that the event loop stays free while the disk is waited for

    async def aput(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """:meth:`put` for asyncio."""
        await self._file(collection).in_thread(self.put, key, val, collection)

    async def aput_all(
        self,
        kv_pairs: list[tuple[str, dict[str, Any]]],
        collection: str = DEFAULT_COLLECTION,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        """:meth:`put_all` for asyncio."""
        await self._file(collection).in_thread(self.put_all, kv_pairs, collection)

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """:meth:`get` for asyncio."""
        return await self._file(collection).in_thread(self.get, key, collection)

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """:meth:`get_all` for asyncio."""
        return await self._file(collection).in_thread(self.get_all, collection)

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """:meth:`delete` for asyncio."""
        return await self._file(collection).in_thread(self.delete, key, collection)
