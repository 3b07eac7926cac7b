"""memsafe.advise: both articles' cases, what it says of a folder, of a known model and of one that nobody knows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import memsafe
from memsafe import Advice, ConfigError, ModelNotFoundError, advise
from memsafe.advice import known, recorded
from memsafe.advice.lengths import of_distribution, parse
from memsafe.config import GiB, MiB
from tests import tiny_models as models

CURVES = Path(__file__).resolve().parents[1] / "planning" / "curves"
T4 = "14.58GiB"  # what torch reports of a card sold with 16 GB


def test_bge_m3_on_a_t4_that_others_use_too() -> None:
    """One article's case, with 9 GiB taken: memsafe's way fits with texts of 8,192 tokens, the usual defaults die."""
    advice = advise("BAAI/bge-m3", device_memory=T4, taken="9GiB", dtype="float16")
    assert advice.fits and advice.longest_text == 8192
    assert advice.weights_bytes == pytest.approx(1.06 * GiB, rel=0.01)
    assert advice.weights_by_dtype["float32"] == pytest.approx(2.115 * GiB, rel=0.01)
    assert advice.largest_micro_batch > 8192
    ten, thirty_two = advice.defaults
    assert (ten.rows, thirty_two.rows, thirty_two.length) == (10, 32, 8192)
    assert thirty_two.needs_bytes == pytest.approx(9.5 * GiB, rel=0.1)
    assert thirty_two.eager_bytes == pytest.approx(134.5 * GiB, rel=0.1)
    assert (ten.outcome, thirty_two.outcome, thirty_two.eager_outcome) == ("fits", "dies", "dies")
    assert "dies" in str(advice) and "8,192 of 8,192" in str(advice)


def test_what_survived_under_a_t4s_cap_is_what_is_said_to_fit() -> None:
    """On an H200 capped to a T4's memory `encode` of bge-m3's shape in float16 survived at batches of 32 and 10; beside a neighbour
    with 9 GiB it was out of memory at 32 and survived at 10 (docs/gpu.md)."""
    alone = advise("BAAI/bge-m3", device_memory=T4, dtype="float16")
    beside = advise("BAAI/bge-m3", device_memory=T4, taken="9GiB", dtype="float16")
    assert [run.outcome for run in alone.defaults] == ["fits", "fits"]
    assert [run.outcome for run in beside.defaults] == ["fits", "dies"]


def test_bge_m3_at_the_length_at_which_colab_failed() -> None:
    """LlamaIndex's issue 17472: ten texts of 3,670 tokens, float32, eager attention, alone on a T4: 8.03 GiB more were wanted
    for scores, twice. They die; with sdpa they fit, and memsafe takes 0.15 GiB for the longest."""
    advice = advise("BAAI/bge-m3", device_memory="14.75GiB", lengths=[3670] * 10)
    ten = advice.defaults[0]
    assert ten.length == 3670
    assert ten.eager_bytes > 2 * 8.03 * GiB and ten.eager_outcome == "dies"
    assert ten.outcome == "fits"
    assert advice.fits


def test_the_reranker_of_the_other_article() -> None:
    """gte-multilingual-reranker-base on a T4 of which 9.1 GiB are taken: 32 pairs of 8,192 tokens die even in half precision."""
    advice = advise("Alibaba-NLP/gte-multilingual-reranker-base", device_memory=T4, taken="9.1GiB", dtype="float16")
    assert advice.kind == "reranker" and advice.fits
    assert advice.weights_bytes == pytest.approx(0.57 * GiB, rel=0.01)
    assert advice.defaults[1].outcome == "dies"
    assert advice.defaults[1].needs_bytes == pytest.approx(8.6 * GiB, rel=0.15)
    assert all(other.parameters < 300 for other in advice.lighter)
    assert "BAAI/bge-reranker-base" in [other.name for other in advice.lighter]


def test_hints_come_in_the_order_of_what_costs_least() -> None:
    """dtype, max_length, reserve, model; those that do not apply are left out."""
    tight = advise("BAAI/bge-m3", device_memory="3GiB", dtype="float32", lengths="median=300,longest=8192")
    assert not tight.fits
    assert [hint.about for hint in tight.hints] == ["dtype", "max_length", "reserve", "model"]
    half = advise("BAAI/bge-m3", device_memory=T4, dtype="float16")
    assert "dtype" not in [hint.about for hint in half.hints]


def test_what_does_not_fit_is_said_in_numbers() -> None:
    """A card smaller than the weights: nothing fits, and the answer says which lighter models would."""
    advice = advise("BAAI/bge-m3", device_memory="2GiB", dtype="float32")
    assert not advice.fits and advice.room_bytes < 0
    assert (advice.longest_text, advice.largest_micro_batch) == (0, 0)
    assert advice.expected == ()
    assert "does NOT fit" in str(advice)
    smallest = min(advice.lighter, key=lambda other: other.weights_bytes)
    assert smallest.weights_bytes < 300 * MiB


def test_room_is_arithmetic() -> None:
    """memory - taken - context - weights - reserve, each of which is told."""
    advice = advise(
        "BAAI/bge-m3", device_memory="10GiB", taken=0.25, context="400MiB", reserve="100MiB", dtype="float16"
    )
    assert advice.taken_bytes == 10 * GiB // 4
    assert advice.room_bytes == 10 * GiB - 10 * GiB // 4 - 400 * MiB - 100 * MiB - advice.weights_bytes
    more = advise("BAAI/bge-m3", device_memory="10GiB", context="400MiB", reserve="100MiB", dtype="float16")
    assert more.largest_micro_batch > advice.largest_micro_batch


def test_a_folder_is_read_and_not_loaded(minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights from the headers, the length from the saved settings, tokens by the folder's own tokenizer; no weight is read."""
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("safetensors.torch.load_file", None)
    texts = ["a b c", "the river runs past nine old mills"]
    advice = advise(minilm, device_memory="1GiB", device="cpu", texts=texts)
    assert advice.told_by == "folder"
    assert advice.weights_bytes == pytest.approx(90.9e6, rel=0.01)
    assert advice.max_length == 256
    assert "counted" in advice.texts
    assert advice.expected and {time.curve for time in advice.expected} >= {"cpu-minilm-fp32"}
    assert advice.expected[0].seconds is not None


