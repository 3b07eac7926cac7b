"""engine/runner.py and rescue.py on a simulated device: what is started, what follows a refusal, and what is told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from memsafe.engine.admission import CPU_KNEE, FAIRNESS, KNEE, Ticket
from memsafe.planning.ramp import LaneChoice

from memsafe import Event, InputTooLargeError, MemoryPolicy
from memsafe.config import FALLBACKS, MiB
from memsafe.engine.jobs import BULK, QUERY, Backlog, Job, QueueKey
from memsafe.engine.lanes import Dispatcher
from memsafe.engine.runner import Executor
from memsafe.events import (
    BudgetChanged,
    CacheReleased,
    FallbackUsed,
    MicroBatchDone,
    OutOfMemory,
    ReportBuilder,
    Waited,
)
from memsafe.machine.heap import heap
from memsafe.planning.batch import BatchShape, MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostModel
from memsafe.planning.recovery import GiveUp
from memsafe.testing import SimulatedDevice, SimulatedModel

NO_WAIT = MemoryPolicy(wait_s=0, reserve=0, learn=False)
KIB = 1024


class Bench:
    """One executor without threads: micro-batches are admitted and run one after another, here.

    A token costs 1 MiB and nothing else costs anything, so that the arithmetic can be done in the head; a micro-batch
    aims at 64 tokens. known: the cost model has seen exact measurements before.
    """

    def __init__(
        self,
        total: str = "1GiB",
        memory: MemoryPolicy = NO_WAIT,
        *,
        target_tokens: int | None = 64,
        known: bool = False,
        device: SimulatedDevice | None = None,
        **model: Any,
    ) -> None:
        self.device = device or SimulatedDevice(total)
        costs = {"fixed_bytes": 0, "per_token_bytes": MiB, "per_sequence_bytes": 0, "weights_bytes": 0}
        self.model = SimulatedModel(self.device, **{**costs, **model})
        cost = CostModel(self.model.cost_key(), self.model.cost_prior())
        cost.target_tokens = target_tokens
        for tokens in (8, 16, 32, 64, 128, 256) if known else ():
            shape = BatchShape.of([tokens], packed=True)
            cost.observe(shape, self.model.num_bytes(shape), self.model.num_bytes(shape))
        total_bytes = self.device.total_bytes
        budget = MemoryBudget(
            limit_bytes=memory.limit_bytes(total_bytes), reserve_bytes=memory.reserve_bytes(total_bytes)
        )
        self.backlog = Backlog()
        self.executor = Executor(self.model, self.device, memory, cost, budget, self.backlog)
        self.events: list[Event] = []
        self.finished: list[int] = []

    def job(self, texts: Sequence[str], priority: int = BULK) -> Job:
        key = QueueKey((priority, None, ()))
        job = Job(len(texts), key, {}, ReportBuilder(), self.finished.append, self.tell)
        encoded = self.model.encoder.encode(texts)
        items = [TokenizedInput(index, one.input_ids, job=job) for index, one in enumerate(encoded)]
        self.backlog.extend(job, sorted(items, key=lambda item: -item.num_tokens))
        return job

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def drain(self, between: Callable[[], object] = lambda: None) -> None:
        while True:
            between()
            ticket = self.executor.admit(0, 0, 1)
            if ticket is None:
                return
            self.executor.run(ticket)

    def run(self, texts: Sequence[str]) -> Any:
        job = self.job(texts)
        self.drain()
        return job.result(0)

    @property
    def forwards(self) -> list[tuple[int, str]]:
        return [(forward.sequences, forward.outcome) for forward in self.device.forwards]

    def told(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def texts_of(count: int, tokens: int = 8) -> list[str]:
    """`count` different texts of `tokens` tokens."""
    return [" ".join([f"w{number}"] * (tokens - 2)) for number in range(count)]


def reference(texts: Sequence[str], **model: Any) -> Any:
    """Rows of `texts`, each computed alone on a device with endless memory."""
    rows = [Bench("1TiB", per_token_bytes=1, **model).run([text]) for text in texts]
    return np.concatenate(rows)


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
    bench = Bench("30MiB", target_tokens=4096, prior_scale=scale)
    texts = texts_of(60)
    rows = bench.run(texts)
    outcomes = [outcome for _, outcome in bench.forwards]
    assert "out of memory" in outcomes
    learnt = outcomes.index("done")
    assert outcomes[learnt:].count("out of memory") <= 6  # one size is not enough to know the slope
    assert outcomes[-10:] == ["done"] * 10
    assert np.array_equal(rows, reference(texts))


# -- admission -----------------------------------------------------------------------------------------------------


def test_neighbours_shrink_and_grow_the_next_micro_batches() -> None:
    """What others take and free in the middle of a run changes the next micro-batch, and nothing ever fails."""
    bench = Bench("100MiB", known=True)
    job = bench.job(texts_of(96))
    free = iter([100, 100, 40, 40, 20, 20, 60, 100])

    def between() -> None:
        bench.device.give()
        bench.device.release()  # what the process itself caches no neighbour can take
        bench.device.take((100 - next(free, 100)) * MiB)

    bench.drain(between)
    assert [count for count, _ in bench.forwards[:8]] == [8, 8, 4, 4, 2, 2, 7, 8]
    assert {outcome for _, outcome in bench.forwards} == {"done"}
    assert np.array_equal(job.result(0), reference(texts_of(96)))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_predicted_above_the_budget_is_ever_started(seed: int) -> None:
    """Random texts, limits, reserves and neighbours: every forward fits into min(limit, free) less the reserve."""
    random = np.random.default_rng(seed)
    limit, reserve = int(random.integers(40, 200)) * MiB, int(random.integers(0, 30)) * MiB
    policy = MemoryPolicy(wait_s=0, limit=limit, reserve=reserve, learn=False, fallback=FALLBACKS)
    packed = bool(random.integers(2))
    bench = Bench("256MiB", policy, target_tokens=int(random.integers(16, 300)), packed=packed, fixed_bytes=MiB // 2)
    texts = [" ".join([f"w{n}"] * int(random.integers(0, 60))) for n in range(150)]
    job = bench.job(texts)

    def between() -> None:
        bench.device.give()
        bench.device.take(int(random.integers(0, 200)) * MiB)

    bench.drain(between)
    assert {forward.outcome for forward in bench.device.forwards} == {"done"}
    for forward in bench.device.forwards:
        assert forward.asked_bytes <= min(limit, forward.room_bytes - reserve) or forward.rung == "cpu"
    for event in bench.told(MicroBatchDone):
        assert event.predicted_bytes <= event.budget_bytes
    rows = job.result(0)
    wanted = reference(texts)
    assert (
        np.allclose(rows, wanted, atol=1e-3)
        if "half" in {f.rung for f in bench.device.forwards}
        else (np.array_equal(rows, wanted))
    )


def test_the_limit_binds_where_more_is_free() -> None:
    """A limit of 20 MiB on an empty device of 1 GiB: micro-batches of two inputs of 8 MiB, with the bound's 1 % to spare."""
    bench = Bench(memory=MemoryPolicy(wait_s=0, limit="20MiB", reserve=0, learn=False), known=True)
    bench.run(texts_of(8))
    assert {count for count, _ in bench.forwards} == {2}


