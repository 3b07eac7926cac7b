"""memsafe.planning.scheduler: what starts, what waits, what is to be done first. No device, no thread, no clock."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsafe.config import GiB, MemoryPolicy, MiB
from memsafe.planning.instructions import Grew, Measured, Remember, Start, TidyFirst
from memsafe.planning.scheduler import Scheduler
from memsafe.planning.sizing import Size
from memsafe.planning.tidying import Tidy
from memsafe.planning.turns import BULK, FAIRNESS, QUERY
from tests.planning.helpers import FixedSizing, World, seen

# -- how many at once ----------------------------------------------------------------------------------------------


def test_two_take_turns_and_a_query_needs_not_wait_for_a_whole_micro_batch() -> None:
    """On an accelerator two are in flight; a query may be the third, nothing the fourth; each end lets one more in."""
    world = World()
    tenant = world.tenant()
    world.add(tenant, [8] * 80)
    first, second = world.next(), world.next()
    assert isinstance(first, Start) and isinstance(second, Start)
    assert (first.busy, second.busy, first.ticket.threads) == (1, 2, None)
    assert world.next() is None
    world.add(tenant, [4] * 20, QUERY, max_rows=1)
    third = world.next()
    assert isinstance(third, Start) and third.busy == 3 and third.ticket.batch.lengths == [4]
    assert world.next() is None
    world.end(second.ticket)
    assert world.start().batch.lengths == [4]
    assert world.next() is None


def test_a_probe_runs_alone() -> None:
    """Where only a forward alone tells what it took: nothing starts beside one, and none starts beside others."""
    world = World("mps")
    tenant = world.tenant(known=False, sizing=FixedSizing(256))
    world.add(tenant, [64] * 40)
    world.add(tenant, [4] * 3, QUERY, max_rows=1)
    query = world.start()
    assert not query.probe  # too small to say anything
    assert world.next() is not None  # the second one
    assert world.next() is not None
    assert world.next() is None  # what is to be measured waits until they are done
    for ticket in list(world.scheduler.in_flight):
        world.end(ticket)
    probe = world.start()
    assert probe.probe and probe.batch.num_tokens == 256
    world.add(tenant, [4], QUERY)
    assert world.next() is None
    world.end(probe)
    assert not world.start().probe


def test_where_peaks_are_counted_nothing_runs_alone() -> None:
    """CUDA counts the peak of every forward: even the very first two run side by side."""
    world = World()
    tenant = world.tenant(known=False, sizing=FixedSizing(256))
    world.add(tenant, [64] * 40)
    assert [world.start().probe for _ in range(2)] == [False, False]


def test_another_division_of_the_cores_waits_for_the_last_one_to_end() -> None:
    """Two lanes of two cores begin only when the four lanes of one core are done; a query does not wait for that."""
    world = World("cpu", 4)
    tenant = world.tenant(sizing=(sizing := FixedSizing(lanes=(4, 1))))
    world.add(tenant, [8] * 200)
    old = [world.start() for _ in range(4)]
    assert {ticket.threads for ticket in old} == {1}
    sizing.lanes = (2, 2)
    for ticket in old[:3]:
        world.end(ticket)
        assert world.next() is None
    world.add(tenant, [4, 4], QUERY, max_rows=1)
    assert world.start().threads == 2
    for ticket in list(world.scheduler.in_flight):
        world.end(ticket)
    assert world.start().threads == 2


def test_the_last_one_alone_has_every_core() -> None:
    """A micro-batch that nobody shares the machine with uses all of it; one of many has its share."""
    world = World("cpu", 4)
    tenant = world.tenant()
    world.add(tenant, [8])
    ticket = world.start()
    assert ticket.threads == 4
    world.end(ticket)
    world.add(tenant, [8] * 16)
    assert [world.start().threads, world.start().threads] == [1, 1]  # the second one is not alone


def test_lanes_are_judged_by_what_began_under_them() -> None:
    """A micro-batch that began under another division of the cores says nothing about the one that is tried now."""
    world = World("cpu", 4)
    tenant = world.tenant(sizing=(sizing := FixedSizing(lanes=(2, 1))))
    world.add(tenant, [8] * 400)
    first, second = world.start(), world.start()
    world.end(first, 1.0)
    assert sizing.judged == []  # it has nothing before it
    third = world.start()
    world.end(second, 1.0)
    assert sizing.judged == [64.0]
    sizing.lanes = (1, 2)
    world.end(third, 1.0)
    assert sizing.judged == [64.0]
    world.end(world.start(), 1.0)
    assert sizing.judged == [64.0, 64.0]


def test_what_waits_for_memory_holds_none() -> None:
    """A paused micro-batch counts neither as busy nor for its bytes; one that needs the device alone keeps all else out."""
    world = World()
    world.seen = seen(150 * MiB)
    tenant = world.tenant()
    world.add(tenant, [8] * 80)
    first = world.start()
    second = world.start()
    assert world.next() is None
    world.scheduler.paused.add(first)
    assert world.start().bound_bytes <= 150 * MiB - second.bound_bytes
    world.scheduler.alone.add(first)
    for ticket in list(world.scheduler.in_flight):
        if ticket is not first:
            world.end(ticket)
    assert world.next() is None
    world.end(first)
    assert not world.scheduler.paused and not world.scheduler.alone
    assert world.next() is not None


# -- memory --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_gets_the_cache_first_and_only_once() -> None:
    """One input that is too large: cached memory goes back once, then it starts marked as not fitting; never a loop.
    The next one's trouble is its own."""
    world = World()
    world.seen = seen(20 * MiB, cached_bytes=10 * MiB)
    tenant = world.tenant()
    world.add(tenant, [64, 63])
    for _ in range(2):
        first = world.next()
        assert isinstance(first, TidyFirst) and first.tidy is Tidy.RELEASE
        world.scheduler.did(first, 0, 0)
        ticket = world.start()
        assert (ticket.fits, len(ticket.batch)) == (False, 1)
        assert ticket.bound_bytes > ticket.budget_bytes
        assert world.next() is None  # what does not fit begins beside nobody
        world.end(ticket)


