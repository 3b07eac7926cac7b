"""Memory of macOS, Windows and other systems: what their own libraries tell in a few calls. Best effort."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

from memsafe.machine.host import Host
from memsafe.planning.budget import MemorySnapshot

__all__ = ["PortableHost"]


class PortableHost(Host):
    """A host known by four figures.

    A `probe` returns total, available, resident and peak resident bytes, None for what it cannot tell.
    """

    def __init__(self, probe: Callable[[], tuple[int | None, ...]] | None = None) -> None:
        if probe is None:
            probe = {"darwin": _probe_macos, "win32": _probe_windows}.get(sys.platform, _probe_unix)
        self._probe: Callable[[], tuple[int | None, ...]] = probe

    def snapshot(self) -> MemorySnapshot:
        total, available, resident, _ = self._probe()
        resident = resident or 0
        total = total if total is not None else resident
        # A system that does not say what is available gets half of its memory: only a real failure can tell more.
        free = available if available is not None else max(total // 2 - resident, 0)
        return MemorySnapshot(min(free, total), total, resident, resident)

    def resident_bytes(self) -> int:
        return self._probe()[2] or 0

    def peak_resident_bytes(self) -> int | None:
        return self._probe()[3]

    def num_cores(self) -> int:
        count = getattr(os, "process_cpu_count", os.cpu_count)()  # Python 3.13 knows the affinity
        return max(count or 1, 1)

    def cpu_features(self) -> frozenset[str]:
        if sys.platform != "darwin":
            return frozenset()
        names = {"bf16": b"hw.optional.arm.FEAT_BF16", "asimdhp": b"hw.optional.arm.FEAT_FP16"}
        return frozenset(name for name, key in names.items() if _sysctl(ctypes.CDLL(None), key, 4) == 1)


def _probe_unix() -> tuple[int | None, ...]:
    import resource

    def pages(name: str) -> int | None:
        try:
            count = os.sysconf(name)
        except (OSError, ValueError):
            return None
        return count * os.sysconf("SC_PAGE_SIZE") if count > 0 else None

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # getrusage(2): KiB outside macOS
    return pages("SC_PHYS_PAGES"), pages("SC_AVPHYS_PAGES"), peak, peak


def _sysctl(library: Any, name: bytes, num_bytes: int) -> int | None:
    value, size = ctypes.create_string_buffer(num_bytes), ctypes.c_size_t(num_bytes)
    if library.sysctlbyname(name, value, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return None
    return int.from_bytes(value.raw[: size.value], sys.byteorder)


def _probe_macos(library: Any = None) -> tuple[int | None, ...]:
    """``hw.memsize``; the share that the kernel itself calls free (``kern.memorystatus_level``, percent, what
    memory_pressure(1) prints); our size from proc_pidinfo (PROC_PIDTASKINFO: virtual, resident, ... 96 bytes)."""
    import resource

    library = library or ctypes.CDLL(None)
    total, percent = _sysctl(library, b"hw.memsize", 8), _sysctl(library, b"kern.memorystatus_level", 4)
    available = total * percent // 100 if total is not None and percent is not None and percent <= 100 else None
    info = (ctypes.c_uint64 * 12)()
    got = library.proc_pidinfo(os.getpid(), 4, ctypes.c_uint64(0), ctypes.byref(info), ctypes.sizeof(info))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return total, available, int(info[1]) if got == ctypes.sizeof(info) else peak, peak


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of sysinfoapi.h."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "free", "total_commit", "free_commit", "v", "v_free", "v_ext")),
    )


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of psapi.h."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        *((name, ctypes.c_size_t) for name in ("peak", "resident", "q0", "q1", "q2", "q3", "commit", "peak_commit")),
    )


def _probe_windows(library: Any = None) -> tuple[int | None, ...]:
    """GlobalMemoryStatusEx: an allocation fails when either physical memory or the commit limit is used up."""
    library = library or ctypes.CDLL("kernel32")
    status, process = _MemoryStatus(), _ProcessMemory()
    status.length, process.length = ctypes.sizeof(status), ctypes.sizeof(process)
    total = available = resident = peak = None
    if library.GlobalMemoryStatusEx(ctypes.byref(status)):
        total, available = status.total, min(status.free, status.free_commit)
    library.GetCurrentProcess.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.GetCurrentProcess())
    if library.K32GetProcessMemoryInfo(handle, ctypes.byref(process), process.length):
        resident, peak = process.resident, process.peak
    return total, available, resident, peak
