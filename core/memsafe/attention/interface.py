"""Padding-free attention through transformers' public attention and mask interfaces.

One name, ``"memsafe"``, is registered with both interfaces. What it does in a forward depends on the calling thread:

* inside :func:`packed` the encoder sees one row of sequences laid end to end, shape (1, tokens); no mask is made, and
  every sequence attends to itself alone;
* inside :func:`padded` the encoder sees ordinary padded rows, with the smallest mask that says the same;
* otherwise (somebody else runs the model) it is exactly ``"sdpa"``.

Whatever is not understood raises ``NotImplementedError``; the self-check then leaves packing off for that model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from memsafe.attention import grouped, kernels
from memsafe.attention.grouped import Packed

__all__ = [
    "NAME",
    "Installation",
    "Packed",
    "Padded",
    "current",
    "install",
    "packed",
    "padded",
    "positions",
    "uninstall",
]

NAME = "memsafe"
_sdpa_mask: Callable[..., Tensor | None] = AttentionMaskInterface()["sdpa"]
_bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)  # transformers 5


@dataclass(frozen=True)
class Padded:
    """One padded forward. uniform: all rows have the same length, so that there is no padding to mask."""

    uniform: bool


@dataclass(frozen=True)
class Installation:
    """Whether a model now runs our attention; `reason` says why not."""

    installed: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.installed


class _Local(threading.local):
    state: Packed | Padded | None = None


_local = _Local()


@contextmanager
def packed(lengths: Sequence[int], device: torch.device | None = None) -> Iterator[Packed]:
    """Forwards of this thread see one row of `lengths` laid end to end, on `device`."""
    state = Packed.of(lengths, device)
    with _active(state):
        yield state


@contextmanager
def padded(*, uniform: bool) -> Iterator[Padded]:
    """Forwards of this thread see padded rows; `uniform` if no row has any padding."""
    state = Padded(uniform)
    with _active(state):
        yield state


@contextmanager
def _active(state: Packed | Padded) -> Iterator[None]:
    before, _local.state = _local.state, state
    try:
        yield
    finally:
        _local.state = before


def current() -> Packed | Padded | None:
    """What forwards of this thread see now; None outside ours."""
    return _local.state


def is_active() -> bool:
    """Whether a forward of ours runs in this thread."""
    return _local.state is not None


# -- masks ---------------------------------------------------------------------------------------------------------


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function: None for a packed forward, a (batch, 1, 1, length) or sdpa's own mask for a padded one."""
    state = _local.state
    if state is None or args:  # transformers passes keywords only; anything else is a caller that we do not know
        if isinstance(state, Packed):
            raise NotImplementedError("the mask function was called in a way that is not understood")
        return _sdpa_mask(*args, **kwargs)
    if isinstance(state, Packed):
        if kwargs.get("kv_length") != state.tokens or kwargs.get("batch_size", 1) != 1:
            raise NotImplementedError("the model does not attend over the packed row as it was given")
        state.masks.add(
            _classify(kwargs.get("mask_function", masking_utils.causal_mask_function), kwargs.get("local_size"))
        )
        return None
    attention_mask = kwargs.get("attention_mask")
    if state.uniform or attention_mask is None:
        return _sdpa_mask(**{**kwargs, "attention_mask": None})  # spares the look at the values, a wait on a GPU
    plain = kwargs.get("mask_function") is _bidirectional is not None and kwargs.get("local_size") is None
    if plain and not kwargs.get("use_vmap") and attention_mask.shape[-1] == kwargs.get("kv_length"):
        # Every query sees the same keys: broadcasting saves batch x length x length, here and in each layer's copy.
        small: Tensor = attention_mask.bool()[:, None, None, :]
        return small
    return _sdpa_mask(**kwargs)


def _classify(mask_function: Callable[..., Any], local_size: int | None) -> tuple[int | None, bool]:
    """(window, causal) of transformers' `mask_function`: a query sees keys nearer than `window`, if causal none later.

    Found by asking it, since the functions are closures. Raises NotImplementedError for any other pattern.
    """
    if local_size is None and mask_function is _bidirectional:
        return None, False
    if local_size is None and mask_function is masking_utils.causal_mask_function:
        return None, True
    zero = torch.zeros((), dtype=torch.long, device="cpu")  # not a default device, which would be waited for
    size = local_size or 8
    query = 2 * size + 8  # far from every border; not a multiple of a chunk

    def sees(offset: int, query: int = query) -> bool:
        return bool(mask_function(zero, zero, zero + query, zero + query + offset))

    try:
        causal = not sees(1)
        ok = sees(0) and sees(1, 0) != causal  # near the start too: a prefix may be open to all
        if local_size is None:
            window = None
            ok = ok and sees(-1) and sees(-query) and sees(query) != causal
        else:
            # Inclusive in one place of transformers and exclusive in others.
            window = size + 1 if sees(-size) else size
            ok = ok and sees(1 - window) and not sees(-window) and sees(window - 1) != causal and not sees(window)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise NotImplementedError(f"an attention mask that depends on more than positions: {error}") from None
    if not ok:
        raise NotImplementedError("an attention mask that is neither full, causal nor a sliding window")
    return window, causal


