"""Copies, dictionaries, pickles and worker processes of MemsafeEmbedding."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import logging
import os
import pickle
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from llama_index.core.callbacks import CallbackManager
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from pydantic import PrivateAttr

from llama_index_memsafe import MemsafeEmbedding, MemsafeRerank
from llama_index_memsafe._state import CoreHolder
from memsafe import ConfigError, Embedder, MemoryPolicy
from tests.llama_index.conftest import TEXTS, CoreCalls


class Broken:
    """Pickles, and fails to unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_fail, ())


def _fail() -> None:
    raise RuntimeError("not in this process")


def quiet_hook(event: Any) -> None:
    """A hook that can be pickled."""


def test_class_name(ours: MemsafeEmbedding) -> None:
    """Difference: the class names itself in dictionaries and events."""
    assert MemsafeEmbedding.class_name() == ours.to_dict()["class_name"] == "MemsafeEmbedding"


@pytest.mark.parametrize("way", ["dict", "json"])
@pytest.mark.cuts
def test_a_dictionary_builds_an_equal_object(tiny: str, way: str) -> None:
    """Difference: from_dict(to_dict()) works (upstream: TypeError) and embeds alike; JSON too."""
    options: dict[str, Any] = {"query_instruction": "Q: ", "prompts": {"text": "T: "}, "truncate_dim": 16}
    model = MemsafeEmbedding(tiny, device="cpu", max_length=20, normalize=False, num_workers=3, **options)
    if way == "dict":
        again = MemsafeEmbedding.from_dict(model.to_dict(), device="cpu")
    else:
        again = MemsafeEmbedding.from_json(json.dumps(json.loads(model.to_json())), device="cpu")
    assert again.to_dict() == model.to_dict()
    for method in ("get_query_embedding", "get_text_embedding"):
        assert np.allclose(getattr(again, method)(TEXTS[6]), getattr(model, method)(TEXTS[6]), atol=1e-6)
    assert len(again.get_query_embedding("a")) == 16


def test_a_dictionary_keeps_the_group_size(plain: str, core_calls: CoreCalls) -> None:
    """A default group size stays a default through a dictionary; a chosen one stays chosen and still caps rows."""
    default = MemsafeEmbedding.from_dict(MemsafeEmbedding(plain, device="cpu").to_dict())
    chosen = MemsafeEmbedding.from_dict(MemsafeEmbedding(plain, device="cpu", embed_batch_size=4).to_dict())
    for model in (default, chosen):
        model.get_text_embedding_batch(TEXTS)
    assert [options["max_rows"] for options in core_calls.options] == [None, 4]


def test_memory_settings_are_not_in_the_cache_key(plain: str) -> None:
    """The ingestion cache finds its entries again whatever the memory policy and hooks; numbers' settings count."""
    nodes = [TextNode(text="a text", id_="1")]

    def key(**options: Any) -> str:
        return get_transformation_hash(nodes, MemsafeEmbedding(plain, device="cpu", **options))

    base = key()
    assert key(memory=MemoryPolicy(limit="6GiB", max_tokens=512)) == base
    assert key(hooks=[quiet_hook]) == base
    assert key(rate_limiter=object()) == base
    for option in ({"parity": True}, {"truncate_dim": 8}, {"prompts": {"query": "Q"}}, {"normalize": False}):
        assert key(**option) != base, option


def test_a_pickle_holds_configuration_not_weights(minilm: str) -> None:
    """Upstream's pickle of MiniLM is 92 MB; ours a few kB; it loads the model when it is first used."""
    model = MemsafeEmbedding(
        minilm, device="cpu", max_length=128, query_instruction="Q: ", memory=MemoryPolicy(learn=False)
    )
    data = pickle.dumps(model)
    assert len(data) < 20_000
    again = pickle.loads(data)
    assert not again._core.loaded
    assert (again.max_length, again.query_instruction, again.memory) == (128, "Q: ", MemoryPolicy(learn=False))
    assert again._device == "cpu"
    assert again.to_dict() == model.to_dict()
    assert np.allclose(again.get_query_embedding("a question"), model.get_query_embedding("a question"), atol=1e-6)
    assert again._core.loaded and again.embedder is not model.embedder
    assert again.embedder.max_length == 128