# -- one input -----------------------------------------------------------------------------------------------------


def lone(total: str, tokens: int, fallback: tuple[str, ...], *, known: bool, wait_s: float = 0, **model: Any) -> Bench:
    """A device, and a policy for one input. known: its cost is predicted as it is; else far too low."""
    policy = MemoryPolicy(wait_s=wait_s, reserve=0, learn=False, fallback=fallback)
    return Bench(total, policy, known=known, prior_scale=1.0 if known else 0.02, **model)


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
    for item in bench.backlog.view(job.key)[0]:
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
    decide = bench.executor._rescue._decider.decide

    def late(failure: Any) -> Any:
        actions = decide(failure)
        if any(isinstance(action, GiveUp) for action in actions):
            bench.device.give()
        return actions

    bench.executor._rescue._decider.decide = late  # type: ignore[method-assign]
    assert len(bench.run(texts_of(1, 100))) == 1
    assert bench.forwards == [(1, "done")]


def test_an_error_tells_what_decided() -> None:
    """Memory comes free after the decision: the error still names the need and what was free for it then."""
    bench = lone("200MiB", 100, (), known=True, wait_s=0)
    bench.device.take("150MiB")
    give_up = bench.executor._rescue._give_up

    def late(reason: str, work: Any) -> None:
        bench.device.give()
        give_up(reason, work)

    bench.executor._rescue._give_up = late  # type: ignore[method-assign]
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


