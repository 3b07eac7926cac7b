"""memsafe.compat: what sentence-transformers' own classes return, in the same types and dtypes, for every way of asking."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch

from memsafe import ConfigError, Embedder, InputError, ModelError, Reranker
from memsafe.compat import CrossEncoder, SentenceTransformer
from tests.tiny_models import save_embedder, save_reranker

TEXTS = ["a crane is a bird", "", "a crane lifts loads over the river and puts them down again", "a crane is a bird"]
PAIRS = [("what is a crane", text) for text in TEXTS]
PROMPTS = {"query": "find: ", "document": "read: ", "loud": "LOUD "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_embedder(tmp_path_factory.mktemp("tiny") / "model", prompts=PROMPTS, num_layers=1))


@pytest.fixture(scope="module")
def ours(folder: str) -> SentenceTransformer:
    return SentenceTransformer(folder, device="cpu")


@pytest.fixture(scope="module")
def theirs(folder: str) -> Any:
    return sentence_transformers.SentenceTransformer(folder, device="cpu")


@pytest.fixture(scope="module")
def pair_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    home = tmp_path_factory.mktemp("pairs")
    return {labels: str(save_reranker(home / str(labels), num_labels=labels, num_layers=1)) for labels in (1, 3)}


def same(found: Any, wanted: Any, atol: float = 1e-5) -> None:
    """The same type, dtype, shape, device and, to rounding, numbers."""
    assert type(found) is type(wanted)
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other, atol)
        return
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if isinstance(wanted, torch.Tensor):
        assert found.device == wanted.device
        found, wanted = found.float().cpu().numpy(), wanted.float().cpu().numpy()
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"normalize_embeddings": True, "batch_size": 2},
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"prompt": "say: ", "show_progress_bar": False},
        {"prompt_name": "loud"},
        {"prompt_name": "loud", "prompt": "say: "},
        {"precision": "binary"},
        {"precision": "ubinary", "convert_to_tensor": True},
        {"precision": "int8", "convert_to_numpy": False},
        {"precision": None},
        {"device": "cpu", "output_value": "sentence_embedding", "chunk_size": 3},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*quantization ranges")
def test_encode(ours: SentenceTransformer, theirs: Any, options: dict[str, Any]) -> None:
    """Several texts, one str, a tuple, an array of str and none at all."""
    if "int8" in str(options) and options["precision"] == "int8":
        same(ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options), atol=1)  # rounding at an edge of a bucket
        return
    for given in (TEXTS, TEXTS[0], tuple(TEXTS), np.array(TEXTS), []):
        same(ours.encode(given, **options), theirs.encode(given, **options))


def test_queries_and_documents(ours: SentenceTransformer, theirs: Any) -> None:
    """Their own prompts, by position too; and `sentences`, the old name."""
    for name in ("encode_query", "encode_document"):
        same(getattr(ours, name)(TEXTS), getattr(theirs, name)(TEXTS))
        same(getattr(ours, name)(TEXTS[0], None, "say: "), getattr(theirs, name)(TEXTS[0], None, "say: "))
    same(ours.encode(sentences=TEXTS), theirs.encode(sentences=TEXTS))
    assert inspect.signature(ours.encode) == inspect.signature(theirs.encode)


def test_what_else_the_class_has(ours: SentenceTransformer, theirs: Any) -> None:
    """Similarities, tokenizer, length, dimension, prompts and modules are the library's."""
    assert isinstance(ours, sentence_transformers.SentenceTransformer) and "sentence_transformers" in str(type(ours))
    rows = theirs.encode(TEXTS)
    same(ours.similarity(rows, rows), theirs.similarity(rows, rows))
    same(ours.similarity_pairwise(rows, rows), theirs.similarity_pairwise(rows, rows))
    assert ours.tokenizer(TEXTS[0]) == theirs.tokenizer(TEXTS[0])
    assert ours.max_seq_length == theirs.max_seq_length == 256
    name = (
        "get_embedding_dimension" if hasattr(theirs, "get_embedding_dimension") else "get_sentence_embedding_dimension"
    )
    assert getattr(ours, name)() == getattr(theirs, name)() == 32
    assert ours.prompts == theirs.prompts and ours.similarity_fn_name == theirs.similarity_fn_name
    assert ours.device == theirs.device and len(ours) == len(theirs)
    report = ours.embedder.run(TEXTS).report
    assert report.texts == 4 and report.path.startswith(("packed", "padded"))


