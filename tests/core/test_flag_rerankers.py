"""FlagEmbedding's rerankers of decoders: the numbers of its own code, and of its formula where it is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from memsafe import ConfigError, MemoryPolicy, Reranker
from memsafe.models.flag import PROMPT
from tests import tiny_models as models

pytest.importorskip("sentence_transformers", minversion="6")

SIZES: dict[str, Any] = {"vocab_size": 30522, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.15}
SIZES |= {"max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
PAIRS = [("how do I sort", text) for text in ("sort a list", "", "rivers run " * 40, "sort a list", "x")]
PAIRS += [("", "both"), ("how " * 60, "open(path) iterates over lines " * 30), ("x", "y " * 5000)]


class LayerwiseConfig(transformers.Qwen3Config):
    """As that of bge-reranker-v2-minicpm-layerwise: from which layer on there are heads, and of which kind."""

    model_type = "memsafe-test-layerwise"
    start_layer = 2
    head_type = "simple"


class Layerwise(transformers.Qwen3PreTrainedModel):
    """A decoder in the shape of the published one (whose own code does not load under transformers 5): a head at every layer from
    `start_layer` on, one number for each token."""

    config_class = LayerwiseConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = transformers.Qwen3Model(config)
        count = config.num_hidden_layers + 1 - config.start_layer
        self.lm_head = nn.ModuleList([nn.Linear(config.hidden_size, 1, bias=False) for _ in range(count)])
        self.post_init()

    def forward(self, input_ids: Any = None, cutoff_layers: Any = None, **options: Any) -> Any:
        states = self.model(input_ids=input_ids, **options).hidden_states
        heads = [self.lm_head[layer - self.config.start_layer] for layer in cutoff_layers]
        found = [head(states[layer]) for head, layer in zip(heads, cutoff_layers, strict=True)]
        return CausalLMOutputWithPast(logits=tuple(each.float().reshape(len(input_ids), -1) for each in found))


transformers.AutoConfig.register(LayerwiseConfig.model_type, LayerwiseConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(LayerwiseConfig, Layerwise, exist_ok=True)


def save(folder: Path, model: Any) -> str:
    model.eval().save_pretrained(folder)
    models.save_tokenizer(folder, "qwen3", 1024, padding_side="left")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "[CLS]"
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_gemma(folder: Path) -> str:
    """The shape of bge-reranker-v2-gemma."""
    torch.manual_seed(0)
    return save(folder, transformers.AutoModelForCausalLM.from_config(transformers.GemmaConfig(**SIZES)))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("layered"), Layerwise(LayerwiseConfig(**{**SIZES, "num_hidden_layers": 4})))


def sequence(tokenizer: Any, query: str, passage: str, most: int, prompt: str) -> list[int]:
    """Of the published code: queries cut at three quarters, then only the passage, then the prompt."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    line, asked = ids("\n"), ids(prompt)
    head = [tokenizer.bos_token_id, *ids("A: " + query)[: most * 3 // 4]]
    tail = [*line, *ids("B: " + passage)[:most]]
    return [*head, *tail[: most + len(line) + len(asked) - len(head)], *line, *asked]


@torch.inference_mode()
def reference(folder: str, most: int = 512, prompt: str = PROMPT, layer: int | None = None) -> list[float]:
    """Each pair alone, by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
    found = []
    for query, passage in PAIRS:
        ids = torch.tensor([sequence(tokenizer, query, passage, most, prompt)])
        if layer is None:
            found.append(float(model(input_ids=ids).logits[0, -1, yes]))
        else:
            out = model(input_ids=ids, output_hidden_states=True, cutoff_layers=[layer])
            found.append(float(out.logits[0][0, -1]))
    return found


@pytest.mark.cuts
@pytest.mark.parametrize("most", [None, 64])
def test_scores_are_those_of_the_formula(gemma: str, most: int | None) -> None:
    """Logits of "Yes", packed; what is cut is cut as there, counted and warned of."""
    with Reranker(gemma, device="cpu", decoder="flag", max_length=most) as ours:
        assert ours.path == "packed" and ours.max_length == (most or 512) and ours.num_labels == 1
        run = ours.run(PAIRS)
        np.testing.assert_allclose(run.scores, reference(gemma, most or 512), rtol=0, atol=1e-5)
        assert run.report.truncated == (1 if most is None else 3)


@pytest.mark.parametrize("most", [512, 64])
@pytest.mark.cuts
def test_scores_are_those_of_flag_embedding(gemma: str, most: int) -> None:
    """FlagLLMReranker.compute_score's, where it is installed."""
    flag = pytest.importorskip("FlagEmbedding", reason="FlagEmbedding is not installed")
    theirs = flag.FlagLLMReranker(gemma, use_fp16=False, use_bf16=False, devices=["cpu"], max_length=most, batch_size=1)
    with Reranker(gemma, device="cpu", decoder="flag", max_length=most) as ours:
        np.testing.assert_allclose(ours.score_pairs(PAIRS), theirs.compute_score(PAIRS), rtol=0, atol=1e-5)


@pytest.mark.cuts
def test_the_question_is_the_prompt_of_a_call(gemma: str) -> None:
    """In the place of the saved one, through `instruction` of both frameworks too."""
    told = "Does B contradict A? Answer 'Yes' or 'No'."
    wanted = reference(gemma, prompt=told)
    with Reranker(gemma, device="cpu", decoder="flag") as ours:
        np.testing.assert_allclose(ours.score_pairs(PAIRS, prompt=told), wanted, rtol=0, atol=1e-5)
        assert np.abs(ours.score_pairs(PAIRS) - wanted).max() > 1e-4
    policy = MemoryPolicy()
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    from langchain_memsafe import MemsafeRerank as Chained
    from llama_index_memsafe import MemsafeRerank as Indexed

    chained = Chained(model=gemma, model_kwargs={"device": "cpu", "decoder": "flag"}, instruction=told, memory=policy)
    ranked = chained.rerank([PAIRS[0][1]], PAIRS[0][0])
    assert ranked[0]["relevance_score"] == pytest.approx(wanted[0], abs=1e-5)
    indexed = Indexed(gemma, "cpu", instruction=told, cross_encoder_kwargs={"decoder": "flag"})
    nodes = [NodeWithScore(node=TextNode(text=PAIRS[0][1]))]
    found = indexed.postprocess_nodes(nodes, QueryBundle(PAIRS[0][0]))
    assert found[0].score == pytest.approx(wanted[0], abs=1e-5)


@pytest.mark.cuts
@pytest.mark.parametrize("layer", [2, 3, None])
def test_layers(layered: str, layer: int | None) -> None:
    """The head of the layer that was asked for; without one, of the last."""
    with Reranker(layered, device="cpu", decoder="flag", cutoff_layer=layer) as ours:
        found = ours.score_pairs(PAIRS)
    np.testing.assert_allclose(found, reference(layered, layer=layer or 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decoder": "qwen"}, "decoder: got 'qwen'"),
        ({"cutoff_layer": 3}, "give decoder='flag' too"),
        ({"decoder": "flag", "cutoff_layer": 0}, "cutoff_layer: got 0"),
        ({"decoder": "flag", "cutoff_layer": 9}, "only at the end"),
        ({"decoder": "flag", "truncation": "only_second"}, "must run unchanged"),
    ],
)
def test_what_is_refused(gemma: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Reranker(gemma, device="cpu", **options)


def test_layers_without_a_head(layered: str) -> None:
    """The error says which there are."""
    with pytest.raises(ConfigError, match="from layer 2 to 4"):
        Reranker(layered, device="cpu", decoder="flag", cutoff_layer=1)
