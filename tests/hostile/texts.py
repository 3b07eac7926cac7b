"""Texts, models and reference rows of the hostile tests: long contexts of realistic shape, random weights, from a seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

WORDS = (
    "river mountain system memory token window north south seven eight light stone paper market garden winter "
    "engine signal vector matrix doctor teacher island bridge forest silver copper velvet thunder harbour"
).split()
MAX_TOKENS = 8192


def text_of(tokens: int, number: int) -> str:
    """A text of about `tokens` tokens that differs from those of other numbers."""
    words = random.Random(number)
    return " ".join([f"n{number}", *(words.choice(WORDS) for _ in range(max(tokens - 6, 0)))])


def heavy_tailed(count: int, seed: int, longest: int = MAX_TOKENS) -> list[str]:
    """`count` different texts: most of a few dozen tokens, a few of thousands, the first as long as can be."""
    lengths = random.Random(seed)
    sizes = [longest, *(min(int(20 * lengths.paretovariate(0.75)), longest) for _ in range(count - 1))]
    return [text_of(size, number) for number, size in enumerate(sizes)]


def build_embedder(folder: Path, *, num_layers: int = 2, hidden_size: int = 256) -> str:
    """An XLM-R of 8,192 positions with random weights, as a folder that sentence-transformers loads."""
    from tests.tiny_models import save_embedder

    shape = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": hidden_size // 64}
    return str(
        save_embedder(
            folder,
            "xlm_roberta",
            **shape,
            intermediate_size=4 * hidden_size,
            max_positions=MAX_TOKENS,
            max_length=MAX_TOKENS,
        )
    )


def build_reranker(folder: Path, *, num_layers: int = 2, hidden_size: int = 256) -> str:
    """The same shape as a cross-encoder with one label."""
    from tests.tiny_models import save_reranker

    shape = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": hidden_size // 64}
    return str(
        save_reranker(
            folder,
            "xlm_roberta",
            **shape,
            intermediate_size=4 * hidden_size,
            max_positions=MAX_TOKENS,
            max_length=MAX_TOKENS,
        )
    )


def one_by_one(folder: str, texts: list[str]) -> Any:
    """Rows of each text in a batch of its own, by sentence-transformers; float32, shape (len(texts), dim)."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    return model.encode(texts, batch_size=1, show_progress_bar=False)


def pairs_one_by_one(folder: str, pairs: list[tuple[str, str]]) -> Any:
    """Scores of each pair in a batch of its own, by sentence-transformers; float32, shape (len(pairs),)."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder, device="cpu")
    return np.asarray(model.predict(pairs, batch_size=1, show_progress_bar=False), dtype=np.float32)
