"""Learnt costs on disk: one small JSON file per :class:`CostKey`. Losing them costs a few probes, nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from pathlib import Path

from memsafe.planning.cost import CostKey, CostModel

__all__ = ["CostStore"]

_log = logging.getLogger("memsafe")
_LARGEST_FILE_BYTES = 1 << 20
"""A model with all its observations takes about 10 KiB; anything beyond this is not ours."""


class CostStore:
    """Cost models in a directory, which is made on the first save.

    Files are replaced in one step, so that readers and other writers, in this process or others, see a whole file; of
    two writers the later one wins. Whatever is wrong (a corrupt or foreign file, another version, no
    permission, a full disk) is ignored, with one warning per store: a cache must never stop the work.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._lock = threading.Lock()
        self._warned = False

    def path(self, key: CostKey) -> Path:
        """The file that holds, or would hold, the model of `key`."""
        return self.directory / f"{key.digest()}.json"

    def load(self, key: CostKey) -> CostModel | None:
        """What was learnt about `key`; None if nothing usable is there."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                content = file.read(_LARGEST_FILE_BYTES + 1)
            if len(content) > _LARGEST_FILE_BYTES:
                raise ValueError("too large")
            model = CostModel.from_json(content.decode("utf-8"))
            if model.key != key:
                raise ValueError("it belongs to another model")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn("read", path, error)
            return None
        return model

    def save(self, model: CostModel) -> bool:
        """Write `model`; return whether that worked."""
        path = self.path(model.key)
        temporary = ""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=self.directory)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(model.to_json())
            os.replace(temporary, path)
        except (OSError, ValueError) as error:
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            self._warn("write", path, error)
            return False
        return True

    def _warn(self, verb: str, path: Path, error: Exception) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            _log.warning(
                "cannot %s the learnt memory costs in %s (%s: %s); going on without, this is not said again",
                verb,
                path,
                type(error).__name__,
                error,
            )
