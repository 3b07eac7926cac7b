"""Time boxes that are kept, and processes whose rows arrive as they come."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.common import NOT_RUN, ROOT, STOPPED, Row, Setting, StepTimeoutError

__all__ = ["Steps", "boxes", "isolated", "run_child", "time_box"]

START_S = 15.0
"""What a process takes to import torch and to load a model, on the H200's slow cores; with less time left none is started."""
LAST_S = 3.0
"""A process plans to end so long before it would be killed."""


def boxes(setting: Setting, weights: Sequence[float]) -> Iterator[Setting]:
    """A setting for each step in turn: a share of the time left, by weight. What a step leaves goes to the later ones."""
    for place, weight in enumerate(weights):
        share = setting.left() * weight / sum(weights[place:])
        yield setting if setting.dry else replace(setting, until=time.time() + share)


@contextlib.contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raise StepTimeoutError in the main thread once `seconds` are over; a kernel that runs is waited for. Not on Windows."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise StepTimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 5.0)  # again, should a finaliser swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Steps:
    """The steps of one case: each has its own time box, a share by `weights` (name -> weight) of what is left when it begins.

    head: columns that each row begins with. A run without time is not begun, one that passes its box is stopped; either is
    a row. A dry run has no boxes.
    """

    def __init__(self, setting: Setting, head: Row, weights: Mapping[str, float]) -> None:
        self.setting = setting
        self.head = head
        self._weights = dict(weights)
        self._ends: dict[str, float] = {}

    def left_s(self, step: str) -> float:
        """Seconds left of the box of `step`, which begins with the first call."""
        if step not in self._ends:
            later = list(self._weights)[list(self._weights).index(step) :]
            share = self._weights[step] / sum(self._weights[name] for name in later)
            self._ends[step] = time.time() + self.setting.left() * share
        return self._ends[step] - time.time()

    def row(self, step: str, work: Callable[[], Row], *, needs_s: float = 1.0, parts: int = 1, **columns: Any) -> Row:
        """What `work` returns, with head and `columns` before it. needs_s: what it is expected to take.

        parts: how many runs of `step`, this one included, still share its box.
        """
        first = {**self.head, "step": step, **columns}
        if self.setting.dry:
            return {**first, **work()}
        box_s = self.left_s(step) / parts
        if box_s < needs_s:
            return {**first, "outcome": NOT_RUN, "box_s": box_s, "needs_s": needs_s}
        try:
            with time_box(box_s):
                return {**first, **work()}
        except StepTimeoutError:
            return {**first, "outcome": STOPPED, "box_s": box_s}


def isolated(
    setting: Setting, target: str, env: dict[str, str] | None = None, plan: Sequence[Row] = (), **arguments: Any
) -> Iterator[Row]:
    """The rows of generator `target` ("module:function"), run in a process of its own so that its memory is its own.

    env: added to the environment; None for the allocator settings that memsafe makes where it starts first, {} for none.
    plan: the columns by which each wanted row is known; those for which no row came are reported as not run.
    Rows come while the process runs, and stay if it is ended at the setting's time or dies. A dry run stays in this process.
    """
    module, _, name = target.partition(":")
    if setting.dry:
        yield from getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(setting, **arguments)
        return
    if setting.left() < START_S:
        yield from ({**head, "outcome": NOT_RUN} for head in plan or [{"what": f"{target} {arguments}"}])
        return
    missing = list(plan)
    end: Row = {}
    for row in _rows_of(setting, target, env, arguments):
        missing = [head for head in missing if any(row.get(key) != value for key, value in head.items())]
        if row.get("what") == "the process":
            end = {**row, "what": f"{target} {arguments}"}
        else:
            yield row
    if end:  # one that ended by itself has told of every step
        yield end
        why = NOT_RUN if end["outcome"] == STOPPED else f"not run (the process {end['outcome']})"
        yield from ({**head, "outcome": why} for head in missing)


def _rows_of(setting: Setting, target: str, env: dict[str, str] | None, arguments: dict[str, Any]) -> Iterator[Row]:
    """Rows as they come; if the process did not end well, {"what": "the process", ...} with how it ended is the last."""
    conf = "expandable_segments:True"
    env = {"PYTORCH_CUDA_ALLOC_CONF": conf, "PYTORCH_ALLOC_CONF": conf} if env is None else env
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    with tempfile.TemporaryDirectory() as folder:
        job, out, log = (Path(folder) / name for name in ("job.json", "rows.jsonl", "log"))
        own = replace(setting, until=setting.until - LAST_S)
        job.write_text(json.dumps({"setting": asdict(own), "target": target, "arguments": arguments}))
        out.touch()
        with open(log, "w", encoding="utf-8") as stream, open(out, encoding="utf-8") as rows:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.prove", "--child", str(job), str(out)],
                cwd=ROOT,
                env={**inherited, **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            late = False
            try:
                while child.poll() is None and not late:
                    yield from _whole_lines(rows)
                    time.sleep(0.1)
                    late = setting.left() < 0
            finally:
                child.kill()
                child.wait()
            yield from _whole_lines(rows)
        if late or child.returncode != 0:
            tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            yield {"what": "the process", "outcome": STOPPED if late else f"died with {child.returncode}", "log": tail}


def _whole_lines(stream: IO[str]) -> Iterator[Row]:
    """The rows that have been written since; a line that is still being written is left for the next time."""
    while True:
        start = stream.tell()
        line = stream.readline()
        if not line.endswith("\n"):
            stream.seek(start)
            return
        yield json.loads(line)


def run_child(job: str, out: str) -> None:
    """The other end of :func:`isolated`."""
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    module, _, name = given["target"].partition(":")
    function = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
    with open(out, "a", encoding="utf-8") as stream:
        for row in function(Setting(**given["setting"]), **given["arguments"]):
            stream.write(json.dumps(row, default=str) + "\n")
            stream.flush()


def some_rows_then_death(setting: Setting, count: int) -> Iterator[Row]:
    """What a test asks of a child: `count` rows, then an end without ceremony."""
    yield from ({"n": n} for n in range(count))
    os._exit(7)


def steps_that_sleep(setting: Setting, total_s: float, sleeps: Sequence[tuple[float, float]]) -> Iterator[Row]:
    """What a test asks of a child: steps of equal weight, of (seconds that it sleeps, seconds that it is said to need)."""
    own = replace(setting, until=time.time() + total_s)
    steps = Steps(own, {"what": "sleeper"}, {str(n): 1 for n in range(len(sleeps))})
    for n, (duration, needs_s) in enumerate(sleeps):
        yield steps.row(str(n), lambda s=duration: time.sleep(s) or {"outcome": "slept"}, needs_s=needs_s)  # type: ignore[misc]


def a_row_then_deafness(setting: Setting) -> Iterator[Row]:
    """What a test asks of a child: a row, then a wait that no alarm ends."""
    yield {"what": "heard"}
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)
