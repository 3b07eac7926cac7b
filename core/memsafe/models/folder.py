"""The files of a saved model, looked at before anything is loaded from them: by us, and later by what loads them.

Whatever lies there, nothing here waits, reads without end or raises anything but :class:`ModelError`, which names the file,
what is wrong with it and what to do.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from memsafe.config import format_bytes
from memsafe.errors import ModelError
from memsafe.machine.files import kind_of, open_regular, parse_json, read_json

__all__ = [
    "bits_of",
    "check_files",
    "files_of",
    "header",
    "missing_shards",
    "read",
    "unparsable",
    "unreadable",
]

_BITS = {"BOOL": 8, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
"""Of a safetensors dtype: https://github.com/huggingface/safetensors#format"""
_MOST_JSON_BYTES = 16 << 20
"""A configuration has a few KiB, a few MiB where it names tens of thousands of labels."""
_MOST_OTHER_BYTES = 1 << 30
"""What is read whole beside weights: the largest tokenizers have tens of MiB."""
_MOST_HEADER_BYTES = 8 << 20
"""Of a safetensors file, that is parsed here: some 50,000 tensors."""
_LONGEST_HEADER_BYTES = 100_000_000
"""safetensors itself reads no longer one."""
_MOST_FILES = 10_000
"""So many files of a folder are looked at: a model has some dozens."""
_LARGEST = 1 << 62

_PARSED = ("*config.json", "modules.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
"""What the libraries parse in Python, wherever in the folder it is."""
_OPENED = (".bin .bpe .jinja .json .md .model .pt .py .safetensors .spm .tiktoken .txt").split()
"""Endings of what they open. Some look only whether there is something of that name."""
_WEIGHTS = (".bin", ".pt", ".safetensors")
_LEFT_TO_LOADER = (json.JSONDecodeError, UnicodeDecodeError)
_REMEDY = "the copy is damaged, fetch it again"


def read(file: Path, kind: type) -> Any:
    """The content of the JSON file `file`, a `kind`; None if there is no such file."""
    try:
        content = read_json(file, _MOST_JSON_BYTES)
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__} where a {kind.__name__} is needed")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise ModelError(f"model: {file} cannot be read as JSON ({_reason(error)}); {_remedy(error)}") from error


def files_of(folder: Path, *, below: bool = True) -> tuple[list[tuple[Path, os.stat_result]], bool]:
    """Everything in `folder`, and in those `below` it, but folders, except folders that are named like a file which is parsed;
    and whether that is all: of a very large tree it is a part.

    Links are followed to files, not into folders; what vanishes meanwhile, cannot be looked at or is a link to nothing is
    left out, be it the whole folder. Raises :class:`ModelError` if `folder` itself may not be read.
    """

    def failed(error: OSError) -> None:
        if error.filename == os.fspath(folder) and not isinstance(error, FileNotFoundError):
            raise unreadable(folder, error) from error

    found: list[tuple[Path, os.stat_result]] = []
    looked = 0
    for here, folders, names in os.walk(folder, onerror=failed):
        looked += 1 + len(names)
        if looked > _MOST_FILES:
            return found, False
        for name in sorted([*names, *(each for each in folders if _is_any(each, _PARSED))]):
            with suppress(OSError):
                state = os.stat(os.path.join(here, name))
                if name not in folders or stat.S_ISDIR(state.st_mode):
                    found.append((Path(here, name), state))
        if below:
            folders.sort()
        else:
            folders.clear()
    return found, True


def check_files(folder: Path, *, below: bool = True) -> None:
    """Raise :class:`ModelError` for a file that would make whoever loads the model wait for ever or read without end: a FIFO,
    a socket, a device, something huge or deeply nested where a configuration is due. Other damage is left to the loader,
    which may not need the file."""
    for file, found in files_of(folder, below=below)[0]:
        parsed = _is_any(file.name, _PARSED)
        if not parsed and file.suffix not in _OPENED:
            continue
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"model: {file} is {kind_of(found.st_mode)} where a file is due; {_REMEDY}")
        most = _MOST_JSON_BYTES if parsed else _MOST_OTHER_BYTES
        if found.st_size > most and file.suffix not in _WEIGHTS:
            raise ModelError(
                f"model: {file} has {format_bytes(found.st_size)}, where {format_bytes(most)} are more than such a file "
                f"ever needs; {_REMEDY}"
            )
        if parsed and (error := _fault(file)) is not None and not isinstance(error, (*_LEFT_TO_LOADER, OSError)):
            raise ModelError(f"model: {file} cannot be read as JSON ({_reason(error)}); {_REMEDY}") from error


def unparsable(folder: Path) -> Path | None:
    """The first file of a saved model that is no JSON where JSON is due: its loader says that there is one, but not which."""
    files = [file for file, _ in files_of(folder)[0] if _is_any(file.name, _PARSED)]
    return next((file for file in files if isinstance(_fault(file), ValueError)), None)


def _fault(file: Path) -> Exception | None:
    try:
        read_json(file, _MOST_JSON_BYTES)
    except (ValueError, OSError) as error:
        return error
    return None


def missing_shards(folder: Path) -> list[str]:
    """Files that an index of several names and that are not there: a download was interrupted."""
    names: set[str] = set()
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = (read(index, dict) or {}).get("weight_map")
        names |= {str(name) for name in shards.values()} if isinstance(shards, Mapping) else set()
    return sorted(name for name in names if not os.path.isfile(folder / name))


def header(file: Path) -> tuple[dict[str, int], int]:
    """Elements by dtype, from a safetensors file's header, and the bytes of a file whose header is too long to be read here.

    Checks that the file is as long as the header says.
    """
    damaged = f"model: {file} is damaged or not complete; fetch it again"
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > size - 8:
                raise ModelError(f"{damaged} ({size:,} bytes, header cut off)")
            if length > _LONGEST_HEADER_BYTES:
                raise ModelError(f"{damaged} (a header of {length:,} bytes)")
            if length > _MOST_HEADER_BYTES:
                return {}, size - 8 - length
            content = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{damaged} ({error})") from error
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise ModelError(f"{damaged} (header is not JSON: {error})") from error
    elements: dict[str, int] = {}
    end = 0
    try:
        for name, tensor in parsed.items():
            if name != "__metadata__":
                dtype, count, stop = _tensor(tensor)
                elements[dtype] = elements.get(dtype, 0) + count
                end = max(end, stop)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{damaged} (header is not of safetensors)") from error
    if 8 + length + end > size:
        raise ModelError(f"{damaged} ({size:,} bytes of {8 + length + end:,})")
    return elements, 0


def bits_of(dtype: str) -> int:
    """Bits of an element of a safetensors dtype."""
    return _BITS.get(dtype, 32)


def _tensor(entry: Any) -> tuple[str, int, int]:
    """(dtype, elements, end in the file) of a header's entry; raises for what no tensor has."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError("a dtype is text, a shape a list")
    if not all(isinstance(each, int) and 0 <= each < _LARGEST for each in (*shape, begin, end)) or begin > end:
        raise ValueError("no sizes")
    count = math.prod(shape)
    if count >= _LARGEST:
        raise ValueError("more elements than any memory holds")
    return dtype, count, end


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def unreadable(file: Path, error: OSError) -> ModelError:
    """The error for a file or folder that cannot be read."""
    return ModelError(f"model: {file} cannot be read ({_reason(error)}); {_remedy(error)}")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _remedy(error: Exception) -> str:
    return "let this user read it" if isinstance(error, PermissionError) else _REMEDY