def test_what_does_not_fit_beside_others_waits_for_them() -> None:
    """While others are in flight no cache is dropped for it: they will give memory back."""
    world = World()
    world.seen = seen(100 * MiB)
    tenant = world.tenant()
    world.add(tenant, [64, 64])
    ticket = world.start()
    assert world.next() is None
    world.end(ticket)
    assert world.start().fits


def test_a_short_heap_is_set_tight_then_trimmed_then_used_as_it_is() -> None:
    """On a CPU a budget that cuts: freed tensors are to leave at once, and what has piled up goes back; each once. The
    ticket tells how much came of it, the next one tells nothing."""
    world = World("cpu")
    tenant = world.tenant(sizing=FixedSizing(lanes=(1, 1)))
    world.seen = seen(GiB, process_bytes=100 * MiB)
    world.add(tenant, [8])
    world.end(world.start())  # from here on growth is counted
    world.seen = seen(60 * MiB, process_bytes=180 * MiB)
    world.add(tenant, [8] * 64)
    asked = []
    while not isinstance(action := world.next(), Start):
        assert isinstance(action, TidyFirst) and len(asked) < 3
        asked.append(action.tidy)
        world.scheduler.did(action, 40 * MiB if action.tidy is Tidy.RELEASE else 0, 140 * MiB)
    assert asked == [Tidy.TIGHTEN, Tidy.RELEASE]
    assert action.ticket.fits and action.ticket.released_bytes == 40 * MiB
    world.end(action.ticket)
    world.seen = seen(60 * MiB, process_bytes=140 * MiB)
    action = world.next()
    assert (
        isinstance(action, TidyFirst) and action.tidy is Tidy.TIGHTEN
    )  # still cut, still not exact: once more for the next one
    world.scheduler.did(action, 0, 140 * MiB)
    assert world.start().released_bytes == 0


def test_in_flight_counts_against_what_is_free() -> None:
    """The bounds of all that runs, of other models too, and the next one's stay within what is free together."""
    world = World()
    world.seen = seen(150 * MiB)
    one, other = world.tenant(), world.tenant()
    world.add(one, [8] * 80)
    world.add(other, [8] * 80)
    first, second = world.start(), world.start()
    assert {world.scheduler.in_flight[first], world.scheduler.in_flight[second]} == {one, other}
    assert first.bound_bytes + second.bound_bytes <= 150 * MiB
    assert second.budget_bytes == 150 * MiB - first.bound_bytes
    assert world.next() is None


