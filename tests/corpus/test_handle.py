"""Embedding where the data is: in ``datasets.map``, in other processes, in Ray's actors."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsafe import ConfigError, EmbedBatches, Embedder, InputError, MemoryPolicy, PerProcess, embed_ray_dataset
from tests.corpus.helpers import in_child, made_texts, needs_fork
from tests.tiny_models import save_embedder

TEXTS = [text[:60] for text in made_texts(40)]
POLICY = MemoryPolicy(learn=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_embedder(tmp_path_factory.mktemp("handle") / "model", num_layers=1))


@pytest.fixture(scope="module")
def rows(model: str) -> Any:
    with Embedder(model, device="cpu", memory=POLICY) as embedder:
        return embedder.embed_documents(TEXTS)


@pytest.mark.parametrize("kind", [list, np.array, lambda texts: np.array(texts, dtype=object)])
def test_a_batch_of_columns(kind: Any, model: str, rows: Any) -> None:
    """The others stay as they are; rows come in their order, float32."""
    batch = {"id": np.arange(40), "text": kind(TEXTS)}
    found = EmbedBatches(model, device="cpu", memory=POLICY)(batch)
    assert list(found) == ["id", "text", "embedding"] and found["id"] is batch["id"]
    assert found["embedding"].dtype == np.float32
    np.testing.assert_allclose(found["embedding"], rows, atol=1e-6)
    renamed = EmbedBatches(
        model, device="cpu", memory=POLICY, text="body", output="row", keep_text=False, call={"normalize": True}
    )
    found = renamed({"id": [1], "body": TEXTS[:1]})
    assert list(found) == ["id", "row"] and np.linalg.norm(found["row"]) == pytest.approx(1, abs=1e-5)


def test_it_travels_as_settings(model: str, rows: Any) -> None:
    """A pickle holds no weights; in another process it loads its own, once for all callables that want the same."""
    handle = EmbedBatches(model, device="cpu", memory=POLICY)
    assert handle.embedder is pickle.loads(pickle.dumps(handle)).embedder
    assert len(pickle.dumps(handle)) < 2000
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(handle, {"text": TEXTS}).result()
    np.testing.assert_allclose(found["embedding"], rows, atol=1e-6)


@needs_fork
def test_a_child_forked_while_the_model_loads() -> None:
    """It makes its own, and never waits for the parent's lock, whose holder it lacks."""
    shared: PerProcess[int] = PerProcess()
    begun, go_on = threading.Event(), threading.Event()
    loading = threading.Thread(target=lambda: shared.get(lambda: (begun.set(), go_on.wait(), os.getpid())[2]))
    loading.start()
    begun.wait()

    def work() -> None:
        assert shared.get(os.getpid) == os.getpid()

    assert in_child(work, kill_after_s=20) == 0
    go_on.set()
    loading.join()
    assert shared.loaded and shared.get(lambda: -1) == os.getpid()


def test_datasets_map(model: str, rows: Any) -> None:
    """As a function of batches for Hugging Face's datasets."""
    dataset = pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS})
    found = dataset.map(EmbedBatches(model, device="cpu", memory=POLICY), batched=True, batch_size=16)
    np.testing.assert_allclose(np.array(found["embedding"]), rows, atol=1e-6)


def test_what_is_refused(model: str) -> None:
    """A loaded model, a column that is not there, an entry that is no text."""
    with pytest.raises(ConfigError, match="model: got a object"):
        EmbedBatches(object())  # type: ignore[arg-type]
    handle = EmbedBatches(model, device="cpu", memory=POLICY)
    with pytest.raises(InputError, match="no column 'text' but 'body'; name the right one"):
        handle({"body": []})
    with pytest.raises(InputError, match="input 1 is a NoneType"):
        handle({"text": ["a", None]})


WORKER = """
import os
from memsafe import EmbedBatches

class DiesOnce(EmbedBatches):
    def __call__(self, batch):
        found = super().__call__(batch)
        try:
            os.close(os.open(os.environ["MARKER"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return found
        os._exit(1)  # in the middle of its work, as if it were killed
"""
RAY = """
import json, os, sys
import ray
from memsafe import MemoryPolicy, embed_ray_dataset
from worker import DiesOnce
import memsafe.handle

model, out = sys.argv[1:]
memsafe.handle.EmbedBatches = DiesOnce
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
texts = [{"id": number, "text": f"text {number}"} for number in range(200)]
embed_ray_dataset(
    ray.data.from_items(texts, override_num_blocks=8), out, model, workers=2, batch_texts=25, device="cpu",
    memory=MemoryPolicy(learn=False, limit="1GiB"),
)
rows = ray.data.read_parquet(out).take_all()
print(json.dumps([sorted(row["id"] for row in rows), len(rows[0]["embedding"]), os.path.exists(os.environ["MARKER"])]))
"""


