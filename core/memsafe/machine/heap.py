"""The C library's heap, where CPU tensors lie: how it is set, and trimming it. Importing this imports no torch."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

__all__ = ["heap", "strict_heap", "trim"]

_MMAP_THRESHOLD_BYTES = 256 * 1024
_TIGHT_BYTES, _LOOSE_BYTES = 4 << 20, 32 << 20  # glibc's own threshold ends at 32 MiB too (HEAP_MAX_SIZE / 2)


def strict_heap(threshold_bytes: int = _MMAP_THRESHOLD_BYTES) -> bool:
    """Fix glibc's mmap threshold, at 256 KiB, for this process; False where malloc is not glibc's.

    By default the threshold follows the blocks that are freed, up to 32 MiB, and freed tensors stay in the heap. Fixed,
    every tensor above it has pages of its own that leave the process when it dies, so that resident memory is what
    tensors hold. The price is a page fault for every page of every new tensor: up to half the speed.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None:
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(m_mmap_threshold, threshold_bytes)) and bool(mallopt(m_trim_threshold, threshold_bytes))


def trim() -> None:
    """Give the heap's free pages back to the system, which takes milliseconds; nothing where malloc is not glibc's."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


class _Heap:
    """How this process's heap is set: by a user's wish for good, or by executors as memory gets tight."""

    def __init__(self) -> None:
        self.exact = False
        self._wished = False
        self._lock = threading.Lock()

    def wish(self) -> None:
        """A policy asked for the strict heap."""
        with self._lock:
            self._wished = self.exact = strict_heap() or self.exact

    def tighten(self) -> bool:
        """Let freed tensors of 4 MiB and more leave the process at once; returns whether that is so.

        With glibc's defaults one forward of 86 MB live grew the process by 134 to 160 MB and left 100 to 130 of them;
        with this threshold by 86 to 88 and 1. What smaller tensors leave in the heap is bounded by their size.
        """
        with self._lock:
            self.exact = self.exact or strict_heap(_TIGHT_BYTES)
            return self.exact

    def loosen(self) -> None:
        """Memory is ample again: keep freed tensors for the next ones, which saves about a tenth of the time."""
        with self._lock:
            if self.exact and not self._wished:
                self.exact = not strict_heap(_LOOSE_BYTES)


heap = _Heap()
"""Of this process, which has one heap for all models."""


def _libc() -> Any:
    """The C library that this process runs on; None on Windows, whose heap has no such calls."""
    return ctypes.CDLL(None) if os.name == "posix" else None
