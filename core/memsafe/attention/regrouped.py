"""Packed attention for models whose own does not go through transformers' interface: MPNet and DeBERTa.

Their attention module is called as it is, once per run of sequences of equal length, on views of the packed row; nothing
of its code is written a second time. What the encoder makes of the length of a row (position biases, relative positions,
masks over pairs), it makes for each run instead of for the whole row. Only ever installed in a private copy of a model,
and used only after a self-check.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memsafe.attention import interface
from memsafe.attention.grouped import Packed

__all__ = ["install", "is_installed", "uninstall"]


@dataclass(frozen=True)
class _Kind:
    """attention: class of the module that attends. table: the encoder's method that makes, from hidden states, what depends
    on their length. argument: what attention calls that. mask: the encoder's method that widens a mask to pairs; "" for
    none, where attention takes None for "no padding"."""

    attention: str
    table: str
    argument: str
    mask: str = ""


_KINDS = {
    "MPNetEncoder": _Kind("MPNetSelfAttention", "compute_position_bias", "position_bias"),
    "DebertaV2Encoder": _Kind("DisentangledSelfAttention", "get_rel_pos", "relative_pos", "get_attention_mask"),
    "DebertaEncoder": _Kind("DisentangledSelfAttention", "get_rel_pos", "relative_pos", "get_attention_mask"),
}


def install(model: nn.Module) -> int:
    """Let the attention modules of `model`, a private copy, run by groups in packed forwards; returns how many do."""
    installed = 0
    for owner in model.modules():
        kind = _KINDS.get(type(owner).__name__)
        if kind is None or not type(owner).__module__.startswith("transformers.models."):
            continue
        table = getattr(type(owner), kind.table)
        mask = getattr(type(owner), kind.mask) if kind.mask else None
        vars(owner)[kind.table] = partial(_unless_packed, partial(table, owner), lambda *args, **kwargs: None)
        if mask is not None:
            vars(owner)[kind.mask] = partial(_unless_packed, partial(mask, owner), lambda given: given)
        for module in owner.modules():
            if type(module).__name__ == kind.attention and "forward" not in vars(module):
                parts = partial(table, owner), None if mask is None else partial(mask, owner)
                vars(module)["forward"] = partial(_forward, module, kind, *parts)
                installed += 1
    return installed


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`."""
    for module in model.modules():
        kind = _KINDS.get(type(module).__name__)
        for name in ("forward", *((kind.table, kind.mask) if kind is not None else ())):
            given = vars(module).get(name)
            if isinstance(given, partial) and given.func in (_forward, _unless_packed):
                del vars(module)[name]


def is_installed(model: nn.Module) -> bool:
    """Whether any attention of `model` runs by groups."""
    return any(
        isinstance(f := vars(module).get("forward"), partial) and f.func is _forward for module in model.modules()
    )


def _unless_packed(original: Callable[..., Any], packed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (packed if isinstance(interface.current(), Packed) else original)(*args, **kwargs)


def _forward(
    module: nn.Module,
    kind: _Kind,
    table: Callable[[Tensor], Any],
    mask: Callable[[Tensor], Any] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The attention of `module`: its own, or in a packed forward its own per run of equal lengths."""
    original = type(module).forward
    state = interface.current()
    if not isinstance(state, Packed):
        return original(module, *args, **kwargs)
    given = inspect.signature(original).bind(module, *args, **kwargs).arguments
    given = {name: value for name, value in given.items() if name not in ("self", "kwargs")}
    hidden = given.pop("hidden_states")
    if hidden.shape[:2] != (1, state.tokens) or given.get("output_attentions") or given.get("query_states") is not None:
        raise NotImplementedError("the attention does not see the packed row as it was given")
    output = torch.empty_like(hidden[0])
    rest: tuple[Any, ...] = ()
    for start, count, length in state.groups:
        stop = start + count * length
        rows = hidden[0, start:stop].view(count, length, -1)
        if length not in state.tables:  # of one encoder, so the same in all its layers
            state.tables[length] = table(rows[:1])
        options = {**given, kind.argument: state.tables[length]}
        options["attention_mask"] = None if mask is None else mask(rows.new_ones(count, length))
        found = original(module, rows, **options)
        output[start:stop] = found[0].reshape(count * length, -1)
        rest = found[1:]
    return (output[None], *rest)
