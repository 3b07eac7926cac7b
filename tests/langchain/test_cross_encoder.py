"""MemsafeCrossEncoder and MemsafeRerank(parity=True) against what they replace, on the same folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from langchain_memsafe import MemsafeCrossEncoder, MemsafeRerank
from memsafe import InputError
from tests.tiny_models import before

from .conftest import CLASSIC, Calls, largest_difference

_home = f"{CLASSIC}.retrievers.document_compressors"
CrossEncoderReranker: Any = importlib.import_module(_home).CrossEncoderReranker
BaseCrossEncoder: Any = importlib.import_module(f"{_home}.cross_encoder").BaseCrossEncoder

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.*langchain-community.*:DeprecationWarning")]
QUERY = "How is a string split into words?"
TEXTS = ["a train", "split a string into words", "", "words", "split a string into words", "a ship " * 40]
PAIRS = [(QUERY, text) for text in TEXTS]


class Reference(BaseModel, BaseCrossEncoder):
    """What langchain-community's HuggingFaceCrossEncoder does, in our words."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    client: Any = None
    model_name: str = "BAAI/bge-reranker-base"
    model_kwargs: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, **kwargs: Any) -> None:
        from sentence_transformers import CrossEncoder

        super().__init__(**kwargs)
        self.client = CrossEncoder(self.model_name, **self.model_kwargs)

    def score(self, text_pairs: list[tuple[str, str]]) -> Any:
        scores = self.client.predict(text_pairs)
        return [row[1] for row in scores] if scores.ndim > 1 else scores


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The class we replace, where langchain-community is installed (it is being sunset); else our writing of it."""
    if importlib.util.find_spec("langchain_community") is None:
        return Reference
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder

    return HuggingFaceCrossEncoder


@pytest.fixture(scope="module")
def peer(theirs: Any, demo_reranker: str) -> Any:
    return theirs(model_name=demo_reranker)


@pytest.fixture(params=["one label", "two labels", "three labels"])
def folder(request: pytest.FixtureRequest, demo_reranker: str, two_labels: Path, three_labels: Path) -> str:
    return {"one label": demo_reranker, "two labels": str(two_labels), "three labels": str(three_labels)}[request.param]


@pytest.mark.filterwarnings("ignore:.*longer than 24 tokens")
@pytest.mark.parametrize("model_kwargs", [{"device": "cpu"}, {"max_length": 24}], ids=str)
def test_same_scores(theirs: Any, folder: str, model_kwargs: dict[str, Any]) -> None:
    """Scores are the same to 1e-5, for one label, and for several, of which the second counts."""
    expected = theirs(model_name=folder, model_kwargs=model_kwargs).score(PAIRS)
    got = MemsafeCrossEncoder(model_name=folder, model_kwargs=model_kwargs).score(PAIRS)
    assert largest_difference(got, list(expected)) < 1e-5
    assert isinstance(got, np.ndarray) and got.dtype == np.float32 and got.shape == (len(PAIRS),)


@pytest.mark.parametrize("top_n", [0, 1, 3, 100, -1, -4])
def test_same_reranking(peer: Any, cross_encoder: MemsafeCrossEncoder, reranker: MemsafeRerank, top_n: int) -> None:
    """CrossEncoderReranker returns the same documents with ours; MemsafeRerank(parity=True) returns them by itself."""
    documents = [Document(text, id=str(i), metadata={"n": i}) for i, text in enumerate(TEXTS)]
    before = [document.model_copy(deep=True) for document in documents]
    expected = list(CrossEncoderReranker(model=peer, top_n=top_n).compress_documents(documents, QUERY))
    ours = (
        CrossEncoderReranker(model=cross_encoder, top_n=top_n),
        reranker.model_copy(update={"top_n": top_n, "parity": True}),
    )
    for compressor in ours:
        got = list(compressor.compress_documents(documents, QUERY))
        assert [id(document) for document in got] == [id(document) for document in expected]
        assert list(compressor.compress_documents([], QUERY)) == []
    assert documents == before


async def test_same_reranking_async(cross_encoder: MemsafeCrossEncoder, reranker: MemsafeRerank) -> None:
    """The async way gives the same documents."""
    documents = [Document(text) for text in TEXTS]
    for compressor in (CrossEncoderReranker(model=cross_encoder), reranker.model_copy(update={"parity": True})):
        got = await compressor.acompress_documents(documents, QUERY)
        assert [id(document) for document in got] == [
            id(document) for document in compressor.compress_documents(documents, QUERY)
        ]


def test_same_fields(theirs: Any, demo_reranker: str) -> None:
    """Upstream's fields with upstream's defaults; unknown ones refused."""
    for name, field in theirs.model_fields.items():
        ours = MemsafeCrossEncoder.model_fields[name]
        assert ours.get_default(call_default_factory=True) == field.get_default(call_default_factory=True), name
    for kind in (theirs, MemsafeCrossEncoder):
        with pytest.raises(ValidationError):
            kind(model_name=demo_reranker, batch_size=3)


def test_client(cross_encoder: MemsafeCrossEncoder) -> None:
    """client is the loaded CrossEncoder, as upstream."""
    from sentence_transformers import CrossEncoder

    assert isinstance(cross_encoder.client, CrossEncoder)
    assert cross_encoder.client is cross_encoder.reranker.model


def test_edges(peer: Any, cross_encoder: MemsafeCrossEncoder) -> None:
    """No pairs: no scores. Pairs may be lists, as upstream."""
    assert len(cross_encoder.score([])) == 0
    if not before("sentence-transformers", 6):  # version 5 fails on none
        assert len(peer.score([])) == 0
    assert largest_difference(cross_encoder.score([["a", "b"]]), peer.score([["a", "b"]])) < 1e-5  # type: ignore[list-item]


def test_scores_can_be_ranked_and_kept(cross_encoder: MemsafeCrossEncoder) -> None:
    """Scores may be gone through twice: upstream's two-label scores were used up by the first reader."""
    scores = cross_encoder.score(PAIRS)
    assert list(scores) == list(scores) != []


