"""A model that is on the hub only: config.json and the headers of its weights are asked for, and no weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny_models as models
from tests.models.hub import hub

CODE = """
import json, sys
from memsafe import advise
advice = advise(sys.argv[1], device_memory="1GiB", device="cpu")
print(json.dumps(advice.to_dict()))
"""


def ask(name: str, home: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", CODE, name], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_the_hub_tells_shape_and_size(tmp_path: Path, kind: str) -> None:
    """The weights' bytes are those of the folder; the kind is as saved; nothing but config.json is kept in the cache."""
    save = models.save_embedder if kind == "embedding" else models.save_reranker
    folder = save(tmp_path / "model", "bert", hidden_size=64)
    with hub({"somebody/something": folder}) as (address, _):
        done = ask("somebody/something", tmp_path / "home", address)
    assert done.returncode == 0, done.stderr
    advice = json.loads(done.stdout)
    assert (advice["told_by"], advice["kind"]) == ("hub", kind)
    assert advice["weights_bytes"] == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.02)
    kept = {file.name for file in (tmp_path / "home").rglob("snapshots/*/*")}
    assert kept == {"config.json"}


def test_a_hub_that_cannot_be_asked_costs_seconds_not_minutes(tmp_path: Path) -> None:
    """The table answers for a known model; for any other there is an error."""
    began = time.perf_counter()
    done = ask("BAAI/bge-m3", tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 0 and json.loads(done.stdout)["told_by"] == "table", done.stderr
    assert time.perf_counter() - began < 60
    assert "ModelNotFoundError" in ask("somebody/unheard-of", tmp_path, "http://127.0.0.1:9").stderr
