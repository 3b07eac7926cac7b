"""What a corpus costs beyond embedding: reading JSON lines, comparing ids, writing rows, checksums and the disk.

In one process, in turn: ``embed_documents`` on a list of texts, and ``embed_corpus`` from a file of the same texts into a new
store. Each also tells its processor time, which does not depend on what else the machine does. The store's own part is
measured without a model too: rows that are there already, copied by an update.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import models, texts
from benchmarks.stats import ratios

__all__ = ["corpus"]


def corpus(*, folder: Path, count: int = 2000, rounds: int = 5) -> dict[str, Any]:
    """Wall and processor seconds of both, round by round, and their ratios; texts a second of an update that computes nothing."""
    command = [sys.executable, "-m", "benchmarks.corpus", str(count), str(rounds), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        return {"rows": [{"texts": count, "not_run": done.stderr.strip().splitlines()[-1][:200]}]}
    return {"rows": [json.loads(done.stdout.splitlines()[-1])]}


def measure(count: int, rounds: int, folder: Path) -> dict[str, Any]:
    from memsafe import Embedder, MemoryPolicy, embed_corpus, open_store

    real = texts.real(count, seed=3)
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"id": f"doc {at}", "text": text}) + "\n" for at, text in enumerate(real)))
    bare: list[tuple[float, float]] = []
    whole: list[tuple[float, float]] = []
    with Embedder(str(models.model_path("minilm")), device="cpu", memory=MemoryPolicy(learn=False)) as embedder:
        for _ in range(2):  # sizes are found, words remembered
            embedder.embed_documents(real)
        tokens = embedder.run(real).report.tokens
        for number in range(rounds):
            store = folder / f"store{number}"
            for part in (0, 1) if number % 2 else (1, 0):
                begun, cpu = time.perf_counter(), time.process_time()
                if part:
                    embed_corpus(embedder, source, store, block_texts=512)
                else:
                    embedder.embed_documents(real)
                taken = time.perf_counter() - begun, time.process_time() - cpu
                (whole if part else bare).append(taken)
        update = embed_corpus(embedder, source, folder / "store0", block_texts=512, update=True)
        num_bytes = open_store(folder / "store0").info["bytes"]
    over = [ratios([w[part] for w in whole], [b[part] for b in bare]).to_dict() for part in (0, 1)]
    return {
        "texts": count,
        "tokens": tokens,
        "store_bytes": num_bytes,
        "tokens_per_s": {
            "embed_documents": [tokens / seconds for seconds, _ in bare],
            "embed_corpus": [tokens / seconds for seconds, _ in whole],
        },
        "wall_ratio": over[0],
        "cpu_ratio": over[1],
        "reused_texts_per_s": update.reused / update.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("rounds", type=int, nargs="?", default=5)
    parser.add_argument("folder", type=Path, nargs="?")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memsafe-corpus-", dir=chosen.folder))
    try:
        print(json.dumps(measure(chosen.count, chosen.rounds, folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
