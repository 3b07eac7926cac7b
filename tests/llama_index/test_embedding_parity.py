"""HuggingFaceEmbedding and MemsafeEmbedding side by side: numbers, fields, errors, events and progress."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import numpy as np
import pytest
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import ImageNode, TextNode

from llama_index_memsafe import MemsafeEmbedding
from llama_index_memsafe._instructions import DEFAULT_MODEL, QUERY_INSTRUCTIONS, TEXT_INSTRUCTIONS
from tests.llama_index.conftest import TEXTS, exchange, recorded
from tests.tiny_models import before

pytest.importorskip("llama_index.embeddings.huggingface", reason="the class that is replaced is not installed")
pytestmark = pytest.mark.peers

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "not normalised": {"normalize": False},
    "instructions": {"query_instruction": "Find: ", "text_instruction": "Text: "},
    "max_length": {"max_length": 16},
    "max_length of 0 means the model's": {"max_length": 0},
    "small batches": {"embed_batch_size": 4},
    "large batches": {"embed_batch_size": 2048},
    "truncate_dim": {"truncate_dim": 64},
    "empty instruction": {"query_instruction": "", "text_instruction": ""},
    "default prompt": {"default_prompt_name": "query", "query_instruction": "Q: "},
    "half precision": {"model_kwargs": {"dtype": "bfloat16"}},
    "left alone": {"backend": "torch", "local_files_only": True, "trust_remote_code": True, "revision": None},
}
TOLERANCE = {"half precision": 5e-3}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.cuts
def test_numbers_are_upstreams(name: str, make_pair: Any, passages: list[str]) -> None:
    """Queries, texts and batches of real passages come out as upstream's, for every option, in every method."""
    theirs, ours = make_pair(**OPTIONS[name])
    texts = [*passages[5:12], "", "   ", "naïve 日本語 🙂", passages[0], passages[5]]

    def everything(model: Any) -> list[Any]:
        return [
            model.get_query_embedding(texts[0]),
            model.get_text_embedding(texts[1]),
            *model.get_text_embedding_batch(texts),
            model.get_agg_embedding_from_queries(texts[2:4]),
            *model._embed(texts[:2]),
            *model._embed(texts[:2], prompt_name="query"),
        ]

    expected, got = everything(theirs), everything(ours)
    assert all(type(vector) is list and type(vector[0]) is float for vector in got)
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=TOLERANCE.get(name, 1e-5))


@pytest.mark.parametrize("normalize", [True, False])
def test_normalize_acts_on_a_model_without_a_normalize_module(make_pair: Any, plain: str, normalize: bool) -> None:
    """normalize=False leaves lengths as they are; True makes them one; both as upstream."""
    theirs, ours = make_pair(plain, normalize=normalize)
    expected, got = theirs.get_text_embedding_batch(TEXTS), ours.get_text_embedding_batch(TEXTS)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert bool(abs(np.linalg.norm(got[0]) - 1) < 1e-5) is normalize


async def test_async_numbers_are_upstreams(make_pair: Any) -> None:
    """The asynchronous methods return what upstream's return."""
    theirs, ours = make_pair()

    async def everything(model: Any) -> list[Any]:
        return [
            await model.aget_query_embedding(TEXTS[0]),
            await model.aget_text_embedding(TEXTS[1]),
            *await model.aget_text_embedding_batch(TEXTS),
            await model.aget_agg_embedding_from_queries(TEXTS[:2]),
        ]

    np.testing.assert_allclose(await everything(ours), await everything(theirs), atol=1e-5)


