"""Whether two models are the same one, wherever their files lie: a digest of what a model holds, not of its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["content_digest"]

_ELEMENTS = 64
"""Of each tensor so many, evenly spread: a step of training moves nearly all of them, and 400 tensors take milliseconds."""

_NO_MATTER = {"can_flatten_inputs", "chunk_size_feed_forward", "gradient_checkpointing", "is_hpu_graph_enabled"}
_NO_MATTER |= {"training", "trust_remote_code"}
"""Settings that change no row."""
_LONGEST_WORD = 40

_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs; ÀÉÎ ß 東京 мир \U0001f600",
    "lower UPPER MiXeD  under_score\ttab\nline https://example.org/a?b=c 3.14159 -1e-9",
    "word " * 40 + "anticonstitutionnellement",
)


def content_digest(model: Any, encode: Callable[[Sequence[str]], Sequence[Any]], otherwise: str) -> str:
    """32 hexadecimal digits that change with weights, modules, their settings, or how texts become tokens.

    model: a SentenceTransformer or CrossEncoder. encode: makes tokens of texts (an ``Encoded`` each). otherwise: what stands
    for a model whose weights are not torch's (ONNX, OpenVINO).
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            digest.update(json.dumps([name, type(module).__qualname__, _settings(module)], sort_keys=True).encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_sample(tensor))
        if not any(True for _ in model.parameters()):
            digest.update(otherwise.encode())
    else:
        digest.update(otherwise.encode())
    for one in encode(_PROBES):
        digest.update(b"" if one.input_ids is None else one.input_ids.tobytes())
        digest.update(str(one.num_tokens).encode())
    return digest.hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module was set to, such as an epsilon, a pooling mode or a length; not where it came from."""
    found = {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in _NO_MATTER}
    return {name: value for name, value in found.items() if _is_setting(value)}


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    if isinstance(value, str):
        return len(value) <= _LONGEST_WORD and not any(sign in value for sign in "/\\")  # "mean", but no path
    return isinstance(value, (bool, int, float))


def _sample(tensor: torch.Tensor) -> bytes:
    if not tensor.numel() or tensor.is_meta:
        return b""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(_ELEMENTS, flat.numel()), dtype=torch.float64, device="cpu")
    some = flat[places.round().long().to(flat.device)].cpu()
    return bytes(some.contiguous().view(torch.uint8).numpy().tobytes())
