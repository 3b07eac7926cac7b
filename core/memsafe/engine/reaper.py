"""Closes what nobody refers to any more, and unloads what nobody has called for long, in a thread of its own.

Garbage collection runs in whatever thread happens to allocate, between any two of its instructions and whatever locks
it holds; closing takes locks and waits. So a finalizer only passes its engine on: a SimpleQueue's put is reentrant.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from queue import Empty, SimpleQueue
from typing import Protocol

__all__ = ["drop", "settle", "watch"]

log = logging.getLogger("memsafe")


class _Closable(Protocol):
    def close(self) -> None: ...


class Unloadable(Protocol):
    """What leaves its device when nobody calls."""

    def unload_if_idle(self) -> float | None:
        """Unload if it is time to; in how many seconds to ask again, None for never."""
        ...


_dropped: SimpleQueue[_Closable | threading.Event | weakref.ref[Unloadable] | None] = SimpleQueue()
_thread: threading.Thread | None = None
_lock = threading.Lock()
_exiting = False


def _start() -> None:
    """See that the thread runs. Not for finalizers: starting a thread takes locks."""
    global _thread
    with _lock:
        if _thread is None:
            thread = threading.Thread(target=_close_dropped, name="memsafe-reaper", daemon=True)
            thread.start()  # a Ctrl-C in here: the next one begins another
            _thread = thread


def drop(engine: _Closable) -> None:
    """Close `engine` soon. May be called at any moment in any thread."""
    _dropped.put(engine)


def watch(engine: Unloadable) -> None:
    """Ask `engine` from time to time whether to unload it, for as long as it wants to be asked. Holds no reference to it."""
    _start()
    reference = weakref.ref(engine)
    hash(reference)  # while it can be computed: it stays the same when the engine is gone
    _dropped.put(reference)


def settle(timeout_s: float = 10.0) -> bool:
    """Wait until everything that was dropped so far is closed; False if that takes longer. Every engine calls it before
    it loads, so that the thread runs from the first one on."""
    _start()
    reached = threading.Event()
    _dropped.put(reached)
    return reached.wait(timeout_s)


def _close_dropped() -> None:
    watched: dict[weakref.ref[Unloadable], float] = {}  # when to ask next, by time.monotonic()
    while True:
        wait_s = max(min(watched.values()) - time.monotonic(), 0) if watched else None
        try:
            each = _dropped.get(timeout=wait_s)
        except Empty:
            _unload_idle(watched)
            continue
        if each is None:
            return
        try:
            if isinstance(each, threading.Event):
                each.set()
            elif isinstance(each, weakref.ref):
                watched[each] = 0.0
            elif not _exiting:
                each.close()
        except Exception:  # a fault of ours must not keep the memory of all that comes later
            log.exception("an embedder or reranker that was dropped could not be closed")
        del each  # or it would live until the next one comes


def _unload_idle(watched: dict[weakref.ref[Unloadable], float]) -> None:
    """Ask those of `watched` whose time has come, and note when to ask them again."""
    for reference, due in list(watched.items()):
        if due > time.monotonic():
            continue
        engine, again_s = reference(), None
        if engine is not None and not _exiting:
            try:
                again_s = engine.unload_if_idle()
            except Exception:
                log.exception("an embedder or reranker that was idle could not be unloaded")
        del engine
        if again_s is None:
            del watched[reference]
        else:
            watched[reference] = time.monotonic() + again_s


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