# -- other errors --------------------------------------------------------------------------------------------------


def test_an_error_reaches_only_the_job_that_has_it() -> None:
    """Two calls share a micro-batch and one holds an input on which the model fails: that call gets the very error,
    the other its rows."""
    bench = Bench()
    bench.model.fail_on("bad one", error := ValueError("not for memory"))
    good, bad = bench.job(texts_of(3)), bench.job(["bad one", *texts_of(2, 9)])
    bench.drain()
    assert bench.forwards[0] == (6, "error")
    assert np.array_equal(good.result(0), reference(texts_of(3)))
    with pytest.raises(ValueError, match="not for memory") as caught:
        bad.result(0)
    assert caught.value is error
    assert not bench.told(OutOfMemory)
    assert bench.run(texts_of(4)) is not None


def test_an_error_that_only_sounds_like_memory_is_not_swallowed() -> None:
    """ "RuntimeError: memory" is no refusal: it reaches the caller untouched, after one attempt."""
    bench = Bench()
    bench.model.fail_on("bad one", RuntimeError("the memory of my grandmother"))
    job = bench.job(["bad one"])
    bench.drain()
    with pytest.raises(RuntimeError, match="grandmother"):
        job.result(0)
    assert bench.forwards == [(1, "error")]


@pytest.mark.parametrize(
    "message",
    ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory"],
)
def test_every_recorded_wording_starts_the_same_recovery(message: str) -> None:
    """Refusals arrive in many forms (tests/machine/test_refusals.py has them all); the sequence is the same."""
    device = SimulatedDevice("1GiB", out_of_memory=lambda num_bytes: RuntimeError(message))
    bench = Bench(device=device)
    device.refuse(2)
    rows = bench.run(texts_of(8))
    assert bench.forwards == [(8, "out of memory"), (8, "out of memory"), (4, "done"), (4, "done")]
    assert np.array_equal(rows, reference(texts_of(8)))


def test_after_any_error_device_memory_is_back() -> None:
    """Refusals, errors of the model, inputs that fit nowhere: nothing stays allocated on the device."""
    bench = lone("50MiB", 100, ("chunk",), known=False)
    bench.model.fail_on("bad one", ValueError("no"))
    for texts in (["bad one"], texts_of(1, 100), texts_of(9), [*texts_of(4), "bad one", *texts_of(1, 100)]):
        job = bench.job(texts)
        bench.drain()
        assert job.done
        assert bench.device.snapshot().allocated_bytes == 0
    assert bench.backlog.pending == 0


# -- half precision ------------------------------------------------------------------------------------------------


def test_rows_that_overflow_in_half_precision_are_redone_loudly() -> None:
    """NaN rows of a half-precision model: those rows alone are computed again in float32, with an event, one warning
    and a count; the others keep their half-precision numbers."""
    bench = Bench(dtype="float16")
    texts = texts_of(8)
    bench.model.overflow_on(texts[2])
    bench.model.overflow_on(texts[5])
    job = bench.job(texts)
    with pytest.warns(UserWarning, match="2 rows came out of float16 as NaN"):
        bench.drain()
    rows, exact, half = job.result(0), reference(texts), reference(texts, dtype="float16")
    assert rows is not None
    assert np.array_equal(rows[[2, 5]], exact[[2, 5]])
    assert np.array_equal(rows[[0, 1, 3, 4, 6, 7]], half[[0, 1, 3, 4, 6, 7]])
    assert job.report.build().non_finite_rows == 2


def test_float32_rows_are_the_models_own_affair() -> None:
    """A float32 model whose rows are NaN returns them: there is nothing more exact to compute them in."""
    bench = Bench()
    bench.model._rows = lambda batch, dtype: np.full((len(batch), 8), np.nan, np.float32)  # type: ignore[method-assign]
    assert np.isnan(bench.run(texts_of(2))).all()


