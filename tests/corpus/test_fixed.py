"""Micro-batches that the texts alone decide: the same cuts and the same bits, whatever else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from memsafe import ConfigError, Embedder, MemoryPolicy
from memsafe.planning.batch import BatchShape, TokenizedInput
from memsafe.planning.sizing import usual_block
from memsafe.planning.tenant import Tenant
from memsafe.planning.traits import Traits
from memsafe.planning.turns import BULK, Fixed, QueueKey, Queues
from memsafe.testing import SimulatedDevice, SimulatedEmbedder
from tests.planning.helpers import FixedSizing, World, seen

TEXTS = [f"t{number} " + "w " * (number * 7 % 40) for number in range(300)]


def cuts(device: SimulatedDevice) -> list[tuple[int, int]]:
    return sorted((forward.sequences, forward.tokens) for forward in device.forwards if forward.outcome == "done")


def of_one_call(
    fixed_tokens: int, before: Callable[[SimulatedEmbedder], object] = lambda embedder: None
) -> tuple[list[tuple[int, int]], int]:
    device = SimulatedDevice()
    with SimulatedEmbedder(device) as embedder:
        before(embedder)
        device.forwards.clear()
        report = embedder.run(TEXTS, fixed_tokens=fixed_tokens).report
    return cuts(device), report.micro_batches


def test_cuts_depend_on_the_texts_alone() -> None:
    """A model that knows nothing and one that has learnt its size cut alike: longest first, as many as fit into the tokens."""
    lengths = sorted((len(text.split()) + 2 for text in TEXTS), reverse=True)
    due, tokens, rows = [], 0, 0
    for length in lengths:
        if rows and tokens + length > 512:
            due.append((rows, tokens))
            tokens = rows = 0
        tokens, rows = tokens + length, rows + 1
    due.append((rows, tokens))
    assert of_one_call(512) == (sorted(due), len(due))
    assert of_one_call(512, lambda embedder: [embedder.embed_documents(TEXTS) for _ in range(5)]) == (
        sorted(due),
        len(due),
    )


def test_no_other_call_is_mixed_in() -> None:
    """Calls with other texts, at the same time, change nothing of what is computed together."""
    alone = of_one_call(512)[0]
    device = SimulatedDevice()
    with SimulatedEmbedder(device) as embedder:
        stopped = threading.Event()

        def others() -> None:
            while not stopped.is_set():
                embedder.embed_documents([f"other {number}" for number in range(50)])

        threads = [threading.Thread(target=others) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            found = [embedder.run(TEXTS, fixed_tokens=512).report for _ in range(5)]
        finally:
            stopped.set()
            for thread in threads:
                thread.join()
    assert {report.micro_batches for report in found} == {len(alone)}
    assert {report.largest_micro_batch_tokens for report in found} == {max(tokens for _, tokens in alone)}


def add(world: World, tenant: Tenant, lengths: list[int], number: int) -> None:
    items = [TokenizedInput(at, None, num_tokens=length, job=number) for at, length in enumerate(lengths)]
    tenant.queues.add(QueueKey((BULK, None, (), Fixed(32, number))), items)


def test_a_micro_batch_waits_for_memory_rather_than_being_cut() -> None:
    """Where two fit one after the other but not at once, the second waits: made smaller, its bits would depend on the first's time."""
    world = World()
    tenant = world.tenant()
    add(world, tenant, [8] * 12, 0)
    room = tenant.ledger.bound(BatchShape.of([8] * 4, packed=True))
    world.seen = seen(2 * room - 1)
    first = world.start()
    assert first.batch.lengths == [8] * 4
    assert world.next() is None
    world.end(first)
    assert world.start().batch.lengths == [8] * 4


