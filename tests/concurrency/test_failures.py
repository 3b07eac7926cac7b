"""What goes wrong for one caller, or for one device, stays there: cancelling, bad inputs, dead workers, close()."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from memsafe import ClosedError, InputError, InputTooLargeError, MemoryPolicy
from memsafe.engine import lanes
from memsafe.engine.lanes import lanes_of
from memsafe.planning.batch import MicroBatch
from memsafe.testing import SimulatedDevice, SimulatedEmbedder, SimulatedReranker
from tests.concurrency.helpers import PATIENCE_S, Watch, before_encoding, occupy, pending, start, wait_until
from tests.concurrency.test_priorities import SMALL, texts


class AcceleratorError(RuntimeError):
    """Named as torch's error for a device that is gone."""


def _taking_part(batch: MicroBatch, count: int) -> bool:
    return len({item.job for item in batch.items}) >= count


# cancelling


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_cancelling_a_task_frees_its_places(device: SimulatedDevice, how: str) -> None:
    """Cancelling an asyncio task, or its timeout, empties its places in the queue at once; others get their rows."""

    async def main() -> None:
        other = asyncio.create_task(embedder.aembed_documents(texts(8, word="other")))
        wanted = asyncio.create_task(embedder.aembed_documents(texts(500)))
        while pending(embedder) < 490:
            await asyncio.sleep(0.005)
        if how == "cancel":
            wanted.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wanted
        else:
            with pytest.raises((TimeoutError, asyncio.TimeoutError)):
                await asyncio.wait_for(wanted, 0.01)
        assert pending(embedder) <= 8  # nothing has been computed since: the forwards are held
        watch.go()
        rows = await asyncio.wait_for(other, PATIENCE_S)
        assert np.array_equal(rows, await embedder.aembed_documents(texts(8, word="other")))

    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        watch = Watch(embedder)
        watch.hold()
        asyncio.run(main())
        assert sum(len(batch) for batch in watch.batches) < 100
        assert device.snapshot().allocated_bytes == sum(model.weights_bytes for model in embedder.simulated)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the shell started this process with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_waiting_thread_cancels_its_call(device: SimulatedDevice) -> None:
    """KeyboardInterrupt in the main thread ends its call, empties the queue, and the next call works."""
    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        watch = Watch(embedder)
        watch.hold()
        other = start(embedder.embed_documents, texts(4, word="other"))
        watch.wait_for(1)

        main = threading.get_ident()

        def interrupt() -> None:
            wait_until(lambda: pending(embedder) >= 290, "the call in the queue")
            time.sleep(0.3)  # until it waits for its rows
            signal.pthread_kill(main, signal.SIGINT)

        interrupting = start(interrupt)
        with pytest.raises(KeyboardInterrupt):
            embedder.embed_documents(texts(300))
        interrupting.result(PATIENCE_S)
        assert pending(embedder) <= 4
        watch.go()
        assert other.result(PATIENCE_S).shape == (4, 8)
        assert embedder.embed_documents(texts(3)).shape == (3, 8)


def test_a_call_cancelled_while_it_is_held_back_ends(device: SimulatedDevice) -> None:
    """A task that waits for room in a full queue can be cancelled too, and leaves nothing behind."""

    async def main() -> None:
        task = asyncio.create_task(embedder.aembed_documents(texts(100)))
        while pending(embedder) < 5:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with SimulatedEmbedder(device, memory={"max_tokens": 32, "max_pending": 5}) as embedder:
        watch = Watch(embedder)
        watch.hold()
        asyncio.run(main())  # which also waits for the threads it started
        assert pending(embedder) == 0
        watch.go()


# one caller's failure


def test_an_error_of_one_callers_inputs_reaches_it_alone(device: SimulatedDevice) -> None:
    """When a shared micro-batch fails because of one caller's text, that caller gets the error, the others their rows."""
    with SimulatedEmbedder(device, memory={"reserve": 0}) as embedder:
        embedder.simulated[0].fail_on("query: poison text", ValueError("the model chokes on this"))
        watch = Watch(embedder)
        busy = occupy(embedder, watch)
        calls = [start(embedder.embed_queries, [text]) for text in ("one", "poison text", "three", "four")]
        wait_until(lambda: pending(embedder) == 6, "four queries waiting")
        watch.go()
        assert all(call.result(PATIENCE_S).shape == (1, 8) for call in busy)
        with pytest.raises(ValueError, match="chokes"):
            calls[1].result(PATIENCE_S)
        for call, text in zip((calls[0], calls[2], calls[3]), ("one", "three", "four"), strict=True):
            assert np.array_equal(call.result(PATIENCE_S), embedder.embed_queries([text]))
        assert any(_taking_part(batch, 2) for batch in watch.batches), "no micro-batch was shared"


