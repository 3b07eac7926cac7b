"""A vector for every token, several outputs of one pass, and reranking with them: the numbers of the models' own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsafe import (
    ConfigError,
    HybridEmbedder,
    InputError,
    LateInteractionReranker,
    MemoryPolicy,
    ModelError,
    MultiVectorEmbedder,
    RaggedArray,
    StoreError,
    maxsim,
)
from tests import sparse_models

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")

TEXTS = [
    "how do I read a file, line by line?",
    "",
    "sort a list. " * 40,
    "...",
    "Ünïcode 你好 1,234.5",
    "how do I read a file, line by line?",
    "x",
    *(f"text number {number}! " * (number % 9) for number in range(20)),
]


@pytest.fixture(scope="module")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = sparse_models.save_late_interaction(
        tmp_path_factory.mktemp("colbert"), prompts={"query": "", "document": "d "}
    )
    return MultiVectorEmbedder(folder, device="cpu"), sentence_transformers.MultiVectorEncoder(folder, device="cpu")


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sparse_models.save_m3(tmp_path_factory.mktemp("m3"))


def close(ours: RaggedArray, theirs: list[np.ndarray]) -> None:
    assert ours.counts.tolist() == [len(row) for row in theirs]
    for row, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(row, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["document", "query", None])
def test_colbert(colbert: Any, kind: str | None) -> None:
    """Documents without their punctuation, queries filled up with [MASK]: the vectors of each text alone, in the caller's
    order, duplicates too; a text of punctuation alone keeps what the model keeps of it."""
    ours, theirs = colbert
    own = {"query": theirs.encode_query, "document": theirs.encode_document, None: theirs.encode}[kind]
    rows = ours.run(TEXTS, kind=kind).embeddings
    assert rows.dtype == np.float32
    close(rows, [own([text], convert_to_numpy=True)[0] for text in TEXTS])
    if kind == "query":
        assert rows.counts.tolist() == [12] * len(TEXTS)


def test_precision_and_normalize(colbert: Any) -> None:
    """float16 halves what is kept; `normalize` scales to length 1. Whatever else is refused."""
    ours, _ = colbert
    full, half = ours.embed_documents(TEXTS), ours.embed_documents(TEXTS, precision="float16", normalize=True)
    assert half.dtype == np.float16 and half.values.nbytes * 2 == full.values.nbytes
    assert np.allclose(half.values, full.values, atol=1e-3)
    assert ours.embed_documents([]).values.shape == (0, 16)
    with pytest.raises(ConfigError, match="precision"):
        ours.run(["a"], precision="int8")
    with pytest.raises(InputError, match="NoneType") as caught:
        ours.run(["a", None])
    assert caught.value.index == 1


def test_limit(colbert: Any) -> None:
    """Within a limit, the same rows from smaller micro-batches."""
    ours, theirs = colbert
    policy = MemoryPolicy(limit=24 << 20, learn=False)
    with MultiVectorEmbedder(theirs, memory=policy) as small:
        run = small.run(TEXTS * 20, kind="document")
    assert run.report.predicted_peak_bytes < 24 << 20
    wanted = ours.embed_documents(TEXTS)
    for place, row in enumerate(run.embeddings):
        np.testing.assert_allclose(row, wanted[place % len(TEXTS)], rtol=0, atol=1e-5)


async def test_late_interaction(colbert: Any) -> None:
    """The scores of the model's own similarity; best first, equal ones in the caller's order."""
    ours, theirs = colbert
    reranker = LateInteractionReranker(ours)
    documents = [text for text in TEXTS if text not in ("", "...")]
    wanted = theirs.similarity(theirs.encode_query(["a list"]), theirs.encode_document(documents)).numpy()[0]
    np.testing.assert_allclose(reranker.score("a list", documents), wanted, rtol=0, atol=1e-4)
    best = reranker.rerank("a list", documents, top_n=3)
    assert len(best) == 3 and best[0].score == max(one.score for one in best)
    assert [one.index for one in await reranker.arerank("a list", documents, top_n=3)] == [one.index for one in best]
    assert reranker.rerank("a list", []) == []
    with pytest.raises(ConfigError, match="top_n"):
        reranker.rerank("a list", documents, top_n=-1)
    with pytest.raises(InputError, match="query"):
        reranker.score(None, documents)  # type: ignore[arg-type]


@pytest.mark.parametrize("tile_bytes", [1, 400, 3000, 1 << 20])
def test_maxsim_in_tiles(tile_bytes: int) -> None:
    """Whatever the size of a tile, each score is the sum of the largest dot products; of nothing it is minus infinity."""
    random = np.random.default_rng(1)
    query = random.normal(size=(5, 8)).astype(np.float32)
    rows = [random.normal(size=(count, 8)).astype(np.float16) for count in (3, 0, 40, 1, 0, 7, 2)]
    documents = RaggedArray.of(rows)
    wanted = [(query @ row.astype(np.float32).T).max(axis=1).sum() if len(row) else -np.inf for row in rows]
    np.testing.assert_allclose(maxsim(query, documents, tile_bytes=tile_bytes), wanted, rtol=1e-5)
    np.testing.assert_allclose(maxsim(query, documents[2:6], tile_bytes=tile_bytes), wanted[2:6], rtol=1e-5)
    with pytest.raises(ValueError, match="query"):
        maxsim(query[:, :4], documents)


def test_three_outputs_of_one_pass(m3: str) -> None:
    """BGE-M3's three outputs, as FlagEmbedding computes each; any choice of them gives the same numbers."""
    with HybridEmbedder(m3, device="cpu") as ours, MultiVectorEmbedder(m3, device="cpu") as vectors:
        run = ours.run(TEXTS)
        assert run.dense is not None and run.sparse is not None and run.multi_vector is not None
        assert run.report.texts == len(TEXTS) and ours.path == "packed"
        wanted = [sparse_models.m3_reference(m3, text) for text in TEXTS]
        np.testing.assert_allclose(run.dense, [one["dense"] for one in wanted], rtol=0, atol=1e-5)
        close(run.multi_vector, [one["multi_vector"] for one in wanted])
        for place, one in enumerate(wanted):
            row = run.sparse[[place]]
            assert row.indices.tolist() == sorted(one["sparse"])
            np.testing.assert_allclose(
                row.data, [one["sparse"][word] for word in row.indices.tolist()], rtol=0, atol=1e-5
            )
        close(vectors.embed_documents(TEXTS), list(run.multi_vector))
        none = ours.run([])
        assert none.dense is not None and none.dense.shape == (0, 32) and none.sparse.shape == (0, 30522)
    with HybridEmbedder(m3, device="cpu", outputs=("sparse", "dense"), precision="float16") as ours:
        some = ours.embed_queries(TEXTS[:5])
        assert some.multi_vector is None and abs(some.sparse - run.sparse[:5]).max() < 1e-5
        np.testing.assert_allclose(some.dense, run.dense[:5], rtol=0, atol=1e-5)