def test_a_redo_without_memory_is_recovered_like_any_other() -> None:
    """Main memory is short when NaN rows are to be redone: the micro-batch is split and tried again, not lost."""
    bench = Bench(dtype="float16")
    texts = texts_of(8)
    bench.model.overflow_on(texts[3])
    redo, failures = bench.model.redo_in_float32, [MemoryError("main memory")] * 2

    def scarce(batch: Any, extras: Any) -> Any:
        if failures:
            raise failures.pop()
        return redo(batch, extras)

    bench.model.redo_in_float32 = scarce  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="as NaN"):
        rows = bench.run(texts)
    assert np.isfinite(rows).all()
    assert bench.forwards == [(8, "done"), (8, "done"), (4, "done"), (4, "done")]


# -- the search for the best size ----------------------------------------------------------------------------------


def test_what_could_not_start_counts_for_nobodys_turn() -> None:
    """Only granted micro-batches of queries bring bulk work's turn nearer, not those that memory held back."""
    bench = Bench("100MiB", known=True)
    bench.job(texts_of(4))
    bench.job(["what is asked"], QUERY)
    for _ in range(3 * FAIRNESS):
        assert bench.executor.admit(99 * MiB, 1, 2) is None
    ticket = bench.executor.admit(0, 0, 2)
    assert ticket is not None and ticket.batch.items[0].job.key.priority == QUERY


def test_lanes_are_judged_by_what_began_under_them() -> None:
    """A micro-batch that began under another division of the cores says nothing about the one that is tried now."""
    dispatcher, recorded = Dispatcher(SimulatedDevice("1GiB", kind="cpu")), []
    executor = SimpleNamespace(
        lanes=(2, 1),
        backlog=SimpleNamespace(pending=5),
        model=SimpleNamespace(flops=lambda shape: shape.tokens),
        record_lanes=lambda units, seconds, starved: recorded.append(units),
    )
    items = tuple(TokenizedInput(i, np.arange(4, dtype=np.int32)) for i in range(2))
    for running, counts in (((2, 1), 0), ((2, 1), 1), ((1, 2), 1), ((2, 1), 2)):  # the first has nothing before it
        ticket = Ticket(MicroBatch(items, True), 1, 1, probe=False)
        dispatcher._in_flight[ticket], dispatcher._running = executor, running  # type: ignore[assignment]
        dispatcher._done(ticket)
        assert recorded == [8] * counts


@pytest.mark.parametrize(("starved", "kept"), [(0.02, [2]), (0.5, [])])
def test_lanes_chosen_while_others_compute_are_not_kept(starved: float, kept: list[int]) -> None:
    """A choice that another process may have spoilt serves this process alone; the next one searches again."""
    bench = Bench("1GiB", known=True)
    executor, remembered = bench.executor, []
    executor.lane_choice = LaneChoice(2)
    executor._remember = lambda cost: remembered.append(cost.lanes)
    for _ in range(40):
        units = 100.0 if executor.lane_choice.current() == (2, 1) else 50.0
        executor.record_lanes(units, 0.5, 0.5 * 2 * starved)
    assert executor.lane_choice.current() == (2, 1) and executor.lane_choice.done
    assert remembered == kept


def test_few_measurements_are_made_more() -> None:
    """With few sizes measured, micro-batches of other sizes are run, as many as are allowed and no more; rows are equal."""
    bench = Bench()
    bench.executor._extra_probes = 2  # none on an accelerator, where every forward is measured anyway
    texts = texts_of(200)
    rows = bench.run(texts)
    sizes = [forward.tokens for forward in bench.device.forwards]
    assert sizes[:2] == [128, 256] and set(sizes[2:]) == {64}
    assert (rows == reference(texts)).all()


