"""Reranker gives CrossEncoder.predict's numbers, in the caller's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer

from memsafe import ConfigError, InputError, ModelError, RankedDocument, Reranker, RerankRun
from tests import tiny_models as models

QUERY = "how do I read a file line by line"
DOCUMENTS = [
    "open(path) iterates over lines",
    "",
    "sort a list " * 60,
    "read " * 7,
    "open(path) iterates over lines",
    "x",
]
PAIRS = [(QUERY, document) for document in DOCUMENTS] + [("", "both"), ("query " * 300, "document " * 300)]


@pytest.fixture(scope="module")
def reranker(demo_reranker: str) -> Reranker:
    return Reranker(demo_reranker, device="cpu", max_length=128)


@pytest.fixture(scope="module")
def reference(demo_reranker: str) -> CrossEncoder:
    return CrossEncoder(demo_reranker, device="cpu", max_length=128)


def close(ours: Any, theirs: Any, atol: float = 1e-5) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:.*longer than:UserWarning")
def test_real_model(reranker: Reranker, reference: CrossEncoder, passages: list[str]) -> None:
    """A real cross-encoder on real passages: predict's numbers to 1e-5, float32, in the caller's order, packed."""
    pairs = PAIRS + [(QUERY, passage) for passage in passages[:60]]
    run = reranker.run(pairs)
    assert run.scores.dtype == np.float32
    close(run.scores, reference.predict(pairs))
    if int(transformers.__version__.split(".")[0]) >= 5:  # before, BERT computed attention itself and runs padded
        assert reranker.path == "packed"
    assert reranker.max_length == 128
    assert run.report.truncated > 0


@pytest.mark.filterwarnings("ignore:.*longer than:UserWarning")
@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_architecture(tmp_path: Path, architecture: str, num_labels: int) -> None:
    """One label and several, every architecture, with and without packing."""
    if not models.available(architecture):
        pytest.skip(f"this transformers has no {architecture}")
    folder = str(models.save_reranker(tmp_path, architecture, num_labels=num_labels))
    reference = CrossEncoder(folder, device="cpu")
    with Reranker(folder, device="cpu") as ours:
        close(ours.score_pairs(PAIRS), reference.predict(PAIRS))
        assert ours.num_labels == num_labels
        if num_labels > 1:
            close(ours.score_pairs(PAIRS, apply_softmax=True), reference.predict(PAIRS, apply_softmax=True))
            with pytest.raises(ModelError, match="cannot rank"):
                ours.rerank(QUERY, DOCUMENTS)


@pytest.mark.filterwarnings("ignore:.*longer than:UserWarning")
def test_activations(reranker: Reranker, reference: CrossEncoder, demo_reranker: str) -> None:
    """activation_fn of the call, of the object and of the model, in that order of precedence; raw logits with Identity."""
    raw = reference.predict(PAIRS, activation_fn=torch.nn.Identity())
    close(reranker.score_pairs(PAIRS, activation_fn=torch.nn.Identity()), raw)
    with Reranker(demo_reranker, device="cpu", max_length=128, activation_fn=torch.nn.Identity()) as ours:
        close(ours.score_pairs(PAIRS), raw)
        sigmoid = torch.nn.Sigmoid()  # given, since sentence-transformers 5.0 keeps the last one that a call gave
        close(ours.score_pairs(PAIRS, activation_fn=sigmoid), reference.predict(PAIRS, activation_fn=sigmoid))


@pytest.mark.cuts
def test_rerank(reranker: Reranker, reference: CrossEncoder) -> None:
    """rerank sorts by score, equal scores in the caller's order, as CrossEncoder.rank; score and Python types agree."""
    ranked = reranker.rerank(QUERY, DOCUMENTS)
    theirs = [int(r["corpus_id"]) for r in reference.rank(QUERY, DOCUMENTS)]
    assert [DOCUMENTS[r.index] for r in ranked] == [DOCUMENTS[i] for i in theirs]  # of equal ones theirs may swap
    assert all(type(r.score) is float and type(r.index) is int for r in ranked)
    scores = reranker.score(QUERY, DOCUMENTS)
    assert [r.score for r in ranked] == sorted((float(s) for s in scores), reverse=True)
    first, second = (next(i for i, r in enumerate(ranked) if r.index == j) for j in (0, 4))
    assert second == first + 1


