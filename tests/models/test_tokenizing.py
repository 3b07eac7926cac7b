"""From text to token ids: whatever the model's own preprocessing does, or a way that is shown to do the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import GPT2Config, GPT2Model

from memsafe import ConfigError, Embedder, InputError, Reranker
from memsafe.models import sbert
from memsafe.models.tokenizing import InputEncoder
from memsafe.models.ways import Unfit
from tests.tiny_models import before, save_embedder, save_reranker

try:
    from sentence_transformers.sentence_transformer import modules as st_models
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
except ImportError:  # before sentence-transformers 6
    from sentence_transformers import models as st_models
    from sentence_transformers.models.tokenizer import WhitespaceTokenizer

TEXTS = [
    "short",
    "",
    "  white  space\n\tand lines \r\n",
    "MiXeD Case \u00c4\u00d6\u00df cafe\u0301 \u4f60\u597d [SEP] inside [MASK] and [CLS][PAD]",
    "don't re-use 3,000.50 \u20ac/kg (see a_b?c=d)\u00a0now\u3000then\u200b\u0007 \ufffd",
    "a somewhat longer text, " * 7,
    "a text that is longer than any limit of these models, " * 60,
    "x" * 90 + " " + "y" * 150,
]
PAIRS = [(a, b) for a in TEXTS[:1] + TEXTS[3:4] + TEXTS[6:7] for b in TEXTS] + [(b, TEXTS[3]) for b in TEXTS]

needs_router = pytest.mark.skipif(before("sentence-transformers", 6), reason="settings of sentence-transformers 6")


def own_ids(model: Any, value: Any, prompt: str | None = None, options: Mapping[str, Any] | None = None) -> list[int]:
    """Ids of one input, as the model's own preprocessing gives them for it alone."""
    features = sbert.preprocess(model, [value], prompt, options)
    return [int(i) for i in features["input_ids"][0][features["attention_mask"][0].bool()]]


