"""The benchmark harness on tiny input: what it publishes is measured, compared and put into words correctly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as suite
from benchmarks import machine, memory, models, report, stats, texts
from benchmarks.client import Unavailable, Worker, write_inputs
from benchmarks.contenders import EMBED, RERANK, Contender
from benchmarks.outputs import KINDS
from benchmarks.outputs_peers import OUTPUTS
from benchmarks.peers import EMBEDDERS, RERANKERS, create
from benchmarks.speed import Arena, Task, agreement, compare, peaks
from tests.sparse_models import save_late_interaction, save_splade


def test_texts_are_distinct_and_the_same_every_time() -> None:
    """Every mix gives as many different texts as asked for, and the same ones again."""
    for name, mix in texts.MIXES.items():
        drawn = mix(60, 3)
        assert len(drawn) == len(set(drawn)) == 60, name
        assert drawn == mix(60, 3), name
    lengths = [len(text.split()) for text in texts.giant(50, 1, 400)]
    assert sorted(lengths)[-2:] == [12, 400]


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that is ten times slower in one round changes neither side's ratio."""
    found = stats.ratios([3.0, 30.0, 3.3], [2.0, 20.0, 2.0])
    assert (found.median, found.low) == (1.5, 1.5)
    assert found.high == pytest.approx(1.65)
    assert stats.percentile(list(range(1, 101)), 95) == 95
    assert stats.percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="1 rounds against 2"):
        stats.ratios([1.0], [1.0, 2.0])


def test_flops_are_those_of_the_layers(minilm: str) -> None:
    """Six layers of 384 with a feed-forward of 1536: 21.2 million operations a token, 4*h*layers a pair of tokens."""
    linear, attention = models.flops(Path(minilm), [10, 2])
    assert linear == 12 * 6 * 2 * (4 * 384**2 + 2 * 384 * 1536)
    assert attention == 104 * 4 * 384 * 6


