"""Packed attention, masks, kernels and packed forwards, each against plain attention of one sequence at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from memsafe.attention import interface, kernels
from memsafe.models.packed import PackedModel, find_hf_model
from tests import tiny_models as models

pytestmark = models.needs_interface

LENGTHS = (60, 33, 33, 9, 3, 3, 3, 1)
ATTEND = AttentionInterface()[interface.NAME]
MASK = AttentionMaskInterface()[interface.NAME]


def ids_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1000, 20000, (length,), generator=generator) for length in lengths]


def alone(model: nn.Module, ids: list[Tensor], packed_model: PackedModel) -> Tensor:
    """Each sequence by itself, without padding: the truth."""
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    return torch.cat([packed_model.plain(row) for row in rows])


def build(folder: Path, architecture: str, kind: str, **options: Any) -> nn.Module:
    if kind == "embedder":
        return SentenceTransformer(str(models.save_embedder(folder, architecture, **options)), device="cpu").eval()
    return CrossEncoder(str(models.save_reranker(folder, architecture, **options)), device="cpu").eval()


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
@pytest.mark.parametrize("architecture", models.PACKABLE)
def test_packed_rows_equal_single_rows(tmp_path: Path, architecture: str, kind: str) -> None:
    """Every architecture that uses the attention interface gives packed what it gives one sequence at a time."""
    options = {"num_labels": 3} if kind == "reranker" else {}
    model = build(tmp_path, architecture, kind, **options)
    packed_model = PackedModel(model)
    ids = ids_of()
    wanted = alone(model, ids, packed_model)
    assert interface.install(packed_model.hf_model)
    got = packed_model.forward(torch.cat(ids), LENGTHS)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_every_pooling_runs_unchanged(tmp_path: Path, pooling: str) -> None:
    """Pooling, a Dense layer and Normalize are sentence-transformers' own, whatever the mode."""
    model = build(tmp_path, "bert", "embedder", pooling=pooling, dense_dim=7, normalize=True)
    packed_model = PackedModel(model)
    ids = ids_of()
    wanted = alone(model, ids, packed_model)
    interface.install(packed_model.hf_model)
    torch.testing.assert_close(packed_model.forward(torch.cat(ids), LENGTHS), wanted, rtol=1e-5, atol=1e-6)


def test_token_types_and_prompt_length_reach_the_model(tmp_path: Path) -> None:
    """Token types enter the encoder, and a prompt that pooling must leave out is left out, packed as padded."""
    model = build(tmp_path, "bert", "embedder", include_prompt=False)
    packed_model = PackedModel(model)
    lengths = (12, 12, 7)
    ids = ids_of(lengths)
    types = [torch.arange(length) % 2 for length in lengths]
    wanted = torch.cat(
        [
            packed_model.plain(
                {"input_ids": i[None], "attention_mask": torch.ones_like(i[None]), "token_type_ids": t[None]}
                | {"prompt_length": 3}
            )
            for i, t in zip(ids, types, strict=True)
        ]
    )
    interface.install(packed_model.hf_model)
    got = packed_model.forward(torch.cat(ids), lengths, torch.cat(types), {"prompt_length": 3})
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    without = packed_model.forward(torch.cat(ids), lengths)
    assert (without - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "pooling", "head"),
    [
        ("embedder", "cls", "first"),
        ("embedder", "lasttoken", "last"),
        ("embedder", "mean", "flat"),
        ("embedder", "max", "flat"),
        ("embedder", "weightedmean", "flat"),
        ("reranker", None, "first"),
    ],
)
def test_quick_heads_give_the_same_rows(tmp_path: Path, kind: str, pooling: str | None, head: str) -> None:
    """Where a head looks at one token, or pooling knows where sequences start, one call behind the encoder is enough."""
    options = {"pooling": pooling, "dense_dim": 7, "normalize": True} if kind == "embedder" else {"num_labels": 3}
    model = build(tmp_path, "bert", kind, **options)
    by_groups, quick = PackedModel(model), PackedModel(model, head)
    interface.install(by_groups.hf_model)
    ids = torch.cat(ids_of())
    types = torch.arange(len(ids)) % 2
    wanted = by_groups.forward(ids, LENGTHS, types)
    torch.testing.assert_close(quick.forward(ids, LENGTHS, types), wanted, rtol=1e-5, atol=1e-6)
    assert len(outer_calls(quick, ids, LENGTHS)) == 1
    assert len(outer_calls(by_groups, ids, LENGTHS)) == len(set(LENGTHS))


