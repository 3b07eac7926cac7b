"""The last rungs: other ways to compute one input that does not fit alone, or rows that came out as NaN."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SLICE_TOKENS", "can_slice", "host_copy", "lower_precision", "sliced_feed_forward"]

SLICE_TOKENS = 1024
"""Tokens per feed-forward slice: small against an input that did not fit, large enough to keep matrix products busy."""

_local = threading.local()
_patch_lock = threading.Lock()
_patched: dict[int, tuple[int, Any]] = {}  # by id of a block's owner: how many use the patch, what it hides
# Names that transformers' encoders give to a feed-forward block that maps (..., tokens, hidden) to the same shape.
_BLOCK_NAMES = ("mlp", "ffn", "feed_forward")


def can_slice(model: nn.Module) -> bool:
    """Whether `model` has feed-forward blocks that can run over slices of the tokens."""
    return next(_blocks(model), None) is not None


@contextmanager
def sliced_feed_forward(model: nn.Module, slice_tokens: int = SLICE_TOKENS) -> Iterator[None]:
    """Within the block, and in this thread only, feed-forward blocks run over slices of the tokens.

    The intermediate activations (2 x I/H of the 3 + 2 x I/H units per token, see planning/cost.py) shrink to one slice.
    """
    with _patch_lock:
        for owner, name in _blocks(model):
            count, hidden = _patched.get(id(owner), (0, None))
            if count == 0:
                hidden = vars(owner).get(name)  # set on the instance, by accelerate for example; else the class's own
                setattr(owner, name, _sliced(getattr(owner, name)))
            _patched[id(owner)] = count + 1, hidden
    _local.slice_tokens = slice_tokens
    try:
        yield
    finally:
        _local.slice_tokens = None
        with _patch_lock:
            for owner, name in _blocks(model):
                count, hidden = _patched.pop(id(owner))
                if count > 1:
                    _patched[id(owner)] = count - 1, hidden
                elif hidden is None:
                    del vars(owner)[name]  # the class's own method shows again
                else:
                    vars(owner)[name] = hidden


@contextmanager
def lower_precision(device_kind: str, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, matrix products and attention run in `dtype`; weights are cast as they are used, not kept."""
    with torch.autocast(device_kind, dtype=dtype, cache_enabled=False):
        yield


def host_copy(model: Any) -> Any:
    """A copy of `model` on the CPU in float32, made without a second copy on its own device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        host = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        memo[id(tensor)] = nn.Parameter(host, requires_grad=False) if isinstance(tensor, nn.Parameter) else host
    replica = copy.deepcopy(model, memo)
    if hasattr(replica, "_target_device"):
        replica._target_device = torch.device("cpu")
    return replica.to("cpu").eval()


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(owner, method) of each feed-forward block: a layer's ``feed_forward_chunk``, or a block's ``forward``."""
    for module in model.modules():
        if callable(getattr(module, "feed_forward_chunk", None)):
            yield module, "feed_forward_chunk"
            continue
        for name in _BLOCK_NAMES:
            block = module._modules.get(name)
            if block is not None and not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
                yield block, "forward"


def _sliced(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(inner)  # transformers counts the parameters of what it calls
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        step: int | None = getattr(_local, "slice_tokens", None)
        if step is None or args or kwargs or hidden.shape[-2] <= step:
            return inner(hidden, *args, **kwargs)
        out = torch.empty_like(hidden)
        for start in range(0, hidden.shape[-2], step):
            out[..., start : start + step, :] = inner(hidden[..., start : start + step, :])
        return out

    return run