def test_arguments_are_upstreams_in_its_order() -> None:
    """Every positional argument has upstream's place and default; what is ours is keyword-only."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    def positional(kind: type) -> list[tuple[str, Any]]:
        parameters = inspect.signature(kind.__init__).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(MemsafeEmbedding) == positional(HuggingFaceEmbedding)
    kinds = {p.name: p.kind for p in inspect.signature(MemsafeEmbedding.__init__).parameters.values()}
    ours = ("memory", "dtype", "hooks", "parity", "prompts", "num_workers", "embeddings_cache", "rate_limiter")
    assert all(kinds[name] is inspect.Parameter.KEYWORD_ONLY for name in ours)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "x"},
        {"model": None},
        {"tokenizer": "x"},
        {"pooling": "cls"},
        {"pooling": None},
        {"tokenizer_name": None},
        {"model_name": None},
        {"embed_batch_size": 0},
        {"embed_batch_size": 2049},
        {"embed_batch_size": "many"},
        {"embed_batch_size": None},
        {"max_length": -1},
    ],
    ids=str,
)
def test_errors_are_upstreams(plain: str, options: dict[str, Any]) -> None:
    """A refused argument raises upstream's exception with upstream's words."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    errors = []
    for kind in (HuggingFaceEmbedding, MemsafeEmbedding):
        with pytest.raises(Exception) as caught:
            kind(**{"model_name": plain, "device": "cpu", **options})
        errors.append((type(caught.value), exchange(str(caught.value))))
    assert errors[0] == errors[1]


def test_fields_are_upstreams(make_pair: Any) -> None:
    """What upstream exposes after construction, ours exposes with the same values."""
    theirs, ours = make_pair(max_length=64, query_instruction="q", cache_folder=None)
    for name in type(theirs).model_fields:
        if name != "callback_manager":
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours._device == theirs._device
    assert type(ours._model) is type(theirs._model)
    assert ours._model.max_seq_length == theirs._model.max_seq_length == 64
    expected = theirs.to_dict()
    assert {name: value for name, value in ours.to_dict().items() if name in expected} == {
        **expected,
        "class_name": "MemsafeEmbedding",
    }


def test_instructions_by_name_are_upstreams() -> None:
    """Every model name for which upstream adds an instruction has the same one here, and no other name has one."""
    from llama_index.embeddings.huggingface import utils

    assert utils.DEFAULT_HUGGINGFACE_EMBEDDING_MODEL == DEFAULT_MODEL
    names = [*utils.BGE_MODELS, *utils.INSTRUCTOR_MODELS]
    assert {name: utils.get_query_instruct_for_model_name(name) for name in names} == QUERY_INSTRUCTIONS
    assert {name: utils.get_text_instruct_for_model_name(name) for name in utils.INSTRUCTOR_MODELS} == TEXT_INSTRUCTIONS


