"""What the three LangChain classes share: the fields memsafe adds, and one core object that copies share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from typing_extensions import Self

from memsafe import MemoryPolicy, PerProcess


def is_overridden(instance: object, sync: Callable[..., Any], name: str) -> bool:
    """Whether `instance` brings its own version of the synchronous method `name`, which is `sync` in our class: the
    asynchronous one must then go through it, as the interface's own does."""
    return inspect.getattr_static(type(instance), name) is not sync


class SharedCore(PerProcess[Any]):
    """A core object, built once a process, whoever asks first. Copies share it, pickles leave it behind.

    device: what it was built on, in the words of whoever built it.
    """

    device: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedCore:
        return self


class CoreModel(BaseModel):
    """The fields that all three classes add, and copying and pickling that never copy weights."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        populate_by_name=True,
        arbitrary_types_allowed=True,
    )

    memory: MemoryPolicy = Field(default_factory=MemoryPolicy)
    """What may be taken of the device's memory, and what to do when it is short. A dict of options works too."""

    dtype: str | None = None
    """``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"auto"``; None keeps the checkpoint's."""

    hooks: tuple[Callable[[Any], None], ...] = Field(default=(), exclude=True, repr=False)
    """Called with every :class:`memsafe.events.Event`, from worker threads. Left out of dumps."""

    _shared: SharedCore = PrivateAttr(default_factory=SharedCore)
    _built_from: ClassVar[frozenset[str]] = frozenset({"model_name", "model_kwargs", "memory", "dtype", "hooks"})
    """Fields that the core object is built from: a copy that changes one of them builds its own."""

    def __getstate__(self) -> dict[Any, Any]:
        return {**super().__getstate__(), "__pydantic_private__": None}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Take the configuration back; the model is loaded when it is first used.

        Nothing here can fail: an exception while a worker process unpickles its task can hang the parent for good.
        """
        values = {
            name: field.get_default(call_default_factory=True)
            for name, field in type(self).model_fields.items()
            if not field.is_required()
        }
        fields = {**values, **state.get("__dict__", {})}
        super().__setstate__({**state, "__dict__": fields, "__pydantic_private__": {"_shared": SharedCore()}})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the configuration and share the loaded model, unless `update` changes what it was loaded from."""
        copied = super().model_copy(update=dict(update) if update else None, deep=deep)
        if update and not self._built_from.isdisjoint(update):
            copied._shared = SharedCore()
        return copied
