"""2. The two articles' cases under a T4's memory, ours and the peers, alone and beside a neighbour."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu import inside
from benchmarks.gpu.common import (
    CONTEXT_BYTES,
    T4_BYTES,
    GiB,
    Row,
    Setting,
    attempt,
    cap_to,
    free_memory,
    isolated,
    lengths,
    load,
    texts,
)
from benchmarks.gpu.neighbour import Neighbour

__all__ = ["run"]

CASES = (
    ("bge-m3", 6000, "float32"),
    ("bge-m3", 6000, "float16"),
    ("gte-reranker", 1500, "float32"),
    ("gte-reranker", 10000, "float16"),
    ("gte-reranker", 1500, "float16"),
    ("gte-reranker", 10000, "float32"),
)
NEIGHBOUR_BYTES = 9 * GiB
"""What other processes held in michaelfeil/infinity#370, from the figures in its error message."""
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def run(setting: Setting) -> Iterator[Row]:
    """Alone first, then beside the neighbour: a process each."""
    cases = setting.pick(CASES, (("bge-m3", 12, "float32"), ("gte-reranker", 8, "float32")))
    for beside in (False, True):
        for place, (model, count, dtype) in enumerate(cases):
            share = setting.left() / max((2 * len(cases) - beside * len(cases) - place), 1)
            until = setting.until if setting.dry else min(setting.until, time.time() + 2 * share)
            shorter = Setting(setting.dry, setting.models, until, setting.device)
            yield from isolated(shorter, "articles:case", model=model, count=count, dtype=dtype, beside=beside)


def case(setting: Setting, model: str, count: int, dtype: str, beside: bool) -> Iterator[Row]:
    """Ours, then every peer at its default and at the largest batch size that survives, as time allows."""
    pairs = model == "gte-reranker"
    counts = lengths(count, 7, longest=setting.pick(8192, 80), median=setting.pick(200, 20))
    head: Row = {"what": f"{count} x {model}", "dtype": dtype, "neighbour": beside, "tokens": sum(counts)}
    documents = texts([max(n - 10, 3) for n in counts] if pairs else counts, 8)
    query = texts([9], 9)[0]
    began = time.perf_counter()
    try:
        st = load(setting, model, dtype)
    except LookupError as error:
        yield {**head, "outcome": f"skipped: {error}"}
        return
    free_memory(setting)
    head["load_s"] = round(time.perf_counter() - began, 1)

    def other() -> Neighbour:
        """A neighbour that leaves a T4's memory, less 9 GB, of this card; then a whole T4's once it gives them back."""
        if setting.dry or not beside:
            return Neighbour(True, 0, 0)
        import torch

        free, _ = torch.cuda.mem_get_info()
        ours = torch.cuda.memory_reserved() + CONTEXT_BYTES
        # What we hold and the two contexts belong to the T4's memory as well; the rest of a larger card is filled.
        return Neighbour(False, free + ours - T4_BYTES, NEIGHBOUR_BYTES - CONTEXT_BYTES)

    with inside.t4_kernels(setting.dry):
        head.update(cap_to(setting, T4_BYTES))
        with other() as neighbour:
            row = _ours(setting, st, pairs, query, documents, sum(counts), neighbour)
        yield {**head, "who": "memsafe", "neighbour_said": neighbour.said, **row}
        rate = row.get("tokens_per_s") or 1.0
        half = row["seconds"] / 2
        order = sorted(range(count), key=lambda i: counts[i], reverse=True)
        for who, run_it in _peers(setting, st, pairs, query, model, dtype).items():
            if isinstance(run_it, str):
                yield {**head, "who": who, "outcome": run_it}
                continue
            best = _survives(setting, run_it, [documents[i] for i in order], other, counts, order)
            for chosen in (None,) if best is None else (None, best):
                # A peer that would not end in time gets every n-th text; whether it survives its longest is known by then.
                step = 1
                while not setting.dry and sum(counts[::step]) / rate * 4 > setting.left() - 10 and step < count:
                    step *= 2
                some, tokens = documents[::step], sum(counts[::step])
                if chosen is None and step > 1:  # the longest first, as a whole run would have met them
                    some = [documents[i] for i in order[: max(64, len(some))]]
                    tokens = sum(counts[i] for i in order[: len(some)])
                if setting.left() < 15 and not setting.dry:
                    yield {**head, "who": who, "batch_size": chosen or "default", "outcome": "not run: out of time"}
                    continue
                with other() as neighbour:
                    timer = threading.Timer(half, neighbour.release)
                    timer.start()
                    row, _ = attempt(setting, lambda f=run_it, s=some, c=chosen: f(s, c), tokens)  # type: ignore[misc]
                    timer.cancel()
                yield {**head, "who": who, "batch_size": chosen or "default", "texts": len(some), **row}


