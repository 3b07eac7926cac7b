"""Memory and cores on Linux: procfs, memory and CPU cgroups (v1, v2 and both at once, every level of them), rlimits, strict
overcommit. No torch, no dependency."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from memsafe.machine.host import Host
from memsafe.planning.budget import MemorySnapshot

__all__ = ["LinuxHost"]


class _Level(NamedTuple):
    """One limit that holds for this process: a level of a cgroup hierarchy. Paths of its files."""

    limits: tuple[str, ...]
    usage: str
    stat: str
    inactive_file: bytes  # how `stat` names the page cache that the kernel drops first


class _Limits(NamedTuple):
    """Where this process is limited, as it was found lately; the limits themselves are read each time."""

    physical_bytes: int
    levels: tuple[_Level, ...]  # those that allow less than there is
    strict_overcommit: bool  # vm.overcommit_memory=2
    until: float  # when to look again, in the clock's seconds
    pid: int


class LinuxHost(Host):
    """Linux, read from files below `root` (tests put a made-up machine there).

    Files are opened anew at each reading, which costs 1-2 microseconds more than a kept descriptor but is right
    after a fork and after everything has been closed. Where there are limits is kept for `refresh_s` seconds, since many
    places may have one; how large they are is not: a container that somebody makes smaller is smaller at once.
    """

    def __init__(
        self,
        root: str = "/",
        *,
        page_bytes: int | None = None,
        getrlimit: Callable[[int], tuple[int, int]] | None = None,
        affinity: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        refresh_s: float = 1.0,
    ) -> None:
        import resource

        self._root = root.rstrip("/")
        self._page_bytes = page_bytes or os.sysconf("SC_PAGE_SIZE")
        self._getrlimit = getrlimit or resource.getrlimit
        self._affinity = affinity or (lambda: len(os.sched_getaffinity(0)))
        self._rlimits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
        self._statm = f"{self._root}/proc/self/statm"
        self._cgroup = f"{self._root}/proc/self/cgroup"
        self._meminfo = f"{self._root}/proc/meminfo"
        self._clock = clock
        self._refresh_s = refresh_s
        self._cgroup_text: bytes | None = None
        self._levels: tuple[_Level, ...] | None = None
        self._limits: _Limits | None = None
        self._cores: tuple[int, float, int] | None = None  # and until when, in the clock's seconds; and the process

    def snapshot(self) -> MemorySnapshot:
        limits = self._current_limits()
        if not all(os.path.exists(level.usage) for level in limits.levels):  # a cgroup has gone: where are we now?
            self._limits = self._levels = None
            limits = self._current_limits()
        meminfo = _read(self._meminfo) or b""
        free = _field(meminfo, b"MemAvailable:", 1024)
        if free is None:  # before Linux 3.14, or procfs is hidden
            known = [_field(meminfo, name, 1024) for name in (b"MemFree:", b"Buffers:", b"\nCached:")]
            free = sum(size or 0 for size in known) if known[0] is not None else limits.physical_bytes
        if limits.strict_overcommit:  # malloc fails at the commit limit, however much is available
            commit, used = (_field(meminfo, name, 1024) for name in (b"CommitLimit:", b"Committed_AS:"))
            if commit is not None and used is not None:
                free = min(free, commit - used)
        address_space, data_limit = self._rlimits_bytes()
        total = limits.physical_bytes
        for level in limits.levels:
            usage, limit = _number(level.usage, 0), _limit_of(level, limits.physical_bytes)
            total = min(total, limit)
            if limit - usage < free:  # otherwise this level does not bind, whatever of its usage is page cache
                cache = _field(_read(level.stat) or b"", level.inactive_file, 1) or 0
                free = min(free, limit - max(usage - cache, 0))
        virtual, resident, data = self._sizes()
        if address_space is not None:
            free, total = min(free, address_space - virtual), min(total, address_space)
        if data_limit is not None:
            free, total = min(free, data_limit - data), min(total, data_limit)
        return MemorySnapshot(max(free, 0), total, resident, resident)

    def resident_bytes(self) -> int:
        return self._sizes()[1]

    def peak_resident_bytes(self) -> int | None:
        return _field(_read(f"{self._root}/proc/self/status") or b"", b"VmHWM:", 1024)

    def reset_peak(self) -> bool:
        # "5" resets VmHWM to the present size (Linux 4.0; proc(5)). Needs CONFIG_PROC_PAGE_MONITOR.
        try:
            descriptor = os.open(f"{self._root}/proc/self/clear_refs", os.O_WRONLY)
        except OSError:
            return False
        try:
            return os.write(descriptor, b"5") == 1
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def limits(self) -> list[tuple[str, int]]:
        limits = self._current_limits()
        found = [
            ("cgroup " + "/".join(level.limits[0].rsplit("/", 2)[1:]), _limit_of(level, limits.physical_bytes))
            for level in limits.levels
        ]
        rlimits = zip(("RLIMIT_AS", "RLIMIT_DATA"), self._rlimits_bytes(), strict=True)
        found += [(name, size) for name, size in rlimits if size is not None]
        commit = _field(_read(self._meminfo) or b"", b"CommitLimit:", 1024) if limits.strict_overcommit else None
        found += [("vm.overcommit_memory=2, CommitLimit", commit)] if commit is not None else []
        return sorted(found, key=lambda limit: limit[1])

    def num_cores(self) -> int:
        """Affinity, or the CPU quota of the cgroups where that is less. A fraction of a core is not a core: a thread
        too many makes all of them wait for it when the quota is used up."""
        now, known = self._clock(), self._cores
        if known is not None and known[1] > now and known[2] == os.getpid():
            return known[0]
        text = _read(self._cgroup) or b""
        mounts = _read_all(f"{self._root}/proc/self/mountinfo")
        cores = float(self._affinity())
        for directory in _directories(self._root, text, mounts, "cpu"):
            cores = min(cores, _quota(directory, "cpu.cfs_quota_us", "cpu.cfs_period_us"))
        for directory in _directories(self._root, text, mounts, None):
            cores = min(cores, _quota(directory, "cpu.max"))
        self._cores = (max(int(cores), 1), now + self._refresh_s, os.getpid())
        return self._cores[0]

    def cpu_features(self) -> frozenset[str]:
        return frozenset(self._cpuinfo(b"flags", b"Features").split())  # x86 and ARM

    def cpu_vendor(self) -> str:
        return self._cpuinfo(b"vendor_id")

    def _cpuinfo(self, *names: bytes) -> str:
        """What the first line of one of these names says; "" without."""
        for line in (_read(f"{self._root}/proc/cpuinfo") or b"").splitlines():
            name, _, value = line.partition(b":")
            if name.strip() in names:
                return value.decode("ascii", "replace").strip()
        return ""

    def _sizes(self) -> tuple[int, int, int]:
        """Virtual, resident and data size in bytes (proc(5), statm; its data includes the stack)."""
        fields = (_read(self._statm) or b"").split()
        if len(fields) < 6:
            return 0, 0, 0
        return tuple(int(fields[i]) * self._page_bytes for i in (0, 1, 5))  # type: ignore[return-value]

    def _current_limits(self) -> _Limits:
        now, limits = self._clock(), self._limits
        if limits is not None and limits.until > now and limits.pid == os.getpid():
            return limits
        text = _read(self._cgroup) or b""
        if self._levels is None or text != self._cgroup_text:
            self._levels = tuple(_memory_levels(self._root, text, _read_all(f"{self._root}/proc/self/mountinfo")))
            self._cgroup_text = text
        physical = _field(_read(self._meminfo) or b"", b"MemTotal:", 1024)
        if physical is None:
            physical = os.sysconf("SC_PHYS_PAGES") * self._page_bytes
        # A level that allows more than there is does not bind; v1 writes "no limit" as such a number.
        binding = tuple(level for level in self._levels if _limit_of(level, physical) < physical)
        strict = (_read(f"{self._root}/proc/sys/vm/overcommit_memory") or b"").strip() == b"2"
        self._limits = _Limits(physical, binding, strict, now + self._refresh_s, os.getpid())
        return self._limits

    def _rlimits_bytes(self) -> tuple[int | None, int | None]:
        """RLIMIT_AS and RLIMIT_DATA; None: no limit, which is -1 or the largest number."""
        address_space, data = (self._getrlimit(which)[0] for which in self._rlimits)
        return (
            address_space if 0 <= address_space < sys.maxsize else None,
            data if 0 <= data < sys.maxsize else None,
        )


def _limit_of(level: _Level, physical_bytes: int) -> int:
    """What a level allows, in bytes; no limit reads as `physical_bytes`."""
    return min(_number(path, physical_bytes) for path in level.limits)


def _memory_levels(root: str, cgroup: bytes, mounts: bytes) -> list[_Level]:
    levels = []
    for path in _directories(root, cgroup, mounts, "memory"):
        for prefix in ("memory.", "memory.memsw."):  # the second counts swap, and exists only with swap accounting
            limit, usage = f"{path}/{prefix}limit_in_bytes", f"{path}/{prefix}usage_in_bytes"
            if os.path.exists(limit):
                levels.append(_Level((limit,), usage, f"{path}/memory.stat", b"total_inactive_file "))
    for path in _directories(root, cgroup, mounts, None):
        # At memory.high the kernel does not kill but throttles almost to a standstill: a limit all the same.
        limits = tuple(f for f in (f"{path}/memory.max", f"{path}/memory.high") if os.path.exists(f))
        if limits:
            levels.append(_Level(limits, f"{path}/memory.current", f"{path}/memory.stat", b"\ninactive_file "))
    return levels


def _directories(root: str, cgroup: bytes, mounts: bytes, controller: str | None) -> list[str]:
    """Directories of this process's cgroup and of the ones it is nested in, innermost first.

    `controller`: the name of a v1 hierarchy, None for v2. Empty if there is no such hierarchy.
    """
    path = None
    for line in cgroup.decode("utf-8", "surrogateescape").splitlines():
        _, controllers, place = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if controllers == "" if controller is None else controller in controllers.split(","):
            path = place
    if path is None:
        return []
    found: list[str] = []
    for line in mounts.decode("utf-8", "surrogateescape").splitlines():
        # 36 35 98:0 /root /mount/point options... - fstype source superoptions (proc_pid_mountinfo(5))
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] != ("cgroup2" if controller is None else "cgroup"):
            continue
        if controller is not None and controller not in kind[2].split(","):
            continue
        mount_root, mount_point = _unescape(fields[3]), root + _unescape(fields[4])
        # In a cgroup namespace, or when a container sees its own part only, the mount itself is our cgroup.
        inside = path[len(mount_root.rstrip("/")) :] if f"{path}/".startswith(mount_root.rstrip("/") + "/") else ""
        parts = [part for part in inside.split("/") if part]
        parts = [] if ".." in parts else parts
        visible = [
            place
            for count in range(len(parts), -1, -1)
            if os.path.isdir(place := "/".join([mount_point, *parts[:count]]))
        ]
        if len(visible) > len(found):  # several mounts of one hierarchy: the one that shows most of our path
            found = visible
    return found


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _read(path: str) -> bytes | None:
    """One reading: all of a file that the kernel formats at once, as it does the ones read here."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the cgroup has just gone
        return None
    finally:
        os.close(descriptor)


