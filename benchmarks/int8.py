"""int8 on a CPU: OpenVINO and ONNX Runtime behind memsafe, and behind sentence-transformers; with what is lost in ranking.

    python -m benchmarks --sections int8                                    # as a section, each contender a process
    python -m benchmarks.int8 --out FILE [--parts speed,tail,rerank,quality]   # all in one process, by processor seconds: for a busy machine

In the second form sentence-transformers' ``encode`` and ``predict`` run over the very export that memsafe made, at several batch sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, texts
from benchmarks.contenders import Contender
from benchmarks.labelled import cranfield
from benchmarks.long_documents import CANDIDATES
from benchmarks.machine import describe
from benchmarks.speed import Arena, Task, compare, peaks

__all__ = ["EMBED", "RERANK", "in_processor_seconds", "int8", "main", "quality"]

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
    from examples.models import demo_reranker
    from memsafe import Embedder, Reranker

    found = cranfield()
    if found is None:
        return []
    warnings.filterwarnings("ignore", message=".*longer than")
    found = replace(found, judged=dict(list(found.judged.items())[:queries]))
    documents, asked, judged = found.documents, found.queries, found.judged
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
        figure = found.ndcg(ranked)
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
    few = replace(found, judged=dict(list(judged.items())[:rerank_queries]))
    pairs = [(query, name) for query in few.judged for name in first[query]]
    for name, options in ways:
        with Reranker(demo_reranker(), device="cpu", max_length=128, **options) as reranker:
            scores = reranker.score_pairs([(asked[query], documents[name_]) for query, name_ in pairs])
            dtype, told = reranker.run([("a", "b")]).report.dtype, reranker.path
        by_query: dict[str, list[tuple[float, str]]] = {}
        for (query, document), score in zip(pairs, scores.tolist(), strict=True):
            by_query.setdefault(query, []).append((-score, document))
        figure = few.ndcg({query: [document for _, document in sorted(each)] for query, each in by_query.items()})
        rows.append({"what": "rerank", "way": name, "dtype": dtype, "path": told, "ndcg_10": figure})
    return rows


# all in one process


def in_processor_seconds(
    task: Task, batches: Sequence[int], rounds: int = 3, engines: Sequence[str] = ("OpenVINO int8", "ONNX Runtime int8")
) -> dict[str, Any]:
    """Tokens per processor second of `task`, each way in turn, in rounds; torch has one thread for encode and predict, since
    threads that wait for each other would count. engines: of memsafe's ways, beside float32."""
    import torch

    from memsafe import Embedder, Reranker

    rerank = not isinstance(task.inputs[0], str)
    folder, tokens = str(models.model_path(task.model)), sum(task.lengths())
    ways: dict[str, Callable[[], Any]] = {}
    loaded: dict[str, Any] = {}
    for name, options in (("float32", {}), *(each for each in _OURS if each[0] in engines)):
        made: Any = (Reranker if rerank else Embedder)(folder, device="cpu", max_length=task.max_length, **options)
        loaded[name] = made
        ways[f"memsafe, {name}"] = lambda made=made: made.run(task.inputs, warn=False)  # type: ignore[misc]
    for name in loaded:
        model = loaded[name].model
        call = model.predict if rerank else model.encode
        for size in batches:
            ways[f"{'predict' if rerank else 'encode'}, {name}, batch {size}"] = (
                lambda call=call, size=size: call(task.inputs, batch_size=size, show_progress_bar=False)  # type: ignore[misc]
            )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    reports: dict[str, Any] = {}
    torch.set_num_threads(1)
    for turn in range(-1, rounds):  # the first one warms up, and ours looks for its sizes in it
        for name, run in ways.items():
            began = time.process_time()
            result = run()
            if turn >= 0:
                seconds[name].append(time.process_time() - began)
            if hasattr(result, "report"):
                kept = (
                    "path",
                    "dtype",
                    "micro_batches",
                    "padding_ratio",
                    "measured_peak_bytes",
                    "predicted_peak_bytes",
                    "lanes",
                )
                reports[name] = {key: value for key, value in result.report.to_dict().items() if key in kept}
        print(f"{task.name}: round {turn + 1}", file=sys.stderr, flush=True)
    base = statistics.median(seconds["memsafe, float32"])
    rows = [
        {
            "way": name,
            "seconds": each,
            "tokens_per_cpu_s": tokens / statistics.median(each),
            "times_our_float32": base / statistics.median(each),
        }
        for name, each in seconds.items()
    ]
    for made in loaded.values():
        made.close()
    return {
        "task": task.name,
        "model": task.model,
        "inputs": len(task.inputs),
        "tokens": tokens,
        "rows": rows,
        "reports": reports,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="speed,tail,rerank,quality")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default=",".join(name for name, _ in _OURS), help="beside float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32])
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*longer than")
    result = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    result["machine"] = describe()
    count, common = given.count, (given.batches, given.rounds, given.engines.split(","))
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: in_processor_seconds(Task("real texts", "minilm", 256, texts.real(count, seed=17)), *common),
        "tail": lambda: in_processor_seconds(
            Task("heavy tail", "xlmr-2x256", 8192, texts.heavy_tail(count // 3, seed=17)), *common
        ),
        "rerank": lambda: in_processor_seconds(
            Task("one query, real documents", "minilm-cross-encoder", 512, texts.pairs(count // 2, seed=17)), *common
        ),
        "quality": quality,
    }
    for name in given.parts.split(","):
        result[name] = parts[name]()
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result[name]), flush=True)


if __name__ == "__main__":
    main()
