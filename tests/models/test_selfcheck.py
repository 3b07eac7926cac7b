"""The self-check lets through what is equal, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface

from memsafe.attention import grouped, interface, regrouped
from memsafe.models import packed, probes, selfcheck
from memsafe.models.routes import Routes
from memsafe.models.selfcheck import SelfCheck
from tests import tiny_models as models
from tests.tiny_models import needs_interface

pytestmark = needs_interface


def load(folder: Path, architecture: str = "bert", kind: str = "embedder", **options: Any) -> Any:
    if kind == "embedder":
        return SentenceTransformer(str(models.save_embedder(folder, architecture, **options)), device="cpu").eval()
    return CrossEncoder(str(models.save_reranker(folder, architecture, **options)), device="cpu").eval()


def checked(model: nn.Module) -> SelfCheck:
    check: SelfCheck = models.loaded(model).check
    return check


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
@pytest.mark.parametrize("architecture", models.PACKABLE)
def test_architectures_on_the_interface_pass(tmp_path: Path, architecture: str, kind: str) -> None:
    """Embedders and rerankers of every architecture on the attention interface may pack and use the small mask."""
    check = checked(load(tmp_path, architecture, kind))
    assert check.packed_ok and not check.alone and check.reason == ""
    assert 0 <= check.max_difference < 1e-5
    assert 0 < check.seconds < 30


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
@pytest.mark.parametrize("architecture", ["deberta_v2", "mpnet"])
def test_architectures_with_their_own_attention_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, kind: str
) -> None:
    """DeBERTa-v2 and MPNet, which ignore the interface, are caught by their numbers even if packed all the same."""
    monkeypatch.setattr(Routes, "_refusal", lambda self: "")
    monkeypatch.setattr(regrouped, "install", lambda model: 0)
    check = checked(load(tmp_path, architecture, kind))
    assert not check.packed_ok
    assert "differ" in check.reason
    assert check.max_difference > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3"])
def test_half_precision_passes_within_its_rounding(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    """The tolerance of half precision covers its rounding, and differences stay far below a real mistake's."""
    check = checked(load(tmp_path, architecture, dtype=dtype))
    assert check.packed_ok
    assert 0 <= check.max_difference < selfcheck.tolerance(dtype, torch.device("cpu")) <= 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mistake_of_half_precision_is_still_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Sequences that see their neighbours fail in every precision."""
    model = load(tmp_path, dtype=dtype)
    monkeypatch.setattr(interface.Packed, "of", _one_long_sequence(interface.Packed.of))
    check = checked(model)
    assert not check.packed_ok and check.small_mask_ok
    assert check.max_difference > 0.1


def _one_long_sequence(real: Any) -> Any:
    def of(lengths: Any, device: Any = None) -> interface.Packed:
        state = real(lengths, device)
        state.groups = ((0, 1, state.tokens),)
        return state

    return staticmethod(of)


@pytest.mark.parametrize("window", [0, 1, -1, 40])
def test_a_wrong_window_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """A sequence longer than any sliding window is among the trials: a band off by one fails, the right one passes."""
    model = load(tmp_path, "modernbert")
    real = grouped._band

    def wrong(state: Any, queries: int, keys: int, offset: int, right: int, *rest: Any) -> Tensor:
        return real(state, queries, keys, offset, right + window, *rest)

    monkeypatch.setattr(grouped, "_band", wrong)
    assert checked(model).packed_ok == (window == 0)


def test_attention_that_ignores_the_interface_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that accepts another attention's name but computes its own over the whole row is not packed."""
    model = load(tmp_path)
    attention = type(packed.find_hf_model(model).encoder.layer[0].attention.self)

    def own(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        query, key, value = (project(hidden_states) for project in (self.query, self.key, self.value))
        scores = query @ key.transpose(1, 2)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, 0], float("-inf"))
        return scores.softmax(-1) @ value, None

    monkeypatch.setattr(attention, "forward", own)
    check = checked(model)
    assert not check.packed_ok and check.small_mask_ok


def test_tokens_mixed_beside_attention_are_caught(tmp_path: Path) -> None:
    """A convolution over the sequence reaches into the neighbours of a packed row: not packed, padded as ever."""
    model = load(tmp_path)
    encoder = packed.find_hf_model(model)

    class Mixing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: Tensor) -> Tensor:
            inner: Tensor = self.inner(hidden_states)
            return inner + torch.roll(inner, 1, dims=1)

    encoder.encoder.layer[0].intermediate = Mixing(encoder.encoder.layer[0].intermediate)
    assert not checked(model).packed_ok


