"""Devices and their memory: the only place, with its helpers, that asks torch or the system about memory.

:func:`open_device` finds a device; :class:`Device` tells what is free on it, measures peaks and gives memory back.
Helpers: host.py, linux.py and portable.py (the operating system), meter.py (peaks), allocator.py and heap.py (giving back).
"""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import torch

from memsafe.errors import ConfigError
from memsafe.machine import allocator
from memsafe.machine.host import Host, open_host
from memsafe.machine.meter import Overlap, Peak, StorageMeter
from memsafe.planning.budget import MemorySnapshot
from memsafe.planning.traits import Traits

__all__ = ["Device", "Peak", "open_device"]


class Device(ABC):
    """One device that models run on.

    name: as torch writes it, index included (``"cuda:0"``, ``"cpu"``).
    kind: ``"cuda"`` (ROCm too), ``"mps"``, ``"xpu"`` or ``"cpu"``.
    index: of a cuda or xpu device; None for the others, of which there is one.
    """

    kind: str

    def __init__(self, index: int | None = None, *, host: Host | None = None) -> None:
        self.index = index
        self.name = self.kind if index is None else f"{self.kind}:{index}"
        self._host = host or open_host()

    def __repr__(self) -> str:
        return f"Device({self.name!r})"

    @property
    def total_bytes(self) -> int:
        """The device's memory as this process may see it: a container's limit on the CPU."""
        return self.snapshot().total_bytes

    @property
    def traits(self) -> Traits:
        """How it behaves, as far as planning needs to know."""
        return Traits.of(self.kind, self.num_cores)

    @property
    def num_cores(self) -> int:
        """CPU cores this process may keep busy, on every kind of device."""
        return self._host.num_cores()

    def host_limits(self) -> list[tuple[str, int]]:
        """What limits this process's main memory, in words, with bytes, smallest first."""
        return self._host.limits()

    def cpu_features(self) -> frozenset[str]:
        """The processor's instruction sets; empty if unknown."""
        return self._host.cpu_features()

    def cpu_vendor(self) -> str:
        """Who made the processor, in the words of x86's CPUID ("GenuineIntel", "AuthenticAMD"); "" if unknown."""
        return self._host.cpu_vendor()

    @abstractmethod
    def snapshot(self) -> MemorySnapshot:
        """Memory now. On a CPU about 10 microseconds."""

    def process_bytes(self) -> int:
        """What this process holds on the device, caches included."""
        return self.snapshot().reserved_bytes

    @abstractmethod
    def measure(self, live: bool = False) -> AbstractContextManager[Peak]:
        """Measure the block's peak; the yielded :class:`Peak` is filled when the block ends, by an error too.

        `live`: on a CPU and on MPS also follow the tensors of this thread, about 10 microseconds per operation;
        cuda and xpu count them anyway, for the whole process.
        """

    @abstractmethod
    def supports(self, dtype_name: str) -> bool:
        """Whether the hardware computes in this dtype (``"bfloat16"``, ``"torch.float16"``), rather than emulating it."""

    def mark(self) -> Any:
        """A point in the device's work, for :meth:`seconds_between`; None where the device has no clock of its own."""
        return None

    def seconds_between(self, begin: Any, end: Any) -> float | None:
        """What the device did from one mark to the next, once it has passed both; None where it cannot say."""
        return None

    def synchronize(self) -> None:
        """Wait until the device has done all it was asked to do."""
        return

    def release(self) -> int:
        """Give cached memory back to the device; return how many bytes it really got."""
        return allocator.release_cache(self)


class CpuDevice(Device):
    """The CPU, in whatever container it is."""

    kind = "cpu"

    def snapshot(self) -> MemorySnapshot:
        return self._host.snapshot()

    def process_bytes(self) -> int:
        return self._host.resident_bytes()

    @contextmanager
    def measure(self, live: bool = False) -> Iterator[Peak]:
        peak, meter, overlap = Peak(), StorageMeter("cpu") if live else None, Overlap.of("cpu")
        token = overlap.enter()
        restarted = self._host.reset_peak()
        before, mark = self._host.resident_bytes(), self._host.peak_resident_bytes()
        try:
            with meter or contextlib.nullcontext():
                yield peak
        finally:
            top = self._host.peak_resident_bytes()
            # A mark that could not be restarted still tells the peak if the block has raised it.
            known = top is not None and mark is not None and (restarted or top > mark)
            if overlap.leave(token) and known and top is not None:
                peak.resident_bytes = max(top - before, 0)
            if meter is not None:
                peak.live_bytes = meter.peak_bytes

    def supports(self, dtype_name: str) -> bool:
        dtype_name = dtype_name.removeprefix("torch.")
        if dtype_name in ("float32", "float64"):
            return True
        # What oneDNN has matrix products for. Names: /proc/cpuinfo, then torch.cpu.get_capabilities() (torch >= 2.10).
        wanted = {
            "bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"},
            "float16": {"avx512_fp16", "amx_fp16", "asimdhp", "fp16_arith"},
        }.get(dtype_name, set())
        if wanted & self._host.cpu_features():
            return True
        told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(told.get(name) is True for name in wanted)


