"""The command line: what it prints, for people and for scripts, its exit codes, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsafe import Embedder, open_store
from tests.corpus.helpers import made_texts
from tests.tiny_models import save_embedder, save_reranker

typer_testing = pytest.importorskip("typer.testing", reason="the command line needs typer and rich")

TEXTS = [f"{text[:80]}" for text in made_texts(200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_embedder(tmp_path_factory.mktemp("cli") / "model", num_layers=1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": f"[{n}]", "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def store(model: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "store"
    assert run("embed", corpus, path, "--model", model, "--device", "cpu").exit_code == 0
    return path


def run(*arguments: Any) -> Any:
    from memsafe.cli import app

    return typer_testing.CliRunner().invoke(app, [str(each) for each in arguments])


def as_json(*arguments: Any, code: int = 0) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_embed_draws_what_happened(model: str, corpus: Path, tmp_path: Path) -> None:
    """--report writes a page with the run's figures; a folder that is not there is said before anything is computed."""
    page, name = tmp_path / "run.html", corpus.name
    done = run("embed", corpus, tmp_path / "store", "--model", model, "--device", "cpu", "--report", page)
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert f"<title>{name} with " in text and "Memory on cpu" in text and "<th>blocks</th>" in text
    missing = run("embed", corpus, tmp_path / "other", "--model", model, "--report", tmp_path / "no" / "run.html")
    assert missing.exit_code == 2 and not (tmp_path / "other").exists()


def test_embed_in_a_terminal(model: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets lines over time and the report in frames; what is piped gets the report's plain lines."""
    command = ("embed", corpus, tmp_path / "store", "--model", model, "--device", "cpu")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard output for a terminal
    seen = run(*command).stdout
    assert "memory, cpu" in seen and "tokens/s" in seen and "200 texts in" in seen and "╭" in seen
    monkeypatch.delenv("FORCE_COLOR")
    piped = run(*command, "--resume").stdout
    assert piped.startswith("store ") and "╭" not in piped


def test_embed(store: Path, model: str, corpus: Path) -> None:
    """The store holds the rows of the embedder, by the ids of the file."""
    opened = open_store(store)
    assert opened.ids[:3] == ["[0]", "[1]", "[2]"] and opened.complete
    with Embedder(model, device="cpu", memory={"learn": False}) as embedder:
        np.testing.assert_allclose(np.asarray(opened.rows), embedder.embed_documents(TEXTS), atol=1e-6)


def test_embed_again(store: Path, model: str, corpus: Path, tmp_path: Path) -> None:
    """What is there is never touched unasked; --resume finds nothing to do, --update what has changed."""
    arguments = ("embed", corpus, store, "--model", model, "--device", "cpu")
    assert "is there already; go on with --resume" in as_json(*arguments, code=4)["error"]["message"]
    report = as_json(*arguments, "--resume")
    assert (report["skipped"], report["computed"], report["complete"]) == (200, 0, True)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text() + '{"id": "new", "text": "one more"}\n')
    copy = tmp_path / "store"
    assert run("embed", corpus, copy, "--model", model, "--device", "cpu").exit_code == 0
    other = ("embed", changed, copy, "--model", model, "--device", "cpu")
    assert "source.bytes" in as_json(*other, "--resume", code=4)["error"]["message"]
    report = as_json(*other, "--update")
    assert (report["reused"], report["computed"], report["texts"]) == (200, 1, 201)


def test_search(store: Path, model: str) -> None:
    """The model is the store's; the nearest come first, with ids as they are."""
    hits = as_json("search", store, TEXTS[17], "-k", 3)["hits"]
    assert (hits[0]["id"], hits[0]["position"], len(hits)) == ("[17]", 17, 3)
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    done = run("search", store, TEXTS[17], "-k", 3)
    assert done.exit_code == 0 and "[17]" in done.stdout


def test_search_with_another_model_is_refused(store: Path, tmp_path: Path) -> None:
    """Its scores would mean nothing."""
    other = save_embedder(tmp_path / "other", num_layers=1, seed=5)
    assert "whose content" in as_json("search", store, "x", "--model", other, code=4)["error"]["message"]


