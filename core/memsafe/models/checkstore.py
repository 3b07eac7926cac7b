"""Remembered self-checks: what a check depends on, and where its result is kept."""

from __future__ import annotations

import enum
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from memsafe.config import cache_dir
from memsafe.models.selfcheck import SelfCheck, tolerance

__all__ = ["CheckStore", "check_key"]

log = logging.getLogger("memsafe")

_FORMAT = "3"


def check_key(*, model: Any, spec: Mapping[str, Any], revision: str, card: str, tokenizer: Any, tokens: str) -> str:
    """Everything that can change rows, as one digest.

    model: the SentenceTransformer or CrossEncoder as it is loaded, whose modules' settings and configs count as they
    are now. spec: how it was asked for (kind, name, all load options). revision: of the files it came from, tokenizer
    and remote code among them. card: what its kernels run on. tokens: how its inputs are tokenised.
    """
    versions = {
        name: importlib.import_module(name).__version__
        for name in ("memsafe", "sentence_transformers", "tokenizers", "torch", "transformers")
    }
    modules = [
        (name, f"{type(module).__module__}.{type(module).__qualname__}", _settings(module))
        for name, module in model.named_modules()
    ]
    whole = {
        "format": _FORMAT,
        "versions": versions,
        "spec": _plain(dict(spec)),
        "revision": revision,
        "card": [card, tolerance(torch.float32, torch.device("cuda" if torch.cuda.is_available() else "cpu"))],
        "modules": modules,
        "tokenizer": [type(tokenizer).__qualname__, _plain(getattr(tokenizer, "init_kwargs", None)), tokens],
        "length": getattr(tokenizer, "model_max_length", None),
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


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
        self._file = os.path.join(cache_dir(), "checks", f"{key[:32]}.json")

    def load(self) -> SelfCheck | None:
        """What was found, or None."""
        try:
            with open(self._file, encoding="utf-8") as stream:
                return SelfCheck(**json.load(stream))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, check: SelfCheck) -> None:
        try:
            os.makedirs(os.path.dirname(self._file), exist_ok=True)
            temporary = f"{self._file}.{os.getpid()}"
            with open(temporary, "w", encoding="utf-8") as stream:
                json.dump(asdict(check), stream)
            os.replace(temporary, self._file)
        except OSError as error:
            log.debug("the self-check could not be remembered: %s", error)
