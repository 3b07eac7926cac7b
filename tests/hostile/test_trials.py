"""Random jobs under random limits that the kernel enforces."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from memsafe.config import GiB
from tests.hostile.cgroup import limited

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("program_trials.py")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("first", "count"), [(0, 24), (24, 176)])
def test_random_jobs_finish_or_raise_the_right_error(first: int, count: int, long_context: Path) -> None:
    """Random (limit, lengths, counts, policy, callers) from a seed, 40 to 360 MiB above what the process takes: every one
    finishes or raises the right error; no kill, no lost or swapped row, and every row as in a batch of one."""
    with limited(8 * GiB) as box:
        arguments = (str(first), str(count), str(long_context), str(box.folder))
        done = box.run(PROGRAM, *arguments, timeout_s=800, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = [line for line in lines if "outcome" in line]
    if done.returncode:
        pytest.fail(
            f"trial {lines[-1] if lines else None} ended the process ({done.returncode})\n{done.stderr[-2000:]}"
        )
    wrong = [result for result in results if result["outcome"] not in ("done", "input too large", "model too large")]
    assert not wrong
    outcomes = Counter(result["outcome"] for result in results)
    print(f"trials {first} to {first + count - 1}: {dict(outcomes)}")
    assert len(results) == count
    assert outcomes["done"] > count // 3