def outer_calls(packed_model: PackedModel, ids: Tensor, lengths: Any) -> list[Any]:
    """How often a packed forward runs what stands behind the encoder."""
    calls: list[Any] = []
    handle = packed_model.model.register_forward_hook(lambda module, args, output: calls.append(output))
    packed_model.forward(ids, lengths)
    handle.remove()
    return calls


def test_a_prompt_outside_pooling_needs_whole_sequences(tmp_path: Path) -> None:
    """With a prompt to leave out, the first token is not the one that cls pooling takes: the quick head steps back."""
    model = build(tmp_path, "bert", "embedder", pooling="cls", include_prompt=False)
    by_groups, quick = PackedModel(model), PackedModel(model, "first")
    interface.install(by_groups.hf_model)
    ids, lengths, features = torch.cat(ids_of((12, 9))), (12, 9), {"prompt_length": 4}
    wanted = by_groups.forward(ids, lengths, None, features)
    assert torch.equal(quick.forward(ids, lengths, None, features), wanted)
    assert not torch.allclose(quick.forward(ids, lengths), wanted)


def test_an_unknown_head_is_refused(tmp_path: Path) -> None:
    """A head that does not exist is an error, not silence."""
    with pytest.raises(ValueError, match="choose from"):
        PackedModel(build(tmp_path, "bert", "embedder"), "middle")


def test_threads_share_a_model(tmp_path: Path) -> None:
    """Forwards of several threads at once on one model do not meet, and a thread without a context runs plain sdpa."""
    model = build(tmp_path, "xlm_roberta", "embedder")
    packed_model = PackedModel(model)
    jobs = [ids_of(lengths, seed) for seed, lengths in enumerate([(40, 8, 8), (25, 25), (3, 2, 1), (31,)] * 3)]
    wanted = [alone(model, ids, packed_model) for ids in jobs]
    interface.install(packed_model.hf_model)
    failures: list[str] = []
    start = threading.Barrier(len(jobs))

    def work(place: int) -> None:
        start.wait()
        for turn in range(6):
            if (turn + place) % 3 == 0:
                got = alone(model, jobs[place], packed_model)
            else:
                got = packed_model.forward(torch.cat(jobs[place]), [len(ids) for ids in jobs[place]])
            if not torch.allclose(got, wanted[place], rtol=1e-5, atol=1e-5):
                failures.append(f"job {place}, turn {turn}")

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_users_model_is_left_as_it_was(tmp_path: Path) -> None:
    """A packed forward changes no module of the model; uninstalling restores its attention once nobody needs ours."""
    model = build(tmp_path, "bert", "reranker")
    packed_model = PackedModel(model)
    before = {name: id(module) for name, module in model.named_modules()}
    hf = packed_model.hf_model
    assert interface.install(hf) and interface.install(hf)
    packed_model.forward(torch.cat(ids_of()), LENGTHS)
    assert {name: id(module) for name, module in model.named_modules()} == before
    interface.uninstall(hf)
    assert hf.config._attn_implementation == interface.NAME
    interface.uninstall(hf)
    assert hf.config._attn_implementation == "sdpa"
    interface.uninstall(hf)
    assert hf.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3"])
