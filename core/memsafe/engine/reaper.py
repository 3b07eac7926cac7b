"""Closes what nobody refers to any more, in a thread of its own.

Garbage collection runs in whatever thread happens to allocate, between any two of its instructions and whatever locks
it holds; closing takes locks and waits. So a finalizer only passes its engine on: a SimpleQueue's put is reentrant.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from queue import SimpleQueue
from typing import Protocol

__all__ = ["drop", "settle"]

log = logging.getLogger("memsafe")


class _Closable(Protocol):
    def close(self) -> None: ...


_dropped: SimpleQueue[_Closable | threading.Event | None] = SimpleQueue()
_thread: threading.Thread | None = None
_lock = threading.Lock()
_exiting = False


def _start() -> None:
    """See that the thread runs. Not for finalizers: starting a thread takes locks."""
    global _thread
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_close_dropped, name="memsafe-reaper", daemon=True)
            _thread.start()


def drop(engine: _Closable) -> None:
    """Close `engine` soon. May be called at any moment in any thread."""
    _dropped.put(engine)


def settle(timeout_s: float = 10.0) -> bool:
    """Wait until everything that was dropped so far is closed; False if that takes longer. Every engine calls it before
    it loads, so that the thread runs from the first one on."""
    _start()
    reached = threading.Event()
    _dropped.put(reached)
    return reached.wait(timeout_s)


def _close_dropped() -> None:
    while (each := _dropped.get()) is not None:
        try:
            if isinstance(each, threading.Event):
                each.set()
            elif not _exiting:
                each.close()
        except Exception:  # a fault of ours must not keep the memory of all that comes later
            log.exception("an embedder or reranker that was dropped could not be closed")
        del each  # or it would live until the next one comes


def _stop() -> None:
    """At exit, finish what is being closed: a thread that is in torch's code when the interpreter goes aborts the process.
    What still waits goes with the process."""
    global _exiting
    _exiting = True
    if _thread is not None:
        _dropped.put(None)
        _thread.join(timeout=60)


def _after_fork() -> None:
    """A forked child has none of its parent's threads, and the queue's lock in an unknown state."""
    global _dropped, _thread, _lock
    _dropped, _thread, _lock = SimpleQueue(), None, threading.Lock()


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