def test_few_measurements_are_made_more() -> None:
    """With few sizes measured, micro-batches of other sizes are run, as many as are allowed and no more."""
    world = World(extra_probes=2, counts_peaks=False)
    tenant = world.tenant(known=False)
    world.add(tenant, [8] * 200)
    sizes = []
    while tenant.queues.pending:
        ticket = world.start()
        sizes.append(ticket.batch.num_tokens)
        world.end(ticket)
    assert sizes[:2] == [128, 256] and set(sizes[2:-1]) == {64}


def test_large_sizes_are_tried_by_one_lane_at_a_time() -> None:
    """On a CPU a second micro-batch beside one of a large size on trial has the best size so far: memory is not doubled."""
    world = World("cpu", 2, counts_peaks=True, extra_probes=0)
    tenant = world.tenant()
    sizing = tenant.sizing = _real_sizing(world)
    world.seen = seen(1 << 40)
    world.add(tenant, [16] * 20_000)
    sizes: list[list[Size]] = []
    while not sizing.settled:
        assert len(sizes) < 60, "the search does not end"
        tickets = [world.start(), world.start()]
        sizes.append([ticket.size for ticket in tickets])
        for ticket in tickets:
            tokens = ticket.batch.num_tokens
            world.end(ticket, 300 + tokens)  # what each micro-batch costs beside its tokens
    tried = [[size.tokens for size in pair if size.trial] for pair in sizes]
    assert any(len(pair) == 2 and max(pair) <= 512 for pair in tried), "small ones are tried side by side"
    assert any(max(pair, default=0) > 512 for pair in tried)
    assert all(len(pair) == 1 for pair in tried if max(pair, default=0) > 512)
    assert all(later[0].tokens <= 2.1 * pair[0].tokens for pair, later in pairwise(sizes))


def _real_sizing(world: World) -> Any:
    from memsafe.planning.sizing import Sizing

    return Sizing(world.traits)


def test_trials_take_texts_that_stand_for_all() -> None:
    """A size on trial is filled from the middle of the queue, further on where texts are too long for it; else longest first."""
    world = World()
    tenant = world.tenant(sizing=(sizing := FixedSizing(64)))
    world.add(tenant, [200] * 10 + [20] * 10 + [4] * 100)
    sizing.trial = True
    trial = world.start()
    assert trial.batch.num_tokens == 64 and set(trial.batch.lengths) == {4}
    sizing.trial, sizing.tokens = False, 400
    assert world.start().batch.lengths == [200, 200]


# -- turns ---------------------------------------------------------------------------------------------------------


def test_what_could_not_start_counts_for_nobodys_turn() -> None:
    """Only granted micro-batches of queries bring bulk work's turn nearer, not those that memory held back."""
    world = World()
    tenant = world.tenant()
    world.seen = seen(70 * MiB)
    other = world.tenant()
    world.add(other, [64])
    holding = world.start()
    world.add(tenant, [8] * 4)
    world.add(tenant, [6], QUERY)
    for _ in range(3 * FAIRNESS):
        assert world.next() is None
    world.end(holding)
    assert world.scheduler.in_flight == {} and world.start().batch.lengths == [6]


def test_bulk_keeps_a_fifth_of_the_device() -> None:
    """However many queries wait, after every FAIRNESS of them bulk work has one turn."""
    world = World()
    tenant = world.tenant()
    world.add(tenant, [8] * 64)
    world.add(tenant, [4] * 60, QUERY, max_rows=1)
    kinds = ""
    for _ in range(30):
        ticket = world.start()
        kinds += "b" if ticket.batch.lengths[0] == 8 else "q"
        world.end(ticket)
    assert kinds == ("q" * FAIRNESS + "b") * 6


def test_work_that_must_run_alone_is_not_starved() -> None:
    """Work that cannot begin beside others, among queries without end: the device runs empty for it in time."""
    world = World("mps")
    tenant = world.tenant(known=False, sizing=FixedSizing(256))
    world.add(tenant, [64] * 40)
    world.add(tenant, [4] * 200, QUERY, max_rows=1)
    started = 0
    while True:
        action = world.next()
        if action is None:
            world.end(next(iter(world.scheduler.in_flight)))
            continue
        assert isinstance(action, Start)
        if action.ticket.probe:
            break
        started += 1
        assert started <= FAIRNESS + 2


