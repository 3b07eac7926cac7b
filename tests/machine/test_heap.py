"""machine/heap.py: the C library's heap, set and trimmed."""

from __future__ import annotations

import platform
import subprocess
import sys
import types

import pytest
import torch

from memsafe.config import MiB
from memsafe.machine import allocator
from memsafe.machine.device import open_device
from memsafe.machine.heap import strict_heap

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")


@glibc
def test_the_heap_is_trimmed() -> None:
    """Freed blocks that glibc keeps leave the process, and the number returned is what the system saw leave."""
    blocks = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each, below the mmap threshold: 95 MiB in the heap
    pins = blocks[::50]
    del blocks
    device = open_device("cpu")
    before = device.process_bytes()
    released = device.release()
    assert released >= 48 * MiB
    assert abs((before - device.process_bytes()) - released) < 8 * MiB
    assert float(sum(pin.sum() for pin in pins)) == 25_000 * len(pins)


@glibc
def test_a_strict_heap_gives_freed_tensors_back_at_once() -> None:
    """In a process of its own: after strict_heap() a freed 1 MiB tensor leaves the process without a trim, even when
    bigger ones were freed before; without it, it stays."""
    code = """
import sys, torch
from memsafe.machine.heap import strict_heap
from memsafe.machine.host import open_host
if sys.argv[1] == "strict":
    assert strict_heap() is True
    assert strict_heap() is True
for _ in range(3):
    torch.ones(4 * 2**20)                 # glibc by itself raises its threshold to 16 MiB here
blocks = [torch.ones(2**18) for _ in range(64)]
last = torch.ones(2**18)                  # keeps the heap's top in place
before = open_host().resident_bytes()
del blocks
print(before - open_host().resident_bytes())
"""
    freed = [
        int(subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("strict", "default")
    ]
    assert freed[0] > 60 * MiB
    assert freed[1] < 16 * MiB


def test_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    """musl, macOS and Windows lack these calls: strict_heap says False and trimming does nothing."""
    for library in (types.SimpleNamespace(), None):
        monkeypatch.setattr("memsafe.machine.heap._libc", lambda library=library: library)
        assert strict_heap() is False
        device = types.SimpleNamespace(kind="cpu", index=None, process_bytes=lambda: 7)
        assert allocator.release_cache(device) == 0
