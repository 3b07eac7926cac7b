"""engine/recover.py on a simulated device: the sequences after refusals of memory, and what is told of them."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest

from memsafe import InputTooLargeError
from memsafe.config import FALLBACKS, MiB
from memsafe.events import BudgetChanged, CacheReleased, FallbackUsed, OutOfMemory, Waited
from memsafe.planning.recovery import GiveUp
from tests.engine.helpers import Bench, lone, reference, texts_of

# -- several inputs ------------------------------------------------------------------------------------------------


def test_one_refusal_costs_a_release_and_a_retry_of_the_same() -> None:
    """Out of memory once: the cache is released and the same micro-batch runs again; nothing is split or capped."""
    bench = Bench()
    bench.device.refuse(1)
    rows = bench.run(texts_of(8))
    assert bench.forwards == [(8, "out of memory"), (8, "done")]
    assert [event.action for event in bench.told(OutOfMemory)] == ["retry"]
    assert not bench.told(BudgetChanged)
    assert np.array_equal(rows, reference(texts_of(8)))


def test_two_refusals_split_that_micro_batch_only() -> None:
    """Out of memory twice: the budget shrinks and the micro-batch is halved; finished rows stay, others stay whole."""
    bench = Bench()
    bench.device.at(2, lambda: bench.device.refuse(2))
    job = bench.job(texts_of(24))
    bench.drain()
    assert bench.forwards[:5] == [(8, "done"), (8, "out of memory"), (8, "out of memory"), (4, "done"), (4, "done")]
    assert bench.finished[:3] == [8, 4, 4]  # nothing was computed twice
    assert [event.action for event in bench.told(OutOfMemory)] == ["retry", "split"]
    assert [event.reason for event in bench.told(BudgetChanged)][:1] == ["shrink"]
    assert np.array_equal(job.result(0), reference(texts_of(24)))


def test_only_the_half_that_still_fails_is_split_again() -> None:
    """Of two halves one is refused twice more: it alone becomes quarters; the other half runs whole."""
    bench = Bench()
    bench.device.refuse(4)
    rows = bench.run(texts_of(8))
    failed, done = "out of memory", "done"
    assert bench.forwards == [(8, failed), (8, failed), (4, failed), (4, failed), (2, done), (2, done), (4, done)]
    assert np.array_equal(rows, reference(texts_of(8)))


def test_the_budget_shrinks_and_grows_back() -> None:
    """After a failure micro-batches are half as large; after a row of successes they grow, but not to what failed."""
    bench = Bench(known=True)
    bench.device.refuse(2)
    rows = bench.run(texts_of(120))
    sizes = [count for count, outcome in bench.forwards if outcome == "done"]
    reasons = [event.reason for event in bench.told(BudgetChanged)]
    caps = [event.cap_bytes for event in bench.told(BudgetChanged)]
    assert reasons[0] == "shrink" and set(reasons[1:]) == {"grow"}
    assert caps == sorted(caps) and 1.5 * caps[0] < caps[-1] < 2 * caps[0]  # the first one is half of what failed
    assert sizes[0] == 4 and sizes[:-1] == sorted(sizes[:-1]) and sizes[-2] > 5
    assert np.array_equal(rows, reference(texts_of(120)))


def test_the_cap_goes_when_a_neighbour_leaves() -> None:
    """What failed while a neighbour was there says nothing once it has left: micro-batches are whole again at once."""
    bench = Bench("256MiB", known=True)
    bench.device.take("150MiB")
    bench.device.refuse(2)
    job = bench.job(texts_of(64))
    done = 0

    def between() -> None:
        nonlocal done
        if sum(bench.finished) >= 16 and not done:
            done = len(bench.forwards)
            bench.device.give()

    bench.drain(between)
    assert all(count == 4 for count, outcome in bench.forwards[2:done] if outcome == "done")
    assert bench.forwards[done][0] == 8
    assert np.array_equal(job.result(0), reference(texts_of(64)))


def test_fragmentation_costs_one_release() -> None:
    """There is room by all figures, but the allocator cannot use it: release, retry, done; the event says how much."""
    bench = Bench("100MiB", known=True)
    bench.device.fragment("60MiB")
    rows = bench.run(texts_of(8))
    assert bench.forwards == [(8, "out of memory"), (8, "done")]
    assert [(event.released_bytes, event.reason) for event in bench.told(CacheReleased)] == [(60 * MiB, "failure")]
    assert np.array_equal(rows, reference(texts_of(8)))


def test_a_neighbour_that_comes_between_admission_and_start() -> None:
    """Memory is gone in the very moment: the retry is not even tried where the prediction no longer fits."""
    bench = Bench("100MiB", known=True)
    bench.device.at(1, lambda: bench.device.take("60MiB"))
    rows = bench.run(texts_of(8))
    assert bench.forwards == [(8, "out of memory"), (4, "done"), (4, "done")]
    assert not [event for event in bench.told(BudgetChanged) if event.reason == "shrink"]
    assert np.array_equal(rows, reference(texts_of(8)))


@pytest.mark.parametrize("scale", [0.3, 0.1, 0.02])
def test_predictions_far_too_low_are_recovered_from_and_learnt(scale: float) -> None:
    """A cost model that expects a fraction of the truth: failures, then what succeeded teaches it; rows are equal."""
    bench = Bench("30MiB", tokens=4096, prior_scale=scale)
    texts = texts_of(60)
    rows = bench.run(texts)
    outcomes = [outcome for _, outcome in bench.forwards]
    assert "out of memory" in outcomes
    learnt = outcomes.index("done")
    assert outcomes[learnt:].count("out of memory") <= 6  # one size is not enough to know the slope
    assert outcomes[-10:] == ["done"] * 10
    assert np.array_equal(rows, reference(texts))


# -- one input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "rungs"),
    [
        ("105MiB", [None]),
        ("75MiB", [None, None, "chunk"]),
        ("55MiB", [None, None, "chunk", "half"]),
        ("5MiB", [None, None, "chunk", "half", "cpu"]),
    ],
)
def test_the_ladder_of_an_input_that_keeps_failing(
    free: str, rungs: list[str | None], caplog: pytest.LogCaptureFixture
) -> None:
    """One input refused by the device: the same again, then chunk, half, cpu, each once, until one succeeds. The rung
    that was used is an event, a warning with the input's place, and a count."""
    bench = lone(free, 100, FALLBACKS, known=False)
    (text,) = texts_of(1, 100)
    job = bench.job([text])
    with caplog.at_level(logging.WARNING, logger="memsafe"):
        bench.drain()
    assert [forward.rung for forward in bench.device.forwards] == rungs
    assert [forward.outcome for forward in bench.device.forwards] == ["out of memory"] * (len(rungs) - 1) + ["done"]
    tried = [rung for rung in rungs if rung]
    assert [event.rung for event in bench.told(FallbackUsed)] == tried
    assert len(caplog.records) == len(tried)
    assert all(text not in record.getMessage() for record in caplog.records)
    report = job.report.build()
    assert report.fallbacks == dict.fromkeys(tried, 1)
    assert report.out_of_memory == len(rungs) - 1
    np.testing.assert_allclose(job.result(0), reference([text]), atol=1e-3 if "half" in tried else 0)


