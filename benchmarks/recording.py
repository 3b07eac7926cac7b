"""Records a curve for `benchmarks.sizing` on this machine: what packed forwards of a model take, by their tokens.

python -m benchmarks.recording minilm cpu-minilm-fp32.json
python -m benchmarks.recording BAAI/bge-m3 t4-bge-m3-fp16.json --device cuda --dtype float16 --sizes 256,1024,4096,16384
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulator import Curve

__all__ = ["main", "record"]

TEXT_TOKENS = 32
"""Of each text: so short that attention between tokens is nothing."""
ROUNDS = 5


def record(model: str, name: str, device: str, dtype: str | None, sizes: Sequence[int], source: str) -> Curve:
    """Measure packed forwards of `sizes` tokens, the fastest of :data:`ROUNDS` each; on a CPU in one thread."""
    from memsafe import Embedder
    from memsafe.planning.batch import BatchShape

    with Embedder(model, device=device, dtype=dtype, memory={"learn": False}) as embedder:
        loaded = embedder._engine.model
        if not loaded.packed:
            raise SystemExit(f"{model} runs {loaded.path}; only packed forwards are recorded")
        clock = _Clock(loaded)
        points = [[size, *clock.fastest([TEXT_TOKENS] * (size // TEXT_TOKENS))] for size in sizes]
        longest = min(embedder.max_length or 512, 2048)
        _, alone, _ = [0.0, *clock.fastest([longest])]
        tokens = [point[0] for point in points]
        flat = float(np.interp(longest, tokens, [point[1] for point in points]))
        one = BatchShape(1, 1, 0, 1)
        large, small = (clock.peak_bytes([TEXT_TOKENS] * (size // TEXT_TOKENS)) for size in (sizes[-1], sizes[-1] // 2))
        cores = loaded.device.num_cores
        gain = clock.gain([TEXT_TOKENS] * (sizes[-1] // TEXT_TOKENS), cores) if device == "cpu" else 0.0
        return Curve(
            name=name,
            kind=loaded.device.kind,
            source=source,
            measured=True,
            seconds=[[size, seconds] for size, seconds, _ in points],
            bytes={"fixed": 0.0, "per_token": 2 * (large - small) / sizes[-1]},
            free_bytes=float(loaded.device.snapshot().free_bytes),
            flops_per_token=loaded.flops(one),
            flops_per_square=loaded.flops(BatchShape(1, 1, 1, 1)) - loaded.flops(one),
            cores=cores,
            host_seconds=min(point[2] for point in points),
            seconds_per_square=max(alone - flat, 0.0) / longest**2,
            noise=[0.5, 0.1 if device == "cpu" else 0.02],
            thread_gain=gain,
            max_length=embedder.max_length or 8192,
        )


class _Clock:
    """Forwards of one model, timed."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self._here = loaded.device.traits.side_by_side

    def fastest(self, lengths: Sequence[int]) -> tuple[float, float]:
        """(seconds of the device, or of one core; seconds of the host, 0 on a CPU)."""
        from memsafe.engine.sinks import to_host
        from memsafe.machine.threads import set_threads

        batch, device = self._batch(lengths), self._loaded.device
        found = []
        for _ in range(ROUNDS + 1):
            if self._here:
                set_threads(1)
                began = time.thread_time()
                to_host(self._loaded.forward(batch, {}))
                found.append((time.thread_time() - began, 0.0))
                continue
            launched, begin = time.perf_counter(), device.mark()
            rows = self._loaded.forward(batch, {})
            end, host = device.mark(), time.perf_counter() - launched
            to_host(rows)
            seconds = device.seconds_between(begin, end) or time.perf_counter() - launched
            found.append((seconds, host))
        return min(found[1:])  # the first one warms up

    def peak_bytes(self, lengths: Sequence[int]) -> int:
        with self._loaded.device.measure(live=True) as peak:
            self._loaded.forward(self._batch(lengths), {})
        return int(peak.live_bytes or 0)

    def gain(self, lengths: Sequence[int], cores: int) -> float:
        """What each further core adds to the speed of one forward."""
        from memsafe.machine.threads import set_threads

        if cores < 2:
            return 0.0
        batch, times = self._batch(lengths), []
        for threads in (1, cores):
            set_threads(threads)
            began = time.perf_counter()
            for _ in range(3):
                self._loaded.forward(batch, {})
            times.append(time.perf_counter() - began)
        return max(times[0] / times[1] - 1, 0.0) / (cores - 1)

    def _batch(self, lengths: Sequence[int]) -> Any:
        from memsafe.planning.batch import MicroBatch, TokenizedInput

        pick = np.random.default_rng(0)
        ids = [pick.integers(1000, 2000, length).astype(np.int32) for length in lengths]
        return MicroBatch(tuple(TokenizedInput(i, each) for i, each in enumerate(ids)), True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a folder, a hub id, or one of benchmarks.models.MODELS")
    parser.add_argument("out", type=Path, help="the JSON file to write; its stem is the curve's name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--sizes", default="64,128,256,512,1024,2048,4096,8192", help="in tokens, smallest first")
    parser.add_argument("--source", default="", help="what machine this is")
    given = parser.parse_args(arguments)
    from benchmarks import models

    model = str(models.model_path(given.model)) if given.model in models.MODELS else given.model
    sizes = [int(size) for size in given.sizes.split(",")]
    curve = record(model, given.out.stem, given.device, given.dtype, sizes, given.source)
    given.out.write_text(json.dumps(asdict(curve), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