def test_without_a_context_it_is_sdpa(tmp_path: Path, architecture: str) -> None:
    """Somebody else's padded forward through the installed model is bit for bit what sdpa gives."""
    hf = models.tiny_model(models.tiny_config(architecture))
    ids = torch.stack([torch.cat([row, torch.zeros(40 - len(row), dtype=torch.long)]) for row in ids_of((40, 22, 5))])
    mask = (torch.arange(40)[None] < torch.tensor([40, 22, 5])[:, None]).long()
    with torch.inference_mode():
        wanted = hf(input_ids=ids, attention_mask=mask).last_hidden_state
        assert interface.install(hf)
        got = hf(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(("architecture", "word"), [("mpnet", "eager"), ("deberta_v2", "eager")])
def test_models_with_their_own_attention_are_refused(architecture: str, word: str) -> None:
    """Eager-only models are not installed, with the reason, and keep their attention."""
    hf = models.tiny_model(models.tiny_config(architecture))
    installation = interface.install(hf)
    assert not installation
    assert word in installation.reason
    assert hf.config._attn_implementation == "eager"


def test_a_users_choice_of_attention_stays() -> None:
    """A model that the user loaded with eager attention is refused: they may need its attention weights."""
    config = models.tiny_config("bert")
    config._attn_implementation = "eager"
    installation = interface.install(models.tiny_model(config))
    assert not installation and "eager" in installation.reason


def test_compiled_and_patched_models_are_refused(tmp_path: Path) -> None:
    """A compiled graph would keep the lengths of one forward, and a replaced forward would bypass the stub."""
    model = build(tmp_path, "bert", "embedder")
    find_hf_model(model).forward = lambda **kwargs: None
    with pytest.raises(NotImplementedError, match="replaced"):
        PackedModel(model)
    hf = models.tiny_model(models.tiny_config("bert"))
    hf.encoder.layer[0]._compiled_call_impl = lambda *args: None
    assert "compiled" in interface.install(hf).reason


def test_models_without_one_encoder_are_refused() -> None:
    """Static embeddings, and models of several encoders, have no packed forward."""
    with pytest.raises(NotImplementedError, match="0 transformers models"):
        find_hf_model(nn.Sequential(nn.Linear(2, 2)))
    two = nn.ModuleList([models.tiny_model(models.tiny_config("bert")) for _ in range(2)])
    with pytest.raises(NotImplementedError, match="2 transformers models"):
        find_hf_model(two)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= tensor.nbytes:
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("architecture", ["bert", "gte", "modernbert", "qwen3"])
def test_nothing_quadratic_is_made(tmp_path: Path, architecture: str) -> None:
    """No tensor of a packed forward grows with the square of its tokens: memory is linear."""
    packed_model = PackedModel(build(tmp_path, architecture, "embedder"))
    interface.install(packed_model.hf_model)
    lengths = [12] * 60
    with Largest() as seen:
        packed_model.forward(torch.cat(ids_of(tuple(lengths))), lengths)
    tokens = sum(lengths)
    assert 0 < seen.elements <= tokens * 2 * 64 < tokens * tokens  # 2 * intermediate_size: a gated feed-forward


# -- the attention function by itself -------------------------------------------------------------------------------


def layer(**attributes: Any) -> nn.Module:
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def reference(
    query: Tensor, key: Tensor, value: Tensor, lengths: Any, *, causal: bool, window: int | None, scale: Any
) -> Tensor:
    """Softmax attention written out, one sequence at a time, in double precision."""
    outputs, start = [], 0
    repeats = query.shape[1] // key.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    for length in lengths:
        q, k, v = (t[0, :, start : start + length].double() for t in (query, key, value))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        scores = q @ k.transpose(1, 2) * scale
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= distance.abs() >= window
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs)[None].float()


