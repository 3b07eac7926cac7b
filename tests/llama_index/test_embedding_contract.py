"""What MemsafeEmbedding promises beyond upstream: the core sees whole lists, prompts are used, async never blocks."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import MockEmbedding, Settings, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager
from llama_index.core.embeddings.utils import resolve_embed_model
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore

from llama_index_memsafe import MemsafeEmbedding, _cache
from llama_index_memsafe._devices import device_list
from llama_index_memsafe._instructions import QUERY_INSTRUCTIONS, TEXT_INSTRUCTIONS
from memsafe import ConfigError, Embedder, InputError, InputTooLargeError, MemoryPolicy, MemsafeError
from tests.llama_index.conftest import DOCUMENT, QUERY, TEXTS, CoreCalls, recorded
from tests.tiny_models import before, save_embedder, save_routed


class Limiter:
    """Counts what a rate limiter is asked for."""

    def __init__(self) -> None:
        self.acquired = self.awaited = 0

    def acquire(self, num_tokens: int = 0) -> None:
        self.acquired += 1

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.awaited += 1


def embed_batch(model: MemsafeEmbedding, texts: list[str], asynchronous: bool) -> list[list[float]]:
    return (
        asyncio.run(model.aget_text_embedding_batch(texts)) if asynchronous else model.get_text_embedding_batch(texts)
    )


# --- The whole list, whatever the group -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"embed_batch_size": 3}, {"num_workers": 4}, {"embed_batch_size": 2048}])
def test_the_core_sees_the_whole_list_in_one_call(plain: str, core_calls: CoreCalls, options: dict[str, Any]) -> None:
    """A list of 23 texts is one call of the core, sync and async, whatever embed_batch_size and num_workers say."""
    model = MemsafeEmbedding(plain, device="cpu", **options)
    expected = model.get_text_embedding_batch(TEXTS)
    assert np.allclose(asyncio.run(model.aget_text_embedding_batch(TEXTS)), expected, atol=1e-6)
    assert core_calls == [23, 23]


def test_rows_of_a_micro_batch_are_capped_only_if_asked(plain: str, core_calls: CoreCalls) -> None:
    """embed_batch_size left alone caps nothing; set in the constructor or afterwards it reaches the core as max_rows."""
    unset = MemsafeEmbedding(plain, device="cpu")
    assert unset.embed_batch_size == 10
    unset.get_text_embedding_batch(TEXTS)
    unset.embed_batch_size = 5
    unset.get_text_embedding_batch(TEXTS)
    MemsafeEmbedding(plain, device="cpu", embed_batch_size=10).get_text_embedding_batch(TEXTS)
    assert [options["max_rows"] for options in core_calls.options] == [None, 5, 10]


def test_an_empty_list_calls_nothing(ours: MemsafeEmbedding, core_calls: CoreCalls) -> None:
    """No texts: an empty list, no event, no call of the core, sync and async."""
    with recorded(ours) as log:
        assert ours.get_text_embedding_batch([]) == []
        assert asyncio.run(ours.aget_text_embedding_batch([])) == []
    assert core_calls == []
    assert [name for name in log.names if "span" not in name.lower()] == []


def test_an_index_embeds_its_nodes_in_one_call(ours: MemsafeEmbedding, core_calls: CoreCalls) -> None:
    """VectorStoreIndex hands all its nodes to the core at once, and its retriever finds the text that was asked for."""
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=ours)
    assert core_calls == [23]
    found = index.as_retriever(similarity_top_k=1).retrieve(TEXTS[7])
    assert found[0].text == TEXTS[7]


def test_a_bar_counts_texts(ours: MemsafeEmbedding, capsys: pytest.CaptureFixture[str]) -> None:
    """show_progress=True draws upstream's bar over all texts, sync and async; the default draws none."""
    ours.get_text_embedding_batch(TEXTS)
    assert "Generating embeddings" not in capsys.readouterr().err
    ours.get_text_embedding_batch(TEXTS, show_progress=True)
    shown = capsys.readouterr().err
    assert "Generating embeddings: 100%" in shown and "23/23" in shown
    asyncio.run(ours.aget_text_embedding_batch(TEXTS, show_progress=True))
    assert "23/23" in capsys.readouterr().err