def _ours(
    setting: Setting, st: Any, pairs: bool, query: str, documents: list[str], tokens: int, neighbour: Neighbour
) -> Row:
    import numpy as np

    from memsafe import Embedder, MemoryPolicy, Reranker

    state = {"done": 0, "released": False}

    def progress(finished: int) -> None:
        state["done"] += finished
        if not state["released"] and state["done"] >= len(documents) // 2:
            state["released"] = True
            neighbour.release()

    model = (Reranker if pairs else Embedder)(st, memory=MemoryPolicy(learn=False))
    inputs: Any = [(query, document) for document in documents] if pairs else documents
    try:
        row, result = attempt(setting, lambda: model.run(inputs, progress=progress), tokens)
    finally:
        model.close()
    if result is None:
        return row
    rows = result.scores if pairs else result.embeddings
    report = result.report.to_dict()
    kept = "path out_of_memory retries splits shrinks grows fallbacks waited_s non_finite_rows micro_batches".split()
    kept += "largest_micro_batch_tokens measured_peak_bytes predicted_peak_bytes truncated".split()
    if len(rows) != len(documents) or not bool(np.isfinite(rows).all()):
        row["outcome"] = "WRONG: rows are missing or not numbers"
    return {**row, **{name: report[name] for name in kept}}


def _peers(
    setting: Setting, st: Any, pairs: bool, query: str, model: str, dtype: str
) -> dict[str, Callable[[list[str], int | None], Any] | str]:
    """Callables of (documents, batch size or None for the default); a text says why one cannot run."""
    if pairs:

        def predict(documents: list[str], batch_size: int | None) -> Any:
            size = {} if batch_size is None else {"batch_size": batch_size}
            return st.predict([(query, document) for document in documents], show_progress_bar=False, **size)

        return {"CrossEncoder.predict": predict, "SentenceTransformerRerank": _llama_rerank(st, query)}

    def encode(documents: list[str], batch_size: int | None) -> Any:
        size = {} if batch_size is None else {"batch_size": batch_size}
        return st.encode(documents, show_progress_bar=False, **size)

    return {"SentenceTransformer.encode": encode, "HuggingFaceEmbedding": _llama_embed(setting, st)}


def _llama_embed(setting: Setting, st: Any) -> Any:
    try:
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding, base
    except ImportError as error:
        return f"skipped: {error}"

    def loaded(*_args: Any, prompts: Any = None, **_options: Any) -> Any:
        st.prompts = {**st.prompts, **(prompts or {})}  # one copy of the weights serves all
        return st

    def run_it(documents: list[str], batch_size: int | None) -> Any:
        original = base.SentenceTransformer
        vars(base)["SentenceTransformer"] = loaded
        try:
            size = {} if batch_size is None else {"embed_batch_size": batch_size}
            peer = HuggingFaceEmbedding(model_name="the-loaded-model", device=setting.device, **size)
        finally:
            vars(base)["SentenceTransformer"] = original
        return peer.get_text_embedding_batch(documents)

    return run_it


def _llama_rerank(st: Any, query: str) -> Any:
    try:
        import sentence_transformers
        from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
        from llama_index.postprocessor.sbert_rerank import SentenceTransformerRerank
    except ImportError as error:
        return f"skipped: {error}"

    def run_it(documents: list[str], batch_size: int | None) -> Any:
        if batch_size is not None:
            raise LookupError("it has no batch size")
        original = sentence_transformers.CrossEncoder
        vars(sentence_transformers)["CrossEncoder"] = lambda *args, **kwargs: st
        try:
            peer = SentenceTransformerRerank(model="the-loaded-model", top_n=len(documents))
        finally:
            vars(sentence_transformers)["CrossEncoder"] = original
        nodes = [NodeWithScore(node=TextNode(text=document), score=0.0) for document in documents]
        return peer.postprocess_nodes(nodes, QueryBundle(query))

    return run_it


def _survives(
    setting: Setting, run_it: Any, longest_first: list[str], other: Any, counts: list[int], order: list[int]
) -> int | None:
    """The largest batch size that survives the batch of the longest texts; None if none does, or it has no batch size."""
    best = None
    with other():
        for size in setting.pick(BATCH_SIZES, (2, 4)):
            if setting.left() < 30 and not setting.dry:
                break
            tokens = sum(counts[i] for i in order[:size])
            try:
                row, _ = attempt(setting, lambda s=size: run_it(longest_first[:s], s), tokens)  # type: ignore[misc]
            except LookupError:
                return None
            if row["outcome"] != "finished":
                break
            best = size
    return best