def tensors(kv_heads: int = 4, dim: int = 8, tokens: int = sum(LENGTHS)) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value as a model makes them: (1, tokens, heads, dim) seen as (1, heads, tokens, dim)."""
    generator = torch.Generator().manual_seed(1)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, tokens, heads, dim, generator=generator).transpose(1, 2) for heads in (4, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 5, 33, 34, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_formula(causal: bool, window: int | None, kv_heads: int, scale: float | None) -> None:
    """Full, causal, windowed and grouped-query attention are what the formula says, for every sequence alone."""
    query, key, value = tensors(kv_heads)
    with interface.packed(LENGTHS):
        got, weights = ATTEND(
            layer(is_causal=causal, num_key_value_groups=4 // kv_heads),
            query,
            key,
            value,
            None,
            scaling=scale,
            sliding_window=window,
        )
    wanted = reference(query, key, value, LENGTHS, causal=causal, window=window, scale=scale)
    assert weights is None
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_is_causal_given_by_the_call_wins() -> None:
    """The call's is_causal overrides the module's, as in transformers' sdpa."""
    query, key, value = tensors()
    with interface.packed(LENGTHS):
        got, _ = ATTEND(layer(is_causal=True), query, key, value, None, is_causal=False)
    torch.testing.assert_close(
        got, reference(query, key, value, LENGTHS, causal=False, window=None, scale=None), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 30.0},
        {"dropout": 0.1},
        {"position_bias": torch.zeros(1)},
        {"s_aux": torch.zeros(4)},
        {"cache": object()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_understood_is_refused(options: dict[str, Any]) -> None:
    """An option that changes the numbers and is not handled raises, so that the self-check turns packing off."""
    query, key, value = tensors()
    with interface.packed(LENGTHS), pytest.raises(NotImplementedError):
        ATTEND(layer(is_causal=False), query, key, value, None, **options)


def test_a_mask_of_the_models_own_is_refused() -> None:
    """A model that makes its own mask, or attends over other rows than the packed one, is not packed."""
    query, key, value = tensors()
    with interface.packed(LENGTHS):
        with pytest.raises(NotImplementedError, match="mask"):
            ATTEND(layer(is_causal=False), query, key, value, torch.ones(1, 1, 1, sum(LENGTHS), dtype=torch.bool))
        with pytest.raises(NotImplementedError, match="row"):
            ATTEND(layer(is_causal=False), query[:, :, 1:], key, value, None)


def test_packing_rejects_empty_sequences() -> None:
    """A sequence of no tokens has no row."""
    for lengths in ([], [3, 0]):
        with pytest.raises(ValueError, match="at least one"):
            interface.Packed.of(lengths)


# -- masks ----------------------------------------------------------------------------------------------------------


def masked(model_type: str = "bert", *, attention_mask: Tensor, config: Any = None) -> Tensor | None:
    config = config or models.tiny_config(model_type)
    config._attn_implementation = interface.NAME
    mask: Tensor | None = masking_utils.create_bidirectional_mask(
        config=config, inputs_embeds=torch.zeros(*attention_mask.shape, 4), attention_mask=attention_mask
    )
    return mask


def test_the_padding_mask_is_small() -> None:
    """A padded forward's mask is (batch, 1, 1, length); without padding there is none; sdpa's own is a square."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with interface.padded(uniform=False):
        small = masked(attention_mask=mask)
    assert small is not None and small.dtype is torch.bool
    assert torch.equal(small, mask.bool()[:, None, None, :])
    with interface.padded(uniform=True):
        assert masked(attention_mask=torch.ones(2, 4)) is None
    square = masked(attention_mask=mask)
    assert square is not None and square.shape == (2, 1, 4, 4)
    with interface.packed([5, 3]):
        assert masked(attention_mask=torch.ones(1, 8)) is None


@pytest.mark.parametrize("architecture", models.PACKABLE)
def test_padded_rows_under_the_small_mask(tmp_path: Path, architecture: str) -> None:
    """Padded rows under our mask equal those under sdpa's, sliding windows and causal models included."""
    model = build(tmp_path, architecture, "embedder")
    packed_model = PackedModel(model)
    lengths = torch.tensor([50, 31, 4])
    ids = torch.stack([torch.cat([row, torch.zeros(50 - len(row), dtype=torch.long)]) for row in ids_of((50, 31, 4))])
    features = {"input_ids": ids, "attention_mask": (torch.arange(50)[None] < lengths[:, None]).long()}
    wanted = packed_model.plain(features)
    interface.install(packed_model.hf_model)
    with interface.padded(uniform=False):
        torch.testing.assert_close(packed_model.plain(features), wanted, rtol=1e-5, atol=1e-6)
    same = {"input_ids": ids[:1].repeat(3, 1), "attention_mask": torch.ones(3, 50, dtype=torch.long)}
    with interface.padded(uniform=True):
        torch.testing.assert_close(packed_model.plain(same)[1], wanted[0], rtol=1e-5, atol=1e-6)


def test_mask_patterns_are_recognised() -> None:
    """Sliding windows are found by asking the mask function; chunks and overlays that need more are refused."""
    from transformers import masking_utils

    sliding = masking_utils.sliding_window_causal_mask_function(16)
    both = masking_utils.sliding_window_bidirectional_mask_function(16)
    assert interface._classify(sliding, 16) == (16, True)
    assert interface._classify(both, 16) == (17, False)  # transformers counts the distance itself as inside
    assert interface._classify(masking_utils.causal_mask_function, None) == (None, True)
    assert interface._classify(masking_utils.bidirectional_mask_function, None) == (None, False)
    always = masking_utils.or_masks(masking_utils.causal_mask_function, lambda *args: torch.tensor(True))
    assert interface._classify(always, None) == (None, False)  # how EmbeddingGemma says bidirectional
    for function, size in [
        (masking_utils.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.long)), 16),
        (lambda b, h, q, k: (k <= q) | (k < 4), None),  # a prefix that all may see
        (lambda b, h, q, k: torch.zeros(1)[q] > 0, None),  # looks its answer up in data
    ]:
        with pytest.raises(NotImplementedError):
            interface._classify(function, size)


