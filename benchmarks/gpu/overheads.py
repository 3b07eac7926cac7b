"""6. What safety costs: reading memory, giving it back, allocator settings."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.common import Row, Setting, behind, free_memory, reserved, timed
from benchmarks.gpu.models import lengths, load, texts
from benchmarks.gpu.processes import isolated

__all__ = ["run"]

SETTINGS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:128",
    "expandable_segments:True,garbage_collection_threshold:0.8",
    "backend:cudaMallocAsync",
)


def run(setting: Setting) -> Iterator[Row]:
    """Readings and release policies in one process, then a process per allocator setting."""
    yield from isolated(setting, "overheads:readings")
    for conf in setting.pick(SETTINGS, SETTINGS[:1]):
        env = {"PYTORCH_CUDA_ALLOC_CONF": conf, "PYTORCH_ALLOC_CONF": conf} if conf else {}
        yield from isolated(setting, "overheads:allocator", env, conf=conf)


def _workload(setting: Setting) -> tuple[Any, list[str], int]:
    counts = lengths(setting.pick(2000, 24), 41, longest=setting.pick(8192, 80), median=setting.pick(300, 20))
    return load(setting, "bge-m3", setting.pick("float16", "float32")), texts(counts, 42), sum(counts)


def readings(setting: Setting) -> Iterator[Row]:
    """Microseconds per reading; then seconds of a run under each release policy."""
    from memsafe import Embedder, MemoryPolicy
    from memsafe.events import Event, MicroBatchDone

    st, inputs, tokens = _workload(setting)
    embedder = Embedder(st, memory=MemoryPolicy(learn=False))
    report = embedder.run(inputs).report
    device = behind(embedder).device

    def measure() -> None:
        with device.measure(live=False):
            pass

    calls = {"snapshot": device.snapshot, "process_bytes": device.process_bytes, "measure": measure}
    if not setting.dry:
        import torch

        calls["torch.cuda.mem_get_info"] = torch.cuda.mem_get_info
        calls["torch.cuda.memory_stats"] = torch.cuda.memory_stats
        calls["torch.cuda.memory_stats_as_nested_dict"] = torch.cuda.memory_stats_as_nested_dict
    for name, call in calls.items():
        call()
        repeats = setting.pick(500, 20)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        yield {"what": name, "outcome": "reading", "microseconds": (time.perf_counter() - began) / repeats * 1e6}
    yield {"what": "micro-batch", "outcome": "reading", "microseconds": report.compute_s / report.micro_batches * 1e6}
    embedder.close()

    def empty_after_each(event: Event) -> None:
        if isinstance(event, MicroBatchDone) and not setting.dry:
            import torch

            torch.cuda.empty_cache()

    for name, policy, hooks in (
        ("release='never'", {"release": "never"}, ()),
        ("release='pressure'", {}, ()),
        ("release='run'", {"release": "run"}, ()),
        ("empty_cache after each micro-batch", {}, (empty_after_each,)),
    ):
        free_memory(setting)
        embedder = Embedder(st, memory=MemoryPolicy(learn=False, **policy), hooks=hooks)  # type: ignore[arg-type]
        embedder.run(inputs)
        seconds = timed(setting, lambda e=embedder: e.run(inputs), setting.pick(3, 1))  # type: ignore[misc]
        yield {
            "what": name,
            "outcome": "release",
            "tokens_per_s": tokens / statistics.median(seconds),
            "seconds": seconds,
            "reserved_after_bytes": reserved(setting),
        }
        embedder.close()


def allocator(setting: Setting, conf: str) -> Iterator[Row]:
    """The same run under one setting: speed, the most that was reserved, and what was split and idle at the end."""
    from memsafe import Embedder, MemoryPolicy

    st, inputs, tokens = _workload(setting)
    free_memory(setting)
    embedder = Embedder(st, memory=MemoryPolicy(learn=False, release="never", alloc_conf=None))
    embedder.run(inputs)
    seconds = timed(setting, lambda: embedder.run(inputs), setting.pick(3, 1))
    row: Row = {"what": conf or "torch's default", "outcome": "allocator"}
    row.update(tokens_per_s=tokens / statistics.median(seconds), seconds=seconds)
    if not setting.dry:
        import torch

        row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        row["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        with contextlib.suppress(KeyError):  # cudaMallocAsync counts less
            stats = torch.cuda.memory_stats()
            row["inactive_split_bytes"] = stats["inactive_split_bytes.all.current"]
            row["alloc_retries"] = stats["num_alloc_retries"]
    embedder.close()
    yield row
