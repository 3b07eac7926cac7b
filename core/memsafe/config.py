"""What a user may decide about memory: :class:`MemoryPolicy`, frozen and validated."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from memsafe.errors import ConfigError

__all__ = ["FALLBACKS", "GiB", "KiB", "MemoryPolicy", "MiB", "Size", "format_bytes", "parse_size"]

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB

Size = int | float | str
"""Bytes (an int), a fraction of the device's total memory (a float in (0, 1]), ``"6GiB"``, ``"512MB"`` or ``"80%"``."""

FALLBACKS = ("chunk", "half", "cpu")
"""The rungs of the ladder for one input that does not fit alone, in the order in which they are tried.

``"chunk"``: feed-forward layers run over slices of the tokens; same numbers, a little slower.
``"half"``: the input is computed in half precision; numbers differ (cosine at least 0.999).
``"cpu"``: the input is computed on the CPU; same numbers, much slower.
"""

_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1000, "kib": KiB, "m": 1000**2, "mb": 1000**2, "mib": MiB}
_UNITS |= {"g": 1000**3, "gb": 1000**3, "gib": GiB, "t": 1000**4, "tb": 1000**4, "tib": 1024 * GiB}
_LARGEST_BYTES = 1 << 62
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*")


def parse_size(size: Size, *, name: str = "size") -> int | float:
    """Return `size` as bytes (int), or as a fraction of the device's total memory (float in (0, 1]).

    Raises :class:`ConfigError` for anything else, naming the option `name`.
    """
    remedy = 'give bytes (an int), a fraction like 0.8, or a string like "6GiB", "512MB" or "80%"'
    if isinstance(size, bool) or not isinstance(size, (int, float, str)):
        raise ConfigError(f"{name}: got {type(size).__name__}; {remedy}")
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = match.group(2).lower() if match else None
        if match is None or (unit != "%" and unit not in _UNITS):
            raise ConfigError(f"{name}: got {size!r}; {remedy}")
        number = float(match.group(1))
        if unit == "%":
            size = number / 100
        elif not unit and "." in match.group(1):
            size = number  # "0.8" from a command line or an environment variable: a fraction, never 0 bytes
        elif number * _UNITS[unit or ""] > _LARGEST_BYTES:
            raise ConfigError(f"{name}: got more than 2**62 bytes; {remedy}")
        else:
            size = int(number * _UNITS[unit or ""])
    if isinstance(size, int):
        if size < 0:
            raise ConfigError(f"{name}: got {size} bytes, which is negative; {remedy}")
        return size
    if not math.isfinite(size) or not 0 < size <= 1:
        raise ConfigError(f"{name}: got {size!r}, but a float is a fraction and must be in (0, 1]; {remedy}")
    return float(size)


def format_bytes(num_bytes: float) -> str:
    """``1536 -> "1.5 KiB"``: for messages and reports, never parsed again."""
    sign, value = ("-" if num_bytes < 0 else ""), abs(float(num_bytes))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{sign}{value:.0f} {unit}" if unit == "B" else f"{sign}{value:.1f} {unit}"
        value /= 1024
    return f"{sign}{value:.1f} TiB"


