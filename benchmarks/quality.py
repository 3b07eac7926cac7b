"""Ranking quality on labelled sets: the same as the peers' in float32, and what each thing that changes rows does to it.

Embedding: all-MiniLM-L6-v2, exact search by cosine. Reranking: the demo reranker over the first of that; a small one trained for
this project, which ranks worse than the embedder alone, so its figures compare ways of running it and say nothing about rerankers.
All in one process, one after another; seconds are those of this process on a machine that may do other work.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import labelled, peers
from benchmarks.labelled import Labelled
from examples import models
from memsafe import Embedder, InputError, Reranker

__all__ = ["chunk_spans", "compared", "fewer", "quality", "rank", "rank_chunks"]

Row = dict[str, Any]
Ranked = dict[str, list[str]]
CANDIDATES = 20
STACKS = (
    ("memsafe", "memsafe", "memsafe", "memsafe-reranker"),
    ("SentenceTransformer.encode", "sentence-transformers", "CrossEncoder.predict", "cross-encoder"),
    (
        "HuggingFaceEmbedding (LlamaIndex)",
        "llama-index",
        "SentenceTransformerRerank (LlamaIndex)",
        "llama-index-rerank",
    ),
)
"""Who embeds and who reranks: labels, and the contenders of `benchmarks.peers`."""
WIDTHS = (256, 128, 64)
PAIR_TOKENS = 512
"""Where SentenceTransformerRerank cuts a pair unless told otherwise; everybody does here."""


def quality(*, documents: int | None = None, queries: int = 30, chunked: int = 300) -> Row:
    """The sets that are at hand. documents: of each, None for all; queries: how many are reranked; chunked: documents of Cranfield that
    are embedded in chunks, late ones and others."""
    judged, long = labelled.cranfield(), labelled.perlfaq()
    found = {"Cranfield": judged, "perlfaq": long}
    sets = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*longer than")  # that texts are cut is the subject here
        if judged is not None:
            sets.append(_set(fewer(judged, documents), queries, _judged))
            sets.append(_set(fewer(judged, min(documents or chunked, chunked)), 0, _late))
        if long is not None:
            sets.append(_set(fewer(long, documents), queries, _long))
    where = "is not at hand (docs/benchmarks.md says where it is looked for)"
    return {"sets": sets, "not_run": [f"{name} {where}" for name, each in found.items() if each is None]}


def _set(found: Labelled, queries: int, measure: Callable[[Labelled, Labelled], list[Row]]) -> Row:
    """A set's part of the result."""
    some = found.first(queries) if queries else Labelled(found.name, {}, {}, {})
    rows = compared(measure(found, some))
    return {
        "name": found.name, "documents": len(found.documents), "queries": len(found.judged),
        "reranked_queries": len(some.judged), "rows": rows,
    }  # fmt: skip


def _judged(found: Labelled, some: Labelled) -> list[Row]:
    """Equality with the peers, then half precision and fewer dimensions."""
    rows: list[Row] = []
    for label, embedder, rerank_label, reranker in STACKS:
        rows.append(_embedding(found, label, "float32", _peer(embedder, {})))
        rows.append(_reranking(some, rows[-1], rerank_label, "float32", _scorer(reranker)))
    rows.append(_embedding(found, "memsafe", "bfloat16", _peer("memsafe", {"dtype": "bfloat16"})))
    rows.append(_reranking(some, rows[-1], "memsafe", "bfloat16", _scorer("memsafe-reranker", dtype="bfloat16")))
    asked, given = rows[0]["vectors"]
    for width in WIDTHS:  # the leading numbers of the same rows: what truncate_dim gives
        few: Encode = (lambda _, rows=given[:, :width]: rows, lambda _, rows=asked[:, :width]: rows)
        rows.append(_embedding(found, "memsafe", f"truncate_dim={width}", few))
    return rows


