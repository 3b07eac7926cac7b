"""SparseEmbedder gives SparseEncoder's rows, in the caller's order, in memory that does not grow with tokens times vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from memsafe import ConfigError, InputError, MemoryPolicy, ModelError, SparseEmbedder, SparseRun
from memsafe.advice.estimate import Estimate
from memsafe.advice.facts import look
from memsafe.machine.device import open_device
from memsafe.machine.threads import set_threads
from memsafe.models import late
from memsafe.models.packed import PackedModel
from memsafe.planning.batch import MicroBatch, TokenizedInput
from tests import sparse_models
from tests import tiny_models as models

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")

TILE_BYTES = 4 << 20
TEXTS = [
    "how do I read a file line by line",
    "",
    "sort a list " * 60,
    "read " * 7,
    "Ünïcode 你好 1,234.5",
    "how do I read a file line by line",
    "x",
    *(f"text number {number} " * (number % 9) for number in range(12)),
]


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Many small operations in this thread: with several cores each would wait for all of them, a hundred times as long where
    other tests have them."""
    cores = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(cores)


def reference(model: Any, kind: str | None, texts: list[str] = TEXTS) -> np.ndarray:
    """Rows of each text alone."""
    own = {"query": model.encode_query, "document": model.encode_document, None: model.encode}[kind]
    return np.stack([own([text], convert_to_sparse_tensor=False)[0].numpy() for text in texts])


def check(folder: str, kinds: tuple[str | None, ...] = (None,), rtol: float = 0, **options: Any) -> str:
    """Ours against theirs, row by row; returns the path."""
    model = sentence_transformers.SparseEncoder(folder, device="cpu", **options)
    with SparseEmbedder(folder, device="cpu", **options) as ours:
        for kind in kinds:
            rows = ours.run(TEXTS, kind=kind).embeddings
            assert isinstance(rows, csr_array) and rows.dtype == np.float32 and rows.has_sorted_indices
            assert (rows.data != 0).all()
            np.testing.assert_allclose(rows.toarray(), reference(model, kind), rtol=rtol, atol=1e-5)
        return ours.path


@pytest.mark.parametrize("architecture", ["bert", "xlm_roberta", "modernbert", "distilbert", "mpnet"])
def test_splade(tmp_path: Path, architecture: str) -> None:
    """Every architecture with a head of its own kind: the numbers of each text alone, to 1e-5, packed."""
    path = check(sparse_models.save_splade(tmp_path, architecture), kinds=("document",))
    assert path == "packed" or models.before("transformers", 5)


def test_sums_and_prompts(tmp_path: Path) -> None:
    """Sums over tokens, two logarithms, a prompt for queries."""
    options = {"pooling_strategy": "sum", "activation_function": "log1p_relu"}
    folder = sparse_models.save_splade(tmp_path, prompts={"query": "query: ", "document": ""}, **options)
    check(folder, kinds=("document", "query"), rtol=1e-5)


def test_inference_free(tmp_path: Path) -> None:
    """Queries from a table of weights, documents from the model: by task, through a Router."""
    check(sparse_models.save_inference_free(tmp_path), kinds=("document", "query", None))


def test_csr(tmp_path: Path) -> None:
    """Sparse codes of dense embeddings, of as many numbers as the model keeps, or as were asked for."""
    folder = sparse_models.save_csr(tmp_path)
    check(folder)
    check(folder, max_active_dims=5)


