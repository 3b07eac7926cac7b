"""Tools written for sentence-transformers, unchanged, on memsafe.compat: each gets what it would get from the library's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers

from memsafe.compat import CrossEncoder, SentenceTransformer
from tests.tiny_models import save_embedder, save_reranker

TEXTS = [f"passage {number} about {topic}" for number in range(8) for topic in ("cranes", "rivers", "bread", "trains")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_embedder(tmp_path_factory.mktemp("tiny") / "model", num_layers=1))


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program does whose tool makes its model itself."""
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", SentenceTransformer)


def test_chroma(folder: str, in_place: None, tmp_path: Path) -> None:
    """Chroma's own SentenceTransformerEmbeddingFunction: rows, a collection, a query."""
    chromadb = pytest.importorskip("chromadb", reason="chromadb is not installed")
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    function = SentenceTransformerEmbeddingFunction(folder, normalize_embeddings=True)
    assert type(function._model) is SentenceTransformer
    collection = chromadb.PersistentClient(str(tmp_path)).create_collection("passages", embedding_function=function)
    collection.add(ids=[str(place) for place in range(len(TEXTS))], documents=TEXTS)
    found = collection.query(query_texts=[TEXTS[5]], n_results=3)
    assert found["documents"][0][0] == TEXTS[5]
    wanted = _theirs(folder).encode(TEXTS, normalize_embeddings=True)
    rows = collection.get(include=["embeddings"])["embeddings"]
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-5)


def test_lancedb(folder: str, in_place: None, tmp_path: Path) -> None:
    """LanceDB's own function from its registry: a table that embeds what is added and what is asked."""
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    function: Any = get_registry().get("sentence-transformers").create(name=folder, device="cpu")

    class Row(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(tmp_path).create_table("passages", schema=Row)
    table.add([{"text": text} for text in TEXTS])
    assert type(function.embedding_model) is SentenceTransformer
    assert table.search(TEXTS[5]).limit(1).to_pydantic(Row)[0].text == TEXTS[5]
    wanted = _theirs(folder).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(np.array(table.to_arrow()["vector"].to_pylist()), wanted, rtol=0, atol=1e-5)


def test_txtai(folder: str, in_place: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """txtai makes the model by its name, or calls a function: the same search either way."""
    pytest.importorskip("txtai", reason="txtai is not installed")
    import txtai
    from txtai.vectors.dense import sbert

    monkeypatch.setattr(sbert, "SentenceTransformer", SentenceTransformer)  # it may have been imported before
    named = txtai.Embeddings(path=folder, method="sentence-transformers", gpu=False)
    model = SentenceTransformer(folder, device="cpu")
    called = txtai.Embeddings(method="external", transform=lambda texts: model.encode(texts))
    sbert.SentenceTransformer = _library()
    theirs = txtai.Embeddings(path=folder, method="sentence-transformers", gpu=False)
    for embeddings in (named, called, theirs):
        embeddings.index(TEXTS)
    assert type(named.model.model) is SentenceTransformer and type(theirs.model.model) is _library()
    wanted = theirs.search(TEXTS[7], 3)
    for embeddings in (named, called):
        found = embeddings.search(TEXTS[7], 3)
        assert [place for place, _ in found] == [place for place, _ in wanted]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_mteb(folder: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """mteb takes the objects: retrieval with the embedder, and the same score as with the library's."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed")
    task = _task()
    options = {
        "cache": None,
        "overwrite_strategy": "always",
        "show_progress_bar": False,
        "encode_kwargs": {"batch_size": 4},
    }
    scores = [
        mteb.evaluate(model, task, **options).task_results[0].get_score()
        for model in (SentenceTransformer(folder, device="cpu"), _theirs(folder))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and 0 < scores[0] <= 1
    pairs = str(save_reranker(tmp_path_factory.mktemp("pairs") / "model", num_layers=1))
    from mteb.models import CrossEncoderWrapper

    assert isinstance(CrossEncoderWrapper(CrossEncoder(pairs, device="cpu")).model, CrossEncoder)


def _task() -> Any:
    """A retrieval task of our own, so that nothing is fetched."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    described: dict[str, Any] = {
        "name": "Passages",
        "description": "made here",
        "dataset": {"path": "none", "revision": "1"},
    }
    described |= {"type": "Retrieval", "category": "t2t", "modalities": ["text"], "main_score": "ndcg_at_10"}
    described |= {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "bibtex_citation": ""}
    unsaid = "reference date domains task_subtypes license annotations_creators dialect sample_creation".split()

    class Passages(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = TaskMetadata(**described, **dict.fromkeys(unsaid))

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            corpus = Dataset.from_list([{"id": str(i), "text": text, "title": ""} for i, text in enumerate(TEXTS)])
            queries = Dataset.from_list([{"id": f"q{i}", "text": text[8:]} for i, text in enumerate(TEXTS)])
            relevant = {f"q{i}": {str(i): 1} for i in range(len(TEXTS))}
            data = RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    return Passages()


@pytest.mark.filterwarnings("ignore")
def test_bertopic(folder: str) -> None:
    """BERTopic takes the object and finds the topics that it finds with the library's."""
    bertopic = pytest.importorskip(
        "bertopic", reason="bertopic is not installed (it brings numba and umap: not in the suite)"
    )
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    def topics(model: Any) -> Any:
        return bertopic.BERTopic(
            embedding_model=model,
            umap_model=PCA(4, random_state=0),
            hdbscan_model=KMeans(4, random_state=0, n_init=1),
        )

    ours, theirs = topics(SentenceTransformer(folder, device="cpu")), topics(_theirs(folder))
    assert ours.fit_transform(TEXTS)[0] == theirs.fit_transform(TEXTS)[0]
    assert type(ours.embedding_model.embedding_model) is SentenceTransformer
    assert ours.find_topics("rivers")[0] == theirs.find_topics("rivers")[0]


def _library() -> Any:
    return SentenceTransformer.__mro__[2]


def _theirs(folder: str) -> Any:
    return _library()(folder, device="cpu")