@pytest.mark.parametrize("count", [0, 1, 10, 23])
@pytest.mark.parametrize("size", [1, 7, 10, 50])
def test_batch_events_are_upstreams(make_pair: Any, plain: str, count: int, size: int) -> None:
    """Events and callbacks of a batch: upstream's number, order and payloads."""
    logs = []
    for model in make_pair(plain, embed_batch_size=size):
        with recorded(model) as log:
            model.get_text_embedding_batch(TEXTS[:count])
        logs.append(log.entries)
    assert logs[0] == logs[1]
    assert len(logs[1]) == -(-count // size) * 4


def test_single_events_are_upstreams(make_pair: Any, plain: str) -> None:
    """Events and callbacks of one query and one text are upstream's."""
    logs = []
    for model in make_pair(plain):
        with recorded(model) as log:
            model.get_query_embedding("a question")
            model.get_text_embedding("a text")
            asyncio.run(model.aget_query_embedding("a question"))
            asyncio.run(model.aget_text_embedding("a text"))
        logs.append(log.entries)
    assert logs[0] == logs[1]


async def test_async_batch_events_are_upstreams(make_pair: Any, plain: str) -> None:
    """An asynchronous batch sends all starts, then all ends, as upstream."""
    logs = []
    for model in make_pair(plain):
        with recorded(model) as log:
            await model.aget_text_embedding_batch(TEXTS)
        logs.append(log.entries)
    assert logs[0] == logs[1]
    assert [name[:5] for name in log.names] == ["Embed", "start"] * 3 + ["Embed", "end e"] * 3


def test_failure_events_are_upstreams(make_pair: Any, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the first group fails, the callback ends with the exception and no end event follows, as upstream."""
    logs = []
    for model in make_pair(plain):

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise KeyError("no such weight")

        monkeypatch.setattr(type(model), "_embed", fail)
        with recorded(model) as log, pytest.raises(KeyError):
            model.get_text_embedding_batch(TEXTS)
        logs.append(log.entries)
    assert logs[0] == logs[1]
    assert "exception" in logs[1][-2][1] or "exception" in logs[1][-1][1] or "SpanDropEvent" in logs[1][-1][0]


def test_spans_are_upstreams(make_pair: Any, plain: str) -> None:
    """The same methods make spans, nested alike; only the class's name differs, and a thread's inner span."""

    def spans(model: Any, call: Any) -> list[str]:
        handler = SimpleSpanHandler()
        root = get_dispatcher()
        root.add_span_handler(handler)
        try:
            call(model)
        finally:
            root.span_handlers.remove(handler)
        return [exchange(span.id_).rsplit("-", 5)[0] for span in handler.completed_spans]

    def query(model: Any) -> None:
        model.get_query_embedding("a question")
        model.get_text_embedding("a text")
        model.get_text_embedding_batch(TEXTS[:5])
        asyncio.run(model.aget_query_embedding("a question"))
        asyncio.run(model.aget_text_embedding_batch(TEXTS[:5]))

    theirs, ours = make_pair(plain)
    expected, got = spans(theirs, query), spans(ours, query)
    # Upstream's async query runs the synchronous method in a thread, which adds its span; ours has no thread.
    del expected[len(expected) - 1 - expected[::-1].index("X._get_query_embedding")]
    assert got == expected


def test_token_counts_are_upstreams(make_pair: Any, plain: str) -> None:
    """TokenCountingHandler sees the same number of tokens."""
    totals = []
    for model in make_pair(plain):
        counter = TokenCountingHandler()
        model.callback_manager = CallbackManager([counter])
        model.get_text_embedding_batch(TEXTS)
        model.get_query_embedding(TEXTS[0])
        totals.append(counter.total_embedding_token_count)
        model.callback_manager = CallbackManager([])
    assert totals[0] == totals[1] > 0


def test_nodes_get_their_embeddings_in_place(make_pair: Any) -> None:
    """Called with nodes, it embeds what MetadataMode.EMBED shows and sets node.embedding, sync and async."""
    results = []
    for model in make_pair():
        nodes = [TextNode(text=text, metadata={"name": f"n{i}"}) for i, text in enumerate(TEXTS[:5])]
        assert model(nodes, show_progress=False) is nodes
        more = [TextNode(text=text) for text in TEXTS[:5]]
        assert asyncio.run(model.acall(more)) is more
        results.append([node.embedding for node in nodes + more])
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)


def test_image_methods_stay_with_upstream(make_pair: Any, plain: str) -> None:
    """Difference: ours is a text embedding; it is no MultiModalEmbedding, so an image index refuses it at once."""
    from llama_index.core.embeddings import MultiModalEmbedding

    theirs, ours = make_pair(plain)
    assert isinstance(theirs, MultiModalEmbedding)
    assert not isinstance(ours, MultiModalEmbedding)
    with pytest.raises(AttributeError):
        ours.get_image_embedding("picture.png")
    assert ImageNode(text="caption").get_content() == "caption"


def test_saved_prompts_are_used_unless_parity_is_asked_for(make_pair: Any, tiny: str) -> None:
    """Difference: upstream drops the model's own query and document prompts; ours uses them; parity=True drops them."""
    if before("sentence-transformers", 6):
        pytest.skip("sentence-transformers 5 puts the saved prompt in the place of an empty one, for upstream too")
    theirs, ours = make_pair(tiny)
    exact = MemsafeEmbedding(tiny, device="cpu", parity=True)
    explicit = make_pair(tiny, query_instruction="SAVED QUERY: ", text_instruction="SAVED DOCUMENT: ")[0]
    text = "the river"
    for method in ("get_query_embedding", "get_text_embedding"):
        without, with_prompt = getattr(theirs, method)(text), getattr(explicit, method)(text)
        assert np.abs(np.subtract(without, with_prompt)).max() > 1e-3
        np.testing.assert_allclose(getattr(exact, method)(text), without, atol=1e-5)
        np.testing.assert_allclose(getattr(ours, method)(text), with_prompt, atol=1e-5)
    assert exact._model.prompts == theirs._model.prompts