def test_a_bad_text_reaches_its_caller_alone(device: SimulatedDevice) -> None:
    """An input that is no text fails its own call, with its index, while calls beside it go on."""
    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        good = [start(embedder.embed_documents, texts(30, word=f"c{i}x")) for i in range(4)]
        with pytest.raises(InputError) as caught:
            embedder.embed_documents(["fine", 7])  # type: ignore[list-item]
        assert caught.value.index == 1
        assert all(call.result(PATIENCE_S).shape == (30, 8) for call in good)


@pytest.mark.cuts
def test_an_input_too_large_reaches_its_caller_alone() -> None:
    """Of two calls that share the device, only the one whose text cannot fit gets InputTooLargeError."""
    device = SimulatedDevice("96MiB")
    policy = MemoryPolicy(reserve=0, wait_s=0, fallback=())
    with SimulatedEmbedder(device, memory=policy) as embedder:
        huge = " ".join(f"w{i}" for i in range(60_000))
        calls = [start(embedder.embed_documents, texts(40, word=f"c{i}x")) for i in range(3)]
        bad = start(embedder.embed_documents, ["small", huge])
        error = bad.exception(PATIENCE_S)
        assert isinstance(error, InputTooLargeError) and error.failed == [1]
        assert np.isfinite(error.partial[0]).all()
        assert all(call.result(PATIENCE_S).shape == (40, 8) for call in calls)


def test_a_failing_progress_callback_fails_its_own_call(device: SimulatedDevice) -> None:
    """An exception from a caller's `progress` is raised in that call; those that share its micro-batches are unharmed."""

    def progress(count: int) -> None:
        raise RuntimeError("no terminal")

    with SimulatedEmbedder(device, memory={"reserve": 0}) as embedder:
        watch = Watch(embedder)
        busy = occupy(embedder, watch)
        bad = start(embedder.embed_queries, ["with a bar"], progress=progress)
        good = start(embedder.embed_queries, ["without"])
        wait_until(lambda: pending(embedder) == 4, "both in the queue")
        watch.go()
        with pytest.raises(RuntimeError, match="no terminal"):
            bad.result(PATIENCE_S)
        assert all(call.result(PATIENCE_S).shape == (1, 8) for call in (good, *busy))
        assert any(_taking_part(batch, 2) for batch in watch.batches), "no micro-batch was shared"


# dead workers


