"""Resident memory of this process, read from Linux's /proc. Bytes. Standard library only: peers' environments use it too."""

from __future__ import annotations

__all__ = ["peak_bytes", "reset_peak", "resident_bytes"]


def _status_bytes(field: str) -> int | None:
    """A kB field of /proc/self/status as bytes; None where there is no such file (not Linux)."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident_bytes() -> int | None:
    """What is resident now (VmRSS)."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int | None:
    """The most that was resident since the process started, or since :func:`reset_peak` (VmHWM)."""
    return _status_bytes("VmHWM")


def reset_peak() -> bool:
    """Start a new high-water mark; False where the kernel does not allow it. Documented in proc(5), clear_refs, value 5."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True
