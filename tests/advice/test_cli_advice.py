"""The two commands, through typer's own runner, on an application of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

typer = pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from memsafe.cli_advice import register  # noqa: E402


@pytest.fixture
def run():
    app = typer.Typer()
    register(app)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_plan_says_and_exits_by_whether_it_fits(run) -> None:
    """0 if it fits, 1 if not; the figures are those of memsafe.advise."""
    fits = run("plan", "BAAI/bge-m3", "--device-memory", "14.58GiB", "--taken", "9GiB", "--dtype", "float16")
    assert fits.exit_code == 0, fits.output
    assert "BAAI/bge-m3 fits." in fits.output and "dies" in fits.output
    none = run("plan", "BAAI/bge-m3", "--device-memory", "1GiB")
    assert none.exit_code == 1 and "does NOT fit" in none.output


def test_plan_as_json_with_texts_of_a_file(run, tmp_path: Path, minilm: str) -> None:
    """One text a line, or JSON Lines; figures for programs."""
    (tmp_path / "a.txt").write_text("one text\n\nanother\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one\\ntext"}\n{"text": "another"}\n')
    for name in ("a.txt", "b.jsonl"):
        done = run(
            "plan", minilm, "--device-memory", "2GiB", "--device", "cpu", "--texts", str(tmp_path / name), "--json"
        )
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["texts"].startswith("2 texts")


def test_plan_refuses_with_one_line(run, tmp_path: Path) -> None:
    """What is wrong, and status 2; no traceback."""
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for words in (
        ("plan", "BAAI/bge-m3", "--device-memory", "much"),
        ("plan", "BAAI/bge-m3", "--device-memory", "2GiB", "--lengths", "mean=3"),
        ("plan", "BAAI/bge-m3", "--device-memory", "2GiB", "--texts", str(tmp_path / "bad.jsonl")),
        ("plan", str(tmp_path / "nowhere"), "--device-memory", "2GiB"),
    ):
        done = run(*words)
        assert done.exit_code == 2 and "Traceback" not in done.output, done.output


def test_doctor_speaks_writes_and_compares(run, tmp_path: Path) -> None:
    """What --json writes is what --compare reads: the same machine has no difference, another version is one that matters."""
    assert "Main memory" in run("doctor").output
    written = run("doctor", "--json")
    file = tmp_path / "here.json"
    file.write_text(written.stdout)
    same = run("doctor", "--compare", str(file))
    assert (same.exit_code, same.output.strip()) == (0, "No difference.")
    other = json.loads(written.stdout)
    other["versions"]["torch"] = "2.6.0"
    file.write_text(json.dumps(other))
    differs = run("doctor", "--compare", str(file), "--json")
    assert differs.exit_code == 1
    assert json.loads(differs.stdout)[0]["where"] == "versions.torch"
    file.write_text("[]")
    assert run("doctor", "--compare", str(file)).exit_code == 2
