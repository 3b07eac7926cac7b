"""The examples run as they are, from any folder, without a network, and find what they look for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.passages import MODULES, QUESTIONS, load_passages
from tests.tiny_models import save_embedder

ROOT = Path(__file__).resolve().parents[2]
NO_NETWORK = """
import socket
def refuse(self, address, *rest):
    raise OSError(f"an example tried to reach the network: {address!r}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: refuse(None, a)
"""


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python refuses every connection."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", ["quickstart", "llama_index_rag", "langchain_rag", "demo"])
def test_example_runs_offline(example: str, offline: dict[str, str], demo_reranker: str, tmp_path: Path) -> None:
    """Without arguments and without a network, each ends well and ranks the right passage first."""
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    asked = [(question, answer) for question, answer in QUESTIONS.items() if question in lines]
    assert len(asked) == (3 if example == "demo" else 1)
    for question, answer in asked:
        assert answer in lines[lines.index(question) + 1]
    if example in {"demo", "quickstart"}:
        for figure in ("micro-batches", "padding", "budget", "measured", "process peak"):
            assert figure in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="it is killed with SIGKILL")
@pytest.mark.timeout(600)
def test_big_corpus(offline: dict[str, str], tmp_path: Path) -> None:
    """Killed twice, it comes to its end all the same, with every row as it was written and the right text found."""
    model = save_embedder(tmp_path / "model", num_layers=1)
    command = [sys.executable, str(ROOT / "examples" / "big_corpus.py"), "16000", str(model)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**offline, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "killed; " in done.stdout and "finished before" in done.stdout
    assert "16,000 rows" in done.stdout and "problems: none" in done.stdout
    assert done.stdout.count("note-") == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_into_vector_stores(offline: dict[str, str], tmp_path: Path) -> None:
    """Every vector store that is installed finds what the exact search finds, in the same order."""
    command = [sys.executable, str(ROOT / "examples" / "into_vector_stores.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**offline, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [line.split("  ")[-1].strip() for line in done.stdout.splitlines()[1:]]
    assert len(found) == 6 and found[0].startswith("secrets.token_urlsafe")
    assert set(found) <= {found[0], "is not installed"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hybrid_search_runs_offline(offline: dict[str, str], tmp_path: Path) -> None:
    """Dense, sparse and fused: every question is asked each way, and each finds most answers among its first ten."""
    pytest.importorskip("qdrant_client")
    pytest.importorskip("sentence_transformers", minversion="6")
    command = [sys.executable, str(ROOT / "examples" / "hybrid.py")]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(question in lines for question in QUESTIONS)
    gains = dict(part.split() for part in lines[-1].removeprefix("nDCG@10: ").split(", "))
    assert set(gains) == {"dense", "sparse", "fused"} and min(map(float, gains.values())) > 0.6


def test_passages_are_real_and_varied() -> None:
    """A few hundred distinct passages, each question's answer among them, lengths spread over two orders of magnitude."""
    passages = load_passages()
    assert passages == load_passages()
    names = [passage.name for passage in passages]
    lengths = sorted(len(passage.text) for passage in passages)
    assert 200 <= len(names) == len(set(names)) <= 500
    assert len({passage.text for passage in passages}) == len(names)
    assert set(QUESTIONS.values()) <= set(names)
    assert {name.split(".")[0] for name in names} == set(MODULES)
    assert lengths[0] < 50
    assert lengths[len(lengths) // 2] > 150
    assert lengths[-1] > 5000


def test_demo_reranker_ranks_better_than_chance(demo_reranker: str) -> None:
    """The packaged reranker is a real one: over all passages, the right one is nearer the top than chance would put it."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(demo_reranker, device="cpu", max_length=128)
    passages = load_passages()[::32]
    texts = {passage.name: passage.text for passage in passages}
    texts |= {passage.name: passage.text for passage in load_passages() if passage.name in QUESTIONS.values()}
    places = []
    for question, answer in QUESTIONS.items():
        scores = model.predict([(question, text) for text in texts.values()], show_progress_bar=False)
        right = scores[list(texts).index(answer)]
        places.append(float((scores > right).mean()))
    assert sum(places) / len(places) < 0.2
