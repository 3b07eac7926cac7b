"""The parent's end of a worker process (see worker.py): start it, send commands, wait no longer than a limit."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.environments import ROOT, python_of

__all__ = ["Unavailable", "Worker", "write_inputs"]


class Unavailable(Exception):
    """A contender cannot run here; the message is the reason, and is published."""


def write_inputs(path: Path, inputs: Sequence[Any]) -> Path:
    """Write texts or pairs as JSON for the workers; returns `path`."""
    path.write_text(json.dumps(list(inputs), ensure_ascii=False), encoding="utf-8")
    return path


class Worker:
    """One contender in a process of its own. A context manager; leaving it ends the process."""

    def __init__(
        self, peer: str, *, folder: Path, environment: str = "", extra_env: dict[str, str] | None = None
    ) -> None:
        """`folder` takes the log and memsafe's learnt costs, so that no run profits from an earlier one."""
        python = python_of(environment)
        if python is None:
            raise Unavailable(
                f"environment {environment!r} is not there: python -m benchmarks.environments {environment}"
            )
        self.peer = peer
        name = f"{peer.replace(':', '-')}-{environment or 'main'}"
        self._log = open(folder / f"{name}.log", "a+b")  # noqa: SIM115  (closed by close())
        env = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", MEMSAFE_CACHE_DIR=str(folder / "learnt"))
        env.update(extra_env or {})
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", peer],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, stream: IO[bytes] | None) -> None:
        if stream is not None:
            for line in stream:
                self._answers.put(line)
        self._answers.put(b"")

    def ask(self, do: str, *, limit_s: float = 300.0, **arguments: Any) -> Any:
        """Send one command and return its value; :class:`Unavailable` if it fails, dies or takes longer than `limit_s`."""
        try:
            if self._process.stdin is None:
                raise Unavailable("no way to write to the process")
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit_s)
        except (BrokenPipeError, ValueError):
            line = b""
        except queue.Empty:
            self.close()
            raise Unavailable(f"no answer to {do!r} within {limit_s:.0f} s") from None
        if not line:
            status = self._process.wait()
            raise Unavailable(f"the process ended with status {status}: {self._last_line()}")
        answer = json.loads(line)
        if not answer["ok"]:
            raise Unavailable(answer["error"])
        return answer["value"]

    def load(self, model: Path | str, options: dict[str, Any] | None = None) -> dict[str, Any]:
        loaded: dict[str, Any] = self.ask("load", model=str(model), options=options or {})
        return loaded

    def run(
        self,
        texts: Path,
        setting: dict[str, Any] | None = None,
        *,
        repeat: int = 1,
        save: Path | None = None,
        limit_s: float = 300.0,
    ) -> dict[str, Any]:
        saved = None if save is None else str(save)
        done: dict[str, Any] = self.ask(
            "run", texts=str(texts), setting=setting or {}, repeat=repeat, save=saved, limit_s=limit_s
        )
        return done

    def call(self, name: str, *, limit_s: float = 300.0, **arguments: Any) -> Any:
        return self.ask("call", name=name, limit_s=limit_s, **arguments)

    def _last_line(self) -> str:
        self._log.flush()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it wrote nothing"

    def close(self) -> None:
        """End the process: asked first, then killed. Idempotent."""
        if self._process.poll() is None:
            try:
                if self._process.stdin is not None:
                    self._process.stdin.write(b'{"do": "quit"}\n')
                    self._process.stdin.close()
                self._process.wait(timeout=5)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
