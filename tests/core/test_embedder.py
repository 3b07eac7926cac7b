"""Embedder gives sentence-transformers' numbers, in the caller's order, whatever the model and the options."""

from __future__ import annotations

import asyncio
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer

from memsafe import ClosedError, ConfigError, Embedder, EmbeddingRun, InputError, MemoryPolicy, ModelError
from tests import tiny_models as models
from tests.tiny_models import save_embedder

# Before version 5 transformers' BERT and its kin computed attention themselves: there they run padded, and say so.
PACKS_BERT = int(transformers.__version__.split(".")[0]) >= 5
TEXTS = ["a", "the quick brown fox", "", "   ", "jumps " * 90, "over\nthe\tlazy dog", "the quick brown fox", "ÄÖ 你好"]


@pytest.fixture(scope="module")
def embedder(minilm: str) -> Embedder:
    return Embedder(minilm, device="cpu")


@pytest.fixture(scope="module")
def reference(minilm: str) -> SentenceTransformer:
    return SentenceTransformer(minilm, device="cpu")


def close(ours: Any, theirs: Any, atol: float = 1e-5) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_real_model_on_real_texts(embedder: Embedder, reference: SentenceTransformer, passages: list[str]) -> None:
    """A real model on real passages: SentenceTransformer.encode's numbers to 1e-5, float32, in the caller's order."""
    some = passages[::2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = embedder.run(some)
    assert run.embeddings.dtype == np.float32
    close(run.embeddings, reference.encode(some))
    assert run.report.texts == len(some)
    assert embedder.path == "packed" if PACKS_BERT else embedder.path.startswith("padded (")
    assert (run.report.padding_ratio == 0.0) == PACKS_BERT


def test_order_duplicates_and_odd_texts(embedder: Embedder, reference: SentenceTransformer) -> None:
    """Empty, blank and repeated texts get encode's rows at their own positions; equal texts are computed once."""
    run = embedder.run(TEXTS)
    close(run.embeddings, reference.encode(TEXTS))
    assert (run.embeddings[1] == run.embeddings[6]).all()
    assert run.report.distinct_texts == len(set(TEXTS))


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3", "mpnet"])
def test_every_pooling_mode(tmp_path: Path, architecture: str, pooling: Any) -> None:
    """Every pooling mode gives encode's numbers, on packed and on padded paths."""
    if architecture == "qwen3" and pooling in ("cls", "weightedmean") and not PACKS_BERT:
        pytest.skip("sentence-transformers 5.0 pools left padding in with the text: its numbers depend on the batch")
    folder = str(models.save_embedder(tmp_path, architecture, pooling=pooling))
    reference = SentenceTransformer(folder, device="cpu")
    with Embedder(folder, device="cpu") as ours:
        close(ours.embed_documents(TEXTS), reference.encode_document(TEXTS))
        if PACKS_BERT:
            assert ours.path == "packed"


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_architecture(tmp_path: Path, architecture: str) -> None:
    """All supported architectures, with prompts: queries and documents as encode_query and encode_document."""
    if not models.available(architecture):
        pytest.skip(f"this transformers has no {architecture}")
    prompts = {"query": "query: ", "document": "passage: "}
    folder = str(models.save_embedder(tmp_path, architecture, prompts=prompts))
    reference = SentenceTransformer(folder, device="cpu")
    with Embedder(folder, device="cpu") as ours:
        close(ours.embed_queries(TEXTS), reference.encode_query(TEXTS))
        close(ours.embed_documents(TEXTS), reference.encode_document(TEXTS))
        close(ours.run(TEXTS, prompt="x ").embeddings, reference.encode(TEXTS, prompt="x "))
        close(ours.run(TEXTS, prompt_name="query").embeddings, reference.encode(TEXTS, prompt_name="query"))
        close(ours.run(TEXTS).embeddings, reference.encode(TEXTS))
        close(ours.run(TEXTS, prompt="").embeddings, reference.encode(TEXTS, prompt=""))


@pytest.mark.filterwarnings("ignore:The `pooling_mode_:FutureWarning")  # the names that version 5 knows
def test_two_poolings_and_a_dense_layer(tmp_path: Path) -> None:
    """Modules of any number and kind after the transformer run unchanged: two poolings side by side, dense, normalise."""
    reference = SentenceTransformer(str(models.save_embedder(tmp_path, "xlm_roberta", dense_dim=24)), device="cpu")
    pooling = reference[1]
    double = type(pooling)(32, pooling_mode_mean_tokens=True, pooling_mode_cls_token=True)
    reference = SentenceTransformer(modules=[reference[0], double], device="cpu")
    ours = Embedder(reference)
    close(ours.run(TEXTS).embeddings, reference.encode(TEXTS))
    assert ours.dimension == 64
    ours.close()
    folder = str(models.save_embedder(tmp_path / "dense", "bert", dense_dim=24, normalize=True))
    with Embedder(folder, device="cpu") as ours:
        close(ours.run(TEXTS).embeddings, SentenceTransformer(folder, device="cpu").encode(TEXTS))
        assert ours.dimension == 24


def test_prompt_left_out_of_the_mean(tmp_path: Path) -> None:
    """A pooling that excludes the prompt (include_prompt=False, Instructor) gets the prompt's length, as in encode."""
    folder = str(models.save_embedder(tmp_path, "bert", prompts={"query": "find this: "}))
    reference = SentenceTransformer(folder, device="cpu")
    reference[1].include_prompt = False
    ours = Embedder(reference)
    close(ours.embed_queries(TEXTS), reference.encode_query(TEXTS))
    ours.close()


@pytest.mark.parametrize(
    "options", [{"normalize": True}, {"truncate_dim": 128}, {"normalize": True, "truncate_dim": 64}]
)
def test_normalize_and_truncate(embedder: Embedder, reference: SentenceTransformer, options: dict[str, Any]) -> None:
    """normalize and truncate_dim do what encode's normalize_embeddings and truncate_dim do, in that order."""
    theirs = {"normalize_embeddings": options.get("normalize", False), "truncate_dim": options.get("truncate_dim")}
    close(embedder.run(TEXTS, **options).embeddings, reference.encode(TEXTS, **theirs))


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precision(embedder: Embedder, reference: SentenceTransformer, precision: Any, passages: list[str]) -> None:
    """precision quantises as encode's does (int8 codes may differ by one where float32 rounding differs)."""
    texts = [p[:80] for p in passages[:120]]  # int8 takes its ranges from 100 texts or more
    ours, theirs = embedder.run(texts, precision=precision).embeddings, reference.encode(texts, precision=precision)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if "binary" in precision:
        assert (ours == theirs).mean() > 0.999
    else:
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_max_length(minilm: str) -> None:
    """max_length cuts where max_seq_length does, counts it, and warns once."""
    reference = SentenceTransformer(minilm, device="cpu")
    reference.max_seq_length = 16
    with Embedder(minilm, device="cpu", max_length=16) as ours:
        assert ours.max_length == 16
        with pytest.warns(UserWarning, match=r"1 input was longer than 16 tokens") as caught:
            run = ours.run(TEXTS)
        assert len(caught) == 1
        assert run.report.truncated == 1
        close(run.embeddings, reference.encode(TEXTS))


def test_ten_megabytes(embedder: Embedder, reference: SentenceTransformer) -> None:
    """A 10 MB text is cut as the model demands, counted, with one warning, and equals what encode makes of its start."""
    text = "lorem ipsum dolor sit amet " * 400_000
    with pytest.warns(UserWarning, match="longer than 256 tokens"):
        run = embedder.run([text, "short"])
    assert run.report.truncated == 1
    close(run.embeddings, reference.encode([text[:20_000], "short"]))


def test_nothing_at_all(embedder: Embedder) -> None:
    """An empty list gives an empty float32 array of the right width, without a forward."""
    run = embedder.run([])
    assert run.embeddings.shape == (0, 384) and run.embeddings.dtype == np.float32
    assert run.report.micro_batches == 0
    assert embedder.embed_documents([], truncate_dim=8).shape == (0, 8)


@pytest.mark.parametrize(
    ("texts", "index", "words"),
    [
        (["a", None], 1, "NoneType"),
        (["a", "b", b"c"], 2, "bytes"),
        ([3.5], 0, "float"),
        (["a", ["nested"]], 1, "list"),
        ("bare", None, "bare str"),
        (b"bare", None, "bare bytes"),
        (None, None, "NoneType"),
        (7, None, "int"),
        ({"a": "b"}, None, "dict"),
        (["fine", "bad \ud800 surrogate"], 1, "lone surrogates"),
        (["x", "x", "y", "bad \udfff"], 3, "lone surrogates"),
    ],
)
def test_bad_texts(embedder: Embedder, texts: Any, index: int | None, words: str) -> None:
    """What is no list of texts raises an InputError that names position and type, never the text; later calls work."""
    with pytest.raises(InputError, match=words) as caught:
        embedder.embed_documents(texts)
    assert caught.value.index == index
    assert "surrogate \ud800" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert embedder.embed_documents(["fine"]).shape == (1, 384)


def test_nul_and_controls(embedder: Embedder, reference: SentenceTransformer) -> None:
    """NUL and other control characters are texts like any other."""
    texts = ["a\x00b", "\x00", "tab\tand\x1bescape"]
    close(embedder.embed_documents(texts), reference.encode(texts))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 32}, "batch_size"),
        ({"prompt_name": "nope"}, "nope"),
        ({"prompt": 3}, "prompt: got a int"),
        ({"precision": "int3"}, "int3"),
        ({"max_rows": 0}, "max_rows"),
        ({"truncate_dim": -1}, "truncate_dim"),
        ({"kind": "passage"}, "passage"),
    ],
)
def test_bad_call_options(embedder: Embedder, options: dict[str, Any], words: str) -> None:
    """Unknown options and values out of range raise a ConfigError that names them."""
    with pytest.raises(ConfigError, match=words):
        embedder.run(["a"], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"no_such_option": 1}, "no_such_option"),
        ({"dtype": "int4"}, "int4"),
        ({"max_length": 0}, "max_length"),
        ({"device": "cuda:77"}, "cuda"),
        ({"device": []}, "empty"),
        ({"memory": {"limt": 3}}, "limt"),
        ({"memory": 5}, "MemoryPolicy"),
        ({"hooks": ["x"]}, "hooks"),
    ],
)
def test_bad_construction(minilm: str, options: dict[str, Any], words: str) -> None:
    """Options that make no sense are refused at construction."""
    with pytest.raises(ConfigError, match=words):
        Embedder(minilm, **options)


