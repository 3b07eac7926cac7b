"""Nothing in a forward makes the host wait for the device: issue of one hidden synchronisation per micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memsafe.attention import transfer
from memsafe.models.selfcheck import SelfCheck
from memsafe.planning.batch import MicroBatch, TokenizedInput
from tests import tiny_models as models

pytestmark = models.needs_interface

CARD = torch.device("meta")
"""Stands for a card: its numbers cannot be asked for, so ``.item()``, ``bool()``, ``.cpu()`` and masks as indices fail."""


class Waited(AssertionError):
    """A copy that a CUDA driver would make the host wait for."""


class RefusesBlockingCopies(TorchDispatchMode):
    """Copies from the host to the card must come from pinned memory and not block; results whose size depends on numbers
    of the card would have to wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | (kwargs or {})
        name, tensor = func.overloadpacket.__name__, given.get("self")
        host = isinstance(tensor, Tensor) and tensor.device.type == "cpu"
        # in inference mode "to" comes whole, outside it as "_to_copy"
        if name in ("to", "_to_copy") and host and str(given.get("device")) == str(CARD):
            self.copies += 1
            if not given.get("non_blocking") or tensor.data_ptr() not in self.pinned:
                raise Waited(f"a blocking copy of shape {tuple(tensor.shape)}")
        if name == "copy_" and not host and given["src"].device.type == "cpu":
            raise Waited("a blocking copy into a tensor")
        if name in ("nonzero", "masked_select", "_local_scalar_dense", "item", "is_nonzero", "_unique2") and not host:
            raise Waited(name)
        if name == "repeat_interleave" and given.get("output_size") is None:
            raise Waited(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> RefusesBlockingCopies:
    watch = RefusesBlockingCopies()

    def pin(tensor: Tensor) -> Tensor:
        watch.pinned.add(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(transfer, "PINNED", ("cuda", "meta"))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return watch


def items(lengths: Any, types: bool) -> tuple[TokenizedInput, ...]:
    random = np.random.default_rng(0)
    made = []
    for index, length in enumerate(lengths):
        ids = random.integers(1000, 20_000, length).astype(np.int32)
        made.append(TokenizedInput(index, ids, np.zeros(length, np.int32) if types else None))
    return tuple(made)


def on_card(loaded: Any) -> Any:
    """The routes of `loaded` with their model on the card."""
    loaded.routes.run.to(CARD)
    loaded.routes.device_of_rows = CARD
    return loaded.routes


CASES = {
    "flat": ("embedder", "bert", {"pooling": "mean"}),
    "first": ("embedder", "bert", {"pooling": "cls", "normalize": True, "dense_dim": 8}),
    "last": ("embedder", "qwen3", {}),
    "windows": ("embedder", "modernbert", {}),
    "positions": ("embedder", "xlm_roberta", {"pooling": "max"}),
    "scores": ("reranker", "bert", {}),
    "decoder scores": ("reranker", "qwen3", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_packed_forward_never_waits(case: str, tmp_path: Path, card: RefusesBlockingCopies) -> None:
    """Ids, positions, sequence starts and head indices travel from pinned memory; no number of the card is asked for."""
    kind, architecture, options = CASES[case]
    save = models.save_embedder if kind == "embedder" else models.save_reranker
    loaded = models.loaded(
        save(tmp_path, architecture, **options), kind="reranker" if kind == "reranker" else "embedding"
    )
    assert loaded.packed
    routes = on_card(loaded)
    batch = MicroBatch(items((60, 33, 33, 9, 3, 1), "token_type_ids" in loaded.encoder.feature_names), packed=True)
    with torch.inference_mode(), card:
        rows = routes.forward(batch, {})
    assert rows.device == CARD and len(rows) == 6
    assert card.copies >= 3  # so that the test tests something


@pytest.mark.parametrize("lengths", [(60, 33, 9), (20, 20, 20)])
def test_a_padded_forward_never_waits(lengths: Any, tmp_path: Path, card: RefusesBlockingCopies) -> None:
    """Padded micro-batches under the small mask likewise, whether or not there is padding."""
    loaded = models.loaded(models.save_embedder(tmp_path, "bert", pooling="cls"))
    loaded.routes.use(SelfCheck(False, True))
    routes = on_card(loaded)
    with torch.inference_mode(), card:
        rows = routes.forward(MicroBatch(items(lengths, True), packed=False), {})
    assert rows.device == CARD and card.copies == 3


def test_the_watch_sees_waits(card: RefusesBlockingCopies) -> None:
    """What it must refuse, it refuses: pageable copies, numbers, masks as indices."""
    there = torch.empty(4, device=CARD)
    pageable = torch.arange(4)
    with card:
        for wait in (
            lambda: pageable.to(CARD),
            lambda: pageable.to(CARD, non_blocking=True),
            lambda: pageable.pin_memory().to(CARD),
            lambda: torch.tensor([1, 2]).to(CARD, non_blocking=True),
            lambda: there.sum().item(),
            lambda: bool((there > 0).any()),
            lambda: there[there > 0],
            lambda: there.cpu(),
        ):
            with pytest.raises((Waited, RuntimeError, NotImplementedError)):
                wait()
        transfer.send([1, 2, 3], CARD, torch.int64)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_card_a_forward_never_waits(case: str, tmp_path: Path) -> None:
    """torch itself says so: a synchronising call inside a forward is an error while this mode is on."""
    from memsafe import MemoryPolicy
    from memsafe.machine.device import open_device
    from memsafe.models.loading import load
    from memsafe.models.model import ModelSpec

    kind, architecture, options = CASES[case]
    save = models.save_embedder if kind == "embedder" else models.save_reranker
    spec = ModelSpec(
        "reranker" if kind == "reranker" else "embedding", str(save(tmp_path, architecture, **options)), {}
    )
    for dtype in ("float32", "bfloat16"):
        spec = ModelSpec(spec.kind, spec.model, {}, dtype=dtype)
        loaded = load(spec, open_device("cuda"), MemoryPolicy(learn=False), 1 << 34)
        assert loaded.packed
        typed = "token_type_ids" in loaded.encoder.feature_names
        batch = MicroBatch(items((60, 33, 33, 9, 3, 1), typed), packed=True)
        loaded.forward(batch, {})  # the first use of a kernel may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            rows = loaded.forward(batch, {})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(rows).all()
