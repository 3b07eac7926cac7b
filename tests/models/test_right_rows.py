"""Kinds of models whose rows came out wrong without a word: each gives the model's own, whatever runs together."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import Tensor, nn

from memsafe import Embedder, Reranker
from memsafe.models.checkstore import check_key
from memsafe.models.private import length_switch
from memsafe.models.probes import BARE
from tests import tiny_models as models
from tests.tiny_models import own_rows

WORDS = "the river runs past nine old mills and one red bridge before it meets a wide grey sea".split()
QUIET = {"learn": False}


def text_of(tokens: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, tokens))


def embedder(folder: Path) -> tuple[Embedder, SentenceTransformer]:
    return Embedder(str(folder), device="cpu", memory=QUIET), SentenceTransformer(str(folder), device="cpu")


def assert_close(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    ours, theirs = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
    norm = np.maximum(np.linalg.norm(theirs, axis=1), 1.0 if theirs.shape[1] < 16 else 0.0)
    assert (np.linalg.norm(ours - theirs, axis=1) / norm).max() < 1e-5


# -- what a model derives from input_ids == padding ------------------------------------------------------------------

MARKED = ["[PAD] at the start", "in the [PAD] [PAD] middle", "at the end [PAD]", "plain", "[PAD]", "", text_of(70)]


@models.needs_interface
@pytest.mark.parametrize("architecture", ["roberta", "xlm_roberta", "bert", "modernbert"])
def test_padding_written_in_a_text(tmp_path: Path, architecture: str) -> None:
    """RoBERTa's positions skip padding tokens: packed rows of texts that hold some are the model's own."""
    ours, theirs = embedder(models.save_embedder(tmp_path, architecture))
    with ours:
        assert ours.path == "packed"
        assert_close(ours.embed_documents(MARKED), own_rows(theirs, MARKED))


@models.needs_interface
def test_a_classifier_that_takes_the_last_token_that_is_no_padding(tmp_path: Path) -> None:
    """A decoder's classifier looks for padding in the ids: texts that end in it score as they do alone."""
    folder = models.save_reranker(tmp_path, "qwen3")
    models.save_tokenizer(folder, "qwen3", special_tokens=False)
    pairs = [(text, "and [PAD]") for text in MARKED[:4]] + [(text_of(9), "b [PAD] [PAD]"), ("a", "b"), ("x y", "z")]
    with Reranker(str(folder), device="cpu", memory=QUIET) as ours:
        assert ours.path == "packed" and ours._engine.model.check.head == "last"
        scores = np.asarray(ours.score_pairs(pairs), dtype=np.float64)
        raw = np.log(scores / (1 - scores))  # ours are behind the model's own activation, a sigmoid
        assert_close(raw, own_rows(CrossEncoder(str(folder), device="cpu"), pairs)[:, 0])


@models.needs_interface
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_default_prompt_hides_no_head(tmp_path: Path, pooling: str) -> None:
    """Heads are told apart without the default prompt, whose length would make each step back for the careful one."""
    prompts = {"query": "question: ", "other": "x: "}
    folder = models.save_embedder(tmp_path, pooling=pooling, prompts=prompts, default_prompt_name="other")
    texts = [text_of(n, n) for n in (12, 3, 40)]
    ours, theirs = embedder(folder)
    with ours:
        for found, method in (
            (ours.embed_documents(texts), theirs.encode_document),
            (ours.embed_queries(texts), theirs.encode_query),
            (ours.run(texts).embeddings, theirs.encode),
            (ours.run(texts, prompt="").embeddings, lambda given: theirs.encode(given, prompt="")),
        ):
            assert_close(found, np.concatenate([method([text]) for text in texts]))


@models.needs_interface
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_padding_at_the_end_hides_no_head(tmp_path: Path, pooling: str) -> None:
    """Heads are told apart on texts that do not end in padding, where "last" would step back as well."""
    folder = models.save_embedder(tmp_path, "qwen3", pooling=pooling)
    models.save_tokenizer(folder, "qwen3", padding_side="left", special_tokens=False)
    texts = [text_of(n, n) for n in (12, 3, 40)] + ["a [PAD]"]
    ours, theirs = embedder(folder)
    with ours:
        assert (ours._engine.model.check.head == "last") == (pooling == "lasttoken")
        assert_close(ours.embed_documents(texts), own_rows(theirs, texts))


# -- state, or a switch by length, inside a forward -------------------------------------------------------------------

ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 5.0, 7.0, 9.0],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
}


def with_rope(folder: Path, kind: str, **options: Any) -> Path:
    config = models.tiny_config("qwen3", max_positions=64 if kind == "longrope" else 16, rope_parameters=ROPES[kind])
    return models.save_embedder(folder, "qwen3", model=models.tiny_model(config), **options)


@models.needs_interface
@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_that_depend_on_the_longest_position(tmp_path: Path, kind: str) -> None:
    """With "dynamic" and "longrope" rotary positions a text's row depends neither on its neighbours nor on those before
    it, and two lanes do not race for the frequencies; texts within the learnt length are still packed."""
    ours, theirs = embedder(with_rope(tmp_path, kind, pooling="mean"))
    assert length_switch(theirs) == 16
    texts = [text_of(n, n) for n in (3, 9, 14, 15, 16, 17, 30, 60, 5, 120, 12, 40)]
    wanted = own_rows(theirs, texts)
    with ours, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours.path == "packed"
        assert_close(ours.embed_documents(texts), wanted)
        found: list[Any] = [None] * 4

        def work(place: int) -> None:
            order = np.random.default_rng(place).permutation(len(texts))
            rows = ours.embed_documents([texts[i] for i in order], max_rows=1 + place)
            found[place] = rows[np.argsort(order)]

        threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rows in found:
            assert_close(rows, wanted)