@dataclass(frozen=True, kw_only=True)
class MemoryPolicy:
    """What memsafe may take, what it may do when that is not enough, and when it gives memory back.

    Every field has a default that needs no thought; unknown names raise ``TypeError`` as any dataclass does, and
    values out of range raise :class:`ConfigError`.
    """

    limit: Size | None = None
    """The most that this process may use on the device beyond what it used before the model was loaded, weights
    included. None: all that is free."""

    reserve: Size | None = None
    """What is always left free for others. None: 1/32 of the device's total memory, between 64 MiB and 512 MiB."""

    fallback: tuple[str, ...] = ("chunk",)
    """Which of :data:`FALLBACKS` may be used for one input that does not fit alone. Each use warns and is counted."""

    release: Literal["pressure", "run", "never"] = "pressure"
    """When cached memory is given back: under pressure and at the end of a run that grew the cache, after every
    run, or never."""

    alloc_conf: str | None = "expandable_segments:True"
    """Allocator settings put in force before torch first uses a device, unless the user has set some. None: nothing."""

    wait_s: float = 30.0
    """How long to wait, in seconds and in all, for neighbours to give memory back before giving up on an input."""

    knee: float | None = None
    """The fraction of a run's speed that may be lost for the sake of smaller micro-batches. None: 0.02, on a CPU 0.01.
    0: the fastest size, whatever memory it takes."""

    max_tokens: int | None = None
    """Never put more tokens than this into one micro-batch. None: the knee and the budget decide."""

    strict_heap: bool = False
    """CPU with glibc only: fix malloc's mmap threshold at 256 KiB, so that freed tensors leave the process at once.
    Tight containers gain predictability; speed falls by up to half."""

    max_pending: int | None = None
    """The most inputs that may wait for the device at a time, over all callers. None: no limit."""

    on_full: Literal["wait", "raise"] = "wait"
    """What happens to a call that would pass ``max_pending``: it waits, or :class:`BusyError` is raised."""

    unload_after_s: float | None = None
    """Take the weights off the device when nobody has called for so many seconds; the next call loads them again, or raises
    :class:`ModelTooLargeError` where they no longer fit. None: they stay. A loaded model that was handed in waits in main memory;
    on a CPU it cannot be unloaded, and asking for it is a :class:`ConfigError`."""

    learn: bool = True
    """Keep what was learnt about a model's memory in the user's cache directory (MEMSAFE_CACHE_DIR, or the platform's)."""

    def __post_init__(self) -> None:
        if self.limit is not None and parse_size(self.limit, name="limit") == 0:
            raise ConfigError("limit: got 0, which leaves no memory to run in; give a size such as '6GiB', or None")
        if self.reserve is not None:
            parse_size(self.reserve, name="reserve")
        if not isinstance(self.fallback, (str, tuple, list, set, frozenset, type(None))):
            raise ConfigError(f"fallback: got {type(self.fallback).__name__}; give a tuple of {', '.join(FALLBACKS)}")
        fallback = (self.fallback,) if isinstance(self.fallback, str) else tuple(self.fallback or ())
        unknown = [rung for rung in fallback if rung not in FALLBACKS]
        if unknown:
            raise ConfigError(f"fallback: got {unknown[0]!r}; choose from {', '.join(FALLBACKS)}")
        object.__setattr__(self, "fallback", tuple(rung for rung in FALLBACKS if rung in fallback))
        _choose("release", self.release, ("pressure", "run", "never"))
        _choose("on_full", self.on_full, ("wait", "raise"))
        _at_least("wait_s", self.wait_s, 0)
        if self.knee is not None:
            _at_least("knee", self.knee, 0)
        if self.unload_after_s is not None:
            _at_least("unload_after_s", self.unload_after_s, 0.01)
        for name in ("max_tokens", "max_pending"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}: got {value!r}; give an int of at least 1, or None for no limit")
        for name in ("strict_heap", "learn"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}; give True or False")
        if self.alloc_conf is not None and not isinstance(self.alloc_conf, str):
            raise ConfigError(f"alloc_conf: got {type(self.alloc_conf).__name__}; give a string, or None for nothing")

    def with_options(self, **changes: Any) -> MemoryPolicy:
        """Return a copy with `changes`; an unknown name raises :class:`ConfigError` with the names there are."""
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"unknown memory option {name!r}; choose from {', '.join(names)}")
        return replace(self, **changes)

    def limit_bytes(self, total_bytes: int) -> int | None:
        """`limit` in bytes on a device with `total_bytes` of memory; None if unset."""
        return None if self.limit is None else _resolve(parse_size(self.limit, name="limit"), total_bytes)

    def reserve_bytes(self, total_bytes: int) -> int:
        """`reserve` in bytes on a device with `total_bytes` of memory."""
        if self.reserve is None:
            return min(max(total_bytes // 32, 64 * MiB), 512 * MiB)
        return _resolve(parse_size(self.reserve, name="reserve"), total_bytes)


def cache_dir() -> str:
    """Where learnt memory costs are kept: ``MEMSAFE_CACHE_DIR``, else ``memsafe`` in the platform's cache directory."""
    chosen = os.environ.get("MEMSAFE_CACHE_DIR")
    if chosen:
        return chosen
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "memsafe")


def _resolve(size: int | float, total_bytes: int) -> int:
    return size if isinstance(size, int) else int(size * total_bytes)


def _choose(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}; choose from {', '.join(allowed)}")


def _at_least(name: str, value: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least or value == math.inf:
        raise ConfigError(f"{name}: got {value!r}; give a finite number of at least {least}")
