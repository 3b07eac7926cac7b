"""Another process on the same device that really holds memory: `python -m benchmarks.gpu.neighbour FILL HOLD MODE SEED`.

FILL bytes are held until the end. Mode "release": HOLD more, given back at a line "release" on stdin and taken again at a line
"hold", which is answered. Mode "random": between none and HOLD more, another amount every 20 to 200 ms. Ends when stdin is closed.
"""

from __future__ import annotations

import contextlib
import random
import select
import subprocess
import sys
import threading
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
        self._lock = threading.Lock()  # a timer releases while the main thread holds again

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
        """Give back what is held, but for the filling."""
        self._tell("release")

    def hold(self) -> None:
        """Take it again; `said` is what came of it. The caller's own cache should be free by then."""
        if self._tell("hold") and self._process is not None and self._process.stdout is not None:
            self.said = self._process.stdout.readline().strip()

    def _tell(self, line: str) -> bool:
        if self._process is None or self._process.stdin is None or self._process.poll() is not None:
            return False
        with self._lock, contextlib.suppress(OSError):  # it may just have ended
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            return True
        return False

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

    def line(timeout_s: float) -> str | None:
        """A line, "" at the end of stdin, None if nothing came."""
        ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
        return sys.stdin.readline() if ready else None

    filler = take(fill_bytes)
    held = take(hold_bytes) if mode == "release" else None
    print(f"ready {torch.cuda.memory_reserved()}", flush=True)
    if mode == "release":
        while said := sys.stdin.readline():
            if said.strip() == "release":
                held = None
                torch.cuda.empty_cache()
                continue
            try:
                held = take(hold_bytes) if held is None else held
                print(f"ready {torch.cuda.memory_reserved()}", flush=True)
            except torch.OutOfMemoryError:
                print("refused: its memory is in use", flush=True)
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
