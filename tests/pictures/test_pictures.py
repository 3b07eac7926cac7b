"""Pictures of a run: bounded however long it is, one page that needs nothing from elsewhere, and legible in a real browser."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from memsafe import Embedder, MissingExtraError, Recording, RunReport, events
from memsafe.config import GiB, MiB
from memsafe.events import (
    BudgetChanged,
    CacheReleased,
    Event,
    FallbackUsed,
    InputsTruncated,
    MicroBatchDone,
    ModelReloaded,
    ModelUnloaded,
    NonFiniteRedone,
    OutOfMemory,
    Waited,
)
from memsafe.pictures import charts
from memsafe.pictures.timeline import MARKS, Bar, Mark, Timeline

DEVICE, OTHER = "cuda:0", "cuda:1"
NAME = 'of/<script>alert("x")</script>&amp;\'s'
VOID = {"meta", "link"}
SVG_VOID = {"path", "rect"}


def batch(number: int, device: str = DEVICE, *, measured: bool = True, budget: int = 900 * MiB) -> MicroBatchDone:
    size = (number % 9 + 1) * 64
    used = size * MiB // 2
    return MicroBatchDone(device, 4, size, size, used, used * 99 // 100 if measured else None, budget, 0.0004)


EVENTS: list[Event] = [
    *(batch(number) for number in range(30)),
    *(batch(number, OTHER, measured=False, budget=40 * GiB) for number in range(10)),
    OutOfMemory(DEVICE, 3, 500, 1000 * MiB, "retry"),
    OutOfMemory(DEVICE, 3, 500, 1000 * MiB, "split"),
    BudgetChanged(DEVICE, 700 * MiB, "shrink"),
    BudgetChanged(DEVICE, 800 * MiB, "grow"),
    CacheReleased(DEVICE, 900, "failure"),
    FallbackUsed(DEVICE, "chunk", 4, 8192),
    Waited(DEVICE, 0.001),
    NonFiniteRedone(DEVICE, 7),
    InputsTruncated(OTHER, 6, 512),
    ModelUnloaded(OTHER, 1000),
    ModelReloaded(OTHER, 1000, 0.001),
]
"""Each kind of event, on two devices: one whose budget is near, one whose budget is far above."""


@pytest.fixture
def recording() -> Recording:
    made = Recording()
    for event in EVENTS:
        made(event)
    return made


class _Page(HTMLParser):
    """Checks that every element is closed where it should be; collects what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)) and not any(name.startswith("on") for name in names)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert tag in VOID | SVG_VOID
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing(recording: Recording) -> None:
    """Well-formed, without a script, and nothing in it is fetched; names that look like markup are text."""
    text = recording.page(RunReport(path=NAME, notes=(NAME,)), title=NAME)
    found = _Page(text)
    assert found.references == ["data:,"]
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "script" not in found.tags and text.startswith("<!DOCTYPE html>")
    assert found.text.count(NAME) == 4  # the title, the heading, two rows of the report
    assert 'name="viewport"' in text and "prefers-color-scheme:dark" in text
    assert len(text) < 100_000


def test_every_kind_of_event_is_drawn(recording: Recording) -> None:
    """Whatever events.py knows has a sign, a place in time, a count and a line; a new kind without one fails here."""
    kinds = {kind for kind in map(events.__dict__.get, events.__all__) if isinstance(kind, type)}
    known = {kind for kind in kinds if issubclass(kind, Event)} - {Event}
    assert {type(event) for event in EVENTS} == known
    text = recording.page()
    for kind, (sign, meaning) in MARKS.items():
        if kind != "other":
            assert recording.timeline.counts[kind] == 1
            assert f'class="lane k-{kind}"' in text and sign in text and meaning in text
    for kind in charts.TROUBLE:
        assert f'class="line k-{kind}"' in text
    assert text.count("<rect") == 40 and text.count('class="dot"') == len(recording.timeline.sizes) + 1
    assert "budget 40.0 GiB, far above" in text and f"Memory on {OTHER}" in text

    @dataclasses.dataclass(frozen=True)
    class Unheard(Event):
        pass

    recording(Unheard(DEVICE))
    assert "Unheard" in recording.page() and MARKS["other"][1] in recording.page()


