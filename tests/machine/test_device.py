"""machine/device.py: which device, what is free on it, what a block took. GPUs are simulated."""

from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memsafe.config import GiB, MiB
from memsafe.errors import ConfigError
from memsafe.machine import allocator
from memsafe.machine.device import CpuDevice, Peak, open_device
from memsafe.machine.host import Host
from memsafe.planning.budget import MemorySnapshot


class FakeHost(Host):
    """A machine whose figures the test decides."""

    def __init__(self, free: int = 8 * GiB, *, features: tuple[str, ...] = (), restarts: bool = True) -> None:
        self.free, self.features, self.restarts = free, features, restarts
        self.resident = self.peak = GiB

    def snapshot(self) -> MemorySnapshot:
        return MemorySnapshot(self.free, 16 * GiB, self.resident, self.resident)

    def resident_bytes(self) -> int:
        return self.resident

    def peak_resident_bytes(self) -> int | None:
        return self.peak

    def reset_peak(self) -> bool:
        if self.restarts:
            self.peak = self.resident
        return self.restarts

    def cpu_features(self) -> frozenset[str]:
        return frozenset(self.features)


class FakeGpus:
    """Stands in for torch.cuda or torch.xpu: `count` devices, each with its own figures; every call is noted."""

    def __init__(self, kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module, self.count, self.current, self.started, self.bad_fork = (
            getattr(torch, kind),
            count,
            0,
            False,
            False,
        )
        self.calls: list[tuple[str, int]] = []
        self.free = [10 * GiB + i for i in range(count)]
        self.allocated = [1 * GiB + i for i in range(count)]
        self.reserved = [3 * GiB + i for i in range(count)]
        self.top_allocated, self.top_reserved = list(self.allocated), list(self.reserved)
        self.fraction = 1.0
        self.capability = (7, 5)
        fakes: dict[str, Callable[..., Any]] = {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "init": self._start,
            "is_initialized": lambda: self.started,
            "_is_in_bad_fork": lambda: self.bad_fork,
            "current_device": self._current_device,
            "mem_get_info": lambda i: (self.free[self._note("mem_get_info", i)], 16 * GiB),
            "memory_allocated": lambda i: self.allocated[i],
            "memory_reserved": lambda i: self.reserved[i],
            "max_memory_allocated": lambda i: self.top_allocated[i],
            "max_memory_reserved": lambda i: self.top_reserved[i],
            "reset_peak_memory_stats": self._reset,
            "get_per_process_memory_fraction": lambda i: self.fraction,
            "get_device_capability": lambda i: self.capability,
            "synchronize": lambda i: self._note("synchronize", i),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(self.module, name, fake, raising=False)

    def _start(self) -> None:
        self.started = True

    def _note(self, name: str, index: int) -> int:
        self.calls.append((name, index))
        return index

    def _current_device(self) -> int:
        assert self.started, "this would have started CUDA"
        return self.current

    def _reset(self, index: int) -> None:
        assert self.started, "torch refuses: did you call init?"
        self._note("reset_peak_memory_stats", index)
        self.top_allocated[index], self.top_reserved[index] = self.allocated[index], self.reserved[index]

    def use(self, index: int, num_bytes: int, *, reserve: int) -> None:
        """Allocate for a moment, as a forward does."""
        self.top_allocated[index] = max(self.top_allocated[index], self.allocated[index] + num_bytes)
        self.reserved[index] += reserve
        self.top_reserved[index] = max(self.top_reserved[index], self.reserved[index])


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def cpu(host: FakeHost | None = None) -> CpuDevice:
    return CpuDevice(host=host or FakeHost())


# Which device


def test_the_order_of_preference(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """None chooses cuda, then mps, then xpu, then the CPU."""
    chosen = [open_device().name]
    FakeGpus("xpu", 1, monkeypatch)
    chosen.append(open_device().name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    chosen.append(open_device().name)
    FakeGpus("cuda", 2, monkeypatch)
    chosen.append(open_device().name)
    assert chosen == ["cpu", "xpu:0", "mps", "cuda:0"]


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), (torch.device("cuda:1"), 1)])
def test_names(no_gpus: None, monkeypatch: pytest.MonkeyPatch, name: str, index: int) -> None:
    """Names as torch writes them; opening a device does not start CUDA."""
    gpus = FakeGpus("cuda", 2, monkeypatch)
    device = open_device(name)
    assert (device.kind, device.index, device.name) == ("cuda", index, f"cuda:{index}")
    assert gpus.calls == []


def test_cuda_without_an_index_is_the_current_device(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch, where the caller has chosen one with set_device."""
    gpus = FakeGpus("cuda", 2, monkeypatch)
    gpus.started, gpus.current = True, 1
    assert open_device("cuda").name == "cuda:1"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda:3", "there is 1 (cuda:0)"),
        ("cpu:1", "only one cpu"),
        ("mps", "use 'cuda', 'cpu'"),
        ("CUDA", "'cuda', 'cpu'"),
        ("rocm", "torch calls AMD GPUs cuda"),
        ("tpu", "'cuda', 'cpu'"),
        ("cuda:-1", "'cuda', 'cpu'"),
        ("", "'cuda', 'cpu'"),
        (0, "'cuda', 'cpu'"),
    ],
)
def test_bad_names_say_what_there_is(no_gpus: None, monkeypatch: pytest.MonkeyPatch, name: Any, says: str) -> None:
    """ConfigError names what was got and what could be given instead."""
    FakeGpus("cuda", 1, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        open_device(name)
    assert repr(name) in str(caught.value) and says in str(caught.value)


def test_cuda_on_a_torch_without_it(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is another build of torch, or, with the right build, the driver."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA"):
        open_device("cuda:0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ConfigError, match=r"driver.*VISIBLE_DEVICES"):
        open_device("cuda:0")


def test_a_fork_after_cuda_was_used(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not silently the CPU: the remedy is to spawn."""
    FakeGpus("cuda", 1, monkeypatch).bad_fork = True
    for name in ("cuda", None):
        with pytest.raises(ConfigError, match="spawn"):
            open_device(name)


# What is free


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_gpu_memory_is_that_of_the_right_device(no_gpus: None, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Driver's free, device's total, the allocator's two figures, all of device 1."""
    gpus = FakeGpus(kind, 2, monkeypatch)
    device = open_device(f"{kind}:1")
    assert device.snapshot() == MemorySnapshot(10 * GiB + 1, 16 * GiB, GiB + 1, 3 * GiB + 1)
    assert gpus.calls == [("mem_get_info", 1)]
    assert (device.process_bytes(), device.total_bytes) == (3 * GiB + 1, 16 * GiB)
    device.synchronize()
    assert gpus.calls[-1] == ("synchronize", 1)


def test_a_memory_fraction_is_respected(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """set_per_process_memory_fraction(0.25) of 16 GiB with 3 GiB reserved leaves 1 GiB, however much the driver has;
    when the driver has less, that counts; beyond the fraction nothing is free."""
    gpus = FakeGpus("cuda", 1, monkeypatch)
    device = open_device("cuda")
    gpus.fraction = 0.25
    assert device.snapshot() == MemorySnapshot(GiB, 4 * GiB, GiB, 3 * GiB)
    gpus.free[0] = 100 * MiB
    assert device.snapshot().free_bytes == 100 * MiB
    gpus.fraction = 0.125
    assert device.snapshot().free_bytes == 0


def test_a_torch_that_cannot_tell_its_fraction(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older torch has no getter: the driver's figures as they are."""
    FakeGpus("cuda", 1, monkeypatch)
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert open_device("cuda").snapshot().free_bytes == 10 * GiB


def test_an_intel_driver_that_does_not_tell(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mem_get_info: the device's size less what this process holds."""
    FakeGpus("xpu", 1, monkeypatch)

    def refuse(index: int) -> tuple[int, int]:
        raise RuntimeError("The device does not support querying the available free memory")

    monkeypatch.setattr(torch.xpu, "mem_get_info", refuse, raising=False)
    properties = type("Properties", (), {"total_memory": 12 * GiB})
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: properties, raising=False)
    assert open_device("xpu").snapshot() == MemorySnapshot(9 * GiB, 12 * GiB, GiB, 3 * GiB)


@pytest.fixture
def mps(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    figures = {"recommended_max_memory": 12 * GiB, "driver_allocated_memory": 4 * GiB, "current_allocated_memory": GiB}
    for name in figures:
        monkeypatch.setattr(torch.mps, name, lambda name=name: figures[name])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    return figures


def test_mps_shares_the_machines_memory(mps: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Free is what Metal recommends less what the driver holds, or what the machine has left if that is less; a
    lowered watermark lowers the total, the default's values above 1 do not raise it."""
    device = open_device("mps")
    device._host = FakeHost(20 * GiB)
    assert device.snapshot() == MemorySnapshot(8 * GiB, 12 * GiB, GiB, 4 * GiB)
    device._host = FakeHost(3 * GiB)
    assert device.snapshot().free_bytes == 3 * GiB
    device._host = FakeHost(20 * GiB)
    for ratio, total in (("0.5", 6 * GiB), ("1.7", 12 * GiB), ("0.0", 12 * GiB), ("nonsense", 12 * GiB)):
        monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", ratio)
        assert device.snapshot().total_bytes == total
    assert device.process_bytes() == 4 * GiB


def test_the_cpu_is_its_host() -> None:
    """The CPU's snapshot and size are the operating system's."""
    host = FakeHost(5 * GiB)
    device = cpu(host)
    assert device.snapshot() == host.snapshot()
    assert (device.process_bytes(), device.total_bytes, device.num_cores) == (GiB, 16 * GiB, os.cpu_count())


def test_releasing_goes_to_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device.release is the allocator's hook, with this device."""
    device = cpu()
    monkeypatch.setattr(allocator, "release_cache", lambda which: 5 if which is device else 0)
    assert device.release() == 5


# What is native


@pytest.mark.parametrize(
    ("capability", "hip", "bf16", "fp16"),
    [((7, 5), None, False, True), ((8, 0), None, True, True), ((9, 0), None, True, True), ((6, 1), None, False, False),
     ((5, 2), None, False, False), ((9, 0), "6.3", True, True)],
)  # fmt: skip
def test_cuda_dtypes(
    no_gpus: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, bf16: bool, fp16: bool
) -> None:
    """bfloat16 from Ampere on (a T4 only emulates it); float16 where it runs at more than a token rate."""
    FakeGpus("cuda", 1, monkeypatch).capability = capability
    monkeypatch.setattr(torch.version, "hip", hip)
    device = open_device("cuda")
    assert (device.supports("bfloat16"), device.supports("torch.float16")) == (bf16, fp16)
    assert device.supports("float32") and not device.supports("float8_e4m3fn")


@pytest.mark.parametrize(
    ("features", "bf16", "fp16"),
    [(("avx512f", "avx512_bf16"), True, False), (("amx_bf16", "avx512_fp16"), True, True), (("avx2",), False, False),
     (("asimd", "asimdhp"), False, True), (("asimdhp", "bf16"), True, True)],
)  # fmt: skip
def test_cpu_dtypes(monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], bf16: bool, fp16: bool) -> None:
    """What the processor has instructions for, on x86 and ARM; what torch itself detects counts too."""
    told: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    device = cpu(FakeHost(features=features))
    assert (device.supports("bfloat16"), device.supports("float16")) == (bf16, fp16)
    assert device.supports("torch.float32") and device.supports("float64") and not device.supports("int8")
    told["avx512_bf16"] = True
    assert device.supports("bfloat16")


def test_mps_dtypes(mps: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 since macOS 14; never float64."""
    device = open_device("mps")
    for newer in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, newer=newer: newer)
        assert device.supports("bfloat16") is newer
    assert device.supports("float16") and not device.supports("float64")


def test_xpu_dtypes(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the properties of the right device say."""
    FakeGpus("xpu", 2, monkeypatch)
    has = {0: {"has_fp64": True}, 1: {"has_fp16": True, "has_fp64": False, "has_bfloat16_conversions": True}}
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: types.SimpleNamespace(**has[index]))
    device = open_device("xpu:1")
    assert [device.supports(name) for name in ("bfloat16", "float16", "float64", "float32")] == [
        True,
        True,
        False,
        True,
    ]


# What a block took: process and device


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_gpu_peaks_are_beyond_what_was_there(no_gpus: None, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The counters of device 1 are restarted, and what it held at entry is not the block's."""
    gpus = FakeGpus(kind, 2, monkeypatch)
    gpus.top_allocated[1] = 15 * GiB  # an old peak
    device = open_device(f"{kind}:1")
    with device.measure() as peak:
        assert peak == Peak(None, None)
        gpus.use(1, 500 * MiB, reserve=600 * MiB)
        gpus.use(0, 5 * GiB, reserve=5 * GiB)
    assert peak == Peak(500 * MiB, 600 * MiB)
    assert gpus.calls == [("reset_peak_memory_stats", 1)]


def test_a_peak_is_filled_in_when_the_block_fails(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error passes through unchanged, and what was reached until then is known."""
    gpus = FakeGpus("cuda", 1, monkeypatch)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    peaks: list[Peak] = []

    def fail() -> None:
        with open_device("cuda").measure() as peak:
            peaks.append(peak)
            gpus.use(0, 7 * MiB, reserve=9 * MiB)
            raise error

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fail()
    assert caught.value is error
    assert peaks == [Peak(7 * MiB, 9 * MiB)]


def test_measurements_of_two_gpus_do_not_disturb_each_other(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device has its own counters; two measurements of one device cannot be told apart and say None."""
    gpus = FakeGpus("cuda", 2, monkeypatch)
    first, second = open_device("cuda:0"), open_device("cuda:1")
    with first.measure() as a, second.measure() as b:
        gpus.use(0, MiB, reserve=MiB)
    assert (a.live_bytes, b.live_bytes) == (MiB, 0)
    with first.measure() as a, open_device("cuda:0").measure() as b:
        gpus.use(0, MiB, reserve=MiB)
    assert (a, b) == (Peak(None, None), Peak(None, None))
    with first.measure() as a:
        gpus.use(0, MiB, reserve=0)
    assert a.live_bytes == MiB


def test_mps_growth_is_the_peak(mps: dict[str, int]) -> None:
    """MPS has no high-water mark; its allocator keeps what it took, and shrinking is no peak."""
    device = open_device("mps")
    with device.measure() as peak:
        mps["driver_allocated_memory"] += 300 * MiB
    assert peak == Peak(None, 300 * MiB)
    with device.measure(live=True) as peak:
        mps["driver_allocated_memory"] -= 300 * MiB
        torch.ones(1000)  # on the CPU: not MPS memory
    assert peak == Peak(0, 0)


def test_the_cpus_high_water_mark_is_restarted() -> None:
    """Resident peak of the block, from the mark that was restarted at its entry."""
    host = FakeHost()
    host.peak = 9 * GiB
    with cpu(host).measure() as peak:
        host.peak = host.resident + 3 * MiB
    assert peak == Peak(None, 3 * MiB)


def test_a_mark_that_cannot_be_restarted_counts_when_it_rises() -> None:
    """Without clear_refs (macOS, Windows, hardened containers) only a new high tells the block's peak; else None."""
    host = FakeHost(restarts=False)
    host.peak = 2 * GiB
    with cpu(host).measure() as peak:
        host.resident += 100 * MiB
    assert peak.resident_bytes is None
    with cpu(host).measure() as peak:
        host.peak = 3 * GiB
    assert peak.resident_bytes == 3 * GiB - (GiB + 100 * MiB)


def test_nested_and_concurrent_measurements_say_that_they_do_not_know() -> None:
    """One process has one high-water mark: measurements that overlap at any time, in any thread, have no resident
    peak of their own; live peaks are per thread and stay exact. The next one alone is exact again."""
    device = open_device("cpu")
    with device.measure(live=True) as outer:
        a = torch.ones(1000)
        with device.measure(live=True) as inner:
            b = torch.ones(500)
    assert (outer, inner) == (Peak(6000, None), Peak(2000, None))
    entered, leave = threading.Event(), threading.Event()
    peaks: list[Peak] = []

    def other() -> None:
        with device.measure(live=True) as peak:
            entered.set()
            leave.wait(10)
            torch.ones(2000)
        peaks.append(peak)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with device.measure(live=True) as here:
        c = torch.ones(300)
    leave.set()
    thread.join()
    assert (here, peaks) == (Peak(1200, None), [Peak(8000, None)])
    with device.measure() as alone:
        pass
    if sys.platform == "linux":
        assert alone.resident_bytes is not None
    del a, b, c


@pytest.mark.skipif(not open_device("cpu")._host.reset_peak(), reason="the high-water mark cannot be restarted here")
def test_a_real_resident_peak() -> None:
    """64 MiB that come and go within the block are seen although nothing of them is left."""
    device = open_device("cpu")
    with device.measure(live=True) as peak:
        block = torch.ones(16 * MiB)
        del block
    assert peak.live_bytes == 64 * MiB
    assert peak.resident_bytes is not None and 60 * MiB <= peak.resident_bytes <= 90 * MiB
