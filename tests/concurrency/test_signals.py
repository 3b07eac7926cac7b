"""Signals in the middle of a call: Ctrl-C at any instruction, and the end that a container's manager asks for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from memsafe.testing import SimulatedDevice, SimulatedEmbedder
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
