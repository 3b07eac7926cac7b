"""Whole jobs in containers that are too small for a batch: what others do there, and what ours does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsafe.config import MiB
from tests.hostile.cgroup import Box, Finished, limited

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
JOB = Path(__file__).with_name("program_job.py")
PAIR = Path(__file__).with_name("program_pair.py")
NEIGHBOUR = Path(__file__).with_name("program_neighbour.py")

CONTAINER_BYTES = 800 * MiB
"""Python with torch and sentence-transformers takes about 450 MiB of it, the weights 40; 32 padded texts of 8,192 tokens
would take 2.9 GiB, ten of them 900 MiB, one 90 MiB."""

Record = Callable[[str, Any], None]


def outcome(finished: Finished) -> dict[str, Any]:
    """How a contender ended, ready for the record."""
    told = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    how = "killed by the kernel" if finished.killed else "finished" if finished.returncode == 0 else "raised"
    figures = {"outcome": how, "container_peak_bytes": finished.peak_bytes}
    for line in told:
        figures.update({key: value for key, value in line.items() if key != "contender"})
    if how == "raised":
        figures["error"] = finished.stderr.strip().splitlines()[-1:]
    return figures


def contend(box: Box, name: str, folder: Path, job: str, rows: Path) -> dict[str, Any]:
    return outcome(box.run(JOB, name, str(folder), job, str(rows), timeout_s=170, env=ENV))


DIRECT = {"SentenceTransformer.encode": "sentence_transformers"}
FRAMEWORKS = {
    "llama_index HuggingFaceEmbedding": "llama_index.embeddings.huggingface",
    "langchain HuggingFaceEmbeddings": "langchain_huggingface",
}


@pytest.mark.peers
@pytest.mark.timeout(400)
@pytest.mark.parametrize("others", [DIRECT, DIRECT | FRAMEWORKS], ids=["direct", "frameworks"])
def test_a_job_that_kills_sentence_transformers_finishes_with_equal_rows(
    others: dict[str, str], long_context: Path, tmp_path: Path, record: Record
) -> None:
    """Long and short texts in 800 MiB: SentenceTransformer.encode with its defaults, and LlamaIndex's and LangChain's
    classes on top of it, are killed or raise; ours finishes, and every row is that of a batch of one."""
    results, rows = {}, tmp_path / "rows.npy"
    with limited(CONTAINER_BYTES) as box:
        for name, package in (others | {"memsafe.Embedder": "memsafe"}).items():
            results[name] = (
                "not installed" if not installed(package) else contend(box, name, long_context, "long", rows)
            )
    record("embed long and short texts", {"container_bytes": CONTAINER_BYTES, **results})
    assert results.pop("memsafe.Embedder")["outcome"] == "finished", results
    assert np.abs(np.load(rows) - np.load(long_context / "long.npy")).max() < 1e-5
    assert results["SentenceTransformer.encode"]["outcome"] != "finished"
    assert {result["outcome"] for result in results.values() if isinstance(result, dict)} <= {
        "killed by the kernel",
        "raised",
    }


@pytest.mark.peers
@pytest.mark.timeout(400)
def test_a_job_that_kills_cross_encoder_finishes_with_equal_scores(
    long_context: Path, tmp_path: Path, record: Record
) -> None:
    """The same for reranking: CrossEncoder.predict with its defaults is killed or raises, ours finishes."""
    rows = tmp_path / "scores.npy"
    with limited(CONTAINER_BYTES) as box:
        results = {
            name: contend(box, name, long_context, "pairs", rows)
            for name in ("CrossEncoder.predict", "memsafe.Reranker")
        }
    record("rerank long and short documents", {"container_bytes": CONTAINER_BYTES, **results})
    assert results["memsafe.Reranker"]["outcome"] == "finished", results
    assert np.abs(np.load(rows) - np.load(long_context / "pairs.npy")).max() < 1e-5
    assert results["CrossEncoder.predict"]["outcome"] in ("killed by the kernel", "raised")


def test_a_neighbour_takes_memory_in_the_middle_and_gives_it_back(
    long_context: Path, tmp_path: Path, record: Record
) -> None:
    """Another process in the same container takes 220 MiB when a third is done: the next budgets shrink by about that,
    grow again when it has left, and nothing is killed or lost."""
    with limited(CONTAINER_BYTES) as box:
        beside = box.start(NEIGHBOUR, str(220 * MiB), str(tmp_path), env=ENV)
        done = box.run(PAIR, "neighbour", str(long_context), str(tmp_path), env=ENV).check()
        assert beside.wait(timeout=20) == 0
    told = json.loads(done.stdout.splitlines()[-1])
    budgets, ((take, taken), (give, given)) = told["budgets"], told["marks"]
    record("a neighbour of 220 MiB", {"container_bytes": CONTAINER_BYTES, "peak": done.peak_bytes, **told})
    in_flight = 4  # let in under the old budget, done after the neighbour's answer; the change itself is nobody's
    before, during, after = budgets[:take], budgets[taken + in_flight : give], budgets[given + in_flight :]
    assert max(during) < max(before) - 150 * MiB
    assert max(after) > max(during) + 150 * MiB
    assert np.abs(np.load(tmp_path / "rows.npy") - np.load(long_context / "many.npy")).max() < 1e-5


def test_embedder_and_reranker_share_one_limit(long_context: Path, tmp_path: Path) -> None:
    """Both models of one process work at once in one container: neither is killed, and all numbers are right."""
    with limited(CONTAINER_BYTES) as box:
        box.run(PAIR, "both", str(long_context), str(tmp_path), env=ENV).check()
    assert np.abs(np.load(tmp_path / "rows.npy") - np.load(long_context / "long.npy")).max() < 1e-5
    assert np.abs(np.load(tmp_path / "scores.npy") - np.load(long_context / "pairs.npy")).max() < 1e-5


def installed(package: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