def test_the_bar_moves_with_finished_work(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core reports finished inputs while it works; their sum is the length of the list."""
    from tqdm.auto import tqdm

    steps: list[float] = []
    original = tqdm.update
    monkeypatch.setattr(tqdm, "update", lambda self, n=1: (steps.append(n), original(self, n))[1])
    model = MemsafeEmbedding(plain, device="cpu", embed_batch_size=4)
    model.get_text_embedding_batch(TEXTS, show_progress=True)
    assert sum(steps) == 23
    assert len([step for step in steps if step]) >= 6


def test_unknown_keywords_of_a_call_are_ignored(ours: MemsafeEmbedding) -> None:
    """IngestionPipeline passes its keywords on to transformations; they change nothing, as upstream."""
    assert len(ours.get_text_embedding_batch(TEXTS[:2], anything=1)) == 2
    assert len(asyncio.run(ours.aget_text_embedding_batch(TEXTS[:2], anything=1))) == 2


# --- Caches and rate limits -------------------------------------------------------------------------------------------


def test_the_constructor_takes_the_fields_that_upstreams_refuses(plain: str) -> None:
    """num_workers, embeddings_cache, rate_limiter and prompts are arguments; a wrong cache is a TypeError."""
    cache, limiter = SimpleKVStore(), Limiter()
    model = MemsafeEmbedding(
        plain, device="cpu", num_workers=2, embeddings_cache=cache, rate_limiter=limiter, prompts={"query": "Q: "}
    )
    assert (model.num_workers, model.embeddings_cache, model.rate_limiter) == (2, cache, limiter)
    with pytest.raises(TypeError, match="embeddings_cache must be of type BaseKVStore"):
        MemsafeEmbedding(plain, device="cpu", embeddings_cache="a path")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_cache_is_read_and_written(plain: str, core_calls: CoreCalls, asynchronous: bool) -> None:
    """The core gets only what the cache lacks; results keep their order; the cache then holds every text."""
    cache = SimpleKVStore()
    model = MemsafeEmbedding(plain, device="cpu", embeddings_cache=cache)

    def batch(texts: list[str]) -> list[list[float]]:
        if asynchronous:
            return asyncio.run(model.aget_text_embedding_batch(texts))
        return model.get_text_embedding_batch(texts)

    expected = MemsafeEmbedding(plain, device="cpu").get_text_embedding_batch(TEXTS)
    core_calls.clear()
    batch(TEXTS[3:9])
    cache.put("marked", {"id": [9.0, 9.0]}, collection="embeddings")
    got = batch([*TEXTS, "marked", TEXTS[0]])
    assert core_calls == [6, 17]
    assert np.allclose(got[:23], expected, atol=1e-5)
    assert got[23] == [9.0, 9.0] and got[24] == got[0]
    assert batch(TEXTS) == got[:23]
    assert core_calls == [6, 17]
    assert all(len(cache.get(text, collection="embeddings")) == 1 for text in TEXTS)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_finished_is_in_the_cache_when_a_later_part_fails(
    plain: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work goes into the cache part by part: a failure, Ctrl-C or a kill later on does not lose it."""
    monkeypatch.setattr(_cache, "_CACHED_AT_ONCE", 8)
    model = MemsafeEmbedding(plain, device="cpu", embeddings_cache=SimpleKVStore())
    original, calls = (Embedder.arun if asynchronous else Embedder.run), []

    def run(self: Any, texts: list[str], **options: Any) -> Any:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, texts, **options)

    monkeypatch.setattr(Embedder, "arun" if asynchronous else "run", run)
    with pytest.raises(KeyboardInterrupt):
        embed_batch(model, TEXTS, asynchronous)
    assert calls == [8, 8, 7]
    assert set(model.embeddings_cache.get_all(collection="embeddings")) == set(TEXTS[:16])
    assert len(model.get_text_embedding_batch(TEXTS)) == 23
    assert calls[3:] == ([] if asynchronous else [7])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_text_too_large_leaves_the_others_in_the_cache(
    plain: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error speaks of the caller's list, not of what the cache lacked; finished neighbours are kept and in `partial`."""
    model = MemsafeEmbedding(plain, device="cpu", embeddings_cache=SimpleKVStore())
    model.get_text_embedding_batch(TEXTS[:5])
    original = Embedder.run

    def run(self: Any, texts: list[str], **options: Any) -> Any:
        rows = original(self, texts, **options).embeddings
        place = texts.index(TEXTS[9])
        rows[place] = np.nan
        raise InputTooLargeError(
            f"input {place} needs 9 GiB alone",
            index=place,
            num_tokens=9,
            need_bytes=9,
            free_bytes=1,
            partial=rows,
            failed=[place],
        )

    async def arun(self: Any, texts: list[str], **options: Any) -> Any:
        return run(self, texts, **options)

    monkeypatch.setattr(Embedder, "run", run)
    monkeypatch.setattr(Embedder, "arun", arun)
    texts = [*TEXTS[3:12], TEXTS[9]]
    with pytest.raises(InputTooLargeError, match=r"^input 6 needs") as caught:
        embed_batch(model, texts, asynchronous)
    monkeypatch.undo()
    assert (caught.value.index, caught.value.failed) == (6, [6, 9])
    assert set(model.embeddings_cache.get_all(collection="embeddings")) == set(TEXTS[:12]) - {TEXTS[9]}
    expected = np.asarray(MemsafeEmbedding(plain, device="cpu").get_text_embedding_batch(texts))
    assert np.isnan(caught.value.partial[[6, 9]]).all()
    np.testing.assert_allclose(np.delete(caught.value.partial, [6, 9], 0), np.delete(expected, [6, 9], 0), atol=1e-5)


def test_a_bad_text_beside_cached_ones_is_named_by_its_place(plain: str) -> None:
    """The index is that of the caller's list, though the cache leaves fewer texts to embed."""
    model = MemsafeEmbedding(plain, device="cpu", embeddings_cache=SimpleKVStore())
    model.get_text_embedding_batch(TEXTS[:5])
    bad: Any = [*TEXTS[:7], None]
    for call in (model.get_text_embedding_batch, lambda texts: asyncio.run(model.aget_text_embedding_batch(texts))):
        with pytest.raises(InputError, match="entry 7") as caught:
            call(bad)
        assert caught.value.index == 7


def test_the_cache_serves_single_texts_and_queries(plain: str, core_calls: CoreCalls) -> None:
    """What a batch has put into the cache, get_text_embedding and get_query_embedding find, as upstream."""
    model = MemsafeEmbedding(plain, device="cpu", embeddings_cache=SimpleKVStore())
    first = model.get_text_embedding_batch(TEXTS[:1])
    assert model.get_text_embedding(TEXTS[0]) == model.get_query_embedding(TEXTS[0]) == first[0]
    assert asyncio.run(model.aget_text_embedding(TEXTS[0])) == first[0]
    assert core_calls == [1]


@pytest.mark.parametrize(("cached", "sync", "asynchronous"), [(False, 3, 3), (True, 3, 0)])
def test_the_rate_limiter_is_asked_once_per_group(plain: str, cached: bool, sync: int, asynchronous: int) -> None:
    """23 texts in tens: three times; asynchronously with a cache never. Upstream's counts."""
    limiter = Limiter()
    cache = SimpleKVStore() if cached else None
    model = MemsafeEmbedding(plain, device="cpu", rate_limiter=limiter, embeddings_cache=cache)
    model.get_text_embedding_batch(TEXTS)
    asyncio.run(model.aget_text_embedding_batch(TEXTS))
    assert (limiter.acquired, limiter.awaited) == (sync, asynchronous)


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "query", "document"),
    [
        ({}, QUERY, DOCUMENT),
        ({"parity": True}, "", ""),
        ({"query_instruction": "Q: ", "text_instruction": "T: "}, "Q: ", "T: "),
        ({"query_instruction": "Q: ", "text_instruction": "T: ", "parity": True}, "Q: ", "T: "),
        ({"query_instruction": "", "text_instruction": ""}, "", ""),
        ({"prompts": {"query": "P: ", "passage": "D: "}}, "P: ", "D: "),
        ({"prompts": {"query": ""}}, "", DOCUMENT),
        (
            {"prompts": {"query": "P: ", "text": "D: "}, "query_instruction": "Q: ", "text_instruction": "T: "},
            "Q: ",
            "T: ",
        ),
    ],
    ids=str,
)
def test_which_prompt_is_used(tiny: str, options: dict[str, Any], query: str, document: str) -> None:
    """The instruction, else `prompts`, else the prompt saved in the model; an empty one means none."""
    if options.get("parity") and "" in (query, document) and before("sentence-transformers", 6):
        pytest.skip("sentence-transformers 5 puts the saved prompt in the place of an empty one, for upstream too")
    model = MemsafeEmbedding(tiny, device="cpu", **options)
    bare = Embedder(tiny, device="cpu")

    def expected(prompt: str) -> Any:
        return bare.run(["the river"], prompt=prompt, normalize=True).embeddings[0]

    assert np.allclose(model.get_query_embedding("the river"), expected(query), atol=1e-5)
    assert np.allclose(model.get_text_embedding("the river"), expected(document), atol=1e-5)
    assert np.allclose(asyncio.run(model.aget_query_embedding("the river")), expected(query), atol=1e-5)
    assert np.allclose(model.get_text_embedding_batch(["the river"])[0], expected(document), atol=1e-5)


