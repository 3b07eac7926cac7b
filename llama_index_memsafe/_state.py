"""What both adapters share: the core object, loaded once per process, and pickling that sends no weights."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pydantic_core import PydanticUndefined

from memsafe import ConfigError, PerProcess

__all__ = ["CoreHolder", "Reloadable", "is_overridden"]

logger = logging.getLogger(__name__)

Core = TypeVar("Core")

_SHARED_SERVICES = ("callback_manager", "embeddings_cache", "rate_limiter")
"""Fields that a deep copy shares: they are live services with handlers, stores or clocks behind them."""


class CoreHolder(Generic[Core]):
    """Builds ``build(**settings)`` on first use, once per process, and hands the same object to every thread.

    A pickled or deep-copied holder carries the settings and builds its own object when it is first used.
    """

    def __init__(self, build: Callable[..., Core], settings: dict[str, Any]) -> None:
        self.build, self.settings = build, settings
        self._shared: PerProcess[Core] = PerProcess()

    def _build(self) -> Core:
        return self.build(**self.settings)

    @property
    def loaded(self) -> bool:
        """Whether :meth:`get` would return at once."""
        return self._shared.loaded

    def get(self) -> Core:
        """The core object. The first call may take seconds and raises what loading a model raises."""
        return self._shared.get(self._build)

    async def aget(self) -> Core:
        """As :meth:`get`; loading happens in a thread, so that the event loop stays free."""
        return await self._shared.aget(self._build)

    def __deepcopy__(self, memo: dict[int, Any]) -> CoreHolder[Core]:
        return CoreHolder(self.build, dict(self.settings))

    def __getstate__(self) -> dict[str, Any]:
        return {"build": self.build, "settings": _pickled(self.settings)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CoreHolder.__init__(self, state["build"], _unpickled(state["settings"]))


class Reloadable:
    """Mixin for a pydantic adapter with a ``_core`` holder: pickles as configuration, never as weights.

    ``__setstate__`` never raises: in a worker of a process pool an exception there would hang the parent for ever.
    Values that cannot be pickled are left out with a warning, as LlamaIndex does, and come back as their defaults.
    """

    def __getstate__(self) -> dict[str, Any]:
        private: dict[str, Any] = getattr(self, "__pydantic_private__", None) or {}
        return {
            "fields": _pickled(vars(self)),
            "private": _pickled(private),
            "fields_set": sorted(getattr(self, "__pydantic_fields_set__", ())),
        }

    def __setstate__(self, state: Any) -> None:
        kind: Any = type(self)
        fields = {
            name: field.get_default(call_default_factory=True)
            for name, field in kind.model_fields.items()
            if not field.is_required()
        }
        private = {name: attribute.get_default() for name, attribute in kind.__private_attributes__.items()}
        private = {name: value for name, value in private.items() if value is not PydanticUndefined}
        try:
            fields.update(_unpickled(state["fields"]))
            private.update(_unpickled(state["private"]))
            fields_set = set(state["fields_set"])
        except Exception as error:
            logger.warning("%s could not be restored from its pickle: %r", kind.__name__, error)
            fields_set = set()
        if not isinstance(private.get("_core"), CoreHolder):
            private["_core"] = CoreHolder(_lost, {"name": kind.__name__})
        object.__setattr__(self, "__dict__", fields)
        object.__setattr__(self, "__pydantic_fields_set__", fields_set)
        object.__setattr__(self, "__pydantic_extra__", None)
        object.__setattr__(self, "__pydantic_private__", private)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        """A new object that loads its own model on first use; callbacks, cache and rate limiter stay the same objects."""
        memo = {} if memo is None else memo
        copied = copy.copy(self)
        memo[id(self)] = copied
        values = vars(copied)
        for name, value in values.items():
            if name not in _SHARED_SERVICES:
                values[name] = copy.deepcopy(value, memo)
        private = {name: copy.deepcopy(value, memo) for name, value in _private(copied).items()}
        object.__setattr__(copied, "__pydantic_private__", private)
        return copied


def is_overridden(instance: object, ours: Mapping[str, Any], *names: str) -> bool:
    """Whether `instance` brings its own version of one of the methods `names`, which are `ours` in our class: async code
    must then go through it. A class that a test has patched counts, too."""
    kind = type(instance)
    return any(inspect.getattr_static(kind, name) is not ours[name] for name in names)


def _private(instance: Any) -> dict[str, Any]:
    return getattr(instance, "__pydantic_private__", None) or {}


def _lost(*, name: str) -> Any:
    raise ConfigError(f"this {name} could not be restored from its pickle (see the log); construct it anew")


def _pickled(values: dict[str, Any]) -> dict[str, bytes]:
    """Each value pickled on its own, so that a value that fails to load later cannot spoil the others."""
    pickled = {}
    for name, value in values.items():
        try:
            pickled[name] = pickle.dumps(value)
        except Exception:
            logger.warning("Removing unpickleable attribute %s", name)
    return pickled


def _unpickled(values: dict[str, bytes]) -> dict[str, Any]:
    loaded = {}
    for name, value in values.items():
        try:
            loaded[name] = pickle.loads(value)
        except Exception as error:
            logger.warning("attribute %s could not be unpickled and takes its default: %r", name, error)
    return loaded