def test_what_has_no_such_heads(m3: str, minilm: str, tmp_path: Path) -> None:
    """A model with one output, outputs that nobody knows, and a file that does not fit are refused with the reason."""
    with pytest.warns(UserWarning, match="no heads"), pytest.raises(ModelError, match=r"sparse_linear\.pt"):
        HybridEmbedder(minilm, device="cpu")
    for outputs in ((), ("dense", "dense"), ("image",), "dense"):
        with pytest.raises(ConfigError, match="outputs"):
            HybridEmbedder(m3, outputs=outputs)
    with pytest.raises(ModelError, match="give a folder"):
        HybridEmbedder(sentence_transformers.SentenceTransformer(minilm, device="cpu"))


def test_saved_and_mapped(tmp_path: Path) -> None:
    """Rows that are saved are mapped, not read, and equal; of a slice only its own vectors are written. numpy reads the files."""
    random = np.random.default_rng(2)
    rows = RaggedArray.of([random.normal(size=(count, 8)).astype(np.float16) for count in (3, 0, 40, 1, 0, 7, 2)])
    for saved in (rows, rows[2:6], rows[[6, 0]], rows[:0]):  # each over the one before, which is still open
        saved.save(tmp_path / "rows")
        found = RaggedArray.open(tmp_path / "rows")
        assert isinstance(found.values, np.memmap) and found.dtype == np.float16 and found.dim == 8
        assert [row.tolist() for row in found] == [row.tolist() for row in saved]
        assert len(np.load(tmp_path / "rows" / "values.npy")) == saved.counts.sum()
        query = random.normal(size=(5, 8)).astype(np.float32)
        assert np.array_equal(maxsim(query, found), maxsim(query, saved))


@pytest.mark.parametrize("damage", ["no folder", "no offsets", "cut off", "no array", "another's offsets"])
def test_what_cannot_be_opened(tmp_path: Path, damage: str) -> None:
    """A folder that is no such one, or damaged, is refused with its path."""
    folder = tmp_path / "rows"
    if damage != "no folder":
        RaggedArray.of([np.ones((3, 4), np.float32)] * 5).save(folder)
    if damage == "no offsets":
        (folder / "offsets.npy").unlink()
    elif damage == "cut off":
        (folder / "values.npy").write_bytes((folder / "values.npy").read_bytes()[:200])
    elif damage == "no array":
        (folder / "offsets.npy").write_bytes(b"offsets")
    elif damage == "another's offsets":
        np.save(folder / "offsets.npy", np.arange(4))
    with pytest.raises(StoreError, match="rows"):
        RaggedArray.open(folder)
