"""Contenders for the other outputs: rows of word weights, a vector for every token, and BGE-M3's three of one pass.

A row of any kind is compared as 64 numbers: word weights through a fixed random projection, token vectors by their sum, and of the
three outputs both beside the dense row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.peers import FlagModelPeer, Peer, SentenceTransformerPeer, _policy, _Reporting

__all__ = ["OUTPUTS"]


@lru_cache(maxsize=1)
def _projection(words: int) -> Any:
    return np.random.default_rng(0).normal(size=(words, 64)).astype(np.float32)


def _sums(rows: Any) -> Any:
    return np.stack([np.asarray(row, dtype=np.float32).sum(axis=0) for row in rows])


class _Memsafe(_Reporting):
    modules = ("torch", "sentence_transformers", "memsafe")
    distributions = ("memsafe", *Peer.distributions)
    kind = ""

    def load(self, model: str, options: dict[str, Any]) -> None:
        import memsafe

        options = dict(options)
        self.embedder = getattr(memsafe, self.kind)(model, device="cpu", memory=_policy(options), **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        self._last = (found := self.embedder.run(inputs, kind="document")).report
        return found


class MemsafeSparse(_Memsafe):
    kind = "SparseEmbedder"

    def rows(self, result: Any) -> Any:
        return result.embeddings @ _projection(result.embeddings.shape[1])


class MemsafeMultiVector(_Memsafe):
    kind = "MultiVectorEmbedder"

    def rows(self, result: Any) -> Any:
        return _sums(result.embeddings)


class MemsafeHybrid(_Memsafe):
    kind = "HybridEmbedder"

    def rows(self, result: Any) -> Any:
        words = result.sparse @ _projection(result.sparse.shape[1])
        return np.concatenate([result.dense, words, _sums(result.multi_vector)], axis=1)


class SparseEncoderPeer(SentenceTransformerPeer):
    """sentence-transformers' SparseEncoder. Its default, 32, would take 32 GB for the longest 32 texts' words: 1 is used instead."""

    def load(self, model: str, options: dict[str, Any]) -> None:
        from sentence_transformers import SparseEncoder

        self.model = SparseEncoder(model, device="cpu", **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.model.encode_document(inputs, show_progress_bar=False, **{"batch_size": 1, **setting})

    def rows(self, result: Any) -> Any:
        import scipy.sparse

        found = result.coalesce()
        matrix = scipy.sparse.coo_array((found.values().numpy(), found.indices().numpy()), shape=tuple(found.shape))
        return matrix.tocsr() @ _projection(matrix.shape[1])


class MultiVectorEncoderPeer(SentenceTransformerPeer):
    def load(self, model: str, options: dict[str, Any]) -> None:
        from sentence_transformers import MultiVectorEncoder

        self.model = MultiVectorEncoder(model, device="cpu", **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.model.encode_document(inputs, show_progress_bar=False, **setting)

    def rows(self, result: Any) -> Any:
        return _sums(result)


class PyLatePeer(Peer):
    modules = ("torch", "pylate.models")
    distributions = ("pylate", *Peer.distributions)

    def load(self, model: str, options: dict[str, Any]) -> None:
        from pylate import models

        self.model = models.ColBERT(model, device="cpu", **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.model.encode(inputs, is_query=False, show_progress_bar=False, **setting)

    def rows(self, result: Any) -> Any:
        return _sums(result)


class FlagM3Peer(Peer):
    """FlagEmbedding's BGEM3FlagModel, all three outputs, in float32 as everyone here."""

    modules = ("torch", "FlagEmbedding")
    distributions = FlagModelPeer.distributions

    def load(self, model: str, options: dict[str, Any]) -> None:
        from FlagEmbedding import BGEM3FlagModel

        options = dict(options)
        self.max_length = options.pop("max_length")
        self.model = BGEM3FlagModel(model, use_fp16=False, devices=["cpu"], **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        wanted = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
        return self.model.encode(inputs, max_length=self.max_length, **wanted, **setting)

    def rows(self, result: Any) -> Any:
        weights = np.zeros((len(result["lexical_weights"]), len(self.model.tokenizer)), np.float32)
        for row, found in zip(weights, result["lexical_weights"], strict=True):
            for token, weight in found.items():
                row[int(token)] = weight
        return np.concatenate(
            [result["dense_vecs"], weights @ _projection(weights.shape[1]), _sums(result["colbert_vecs"])], axis=1
        )


OUTPUTS: dict[str, type[Peer]] = {
    "memsafe-sparse": MemsafeSparse,
    "memsafe-multi-vector": MemsafeMultiVector,
    "memsafe-hybrid": MemsafeHybrid,
    "sparse-encoder": SparseEncoderPeer,
    "multi-vector-encoder": MultiVectorEncoderPeer,
    "pylate": PyLatePeer,
    "flag-m3": FlagM3Peer,
}