def test_a_layer_and_its_mask_must_agree() -> None:
    """A window that only the mask, or only the layer, knows about is refused, unless no sequence is that long."""
    query, key, value = tensors()
    common = {"batch_size": 1, "kv_length": sum(LENGTHS), "local_size": 16}
    from transformers.masking_utils import sliding_window_bidirectional_mask_function

    with interface.packed(LENGTHS):
        assert MASK(mask_function=sliding_window_bidirectional_mask_function(16), **common) is None
        ATTEND(layer(is_causal=False), query, key, value, None, sliding_window=17)
        for window in (None, 16, 18):
            with pytest.raises(NotImplementedError, match="agree"):
                ATTEND(layer(is_causal=False), query, key, value, None, sliding_window=window)
        with pytest.raises(NotImplementedError, match="agree"):
            ATTEND(layer(is_causal=True), query, key, value, None, sliding_window=17)
    short = (5, 4)
    query, key, value = tensors(tokens=9)
    with interface.packed(short):
        MASK(mask_function=sliding_window_bidirectional_mask_function(16), **{**common, "kv_length": 9})
        got, _ = ATTEND(layer(is_causal=False), query, key, value, None)
    torch.testing.assert_close(
        got, reference(query, key, value, short, causal=False, window=None, scale=None), rtol=1e-5, atol=1e-5
    )


# -- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "first"), [("bert", 0), ("xlm_roberta", 1), ("roberta", 1), ("gte", 0)])
def test_positions_start_where_the_model_starts(architecture: str, first: int) -> None:
    """RoBERTa and its kin number positions from behind the padding index, the others from 0; each sequence anew."""
    padding = interface.padding_position(models.tiny_model(models.tiny_config(architecture)))
    assert padding == (first - 1 if first else None)
    positions = interface.positions(np.arange(10, 17), [3, 2, 2], padding)
    assert positions.tolist() == [first, first + 1, first + 2, first, first + 1, first, first + 1]


@pytest.mark.parametrize("architecture", ["roberta", "xlm_roberta"])
def test_positions_skip_padding_written_in_a_text(architecture: str) -> None:
    """Where a model derives positions from ``input_ids == padding``, ours are those of transformers' own code."""
    encoder = models.tiny_model(models.tiny_config(architecture))
    padding = interface.padding_position(encoder)
    assert padding is not None
    rows = [torch.tensor(row) for row in ([padding, 5, padding, 7], [5, padding], [padding], [4, 5, 6])]
    seen: list[Tensor] = []
    encoder.embeddings.position_embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for row in rows:
        encoder(row[None])
    positions = interface.positions(torch.cat(rows).numpy(), [len(row) for row in rows], padding)
    assert positions.tolist() == torch.cat([each[0] for each in seen]).tolist()


# -- CUDA kernels, their arguments checked on the CPU by kernels that do the arithmetic -----------------------------


def varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, *, causal: bool, window: Any, scale: Any
) -> Tensor:
    """What a variable-length kernel computes; (tokens, heads, dim) in and out."""
    assert starts.dtype is torch.int32 and starts[0] == 0 and starts[-1] == query.shape[0]
    lengths = starts.diff().tolist()
    assert longest == max(lengths)
    views = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    return reference(*views, lengths, causal=causal, window=window, scale=scale)[0].to(query.dtype)


def varlen_2_10(
    q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any, is_causal: bool = False
) -> Any:
    """Without windows, scale or grouped queries."""
    assert k.shape[1] == q.shape[1]
    return varlen(q, k, v, cu_seq_q, max_q, causal=is_causal, window=None, scale=None)


