"""What the core took, in the tags of LlamaIndex's spans and events: beside what upstream sends, which others tests compare."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import NodeWithScore, TextNode

from llama_index_memsafe import MemsafeEmbedding, MemsafeRerank
from tests.tiny_models import save_embedder, save_reranker

TEXTS = [f"a crane of {number} tons" for number in range(23)]


class _Events(BaseEventHandler):
    seen: list[Any] = []  # noqa: RUF012 - a pydantic field

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(event)


@contextmanager
def listening() -> Iterator[tuple[SimpleSpanHandler, list[Any]]]:
    spans, events, root = SimpleSpanHandler(), _Events(seen=[]), get_dispatcher()
    root.add_span_handler(spans)
    root.add_event_handler(events)
    try:
        yield spans, events.seen
    finally:
        root.span_handlers.remove(spans)
        root.event_handlers.remove(events)


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> MemsafeEmbedding:
    return MemsafeEmbedding(str(save_embedder(tmp_path_factory.mktemp("embedder"))), device="cpu")


@pytest.fixture(scope="module")
def rerank(tmp_path_factory: pytest.TempPathFactory) -> MemsafeRerank:
    folder: Path = save_reranker(tmp_path_factory.mktemp("reranker"))
    return MemsafeRerank(str(folder), "cpu")


def _check(figures: list[dict[str, Any]], texts: int) -> None:
    (report,) = json.loads(json.dumps(figures))
    assert report["texts"] == texts and report["tokens"] > texts and report["device"] == "cpu"
    assert not any(text in json.dumps(report) for text in TEXTS)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_batch_tags_its_span_and_its_first_end(embedding: MemsafeEmbedding, asynchronous: bool) -> None:
    """23 texts in three groups are one call of the core: one report, in the span and in the event that ends the first group."""
    with listening() as (spans, events):
        if asynchronous:
            asyncio.run(embedding.aget_text_embedding_batch(TEXTS))
        else:
            embedding.get_text_embedding_batch(TEXTS)
    (span,) = spans.completed_spans
    _check(span.tags["memsafe"], 23)
    ends = [event for event in events if event.class_name() == "EmbeddingEndEvent"]
    assert len(ends) == 3 and [bool(event.tags) for event in ends] == [True, False, False]
    _check(ends[0].tags["memsafe"], 23)


def test_a_query_and_a_text_tag_their_spans(embedding: MemsafeEmbedding) -> None:
    """The events of these are LlamaIndex's own; the innermost span, which is open while the core works, has the figures."""
    with listening() as (spans, _):
        embedding.get_query_embedding("a crane")
        embedding.get_text_embedding("a crane")
        asyncio.run(embedding.aget_query_embedding("a crane"))
    inner = [
        span
        for span in spans.completed_spans
        if span.id_.startswith(("MemsafeEmbedding._get", "MemsafeEmbedding._aget"))
    ]
    assert len(inner) == 3
    for span in inner:
        _check(span.tags["memsafe"], 1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_reranking_tags_its_span_and_its_end(rerank: MemsafeRerank, asynchronous: bool) -> None:
    """The same for a postprocessor, and nothing is left for the next call."""
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS[:5]]
    with listening() as (spans, events):
        for _ in range(2):
            if asynchronous:
                asyncio.run(rerank.apostprocess_nodes(nodes, query_str="a crane"))
            else:
                rerank.postprocess_nodes(nodes, query_str="a crane")
    ends = [event for event in events if event.class_name() == "ReRankEndEvent"]
    for tagged in (*spans.completed_spans, *ends):
        _check(tagged.tags["memsafe"], 5)
    assert len(spans.completed_spans) == len(ends) == 2
