"""Files that anybody may have put there, read without waiting, without end and without overflowing a stack."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

__all__ = ["kind_of", "open_regular", "parse_json", "read_json"]

_DEEPEST = 100
"""Levels of a JSON document; configurations have about five. It is parsed by recursion in C: a deep one raises
RecursionError, or overflows the stack and kills the process where somebody has raised Python's limit."""
_PIECE_BYTES = 1 << 16
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """`path` opened for reading; raises ``OSError``, and ``ValueError`` for what is no regular file.

    Reading a FIFO would wait for ever, and a device might not end. Links to regular files are followed. Nothing else is
    opened, except where it takes the place of the file meanwhile; then it is not waited for.
    """
    _check_regular(os.stat(path).st_mode)
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - it is what is returned
    try:
        _check_regular(os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def read_json(path: str | os.PathLike[str], most_bytes: int, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The value in the JSON file `path`; raises ``OSError``, and ``ValueError`` for anything but a regular file of at most
    `most_bytes` that holds one."""
    content = bytearray()
    with open_regular(
        path
    ) as file:  # in pieces: reading takes room for all that is asked for. None: the kernel would wait
        while piece := file.read(_PIECE_BYTES):
            content += piece
            if len(content) > most_bytes:
                raise ValueError(f"too large: more than {most_bytes:,} bytes")
    return parse_json(bytes(content), parse_constant)


def parse_json(content: bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON document in UTF-8; raises ``ValueError`` for anything else, too deeply nested ones included.

    parse_constant: makes values of NaN and the infinities, which JSON does not know; None takes them as they are.
    """
    if _depth(content) > _DEEPEST:
        raise ValueError(f"too deeply nested: more than {_DEEPEST} levels")
    try:
        return json.loads(content.decode("utf-8"), parse_constant=parse_constant)
    except RecursionError as error:  # where the caller has used up nearly all of the stack
        raise ValueError("too deeply nested for what is left of the stack") from error
    except MemoryError as error:
        raise ValueError("reading it takes more memory than there is") from error


def kind_of(mode: int) -> str:
    """What a file of `mode` is, in words: "a folder", "a FIFO", ..."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "of an unknown kind")


def _depth(content: bytes) -> int:
    """How many levels the arrays and objects of a document have. Of what is no JSON at least as many as a parser enters before
    it finds out."""
    plain = np.frombuffer(_ESCAPED.sub(b"", content), np.uint8)
    outside = np.cumsum(plain == ord('"'), dtype=np.uint8) % 2 == 0  # of strings: it wraps around, but odd stays odd
    steps = np.isin(plain, np.frombuffer(b"[{", np.uint8)).astype(np.int8)
    steps -= np.isin(plain, np.frombuffer(b"]}", np.uint8))
    return int(np.cumsum(steps * outside, dtype=np.int32).max(initial=0))


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"not a regular file, but {kind_of(mode)}")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
