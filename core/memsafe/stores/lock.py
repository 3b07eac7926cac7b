"""One writer at a time: a lock that dies with the process that holds it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import IO

from memsafe.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["WriterLock"]


class WriterLock:
    """Holds the file ``lock`` in `folder` from construction to :meth:`release`; raises :class:`StoreError` if another one does.

    The system's own lock on an open file (``flock``; ``msvcrt.locking`` on Windows): whoever is killed gives it up, so a file
    that is left behind stops nobody. The file names its last owner for the message, nothing more. On NFS Linux passes such
    locks on to the server, so that writers on several machines exclude each other; where it is mounted with ``nolock`` or
    ``local_lock``, only those of one machine do.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        self._file: IO[bytes] | None = open(path, "a+b")  # noqa: SIM115 - held until release
        try:
            _take(self._file)
        except OSError as error:
            owner = _owner(self._file)
            self._file.close()
            raise StoreError(
                f"{folder} is being written by {owner}; wait until that has ended, or end it", path=str(folder)
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._file.flush()

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give it up; twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _take(file: IO[bytes]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt  # one byte far behind the owner's name, which others may then still read

    file.seek(1 << 30)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]


def _owner(file: IO[bytes]) -> str:
    try:
        file.seek(0)
        return file.read(200).decode("utf-8", "replace") or "another process"
    except OSError:
        return "another process"