def check_ids(
    model: Any,
    encoder: InputEncoder,
    values: Sequence[Any],
    prompt: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    for value, encoded in zip(values, encoder.encode(values, prompt, options), strict=True):
        assert encoded.input_ids is not None
        assert encoded.input_ids.tolist() == own_ids(model, value, prompt, options), repr(value)[:80]


def alone(model: Any, texts: Sequence[str], **options: Any) -> np.ndarray:
    """Rows of `encode`, one text at a time."""
    return np.stack([model.encode([text], **options)[0] for text in texts])


def near(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # infinities must be equal


# types of single texts


def typed_gpt2(folder: Path, *, cls_type: int = 0) -> Path:
    """A decoder whose types go into its word embeddings, behind a tokenizer that returns them."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30522, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.15, pad_token_id=0
    )
    save_embedder(folder, "bert", model=GPT2Model(config).eval(), pooling="mean", max_length=64, hidden_size=32)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for piece in tokenizer["post_processor"]["single"]:
        if piece.get("SpecialToken", {}).get("id") == "[CLS]":
            piece["SpecialToken"]["type_id"] = cls_type
        if "Sequence" in piece:
            piece["Sequence"]["type_id"] = min(cls_type, 1)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    take_as_saved(folder)
    return folder


@pytest.mark.parametrize("cls_type", [0, 2])
@pytest.mark.cuts
def test_types_of_single_texts_reach_the_model(tmp_path: Path, cls_type: int) -> None:
    """All zero or not: a model that adds types to its word embeddings gives encode's rows, packed or padded."""
    folder = str(typed_gpt2(tmp_path, cls_type=cls_type))
    model = SentenceTransformer(folder, device="cpu")
    assert sbert.preprocess(model, ["a"], None)["token_type_ids"].tolist() == [[cls_type, min(cls_type, 1), 0]]
    with Embedder(folder, device="cpu") as ours:
        near(ours.run(TEXTS).embeddings, alone(model, TEXTS))


# what a module makes of each text


class Noting(st_models.Transformer):
    """A user's module: gives every text a feature of its own, as jina's adapters do."""

    def _noted(self, features: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        return {**features, "shout": torch.tensor([sum(c.isupper() for c in text) for text in texts])}

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        return self._noted(super().preprocess(inputs, prompt=prompt, **kwargs), inputs)

    def tokenize(self, texts: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not hasattr(st_models.Transformer, "preprocess"):
            return self._noted(super().tokenize(texts, *args, **kwargs), texts)
        return self.preprocess(texts, **kwargs)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        shout = features.pop("shout")
        features = super().forward(features, **kwargs)
        features["token_embeddings"] = features["token_embeddings"] * (1 + shout.float()[:, None, None])
        return features


def test_a_feature_of_each_text_is_never_that_of_a_sample(tmp_path: Path) -> None:
    """A module that looks at the texts themselves: its own code sees each of them."""
    folder = str(save_embedder(tmp_path, "bert"))
    model = SentenceTransformer(modules=[Noting(folder), st_models.Pooling(32)], device="cpu")
    texts = [*TEXTS[3:5], "LOUD", "quiet"]
    wanted = alone(model, texts)
    with Embedder(model, device="cpu") as ours:
        assert ours._engine.model.encoder.mode == "opaque"
        near(ours.run(texts).embeddings, wanted)


def test_word_embeddings_with_lengths_of_their_own() -> None:
    """sentence_lengths, which an LSTM needs, are of the texts at hand, not of a sample."""
    vocabulary = ["PADDING", *{word for text in TEXTS for word in text.lower().split()}]
    embeddings = torch.randn(len(vocabulary), 16, generator=torch.Generator().manual_seed(0))
    words = st_models.WordEmbeddings(WhitespaceTokenizer(vocabulary, do_lower_case=True), embeddings)
    torch.manual_seed(1)
    lstm = st_models.LSTM(16, 8, bidirectional=False)
    model = SentenceTransformer(modules=[words, lstm, st_models.Pooling(8)], device="cpu").eval()
    texts = [text for text in TEXTS if text.strip()][:5]
    wanted = alone(model, texts)
    with Embedder(model, device="cpu") as ours:
        near(ours.run(texts).embeddings, wanted)


def bare_tokenizer(folder: Path) -> None:
    """The tokenizer in `folder` adds no special tokens any more."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    take_as_saved(folder)


def take_as_saved(folder: Path) -> None:
    """Transformers 5 makes BERT's tokenizer anew from its vocabulary, unless it is of no particular class."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_text_of_no_token_at_all(tmp_path: Path, pooling: str) -> None:
    """Where no special tokens are added, "" has none: its row is the one it has in company, and it harms nobody."""
    folder = save_embedder(tmp_path, "bert", pooling=pooling)
    bare_tokenizer(folder)
    model = SentenceTransformer(str(folder), device="cpu")
    texts = ["one", "", "two words", "\u0007", " "]
    wanted = model.encode(texts)
    with Embedder(str(folder), device="cpu") as ours:
        assert ours._engine.model.encoder.encode([""])[0].num_tokens == 0
        near(ours.run(texts).embeddings, wanted)
        near(ours.run([""]).embeddings, wanted[1:2])
        near(ours.run([" ", "\u0007"]).embeddings, wanted[[4, 3]])


# the task decides


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    folders = [save_embedder(tmp_path_factory.mktemp(f"route{seed}"), "bert", seed=seed) for seed in (1, 2)]
    parts = [list(SentenceTransformer(str(folder), device="cpu").children()) for folder in folders]
    for part in parts:
        part[0].max_seq_length = 64
    router = st_models.Router.for_query_document(*parts)
    return SentenceTransformer(modules=[router], device="cpu").eval()


@pytest.mark.parametrize("default", ["document", "query", None])
@pytest.mark.cuts(r"\[(document|query)\]")
def test_queries_and_documents_take_their_routes(routed: SentenceTransformer, default: str | None) -> None:
    """embed_queries is encode_query and embed_documents encode_document, with any default route and none."""
    routed[0].default_route = default
    with Embedder(routed, device="cpu") as ours:
        near(ours.embed_queries(TEXTS), alone(routed, TEXTS, task="query"))
        near(ours.embed_documents(TEXTS), alone(routed, TEXTS, task="document"))
        near(ours.run(TEXTS, task="query").embeddings, alone(routed, TEXTS, task="query"))
        if default is not None:
            near(ours.run(TEXTS).embeddings, alone(routed, TEXTS))


class Scaled(st_models.Transformer):
    """A module whose forward takes an option of its own."""

    forward_kwargs: ClassVar[set[str]] = {"task", "strength"}

    def forward(self, features: dict[str, Any], task: str | None = None, strength: float = 1.0, **kw: Any) -> Any:
        features = super().forward(features, **kw)
        sign = -1.0 if task == "query" else 1.0
        features["token_embeddings"] = features["token_embeddings"] * (sign * strength)
        return features


@pytest.mark.cuts
def test_call_options_of_a_module_are_passed_on_and_share_nothing(tmp_path: Path) -> None:
    """task= and any keyword of a module reach its forward; calls with other options never run together."""
    folder = str(save_embedder(tmp_path, "bert"))
    model = SentenceTransformer(modules=[Scaled(folder), st_models.Pooling(32)], device="cpu")
    with Embedder(model, device="cpu") as ours:
        for options in ({}, {"task": "query"}, {"strength": 2.5}, {"task": "query", "strength": 0.5}):
            near(ours.run(TEXTS, **options).embeddings, alone(model, TEXTS, **options))
        near(ours.embed_queries(TEXTS), alone(model, TEXTS, task="query"))
        keys = {ours._engine.way(None, {"strength": s}).key for s in (1.0, 2.0, True, [1], [1, 2])}
        assert len(keys) == 5
        with pytest.raises(ConfigError, match=r"unknown option 'strenght'.*strength"):
            ours.run(["a"], strenght=1)


def test_the_task_of_a_plain_model_changes_nothing(minilm: str) -> None:
    """A model that takes no task stays on the fast, packed way, and queries may run beside documents."""
    encoder = InputEncoder(SentenceTransformer(minilm, device="cpu"), pairs=False)
    ways = [encoder.way(None, {"task": task}) for task in ("query", "document")]
    assert {way.mode for way in ways} == {"fast"} and ways[0].key == ways[1].key == encoder.way().key


@needs_router
@pytest.mark.cuts
def test_lengths_by_task(tmp_path: Path) -> None:
    """query_length and document_length cut queries and documents, and reports name the length."""
    folder = save_embedder(tmp_path, "bert")
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings | {"query_length": 8, "document_length": 40}))
    model = SentenceTransformer(str(folder), device="cpu")
    assert model[0].query_length == 8
    with Embedder(str(folder), device="cpu") as ours:
        near(ours.embed_queries(TEXTS), alone(model, TEXTS, task="query"))
        near(ours.embed_documents(TEXTS), alone(model, TEXTS, task="document"))
        near(ours.run(TEXTS).embeddings, alone(model, TEXTS))
        with pytest.warns(UserWarning, match="longer than 8 tokens"):
            ours.embed_queries(TEXTS[-2:])


# settings saved in the module


@needs_router
@pytest.mark.parametrize(
    "saved",
    [
        {"text": {"max_length": 24}},
        {"text": {"max_length": 400}},
        {"text": {"padding": "max_length", "max_length": 48}},
    ],
)
@pytest.mark.cuts
def test_saved_settings_of_single_texts(tmp_path: Path, saved: dict[str, Any]) -> None:
    """max_length and padding in processing_kwargs, below and above the model's own length."""
    folder = save_embedder(tmp_path, "bert", max_length=128)
    model = SentenceTransformer(str(folder), device="cpu")
    model[0].processing_kwargs = saved
    encoder = InputEncoder(model, pairs=False)
    assert (encoder.mode, encoder.max_length) == ("fast", saved["text"]["max_length"])
    check_ids(model, encoder, TEXTS)
    wanted = alone(model, TEXTS)
    with Embedder(model, device="cpu") as ours:
        near(ours.run(TEXTS).embeddings, wanted)


def can_be_cut(model: Any, pair: tuple[str, str]) -> bool:
    try:
        own_ids(model, pair)
    except Exception:
        return False
    return True


@needs_router
@pytest.mark.parametrize("strategy", ["only_second", "only_first", "longest_first"])
def test_saved_truncation_of_pairs(tmp_path: Path, strategy: str) -> None:
    """Whichever text the saved settings cut, that one is cut; a pair that cannot be, is refused with its place."""
    model = CrossEncoder(str(save_reranker(tmp_path, "bert", max_length=64)), device="cpu")
    model[0].processing_kwargs = {"text": {"truncation": strategy, "max_length": 48}}
    encoder = InputEncoder(model, pairs=True)
    assert (encoder.mode, encoder.max_length) == ("fast", 48)
    long, short = TEXTS[6], TEXTS[3]
    pairs = [pair for pair in PAIRS if can_be_cut(model, pair)]
    assert 0 < len(PAIRS) - len(pairs) < len(PAIRS) // 2 or strategy == "longest_first"
    check_ids(model, encoder, pairs)
    for pair in set(PAIRS) - set(pairs):
        with pytest.raises(Unfit):
            encoder.encode([pair])
    if strategy != "longest_first":
        bad = (long, short) if strategy == "only_second" else (short, long)
        with (
            Reranker(model, device="cpu") as ours,
            pytest.raises(InputError, match=r"input 1 .*max_length, 48") as info,
        ):
            ours.score_pairs([(short, short), bad])
        assert info.value.index == 1 and long[:20] not in str(info.value)


# ways


@pytest.mark.parametrize("prompt", [None, "query: ", " Instruct: find [SEP]\nQuery:"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 16, 100])
def test_fast_ids_of_texts(minilm: str, side: str, max_length: int, prompt: str | None) -> None:
    """Ids equal the model's own, whatever the text, the prompt, the length and the side that is cut."""
    model = SentenceTransformer(minilm, device="cpu")
    model.tokenizer.truncation_side = side
    model.max_seq_length = max_length
    encoder = InputEncoder(model, pairs=False)
    assert (encoder.mode, encoder.max_length) == ("fast", max_length)
    check_ids(model, encoder, TEXTS, prompt)


@pytest.mark.parametrize("side", ["right", "left"])
def test_fast_ids_and_types_of_pairs(demo_reranker: str, side: str) -> None:
    """Both orders of a pair, long and short, with types, as the model's own preprocessing gives them."""
    model = CrossEncoder(demo_reranker, device="cpu", max_length=40)
    model.tokenizer.truncation_side = side
    encoder = InputEncoder(model, pairs=True)
    assert encoder.mode == "fast"
    check_ids(model, encoder, PAIRS)
    for pair, encoded in zip(PAIRS, encoder.encode(PAIRS), strict=True):
        wanted = sbert.preprocess(model, [pair], None)["token_type_ids"][0].tolist()
        assert encoded.token_type_ids is not None and encoded.token_type_ids.tolist() == wanted


def test_foreign_code_is_called_not_imitated(minilm: str) -> None:
    """A tokenizer call that somebody replaced may do anything with a text that samples do not show."""
    model = SentenceTransformer(minilm, device="cpu")

    class Own(type(model.tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super().__call__([t.replace("colour", "color") for t in text], *args, **kwargs)

    model.tokenizer.__class__ = Own
    encoder = InputEncoder(model, pairs=False)
    assert encoder.mode != "fast"
    a, b = encoder.encode(["the colour", "the color"])
    assert a.input_ids is not None and b.input_ids is not None and a.input_ids.tolist() == b.input_ids.tolist()


def as_foreign(model: Any) -> None:
    """Make the tokenizer one of somebody's own, which is called and not imitated."""

    class Own(type(model.tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    model.tokenizer.__class__ = Own


def giants(num_chars: int) -> list[str]:
    units = ("words of a text that never ends ", "\u4f60\u597d\u4e16\u754c\u9019\u662f\u4e00\u500b\u6587\u672c", "!?")
    texts = [(unit * num_chars)[:num_chars] for unit in units]
    return [*texts, "the" + " " * num_chars + "end", "the " + "x" * num_chars]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", ["fast", "features"])
def test_giant_pairs_are_those_of_the_uncut_texts(demo_reranker: str, mode: str, side: str) -> None:
    """Both sides cut: the very ids that the model's own preprocessing gives (which needs gigabytes for longer ones)."""
    model = CrossEncoder(demo_reranker, device="cpu", max_length=100)
    model.tokenizer.truncation_side = side
    if mode == "features":
        as_foreign(model)
    encoder = InputEncoder(model, pairs=True)
    assert encoder.mode == mode
    texts = [*giants(6_000), "short"]
    pairs = [(a, b) for a in texts for b in texts]
    check_ids(model, encoder, pairs)
    assert encoder.way().num_bytes(10**7) == encoder.way().num_bytes(10**6) < 10**7


def test_giant_texts_are_cut_before_the_forward_sees_them(routed: SentenceTransformer) -> None:
    """Where the raw text goes to the forward, it is cut too, and rows are those of the whole text."""
    routed[0].default_route = "document"
    encoder = InputEncoder(routed, pairs=False)
    texts = giants(100_000)
    for encoded in encoder.encode(texts, None, {"task": "query"}):
        assert encoded.input_ids is None and len(encoded.raw) < 20_000
    with Embedder(routed, device="cpu") as ours:
        near(ours.embed_queries(texts), alone(routed, texts, task="query"))


# what users hand in


class Words(str, Enum):
    GREETING = "hello there"


class Loud(str):
    def __str__(self) -> str:
        return self.upper()


def test_a_str_is_its_value(minilm: str) -> None:
    """Members of a str enumeration, any str with a __str__ of its own: what is embedded is the text they are."""
    texts = [Words.GREETING, Loud("MiXed [SEP]"), np.str_("plain")]
    with Embedder(minilm, device="cpu") as ours:
        wanted = ours.run(["hello there", "MiXed [SEP]", "plain"], prompt="pro ").embeddings
        assert np.array_equal(ours.run(texts, prompt=Loud("pro ")).embeddings, wanted)


def test_tables_and_arrays(minilm: str, demo_reranker: str) -> None:
    """A table is refused with the remedy; a column, and arrays of pairs, are taken."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"query": ["a b", "c"], "document": ["d e", "f"]})
    with Embedder(minilm, device="cpu") as ours:
        with pytest.raises(InputError, match=r"got a DataFrame.*one column"):
            ours.embed_documents(table)
        near(ours.embed_documents(table["query"]), ours.embed_documents(["a b", "c"]))
        with pytest.raises(InputError, match="bare str"):
            ours.embed_documents(np.array("abc"))
    with Reranker(demo_reranker, device="cpu") as ranker:
        wanted = ranker.score_pairs([("a b", "d e"), ("c", "f")])
        for pairs in (table.values, np.array([["a b", "d e"], ["c", "f"]]), [np.array(["a b", "d e"]), ["c", "f"]]):
            assert np.array_equal(ranker.score_pairs(pairs), wanted)
        with pytest.raises(InputError, match=r"got a DataFrame.*values"):
            ranker.score_pairs(table)
