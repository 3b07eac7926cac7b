"""The calling thread and its cores: how many an operation uses, without touching what other threads of the process use, and
how long the thread has had none."""

from __future__ import annotations

import ctypes
import glob
import os
from collections.abc import Callable
from functools import lru_cache

import torch

__all__ = ["set_threads", "starved_seconds"]


def set_threads(count: int) -> None:
    """Let torch's CPU operations in this thread, and only in it, use `count` cores.

    ``torch.set_num_threads`` would do, but also sets MKL's process-wide number, which slows the caller's own matrix
    products; so OpenMP's and MKL's per-thread settings are used where torch's libraries export them.
    """
    if torch.get_num_threads() == count and not _local_setters():
        return
    setters = _local_setters()
    if not setters:
        torch.set_num_threads(count)
    for setter in setters:
        setter(count)


def starved_seconds() -> float:
    """How long the calling thread has been ready to run and had no core, since it began: the run delay of Linux's
    /proc/thread-self/schedstat (nanoseconds, the second field). Always 0 where the system does not say."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as stream:
            fields = stream.read().split()
    except OSError:
        return 0.0
    return int(fields[1]) / 1e9 if len(fields) == 3 else 0.0


@lru_cache(maxsize=1)
def _local_setters() -> tuple[Callable[[int], object], ...]:
    """OpenMP's and MKL's own functions, or nothing where one of them cannot be found."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    openmp = glob.glob(os.path.join(folder, "libgomp*.so*")) + glob.glob(
        os.path.join(folder, "..", "..", "torch.libs", "libgomp*")
    )
    core = os.path.join(folder, "libtorch_cpu.so")
    if not openmp or not os.path.exists(core):
        return ()
    try:
        torch_library = ctypes.CDLL(core)
        setters = [ctypes.CDLL(openmp[0]).omp_set_num_threads]
        if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
            setters.append(torch_library.MKL_Set_Num_Threads_Local)
    except (OSError, AttributeError):
        return ()
    for setter in setters:
        setter.argtypes, setter.restype = [ctypes.c_int], None
    before = torch.get_num_threads()
    setters[0](before + 1)
    same = torch.get_num_threads() == before + 1  # whether it is the OpenMP that torch uses
    setters[0](before)
    return tuple(setters) if same else ()
