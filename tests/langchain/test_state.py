"""Pickles, copies and dumps: configuration travels, weights stay."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from langchain_memsafe import MemsafeCrossEncoder, MemsafeEmbeddings, MemsafeRerank

from .conftest import largest_difference

Memsafe = MemsafeEmbeddings | MemsafeRerank | MemsafeCrossEncoder


@pytest.fixture(params=["ours", "reranker", "cross_encoder"])
def loaded(request: pytest.FixtureRequest) -> Memsafe:
    """Each of the three classes, loaded."""
    made: Memsafe = request.getfixturevalue(request.param)
    return made


def core_of(memsafe: Memsafe) -> Any:
    return memsafe.embedder if isinstance(memsafe, MemsafeEmbeddings) else memsafe.reranker


def answer(memsafe: Memsafe) -> Any:
    if isinstance(memsafe, MemsafeEmbeddings):
        return memsafe.embed_query("an apple")
    if isinstance(memsafe, MemsafeRerank):
        return [entry["relevance_score"] for entry in memsafe.rerank(["a pear", "a train"], "an apple")]
    return memsafe.score([("an apple", "a pear"), ("an apple", "a train")])


def test_pickle(loaded: Memsafe) -> None:
    """A pickle holds configuration, under 4 KB; the copy loads its own model when it is used and answers the same."""
    data = pickle.dumps(loaded)
    assert len(data) < 4096
    copied = pickle.loads(data)
    assert copied.model_dump(exclude={"client"}) == loaded.model_dump(exclude={"client"})
    assert not copied._shared.loaded
    assert largest_difference(answer(copied), answer(loaded)) < 1e-5
    assert core_of(copied) is not core_of(loaded)


def test_unpickling_never_raises(loaded: Memsafe, tmp_path: Path) -> None:
    """Unpickling where the model does not exist, or fields are new since, works; only use raises."""
    moved = loaded.model_copy(update={"model_name": str(tmp_path / "gone")})
    state = moved.__getstate__()
    del state["__dict__"]["memory"]  # as if the pickle were of a version without this field
    copied = type(loaded).__new__(type(loaded))
    copied.__setstate__(state)
    assert copied.memory == type(loaded).model_fields["memory"].get_default(call_default_factory=True)
    again = pickle.loads(pickle.dumps(moved))
    with pytest.raises(ValueError, match="gone"):
        answer(again)


@pytest.mark.parametrize(
    "copied_by", [copy.copy, copy.deepcopy, lambda it: it.model_copy(), lambda it: it.model_copy(deep=True)]
)
def test_copies_share_the_weights(loaded: Memsafe, copied_by: Callable[[Any], Any]) -> None:
    """Every copy shares the loaded model."""
    copied = copied_by(loaded)
    assert copied == loaded and copied is not loaded
    assert core_of(copied) is core_of(loaded)
    assert getattr(copied, "client", None) is getattr(loaded, "client", None)


def test_deep_copy_shares_no_settings(ours: MemsafeEmbeddings) -> None:
    """Editing a deep copy's options leaves the original's alone."""
    copied = copy.deepcopy(ours)
    copied.encode_kwargs["prompt"] = "p: "
    assert ours.encode_kwargs == {}


def test_copy_with_another_model(loaded: Memsafe) -> None:
    """A copy that changes what the model was loaded from loads its own; another change keeps sharing."""
    assert core_of(loaded.model_copy(update={"show_progress": True})) is core_of(loaded)
    changed = loaded.model_copy(update={"dtype": "bfloat16"})
    assert changed._shared is not loaded._shared
    assert core_of(changed) is not core_of(loaded)
    if isinstance(changed, MemsafeCrossEncoder):
        assert changed.client is changed.reranker.model


def test_dump_makes_an_equal_one(ours: MemsafeEmbeddings, reranker: MemsafeRerank) -> None:
    """model_dump and JSON round-trip through the constructor, memory policy included."""
    for memsafe in (ours, reranker):
        changed = memsafe.model_copy(update={"memory": type(memsafe.memory)(limit=0.5, max_pending=9)})
        for dumped in (changed.model_dump(), changed.model_validate_json(changed.model_dump_json()).model_dump()):
            assert type(memsafe)(**dumped).memory == changed.memory


def _embed_in_child(embeddings: MemsafeEmbeddings) -> list[float]:
    return embeddings.embed_query("an apple")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is not safe elsewhere")
def test_forked_child_loads_its_own(minilm: str) -> None:
    """A fork after loading leaves the child without the parent's threads: it loads its own model and answers."""
    code = (
        "import os, sys\n"
        "from langchain_memsafe import MemsafeEmbeddings\n"
        f"embeddings = MemsafeEmbeddings(model_name={minilm!r})\n"
        "before = embeddings.embed_query('an apple')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    ok = False\n"
        "    try:\n"
        "        after = embeddings.embed_query('an apple')\n"
        "        ok = max(abs(a - b) for a, b in zip(after, before)) < 1e-5\n"
        "    finally:\n"
        "        os._exit(0 if ok else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_worker_process(ours: MemsafeEmbeddings) -> None:
    """A spawned worker gets the configuration and answers the same."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert largest_difference(pool.submit(_embed_in_child, ours).result(timeout=120), answer(ours)) < 1e-5
