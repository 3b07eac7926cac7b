"""The only place of the proof that reaches behind the front door: forced kernels, predictions before the fact, wrong ones.

It fails loudly where a name has gone; nothing here is needed to use memsafe.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["forced", "greedy", "knee", "measure_shapes", "scaled", "t4_kernels"]

KERNELS = ("varlen", "memory-efficient", "flash", "cudnn", "math", "grouped memory-efficient")
"""The first two take sequence starts; the others are sdpa's, one call per run of equal lengths."""


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[list[str]]:
    """Packed attention runs on `kernel` only; yields the names of what really ran, one per layer of each forward.

    Raises LookupError where this device or torch lacks it.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from memsafe.attention import grouped, kernels

    used: list[str] = []
    names = ("choose", "_varlen_features", "_varlen", "_memory_efficient")
    attend, lock = grouped.attend, threading.Lock()
    saved = {name: getattr(kernels, name) for name in names}

    def counting(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            used.append(name.strip("_").replace("_", "-"))
            return saved[name](*args, **kwargs)

        return run

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
        "grouped memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    changes: dict[str, Any] = {"_varlen": counting("_varlen"), "_memory_efficient": counting("_memory_efficient")}
    if kernel == "memory-efficient":
        changes["_varlen_features"] = lambda: frozenset()
    elif kernel in backends:
        changes["choose"] = lambda *args, **kwargs: used.append(kernel)
    elif kernel == "varlen":
        if not saved["_varlen_features"]():
            raise LookupError(f"torch {torch.__version__} has no varlen_attn")
    elif kernel != "default":
        raise LookupError(f"no kernel called {kernel}")

    def only(*args: Any, **kwargs: Any) -> Any:
        with lock, sdpa_kernel(backends[kernel]):  # the padded forward keeps its own choice: flash takes no mask
            return attend(*args, **kwargs)

    vars(kernels).update(changes)
    if kernel in backends:
        vars(grouped)["attend"] = only
    try:
        yield used
    finally:
        vars(kernels).update(saved)
        vars(grouped)["attend"] = attend


@contextlib.contextmanager
def t4_kernels(dry: bool) -> Iterator[None]:
    """As on sm75: no flash, no cuDNN attention, no bfloat16, whatever card this is."""
    if dry:
        yield
        return
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from memsafe.attention import kernels

    saved = kernels._capability
    vars(kernels)["_capability"] = lambda device: (7, 5)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        vars(kernels)["_capability"] = saved


def measure_shapes(embedder: Any, count: int, most_tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    """Random micro-batches: the prediction before, the peak after; nothing is learnt from them."""
    from memsafe.engine.sinks import to_host
    from memsafe.planning.batch import MicroBatch, TokenizedInput

    engine = embedder._engine
    executor, loaded = engine.executors[0], engine.model
    cost, device, pick = executor.cost, executor.device, random.Random(seed)
    longest = min(embedder.max_length or 512, most_tokens)
    types = "token_type_ids" in loaded.encoder.feature_names
    for _ in range(count):
        goal, lengths = int(64 * (most_tokens / 64) ** pick.random()), []
        while sum(lengths) < goal:
            lengths.append(min(int(8 * pick.paretovariate(0.9)), longest, max(goal - sum(lengths), 8)))
        items = []
        for index, length in enumerate(sorted(lengths, reverse=True)):
            ids = np.asarray([pick.randrange(1000, 5000) for _ in range(length)], dtype=np.int32)
            items.append(TokenizedInput(index, ids, np.zeros(length, dtype=np.int32) if types else None))
        batch = MicroBatch(tuple(items), loaded.packed)
        shape = batch.shape
        before = {"predicted_bytes": cost.predict(shape), "upper_bytes": cost.upper_bound(shape)}
        with device.measure(live=True) as peak:
            rows = loaded.forward(batch, {})
        finite = bool(np.isfinite(to_host(rows)).all())
        del rows
        yield {
            "tokens": shape.tokens,
            "sequences": shape.sequences,
            "longest": shape.longest,
            **before,
            "live_bytes": peak.live_bytes,
            "finite": finite,
        }


def greedy(embedder: Any, tokens: int = 1 << 22) -> None:
    """No knee: every micro-batch as large as the budget admits."""
    from memsafe.planning.ramp import Ramp

    for executor in embedder._engine.executors:
        executor.ramp = Ramp(0.0, target_tokens=tokens)


def scaled(embedder: Any, factor: float) -> None:
    """The cost model says `factor` of what it would say, whatever it learns."""
    for executor in embedder._engine.executors:
        cost = executor.cost
        for name in ("predict", "upper_bound", "resident_bound"):
            setattr(cost, name, _times(getattr(cost, name), factor))
        cost.token_ceiling = _times(cost.token_ceiling, 1 / factor)
        cost.max_tokens_for = _times(cost.max_tokens_for, 1 / factor)


def _times(function: Any, factor: float) -> Any:
    return lambda *args, **kwargs: int(function(*args, **kwargs) * factor) + 1


def knee(embedder: Any) -> dict[str, Any]:
    """What the ramp settled on."""
    ramp = embedder._engine.executors[0].ramp
    return {"target_tokens": ramp.target_tokens, "at_knee": ramp.at_knee, "rates": dict(ramp._rates)}


def device_of(embedder: Any) -> Any:
    return embedder._engine.executors[0].device


def flops_of(embedder: Any, lengths: list[int]) -> float:
    from memsafe.planning.batch import BatchShape

    return float(embedder._engine.model.flops(BatchShape.of(tuple(lengths), packed=True)))


def weights_bytes(embedder: Any) -> int:
    return int(embedder._engine.model.weights_bytes)
