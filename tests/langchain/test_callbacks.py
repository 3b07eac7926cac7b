"""What the core took, as a custom event of LangChain's callbacks, wherever a call has some."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, CallbackManager
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda

from langchain_memsafe import MemsafeCrossEncoder, MemsafeEmbeddings, MemsafeRerank

DOCUMENTS = [Document("the crane is a bird"), Document("a city")]


class Listener(BaseCallbackHandler):
    """Keeps the custom events."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_custom_event(self, name: str, data: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.seen.append((name, data, run_id))


class AsyncListener(AsyncCallbackHandler):
    """The same, as a coroutine."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    async def on_custom_event(self, name: str, data: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.seen.append((name, data, run_id))


def _check(listener: Listener | AsyncListener, texts: int) -> Any:
    ((name, data, run_id),) = listener.seen
    data = json.loads(json.dumps(data))
    assert name == "memsafe_run" and data["texts"] == texts and data["tokens"] > 0 and data["device"] == "cpu"
    assert "crane" not in json.dumps(data)
    return run_id


@pytest.mark.parametrize("kind", [Listener, AsyncListener])
def test_a_compressor_tells_its_callbacks(reranker: MemsafeRerank, kind: Any) -> None:
    """Sync and async, a list or a manager, under the run that they belong to; the documents are the same."""
    parent = uuid4()
    for callbacks in (lambda one: [one], lambda one: CallbackManager([one], parent_run_id=parent)):
        listener = kind()
        asyncio.run(reranker.acompress_documents(DOCUMENTS, "a crane", callbacks(listener)))
        given = _check(listener, 2)
        if kind is Listener:
            listener = kind()
            reranker.compress_documents(DOCUMENTS, "a crane", callbacks(listener))
            _check(listener, 2)
    assert given == parent


def test_embeddings_tell_the_chain_they_are_part_of(
    ours: MemsafeEmbeddings, cross_encoder: MemsafeCrossEncoder
) -> None:
    """An embedding has no callbacks of its own: those of the chain hear of it, and nobody where there is none."""
    for work, texts in (
        (lambda _: ours.embed_documents(["the crane", "a city", "a river"]), 3),
        (lambda _: ours.embed_query("the crane"), 1),
        (lambda _: cross_encoder.score([("a crane", "a bird"), ("a crane", "a city")]), 2),
    ):
        listener = Listener()
        RunnableLambda(work).invoke(0, {"callbacks": [listener]})
        assert _check(listener, texts) is not None
        work(0)
        assert len(listener.seen) == 1


def test_a_listener_that_fails_harms_nobody(reranker: MemsafeRerank) -> None:
    """As LangChain has it: logged, and the documents come."""

    class Broken(BaseCallbackHandler):
        def on_custom_event(self, *args: Any, **kwargs: Any) -> None:
            raise KeyError("no such thing")

    assert len(reranker.compress_documents(DOCUMENTS, "a crane", [Broken()])) == 2
