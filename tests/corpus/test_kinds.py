"""Corpora of sparse rows, and of a vector for every token: the same windows, shards, checksums, crashes and updates as dense ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from memsafe import ConfigError, RaggedArray, StoreError, embed_corpus, maxsim, open_store
from memsafe.stores.segments import as_given, as_stored
from memsafe.testing import SimulatedEmbedder
from tests.corpus.helpers import in_child, made_texts, needs_fork, simulated, tree
from tests.corpus.test_crashes import kill_at

KINDS = ["sparse", "multi_vector"]
TEXTS = made_texts(300)
WIDTH = 8


def rows_of(kind: str, dense: Any) -> Any:
    """Of each dense row a sparse one without a number now and then, or one to three vectors."""
    if kind == "sparse":
        return csr_array(np.where(dense > np.quantile(np.abs(dense), 0.6, axis=1, keepdims=True), dense, 0))
    counts = 1 + np.abs(dense[:, 0] * 1000).astype(int) % 3
    return RaggedArray.of(
        [np.stack([row * (n + 1) for n in range(count)]) for row, count in zip(dense, counts, strict=True)]
    )


def embedder_of(kind: str, scale: float = 1) -> SimulatedEmbedder:
    """A simulated embedder whose rows are of that kind, and depend on each text alone."""
    embedder = simulated()
    embedder._kind = kind
    run = embedder.run

    def run_of(texts: Any, *, precision: str = "float32", **options: Any) -> Any:
        done = run(texts, **options)
        return replace(done, embeddings=rows_of(kind, done.embeddings * np.float32(scale)))

    embedder.run = run_of  # type: ignore[method-assign]
    identity = embedder.identity

    def identity_of(*, precision: str = "float32", **options: Any) -> Any:
        return identity(**options)

    embedder.identity = identity_of  # type: ignore[method-assign]
    return embedder


def embed(kind: str, path: Path, texts: Any = TEXTS, scale: float = 1, **options: Any) -> Any:
    with embedder_of(kind, scale) as embedder:
        return embed_corpus(embedder, texts, path, **{"block_texts": 32, "shard_bytes": 2500, **options})


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of each kind, for reading."""
    path = tmp_path_factory.mktemp("stores")
    for kind in KINDS:
        embed(kind, path / kind)
    return path


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        with embedder_of(kind) as embedder:
            found[kind] = embedder.run(TEXTS).embeddings
    return found


def same(found: Any, due: Any) -> None:
    """Equal rows, bit for bit."""
    if isinstance(due, RaggedArray):
        assert found.counts.tolist() == due.counts.tolist()
        np.testing.assert_array_equal(*(each[np.arange(len(each))].values for each in (found, due)))
    else:
        assert found.shape == due.shape
        np.testing.assert_array_equal(found.toarray(), due.toarray())


@pytest.mark.parametrize("kind", KINDS)
def test_reading_back(kind: str, tmp_path: Path, expected: dict[str, Any]) -> None:
    """Over several shards: slices, lists, masks, single rows and batches; `info` and `verify` know what they are."""
    due = expected[kind]
    report = embed(kind, tmp_path / "store", list(zip(range(1000, 1300), TEXTS, strict=True)))
    store = open_store(tmp_path / "store")
    assert report.computed == 300 and len(store.shards) > 2 and list(store.ids) == list(range(1000, 1300))
    places = np.array([3, 250, 3, -2])
    for index in (slice(None), slice(30, 200), slice(5, 5), slice(200, 10, -3), places, np.arange(300) % 7 == 0):
        same(store.rows[index], due[np.arange(300)[index]])
    np.testing.assert_array_equal(np.asarray(store.rows[77] if kind == "multi_vector" else store.rows[77].toarray()[0]),
                                  due[77] if kind == "multi_vector" else due[[77]].toarray()[0])  # fmt: skip
    with pytest.raises(IndexError):
        store.rows[300]
    seen = [(ids, rows) for ids, rows in store.iter_batches(50)]
    assert [one for ids, _ in seen for one in ids] == list(range(1000, 1300))
    assert store.info["kind"] == kind and store.info["values"] == store.rows.num_values and kind in repr(store)
    assert store.verify().ok and store.verify().num_bytes > 4 * store.rows.num_values


def test_the_files_are_plain(tmp_path: Path, expected: dict[str, Any]) -> None:
    """numpy reads them, and scipy makes of them what they were; nothing of ours is needed."""
    for kind in KINDS:
        embed(kind, tmp_path / kind, shard_bytes=1 << 30)
    folder = tmp_path / "sparse" / "data-1"
    data, indices, indptr = (
        np.load(folder / f"{name}-00000.npy", mmap_mode="r") for name in ("data", "indices", "indptr")
    )
    assert (data.dtype, indices.dtype, indptr.dtype) == (np.float32, np.int32, np.int64)
    same(csr_array((data, indices, indptr), shape=(300, WIDTH)), expected["sparse"])
    folder = tmp_path / "multi_vector" / "data-1"
    values, offsets = np.load(folder / "values-00000.npy", mmap_mode="r"), np.load(folder / "offsets-00000.npy")
    same(RaggedArray(values, offsets), expected["multi_vector"])