def test_what_is_changed_counts(folder: str, theirs: Any) -> None:
    """A shorter length, another prompt, another width: the next call has it, as the library's does."""
    ours, other = SentenceTransformer(folder, device="cpu"), copy.deepcopy(theirs)
    long = ["crane " * 300]
    for model in (ours, other):
        model.max_seq_length = 8
    with pytest.warns(UserWarning, match="longer than 8 tokens"):
        same(ours.encode(long), other.encode(long))
    for model in (ours, other):
        model.max_seq_length = 64
        model.encode("once, at the new length")
    for model in (ours, other):
        model.prompts = {"new": "quite new: "}
        model.default_prompt_name = "new"
        model.truncate_dim = 5
    same(ours.encode(TEXTS[:1]), other.encode(TEXTS[:1]))
    for model in (ours, other):
        model.half()
    same(ours.encode(TEXTS[:1]), other.encode(TEXTS[:1]), atol=5e-3)
    assert ours.encode(TEXTS[:1]).dtype == np.float16
    for model in (ours, other):
        model.bfloat16()
    same(ours.encode(TEXTS[:1]), other.encode(TEXTS[:1]), atol=5e-2)
    same(ours.encode(TEXTS[:1], convert_to_tensor=True), other.encode(TEXTS[:1], convert_to_tensor=True), atol=5e-2)


def test_constructor(folder: str, theirs: Any, tmp_path: Path) -> None:
    """Modules, a loaded model, prompts, a width, a similarity; what it makes is saved, copied and pickled as it is there."""
    wanted = theirs.encode(TEXTS)
    for made in (
        SentenceTransformer(modules=list(theirs.children()), device="cpu"),
        SentenceTransformer(theirs),
        SentenceTransformer(model_name_or_path=folder, device="cpu", memory={"limit": "1GiB"}),
        pickle.loads(pickle.dumps(SentenceTransformer(folder, device="cpu"))),
    ):
        same(made.encode(TEXTS), wanted)
    given = {"truncate_dim": 7, "similarity_fn_name": "dot", "prompts": {"a": "b "}, "default_prompt_name": "a"}
    ours = SentenceTransformer(folder, device="cpu", **given)
    other = sentence_transformers.SentenceTransformer(folder, device="cpu", **given)
    same(copy.deepcopy(ours).encode(TEXTS), other.encode(TEXTS))
    rows = other.encode(TEXTS)
    same(ours.similarity(rows, rows), other.similarity(rows, rows))
    ours.save(str(tmp_path / "saved"))
    same(sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), rows)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: m.encode(TEXTS, output_value="token_embeddings"), ConfigError, "MultiVectorEmbedder"),
        (lambda m: m.encode(TEXTS, output_value=None), ConfigError, "output_value"),
        (lambda m: m.encode(TEXTS, batch_size=0), ValueError, "batch_size must be a positive integer, got 0"),
        (lambda m: m.encode(TEXTS, pool={}), ConfigError, "pool"),
        (lambda m: m.encode(TEXTS, device="meta"), ConfigError, "the model is on 'cpu'"),
        (lambda m: m.encode(TEXTS, device=["cpu", "cpu"]), ConfigError, "construct with that device"),
        (lambda m: m.encode(TEXTS, precision="int3"), ValueError, "int3"),
        (lambda m: m.encode(TEXTS, prompt_name="quiet"), ValueError, "quiet"),
        (lambda m: m.encode(TEXTS, colour="red"), ValueError, "colour"),
        (lambda m: m.encode([*TEXTS, 7]), InputError, "input 4 is a int"),
        (lambda m: m.encode(7), InputError, "got a int"),
        (lambda m: m.encode(), TypeError, "inputs|sentences"),
        (lambda m: m.start_multi_process_pool(), ConfigError, "pool"),
        (lambda m: SentenceTransformer(m.tokenizer), (ConfigError, ModelError), "model"),
        (lambda m: SentenceTransformer(m, prompts={}), ConfigError, "prompts"),
        (lambda m: SentenceTransformer("nowhere/at-all"), OSError, "nowhere"),
        (lambda m: CrossEncoder(m), ModelError, "CrossEncoder"),
        (lambda m: SentenceTransformer("any", memory={"unload_after_s": 1}), ConfigError, "memsafe.Embedder"),
    ],
)
def test_what_is_refused(ours: SentenceTransformer, call: Any, error: Any, match: str) -> None:
    """What cannot be had here says so, and what to do; never a wrong result."""
    with pytest.raises(error, match=match):
        call(ours)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False, "batch_size": 1},
        {"activation_fn": torch.nn.Tanh()},
        {"apply_softmax": True},
    ],
    ids=str,
)
def test_predict(pair_folders: dict[int, str], labels: int, options: dict[str, Any]) -> None:
    """Several pairs, one pair, a list of lists, an array and none at all; one label and several."""
    ours = CrossEncoder(pair_folders[labels], device="cpu")
    theirs = sentence_transformers.CrossEncoder(pair_folders[labels], device="cpu")
    for given in (PAIRS, PAIRS[0], [list(pair) for pair in PAIRS], np.array(PAIRS), np.array(PAIRS[0]), []):
        same(ours.predict(given, **options), theirs.predict(given, **options))