@pytest.mark.parametrize("name", ["BAAI/bge-small-en-v1.5", "BAAI/bge-large-zh", "hkunlp/instructor-xl"])
@pytest.mark.parametrize("parity", [False, True])
def test_instructions_by_model_name(plain: str, monkeypatch: pytest.MonkeyPatch, name: str, parity: bool) -> None:
    """A BGE or Instructor name brings its instruction; "" keeps it (as upstream), prompts={"query": ""} removes it."""
    original = Embedder.__init__
    monkeypatch.setattr(Embedder, "__init__", lambda self, model, **options: original(self, plain, **options))

    def prompt(kind: str, **options: Any) -> str:
        model = MemsafeEmbedding(name, device="cpu", parity=parity, **options)
        return str(model.embedder.prompts.get(kind) or "")

    assert prompt("query") == prompt("query", query_instruction="") == QUERY_INSTRUCTIONS[name]
    assert prompt("text") == TEXT_INSTRUCTIONS.get(name, "")
    assert prompt("query", query_instruction="Mine: ") == "Mine: "
    assert prompt("query", prompts={"query": ""}) == ""


def test_which_route_is_taken(tiny: str, core_calls: CoreCalls) -> None:
    """Queries and texts tell the core what they are, for models with routes; parity tells nothing, as upstream.

    Queries are urgent either way: someone waits for them.
    """
    for parity in (False, True):
        model = MemsafeEmbedding(tiny, device="cpu", parity=parity)
        model.get_query_embedding("a")
        model.get_text_embedding("a")
        model._embed(["a"])
    kinds = [(options["kind"], options.get("prompt_name")) for options in core_calls.options]
    assert kinds[:3] == [("query", None), ("document", None), (None, None)]
    assert kinds[3:] == [(None, "query"), (None, "text"), (None, None)]
    assert [options["urgent"] for options in core_calls.options] == [True, False, False] * 2


