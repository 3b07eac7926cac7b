"""MemsafeEmbeddings and the class it replaces, side by side on the same real model."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

import pytest

from langchain_memsafe import MemsafeEmbeddings
from tests.tiny_models import before

from .conftest import largest_difference

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:int8|uint8:UserWarning")]
pytest.importorskip("langchain_huggingface", reason="langchain-huggingface is not installed")

Peer = Any  # langchain_huggingface.HuggingFaceEmbeddings

PROMPTS = {"prompts": {"query": "question: ", "document": "passage: ", "other": "other: "}}


@pytest.fixture(scope="module")
def theirs(minilm: str) -> Peer:
    from langchain_huggingface import HuggingFaceEmbeddings

    return HuggingFaceEmbeddings(model_name=minilm, model_kwargs=PROMPTS)


@pytest.fixture(scope="module")
def mine(minilm: str) -> MemsafeEmbeddings:
    return MemsafeEmbeddings(model_name=minilm, model_kwargs=PROMPTS)


@pytest.mark.parametrize(
    "encode_kwargs",
    [
        {},
        {"batch_size": 3},
        {"normalize_embeddings": False},
        {"normalize_embeddings": True, "convert_to_tensor": True},
        {"truncate_dim": 64, "normalize_embeddings": True},
        {"prompt": "Represent this: "},
        {"prompt": ""},
        {"prompt_name": "other"},
        {"prompt": "wins: ", "prompt_name": "other"},
        {"precision": "float32", "chunk_size": 10, "device": None, "pool": None},
        {"precision": None},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_same_numbers(theirs: Peer, mine: MemsafeEmbeddings, texts: list[str], encode_kwargs: dict[str, Any]) -> None:
    """Documents and queries have the same numbers (1e-5), in the same order, whatever encode_kwargs says."""
    device = {"device": encode_kwargs["device"]} if encode_kwargs.get("device") else {}
    peer = theirs.model_copy(update={"encode_kwargs": encode_kwargs})
    ours = mine.model_copy(
        update={"encode_kwargs": encode_kwargs, **({"model_kwargs": {**PROMPTS, **device}} if device else {})}
    )
    documents = ours.embed_documents(texts)
    assert largest_difference(documents, peer.embed_documents(texts)) < 1e-5
    assert type(documents) is list and type(documents[0]) is list and type(documents[0][0]) is float
    query = ours.embed_query("what\nis an apple?")
    assert largest_difference(query, peer.embed_query("what\nis an apple?")) < 1e-5
    assert type(query) is list and type(query[0]) is float


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_same_quantized(theirs: Peer, mine: MemsafeEmbeddings, texts: list[str], precision: str) -> None:
    """Quantised embeddings are the same ints; a value on the border of two steps may fall to either side."""
    update = {"encode_kwargs": {"precision": precision}}
    got = mine.model_copy(update=update).embed_documents(texts)
    expected = theirs.model_copy(update=update).embed_documents(texts)
    assert type(got[0][0]) is int
    assert [len(row) for row in got] == [len(row) for row in expected]
    step = [(a - b) % 256 for row, other in zip(got, expected, strict=True) for a, b in zip(row, other, strict=True)]
    assert sum(value != 0 for value in step) <= 0.005 * len(step)
    if "int8" in precision:  # in the binary precisions eight dimensions share an int
        assert set(step) <= {0, 1, 255}


@pytest.mark.parametrize(
    ("encode_kwargs", "query_encode_kwargs"),
    [
        ({"normalize_embeddings": True, "prompt": "d: "}, {"prompt": "q: "}),
        ({"normalize_embeddings": True, "prompt": "d: "}, {}),
        ({}, {"truncate_dim": 32}),
    ],
    ids=str,
)
def test_query_encode_kwargs_replace(
    theirs: Peer, mine: MemsafeEmbeddings, encode_kwargs: dict[str, Any], query_encode_kwargs: dict[str, Any]
) -> None:
    """query_encode_kwargs takes the place of encode_kwargs for queries as a whole, and only if it is not empty."""
    update = {"encode_kwargs": encode_kwargs, "query_encode_kwargs": query_encode_kwargs}
    peer, ours = theirs.model_copy(update=update), mine.model_copy(update=update)
    assert largest_difference(ours.embed_query("an apple"), peer.embed_query("an apple")) < 1e-5
    assert largest_difference(ours.embed_documents(["an apple"]), peer.embed_documents(["an apple"])) < 1e-5


def test_saved_prompts_are_not_used_by_default(theirs: Peer, mine: MemsafeEmbeddings) -> None:
    """A prompt saved in the model changes nothing, as upstream; a default prompt does, as upstream."""
    assert mine.embed_query("an apple") == pytest.approx(mine.embed_documents(["an apple"])[0], abs=1e-6)
    assert largest_difference(mine.embed_query("an apple"), theirs.embed_query("an apple")) < 1e-5


def test_default_prompt(minilm: str) -> None:
    """default_prompt_name in model_kwargs applies to documents and queries alike, as upstream."""
    from langchain_huggingface import HuggingFaceEmbeddings

    model_kwargs = {**PROMPTS, "default_prompt_name": "other", "device": "cpu"}
    peer = HuggingFaceEmbeddings(model_name=minilm, model_kwargs=model_kwargs)
    ours = MemsafeEmbeddings(model_name=minilm, model_kwargs=model_kwargs)
    assert largest_difference(ours.embed_query("an apple"), peer.embed_query("an apple")) < 1e-5
    assert largest_difference(ours.embed_documents(["a pear"]), peer.embed_documents(["a pear"])) < 1e-5
    assert (
        largest_difference(
            ours.embed_query("an apple"),
            ours.model_copy(update={"encode_kwargs": {"prompt": ""}}).embed_query("an apple"),
        )
        > 1e-3
    )


@pytest.mark.cuts
def test_long_texts(theirs: Peer, mine: MemsafeEmbeddings, passages: list[str]) -> None:
    """Texts longer than the model takes are cut where upstream cuts them, among shorter ones."""
    texts = [max(passages, key=len), "short", "word " * 2000]
    assert largest_difference(mine.embed_documents(texts), theirs.embed_documents(texts)) < 1e-5


def test_edges(theirs: Peer, mine: MemsafeEmbeddings) -> None:
    """No texts, an iterator of texts, one text: as upstream."""
    for make in (list, tuple, iter):
        assert (
            largest_difference(mine.embed_documents(make(["a", "b"])), theirs.embed_documents(make(["a", "b"]))) < 1e-5
        )
    assert mine.embed_documents([]) == theirs.embed_documents([]) == []


@pytest.mark.parametrize(
    ("encode_kwargs", "error", "words"),
    [
        ({"convert_to_numpy": False}, TypeError, "Expected embeddings to be a Tensor or a numpy array, got a list"),
        ({"output_value": "token_embeddings"}, TypeError, "Expected embeddings to be a Tensor or a numpy array"),
        ({"output_value": None}, TypeError, "Expected embeddings to be a Tensor or a numpy array"),
        ({"show_progress_bar": True}, TypeError, "multiple values for keyword argument 'show_progress_bar'"),
        ({"sentences": ["a"]}, TypeError, None),
        ({"inputs": ["a"]}, TypeError, "multiple values"),
        ({"no_such_option": 1}, ValueError, "no_such_option"),
        ({"prompt_name": "missing"}, ValueError, "missing"),
        ({"precision": "float8"}, ValueError, "float8"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size must be a positive integer, got -1"),
    ],
    ids=str,
)
def test_same_errors(
    theirs: Peer, mine: MemsafeEmbeddings, encode_kwargs: dict[str, Any], error: type[Exception], words: str | None
) -> None:
    """What upstream refuses, ours refuses with the same kind of error, for documents and for queries."""
    for embeddings in (theirs, mine):
        copied = embeddings.model_copy(update={"encode_kwargs": encode_kwargs})
        if embeddings is theirs and before("sentence-transformers", 6) and words != "float8" and words != "missing":
            continue  # version 5 takes options that it does not know, and fails on batch sizes in range()
        if embeddings is theirs and words is None:
            continue  # upstream drops the old name of the inputs without a word; ours says so
        with pytest.raises(error, match=words):
            copied.embed_documents(["a"])
        with pytest.raises(error, match=words):
            copied.embed_query("a")


@pytest.mark.parametrize(
    "kwargs", [{"extra": 1}, {"embed_batch_size": 10}, {"model_kwargs": None}, {"multi_process": "maybe"}], ids=str
)
def test_same_validation(minilm: str, kwargs: dict[str, Any]) -> None:
    """Unknown fields and wrong types are refused by both with pydantic's ValidationError, before any model is loaded."""
    from langchain_huggingface import HuggingFaceEmbeddings
    from pydantic import ValidationError

    for kind in (HuggingFaceEmbeddings, MemsafeEmbeddings):
        with pytest.raises(ValidationError):
            kind(model_name=minilm, **kwargs)


