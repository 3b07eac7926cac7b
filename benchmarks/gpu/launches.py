"""Where a forward's time goes: host and device seconds of forwards queued back to back, hidden waits, a profile."""

from __future__ import annotations

import collections
import contextlib
import random
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.common import Row, Setting, behind
from benchmarks.gpu.inside import micro_batch
from benchmarks.gpu.models import Workload

__all__ = ["profile", "queued", "waits_in_a_forward", "waits_in_a_run"]

SIZES = (256, 2048, 4096, 8192, 16384, 65536)
SEQUENCE = 128
"""Tokens of each text of these micro-batches."""


def queued(setting: Setting, model: Any, sizes: tuple[int, ...] = SIZES) -> Row:
    """By size of a micro-batch of short texts: milliseconds until a launch returned, of the device alone, and of forwards
    queued back to back; the last one's tokens/s. Where "queued" is as long as "host", the host is the limit."""
    found: dict[str, Any] = {}
    for size in setting.pick(sizes, (128, 256)):
        forward = _forward(model, size)
        host, device, wall = _seconds(setting, forward)
        found[str(size)] = {
            "host_ms": host * 1e3,
            "device_ms": None if device is None else device * 1e3,
            "queued_ms": wall * 1e3,
            "tokens_per_s": size / wall,
        }
    return {"who": "memsafe", "outcome": "queued forwards", "forwards": found}


def _forward(model: Any, size: int) -> Callable[[], Any]:
    loaded = behind(model).loaded
    batch = micro_batch(loaded, [min(SEQUENCE, size)] * max(size // SEQUENCE, 1), random.Random(size))
    return lambda: loaded.forward(batch, {})


def _seconds(setting: Setting, forward: Callable[[], Any]) -> tuple[float, float | None, float]:
    """(host seconds of a launch, device seconds or None, seconds of one of several queued forwards)."""
    wait = _synchronise(setting)
    for _ in range(2):  # a kernel's first use costs up to a second
        forward()
    wait()
    host = []
    for _ in range(3):
        began = time.perf_counter()
        forward()
        host.append(time.perf_counter() - began)
        wait()
        whole = time.perf_counter() - began
    repeats = min(max(int(0.5 / max(whole, 1e-6)), 3), 20)
    began = time.perf_counter()
    for _ in range(repeats):
        forward()
    wait()
    wall = (time.perf_counter() - began) / repeats
    return statistics.median(host), None if setting.dry else _device_seconds(forward, statistics.median(host)), wall


def _device_seconds(forward: Callable[[], Any], host_s: float) -> float:
    """Of one forward whose launches were all queued before the device began, so that it never waited for the host."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2e9 * 2 * max(host_s, 1e-3)))  # in cycles; no card has more than 2 GHz and a bit
    start.record()
    forward()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _synchronise(setting: Setting) -> Callable[[], None]:
    if setting.dry:
        return lambda: None
    import torch

    return torch.cuda.synchronize


def waits_in_a_forward(setting: Setting, model: Any, size: int = 4096) -> Row:
    """Whether launching a forward makes the host wait for the device (cudaStreamSynchronize), and where: it should not."""
    if setting.dry:
        return {"who": "memsafe", "outcome": "skipped: no CUDA"}
    import torch

    forward = _forward(model, size)
    forward()
    torch.cuda.synchronize()
    return {"who": "memsafe", **refused_waits(forward, torch.cuda.set_sync_debug_mode)}


def refused_waits(forward: Callable[[], Any], set_mode: Callable[[str], None]) -> Row:
    """The outcome of `forward` where waiting is an error; set_mode: torch.cuda.set_sync_debug_mode."""
    set_mode("error")
    try:
        forward()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/memsafe/" in f.filename.replace("\\", "/")]
        place = (
            f"{own[-1].filename.replace(chr(92), '/').rsplit('/memsafe/', 1)[1]}:{own[-1].lineno}" if own else "torch"
        )
        return {"outcome": f"WAITS for the device in {place}"}
    finally:
        set_mode("default")
    return {"outcome": "no wait in a forward"}


def waits_in_a_run(setting: Setting, model: Any, load: Workload) -> Row:
    """How often an operation made the host wait, by place; torch warns where it does so itself. Rows must be fetched: one
    wait a micro-batch, by an event, is not counted by torch."""
    if setting.dry:
        return {"who": "memsafe", "outcome": "skipped: no CUDA"}
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            report = model.run(load.inputs).report
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(
        f"{one.filename.rsplit('/', 2)[-2]}/{one.filename.rsplit('/', 1)[-1]}:{one.lineno}"
        for one in caught
        if "synchroniz" in str(one.message)
    )
    total = sum(places.values())
    return {
        "who": "memsafe",
        "outcome": "waits in a run",
        "waits": total,
        "waits_per_micro_batch": total / max(report.micro_batches, 1),
        "detail": places.most_common(12),
    }


WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpyAsync",
    "cudaLaunchKernel",
)


def profile(setting: Setting, model: Any, load: Workload) -> Row:
    """Device time by kernel, the share of the time in which the device was busy, and calls that wait."""
    import torch
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] if setting.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    began = time.perf_counter()
    options: dict[str, Any] = {"activities": kinds}
    # the lanes are other threads; older torch sees only their kernels
    with contextlib.suppress(AttributeError, TypeError):
        options["experimental_config"] = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(**options) as recorded:
        model.run(load.inputs)
        _synchronise(setting)()
    seconds = time.perf_counter() - began
    averages = recorded.key_averages()

    def device_us(event: Any) -> float:
        return float(getattr(event, "self_device_time_total", 0.0) or 0.0)

    kernels = [e for e in averages if device_us(e) > 0 and "CUDA" in str(getattr(e, "device_type", "")).upper()]
    busy = sum(device_us(event) for event in kernels)
    top = sorted(kernels, key=device_us, reverse=True)[:15]
    host = sorted(averages, key=lambda e: e.self_cpu_time_total, reverse=True)[:15]
    return {
        "who": "memsafe",
        "outcome": "profile",
        "device_busy": busy / 1e6 / seconds,
        "calls": {e.key: e.count for e in averages if e.key in WAITS},
        "top_kernels": [(e.key[:80], e.count, device_us(e) / max(busy, 1)) for e in top],
        "detail": [(e.key[:60], e.count, e.self_cpu_time_total / 1e6) for e in host],
    }
