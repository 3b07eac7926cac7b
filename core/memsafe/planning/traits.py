"""What differs between devices, as data: nobody else asks what kind of device it is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Traits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How a device behaves, as far as planning needs to know. :meth:`of` gives those of a kind.

    cores: processor cores that the process may keep busy.
    side_by_side: micro-batches compute side by side, each on its share of the cores (a CPU); otherwise they take turns,
        and two are in flight: one computes, the next is launched, or the last one fetched, meanwhile.
    counts_peaks: the peak of every forward is counted at no cost, beside others too; otherwise only of one that runs alone.
    keeps_freed: freed memory stays in the process and counts as used until it is given back (a CPU's heap).
    """

    kind: str
    cores: int = 1
    side_by_side: bool = False
    counts_peaks: bool = True
    keeps_freed: bool = False

    start_tokens: int = 256
    """The first size of a search."""

    knee: float = 0.02
    """A run may lose this fraction of its speed for the sake of memory."""

    searched_tokens: int = 0
    """Sizes up to this are tried whatever smaller ones showed. On a CPU with busy neighbours the gain of a doubling is hard to
    see at small sizes; MiniLM on two cores: 512 to 1,024 tokens gain 6 to 20 %, 1,024 to 2,048 from -6 to +6 %."""

    short_run_tokens: int = 1 << 16
    """While nothing is known, a run of at most so many tokens does not begin small: a hundred documents of 600 tokens."""

    launch_flops: float = 5e12
    """Floating-point operations that the fastest device does while one forward is launched: it begins with so many. An H200
    took 12 ms for 8,192 tokens of bge-m3's shape in bfloat16, and its host 13 ms to launch them."""

    most_rows: int | None = 32768
    """In one micro-batch: CUDA's attention kernels count sequences in a grid dimension of at most 65,535."""

    lone_trials: int | None = None
    """Sizes beyond this are tried by one lane at a time, so that their memory is not taken twice; None: never so."""

    least_probe_tokens: int = 128
    """Smaller micro-batches are not measured alone: they say little of larger ones, and a query should not wait for it."""

    extra_probes: int = 0
    """At most so many micro-batches are run for the measurement of their memory alone, where few sizes were tried: a law
    is then still told from chance (95th percentile of errors 5 % without, under 1 % with, with a mask per pair of tokens)."""

    heap_share: float = 0.0
    """Growth of the process beyond live bytes, as a share of them, that is expected of its heap at least. With glibc's
    0.55 to 0.87 was seen for one input of 8,000 tokens (2 layers x 256), 0.87 to 1.03 in 3 of 320 random micro-batches."""

    @classmethod
    def of(cls, kind: str, cores: int) -> Traits:
        """kind: as torch names it (``"cuda"``, ``"cpu"``, ...)."""
        if kind != "cpu":
            # Only CUDA and XPU count allocations, but all that is not the CPU computes one micro-batch after another.
            return cls(kind=kind, cores=cores, counts_peaks=kind != "mps")
        return cls(
            kind=kind,
            cores=cores,
            side_by_side=True,
            counts_peaks=False,
            keeps_freed=True,
            short_run_tokens=0,
            most_rows=None,
            lone_trials=512,
            extra_probes=2,
            heap_share=1.0,
            searched_tokens=1024,
            knee=0.01,  # sizes are small: 0.028 once settled on 390 to 512 tokens of MiniLM, 6 % slower per core than 1,024
        )
