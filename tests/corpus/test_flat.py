"""The memory of the process does not grow with the corpus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import save_embedder

PROGRAM = Path(__file__).with_name("program_flat.py")


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the size of the process is read from /proc")


def sizes(count: int, folder: Path, *model: str) -> tuple[int, int]:
    """(peak, largest resident size after a block) of a process of its own, in bytes."""
    command = [sys.executable, str(PROGRAM), str(count), str(folder / f"store{count}"), *model]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(count, done.stdout.strip())
    peak, resident = map(int, done.stdout.split())
    return peak, resident


def test_twenty_times_the_texts_take_the_same_memory(tmp_path: Path) -> None:
    """10,000 and 200,000 short texts with ids, on a simulated model: at most 12 MiB more; the texts would take 30."""
    small, large = (sizes(count, tmp_path) for count in (10_000, 200_000))
    assert large[1] < small[1] + (12 << 20)
    assert large[0] < 1.05 * small[0]


@pytest.mark.timeout(3600)
def test_a_million_texts_take_the_memory_of_a_hundred_thousand(tmp_path: Path) -> None:
    """1e5 and 1e6 short texts on a small real model: peaks within 10 %."""
    model = str(save_embedder(tmp_path / "model", hidden_size=32, num_layers=1, intermediate_size=32))
    small, large = (sizes(count, tmp_path, model) for count in (100_000, 1_000_000))
    assert large[0] < 1.10 * small[0] and large[1] < 1.10 * small[1]