def varlen_2_13(
    q: Any,
    k: Any,
    v: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: Any,
    max_k: Any,
    *,
    scale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    """(left, right) tokens that a query sees beside its own; -1 for all."""
    assert k.shape[1] == q.shape[1] or enable_gqa
    left, right = window_size
    assert right in (0, left)
    window = None if left == -1 else left + 1
    return varlen(q, k, v, cu_seq_q, max_q, causal=right == 0, window=window, scale=scale)


def efficient(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: Any,
    max_k: Any,
    dropout: float,
    mask_type: int,
    logsumexp: bool,
    *,
    scale: Any = None,
) -> Any:
    """The operator behind memory-efficient attention: (1, tokens, heads, dim), no grouped queries."""
    assert bias is None and dropout == 0.0 and not logsumexp and k.shape[2] == q.shape[2]
    return (varlen(q[0], k[0], v[0], cu_q, max_q, causal=mask_type == 1, window=None, scale=scale)[None], None)


def on_cuda(monkeypatch: pytest.MonkeyPatch, function: Any, capability: tuple[int, int] = (8, 0)) -> None:
    monkeypatch.setattr(kernels, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(kernels, "_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "_varlen_function", lambda: function)
    monkeypatch.setattr(kernels, "_efficient", lambda: efficient)


def through_a_kernel(kv_heads: int, dtype: torch.dtype, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """(the kernel chosen, what attention gave, what it should give)."""
    query, key, value = (tensor.to(dtype) for tensor in tensors(kv_heads))
    causal, window, scale = options.get("causal", False), options.get("window"), options.get("scale")
    chosen = kernels.choose(query, key, value, causal=causal, window=window, scaling=scale)
    with interface.packed(LENGTHS) as state:
        state.cumulative = kernels.cumulative(LENGTHS, torch.device("cpu"))
        got, _ = ATTEND(layer(is_causal=causal), query, key, value, None, sliding_window=window, scaling=scale)
    return chosen, got, reference(query, key, value, LENGTHS, causal=causal, window=window, scale=scale).to(dtype)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"scale": 0.3}, {"window": 6}, {"window": 6, "causal": True}], ids=str
)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("function", [varlen_2_10, varlen_2_13])
def test_half_precision_uses_the_variable_length_kernel(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], kv_heads: int, options: dict[str, Any]
) -> None:
    """On sm80 and later, half precision goes through varlen_attn as each torch version spells it, or rightly around it."""
    on_cuda(monkeypatch, function)
    _, got, wanted = through_a_kernel(kv_heads, torch.bfloat16, **options)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.3}, {"window": 6}], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_single_precision_uses_the_memory_efficient_kernel(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, options: dict[str, Any]
) -> None:
    """fp32 on CUDA goes through the memory-efficient operator, or through groups where a window is asked for."""
    on_cuda(monkeypatch, None)
    chosen, got, wanted = through_a_kernel(kv_heads, torch.float32, **options)
    assert (chosen is None) == ("window" in options)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_kernels_are_chosen_only_where_they_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel on a CPU; none for bfloat16 before sm80; flash attention only from sm80 and for heads it can do."""
    query, key, value = tensors()
    assert kernels.choose(query, key, value, causal=False, window=None, scaling=None) is None
    calls: list[str] = []

    def spy(*args: Any, scale: Any = None, window_size: Any = (-1, -1)) -> Any:
        calls.append("varlen")
        return varlen_2_13(*args, scale=scale, window_size=window_size)

    def chosen(dtype: torch.dtype, dim: int = 8) -> Any:
        q, k, v = (tensor.to(dtype) for tensor in tensors(dim=dim))
        return kernels.choose(q, k, v, causal=False, window=None, scaling=None)

    on_cuda(monkeypatch, spy, (7, 5))
    assert chosen(torch.bfloat16) is None
    assert chosen(torch.float16) is not None
    through_a_kernel(4, torch.float16)
    assert calls == []
    on_cuda(monkeypatch, spy, (9, 0))
    through_a_kernel(4, torch.float16)
    assert calls == ["varlen"]
    assert chosen(torch.float16, dim=6) is None  # heads in steps of 8 only
    monkeypatch.setattr(kernels, "_efficient", lambda: None)
    assert chosen(torch.float32) is None


def test_the_installed_torch_offers_what_is_detected() -> None:
    """The feature detection reads the installed torch's own signature, or finds that there is no such function."""
    features = kernels._varlen_features()
    assert features == frozenset() or {"query", "key", "value", "cu_seq_q", "max_q"} <= features


