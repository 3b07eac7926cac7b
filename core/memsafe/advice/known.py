"""Models that are worth knowing of when another is too large: shapes, sizes, lengths, languages. A small table, by hand.

As of November 2026, from each model's card and ``config.json`` on https://huggingface.co/NAME. A test computes every number of
parameters again from the shape. What is best for a corpus only its own questions can tell: the table says what fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AS_OF", "KNOWN", "Known", "find", "lighter"]

AS_OF = "2026-11"


@dataclass(frozen=True)
class Known:
    """One model. kind: "embedding" or "reranker". languages: "multilingual", "en" or "zh". parameters: millions.

    max_length: tokens that its authors give it. config: what ``config.json`` says of its shape, in transformers' names.
    """

    name: str
    kind: str
    languages: str
    parameters: float
    max_length: int
    config: Mapping[str, Any]

    @property
    def source(self) -> str:
        return f"https://huggingface.co/{self.name}"


def _shape(
    model_type: str, layers: int, hidden: int, heads: int, wide: int, vocab: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": wide,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        **more,
    }


def _roberta(layers: int, hidden: int, heads: int, wide: int, positions: int = 514) -> dict[str, Any]:
    """XLM-RoBERTa: its positions start behind the padding index, so that 514 are 512 tokens."""
    return _shape(
        "xlm-roberta", layers, hidden, heads, wide, 250002, positions, type_vocab_size=1, pad_token_id=1
    )  # fmt: skip


def _deberta(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    own = {"relative_attention": True, "position_buckets": 256, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    own |= {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
    return _shape("deberta-v2", layers, hidden, heads, 4 * hidden, 128100, 512, **own)


_XLMR_LARGE, _XLMR_BASE = _roberta(24, 1024, 16, 4096), _roberta(12, 768, 12, 3072)
_M3 = _roberta(24, 1024, 16, 4096, 8194)
_GTE = _shape("gte", 12, 768, 12, 3072, 250048, 8192, type_vocab_size=1)
_MODERNBERT = _shape("modernbert", 22, 768, 12, 1152, 50368, 8192, local_attention=128, global_attn_every_n_layers=3)
_QWEN3 = _shape("qwen3", 28, 1024, 16, 3072, 151669, 32768, head_dim=128, num_key_value_heads=8, rope_theta=1000000)
_NOMIC = _shape("nomic_bert", 12, 768, 12, 3072, 30528, 8192)
_BERT_LARGE = _shape("bert", 24, 1024, 16, 4096, 30522, 512)
_BERT_BASE = _shape("bert", 12, 768, 12, 3072, 30522, 512)
_MINILM_12, _MINILM_6 = (_shape("bert", layers, 384, 12, 1536, 30522, 512) for layers in (12, 6))
_MULTILINGUAL_MINILM = _shape("bert", 12, 384, 12, 1536, 250037, 512)
_MPNET = _shape("mpnet", 12, 768, 12, 3072, 30527, 514)

KNOWN: tuple[Known, ...] = (
    Known("Qwen/Qwen3-Embedding-0.6B", "embedding", "multilingual", 595.8, 32768, _QWEN3),
    Known("BAAI/bge-m3", "embedding", "multilingual", 567.8, 8192, _M3),
    Known("intfloat/multilingual-e5-large", "embedding", "multilingual", 559.9, 512, _XLMR_LARGE),
    Known("Alibaba-NLP/gte-multilingual-base", "embedding", "multilingual", 305.4, 8192, _GTE),
    Known("Snowflake/snowflake-arctic-embed-m-v2.0", "embedding", "multilingual", 305.4, 8192, _GTE),
    Known("intfloat/multilingual-e5-base", "embedding", "multilingual", 278.0, 512, _XLMR_BASE),
    Known("intfloat/multilingual-e5-small", "embedding", "multilingual", 117.7, 512, _MULTILINGUAL_MINILM),
    Known(
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2", "embedding", "multilingual", 117.7, 128,
        _MULTILINGUAL_MINILM,
    ),
    Known("BAAI/bge-large-en-v1.5", "embedding", "en", 335.1, 512, _BERT_LARGE),
    Known("Alibaba-NLP/gte-modernbert-base", "embedding", "en", 149.0, 8192, _MODERNBERT),
    Known("nomic-ai/nomic-embed-text-v1.5", "embedding", "en", 136.7, 8192, _NOMIC),
    Known("BAAI/bge-base-en-v1.5", "embedding", "en", 109.5, 512, _BERT_BASE),
    Known("sentence-transformers/all-mpnet-base-v2", "embedding", "en", 109.5, 384, _MPNET),
    Known("BAAI/bge-small-en-v1.5", "embedding", "en", 33.4, 512, _MINILM_12),
    Known("sentence-transformers/all-MiniLM-L6-v2", "embedding", "en", 22.7, 256, _MINILM_6),
    Known("BAAI/bge-large-zh-v1.5", "embedding", "zh", 325.5, 512, {**_BERT_LARGE, "vocab_size": 21128}),
    Known("BAAI/bge-base-zh-v1.5", "embedding", "zh", 102.3, 512, {**_BERT_BASE, "vocab_size": 21128}),
    Known("BAAI/bge-small-zh-v1.5", "embedding", "zh", 24.0, 512, _shape("bert", 4, 512, 8, 2048, 21128, 512)),
    Known("BAAI/bge-reranker-v2-m3", "reranker", "multilingual", 567.8, 8192, _M3),
    Known("BAAI/bge-reranker-large", "reranker", "multilingual", 559.9, 512, _XLMR_LARGE),
    Known("Alibaba-NLP/gte-multilingual-reranker-base", "reranker", "multilingual", 306.0, 8192, _GTE),
    Known("BAAI/bge-reranker-base", "reranker", "multilingual", 278.0, 512, _XLMR_BASE),
    Known("cross-encoder/mmarco-mMiniLMv2-L12-H384-v1", "reranker", "multilingual", 117.6, 512, _roberta(12, 384, 12, 1536)),
    Known("mixedbread-ai/mxbai-rerank-large-v1", "reranker", "en", 435.1, 512, _deberta(24, 1024, 16)),
    Known("mixedbread-ai/mxbai-rerank-base-v1", "reranker", "en", 184.4, 512, _deberta(12, 768, 12)),
    Known("Alibaba-NLP/gte-reranker-modernbert-base", "reranker", "en", 149.6, 8192, _MODERNBERT),
    Known("mixedbread-ai/mxbai-rerank-xsmall-v1", "reranker", "en", 70.8, 512, _deberta(12, 384, 6)),
    Known("cross-encoder/ms-marco-MiniLM-L12-v2", "reranker", "en", 33.4, 512, _MINILM_12),
    Known("cross-encoder/ms-marco-MiniLM-L6-v2", "reranker", "en", 22.7, 512, _MINILM_6),
)  # fmt: skip


def find(model: str) -> Known | None:
    """The entry for a hub id, or for a folder of the same last name; None if it is not in the table."""
    last = model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()
    exact = next((known for known in KNOWN if known.name.lower() == model.lower()), None)
    return exact or next((known for known in KNOWN if known.name.rsplit("/", 1)[-1].lower() == last), None)


def lighter(kind: str, languages: str, parameters: float) -> list[Known]:
    """Entries of the same kind and languages with at most 0.95 times as many parameters (millions), largest first."""
    found = [k for k in KNOWN if k.kind == kind and k.languages == languages and k.parameters < 0.95 * parameters]
    return sorted(found, key=lambda known: -known.parameters)
