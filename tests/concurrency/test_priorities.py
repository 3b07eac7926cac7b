"""Queries overtake bulk work between micro-batches, and nothing waits for ever: shown by the order of micro-batches."""

from __future__ import annotations

from memsafe.planning.turns import FAIRNESS, OLDEST, QUERY
from memsafe.testing import SimulatedDevice, SimulatedEmbedder
from tests.concurrency.helpers import PATIENCE_S, Watch, occupy, pending, start, wait_until

SMALL = {"max_tokens": 32, "reserve": 0}
"""Micro-batches of at most 32 tokens: four of the texts below."""


def texts(count: int, *, words: int = 6, word: str = "w") -> list[str]:
    """`count` different texts of `words` + 2 tokens."""
    return [" ".join(f"{word}{i}" for _ in range(words)) for i in range(count)]


def test_a_query_overtakes_bulk_work_that_waits(device: SimulatedDevice) -> None:
    """A query that comes while bulk work waits runs right after the micro-batches in flight, at most two here."""
    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        watch = Watch(embedder)
        watch.hold()
        bulk = start(embedder.embed_documents, texts(80))
        watch.wait_for(1)
        wait_until(lambda: pending(embedder) >= 72, "bulk work in the queue")
        query = start(embedder.embed_queries, ["what is asked"])
        wait_until(lambda: QUERY in _priorities(embedder) or "q" in watch.kinds, "the query in the queue")
        watch.go()
        assert query.result(PATIENCE_S).shape == (1, 8)
        assert watch.kinds.index("q") <= 2
        assert bulk.result(PATIENCE_S).shape == (80, 8)
        assert watch.kinds.count("b") >= 20


def _priorities(embedder: SimulatedEmbedder) -> list[int]:
    with embedder._engine.backlog.lock:
        return embedder._engine.backlog.queues.priorities()


def _queries(embedder: SimulatedEmbedder, count: int, watch: Watch) -> list:
    """Calls of `count` queries, each a micro-batch of its own, all waiting."""
    before = pending(embedder)
    calls = [start(embedder.embed_queries, [f"query {i}"], max_rows=1) for i in range(count)]
    wait_until(lambda: pending(embedder) >= before + count - 3, "the queries in the queue")
    return calls


def _longest_wait(kinds: str) -> int:
    """The most micro-batches of queries in a row while bulk work waited."""
    return max(len(run) for run in kinds[: kinds.rindex("b")].split("b"))


def test_bulk_work_has_its_turn_among_queries(device: SimulatedDevice) -> None:
    """However many queries wait, bulk work gets a turn after every FAIRNESS of them (one more may be in flight)."""
    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        watch = Watch(embedder)
        watch.hold()
        bulk = start(embedder.embed_documents, texts(32))
        watch.wait_for(2)  # both lanes are busy: nothing but queries leaves the queue
        calls = _queries(embedder, 60, watch)
        watch.go()
        for call in (bulk, *calls):
            call.result(PATIENCE_S)
        assert watch.kinds.count("q") == 60
        assert _longest_wait(watch.kinds) <= FAIRNESS + 2, watch.kinds


def test_bulk_work_of_another_model_has_its_turn_among_queries(device: SimulatedDevice) -> None:
    """Fairness holds between models on one device: one model's queries do not starve another model's bulk work."""
    with SimulatedEmbedder(device, memory=SMALL) as asked, SimulatedEmbedder(device, memory=SMALL) as indexing:
        watch = Watch(asked, indexing)
        watch.hold()
        bulk = start(indexing.embed_documents, texts(24))
        watch.wait_for(1)
        calls = _queries(asked, 60, watch)
        watch.go()
        for call in (bulk, *calls):
            call.result(PATIENCE_S)
        assert _longest_wait(watch.kinds) <= 2 * FAIRNESS + 2, watch.kinds


def test_bulk_work_that_must_run_alone_has_its_turn_among_queries() -> None:
    """Bulk work that cannot start beside others (its memory is being measured) is not starved by queries either."""
    device = SimulatedDevice("1GiB", kind="mps")  # which counts no peaks: only a forward alone tells what it took
    with SimulatedEmbedder(device, memory={"reserve": 0}) as embedder:  # no cap on tokens: sizes are still being tried
        watch = Watch(embedder, takes_s=0.001)
        watch.hold()
        first = start(embedder.embed_queries, ["a first query"])
        watch.wait_for(1)
        calls = _queries(embedder, 100, watch)
        bulk = start(embedder.embed_documents, texts(600))
        wait_until(lambda: pending(embedder) >= 600, "bulk work in the queue")
        watch.go()
        for call in (first, bulk, *calls):
            call.result(PATIENCE_S)
        assert _longest_wait(watch.kinds) <= 4 * FAIRNESS, watch.kinds


def test_queues_of_equal_priority_take_turns(device: SimulatedDevice) -> None:
    """Calls that cannot share micro-batches (different row caps) take turns, whoever came first."""
    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        watch = Watch(embedder)
        watch.hold()
        first = start(embedder.embed_documents, texts(60), max_rows=3)
        watch.wait_for(1)
        wait_until(lambda: pending(embedder) >= 54, "the first call in the queue")
        second = start(embedder.embed_documents, texts(6, word="v"), max_rows=2)
        wait_until(lambda: pending(embedder) >= 60, "the second call in the queue")
        watch.go()
        second.result(PATIENCE_S)
        first.result(PATIENCE_S)
        caps = [batch.items[0].job.key.max_rows for batch in watch.granted]
        last = len(caps) - caps[::-1].index(2)
        assert last <= 9, caps  # three micro-batches of the second, in turn with the first's, and two in flight before


def test_short_texts_do_not_wait_for_all_longer_ones(device: SimulatedDevice) -> None:
    """A call with short texts has its turn before a large call with long ones ends, though the longest go first."""
    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        watch = Watch(embedder)
        busy = occupy(embedder, watch)
        early = start(embedder.embed_documents, texts(4, words=2, word="short"))
        wait_until(lambda: pending(embedder) == 6, "the short texts in the queue")
        late = start(embedder.embed_documents, texts(200, words=20))
        wait_until(lambda: pending(embedder) == 206, "the long texts in the queue")
        watch.go()
        for call in (*busy, early, late):
            call.result(PATIENCE_S)
        shapes = [min(item.num_tokens for item in batch.items) for batch in watch.granted[5:]]
        assert shapes.index(4) <= OLDEST + 1, shapes
        assert len(shapes) > 100


def test_replicas_share_one_calls_micro_batches() -> None:
    """Several devices work on one call at the same time, and every row is in its place."""
    devices = [SimulatedDevice("1GiB"), SimulatedDevice("1GiB")]
    many = texts(64)
    with SimulatedEmbedder(devices, memory=SMALL) as embedder, SimulatedEmbedder(SimulatedDevice("1GiB")) as plain:
        watch = Watch(embedder, takes_s=0.002)
        rows = embedder.embed_documents(many)
        assert all(len(each.forwards) >= 4 for each in devices)
        assert watch.most >= 2
        assert (rows == plain.embed_documents(many)).all()