def _late(found: Labelled, some: Labelled) -> list[Row]:
    """Whole documents, their chunks each alone, and late chunks."""
    with Embedder(models.minilm(), device="cpu", max_length=512) as embedder:
        rows = [_embedding(found, "memsafe", "max_length=512", _pair_of(embedder))]
    return rows + _chunked(found, 512, late=True)


def _long(found: Labelled, some: Labelled) -> list[Row]:
    """Documents that a model must cut: cut, in windows, in chunks."""
    rows = []
    for mode in ("truncate", "mean_windows"):
        with Embedder(models.minilm(), device="cpu", long_documents=mode) as embedder:
            rows.append(_embedding(found, "memsafe", f'long_documents="{mode}"', _pair_of(embedder)))
    first = rows[0]
    rows += _chunked(found, 256, late=False)  # documents are too long for late chunks
    for mode in ("truncate", "max_passage", "mean_passage"):
        with Reranker(models.demo_reranker(), device="cpu", max_length=256, long_documents=mode) as reranker:
            rows.append(_reranking(some, first, "memsafe", f'long_documents="{mode}"', reranker.score_pairs))
    return rows


def fewer(found: Labelled, documents: int | None) -> Labelled:
    """The first `documents`, and the queries that have an answer among them."""
    if documents is None:
        return found
    kept = dict(list(found.documents.items())[:documents])
    judged = {
        query: {name: score for name, score in scores.items() if name in kept} for query, scores in found.judged.items()
    }
    judged = {query: scores for query, scores in judged.items() if any(scores.values())}
    return Labelled(f"{found.name}, the first of it", kept, {query: found.queries[query] for query in judged}, judged)


# Embedding: how documents and queries become rows is all that differs

Encode = tuple[Callable[[Sequence[str]], Any], Callable[[Sequence[str]], Any]]


def _peer(name: str, options: Row) -> Encode:
    """(documents, queries) to rows, by a contender of the other sections."""
    peer = peers.create(name)
    peer.load(models.minilm(), dict(options))
    return (lambda texts: peer.run(list(texts), {}),) * 2  # this model has no prompts: queries are texts like others


def _pair_of(embedder: Embedder, **options: Any) -> Encode:
    return (
        lambda texts: embedder.embed_documents(list(texts), **options),
        lambda texts: embedder.embed_queries(list(texts), **options),
    )


def _embedding(found: Labelled, who: str, change: str, encode: Encode) -> Row:
    began = time.perf_counter()
    documents = _unit(encode[0](list(found.documents.values())))
    queries = _unit(encode[1]([found.queries[query] for query in found.judged]))
    ranked = rank(queries @ documents.T, list(found.judged), list(found.documents))
    return {**_row("embedding", who, change, found, ranked, began), "vectors": (queries, documents)}


def rank(scores: Any, queries: Sequence[str], documents: Sequence[str], most: int = 100) -> Ranked:
    """Names of the `most` best documents of each query; scores: (queries, documents). Equal ones in the documents' order."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    names = np.array(documents)
    return {query: names[order[place]].tolist() for place, query in enumerate(queries)}


def _chunked(found: Labelled, max_length: int, *, late: bool) -> list[Row]:
    """Documents in chunks, of which the best one counts: late ones, and each embedded alone. Models read `max_length` tokens; a document
    that is longer has no late chunks, and its chunks are embedded alone in both rows."""
    spans = {name: chunk_spans(text) for name, text in found.documents.items()}
    owners = np.repeat(np.arange(len(spans)), [len(each) for each in spans.values()])

    def alone(name: str) -> list[str]:
        return [found.documents[name][start:stop] for start, stop in spans[name]]

    def row(change: str, vectors: Any, began: float) -> Row:
        ranked = rank_chunks(queries @ _unit(vectors).T, owners, found)
        return _row("embedding", "memsafe", change, found, ranked, began)

    with Embedder(models.minilm(), device="cpu", max_length=max_length) as embedder:
        queries = embedder.embed_queries([found.queries[query] for query in found.judged])
        began = time.perf_counter()
        pieces = embedder.embed_documents([piece for name in spans for piece in alone(name)])
        rows = [row("chunks, each alone", pieces, began)]
        if late:
            began, chunks, too_long = time.perf_counter(), [], 0
            for name, text in found.documents.items():
                try:
                    chunks.append(embedder.embed_chunks(text, spans[name]))
                except InputError:
                    too_long += 1
                    chunks.append(embedder.embed_documents(alone(name)))
            rows.append(row(f"late chunks ({too_long} documents too long)", np.concatenate(chunks), began))
    return rows


def rank_chunks(scores: Any, owners: Any, found: Labelled) -> Ranked:
    """As :func:`rank`, a document being as good as its best chunk. owners: place of each chunk's document, ascending."""
    best = np.maximum.reduceat(scores, np.flatnonzero(np.diff(owners, prepend=-1)), axis=1)
    return rank(best, list(found.judged), list(found.documents))


