"""What the sections share: a setting, memory, outcomes, and the one look behind the front door."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NOT_RUN", "STOPPED", "Behind", "GiB", "Row", "Setting", "StepTimeoutError", "attempt", "behind"]

GiB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

T4_BYTES = int(14.58 * GiB)
"""What a T4 shows as its total memory: the figure in the error message of michaelfeil/infinity#370."""
CONTEXT_BYTES = int(0.45 * GiB)
"""What a CUDA context takes of it; the measured one is recorded beside it."""
NOT_RUN, STOPPED = "not run (time)", "stopped (time)"
"""Outcomes of a step that was not begun, and of one that was ended, because its time was over."""


class StepTimeoutError(BaseException):
    """A step's time is over. Not an Exception: no library's handler may take it for a failure of its own."""


@dataclass(frozen=True)
class Setting:
    """How the proof runs. dry: on the CPU with tiny shapes; models: where they are saved; until: time.time() to stop at."""

    dry: bool
    models: str
    until: float
    device: str = "cuda:0"

    def left(self) -> float:
        """Seconds until the section, or the step that this setting was made for, must have ended."""
        return self.until - time.time()

    def pick(self, real: Any, tiny: Any) -> Any:
        return tiny if self.dry else real


@dataclass(frozen=True)
class Behind:
    """What the proof needs of a model's first device and the front door does not offer.

    loaded: has `forward`, `flops`, `packed`, `weights_bytes`. cost: has `predict` and the bounds, in bytes. device: measures.
    size: tokens per micro-batch that the search settled on, None if it is not done. tried: [tokens, tokens/s] of each size
    that was tried; or "not offered". hold(tokens): from now on every micro-batch takes as many as that, if memory allows.
    """

    loaded: Any
    cost: Any
    device: Any
    size: int | None
    tried: Any
    hold: Callable[[int], None]


def behind(model: Any) -> Behind:
    """The only place that knows how an engine is put together: mend it here where a name has moved."""
    from memsafe.planning.sizing import Size

    engine = model._engine
    tenant = engine.runners[0].tenant
    sizing = tenant.sizing

    def hold(tokens: int) -> None:
        for runner in engine.runners:
            runner.tenant.sizing.propose = lambda pending, *, capped=False: Size(tokens)

    tried = [[point.tokens, point.rate] for point in sizing.curve.points]
    size = sizing.curve.points[-1].tokens if sizing.settled else None
    return Behind(engine.model, tenant.ledger.cost, engine.model.device, size, tried, hold)


def cap_to(setting: Setting, num_bytes: int) -> Row:
    """Cap this process as a card of `num_bytes`, less what its context takes; what was done, for the record."""
    if setting.dry:
        return {"cap": "skipped: no CUDA"}
    import torch

    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    fraction = min((num_bytes - CONTEXT_BYTES) / total, 1.0)
    torch.cuda.set_per_process_memory_fraction(fraction)
    return {"cap_bytes": int(fraction * total), "in_use_before_bytes": total - free}


def free_memory(setting: Setting) -> None:
    if setting.dry:  # a full collection of a large process takes a second
        return
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def reserved(setting: Setting, *, peak: bool = False) -> int | None:
    if setting.dry:
        return None
    import torch

    return torch.cuda.max_memory_reserved() if peak else torch.cuda.memory_reserved()


def attempt(setting: Setting, work: Callable[[], Any], tokens: int) -> tuple[Row, Any]:
    """(what came of `work`, its result): seconds, tokens/s and peak, or how it failed. LookupErrors pass through.

    A step whose time is over while `work` runs is "stopped (time)", and its row has the seconds until then.
    """
    from memsafe import InputTooLargeError, ModelTooLargeError
    from memsafe.machine.refusals import is_out_of_memory

    free_memory(setting)
    if not setting.dry:
        import torch

        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    message = None
    result = None
    try:
        result = work()
        if not setting.dry:
            torch.cuda.synchronize()
    except LookupError:
        raise
    except StepTimeoutError:
        signal.setitimer(signal.ITIMER_REAL, 0)  # what follows only tells of it
        message = STOPPED
    except Exception as error:  # a peer may fail in any way; that is its outcome
        too_large = isinstance(error, (InputTooLargeError, ModelTooLargeError)) or is_out_of_memory(error)
        kind = "out of memory" if too_large else "error"
        message = f"{kind}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    seconds = time.perf_counter() - began
    row: Row = {"seconds": seconds, "peak_reserved_bytes": reserved(setting, peak=True)}
    if message is not None:  # looked at outside the except block, where the failed tensors still live
        free_memory(setting)
        return {**row, "outcome": message}, None
    return {**row, "outcome": "finished", "tokens_per_s": tokens / seconds if seconds else None}, result


def timed(setting: Setting, work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, the device's work included."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if not setting.dry:
            import torch

            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


def matmul_rate(setting: Setting, dtype: str = "bfloat16") -> float:
    """Floating-point operations per second of a large matrix product of random numbers: the median of 20."""
    import torch

    size = setting.pick(8192, 256)
    a, b = (torch.randn(size, size, device=setting.device, dtype=getattr(torch, dtype)) for _ in range(2))
    for _ in range(3):
        a @ b
    if setting.dry:
        found = timed(setting, lambda: a @ b, 3)
    else:
        found = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            a @ b
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000)
    return 2 * size**3 / sorted(found)[len(found) // 2]


def describe(setting: Setting) -> Iterator[Row]:
    """One row: device, driver, versions."""
    import importlib.metadata
    import platform

    import torch

    versions: Row = {}
    for package in "memsafe torch triton transformers sentence-transformers tokenizers numpy llama-index-core langchain-core".split():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    row: Row = {"what": "machine", "python": platform.python_version(), "cores": os.cpu_count(), "commit": _commit()}
    row["versions"] = versions
    if setting.dry:
        yield {**row, "device": "CPU (dry run: says nothing about a GPU)"}
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        driver = f"unknown ({type(error).__name__})"
    yield {
        **row,
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "total_bytes": total,
        "free_bytes": free,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_bf16_flops": matmul_rate(setting) if torch.cuda.get_device_capability(0) >= (8, 0) else None,
        "matmul_fp32_flops": matmul_rate(setting, "float32"),
    }


def _commit() -> str | None:
    """The repository's commit, with a + if files differ from it; None where git or its folder did not travel."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
