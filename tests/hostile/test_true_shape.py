"""A model as large as it really is, in a container that would not hold it and one batch of others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from memsafe.config import GiB
from tests.hostile.cgroup import limited
from tests.hostile.texts import heavy_tailed, one_by_one
from tests.tiny_models import save_embedder

ROOT = Path(__file__).resolve().parents[2]
JOB = Path(__file__).with_name("program_job.py")
BGE_M3 = {
    "num_layers": 24,
    "hidden_size": 1024,
    "num_heads": 16,
    "intermediate_size": 4096,
    "max_positions": 8192,
    "vocab_size": 250_002,
    "initializer_range": 0.02,
}
"""BAAI/bge-m3's config.json: 568 million parameters, 2.1 GiB in float32; CLS pooling, normalised."""


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_heavy_tailed_texts_through_bge_m3s_shape(tmp_path: Path) -> None:
    """60 texts, most of a few dozen tokens, one of 8,192, in 3.5 GiB, of which the weights are 2.1: it finishes, every row is a
    unit vector of its own, and those of the shorter texts are what a batch of one gives outside."""
    texts = heavy_tailed(60, seed=6)
    save_embedder(tmp_path / "embedder", "xlm_roberta", **BGE_M3, max_length=8192, pooling="cls", normalize=True)
    (tmp_path / "jobs.json").write_text(json.dumps({"long": texts}))
    rows_file = tmp_path / "rows.npy"
    with limited(int(3.5 * GiB)) as box:
        arguments = ("memsafe.Embedder", str(tmp_path), "long", str(rows_file))
        done = box.run(JOB, *arguments, timeout_s=2000, env={**os.environ, "PYTHONPATH": str(ROOT)}).check()
    report = json.loads(done.stdout.splitlines()[0])["report"]
    rows = np.load(rows_file)
    assert rows.shape == (60, 1024) and report["texts"] == 60
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert len(np.unique(rows.round(4), axis=0)) == 60
    shorter = [number for number, text in enumerate(texts) if len(text) < 2000][:12]
    reference = one_by_one(str(tmp_path / "embedder"), [texts[number] for number in shorter])
    np.testing.assert_allclose(rows[shorter], reference, atol=1e-5)
