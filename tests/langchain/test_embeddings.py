"""MemsafeEmbeddings: what it adds, what it refuses, and how it asks the core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import langchain_huggingface
import pytest
from pydantic import ValidationError

from langchain_memsafe import MemsafeEmbeddings
from memsafe import ConfigError, InputError, MemoryPolicy, ModelError
from tests.tiny_models import save_routed

from .conftest import Calls, largest_difference

PROMPTS = {"query": "question: ", "document": "passage: ", "other": "other: "}


@pytest.fixture(scope="module")
def prompted(minilm: str) -> MemsafeEmbeddings:
    return MemsafeEmbeddings(model_name=minilm, model_kwargs={"prompts": PROMPTS})


def test_names(minilm: str, ours: MemsafeEmbeddings) -> None:
    """`model` and `model_name` are one field; the core object and the model are in reach."""
    assert MemsafeEmbeddings(model=minilm).model_name == ours.model_name == minilm
    assert ours.embedder.dimension == 384
    assert ours._client is ours.embedder.model
    with pytest.raises(TypeError):
        MemsafeEmbeddings(minilm)


def test_one_call_with_the_whole_list(ours: MemsafeEmbeddings, texts: list[str], core_calls: Calls) -> None:
    """The core sees the whole list in one call: nothing is cut into batches before the planner."""
    ours.embed_documents(texts)
    ours.embed_query("a")
    assert [(call["method"], call["inputs"], call.get("urgent")) for call in core_calls] == [
        ("run", len(texts), None),
        ("run", 1, True),
    ]
    assert [call["kind"] for call in core_calls] == [None, None]  # as upstream: no prompts saved in the model


def test_order_and_twins(ours: MemsafeEmbeddings, texts: list[str]) -> None:
    """Rows are in the caller's order: each equals the embedding of its text alone. Equal texts have equal rows."""
    rows = ours.embed_documents(texts)
    for index in (0, 6, 8, len(texts) - 1):
        assert largest_difference(rows[index], ours.embed_documents([texts[index]])[0]) < 1e-5
    twins = [row for row, text in zip(rows, texts, strict=True) if text == "twin"]
    assert len(twins) == 2 and twins[0] == twins[1]
    assert rows[texts.index("a\nb")] == rows[texts.index("a b")]  # a line break becomes a space


def test_callers_list_is_not_edited(ours: MemsafeEmbeddings) -> None:
    """Replacing line breaks happens on a copy."""
    texts = ["one\ntwo", "three"]
    ours.embed_documents(texts)
    assert texts == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("texts", "index"),
    [("bare", None), (b"bare", None), (None, None), (3, None), (["a", None], 1), ([b"a"], 0), (["a", "b", 3.0], 2),
     (["a", ["b"]], 1)],
    ids=str,
)  # fmt: skip
def test_bad_texts(ours: MemsafeEmbeddings, texts: Any, index: int | None) -> None:
    """What is not a list of strings is refused with the position of the culprit; a bare string is not iterated."""
    with pytest.raises(InputError) as caught:
        ours.embed_documents(texts)
    assert caught.value.index == index
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"]], ids=str)
def test_bad_query(ours: MemsafeEmbeddings, text: Any) -> None:
    """A query that is not a string is refused."""
    with pytest.raises(InputError):
        ours.embed_query(text)


def test_empty_list(ours: MemsafeEmbeddings) -> None:
    """No texts: an empty list."""
    assert ours.embed_documents([]) == []