def test_what_cannot_be_pickled_is_left_out(plain: str, caplog: pytest.LogCaptureFixture) -> None:
    """A lambda as hook or a limiter with a lock is dropped with a warning, and the rest survives."""
    hook = lambda event: None  # noqa: E731
    model = MemsafeEmbedding(plain, device="cpu", hooks=[hook], num_workers=2)
    model.rate_limiter = threading.Lock()
    with caplog.at_level(logging.WARNING):
        again = pickle.loads(pickle.dumps(model))
    assert "unpickleable" in caplog.text
    assert (again.hooks, again.rate_limiter, again.num_workers) == ((), None, 2)
    assert len(again.get_text_embedding_batch(TEXTS)) == 23


def test_unpickling_never_raises(plain: str, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in __setstate__ would hang a process pool's parent: broken parts take their defaults instead."""
    model = MemsafeEmbedding(plain, device="cpu", num_workers=5)
    model.rate_limiter = Broken()
    with caplog.at_level(logging.WARNING):
        again = pickle.loads(pickle.dumps(model))
    assert again.rate_limiter is None and again.num_workers == 5
    assert "rate_limiter" in caplog.text
    assert len(again.get_text_embedding("a text")) == 32
    for state in (None, {}, {"fields": {"model_name": b"not a pickle"}, "private": {}, "fields_set": []}, 7):
        lost = object.__new__(MemsafeEmbedding)
        lost.__setstate__(state)
        assert lost.callback_manager is not None
        with pytest.raises(ConfigError, match="construct it anew"):
            lost.get_text_embedding("a text")


class Tagged(MemsafeEmbedding):
    """A user's subclass with a field and a private attribute."""

    tag: str = "none"
    _count: int = PrivateAttr(default=0)


def test_a_subclass_survives_pickling(plain: str) -> None:
    """Fields and private attributes that a subclass adds travel too."""
    model = Tagged(plain, device="cpu")
    model.tag, model._count = "mine", 3
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is Tagged and (again.tag, again._count) == ("mine", 3)
    assert len(again.get_text_embedding("a text")) == 32


def test_model_copy_shares_the_model(ours: MemsafeEmbedding) -> None:
    """model_copy and copy.copy share the loaded model, as upstream; fields are their own."""
    for copied in (ours.model_copy(update={"normalize": False}), copy.copy(ours)):
        assert copied.embedder is ours.embedder
    copied = ours.model_copy(update={"normalize": False})
    assert ours.normalize and not copied.normalize
    assert abs(np.linalg.norm(copied.get_text_embedding("a text")) - 1) > 1e-3


def test_deepcopy_is_independent(plain: str) -> None:
    """A deep copy has its own fields and its own model, loaded on first use; services stay the same objects."""
    cache = SimpleKVStore()
    model = MemsafeEmbedding(plain, device="cpu", embeddings_cache=cache, prompts={"query": "Q: "})
    copied = copy.deepcopy(model)
    assert not copied._core.loaded
    assert copied.embeddings_cache is cache and copied.callback_manager is model.callback_manager
    assert copied.prompts == model.prompts and copied.prompts is not model.prompts
    assert copied.get_query_embedding("a") == pytest.approx(model.get_query_embedding("a"), abs=1e-6)
    copied.embeddings_cache = None
    assert copied.get_text_embedding("b") == pytest.approx(model.get_text_embedding("b"), abs=1e-6)
    assert copied.embedder is not model.embedder
    model.embedder.close()
    assert len(copied.get_text_embedding("c")) == 32
    assert len(model.model_copy(deep=True).get_text_embedding("c")) == 32


def test_a_forked_child_loads_its_own(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork the parent's workers do not exist in the child: the holder builds a new core there."""
    built: list[int] = []
    holder: CoreHolder[Any] = CoreHolder(lambda **options: built.append(1) or object(), {})
    first = holder.get()
    assert holder.get() is first
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert not holder.loaded
    assert holder.get() is not first
    assert built == [1, 1]


def test_an_object_that_is_dropped_frees_its_model(plain: str) -> None:
    """Replacing Settings.embed_model must not keep the old model's weights."""
    model = MemsafeEmbedding(plain, device="cpu")
    model.get_text_embedding_batch(TEXTS)
    asyncio.run(model.aget_text_embedding_batch(TEXTS))
    alive = weakref.ref(model._model)
    del model
    for _ in range(50):  # a worker may hold its last micro-batch for a moment
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.1)
    assert alive() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_real_fork(plain: str) -> None:
    """A forked child uses the parent's object and gets the same numbers from a model of its own."""
    import multiprocessing

    model = MemsafeEmbedding(plain, device="cpu")
    expected = model.get_text_embedding_batch(TEXTS)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(model.get_text_embedding_batch(TEXTS)), daemon=True)
    child.start()
    assert receiver.poll(60)
    assert np.allclose(receiver.recv(), expected, atol=1e-6)
    child.join(30)
    assert child.exitcode == 0
    assert len(model.get_text_embedding_batch(TEXTS)) == 23