def test_rank(pair_folders: dict[int, str]) -> None:
    """The library's own `rank`, over our scores; the constructor's length and activation."""
    given = {"max_length": 12, "activation_fn": torch.nn.Identity(), "device": "cpu"}
    ours, theirs = CrossEncoder(pair_folders[1], **given), sentence_transformers.CrossEncoder(pair_folders[1], **given)
    with pytest.warns(UserWarning, match="longer than 12 tokens"):
        found = ours.rank("what is a crane", TEXTS, top_k=3, return_documents=True)
    wanted = theirs.rank("what is a crane", TEXTS, top_k=3, return_documents=True)
    assert [each["text"] for each in found] == [each["text"] for each in wanted]
    np.testing.assert_allclose([each["score"] for each in found], [each["score"] for each in wanted], rtol=0, atol=1e-5)
    assert ours.num_labels == 1 and isinstance(ours.reranker, Reranker)
    with pytest.raises(InputError, match="document of input 0"):
        ours.predict([("a", 7)])


def test_in_the_place_of_the_librarys_class(folder: str, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that puts ours where tools look for the library's still has Embedder, and ours, built on the library's."""
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", SentenceTransformer)
    monkeypatch.setattr(sentence_transformers, "CrossEncoder", CrossEncoder)
    made = sentence_transformers.SentenceTransformer(folder, device="cpu")
    same(made.encode(TEXTS), theirs.encode(TEXTS))
    with Embedder(folder, device="cpu") as embedder:
        assert type(embedder.model).__module__.startswith("sentence_transformers.")
    with Embedder(made) as embedder:
        np.testing.assert_allclose(embedder.run(TEXTS).embeddings, theirs.encode(TEXTS), atol=1e-5)


def test_a_saved_width_can_be_lifted(folder: str, tmp_path: Path) -> None:
    """`truncate_dim` of the object counts from the next call, also where the model was saved with one, and None is all of it."""
    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu", truncate_dim=8)
    theirs.save(str(tmp_path / "saved"))
    for ours in (SentenceTransformer(str(tmp_path / "saved"), device="cpu"), SentenceTransformer(theirs)):
        same(ours.encode(TEXTS), theirs.encode(TEXTS))
        ours.truncate_dim = None
        assert ours.encode(TEXTS).shape[1] > 8
        with ours.truncate_embeddings(4):
            assert ours.encode(TEXTS).shape[1] == 4
    assert theirs.truncate_dim == 8