def test_models_take_turns_by_what_they_have_in_flight() -> None:
    """Of two models with equal work, the one with less in flight is next."""
    world = World()
    one, other = world.tenant(), world.tenant()
    world.add(one, [8] * 80)
    world.add(other, [8] * 80)
    order = []
    tickets = [world.start(), world.start()]
    for _ in range(10):
        order.append(world.scheduler.in_flight[tickets[0]])
        world.end(tickets.pop(0))
        tickets.append(world.start())
    assert order == [one, other] * 5


def test_who_has_left_or_is_broken_is_not_asked() -> None:
    """Nothing starts for a model that was detached, or whose device failed for it; others go on."""
    world = World()
    gone, broken, well = world.tenant(), world.tenant(), world.tenant()
    for tenant in (gone, broken, well):
        world.add(tenant, [8] * 8)
    world.scheduler.detach(gone)
    broken.broken = RuntimeError("device lost")
    ticket = world.start()
    assert world.scheduler.in_flight[ticket] is well
    world.end(ticket)
    assert world.next() is None


def test_sizes_are_asked_for_with_the_rate_at_which_texts_come() -> None:
    """Tokens per second while a call is being tokenised, the first piece apart; not known of one piece, nor of a new run, and
    nothing once all are here."""
    world = World()
    tenant = world.tenant(sizing=(sizing := FixedSizing()))
    for run in range(2):
        tenant.queues.announce(job := object(), 32)
        for _ in range(4):
            world.add(tenant, [8] * 8)
            tenant.queues.arrived(job, 8)
            world.end(world.start(), 0.5)
        inflows = [pending.inflow for pending in sizing.asked[-4:]]
        assert inflows == [0.0, 128.0, 128.0, 0.0], run


# -- what came of it -----------------------------------------------------------------------------------------------


def test_what_ran_is_learnt_and_what_is_worth_it_remembered() -> None:
    """A size that was not known: the cost is worth keeping. One more of the same: it is not."""
    world = World()
    tenant = world.tenant(known=False, sizing=(sizing := FixedSizing()))
    world.add(tenant, [8] * 24)
    told = world.end(world.start(), 0.5)
    assert [type(action) for action in told] == [Remember] and told[0].key == tenant.ledger.cost.key
    assert world.end(world.start(), 0.5) == []
    assert [(sample.tokens, sample.seconds) for sample in sizing.samples] == [(64, 0.5)] * 2
    assert tenant.ledger.cost.num_observations == 2


@pytest.mark.parametrize(("kind", "release", "told"), [("cpu", "pressure", 1), ("cpu", "never", 0), ("cuda", "run", 0)])
def test_what_sizes_took_in_vain_goes_back(kind: str, release: Any, told: int) -> None:
    """When a search ends, a CPU's heap is trimmed unless the policy says never; and the finding is remembered."""
    world = World(kind)
    tenant = world.tenant(policy=MemoryPolicy(release=release, learn=False), sizing=(sizing := FixedSizing()))
    world.add(tenant, [8] * 24)
    sizing.found = True
    actions = world.end(world.start(), 0.5)
    assert actions.count(Tidy.RELEASE) == told
    assert sum(isinstance(action, Remember) for action in actions) == 1


def test_successes_near_the_cap_let_it_grow() -> None:
    """After a refusal the cap grows again, and each growth is told."""
    world = World()
    tenant = world.tenant()
    world.add(tenant, [8] * 200)
    ticket = world.start()
    from memsafe.planning.recovery import Work

    work = Work(ticket.batch, ticket.bound_bytes, ticket.budget_bytes, failures=2)
    actions = world.scheduler.refused(ticket, work, world.seen)
    cap = tenant.ledger.budget.cap_bytes
    assert [action.name for action in actions] == ["shrink", "split"]
    assert cap is not None and actions[0] == type(actions[0])(cap)
    world.scheduler.done(ticket, 1.0)
    told = [action for _ in range(8) for action in world.end(world.start())]
    assert [type(action) for action in told] == [Grew, Grew]
    assert told[1].cap_bytes > told[0].cap_bytes > cap


