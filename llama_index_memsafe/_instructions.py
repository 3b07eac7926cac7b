"""Instructions that HuggingFaceEmbedding adds by the exact model name, as data.

Source: the model cards of BAAI/bge-* (v1 and v1.5) and hkunlp/instructor-*, in the form in which
llama-index-embeddings-huggingface 0.8.0 applies them. A test compares these tables with its.
"""

from __future__ import annotations

__all__ = ["DEFAULT_MODEL", "QUERY_INSTRUCTIONS", "TEXT_INSTRUCTIONS"]

DEFAULT_MODEL = "BAAI/bge-small-en"

_BGE = {
    "en": "Represent this question for searching relevant passages: ",
    "zh": "为这个句子生成表示以用于检索相关文章：",
}
_INSTRUCTOR_QUERY = "Represent the question for retrieving supporting documents: "
_INSTRUCTOR_TEXT = "Represent the document for retrieval: "

_BGE_MODELS = {
    f"BAAI/bge-{size}-{language}{version}": instruction
    for language, instruction in _BGE.items()
    for size in ("small", "base", "large")
    for version in ("", "-v1.5")
}
_INSTRUCTOR_MODELS = [
    f"{owner}/instructor-{size}" for owner in ("hku-nlp", "hkunlp") for size in ("base", "large", "xl")
]

QUERY_INSTRUCTIONS: dict[str, str] = {**_BGE_MODELS, **dict.fromkeys(_INSTRUCTOR_MODELS, _INSTRUCTOR_QUERY)}
"""Model name -> what is put before a query."""

TEXT_INSTRUCTIONS: dict[str, str] = dict.fromkeys(_INSTRUCTOR_MODELS, _INSTRUCTOR_TEXT)
"""Model name -> what is put before a text."""