def test_agreement_sees_swapped_rows() -> None:
    """Rows in another order are not taken for the same result."""
    rows = np.eye(4, dtype=np.float32)
    assert agreement(rows, rows)["min_cosine"] == pytest.approx(1)
    assert agreement(rows[[1, 0, 2, 3]], rows)["min_cosine"] == pytest.approx(0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_high_water_mark_can_be_reset() -> None:
    """The peak of a block is its own, not that of an earlier, larger one."""
    block: Any = np.ones(8 << 20)
    high = memory.peak_bytes()
    del block
    assert memory.reset_peak()
    after = memory.peak_bytes()
    assert high is not None and after is not None
    assert after < high - (32 << 20)


def test_every_contender_has_a_driver() -> None:
    """No line of the tables names a peer that nobody wrote."""
    assert {c.peer for c in EMBED} == set(EMBEDDERS)
    assert {c.peer for c in RERANK} == set(RERANKERS)
    assert {c.peer for among in KINDS.values() for c in among} == {f"outputs:{name}" for name in OUTPUTS}


def test_rows_of_other_outputs_are_compared(tmp_path: Path) -> None:
    """Words' weights and token vectors come out as rows of numbers: those of ours are the peers', in the same order."""
    given = ["how do I sort a list", "open a file", "sockets and bytes, one after the other"]
    folders = {"sparse": save_splade(tmp_path / "s"), "multi-vector": save_late_interaction(tmp_path / "m")}
    for ours, theirs in (("sparse", "sparse-encoder"), ("multi-vector", "multi-vector-encoder")):
        found = []
        for name in (f"memsafe-{ours}", theirs):
            peer = create(f"outputs:{name}")
            peer.load(folders[ours], {})
            found.append(np.asarray(peer.rows(peer.run(given, {})), dtype=np.float32))
        largest = np.abs(found[1]).max()
        assert agreement(*found)["max_difference"] < 1e-5 * largest, ours
        assert agreement(found[0][::-1], found[1])["max_difference"] > 1e-2 * largest > 0, ours


def test_a_missing_environment_is_a_reason_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that cannot run is listed with what to do about it; the others are unaffected."""
    monkeypatch.setenv("MEMSAFE_BENCH_ENVS", str(tmp_path))
    peer = next(c for c in EMBED if c.environment == "fastembed")
    with Arena((peer,), "minilm", folder=tmp_path, max_length=256) as arena:
        assert not arena.contenders
        assert "python -m benchmarks.environments" in arena.missing[0]["reason"]


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    """An error inside the worker arrives as the reason, and the worker answers the next command."""
    with Worker("roofline", folder=tmp_path) as worker:
        with pytest.raises(Unavailable, match="is not a measurement"):
            worker.call("_rate")
        worker.load("", {"hidden": 32, "inner": 64, "rows": 16})
        rates = worker.call("measure", dtype="float32", seconds=0.05)
    assert rates["best"] == max(rates["intra_op"], rates["side_by_side"]) > 0


@pytest.mark.slow
@pytest.mark.peers
def test_a_comparison_on_tiny_input(tmp_path: Path, minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and sentence-transformers run the same texts in turn, agree, and come out as a table with both in it."""
    monkeypatch.setenv("MEMSAFE_BENCH_MODEL", minilm)
    among = tuple(c for c in EMBED if c.label in ("memsafe", "SentenceTransformer.encode"))
    task = Task("real", "minilm", 256, texts.real(12))
    with Arena(among, "minilm", folder=tmp_path, max_length=256) as arena:
        found = compare(arena, task, folder=tmp_path, rounds=2, budget_s=60, part=4, sweep=(4,))
    assert found["not_run"] == []
    rows = {(row["label"], row["setting"]): row for row in found["rows"]}
    assert set(rows) == {
        ("memsafe", "default"),
        ("SentenceTransformer.encode", "batch 32"),
        ("SentenceTransformer.encode", "batch 4"),
    }
    ours, theirs = rows["memsafe", "default"], rows["SentenceTransformer.encode", "batch 32"]
    assert ours["check"]["max_difference"] < 1e-5
    expected = stats.ratios(theirs["seconds"], ours["seconds"])
    assert theirs["ratio"]["median"] == pytest.approx(expected.median)
    assert 0 < ours["roofline_fraction"]["median"] < 5  # of a rate measured beside whatever else runs here
    result = _result({"speed": {"tasks": [found]}})
    page = report.render(result)
    assert "**memsafe**" in page
    assert "SentenceTransformer.encode, batch 4" in page
    assert json.loads(json.dumps(result)) == result


@pytest.mark.slow
def test_peak_memory_is_of_the_run(tmp_path: Path, minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak beyond loading is there, positive, and less than that beyond what was there before loading."""
    monkeypatch.setenv("MEMSAFE_BENCH_MODEL", minilm)
    ours = Contender("memsafe", "memsafe", ours=True)
    (row,) = peaks(Task("real", "minilm", 256, texts.real(12)), [(ours, {}, "default")], folder=tmp_path)
    if row["peak_beyond_before_load_bytes"] is None:
        pytest.skip("this kernel does not let the high-water mark be reset")
    assert 0 < row["peak_beyond_after_load_bytes"] < row["peak_beyond_before_load_bytes"]


def _result(sections: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "mode": "full", "machine": machine.describe(), "sections": sections, "failed": {}}


def test_readme_part_is_replaced_between_its_markers(tmp_path: Path) -> None:
    """Only what is between the markers changes, twice gives the same, and a page without them is refused."""
    page = f"# A\n\n{report.BEGIN}\nold\n{report.END}\n\nend\n"
    once = report.inject(page, "new\n")
    assert once == f"# A\n\n{report.BEGIN}\nnew\n{report.END}\n\nend\n"
    assert report.inject(once, "new\n") == once
    with pytest.raises(ValueError, match="needs one"):
        report.inject("# A\n", "new")


def test_the_newest_full_result_is_chosen(tmp_path: Path) -> None:
    """Quick and partial runs never become the published figures."""
    for name, mode, date in (("a", "full", "2025-01-01"), ("b", "full", "2025-02-01"), ("c", "quick", "2025-03-01")):
        result = _result({}) | {"mode": mode}
        result["machine"]["date"] = date
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    assert report.newest(tmp_path) == tmp_path / "b.json"
    assert report.newest(tmp_path, mode="part") is None


def test_losing_is_shown() -> None:
    """A peer that is faster than ours is marked as such, in the full table and in README's."""
    spread = {"median": 0.8, "low": 0.7, "high": 0.9, "count": 3}
    one = {"median": 5.0, "low": 5.0, "high": 5.0, "count": 3}
    row = {"label": "peer", "setting": "default", "ours": False, "ratio": spread, "tokens_per_s": one}
    row |= {"roofline_fraction": one}
    found = {
        "task": "t", "model": "m", "kind": "embed", "inputs": 1, "tokens": 1, "rounds": 3, "rows": [row], "sweep": [],
        "length": {"median": 1, "p95": 1, "max": 1}, "roofline": {}, "not_run": [], "first_run": {"inputs": 1, "seconds": {}},
        "linear_flop_per_token": 1.0, "attention_flop_per_token": 0.1,
    }  # fmt: skip
    assert "0.80 [0.70-0.90] (ours is slower)" in report.render(_result({"speed": {"tasks": [found]}}))
    part = report.summary(_result({"speed": {"tasks": [found]}, "rerank": {"tasks": [found]}}), "results/x.md")
    assert part.count("0.80 [0.70-0.90] (ours is slower)") == 2
    assert "[results/x.md](results/x.md)" in part
    rows = [{"label": "peer", "setting": "default", "peak_beyond_before_load_bytes": size << 20} for size in (7, 9)]
    tasks = {"t, m": [rows[0]], "other, n": [rows[1]]}
    part = report.summary(_result({"speed": {"tasks": [found]}, "memory": {"tasks": tasks}}), "results/x.md")
    assert "7 MiB" in part and "9 MiB" not in part, "memory is that of the same texts and model"


def test_every_section_has_a_table() -> None:
    """What the suite measures, the page shows."""
    from benchmarks.tables import SECTIONS

    assert set(suite.SECTIONS) == set(SECTIONS)
    assert set(suite.QUICK) <= set(suite.SECTIONS)


def test_the_command_refuses_unknown_sections(capsys: pytest.CaptureFixture[str]) -> None:
    """A typo is told before minutes are spent."""
    with pytest.raises(SystemExit):
        suite.main(["--sections", "sped"])
    assert "no section is called 'sped'" in capsys.readouterr().err


def test_inputs_survive_the_way_to_a_worker(tmp_path: Path) -> None:
    """Texts in any script arrive as they were."""
    path = write_inputs(tmp_path / "t.json", ["grüße", "你好", "a\nb"])
    assert json.loads(path.read_text(encoding="utf-8")) == ["grüße", "你好", "a\nb"]


def test_tokenising_alone_is_measured() -> None:
    """Every kind of text on one core, before and now, beside a busy thread too: rates of the way that is there today."""
    command = [sys.executable, "-m", "benchmarks.feeding", "1", "40", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 8 and all(row["ratio"]["now"] > 0 for row in rows)