def test_figures_are_those_of_the_events(recording: Recording) -> None:
    """Counts, tokens, points and sizes are exact; a micro-batch that two calls share is told twice and counts once."""
    line = recording.timeline
    batches = [event for event in EVENTS if isinstance(event, MicroBatchDone)]
    assert (line.micro_batches, line.tokens) == (40, sum(event.tokens for event in batches))
    assert len(line.points) == 30 and all(measured < predicted for predicted, measured in line.points)
    assert sum(size.micro_batches for size in line.sizes.values()) == 40
    recording(EVENTS[-1])
    recording(batches[-1])
    assert line.counts["reload"] == 1 and line.micro_batches == 40
    assert sum(line.rates(80)) * line.seconds / 80 == pytest.approx(line.tokens, rel=1e-6)


def test_a_long_run_takes_no_more_memory() -> None:
    """A hundred thousand micro-batches and ten thousand marks: what is kept stays bounded and covers the whole time."""
    line = Timeline(most=100)
    for number in range(100_000):
        line.add(
            Bar(DEVICE, number, number + 0.5, 10, 100 + number, 50 if number % 2 else None, 1000),
            sized_tokens=10 + number % 5000,
        )
        if number % 10 == 0:
            line.mark(Mark(DEVICE, number, "release", ""))
    line.mark(Mark(DEVICE, 99_999.0, "oom", ""))
    bars = line.bars[DEVICE]
    assert len(bars) <= 100 and len(line.points) <= 100 and len(line.marks) <= 100 and len(line.sizes) < 100
    assert (sum(bar.micro_batches for bar in bars), sum(bar.tokens for bar in bars)) == (100_000, 1_000_000)
    assert (bars[0].start_s, bars[-1].end_s, line.seconds) == (0, 99_999.5, 99_999.5)
    assert max(bar.predicted_bytes for bar in bars) == 100_099
    assert line.counts == {"release": 10_000, "oom": 1} and line.marks[-1].kind == "oom"
    assert len(charts.memory_chart(line, DEVICE)) < 60_000


def test_nothing_and_one_are_drawn_too() -> None:
    """No event, one micro-batch at time 0, marks alone: a page each."""
    assert "Nothing has been recorded" in _Page(Recording().page()).text
    for event in (batch(0, measured=False), EVENTS[-3], OutOfMemory(DEVICE, 1, 1, 1, "retry")):
        recording = Recording()
        recording(event)
        assert _Page(recording.page({"a": "b"})).text.count("memsafe run") == 2
    line = Timeline()
    line.add(Bar(DEVICE, 0.0, 0.0, 0, 0, 0, 0), sized_tokens=0)
    assert line.rates(4) == [0.0] * 4 and "Sizes tried" in charts.size_chart(line)


def test_in_a_notebook(recording: Recording) -> None:
    """A piece that styles nothing but itself; a report alone is a table."""
    piece = recording._repr_html_()
    found = _Page(piece)
    assert "html" not in found.tags and "body" not in found.tags
    rules = re.sub(r"@media[^{]*\{", "", re.search(r"<style>(.*?)</style>", piece, re.S)[1])  # type: ignore[index]
    selectors = [each.strip() for rule in re.findall(r"([^{}]+)\{", rules) for each in rule.split(",")]
    assert selectors and all(each.startswith((".memsafe", "body.memsafe")) for each in selectors)
    assert "<table>" in RunReport()._repr_html_()


