"""What is remembered on disk: small JSON files, one per key. Losing one costs a measurement, nothing else.

:class:`Store` is the one that reads and writes; :class:`CostStore` keeps learnt costs in it, models/checkstore.py checks of models.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_type_hints

import numpy as np

from memsafe.machine.files import read_json
from memsafe.planning.batch import BatchShape
from memsafe.planning.cost import SCHEMA, CostKey, CostModel

__all__ = ["CostStore", "Store", "document", "read_fields"]

_log = logging.getLogger("memsafe")

_LARGEST_FILE_BYTES = 1 << 20
"""The largest of ours, a cost model with all its observations, takes about 10 KiB; anything beyond this is not ours."""

Key = CostKey | Sequence[str]
"""What a value is valid for: strings, with their names or in a fixed order."""
Value = TypeVar("Value")


class Store(Generic[Value]):
    """Values of one kind in a folder, which is made at the first write.

    what: the kind, as the warning names it. schema: the only version that is read. decode: makes the value from the
    parsed file, and raises ``ValueError`` for what it does not believe.

    Files are replaced in one step, so that readers and other writers, in this process or others, see a whole file; of
    two writers the later one wins. Whatever is wrong (a damaged or foreign file, another version, something that is no
    file, no permission, a full disk) is ignored, with one warning per store: a cache must never stop the work. Only
    regular files are opened (see `files.py`). Links to such are followed, because a cache that is shipped with a
    container (a ConfigMap, a Nix store) consists of them; writing replaces the link.
    """

    def __init__(
        self, directory: str | os.PathLike[str], what: str, schema: int, decode: Callable[[dict[str, Any]], Value]
    ) -> None:
        self.directory = Path(directory)
        self._what, self._schema, self._decode = what, schema, decode
        self._warnings = itertools.count()  # whose next() is one step: no lock that a fork could leave held

    def path(self, key: Key) -> Path:
        """The file that holds, or would hold, the value of `key`: its name is 32 hexadecimal digits of SHA-256."""
        return (
            self.directory / f"{hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:32]}.json"
        )

    def load(self, key: Key) -> Value | None:
        """The value of `key`; None if nothing usable is there."""
        path = self.path(key)
        try:
            return self._decode(self._parse(read_json(path, _LARGEST_FILE_BYTES, _refuse), key))
        except FileNotFoundError:
            return None
        except (ArithmeticError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError) as error:
            self._warn("read", path, error)
        return None

    def write(self, key: Key, text: str) -> bool:
        """Replace the file of `key` by `text`, a :func:`document` of this schema and key; return whether that worked."""
        path = self.path(key)
        temporary = ""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=self.directory)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except (OSError, ValueError) as error:
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            self._warn("write", path, error)
            return False
        return True

    def _parse(self, state: Any, key: Key) -> dict[str, Any]:
        if not isinstance(state, dict) or state.get("schema") != self._schema:
            raise ValueError(f"not of version {self._schema}")
        if state.get("key") != _plain(key):
            raise ValueError("it belongs to another model")
        return state

    def _warn(self, verb: str, path: Path, error: Exception) -> None:
        if next(self._warnings) == 0:
            _log.warning(
                "cannot %s the %s in %s (%s: %s); going on without, this is not said again",
                verb,
                self._what,
                path,
                type(error).__name__,
                error,
            )


class CostStore(Store[CostModel]):
    """What was learnt about the memory that models need."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory, "learnt memory costs", SCHEMA, _usable)

    def save(self, model: CostModel) -> bool:
        """Write `model`; return whether that worked."""
        return self.write(model.key, model.to_json())


def _usable(state: dict[str, Any]) -> CostModel:
    """The model in a file; raises ``ValueError`` and ``ArithmeticError`` where its figures, each possible, fit no law."""
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        CostModel.from_state(state).resident_bound(BatchShape(1, 1, 1, 1))  # of its own: fitting changes a model
    return CostModel.from_state(state)


def document(schema: int, key: Key, fields: Mapping[str, Any]) -> str:
    """The text of a file: `fields`, a JSON object, with the schema and the key that reading asks for."""
    return json.dumps({"schema": schema, "key": _plain(key), **fields}, indent=1, allow_nan=False)


def read_fields(kind: type[Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the dataclass `kind` (of bool, str, int or float) in `state`, for its constructor.

    Raises ``ValueError`` unless each one is there, has its field's type and, as a number, is finite and not negative.
    """
    types = get_type_hints(kind)
    if state.keys() - {"schema", "key"} != types.keys():
        raise ValueError("unknown fields, or some are missing")
    for name, wanted in types.items():
        value = state[name]
        number = wanted in (int, float) and not isinstance(value, bool)
        if not (isinstance(value, (int, wanted)) if number else type(value) is wanted):
            raise ValueError(f"{name} is a {type(value).__name__}")
        if number and not 0 <= value < math.inf:
            raise ValueError(f"{name} is out of range")
    return {name: float(state[name]) if wanted is float else state[name] for name, wanted in types.items()}


def _plain(key: Key) -> Any:
    return asdict(key) if isinstance(key, CostKey) else list(key)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