@pytest.mark.parametrize(
    ("free", "rungs"),
    [("105MiB", [None]), ("75MiB", ["chunk"]), ("55MiB", ["half"]), ("5MiB", ["cpu"])],
)
def test_what_is_known_not_to_fit_is_never_started(free: str, rungs: list[str | None]) -> None:
    """One input whose cost is known: only the first strategy that fits is started, and no memory ever runs out."""
    bench = lone(free, 100, FALLBACKS, known=True)
    job = bench.job(texts_of(1, 100))
    bench.drain()
    assert [(forward.rung, forward.outcome) for forward in bench.device.forwards] == [(rung, "done") for rung in rungs]
    assert job.report.build().fallbacks == {rung: 1 for rung in rungs if rung}
    assert job.report.build().out_of_memory == 0


@pytest.mark.parametrize("known", [True, False])
def test_giving_up_names_the_input_and_keeps_the_rest(known: bool) -> None:
    """The ladder is exhausted: InputTooLargeError has the index, tokens, need, free and remedy; everything else of the
    call is in `partial`, and the next call works."""
    bench = lone("50MiB", 100, ("chunk",), known=known)
    texts = [*texts_of(3, 8), *texts_of(1, 100), *texts_of(3, 9)]
    job = bench.job(texts)
    bench.drain()
    with pytest.raises(InputTooLargeError) as caught:
        job.result(0)
    error = caught.value
    assert (error.index, error.failed, error.num_tokens) == (3, [3], 100)
    assert error.need_bytes > error.free_bytes > 0 or not known
    assert "input 3" in str(error) and "100 tokens" in str(error) and "max_length" in str(error)
    assert "fallback=('chunk', 'half', 'cpu')" in str(error)
    others = [0, 1, 2, 4, 5, 6]
    assert np.array_equal(error.partial[others], reference([texts[i] for i in others]))
    assert np.isnan(error.partial[3]).all()
    assert np.array_equal(bench.run(texts_of(5)), reference(texts_of(5)))


