"""What the tests of concurrency share: watched models, callers in threads, and waiting with a limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from memsafe.engine.lanes import lanes_of
from memsafe.planning.batch import MicroBatch
from memsafe.planning.instructions import Start
from memsafe.planning.scheduler import Scheduler
from memsafe.planning.turns import QUERY, Queues

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far longer than it takes, so that a busy machine does not fail it."""


def start(function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
    """Call `function` in a daemon thread of its own: a test that fails never waits for it."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True, name="caller").start()
    return future


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll until `condition` holds; fails the test, saying `what` did not happen."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.002)


_STAY = ("memsafe-reaper", "memsafe-cache")


def lane_names() -> list[str]:
    """Names of the threads that run micro-batches now. The one that closes what was dropped stays and is none, as do those of caches,
    which an earlier test has left."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("memsafe-") and not name.startswith(_STAY)]


def before_encoding(encoder: Any, do: Callable[[], object]) -> None:
    """Call `do` before each piece of texts that `encoder` turns into tokens."""
    way = encoder.way

    def wrapped(*args: Any) -> Any:
        chosen = way(*args)
        encode = chosen.encode

        def held(inputs: Any) -> Any:
            do()
            return encode(inputs)

        chosen.encode = held
        return chosen

    encoder.way = wrapped


def pending(model: Any) -> int:
    """Inputs of an Embedder or Reranker that wait."""
    return int(model._engine.backlog.pending)


class Watch:
    """Wraps the forward of an Embedder's or Reranker's models: records micro-batches and can hold them.

    batches: in the order in which their forwards began. granted: in the order in which they were let in, which a busy
    machine cannot change (a lane may stand still between the two). most: forwards inside at once, at most.
    """

    def __init__(self, *models: Any, takes_s: float = 0.0) -> None:
        self.batches: list[MicroBatch] = []
        self.granted: list[MicroBatch] = []
        self.most = 0
        self.takes_s = takes_s
        self._inside = 0
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()
        self.errors: list[Callable[[MicroBatch], None]] = []
        for model in models:
            for loaded in model._engine.models:
                loaded.forward = self._wrapped(loaded.forward)
        runners = [runner for model in models for runner in model._engine.runners]
        for scheduler in {lanes_of(runner.device).scheduler for runner in runners}:
            self._record(scheduler, [runner.tenant.queues for runner in runners])

    def _record(self, scheduler: Scheduler, watched: list[Queues]) -> None:
        decide = scheduler.next

        def recorded(*args: Any) -> Any:
            action = decide(*args)
            if isinstance(action, Start) and any(action.tenant.queues is queues for queues in watched):
                self.granted.append(action.ticket.batch)
            return action

        scheduler.next = recorded  # type: ignore[method-assign]

    def _wrapped(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(batch: MicroBatch, *args: Any, **options: Any) -> Any:
            with self._lock:
                self.batches.append(batch)
                self._inside += 1
                self.most = max(self.most, self._inside)
            try:
                assert self._open.wait(PATIENCE_S)
                if self.takes_s:
                    time.sleep(self.takes_s)
                for error in self.errors:
                    error(batch)
                return forward(batch, *args, **options)
            finally:
                with self._lock:
                    self._inside -= 1

        return watched

    def hold(self) -> None:
        """Let no forward that begins from now on end."""
        self._open.clear()

    def go(self) -> None:
        """Let all forwards that are held go on."""
        self._open.set()

    @property
    def kinds(self) -> str:
        """The micro-batches in the order of ``granted``: ``q`` for queries, ``b`` for bulk."""
        return "".join("q" if batch.items[0].job.key.priority == QUERY else "b" for batch in self.granted)

    def wait_for(self, count: int) -> None:
        """Until `count` micro-batches have been let in."""
        wait_until(lambda: len(self.granted) >= count, f"{count} micro-batches")


def occupy(embedder: Any, watch: Watch) -> list[Future[Any]]:
    """Hold the device with as many calls as it takes, so that whatever comes next waits in the queue together.

    Three of them are in flight then (two lanes, and one more for queries), two wait.
    """
    watch.hold()
    before = len(watch.granted)
    calls = [start(embedder.embed_queries, [f"keeps the device busy {i}"], max_rows=1) for i in range(5)]
    # Two that wait could also be the first two, before any lane has looked: three must have been let in.
    wait_until(lambda: len(watch.granted) >= before + 3 and pending(embedder) == 2, "a busy device")
    return calls