def chunk_spans(text: str, most_chars: int = 400) -> list[tuple[int, int]]:
    """(start, stop) of chunks that end where sentences do, of `most_chars` or, where a sentence is longer, that sentence."""
    ends = [match.end() for match in re.finditer(r"[.?!]\s+", text)]
    spans, start, last = [], 0, 0
    for end in [*ends, len(text)]:
        if last > start and end - start > most_chars:
            spans.append((start, last))
            start = last
        last = end
    return [*spans, (start, len(text))]


# Reranking


def _scorer(name: str, **options: Any) -> Callable[[list[tuple[str, str]]], Any]:
    """Pairs to scores, a query at a time, as the frameworks ask."""
    peer = peers.create(name)
    cut = {} if name == "llama-index-rerank" else {"max_length": PAIR_TOKENS}
    peer.load(models.demo_reranker(), {**cut, **options})

    def score(pairs: list[tuple[str, str]]) -> Any:
        found: list[float] = []
        for query in dict.fromkeys(query for query, _ in pairs):
            found += list(peer.run([list(pair) for pair in pairs if pair[0] == query], {}))
        return np.array(found)

    return score


def _reranking(some: Labelled, first: Row, who: str, change: str, score: Callable[[list[tuple[str, str]]], Any]) -> Row:
    """The first candidates of each query of `some` by the row `first`, ranked anew."""
    pairs = [(query, name) for query in some.judged for name in first["ranked"][query][:CANDIDATES]]
    began = time.perf_counter()
    scores = score([(some.queries[query], some.documents[name]) for query, name in pairs])
    scored: dict[str, list[tuple[float, str]]] = {}
    for (query, name), each in zip(pairs, np.asarray(scores).tolist(), strict=True):
        scored.setdefault(query, []).append((-each, name))
    ranked = {query: [name for _, name in sorted(found, key=lambda one: one[0])] for query, found in scored.items()}
    return _row("embedding + reranking", f"{first['who']} + {who}", change, some, ranked, began)


def _row(stage: str, who: str, change: str, found: Labelled, ranked: Ranked, began: float) -> Row:
    row = {
        "stage": stage, "who": who, "change": change, "ndcg_10": found.ndcg(ranked), "seconds": time.perf_counter() - began,
        "ranked": ranked,
    }  # fmt: skip
    print({name: value for name, value in row.items() if name != "ranked"}, flush=True)
    return row


def compared(rows: list[Row], cut: int = 10) -> list[Row]:
    """Each row with what differs from the first of its stage: nDCG@10, and the share of the first ten that are there too."""
    for stage in dict.fromkeys(row["stage"] for row in rows):
        same = [row for row in rows if row["stage"] == stage]
        exact, base = same[0]["ranked"], same[0]["ndcg_10"]
        for row in same:
            shares = [len({*exact[query][:cut]} & {*names[:cut]}) / cut for query, names in row["ranked"].items()]
            row |= {"change_of_ndcg": row["ndcg_10"] - base, "kept": sum(shares) / len(shares)}
    for row in rows:
        del row["ranked"]
        row.pop("vectors", None)
    return rows


def _unit(rows: Any) -> Any:
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
