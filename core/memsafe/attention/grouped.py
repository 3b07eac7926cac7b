"""A packed row, and attention over it by runs of sequences of equal length: what every device can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

from memsafe.attention import kernels

__all__ = ["Packed", "attend", "window_bytes"]

WINDOW_BLOCK = 256
"""Queries at a time under a sliding window (ModernBERT's reaches 64 tokens to each side): large enough for the kernel."""


@dataclass
class Packed:
    """One packed forward: which rows of (1, tokens) belong together.

    lengths: tokens of each sequence, in the order in which they lie; equal lengths adjacent.
    groups: (first token, sequences, tokens of each) of every run of equal lengths.
    masks: (window or None, causal) of every mask that the model asked for in this forward.
    """

    lengths: tuple[int, ...]
    groups: tuple[tuple[int, int, int], ...]
    tokens: int
    longest: int
    masks: set[tuple[int | None, bool]] = field(default_factory=set)
    bands: dict[tuple[int, int, int, int, bool], Tensor] = field(default_factory=dict)
    tables: dict[int, Any] = field(default_factory=dict)
    """What a model makes of the length of a row, by length; see regrouped.py."""
    cumulative: Tensor | None = None
    """int32, shape (sequences + 1,), on the accelerator: where each sequence starts; None on a CPU."""

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | None = None) -> Packed:
        if not lengths or min(lengths) < 1:
            raise ValueError("packed sequences need at least one token each")
        groups, start = [], 0
        for length, run in groupby(lengths):
            count = len(list(run))
            groups.append((start, count, length))
            start += count * length
        state = Packed(tuple(lengths), tuple(groups), start, max(lengths))
        if device is not None and device.type == "cuda":
            state.cumulative = kernels.cumulative(lengths, device)  # once per forward, so that no layer waits for it
        return state


def attend(
    query: Tensor, key: Tensor, value: Tensor, state: Packed, causal: bool, window: int | None, scaling: float | None
) -> Tensor:
    """Attention per run of equal lengths, on views of query, key and value; returns (1, tokens, heads, dim)."""
    heads = query.shape[1]
    if key.shape[1] != heads:
        key, value = repeat_kv(key, heads // key.shape[1]), repeat_kv(value, heads // value.shape[1])
    output = query.new_empty((state.tokens, heads, value.shape[3]))
    limit = kernels.short_limit(query) if not causal and window is None else 0
    short = [group for group in state.groups if group[2] <= limit]
    if short and not kernels.attend_short(query[0], key[0], value[0], output, short, scaling):
        short = []
    for start, count, length in state.groups:
        if short and length <= limit:
            continue
        stop = start + count * length
        q, k, v = (
            tensor[0, :, start:stop].view(tensor.shape[1], count, length, tensor.shape[3]).transpose(0, 1)
            for tensor in (query, key, value)
        )
        out = output[start:stop].view(count, length, heads, value.shape[3]).transpose(1, 2)
        if window is not None and length > window:
            _windowed(q, k, v, out, state, causal, window, scaling)
        else:
            out.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling))
    return output[None]


def _windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    state: Packed,
    causal: bool,
    window: int,
    scaling: float | None,
) -> None:
    """Attention within a window, block of queries by block, over the keys that one of them sees: memory and time grow
    with the length, not with its square. All of shape (sequences, heads, length, dim)."""
    length = query.shape[2]
    step = max(window, WINDOW_BLOCK)
    for start in range(0, length, step):
        stop = min(start + step, length)
        first = max(start - window + 1, 0)
        last = stop if causal else min(stop + window - 1, length)
        band = _band(state, stop - start, last - first, start - first, window, causal, query.device)
        keys = slice(first, last)
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, keys], value[:, :, keys], attn_mask=band, scale=scaling
        )
        out[:, :, start:stop].copy_(attended)


def window_bytes(window: int, bytes_per_element: int) -> int:
    """What the masks of a forward with this window take at most: three kept, one in the making or as sdpa copies it."""
    step = max(window, WINDOW_BLOCK)
    return step * (step + 2 * window) * (3 + max(4 + 4, bytes_per_element))


def _band(
    state: Packed, queries: int, keys: int, offset: int, window: int, causal: bool, device: torch.device
) -> Tensor:
    """bool, shape (queries, keys), of which the first query stands at key `offset`: True where the key is nearer than
    `window` and, if causal, not later."""
    found = state.bands.get((queries, keys, offset, window, causal))
    if found is None:
        place = torch.arange(offset, offset + queries, dtype=torch.int32, device=device)
        distance = place[:, None] - torch.arange(keys, dtype=torch.int32, device=device)[None, :]
        found = (distance < window) & (distance >= 0) if causal else distance.abs() < window
        state.bands[queries, keys, offset, window, causal] = found
    return found
