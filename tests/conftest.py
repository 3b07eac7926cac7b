"""What every test may rely on: no hub, no user's cache, the packaged models, and markers by folder.

Fixtures: ``minilm`` and ``demo_reranker`` (folders of real models), ``passages`` (real texts of varied length).
With ``-n`` (pytest-xdist) tests run side by side, except those marked ``alone``.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.marks import COLLECTED, marks_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Set before anything imports transformers or a framework; subprocesses inherit it.
_CACHE = tempfile.mkdtemp(prefix="memsafe-tests-")
os.environ["MEMSAFE_CACHE_DIR"] = os.path.join(_CACHE, "memsafe")
os.environ["LLAMA_INDEX_CACHE_DIR"] = os.path.join(_CACHE, "llama_index")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["LANGSMITH_TRACING"] = "false"
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

_ROOM = os.environ.setdefault("MEMSAFE_TESTS_ROOM", os.path.join(_CACHE, "room"))  # one for all workers of a run
_HERE = Path(__file__).parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker per core that this process may use, as far as each can have 3 GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return max(min(cores, memory // (3 << 30)), 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Markers by name (marks.py) and by folder; tests marked gpu are skipped where there is no CUDA device."""
    names = [(item.path.relative_to(_HERE).as_posix(), item.name) for item in items]
    config.stash[COLLECTED] = names
    for item, (file, name) in zip(items, names, strict=True):
        for marker in marks_of(file, name):
            item.add_marker(marker)
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


class _Watchdog:
    """Ends the run if a test outlives its timeout by :attr:`grace_s`: pytest-timeout raises in the test, but what the
    test then waits for in its cleanup (a worker process that hangs, say) has no limit."""

    grace_s = 120.0

    def __init__(self) -> None:
        self.test, self.deadline = "", float("inf")
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def _watch(self) -> None:
        while True:
            time.sleep(5)
            if time.monotonic() > self.deadline:
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                print(f"{self.test} hangs, in its cleanup too: the run is ended", file=sys.__stderr__, flush=True)
                os._exit(70)


_watchdog = _Watchdog()


@contextmanager
def _room(alone: bool) -> Iterator[None]:
    """Among the workers of a run: many tests at a time, or one that is alone. Whoever waits for the room holds the door, so
    that others do not slip in before. The kernel frees both when a worker dies."""
    if fcntl is None or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with open(f"{_ROOM}.door", "w") as door, open(f"{_ROOM}.inside", "w") as inside:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(inside, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:  # said, since a forked child may hold the file open
            fcntl.flock(inside, fcntl.LOCK_UN)


_seen: dict[str, Any] = {"file": None, "tests": 0}


def _freeze(file: Path) -> None:
    """What is there before the first and the second test of a file (which has imported the rest) is never looked at again by
    the garbage collector. A model that is closed collects garbage, which among a million objects of libraries and tests
    took half a second each time: a third of the suite."""
    _seen["tests"] = _seen["tests"] + 1 if file == _seen["file"] else 1
    _seen["file"] = file
    if _seen["tests"] <= 2:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the time that a test waits for its turn is not its own
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    _freeze(item.path)
    marker = item.get_closest_marker("timeout")
    limit_s = float(marker.args[0] if marker and marker.args else item.config.getini("timeout"))
    with _room(alone=item.get_closest_marker("alone") is not None):
        _watchdog.test, _watchdog.deadline = item.nodeid, time.monotonic() + limit_s + _watchdog.grace_s
        try:
            return (yield)  # type: ignore[misc]
        finally:
            _watchdog.deadline = float("inf")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test marked `cuts` gives texts that are too long, on its way to something else: the warning that says so must come."""
    marker = pyfuncitem.get_closest_marker("cuts")
    if marker is None or (marker.args and not re.search(marker.args[0], pyfuncitem.name)):
        return (yield)
    with pytest.warns(UserWarning, match=r"longer than [\d,]+ tokens and cut there"):
        return (yield)


def pytest_unconfigure() -> None:
    if "memsafe.engine.reaper" in sys.modules:  # what the tests have dropped is closed before the interpreter goes
        sys.modules["memsafe.engine.reaper"].settle(60)
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2: a real SentenceTransformer, 384 dimensions, 256 tokens."""
    from examples.models import minilm

    return minilm()


@pytest.fixture(scope="session")
def demo_reranker() -> str:
    """Folder of a real CrossEncoder with one label and a sigmoid, built once into .models/ (see examples/models.py)."""
    from examples.models import demo_reranker

    return demo_reranker()


@pytest.fixture(scope="session")
def passages() -> list[str]:
    """About 300 real passages of 8 to 10,000 characters, in a fixed order."""
    from examples.passages import load_passages

    return [passage.text for passage in load_passages()]
