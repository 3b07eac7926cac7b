"""Lanes, forks and exits: what a process may do around memsafe. Each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from memsafe.testing import SimulatedDevice, SimulatedEmbedder
from tests.concurrency.helpers import PATIENCE_S, lane_names, start, wait_until
from tests.concurrency.test_priorities import SMALL, texts

HELD = """
import atexit, threading, time
atexit.register(lambda: print("left", time.time(), flush=True))  # runs after what is registered later: ours
from memsafe.testing import SimulatedDevice, SimulatedEmbedder

embedder = SimulatedEmbedder(SimulatedDevice("1GiB"), memory={"max_tokens": 32, "max_pending": 100, "wait_s": 30})
texts = [f"text {i} of many" for i in range(100_000)]
model = embedder.simulated[0]
forward, begun = model.forward, threading.Event()

def slow(*args, **options):
    begun.set()
    time.sleep(0.05)
    return forward(*args, **options)

model.forward = slow

def background(texts):
    try:
        embedder.embed_documents(texts)
    except Exception as error:
        assert type(error).__name__ == "ClosedError", error
"""


def run(program: str, limit_s: float = 120, **env: str) -> tuple[str, float]:
    """Run `program`; returns its output and the seconds between its lines ``leaving <time>`` and ``left <time>``."""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **env},
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=limit_s)
        except BaseException:
            with suppress(ProcessLookupError):  # forked children too: they would keep the pipes open
                os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, stderr
    assert "Fatal" not in stderr and "Traceback" not in stderr, stderr
    times = dict(line.split() for line in stdout.splitlines() if line.startswith(("leaving", "left")))
    return stdout, float(times["left"]) - float(times["leaving"]) if "left" in times else 0.0


@pytest.mark.parametrize(
    "unfinished",
    [
        "threading.Thread(target=background, args=(texts,), daemon=True).start(); begun.wait()",
        "embedder.embed_documents(texts[:10])",
        "model.device.take('900MiB'); threading.Thread(target=background, args=([texts[0] * 800],), "
        "daemon=True).start(); time.sleep(0.5)",
    ],
    ids=["a call in a daemon thread", "no call", "a call that waits for memory"],
)
def test_the_interpreter_exits_promptly(unfinished: str) -> None:
    """A process ends at once after its last statement, also while a background call is unfinished."""
    _, seconds = run(HELD + unfinished + "\nprint('leaving', time.time(), flush=True)\n")
    assert seconds < 3  # about 0.05, the forward in flight; when a call that waits for memory is not ended, 10


def test_calls_while_the_interpreter_exits_fail_rather_than_hang() -> None:
    """A call from an exit handler that runs after ours gets ClosedError."""
    early = "import atexit\nlate = []\natexit.register(lambda: late[0]())\n"
    late = """
def late_call():
    try:
        embedder.embed_queries(["too late"])
    except Exception as error:
        print(type(error).__name__, flush=True)

late.append(late_call)
embedder.embed_queries(["in time"])
print("leaving", time.time(), flush=True)
"""
    output, seconds = run(early + HELD + late)
    assert "ClosedError" in output
    assert seconds < 3


REAL = """
import os, sys, threading
import numpy as np
from examples.models import minilm
from memsafe import Embedder

texts = [f"text number {i} " + "and more " * (i % 9) for i in range(30)]

def check(rows):
    assert np.abs(rows - expected).max() < 1e-5
"""


def test_what_is_being_closed_at_the_very_end_is_closed_before_the_interpreter_goes() -> None:
    """The thread that closes it is in torch's code then, and would abort the process. What else waits is let be."""
    program = """
from memsafe.engine.engine import Engine

close = Engine.close

def slow(engine):
    time.sleep(1)
    close(engine)
    print("closed", flush=True)

Engine.close = slow
embedder = Embedder(minilm(), device="cpu")
embedder.embed_documents(texts)
del embedder
time.sleep(0.3)
"""
    assert "closed" in run("import time\n" + REAL + program)[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parallelism", ["true", "false"])
def test_a_forked_child_has_a_worker_of_its_own(parallelism: str) -> None:
    """After os.fork, even in the middle of a call of the parent, the child embeds with its own worker, equal rows; the
    parent's call goes on. So does a multiprocessing pool that forks. Whatever tokenizers was told about its threads."""
    program = """
embedder = Embedder(minilm(), device="cpu")
expected = embedder.embed_documents(texts)
busy = threading.Thread(target=lambda: check(embedder.embed_documents(texts * 4 + ["another"])[:30]))
busy.start()
pid = os.fork()
if not pid:
    code = 1
    try:
        check(embedder.embed_documents(texts))
        check(np.concatenate([embedder.embed_queries([text]) for text in texts[:3]] + [expected[3:]]))
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(pid, 0)[1] == 0
busy.join()

import multiprocessing

def work(number):
    check(embedder.embed_documents(texts))
    return os.getpid()

with multiprocessing.get_context("fork").Pool(2) as pool:
    assert os.getpid() not in pool.map(work, range(3))
check(embedder.embed_documents(texts))
print("done")
"""
    assert "done" in run(REAL + program, limit_s=60, TOKENIZERS_PARALLELISM=parallelism)[0]


def test_spawned_workers(tmp_path: Path) -> None:
    """A spawned process that loads the model itself gets equal rows."""
    script = tmp_path / "spawning.py"
    program = """
def work(number):
    with Embedder(minilm(), device="cpu") as embedder:
        return embedder.embed_documents(texts)

if __name__ == "__main__":
    import multiprocessing

    with Embedder(minilm(), device="cpu") as embedder:
        expected = embedder.embed_documents(texts)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            check(pool.map(work, [0])[0])
    print("done")
"""
    script.write_text(REAL + program)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr


def test_after_a_fork_other_devices_say_so(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child that inherits a model on an accelerator gets an error that says what to do, not a crash."""
    with SimulatedEmbedder(device) as embedder:
        monkeypatch.setattr(embedder._engine._home, "_pid", -1)
        with pytest.raises(RuntimeError, match=r"fork.*spawn"):
            embedder.embed_queries(["in a child"])
        monkeypatch.undo()


def test_lanes_end_and_start_again(device: SimulatedDevice) -> None:
    """Lanes end when they have been idle for a while; the next call starts new ones; their number stays bounded."""
    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        before = threading.active_count()
        for _ in range(3):
            calls = [start(embedder.embed_documents, texts(20, word=f"c{i}x")) for i in range(8)]
            most = 0
            while not all(call.done() for call in calls):
                most = max(most, len(lane_names()))
            assert all(call.result(PATIENCE_S).shape == (20, 8) for call in calls)
            assert most <= 3
            wait_until(lambda: threading.active_count() <= before, "idle lanes to end")
