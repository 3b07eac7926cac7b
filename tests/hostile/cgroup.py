"""A Python program under a memory limit that the kernel enforces, for tests.

`limited(limit_bytes)` makes a memory cgroup (v1 or v2) with that limit, and removes it at the end, whatever happened::

    with limited(512 * MiB) as box:
        done = box.run("print('x' * 3)")
    assert done.stdout == "xxx\\n" and not done.killed

Where no cgroup can be made (not root, no delegation, not Linux), `limited` falls back to an rlimit on the address space
if the test allows that, and else skips the test with the reason.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

__all__ = ["Box", "Finished", "limited", "where"]


@dataclass(frozen=True)
class Finished:
    """How a program ended.

    killed: the kernel ended it with SIGKILL (under a cgroup: the out-of-memory killer).
    peak_bytes: the most that the cgroup held, page cache included; None under an rlimit.
    """

    returncode: int
    killed: bool
    peak_bytes: int | None
    stdout: str
    stderr: str

    def check(self) -> Finished:
        """Fail the test if the program did not end well, and show what it wrote."""
        if self.returncode != 0:
            how = "was killed by the kernel" if self.killed else f"ended with {self.returncode}"
            pytest.fail(f"the program under the limit {how}; peak {self.peak_bytes}\n{self.stdout}\n{self.stderr}")
        return self


@dataclass(frozen=True)
class Where:
    """A place where memory cgroups can be made: `parent` is a cgroup folder of that version."""

    version: Literal[1, 2]
    parent: Path


def where() -> Where | str:
    """A place where this process may make memory cgroups, or the reason why there is none."""
    if sys.platform != "linux":
        return f"cgroups are Linux's; this is {sys.platform}"
    missing = []
    for found in _candidates():
        probe = found.parent / f"memsafe-probe-{uuid.uuid4().hex[:8]}"
        try:
            probe.mkdir()
        except OSError as error:
            missing.append(f"v{found.version}: cannot make {probe.parent}/...: {error.strerror}")
            continue
        try:
            if (probe / ("memory.limit_in_bytes" if found.version == 1 else "memory.max")).exists():
                return found
            missing.append(f"v{found.version}: {found.parent} does not hand on the memory controller")
        finally:
            probe.rmdir()
    return "no memory cgroup can be made: " + ("; ".join(missing) or "no memory hierarchy is mounted")


def _candidates() -> Iterator[Where]:
    """The mounts of memory hierarchies, our own cgroup's parent before the root (delegation by systemd)."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[1 if "memory" in controllers.split(",") else 2 if controllers == "" else 0] = path
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, mount = right.split(), Path(left.split()[4])
        if kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield Where(1, mount)
        elif kind[0] == "cgroup2":
            # v2 forbids children with controllers below a cgroup that has processes, so not below our own.
            inside = mount / own.get(2, "/").strip("/")
            if inside != mount and inside.parent != mount:
                yield Where(2, inside.parent)
            yield Where(2, mount)


class Box:
    """A limit of `limit_bytes` on everything that :meth:`run` starts, one program after another or side by side.

    Swap is off inside where the kernel can do that. folder: the cgroup's; None for an rlimit.
    """

    def __init__(self, limit_bytes: int, place: Where | None) -> None:
        self.limit_bytes = limit_bytes
        self.version = place.version if place else None
        self.folder = place.parent / f"memsafe-{os.getpid()}-{uuid.uuid4().hex[:8]}" if place else None
        self._processes: list[subprocess.Popen[str]] = []

    def make(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir()
        self.set_limit(self.limit_bytes)
        with suppress(OSError):  # v1, or no swap accounting here
            self._write("memory.swap.max", "0")

    def set_limit(self, limit_bytes: int) -> None:
        """Resize the box, also while programs run in it."""
        if self.version == 1:
            # With swap the limit is the same: no swap. It may never be the smaller one, hence the third time.
            for name in ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
                with suppress(OSError):
                    self._write(name, str(limit_bytes))
        else:
            self._write("memory.max", str(limit_bytes))
        self.limit_bytes = limit_bytes
        if self.real_limit_bytes() != limit_bytes // mmap.PAGESIZE * mmap.PAGESIZE:
            raise RuntimeError(f"the kernel did not take {limit_bytes} as the limit of {self.folder}")

    def real_limit_bytes(self) -> int:
        """The limit as the kernel has it."""
        if self.folder is None:
            return self.limit_bytes
        return int((self.folder / ("memory.limit_in_bytes" if self.version == 1 else "memory.max")).read_text())

    def run(
        self,
        code: str | Path,
        *arguments: str,
        timeout_s: float = 120,
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> Finished:
        """Run Python `code` (a string, or a file's path) to its end inside the box; stdout and stderr come back.

        Raises ``subprocess.TimeoutExpired`` after `timeout_s`, with the program killed.
        """
        self._reset_peak()
        process = self.start(code, *arguments, env=env, python=python)
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        killed = process.returncode == -signal.SIGKILL
        return Finished(process.returncode, killed, self.peak_bytes(), stdout, stderr)

    def start(
        self,
        code: str | Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> subprocess.Popen[str]:
        """Start a program inside the box and return at once; whatever still runs at the end of the box is killed."""
        program = [str(code)] if isinstance(code, Path) else ["-c", code]
        process = subprocess.Popen(
            [*self._enter(), python, *program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self._processes.append(process)
        return process

    def peak_bytes(self) -> int | None:
        """The most that the box held, page cache included: v1 since the last :meth:`run` began, v2 (Linux 5.19) ever."""
        if self.folder is None:
            return None
        file = self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(file.read_text()) if file.exists() else None

    def usage_bytes(self) -> int | None:
        """What the box holds now, page cache included."""
        if self.folder is None:
            return None
        return int((self.folder / ("memory.usage_in_bytes" if self.version == 1 else "memory.current")).read_text())

    def close(self) -> None:
        """End what still runs, and remove the cgroup."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        if self.folder is None or not self.folder.exists():
            return
        for _ in range(100):  # a killed program's own children may take a moment to go
            for pid in (self.folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)
        raise RuntimeError(f"the cgroup {self.folder} could not be removed")

    def _enter(self) -> list[str]:
        """A shell that puts itself into the box and then becomes the program, so that all of that is charged to it.
        (A function between fork and exec could deadlock in a test process with threads.)"""
        if self.folder is None:
            return ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"', str(self.limit_bytes // 1024)]
        return ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', str(self.folder / "cgroup.procs")]

    def _reset_peak(self) -> None:
        if self.folder is not None and self.version == 1:
            self._write("memory.max_usage_in_bytes", "0")

    def _write(self, name: str, value: str) -> None:
        if self.folder is None:
            raise RuntimeError("an rlimit cannot be changed from outside")
        (self.folder / name).write_text(value)


@contextmanager
def limited(limit_bytes: int, *, rlimit: bool = False) -> Iterator[Box]:
    """A :class:`Box` of `limit_bytes`, removed at the end.

    `rlimit`: the test also makes sense under RLIMIT_AS (the kernel then refuses memory instead of killing, and counts
    address space, of which torch alone maps several hundred MiB). Otherwise the test is skipped without cgroups.
    """
    place = where()
    if isinstance(place, str):
        if not rlimit or os.name != "posix":
            pytest.skip(place)
        place = None
    box = Box(limit_bytes, place)
    try:
        box.make()
        yield box
    finally:
        box.close()
