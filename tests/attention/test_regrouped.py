"""MPNet and DeBERTa, packed through their own attention modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from memsafe.attention import regrouped
from memsafe.models.packed import PackedModel
from memsafe.models.private import private_copy
from tests import tiny_models as models

LENGTHS = (60, 33, 33, 9, 3, 3, 3, 1)


def build(folder: Path, architecture: str, kind: str, **options: Any) -> Any:
    if kind == "embedder":
        return SentenceTransformer(str(models.save_embedder(folder, architecture, **options)), device="cpu")
    return CrossEncoder(str(models.save_reranker(folder, architecture, **options)), device="cpu")


def ids_of(lengths: Any = LENGTHS) -> list[Any]:
    generator = np.random.default_rng(0)
    return [generator.integers(1000, 20_000, length) for length in lengths]


def alone(model: PackedModel, ids: list[Any]) -> torch.Tensor:
    rows = [torch.from_numpy(row)[None] for row in ids]
    return torch.cat([model.plain({"input_ids": row, "attention_mask": torch.ones_like(row)}) for row in rows])


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
@pytest.mark.parametrize("architecture", models.REGROUPED)
def test_packed_rows_equal_single_rows(tmp_path: Path, architecture: str, kind: str) -> None:
    """Packed, they give what they give one sequence at a time; padded forwards, and the original, are as they were."""
    original = build(tmp_path, architecture, kind)
    before = {name: sorted(vars(module)) for name, module in original.named_modules()}
    model = private_copy(original)
    ids = ids_of()
    wanted = alone(PackedModel(model), ids)
    assert regrouped.install(model) == 2
    packed = PackedModel(model)
    torch.testing.assert_close(packed.forward(np.concatenate(ids), LENGTHS), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone(packed, ids), wanted)
    assert {name: sorted(vars(module)) for name, module in original.named_modules()} == before
    regrouped.uninstall(model)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("architecture", models.REGROUPED)
def test_nothing_grows_with_the_square_of_the_packed_row(tmp_path: Path, architecture: str) -> None:
    """No mask, bias or relative position over pairs of tokens of the whole row is ever made."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                self.numel = max(self.numel, found.numel())
            return found

    model = private_copy(build(tmp_path, architecture, "embedder"))
    regrouped.install(model)
    lengths = (10,) * 300
    with torch.inference_mode(), Largest() as largest:
        PackedModel(model).forward(np.concatenate(ids_of(lengths)), lengths)
    assert 0 < largest.numel < 3000 * 3000 // 4


@pytest.mark.parametrize("architecture", models.REGROUPED)
def test_the_self_check_lets_them_pack(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are packed after the self-check; positions that are those of another length are caught by it."""
    model = build(tmp_path, architecture, "embedder")
    assert models.loaded(model).path == "packed"
    real = regrouped._forward

    def shifted(module: Any, kind: Any, table: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return real(module, kind, lambda rows: table(rows).roll(1, -1), mask, *args, **kwargs)

    monkeypatch.setattr(regrouped, "_forward", shifted)
    loaded = models.loaded(model)
    assert loaded.path.startswith("padded (results differ") and not loaded.check.small_mask_ok