@pytest.mark.parametrize(("starved", "kept"), [(0.02, 1), (0.5, 0)])
def test_lanes_chosen_while_others_compute_are_not_kept(starved: float, kept: int) -> None:
    """A choice that another process may have spoilt serves this process alone; the next one searches again."""
    world = World("cpu", 2)
    tenant = world.tenant()
    sizing = tenant.sizing = _real_sizing(world)
    sizing._settled = True
    world.seen = seen(1 << 40)
    world.add(tenant, [8] * 200_000)
    remembered: list[Remember] = []
    for _ in range(300):
        while isinstance(action := world.next(), TidyFirst | Start):
            if isinstance(action, TidyFirst):
                world.scheduler.did(action, 0, 0)
        lanes, _ = sizing.lanes
        for ticket in list(world.scheduler.in_flight):
            rate = 100.0 if lanes == 2 else 50.0
            seconds = ticket.batch.num_tokens / rate
            world.now += seconds
            remembered += world.scheduler.done(ticket, world.now, starved * seconds * lanes)
    assert sizing.lane_choice.done and sizing.lanes == (2, 1)
    assert len(remembered) == kept
    assert tenant.ledger.cost.lanes == (2 if kept else None)


# -- recovery ------------------------------------------------------------------------------------------------------


def _work(ticket: Any, **options: Any) -> Any:
    from memsafe.planning.recovery import Work

    return Work(ticket.batch, ticket.bound_bytes, ticket.budget_bytes, **options)


def test_checked_looks_at_what_is_free_beside_the_others() -> None:
    """Bytes of others in flight count, one's own do not; a fallback's bound is its own; paused ones hold nothing."""
    world = World()
    world.seen = seen(140 * MiB)
    tenant = world.tenant()
    world.add(tenant, [8] * 16)
    first, second = world.start(), world.start()
    work = world.scheduler.checked(first, _work(first), world.seen)
    assert (work.bound_bytes, work.refused) == (first.bound_bytes, False)
    assert work.budget_bytes == 140 * MiB - second.bound_bytes
    less = seen(first.bound_bytes + second.bound_bytes - 1)
    assert world.scheduler.checked(first, _work(first), less).refused
    world.scheduler.paused.add(second)
    assert not world.scheduler.checked(first, _work(first), less).refused
    chunked = world.scheduler.checked(first, _work(first, rung="chunk"), less)
    assert chunked.bound_bytes == first.bound_bytes // 2
    assert not world.scheduler.checked(first, _work(first, rung="cpu"), seen(0)).refused


def test_a_cap_does_not_bind_what_has_failed_already() -> None:
    """Inputs on their way through recovery may use all that is free: the cap is for those that have not begun."""
    world = World()
    tenant = world.tenant()
    world.add(tenant, [8] * 80)
    first = world.start()
    tenant.ledger.refuse(40 * MiB, world.seen.snapshot)
    assert not world.scheduler.checked(first, _work(first), world.seen).refused
    world.end(first)
    assert (len(world.start().batch), tenant.ledger.budget.cap_bytes) == (2, 20 * MiB)


def test_one_input_that_failed_beside_others_is_tried_alone_first() -> None:
    """It has not shown that it does not fit: first the device is cleared for it, once; alone it goes the usual way."""
    world = World()
    tenant = world.tenant(policy=MemoryPolicy(wait_s=7, reserve=0, learn=False))
    world.add(tenant, [8], max_rows=1)
    world.add(tenant, [8], max_rows=2)
    first, second = world.start(), world.start()

    def names(**options: Any) -> list[str]:
        return [type(action).__name__ for action in world.scheduler.refused(first, _work(first, **options), world.seen)]

    (clear,) = world.scheduler.refused(first, _work(first, failures=2), world.seen)
    assert type(clear).__name__ == "Clear" and clear.seconds == 7  # type: ignore[attr-defined]
    assert names(refused=True) == ["Clear"]
    assert names(failures=1) == ["ReleaseCache", "Retry"]
    assert names(failures=2, cleared=True) == ["ReleaseCache", "FallBack"]
    world.scheduler.done(second, 1.0)
    assert names(failures=2) == ["ReleaseCache", "FallBack"]


def test_what_was_never_tried_caps_nothing() -> None:
    """A prediction that does not fit splits, but shrinks no budget: nothing has been shown."""
    world = World()
    tenant = world.tenant()
    world.add(tenant, [8] * 8)
    ticket = world.start()
    actions = world.scheduler.refused(ticket, _work(ticket, refused=True), world.seen)
    assert [action.name for action in actions] == ["split"]
    assert tenant.ledger.budget.cap_bytes is None