@pytest.mark.parametrize(
    ("architecture", "kept"), [("bert", 64), ("xlm_roberta", 64), ("distilbert", 64), ("modernbert", 300)]
)
@pytest.mark.cuts
def test_lengths_beyond_the_positions(architecture: str, kept: int, tmp_path: Path) -> None:
    """A table of positions that was learnt has an end, where inputs are cut with a warning; rotary positions have none."""
    folder = save_embedder(tmp_path, architecture, max_positions=64, max_length=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        embedder = Embedder(str(folder), device="cpu", max_length=300)
    with embedder:
        assert embedder.max_length == kept
        assert any("learnt 64 positions" in str(w.message) for w in caught) == (kept == 64)
        report = embedder.run(["river " * 400]).report
    assert report.tokens == kept


def test_wrong_models(tmp_path: Path, minilm: str) -> None:
    """A folder that is missing, empty or half-written, or a loaded model of the other kind, is a ModelError with the remedy."""
    with pytest.raises(ModelError, match="does not exist"):
        Embedder(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        Embedder(tmp_path / "empty")
    folder = models.save_embedder(tmp_path / "half", "bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not complete"):
        Embedder(folder)
    weights.unlink()
    with pytest.raises(ModelError, match="no weights"):
        Embedder(folder)
    reranker = models.save_reranker(tmp_path / "reranker", "bert")
    with pytest.raises(ModelError, match="Reranker"):
        Embedder(CrossEncoder(str(reranker), device="cpu"))
    for nothing in (None, "", 3):
        with pytest.raises(ConfigError, match="model"):
            Embedder(nothing)


def test_threads_share_one_model(embedder: Embedder, reference: SentenceTransformer) -> None:
    """Many threads at once: each gets its own rows."""
    wanted = reference.encode([f"text number {i}" for i in range(32)])
    got: list[Any] = [None] * 32

    def work(i: int) -> None:
        got[i] = embedder.embed_queries([f"text number {i}"])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(np.stack(got), wanted)


async def test_async_equals_sync(embedder: Embedder) -> None:
    """The async methods give the same rows, many at a time."""
    texts = [f"text number {i}" for i in range(40)]
    one, many = (
        await embedder.aembed_documents(texts),
        await asyncio.gather(*(embedder.aembed_queries([text]) for text in texts)),
    )
    close(np.concatenate(many), one)
    run = await embedder.arun(texts)
    assert isinstance(run, EmbeddingRun)
    with pytest.raises(InputError):
        await embedder.aembed_documents([1])  # type: ignore[list-item]


def test_progress_counts_every_text(embedder: Embedder) -> None:
    """progress hears of every distinct text exactly once."""
    seen: list[int] = []
    embedder.run([f"t {i}" for i in range(30)], progress=seen.append)
    assert sum(seen) == 30


def test_max_rows(embedder: Embedder) -> None:
    """max_rows caps the texts in a micro-batch."""
    run = embedder.run([f"t {i}" for i in range(30)], max_rows=4)
    assert run.report.micro_batches >= 8


def test_loaded_model(minilm: str) -> None:
    """A SentenceTransformer that is loaded already is used as it is, and still works by itself afterwards."""
    theirs = SentenceTransformer(minilm, device="cpu")
    before = theirs.encode(TEXTS)
    ours = Embedder(theirs)
    assert ours.model is theirs
    close(ours.run(TEXTS).embeddings, before)
    close(theirs.encode(TEXTS), before)
    ours.close()
    close(theirs.encode(TEXTS), before)


def test_closed(minilm: str) -> None:
    """After close(), and only then, calls raise ClosedError; closing twice is fine."""
    ours = Embedder(minilm, device="cpu")
    ours.close()
    ours.close()
    with pytest.raises(ClosedError):
        ours.embed_documents(["a"])
    with Embedder(minilm, device="cpu") as other:
        assert other.embed_documents(["a"]).shape == (1, 384)
    with pytest.raises(ClosedError):
        other.embed_queries(["a"])


def test_two_copies_share_the_work(minilm: str, reference: SentenceTransformer) -> None:
    """device=["cpu", "cpu"] runs two copies of the model on one queue: same rows, same order."""
    with Embedder(minilm, device=["cpu", "cpu"]) as ours:
        texts = [f"text number {i} " * (i % 17 + 1) for i in range(200)]
        close(ours.embed_documents(texts), reference.encode(texts))
        assert ours.device == "cpu, cpu"


def test_hooks_get_events_without_texts(minilm: str) -> None:
    """Hooks see micro-batches as they finish; a hook that fails harms nobody; no event holds a text."""
    events: list[Any] = []

    def broken(event: Any) -> None:
        raise RuntimeError("boom")

    with Embedder(minilm, device="cpu", hooks=[broken, events.append], memory=MemoryPolicy(max_tokens=64)) as ours:
        ours.embed_documents([f"secret words {i}" for i in range(50)])
    assert sum(e.sequences for e in events if type(e).__name__ == "MicroBatchDone") == 50
    assert "secret" not in repr(events)


def test_report_reads_well(embedder: Embedder) -> None:
    """The report prints its figures and turns into JSON."""
    report = embedder.run(["hello there", "world"]).report
    assert "tokens/s" in str(report) and embedder.path in str(report)
    assert report.to_dict()["texts"] == 2
    assert "<table>" in report._repr_html_()


def test_dimensions_that_the_model_keeps(minilm: str, tmp_path: Path) -> None:
    """A model that was made, or saved, with `truncate_dim` gives rows as narrow as its own `encode`; a call's own number goes before."""
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(minilm, device="cpu", truncate_dim=64)
    expected = plain.encode(["a crane", "a bird"])
    plain.save(str(tmp_path / "saved"))
    for given in (plain, str(tmp_path / "saved")):
        with Embedder(given, device="cpu", memory=MemoryPolicy(learn=False)) as embedder:
            assert embedder.dimension == 64 == embedder.identity()["dimension"]
            assert embedder.embed_documents([]).shape == (0, 64)
            np.testing.assert_allclose(embedder.embed_documents(["a crane", "a bird"]), expected, atol=1e-6)
            wide = embedder.run(["a crane"], truncate_dim=128).embeddings
            np.testing.assert_allclose(wide, plain.encode(["a crane"], truncate_dim=128), atol=1e-6)
            assert embedder.identity(truncate_dim=128)["dimension"] == 128 == wide.shape[1]
    with Embedder(str(tmp_path / "saved"), device="cpu", truncate_dim=32, memory=MemoryPolicy(learn=False)) as embedder:
        np.testing.assert_allclose(embedder.embed_documents(["a crane", "a bird"]), expected[:, :32], atol=1e-6)