def test_threads_may_share_one() -> None:
    """Eight threads that tell it things at once: nothing is lost, and drawing meanwhile is safe."""
    recording = Recording()

    def tell() -> None:
        for number in range(200):
            recording(batch(number))

    threads = [threading.Thread(target=tell) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        recording.page()
    for thread in threads:
        thread.join()
    assert recording.timeline.micro_batches == 1600


def test_a_real_run(minilm: str, passages: list[str], tmp_path: Path) -> None:
    """A hook of a real embedder: what it kept adds up to the report, and the page has the report's rows."""
    recording = Recording()
    with Embedder(minilm, device="cpu", hooks=[recording]) as embedder:
        report = embedder.run([passage[:200] for passage in passages[:40]]).report
    assert (recording.timeline.tokens, recording.timeline.micro_batches) == (report.tokens, report.micro_batches)
    recording.save(tmp_path / "run.html", report)
    assert f"{report.tokens:,} at" in (tmp_path / "run.html").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
def test_matplotlib_draws_the_same(recording: Recording, tmp_path: Path) -> None:
    """recording.plot() has a panel a device and three more; report.plot() memory and time."""
    pytest.importorskip("matplotlib")
    figure = recording.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 5 and f"Memory on {DEVICE}" in titles[0] and titles[-1] == "Predicted and measured"
    figure.savefig(tmp_path / "run.png")
    summary = RunReport(device="cpu", predicted_peak_bytes=5 * MiB, budget_min_bytes=MiB, out_of_memory=2).plot()
    assert "2 times out of memory" in summary.axes[1].get_title()
    Recording().plot()
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra; the page needs nothing."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (Recording().plot, RunReport().plot):
        with pytest.raises(MissingExtraError, match=r'pip install "memsafe\[plot\]"'):
            draw()


def _chromium() -> str:
    """A Chromium of this machine; skips, saying what is missing, where there is none."""
    pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("MEMSAFE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is on the path, and MEMSAFE_CHROMIUM is not set")
    try:
        subprocess.run([found, "--version"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{found} does not start: {error}")
    return found


@pytest.fixture
def browser() -> Iterator[Any]:
    path = _chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


_LOOK = """() => {
  const shown = getComputedStyle(document.body);
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = text => rgb(text).map(c => { c /= 255; return c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; })
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const panel = getComputedStyle(document.querySelector('.chart')).backgroundColor;
  return {
    width: document.documentElement.scrollWidth, inner: innerWidth, ground: light(shown.backgroundColor),
    contrasts: ['body', '.sub', '.xs span', '.legend', 'td'].map(s => contrast(getComputedStyle(document.querySelector(s)).color, panel)),
    sizes: [...document.querySelectorAll('.ys span, .xs span, td, .legend')].map(e => parseFloat(getComputedStyle(e).fontSize)),
    bars: [...document.querySelectorAll('rect.used')].filter(e => e.getBoundingClientRect().height > 1).length,
    outside: [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('svg')).length,
  };
}"""


def test_in_a_real_browser(recording: Recording, tmp_path: Path, browser: Any) -> None:
    """On a wide screen and a phone, light and dark: no error, nothing fetched, no sideways scrolling, text large and clear enough."""
    path = tmp_path / "run.html"
    recording.save(path, RunReport(path=NAME + "x" * 200), title=NAME + "y" * 200)
    for scheme in ("light", "dark"):
        for width in (390, 1200):
            context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page, said, asked = context.new_page(), [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(path.as_uri())
            page.locator("summary").click()
            seen = page.evaluate(_LOOK)
            context.close()
            assert said == [] and [url for url in asked if url.split(":")[0] not in ("file", "data")] == []
            assert seen["width"] <= seen["inner"] == width and seen["outside"] == 0, json.dumps(seen)
            assert (seen["ground"] > 0.8) if scheme == "light" else (seen["ground"] < 0.05)
            assert min(seen["contrasts"]) >= 4.5 and min(seen["sizes"]) >= 12 and seen["bars"] == 30, json.dumps(seen)