def test_max_active_dims(tmp_path: Path) -> None:
    """Of the model, of the object and of the call; more than the model keeps is refused."""
    folder = sparse_models.save_splade(tmp_path)
    check(folder, max_active_dims=20)
    with SparseEmbedder(folder, device="cpu", max_active_dims=20) as ours:
        rows, fewer = ours.embed_documents(TEXTS[:4]), ours.embed_documents(TEXTS[:4], max_active_dims=3)
        assert np.diff(rows.indptr).tolist() == [20] * 4 and np.diff(fewer.indptr).tolist() == [3] * 4
        for row in range(4):
            assert np.allclose(np.sort(fewer[[row]].data), np.sort(rows[[row]].data)[-3:])
        with pytest.raises(ConfigError, match="max_active_dims"):
            ours.embed_documents(["a"], max_active_dims=21)
        for wrong in (0, True, "3", 1.5):
            with pytest.raises(ConfigError, match="max_active_dims"):
                ours.run(["a"], max_active_dims=wrong)


def test_bge_m3(tmp_path: Path) -> None:
    """BGE-M3's lexical weights, by token id, as FlagEmbedding computes them."""
    folder = sparse_models.save_m3(tmp_path)
    texts = [*TEXTS[:7], TEXTS[9]]
    with SparseEmbedder(folder, device="cpu") as ours:
        rows = ours.embed_documents(texts)
        assert ours.dimension == rows.shape[1] == 30522 and ours.run([]).embeddings.shape == (0, 30522)
        for place, text in enumerate(texts):
            row, wanted = rows[[place]], sparse_models.m3_reference(folder, text)["sparse"]
            assert row.indices.tolist() == sorted(wanted)
            np.testing.assert_allclose(row.data, [wanted[word] for word in sorted(wanted)], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def splade(tmp_path_factory: pytest.TempPathFactory) -> SparseEmbedder:
    return SparseEmbedder(sparse_models.save_splade(tmp_path_factory.mktemp("splade")), device="cpu")


@pytest.mark.parametrize(
    ("texts", "index", "words"),
    [
        ("bare", None, "bare str"),
        (["a", None], 1, "NoneType"),
        (None, None, "NoneType"),
        (["a", "\ud800"], 1, "surrogates"),
    ],
)
def test_bad_input(splade: SparseEmbedder, texts: Any, index: int | None, words: str) -> None:
    """Texts of the wrong type raise an InputError with the position."""
    with pytest.raises(InputError, match=words) as caught:
        splade.embed_documents(texts)
    assert caught.value.index == index


def test_wrong_calls(splade: SparseEmbedder, minilm: str) -> None:
    """Unknown options, and a loaded model of another class."""
    with pytest.raises(ConfigError, match="unknown option 'batch_size'"):
        splade.run(["a"], batch_size=3)
    with pytest.raises(ModelError, match="Embedder"):
        SparseEmbedder(sentence_transformers.SentenceTransformer(minilm, device="cpu"))


async def test_nothing_and_async(splade: SparseEmbedder) -> None:
    """No texts: no rows, all columns. The async methods give the same numbers."""
    run = splade.run([])
    assert isinstance(run, SparseRun) and run.embeddings.shape == (0, 30522)
    rows = await splade.aembed_documents(TEXTS[:3])
    np.testing.assert_allclose(rows.toarray(), splade.embed_documents(TEXTS[:3]).toarray(), rtol=0, atol=1e-5)
    assert (await splade.aembed_queries([])).shape == (0, 30522)


def test_limit(tmp_path: Path) -> None:
    """Within a limit of 96 MiB beyond the weights: the rows, and no micro-batch that was predicted or measured above it."""
    folder = sparse_models.save_splade(tmp_path)
    limit = 96 << 20
    texts = TEXTS * 6
    model = sentence_transformers.SparseEncoder(folder, device="cpu")
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    policy = MemoryPolicy(limit=limit + weights, learn=False)
    with SparseEmbedder(folder, device="cpu", memory=policy) as ours:
        run = ours.run(texts)
        np.testing.assert_allclose(run.embeddings.toarray(), np.tile(reference(model, None), (6, 1)), rtol=0, atol=1e-5)
        assert run.report.predicted_peak_bytes < limit and (run.report.measured_peak_bytes or 0) < limit


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """XLM-R's vocabulary of 250,002 words, a narrow encoder, and tiles of 512 tokens."""
    folder = tmp_path_factory.mktemp("wide")
    options = {
        "vocab_size": 250_002,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 1,
        "max_positions": 1100,
    }
    name = sparse_models.save_splade(folder, "xlm_roberta", max_length=1100, bias=-3.0, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(late, "TILE_BYTES", TILE_BYTES)
        yield models.loaded(name, kind="sparse"), sentence_transformers.SparseEncoder(name, device="cpu")


def batch_of(lengths: list[int]) -> MicroBatch:
    random = np.random.default_rng(sum(lengths))
    items = [TokenizedInput(i, random.integers(1000, 29000, n).astype(np.int32)) for i, n in enumerate(lengths)]
    return MicroBatch(tuple(items), packed=True)


def test_a_true_vocabulary(wide: Any) -> None:
    """250,002 words: the rows of each text alone, whole ones, some of a tile together, and one of several tiles."""
    ours, theirs = wide
    texts = ["long text " * 300, "a short one", "", "another short one"]
    way = ours.encoder.way()
    items = [TokenizedInput(i, e.input_ids, num_tokens=e.num_tokens) for i, e in enumerate(way.encode(texts))]
    rows = ours.forward(MicroBatch(tuple(items), packed=ours.packed), way.extras).to_host()
    assert ours.packed and rows.shape == (4, 250_002)
    np.testing.assert_allclose(rows.toarray(), reference(theirs, None, texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1100], [300, *[40] * 20], [9] * 80, [5]], ids=["one", "mixed", "many", "a word"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(wide: Any, lengths: list[int]) -> None:
    """What a forward takes at its peak is within the first bound, and a small part of the scores; far below one of one row per
    token. The prior meets it to a third, before anything is measured."""
    ours, _ = wide
    batch = batch_of(lengths)
    with open_device("cpu").measure(live=True) as peak:
        ours.forward(batch, ours.encoder.way().extras)
    predicted = ours.cost_prior().head_bytes(batch.shape)
    assert peak.live_bytes is not None and peak.live_bytes < 8 * TILE_BYTES
    if sum(lengths) > 1000:
        assert peak.live_bytes < sum(lengths) * 250_002 * 4 / 20
    assert predicted / 1.5 < peak.live_bytes < predicted * 1.34


@pytest.fixture(scope="module")
def like_minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Estimate]:
    """The model, and what `advise` expects of its folder."""
    shape = {"hidden_size": 384, "num_heads": 12, "intermediate_size": 1536, "num_layers": 1}
    name = sparse_models.save_splade(tmp_path_factory.mktemp("minilm"), max_length=512, bias=-6.0, **shape)
    return models.loaded(name, kind="sparse"), Estimate(look(name, rerank=None), "float32", "cpu")


@pytest.mark.parametrize("lengths", [[512], [64] * 8], ids=["one", "eight"])
def test_sparse_rows_need_hardly_more_memory_than_dense_ones(
    like_minilm: tuple[Any, Estimate], lengths: list[int]
) -> None:
    """512 tokens of a model of MiniLM's shape: at most 1.3 times what its encoder takes alone, as was predicted and advised."""
    (ours, advised), batch = like_minilm, batch_of(lengths)
    packed = PackedModel(ours.routes.run)
    assert ours.packed
    with open_device("cpu").measure(live=True) as peak:
        ours.forward(batch, ours.encoder.way().extras)
    with torch.inference_mode(), open_device("cpu").measure(live=True) as alone:
        packed.hidden_states(packed.pack(np.concatenate([item.input_ids for item in batch.items]), lengths))
    assert peak.live_bytes is not None and alone.live_bytes is not None
    assert peak.live_bytes < 1.3 * alone.live_bytes
    assert peak.live_bytes < 1.3 * ours.cost_prior().bytes(batch.shape) < 1.7 * peak.live_bytes
    assert peak.live_bytes == pytest.approx(advised.packed(batch.shape), rel=0.2)
