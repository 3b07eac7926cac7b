"""memsafe.events: reports print, become JSON, are counted correctly from many threads."""

from __future__ import annotations

import dataclasses
import json
import threading
from html.parser import HTMLParser

import pytest

from memsafe import events
from memsafe.events import Event, EventHook, MicroBatchDone, OutOfMemory, ReportBuilder, RunReport

FULL = RunReport(
    device="cuda:0",
    path="packed",
    dtype="float16",
    texts=1000,
    distinct_texts=900,
    tokens=80_000,
    computed_tokens=100_000,
    micro_batches=12,
    largest_micro_batch_tokens=8192,
    predicted_peak_bytes=3 << 20,
    measured_peak_bytes=2 << 20,
    process_peak_bytes=5 << 30,
    weights_bytes=90 << 20,
    budget_min_bytes=1 << 30,
    budget_max_bytes=2 << 30,
    out_of_memory=3,
    retries=2,
    splits=1,
    shrinks=1,
    fallbacks={"chunk": 2},
    non_finite_rows=4,
    truncated=5,
    waited_s=0.25,
    released_bytes=1 << 20,
    tokenize_s=0.5,
    compute_s=3.0,
    total_s=4.0,
    lanes=2,
    notes=("expandable_segments is in force",),
)


def test_a_printed_report_says_what_happened() -> None:
    """The printed form holds the figures that a user asks for, one line a topic."""
    text = str(FULL)
    for part in (
        "cuda:0 float16, packed",
        "1,000 (900 distinct, 5 truncated)",
        "80,000 at 20,000 tokens/s; padding 20.0%",
        "12, largest 8,192 tokens, 2 at a time",
        "predicted 3.0 MiB, measured 2.0 MiB; weights 90.0 MiB",
        "5.0 GiB",
        "1.0 GiB to 2.0 GiB",
        "4.00 s: tokenise 0.50, compute 3.00",
        "3 out of memory, 2 retries, 1 splits, waited 0.2 s, 4 rows redone in float32, 2 x chunk",
        "expandable_segments is in force",
    ):
        assert part in text, part
    assert len(text.splitlines()) == 10


def test_an_empty_report_prints_without_dividing_by_zero() -> None:
    """A run of nothing has rates of 0, no peaks, and nothing to recover from."""
    report = RunReport()
    assert (report.padding_ratio, report.tokens_per_s) == (0.0, 0.0)
    assert ", not measured;" in str(report)
    assert "nothing" in str(report)


def test_to_dict_is_ready_for_json_and_complete() -> None:
    """Every field and both derived figures survive a round trip through JSON."""
    back = json.loads(json.dumps(FULL.to_dict()))
    assert set(back) == {field.name for field in dataclasses.fields(RunReport)} | {"padding_ratio", "tokens_per_s"}
    assert back["padding_ratio"] == pytest.approx(0.2)
    assert back["tokens_per_s"] == pytest.approx(20_000)
    assert back["fallbacks"] == {"chunk": 2}
    assert back["notes"] == ["expandable_segments is in force"]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_escapes_what_it_shows() -> None:
    """A note that looks like markup is shown as text: no tag but those of the table gets into a notebook."""
    page = _Tags()
    page.feed(RunReport(path="padded (a < b & c)", notes=('<script>alert("x")</script>',))._repr_html_())
    assert page.tags == {"table", "tr", "th", "td"}
    assert '<script>alert("x")</script>' in page.text
    assert "padded (a < b & c)" in page.text


def test_the_builder_counts() -> None:
    """Values are set, sums added, extremes kept (None is no value), notes said once."""
    builder = ReportBuilder()
    builder.set(device="cpu", texts=3)
    builder.add(tokens=5, compute_s=0.5)
    builder.add(tokens=7, compute_s=0.25, splits=1)
    builder.peak(measured_peak_bytes=None, predicted_peak_bytes=10)
    builder.peak(predicted_peak_bytes=5)
    builder.least(budget_min_bytes=9)
    builder.least(budget_min_bytes=4)
    builder.least(budget_min_bytes=None)
    builder.fall_back("cpu")
    builder.fall_back("cpu")
    builder.note("once")
    builder.note("once")
    report = builder.build()
    assert report == RunReport(
        device="cpu",
        texts=3,
        tokens=12,
        compute_s=0.75,
        splits=1,
        measured_peak_bytes=None,
        predicted_peak_bytes=10,
        budget_min_bytes=4,
        fallbacks={"cpu": 2},
        notes=("once",),
    )


def test_a_built_report_does_not_change_any_more() -> None:
    """What happens after build() reaches the next report, not the one that was handed out."""
    builder = ReportBuilder()
    builder.fall_back("half")
    first = builder.build()
    builder.fall_back("half")
    builder.add(tokens=1)
    assert (first.fallbacks, first.tokens) == ({"half": 1}, 0)
    assert builder.build().fallbacks == {"half": 2}


def test_the_builder_loses_nothing_between_threads() -> None:
    """Eight threads that count at once are all counted."""
    builder = ReportBuilder()
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for step in range(500):
            builder.add(tokens=1, retries=2)
            builder.peak(predicted_peak_bytes=thread * 1000 + step)
            builder.least(budget_min_bytes=thread * 1000 + step)
            builder.fall_back("chunk")
            builder.note(f"thread {thread}")

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = builder.build()
    assert (report.tokens, report.retries, report.fallbacks) == (4000, 8000, {"chunk": 4000})
    assert (report.predicted_peak_bytes, report.budget_min_bytes) == (7499, 0)
    assert sorted(report.notes) == [f"thread {thread}" for thread in range(8)]


def test_events_are_frozen_and_carry_no_text() -> None:
    """Every event is immutable data, and none of its fields could hold what a user wrote."""
    kinds = [getattr(events, name) for name in events.__all__]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Event)]
    assert len(kinds) >= 9
    words = {"device", "action", "reason", "rung"}  # the only text: torch's device name and our own vocabulary
    for kind in kinds:
        text_fields = {field.name for field in dataclasses.fields(kind) if "str" in str(field.type)}
        assert text_fields <= words, kind
    event = OutOfMemory("cuda:0", sequences=4, tokens=100, predicted_bytes=1, action="split")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.tokens = 0  # type: ignore[misc]


def test_any_callable_is_a_hook() -> None:
    """A list's append, a function, an object with __call__: each satisfies the protocol."""
    seen: list[Event] = []
    hook = seen.append
    assert isinstance(hook, EventHook)
    assert not isinstance(3, EventHook)
    hook(MicroBatchDone("cpu", 1, 2, 2, 10, None, 100, 0.1))
    assert seen[0].device == "cpu"
