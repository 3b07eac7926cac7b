"""How long it took elsewhere: curves recorded on real devices. Copies of tests/planning/curves, which a test compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memsafe.planning.architecture import Architecture
from memsafe.planning.batch import BatchShape
from memsafe.planning.speed import SpeedCurve, size_class

__all__ = ["RECORDED", "Recorded", "matching"]


@dataclass(frozen=True)
class Recorded:
    """A shape in one dtype on one device. points: (tokens, seconds) of a packed forward of short texts, smallest first.

    seconds_per_square: more for each pair of tokens of one text. host_seconds: to launch one forward. flops_per_token,
    flops_per_square: the arithmetic by which a shape is recognised. lanes: forwards side by side.
    """

    name: str
    where: str
    dtype: str
    flops_per_token: float
    flops_per_square: float
    points: tuple[tuple[int, float], ...]
    seconds_per_square: float = 0.0
    host_seconds: float = 0.0
    lanes: int = 1

    def fits(self, shape: Architecture, dtype: str) -> bool:
        """Whether it is of this shape, to 1 % of its arithmetic per token, and of this dtype."""
        one = shape.flops(BatchShape(1, 1, 0, 1))
        return self.dtype == dtype and abs(one / self.flops_per_token - 1) < 0.01

    def curve(self) -> SpeedCurve:
        """As planning asks it."""
        per_token = min(seconds / tokens for tokens, seconds in self.points)
        square_tokens = self.flops_per_square / self.flops_per_token
        slow = min(max(self.seconds_per_square / (per_token * square_tokens), 0.5), 8.0)
        points = [[tokens, float(seconds), 4] for tokens, seconds in self.points]
        curve = SpeedCurve.from_json({"points": points, "attention": slow, "host_seconds": self.host_seconds})
        curve.square_tokens = square_tokens if self.seconds_per_square else 0.0
        return curve

    def run(self, lengths: Mapping[int, int], most_tokens: int, within: float) -> tuple[int, float]:
        """(tokens of a micro-batch, seconds of the run) for texts of `lengths`, how many of each number of tokens, in micro-batches
        of `most_tokens` at most; `within`: the share of speed that a run may lose for smaller ones."""
        classes: dict[int, int] = {}
        for length, count in lengths.items():
            classes[size_class(length)] = classes.get(size_class(length), 0) + count
        curve = self.curve()
        size = max(min(curve.smallest(within, classes), most_tokens), 1)
        return size, curve.run_seconds(size, classes) / self.lanes


_H200 = "NVIDIA H200, torch 2.11.0+cu130, transformers 5.23.0, driver 580.159, November 2026; single runs"
_CPU = "two cores of an AMD EPYC (AVX-512, VNNI), torch 2.13.0, November 2026; other processes at work"
_BGE_M3, _GTE, _MINILM = (603979776.0, 98304.0), (226492416.0, 36864.0), (21233664.0, 9216.0)

RECORDED: tuple[Recorded, ...] = (
    Recorded(
        "h200-bge-m3-bf16", _H200, "bfloat16", *_BGE_M3,
        ((18, 0.00133), (256, 0.00154), (1024, 0.00212), (4096, 0.00557), (8400, 0.0122), (16500, 0.0259), (65700, 0.0947)),
        4.6e-10, 0.013,
    ),
    Recorded(
        "h200-bge-m3-fp32", _H200, "float32", *_BGE_M3,
        ((256, 0.02), (2100, 0.048), (8400, 0.117), (16500, 0.237), (65700, 0.912)),
        2.4e-09, 0.013,
    ),
    Recorded(
        "h200-gte-reranker-fp16", _H200, "float16", *_GTE,
        ((256, 0.002), (2100, 0.0038), (8400, 0.0098), (16500, 0.0166), (65700, 0.0578)),
        1.7e-10, 0.0137,
    ),
    Recorded(
        "h200-minilm-fp16", _H200, "float16", *_MINILM,
        ((256, 0.001), (2100, 0.0013), (8400, 0.0022), (16500, 0.0033), (65700, 0.0101)),
        0.0, 0.0063,
    ),
    Recorded(
        "h200-minilm-fp32", _H200, "float32", *_MINILM,
        ((256, 0.0034), (2100, 0.0045), (8400, 0.0078), (16500, 0.0134), (65700, 0.044)),
        0.0, 0.0044,
    ),
    Recorded(
        "cpu-minilm-fp32", _CPU, "float32", *_MINILM,
        (
            (64, 0.025601155000000375), (128, 0.04325323100000045), (256, 0.07234913199999937), (512, 0.14632405399999904),
            (1024, 0.28441305299999975), (2048, 0.5741815119999991), (4096, 1.0738425490000019), (8192, 2.276808539000001),
        ),
        1.339274139404911e-07, 0.0, 2,
    ),
)  # fmt: skip


def matching(shape: Architecture, dtype: str) -> list[Recorded]:
    """What was recorded of this shape in this dtype."""
    return [recorded for recorded in RECORDED if recorded.fits(shape, dtype)]
