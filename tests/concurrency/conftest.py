"""A device with room, and the promise that every test leaves no thread behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from memsafe.engine import lanes
from memsafe.testing import SimulatedDevice
from tests.concurrency.helpers import lane_names, wait_until


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice("1GiB")


@pytest.fixture(autouse=True)
def _no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lanes end when they have had no work for a while (here: shortly), and callers' threads with their calls."""
    monkeypatch.setattr(lanes, "IDLE_S", 0.05)
    yield

    def ours() -> list[str]:
        return lane_names() + [thread.name for thread in threading.enumerate() if thread.name.startswith("caller")]

    wait_until(lambda: not ours(), "the end of every lane and caller")
