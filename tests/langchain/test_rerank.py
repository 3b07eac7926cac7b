"""MemsafeRerank: ranking, metadata, top_n, and exactly CrossEncoderReranker where asked."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.callbacks import BaseCallbackHandler, CallbackManager
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ValidationError

from langchain_memsafe import MemsafeRerank
from memsafe import ConfigError, InputError, ModelError

from .conftest import Calls, largest_difference, same_ranking

QUERY = "How is a string split into words?"


@pytest.fixture
def documents(passages: list[str]) -> list[Document]:
    """Documents with ids and nested metadata, an empty one and two equal ones among them."""
    texts = [*(passage[:200] for passage in passages[:5]), "", "split a string into words", "split a string into words"]
    return [Document(text, id=f"id-{i}", metadata={"n": i, "tags": ["x"]}) for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def predict(demo_reranker: str) -> Any:
    """The reference: sentence-transformers' CrossEncoder on the same folder."""
    from sentence_transformers import CrossEncoder

    return CrossEncoder(demo_reranker, device="cpu").predict


def test_scores_and_order(reranker: MemsafeRerank, documents: list[Document], predict: Any) -> None:
    """Scores are those of CrossEncoder.predict to 1e-5; best first, equal scores in the caller's order."""
    expected = predict([(QUERY, document.page_content) for document in documents])
    compressor = reranker.model_copy(update={"top_n": None})
    got = list(compressor.compress_documents(documents, QUERY))
    assert [document.metadata["n"] for document in got] == np.argsort(-expected, kind="stable").tolist()
    scores = [document.metadata["relevance_score"] for document in got]
    assert all(type(score) is float for score in scores)
    assert largest_difference(scores, [expected[document.metadata["n"]] for document in got]) < 1e-5
    assert [d.metadata["n"] for d in got[:2]] == [6, 7]


def test_copies(reranker: MemsafeRerank, documents: list[Document]) -> None:
    """The caller's documents are untouched; copies keep id and class, and have metadata of their own."""

    class Special(Document):
        extra: str = "kept"

    documents = [*documents, Special("split words", id="special", metadata={"relevance_score": "old", "tags": []})]
    before = [document.model_copy(deep=True) for document in documents]
    compressor = reranker.model_copy(update={"top_n": None})
    got = {document.id: document for document in compressor.compress_documents(documents, QUERY)}
    assert documents == before
    assert set(got) == {document.id for document in documents}
    for document in documents:
        copied = got[document.id]
        assert copied is not document and type(copied) is type(document)
        assert copied.page_content == document.page_content
        assert {**copied.metadata, "relevance_score": None} == {**document.metadata, "relevance_score": None}
        copied.metadata["tags"] = copied.metadata["new"] = "edited"
    assert documents == before
    assert isinstance(got["special"].metadata["relevance_score"], float)


@pytest.mark.parametrize("metadata", [None, {"lock": threading.Lock(), "large": object()}])
def test_metadata_that_cannot_be_deep_copied(reranker: MemsafeRerank, metadata: Any) -> None:
    """No metadata at all, or a handle in it: the copy holds what the document held, and the score."""
    document = Document.model_construct(page_content="split words", metadata=metadata, id="odd", type="Document")
    (got,) = reranker.compress_documents([document], QUERY)
    assert {**got.metadata, "relevance_score": 0} == {**(metadata or {}), "relevance_score": 0}
    assert document.metadata is metadata


def test_score_key(reranker: MemsafeRerank, documents: list[Document]) -> None:
    """The score goes where score_key says."""
    got = reranker.model_copy(update={"score_key": "rank"}).compress_documents(documents, QUERY)
    assert all("rank" in document.metadata and "relevance_score" not in document.metadata for document in got)


@pytest.mark.parametrize(("top_n", "kept"), [(None, 8), (0, 0), (1, 1), (3, 3), (8, 8), (100, 8)])
def test_top_n(reranker: MemsafeRerank, documents: list[Document], top_n: int | None, kept: int) -> None:
    """None keeps all documents, 0 none, a number larger than the list all; the order is always the same."""
    everything = reranker.rerank(documents, QUERY, top_n=None)
    compressor = reranker.model_copy(update={"top_n": top_n})
    got = [document.metadata["n"] for document in compressor.compress_documents(documents, QUERY)]
    assert got == [entry["index"] for entry in everything][:kept]
    assert same_ranking(reranker.rerank(documents, QUERY, top_n=top_n), everything[:kept])


