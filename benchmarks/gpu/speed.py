"""5. Tokens/s against the peers at their best batch size, against the matrix rate; where the time goes; the knee."""

from __future__ import annotations

import collections
import contextlib
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import inside
from benchmarks.gpu.articles import _peers
from benchmarks.gpu.common import (
    Row,
    Setting,
    attempt,
    free_memory,
    isolated,
    lengths,
    load,
    matmul_rate,
    texts,
    timed,
)

__all__ = ["run"]

CASES = (("bge-m3", "bfloat16", 3000), ("minilm", "float16", 20000), ("minilm", "float32", 20000))
BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)


def run(setting: Setting) -> Iterator[Row]:
    """A process per model and dtype."""
    for model, dtype, count in setting.pick(CASES, (("bge-m3", "float32", 24),)):
        yield from isolated(setting, "speed:case", model=model, dtype=dtype, count=count)


def case(setting: Setting, model: str, dtype: str, count: int) -> Iterator[Row]:
    """Ours and the peers, in turns, in one process; then a profile of ours."""
    from memsafe import Embedder, MemoryPolicy

    head: Row = {"what": model, "dtype": dtype}
    try:
        st = load(setting, model, dtype)
    except LookupError as error:
        yield {**head, "outcome": f"skipped: {error}"}
        return
    most = setting.pick(256 if model == "minilm" else 8192, 80)
    counts = lengths(count, 31, longest=most, median=setting.pick(100 if model == "minilm" else 300, 20))
    inputs, tokens = texts(counts, 32), sum(counts)
    embedder = Embedder(st, memory=MemoryPolicy(learn=False))
    began = time.perf_counter()
    embedder.run(inputs)
    warm_s = time.perf_counter() - began
    report = embedder.run(inputs).report
    # every fourth text stands for all where a peer's best batch size is searched
    search, search_tokens = inputs[::4], sum(counts[::4])
    found: dict[str, tuple[float, int | None, Any]] = {}
    for who, run_it in _peers(setting, st, False, "", model, dtype).items():
        if isinstance(run_it, str):
            yield {**head, "who": who, "outcome": run_it}
            continue
        rates: dict[str, float] = {}
        attempt(setting, lambda f=run_it: f(search[:64], None), 1)  # type: ignore[misc]  # warms up
        for size in (None, *setting.pick(BATCH_SIZES, (4,))):
            if setting.left() < 60 and not setting.dry:
                break
            row, _ = attempt(setting, lambda f=run_it, s=size: f(search, s), search_tokens)  # type: ignore[misc]
            rates[str(size or "default")] = row.get("tokens_per_s") or 0.0
            if row["outcome"] != "finished":
                break
            if who not in found or rates[str(size or "default")] > found[who][0]:
                found[who] = (rates[str(size or "default")], size, run_it)
            slower = rates[str(size or "default")] < 0.7 * found[who][0]
            if (slower and size) or (setting.left() < 150 and not setting.dry):
                break
        yield {**head, "who": who, "detail": rates}
    ours: list[float] = []
    theirs: dict[str, list[float]] = {who: [] for who in found}
    for _ in range(setting.pick(3, 1)):  # in turns: what slows the machine slows all
        if setting.left() < 100 and ours and not setting.dry:
            break
        free_memory(setting)
        ours += timed(setting, lambda: embedder.run(inputs), 1)
        for who, (_, size, run_it) in found.items():
            theirs[who] += timed(setting, lambda f=run_it, s=size: f(inputs, s), 1)  # type: ignore[misc]
    seconds = statistics.median(ours)
    rate = matmul_rate(setting, dtype)
    flops = inside.flops_of(embedder, counts)
    best = min((statistics.median(times) for times in theirs.values()), default=None)
    for who, times in theirs.items():
        yield {
            **head,
            "who": who,
            "outcome": "finished",
            "batch_size": found[who][1] or "default",
            "tokens_per_s": tokens / statistics.median(times),
            "seconds": times,
        }
    yield {
        **head,
        "who": "memsafe",
        "outcome": "finished",
        "tokens_per_s": tokens / seconds,
        "seconds": ours,
        "warm_up_s": warm_s,
        "times_the_best_peer": best / seconds if best else None,
        "matmul_flops": rate,
        "share_of_matmul": flops / seconds / rate,
        "tokenize_s": report.tokenize_s,
        "compute_s": report.compute_s,
        "path": report.path,
        "largest_micro_batch_tokens": report.largest_micro_batch_tokens,
        "measured_peak_bytes": report.measured_peak_bytes,
        "process_peak_bytes": report.process_peak_bytes,
    }
    yield {**head, "who": "memsafe", "outcome": "knee", **inside.knee(embedder)}
    yield {**head, "who": "memsafe", **_syncs(setting, embedder, inputs)}
    yield {**head, "who": "memsafe", **_profile(setting, embedder, inputs)}
    embedder.close()


def _syncs(setting: Setting, embedder: Any, inputs: list[str]) -> Row:
    """How often an operation made the host wait, by place; torch warns where it does so itself."""
    if setting.dry:
        return {"outcome": "syncs skipped: no CUDA"}
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            report = embedder.run(inputs).report
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(
        f"{one.filename.rsplit('/', 2)[-2]}/{one.filename.rsplit('/', 1)[-1]}:{one.lineno}"
        for one in caught
        if "synchroniz" in str(one.message)
    )
    total = sum(places.values())
    return {
        "outcome": "syncs",
        "syncs": total,
        "syncs_per_micro_batch": total / max(report.micro_batches, 1),
        "detail": places.most_common(12),
    }


def _profile(setting: Setting, embedder: Any, inputs: list[str]) -> Row:
    """Device time by kernel, the share of the time in which the device was busy, and calls that wait."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] if setting.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    some = inputs[:: setting.pick(4, 1)]
    began = time.perf_counter()
    options: dict[str, Any] = {"activities": kinds}
    with contextlib.suppress(
        AttributeError, TypeError
    ):  # the lanes are other threads; older torch sees only their kernels
        options["experimental_config"] = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(**options) as recorded:
        embedder.run(some)
        if not setting.dry:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    averages = recorded.key_averages()

    def device_us(event: Any) -> float:
        return float(getattr(event, "self_device_time_total", 0.0) or 0.0)

    kernels = [e for e in averages if device_us(e) > 0 and "CUDA" in str(getattr(e, "device_type", "")).upper()]
    busy = sum(device_us(event) for event in kernels)
    top = sorted(kernels, key=device_us, reverse=True)[:15]
    waits = (
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpyAsync",
        "cudaLaunchKernel",
    )
    host = sorted(averages, key=lambda e: e.self_cpu_time_total, reverse=True)[:15]
    return {
        "outcome": "profile",
        "device_busy": busy / 1e6 / seconds,
        "calls": {e.key: e.count for e in averages if e.key in waits},
        "top_kernels": [(e.key[:80], e.count, device_us(e) / max(busy, 1)) for e in top],
        "detail": [(e.key[:60], e.count, e.self_cpu_time_total / 1e6) for e in host],
    }
