"""A model's modules once more over the same weights, so that what is ours never shows in the object of the user."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

__all__ = ["ForwardState", "length_switch", "private_copy"]

_SMALL_BYTES = 1 << 16
"""Buffers up to this size are copied: frequencies and the like, which some forwards write into. Larger ones are shared."""


def private_copy(model: nn.Module) -> nn.Module:
    """`model` in eval mode with modules, settings and configs of its own; parameters and large buffers are shared.

    What is installed in the copy (attention, activations, a maximum length), and what its forwards leave behind, the
    original never sees. Shared as they are: modules with code of their own repository (nothing is installed in
    those), and adapter layers of PEFT, so that switching an adapter on the original reaches the copy.
    """
    copies: dict[int, Any] = {}
    clone: nn.Module = _copy(model, copies)
    configs: dict[int, Any] = {}
    for module in [each for each in copies.values() if isinstance(each, nn.Module)]:
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                vars(module)[name] = _own(value, copies, configs)
    _eval(clone, set())
    return clone


def _copy(module: nn.Module, copies: dict[int, Any]) -> Any:
    if id(module) in copies:
        return copies[id(module)]
    if _shared(module):
        return module
    clone: nn.Module = type(module).__new__(type(module))
    copies[id(module)] = clone
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_buffers"] = {name: _small_copy(buffer) for name, buffer in module._buffers.items()}
    clone.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            clone.__dict__[name] = type(value)(value)
    clone.__dict__["_modules"] = {
        name: None if child is None else _copy(child, copies) for name, child in module._modules.items()
    }
    return clone


def _shared(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "transformers_modules" or hasattr(
        type(module), "adapter_layer_names"
    )


def _own(value: Any, copies: dict[int, Any], configs: dict[int, Any]) -> Any:
    """What stands for `value`, an attribute of a module, in the copy of that module."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, PretrainedConfig):
        return copy.deepcopy(value, configs)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return _small_copy(value)
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) in (list, tuple) and any(isinstance(each, nn.Module) for each in value):
        return type(value)(_own(each, copies, configs) for each in value)
    return value


def _small_copy(tensor: Any) -> Any:
    if isinstance(tensor, Tensor) and tensor.numel() * tensor.element_size() <= _SMALL_BYTES:
        return tensor.detach().clone()
    return tensor


def _eval(module: nn.Module, seen: set[int]) -> None:
    for each in module.modules():
        if id(each) not in seen and each.training:
            each.training = False
        seen.add(id(each))


# -- what depends on the longest sequence of a forward, or on those before it ---------------------------------------


def length_switch(model: nn.Module) -> int | None:
    """Tokens beyond which a sequence changes the frequencies of all that run with it or after it; None without such.

    "dynamic" and "longrope" rotary positions: the longest position of a forward chooses or rewrites the frequencies of
    the module (transformers' ``dynamic_rope_update``).
    """
    limits = [limit for module in model.modules() for limit in _switches(module)]
    return min(limits, default=None)


def _switches(module: nn.Module) -> Iterator[int]:
    rope = getattr(module, "rope_type", None)
    kinds = list(rope.values()) if isinstance(rope, dict) else [rope]
    if not any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
        return
    config = getattr(module, "config", None)
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parameters = (
        [each for each in (given, *given.values()) if isinstance(each, dict)] if isinstance(given, dict) else []
    )
    found = [getattr(module, name, None) for name in ("original_max_seq_len", "max_seq_len_cached")]
    found.append(getattr(config, "original_max_position_embeddings", None))
    found += [each.get("original_max_position_embeddings") for each in parameters]
    numbers = [int(value) for value in found if isinstance(value, (int, Tensor)) and int(value) > 0]
    yield min(numbers, default=0)


class ForwardState:
    """The buffers and plain attributes of a model that a forward may change, as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if not _shared(module)]
        self._attributes = [self._of(module) for module in self._modules]
        self._buffers = [dict(module._buffers) for module in self._modules]
        self._contents = [{name: _small_copy(buffer) for name, buffer in buffers.items()} for buffers in self._buffers]

    @staticmethod
    def _of(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if not name.startswith("_")}

    @torch.inference_mode()
    def restore(self) -> None:
        """Put back what changed. Nobody may run the model meanwhile."""
        for module, attributes, buffers, contents in zip(
            self._modules, self._attributes, self._buffers, self._contents, strict=True
        ):
            if any(module._buffers.get(name) is not buffer for name, buffer in buffers.items()):
                module._buffers.clear()
                module._buffers.update(buffers)
            for name, buffer in buffers.items():
                if buffer is not None and buffer is not contents[name]:  # a small one, which may have been written into
                    buffer.copy_(contents[name])
            now = vars(module)
            for name, value in attributes.items():
                if now.get(name) is not value:
                    now[name] = value
