"""Memory after many calls, failed ones among them, and the limit over the life of a model: in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memsafe import InputTooLargeError
from memsafe.config import MiB
from memsafe.testing import SimulatedDevice, SimulatedEmbedder

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which is Linux's")

START = """
import json, sys, warnings
import numpy as np
from memsafe import Embedder, InputError, InputTooLargeError, MemoryPolicy, Reranker
from memsafe.config import MiB
from memsafe.machine.linux import LinuxHost

warnings.simplefilter("ignore")
folder, host = sys.argv[1], LinuxHost()
texts, _ = json.load(open(f"{folder}/texts.json"))
"""

CALLS = """
import logging
from memsafe.machine import device

logging.getLogger("memsafe").setLevel(logging.CRITICAL)
embedder = Embedder(f"{folder}/embedder", device="cpu", memory=MemoryPolicy(learn=False, fallback=()))
model = embedder._engine.models[0]
forward, failing = model.forward, False

def sometimes(*args, **options):
    global failing
    rows = forward(*args, **options)
    if failing:
        failing = False
        raise MemoryError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory")
    return rows

model.forward = sometimes
short = [text[:300] for text in texts[:40]]
expected = embedder.embed_documents(short)

def call(number):
    global failing
    some = [(number * 7 + i) % 40 for i in range(3)]
    if number % 10 == 3:
        try:
            embedder.embed_documents(["good", None])
            raise SystemExit("a bad input was taken")
        except InputError:
            return
    failing = number % 10 == 6
    rows = embedder.embed_documents([short[i] for i in some])
    assert np.abs(rows - expected[some]).max() < 1e-5

for number in range(200):
    call(number)
model.device.release()
before = host.resident_bytes()
for number in range(1000):
    call(number)
model.device.release()
print(json.dumps({"before": before, "after": host.resident_bytes()}))
"""

LIMIT = """
limit = int(sys.argv[2])
for kind in (Embedder, Reranker):  # the libraries' own first use
    name = "embedder" if kind is Embedder else "reranker"
    kind(f"{folder}/{name}", device="cpu", memory=MemoryPolicy(learn=False)).close()
host.reset_peak()
before = host.resident_bytes()
embedder = Embedder(f"{folder}/embedder", device="cpu", memory=MemoryPolicy(learn=False, limit=limit))
for _ in range(2):
    run = embedder.run(texts)
assert np.abs(run.embeddings - np.load(f"{folder}/rows.npy")).max() < 1e-5
print(json.dumps({"peak": host.peak_resident_bytes() - before, "out_of_memory": run.report.out_of_memory}))
"""


def told_by(program: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", START + program, *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@linux
def test_a_thousand_calls_leave_nothing_behind(long_context: Path) -> None:
    """1,000 calls, every tenth with a bad input and every tenth with memory running out in its middle: right rows from
    all others, and the process is as large as it was, but for 8 MiB (8 kB a call)."""
    told = told_by(CALLS, str(long_context))
    print(told)
    assert told["after"] - told["before"] < 8 * MiB


@pytest.mark.cuts
def test_a_thousand_failures_leave_nothing_on_a_device() -> None:
    """1,000 calls on a simulated accelerator, one in four with an input that cannot be done: exactly the weights stay."""
    device = SimulatedDevice("256MiB")
    with SimulatedEmbedder(device, memory={"wait_s": 0, "fallback": ()}) as embedder:
        held = device.snapshot().allocated_bytes
        for number in range(1000):
            if number % 4 == 3:
                with pytest.raises(InputTooLargeError):
                    embedder.embed_documents(["fits", "word " * 30_000])
            else:
                assert embedder.embed_documents(["some", f"text {number}"]).shape == (2, 8)
        assert device.snapshot().allocated_bytes == held


@linux
@pytest.mark.parametrize("limit_mib", [180, 250, 400])
def test_the_limit_is_kept_from_loading_on(limit_mib: int, long_context: Path) -> None:
    """The process's measured peak beyond what it used before loading, weights included, stays under the limit; the rows
    are those of a batch of one."""
    told = told_by(LIMIT, str(long_context), str(limit_mib * MiB))
    print(limit_mib, told["peak"] / MiB)
    assert told["peak"] <= limit_mib * MiB
