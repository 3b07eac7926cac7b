"""Models loaded once for all tests of the LangChain adapter, and what those tests compare with."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from langchain_memsafe import MemsafeCrossEncoder, MemsafeEmbeddings, MemsafeRerank
from memsafe import Embedder, Reranker

Calls = list[dict[str, Any]]

CLASSIC = "langchain_classic" if importlib.util.find_spec("langchain_classic") else "langchain"
"""Where retrievers and compressors live: `langchain` until 0.3, `langchain-classic` since."""


@pytest.fixture(scope="session")
def ours(minilm: str) -> MemsafeEmbeddings:
    return MemsafeEmbeddings(model_name=minilm)


@pytest.fixture(scope="session")
def reranker(demo_reranker: str) -> MemsafeRerank:
    return MemsafeRerank(model_name=demo_reranker)


@pytest.fixture(scope="session")
def cross_encoder(demo_reranker: str) -> MemsafeCrossEncoder:
    return MemsafeCrossEncoder(model_name=demo_reranker)


@pytest.fixture(scope="session")
def two_labels(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _labelled(minilm, tmp_path_factory.mktemp("models") / "two-labels", 2)


@pytest.fixture(scope="session")
def three_labels(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _labelled(minilm, tmp_path_factory.mktemp("models") / "three-labels", 3)


def _labelled(minilm: str, folder: Path, num_labels: int) -> Path:
    """A CrossEncoder: MiniLM under a head of random weights, the same for whoever loads it."""
    import torch
    from sentence_transformers import CrossEncoder

    with torch.random.fork_rng():
        torch.manual_seed(7)
        CrossEncoder(minilm, num_labels=num_labels, device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def texts(passages: list[str]) -> list[str]:
    """Real passages between the hard cases: line breaks, nothing, whitespace, twins, emoji."""
    hard = ["", " ", "\n", "a\nb", "a b", "twin", "twin", "naïve 文字 🎉", "\r\n\ttabs", "x" * 300]
    return [*(passage[:200] for passage in passages[:6]), *hard, *(passage[:100] for passage in passages[6:10])]


@pytest.fixture
def core_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the adapters asked of the core: method, number of inputs, options. The core does its work as ever."""
    calls: Calls = []
    for kind, names in ((Embedder, ("run", "arun")), (Reranker, ("score", "ascore", "score_pairs", "ascore_pairs"))):
        for name in names:
            monkeypatch.setattr(kind, name, _recorded(getattr(kind, name), name, calls))
    return calls


def _recorded(method: Callable[..., Any], name: str, calls: Calls) -> Callable[..., Any]:
    def recorded(self: Any, *inputs: Any, **options: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("langchain_memsafe"):  # the core's methods call each other
            calls.append({"method": name, "inputs": len(inputs[-1]), **options})
        return method(self, *inputs, **options)

    return recorded


def largest_difference(one: Any, other: Any) -> float:
    """The largest difference between two sets of rows or scores; infinite if their shapes differ."""
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return float(np.abs(one - other).max(initial=0)) if one.shape == other.shape else float("inf")


def same_ranking(one: Any, other: Any, key: str = "relevance_score") -> bool:
    """Whether two rankings (of documents, or of rerank's dicts) agree but for the rounding of scores (1e-5).

    The last digits of a score depend on what it is computed together with, and that on the memory and the moment.
    """
    sides = []
    for ranking in (list(one), list(other)):
        dumped = [entry.model_dump() if hasattr(entry, "model_dump") else dict(entry) for entry in ranking]
        sides.append((dumped, [(entry.get("metadata") or entry).pop(key) for entry in dumped]))
    (entries, scores), (others, other_scores) = sides
    return entries == others and largest_difference(scores, other_scores) < 1e-5
