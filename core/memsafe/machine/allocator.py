"""Allocator set-up before torch first uses a device, and giving cached memory back.

Importing this imports no torch: the settings must be in the environment before torch reads them.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from memsafe.machine import heap

__all__ = ["AllocatorState", "configure", "release_cache"]

_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_OTHER_NAMES = ("PYTORCH_HIP_ALLOC_CONF",)  # ROCm reads this one first for some keys

_ONEDNN = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""oneDNN writes a program for each shape of a matrix product that it meets, and it and torch's layer above it (ideep, per thread) keep 1,024 of
them, of 0.7 to 1.7 MB: micro-batches of 400 different numbers of tokens made a process grow by 0.9 GB in bfloat16, 1.1 GB in float32;
with 16 by 31 MB, and no slower (one core of an EPYC, torch 2.13)."""

_lock = threading.Lock()
_ours: str | None = None


@dataclass(frozen=True)
class AllocatorState:
    """What is in force for torch's caching allocator, and why.

    status: ``"set"`` by us; ``"user"``: they had set it, and we left it; ``"late"``: torch had begun, so that what it
        read then stays; ``"unsupported"`` on this platform; ``"off"``: the policy asks for nothing.
    """

    in_force: str | None
    status: Literal["set", "user", "late", "unsupported", "off"]
    note: str


def configure(policy_alloc_conf: str | None) -> AllocatorState:
    """Put `policy_alloc_conf` in force, if nobody else has set anything and torch has not begun; and limits for what oneDNN keeps
    on a CPU, where the environment has none. Idempotent.

    Both names are set to the same string: torch 2.9 ignores some keys under the new name, later ones deprecate the
    old one, and keys under different names are split between them.
    """
    global _ours
    for name, value in _ONEDNN.items():
        os.environ.setdefault(name, value)
    with _lock:
        found = {name: os.environ[name] for name in (*_NAMES, *_OTHER_NAMES) if name in os.environ}
        users = {name: value for name, value in found.items() if name not in _NAMES or value != _ours}
        wanted, dropped = _supported(policy_alloc_conf or "")
        if users and all(users.get(name) == wanted for name in _NAMES):
            return AllocatorState(wanted, "set", "both variables had this value already")  # a parent process, say
        if users:
            return AllocatorState(next(iter(users.values())), "user", _describe(users))
        if policy_alloc_conf is None:
            note = "nothing was asked for" if _ours is None else "nothing was asked for; what was set earlier stays"
            return AllocatorState(_ours, "off", note)
        note = f"expandable_segments was left out: {dropped}" if dropped else ""
        if not wanted:
            return AllocatorState(_ours, "unsupported", note or "the setting is empty")
        if wanted == _ours and (len(found) == len(_NAMES) or _has_begun()):
            return AllocatorState(_ours, "set", note or "in both variables since an earlier call")
        if _has_begun():
            note = "torch had used a device before; set it earlier, or in the environment before Python starts"
            return AllocatorState(_ours, "late", note)
        for name in _NAMES:
            os.environ[name] = wanted
        _ours = wanted
        # torch 2.9 to 2.11 warn about the old name, which 2.9 needs.
        warnings.filterwarnings("ignore", message=r".*PYTORCH_CUDA_ALLOC_CONF is deprecated", category=UserWarning)
        return AllocatorState(wanted, "set", note or "in both variables, before torch's first use of a device")


def _describe(users: dict[str, str]) -> str:
    values = {name: value for name, value in users.items() if name in _NAMES}
    note = "left as it is: " + ", ".join(f"{name}={value!r}" for name, value in users.items())
    if len(values) == 1:
        (other,) = set(_NAMES) - set(values)
        return f"{note}; {other} is not set, and some versions of torch read some keys there only"
    if len(set(values.values())) > 1:
        return f"{note}; they differ, and torch reads device-specific keys from the first, common keys from the other"
    return note


def _supported(conf: str) -> tuple[str, str]:
    """`conf` without expandable_segments where the platform cannot do it, and why not."""
    reason = _no_expandable_segments()
    parts = [part.strip() for part in _split(conf)]
    kept = [part for part in parts if part and (reason is None or part.split(":")[0] != "expandable_segments")]
    return ",".join(kept), reason or "" if len(kept) < len([part for part in parts if part]) else ""


def _split(conf: str) -> list[str]:
    """At commas, but not inside brackets: ``roundup_power2_divisions:[256:1,512:2]``."""
    parts, depth = [""], 0
    for char in conf:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _no_expandable_segments() -> str | None:
    release = platform.release().lower()
    if sys.platform == "win32":
        return "Windows has no virtual memory management for it"
    if "microsoft" in release:
        return "it can fail under WSL"
    if release.endswith("-tegra") or os.path.exists("/etc/nv_tegra_release"):
        return "it is fatal on Jetson"
    return None


def _has_begun() -> bool:
    torch = sys.modules.get("torch")
    kinds = [getattr(torch, name, None) for name in ("cuda", "xpu")]
    return any(kind is not None and bool(kind.is_initialized()) for kind in kinds)


class _Device(Protocol):
    """What giving back must know about a device; see device.py."""

    @property
    def kind(self) -> str: ...
    @property
    def index(self) -> int | None: ...
    def process_bytes(self) -> int: ...


def release_cache(device: _Device) -> int:
    """Give cached, unused memory of this process back; return the bytes by which its size on the device fell.

    What tensors still hold, or a traceback or an unreachable cycle keeps alive, stays. In a CPU build the heap is
    trimmed, which takes milliseconds.
    """
    if device.kind in ("cuda", "xpu") and not _has_begun():
        return 0
    before = device.process_bytes()
    _empty_cache(device.kind, device.index)
    return max(before - device.process_bytes(), 0)


def _empty_cache(kind: str, index: int | None) -> None:
    if kind == "cpu":
        heap.trim()
        return
    import torch

    if kind == "mps":
        torch.mps.empty_cache()
        return
    module: Any = getattr(torch, kind)
    # Under another current device empty_cache can touch the wrong context (expandable segments, pytorch#196258).
    with module.device(index):
        module.empty_cache()
