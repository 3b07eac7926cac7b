"""Events, callbacks and the progress bar of an embedding call, in the groups in which LlamaIndex sends them.

LlamaIndex cuts a list into groups of ``embed_batch_size`` and embeds one group after the other. Here the core sees the
whole list once, and the groups only say how the events are cut: same number, payloads and order as upstream, through
the same dispatcher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding, dispatcher
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent

from llama_index_memsafe._reports import collected, tags

__all__ = [
    "current_progress",
    "emit_batch",
    "event_groups",
    "fail_batch",
    "finish_batch",
    "progress_bar",
    "start_batch",
]

Progress = Callable[[int], None]

_EVENTS_PER_TURN = 32
"""Events sent by an async call before it lets the event loop run (an end validates its vectors: about 0.1 ms)."""

_progress: ContextVar[Progress | None] = ContextVar("memsafe_progress", default=None)


def event_groups(texts: list[str], size: int) -> list[slice]:
    """Slices of at most `size` texts that cover the list; one slice if `size` is not positive, as upstream."""
    step = size if size > 0 else max(len(texts), 1)
    return [slice(start, min(start + step, len(texts))) for start in range(0, len(texts), step)]


def event_payload(model: BaseEmbedding) -> dict[str, Any]:
    """The model as events show it: ``to_payload()``, or what llama-index-core sent before it had that."""
    if hasattr(model, "to_payload"):
        return dict(model.to_payload())
    payload: dict[str, Any] = model.to_dict()
    payload.pop("api_key", None)
    return payload


def emit_batch(model: BaseEmbedding, texts: list[str], compute: Callable[[int], list[Embedding]]) -> list[Embedding]:
    """Run ``compute(num_groups)`` once inside the first group's event; then start and end the other groups.

    The order is upstream's: start, end, start, end. The first event lasts as long as the whole work, so that the
    durations of a trace still add up to the time that passed, and ends with the core's figures in its tags. On failure the open event ends with the exception.
    """
    payload = event_payload(model)
    groups = event_groups(texts, model.embed_batch_size)
    embeddings: list[Embedding] | None = None
    for group in groups:
        reports: list[dict[str, Any]] = []
        dispatcher.event(EmbeddingStartEvent(model_dict=payload))
        with model.callback_manager.event(CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: payload}) as event:
            if embeddings is None:
                with collected() as reports:
                    embeddings = compute(len(groups))
            chunk, rows = texts[group], embeddings[group]
            event.on_end(payload={EventPayload.CHUNKS: chunk, EventPayload.EMBEDDINGS: rows})
        dispatcher.event(EmbeddingEndEvent(chunks=chunk, embeddings=rows, tags=tags(reports)))
    return embeddings or []


async def start_batch(model: BaseEmbedding, num_groups: int, event_ids: list[str]) -> None:
    """Send the start of every group, as upstream's async call does, and add the callbacks' event ids to `event_ids`."""
    payload = event_payload(model)
    for number in range(num_groups):
        if number and number % _EVENTS_PER_TURN == 0:
            await asyncio.sleep(0)
        dispatcher.event(EmbeddingStartEvent(model_dict=payload))
        event_ids.append(
            model.callback_manager.on_event_start(CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: payload})
        )


async def finish_batch(
    model: BaseEmbedding,
    texts: list[str],
    embeddings: list[Embedding],
    groups: list[slice],
    event_ids: list[str],
    reports: list[dict[str, Any]],
) -> None:
    """Send the end of every group, letting the event loop run in between. reports: for the tags of the first."""
    for number, (group, event_id) in enumerate(zip(groups, event_ids, strict=False)):
        if number and number % _EVENTS_PER_TURN == 0:
            await asyncio.sleep(0)
        chunk, rows = texts[group], embeddings[group]
        dispatcher.event(EmbeddingEndEvent(chunks=chunk, embeddings=rows, tags={} if number else tags(reports)))
        model.callback_manager.on_event_end(
            CBEventType.EMBEDDING,
            payload={EventPayload.CHUNKS: chunk, EventPayload.EMBEDDINGS: rows},
            event_id=event_id,
        )


def fail_batch(model: BaseEmbedding, event_ids: list[str], error: BaseException) -> None:
    """End every group with the exception; upstream's async call leaves them open.

    In one go, since a cancelled task should not wait again.
    """
    for event_id in event_ids:
        model.callback_manager.on_event_end(
            CBEventType.EMBEDDING, payload={EventPayload.EXCEPTION: error}, event_id=event_id
        )
    # As CallbackManager.event does, so that an enclosing event does not report the same exception again.
    error.event_added = True  # type: ignore[attr-defined]


def current_progress() -> Progress | None:
    """What the core should tell about finished inputs in this context; None outside :func:`progress_bar`."""
    return _progress.get()


@contextmanager
def progress_bar(show: bool, total: int) -> Iterator[None]:
    """Upstream's "Generating embeddings" bar over texts, driven by what the core has really finished."""
    if not show:
        yield
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Generating embeddings") as bar:
        token = _progress.set(lambda count: bar.update(count))
        try:
            yield
        finally:
            _progress.reset(token)
        bar.update(total - bar.n)
