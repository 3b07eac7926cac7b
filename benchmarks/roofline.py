"""The machine's own matrix-product rate at a model's shapes: what no embedder that multiplies dense matrices can pass.

Measured with `torch.nn.functional.linear` on about a thousand rows, the way the layers of the model call it: per layer
four products of (hidden, hidden), and the feed-forward's. In two ways: one product at a time over all intra-op threads, and
one product per core side by side, each on one thread. The better one is the roofline.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from benchmarks.peers import Peer

__all__ = ["Roofline"]


class Roofline(Peer):
    """Runs in a worker of its own, in turn with the contenders. Nothing is loaded: the model is only its shapes."""

    modules = ("torch",)
    distributions = ("torch",)

    def load(self, model: str, options: dict[str, Any]) -> None:
        """`options`: hidden, inner (width of the feed-forward), gated, rows."""
        import torch

        torch.set_grad_enabled(False)
        hidden, inner = options["hidden"], options["inner"]
        self.rows = options.get("rows", 1024)
        self.shapes = (
            [(hidden, hidden)] * 4 + [(inner, hidden)] * (2 if options.get("gated") else 1) + [(hidden, inner)]
        )
        self.cores = self.threads()["cores"]

    def measure(self, dtype: str, seconds: float = 1.0) -> dict[str, Any]:
        """Floating-point operations per second over one layer's products, in `dtype`, both ways and the better one."""
        together = self._rate(dtype, seconds / 2, lanes=1, threads=self.cores)
        if self.cores == 1:
            return {"dtype": dtype, "intra_op": together, "side_by_side": together, "best": together}
        side = self._rate(dtype, seconds / 2, lanes=self.cores, threads=1)
        return {"dtype": dtype, "intra_op": together, "side_by_side": side, "best": max(together, side)}

    def _rate(self, dtype_name: str, seconds: float, *, lanes: int, threads: int) -> float:
        """The sum over `lanes` threads, each multiplying on `threads` intra-op threads for `seconds`."""
        import torch

        dtype = getattr(torch, dtype_name)
        torch.set_num_threads(threads)
        barrier, rates = threading.Barrier(lanes), [0.0] * lanes
        work = sum(2.0 * self.rows * out * into for out, into in self.shapes)

        def lane(number: int) -> None:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                weights = [torch.randn(out, into).to(dtype) for out, into in self.shapes]
                inputs = {into: torch.randn(self.rows, into).to(dtype) for _, into in self.shapes}
                for weight in weights:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)
                barrier.wait()
                times, end = [], time.perf_counter() + seconds
                while True:
                    started = time.perf_counter()
                    for weight in weights:
                        torch.nn.functional.linear(inputs[weight.shape[1]], weight)
                    now = time.perf_counter()
                    times.append(now - started)
                    if now >= end:
                        break
            rates[number] = work / statistics.median(times)

        lanes_threads = [threading.Thread(target=lane, args=(number,)) for number in range(lanes)]
        for thread in lanes_threads:
            thread.start()
        for thread in lanes_threads:
            thread.join()
        return sum(rates)