class Sizes:
    """A hook that keeps the number of rows of every micro-batch."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, event: Any) -> None:
        if type(event).__name__ == "MicroBatchDone":
            self.rows.append(event.sequences)


def test_batch_size_caps_rows(minilm: str, passages: list[str]) -> None:
    """batch_size in encode_kwargs caps the rows of a micro-batch; without it the planner takes more at a time."""
    hook = Sizes()
    embeddings = MemsafeEmbeddings(model_name=minilm, hooks=[hook])
    texts = [passage[:80] for passage in passages[:40]]
    free = embeddings.embed_documents(texts)
    chosen = hook.rows[:]
    hook.rows.clear()
    capped = embeddings.model_copy(update={"encode_kwargs": {"batch_size": 4}}).embed_documents(texts)
    assert max(hook.rows) <= 4 < max(chosen)
    assert sum(hook.rows) == sum(chosen) == len(set(texts))
    assert largest_difference(free, capped) < 1e-5


@pytest.mark.parametrize("option", ["batch_size", "prompt_name", "normalize_embeddings"])
def test_encode_kwargs_are_read_at_every_call(ours: MemsafeEmbeddings, core_calls: Calls, option: str) -> None:
    """As upstream, editing encode_kwargs after construction works; the options of the core get the core's names."""
    embeddings = ours.model_copy(update={"encode_kwargs": {}})
    embeddings.embed_documents(["a"])
    embeddings.encode_kwargs[option] = {"batch_size": 2, "prompt_name": "no", "normalize_embeddings": True}[option]
    name = {"batch_size": "max_rows", "normalize_embeddings": "normalize"}.get(option, option)
    if option == "prompt_name":
        with pytest.raises(ConfigError, match="no"):
            embeddings.embed_documents(["a"])
    else:
        embeddings.embed_documents(["a"])
    assert name not in core_calls[0]
    assert core_calls[1][name] == embeddings.encode_kwargs[option]


@pytest.mark.parametrize(
    ("encode_kwargs", "words"),
    [
        ({"pool": {"processes": []}}, "list of devices"),
        ({"device": "cuda:7"}, "model_kwargs"),
        ({"output_value": "all"}, "sentence_embedding"),
        ({"batch_size": True}, "positive integer"),
        ({"batch_size": 2.5}, "positive integer"),
        ({"normalise": True}, "normalize_embeddings"),
    ],
    ids=str,
)
def test_options_that_cannot_be_had(ours: MemsafeEmbeddings, encode_kwargs: dict[str, Any], words: str) -> None:
    """An option that the core cannot honour is refused with the way to have it, never ignored."""
    with pytest.raises(ConfigError, match=words):
        ours.model_copy(update={"encode_kwargs": encode_kwargs}).embed_documents(["a"])


@pytest.mark.parametrize("name", ["memory", "dtype", "hooks", "normalize", "max_length", "cache_folder", "model"])
def test_model_kwargs_leave_the_fields_alone(minilm: str, name: str) -> None:
    """What is a field here is refused in model_kwargs, with a TypeError as upstream's constructor raises."""
    with pytest.raises(TypeError, match=name) as caught:
        MemsafeEmbeddings(model_name=minilm, model_kwargs={name: None})
    assert isinstance(caught.value, ConfigError)


def test_unknown_model_kwargs(minilm: str) -> None:
    """An option that SentenceTransformer does not know is refused by name."""
    with pytest.raises((ConfigError, TypeError), match="no_such_option"):
        MemsafeEmbeddings(model_name=minilm, model_kwargs={"no_such_option": 1})


def test_device_of_a_call(minilm: str) -> None:
    """A device in encode_kwargs is where the model is loaded: upstream moves it there at the first call."""
    embeddings = MemsafeEmbeddings(model_name=minilm, encode_kwargs={"device": "cpu"})
    assert embeddings.embedder.device == "cpu"
    assert len(embeddings.embed_query("a")) == 384


def test_saved_prompts(prompted: MemsafeEmbeddings) -> None:
    """use_saved_prompts: queries get the saved query prompt, documents the document prompt; off, neither does."""
    with_prompts = prompted.model_copy(update={"use_saved_prompts": True})
    assert with_prompts.embedder is prompted.embedder
    plain = prompted.embed_documents(["question: an apple", "passage: an apple", "an apple"])
    assert largest_difference(with_prompts.embed_query("an apple"), plain[0]) < 1e-5
    assert largest_difference(with_prompts.embed_documents(["an apple"])[0], plain[1]) < 1e-5
    assert largest_difference(prompted.embed_query("an apple"), plain[2]) < 1e-5


def test_named_prompt_wins_over_saved(prompted: MemsafeEmbeddings) -> None:
    """With use_saved_prompts a prompt in encode_kwargs still has the last word."""
    update = {
        "use_saved_prompts": True,
        "encode_kwargs": {"prompt_name": "other"},
        "query_encode_kwargs": {"prompt": ""},
    }
    embeddings = prompted.model_copy(update=update)
    plain = prompted.embed_documents(["other: an apple", "an apple"])
    assert largest_difference(embeddings.embed_documents(["an apple"])[0], plain[0]) < 1e-5
    assert largest_difference(embeddings.embed_query("an apple"), plain[1]) < 1e-5