@pytest.mark.parametrize("error", [SystemExit(3), RuntimeError("a fault of ours")])
def test_a_worker_that_dies_is_reported_to_every_waiter(
    device: SimulatedDevice, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever escapes from a micro-batch, all its callers get ClosedError that names it, and the next call works."""
    with SimulatedEmbedder(device, memory={"reserve": 0}) as embedder:
        runner = embedder._engine.runners[0]
        run, entered, die = runner.run, threading.Event(), threading.Event()

        def dying(*args: object) -> None:
            entered.set()
            assert die.wait(PATIENCE_S)
            raise error

        runner.run = dying  # type: ignore[method-assign]
        calls = [start(embedder.embed_queries, [f"text {i}"]) for i in range(5)]
        assert entered.wait(PATIENCE_S)
        wait_until(lambda: pending(embedder) <= 4, "the queries in the queue")
        with caplog.at_level(logging.CRITICAL, logger="memsafe"):
            die.set()
            for call in calls:
                failure = call.exception(PATIENCE_S)
                assert isinstance(failure, ClosedError) and type(error).__name__ in str(failure)
        runner.run = run  # type: ignore[method-assign]
        assert embedder.embed_queries(["again"]).shape == (1, 8)


def test_a_fault_while_choosing_is_reported_to_every_waiter(
    device: SimulatedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault before a micro-batch is chosen reaches all who wait for that device, and the next call works."""
    with SimulatedEmbedder(device) as embedder, SimulatedReranker(device) as reranker:
        sizing = embedder._engine.runners[0].tenant.sizing
        propose = sizing.propose

        def broken(*args: object, **options: object) -> None:
            raise ZeroDivisionError("a fault of ours")

        sizing.propose = broken  # type: ignore[method-assign]
        with caplog.at_level(logging.CRITICAL, logger="memsafe"):
            failures = [start(embedder.embed_queries, [f"text {i}"]).exception(PATIENCE_S) for i in range(4)]
        assert all(isinstance(f, ClosedError) and "ZeroDivisionError" in str(f) for f in failures)
        sizing.propose = propose  # type: ignore[method-assign]
        assert embedder.embed_queries(["again"]).shape == (1, 8)
        assert reranker.score("q", ["a", "b"]).shape == (2,)


def test_a_fault_while_choosing_harms_nobody_who_comes_later(device: SimulatedDevice) -> None:
    """The lane that met the fault is slow to tell: a call that comes meanwhile waits on, and is served."""
    with SimulatedEmbedder(device) as embedder:
        sizing, told, go = embedder._engine.runners[0].tenant.sizing, threading.Event(), threading.Event()
        propose = sizing.propose

        def broken(*args: object, **options: object) -> None:
            sizing.propose = lambda *args, **options: None  # type: ignore[method-assign]
            raise ZeroDivisionError("a fault of ours")

        def slow(*args: object, **options: object) -> None:
            told.set()
            assert go.wait(PATIENCE_S)

        sizing.propose = broken  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lanes.log, "error", slow)
            first = start(embedder.embed_queries, ["first"])
            assert told.wait(PATIENCE_S)
            later = start(embedder.embed_queries, ["later"])
            wait_until(lambda: pending(embedder) == 2, "the later call")
            go.set()
            assert isinstance(first.exception(PATIENCE_S), ClosedError)
            sizing.propose = propose  # type: ignore[method-assign]
            assert later.result(PATIENCE_S).shape == (1, 8)


# close()


def test_close_is_prompt_while_others_wait(device: SimulatedDevice) -> None:
    """close() ends after the micro-batches in flight; callers that wait, in whatever stage, get ClosedError, none hangs."""
    embedder = SimulatedEmbedder(device, memory={"max_tokens": 32, "max_pending": 50})
    watch = Watch(embedder)
    watch.hold()
    calls = [start(embedder.embed_documents, texts(40, word=f"c{i}x")) for i in range(6)]  # most are held back
    wait_until(lambda: pending(embedder) >= 50, "a full queue")
    closing = start(embedder.close)
    wait_until(lambda: sum(call.done() for call in calls) >= 5, "errors, before the forward in flight ends")
    watch.go()
    closing.result(PATIENCE_S)
    for call in calls:
        assert isinstance(call.exception(PATIENCE_S), ClosedError)
    with pytest.raises(ClosedError):
        embedder.embed_documents(["later"])
    assert device.snapshot().allocated_bytes == 0


def test_close_while_a_call_is_tokenised_ends_the_call(device: SimulatedDevice) -> None:
    """A call that is still tokenising when the embedder is closed gets ClosedError rather than waiting for ever."""
    embedder = SimulatedEmbedder(device)
    entered, go = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go.wait(PATIENCE_S)

    before_encoding(embedder._engine.model.encoder, hold)
    call = start(embedder.embed_documents, texts(5))
    assert entered.wait(PATIENCE_S)
    embedder.close()
    go.set()
    assert isinstance(call.exception(PATIENCE_S), ClosedError)


def test_close_from_a_hook_does_not_lock_up(device: SimulatedDevice) -> None:
    """A hook may close the embedder from the worker's own thread."""
    embedder = SimulatedEmbedder(device, memory=SMALL, hooks=[lambda event: embedder.close()])
    call = start(embedder.embed_documents, texts(40))
    assert isinstance(call.exception(PATIENCE_S), ClosedError)