def _read_all(path: str) -> bytes:
    """For files of many records (mountinfo), which the kernel hands out piece by piece."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _field(data: bytes, name: bytes, unit: int) -> int | None:
    """The number after `name` in lines of names and numbers, times `unit`; None if there is none."""
    at = data.find(name)
    if at < 0 and name[:1] == b"\n" and data.startswith(name[1:]):
        at, name = 0, name[1:]
    if at < 0:
        return None
    words = data[at + len(name) : at + len(name) + 32].split(None, 1)
    try:
        return int(words[0]) * unit
    except (IndexError, ValueError):
        return None


def _number(path: str, otherwise: int) -> int:
    """The number in a file; `otherwise` for "max", a negative number, or an unreadable file."""
    try:
        value = int(_read(path) or b"")
    except ValueError:
        return otherwise
    return value if value >= 0 else otherwise


def _quota(directory: str, quota: str, period: str | None = None) -> float:
    """Cores that a cgroup's CPU quota allows; infinite without one. v2 has both numbers in one file."""
    words = (_read(f"{directory}/{quota}") or b"").split()
    if period is not None:
        words += (_read(f"{directory}/{period}") or b"").split()
    try:
        microseconds, each = int(words[0]), int(words[1])
    except (IndexError, ValueError):  # "max", or no such controller here
        return float("inf")
    return microseconds / each if microseconds > 0 and each > 0 else float("inf")
