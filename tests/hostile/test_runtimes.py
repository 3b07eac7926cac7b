"""Another runtime in a container that is too small for a batch: its memory is planned like torch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memsafe import Embedder
from memsafe.config import MiB
from tests.hostile.cgroup import limited
from tests.hostile.test_jobs import ENV, JOB, Record, outcome

CONTAINER_BYTES = 1000 * MiB
"""Python with torch, sentence-transformers and OpenVINO takes about 550 MiB of it, and grows by some MiB for each new shape that
OpenVINO meets; one text of 8,192 tokens takes 160 MiB, 32 of them padded would take 5 GiB."""


@pytest.mark.timeout(400)
def test_an_int8_job_finishes_where_encode_over_the_same_export_is_killed(
    long_context: Path, tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short texts in 1000 MiB: sentence-transformers' encode with its default batch size over an OpenVINO int8 export dies;
    ours finishes over the very same export, with the rows of a batch of one."""
    pytest.importorskip("openvino", reason='engine="openvino" is an extra')
    pytest.importorskip("nncf", reason='engine="openvino" is an extra')
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    with Embedder(str(long_context / "embedder"), engine="openvino", dtype="int8") as embedder:  # made outside
        agreed = embedder._engine.model.agreement
    results, rows = {}, tmp_path / "rows.npy"
    env = {**ENV, "MEMSAFE_CACHE_DIR": str(tmp_path / "cache")}
    with limited(CONTAINER_BYTES) as box:
        for name in ("SentenceTransformer.encode, OpenVINO int8", "memsafe.Embedder, OpenVINO int8"):
            results[name] = outcome(box.run(JOB, name, str(long_context), "long", str(rows), timeout_s=170, env=env))
    record("embed long and short texts, OpenVINO int8", {"container_bytes": CONTAINER_BYTES, **results})
    assert results["memsafe.Embedder, OpenVINO int8"]["outcome"] == "finished", results
    assert results["SentenceTransformer.encode, OpenVINO int8"]["outcome"] in ("killed by the kernel", "raised"), (
        results
    )
    found, wanted = np.load(rows), np.load(long_context / "long.npy")
    cosines = np.sum(found * wanted, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert agreed is not None and np.median(cosines) > 0.98
