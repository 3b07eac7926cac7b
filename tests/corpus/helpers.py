"""What the tests of corpora share: made texts, an embedder that costs nothing, folders compared byte for byte, children to kill."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memsafe import MemoryPolicy
from memsafe.testing import SimulatedDevice, SimulatedEmbedder

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="a child that is killed is forked, and this system has no fork"
)


def made_texts(count: int, seed: int = 0) -> list[str]:
    """Short texts of 1 to 30 words, all different."""
    return [f"s{seed} text {number} " + "word " * (number * 13 % 27) for number in range(count)]


def simulated(**options: Any) -> SimulatedEmbedder:
    """An embedder whose rows depend on each text alone. options: of SimulatedModel, and memory."""
    return SimulatedEmbedder(SimulatedDevice("4GiB"), **{"memory": MemoryPolicy(wait_s=0), **options})


def tree(path: Path) -> dict[str, bytes]:
    """Every file below `path` but the lock, by name."""
    files = (each for each in path.rglob("*") if each.is_file() and each.name != "lock")
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in files}


def in_child(work: Callable[[], object], kill_after_s: float | None = None) -> int | None:
    """Run `work` in a forked child; its exit code, or None if it was killed. kill_after_s: SIGKILL after so long."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    if kill_after_s is not None:
        deadline = time.monotonic() + kill_after_s
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code