def test_views_not_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value of a group are views of the packed row: attention copies none of them."""
    query, key, value = tensors()
    storages = {tensor.untyped_storage().data_ptr() for tensor in (query, key, value)}
    seen: list[int] = []
    real = nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.extend(tensor.untyped_storage().data_ptr() for tensor in (q, k, v))
        return real(q, k, v, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    with interface.packed(LENGTHS):
        ATTEND(SimpleNamespace(is_causal=True), query, key, value, None)
    assert len(seen) == 3 * len(set(LENGTHS))
    assert set(seen) == storages


# -- the quick way for short sequences on a CPU ---------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the sequences that scaled_dot_product_attention, the careful way, attends to."""
    calls: list[int] = []
    real = nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(q.shape[0])
        return real(q, *args, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return calls


@pytest.mark.parametrize(("factor", "careful"), [(1.0, False), (3.0, False), (12.0, True), (1000.0, True)])
def test_short_sequences_need_no_maximum(monkeypatch: pytest.MonkeyPatch, factor: float, careful: bool) -> None:
    """Scores whose exponentials fit into float32 are summed as they are; larger ones are done again, the careful way."""
    query, key, value = tensors()
    query, key = query * factor, key * factor
    calls = counting(monkeypatch)
    with interface.packed(LENGTHS):
        got, _ = ATTEND(layer(is_causal=False), query, key, value, None)
    assert sum(calls) == (len(LENGTHS) if careful else 0)
    wanted = reference(query, key, value, LENGTHS, causal=False, window=None, scale=None)
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


def test_gradients_still_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside inference mode packed attention is differentiable: the quick way is left to those who need no gradient."""
    query, key, value = tensors()
    calls = counting(monkeypatch)
    with interface.packed(LENGTHS):
        got, _ = ATTEND(layer(is_causal=False), query.requires_grad_(), key, value, None)
    got.sum().backward()
    assert sum(calls) == len(LENGTHS) and query.grad is not None


def test_one_row_far_below_the_others_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query whose scores all vanish beside another's is seen by its sum, and comes out right."""
    query, key, value = tensors()
    key[:, :, :60] = 1.0 + 0.01 * key[:, :, :60]
    query[:, :, 5] = -40.0  # scores of -113, whose exponentials float32 cannot hold
    calls = counting(monkeypatch)
    with interface.packed(LENGTHS):
        got, _ = ATTEND(layer(is_causal=False), query, key, value, None)
    assert sum(calls) == len(LENGTHS)
    wanted = reference(query, key, value, LENGTHS, causal=False, window=None, scale=None)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_long_sequences_keep_their_memory_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sequences whose scores fit into a core's cache go the quick way; the others never hold their scores."""
    monkeypatch.setattr(kernels, "SHORT_SCORES_BYTES", 4 * 4 * 33 * 33)
    query, key, value = tensors()
    calls = counting(monkeypatch)
    with interface.packed(LENGTHS), Largest() as seen:
        got, _ = ATTEND(layer(is_causal=False), query, key, value, None)
    assert sum(calls) == 1
    assert seen.elements < 4 * 60 * 60
    wanted = reference(query, key, value, LENGTHS, causal=False, window=None, scale=None)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [3, 40, 300])
def test_a_window_takes_memory_by_length_and_not_by_its_square(window: int, causal: bool) -> None:
    """Sequences longer than a block of queries: equal to a mask over all pairs, which is never made."""
    lengths = (1100, 700, 700, 301, 5)
    query, key, value = tensors(tokens=sum(lengths))
    with interface.packed(lengths) as state, Largest() as seen:
        state.masks.add((window, causal))
        got, _ = ATTEND(layer(is_causal=causal), query, key, value, None, sliding_window=window)
    assert seen.elements < 1100 * 1100
    wanted = reference(query, key, value, lengths, causal=causal, window=window, scale=None)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