# -- attention -----------------------------------------------------------------------------------------------------


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function. query, key, value: (batch, heads, length, dim); returns (batch, length, heads, dim)."""
    state = _local.state
    if not isinstance(state, Packed):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output
    _refuse(attention_mask, dropout, kwargs)
    if query.shape[0] != 1 or query.shape[2] != state.tokens or key.shape[2] != state.tokens:
        raise NotImplementedError("the attention does not see the packed row as it was given")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = _window(state, kwargs.get("sliding_window"), causal)
    kernel = kernels.choose(query, key, value, causal=causal, window=window, scaling=scaling)
    if kernel is not None and state.cumulative is not None:
        return kernel(query, key, value, state.cumulative, state.longest), None
    return grouped.attend(query, key, value, state, causal, window, scaling), None


def _refuse(attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError for everything that would change the numbers and is not handled here."""
    if attention_mask is not None:
        raise NotImplementedError("the model makes its own attention mask")
    if dropout:
        raise NotImplementedError("attention dropout: the model is in training mode")
    for name, given in kwargs.items():
        if name == "sliding_window" or given is None or isinstance(given, (bool, str)):
            continue
        if isinstance(given, Tensor) and name in ("position_ids", "cache_position"):
            continue
        if isinstance(given, (Tensor, float)) or name in ("softcap", "cache"):
            raise NotImplementedError(f"attention with {name}")


def _window(state: Packed, sliding_window: Any, causal: bool) -> int | None:
    """The window that matters for these lengths, or None; a query sees keys nearer than it.

    The mask that sdpa would have been given decides; `sliding_window`, the layer's own word, says which mask it was.
    """
    wanted = int(sliding_window) if sliding_window is not None else None
    if wanted is not None and wanted >= state.longest:
        wanted = None
    # A window at least as long as the longest sequence hides nothing.
    made = {(w if w is not None and w < state.longest else None, c) for w, c in state.masks}
    if made and (wanted, causal) not in made:
        raise NotImplementedError("the attention layer and the mask made for it do not agree")
    return wanted


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


# -- installing ----------------------------------------------------------------------------------------------------


@dataclass
class _Record:
    previous: str
    users: int


_installed: weakref.WeakKeyDictionary[PreTrainedModel, _Record] = weakref.WeakKeyDictionary()
_install_lock = threading.Lock()


def install(hf_model: PreTrainedModel) -> Installation:
    """Make `hf_model`, loaded with sdpa attention, run ours. Several users may install; the last uninstall restores."""
    with _install_lock:
        record = _installed.get(hf_model)
        if record is not None:
            record.users += 1
            return Installation(True)
        previous = getattr(hf_model.config, "_attn_implementation", None)
        if type(hf_model).__module__.split(".")[0] == "transformers_modules":
            return Installation(False, "the model brings its own code")
        if previous != "sdpa":
            return Installation(False, f"the model runs {previous} attention, not sdpa")
        if getattr(hf_model.config, "is_encoder_decoder", False):
            return Installation(False, "the model is an encoder-decoder")
        if any(vars(module).get("_compiled_call_impl") is not None for module in hf_model.modules()):
            return Installation(False, "the model is compiled")  # a compiled graph would keep one forward's lengths
        can_set = getattr(hf_model, "_can_set_attn_implementation", None)
        if callable(can_set) and not can_set():  # asked first, since trying would log a warning
            return Installation(False, "the model's code does not use transformers' attention interface")
        try:
            hf_model.set_attn_implementation(NAME)
        except (ValueError, ImportError, AttributeError) as error:
            return Installation(False, f"the model refuses another attention: {error}")
        models = [module for module in hf_model.modules() if isinstance(module, PreTrainedModel)]
        if any(model.config._attn_implementation != NAME for model in models):
            hf_model.set_attn_implementation(previous)
            return Installation(False, "a part of the model does not use the attention interface")
        _installed[hf_model] = _Record(previous, 1)
        return Installation(True)


def uninstall(hf_model: PreTrainedModel) -> None:
    """Undo one :func:`install`; unknown models are left alone."""
    with _install_lock:
        record = _installed.get(hf_model)
        if record is None:
            return
        record.users -= 1
        if record.users == 0:
            del _installed[hf_model]
            hf_model.set_attn_implementation(record.previous)


# -- positions -----------------------------------------------------------------------------------------------------


def padding_position(encoder: nn.Module) -> int | None:
    """The padding index from which RoBERTa and its kin number positions; None where positions start at 0.

    Only embeddings that do so have both an integer ``padding_idx`` and a learned table of positions (the rule of
    sentence-transformers' own flattening).
    """
    for module in encoder.modules():
        padding_idx = getattr(module, "padding_idx", None)
        if isinstance(padding_idx, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding_idx
    return None


def learned_positions(encoder: nn.Module) -> int | None:
    """Tokens of the longest sequence that a learned table of positions allows; None without such a table, where positions
    are rotary or relative: their config's ``max_position_embeddings`` is no limit."""
    padding = padding_position(encoder)
    for module in encoder.modules():
        for name in ("position_embeddings", "embed_positions", "wpe"):
            table = getattr(module, name, None)
            if isinstance(table, nn.Embedding):
                return int(table.num_embeddings) - (0 if padding is None else padding + 1)
    return None


def positions(input_ids: NDArray[np.integer[Any]], lengths: Sequence[int], padding: int | None) -> NDArray[np.int64]:
    """int64, shape (tokens,): each token's position in its own sequence. input_ids: the sequences end to end.

    padding: of :func:`padding_position`. A padding token written inside a text takes the position `padding` there, and
    is not counted: what these models derive from ``input_ids == padding``.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(counts) - counts
    if padding is None:
        return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)
    real = np.asarray(input_ids) != padding
    seen = np.concatenate(([0], np.cumsum(real, dtype=np.int64)))
    return padding + np.where(real, seen[1:] - np.repeat(seen[starts], counts), 0)