def test_max_length(minilm: str) -> None:
    """max_length cuts texts to so many tokens."""
    embeddings = MemsafeEmbeddings(model_name=minilm, max_length=8)
    assert embeddings.embedder.max_length == 8
    with pytest.warns(UserWarning, match="longer than 8 tokens"):
        long = embeddings.embed_documents(["word " * 50])
    assert largest_difference(long, embeddings.embed_documents(["word " * 6])) < 1e-5


def test_memory_policy(minilm: str) -> None:
    """memory takes a policy or a dict of its options, reaches the core, and refuses what a policy refuses."""
    policy = MemoryPolicy(limit="3GiB", learn=False)
    for given in (policy, {"limit": "3GiB", "learn": False}):
        embeddings = MemsafeEmbeddings(model_name=minilm, memory=given)
        assert embeddings.memory == embeddings.embedder.memory == policy
    for wrong in ({"limit": 0}, {"no_such_option": 1}, "3GiB"):
        with pytest.raises(ValidationError):
            MemsafeEmbeddings(model_name=minilm, memory=wrong)


def test_dtype(minilm: str, ours: MemsafeEmbeddings) -> None:
    """dtype computes in that type; the result is close to that of float32."""
    half = MemsafeEmbeddings(model_name=minilm, dtype="bfloat16").embed_query("an apple")
    assert 1e-5 < largest_difference(half, ours.embed_query("an apple")) < 0.02


def test_model_errors(tmp_path: Path) -> None:
    """An empty and a missing folder are refused when the object is made."""
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelError):
            MemsafeEmbeddings(model_name=str(folder))


def test_cross_encoder_loads_as_upstream_loads_it(demo_reranker: str) -> None:
    """A folder saved as a cross-encoder gives upstream's rows, averages of its encoder, with a warning when it is made."""
    with pytest.warns(UserWarning, match="was saved as a cross-encoder"):
        ours = MemsafeEmbeddings(model_name=demo_reranker)
    theirs = langchain_huggingface.HuggingFaceEmbeddings(model_name=demo_reranker)
    texts = ["One sentence.", "Another one, which is a little longer."]
    assert largest_difference(ours.embed_documents(texts), theirs.embed_documents(texts)) < 1e-5


def test_progress(ours: MemsafeEmbeddings, capsys: pytest.CaptureFixture[str]) -> None:
    """Quiet by default; show_progress shows a bar."""
    ours.embed_documents(["a", "b"])
    assert "2/2" not in capsys.readouterr().err
    ours.model_copy(update={"show_progress": True}).embed_documents(["a", "b"])
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "expected"),
    [(None, ["cuda:0", "cuda:1"]), ("cuda:1", ["cuda:0", "cuda:1"]), ("cpu", "cpu"), (["cuda:1"], ["cuda:1"])],
    ids=str,
)
def test_multi_process_devices(monkeypatch: pytest.MonkeyPatch, device: Any, expected: Any) -> None:
    """multi_process takes every GPU, as start_multi_process_pool does; a list of devices or the CPU is kept."""
    import torch

    from langchain_memsafe._options import all_devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert all_devices(device) == expected


def test_options_of_the_model_are_passed_on(tmp_path: Path) -> None:
    """encode_kwargs={"task": ...} takes the model's route, as upstream; what nobody knows is refused with its name."""
    from sentence_transformers import SentenceTransformer

    folder = str(save_routed(tmp_path))
    model = SentenceTransformer(folder, device="cpu")
    ours = MemsafeEmbeddings(
        model_name=folder,
        model_kwargs={"device": "cpu"},
        encode_kwargs={"task": "document"},
        query_encode_kwargs={"task": "query"},
    )
    assert largest_difference(ours.embed_documents(["a text"])[0], model.encode("a text", task="document")) < 1e-5
    assert largest_difference(ours.embed_query("a text"), model.encode("a text", task="query")) < 1e-5
    for bad in ("no_such_option", "kind", "max_rows"):
        with pytest.raises(ConfigError, match=f"unknown option '{bad}'"):
            MemsafeEmbeddings(model_name=folder, encode_kwargs={bad: 1}).embed_documents(["a"])
