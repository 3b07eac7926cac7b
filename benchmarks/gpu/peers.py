"""What is replaced: the peers over one copy of the weights, and the search for their best batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu.common import Row, Setting, attempt
from benchmarks.gpu.models import Workload

__all__ = ["DEFAULT", "NAMES", "Peer", "next_size", "next_that_may_survive", "peers", "run_peer"]

Peer = Callable[[Workload, int | None], Any]
"""Runs a workload at a batch size, None for its default. LookupError: it has no batch size."""

NAMES = {
    False: ("SentenceTransformer.encode", "HuggingFaceEmbedding"),
    True: ("CrossEncoder.predict", "SentenceTransformerRerank"),
}
"""For texts, and for pairs: the library itself, then the one that calls it."""
DEFAULT = 32
"""The default of `encode` and `predict`."""
LARGEST = 1024
CLEARLY_WORSE = 0.95
"""A size is clearly worse below this share of the best; larger ones are then not tried. One run each: noise was 2 to 3 %."""


def peers(setting: Setting, st: Any, pairs: bool) -> dict[str, Peer | str]:
    """By name; a text says why one cannot run here."""
    if pairs:

        def predict(load: Workload, batch_size: int | None) -> Any:
            return st.predict(load.inputs, show_progress_bar=False, **_size("batch_size", batch_size))

        return dict(zip(NAMES[True], (predict, _llama_rerank(st)), strict=True))

    def encode(load: Workload, batch_size: int | None) -> Any:
        return st.encode(load.documents, show_progress_bar=False, **_size("batch_size", batch_size))

    return dict(zip(NAMES[False], (encode, _llama_embed(setting, st)), strict=True))


def _size(name: str, batch_size: int | None) -> dict[str, int]:
    return {} if batch_size is None else {name: batch_size}


def _llama_embed(setting: Setting, st: Any) -> Peer | str:
    try:
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding, base
    except ImportError as error:
        return f"skipped: {error}"

    def loaded(*_args: Any, prompts: Any = None, **_options: Any) -> Any:
        st.prompts = {**st.prompts, **(prompts or {})}  # one copy of the weights serves all
        return st

    def run_it(load: Workload, batch_size: int | None) -> Any:
        original = base.SentenceTransformer
        vars(base)["SentenceTransformer"] = loaded
        try:
            size = _size("embed_batch_size", batch_size)
            peer = HuggingFaceEmbedding(model_name="the-loaded-model", device=setting.device, **size)
        finally:
            vars(base)["SentenceTransformer"] = original
        return peer.get_text_embedding_batch(load.documents)

    return run_it


def _llama_rerank(st: Any) -> Peer | str:
    try:
        import sentence_transformers
        from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
        from llama_index.postprocessor.sbert_rerank import SentenceTransformerRerank
    except ImportError as error:
        return f"skipped: {error}"

    def run_it(load: Workload, batch_size: int | None) -> Any:
        if batch_size is not None:
            raise LookupError("it has no batch size")
        original = sentence_transformers.CrossEncoder
        vars(sentence_transformers)["CrossEncoder"] = lambda *args, **kwargs: st
        try:
            peer = SentenceTransformerRerank(model="the-loaded-model", top_n=len(load.documents))
        finally:
            vars(sentence_transformers)["CrossEncoder"] = original
        nodes = [NodeWithScore(node=TextNode(text=document), score=0.0) for document in load.documents]
        return peer.postprocess_nodes(nodes, QueryBundle(load.query or ""))

    return run_it


def next_size(tried: Mapping[int, float | None], start: int = DEFAULT) -> int | None:
    """The batch size to try next, None for enough: doubled from `start` until clearly worse, halved if that did not help.

    tried: size -> tokens/s, None if it did not survive. A curve with one maximum is taken for granted, as all on record have.
    """
    if start not in tried:
        return start
    alive = {size: rate for size, rate in tried.items() if rate is not None}
    smallest, largest = min(tried), max(tried)
    if not alive:
        return smallest // 2 or None
    best = max(alive, key=alive.__getitem__)
    enough = CLEARLY_WORSE * alive[best]
    if start in alive and alive.get(largest, 0.0) >= enough and 2 * largest <= LARGEST:
        return 2 * largest
    if best > start or alive.get(smallest, 0.0) < enough:
        return None
    return smallest // 2 or None


def next_that_may_survive(tried: Mapping[int, bool], start: int = DEFAULT) -> int | None:
    """On the way to the largest batch size that survives: doubled from `start` until one fails, or halved until one does not."""
    if start not in tried:
        return start
    smallest, largest = min(tried), max(tried)
    if tried[start]:
        return 2 * largest if tried[largest] and 2 * largest <= LARGEST else None
    return None if tried[smallest] else smallest // 2 or None


def run_peer(setting: Setting, peer: Peer, load: Workload, batch_size: int | None) -> Row:
    """The row of one run of a peer."""
    row, _ = attempt(setting, lambda: peer(load, batch_size), load.tokens)
    return {"batch_size": batch_size or "default", "texts": len(load.counts), **row}
