"""haystack_memsafe: numbers, orders, documents and serialised pipelines are those of Haystack's own components."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import numpy as np
import pytest

from memsafe import ConfigError, InputError, MemoryPolicy
from tests.tiny_models import save_embedder, save_reranker

haystack = pytest.importorskip("haystack", reason="haystack-ai is not installed")

from haystack import Document, Pipeline  # noqa: E402 - after the skip
from haystack.utils import ComponentDevice, Secret  # noqa: E402

from haystack_memsafe import MemsafeDocumentEmbedder, MemsafeRanker, MemsafeTextEmbedder  # noqa: E402

CPU = ComponentDevice.from_str("cpu")
TEXTS = [f"passage {number} about {topic}" for number in range(3) for topic in ("cranes", "rivers", "bread")]


def documents() -> list[Document]:
    made = [Document(content=text, meta={"page": place, "empty": None}) for place, text in enumerate(TEXTS)]
    return [*made, Document(content=None, meta={"page": 0})]


def upstream(kind: str) -> Any:
    """Haystack's own components: in the integration of their own since Haystack 3."""
    return pytest.importorskip(
        f"haystack_integrations.components.{kind}.sentence_transformers",
        reason="sentence-transformers-haystack is not installed",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_embedder(tmp_path_factory.mktemp("tiny") / "model", prompts={"loud": "LOUD "}, num_layers=1))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_reranker(tmp_path_factory.mktemp("pairs") / "model", num_layers=1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": "say: ", "suffix": " !", "normalize_embeddings": True, "batch_size": 2},
        {"truncate_dim": 8, "encode_kwargs": {"prompt_name": "loud"}},
        {"precision": "ubinary"},
        {"precision": "int8", "quantization_ranges": [[-3.0] * 32, [3.0] * 32]},
    ],
    ids=str,
)
def test_embedders(folder: str, options: dict[str, Any]) -> None:
    """Lists of the same numbers, in copies of the same documents; the text embedder likewise, and both for asyncio."""
    library = upstream("embedders")
    given = {"model": folder, "device": CPU, "progress_bar": False, **options}
    atol = 1 if "quantization_ranges" in options else 1e-5
    for extra in ({}, {"meta_fields_to_embed": ["page", "empty", "none"], "embedding_separator": " | "}):
        ours, theirs = (
            MemsafeDocumentEmbedder(**given, **extra),
            library.SentenceTransformersDocumentEmbedder(**given, **extra),
        )
        wanted = theirs.run(documents())["documents"]
        mine = documents()
        for found in (ours.run(mine)["documents"], asyncio.run(ours.run_async(mine))["documents"]):
            assert [each.id for each in found] == [each.id for each in wanted]
            assert all(each.embedding is None for each in mine)
            assert type(found[0].embedding[0]) is type(wanted[0].embedding[0])
            rows = [np.array([each.embedding for each in some]) for some in (found, wanted)]
            np.testing.assert_allclose(*rows, rtol=0, atol=atol)
    assert MemsafeDocumentEmbedder(**given).run([]) == {"documents": []}
    text, other = MemsafeTextEmbedder(**given), library.SentenceTransformersTextEmbedder(**given)
    wanted = other.run(TEXTS[0])["embedding"]
    for found in (text.run(TEXTS[0]), asyncio.run(text.run_async(TEXTS[0]))):
        np.testing.assert_allclose(found["embedding"], wanted, rtol=0, atol=atol)
    assert text.embedder is MemsafeDocumentEmbedder(**given).embedder  # one copy of the weights


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({"top_k": 3, "query_prefix": "q ", "document_suffix": " d", "meta_fields_to_embed": ["page"]}, {}),
        ({"scale_score": False}, {"top_k": 2}),
        ({"score_threshold": 2.0}, {"scale_score": True, "score_threshold": "the middle one"}),
    ],
    ids=str,
)
def test_ranker(pairs: str, options: dict[str, Any], call: dict[str, Any]) -> None:
    """The same documents in the same order with the same scores, each id once."""
    given = {"model": pairs, "device": CPU, **options}
    ours, theirs = MemsafeRanker(**given), upstream("rankers").SentenceTransformersSimilarityRanker(**given)
    twice = [*documents(), Document(id=documents()[1].id, content=TEXTS[1], meta={"page": 99}, score=0.9)]
    if call.get("score_threshold"):
        assert ours.run(query="about cranes", documents=twice)["documents"] == []
        every = theirs.run(query="about cranes", documents=twice, score_threshold=-2.0)["documents"]
        call = {**call, "score_threshold": every[len(every) // 2].score - 1e-4}
    wanted = theirs.run(query="about cranes", documents=twice, **call)["documents"]
    for found in (
        ours.run(query="about cranes", documents=twice, **call)["documents"],
        asyncio.run(ours.run_async(query="about cranes", documents=twice, **call))["documents"],
    ):
        assert [(each.id, each.meta) for each in found] == [(each.id, each.meta) for each in wanted] and found
        np.testing.assert_allclose([each.score for each in found], [each.score for each in wanted], rtol=0, atol=1e-5)
    assert ours.run(query="q", documents=[]) == {"documents": []}


def test_pipelines(folder: str, pairs: str) -> None:
    """Index, embed the query, retrieve, rank: built, written as YAML, read, and run."""
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    store = InMemoryDocumentStore()
    quiet = {"model": folder, "device": CPU, "progress_bar": False}
    policy = MemoryPolicy(limit="1GiB", fallback=("chunk", "cpu"))
    store.write_documents(MemsafeDocumentEmbedder(**quiet, memory=policy).run(documents())["documents"])
    pipeline = Pipeline()
    pipeline.add_component("embedder", MemsafeTextEmbedder(**quiet, memory=policy, hooks=(print,)))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=4))
    pipeline.add_component(
        "ranker", MemsafeRanker(model=pairs, device=CPU, top_k=2, token=Secret.from_env_var("NO_TOKEN", strict=False))
    )
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "ranker.documents")
    asked = {"embedder": {"text": TEXTS[5]}, "ranker": {"query": TEXTS[5]}}
    found = pipeline.run(asked)["ranker"]["documents"]
    assert len(found) == 2
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["haystack_memsafe"])
    embedder = again.get_component("embedder")
    assert embedder.memory == {"limit": "1GiB", "fallback": ["chunk", "cpu"]} and embedder.hooks == ()
    assert again.get_component("ranker").device == CPU
    again.get_component("retriever").document_store = store
    assert [each.id for each in again.run(asked)["ranker"]["documents"]] == [each.id for each in found]