def test_positions_out_of_place_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that start one too early, as for RoBERTa without its offset, change the numbers and fail."""
    model = load(tmp_path, "xlm_roberta")
    monkeypatch.setattr(interface, "padding_position", lambda encoder: None)
    assert not checked(model).packed_ok


def test_a_number_that_is_none_fails(tmp_path: Path) -> None:
    """A model whose output is not finite passes neither check: NaN is never equal."""
    model = load(tmp_path)
    with torch.no_grad():
        packed.find_hf_model(model).encoder.layer[1].output.dense.bias[3] = float("nan")
    check = checked(model)
    assert not check.packed_ok and not check.small_mask_ok
    assert "finite" in check.reason


@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_small_mask_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """Where nothing can be packed, the small mask serves; where that gives other numbers, the model's own mask does."""
    model = load(tmp_path)
    real = AttentionInterface()[interface.NAME]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("attention with a twist")

    def blind(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        small = wrong and mask is not None and mask.shape[2] == 1 < query.shape[2]
        return real(module, query, key, value, None if small else mask, **options)

    monkeypatch.setattr(grouped, "attend", fail)
    monkeypatch.setitem(AttentionInterface._global_mapping, interface.NAME, blind)
    check = checked(model)
    assert (check.packed_ok, check.small_mask_ok, check.alone) == (False, not wrong, False)


@pytest.mark.parametrize(
    ("kind", "options", "head"),
    [
        ("embedder", {"pooling": "mean"}, "flat"),
        ("embedder", {"pooling": "cls"}, "first"),
        ("embedder", {"pooling": "lasttoken"}, "last"),
        ("embedder", {"architecture": "qwen3"}, "last"),
        ("reranker", {}, "first"),
        ("reranker", {"architecture": "qwen3"}, "last"),
        ("reranker", {"architecture": "modernbert", "classifier_pooling": "mean"}, "groups"),
    ],
    ids=str,
)
def test_the_head_is_the_quickest_that_is_right(tmp_path: Path, kind: str, options: dict[str, Any], head: str) -> None:
    """What stands behind the encoder is run on single tokens or on the flat row only where that gives the same rows."""
    model = load(tmp_path, kind=kind, **options)
    check = checked(model)
    if head == "flat" and not hasattr(model[1], "_forward_flattened"):  # sentence-transformers before 5.4
        head = "groups"
    assert check.packed_ok and check.head == head


def test_an_error_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a packed forward raises becomes the reason for not packing; the plain path is not touched."""
    model = load(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("attention with a twist")

    monkeypatch.setattr(grouped, "attend", fail)
    check = checked(model)
    assert not check.packed_ok and check.small_mask_ok
    assert check.reason == "attention with a twist"
    assert check.max_difference == float("inf")


def test_memory_errors_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory says nothing about the numbers: it is the caller's to recover from."""
    ways = models.loaded(load(tmp_path)).routes

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(grouped, "attend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        selfcheck.run_self_check(ways)


def test_a_model_without_an_encoder_has_a_reason() -> None:
    """What has no transformers model inside is not packed, says so, and gives its own rows."""
    static = models.st_modules().StaticEmbedding
    tokenizer = Tokenizer.from_file(str(models.minilm_folder() / "tokenizer.json"))
    model = SentenceTransformer(modules=[static(tokenizer, embedding_dim=8)], device="cpu")
    check = checked(model)
    assert not check.packed_ok and not check.small_mask_ok
    assert "through transformers" in check.reason


def test_the_real_model_passes(minilm: str) -> None:
    """all-MiniLM-L6-v2 is packed; its difference is that of sums in another order."""
    check = checked(SentenceTransformer(minilm, device="cpu").eval())
    assert check.packed_ok
    assert check.max_difference < 5e-6


@pytest.mark.parametrize("large", [False, True])
def test_the_check_runs_few_tokens(minilm: str, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """Three passes over the probes, in ten forwards: what has no prompt and no task is not run again as a query and as a
    document. (Fourteen more forwards, each of which reads all weights: 6.7 instead of 3.8 s for bge-m3's shape on one core.)"""
    if large:
        monkeypatch.setattr(probes, "budget_tokens", lambda *_: 126)
    ways, sizes = models.loaded(SentenceTransformer(minilm, device="cpu").eval()).routes, []
    ways.encoder_module.get_input_embeddings().register_forward_hook(lambda _, args, out: sizes.append(args[0].numel()))
    selfcheck.run_self_check(ways)
    assert len(sizes) <= 8 + 2 and sum(sizes) <= 3 * (100 if large else 310)  # each probe alone, then all of them twice


def test_prompts_and_tasks_are_tried_where_they_change_something(tmp_path: Path) -> None:
    """Queries with a prompt are called beside the bare texts, documents without one are not; a task that a forward is told of
    is, and so is everything where the model's methods are not sentence-transformers' own."""
    model = load(tmp_path)
    few, found = ["a b", "c"], probes.calls(model, pairs=False)
    assert probes.telling(model, few, found) == []
    model.prompts["query"] = "query: "
    found = probes.calls(model, pairs=False)
    assert [call.kind or call.prompt_name for call in probes.telling(model, few, found)] == ["query"]

    class Other(SentenceTransformer):
        def encode(self, *args: Any, **options: Any) -> Any:
            return super().encode(*args, **options)

    model.__class__ = Other
    assert probes.telling(model, few, found) == found
    routed = SentenceTransformer(str(models.save_routed(tmp_path / "routed")), device="cpu")
    kinds = [call.kind for call in probes.telling(routed, few, probes.calls(routed, pairs=False))]
    assert {"query", "document"} <= set(kinds)


def test_large_models_are_tried_on_fewer_tokens() -> None:
    """The trial costs a bounded number of operations on a CPU."""
    small = models.tiny_model(models.tiny_config("bert"))
    cpu = torch.device("cpu")
    assert probes.longest_wanted(small, None, cpu) == 90
    assert probes.longest_wanted(small, 256, cpu) == 276  # beyond what the model takes

    class Large(nn.Module):
        config = models.tiny_config("bert", max_positions=8192)

        def get_input_embeddings(self) -> nn.Embedding:
            return nn.Embedding(1, 1)

        def parameters(self, recurse: bool = True) -> Any:
            return iter([torch.empty(300_000_000, device="meta")])

    assert probes.budget_tokens(Large(), cpu) * 3 * 2 * 300e6 < 2.4e11
    assert probes.longest_wanted(Large(), 512, cpu) < 70
    assert probes.longest_wanted(Large(), 512, torch.device("cuda")) == 532


@pytest.mark.parametrize("architecture", ["modernbert", "roberta"])
def test_trials_respect_the_models_longest_input(tmp_path: Path, architecture: str) -> None:
    """A trial beyond the longest input is cut by the model, not by a failure."""
    check = checked(load(tmp_path, architecture, max_positions=30, max_length=30))
    assert check.packed_ok
