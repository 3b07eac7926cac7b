"""Tiny models and their exports, made once: by whoever asks first, into the cache of the test run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import save_embedder, save_reranker

NEEDS = {"openvino": ("openvino", "nncf"), "onnx": ("onnx", "onnxruntime")}


def need(engine: str) -> str:
    """`engine`, where it is installed; else the test is skipped."""
    for name in NEEDS[engine]:
        pytest.importorskip(name, reason=f'engine="{engine}" is an extra')
    return engine


@pytest.fixture(params=["openvino", "onnx"])
def engine(request: pytest.FixtureRequest) -> str:
    return need(request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers x 64 with mean pooling and a prompt for queries."""
    folder = tmp_path_factory.mktemp("runtimes") / "embedder"
    return save_embedder(
        folder, "bert", hidden_size=64, intermediate_size=128, prompts={"query": "ask: ", "document": ""}
    )


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reranker(
        tmp_path_factory.mktemp("runtimes") / "reranker", "bert", hidden_size=64, intermediate_size=128
    )
