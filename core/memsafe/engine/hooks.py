"""Events to hooks, in a thread of their own: whatever a hook does, no micro-batch, no other call and no close() waits for it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

from memsafe.events import Event, EventHook

__all__ = ["Hooks"]

log = logging.getLogger("memsafe")

IDLE_S = 0.5
"""The thread ends after so many seconds without an event; starting one again costs well under a millisecond."""
PATIENCE_S = 5.0
"""How long the end of a call waits for one and the same event to be told."""
MOST_WAITING = 10_000
"""Events that wait for a hook; more are dropped, the oldest first."""


class Hooks:
    """Calls `hooks` with one event after another, in the order in which they came. Thread-safe.

    A hook may take its time, raise, or call the embedder again. Events of a call have been told when it returns, unless a
    hook takes longer than :data:`PATIENCE_S` for one of them. What goes wrong is logged once.
    """

    def __init__(self, hooks: Sequence[EventHook]) -> None:
        self._hooks = tuple(hooks)
        self._waiting: deque[Event] = deque()
        # `with` on the lock itself: a Ctrl-C inside the condition's own __enter__, which is Python code, would leave it held
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._come = self._told = 0  # events so far
        self._failed = self._full = self._stuck = False

    def __call__(self, event: Event) -> None:
        """Let `event` be told soon."""
        dropped = False
        with self._lock:
            self._come += 1
            self._waiting.append(event)
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popleft()
                self._told += 1
                dropped, self._full = not self._full, True
            if self._thread is None:
                thread = threading.Thread(target=self._tell_all, name="memsafe-hooks", daemon=True)
                try:
                    thread.start()
                    self._thread = thread
                except RuntimeError:  # the system gives no more threads: with the next event
                    return
            self._changed.notify_all()
        if dropped:
            log.warning("event hooks are too slow: %d events wait, older ones are dropped", MOST_WAITING)

    def settle(self) -> None:
        """Wait until all that has come so far is told, or a hook is stuck; not in a hook itself, which would wait for itself."""
        with self._lock:
            if self._thread is None or threading.current_thread() is self._thread or self._stuck:
                return
            wanted = self._come
            while self._told < wanted and self._thread is not None:
                before = self._told
                if not self._changed.wait_for(lambda told=before: self._told > told, PATIENCE_S):  # type: ignore[misc]
                    self._stuck = True
                    break
            else:
                return
        log.warning("an event hook has taken more than %g seconds; calls no longer wait for hooks", PATIENCE_S)

    def _tell_all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting and not self._changed.wait_for(lambda: self._waiting, IDLE_S):
                    self._thread = None
                    self._changed.notify_all()
                    return
                event = self._waiting.popleft()
            for hook in self._hooks:
                try:
                    hook(event)
                except BaseException:  # SystemExit too: the thread is ours
                    if not self._failed:
                        self._failed = True
                        log.exception("an event hook failed; later failures of hooks are not reported")
            del event
            with self._lock:
                self._told += 1
                self._stuck = False
                self._changed.notify_all()