@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_steps_to_the_disk(kind: str, tmp_path: Path) -> None:
    """SIGKILL before every 13th write, fsync or rename: what is finished is not computed again, and the files are the same."""
    few, options = TEXTS[:96], {"shard_bytes": 1500}
    embed(kind, tmp_path / "whole", few, **options)
    due = tree(tmp_path / "whole")
    assert f"data-1/{'data' if kind == 'sparse' else 'values'}-00001.npy" in due
    for step in range(1, 400, 13):
        path = tmp_path / f"{step}"

        def work(path: Path = path, step: int = step) -> None:
            kill_at(step, before=True)
            embed(kind, path, few, **options)

        if in_child(work) == 0:
            assert step > 30
            break
        before = len(open_store(path)) if (path / "manifest.jsonl").exists() else 0
        report = embed(kind, path, few, **options)
        assert (report.skipped, report.computed) == (before, 96 - before)
        assert tree(path) == due
    else:
        raise AssertionError("it never came to its end")


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_computes_what_is_new(kind: str, tmp_path: Path) -> None:
    """Rows of texts that are there are taken, wherever they stood; the store is that of a first run over the new texts."""
    embed(kind, tmp_path / "store")
    new = [*TEXTS[100:220], "brand new", *TEXTS[:50], "another new"]
    report = embed(kind, tmp_path / "store", new, update=True)
    assert (report.reused, report.computed, report.dropped) == (170, 2, 130)
    embed(kind, tmp_path / "fresh", new)
    same(open_store(tmp_path / "store").rows[:], open_store(tmp_path / "fresh").rows[:])
    assert open_store(tmp_path / "store").verify().ok


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_a_store_without_rows(kind: str, tmp_path: Path) -> None:
    """A run that was stopped before its first block has a manifest and no rows; an update computes them all."""
    embed(kind, tmp_path / "store", stop=lambda: True)
    assert (
        len(open_store(tmp_path / "store").rows[:] if kind == "multi_vector" else open_store(tmp_path / "store").ids)
        == 0
    )
    assert embed(kind, tmp_path / "store", update=True).computed == 300


@pytest.mark.parametrize("name", ["data-00001", "indices-00000", "indptr-00002", "values-00001", "offsets-00000"])
def test_one_bit_is_noticed(name: str, tmp_path: Path) -> None:
    """In any file of rows, at any place: verify names it, and an update does not use the block."""
    kind = "multi_vector" if name.startswith(("values", "offsets")) else "sparse"
    embed(kind, tmp_path / "store")
    path = tmp_path / "store" / "data-1" / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 64
    path.write_bytes(content)
    found = open_store(tmp_path / "store").verify()
    assert not found.ok and all(f"{name}.npy" in problem for problem in found.problems)
    report = embed(kind, tmp_path / "store", update=True)
    assert report.computed in (32, 64)  # an offset may stand between two blocks
    assert open_store(tmp_path / "store").verify().ok


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut(kind: str, tmp_path: Path) -> None:
    """Found when the store is opened, and when it is gone on with."""
    embed(kind, tmp_path / "store", stop=iter([False] * 5 + [True] * 9).__next__)
    path = max((tmp_path / "store" / "data-1").glob("[div]*-*.npy"))
    with open(path, "r+b") as file:
        file.truncate(140)
    for attempt in (lambda: open_store(tmp_path / "store"), lambda: embed(kind, tmp_path / "store")):
        with pytest.raises(StoreError, match=r"has 140 bytes where \d+ were written; restore it"):
            attempt()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, tmp_path: Path, expected: dict[str, Any]) -> None:
    """float16 rows are those of float32, rounded once; one that does not fit is refused with its place."""
    embed(kind, tmp_path / "store", dtype="float16")
    found, due = open_store(tmp_path / "store").rows[:], expected[kind]
    numbers = (found.values, due.values) if kind == "multi_vector" else (found.data, due.data)
    assert numbers[0].dtype == np.float16
    np.testing.assert_array_equal(numbers[0], numbers[1].astype(np.float16))
    with pytest.raises(ConfigError, match="dtype: source: entry 0 has a row that float16 cannot hold"):
        embed(kind, tmp_path / "large", dtype="float16", scale=1e7)


def test_search_is_exact(stores: Path, expected: dict[str, Any]) -> None:
    """Sparse rows by dot product, vectors of tokens by MaxSim; queries as their embedder gives them."""
    sparse, vectors = open_store(stores / "sparse"), open_store(stores / "multi_vector")
    asked = expected["sparse"][[7, 200, 7]]
    for max_bytes in (1 << 25, 200):
        found = sparse.search(asked, k=5, max_bytes=max_bytes)
        scores = (asked @ expected["sparse"].T).toarray()
        np.testing.assert_array_equal(found.positions, np.argsort(-scores, axis=1, kind="stable")[:, :5])
        np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :5], rtol=1e-6)
    scores = np.stack([maxsim(expected["multi_vector"][one], expected["multi_vector"]) for one in (7, 200)])
    found = vectors.search(expected["multi_vector"][[7, 200]], k=400)
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(vectors.search(expected["multi_vector"][7], k=3).positions[0], found.positions[0][:3])


