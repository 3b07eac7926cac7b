"""The machine's memory and cores as this process may use them: linux.py knows Linux, portable.py other systems."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod

from memsafe.planning.budget import MemorySnapshot

__all__ = ["Host", "open_host"]


class Host(ABC):
    """What the operating system lets this process have."""

    @abstractmethod
    def snapshot(self) -> MemorySnapshot:
        """Memory now, in bytes. ``allocated_bytes`` and ``reserved_bytes`` are both the resident size: what malloc
        keeps for later is not counted as reusable, since nobody can say which allocation it would serve."""

    @abstractmethod
    def resident_bytes(self) -> int:
        """Bytes of this process that are in memory now."""

    def peak_resident_bytes(self) -> int | None:
        """The highest resident size since the process began or since :meth:`reset_peak`; None if unknown."""
        return None

    def reset_peak(self) -> bool:
        """Start the high-water mark again from now. False where the system cannot."""
        return False

    def limits(self) -> list[tuple[str, int]]:
        """What limits this process's memory, in words, with bytes: cgroups, rlimits; smallest first. Empty if nothing does."""
        return []

    def num_cores(self) -> int:
        """Cores this process may keep busy; at least 1."""
        return max(os.cpu_count() or 1, 1)

    def cpu_features(self) -> frozenset[str]:
        """The processor's instruction sets, in the words of /proc/cpuinfo; empty if unknown."""
        return frozenset()

    def cpu_vendor(self) -> str:
        """Who made the processor, in the words of x86's CPUID ("GenuineIntel", "AuthenticAMD"); "" if unknown."""
        return ""


def open_host() -> Host:
    """The host for this system."""
    if sys.platform == "linux":
        from memsafe.machine.linux import LinuxHost

        return LinuxHost()
    from memsafe.machine.portable import PortableHost

    return PortableHost()