def test_expected_time_is_that_of_the_recorded_run() -> None:
    """bge-m3 in bfloat16 on an H200: 2,000 heavy-tailed texts ran end to end at 350,000 to 405,000 tokens/s in micro-batches of
    16,384 tokens, at 443,000 to 455,000 in such of 65,536. What is said for a size between them lies between."""
    advice = advise("BAAI/bge-m3", device_memory="139.8GiB", dtype="bfloat16", lengths=of_distribution(300, 8192, 2000))
    (time,) = advice.expected
    assert time.seconds is not None and 16_384 < time.micro_batch_tokens < 65_536
    assert 350_000 < time.tokens_per_s < 455_000
    assert "H200" in time.where
    assert not advise("BAAI/bge-m3", device_memory="139.8GiB", dtype="float16").expected  # never recorded


def test_texts_without_a_tokenizer_are_guessed_and_say_so() -> None:
    """Of a model of the table only: four characters a token."""
    advice = advise("BAAI/bge-m3", device_memory="16GiB", texts=["x" * 4000, "y" * 40])
    assert "guessed" in advice.texts
    assert advice.defaults[0].length == 1002


@pytest.mark.parametrize(
    ("lengths", "median", "longest", "texts"),
    [("median=300,longest=8192", 300, 8192, 1000), ({"median": 50, "count": 9}, 50, 50, 9), ([3, 4, 5], 4, 5, 3)],
)
def test_lengths_are_numbers_or_a_few_words(lengths: Any, median: int, longest: int, texts: int) -> None:
    """The distribution has the median, the longest text and the number of texts that were asked for."""
    found = parse(lengths)
    assert found.texts == texts and found.longest == longest
    assert found.median == pytest.approx(median, rel=0.05)