@pytest.mark.parametrize(("top_n", "count"), [(None, 6), (0, 0), (1, 1), (6, 6), (100, 6)])
@pytest.mark.cuts
def test_top_n(reranker: Reranker, top_n: int | None, count: int) -> None:
    """top_n None or larger than the list gives all, 0 none."""
    ranked = reranker.rerank(QUERY, DOCUMENTS, top_n=top_n)
    assert len(ranked) == count
    assert all(isinstance(r, RankedDocument) for r in ranked)


@pytest.mark.parametrize("top_n", [-1, 2.5, "3", True])
def test_bad_top_n(reranker: Reranker, top_n: Any) -> None:
    """A negative top_n, or one that is no int, raises a ConfigError."""
    with pytest.raises(ConfigError, match="top_n"):
        reranker.rerank(QUERY, DOCUMENTS, top_n=top_n)


@pytest.mark.parametrize(
    ("query", "documents", "index", "words"),
    [
        (None, ["a"], None, "query"),
        (["q"], ["a"], None, "query"),
        ("q", "bare", None, "bare str"),
        ("q", ["a", None], 1, "NoneType"),
        ("q", None, None, "NoneType"),
        ("q", ["a", "bad \ud800"], 1, "surrogates"),
    ],
)
def test_bad_input(reranker: Reranker, query: Any, documents: Any, index: int | None, words: str) -> None:
    """A query or documents of the wrong type raise an InputError with the position."""
    with pytest.raises(InputError, match=words) as caught:
        reranker.score(query, documents)
    assert caught.value.index == index


@pytest.mark.parametrize("pairs", [[("a",)], [("a", "b", "c")], ["ab"], [("a", 1)], "pairs", None, [("a", "b"), 3]])
def test_bad_pairs(reranker: Reranker, pairs: Any) -> None:
    """What is no list of (query, document) pairs raises an InputError."""
    with pytest.raises(InputError, match="pairs"):
        reranker.score_pairs(pairs)


def test_nothing(reranker: Reranker) -> None:
    """No documents: an empty float32 array, an empty ranking."""
    assert reranker.score(QUERY, []).shape == (0,)
    assert reranker.rerank(QUERY, []) == []


def test_an_embedding_model(minilm: str) -> None:
    """A folder of an embedding model loads as CrossEncoder loads it, with a random head, and we say so; a loaded embedding
    model, which has no scores, is refused with the way out."""
    with pytest.warns(UserWarning, match="random until it is trained"), Reranker(minilm, device="cpu") as ours:
        assert ours.score("a question", ["a text", "another"]).shape == (2,)
    with pytest.raises(ModelError, match="Embedder"):
        Reranker(SentenceTransformer(minilm, device="cpu"))


@pytest.mark.filterwarnings("ignore:.*longer than:UserWarning")
def test_only_second(tmp_path: Path) -> None:
    """truncation="only_second" keeps the query whole up to query_max_length and cuts the document, as FlagEmbedding does."""
    folder = str(models.save_reranker(tmp_path, "bert", max_length=64))
    query, document = "query words " * 40, "document words " * 100
    with Reranker(folder, device="cpu", truncation="only_second", query_max_length=48) as ours:
        encoded = ours._engine.model.encoder.encode([(query, document)])[0]
        types = encoded.token_type_ids
        assert encoded.num_tokens == 64
        assert types is not None and int((types == 0).sum()) == 48 + 2
        assert ours.score(query, [document]).shape == (1,)
    with pytest.raises(ConfigError, match="truncation"):
        Reranker(folder, truncation="head")


@pytest.mark.cuts
async def test_async(reranker: Reranker) -> None:
    """The async methods give the same numbers."""
    got, expected = await reranker.arerank(QUERY, DOCUMENTS, top_n=2), reranker.rerank(QUERY, DOCUMENTS, top_n=2)
    assert [ranked.index for ranked in got] == [ranked.index for ranked in expected]
    close([ranked.score for ranked in got], [ranked.score for ranked in expected])  # cut into other micro-batches, say
    close(await reranker.ascore(QUERY, DOCUMENTS), reranker.score(QUERY, DOCUMENTS))
    run = await reranker.arun([(QUERY, "x")])
    assert isinstance(run, RerankRun) and run.scores.shape == (1,)