@pytest.mark.parametrize(
    ("growth", "options", "released"),
    [
        (30 * MiB, {}, 0),
        (40 * MiB, {}, 1),
        (40 * MiB, {"per_token_bytes": MiB // 2}, 0),  # two lanes' micro-batches of 64 tokens take 64 MiB
        (70 * MiB, {"per_token_bytes": MiB // 2}, 1),
        (40 * MiB, {"kind": "cuda"}, 0),
        (40 * MiB, {"release": "never"}, 0),
        (40 * MiB, {"exact": True}, 0),
    ],
)
def test_a_heap_that_creeps_is_trimmed(
    growth: int, options: dict[str, Any], released: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the process may grow by what the lanes need, or 32 MiB, before its heap is trimmed; then it is counted anew."""
    memory = MemoryPolicy(wait_s=0, release=options.get("release", "pressure"))
    device = SimulatedDevice("1GiB", kind=options.get("kind", "cpu"))
    per_token = options.get("per_token_bytes", 64 * KIB)
    bench = Bench(device=device, memory=memory, known=True, per_token_bytes=per_token)
    monkeypatch.setattr(heap, "exact", options.get("exact", False))
    monkeypatch.setattr(heap, "loosen", lambda: None)
    size, releases = [500 * MiB], []
    monkeypatch.setattr(device, "process_bytes", lambda: size[0])
    monkeypatch.setattr(device, "release", lambda: releases.append(size[0]) or 0)
    bench.job(texts_of(200))
    assert bench.executor.admit(0, 0, 2) is not None and not releases  # where it begins is no growth
    size[0] += growth
    for _ in range(3):
        assert bench.executor.admit(0, 0, 2) is not None
    assert len(releases) == released
    size[0] += growth
    assert bench.executor.admit(0, 0, 2) is not None
    if released:
        assert releases == [500 * MiB + growth, 500 * MiB + 2 * growth]


def test_large_sizes_are_tried_by_one_lane_at_a_time() -> None:
    """On a CPU a second micro-batch beside one of a large size on trial has the best size so far: memory is not doubled."""
    bench = Bench(device=SimulatedDevice("1GiB", kind="cpu"), target_tokens=None, known=True, per_token_bytes=KIB)
    for tokens in (512, 1024):
        shape = BatchShape.of([tokens], packed=True)
        bench.executor.cost.observe(shape, tokens * KIB, tokens * KIB)
    bench.job(texts_of(2000, 16))
    ramp = bench.executor.ramp
    for size in (256, 256):  # a warm-up, and a measurement
        ramp.record(size, 1.0)
    assert [getattr(bench.executor.admit(0, busy, 2, busy > 0), "size", None) for busy in (0, 1)] == [512, 512]
    ramp.record(512, 1.0)
    first, second = bench.executor.admit(0, 0, 2), bench.executor.admit(0, 1, 2, True)
    assert first is not None and first.size == 1024 and first.batch.shape.tokens > 900
    assert second is not None and second.size is None and 400 < second.batch.shape.tokens <= 512


@pytest.mark.parametrize(("kind", "knee", "used"), [("cuda", None, KNEE), ("cpu", None, CPU_KNEE), ("cpu", 0.0, 0.0)])
def test_which_gain_is_worth_its_memory(kind: str, knee: float | None, used: float) -> None:
    """The policy's knee, or the device's: on a CPU every lane holds a micro-batch, so a doubling must gain more."""
    bench = Bench(device=SimulatedDevice("1GiB", kind=kind), memory=MemoryPolicy(knee=knee), target_tokens=None)
    ramp = bench.executor.ramp
    for _ in range(2):
        ramp.record(256, 1.0)
    ramp.record(512, 2.0 / (1 + used - 0.001))
    assert ramp.best_tokens == 256
    ramp.record(512, 2.0 / (1 + used + 0.001))
    assert ramp.best_tokens == 512


def test_the_first_micro_batches_grow_and_are_within_the_budget() -> None:
    """Nothing is known at first: micro-batches start small, at most double, and none is above what is free."""
    bench = Bench("300MiB", target_tokens=None, per_token_bytes=64 * KIB)
    bench.run(texts_of(2000, 16))
    tokens = [forward.tokens for forward in bench.device.forwards]
    assert tokens[0] == 256
    assert all(later <= 2.1 * max(tokens[: place + 1]) for place, later in enumerate(tokens[1:]))
    assert {forward.outcome for forward in bench.device.forwards} == {"done"}
    assert all(forward.asked_bytes <= forward.room_bytes for forward in bench.device.forwards)