def test_cores_do_not_depend_on_who_else_is_there() -> None:
    """On a CPU each runs on one core, the last one too, however many were found best for others and however idle the rest is."""
    world = World("cpu", cores=4)
    tenant = world.tenant(sizing=FixedSizing(lanes=(1, 4)))
    add(world, tenant, [32] * 5, 0)
    tickets = [world.start() for _ in range(4)]
    assert world.next() is None
    for ticket in tickets:
        world.end(ticket)
    tickets.append(world.start())
    assert [ticket.threads for ticket in tickets] == [1] * 5
    assert world.scheduler.most_lanes >= 5


def test_max_pending_lets_all_of_it_in_at_once() -> None:
    """A limit on what waits does not cut the call in two, even if the call alone is larger."""
    due = of_one_call(512)[0]
    device = SimulatedDevice()
    with SimulatedEmbedder(device, memory=MemoryPolicy(max_pending=10)) as embedder:
        embedder.run(TEXTS, fixed_tokens=512)
    assert cuts(device) == due


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "512"])
def test_a_size_is_a_positive_int(value: object) -> None:
    """Anything else is refused, by name."""
    with SimulatedEmbedder(SimulatedDevice()) as embedder, pytest.raises(ConfigError, match="fixed_tokens"):
        embedder.run(["a"], fixed_tokens=value)


def test_of_several_calls_the_first_is_finished_first() -> None:
    """Turns alternate between other queues, not among fixed ones: the next block follows, it does not run beside."""
    queues = Queues()
    keys = [QueueKey((BULK, None, (), Fixed(64, number))) for number in (5, 3, 9)]
    other = QueueKey((BULK, None, ()))
    for key in (*keys, other):
        queues.add(key, [TokenizedInput(at, None, num_tokens=8, job=key) for at in range(4)])
    served = []
    for _ in range(16):
        key = queues.first(BULK)
        served.append(key.fixed.number if key.fixed else None)
        queues.take(key, 0, 1)
    assert [number for number in served if number is not None] == [3] * 4 + [5] * 4 + [9] * 4
    assert served.index(None) <= 1  # and the other queue has its turns meanwhile
    assert [at for at, number in enumerate(served) if number is None] == pytest.approx([1, 3, 5, 7], abs=2)


def test_usual_sizes() -> None:
    """A CPU's is that of its search; an accelerator's what it computes while launching, within bounds and half the room."""
    cpu, cuda = Traits.of("cpu", 8), Traits.of("cuda", 8)
    assert usual_block(cpu, token_flops=1e9, room_tokens=1, max_tokens=None) == (1024, 1024)
    assert usual_block(cpu, token_flops=1e9, room_tokens=1 << 20, max_tokens=100) == (1024, 100)
    assert usual_block(cuda, token_flops=6e8, room_tokens=1 << 30, max_tokens=None) == (8192, 16_666)
    assert usual_block(cuda, token_flops=6e8, room_tokens=10_000, max_tokens=None) == (8192, 4_166)
    assert usual_block(cuda, token_flops=1.0, room_tokens=1 << 30, max_tokens=None) == (8192, 65_536)
    assert usual_block(cuda, token_flops=1e15, room_tokens=1 << 30, max_tokens=None) == (8192, 4096)


@pytest.mark.timeout(300)
def test_the_same_bits_beside_other_work(minilm: str, passages: list[str]) -> None:
    """On a real model rows are equal to the last bit: anew, in another process's place, and beside other calls."""
    texts = [text[:600] for text in passages[:80]]
    found = []
    for _ in range(2):
        with Embedder(minilm, device="cpu", memory=MemoryPolicy(learn=False)) as embedder:
            found.append(embedder.run(texts, fixed_tokens=512).embeddings)
            stopped = threading.Event()

            def others(embedder: Embedder = embedder, stopped: threading.Event = stopped) -> None:
                while not stopped.is_set():
                    embedder.embed_documents(texts[:7])

            thread = threading.Thread(target=others)
            thread.start()
            try:
                found.append(embedder.run(texts, fixed_tokens=512).embeddings)
            finally:
                stopped.set()
                thread.join()
    for rows in found[1:]:
        np.testing.assert_array_equal(rows, found[0])
