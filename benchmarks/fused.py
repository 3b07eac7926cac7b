"""Does fused float32 gain on a CPU? The parts of a layer between attention, three ways, on one thread: `python -m benchmarks.fused`.

As memsafe runs them (linear, GELU, linear, addition, layer norm); through torch.compile, frozen, which packs the weights beforehand; and by
oneDNN's own linear with packed weights and GELU or addition behind it, which is not public. In turn, in rounds; ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.machine import describe

__all__ = ["Block", "main"]


class Block(torch.nn.Module):
    """What of a BERT layer reads no other token, of `hidden` numbers and `inner` in between: after attention's weighted sum."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.out, self.up = torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, inner)
        self.down = torch.nn.Linear(inner, hidden)
        self.first, self.second = torch.nn.LayerNorm(hidden), torch.nn.LayerNorm(hidden)

    def forward(self, attended: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        x = self.first(self.out(attended) + before)
        return self.second(self.down(functional.gelu(self.up(x))) + x)


def packed(block: Block, tokens: int) -> Callable[..., torch.Tensor]:
    """By torch.ops.mkldnn: weights in the order that oneDNN likes best for `tokens` rows, GELU and addition in the same pass."""
    ops: Any = torch.ops.mkldnn
    out, up, down = (
        (ops._reorder_linear_weight(each.weight.detach(), tokens), each.bias)
        for each in (block.out, block.up, block.down)
    )

    def run(attended: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        x = block.first(ops._linear_pointwise.binary(attended, before, *out, "add"))
        inner = ops._linear_pointwise(x, *up, "gelu", [], "none")
        return block.second(ops._linear_pointwise.binary(inner, x, *down, "add"))

    return run


def measure(hidden: int, inner: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way, and how many times the plain way's speed each has."""
    from torch._inductor import config

    torch.manual_seed(0)
    config.freezing = True
    block = Block(hidden, inner).eval()
    given = (torch.randn(tokens, hidden), torch.randn(tokens, hidden))
    ways: dict[str, Any] = {"plain": block, "torch.compile, frozen": torch.compile(block)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways["oneDNN, packed"] = packed(block, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors = {}
    with torch.inference_mode():
        wanted = block(*given)
        for name, run in ways.items():
            errors[name] = float((run(*given) - wanted).abs().max())
        for _ in range(rounds):
            for name, run in ways.items():
                started = time.perf_counter()
                for _ in range(4):
                    run(*given)
                seconds[name].append((time.perf_counter() - started) / 4)
    ratios = {
        name: statistics.median(plain / each for plain, each in zip(seconds["plain"], found, strict=True))
        for name, found in seconds.items()
    }
    shape = {"hidden": hidden, "inner": inner, "tokens": tokens}
    return {**shape, "times_plain": ratios, "largest_difference": errors, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(384, 1536, 256), (384, 1536, 1024), (1024, 4096, 256), (1024, 4096, 1024)]
    result = {"machine": describe(), "rows": [measure(*shape, given.rounds) for shape in shapes]}
    for row in result["rows"]:
        print(
            row["hidden"],
            row["tokens"],
            {name: round(each, 3) for name, each in row["times_plain"].items()},
            row["largest_difference"],
        )
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