def test_what_is_refused(tmp_path: Path, stores: Path, expected: dict[str, Any]) -> None:
    """Each with the remedy: other embedders, options, metrics, queries, exports, and a store of another kind."""
    sparse, vectors = open_store(stores / "sparse"), open_store(stores / "multi_vector")
    for call, message in (
        (lambda: embed("hybrid", tmp_path / "x"), "a store holds rows of one kind: make one with Embedder, SparseEmbedder"),
        (lambda: embed("reranker", tmp_path / "x"), "give an Embedder, SparseEmbedder or MultiVectorEmbedder"),
        (lambda: embed("sparse", tmp_path / "x", precision="float16"), "precision: not an option of a corpus"),
        (lambda: sparse.search(expected["sparse"], metric="cosine"), "the store is sparse: leave it out, or give 'dot'"),
        (lambda: sparse.search(expected["multi_vector"]), "the store is sparse: give what SparseEmbedder.embed_queries"),
        (lambda: sparse.search(np.ones((1, 3))), "the rows have 8 columns"),
        (lambda: sparse.search(expected["sparse"], k=0), "k: got 0"),
        (lambda: vectors.search(np.ones(8)), "give what MultiVectorEmbedder.embed_queries gives: vectors of 8"),
        (lambda: vectors.search(expected["multi_vector"][3], metric="dot"), "give 'maxsim'"),
        (lambda: sparse.export(tmp_path / "x.parquet"), "read the .npy files of the store with numpy, or iter_batches()"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="(?s)" + message.replace("(", r"\(").replace(")", r"\)")):
            call()
    with pytest.raises(StoreError, match="kind: the store has 'sparse', this run has 'multi_vector'"):
        embed("multi_vector", stores / "sparse")


def test_a_store_of_the_first_version(tmp_path: Path) -> None:
    """It has no kind and no counts of values: its rows are dense, and it is gone on with."""
    from memsafe.stores.manifest import _line

    path = tmp_path / "store"
    with simulated() as embedder:
        embed_corpus(embedder, TEXTS, path, block_texts=32)
        lines = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
        lines[0]["schema"] = 1
        for line in lines:
            for name in ("kind", "values", "crc"):
                line.pop(name, None)
        (path / "manifest.jsonl").write_bytes(b"".join(map(_line, lines[:5])))
        assert open_store(path).kind == "dense"
        report = embed_corpus(embedder, TEXTS, path, block_texts=32)
    assert report.skipped == 128 and open_store(path).verify().ok


def test_rows_go_to_files_and_back() -> None:
    """Also where nothing is there, and where rows are a part of others."""
    for rows in (csr_array((0, 5), dtype=np.float32), csr_array((3, 5), dtype=np.float32)):
        same(as_given(as_stored(rows), "sparse", 5), rows)
    ragged = RaggedArray(np.arange(20, dtype=np.float32).reshape(10, 2), [0, 1, 1, 4, 9])
    for rows in (ragged, ragged[2:], ragged[1:1]):
        found = as_given(as_stored(rows), "multi_vector", 2)
        assert found.counts.tolist() == rows.counts.tolist() and found.offsets[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_real_models(kind: str, tmp_path: Path) -> None:
    """A tiny SPLADE and a tiny ColBERT: the store has the embedder's rows, goes on, and refuses another identity."""
    pytest.importorskip("sentence_transformers", minversion="6", reason="needs sentence-transformers 6")
    from memsafe import MultiVectorEmbedder, SparseEmbedder
    from tests import sparse_models

    make, save = (
        (SparseEmbedder, sparse_models.save_splade)
        if kind == "sparse"
        else (MultiVectorEmbedder, sparse_models.save_late_interaction)
    )
    texts = [f"text number {number} " * (1 + number % 5) for number in range(40)]
    with make(save(tmp_path), device="cpu") as embedder:
        embed_corpus(embedder, texts, tmp_path / "store", block_texts=16, stop=iter([False, True, True]).__next__)
        assert len(open_store(tmp_path / "store")) < 40
        report = embed_corpus(embedder, texts, tmp_path / "store", block_texts=16)
        assert report.complete and report.skipped >= 16
        store, due = open_store(tmp_path / "store"), embedder.embed_documents(texts)
        assert store.kind == kind and store.dimension == embedder.dimension
        rows = store.rows[:]
        if kind == "sparse":
            assert abs(rows - due).max() < 1e-5
        else:
            assert rows.counts.tolist() == due.counts.tolist()
            np.testing.assert_allclose(rows.values, due.values, atol=1e-5)
        assert len(store.search(embedder.embed_queries(["text number 3"]), k=3).ids[0]) == 3
        other = {"max_active_dims": 4} if kind == "sparse" else {"normalize": True}
        with pytest.raises(StoreError, match=f"options.{next(iter(other))}: the store has"):
            embed_corpus(embedder, texts, tmp_path / "store", block_texts=16, **other)