def test_threads_load_one_model(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many threads that use an unpickled object at once load one model."""
    from concurrent.futures import ThreadPoolExecutor

    loads: list[int] = []
    original = Embedder.__init__

    def watch(self: Any, *args: Any, **options: Any) -> None:
        loads.append(1)
        original(self, *args, **options)

    model = pickle.loads(pickle.dumps(MemsafeEmbedding(plain, device="cpu")))
    monkeypatch.setattr(Embedder, "__init__", watch)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(model.get_text_embedding, TEXTS[:8]))
    assert len(rows) == 8 and loads == [1]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["run", "arun"])
@pytest.mark.slow
def test_ingestion_with_worker_processes(plain: str, asynchronous: bool) -> None:
    """IngestionPipeline(num_workers=2): spawned (run) and forked (arun) workers return the right embeddings."""
    model = MemsafeEmbedding(plain, device="cpu", callback_manager=CallbackManager([]))
    expected = model.get_text_embedding_batch(TEXTS)
    nodes = [TextNode(text=text) for text in TEXTS]
    pipeline = IngestionPipeline(transformations=[model], disable_cache=True)
    if asynchronous:
        done = asyncio.run(pipeline.arun(nodes=nodes, num_workers=2))
    else:
        done = pipeline.run(nodes=nodes, num_workers=2)
    assert np.allclose([node.embedding for node in done], expected, atol=1e-5)
    assert [node.text for node in done] == TEXTS


def test_ingestion_cache_is_used(plain: str, core_calls: CoreCalls) -> None:
    """A second run of a pipeline finds its embeddings in the cache, even under another memory policy."""
    nodes = [TextNode(text=text, id_=str(place)) for place, text in enumerate(TEXTS)]
    first = IngestionPipeline(transformations=[MemsafeEmbedding(plain, device="cpu")])
    first.run(nodes=nodes)
    memory = MemoryPolicy(max_tokens=256)
    second = IngestionPipeline(
        transformations=[MemsafeEmbedding(plain, device="cpu", memory=memory)], cache=first.cache
    )
    done = second.run(nodes=nodes)
    assert core_calls == [23]
    assert len(done) == 23


def test_a_reranker_pickles_alike(tiny_cross: str) -> None:
    """MemsafeRerank: pickle, deepcopy, model_copy and from_dict keep the configuration and no weights."""
    model = MemsafeRerank.from_flag(3, tiny_cross, device="cpu", memory=MemoryPolicy(learn=False))
    expected = model.reranker.score("a river", TEXTS)
    assert len(pickle.dumps(model)) < 20_000
    copies = [
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        model.model_copy(),
        MemsafeRerank.from_dict(model.to_dict()),
        MemsafeRerank.from_json(model.to_json()),
    ]
    for again in copies:
        assert (again.top_n, again.model, again.raw_scores) == (3, tiny_cross, True)
        assert again.to_dict() == model.to_dict()
        np.testing.assert_allclose(again.reranker.score("a river", TEXTS), expected, atol=1e-6)
    assert "memory" not in model.to_dict() and copies[0].memory == MemoryPolicy(learn=False)