@pytest.mark.parametrize("lengths", ["", "median", "longest=9", "median=0", [0], [], [1.5], 7, {"mean": 3}, [True]])
def test_other_lengths_are_refused(lengths: Any) -> None:
    """With what is due."""
    with pytest.raises(ConfigError, match="lengths"):
        parse(lengths)


@pytest.mark.parametrize(
    "changes",
    [
        {"device_memory": "much"},
        {"device_memory": 0},
        {"device_memory": 0.5},
        {"taken": "-1GiB"},
        {"dtype": "int3"},
        {"max_length": 0},
        {"device": "abacus"},
        {"lengths": [3], "texts": ["a"]},
        {"texts": []},
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    """Every one names itself."""
    with pytest.raises(ConfigError, match=r"|".join(changes)):
        advise("BAAI/bge-m3", **{"device_memory": "16GiB", **changes})


def test_a_model_that_nobody_knows_is_not_made_up() -> None:
    """No folder, not in the cache, no hub, not in the table: an error, not a guess."""
    with pytest.raises(ModelNotFoundError):
        advise("nobody/nothing-at-all", device_memory="16GiB")


def test_a_pytorch_bin_counts_in_the_dtype_asked_for(tmp_path: Path) -> None:
    """A pytorch_model.bin has no header to read: its size counts, scaled from the dtype that the config says."""
    config = models.tiny_config("bert").to_dict() | {"torch_dtype": "float32", "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(4000))
    advice = advise(str(tmp_path), device_memory="16GiB", dtype="float16")
    assert advice.weights_by_dtype == {"float32": 4000, "float16": 2000, "bfloat16": 2000}


def test_to_dict_is_json_and_advice_is_public() -> None:
    """Everything goes through JSON unchanged."""
    advice = advise("BAAI/bge-m3", device_memory="16GiB")
    assert isinstance(advice, Advice) and memsafe.Advice is Advice
    assert json.loads(json.dumps(advice.to_dict()))["defaults"][1]["rows"] == 32


def test_importing_advice_from_the_front_door_loads_no_torch() -> None:
    """Its name is there without torch; only an answer needs it (for names of dtypes)."""
    code = "import sys, memsafe; memsafe.MemoryPolicy; assert 'advise' in dir(memsafe); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("entry", known.KNOWN, ids=lambda entry: entry.name.rsplit("/", 1)[-1])
def test_the_table_is_computed_again(entry: known.Known) -> None:
    """The number of parameters of each entry is that of its shape, as transformers builds it, to 1 %."""
    import transformers

    if entry.config["model_type"] not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {entry.config['model_type']}")
    options = {name: value for name, value in entry.config.items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(entry.config["model_type"], **options)
    reranker = entry.kind == "reranker"
    if reranker:
        config.num_labels = 1
    build = transformers.AutoModelForSequenceClassification if reranker else transformers.AutoModel
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in build.from_config(config).parameters())
    assert counted / 1e6 == pytest.approx(entry.parameters, rel=0.01)


def test_the_table_has_no_two_of_a_name_and_covers_both_kinds() -> None:
    """Multilingual embedders and rerankers among them, each with its source."""
    names = [entry.name for entry in known.KNOWN]
    assert len(names) == len(set(names))
    for kind in ("embedding", "reranker"):
        assert sum(entry.kind == kind and entry.languages == "multilingual" for entry in known.KNOWN) >= 4
    assert all(entry.source == f"https://huggingface.co/{entry.name}" for entry in known.KNOWN)


@pytest.mark.parametrize("curve", recorded.RECORDED, ids=lambda curve: curve.name)
def test_recorded_curves_are_those_of_the_planning_tests(curve: recorded.Recorded) -> None:
    """Figures are carried along, never retyped differently; made-up ones are not."""
    told = json.loads((CURVES / f"{curve.name}.json").read_text())
    assert told["measured"] is True
    assert [list(point) for point in curve.points] == told["seconds"]
    for name in ("seconds_per_square", "host_seconds", "flops_per_token", "flops_per_square"):
        assert getattr(curve, name) == told[name]
