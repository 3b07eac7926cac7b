"""Whether a model is on its device, who uses it, and since when nobody does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Presence"]


class Presence:
    """Counts who uses a model, so that its weights leave between two uses and never in one. Thread-safe.

    here: whether the weights are on the device. Whoever has entered :meth:`use` and then finds them here keeps them until he
    leaves; whoever does not sees to it that they come back.
    """

    def __init__(self) -> None:
        self.here = False
        self._lock = threading.Lock()
        self._users = 0
        self._last_use = time.monotonic()

    @contextmanager
    def use(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._last_use = time.monotonic()

    def leave(self, after_s: float) -> float:
        """0, and the weights count as gone, if nobody has used them for `after_s`; else the seconds until one may ask again."""
        with self._lock:
            left_s = after_s if self._users else after_s - (time.monotonic() - self._last_use)
            if left_s > 0:
                return left_s
            self.here = False
            return 0.0
