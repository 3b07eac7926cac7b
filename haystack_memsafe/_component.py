"""What the three components share: settings that serialise, a model that components of equal settings share, texts of documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from haystack import Document, default_from_dict, default_to_dict
from haystack.utils import ComponentDevice
from haystack.utils.hf import deserialize_hf_model_kwargs, serialize_hf_model_kwargs
from typing_extensions import Self

from memsafe import ConfigError, InputError, MemoryPolicy, PerProcess

__all__ = ["MemsafeComponent", "WrongInputError", "check_documents", "texts_of"]

_Core = TypeVar("_Core")


class WrongInputError(InputError, TypeError):
    """An input of another kind than the component takes: the TypeError of the classes that ours replace."""


class MemsafeComponent(Generic[_Core]):
    """Settings as attributes, under upstream's names. Pickles and copies as these; the model is loaded on first use."""

    model: str
    device: ComponentDevice
    batch_size: int | None
    _names: tuple[str, ...]
    _core: PerProcess[_Core]

    def _take(self, settings: dict[str, Any]) -> None:
        """Keep what the constructor was given."""
        size = settings["batch_size"]
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"batch_size: got {size!r}; give an int of at least 1, or None and the planner decides")
        settings["device"] = ComponentDevice.resolve_device(settings["device"])
        if "meta_fields_to_embed" in settings:
            settings["meta_fields_to_embed"] = settings["meta_fields_to_embed"] or []
        vars(self).update(settings, _names=tuple(settings))
        self._core = PerProcess.shared(type(self)._build, self._settings())

    def to_dict(self) -> dict[str, Any]:
        """The component as a dictionary. hooks are left out; memory as a dict of what was set."""
        kept = {name: getattr(self, name) for name in self._names if name != "hooks"}
        kept |= {name: value.to_dict() for name, value in kept.items() if hasattr(value, "to_dict")}
        if isinstance(kept["memory"], MemoryPolicy):
            given = {each.name: getattr(kept["memory"], each.name) for each in dataclasses.fields(MemoryPolicy)}
            usual = MemoryPolicy()
            kept["memory"] = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in given.items()
                if value != getattr(usual, name)
            }
        if kept.get("model_kwargs") is not None:
            kept["model_kwargs"] = dict(kept["model_kwargs"])
            serialize_hf_model_kwargs(kept["model_kwargs"])
        made: dict[str, Any] = default_to_dict(self, **kept)
        return made

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The component that :meth:`to_dict` gave."""
        given = dict(data["init_parameters"])
        if given.get("model_kwargs") is not None:
            given["model_kwargs"] = dict(given["model_kwargs"])
            deserialize_hf_model_kwargs(given["model_kwargs"])
        made: Self = default_from_dict(cls, {**data, "init_parameters": given})
        return made

    def warm_up(self) -> None:
        """Load the model, unless a component of equal settings has. Raises what loading a model raises."""
        self._core.get(self._build)

    def _build(self) -> _Core:
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        """Options of the core's constructor, the token still unread."""
        given: Any = self
        options: Mapping[str, Any] = given.tokenizer_kwargs or {}
        made = {name: getattr(self, name, None) for name in ("dtype", "memory", "hooks", "revision", "backend")}
        made |= {name: getattr(self, name) for name in ("trust_remote_code", "model_kwargs", "config_kwargs")}
        made |= {"model": self.model, "device": self.device.to_torch_str(), "tokenizer_kwargs": given.tokenizer_kwargs}
        made |= {"max_length": options.get("model_max_length"), "token": given.token}
        return made

    def _resolved(self) -> dict[str, Any]:
        """:meth:`_settings` with the token, which may be there only where the model is loaded."""
        settings = self._settings()
        return {**settings, "token": settings["token"] and settings["token"].resolve_value()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_core"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._core = PerProcess.shared(type(self)._build, self._settings())


def check_documents(documents: Any) -> list[Document]:
    """Raises :class:`WrongInputError` for what is no list of documents."""
    if not isinstance(documents, list):
        raise WrongInputError(f"documents: got a {type(documents).__name__}; give a list of Documents", index=None)
    for index, document in enumerate(documents):
        if not isinstance(document, Document):
            raise WrongInputError(
                f"documents: entry {index} is a {type(document).__name__}, not a Document", index=index
            )
    return documents


def texts_of(documents: list[Document], component: Any, prefix: str, suffix: str) -> list[str]:
    """What the model reads of each: the metadata that was asked for, then the content."""
    texts = []
    for document in documents:
        parts = [
            str(document.meta[name]) for name in component.meta_fields_to_embed if document.meta.get(name) is not None
        ]
        texts.append(prefix + component.embedding_separator.join([*parts, document.content or ""]) + suffix)
    return texts
