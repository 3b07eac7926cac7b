"""memsafe.planning.tidying: when memory goes back and how the heap is set: its whole table."""

from __future__ import annotations

from typing import Any

import pytest

from memsafe.config import GiB, MiB
from memsafe.planning.tidying import CREEP, WORTH_RELEASING, WORTH_WHILE_BUSY, Tidy, Tidying
from memsafe.planning.traits import Traits
from tests.planning.helpers import seen

TIGHTEN, LOOSEN, RELEASE = Tidy.TIGHTEN, Tidy.LOOSEN, Tidy.RELEASE


def before(tidying: Tidying, process_mib: int = 500, *, free_mib: int = 1000, exact: bool = False, **options: Any):
    """What to do before a micro-batch of 4 MiB, bound 8 MiB, one of two, on an idle device."""
    situation: dict[str, Any] = {
        "release": "pressure",
        "refused": False,
        "cut": False,
        "busy": 0,
        "lanes": 2,
        "bound_bytes": 8 * MiB,
        "predicted_bytes": 4 * MiB,
    }
    return tidying.before(
        seen(free_mib * MiB, process_bytes=process_mib * MiB, exact_heap=exact), **(situation | options)
    )


def fresh(kind: str = "cpu") -> Tidying:
    """A device whose process had 500 MiB when it was first looked at."""
    tidying = Tidying(Traits.of(kind, 2))
    assert before(tidying) is None
    return tidying


@pytest.mark.parametrize(
    ("kind", "process_mib", "options", "expected"),
    [
        # nothing is wrong
        ("cpu", 500, {}, None),
        ("cuda", 900, {}, None),
        # what does not fit gets the cache first, but not while others are at work and will give memory back
        ("cuda", 500, {"refused": True, "cut": True}, RELEASE),
        ("cuda", 500, {"refused": True, "cut": True, "busy": 1}, None),
        ("cuda", 500, {"refused": True, "cut": True, "release": "never"}, RELEASE),
        ("cuda", 900, {"cut": True}, None),  # a caching allocator's cache counts as free anyway
        # a heap that is short: first freed tensors leave at once, then what has grown goes back
        ("cpu", 500, {"cut": True}, TIGHTEN),
        ("cpu", 500, {"cut": True, "busy": 1}, TIGHTEN),
        ("cpu", 500, {"cut": True, "exact": True}, None),
        ("cpu", 564, {"cut": True, "exact": True}, None),
        ("cpu", 565, {"cut": True, "exact": True}, RELEASE),
        ("cpu", 565, {"cut": True, "exact": True, "busy": 1}, RELEASE),
        ("cpu", 565, {"cut": True, "exact": True, "release": "never"}, None),
        # a heap that creeps: 32 MiB, or what the lanes need, are let be
        ("cpu", 530, {}, None),
        ("cpu", 533, {}, RELEASE),
        ("cpu", 533, {"busy": 1}, RELEASE),
        ("cpu", 540, {"predicted_bytes": 32 * MiB}, None),  # two lanes' micro-batches take 64 MiB
        ("cpu", 570, {"predicted_bytes": 32 * MiB}, RELEASE),
        ("cpu", 540, {"release": "never"}, None),
        ("cpu", 540, {"exact": True, "free_mib": 60}, None),
        # memory is ample again: eight times what is needed
        ("cpu", 500, {"exact": True, "free_mib": 65}, LOOSEN),
        ("cpu", 500, {"exact": True, "free_mib": 64}, None),
        ("cpu", 500, {"exact": True, "busy": 1}, None),
        ("cuda", 500, {"exact": True}, None),
    ],
)
def test_what_is_done_before_a_micro_batch(
    kind: str, process_mib: int, options: dict[str, Any], expected: Tidy | None
) -> None:
    """The table, row by row."""
    assert before(fresh(kind), process_mib, **options) is expected


def test_what_was_done_in_vain_is_not_done_again_until_something_starts() -> None:
    """Each remedy once for a micro-batch; the next one may need it again."""
    for options, wanted in (
        ({"cut": True}, TIGHTEN),
        ({"refused": True, "cut": True, "exact": True}, RELEASE),
        ({"exact": True}, LOOSEN),
    ):
        tidying = fresh()
        assert before(tidying, **options) is wanted
        tidying.did(wanted, 500 * MiB)
        assert before(tidying, **options) is None
        tidying.started()
        assert before(tidying, **options) is wanted


def test_growth_counts_from_when_memory_last_went_back() -> None:
    """After a release the size that is left is the new beginning; tightening and loosening change nothing of it."""
    tidying = fresh()
    tidying.did(RELEASE, 700 * MiB)
    tidying.started()
    assert before(tidying, 730) is None
    assert before(tidying, 733) is RELEASE
    tidying.did(TIGHTEN, 900 * MiB)
    assert before(tidying, 733) is RELEASE


@pytest.mark.parametrize(
    ("kind", "release", "grown_mib", "busy", "expected"),
    [
        ("cpu", "pressure", 63, False, False),
        ("cpu", "pressure", 64, False, True),
        ("cpu", "pressure", 255, True, False),
        ("cpu", "pressure", 256, True, True),
        ("cpu", "run", 0, False, True),
        ("cpu", "run", 100, True, False),
        ("cpu", "never", 5000, False, False),
        ("cuda", "pressure", 64, False, True),
        ("cuda", "run", 0, False, True),
        ("cuda", "run", 5000, True, False),  # whoever is at work would only fetch it back
        ("cuda", "never", 5000, True, False),
    ],
)
def test_what_goes_back_at_the_end_of_a_run(
    kind: str, release: Any, grown_mib: int, busy: bool, expected: bool
) -> None:
    """Growth worth a page fault, or whatever there is if the policy says so; while others work only a large heap."""
    tidying = fresh(kind)
    end = (500 + grown_mib) * MiB
    assert tidying.after_run(release, 500 * MiB, end, busy=busy) is expected


def test_a_run_is_measured_from_the_lower_of_its_beginning_and_the_last_release() -> None:
    """A run that began while another one's memory was still there gives that back too."""
    tidying = fresh()
    assert tidying.after_run("pressure", 600 * MiB, 570 * MiB, busy=False)
    unknown = Tidying(Traits.of("cuda", 1))  # nothing ever started here
    assert not unknown.after_run("pressure", 600 * MiB, 600 * MiB, busy=False)
    assert unknown.after_run("pressure", 600 * MiB, 664 * MiB, busy=False)


def test_only_a_heap_is_trimmed_after_a_search() -> None:
    """What large sizes left that were tried in vain stays in a CPU's heap; an allocator's cache is of use to any size."""
    assert [Tidying(Traits.of("cpu", 1)).after_search(release) for release in ("pressure", "run", "never")] == [
        True,
        True,
        False,
    ]
    assert not Tidying(Traits.of("cuda", 1)).after_search("run")


def test_the_thresholds_are_in_order() -> None:
    """Creep is let be before a run's growth is worth releasing, and that long before others would be disturbed for it."""
    assert CREEP < WORTH_RELEASING < WORTH_WHILE_BUSY < GiB
