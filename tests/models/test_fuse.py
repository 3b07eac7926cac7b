"""Activations in place: the same numbers, less memory, and nobody else notices."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from memsafe.attention import interface
from memsafe.models import fuse, packed
from tests import tiny_models as models
from tests.tiny_models import needs_interface

pytestmark = needs_interface

NAMES = ["gelu", "gelu_pytorch_tanh", "silu", "relu"]


def feed_forward(activation: nn.Module) -> Any:
    """Something with a `base_model` and an activation inside, as a transformers model has."""
    model = nn.Module()
    model.base_model = nn.Sequential(activation)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_result_replaces_the_input(name: str) -> None:
    """In our forwards the result lies where the input was and is bit for bit the activation's own."""
    activation = ACT2FN[name]
    given = torch.linspace(-6, 6, 4097)
    wanted = activation(given.clone())
    model = feed_forward(activation)
    assert fuse.install(model) == 1 == fuse.install(model)
    with torch.inference_mode(), interface.padded(uniform=True):
        mine = given.clone()
        got = activation(mine)
        assert got.data_ptr() == mine.data_ptr()
        assert torch.equal(got, wanted)
    fuse.uninstall(model)
    with torch.inference_mode(), interface.padded(uniform=True):
        mine = given.clone()
        assert activation(mine).data_ptr() != mine.data_ptr()
    assert "forward" not in vars(activation)


def test_others_keep_their_input() -> None:
    """A forward that is not ours, and one that needs gradients, leaves its input alone."""
    activation = ACT2FN["gelu"]
    fuse.install(feed_forward(activation))
    given = torch.tensor([-1.0, 2.0])
    activation(given)
    with interface.padded(uniform=True):
        activation(given)
    assert given.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("name", ["gelu_new", "gelu_python", "gelu_python_tanh", "quick_gelu", "tanh"])
def test_other_formulas_are_left_alone(name: str) -> None:
    """An activation written out as another formula rounds otherwise, so it is not replaced."""
    assert fuse.install(feed_forward(ACT2FN[name])) == 0


def test_watched_activations_are_left_alone() -> None:
    """Somebody's hook on an activation sees its input and output as they are."""
    activation = ACT2FN["gelu"]
    activation.register_forward_hook(lambda module, args, output: None)
    assert fuse.install(feed_forward(activation)) == 0


@pytest.mark.parametrize(("architecture", "layers"), [("bert", 2), ("gte", 2), ("modernbert", 2), ("qwen3", 2)])
def test_models_keep_their_numbers(tmp_path: Path, architecture: str, layers: int) -> None:
    """Packed and padded rows are bit for bit the same, and copies and pickles of the model still run."""
    model = SentenceTransformer(str(models.save_embedder(tmp_path, architecture)), device="cpu").eval()
    packed_model = packed.PackedModel(model)
    interface.install(packed_model.hf_model)
    ids = torch.arange(1000, 1040)
    wanted = packed_model.forward(ids, [20, 20])
    assert fuse.install(packed_model.hf_model) == layers
    assert torch.equal(packed_model.forward(ids, [20, 20]), wanted)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = packed.PackedModel(other)
        torch.testing.assert_close(again.forward(ids, [20, 20]), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("architecture", "saved"), [("bert", 1), ("distilbert", 3)])
def test_the_peak_shrinks(architecture: str, saved: int) -> None:
    """The most bytes alive at once fall by one hidden size per token for BERT, by three for DistilBERT."""
    hf = models.tiny_model(models.tiny_config(architecture, hidden_size=64, intermediate_size=256))
    interface.install(hf)
    model = nn.Module()
    model.hf = hf
    packed_model = packed.PackedModel(model)
    ids = torch.arange(1000, 1000 + 1024)

    def peak_bytes() -> int:
        with torch.inference_mode():
            packed_model.hidden_states(packed_model.pack(ids, [16] * 64))
        gc.collect()  # or leftovers of other tests are freed while we count
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.inference_mode(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            packed_model.hidden_states(packed_model.pack(ids, [16] * 64))
        alive = highest = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                highest = max(highest, alive)
        return highest

    before = peak_bytes()
    fuse.install(hf)
    assert before - peak_bytes() == pytest.approx(saved * 1024 * 64 * 4, rel=0.1)


def test_the_self_check_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer still needs the activation's input, packing is kept and working in place is not."""
    model = SentenceTransformer(str(models.save_embedder(tmp_path)), device="cpu").eval()
    assert models.loaded(model).check.in_place_ok
    hf = packed.find_hf_model(model)
    assert all("forward" not in vars(module) for module in hf.modules())  # checking leaves no trace
    intermediate = type(hf.encoder.layer[0].intermediate)

    def residual(self: Any, hidden_states: Tensor) -> Tensor:
        wide = self.dense(hidden_states)
        activated: Tensor = self.intermediate_act_fn(wide)
        return activated + wide

    monkeypatch.setattr(intermediate, "forward", residual)
    check = models.loaded(model).check
    assert check.packed_ok and not check.in_place_ok
