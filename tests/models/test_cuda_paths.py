"""CUDA paths that need no card to be judged: what is chosen, what is asked of torch, what is shared between cards."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memsafe import Embedder, MemoryPolicy, ModelTooLargeError
from memsafe.attention import kernels
from memsafe.engine.sinks import HostCopy
from memsafe.machine.device import CpuDevice
from memsafe.models import collate, model, selfcheck
from memsafe.models.checkstore import CheckStore, check_key
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostModel
from memsafe.planning.tenant import Tenant
from memsafe.planning.traits import Traits
from memsafe.planning.turns import Queues
from memsafe.testing import SimulatedDevice, SimulatedModel
from tests.tiny_models import needs_interface, save_embedder

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Tensors of the CPU count as those of a card; `card.capability` says which."""
    one = types.SimpleNamespace(capability=(8, 0))
    monkeypatch.setattr(kernels, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(kernels, "_capability", lambda device: one.capability)
    monkeypatch.setattr(
        kernels, "_varlen_features", lambda: frozenset({"scale", "window_size", "enable_gqa"})
    )  # torch 2.11 and later
    return one


def _choose(query: torch.dtype, key: torch.dtype, value: torch.dtype, dim: int = 64) -> str | None:
    tensors = [torch.zeros(1, 2, 5, dim, dtype=dtype) for dtype in (query, key, value)]
    kernel = kernels.choose(*tensors, causal=False, window=None, scaling=None)  # type: ignore[arg-type]
    return (
        None
        if kernel is None
        else next(name for name in ("_varlen", "_memory_efficient") if name in kernel.__code__.co_names)
    )


def test_mixed_dtypes_go_to_sdpa(card: types.SimpleNamespace) -> None:
    """In the half rung rotary positions leave query and key in float32 and value in half: no kernel of ours takes that."""
    half, full = torch.float16, torch.float32
    assert _choose(half, half, half) == "_varlen"
    assert _choose(full, full, full) == "_memory_efficient"
    assert _choose(full, full, half) is None
    assert _choose(full, half, half) is None


def test_older_cards_get_what_they_have(card: types.SimpleNamespace) -> None:
    """A T4 has memory-efficient attention in float16 and float32; its bfloat16 is emulated, so sdpa decides."""
    card.capability = (7, 5)
    assert _choose(torch.float16, torch.float16, torch.float16) == "_memory_efficient"
    assert _choose(torch.float32, torch.float32, torch.float32) == "_memory_efficient"
    assert _choose(torch.bfloat16, torch.bfloat16, torch.bfloat16) is None
    assert _choose(torch.float16, torch.float16, torch.float16, dim=20) is None


@needs_interface
@pytest.mark.parametrize("architecture", ["gte", "nomic_bert", "modernbert", "bert"])
def test_the_half_rung_asks_no_kernel_for_mixed_dtypes(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast, every kernel that is chosen gets query, key and value of one dtype, whatever the model's positions are."""
    asked: list[tuple[set[torch.dtype], bool]] = []
    original = kernels.choose
    monkeypatch.setattr(kernels, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(kernels, "_capability", lambda device: (9, 0))

    def choose(query: Any, key: Any, value: Any, **options: Any) -> None:
        dtypes = {query.dtype, key.dtype, value.dtype}
        asked.append((dtypes, original(query, key, value, **options) is not None))

    monkeypatch.setattr(kernels, "choose", choose)
    with Embedder(
        str(save_embedder(tmp_path, architecture)), device="cpu", memory=MemoryPolicy(learn=False)
    ) as embedder:
        from memsafe.planning.batch import MicroBatch, TokenizedInput

        loaded = embedder._engine.model
        assert loaded.packed
        monkeypatch.setattr(type(loaded), "half", torch.bfloat16)
        ids = np.asarray([101, 2054, 2003, 102], dtype=np.int32)
        types_ = np.zeros(4, dtype=np.int32) if "token_type_ids" in loaded.encoder.feature_names else None
        batch = MicroBatch((TokenizedInput(0, ids, types_),), packed=True)
        asked.clear()
        rows = loaded.forward(batch, {}, "half")
    assert bool(torch.isfinite(rows).all())
    assert asked and all(not taken for dtypes, taken in asked if len(dtypes) > 1)
    if architecture == "gte":
        assert any(len(dtypes) > 1 for dtypes, _ in asked)  # so that the test tests something


def test_sequence_starts_travel_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of the sequence starts does not make the host wait for the work before it."""
    seen: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: seen.append((args, kwargs)) or self)
    assert kernels.cumulative([3, 2], CUDA).tolist() == [0, 3, 5]
    assert seen == ["pinned", ((CUDA,), {"non_blocking": True})]


def test_padded_features_travel_from_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded micro-batches too are copied without stopping the host, so that two lanes overlap."""
    from memsafe.planning.batch import MicroBatch, TokenizedInput

    with Embedder(str(save_embedder(tmp_path)), device="cpu", memory=MemoryPolicy(learn=False)) as embedder:
        loaded = embedder._engine.model
        ids = np.asarray([101, 2054, 102], dtype=np.int32)
        batch = MicroBatch((TokenizedInput(0, ids, np.zeros(3, dtype=np.int32)),), packed=False, multiple=8)
        seen: list[bool] = []

        def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(bool(kwargs.get("non_blocking")))
            return self

        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        monkeypatch.setattr(torch.Tensor, "to", to)
        features, uniform = loaded.routes.features(loaded.st, batch.items, {}, CUDA, batch.multiple)
        assert seen == [True, True, True] and not uniform
        assert features["input_ids"].shape == (1, 8)
        loaded.routes.features(loaded.st, batch.items, {}, torch.device("cpu"))  # the CPU rung must not pin
        assert seen == [True, True, True]


def test_tf32_is_seen_by_either_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 set by torch 2.9's new name raises where it is asked for by the old one; the check must not fail for that."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has only the older name")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert selfcheck.tolerance(torch.float32, CUDA) == 6e-3
        matmul.fp32_precision = "ieee"
        assert selfcheck.tolerance(torch.float32, CUDA) == 1e-5
    finally:
        matmul.fp32_precision = before


def test_a_default_device_does_not_move_micro_batches() -> None:
    """With a default device, packed and padded micro-batches are still made where they belong."""
    cpu, ids = torch.device("cpu"), np.arange(1000, 1006)
    with torch.device("meta"):  # as set_default_device, which torch 2.6 cannot undo
        row = collate.PackedRow.of(ids, [4, 2], ids % 2, cpu, padding=1)
        sent = [row.input_ids, row.token_type_ids, row.position_ids, row.starts(), row.firsts(), row.lasts()]
        sent += [row.sequence_of_token(), *collate.padded([ids[:4], ids[4:]], None, 8, cpu, pad_id=0).values()]
    assert {tensor.device for tensor in sent if tensor is not None} == {cpu}
    assert row.lasts().tolist() == [3, 5] and row.sequence_of_token().tolist() == [0, 0, 0, 0, 1, 1]


def test_rows_come_to_pinned_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's copy names its device: under a default device, torch.empty would ask for pinned memory on the card."""
    asked: dict[str, Any] = {}
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.update(kwargs)
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    class Event:
        def record(self, stream: Any) -> None:
            asked["stream"] = stream

        def synchronize(self) -> None:
            asked["waited"] = True

    class OnCard(torch.Tensor):
        device = CUDA  # type: ignore[assignment]

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    rows = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    copy = HostCopy(rows.as_subclass(OnCard))
    assert asked["device"] == "cpu" and asked["pin_memory"] and asked["stream"] == "stream of cuda:0"
    assert "waited" not in asked
    assert copy.wait().tolist() == rows.tolist() and asked["waited"]


def test_micro_batches_fit_a_launch_grid() -> None:
    """On a card no micro-batch has more sequences than a kernel can be launched for, whatever a caller allows."""

    def most(kind: str, max_rows: int | None) -> int | None:
        loaded = SimulatedModel(SimulatedDevice(kind=kind))
        cost, budget = (
            CostModel(loaded.cost_key(), loaded.cost_prior()),
            MemoryBudget(limit_bytes=None, reserve_bytes=0),
        )
        return Tenant(loaded, Traits.of(kind, 1), MemoryPolicy(), cost, budget, Queues()).planner(max_rows).max_rows

    limit = Traits.of("cuda", 1).most_rows
    assert limit is not None and limit < 65536
    assert (most("cuda", None), most("cuda", 100_000), most("cuda", 7)) == (limit, limit, 7)
    assert (most("cpu", None), most("cpu", 100_000)) == (None, 100_000)


def test_costs_are_kept_for_their_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cards have kernels, and so costs, of their own; two of equal memory do not share what was learnt on one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    assert model._card(types.SimpleNamespace(kind="cuda", name="cuda:1")) == "card of cuda:1"  # type: ignore[arg-type]
    with Embedder(save_embedder(tmp_path / "bert", "bert"), device="cpu", memory={"learn": False}) as embedder:
        before = embedder._engine.model.cost_key()
        monkeypatch.setattr(model, "_card", lambda device: "another card")
        assert embedder._engine.model.cost_key().digest() != before.digest()


def test_a_self_check_is_kept_for_its_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a check found on one card is not taken for another's, though both machines share a cache directory."""
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path))

    def store(card: str) -> CheckStore:
        key = check_key(model=torch.nn.Identity(), spec={}, revision="1", card=card, tokenizer=None, tokens="fast")
        return CheckStore(key)

    check = selfcheck.SelfCheck(True, True)
    store("Tesla T4").save(check)
    assert store("Tesla T4").load() == check
    assert store("NVIDIA A100").load() is None


@needs_interface
def test_what_a_self_check_took_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the heap is trimmed after a check; a second load, which remembers it, has nothing to give back."""
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    released: list[int] = []
    monkeypatch.setattr(CpuDevice, "release", lambda self: released.append(1) or 0)
    folder = str(save_embedder(tmp_path / "model"))
    with Embedder(folder, device="cpu", memory={"release": "never", "learn": False}):
        assert not released
    for expected in (1, 0):
        released.clear()
        with Embedder(folder, device="cpu"):
            assert len(released) == expected


@needs_interface
@pytest.mark.parametrize("failures", [1, 2])
def test_memory_that_runs_out_in_the_self_check(failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour's passing peak costs one more try; with lasting lack the caller gets our error, never torch's."""
    original, calls = model.run_self_check, []

    def check(st: Any) -> Any:
        calls.append(st)
        if len(calls) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(st)

    monkeypatch.setattr(model, "run_self_check", check)
    folder = str(save_embedder(tmp_path))
    if failures == 1:
        with Embedder(folder, device="cpu", memory=MemoryPolicy(learn=False)) as embedder:
            assert embedder.embed_documents(["a text"]).shape == (1, 32)
    else:
        with pytest.raises(ModelTooLargeError, match="free"):
            Embedder(folder, device="cpu", memory=MemoryPolicy(learn=False))
    assert len(calls) == 2
