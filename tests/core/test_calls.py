"""Calls: copies and pickles of what makes them, asyncio without its default executor, options of the model's own."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from memsafe import ConfigError, Embedder, MemoryPolicy, Reranker
from tests.tiny_models import save_embedder, st_modules

st_models = st_modules()

WAYS = [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))]


@pytest.mark.parametrize("way", WAYS)
def test_copies_carry_the_settings_and_load_on_first_use(tmp_path: Path, way: Any) -> None:
    """A copied or pickled Embedder is small, loads nothing until it is used, and then gives the same numbers."""
    folder = save_embedder(tmp_path, "bert", prompts={"query": "q: "})
    memory = MemoryPolicy(reserve="64MiB")
    with Embedder(folder, device="cpu", normalize=True, truncate_dim=16, max_length=20, memory=memory) as ours:
        assert len(pickle.dumps(ours)) < 2_000
        twin = way(ours)
        assert "_engine" not in vars(twin)
        wanted = ours.embed_queries(["a b", "c"])
        ours.close()
        assert np.array_equal(twin.embed_queries(["a b", "c"]), wanted)
        assert (twin.max_length, twin.memory, twin.dimension) == (20, memory, 16)
        with pytest.raises(AttributeError, match="no_such"):
            twin.no_such  # noqa: B018
        twin.close()
    way(ours).close()  # never used: nothing to free


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.cuts
def test_copies_of_a_reranker(demo_reranker: str, way: Any) -> None:
    """The same for a Reranker, its own options included."""
    with Reranker(
        demo_reranker, device="cpu", activation_fn=torch.tanh, truncation="only_second", max_length=60
    ) as ours:
        wanted = ours.score("which river", ["the Nile " * 80, "a desert"])
        with way(ours) as twin:
            assert np.array_equal(twin.score("which river", ["the Nile " * 80, "a desert"]), wanted)


def test_a_loaded_model_does_not_travel(minilm: str) -> None:
    """An Embedder made of a loaded model says why it cannot be copied, and what to do."""
    with Embedder(SentenceTransformer(minilm, device="cpu"), device="cpu") as ours:
        for way in WAYS:
            with pytest.raises(ConfigError, match="folder or a hub id"):
                way(ours)


def test_threads_that_use_a_copy_at_once_load_it_once(tmp_path: Path) -> None:
    """Eight threads meet a copy that is not loaded yet: one model, equal rows (but for the rounding of what runs together)."""
    with Embedder(str(save_embedder(tmp_path, "bert")), device="cpu") as ours:
        twin = copy.copy(ours)
        engines: set[int] = set()

        def use(number: int) -> np.ndarray:
            rows: np.ndarray = twin.embed_documents(["a", "b"])
            engines.add(id(twin._engine))
            return rows

        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(use, range(8)))
        assert len(engines) == 1 and all(np.allclose(one, rows[0], atol=1e-6) for one in rows)
        twin.close()


@pytest.mark.timeout(60)
def test_async_calls_need_no_thread_of_the_default_executor(minilm: str, demo_reranker: str) -> None:
    """Every thread of asyncio's default executor waits for our result, and it comes."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2))
        done = threading.Event()
        blocked = [asyncio.create_task(asyncio.to_thread(done.wait, 50)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with Embedder(minilm, device="cpu") as ours, Reranker(demo_reranker, device="cpu") as ranker:
            rows, scores = await asyncio.gather(
                ours.aembed_documents(["a", "b"], precision="int8"), ranker.ascore("a", ["b", "c"])
            )
            assert rows.shape == (2, 384) and scores.shape == (2,) and not done.is_set()
        done.set()
        await asyncio.gather(*blocked)

    asyncio.run(main())


class Named(nn.Module):
    """A module with tasks of its own names, which refuses others, as jina-embeddings-v3 does."""

    forward_kwargs = frozenset({"task"})

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def tokenizer(self) -> Any:
        return self.inner.tokenizer

    def preprocess(self, inputs: Any, prompt: str | None = None, task: str | None = None, **_: Any) -> Any:
        if task not in (None, "retrieval.query", "retrieval.passage"):
            raise ValueError(f"unknown task {task}")
        tokenize = self.inner.preprocess if hasattr(self.inner, "preprocess") else self.inner.tokenize
        return tokenize([(prompt or "") + text for text in inputs])

    tokenize = preprocess

    def forward(self, features: Any, task: str | None = None) -> Any:
        features = self.inner(features)
        features["token_embeddings"] = features["token_embeddings"] * {None: 1, "retrieval.query": 2}.get(task, 3)
        return features


def test_a_model_with_tasks_of_its_own_names(tmp_path: Path) -> None:
    """kind alone does not fail on a model that calls its tasks otherwise; a task that is named reaches it."""
    inner = st_models.Transformer(str(save_embedder(tmp_path, "bert")))
    model = SentenceTransformer(modules=[Named(inner), st_models.Pooling(32)], device="cpu")
    wanted = [model.encode(["a text"], task=task) for task in (None, "retrieval.query", "retrieval.passage")]
    with Embedder(model, device="cpu") as ours:
        assert np.allclose(ours.embed_queries(["a text"]), wanted[0], atol=1e-5)
        assert np.allclose(ours.embed_queries(["a text"], task="retrieval.query"), wanted[1], atol=1e-5)
        assert np.allclose(ours.embed_documents(["a text"], task="retrieval.passage"), wanted[2], atol=1e-5)
