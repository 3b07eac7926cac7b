"""Every exception that memsafe raises.

* :class:`MemsafeError`

  * :class:`ConfigError` (also ``ValueError``): an option is unknown or out of range.

    * :class:`ModelError`: a model is missing, broken or of the wrong kind.

      * :class:`ModelNotFoundError` (also ``OSError``): a model, or a file of it, is not there.
      * :class:`ModelTooLargeError`: the weights do not fit into the memory that is free.

  * :class:`InputError` (also ``ValueError``): a text, pair or list cannot be used.
  * :class:`InputTooLargeError`: one input does not fit alone, whatever is tried.
  * :class:`BusyError`: the queue is full and the policy says not to wait.
  * :class:`ClosedError` (also ``RuntimeError``): used after ``close()``, or its worker has died.
  * :class:`CancelledError`: the call was cancelled before it finished.
  * :class:`StoreError`: embeddings on disk cannot be read, written, or gone on with.
  * :class:`MissingExtraError` (also ``ImportError``): an optional dependency is not installed.

Messages say what was wrong, what was got, which limit it met and what to do about it. They never contain a user's text.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ConfigError",
    "InputError",
    "InputTooLargeError",
    "MemsafeError",
    "MissingExtraError",
    "ModelError",
    "ModelNotFoundError",
    "ModelTooLargeError",
    "StoreError",
]


class MemsafeError(Exception):
    """Base of all errors raised by memsafe.

    Keyword arguments become attributes, so that a handler need not parse the message.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        for name, value in details.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.details))


def _rebuild(kind: type[MemsafeError], message: str, details: dict[str, Any]) -> MemsafeError:
    return kind(message, **details)


class ConfigError(MemsafeError, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class InputError(MemsafeError, ValueError):
    """An input cannot be used. ``index`` is its position in the caller's list, or None for the list itself."""

    index: int | None = None


class ModelError(ConfigError):
    """A model folder is missing, empty, half-written or of the wrong kind."""


class ModelNotFoundError(ModelError, OSError):
    """A model is not there, or a file of it, or the hub cannot be reached. An ``OSError`` too, as transformers raises."""


class ModelTooLargeError(ModelError):
    """The weights alone do not fit. Attributes: ``need_bytes``, ``free_bytes``."""

    need_bytes: int
    free_bytes: int


class InputTooLargeError(MemsafeError):
    """One input does not fit alone. Attributes: ``index``, ``num_tokens``, ``need_bytes``, ``free_bytes``.

    Raised when everything else of the call is done: ``partial`` holds those results (float32, the caller's order; the
    rows of ``failed``, positions in the caller's list, are NaN), or None if nothing was done.
    """

    index: int
    num_tokens: int
    need_bytes: int
    free_bytes: int
    partial: Any = None
    failed: list[int] = []  # noqa: RUF012 - replaced, never changed in place


class BusyError(MemsafeError):
    """More inputs are pending than ``MemoryPolicy.max_pending`` allows, and ``on_full`` is ``"raise"``."""


class ClosedError(MemsafeError, RuntimeError):
    """The object was closed, or the worker that served it has died."""


class CancelledError(MemsafeError):
    """The call was cancelled; its places in the queue and its memory have been given back."""


class StoreError(MemsafeError):
    """A store of embeddings is damaged, in use, of a newer version, made of something else, or cannot be written.

    Attributes: ``path``: where; ``differences``: what keeps a run from going on with it, one sentence each, if that is it.
    """

    path: str | None = None
    differences: list[str] = []  # noqa: RUF012 - replaced, never changed in place


class MissingExtraError(MemsafeError, ImportError):
    """An optional dependency is missing. The message holds the exact pip command."""