def test_copies_carry_settings(folder: str) -> None:
    """Pickled and copied without weights; what is made of it gives the same numbers."""
    made = MemsafeTextEmbedder(model=folder, device=CPU, progress_bar=False, token=None)
    assert len(pickle.dumps(made)) < 4096 and not made._core.loaded
    wanted = made.run(TEXTS[0])["embedding"]
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        np.testing.assert_allclose(other.run(TEXTS[0])["embedding"], wanted, rtol=0, atol=1e-5)


def test_what_is_refused(folder: str, pairs: str) -> None:
    """Of the type that upstream raises, and ours: what, and where."""
    text = MemsafeTextEmbedder(model=folder, device=CPU, progress_bar=False)
    for wrong in (["a"], None):
        with pytest.raises(TypeError, match="text: got"):
            text.run(wrong)
    ranker = MemsafeRanker(model=pairs, device=CPU)
    for wrong, match in (("a", "got a str"), ([Document(content="a"), "b"], "entry 1 is a str")):
        with pytest.raises(InputError, match=match):
            MemsafeDocumentEmbedder(model=folder, device=CPU).run(wrong)
        with pytest.raises(TypeError, match=match):
            ranker.run(query="q", documents=wrong)
    with pytest.raises(TypeError, match="query: got a int"):
        ranker.run(query=7, documents=documents())  # type: ignore[arg-type]
    for make in (
        lambda: MemsafeRanker(model=pairs, top_k=0),
        lambda: ranker.run(query="q", documents=documents(), top_k=-1),
    ):
        with pytest.raises(ValueError, match="top_k must be > 0"):
            make()
    with pytest.raises(ConfigError, match="batch_size"):
        MemsafeTextEmbedder(model=folder, batch_size=0)
    with pytest.raises(ConfigError, match="convert_to_tensor"):
        MemsafeTextEmbedder(model=folder, encode_kwargs={"convert_to_tensor": True})
    with pytest.raises(ConfigError, match="colour"):
        MemsafeTextEmbedder(model=folder, device=CPU, encode_kwargs={"colour": "red"}).run("a")
