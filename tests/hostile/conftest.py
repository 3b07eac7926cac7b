"""Models, texts and reference rows that hostile tests share, built once, outside every limit; and their record."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hostile.texts import (
    build_embedder,
    build_reranker,
    heavy_tailed,
    one_by_one,
    pairs_one_by_one,
    text_of,
)

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "hostile-cpu.json"


@pytest.fixture(scope="session")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `embedder` and `reranker` (XLM-R, 2 layers x 256, 8,192 positions) and inputs with the rows and scores
    of each computed in a batch of one, outside every limit: `texts.json` ([texts, pairs]) with `rows.npy` and
    `scores.npy`, and `jobs.json` ({name: inputs}) with `NAME.npy`."""
    folder = tmp_path_factory.mktemp("long-context")
    embedder, reranker = build_embedder(folder / "embedder"), build_reranker(folder / "reranker")
    texts = heavy_tailed(60, seed=1)
    pairs = [(f"query {number}", text) for number, text in enumerate(heavy_tailed(40, seed=3))]
    (folder / "texts.json").write_text(json.dumps([texts, pairs]))
    rows, scores = one_by_one(embedder, texts), pairs_one_by_one(reranker, pairs)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "scores.npy", scores)
    jobs: dict[str, Any] = {"long": texts, "pairs": pairs, "many": [text_of(300, number) for number in range(150)]}
    np.save(folder / "long.npy", rows)
    np.save(folder / "pairs.npy", scores)
    np.save(folder / "many.npy", one_by_one(embedder, jobs["many"]))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return folder


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[[str, Any], None]]:
    """Keeps what peers and we did in the same run: printed, or with MEMSAFE_RECORD=1 written to benchmarks/results."""
    kept: dict[str, Any] = {}
    yield kept.__setitem__
    if not kept:
        return
    import sentence_transformers
    import torch
    import transformers

    versions = {m.__name__: m.__version__ for m in (torch, transformers, sentence_transformers)}
    kept["machine"] = {"system": platform.system(), "cores": len(os.sched_getaffinity(0)), **versions}
    if os.environ.get("MEMSAFE_RECORD"):
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    else:
        print("\n" + json.dumps(kept, indent=1))
