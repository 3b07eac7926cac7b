"""4. Wrong predictions, fragmentation and a neighbour that grabs at random, with expandable segments on and off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import inside
from benchmarks.gpu.common import (
    CONTEXT_BYTES,
    GiB,
    Row,
    Setting,
    attempt,
    cap_to,
    free_memory,
    reserved,
)
from benchmarks.gpu.models import lengths, load, texts
from benchmarks.gpu.neighbour import Neighbour
from benchmarks.gpu.processes import isolated

__all__ = ["run"]

TROUBLES = ("none", "wrong predictions", "fragmentation", "random neighbour", "all")
ROOM_BYTES = 2 * GiB
"""Beyond the weights: about 90,000 tokens of bge-m3's shape in half precision."""
WORKSPACES_BYTES = 160 << 20
"""cuBLAS keeps up to 32 MiB for each thread's handle until the process ends; that is not a leak."""


def run(setting: Setting) -> Iterator[Row]:
    """A process per allocator setting and trouble: the setting is read once per process."""
    for expandable in ("True", "False"):
        conf = f"expandable_segments:{expandable}"
        env = {"PYTORCH_CUDA_ALLOC_CONF": conf, "PYTORCH_ALLOC_CONF": conf}
        for trouble in setting.pick(TROUBLES, ("none", "wrong predictions") if expandable == "True" else ()):
            plan = [{"what": trouble, "expandable_segments": expandable}]
            yield from isolated(setting, "recovery:case", env, plan, trouble=trouble, expandable=expandable)


def case(setting: Setting, trouble: str, expandable: str) -> Iterator[Row]:
    """A calm run, then the same in trouble and under a cap: same rows, nothing lost, memory back."""
    import numpy as np

    from memsafe import Embedder, MemoryPolicy

    dtype = setting.pick("float16", "float32")
    st = load(setting, "bge-m3", dtype)
    counts = lengths(setting.pick(1200, 24), 21, longest=setting.pick(8192, 80), median=setting.pick(300, 20))
    inputs = texts(counts, 22)
    calm = Embedder(st, memory=MemoryPolicy(learn=False))
    wanted = calm.embed_documents(inputs)
    calm.close()
    free_memory(setting)
    start = reserved(setting) or 0
    head: Row = {"what": trouble, "expandable_segments": expandable, "dtype": dtype}
    embedder = Embedder(st, memory=MemoryPolicy(learn=False, release="run", reserve="128MiB"))
    cap = start + ROOM_BYTES
    head.update(cap_to(setting, cap + CONTEXT_BYTES))
    held: list[Any] = []
    if trouble in ("fragmentation", "all"):
        held = _fragment(setting)
    embedder.run(inputs[:: max(len(inputs) // 64, 1)])  # so that something is learnt before it is made wrong
    inside.greedy(embedder)
    if trouble in ("wrong predictions", "all"):
        inside.scaled(embedder, 0.3)
    fill, hold = 0, 0
    if trouble in ("random neighbour", "all") and not setting.dry:
        import torch

        free, _ = torch.cuda.mem_get_info()
        left = cap - (reserved(setting) or 0)
        fill, hold = free - left - CONTEXT_BYTES, int(0.8 * left)
    with Neighbour(setting.dry or not hold, fill, hold, "random", seed=23) as neighbour:
        row, result = attempt(setting, lambda: embedder.run(inputs), sum(counts))
    report = result.report.to_dict() if result is not None else {}
    embedder.close()
    held.clear()
    free_memory(setting)
    end = reserved(setting) or 0
    if result is not None:
        norms = np.linalg.norm(wanted, axis=1)
        difference = float(np.max(np.linalg.norm(result.embeddings - wanted, axis=1) / norms))
        lost = int((~np.isfinite(result.embeddings).all(axis=1)).sum())
        good = difference <= (1e-4 if dtype == "float32" else 2e-2) and not lost
        row["outcome"] = "ok" if good and end - start <= WORKSPACES_BYTES else "WRONG"
        row.update(difference=difference, lost_rows=lost)
    kept = "out_of_memory retries splits shrinks grows fallbacks waited_s micro_batches".split()
    yield {
        **head,
        "neighbour_said": neighbour.said,
        **row,
        **{name: report.get(name) for name in kept},
        "memory_left_bytes": end - start,
    }


def _fragment(setting: Setting) -> list[Any]:
    """Every second block of a checkerboard is kept: half of the room is free, in holes of 24 MiB."""
    if setting.dry:
        return []
    import torch

    blocks = []
    while True:
        try:
            blocks.append(torch.empty(24 << 20, dtype=torch.uint8, device=setting.device))
        except torch.OutOfMemoryError:
            break
    kept = blocks[: int(len(blocks) * 0.8) : 2]
    blocks.clear()
    return kept
