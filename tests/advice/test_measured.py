"""What advise expects, against what forwards take: the meter of the CPU for every architecture, and what one H200 measured."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from memsafe.advice import WORKSPACE_BYTES, facts, known
from memsafe.advice.estimate import MARGIN, Estimate
from memsafe.machine.device import open_device
from memsafe.planning.batch import BatchShape, MicroBatch, TokenizedInput
from tests import tiny_models as models

ROOT = Path(__file__).resolve().parents[2]
H200 = ROOT / "benchmarks" / "results" / "gpu-nvidia-h200-correctness-prediction-recovery.json"
ARTICLES = ROOT / "benchmarks" / "results" / "gpu-nvidia-h200-articles.json"
SIZES: dict[str, Any] = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 512}
WIDTHS = {"modernbert": 192, "qwen3": 384}
"""Feed-forward sizes whose share of the hidden size is that of the published models; 4 for the others."""
UNIFORM = [[60] * 40, [2000]]
MIXED = [1500, 700, 400, 300, 100]


@pytest.fixture(scope="module", params=[a for a in models.ARCHITECTURES if models.available(a)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Estimate]:
    """(architecture, the model as memsafe loaded it, what is expected of its folder)."""
    name = request.param
    sizes = SIZES | {"intermediate_size": WIDTHS.get(name, 512), "max_positions": 2048}
    folder = models.save_embedder(tmp_path_factory.mktemp(name) / "model", name, max_length=2040, **sizes)
    return name, models.loaded(folder), Estimate(facts.look(str(folder), rerank=None), "float32", "cpu")


def items_of(loaded: Any, lengths: list[int]) -> tuple[TokenizedInput, ...]:
    pick = np.random.default_rng(0)
    typed = "token_type_ids" in loaded.encoder.feature_names
    ids = [pick.integers(1000, 20000, length).astype(np.int32) for length in lengths]
    return tuple(TokenizedInput(i, row, np.zeros_like(row) if typed else None) for i, row in enumerate(ids))


def measured(run: Any) -> int:
    """The second call's peak of live tensors: the first may make what is kept."""
    with torch.inference_mode():
        run()
        with open_device("cpu").measure(live=True) as peak:
            run()
    assert peak.live_bytes is not None
    return peak.live_bytes


def near(expected: int, found: int) -> bool:
    return abs(expected - found) <= MARGIN * found


@models.needs_interface
def test_packed_peaks_of_every_architecture(pair: tuple[str, Any, Estimate]) -> None:
    """Many short texts, one long text, and a mixture: within 10 % of the measured peak. (Architectures with attention of their own
    run a mixture group by group, and then need less than is said: that is on the safe side.)"""
    name, loaded, estimate = pair
    assert loaded.packed
    for lengths in [*UNIFORM, MIXED]:
        batch = MicroBatch(items_of(loaded, lengths), packed=True)
        found = measured(lambda batch=batch: loaded.forward(batch, {}))
        expected = estimate.packed(BatchShape.of(lengths, packed=True))
        if name in models.REGROUPED and lengths is MIXED:
            assert found <= expected <= 1.4 * found
        else:
            assert near(expected, found), (lengths[0], expected / found)


@models.needs_interface
def test_padded_peaks_of_every_architecture(pair: tuple[str, Any, Estimate]) -> None:
    """Upstream's own padded forward, with padding and without: within 10 % of the measured peak."""
    name, loaded, estimate = pair
    for lengths in [*UNIFORM, MIXED]:
        rows, longest = len(lengths), max(lengths)
        features = {name: torch.zeros((rows, longest), dtype=torch.long) for name in ("input_ids", "attention_mask")}
        for place, item in enumerate(items_of(loaded, lengths)):
            features["input_ids"][place, : item.num_tokens] = torch.from_numpy(item.input_ids).long()
            features["attention_mask"][place, : item.num_tokens] = 1
        if "token_type_ids" in loaded.encoder.feature_names:
            features["token_type_ids"] = torch.zeros((rows, longest), dtype=torch.long)
        found = measured(lambda given=features: loaded.st({name: each.clone() for name, each in given.items()}))
        expected = estimate.padded(rows, longest, uniform=len(set(lengths)) == 1)
        assert near(expected, found), (name, lengths[0], expected / found)


