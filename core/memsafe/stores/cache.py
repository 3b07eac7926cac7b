"""A file of keys and values that outlives the process: what the frameworks' caches of embeddings are kept in."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from memsafe.errors import StoreError

__all__ = ["CacheFile"]

_SCHEMA = 1
_AT_ONCE = 500
"""Keys in one question: sqlite takes 999 variables at least."""
_WAIT_S = 30.0
_NUM_THREADS = 4

_Result = TypeVar("_Result")


class CacheFile:
    """Bytes by key in a sqlite file, in a scope of its own: nobody with another scope sees them.

    path: made, with its folders, at the first use. scope: a name, or what decides the values, such as
    :meth:`memsafe.Embedder.identity`: rows of another model, prompt or dimension are then never taken for these. Thread-safe;
    several processes may use one file; pickles as path and scope. A value is on the disk when :meth:`set` returns, except
    after a power cut, which may take the last ones.

    Methods raise :class:`StoreError` for a file that is damaged, no cache, of a newer version, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], scope: str | Mapping[str, Any] = "") -> None:
        self.path = Path(path)
        self.scope = scope if isinstance(scope, str) else _digest(scope)
        self._local = threading.local()

    def get(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key, None where there is none."""
        found: dict[str, bytes] = {}
        with self._connected() as connection:
            for start in range(0, len(keys), _AT_ONCE):
                some = list(keys[start : start + _AT_ONCE])
                places = ",".join("?" * len(some))
                found.update(
                    connection.execute(
                        f"SELECT key, value FROM cache WHERE scope = ? AND key IN ({places})", (self.scope, *some)
                    )
                )
        return [found.get(key) for key in keys]

    def set(self, pairs: Iterable[tuple[str, bytes]]) -> None:
        """Keep these values, all or none of them; they replace others of the same key."""
        rows = [(self.scope, key, value) for key, value in pairs]
        with self._connected() as connection:
            connection.executemany("INSERT OR REPLACE INTO cache VALUES (?, ?, ?)", rows)

    def delete(self, keys: Sequence[str]) -> int:
        """Forget these keys; returns how many were there."""
        with self._connected() as connection:
            before = connection.total_changes
            connection.executemany("DELETE FROM cache WHERE scope = ? AND key = ?", [(self.scope, key) for key in keys])
            return connection.total_changes - before

    def items(self, prefix: str = "") -> Iterator[tuple[str, bytes]]:
        """(key, value) of all keys that begin with `prefix`, in their order, a few hundred in memory at a time."""
        last: str | None = None
        while True:
            with self._connected() as connection:
                rows = connection.execute(
                    "SELECT key, value FROM cache WHERE scope = ? AND (? IS NULL OR key > ?) AND substr(key, 1, ?) = ? "
                    "ORDER BY key LIMIT ?",
                    (self.scope, last, last, len(prefix), prefix, _AT_ONCE),
                ).fetchall()
            yield from rows
            if len(rows) < _AT_ONCE:
                return
            last = rows[-1][0]

    async def in_thread(self, function: Callable[..., _Result], *args: Any) -> _Result:
        """``function(*args)``, which uses this file, for asyncio: in one of a few threads that wait for the disk and nothing
        else, since those of asyncio's default executor may all be waiting for us."""
        return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)

    def close(self) -> None:
        """Close the file for this thread; it is opened again when it is used."""
        connection = getattr(self._local, "connection", None)
        if connection is not None and self._local.pid == os.getpid():
            connection.close()
        self._local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return (CacheFile, (str(self.path), self.scope))

    def __repr__(self) -> str:
        return f"CacheFile({str(self.path)!r}, {self.scope!r})"

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, in a transaction. One that was opened before a fork is left alone."""
        try:
            if getattr(self._local, "pid", None) != os.getpid():
                self._local.connection, self._local.pid = self._open(), os.getpid()
            connection: sqlite3.Connection = self._local.connection
            with connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path} cannot be used as a cache: {error}", path=str(self.path)) from error

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=_WAIT_S, check_same_thread=False)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA:
                raise sqlite3.DatabaseError(f"it is of version {version}, and this memsafe reads up to {_SCHEMA}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if version < _SCHEMA:
                with connection:
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS cache (scope TEXT, key TEXT, value BLOB, PRIMARY KEY (scope, key)) WITHOUT ROWID"
                    )
                    connection.execute(f"PRAGMA user_version = {_SCHEMA}")
        except BaseException:
            connection.close()
            raise
        return connection


_threads = ThreadPoolExecutor(_NUM_THREADS, "memsafe-cache")


def _new_threads() -> None:
    global _threads
    _threads = ThreadPoolExecutor(_NUM_THREADS, "memsafe-cache")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_threads)  # threads do not survive a fork


def _digest(scope: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(scope, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