@models.needs_interface
def test_a_switch_that_no_input_reaches_costs_nothing(tmp_path: Path) -> None:
    """Where inputs are cut before the switch, nothing needs to run alone."""
    loaded = models.loaded(with_rope(tmp_path, "dynamic", max_length=16))
    assert loaded.routes.company(["word " * 100, "a"], BARE) == [True, True] and loaded.packed


class Remembers(nn.Module):
    """Adds what it saw longest so far: state that no name gives away."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.longest = inner, 1

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.longest = max(self.longest, hidden_states.shape[1])
        output: Tensor = self.inner(hidden_states)
        return output * (1 + 0.01 * self.longest)


class Counts(nn.Module):
    """Depends on the width of the row alone: padding, or what is packed with it, changes it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.inner(hidden_states)
        return output * (1 + 0.01 * hidden_states.shape[1])


@models.needs_interface
@pytest.mark.parametrize("module", [Remembers, Counts])
def test_rows_that_depend_on_company_run_alone(tmp_path: Path, module: type[nn.Module]) -> None:
    """Where rows depend on what runs together or ran before, each input runs alone in the state that the model came in."""
    theirs = SentenceTransformer(str(models.save_embedder(tmp_path)), device="cpu")
    layer = theirs[0].auto_model.encoder.layer[0]
    layer.intermediate = module(layer.intermediate)
    texts = [text_of(n, n) for n in (60, 3, 30, 12, 5)]
    with Embedder(theirs, device="cpu", memory=QUIET) as ours:
        assert ours.path.startswith("one input at a time (")
        wanted = own_rows(theirs, texts)
        assert_close(ours.embed_documents(texts), wanted)
        assert_close(ours.embed_documents(texts[::-1])[::-1], wanted)


@models.needs_interface
def test_what_rounding_explains_does_not_cost_company(tmp_path: Path) -> None:
    """A batch whose rows differ from those alone by a few units of rounding is not run one input at a time."""
    theirs = SentenceTransformer(str(models.save_embedder(tmp_path)), device="cpu")

    class Rounds(Counts):
        def forward(self, hidden_states: Tensor) -> Tensor:
            output: Tensor = self.inner(hidden_states)
            return output * (1 + 3e-7 * hidden_states.shape[1])

    layer = theirs[0].auto_model.encoder.layer[0]
    layer.intermediate = Rounds(layer.intermediate)
    loaded = models.loaded(theirs)
    assert 1e-5 < loaded.check.max_difference < 1e-4
    assert not loaded.packed and not loaded.check.alone


# -- one check for one thing -----------------------------------------------------------------------------------------


@models.needs_interface
@pytest.mark.parametrize("before", ["cls", "lasttoken"])
def test_a_remembered_check_is_of_this_very_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Checked with one pooling, then loaded from the same files with another: the head is the new one's."""
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    texts = [text_of(n, n) for n in (12, 3, 40)]
    folder = models.save_embedder(tmp_path / "model", pooling=before)
    with Embedder(str(folder), device="cpu") as first:
        first.embed_documents(texts)
    kept = {file: file.stat() for file in folder.rglob("*") if file.is_file()}
    pooling = folder / "1_Pooling" / "config.json"
    other = models.save_embedder(tmp_path / "other", pooling="mean") / "1_Pooling" / "config.json"
    pooling.write_text(other.read_text().ljust(kept[pooling].st_size))
    os.utime(pooling, ns=(kept[pooling].st_atime_ns, kept[pooling].st_mtime_ns))
    with Embedder(str(folder), device="cpu") as second:
        assert_close(second.embed_documents(texts), own_rows(SentenceTransformer(str(folder), device="cpu"), texts))


def test_checks_of_anything_else_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's next version, other files (the tokenizer's, remote code's), another card or load option, another setting of a
    module: each is checked anew."""
    model = SentenceTransformer(str(models.save_embedder(tmp_path)), device="cpu")
    given: dict[str, Any] = {"spec": {"model": "m", "options": {}}, "revision": "1", "card": "cpu", "tokens": "fast"}

    def key(**changed: Any) -> str:
        return check_key(model=model, tokenizer=model.tokenizer, **{**given, **changed})

    keys = [key(), key(revision="2"), key(card="NVIDIA T4"), key(tokens="opaque")]
    keys.append(key(spec={"model": "m", "options": {"model_kwargs": {"attn_implementation": "eager"}}}))
    for package in ("memsafe", "sentence_transformers", "tokenizers", "torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{package}.__version__", "99.0.0")
            keys.append(key())
    assert key() == keys[0]
    model[0].auto_model.config.layer_norm_eps = 1e-3
    keys.append(key())
    model[1].include_prompt = False
    keys.append(key())
    model[0].auto_model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()
    keys.append(key())
    assert len(set(keys)) == len(keys)


@models.needs_interface
def test_options_that_change_the_model_are_checked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder with other config_kwargs or another length is another model to the self-check."""
    from memsafe.models import model

    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    folder = str(models.save_embedder(tmp_path / "model"))
    real, ran = model.run_self_check, []
    monkeypatch.setattr(model, "run_self_check", lambda subject: ran.append(1) or real(subject))
    for options, runs in (
        ({}, 1),
        ({}, 1),
        ({"config_kwargs": {"layer_norm_eps": 1e-3}}, 2),
        ({"max_length": 100}, 3),
        ({"prompts": {"query": "q: "}}, 4),
        ({"max_length": 100}, 4),
    ):
        Embedder(folder, device="cpu", **options).close()  # type: ignore[arg-type]
        assert len(ran) == runs
    Embedder(SentenceTransformer(folder, device="cpu"), device="cpu").close()
    assert len(ran) == 5  # what is handed in loaded is checked itself
