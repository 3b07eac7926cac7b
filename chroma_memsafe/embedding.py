"""``MemsafeEmbeddingFunction``: what Chroma's SentenceTransformerEmbeddingFunction does, with memory planned by the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from memsafe import ConfigError, Embedder, EventHook, MemoryPolicy, PerProcess

__all__ = ["MemsafeEmbeddingFunction"]

_CONFIG = ("model_name", "device", "normalize_embeddings", "kwargs", "dtype", "max_length", "use_saved_prompts")
"""What a collection keeps of its embedding function: what decides the rows, and nothing of the machine's memory."""


@register_embedding_function
class MemsafeEmbeddingFunction(EmbeddingFunction[Documents]):
    """Drop-in for ``chromadb.utils.embedding_functions.SentenceTransformerEmbeddingFunction``.

    Args:
        model_name, device, normalize_embeddings, kwargs: as there: by default the model runs on the CPU, and `kwargs` (of the
            SentenceTransformer) are numbers, strings, lists and dicts. device: None for the best one.
        dtype, max_length: as for :class:`memsafe.Embedder`.
        use_saved_prompts: True puts the model's prompts before queries and documents; the class that this replaces does not.
        memory: a ``MemoryPolicy``, or a dict of its fields; hooks: called with the core's events. Neither is kept with a collection.

    Raises:
        memsafe.ModelError: the model is missing or broken. memsafe.ConfigError: an option cannot be used.
    """

    def __init__(
        self,
        model_name: str = "all-MiniLM-L6-v2",
        device: str | None = "cpu",
        normalize_embeddings: bool = False,
        *,
        dtype: str | None = None,
        max_length: int | None = None,
        use_saved_prompts: bool = False,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        **kwargs: Any,
    ) -> None:
        for name, value in kwargs.items():
            if not isinstance(value, (str, int, float, bool, list, dict, tuple)):
                raise ConfigError(f"Keyword argument {name} is not a primitive type")
        self.model_name, self.device, self.normalize_embeddings = model_name, device, normalize_embeddings
        self.dtype, self.max_length, self.use_saved_prompts = dtype, max_length, use_saved_prompts
        self.memory, self.hooks, self.kwargs = memory, tuple(hooks), kwargs
        self._core = self._holder()
        self._core.get(self._build)  # a model that cannot be loaded is refused here, as upstream does

    @property
    def embedder(self) -> Embedder:
        """The core object that does the work; loaded anew after unpickling, on first use."""
        return self._core.get(self._build)

    def __call__(self, input: Documents) -> Embeddings:
        """Embeddings of `input` as documents: float32, one array for each."""
        return _arrays(self.embedder.run(input, **self._options("document")).embeddings)

    def embed_query(self, input: Documents) -> Embeddings:
        """Embeddings of `input` as queries, which overtake documents that wait."""
        return _arrays(self.embedder.run(input, urgent=True, **self._options("query")).embeddings)

    @staticmethod
    def name() -> str:
        return "memsafe"

    def default_space(self) -> Space:
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        return ["cosine", "l2", "ip"]

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> MemsafeEmbeddingFunction:
        """The function that a collection was made with. Raises :class:`memsafe.ConfigError` for a configuration of another kind."""
        MemsafeEmbeddingFunction.validate_config(config)
        given = dict(config)
        return MemsafeEmbeddingFunction(**{**(given.pop("kwargs", None) or {}), **given})

    def get_config(self) -> dict[str, Any]:
        """What :meth:`build_from_config` takes, ready for JSON."""
        return {name: getattr(self, name) for name in _CONFIG}

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Anything may change, as upstream: a folder may have moved."""

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Raise :class:`memsafe.ConfigError` for options that are unknown, and for no model."""
        unknown = sorted(set(config) - set(_CONFIG))
        if unknown or not config.get("model_name"):
            what = f"unknown option {unknown[0]!r}" if unknown else "no model_name"
            raise ConfigError(f"config: {what}; choose from {', '.join(_CONFIG)}")

    def _options(self, kind: str) -> dict[str, Any]:
        return {"kind": kind if self.use_saved_prompts else None, "normalize": bool(self.normalize_embeddings)}

    def _holder(self) -> PerProcess[Embedder]:
        """Of a loaded model: Chroma makes a function of the same configuration again and again."""
        return PerProcess.shared(self._settings())

    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("device", "dtype", "max_length", "memory", "hooks")}
        return {"model": self.model_name, **own, **self.kwargs}

    def _build(self) -> Embedder:
        return Embedder(**self._settings())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_core"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._core = self._holder()


def _arrays(rows: np.ndarray[Any, Any]) -> Embeddings:
    return list(rows)
