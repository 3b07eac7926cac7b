"""Rerankers that ask a decoder for "yes" or "no": sentence-transformers' numbers, from the logits of two words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from memsafe import Reranker
from memsafe.machine.device import open_device
from memsafe.planning.batch import MicroBatch, TokenizedInput
from tests import tiny_models as models

pytest.importorskip("sentence_transformers", minversion="6")

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] if part['text'] is defined else '' }} {% endfor %}{% endif %} {% endfor %}answer:"
)
PAIRS = [("how do I sort", text) for text in ("sort a list", "", "rivers run " * 40, "sort a list", "x")]
PAIRS += [("", "both"), ("how do I read a file", "open(path) iterates over lines")]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen3 with 30,522 words and two of them that count."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    folder: Path = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = models.tiny_config("qwen3", tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder / "lm")
    models.save_tokenizer(folder / "lm", "qwen3", 256, padding_side="left")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "lm")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "lm")
    transformer = Transformer(str(folder / "lm"), transformer_task="text-generation")
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    prompts = {"default": "find what answers the question"}
    model = CrossEncoder(
        modules=[transformer, LogitScore(yes, no)], device="cpu", prompts=prompts, default_prompt_name="default"
    )
    model.save(str(folder / "reranker"))
    return str(folder / "reranker")


def reference(folder: str, **options: Any) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    return np.asarray(CrossEncoder(folder, device="cpu").predict(PAIRS, batch_size=1, **options))


def test_scores_and_instructions(decoder: str) -> None:
    """predict's numbers, with the saved instruction and with another one."""
    with Reranker(decoder, device="cpu") as ours:
        assert not ours.path.startswith(("one input", "the model's own"))
        saved, other = ours.score_pairs(PAIRS), ours.score_pairs(PAIRS, prompt="find what contradicts it")
        np.testing.assert_allclose(saved, reference(decoder), rtol=0, atol=1e-5)
        np.testing.assert_allclose(other, reference(decoder, prompt="find what contradicts it"), rtol=0, atol=1e-5)
        assert np.abs(saved - other).max() > 1e-3


def test_no_logits_of_other_words(decoder: str) -> None:
    """A micro-batch of 400 short pairs takes less than the logits of all words for each of them, let alone for each token."""
    loaded = models.loaded(decoder, kind="reranker")
    random = np.random.default_rng(0)
    items = [TokenizedInput(i, random.integers(1000, 29000, 12).astype(np.int32)) for i in range(400)]
    with open_device("cpu").measure(live=True) as peak:
        loaded.forward(MicroBatch(tuple(items), packed=loaded.packed), loaded.encoder.way().extras)
    assert peak.live_bytes is not None and peak.live_bytes < 400 * 30522 * 4 / 2


def test_instruction_in_both_frameworks(decoder: str) -> None:
    """`instruction` of MemsafeRerank is the prompt of the call."""
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    from langchain_memsafe import MemsafeRerank as Chained
    from llama_index_memsafe import MemsafeRerank as Indexed

    told = "find what contradicts it"
    wanted = reference(decoder, prompt=told)[[0, 2, 4]]
    texts = [PAIRS[place][1] for place in (0, 2, 4)]
    chained = Chained(model=decoder, model_kwargs={"device": "cpu"}, instruction=told, top_n=None)
    found = chained.compress_documents([Document(page_content=text) for text in texts], "how do I sort")
    scores = {document.page_content: document.metadata["relevance_score"] for document in found}
    np.testing.assert_allclose([scores[text] for text in texts], wanted, rtol=0, atol=1e-5)
    indexed = Indexed(decoder, "cpu", top_n=3, instruction=told)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    ranked = indexed.postprocess_nodes(nodes, QueryBundle("how do I sort"))
    scores = {node.node.get_content(): node.score for node in ranked}
    np.testing.assert_allclose([scores[text] for text in texts], wanted, rtol=0, atol=1e-5)
