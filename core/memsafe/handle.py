"""Embedding where the data is: a callable for Ray Data, ``datasets.map`` and Daft that loads its model where it is called.

dataset.map_batches(EmbedBatches, fn_constructor_args=["BAAI/bge-m3"], concurrency=4, num_gpus=0.5)     # Ray Data
dataset.map(EmbedBatches("BAAI/bge-m3"), batched=True, batch_size=4096)                                 # datasets
"""

from __future__ import annotations

import importlib
import os
import pickle
import threading
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from memsafe.calls import in_thread
from memsafe.config import MemoryPolicy
from memsafe.embedder import Embedder
from memsafe.errors import ConfigError, InputError, MissingExtraError

__all__ = ["EmbedBatches", "PerProcess", "embed_ray_dataset"]

_Made = TypeVar("_Made")


class PerProcess(Generic[_Made]):
    """What is made once in each process, such as a loaded model, by whoever asks first. Thread-safe.

    A forked child makes its own: threads and device contexts do not survive a fork.
    """

    def __init__(self) -> None:
        self._forget()

    @classmethod
    def shared(cls, *settings: Any) -> PerProcess[_Made]:
        """The one of all in this process that have equal `settings`, as long as any of them holds it. Settings that cannot be pickled
        are equal to no others."""
        try:
            key = pickle.dumps(settings)
        except Exception:  # a lambda among the hooks, say
            return cls()
        return _shared.setdefault(key, cls())

    def _forget(self) -> None:
        self._made: _Made | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @property
    def loaded(self) -> bool:
        """Whether :meth:`get` would return at once."""
        return self._made is not None and self._pid == os.getpid()

    def get(self, make: Callable[[], _Made]) -> _Made:
        """What `make` makes, if this process has none; what it raises is not kept. May take seconds."""
        if self._pid != os.getpid():  # the parent may have forked while another thread held the lock
            self._inherited = self._made  # kept: to finalise the parent's could wait for threads that do not exist
            self._forget()
        with self._lock:
            if self._made is None:
                self._made = make()
            return self._made

    async def aget(self, make: Callable[[], _Made]) -> _Made:
        """As :meth:`get`; made in a thread, so that the event loop stays free."""
        return self.get(make) if self.loaded else await in_thread(self.get, make)


_shared: WeakValueDictionary[bytes, PerProcess[Any]] = WeakValueDictionary()

_loaded: dict[bytes, PerProcess[Embedder]] = {}
"""By settings: callables of one process that want the same model share it."""


class EmbedBatches:
    """From a batch of columns to the same with one column more: float32 rows, shape (n, dim).

    Pickles as its settings, so it travels to other processes and machines; the model is loaded at the first call in each. How
    many rows a batch has changes nothing but how much is lost with it: what fits into memory at a time is planned inside.
    Several actors on one device see each other's memory; give each a share all the same, such as
    ``memory=MemoryPolicy(limit=0.45)`` for two, so that none takes what another one is about to.

    Args:
        model: a folder or a hub id, which must be there wherever it is called.
        text: the column of texts. output: the column that is added.
        kind: ``"document"``, ``"query"`` or None. call: other options of :meth:`Embedder.run`, such as ``{"normalize": True}``.
        keep_text: False drops the column of texts, where only ids and rows are written.
        memory, options: of :class:`Embedder`.

    Raises:
        ConfigError: `model` is a loaded one. InputError, when called: there is no such column, or an entry is not a str.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        text: str = "text",
        output: str = "embedding",
        kind: str | None = "document",
        call: Mapping[str, Any] | None = None,
        keep_text: bool = True,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, (str, os.PathLike)):
            raise ConfigError(
                f"model: got a {type(model).__name__}; give a folder or a hub id, which can be sent elsewhere"
            )
        self.text, self.output, self.keep_text = text, output, keep_text
        self._call: dict[str, Any] = {"kind": kind, **(call or {})}
        self._settings: dict[str, Any] = {"model": os.fspath(model), "memory": memory, **options}

    @property
    def embedder(self) -> Embedder:
        """The model of this process, loaded if it is not there yet."""
        shared = _loaded.setdefault(pickle.dumps(self._settings), PerProcess())
        return shared.get(lambda: Embedder(**self._settings))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`batch` (columns by name, each a list or an array) with the rows of its texts."""
        if self.text not in batch:
            names = ", ".join(map(repr, batch)) or "nothing"
            raise InputError(f"batch: no column {self.text!r} but {names}; name the right one (text=...)", index=None)
        column = batch[self.text]
        texts: Any = column if isinstance(column, np.ndarray) else list(column)
        rows = self.embedder.run(texts, **self._call).embeddings
        kept = {name: values for name, values in batch.items() if self.keep_text or name != self.text}
        return {**kept, self.output: rows}


def embed_ray_dataset(
    dataset: Any,
    path: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    workers: int = 1,
    batch_texts: int = 4096,
    gpus_per_worker: float = 0,
    cpus_per_worker: float = 1,
    **options: Any,
) -> None:
    """Embed a ``ray.data.Dataset`` to Parquet files in the folder `path`, with `workers` actors; what an actor that dies had in
    hand is computed by another. Needs the extra ``ray``.

    batch_texts: what an actor gets at a time, and what is lost with it. options: of :class:`EmbedBatches`.

    Raises :class:`MissingExtraError`, :class:`ConfigError`, and what Ray raises.
    """
    try:
        importlib.import_module("ray.data")
    except ModuleNotFoundError as error:
        raise MissingExtraError('ray is not installed; run: pip install "memsafe[ray]"', name="ray") from error
    for name, value in (("workers", workers), ("batch_texts", batch_texts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: got {value!r}; give an int of at least 1")
    EmbedBatches(model, **options)  # what is wrong is said here, not on another machine
    dataset.map_batches(
        EmbedBatches,
        fn_constructor_args=(os.fspath(model),),
        fn_constructor_kwargs=options,
        batch_size=batch_texts,
        concurrency=workers,
        num_gpus=gpus_per_worker or None,
        num_cpus=cpus_per_worker if not gpus_per_worker else None,
    ).write_parquet(os.fspath(path))
