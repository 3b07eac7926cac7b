"""Who else holds memory of an NVIDIA card: NVIDIA's management library, where its Python binding is installed (nvidia-ml-py)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Holder", "NvmlCard", "cards"]


@dataclass(frozen=True)
class Holder:
    """A process on a card. program: the last part of its name, without arguments; "" where the system hides it (in a container,
    say). used_bytes: None where the driver does not say (Windows, MIG)."""

    pid: int
    program: str
    used_bytes: int | None
    ours: bool


@dataclass(frozen=True)
class NvmlCard:
    """A card as the driver sees it, in the driver's order, which CUDA_VISIBLE_DEVICES may change. uuid: of it."""

    name: str
    uuid: str
    total_bytes: int
    used_bytes: int
    driver: str
    holders: tuple[Holder, ...]


def cards(library: Any = None) -> tuple[list[NvmlCard], str]:
    """(cards, why there are none). library: pynvml, or what stands for it; None: the installed one."""
    if library is None:
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return [], "nvidia-ml-py is not installed: pip install nvidia-ml-py shows who holds a card's memory"
    try:
        with _open(library):
            driver = _text(library.nvmlSystemGetDriverVersion())
            count = library.nvmlDeviceGetCount()
            return [_card(library, library.nvmlDeviceGetHandleByIndex(place), driver) for place in range(count)], ""
    except Exception as error:  # its own error classes: no driver, no card, no permission
        return [], f"the NVIDIA driver cannot be asked ({type(error).__name__}: {error})"


@contextmanager
def _open(library: Any) -> Iterator[None]:
    library.nvmlInit()
    try:
        yield
    finally:
        library.nvmlShutdown()


def _card(library: Any, handle: Any, driver: str) -> NvmlCard:
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    holders: dict[int, Holder] = {}
    for kind in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        try:
            found = getattr(library, kind)(handle)
        except Exception:  # not on this card, or not for this user
            continue
        for process in found:
            used = getattr(process, "usedGpuMemory", None)
            pid = int(process.pid)
            holders[pid] = Holder(pid, _program(library, pid), None if used is None else int(used), pid == os.getpid())
    return NvmlCard(
        _text(library.nvmlDeviceGetName(handle)),
        _text(library.nvmlDeviceGetUUID(handle)),
        int(memory.total),
        int(memory.used),
        driver,
        tuple(holders[pid] for pid in sorted(holders)),
    )


def _program(library: Any, pid: int) -> str:
    try:
        name = _text(library.nvmlSystemGetProcessName(pid))
    except Exception:  # another container's process: its number means nothing here
        return ""
    words = name.split()
    return words[0].replace("\\", "/").rsplit("/", 1)[-1] if words else ""


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
