"""models/fallbacks.py and the rungs of LoadedModel: other ways to the same rows, and what they take."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memsafe import Embedder, MemoryPolicy
from memsafe.events import NonFiniteRedone
from memsafe.machine.device import CpuDevice, open_device
from memsafe.models import fallbacks
from memsafe.models.loading import load
from memsafe.models.model import LoadedModel, ModelSpec
from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.cost import CostModel
from tests.tiny_models import ARCHITECTURES, available, save_embedder, save_reranker, tiny_config, tiny_model

SLICEABLE = [name for name in ARCHITECTURES if name != "mpnet" and name != "deberta_v2" and available(name)]


def loaded(folder: Path, kind: str = "embedding", dtype: str | None = None) -> LoadedModel:
    spec = ModelSpec(kind, str(folder), {}, dtype=dtype)
    return load(spec, open_device("cpu"), MemoryPolicy(learn=False), 1 << 40)


def batch_of(model: LoadedModel, lengths: list[int]) -> MicroBatch:
    ids = np.random.default_rng(0)
    items = [
        TokenizedInput(index, ids.integers(1000, 20_000, length).astype(np.int32))
        for index, length in enumerate(lengths)
    ]
    return MicroBatch(tuple(items), packed=model.packed)


# -- feed-forward in slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SLICEABLE)
def test_sliced_feed_forward_gives_the_same_hidden_states(architecture: str) -> None:
    """Feed-forward layers over slices of 7 of 40 tokens: equal hidden states, and the layers are untouched afterwards."""
    model = tiny_model(tiny_config(architecture))
    ids = torch.randint(1000, 20_000, (2, 40), generator=torch.Generator().manual_seed(0))
    methods = {name: dict(vars(module)) for name, module in model.named_modules()}
    with torch.inference_mode():
        plain = model(ids).last_hidden_state
        assert fallbacks.can_slice(model)
        with fallbacks.sliced_feed_forward(model, 7):
            sliced = model(ids).last_hidden_state
    torch.testing.assert_close(sliced, plain, rtol=1e-5, atol=1e-6)
    assert {name: dict(vars(module)).keys() for name, module in model.named_modules()} == {
        name: before.keys() for name, before in methods.items()
    }


@pytest.mark.parametrize("architecture", SLICEABLE)
def test_slices_are_really_taken(architecture: str) -> None:
    """Inside the block the widest product sees seven tokens at a time, outside all of them."""
    model, widths = tiny_model(tiny_config(architecture)), set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features in (64, 128):
            module.register_forward_hook(lambda _m, given, _o: widths.add(given[0].shape[-2]))
    ids = torch.randint(1000, 20_000, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), fallbacks.sliced_feed_forward(model, 7):
        model(ids)
    assert widths == {7, 5}


def test_slicing_is_for_the_own_thread_only() -> None:
    """A forward of another thread during the block runs whole: lanes share the model."""
    model, widths = tiny_model(tiny_config("bert")), []
    model.encoder.layer[0].intermediate.register_forward_hook(lambda _m, given, _o: widths.append(given[0].shape[-2]))
    ids = torch.ones((1, 40), dtype=torch.long)
    with fallbacks.sliced_feed_forward(model, 7):
        thread = threading.Thread(target=model, args=(ids,))
        thread.start()
        thread.join()
    assert widths == [40]


def test_blocks_may_overlap_in_time() -> None:
    """Two lanes inside the block: the first to leave does not take the patch from the other."""
    model = tiny_model(tiny_config("bert"))
    layer = model.encoder.layer[0]
    first, second = fallbacks.sliced_feed_forward(model, 7), fallbacks.sliced_feed_forward(model, 7)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "feed_forward_chunk" in vars(layer)
    second.__exit__(None, None, None)
    assert "feed_forward_chunk" not in vars(layer)


def test_what_was_set_on_an_instance_comes_back() -> None:
    """A method that somebody else replaced on a layer is used inside the block and there again after it."""
    model = tiny_model(tiny_config("bert"))
    layer, calls = model.encoder.layer[0], []
    original = layer.feed_forward_chunk
    layer.feed_forward_chunk = mine = lambda hidden: (calls.append(1), original(hidden))[1]
    with torch.inference_mode(), fallbacks.sliced_feed_forward(model, 20):
        model(torch.ones((1, 40), dtype=torch.long))
    assert len(calls) == 2
    assert layer.feed_forward_chunk is mine


# -- what the rungs take, and what they give -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*SLICEABLE, "mpnet", "deberta_v2"])
@pytest.mark.parametrize("rung", [None, "chunk", "half"])
def test_a_rung_takes_no_more_than_was_predicted(architecture: str, rung: str | None, tmp_path: Path) -> None:
    """One input of 1,500 tokens by each strategy: measured live bytes stay below the bound that admits it, and the first
    bound of all, from the architecture alone, holds for the plain forward."""
    if not available(architecture):
        pytest.skip(f"this transformers has no {architecture}")
    wide = {} if architecture in ("gte", "nomic_bert", "modernbert", "qwen3") else {"intermediate_size": 256}
    folder = save_embedder(tmp_path, architecture, hidden_size=64, max_positions=2048, max_length=2000, **wide)
    model = loaded(folder)
    if rung == "chunk" and not model.can("chunk"):
        pytest.skip(f"{architecture} has no feed-forward block that can run over slices")
    batch = batch_of(model, [1500])
    bound = CostModel(model.cost_key(), model.cost_prior()).upper_bound(batch.shape)
    if rung is not None:
        bound = model.rung_bound(rung, batch.shape, bound)
    with model.device.measure(live=True) as peak:
        model.forward(batch, {}, rung)
    assert peak.live_bytes is not None
    assert peak.live_bytes <= bound
    model.close()


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_rows_of_every_rung(kind: str, tmp_path: Path) -> None:
    """Chunk gives the plain numbers, half nearly so (cosine at least 0.999), and a copy on the CPU the plain ones."""
    save = save_embedder if kind == "embedding" else save_reranker
    model = loaded(
        save(tmp_path, "xlm_roberta", hidden_size=64, num_labels=3)
        if kind == "reranker"
        else save(tmp_path, "xlm_roberta", hidden_size=64),
        kind,
    )
    batch = batch_of(model, [200, 64, 64, 9])
    plain = model.forward(batch, {}).numpy()
    ladder_slice, fallbacks.SLICE_TOKENS = fallbacks.SLICE_TOKENS, 50
    try:
        chunk, half = model.forward(batch, {}, "chunk").numpy(), model.forward(batch, {}, "half").float().numpy()
    finally:
        fallbacks.SLICE_TOKENS = ladder_slice
    cpu = model.forward(batch, {}, "cpu").numpy()
    np.testing.assert_allclose(chunk, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cpu, plain, rtol=1e-5, atol=1e-5)
    cosines = (half * plain).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() > 0.999 and not np.array_equal(half, plain)
    assert half.dtype == np.float32 and half.shape == plain.shape


def test_half_is_offered_only_where_it_is_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that would emulate half precision, and for a model that is half already, the rung does not exist."""
    folder = save_embedder(tmp_path, "bert")
    monkeypatch.setattr(CpuDevice, "supports", lambda self, name: name == "float32")
    assert not loaded(folder).can("half")
    monkeypatch.setattr(CpuDevice, "supports", lambda self, name: True)
    assert loaded(folder).can("half")
    assert not loaded(folder, dtype="bfloat16").can("half")
    assert not loaded(folder).can("cpu")  # it is there already


