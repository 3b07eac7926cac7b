"""chroma_memsafe: Chroma's own function's rows, in collections that open again, with a configuration that JSON holds."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsafe import ConfigError, InputError, MemoryPolicy, ModelError
from tests.tiny_models import save_embedder

chromadb = pytest.importorskip("chromadb", reason="chromadb is not installed")

from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction  # noqa: E402 - after the skip

from chroma_memsafe import MemsafeEmbeddingFunction  # noqa: E402

TEXTS = [f"passage {number} about {topic}" for number in range(4) for topic in ("cranes", "rivers", "bread")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    prompts = {"query": "find: ", "document": "read: "}
    return str(save_embedder(tmp_path_factory.mktemp("tiny") / "model", prompts=prompts, num_layers=1))


@pytest.mark.parametrize("options", [{}, {"normalize_embeddings": True}, {"truncate_dim": 8}], ids=str)
def test_rows_are_those_of_the_replaced_class(folder: str, options: dict[str, Any]) -> None:
    """The same constructor, the same list of float32 arrays, for documents and for queries."""
    ours = MemsafeEmbeddingFunction(folder, "cpu", **options)
    SentenceTransformerEmbeddingFunction.models.clear()  # it keeps models by name, whatever their options
    theirs = SentenceTransformerEmbeddingFunction(folder, "cpu", **options)
    for found, wanted in ((ours(TEXTS), theirs(TEXTS)), (ours.embed_query(TEXTS[:1]), theirs.embed_query(TEXTS[:1]))):
        assert [(type(row), row.dtype) for row in found] == [(type(row), row.dtype) for row in wanted]
        np.testing.assert_allclose(np.stack(found), np.stack(wanted), rtol=0, atol=1e-5)
    assert ours.default_space() == theirs.default_space() and ours.supported_spaces() == theirs.supported_spaces()


def test_a_collection_opens_again(folder: str, tmp_path: Path) -> None:
    """Whoever imports the package gets a collection's function back, by its name and configuration, and finds."""
    made = chromadb.PersistentClient(str(tmp_path / "a")).create_collection(
        "passages", embedding_function=MemsafeEmbeddingFunction(folder, use_saved_prompts=True)
    )
    made.add(ids=[str(place) for place in range(len(TEXTS))], documents=TEXTS)
    again = chromadb.PersistentClient(str(tmp_path / "a")).get_collection("passages")
    function = again.configuration["embedding_function"]
    assert isinstance(function, MemsafeEmbeddingFunction) and function.use_saved_prompts and not function.is_legacy()
    found = again.query(query_texts=[TEXTS[5]], n_results=len(TEXTS), include=["distances"])
    rows = function.embedder.embed_documents(TEXTS)
    query = function.embedder.embed_queries([TEXTS[5]])[0]
    distances = 1 - rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    np.testing.assert_allclose(sorted(distances), found["distances"][0], rtol=0, atol=1e-5)


def test_configuration(folder: str) -> None:
    """It is JSON, holds what decides rows and nothing of the machine, and makes the same function, over the same model."""
    function = MemsafeEmbeddingFunction(folder, max_length=7, memory=MemoryPolicy(limit="1GiB"), truncate_dim=8)
    config = json.loads(json.dumps(function.get_config()))
    assert "memory" not in config and config["kwargs"] == {"truncate_dim": 8} and config["max_length"] == 7
    again = MemsafeEmbeddingFunction.build_from_config(config)
    assert again.get_config() == function.get_config()
    assert MemsafeEmbeddingFunction.build_from_config(config).embedder is again.embedder
    assert again.embedder is not function.embedder  # which has a limit
    assert pickle.loads(pickle.dumps(function)).embedder is function.embedder


def test_what_is_refused(folder: str) -> None:
    """By errors of ours that are ValueErrors, as upstream's."""
    with pytest.raises(ConfigError, match="colour is not a primitive type"):
        MemsafeEmbeddingFunction(folder, colour=object())
    with pytest.raises(ConfigError, match="unknown option 'shape'"):
        MemsafeEmbeddingFunction.validate_config({"model_name": folder, "shape": 1})
    with pytest.raises(ConfigError, match="no model_name"):
        MemsafeEmbeddingFunction.build_from_config({})
    with pytest.raises(ModelError):
        MemsafeEmbeddingFunction("nowhere/at-all")
    with pytest.raises(InputError, match="input 1 is a int"):
        MemsafeEmbeddingFunction(folder)(["a", 7])  # type: ignore[list-item]