@pytest.mark.timeout(900)
def test_a_ray_worker_that_dies(model: str, tmp_path: Path) -> None:
    """Two actors, one of which dies in the middle: every row once, none twice."""
    pytest.importorskip("ray.data", reason="needs Ray")
    script = tmp_path / "script.py"
    script.write_text(RAY)
    (tmp_path / "worker.py").write_text(WORKER)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "MARKER": str(tmp_path / "died")}
    command = [sys.executable, str(script), model, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    ids, width, died = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert (ids, width, died) == (list(range(200)), 32, True)


@pytest.mark.parametrize(("name", "value"), [("workers", 0), ("batch_texts", True)])
def test_numbers_of_ray_are_checked(name: str, value: Any, model: str, tmp_path: Path) -> None:
    """Before anything is sent anywhere."""
    pytest.importorskip("ray.data", reason="needs Ray")
    with pytest.raises(ConfigError, match=name):
        embed_ray_dataset(None, tmp_path, model, **{name: value})


def test_daft(model: str, rows: Any) -> None:
    """As a function of batches for Daft, which hands it one column."""
    daft = pytest.importorskip("daft", reason="needs Daft")
    embed = EmbedBatches(model, device="cpu", memory=POLICY)

    @daft.func.batch(return_dtype=daft.DataType.embedding(daft.DataType.float32(), 32), batch_size=16)
    def embedded(texts: Any) -> Any:
        return embed({"text": texts.to_pylist()})["embedding"]

    frame = daft.from_pydict({"id": list(range(40)), "text": TEXTS})
    found = frame.with_column("embedding", embedded(frame["text"])).to_pydict()
    assert found["id"] == list(range(40))
    np.testing.assert_allclose(np.stack(found["embedding"]), rows, atol=1e-6)


SHARED = """
import json, os, sys
import ray
from memsafe import EmbedBatches, MemoryPolicy

model = sys.argv[1]

@ray.remote(num_cpus=1)
class Actor:
    def __init__(self, limit):
        self.embed = EmbedBatches(model, device="cpu", memory=MemoryPolicy(limit=limit, learn=False))

    def work(self, texts):
        run = self.embed.embedder.run(texts)
        report = run.report
        return os.getpid(), self.embed.embedder.memory.limit, run.embeddings, report.out_of_memory, report.measured_peak_bytes

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
texts = [f"text {number} " * (1 + number % 200) for number in range(400)]
actors = [Actor.remote(limit) for limit in ("160MiB", "320MiB")]
small, large = ray.get([actor.work.remote(texts) for actor in actors])
print(json.dumps([small[0] != large[0], [small[1], large[1]], float(abs(small[2] - large[2]).max()),
                  len(small[2]), [small[3], large[3]], [small[4], large[4]]]))
"""


@pytest.mark.timeout(900)
def test_two_ray_actors_share_a_device(model: str, tmp_path: Path) -> None:
    """Each with a memory policy of its own, at the same time on one device: both finish, with the same rows."""
    pytest.importorskip("ray", reason="needs Ray")
    script = tmp_path / "script.py"
    script.write_text(SHARED)
    done = subprocess.run([sys.executable, str(script), model], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith(("[true", "[false"))))
    apart, limits, difference, count, out_of_memory, peaks = found
    assert apart and limits == ["160MiB", "320MiB"] and count == 400
    assert difference < 1e-5 and out_of_memory == [0, 0]
    assert 0 < peaks[0] < 160 << 20 and 0 < peaks[1] < 320 << 20


def test_equal_settings_share_what_is_made() -> None:
    """PerProcess.shared: one for equal settings, while anybody holds it; other settings, and what cannot be pickled, have their own."""
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return len(made)

    first, second = PerProcess.shared("a", {"b": 1}), PerProcess.shared("a", {"b": 1})
    assert first is second and first.get(make) == second.get(make) == 1
    assert PerProcess.shared("a", {"b": 2}).get(make) == 2
    hook = lambda event: None  # noqa: E731 - cannot be pickled
    assert PerProcess.shared(hook) is not PerProcess.shared(hook)
    del first, second
    gc.collect()
    assert PerProcess.shared("a", {"b": 1}).get(make) == 3
