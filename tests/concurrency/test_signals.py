"""Signals in the middle of a call: Ctrl-C at any instruction, and the end that a container's manager asks for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from memsafe.testing import SimulatedDevice, SimulatedEmbedder
from tests.concurrency.helpers import PATIENCE_S, lane_names, start, wait_until
from tests.concurrency.test_processes import HELD, run

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")

INTERRUPTED = """
import random, signal, time
import numpy as np
from memsafe.engine.lanes import lanes_of
from memsafe.testing import SimulatedDevice, SimulatedEmbedder

device = SimulatedDevice("1GiB")
embedder = SimulatedEmbedder(device, memory={"max_tokens": 32, "max_pending": 50})
random_, texts = random.Random(3), [f"text {i} of many" for i in range(60)]

def interrupt(*args):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
expected = embedder.embed_documents(texts)
began = time.perf_counter()
embedder.embed_documents(texts)
takes_s = time.perf_counter() - began
queues, scheduler = embedder._engine.backlog.queues, lanes_of(device).scheduler
ended, interrupted, until = 0, 0, time.monotonic() + 5
while time.monotonic() < until:
    try:
        signal.setitimer(signal.ITIMER_REAL, random_.random() * takes_s * 1.3)
        try:
            rows = embedder.embed_documents(texts)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert np.array_equal(rows, expected)
        ended += 1
    except KeyboardInterrupt:
        interrupted += 1
    patience = time.monotonic() + 20
    while queues.pending or queues.coming or scheduler.in_flight:
        assert time.monotonic() < patience, (queues.pending, queues.coming, scheduler.in_flight)
        time.sleep(0.0005)
assert ended > 5 and interrupted > 5, (ended, interrupted)
assert np.array_equal(embedder.embed_documents(texts), expected)
embedder.close()
print("done")
"""


def test_ctrl_c_at_any_instruction() -> None:
    """Hundreds of calls, each interrupted at a moment of its own: no call leaves anything behind, no lock is held, the last one
    works."""
    assert "done" in run(INTERRUPTED)[0]


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(7)])
def test_ctrl_c_as_a_wait_lets_its_lock_go(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one instruction at which CPython's own condition makes another error of it: the caller sees the signal's all the same."""
    with SimulatedEmbedder(SimulatedDevice("1GiB"), memory={"max_tokens": 32, "max_pending": 5}) as embedder:
        texts = [f"text {i} of many" for i in range(60)]
        expected = embedder.embed_documents(texts)
        room = embedder._engine.backlog._room
        release = room._release_save

        def interrupted() -> None:
            release()
            raise raised

        with monkeypatch.context() as patch:
            patch.setattr(room, "_release_save", interrupted)
            with pytest.raises(type(raised)):
                embedder.embed_documents(texts)
        assert np.array_equal(embedder.embed_documents(texts), expected)


def test_a_caller_enters_no_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """`with` on a condition, or on a future, runs Python code that a Ctrl-C can end with the lock held: a worker that needs it then
    waits for ever. Thread.start has one, and what it leaves behind is not counted as a lane."""
    caller, entered = threading.get_ident(), []
    enter = threading.Condition.__enter__

    def recorded(condition: threading.Condition) -> bool:
        came_from = sys._getframe(1).f_code
        if threading.get_ident() == caller and came_from.co_filename != threading.__file__:
            entered.append(came_from.co_qualname if hasattr(came_from, "co_qualname") else came_from.co_name)
        return enter(condition)

    monkeypatch.setattr(threading.Condition, "__enter__", recorded)
    memory = {"max_tokens": 32, "max_pending": 50}
    with SimulatedEmbedder(SimulatedDevice("1GiB"), memory=memory, hooks=[lambda event: None]) as embedder:
        embedder.embed_documents([f"text {i} of many" for i in range(60)])
    assert not entered


def test_a_lane_that_was_interrupted_as_it_began_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hang in its own beginning; the next call has a new one."""
    with SimulatedEmbedder(SimulatedDevice("1GiB")) as embedder:
        expected = embedder.embed_documents(["a", "b"])
        wait_until(lambda: not lane_names(), "the end of the lanes")

        begin = threading.Thread.start

        def interrupted(thread: threading.Thread) -> None:
            if thread.name in ("memsafe-hooks", "memsafe-reaper"):
                return begin(thread)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            for _ in range(4):  # as many as a device has lanes, and more
                with pytest.raises(KeyboardInterrupt):
                    embedder.embed_documents(["a", "b"])
        assert np.array_equal(start(embedder.embed_documents, ["a", "b"]).result(PATIENCE_S), expected)


@pytest.mark.parametrize("handled", [True, False])
def test_sigterm_in_the_middle_of_a_call(handled: bool) -> None:
    """A handler that exits, as servers have one, is as prompt as any exit, finally blocks included; without one the process dies."""
    handler = "import signal, sys; signal.signal(signal.SIGTERM, lambda *args: sys.exit(7))\n" if handled else ""
    program = """
import threading
threading.Thread(target=background, args=(texts,), daemon=True).start()
begun.wait()
print("begun", flush=True)
try:
    embedder.embed_documents(texts)
finally:
    print("finally", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", handler + HELD + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            time.sleep(0.3)
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == (7 if handled else -signal.SIGTERM), stderr
    assert ("finally" in stdout) == handled and "Fatal" not in stderr
    assert time.monotonic() - sent < 5