def test_one_embedder_closes_while_another_works_on_the_device(device: SimulatedDevice) -> None:
    """Closing one of two models of a device leaves the other's calls alone."""
    staying, leaving = SimulatedEmbedder(device, memory=SMALL), SimulatedEmbedder(device, memory=SMALL)
    with staying:
        calls = [start(staying.embed_documents, texts(60, word=f"c{i}x")) for i in range(3)]
        gone = start(leaving.embed_documents, texts(60))
        leaving.close()
        assert gone.exception(PATIENCE_S) is None or isinstance(gone.exception(), ClosedError)
        assert all(call.result(PATIENCE_S).shape == (60, 8) for call in calls)


# several devices


def test_one_failing_device_is_finished_by_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """When one of two devices is gone, the other finishes the call, rows in order, and serves the next ones."""
    devices = [SimulatedDevice("1GiB"), SimulatedDevice("1GiB")]
    with SimulatedEmbedder(devices, memory=SMALL) as embedder, SimulatedEmbedder(SimulatedDevice("1GiB")) as plain:
        broken = embedder._engine.models[1]
        sound = embedder._engine.models[0]
        good, other = broken.forward, sound.forward
        served: list[int] = []
        gone = threading.Event()

        def failing(batch: MicroBatch, *args: object) -> object:
            served.append(len(batch))
            if len(served) > 2:
                gone.set()
                raise AcceleratorError("CUDA error: unspecified launch failure")
            return good(batch, *args)

        def waiting(*args: Any) -> object:
            assert gone.wait(PATIENCE_S)  # or a busy machine might let this one do it all
            return other(*args)

        broken.forward, sound.forward = failing, waiting
        many = texts(120)
        with caplog.at_level(logging.CRITICAL, logger="memsafe"):
            rows = embedder.embed_documents(many)
        ended = len(served)
        assert 3 <= ended <= 4  # the other lane may have had one in its hands already
        assert np.array_equal(rows, plain.embed_documents(many))
        assert np.array_equal(embedder.embed_queries(["next"]), plain.embed_queries(["next"]))
        assert len(served) == ended


def test_all_devices_failing_is_an_error_and_no_hang(caplog: pytest.LogCaptureFixture) -> None:
    """When every device is gone, even at the same moment, all calls get an error that names it, later ones too."""
    devices = [SimulatedDevice("1GiB"), SimulatedDevice("1GiB")]
    with SimulatedEmbedder(devices, memory=SMALL) as embedder:
        together = threading.Barrier(2)

        def failing(*args: object) -> object:
            try:
                together.wait(2)  # both fail at the same moment
            except threading.BrokenBarrierError:
                time.sleep(0)
            raise AcceleratorError("CUDA error: device-side assert triggered")

        for model in embedder._engine.models:
            model.forward = failing
        with caplog.at_level(logging.CRITICAL, logger="memsafe"):
            calls = [start(embedder.embed_documents, texts(40, word=f"c{i}x")) for i in range(3)]
            for call in calls:
                assert "device-side assert" in str(call.exception(PATIENCE_S))
            later = start(embedder.embed_queries, ["later"]).exception(PATIENCE_S)
        assert "device-side assert" in str(later)
        in_flight = [lanes_of(each).scheduler.in_flight for each in devices]
        wait_until(lambda: not any(in_flight), "nothing in flight")  # a lane may still be leaving when its calls know


def test_garbage_collection_under_any_lock_closes_what_was_dropped() -> None:
    """A collection may drop an embedder in a thread that holds another one's queue, while a lane waits for that queue:
    neither waits for the other, and the dropped one is closed and its memory back."""
    device = SimulatedDevice("1GiB")
    with SimulatedEmbedder(device, memory=SMALL) as other:
        engine, taken = other._engine, device.snapshot().allocated_bytes
        way = engine.way(None, {})
        dropped = [SimulatedEmbedder(device, memory=SMALL)]
        dropped[0].embed_documents(texts(3))

        def collect() -> Any:
            with engine.backlog.lock:
                job = engine.open(1, way=way, urgent=False, max_rows=None)
                engine.announce(job)
                engine.feed(job, ["wakes a lane"], way)
                time.sleep(0.2)  # by now a lane waits for this queue, or looks at the device
                dropped.clear()
            return job

        job = start(collect).result(PATIENCE_S)
        assert job.result(PATIENCE_S).shape == (1, 8)
        wait_until(lambda: device.snapshot().allocated_bytes == taken, "the dropped one's memory is back")
