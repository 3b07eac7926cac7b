"""int8 on a CPU: OpenVINO and ONNX Runtime behind memsafe, and behind sentence-transformers; with what is lost in ranking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, texts
from benchmarks.contenders import Contender
from benchmarks.long_documents import CANDIDATES, ndcg, read
from benchmarks.speed import Arena, Task, compare, peaks

__all__ = ["EMBED", "RERANK", "int8"]

_OURS = (
    ("OpenVINO int8", {"engine": "openvino", "dtype": "int8"}),
    ("OpenVINO bfloat16", {"engine": "openvino", "dtype": "bfloat16"}),
    ("OpenVINO float32", {"engine": "openvino"}),
    ("ONNX Runtime int8", {"engine": "onnx", "dtype": "int8"}),
)


def _among(ours: str, peer: str, what: str) -> tuple[Contender, ...]:
    few = (1, 4, 8)
    return (
        Contender("memsafe, float32", ours, ours=True),
        *(Contender(f"memsafe, {name}", ours, options=options, ours=True) for name, options in _OURS),
        Contender(f"{what}, float32", peer, default="batch 32", sweep=(8,)),
        Contender(
            f"{what}, OpenVINO int8",
            peer,
            "openvino",
            {"backend": "openvino", "model_kwargs": {"file_name": "openvino/openvino_model_int8.xml"}},
            "batch 32",
            few,
            "openvino-int8",
        ),
        Contender(
            f"{what}, ONNX int8",
            peer,
            "onnx",
            {"backend": "onnx", "model_kwargs": {"file_name": "onnx/model_qint8_avx512_vnni.onnx"}},
            "batch 32",
            few,
            "onnx-int8",
        ),
    )


EMBED = _among("memsafe", "sentence-transformers", "SentenceTransformer")
RERANK = _among("memsafe-reranker", "cross-encoder", "CrossEncoder")


def int8(
    *, folder: Path, count: int = 200, pairs: int = 100, tail: int = 60, rounds: int = 3, budget_s: float = 240.0
) -> dict[str, Any]:
    """Speed against our float32, on real texts, a heavy tail and pairs; peak memory; nDCG@10 where a labelled set is at hand."""
    tasks = (
        (EMBED, Task("real texts", "minilm", 256, texts.real(count, seed=17)), (1, 4, 8)),
        (EMBED, Task("heavy tail to 4,000 tokens", "xlmr-2x256", 8192, texts.heavy_tail(tail, seed=17)), (1, 4)),
        (
            RERANK,
            Task("one query, real documents", "minilm-cross-encoder", 512, texts.pairs(pairs, seed=17)),
            (1, 4, 8),
        ),
    )
    found, memory = [], {}
    for among, task, sweep in tasks:
        with Arena(among, task.model, folder=folder, max_length=task.max_length) as arena:
            part = max(len(task.inputs) // 3, 16)
            options = {"rounds": rounds, "budget_s": budget_s, "part": part, "sweep": sweep, "keep": 1}
            found.append(compare(arena, task, folder=folder, reference=among[len(_OURS) + 1].label, **options))
        best = {row["label"]: row for row in sorted(found[-1]["rows"], key=lambda row: row["tokens_per_s"]["median"])}
        chosen: list[tuple[Contender, dict[str, Any], str]] = [(each, {}, each.default) for each in among]
        for each in among:
            setting = best.get(each.label, {}).get("setting", each.default)
            if not each.ours and setting != each.default:
                chosen.append((each, {"batch_size": int(setting.split()[-1])}, setting))
        memory[f"{task.name}, {task.model}"] = peaks(task, chosen, folder=folder)
    return {"tasks": found, "memory": memory, "quality": quality()}


def quality(queries: int = 225, rerank_queries: int = 40) -> list[dict[str, Any]]:
    """nDCG@10 on Cranfield by all-MiniLM-L6-v2, and of the demo reranker over the first 20 of that: a small one trained for this
    project, whose figures compare dtypes and say nothing of rerankers. [] where the set is not at hand."""
    import warnings

    from examples.models import demo_reranker
    from memsafe import Embedder, Reranker

    source = texts.cranfield_folder()
    if not (source / "corpus.jsonl").exists():
        return []
    warnings.filterwarnings("ignore", message=".*longer than")
    documents, asked, judged = read(source)
    judged = dict(list(judged.items())[:queries])
    ways: list[tuple[str, dict[str, Any]]] = [
        ("float32", {}),
        ("bfloat16", {"dtype": "bfloat16"}),
        *_OURS[:2],
        ("OpenVINO int8, static scales", {**_OURS[0][1], "quantization": {"scheme": "static"}}),
        _OURS[3],
        (
            "ONNX Runtime int8, static scales",
            {**_OURS[3][1], "quantization": {"scheme": "static", "least_agreement": 0}},
        ),
    ]
    rows: list[dict[str, Any]] = []
    names, first, plain = np.array(list(documents)), dict[str, list[str]](), None
    for name, options in ways:
        with Embedder(str(models.model_path("minilm")), device="cpu", **options) as embedder:
            vectors = embedder.embed_documents(list(documents.values()))
            order = np.argsort(
                -(embedder.embed_queries([asked[each] for each in judged]) @ vectors.T), axis=1, kind="stable"
            )
            dtype, told = embedder.run(["a"]).report.dtype, embedder.path
        plain = vectors if plain is None else plain
        ranked = {query: names[order[place, :CANDIDATES]].tolist() for place, query in enumerate(judged)}
        first = first or ranked
        cosines = np.sum(vectors * plain, axis=1)  # both are of length 1
        figure = sum(ndcg(ranked[query], judged[query]) for query in judged) / len(judged)
        rows.append(
            {
                "what": "embed",
                "way": name,
                "dtype": dtype,
                "path": told,
                "ndcg_10": figure,
                "median_cosine": float(np.median(cosines)),
            }
        )
        rows[-1]["least_cosine"] = float(cosines.min())
    few = list(judged)[:rerank_queries]
    pairs = [(query, name) for query in few for name in first[query]]
    for name, options in ways:
        with Reranker(demo_reranker(), device="cpu", max_length=128, **options) as reranker:
            scores = reranker.score_pairs([(asked[query], documents[name_]) for query, name_ in pairs])
            dtype, told = reranker.run([("a", "b")]).report.dtype, reranker.path
        figure = _ndcg_of(pairs, scores.tolist(), judged, few)
        rows.append({"what": "rerank", "way": name, "dtype": dtype, "path": told, "ndcg_10": figure})
    return rows


def _ndcg_of(pairs: Sequence[tuple[str, str]], scores: Sequence[float], judged: Any, queries: Sequence[str]) -> float:
    by_query: dict[str, list[tuple[float, str]]] = {}
    for (query, name), score in zip(pairs, scores, strict=True):
        by_query.setdefault(query, []).append((-score, name))
    return sum(ndcg([name for _, name in sorted(by_query[query])], judged[query]) for query in queries) / len(queries)
