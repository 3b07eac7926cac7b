"""A corpus that is never in memory as a whole: embedded by a process that is killed now and then, and goes on each time.

python examples/big_corpus.py [TEXTS [MODEL]]     # 20,000 short made texts; 1,000,000 take about an hour on two cores
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from memsafe import Embedder, MemoryPolicy, embed_corpus, open_store
from models import minilm

BIRDS = "crane heron stork swift wren kite owl rook finch robin".split()
DEEDS = "crosses follows watches leaves finds circles avoids remembers".split()
PLACES = "river harbour steeple orchard marsh quarry bridge meadow island station".split()


def texts(count: int) -> Iterator[tuple[str, str]]:
    """(id, text), made one after another; always the same ones."""
    for number in range(count):
        bird, deed, place = BIRDS[number % 10], DEEDS[number // 10 % 8], PLACES[number // 80 % 10]
        yield f"note-{number}", f"A {bird} {deed} the {place} on day {number // 800} of the count."


def embed(count: int, model: str, path: Path) -> None:
    """What a nightly job would do: the same call, whether it is the first or goes on with another one's work."""
    with Embedder(model, memory=MemoryPolicy(limit="2GiB")) as embedder:
        print(embed_corpus(embedder, texts(count), path, block_texts=1024), flush=True)


def main(count: int, model: str) -> None:
    path = Path(tempfile.mkdtemp(prefix="memsafe-corpus-")) / "store"
    command = [sys.executable, __file__, "--embed", str(count), model, str(path)]
    for kills in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            if kills < 2:
                wait_for_blocks(path, finished(path) // 1024 + 2, process)
                time.sleep(random.uniform(0, 1))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
            report, _ = process.communicate()
        print(report.strip() or f"killed; {finished(path):,} texts are finished")
        if process.returncode == 0:
            break

    store = open_store(path)
    checked = store.verify()
    print(
        f"\n{store}\nverified: {checked.rows:,} rows, {checked.num_bytes / 1e6:.0f} MB, problems: {checked.problems or 'none'}"
    )
    question = "Which owl remembers the bridge?"
    with Embedder(model) as embedder:
        nearest = store.search(embedder.embed_queries([question]), k=3)
    print(f"\n{question}")
    found = dict(entry for entry in texts(count) if entry[0] in nearest.ids[0])
    for name, score in zip(nearest.ids[0], nearest.scores[0], strict=True):
        print(f"  {score:.3f}  {name}: {found[name]}")


def finished(path: Path) -> int:
    return len(open_store(path)) if (path / "manifest.jsonl").exists() else 0


def wait_for_blocks(path: Path, blocks: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and finished(path) < blocks * 1024:
        time.sleep(0.05)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--embed"]:
        embed(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, sys.argv[2] if len(sys.argv) > 2 else minilm())
