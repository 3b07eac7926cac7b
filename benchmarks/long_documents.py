"""Ranking quality with documents cut and with documents read in windows: nDCG@10 on a labelled set in BEIR's layout.

    python -m benchmarks.long_documents FOLDER [--out FILE]

FOLDER holds corpus.jsonl, queries.jsonl and qrels.tsv (Cranfield, say). Embedding: all-MiniLM-L6-v2 over title and text. Reranking:
the demo reranker over the first 20 of that for some queries; it is a small one trained for this project, so its figures compare
ways of reading with each other, and say nothing about rerankers.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from examples import models
from memsafe import Embedder, Reranker

__all__ = ["main", "ndcg"]

CANDIDATES = 20
Judged = Mapping[str, Mapping[str, int]]


def ndcg(ranked: Sequence[str], judged: Mapping[str, int], cut: int = 10) -> float:
    """Gain 2^score - 1, discount log2(place + 1); 0 where nothing is relevant."""

    def gain(scores: Sequence[int]) -> float:
        return sum((2**score - 1) / math.log2(place + 2) for place, score in enumerate(scores[:cut]))

    ideal = gain(sorted(judged.values(), reverse=True))
    return gain([judged.get(document, 0) for document in ranked]) / ideal if ideal else 0.0


def read(folder: Path) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Documents (title and text), queries, and judgements of each query, by id."""
    documents, queries = (
        {
            row["_id"]: f"{row.get('title', '')} {row['text']}".strip()
            for row in map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())
        }
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    judged: dict[str, dict[str, int]] = {}
    with (folder / "qrels.tsv").open(encoding="utf-8") as file:
        for row in csv.reader(file, delimiter="\t"):
            if row and row[-1].lstrip("-").isdigit():  # not the names of the columns
                judged.setdefault(row[0], {})[row[-2]] = int(row[-1])
    return documents, queries, judged


def embedding(documents: Mapping[str, str], queries: Mapping[str, str], judged: Judged, length: int, mode: str) -> Any:
    """A row of figures, and the ranking of each query."""
    began = time.perf_counter()
    with Embedder(models.minilm(), device="cpu", max_length=length, long_documents=mode) as embedder:
        run = embedder.run(list(documents.values()))
        asked = embedder.embed_queries([queries[query] for query in judged])
    names = np.array(list(documents))
    order = np.argsort(-(asked @ run.embeddings.T), axis=1, kind="stable")
    ranked = {query: names[order[place, :100]].tolist() for place, query in enumerate(judged)}
    return _row("embedding", length, mode, judged, ranked, run.report, began), ranked


def reranking(
    documents: Mapping[str, str], queries: Mapping[str, str], judged: Judged, first: Mapping[str, list[str]], mode: str
) -> dict[str, Any]:
    """A row of figures for the first candidates of each query, ranked anew."""
    pairs = [(query, name) for query in judged for name in first[query][:CANDIDATES]]
    began = time.perf_counter()
    with Reranker(models.demo_reranker(), device="cpu", max_length=128, long_documents=mode) as reranker:
        run = reranker.run([(queries[query], documents[name]) for query, name in pairs])
    scored: dict[str, list[tuple[float, str]]] = {}
    for (query, name), score in zip(pairs, run.scores.tolist(), strict=True):
        scored.setdefault(query, []).append((-score, name))
    ranked = {query: [name for _, name in sorted(found)] for query, found in scored.items()}
    return _row("reranking", 128, mode, judged, ranked, run.report, began)


def _row(
    what: str, length: int, mode: str, judged: Judged, ranked: Mapping[str, list[str]], report: Any, began: float
) -> dict[str, Any]:
    return {
        "what": what,
        "max_length": length,
        "long_documents": mode,
        "queries": len(judged),
        "ndcg_10": sum(ndcg(ranked[query], judged[query]) for query in judged) / len(judged),
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
    documents, queries, judged = read(given.folder)
    rows: list[dict[str, Any]] = []
    first: dict[str, list[str]] = {}
    for length in given.lengths:
        for mode in ("truncate", "mean_windows"):
            row, ranked = embedding(documents, queries, judged, length, mode)
            first = first or ranked  # candidates as they are without windows
            rows.append(row)
            print(row, flush=True)
    some = dict(list(judged.items())[: given.rerank_queries])
    for mode in ("truncate", "max_passage", "mean_passage"):
        rows.append(reranking(documents, queries, some, first, mode))
        print(rows[-1], flush=True)
    if given.out is not None:
        result = {"machine": describe(), "data": given.folder.name, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