@pytest.mark.parametrize(
    ("pairs", "index"),
    [("bare", None), (None, None), ([("a",)], 0), ([("a", "b"), "cd"], 1), ([("a", None)], 0), ([("a", "b", "c")], 0)],
    ids=str,
)
def test_bad_pairs(cross_encoder: MemsafeCrossEncoder, pairs: Any, index: int | None) -> None:
    """What is not a list of pairs of strings is refused with the position of the culprit."""
    with pytest.raises(InputError) as caught:
        cross_encoder.score(pairs)
    assert caught.value.index == index


def test_the_reference_is_true(theirs: Any, two_labels: Path) -> None:
    """Where both are there, our writing of HuggingFaceCrossEncoder scores as the real one does."""
    if theirs is Reference:
        pytest.skip("langchain-community is not installed")
    scores = [list(kind(model_name=str(two_labels)).score(PAIRS)) for kind in (theirs, Reference)]
    assert largest_difference(*scores) < 1e-6


async def test_async_scores(cross_encoder: MemsafeCrossEncoder) -> None:
    """ascore gives the same scores."""
    assert largest_difference(await cross_encoder.ascore(PAIRS), cross_encoder.score(PAIRS)) < 1e-5


def test_one_call(cross_encoder: MemsafeCrossEncoder, core_calls: Calls) -> None:
    """All pairs go to the core in one call."""
    CrossEncoderReranker(model=cross_encoder).compress_documents([Document(text) for text in TEXTS], QUERY)
    assert [(call["method"], call["inputs"]) for call in core_calls] == [("score_pairs", len(TEXTS))]


def test_interface_of_an_older_package(monkeypatch: pytest.MonkeyPatch, demo_reranker: str) -> None:
    """The interface that langchain 0.x and langchain-classic 1.0 hold themselves takes ours too, if it is loaded."""

    class OlderInterface(ABC):
        @abstractmethod
        def score(self, text_pairs: list[tuple[str, str]]) -> list[float]: ...

    home = "langchain.retrievers.document_compressors.cross_encoder"
    older = types.ModuleType(home)
    older.BaseCrossEncoder = OlderInterface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, home, older)
    assert isinstance(MemsafeCrossEncoder(model_name=demo_reranker), (OlderInterface, BaseCrossEncoder))
    assert issubclass(MemsafeCrossEncoder, OlderInterface)


def test_without_the_interface_in_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where langchain-core has no BaseCrossEncoder (0.3, 1.0), the one of another package, or one of ours, serves."""
    from langchain_memsafe import cross_encoder

    monkeypatch.setitem(sys.modules, "langchain_core.cross_encoders", None)
    assert cross_encoder._interface().__name__ == "BaseCrossEncoder"
    for home in cross_encoder._HOMES:
        monkeypatch.setitem(sys.modules, home, None)
    ours = cross_encoder._interface()
    assert ours.__module__ == "langchain_memsafe.cross_encoder" and ours.__abstractmethods__ == {"score"}