class MpsDevice(Device):
    """Apple's GPU, which shares the machine's memory."""

    kind = "mps"

    def snapshot(self) -> MemorySnapshot:
        total = int(torch.mps.recommended_max_memory())
        with contextlib.suppress(ValueError):  # the allocator's own limit, where the user has lowered it
            ratio = float(os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0"))
            total = int(total * ratio) if 0 < ratio < 1 else total
        reserved = int(torch.mps.driver_allocated_memory())
        free = min(total - reserved, self._host.snapshot().free_bytes)
        return MemorySnapshot(max(free, 0), total, int(torch.mps.current_allocated_memory()), reserved)

    def process_bytes(self) -> int:
        return int(torch.mps.driver_allocated_memory())

    @contextmanager
    def measure(self, live: bool = False) -> Iterator[Peak]:
        peak, meter, overlap = Peak(), StorageMeter("mps") if live else None, Overlap.of("mps")
        token, before = overlap.enter(), self.process_bytes()
        try:
            with meter or contextlib.nullcontext():
                yield peak
        finally:
            # There is no high-water mark, but the allocator keeps what it took, so that growth is the peak.
            grown = self.process_bytes() - before
            if overlap.leave(token):
                peak.resident_bytes = max(grown, 0)
            if meter is not None:
                peak.live_bytes = meter.peak_bytes

    def supports(self, dtype_name: str) -> bool:
        dtype_name = dtype_name.removeprefix("torch.")
        if dtype_name == "bfloat16":  # since Metal 3.1
            return bool(torch.backends.mps.is_macos_or_newer(14, 0))
        return dtype_name in ("float32", "float16")

    def synchronize(self) -> None:
        torch.mps.synchronize()


class _CachedDevice(Device):
    """A device behind torch's caching allocator, which counts for itself."""

    @property
    @abstractmethod
    def _torch(self) -> ModuleType:
        """torch.cuda or torch.xpu."""

    def _driver_memory(self) -> tuple[int, int]:
        """Free and total bytes, other processes included."""
        free, total = self._torch.mem_get_info(self.index)
        return int(free), int(total)

    def snapshot(self) -> MemorySnapshot:
        free, total = self._driver_memory()
        reserved = int(self._torch.memory_reserved(self.index))
        # set_per_process_memory_fraction caps what the allocator may reserve of the total; old torch cannot tell it.
        fraction = getattr(self._torch, "get_per_process_memory_fraction", None)
        if fraction is not None:
            total = min(total, int(total * float(fraction(self.index))))
            free = min(free, total - reserved)
        return MemorySnapshot(max(free, 0), total, int(self._torch.memory_allocated(self.index)), reserved)

    def process_bytes(self) -> int:
        return int(self._torch.memory_reserved(self.index))

    @contextmanager
    def measure(self, live: bool = False) -> Iterator[Peak]:
        peak, overlap, module = Peak(), Overlap.of(self.name), self._torch
        token = overlap.enter()
        module.init()  # the counters of an unused torch cannot be reset
        module.reset_peak_memory_stats(self.index)
        allocated, reserved = module.memory_allocated(self.index), module.memory_reserved(self.index)
        try:
            yield peak
        finally:
            top_allocated = module.max_memory_allocated(self.index)
            top_reserved = module.max_memory_reserved(self.index)
            if overlap.leave(token):
                peak.live_bytes = max(int(top_allocated - allocated), 0)
                peak.resident_bytes = max(int(top_reserved - reserved), 0)

    def synchronize(self) -> None:
        self._torch.synchronize(self.index)


class CudaDevice(_CachedDevice):
    """An NVIDIA GPU, or an AMD one with torch for ROCm."""

    kind = "cuda"

    @property
    def _torch(self) -> ModuleType:
        return torch.cuda

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.index))
        return event

    def seconds_between(self, begin: Any, end: Any) -> float | None:
        return float(begin.elapsed_time(end)) / 1000  # of the stream: a slow host before or after does not count

    def supports(self, dtype_name: str) -> bool:
        dtype_name = dtype_name.removeprefix("torch.")
        if dtype_name == "bfloat16":  # Ampere: sm80. torch.cuda.is_bf16_supported() is also true of emulation on a T4
            return bool(torch.version.hip) or torch.cuda.get_device_capability(self.index) >= (8, 0)
        if dtype_name == "float16":  # full rate since sm53; 1/64 of it on sm61
            capability = torch.cuda.get_device_capability(self.index)
            return bool(torch.version.hip) or (capability >= (5, 3) and capability != (6, 1))
        return dtype_name in ("float32", "float64")


