"""Remembered self-checks: what a check depends on, and where its result is kept."""

from __future__ import annotations

import enum
import hashlib
import importlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from memsafe.config import cache_dir
from memsafe.machine.store import Store, document, read_fields
from memsafe.models.heads import HEADS
from memsafe.models.selfcheck import SelfCheck, tolerance

__all__ = ["CheckStore", "check_key", "versions"]

_SCHEMA = 5


def check_key(*, model: Any, spec: Mapping[str, Any], revision: str, card: str, tokenizer: Any, tokens: str) -> str:
    """Everything that can change rows, as one digest.

    model: the SentenceTransformer or CrossEncoder as it is loaded, whose modules' settings and configs count as they
    are now. spec: how it was asked for (kind, name, all load options). revision: of the files it came from, tokenizer
    and remote code among them. card: what its kernels run on. tokens: how its inputs are tokenised.
    """
    modules = [
        (name, f"{type(module).__module__}.{type(module).__qualname__}", _settings(module))
        for name, module in model.named_modules()
    ]
    whole = {
        "versions": versions("memsafe", "sentence_transformers", "tokenizers", "torch", "transformers"),
        "spec": _plain(dict(spec)),
        "revision": revision,
        "card": [card, tolerance(torch.float32, torch.device("cuda" if torch.cuda.is_available() else "cpu"))],
        "modules": modules,
        "tokenizer": [type(tokenizer).__qualname__, _plain(getattr(tokenizer, "init_kwargs", None)), tokens],
        "length": getattr(tokenizer, "model_max_length", None),
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each of `packages`."""
    return {name: str(importlib.import_module(name).__version__) for name in packages}


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module: pooling modes, flags, configs, activation functions."""
    return {name: _plain(value) for name, value in vars(module).items() if not name.startswith("_")}


def _plain(value: Any) -> Any:
    """`value` as JSON holds it, without addresses; what says nothing that lasts is left to its type."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, PretrainedConfig):
        settings = {**value.to_dict(), "attention": getattr(value, "_attn_implementation", None)}
        return {name: _plain(each) for name, each in settings.items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        each = [_plain(one) for one in value]
        return sorted(each, key=str) if isinstance(value, (set, frozenset)) else each
    if isinstance(value, (torch.dtype, torch.device, enum.Enum)):
        return str(value)
    name = getattr(value, "__qualname__", None)  # functions and classes
    return (
        f"{getattr(value, '__module__', '')}.{name}"
        if name
        else f"<{type(value).__module__}.{type(value).__qualname__}>"
    )


class CheckStore:
    """One model's self-check on disk. key: of :func:`check_key`. Losing it costs another check, nothing else."""

    def __init__(self, key: str) -> None:
        self._key = [key]
        self._store = Store(os.path.join(cache_dir(), "checks"), "remembered self-check", _SCHEMA, _believed)

    def load(self) -> SelfCheck | None:
        """What was found, or None."""
        return self._store.load(self._key)

    def save(self, check: SelfCheck) -> None:
        fields = asdict(check)
        if not math.isfinite(check.max_difference):
            fields["max_difference"] = None
        self._store.write(self._key, document(_SCHEMA, self._key, fields))


def _believed(state: dict[str, Any]) -> SelfCheck:
    """The check in a remembered file; raises ``ValueError`` for one that `run_self_check` cannot have given."""
    infinite = state["max_difference"] is None  # JSON knows no infinity
    check = SelfCheck(**read_fields(SelfCheck, {**state, "max_difference": 0.0} if infinite else state))
    if check.head not in HEADS or (check.head != HEADS[0] and not check.packed_ok):
        raise ValueError("a head that this check cannot have found")
    if check.in_place_ok and not (check.packed_ok or check.small_mask_ok):
        raise ValueError("working in place is right for no path")
    if (check.alone and (check.packed_ok or check.small_mask_ok)) or check.own > check.alone or check.cut > check.own:
        raise ValueError("inputs run alone, or together, not both")
    return replace(check, max_difference=math.inf) if infinite else check
