"""Ranking quality with documents cut and with documents read in windows: nDCG@10 on a labelled set in BEIR's layout.

    python -m benchmarks.long_documents FOLDER [--out FILE]

FOLDER holds corpus.jsonl, queries.jsonl and qrels.tsv (Cranfield, say). Embedding: all-MiniLM-L6-v2 over title and text. Reranking:
the demo reranker over the first 20 of that for some queries; it is a small one trained for this project, so its figures compare
ways of reading with each other, and say nothing about rerankers.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.labelled import Labelled, beir
from benchmarks.machine import describe
from examples import models
from memsafe import Embedder, Reranker

__all__ = ["main"]

CANDIDATES = 20


def embedding(found: Labelled, length: int, mode: str) -> Any:
    """A row of figures, and the ranking of each query."""
    began = time.perf_counter()
    with Embedder(models.minilm(), device="cpu", max_length=length, long_documents=mode) as embedder:
        run = embedder.run(list(found.documents.values()))
        asked = embedder.embed_queries([found.queries[query] for query in found.judged])
    names = np.array(list(found.documents))
    order = np.argsort(-(asked @ run.embeddings.T), axis=1, kind="stable")
    ranked = {query: names[order[place, :100]].tolist() for place, query in enumerate(found.judged)}
    return _row("embedding", length, mode, found, ranked, run.report, began), ranked


def reranking(found: Labelled, first: Mapping[str, list[str]], mode: str) -> dict[str, Any]:
    """A row of figures for the first candidates of each query, ranked anew."""
    pairs = [(query, name) for query in found.judged for name in first[query][:CANDIDATES]]
    began = time.perf_counter()
    with Reranker(models.demo_reranker(), device="cpu", max_length=128, long_documents=mode) as reranker:
        run = reranker.run([(found.queries[query], found.documents[name]) for query, name in pairs])
    scored: dict[str, list[tuple[float, str]]] = {}
    for (query, name), score in zip(pairs, run.scores.tolist(), strict=True):
        scored.setdefault(query, []).append((-score, name))
    ranked = {query: [name for _, name in sorted(each)] for query, each in scored.items()}
    return _row("reranking", 128, mode, found, ranked, run.report, began)


def _row(
    what: str, length: int, mode: str, found: Labelled, ranked: Mapping[str, list[str]], report: Any, began: float
) -> dict[str, Any]:
    return {
        "what": what,
        "max_length": length,
        "long_documents": mode,
        "queries": len(found.judged),
        "ndcg_10": found.ndcg(ranked),
        "documents": report.texts,
        "read_in_windows": report.windowed,
        "windows": report.windows,
        "truncated": report.truncated,
        "tokens": report.tokens,
        "seconds": time.perf_counter() - began,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rerank-queries", type=int, default=100)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 256], help="max_length of the embedder, in tokens"
    )
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*longer than")
    found = beir(given.folder, given.folder.name)
    rows: list[dict[str, Any]] = []
    first: dict[str, list[str]] = {}
    for length in given.lengths:
        for mode in ("truncate", "mean_windows"):
            row, ranked = embedding(found, length, mode)
            first = first or ranked  # candidates as they are without windows
            rows.append(row)
            print(row, flush=True)
    judged = dict(list(found.judged.items())[: given.rerank_queries])
    some = Labelled(found.name, found.documents, found.queries, judged)
    for mode in ("truncate", "max_passage", "mean_passage"):
        rows.append(reranking(some, first, mode))
        print(rows[-1], flush=True)
    if given.out is not None:
        result = {"machine": describe(), "data": found.name, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
