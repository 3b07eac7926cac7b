"""Sizes of micro-batches on simulated devices: the real scheduling code against the best size that somebody could have picked.

    python -m benchmarks.sizing                                 # every recorded curve, every mix
    python -m benchmarks.sizing CURVE.json --mix heavy --texts 2000 --seed 7 --json

Times are virtual and exact: the same on every machine. A curve's JSON is explained by `benchmarks.simulator.Curve`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from benchmarks.simulator import CURVES, MIXES, Curve, Outcome, learnt_from, load_curve, mix, simulate, texts_for

__all__ = ["Comparison", "compare", "main", "short_run"]

SIZES = tuple(1 << power for power in range(8, 20))
"""Fixed sizes that are compared with, in tokens."""
DEVICE_S = 3.0
"""How much work a run has, in seconds of the device at its best; beyond two the targets hold."""
CLIENTS = 16
"""Callers who ask one question after another, in the mix "queries"."""
LEARNT_SEED = 1000
"""Added to the seed of the run that finds what an earlier one learnt: its noise is another."""


@dataclass(frozen=True)
class Comparison:
    """One curve, mix and seed. Times in virtual seconds, sizes in tokens, peaks in bytes beyond the weights.

    best_tokens: the fastest fixed size; enough_tokens, enough_bytes: the smallest within 5 % of it, and its peak.
    cold: nothing is known; learnt: what the cold run has learnt is. sizes: of the cold run's trials, in order.
    """

    curve: str
    measured: bool
    mix: str
    seed: int
    texts: int
    tokens: int
    best_s: float
    best_tokens: int
    enough_tokens: int
    enough_bytes: int
    cold_s: float
    cold_bytes: int
    learnt_s: float
    learnt_bytes: int
    sizes: tuple[int, ...]
    used_tokens: int
    refused: int
    lost: int

    @property
    def cold(self) -> float:
        return self.cold_s / self.best_s

    @property
    def learnt(self) -> float:
        return self.learnt_s / self.best_s

    @property
    def memory(self) -> float:
        """Peak, cold or learnt, against that of the smallest size within 5 % of the best."""
        return max(self.cold_bytes, self.learnt_bytes) / self.enough_bytes


def compare(curve: Curve, name: str, seed: int, count: int | None = None) -> Comparison:
    """Run a mix of texts cold, with what that learnt, and at every fixed size. count: of texts; None: enough for the targets."""
    lengths = tuple(
        texts_for(curve, name, DEVICE_S, seed) if count is None else mix(name, count, curve.max_length, seed)
    )
    clients = CLIENTS if name == "queries" else 0
    if clients:
        lengths = lengths[:600]
    fixed = fixed_runs(_Hashed(curve), lengths, seed, clients)
    best_tokens, best = min(fixed, key=lambda run: run[1].total_s)
    enough_tokens, enough = next(run for run in fixed if run[1].total_s <= 1.05 * best.total_s)
    cold = simulate(curve, lengths, seed=seed, clients=clients)
    learnt = simulate(curve, lengths, seed=seed + LEARNT_SEED, learnt=learnt_from(cold, curve), clients=clients)
    return Comparison(
        curve.name,
        curve.measured,
        name,
        seed,
        len(lengths),
        sum(lengths),
        best.total_s,
        best_tokens,
        enough_tokens,
        enough.peak_bytes,
        cold.total_s,
        cold.peak_bytes,
        learnt.total_s,
        learnt.peak_bytes,
        tuple(cold.trials),
        round(statistics.median(learnt.sizes)),
        cold.refused + learnt.refused,
        cold.lost + learnt.lost,
    )


def short_run(curve: Curve, lengths: Sequence[int], seed: int) -> float:
    """A run of a few texts while nothing is known, against one plain forward of everything."""
    whole = simulate(curve, lengths, seed=seed, fixed_tokens=sum(lengths)).total_s
    return simulate(curve, lengths, seed=seed).total_s / whole


class _Hashed:
    """A curve as a key."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.curve == other.curve

    def __hash__(self) -> int:
        return hash(self.curve.name)


@lru_cache(maxsize=4)
def fixed_runs(hashed: _Hashed, lengths: tuple[int, ...], seed: int, clients: int) -> list[tuple[int, Outcome]]:
    """(size, outcome) of fixed sizes that fit, smallest first: from the middle on to either side, until two in a row are a fifth
    slower than the best."""
    curve, runs = hashed.curve, {}
    middle = SIZES.index(8192)
    for sizes in (SIZES[middle::-1], SIZES[middle + 1 :]):
        behind = 0
        for size in sizes:
            if runs and 2 * curve.bytes["per_token"] * size > curve.free_bytes:
                break
            runs[size] = simulate(curve, lengths, seed=seed, fixed_tokens=size, clients=clients)
            best_s = min(run.total_s for run in runs.values())
            behind = behind + 1 if runs[size].total_s > 1.2 * best_s else 0
            if behind == 2:
                break
    return sorted(runs.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or JSON. 2 for a file that holds no curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("curves", nargs="*", metavar="CURVE.json", help="default: every recorded and made-up one")
    parser.add_argument("--mix", choices=MIXES, action="append", help="of lengths; default: all")
    parser.add_argument("--texts", type=int, help=f"default: as many as take {DEVICE_S:.0f} s of the device")
    parser.add_argument("--seed", type=int, action="append", help="default: 0; several may be given")
    parser.add_argument("--json", action="store_true", help="one list of objects instead of the table")
    given = parser.parse_args(arguments)
    if given.texts is not None and given.texts < 1:
        parser.error(f"--texts: got {given.texts}; give at least 1")
    try:
        curves = [load_curve(path) for path in given.curves or sorted(CURVES.glob("*.json"))]
    except ValueError as error:
        parser.error(str(error))
    cases = [(curve, name, seed) for curve in curves for name in given.mix or MIXES for seed in given.seed or [0]]
    rows: list[Comparison] = []
    if not given.json:
        print(HEAD)
    for curve, name, seed in cases:
        rows.append(compare(curve, name, seed, given.texts))
        if not given.json:
            print(line(rows[-1]), flush=True)
    if given.json:
        print(json.dumps([{**asdict(row), "cold": row.cold, "learnt": row.learnt} for row in rows], indent=1))
    elif rows:
        print("\n".join(summary(rows)))
    return 0


HEAD = (
    f"{'curve (* made up)':<28} {'mix':<8} {'texts':>7} {'best fixed':>17} {'cold':>6} {'learnt':>6} {'peak':>9} "
    f"{'memory':>6}  sizes tried"
)


def line(row: Comparison) -> str:
    """One comparison; cold and learnt times, and memory, as multiples."""
    tried = " ".join(str(size) for size in dict.fromkeys(row.sizes)) or "none"
    best = f"{row.best_s:.2f} s at {row.best_tokens}"
    return (
        f"{row.curve + ('' if row.measured else '*'):<28} {row.mix:<8} {row.texts:>7} {best:>17} {row.cold:>6.3f} "
        f"{row.learnt:>6.3f} {row.cold_bytes / 2**20:>5.0f} MiB {row.memory:>6.2f}  {tried}"
    )


def summary(rows: Iterable[Comparison]) -> list[str]:
    """Medians and worst cases over all."""
    rows = list(rows)
    figures = {
        "cold": [row.cold for row in rows],
        "learnt": [row.learnt for row in rows],
        "memory": [row.memory for row in rows],
    }
    return ["", *(f"{name}: median {statistics.median(v):.3f}, worst {max(v):.3f}" for name, v in figures.items())]


if __name__ == "__main__":
    raise SystemExit(main())