def test_default_top_n(reranker: MemsafeRerank, documents: list[Document]) -> None:
    """top_n is 3 by default, as CrossEncoderReranker's; rerank's -1 stands for the object's own."""
    assert len(reranker.compress_documents(documents, QUERY)) == 3
    assert len(reranker.rerank(documents, QUERY)) == len(reranker.rerank(documents, QUERY, top_n=-1)) == 3
    assert len(reranker.model_copy(update={"top_n": None}).rerank(documents, QUERY)) == len(documents)


def test_negative_top_n(demo_reranker: str, reranker: MemsafeRerank, documents: list[Document]) -> None:
    """A negative top_n is refused, at construction and at a call."""
    with pytest.raises(ConfigError, match="top_n"):
        MemsafeRerank(model_name=demo_reranker, top_n=-1)
    with pytest.raises(ConfigError, match="top_n"):
        reranker.model_copy(update={"top_n": -2}).compress_documents(documents, QUERY)
    with pytest.raises(ConfigError, match="top_n"):
        reranker.rerank(documents, QUERY, top_n=-2)


def test_rerank_takes_texts_and_documents(reranker: MemsafeRerank, documents: list[Document]) -> None:
    """rerank gives positions and scores, of texts and documents alike, without editing them."""
    mixed = [document.page_content if i % 2 else document for i, document in enumerate(documents)]
    got = reranker.rerank(mixed, QUERY, top_n=None)
    assert same_ranking(got, reranker.rerank(documents, QUERY, top_n=None))
    assert sorted(entry["index"] for entry in got) == list(range(len(documents)))
    assert all(set(entry) == {"index", "relevance_score"} for entry in got)
    assert [type(value) for value in got[0].values()] == [int, float]


def test_no_documents(reranker: MemsafeRerank, core_calls: Calls) -> None:
    """No documents: an empty list, without a call of the model."""
    assert list(reranker.compress_documents([], QUERY)) == list(reranker.compress_documents((), QUERY)) == []
    assert reranker.rerank([], QUERY) == []
    assert core_calls == []


def test_one_call(reranker: MemsafeRerank, documents: list[Document], core_calls: Calls) -> None:
    """All documents go to the core in one call."""
    reranker.compress_documents(tuple(documents), QUERY)
    assert [(call["method"], call["inputs"]) for call in core_calls] == [("score", len(documents))]


@pytest.mark.parametrize("query", [None, 3, b"a", ["a"]], ids=str)
def test_bad_query(reranker: MemsafeRerank, documents: list[Document], query: Any) -> None:
    """A query that is not a string is refused."""
    with pytest.raises(InputError, match="query"):
        reranker.compress_documents(documents, query)


@pytest.mark.parametrize(
    ("bad", "index"),
    [("bare", None), (b"bare", None), (None, None), ([Document("a"), None], 1), (["text"], 0)],
    ids=str,
)
def test_bad_documents(reranker: MemsafeRerank, bad: Any, index: int | None) -> None:
    """What is not a list of documents is refused with the position of the culprit."""
    with pytest.raises(InputError) as caught:
        reranker.compress_documents(bad, QUERY)
    assert caught.value.index == index
    if bad != ["text"]:  # rerank takes texts as well
        with pytest.raises(InputError) as caught:
            reranker.rerank(bad, QUERY)
        assert caught.value.index == index


def test_callbacks(reranker: MemsafeRerank, documents: list[Document]) -> None:
    """callbacks are accepted by keyword and by position, as the interface says, and change nothing."""
    plain = list(reranker.compress_documents(documents, QUERY))
    for callbacks in (None, [], [BaseCallbackHandler()], CallbackManager([BaseCallbackHandler()])):
        assert same_ranking(reranker.compress_documents(documents, QUERY, callbacks=callbacks), plain)
        assert same_ranking(reranker.compress_documents(documents, QUERY, callbacks), plain)


def test_interface(reranker: MemsafeRerank) -> None:
    """It is a BaseDocumentCompressor, so that retrievers and pipelines take it."""
    assert isinstance(reranker, BaseDocumentCompressor)


class NotANumber:
    """An activation that turns the best score into NaN."""

    def __call__(self, scores: Any) -> Any:
        scores = scores.clone()
        scores[scores.argmax()] = float("nan")
        return scores


