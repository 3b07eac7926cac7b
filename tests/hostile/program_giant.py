"""Giant pairs and texts, in one of the three ways of tokenising; prints what it took and whether rows are those of short ones.

python program_giant.py WAY FOLDER CHARS
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

from memsafe import Embedder, MemoryPolicy, Reranker

way, folder, num_chars = sys.argv[1], sys.argv[2], int(sys.argv[3])


def giant(unit: str) -> str:
    return (unit * (num_chars // len(unit) + 1))[:num_chars]


def any_of(first: int, last: int) -> str:
    return giant("".join(random.Random(0).choices([chr(code) for code in range(first, last)], k=99_991)))


TEXTS = {
    "words": giant("a few words of a text that never ends, "),
    "no spaces": giant("你好世界這是一個沒有空格的文本"),
    "spaces": "before " + giant(" ") + " after",
    "lines": "before " + giant(" \n\t \r\n") + " after",
    "one letter": giant("a"),
    "digits": giant("0123456789abcdef"),
    "marks": giant("!?"),
    "unknown": giant("\U0001f9ec"),
    "emoji": any_of(0x1F300, 0x1F6FF),
    "accents": "e" + any_of(0x300, 0x36F),
    "runs of spaces": giant(" " * 4095 + "x"),
    "runs of letters": giant("ab" * 2047 + "c "),
}


def as_foreign(tokenizer: Any) -> None:
    """A tokenizer of somebody's own, which memsafe calls and does not imitate."""

    class Own(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    tokenizer.__class__ = Own


started = time.perf_counter()
memory = MemoryPolicy(wait_s=1)
if way == "opaque":
    from sentence_transformers.models import Router

    parts = list(SentenceTransformer(folder, device="cpu").children())
    with Embedder(
        SentenceTransformer(modules=[Router.for_query_document(parts, parts)]), device="cpu", memory=memory
    ) as ours:
        rows = ours.embed_documents(list(TEXTS.values()))
        again = ours.embed_documents(list(TEXTS.values())[::-1])[::-1]
else:
    model = CrossEncoder(folder, device="cpu")
    if way == "features":
        as_foreign(model.tokenizer)
    with Reranker(model, device="cpu", memory=memory) as ours:
        assert ours._engine.model.encoder.mode == way, ours._engine.model.encoder.mode
        pairs = [(text, text) for text in TEXTS.values()] + [(TEXTS["words"], text) for text in TEXTS.values()]
        rows = ours.score_pairs(pairs)
        again = ours.score_pairs(pairs[::-1])[::-1]
assert np.isfinite(rows).all()
peak_kib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(
    json.dumps(
        {"s": time.perf_counter() - started, "peak_mib": peak_kib >> 10, "same": float(np.abs(rows - again).max())}
    )
)