@pytest.mark.filterwarnings("ignore:cpu has no native float16")
def test_a_host_copy_is_float32_and_apart(tmp_path: Path) -> None:
    """The copy has the model's numbers in float32, shares no memory with it, and leaves its dtype alone."""
    model = loaded(save_embedder(tmp_path, "bert", dtype=torch.float16), dtype="float16")
    copied = fallbacks.host_copy(model.st)
    for (name, ours), (_, theirs) in zip(copied.named_parameters(), model.st.named_parameters(), strict=True):
        assert ours.dtype == torch.float32 and theirs.dtype == torch.float16, name
        assert ours.data_ptr() != theirs.data_ptr()
        assert torch.equal(ours, theirs.float())


@pytest.mark.filterwarnings("ignore:cpu has no native float16")
def test_a_copy_on_the_cpu_is_not_made_without_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would kill the process: too little main memory is a MemoryError before anything is copied."""
    model = loaded(save_embedder(tmp_path, "bert", dtype=torch.float16), dtype="float16")
    snapshot = model.device.snapshot()
    from dataclasses import replace

    monkeypatch.setattr(CpuDevice, "snapshot", lambda self: replace(snapshot, free_bytes=1 << 20))
    monkeypatch.setattr(fallbacks, "host_copy", lambda model: pytest.fail("copied"))
    with pytest.raises(MemoryError, match="main memory"):
        model.redo_in_float32(batch_of(model, [10]), {})


# -- NaN guard -----------------------------------------------------------------------------------------------------


def overflowing(folder: Path) -> Path:
    """A BERT whose feed-forward layers pass the range of float16 for texts with the word "overflow"."""
    config = tiny_config("bert")
    model = tiny_model(config)
    from transformers import AutoTokenizer

    save_embedder(folder, "bert", model=model)
    word = AutoTokenizer.from_pretrained(folder)("overflow", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        # One token's embedding lights a unit that everything else leaves dark; its product passes 65,504.
        table = model.embeddings.word_embeddings.weight
        table[:, 0] = -3.0
        table[word, 0] = 60.0
        for layer in model.encoder.layer:
            layer.intermediate.dense.weight[0] = 0
            layer.intermediate.dense.weight[0, 0] = 400.0
            layer.intermediate.dense.bias[0] = -400.0
            layer.output.dense.weight[:, 0] = 100.0
    return save_embedder(folder, "bert", model=model)


@pytest.mark.filterwarnings("ignore:cpu has no native float16")
def test_float16_rows_that_overflow_are_computed_again(tmp_path: Path) -> None:
    """A half-precision model doctored to overflow on one word: exactly the texts with it are redone in float32, with a
    warning, an event and a count, and their numbers are the float32 model's; calls before and after are not disturbed."""
    folder = overflowing(tmp_path)
    texts = ["a quiet text", "one with overflow in it", "another quiet text", "overflow", "the last one"]
    with Embedder(str(folder), device="cpu", dtype="float32", memory=MemoryPolicy(learn=False)) as exact:
        wanted = exact.embed_documents(texts)
    assert np.isfinite(wanted).all()
    events: list[Any] = []
    with Embedder(
        str(folder), device="cpu", dtype="float16", memory=MemoryPolicy(learn=False), hooks=[events.append]
    ) as half:
        with torch.inference_mode():
            raw = half.model.encode(texts, convert_to_numpy=False, convert_to_tensor=True)
        bad = ~torch.isfinite(raw).all(dim=1)
        assert bad.tolist() == [False, True, False, True, False]  # the doctoring works
        for _ in range(2):
            with pytest.warns(UserWarning, match="came out of float16 as NaN or infinity"):
                run = half.run(texts)
            np.testing.assert_allclose(run.embeddings[[1, 3]], wanted[[1, 3]], rtol=2e-2, atol=2e-2)
            np.testing.assert_allclose(run.embeddings[[0, 2, 4]], raw[[0, 2, 4]].float(), rtol=1e-2, atol=1e-2)
            assert run.report.non_finite_rows == 2
        assert half.run(texts[:1]).report.non_finite_rows == 0
        assert half._engine.models[0]._host is None  # the copy is gone after the run
    assert sum(event.rows for event in events if isinstance(event, NonFiniteRedone)) == 4
