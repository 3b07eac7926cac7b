"""Where exports lie: beside the model, as others made them, or in our cache, as we did. One that is there is used as it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memsafe.config import cache_dir
from memsafe.errors import ModelNotFoundError
from memsafe.machine.store import Store, document

__all__ = ["Shelf", "beside"]

_SCHEMA = 1
_PLACES = {"openvino": ("openvino", ""), "onnx": ("onnx", "")}
_NAMES = {"openvino": "openvino_model*.xml", "onnx": "model*.onnx"}
_INT8 = ("int8", "uint8", "quantized")
_MARKS = ("amx", "avx512_vnni", "avx512", "avx2", "arm64")
"""In names of files that are quantised for a processor, best first."""


def beside(folder: Path, engine: str, dtype: str, name: str | None, features: frozenset[str]) -> Path | None:
    """The export that lies in a model's `folder`, as optimum and sentence-transformers leave it there; None without.

    name: the one that the user wants, relative to `folder`; None for the one that suits `dtype` and the processor's `features`.
    Raises :class:`ModelNotFoundError` where `name` is not there.
    """
    if name is not None:
        for place in ("", *_PLACES[engine]):
            if (folder / place / name).is_file():
                return folder / place / name
        raise ModelNotFoundError(f"model: {folder} has no {name}; leave file_name out, and the export is made")
    for place in _PLACES[engine]:
        found = sorted((folder / place).glob(_NAMES[engine]))
        plain, rounded = _split(found)
        if dtype != "int8" and plain:
            return plain[0]
        if dtype == "int8" and rounded:
            return min(rounded, key=lambda file: _rank(file.name, features))
    return None


def _split(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Those that are not quantised (named so and no further: others are optimised for something), and those that are."""
    rounded = [file for file in files if any(mark in file.name for mark in _INT8)]
    return [file for file in files if file.stem in ("model", "openvino_model")], rounded


def _rank(name: str, features: frozenset[str]) -> tuple[int, str]:
    mark = next((mark for mark in _MARKS if mark in name), "")
    usable = not mark or (mark == "avx512" and "avx512f" in features) or any(each.startswith(mark) for each in features)
    return (_MARKS.index(mark) if mark and usable else len(_MARKS) + (not usable), name)


class Shelf:
    """The place of one export of ours. key: everything that it was made from, by. keep: False for nothing on disk longer
    than this process needs it.

    A folder holds the files, and a small JSON file beside it says that they are whole. Both are written elsewhere first and
    moved in one step, so that a reader sees all of it, or nothing; of two who make it at once the first one wins.
    """

    def __init__(self, key: Sequence[str], file_name: str, *, keep: bool = True) -> None:
        self._key, self._name = list(key), file_name
        self._temporary = (
            None if keep else tempfile.TemporaryDirectory(prefix="memsafe-export-", ignore_cleanup_errors=True)
        )
        base = cache_dir() if self._temporary is None else self._temporary.name
        self._notes: Store[dict[str, Any]] = Store(os.path.join(base, "exports"), "exported model", _SCHEMA, _believed)
        self.folder = self._notes.path(self._key).with_suffix("")

    def find(self) -> Path | None:
        """The file that was made earlier, if it is whole."""
        sizes = self._note().get("sizes")
        return self.folder / self._name if sizes and _sizes(self.folder) == sizes else None

    def agreement(self) -> dict[str, float]:
        """How well the export agrees with float32, by processor, as far as it was measured."""
        return dict(self._note().get("agreement", {}))

    def make(self, write: Callable[[Path], object]) -> Path:
        """Have `write` make the file, given its path in a folder of its own. Raises what it raises, and OSError."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.folder.name[:8]}.", dir=self.folder.parent) as temporary:
            made = Path(temporary) / "export"
            made.mkdir()
            write(made / self._name)
            if self.find() is None:  # what is there was cut short
                shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process has made it meanwhile
                os.replace(made, self.folder)
        self._write(_sizes(self.folder), {})
        return self.folder / self._name

    def agreed(self, processor: str, agreement: float) -> None:
        """Note how well the export agrees with float32 on a processor."""
        self._write(self._note().get("sizes", {}), {**self.agreement(), processor: agreement})

    def _note(self) -> dict[str, Any]:
        return self._notes.load(self._key) or {}

    def _write(self, sizes: Mapping[str, int], agreement: Mapping[str, float]) -> None:
        state = {"sizes": dict(sizes), "agreement": dict(agreement)}
        self._notes.write(self._key, document(_SCHEMA, self._key, state))

    def close(self) -> None:
        """The export is open, or there is none: what is not to be kept goes."""
        if self._temporary is not None:
            self._temporary.cleanup()


def _sizes(folder: Path) -> dict[str, int]:
    try:
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except OSError:
        return {}


def _believed(state: dict[str, Any]) -> dict[str, Any]:
    sizes, agreement = state.get("sizes"), state.get("agreement")
    if not isinstance(sizes, dict) or not isinstance(agreement, dict):
        raise ValueError("not a note of an export")
    if not all(isinstance(size, int) and size >= 0 for size in sizes.values()):
        raise ValueError("sizes out of range")
    if not all(isinstance(each, float) and 0 <= each <= 1 for each in agreement.values()):
        raise ValueError("an agreement out of range")
    return {"sizes": sizes, "agreement": agreement}
