"""float32 products by oneDNN: where they pay, the same numbers, only in our forwards, and no more memory for new shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from memsafe.attention import interface, kernels
from memsafe.machine import allocator
from memsafe.models import packed, products
from tests import tiny_models as models
from tests.tiny_models import needs_interface

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),  # type: ignore[no-untyped-call]
    reason="this torch has no oneDNN",
)


@dataclass
class _Host:
    features: frozenset[str]
    vendor: str

    def cpu_features(self) -> frozenset[str]:
        return self.features

    def cpu_vendor(self) -> str:
        return self.vendor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Products that pay whatever the processor, and from the smallest on; the shapes of those that oneDNN did."""
    seen: list[tuple[int, ...]] = []
    product = products._product

    def recorded(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(tuple(states.shape))
        return product(states, weight, bias)

    monkeypatch.setattr(products, "pays", lambda: True)
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    monkeypatch.setattr(products, "_product", recorded)
    return seen


@needs_onednn
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")  # type: ignore[no-untyped-call]
@pytest.mark.parametrize(
    ("features", "vendor", "pays"),
    [
        ("avx2 avx512f", "AuthenticAMD", True),
        ("avx2 avx512f", "GenuineIntel", False),  # MKL's own are as fast there
        ("avx2", "AuthenticAMD", False),
        ("avx2 avx512f", "", False),
    ],
)
def test_where_it_pays(features: str, vendor: str, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with AVX-512 that MKL does not use: those that Intel did not make. A rule, not a measurement, which would make rows
    differ in their last digit from one process to the next."""
    monkeypatch.setattr(products, "open_device", lambda kind: _Host(frozenset(features.split()), vendor))
    assert products.pays.__wrapped__() is pays
    monkeypatch.setattr(products, "_product", lambda states, weight, bias: nn.functional.linear(states, weight) + 1)
    assert not products.pays.__wrapped__()  # another version's numbers


@needs_onednn
@pytest.mark.parametrize("shape", [(300, 48), (1, 37, 48), (2, 3, 5, 48), (0, 48), (3, 48)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_same_numbers(shape: tuple[int, ...], biased: bool, calls: list[tuple[int, ...]]) -> None:
    """For any number of dimensions, with and without a bias; too few rows stay with torch's own."""
    torch.manual_seed(0)
    states, weight, bias = torch.randn(shape), torch.randn(70, 48), torch.randn(70) if biased else None
    with torch.inference_mode():
        got = products.linear(states, weight, bias)
        torch.testing.assert_close(got, nn.functional.linear(states, weight, bias), rtol=1e-5, atol=1e-5)
    assert calls == ([shape] if states.numel() // 48 >= 4 else [])


@needs_onednn
def test_everything_else_stays_with_torch(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, half precision, autocast, weights that do not lie in a row, and oneDNN switched off."""
    states, weight = torch.randn(8, 48), torch.randn(48, 48)
    assert products.linear(states, weight.requires_grad_()).requires_grad
    weight = weight.detach()
    with torch.inference_mode():
        products.linear(states.bfloat16(), weight.bfloat16())
        products.linear(states, weight.T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert products.linear(states, weight).dtype == torch.bfloat16
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.mkldnn, "enabled", False)
            products.linear(states, weight)
        assert not calls
        products.linear(states, weight)
    assert calls == [(8, 48)]


@needs_onednn
@needs_interface
def test_layers_of_an_encoder(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    """Each linear layer of an encoder, in our forwards alone; one that somebody watches stays as it is; uninstalled, nothing is left."""
    model = SentenceTransformer(str(models.save_embedder(tmp_path)), device="cpu").eval()
    packed_model = packed.PackedModel(model)
    hf = packed_model.hf_model
    interface.install(hf)
    ids = torch.arange(1000, 1040)
    wanted = packed_model.forward(ids, [20, 20])
    watched = next(module for module in hf.modules() if type(module) is nn.Linear)
    watched.register_forward_hook(lambda module, args, output: None)
    assert products.workspace_bytes(hf) == 0
    installed = products.install(hf)
    assert installed == 2 * 6 - 1 + 1 == products.install(hf)  # of a layer six, and the pooler's
    assert products.workspace_bytes(hf) == 4 * 32 * 64
    torch.testing.assert_close(packed_model.forward(ids, [20, 20]), wanted, rtol=0, atol=1e-5)
    assert len(calls) == 2 * 6 - 1
    with torch.inference_mode():
        hf(input_ids=ids[None])
    assert len(calls) == 2 * 6 - 1
    products.uninstall(hf)
    assert all("forward" not in vars(module) for module in hf.modules() if type(module) is nn.Linear)


@needs_onednn
def test_a_loaded_model_uses_them(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    """Rows are the model's own, what a product takes is planned for, and the user's object is not touched."""
    model = SentenceTransformer(str(models.save_embedder(tmp_path)), device="cpu").eval()
    loaded = models.loaded(model)
    assert loaded.check.packed_ok and calls
    assert loaded.workspace_bytes == kernels.SHORT_SCORES_BYTES + 4 * 32 * 64
    assert all("forward" not in vars(module) for module in model.modules())


_SHAPES = """
import os, sys
from memsafe.machine import allocator
if sys.argv[1] == "bounded":
    allocator.configure(None)
import torch
from memsafe.machine.host import open_host
from memsafe.models import products
weights = [torch.randn(384, 384), torch.randn(1536, 384)]
torch.set_num_threads(1)
with torch.inference_mode():
    states = torch.randn(300, 384)
    [products._product(states[:n], w, None) for n in (100, 300) for w in weights]
    before = open_host().resident_bytes()
    for n in range(101, 180):
        [products._product(states[:n], w, None) for w in weights]
print(open_host().resident_bytes() - before)
"""


@needs_onednn
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_new_shapes_take_no_memory_for_good() -> None:
    """oneDNN keeps a program for each shape: of micro-batches of 80 sizes not more than a few are kept."""

    def grown(how: str) -> int:
        free = {name: value for name, value in os.environ.items() if name not in allocator._ONEDNN}
        done = subprocess.run(
            [sys.executable, "-c", _SHAPES, how], capture_output=True, text=True, check=True, env=free
        )
        return int(done.stdout)

    assert (
        grown("bounded") < 40 << 20 < grown("as it is") or not products.pays()
    )  # what a program takes is the processor's
