"""What may lie where a file is due."""

from __future__ import annotations

import os
import socket
from pathlib import Path

__all__ = ["bound_socket", "fifo"]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:  # a path of a socket has at most 108 bytes
        here = os.open(path.parent, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)