def test_the_ladder_leaves_out_what_a_model_cannot() -> None:
    """Rungs that the model cannot do (here: half) are never decided."""
    world = World()
    tenant = world.tenant()
    world.add(tenant, [8])
    ticket = world.start()
    rungs: list[str] = []
    while True:
        last = world.scheduler.refused(ticket, _work(ticket, failures=2 + len(rungs), rungs=tuple(rungs)), seen(0))[-1]
        if last.name == "give up":
            break
        rungs.append(last.rung)  # type: ignore[attr-defined]
    assert rungs == ["chunk", "cpu"]


# -- everything together -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(["cuda", "mps", "cpu"]),
    known=st.booleans(),
    models=st.integers(1, 3),
)
def test_whatever_happens_nothing_is_lost_and_nothing_begins_above_what_is_free(
    data: st.DataObject, kind: str, known: bool, models: int
) -> None:
    """Random arrivals, ends, neighbours and refusals: every input runs exactly once, what fits stays within what was free with
    all that is in flight, and the scheduler never stands still with work left and nothing in flight."""
    world = World(kind, 3)
    tenants = [world.tenant(known=known) for _ in range(models)]
    wanted, ran = 0, []
    for _ in range(data.draw(st.integers(5, 60))):
        what = data.draw(st.sampled_from(["add", "next", "next", "end", "memory", "refuse"]))
        if what == "add":
            lengths = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=20))
            priority = data.draw(st.sampled_from([QUERY, BULK]))
            cap = data.draw(st.none() | st.integers(1, 5))
            world.add(data.draw(st.sampled_from(tenants)), lengths, priority, max_rows=cap)
            wanted += len(lengths)
        elif what == "memory":
            world.seen = seen(data.draw(st.integers(0, 400)) * MiB, process_bytes=data.draw(st.integers(1, 400)) * MiB)
        elif what == "end" and world.scheduler.in_flight:
            ran += _finished(world, data.draw(st.integers(0, 5)))
        elif what == "refuse" and world.scheduler.in_flight:
            ticket = next(iter(world.scheduler.in_flight))
            world.scheduler.refused(ticket, _work(ticket, failures=2), world.seen)
        elif what == "next":
            _step(world)
    while world.scheduler.pending or world.scheduler.in_flight:
        if not _step(world):
            assert world.scheduler.in_flight, "it stands still with work left"
            ran += _finished(world, 0)
    assert world.scheduler.idle
    assert len(ran) == wanted == len({id(item) for item in ran})


def _step(world: World) -> bool:
    others = sum(ticket.bound_bytes for ticket in world.scheduler.in_flight)
    for _ in range(4):
        action = world.next()
        if isinstance(action, Start):
            if action.ticket.fits:
                assert action.ticket.bound_bytes <= world.seen.snapshot.free_bytes + _cached(world) - others
            else:
                assert not others
            return True
        if action is None:
            return False
        world.scheduler.did(action, 0, world.seen.process_bytes)
    raise AssertionError("tidying without end")


def _cached(world: World) -> int:
    return world.seen.snapshot.reusable_bytes


def _finished(world: World, place: int) -> list[Any]:
    tickets = list(world.scheduler.in_flight)
    ticket = tickets[place % len(tickets)]
    world.end(ticket, 0.1)
    return list(ticket.batch.items)


def test_a_scheduler_without_models_has_nothing_to_do() -> None:
    """Idle, nothing pending, nothing next."""
    scheduler = Scheduler(World().traits)
    assert scheduler.next(0.0, seen(GiB)) is None
    assert scheduler.idle and not scheduler.pending


def test_a_micro_batch_without_measurements_teaches_nothing() -> None:
    """Nothing measured: no observation, no sample, no action."""
    world = World()
    tenant = world.tenant(known=False, sizing=(sizing := FixedSizing()))
    world.add(tenant, [8] * 8)
    ticket = world.start()
    assert world.scheduler.ran(ticket, ticket.batch, Measured()) == []
    assert not sizing.samples and not tenant.ledger.cost.num_observations


def test_what_the_models_own_code_sees_is_planned_as_it_runs() -> None:
    """A packed model whose own preprocessing must see some texts pads those: their micro-batches are planned padded, and so
    charged for the padding; all others stay packed."""
    world = World()
    tenant = world.tenant()
    for item in world.add(tenant, [32, 2, 2, 2]):
        item.raw = "a text"
    ticket = world.start()
    assert not ticket.batch.packed and ticket.batch.shape.tokens == 64  # two of 32, one of them mostly padding
    world.add(tenant, [8, 8], QUERY)
    assert world.start().batch.packed
