"""What every test may rely on: no hub, no user's cache, the packaged models, and markers by folder.

Fixtures: ``minilm`` and ``demo_reranker`` (folders of real models), ``passages`` (real texts of varied length).
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before anything imports transformers or a framework; subprocesses inherit it.
_CACHE = tempfile.mkdtemp(prefix="memsafe-tests-")
os.environ["MEMSAFE_CACHE_DIR"] = os.path.join(_CACHE, "memsafe")
os.environ["LLAMA_INDEX_CACHE_DIR"] = os.path.join(_CACHE, "llama_index")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["LANGSMITH_TRACING"] = "false"

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/hostile is hostile; tests marked gpu are skipped where there is no CUDA device."""
    for item in items:
        if _HERE / "hostile" in item.path.parents:
            item.add_marker(pytest.mark.hostile)
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    marker = item.get_closest_marker("timeout")
    limit_s = float(marker.args[0] if marker and marker.args else item.config.getini("timeout"))
    _watchdog.test, _watchdog.deadline = item.nodeid, time.monotonic() + limit_s + _watchdog.grace_s
    try:
        return (yield)  # type: ignore[misc]
    finally:
        _watchdog.deadline = float("inf")


@pytest.fixture(scope="session", autouse=True)
def _remove_cache() -> Iterator[None]:
    yield
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