@models.needs_interface
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_peaks_of_every_architecture(pair: tuple[str, Any, Estimate], dtype: str) -> None:
    """What old versions and some servers force: all scores in memory, in float32 where the softmax asks for it. Within 10 %."""
    name, loaded, estimate = pair
    if name in models.REGROUPED:
        assert estimate.eager(3, 600) == estimate.padded(3, 600)  # it computes attention itself: measured above
        return
    config = copy.deepcopy(loaded.st[0].auto_model.config)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").to(getattr(torch, dtype)).eval()
    ids = torch.randint(1000, 20000, (3, 600), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 300:] = 0
    found = measured(lambda: model(input_ids=ids, attention_mask=mask))
    expected = replace(estimate, dtype=dtype).eager(3, 600)
    assert near(expected, found), (name, expected / found)


@pytest.mark.parametrize(
    ("model", "listed", "dtype"),
    [
        ("bge-m3", "BAAI/bge-m3", "bfloat16"),
        ("bge-m3", "BAAI/bge-m3", "float32"),
        ("minilm", "sentence-transformers/all-MiniLM-L6-v2", "float32"),
    ],
)
def test_peaks_that_an_h200_measured(model: str, listed: str, dtype: str) -> None:
    """All 200 random micro-batches of true shapes that a card measured: expected within 10 %, from the table's entry alone."""
    entry = known.find(listed)
    assert entry is not None
    estimate = Estimate(facts.of_known(entry), dtype, "cuda")
    rows = json.loads(H200.read_text())["sections"]["prediction"]["rows"]
    (detail,) = [row["detail"] for row in rows if row["what"] == model and row["dtype"] == dtype and "detail" in row]
    assert len(detail) == 200
    errors = [
        estimate.packed(BatchShape(row["tokens"], row["sequences"], 0, row["longest"])) / row["live_bytes"] - 1
        for row in detail
    ]
    assert max(abs(error) for error in errors) <= MARGIN, max(errors, key=abs)
    assert float(np.median(np.abs(errors))) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_rerankers_own_run_on_an_h200(dtype: str) -> None:
    """gte-multilingual-reranker under a T4's cap, 1,500 documents: the largest micro-batch was one text of 7,860 tokens. Its peak is
    what is expected of it and the workspace that cuBLAS took meanwhile, within 10 %."""
    rows = json.loads(ARTICLES.read_text())["sections"]["articles"]["rows"]
    (row,) = [row for row in rows if row.get("who") == "memsafe" and row.get("dtype") == dtype]
    entry = known.find("Alibaba-NLP/gte-multilingual-reranker-base")
    assert entry is not None
    expected = Estimate(facts.of_known(entry), dtype, "cuda").one_text(row["largest_micro_batch_tokens"])
    assert near(expected + WORKSPACE_BYTES, row["measured_peak_bytes"])


def test_the_batch_that_an_h200_refused_under_a_cap() -> None:
    """gte-multilingual-reranker, float32, 32 pairs of up to 7,863 tokens: 13.4 GiB were held and 7.37 GiB more wanted under a cap of
    14.13 GiB. So much is expected, with the weights: at least what was seen, at most 10 % more."""
    GiB = 1 << 30
    rows = json.loads(ARTICLES.read_text())["sections"]["articles"]["rows"]
    refused = next(row for row in rows if row.get("who") == "CrossEncoder.predict" and row.get("dtype") == "float32")
    assert "Tried to allocate 7.37 GiB" in refused["outcome"]
    entry = known.find("Alibaba-NLP/gte-multilingual-reranker-base")
    assert entry is not None
    found = facts.of_known(entry)
    longest = round((7.37 * GiB / (32 * 4)) ** 0.5)  # one mask in float32, (32, 1, longest, longest)
    needs = Estimate(found, "float32", "cuda").padded(32, longest) + found.weights_bytes("float32")
    seen = refused["peak_reserved_bytes"] + 7.37 * GiB
    assert seen * 0.99 <= needs <= 1.1 * seen