def test_several_that_do_not_fit_are_all_named() -> None:
    """Two inputs that fit nowhere: one error, of the first; `failed` has both, and the others are done."""
    bench = lone("50MiB", 100, (), known=True)
    texts = [*texts_of(2, 8), *texts_of(2, 100), *texts_of(2, 9)]
    job = bench.job(texts)
    bench.drain()
    with pytest.raises(InputTooLargeError) as caught:
        job.result(0)
    assert (caught.value.index, caught.value.failed) == (2, [2, 3])
    assert np.isfinite(caught.value.partial[[0, 1, 4, 5]]).all()


def test_it_waits_for_neighbours_and_goes_on_when_they_leave() -> None:
    """Neighbours hold everything: the input waits, is never started meanwhile, and runs whole when they leave."""
    bench = lone("200MiB", 100, (), known=True, wait_s=5)
    bench.device.take("150MiB")
    bench.tell = lambda event: (  # type: ignore[method-assign]
        bench.events.append(event),
        bench.device.give() if len(bench.told(Waited)) == 3 else None,
    )
    job = bench.job(texts_of(1, 100))
    for item in bench.backlog.queues.view(job.key)[0]:
        item.job.emit = bench.tell
    bench.drain()
    assert job.result(0) is not None
    assert [event.seconds for event in bench.told(Waited)] == pytest.approx([0.05, 0.1, 0.2])
    assert bench.forwards == [(1, "done")]
    report = job.report.build()
    assert report.waited_s == pytest.approx(0.35) and report.retries == 1


def test_waiting_is_bounded() -> None:
    """Neighbours that never leave: waits add up to wait_s, then the ladder goes on, then the error says so."""
    bench = lone("200MiB", 100, (), known=True, wait_s=0.2)
    bench.device.take("150MiB")
    job = bench.job(texts_of(1, 100))
    bench.drain()
    with pytest.raises(InputTooLargeError, match=r"waited 0\.2 s"):
        job.result(0)
    assert job.report.build().waited_s == pytest.approx(0.2)
    assert bench.device.forwards == []


def test_memory_that_comes_free_at_the_last_moment_is_used() -> None:
    """Others give memory back between the refusal and giving up: the input runs, once more only, and is not lost."""
    bench = lone("200MiB", 100, (), known=True, wait_s=0)
    bench.device.take("150MiB")
    decide = bench.runner.tenant.recovery.decide

    def late(failure: Any) -> Any:
        actions = decide(failure)
        if any(isinstance(action, GiveUp) for action in actions):
            bench.device.give()
        return actions

    bench.runner.tenant.recovery.decide = late  # type: ignore[method-assign]
    assert len(bench.run(texts_of(1, 100))) == 1
    assert bench.forwards == [(1, "done")]


def test_an_error_tells_what_decided() -> None:
    """Memory comes free after the decision: the error still names the need and what was free for it then."""
    bench = lone("200MiB", 100, (), known=True, wait_s=0)
    bench.device.take("150MiB")
    give_up = bench.runner._rescue._give_up

    def late(reason: str, work: Any, site: Any) -> None:
        bench.device.give()
        give_up(reason, work, site)

    bench.runner._rescue._give_up = late  # type: ignore[method-assign]
    with pytest.raises(InputTooLargeError) as caught:
        bench.run(texts_of(1, 100))
    assert caught.value.need_bytes >= 100 * MiB > caught.value.free_bytes


def test_an_input_that_failed_needed_more_than_was_free() -> None:
    """Predictions far too low, and a real failure: the need that the error names is above what was free."""
    bench = lone("50MiB", 100, (), known=False)
    with pytest.raises(InputTooLargeError) as caught:
        bench.run(texts_of(1, 100))
    assert caught.value.need_bytes > caught.value.free_bytes


def test_nobody_is_waited_for_who_is_not_there() -> None:
    """An input larger than the whole device fails at once, however long the policy would wait."""
    bench = lone("50MiB", 100, (), known=True, wait_s=60)
    job = bench.job(texts_of(1, 100))
    bench.drain()
    with pytest.raises(InputTooLargeError):
        job.result(0)
    assert not bench.told(Waited)


def test_a_cancelled_job_does_not_keep_the_device_waiting() -> None:
    """Cancelling ends a wait for neighbours within moments."""
    bench = lone("200MiB", 100, (), known=True, wait_s=60)
    bench.device.take("150MiB")
    job = bench.job(texts_of(1, 100))
    thread = threading.Thread(target=bench.drain)
    thread.start()
    job.cancel()
    thread.join(timeout=5)
    assert not thread.is_alive()
