"""What the proof does behind the front door, by way of `common.behind`: forced kernels, predictions before the fact, wrong ones.

It fails loudly where a name has gone; nothing here is needed to use memsafe.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu.common import behind

__all__ = ["bound_of", "forced", "greedy", "measure_shapes", "micro_batch", "refused_by_cards", "scaled", "t4_kernels"]

KERNELS = ("varlen", "memory-efficient", "flash", "cudnn", "math", "grouped memory-efficient")
"""The first two take sequence starts; the others are sdpa's, one call per run of equal lengths."""


def refused_by_cards(kernel: str, dtype: str, capability: tuple[int, int]) -> bool:
    """Whether torch has no such kernel for the dtype on a card of that capability, so that it must refuse.

    sdpa's flash and cuDNN kernels take half precision only, and cards from sm80 on (torch's `sdp_utils.cpp`,
    check_flash_attention_hardware_support, check_cudnn_hardware_support and their lists of dtypes).
    """
    return kernel in ("flash", "cudnn") and (dtype == "float32" or capability < (8, 0))


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


def micro_batch(loaded: Any, lengths: Sequence[int], pick: random.Random) -> Any:
    """A micro-batch of random token ids, sequences of `lengths`, as `loaded` runs it."""
    from memsafe.planning.batch import MicroBatch, TokenizedInput

    types = "token_type_ids" in loaded.encoder.feature_names
    items = []
    for index, length in enumerate(sorted(lengths, reverse=True)):
        ids = np.asarray([pick.randrange(1000, 5000) for _ in range(length)], dtype=np.int32)
        items.append(TokenizedInput(index, ids, np.zeros(length, dtype=np.int32) if types else None))
    return MicroBatch(tuple(items), loaded.packed)


def measure_shapes(model: Any, count: int, most_tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    """Random micro-batches: the prediction before, the peak after; nothing is learnt from them."""
    from memsafe.engine.sinks import to_host

    found = behind(model)
    cost, device, loaded, pick = found.cost, found.device, found.loaded, random.Random(seed)
    longest = min(model.max_length or 512, most_tokens)
    for _ in range(count):
        goal, lengths = int(64 * (most_tokens / 64) ** pick.random()), []
        while sum(lengths) < goal:
            lengths.append(min(int(8 * pick.paretovariate(0.9)), longest, max(goal - sum(lengths), 8)))
        batch = micro_batch(loaded, lengths, pick)
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


def greedy(model: Any, tokens: int = 1 << 22) -> None:
    """No knee: every micro-batch as large as the budget admits."""
    behind(model).hold(tokens)


def scaled(model: Any, factor: float) -> None:
    """The cost model says `factor` of what it would say, whatever it learns."""
    cost = behind(model).cost
    for name in ("predict", "upper_bound", "resident_bound"):
        setattr(cost, name, _times(getattr(cost, name), factor))
    cost.token_ceiling = _times(cost.token_ceiling, 1 / factor)
    cost.max_tokens_for = _times(cost.max_tokens_for, 1 / factor)


def _times(function: Any, factor: float) -> Any:
    return lambda *args, **kwargs: int(function(*args, **kwargs) * factor) + 1


def flops_of(model: Any, lengths: Sequence[int]) -> float:
    from memsafe.planning.batch import BatchShape

    return float(behind(model).loaded.flops(BatchShape.of(tuple(lengths), packed=True)))


def weights_bytes(model: Any) -> int:
    return int(behind(model).loaded.weights_bytes)


def bound_of(model: Any, lengths: Sequence[int]) -> int:
    """The bytes for which a micro-batch of `lengths` is admitted."""
    from memsafe.planning.batch import BatchShape

    found = behind(model)
    shape = BatchShape.of(tuple(lengths), packed=found.loaded.packed, multiple=found.loaded.pad_multiple)
    return int(found.cost.resident_bound(shape))
