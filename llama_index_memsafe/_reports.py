"""What calls of the core took, in the tags of LlamaIndex's spans and events: figures of ``memsafe.RunReport``, never a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # no __all__ there
from llama_index.core.instrumentation.span import active_span_id

from memsafe import RunReport

__all__ = ["TAG", "collected", "tags", "tell"]

TAG = "memsafe"
"""The tag's name. Its value: a list of ``RunReport.to_dict()``, one for each call of the core."""

_collected: ContextVar[list[dict[str, Any]] | None] = ContextVar("memsafe_reports", default=None)


@contextmanager
def collected() -> Iterator[list[dict[str, Any]]]:
    """Gathers the figures of what the core does inside, for the events that end it."""
    reports: list[dict[str, Any]] = []
    token = _collected.set(reports)
    try:
        yield reports
    finally:
        _collected.reset(token)


def tell(report: RunReport) -> None:
    """Put the figures into the tags of the span that is open here, in every handler that keeps it, and into :func:`collected`."""
    figures = report.to_dict()
    reports = _collected.get()
    if reports is not None:
        reports.append(figures)
    span_id = active_span_id.get()
    dispatcher: Any = get_dispatcher()
    for handler in dispatcher.span_handlers if span_id else ():
        span = handler.open_spans.get(span_id)
        if span is not None:
            span.tags[TAG] = [*span.tags.get(TAG, ()), figures]


def tags(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The tags of an event that ends a call with these figures."""
    return {TAG: reports} if reports else {}
