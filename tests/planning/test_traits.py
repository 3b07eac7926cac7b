"""memsafe.planning.traits: what differs between devices is one table of data."""

from __future__ import annotations

import dataclasses

import pytest

from memsafe.planning.traits import Traits


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "simulated"])
def test_an_accelerator_computes_one_after_another(kind: str) -> None:
    """Micro-batches take turns, nothing stays in a heap, rows fit a launch grid; all but MPS count peaks of every forward."""
    traits = Traits.of(kind, 16)
    assert (traits.kind, traits.cores, traits.side_by_side, traits.keeps_freed) == (kind, 16, False, False)
    assert traits.counts_peaks is (kind != "mps")
    assert traits.most_rows is not None and traits.most_rows < 65_536
    assert (traits.extra_probes, traits.heap_share, traits.searched_tokens, traits.lone_trials) == (0, 0.0, 0, None)
    assert traits.short_run_tokens > 0


def test_a_cpu_computes_side_by_side() -> None:
    """Its heap keeps what was freed, which must be expected and given back; a peak shows only alone."""
    traits = Traits.of("cpu", 4)
    assert (traits.cores, traits.side_by_side, traits.keeps_freed, traits.counts_peaks) == (4, True, True, False)
    assert (traits.heap_share, traits.extra_probes, traits.most_rows) == (1.0, 2, None)
    assert traits.lone_trials == 512 and traits.searched_tokens == 1024
    assert traits.short_run_tokens == 0  # launching costs next to nothing


def test_traits_cannot_be_changed() -> None:
    """They are shared by all that decide."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Traits.of("cpu", 1).cores = 2  # type: ignore[misc]
