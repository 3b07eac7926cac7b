"""Variable-length attention: kernels of CUDA devices, found by feature detection, and short sequences on a CPU.

Each CUDA kernel takes the packed row as it is, so that the number of launches does not grow with the number of
sequences. Where none fits, packed attention runs per run of equal lengths instead. A wrong kernel cannot go unnoticed:
a model's self-check compares it with plain attention before it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from memsafe.attention.transfer import send

__all__ = ["SHORT_SCORES_BYTES", "attend_short", "choose", "cumulative", "offered", "score_limit", "short_limit"]

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(query, key, value: (1, heads, tokens, dim); starts: int32 (sequences + 1,); longest) -> (1, tokens, heads, dim)."""


def cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32, shape (sequences + 1,): where each sequence starts, and the end."""
    return send([0, *accumulate(lengths)], device, torch.int32)


def choose(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, window: int | None, scaling: float | None
) -> Kernel | None:
    """The kernel for these tensors, or None. A query sees keys nearer than `window`, and if `causal` none later."""
    if not _on_cuda(query):
        return None
    dim = query.shape[3]
    if value.shape[3] != dim or key.shape[3] != dim:
        return None
    # Under autocast rotary positions leave query and key in float32 beside a half value; only sdpa casts them itself.
    if not query.dtype == key.dtype == value.dtype:
        return None
    half = query.dtype in (torch.float16, torch.bfloat16)
    # Flash attention: from sm80 on, half precision, heads of up to 256 in steps of 8.
    if half and dim % 8 == 0 and dim <= 256 and _capability(query.device) >= (8, 0):
        features = _varlen_features()
        scale_ok = "scale" in features or scaling is None or abs(scaling * dim**0.5 - 1) < 1e-6
        window_ok = "window_size" in features or (window is None and (not causal or "is_causal" in features))
        if features and scale_ok and window_ok:
            return lambda q, k, v, starts, longest: _varlen(
                q, k, v, starts, longest, causal=causal, window=window, scaling=scaling
            )
    # Memory-efficient attention: any CUDA device, fp32 too; its windows are only causal, so they go without it.
    if window is None and dim % (8 if half else 4) == 0 and _efficient() is not None:
        if query.dtype is torch.bfloat16 and _capability(query.device) < (8, 0):
            return None
        return lambda q, k, v, starts, longest: _memory_efficient(
            q, k, v, starts, longest, causal=causal, scaling=scaling
        )
    return None


def offered(capability: tuple[int, int]) -> dict[str, str]:
    """Attention kernels for a CUDA card of that compute capability with this torch: "yes", or "no: why".

    Hardware: flash and cuDNN from sm80 on (torch's sdp_utils.cpp), which a T4 (sm75) lacks; math holds all scores.
    """
    modern = (
        "yes" if capability >= (8, 0) else f"no: needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
    )
    has_varlen, has_efficient = bool(_varlen_features()), _efficient() is not None
    varlen = modern if has_varlen else "no: this torch has no varlen_attn (2.10 has)"
    efficient = "yes" if has_efficient else "no: this torch has no _efficient_attention_forward"
    return {
        "packed flash (varlen_attn)": varlen,
        "packed memory-efficient": efficient,
        "sdpa flash": modern,
        "sdpa cuDNN": modern,
        "sdpa memory-efficient": "yes",
        "sdpa math (holds all scores)": "yes",
    }


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None  # ROCm has other kernels behind the same names


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def _varlen_function() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later
    except ImportError:
        return None
    function: Callable[..., Any] = varlen_attn
    return function


def _varlen_features() -> frozenset[str]:
    """Parameter names of this torch's varlen_attn: they grew from release to release. Empty if there is none."""
    function = _varlen_function()
    return frozenset(inspect.signature(function).parameters) if function is not None else frozenset()


def _rows(tensor: Tensor, heads: int | None = None) -> Tensor:
    """(1, heads, tokens, dim) -> (tokens, heads, dim), a view; with `heads`, each head repeated up to that many."""
    rows = tensor[0].transpose(0, 1)
    if heads is not None and rows.shape[1] != heads:
        rows = rows.repeat_interleave(heads // rows.shape[1], dim=1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    *,
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    function, features = _varlen_function(), _varlen_features()
    if function is None:
        raise NotImplementedError("this torch has no varlen_attn")
    options: dict[str, Any] = {}
    grouped = query.shape[1] != key.shape[1]
    repeat = None
    if grouped and "enable_gqa" in features:
        options["enable_gqa"] = True
    elif grouped:
        repeat = query.shape[1]
    if "scale" in features:
        options["scale"] = scaling
    if "window_size" in features:
        before = -1 if window is None else window - 1
        options["window_size"] = (before, 0 if causal else before)
    elif causal:
        options["is_causal"] = True
    output = function(
        _rows(query), _rows(key, repeat), _rows(value, repeat), starts, starts, longest, longest, **options
    )
    return output[None] if isinstance(output, Tensor) else output[0][None]


def _efficient() -> Any:
    """The private operator under scaled_dot_product_attention that takes sequence starts, or None."""
    return getattr(torch.ops.aten, "_efficient_attention_forward", None)


def _memory_efficient(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, *, causal: bool, scaling: float | None
) -> Tensor:
    heads = query.shape[1]
    output = _efficient()(
        _rows(query)[None],
        _rows(key, heads)[None],
        _rows(value, heads)[None],
        None,  # bias
        starts,
        starts,
        longest,
        longest,
        0.0,  # dropout
        1 if causal else 0,  # custom_mask_type: 1 is causal from the top left corner of every sequence
        False,  # no log-sum-exp
        scale=scaling,
    )
    result: Tensor = output[0]
    return result


# -- short sequences on a CPU ---------------------------------------------------------------------------------------

SHORT_SCORES_BYTES = 2 << 20
"""Scores of one sequence, (heads, length, length) in float32, that stay in a core's cache: the second level has 1 or 2 MiB.

At 12 heads this is 209 tokens. Measured against scaled_dot_product_attention, heads of 32 and 64, on one core and on
two: 0.5 of its time at 40 and 60 tokens, 0.7 to 0.8 from 80 to 200, as much at 256.
"""
_SHORT_THREADS = 4  # more of them wait for each other longer than these small operations take


def short_limit(query: Tensor) -> int:
    """Sequences of up to so many tokens go to :func:`attend_short`; 0 for none. query: (1, heads, tokens, dim)."""
    single = query.device.type == "cpu" and query.dtype is torch.float32 and not query.requires_grad
    return score_limit(query.shape[1]) if single and torch.get_num_threads() <= _SHORT_THREADS else 0


def score_limit(heads: int) -> int:
    """The tokens of the longest sequence whose scores take :data:`SHORT_SCORES_BYTES` at most."""
    return isqrt(SHORT_SCORES_BYTES // (4 * heads))


def attend_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    groups: Sequence[tuple[int, int, int]],
    scaling: float | None,
) -> bool:
    """Attention of short sequences by matrix products and one exponential, into `output`; False if that cannot be.

    query, key, value: (heads, tokens, dim). A softmax needs no maximum where the exponentials neither overflow nor
    vanish, and it spends half its time there. So they are summed first and looked at after: with every sum between
    1e-30 and 1e30, no term that matters was lost to float32's range; otherwise the caller does it the careful way.
    """
    scale = query.shape[2] ** -0.5 if scaling is None else scaling
    nothing = query.new_empty(())
    totals = []
    for start, count, length in groups:
        for first in range(start, start + count * length, length):
            last = first + length
            scores = torch.baddbmm(nothing, query[:, first:last], key[:, first:last].mT, beta=0, alpha=scale).exp_()
            total = scores.sum(-1, keepdim=True)
            torch.div(torch.bmm(scores, value[:, first:last]), total, out=output[first:last].transpose(0, 1))
            totals.append(total.view(-1))
    low, high = torch.aminmax(torch.cat(totals))
    return bool(low > 1e-30) and bool(high < 1e30)
