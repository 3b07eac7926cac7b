"""Giant texts where tokens are not ours: static embeddings, and models whose own ``encode`` or ``predict`` makes each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer
from torch import nn

from memsafe import Embedder, Reranker
from tests import tiny_models as models

GIANT = "the quick brown fox " * 1_000
SHORT = ["a river", "", "the quick brown fox"]


def static(cut: int | None) -> SentenceTransformer:
    """Static embeddings, whose tokenizer cuts after `cut` tokens."""
    tokenizer = Tokenizer.from_file(str(models.minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation() if cut is None else tokenizer.enable_truncation(cut)
    return SentenceTransformer(modules=[models.st_modules().StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")


@pytest.mark.parametrize("cut", [None, 128])
def test_static_embeddings_take_texts_of_any_length(cut: int | None) -> None:
    """As upstream: all of a text, or what the tokenizer's own saved truncation leaves. (Attention over all pairs of tokens was
    expected of them: 400,000 characters "needed" 300 GiB and were refused.)"""
    model = static(cut)
    with Embedder(model, device="cpu") as ours:
        assert ours.max_length == cut
        assert np.allclose(ours.run([20 * GIANT, *SHORT]).embeddings, model.encode([20 * GIANT, *SHORT]), atol=1e-6)
        if cut is not None:  # what it drops is not tokenised first
            (encoded,) = ours._engine.model.encoder.encode([20 * GIANT])
            assert len(encoded.raw) < 5_000


def test_a_length_for_static_embeddings() -> None:
    """Upstream cannot set one. The user's own object keeps its tokenizer as it was."""
    model = static(None)
    with Embedder(model, device="cpu", max_length=5) as ours:
        assert ours.max_length == 5 and model[0].tokenizer.truncation is None
        rows = ours.run(["one two three four five six seven", "one two three four five"]).embeddings
        assert np.allclose(rows[0], rows[1], atol=1e-6)


class Doubled(SentenceTransformer):
    """Rows that no forward of the modules gives."""

    seen: list[int]
    cut = True

    def encode(self, sentences: Any, *args: Any, **options: Any) -> Any:
        self.seen.append(max(map(len, sentences)))
        rows = 2 * super().encode(sentences, *args, **options)
        return rows if self.cut else rows + float(len(sentences[0]) > 1_500)


class DoubledScores(CrossEncoder):
    seen: list[int]

    def predict(self, pairs: Any, *args: Any, **options: Any) -> Any:
        self.seen.append(max(len(text) for pair in pairs for text in pair))
        return 2 * super().predict(pairs, *args, **options)


def of_kind(model: Any, kind: type, **values: Any) -> Any:
    model.__class__ = kind
    vars(model).update(seen=[], **values)
    return model


@pytest.mark.parametrize("cut", [True, False])
def test_giant_texts_before_the_models_own_encode(tmp_path: Path, cut: bool) -> None:
    """What overflows by itself what the model takes is left out before, if that is seen to make no difference to its rows."""
    model = of_kind(
        SentenceTransformer(str(models.save_embedder(tmp_path, max_length=24)), device="cpu"), Doubled, cut=cut
    )
    with Embedder(model, device="cpu") as ours:
        assert ours.path.startswith("the model's own encode") and ours._engine.model.check.cut is cut
        wanted = model.encode([SHORT[0]])[0], model.encode([GIANT])[0]
        model.seen.clear()
        rows = ours.run([SHORT[0], GIANT]).embeddings
        assert np.allclose(rows, wanted, atol=1e-5)
        assert (max(model.seen) < 5_000) is cut


def test_giant_pairs_before_the_models_own_predict(tmp_path: Path) -> None:
    """Both sides of a pair."""
    folder = str(models.save_reranker(tmp_path))
    plain = CrossEncoder(folder, device="cpu", max_length=24, activation_fn=nn.Identity())
    model = of_kind(plain, DoubledScores)
    pairs = [("a fox", GIANT), (GIANT, "a fox"), (GIANT, GIANT), ("a", "b")]
    with Reranker(model, device="cpu") as ours:
        assert ours.path.startswith("the model's own") and ours._engine.model.check.cut
        wanted = np.concatenate([model.predict([pair]) for pair in pairs])
        model.seen.clear()
        assert np.allclose(ours.score_pairs(pairs), wanted, atol=1e-5)
        assert max(model.seen) < 5_000