def test_rerank(corpus: Path, tmp_path: Path) -> None:
    """The best documents, by id, best first."""
    reranker = save_reranker(tmp_path / "reranker", num_layers=1)
    hits = as_json("rerank", "a question", corpus, "--model", reranker, "--top", 4, "--device", "cpu")["hits"]
    assert len(hits) == 4 and [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert all(hit["id"] == f"[{hit['position']}]" for hit in hits)


def test_store_commands(store: Path, tmp_path: Path) -> None:
    """info, verify and export, for people and for scripts."""
    assert as_json("store", "info", store)["rows"] == 200
    assert "200" in run("store", "info", store).stdout
    found = as_json("store", "verify", store)
    assert (found["ok"], found["rows"], found["problems"]) == (True, 200, [])
    pytest.importorskip("pyarrow")
    assert as_json("store", "export", store, tmp_path / "a.parquet")["rows"] == 200
    assert (tmp_path / "a.parquet").exists()


def test_damage_has_an_exit_code_of_its_own(store: Path, tmp_path: Path) -> None:
    """So that a nightly job can tell it from a store that is not there."""
    import shutil

    copy = Path(shutil.copytree(store, tmp_path / "store"))
    file = copy / "data-1" / "rows-00000.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = as_json("store", "verify", copy, code=5)
    assert not found["ok"] and "rows-00000.npy" in found["problems"][0]
    done = run("store", "verify", copy)
    assert done.exit_code == 5 and "is damaged" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["store", "info", "{tmp}/none"], 4, "StoreError"),
        (["search", "{tmp}/none", "x"], 4, "StoreError"),
        (["embed", "{tmp}/none.jsonl", "{tmp}/s", "--model", "{model}"], 3, "InputError"),
        (["embed", "{corpus}", "{tmp}/s", "--model", "{tmp}/nowhere"], 2, "ModelNotFoundError"),
        (["embed", "{corpus}", "{tmp}/s", "--model", "{model}", "--limit", "much"], 2, "ConfigError"),
        (["embed", "{corpus}", "{tmp}/s", "--model", "{model}", "--resume", "--update"], 2, "ConfigError"),
        (["embed", "{corpus}", "{tmp}/s", "--model", "{model}", "--limit", "10KiB"], 6, "ModelTooLargeError"),
        (["embed", "{corpus}", "{tmp}/s", "--model", "{model}", "--text", "body"], 3, "InputError"),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_errors(arguments: list[str], code: int, kind: str, tmp_path: Path, model: str, corpus: Path) -> None:
    """One line for people, an object for scripts, an exit code by what is wrong; no traceback."""
    filled = [each.format(tmp=tmp_path, model=model, corpus=corpus) for each in arguments]
    error = as_json(*filled, code=code)["error"]
    assert error["type"] == kind
    done = run(*filled)
    assert done.exit_code == code and "error: " in done.stderr and "Traceback" not in done.output
    assert error["message"][:30].replace("[", "") in done.stderr.replace("[", "")


def test_wrong_usage() -> None:
    """As every program has it: 2."""
    assert run("embed").exit_code == run("nonsense").exit_code == run("store", "info").exit_code == 2


def start(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "memsafe", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_blocks(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if (path / "manifest.jsonl").exists() and (path / "manifest.jsonl").read_bytes().count(b"\n") > count:
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("times", [1, 2])
def test_control_c(times: int, model: str, tmp_path: Path) -> None:
    """Once: the block in progress is finished. Twice: the end is at once. Each says how to go on, and that goes on."""
    corpus, path = tmp_path / "texts.txt", tmp_path / "store"
    corpus.write_text("\n".join(f"text {number} of many that are all about the same" for number in range(30_000)))
    arguments = ("embed", corpus, path, "--model", model, "--device", "cpu", "--block-texts", 64)
    process = start(*arguments)
    wait_for_blocks(path, 2, process)
    process.send_signal(signal.SIGINT)
    if times == 2:
        process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"{path} is not complete; run the same command with --resume to go on" in stderr
    assert "Traceback" not in stderr
    finished = len(open_store(path))
    assert 64 <= finished < 30_000 and finished % 64 == 0
    assert open_store(path).verify().ok
    process = start(*arguments, "--resume", "--json")
    wait_for_blocks(path, finished // 64 + 1, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    report = json.loads(stdout)
    assert (report["skipped"], report["complete"]) == (finished, False) and report["computed"] >= 64


def test_without_typer_it_says_what_to_install(tmp_path: Path) -> None:
    """The command is there without the extra, and names the exact pip command."""
    code = "import sys; sys.modules['typer'] = None; sys.argv = ['memsafe']; import memsafe.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 1 and 'pip install "memsafe[cli]"' in done.stderr and "Traceback" not in done.stderr
