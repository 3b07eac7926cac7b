"""Another process on the same device that really holds memory: `python -m benchmarks.gpu.neighbour FILL HOLD MODE SEED`.

FILL bytes are held until the end. Mode "release": HOLD more, given back at the first line on stdin. Mode "random": between
none and HOLD more, another amount every 20 to 200 ms. Ends when stdin is closed.
"""

from __future__ import annotations

import contextlib
import random
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Neighbour"]


class Neighbour:
    """The process, as a context manager; does nothing in a dry run."""

    def __init__(self, dry: bool, fill_bytes: int, hold_bytes: int, mode: str = "release", seed: int = 0) -> None:
        self.arguments = None if dry else [str(max(fill_bytes, 0)), str(max(hold_bytes, 0)), mode, str(seed)]
        self.said = "skipped: no CUDA"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Neighbour:
        if self.arguments is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.neighbour", *self.arguments],
                cwd=Path(__file__).resolve().parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.said = self._process.stdout.readline().strip() if self._process.stdout is not None else ""
            if not self.said.startswith("ready"):
                raise RuntimeError("the neighbour could not take its memory")
        return self

    def release(self) -> None:
        if self._process is not None and self._process.stdin is not None and self._process.poll() is None:
            with contextlib.suppress(OSError):  # it may just have ended
                self._process.stdin.write("release\n")
                self._process.stdin.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def main(fill_bytes: int, hold_bytes: int, mode: str, seed: int) -> None:
    import torch

    def take(num_bytes: int) -> Any:
        return torch.empty(max(num_bytes, 1), dtype=torch.uint8, device="cuda")

    def line(timeout_s: float | None) -> str | None:
        """A line, "" at the end of stdin, None if nothing came."""
        ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
        return sys.stdin.readline() if ready else None

    filler = take(fill_bytes)
    held = take(hold_bytes) if mode == "release" else None
    print(f"ready {torch.cuda.memory_reserved()}", flush=True)
    if mode == "release":
        if line(None):
            held = None
            torch.cuda.empty_cache()
            line(None)
    else:
        pick = random.Random(seed)
        while line(pick.uniform(0.02, 0.2)) != "":
            held = None
            torch.cuda.empty_cache()
            try:
                held = take(int(pick.random() * hold_bytes))
            except torch.OutOfMemoryError:
                held = None
    del filler, held


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
