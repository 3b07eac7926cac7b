"""Texts for the benchmarks: real ones (the interpreter's own docstrings, Cranfield if it is there) and length mixes.

All of it is deterministic: the same interpreter, seed and count give the same texts. No text occurs twice, so that nobody
gains from answering one text for another.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
import sys
import sysconfig
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

__all__ = ["MIXES", "cranfield", "docstrings", "giant", "heavy_tail", "pairs", "real", "short"]

ROOT = Path(__file__).resolve().parent.parent
_SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__"}


@lru_cache(maxsize=1)
def docstrings() -> tuple[str, ...]:
    """Distinct docstrings of the standard library, at least 20 characters each, in a fixed order."""
    base = Path(sysconfig.get_paths()["stdlib"])
    version = ".".join(map(str, sys.version_info[:3]))
    cache = ROOT / ".cache" / "bench" / f"docstrings-{version}.json"
    if cache.exists():
        return tuple(json.loads(cache.read_text(encoding="utf-8")))
    found: dict[str, None] = {}
    for path in sorted(base.rglob("*.py")):
        if _SKIP.isdisjoint(path.relative_to(base).parts[:-1]):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = inspect.cleandoc(ast.get_docstring(node) or "")
                    if len(text) >= 20:
                        found.setdefault(text)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(list(found), ensure_ascii=False), encoding="utf-8")
    return tuple(found)


def cranfield() -> list[str] | None:
    """The Cranfield abstracts (BEIR's corpus.jsonl), from $MEMSAFE_BENCH_CRANFIELD or beside the checkout; None if absent."""
    folder = Path(os.environ.get("MEMSAFE_BENCH_CRANFIELD") or ROOT.parent / "shared" / "data" / "cranfield")
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        return None
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = (f"{row.get('title', '')} {row.get('text', '')}".strip() for row in rows)
    return list(dict.fromkeys(text for text in texts if text))


@lru_cache(maxsize=1)
def _words() -> tuple[str, ...]:
    return tuple(" ".join(docstrings()).split())


def _windows(lengths: list[int], seed: int) -> list[str]:
    """For each length, that many consecutive words of the docstrings from a random place; all distinct."""
    words, pick, seen = _words(), random.Random(seed), set()
    texts = []
    for length in lengths:
        text = ""
        while not text or text in seen:
            start = pick.randrange(len(words) - length)
            text = " ".join(words[start : start + length])
        seen.add(text)
        texts.append(text)
    return texts


def real(count: int, seed: int = 0) -> list[str]:
    """`count` docstrings, drawn without putting back; lengths 5 to several thousand tokens, median about 60."""
    source = docstrings()
    if count > len(source):
        raise ValueError(f"there are {len(source)} docstrings; {count} were asked for")
    return random.Random(seed).sample(source, count)


def short(count: int, seed: int = 0) -> list[str]:
    """`count` texts of 8 words each: all of about the same, small size."""
    return _windows([8] * count, seed)


def heavy_tail(count: int, seed: int = 0, longest: int = 2500) -> list[str]:
    """Word counts drawn from a Pareto law (shape 0.9, least 8), cut at `longest`: most are short, a few are very long."""
    pick = random.Random(seed + 1)
    return _windows([min(int(8 * pick.paretovariate(0.9)), longest) for _ in range(count)], seed)


def giant(count: int, seed: int = 0, longest: int = 2500) -> list[str]:
    """One text of `longest` words among ``count - 1`` of 12, at a random place."""
    lengths = [12] * (count - 1)
    lengths.insert(random.Random(seed).randrange(count), longest)
    return _windows(lengths, seed)


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """One query against `count` real documents, as a reranker is asked."""
    return [("how do I read a compressed file line by line", text) for text in real(count, seed)]


MIXES: dict[str, Callable[[int, int], list[str]]] = {
    "real": real,
    "short": short,
    "heavy tail": heavy_tail,
    "one giant": giant,
}