def test_not_a_number_goes_last(reranker: MemsafeRerank) -> None:
    """A score that is not a number ranks last, whatever its place in the list."""
    texts = ["a train", "split a string into words", "a ship"]
    best = reranker.rerank(texts, QUERY)[0]["index"]
    broken = reranker.model_copy(update={"predict_kwargs": {"activation_fn": NotANumber()}}).rerank(texts, QUERY)
    assert broken[-1]["index"] == best
    assert np.isnan(broken[-1]["relevance_score"]) and not np.isnan(broken[0]["relevance_score"])


def test_predict_kwargs(reranker: MemsafeRerank, documents: list[Document], core_calls: Calls) -> None:
    """predict_kwargs are those of CrossEncoder.predict: raw logits by activation_fn, rows capped by batch_size."""
    from torch.nn import Identity

    raw = reranker.model_copy(update={"predict_kwargs": {"activation_fn": Identity(), "batch_size": 2}})
    logits = np.array([entry["relevance_score"] for entry in raw.rerank(documents, QUERY)])
    scores = [entry["relevance_score"] for entry in reranker.rerank(documents, QUERY)]
    assert largest_difference(1 / (1 + np.exp(-logits)), scores) < 1e-5
    assert core_calls[0]["max_rows"] == 2 and "max_rows" not in core_calls[1]


@pytest.mark.parametrize(
    ("predict_kwargs", "error"),
    [({"show_progress_bar": True}, TypeError), ({"no_such": 1}, ConfigError), ({"batch_size": 0}, ConfigError),
     ({"pool": {}}, ConfigError), ({"device": "cuda:9"}, ConfigError)],
    ids=str,
)  # fmt: skip
def test_bad_predict_kwargs(reranker: MemsafeRerank, predict_kwargs: dict[str, Any], error: type[Exception]) -> None:
    """Options that CrossEncoder.predict would refuse, or that cannot be had, are refused."""
    with pytest.raises(error):
        reranker.model_copy(update={"predict_kwargs": predict_kwargs}).rerank(["a"], QUERY)


def test_two_labels(two_labels: Path) -> None:
    """Of two labels the second ranks, as HuggingFaceCrossEncoder has it."""
    from sentence_transformers import CrossEncoder

    texts = ["a train", "split a string into words", "a ship"]
    expected = CrossEncoder(str(two_labels), device="cpu").predict([(QUERY, text) for text in texts])[:, 1]
    got = MemsafeRerank(model_name=str(two_labels)).rerank(texts, QUERY)
    assert [entry["index"] for entry in got] == np.argsort(-expected, kind="stable").tolist()
    assert largest_difference([entry["relevance_score"] for entry in got], np.sort(expected)[::-1]) < 1e-5


def test_construction(demo_reranker: str, minilm: str, tmp_path: Path) -> None:
    """`model` is an alias; unknown fields and a folder without a model are refused; an embedding model loads, as upstream
    loads it, with a random head, and we say so."""
    assert MemsafeRerank(model=demo_reranker).model_name == demo_reranker
    for wrong in ({"batch_size": 3}, {"top_n": "many"}, {"memory": {"limit": 0}}, {"score_key": ""}):
        with pytest.raises(ValidationError):
            MemsafeRerank(model_name=demo_reranker, **wrong)
    with pytest.raises(ModelError):
        MemsafeRerank(model_name=str(tmp_path))
    with pytest.warns(UserWarning, match="random until it is trained"):
        MemsafeRerank(model_name=minilm)


def test_long_documents_are_read_in_windows(demo_reranker: str) -> None:
    """The option goes to the core, with what belongs to it in model_kwargs; a copy that changes it builds a core of its own."""
    from memsafe import Reranker

    texts = ["nothing of interest here " * 40 + QUERY, "a short one"]
    documents = [Document(text) for text in texts]
    kwargs = {"device": "cpu", "max_length": 64, "window_overlap": 4}
    compressor = MemsafeRerank(model=demo_reranker, model_kwargs=kwargs, long_documents="max_passage", top_n=None)
    got = compressor.compress_documents(documents, QUERY)
    with Reranker(
        demo_reranker, device="cpu", max_length=64, long_documents="max_passage", window_overlap=4
    ) as reranker:
        expected = reranker.score(QUERY, texts)
    scores = {document.page_content: document.metadata["relevance_score"] for document in got}
    assert largest_difference([scores[text] for text in texts], list(expected)) < 1e-5
    cut = compressor.model_copy(update={"long_documents": "truncate"})
    with pytest.warns(UserWarning, match="as the model demands"):
        cut.compress_documents(documents, QUERY)
    with pytest.raises(TypeError, match="long_documents"):
        MemsafeRerank(model=demo_reranker, model_kwargs={"long_documents": "max_passage"})
