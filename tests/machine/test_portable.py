"""machine/portable.py: what macOS, Windows and other systems tell, through libraries that the test makes up."""

from __future__ import annotations

import ctypes
import os
import sys

from memsafe.config import GiB
from memsafe.machine import portable
from memsafe.machine.portable import PortableHost


class _Library:
    """A C library with just the calls that a probe makes."""

    def __init__(self, sysctl: dict[bytes, tuple[int, int]], resident: int) -> None:
        self._sysctl, self._resident = sysctl, resident

    def sysctlbyname(self, name: bytes, value: ctypes.Array[ctypes.c_char], size: object, *_: object) -> int:
        if name not in self._sysctl:
            return -1
        number, width = self._sysctl[name]
        ctypes.memmove(value, number.to_bytes(width, sys.byteorder), width)
        return 0

    def proc_pidinfo(self, pid: int, flavor: int, arg: object, info: object, size: int) -> int:
        assert (pid, flavor, size) == (os.getpid(), 4, 96)
        info._obj[1] = self._resident  # type: ignore[attr-defined]
        return size


def test_macos() -> None:
    """Total from hw.memsize, free from the share that the kernel calls free, held from proc_pidinfo."""
    library = _Library({b"hw.memsize": (32 * GiB, 8), b"kern.memorystatus_level": (25, 4)}, resident=GiB)
    snapshot = PortableHost(lambda: portable._probe_macos(library)).snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes, snapshot.reserved_bytes) == (8 * GiB, 32 * GiB, GiB)


def test_macos_that_tells_nothing_of_what_is_free() -> None:
    """Without memorystatus_level half of the memory is assumed to be for us."""
    library = _Library({b"hw.memsize": (32 * GiB, 8)}, resident=GiB)
    assert PortableHost(lambda: portable._probe_macos(library)).snapshot().free_bytes == 15 * GiB


def test_windows() -> None:
    """Free is the smaller of free memory and free commit; held is the working set."""

    class Handle:
        restype: object = None

        def __call__(self) -> int:
            return 2**64 - 1

    class Kernel32:
        GetCurrentProcess = Handle()

        @staticmethod
        def GlobalMemoryStatusEx(status: object) -> int:
            status._obj.total, status._obj.free, status._obj.free_commit = 16 * GiB, 9 * GiB, 5 * GiB  # type: ignore[attr-defined]
            assert status._obj.length == 64  # type: ignore[attr-defined]
            return 1

        @staticmethod
        def K32GetProcessMemoryInfo(handle: object, process: object, size: int) -> int:
            process._obj.resident, process._obj.peak = GiB, 2 * GiB  # type: ignore[attr-defined]
            assert size == 72
            return 1

    host = PortableHost(lambda: portable._probe_windows(Kernel32()))
    snapshot = host.snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes, snapshot.reserved_bytes) == (5 * GiB, 16 * GiB, GiB)
    assert host.peak_resident_bytes() == 2 * GiB


def test_any_other_unix() -> None:
    """sysconf and getrusage, run for real here: plausible figures, no peak that can be restarted."""
    host = PortableHost(portable._probe_unix)
    snapshot = host.snapshot()
    assert 0 < snapshot.free_bytes <= snapshot.total_bytes
    assert 0 < snapshot.reserved_bytes < snapshot.total_bytes
    assert host.reset_peak() is False
    assert host.num_cores() >= 1
