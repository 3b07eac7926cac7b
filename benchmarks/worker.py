"""The process a contender runs in: loads one model once, then answers commands. `python -m benchmarks.worker PEER`.

One JSON object per line comes in on standard input, one goes out on standard output; anything that a library prints is
sent to standard error, so that it cannot be mistaken for an answer. Every contender has a process of its own: its
memory can then be told from the others', and it may live in another virtual environment. Needs only the standard
library, numpy and the peer itself.

Commands: {"do": "load", "model": path, "options": {...}}, {"do": "run", "texts": path, "setting": {...}, "repeat": n,
"save": path or null}, {"do": "call", "name": method, ...}, {"do": "quit"}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from typing import Any

import numpy as np

from benchmarks import memory, peers


class Host:
    """Answers the commands for one peer."""

    def __init__(self, peer: str) -> None:
        self.peer = peers.create(peer)

    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        """Import, then load; sizes are read before the import, before the load and after it."""
        start_bytes = memory.resident_bytes()
        started = time.perf_counter()
        self.peer.imports()
        imported = time.perf_counter()
        gc.collect()
        before_load_bytes = memory.resident_bytes()
        memory.reset_peak()
        self.peer.load(model, options)
        loaded = time.perf_counter()
        return {
            "import_s": imported - started,
            "load_s": loaded - imported,
            "start_bytes": start_bytes,
            "before_load_bytes": before_load_bytes,
            "load_peak_bytes": memory.peak_bytes(),
            "after_load_bytes": memory.resident_bytes(),
            "versions": self.peer.versions(),
            "threads": self.peer.threads(),
        }

    def run(self, texts: str, setting: dict[str, Any], repeat: int = 1, save: str | None = None) -> dict[str, Any]:
        """Run the texts `repeat` times; the checksum shows that every row was really computed, every time."""
        with open(texts, encoding="utf-8") as file:
            inputs = json.load(file)
        gc.collect()
        before_bytes = memory.resident_bytes()
        can_reset = memory.reset_peak()
        seconds, cpu_seconds, checksums, rows = [], [], [], None
        for _ in range(repeat):
            started, cpu_started = time.perf_counter(), time.process_time()
            result = self.peer.run(inputs, setting)
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
            rows = np.asarray(self.peer.rows(result), dtype=np.float32)
            if len(rows) != len(inputs):
                raise RuntimeError(f"{len(rows)} rows for {len(inputs)} inputs")
            checksums.append(float(np.abs(rows).sum(dtype=np.float64)))
        peak_bytes = memory.peak_bytes() if can_reset else None
        if rows is not None and save:
            np.save(save, rows)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "checksums": checksums,
            "shape": [] if rows is None else list(rows.shape),
            "before_bytes": before_bytes,
            "peak_bytes": peak_bytes,
            "after_bytes": memory.resident_bytes(),
            "report": self.peer.report(),
        }

    def call(self, name: str, **arguments: Any) -> Any:
        """A peer's own measurement, such as the roofline's; public methods only."""
        if name.startswith("_"):
            raise ValueError(f"{name!r} is not a measurement")
        return getattr(self.peer, name)(**arguments)


def main() -> int:
    """Answer until told to quit or until standard input ends (the parent is gone)."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    host: Host | None = None
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "quit":
            break
        try:
            if host is None:
                host = Host(sys.argv[1])
            answer = {"ok": True, "value": getattr(host, do)(**command)}
        except Exception as error:  # reported to the parent, which records the peer as unavailable
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    sys.stderr.flush()
    os._exit(0)  # some peers leave threads behind that would keep the interpreter alive


if __name__ == "__main__":
    sys.exit(main())
