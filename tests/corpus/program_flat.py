"""Embeds `count` short made texts into a store and prints two sizes of the process in bytes: program_flat.py COUNT STORE [MODEL]

The peak since it began, which importing torch may have made; and the largest resident size that was seen after a block.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from typing import Any


def texts(count: int) -> Iterator[tuple[str, str]]:
    for number in range(count):
        yield f"key {number}", f"entry {number} of a corpus that is never in memory as a whole"


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(count: int, store: str, model: str | None = None) -> None:
    from memsafe import Embedder, MemoryPolicy, embed_corpus
    from memsafe.testing import SimulatedDevice, SimulatedEmbedder

    embedder: Any = SimulatedEmbedder(SimulatedDevice("1GiB"), dimension=16)
    if model is not None:
        embedder = Embedder(model, device="cpu", memory=MemoryPolicy(learn=False))
    largest = 0

    def look(progress: object) -> None:
        nonlocal largest
        largest = max(largest, resident_bytes())

    report = embed_corpus(embedder, texts(count), store, fixed_tokens=4096, block_texts=1024, progress=look)
    assert report.complete and report.texts == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, largest)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