class XpuDevice(_CachedDevice):
    """An Intel GPU."""

    kind = "xpu"

    @property
    def _torch(self) -> ModuleType:
        return torch.xpu

    def _driver_memory(self) -> tuple[int, int]:
        if hasattr(torch.xpu, "mem_get_info"):
            with contextlib.suppress(RuntimeError):  # drivers without sysman refuse to tell
                return super()._driver_memory()
        total = int(torch.xpu.get_device_properties(self.index).total_memory)
        return total - int(torch.xpu.memory_reserved(self.index)), total

    def supports(self, dtype_name: str) -> bool:
        dtype_name = dtype_name.removeprefix("torch.")
        has = {"bfloat16": "has_bfloat16_conversions", "float16": "has_fp16", "float64": "has_fp64"}.get(dtype_name)
        if has is None:
            return dtype_name == "float32"
        return bool(getattr(torch.xpu.get_device_properties(self.index), has, False))


def _available(kind: str) -> bool:
    if kind == "cpu":
        return True
    return bool(torch.backends.mps.is_available() if kind == "mps" else getattr(torch, kind).is_available())


_KINDS: dict[str, type[Device]] = {"cuda": CudaDevice, "mps": MpsDevice, "xpu": XpuDevice, "cpu": CpuDevice}


def open_device(name: str | None = None) -> Device:
    """The device called `name` (``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"xpu:0"``, ``"cpu"``), as torch writes it.

    None: the first there is of cuda, mps, xpu, cpu. Raises :class:`ConfigError` for a name that torch does not know,
    for a device that is not there, and in a process that was forked after its parent had used the device.
    """
    if name is None:
        name = next(kind for kind in _KINDS if _available(kind))
    name = str(name) if isinstance(name, torch.device) else name
    match = re.fullmatch(r"(cuda|mps|xpu|cpu)(?::(\d+))?", name) if isinstance(name, str) else None
    if match is None:
        hint = "; torch calls AMD GPUs cuda too" if re.match(r"(?i)hip|rocm", str(name)) else ""
        raise ConfigError(f"device: got {name!r}; give None, or one of {', '.join(map(repr, _present()))}{hint}")
    kind, index = match.group(1), None if match.group(2) is None else int(match.group(2))
    if not _available(kind):
        raise ConfigError(
            f"device: got {name!r}, but {_why_not(kind)}; use {', '.join(map(repr, _present()))}, or None to let "
            "memsafe choose"
        )
    if kind in ("cpu", "mps"):
        if index:
            raise ConfigError(f"device: got {name!r}, but there is only one {kind} device; give {kind!r}")
        return _KINDS[kind]()
    module = getattr(torch, kind)
    if getattr(module, "_is_in_bad_fork", lambda: False)():
        raise ConfigError(
            f"device: got {name!r}, but this process was forked from one that had used {kind} already, which leaves it "
            f"unusable here; start workers with multiprocessing's 'spawn', or use 'cpu'"
        )
    count = module.device_count()
    if index is None:  # torch's meaning; asking an unused torch for its current device would start it too early
        index = module.current_device() if module.is_initialized() else 0
    if index >= count:
        there = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise ConfigError(f"device: got {name!r}, but there {'is' if count == 1 else 'are'} {count} ({there})")
    return _KINDS[kind](index)


def _present() -> list[str]:
    return [kind for kind in _KINDS if _available(kind)]


def _why_not(kind: str) -> str:
    if kind == "cuda" and not any(getattr(torch.version, name, None) for name in ("cuda", "hip")):
        return f"this torch ({torch.__version__}) was built without CUDA: install the CUDA build from pytorch.org"
    if kind == "mps":
        return "MPS needs macOS on Apple silicon and a torch built for it"
    if kind == "xpu" and not getattr(torch.version, "xpu", None):
        return f"this torch ({torch.__version__}) was built without XPU: install the XPU build from pytorch.org"
    return f"torch finds no {kind} device: look at the driver, and at *_VISIBLE_DEVICES"