# --- Async ------------------------------------------------------------------------------------------------------------


@pytest.mark.cuts
async def test_the_event_loop_stays_free(plain: str, passages: list[str]) -> None:
    """While a batch is embedded the loop keeps turning: no gap is longer than a fraction of the work."""
    model = MemsafeEmbedding(plain, device="cpu")
    gaps: list[float] = []
    last = time.perf_counter()
    work = asyncio.ensure_future(model.aget_text_embedding_batch(passages * 3))
    while not work.done():
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    assert len(await work) == 3 * len(passages)
    assert len(gaps) > 10
    assert max(gaps) < max(0.25, sum(gaps) / 4)


@pytest.mark.parametrize("cached", [False, True])
async def test_long_lists_leave_the_loop_free(plain: str, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and cache entries of 30,000 texts are handled some at a time: the loop turns in between,
    whatever the core takes (here nothing)."""
    store = SimpleKVStore() if cached else None
    model = MemsafeEmbedding(plain, device="cpu", embeddings_cache=store)

    async def nothing(self: Any, inputs: list[str], prompt_name: str | None = None) -> list[list[float]]:
        return [[1.0]] * len(inputs)

    monkeypatch.setattr(MemsafeEmbedding, "_aembed", nothing)
    turns = 0
    work = asyncio.ensure_future(model.aget_text_embedding_batch([f"text {n}" for n in range(30_000)]))
    while not work.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(await work) == 30_000
    # 3,000 groups start and end 32 at a time; with a cache 30,000 lookups and as many entries go 256 at a time.
    assert turns > (180 + 230 if cached else 180)


async def test_concurrent_calls_all_get_their_own_rows(ours: MemsafeEmbedding) -> None:
    """Batches and single texts at the same time return what they return alone."""
    expected = ours.get_text_embedding_batch(TEXTS)
    results = await asyncio.gather(
        *[ours.aget_text_embedding(text) for text in TEXTS], ours.aget_text_embedding_batch(TEXTS)
    )
    assert np.allclose(results[:23], expected, atol=1e-5)
    assert np.allclose(results[23], expected, atol=1e-5)


@pytest.mark.cuts
async def test_a_cancelled_batch_ends_its_events(plain: str, passages: list[str]) -> None:
    """Cancelling a batch raises CancelledError, closes every callback, and the next call works."""
    model = MemsafeEmbedding(plain, device="cpu")
    with recorded(model) as log:  # asserts that no callback stays open
        work = asyncio.ensure_future(model.aget_text_embedding_batch(passages * 20))
        await asyncio.sleep(0.1)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
    assert {"exception": "exception"} in [content for name, content in log.entries if name == "end embedding"]
    assert len(await model.aget_text_embedding_batch(TEXTS)) == 23


async def test_an_async_failure_ends_every_event(ours: MemsafeEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Difference: upstream leaves the callbacks of a failed async batch open; ours ends each with the exception."""

    async def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("no such weight")

    monkeypatch.setattr(MemsafeEmbedding, "_aembed", fail)
    with recorded(ours) as log, pytest.raises(KeyError):
        await ours.aget_text_embedding_batch(TEXTS)
    ends = [content for name, content in log.entries if name == "end embedding"]
    assert ends == [{"exception": "exception"}] * 3
    assert "EmbeddingEndEvent" not in log.names


async def test_loading_after_unpickling_leaves_the_loop_free(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first async call after unpickling loads the model in a thread."""
    import pickle

    model = pickle.loads(pickle.dumps(MemsafeEmbedding(plain, device="cpu")))
    original = Embedder.__init__

    def slow(self: Any, *args: Any, **options: Any) -> None:
        time.sleep(0.3)
        original(self, *args, **options)

    monkeypatch.setattr(Embedder, "__init__", slow)
    turns = 0
    work = asyncio.ensure_future(model.aget_query_embedding("a question"))
    while not work.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert len(await work) == 32
    assert turns > 5


# --- Subclasses, as users of upstream write them ----------------------------------------------------------------------


def test_a_subclass_that_overrides_the_work_is_obeyed(plain: str) -> None:
    """Whoever overrode _embed in a subclass of upstream's class finds it called from every method, async too."""

    class Marked(MemsafeEmbedding):
        def _embed(self, inputs: list[str], prompt_name: str | None = None) -> list[list[float]]:
            return [[float(len(text))] for text in inputs]

    model = Marked(plain, device="cpu")
    assert model.get_text_embedding_batch(["a", "bb"]) == [[1.0], [2.0]]
    assert model.get_query_embedding("ccc") == [3.0]
    assert asyncio.run(model.aget_text_embedding_batch(["a", "bb"])) == [[1.0], [2.0]]
    assert asyncio.run(model.aget_query_embedding("ccc")) == asyncio.run(model.aget_text_embedding("ccc")) == [3.0]


def test_a_patched_class_is_obeyed(ours: MemsafeEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that replaces a method of the class itself sees it used by the asynchronous methods."""
    monkeypatch.setattr(MemsafeEmbedding, "_embed", lambda self, inputs, prompt_name=None: [[7.0] for _ in inputs])
    assert asyncio.run(ours.aget_query_embedding("a question")) == ours.get_query_embedding("a question") == [7.0]
    assert asyncio.run(ours.aget_text_embedding_batch(["a", "b"])) == [[7.0], [7.0]]


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, b"bytes", 7, ["nested"]], ids=repr)
def test_a_bad_text_is_named_by_its_place_at_once(ours: MemsafeEmbedding, bad: Any) -> None:
    """Difference: no retries (upstream sleeps 8 s before it raises); an InputError says which text it is."""
    texts: Any = [*TEXTS[:15], bad]
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        ours.get_text_embedding_batch(texts)
    assert caught.value.index == 15
    with pytest.raises(InputError):
        asyncio.run(ours.aget_text_embedding_batch(texts))
    assert time.perf_counter() - start < 2


def test_nothing_is_tried_again(ours: MemsafeEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Difference: an error comes at once (upstream tries three times and sleeps 8 s in between)."""
    tries: list[int] = []

    def fail(*args: Any, **options: Any) -> Any:
        tries.append(1)
        raise OSError("no such device")

    monkeypatch.setattr(Embedder, "run", fail)
    monkeypatch.setattr(Embedder, "arun", fail)
    with pytest.raises(OSError, match="no such device"):
        ours.get_query_embedding("a question")
    with pytest.raises(OSError, match="no such device"):
        asyncio.run(ours.aget_text_embedding_batch(TEXTS))
    assert len(tries) == 2


def test_a_bad_text_in_a_later_group_ends_the_first(ours: MemsafeEmbedding) -> None:
    """Difference: nothing is embedded when one input is bad, so the first group ends with the exception."""
    texts: Any = [*TEXTS[:15], None]
    with recorded(ours) as log, pytest.raises(InputError):
        ours.get_text_embedding_batch(texts)
    assert log.names.count("EmbeddingStartEvent") == log.names.count("end embedding") == 1
    assert "EmbeddingEndEvent" not in log.names


def test_a_model_without_a_limit(tmp_path: Any) -> None:
    """Difference: a model that takes any length has max_length None (upstream: a validation error)."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    from tests.tiny_models import minilm_folder, st_modules

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    folder = str(tmp_path / "static")
    SentenceTransformer(modules=[st_modules().StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu").save(folder)
    model = MemsafeEmbedding(folder, device="cpu")
    assert model.max_length is None
    assert np.allclose(model.get_text_embedding("a river"), model._model.encode("a river", normalize_embeddings=True))


def test_a_model_changed_afterwards_is_not_followed(plain: str) -> None:
    """Difference: the length of inputs is fixed when the model is loaded; a later change of `_model` changes nothing."""
    model = MemsafeEmbedding(plain, device="cpu")
    before = model.get_text_embedding(TEXTS[6])
    model._model.max_seq_length = 4
    assert model.get_text_embedding(TEXTS[6]) == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("bad", ["one text", b"bytes"], ids=repr)
def test_one_text_is_not_a_list(ours: MemsafeEmbedding, bad: Any) -> None:
    """Difference: upstream embeds each letter of a bare string; ours refuses it."""
    with pytest.raises(InputError, match="list"):
        ours.get_text_embedding_batch(bad)
    with pytest.raises(InputError, match="list"):
        asyncio.run(ours.aget_text_embedding_batch(bad))


def test_an_unknown_option_is_refused(plain: str) -> None:
    """Difference: a misspelt argument is a ConfigError (upstream: TypeError from SentenceTransformer)."""
    with pytest.raises(ConfigError, match="embed_batchsize"):
        MemsafeEmbedding(plain, device="cpu", embed_batchsize=4)
    with pytest.raises(ConfigError, match="memory"):
        MemsafeEmbedding(plain, device="cpu", memory="6GiB")  # type: ignore[arg-type]


def test_a_missing_model_is_one_of_our_errors(tmp_path: Any) -> None:
    """A folder without a model is a MemsafeError with the folder's name, and an OSError as upstream's."""
    with pytest.raises(MemsafeError, match=tmp_path.name) as caught:
        MemsafeEmbedding(str(tmp_path), device="cpu")
    assert isinstance(caught.value, OSError)


def test_an_option_of_the_cores_is_no_argument(plain: str) -> None:
    """Difference: ConfigError; upstream's TypeError comes from SentenceTransformer, which does not know it either."""
    with pytest.raises(ConfigError, match="show_progress_bar"):
        MemsafeEmbedding(plain, device="cpu", show_progress=True)


def test_parity_is_chosen_at_construction(plain: str) -> None:
    """Set afterwards it would apply to half of the prompts: an error, for queries and for texts."""
    model = MemsafeEmbedding(plain, device="cpu")
    for changed in (model.model_copy(update={"parity": True}), model):
        changed.parity = True
        for method in (changed.get_text_embedding, changed.get_query_embedding):
            with pytest.raises(ConfigError, match="parity"):
                method("a river")


def test_lengths_beyond_the_models_positions_are_cut(tmp_path: Any) -> None:
    """Difference: upstream takes the number and fails at the first long text; ours warns and cuts where the model ends."""
    folder = str(save_embedder(tmp_path, "bert", max_positions=64, max_length=32))
    with pytest.warns(UserWarning, match="learnt 64 positions"):
        model = MemsafeEmbedding(folder, device="cpu", max_length=1024)
    assert model.max_length == 64
    with pytest.warns(UserWarning, match="longer than 64 tokens"):
        long = model.get_text_embedding("river " * 200)
    assert long == pytest.approx(
        MemsafeEmbedding(folder, device="cpu", max_length=64).get_text_embedding("river " * 62), abs=1e-5
    )
    rebuilt = MemsafeEmbedding.from_dict(model.to_dict(), device="cpu")
    assert rebuilt.max_length == 64


# --- Devices and memory -----------------------------------------------------------------------------------------------


def test_memory_options_reach_the_core(plain: str) -> None:
    """memory, dtype and hooks are the core's: the hook hears of micro-batches and none holds more tokens than told."""
    events: list[Any] = []
    policy = MemoryPolicy(max_tokens=64, learn=False)
    model = MemsafeEmbedding(plain, device="cpu", memory=policy, hooks=[events.append], dtype="float32")
    model.get_text_embedding_batch(TEXTS)
    sizes = [event.computed_tokens for event in events if type(event).__name__ == "MicroBatchDone"]
    assert len(sizes) > 3 and max(sizes) <= 64


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"]), (["cpu"] * 4, ["cpu"]), (None, None), ([], None)],
)
def test_target_devices_become_workers_of_the_core(
    monkeypatch: pytest.MonkeyPatch, plain: str, targets: Any, expected: Any
) -> None:
    """parallel_process: the core gets the list of devices, each once; without a list all CUDA devices, else the CPU."""
    seen: list[Any] = []
    original = Embedder.__init__

    def watch(self: Any, *args: Any, **options: Any) -> None:
        seen.append(options["device"])
        original(self, *args, **{**options, "device": "cpu"})

    monkeypatch.setattr(Embedder, "__init__", watch)
    MemsafeEmbedding(plain, parallel_process=True, target_devices=targets)
    MemsafeEmbedding(plain, device="cpu", target_devices=targets)
    assert seen == [expected or device_list(None), "cpu"]


def test_parallel_process_gives_the_same_numbers(plain: str, ours: MemsafeEmbedding) -> None:
    """parallel_process=True on a CPU: no process pool per group, the same embeddings."""
    model = MemsafeEmbedding(plain, parallel_process=True, target_devices=["cpu", "cpu"])
    assert np.allclose(model.get_text_embedding_batch(TEXTS), ours.get_text_embedding_batch(TEXTS), atol=1e-5)


# --- In LlamaIndex ----------------------------------------------------------------------------------------------------


def test_it_is_an_embedding_for_llama_index(ours: MemsafeEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    """resolve_embed_model and Settings take it as it is and put their callback manager into it."""
    manager = CallbackManager([])
    assert isinstance(ours, BaseEmbedding)
    assert resolve_embed_model(ours, callback_manager=manager) is ours
    assert ours.callback_manager is manager
    before = Settings._embed_model
    try:
        Settings.embed_model = ours
        assert Settings.embed_model is ours
    finally:
        Settings._embed_model = before
    assert isinstance(resolve_embed_model(None), MockEmbedding)


def test_no_upstream_package_is_imported() -> None:
    """Importing and using the adapter needs llama-index-core only."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for name in ('llama_index.embeddings.huggingface', 'llama_index.postprocessor.sbert_rerank'):\n"
        "    sys.modules[name] = None\n"
        "import llama_index_memsafe\n"
        "print('torch' in sys.modules, 'sentence_transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_missing_llama_index_names_the_pip_command() -> None:
    """Without llama-index-core the import says what to install."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "sys.modules['llama_index'] = None\n"
        "try:\n"
        "    import llama_index_memsafe\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MissingExtraError" in done.stdout and 'pip install "memsafe[llama-index]"' in done.stdout


def test_options_of_the_model_are_passed_on(tmp_path: Path) -> None:
    """Queries and texts take their routes by themselves; encode_kwargs and query_encode_kwargs name others."""
    from sentence_transformers import SentenceTransformer

    folder = str(save_routed(tmp_path))
    model = SentenceTransformer(folder, device="cpu")
    query, document = (model.encode("a text", task=task, normalize_embeddings=True) for task in ("query", "document"))
    ours = MemsafeEmbedding(folder, device="cpu")
    assert np.allclose(ours.get_query_embedding("a text"), query, atol=1e-5)
    assert np.allclose(ours.get_text_embedding("a text"), document, atol=1e-5)
    other = MemsafeEmbedding(
        folder, device="cpu", encode_kwargs={"task": "query"}, query_encode_kwargs={"task": "document"}
    )
    assert np.allclose(other.get_query_embedding("a text"), document, atol=1e-5)
    assert np.allclose(other.get_text_embedding("a text"), query, atol=1e-5)
    with pytest.raises(ConfigError, match="max_rows"):
        MemsafeEmbedding(folder, device="cpu", encode_kwargs={"max_rows": 1}).get_text_embedding("a")