def test_same_fields() -> None:
    """Every field of upstream is one of ours, with the same alias and default; before 1.0 there was no alias."""
    from langchain_huggingface import HuggingFaceEmbeddings

    for name, field in HuggingFaceEmbeddings.model_fields.items():
        ours = MemsafeEmbeddings.model_fields[name]
        assert ours.alias == (field.alias or ("model" if name == "model_name" else None)), name
        assert ours.get_default(call_default_factory=True) == field.get_default(call_default_factory=True), name
    for option in ("extra", "protected_namespaces", "populate_by_name"):
        assert MemsafeEmbeddings.model_config[option] == HuggingFaceEmbeddings.model_config[option]


def test_same_ipex_warning(minilm: str) -> None:
    """backend="ipex" warns in upstream's words and goes on with torch."""
    from langchain_huggingface import HuggingFaceEmbeddings

    if tuple(int(part) for part in version("langchain-huggingface").split(".")[:2]) < (1, 2):
        pytest.skip("older versions of langchain-huggingface ask for optimum-intel")
    said = []
    for kind in (HuggingFaceEmbeddings, MemsafeEmbeddings):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            embeddings = kind(model_name=minilm, model_kwargs={"backend": "ipex"})
        said.append([str(warning.message) for warning in caught if warning.category is UserWarning])
        assert embeddings.model_kwargs["backend"] == "torch"
    assert said[0] == said[1] != []


def test_missing_model(tmp_path: Any) -> None:
    """A folder without a model is refused when the object is made, by both."""
    from langchain_huggingface import HuggingFaceEmbeddings

    for kind in (HuggingFaceEmbeddings, MemsafeEmbeddings):
        with pytest.raises((OSError, ValueError)):
            kind(model_name=str(tmp_path))


@pytest.mark.slow
def test_multi_process(theirs: Peer, minilm: str, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """multi_process=True gives upstream's numbers, encode_kwargs ignored as upstream ignores them, but with a warning."""
    from sentence_transformers import SentenceTransformer

    start = SentenceTransformer.start_multi_process_pool  # with one worker, not four: the numbers are the same
    monkeypatch.setattr(SentenceTransformer, "start_multi_process_pool", lambda model: start(model, ["cpu"]))
    update = {"multi_process": True, "encode_kwargs": {"normalize_embeddings": False, "prompt": "p: "}}
    with pytest.warns(UserWarning, match="ignores encode_kwargs"):
        ours = MemsafeEmbeddings(model_name=minilm, model_kwargs=PROMPTS, **update)
    assert (
        largest_difference(ours.embed_documents(texts), theirs.model_copy(update=update).embed_documents(texts)) < 1e-5
    )
