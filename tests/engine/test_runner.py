"""engine/runner.py and lanes.py on a simulated device: what is started, what errors reach whom, and what is told."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from memsafe import MemoryPolicy
from memsafe.config import FALLBACKS, MiB
from memsafe.events import BudgetChanged, CacheReleased, MicroBatchDone, OutOfMemory
from memsafe.machine.heap import heap
from memsafe.planning.cost import CostModel
from memsafe.testing import SimulatedDevice
from tests.engine.helpers import Bench, lone, reference, texts_of

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
    bench = Bench("256MiB", policy, tokens=int(random.integers(16, 300)), packed=packed, fixed_bytes=MiB // 2)
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


# -- sizes, lanes, memory ------------------------------------------------------------------------------------------


def test_the_first_micro_batches_grow_and_are_within_the_budget() -> None:
    """Nothing is known at first: micro-batches start small, at most double, and none is above what is free."""
    bench = Bench("300MiB", tokens=None, per_token_bytes=64 << 10)
    bench.backlog.queues.announce("more", 1)  # as if more were to come: this is no short run
    rows = bench.run(texts_of(2000, 16))
    tokens = [forward.tokens for forward in bench.device.forwards]
    assert tokens[0] == 256
    assert all(later <= 2.1 * max(tokens[: place + 1]) for place, later in enumerate(tokens[1:]))
    assert {forward.outcome for forward in bench.device.forwards} == {"done"}
    assert all(forward.asked_bytes <= forward.room_bytes for forward in bench.device.forwards)
    assert np.isfinite(rows).all()


def test_what_is_learnt_is_remembered_by_the_lane_that_learnt_it() -> None:
    """The first sizes of an unknown model are kept for another day; what is known is not written again."""
    bench = Bench()
    bench.run(texts_of(8))
    assert len(bench.remembered) == 1 and CostModel.from_json(bench.remembered[0]).num_observations == 1
    bench.run(texts_of(8))
    assert len(bench.remembered) == 1


def test_the_heap_is_tightened_and_trimmed_by_whoever_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that is short of memory: the heap is set, the cache released, the report says how much; rows are equal."""
    device = SimulatedDevice("1GiB", kind="cpu")
    bench = Bench(device=device, memory=MemoryPolicy(wait_s=0, reserve=0, learn=False), known=True)
    done: list[str] = []
    monkeypatch.setattr(heap, "exact", False)
    monkeypatch.setattr(heap, "tighten", lambda: done.append("tighten") or setattr(heap, "exact", True))
    monkeypatch.setattr(heap, "loosen", lambda: done.append("loosen") or setattr(heap, "exact", False))
    release = device.release
    monkeypatch.setattr(device, "release", lambda: done.append("release") or release())
    bench.run(texts_of(8))
    device.release()
    done.clear()
    device.fragment("70MiB")
    device.take("949MiB")  # 75 MiB are left, in the cache nearly all
    job = bench.job(texts_of(64))
    bench.drain()
    assert done[:2] == ["tighten", "release"] and done.count("release") == 1
    assert job.report.build().released_bytes == 70 * MiB
    assert [event.reason for event in bench.told(CacheReleased)] == ["pressure"]
    assert np.array_equal(job.result(0), reference(texts_of(64)))


def test_a_budget_that_grows_back_is_told() -> None:
    """Growth is decided by planning, and reaches hooks and the report of the calls at work."""
    bench = Bench(known=True)
    bench.device.refuse(2)
    job = bench.job(texts_of(120))
    bench.drain()
    report = job.report.build()
    grown = [event for event in bench.told(BudgetChanged) if event.reason == "grow"]
    assert report.grows == len(grown) >= 2 and report.shrinks == 1


def test_a_single_input_that_fails_beside_others_has_the_device_for_itself() -> None:
    """Two lanes: the one whose input fails waits for the other to end, tries again alone, and needs no fallback."""
    policy = MemoryPolicy(wait_s=30, reserve=0, learn=False)
    bench = Bench("150MiB", policy, known=True, tokens=100)
    one, other = bench.job(texts_of(1, 70)), bench.job(texts_of(1, 60))
    first, second = bench.lanes.choose(), bench.lanes.choose()
    assert first is not None and second is not None
    bench.device.refuse(2)
    failing = threading.Thread(target=bench.lanes.perform, args=(first,))
    failing.start()
    failing.join(0.2)
    assert failing.is_alive()  # it waits, and nothing new starts
    bench.job(texts_of(1, 9))
    assert bench.lanes.choose() is None
    bench.lanes.perform(second)
    failing.join(10)
    assert not failing.is_alive()
    assert one.report.build().fallbacks == {} and one.report.build().out_of_memory == 2
    assert np.array_equal(one.result(0), reference(texts_of(1, 70)))
    assert np.array_equal(other.result(0), reference(texts_of(1, 60)))
    assert bench.lanes.choose() is not None
