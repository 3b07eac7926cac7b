"""What is compared: one small class per contender, each driven as its users drive it.

This file is imported in every environment, so a peer's packages are imported by :meth:`Peer.imports` only. A peer takes
a list of texts (embedding) or of [query, document] pairs (reranking) and returns rows in that order.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
from typing import Any

__all__ = ["EMBEDDERS", "RERANKERS", "Peer", "create"]


class Peer:
    """Base of all contenders."""

    modules: tuple[str, ...] = ()
    """Imported before the memory is read for the first time, so that code is not counted as the model's memory."""
    distributions: tuple[str, ...] = ("torch", "transformers", "sentence-transformers")
    """Whose versions are recorded."""

    def imports(self) -> None:
        for name in self.modules:
            importlib.import_module(name)

    def load(self, model: str, options: dict[str, Any]) -> None:
        """Load the model folder `model`; `options` are the peer's own."""
        raise NotImplementedError

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        """Rows in the order of `inputs`; `setting` holds what is varied, such as batch_size."""
        raise NotImplementedError

    def rows(self, result: Any) -> Any:
        """What :meth:`run` gave as an array of a row per input, not timed: for the checksum and the comparison."""
        return result

    def query(self, text: str) -> Any:
        """One query alone, as a service embeds it."""
        return self.run([text], {})

    def report(self) -> dict[str, Any] | None:
        """What the last run says about itself, if it says anything."""
        return None

    def versions(self) -> dict[str, str]:
        found = {}
        for name in self.distributions:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "not installed"
        return found

    def threads(self) -> dict[str, int]:
        """Threads there are for the work: cores this process may use, and torch's intra-op threads if torch is loaded."""
        import sys

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch = sys.modules.get("torch")
        return {"cores": cores, **({"torch": torch.get_num_threads()} if torch is not None else {})}


class _Reporting(Peer):
    """Ours: keeps the report of the last run for the record."""

    _last: Any = None

    def report(self) -> dict[str, Any] | None:
        if self._last is None:
            return None
        report = self._last.to_dict()
        wanted: tuple[str, ...] = (
            "path",
            "dtype",
            "micro_batches",
            "largest_micro_batch_tokens",
            "padding_ratio",
            "lanes",
        )
        wanted += ("tokens", "predicted_peak_bytes", "measured_peak_bytes", "process_peak_bytes", "weights_bytes")
        wanted += ("tokenize_s", "compute_s", "total_s", "retries", "out_of_memory", "notes")
        return {name: report[name] for name in wanted}


def _policy(options: dict[str, Any]) -> Any:
    from memsafe import MemoryPolicy

    return MemoryPolicy(**options.pop("memory", {}))


class MemsafeEmbedder(_Reporting):
    modules = ("torch", "sentence_transformers", "memsafe")
    distributions = ("memsafe", *Peer.distributions)

    def load(self, model: str, options: dict[str, Any]) -> None:
        from memsafe import Embedder

        options = dict(options)
        self.embedder = Embedder(model, memory=_policy(options), **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        run = self.embedder.run(inputs, kind="document", **setting)
        self._last = run.report
        return run.embeddings

    def query(self, text: str) -> Any:
        return self.embedder.embed_queries([text])


class MemsafeLlamaIndex(Peer):
    modules = ("torch", "sentence_transformers", "llama_index_memsafe")
    distributions = ("memsafe", "llama-index-core", *Peer.distributions)

    def load(self, model: str, options: dict[str, Any]) -> None:
        from llama_index_memsafe import MemsafeEmbedding

        self.embedding = MemsafeEmbedding(model_name=model, **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.embedding.get_text_embedding_batch(inputs)

    def query(self, text: str) -> Any:
        return self.embedding.get_query_embedding(text)


class MemsafeLangChain(Peer):
    modules = ("torch", "sentence_transformers", "langchain_memsafe")
    distributions = ("memsafe", "langchain-core", *Peer.distributions)

    def load(self, model: str, options: dict[str, Any]) -> None:
        from langchain_memsafe import MemsafeEmbeddings

        self.embeddings = MemsafeEmbeddings(model_name=model, **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.embeddings.embed_documents(inputs)

    def query(self, text: str) -> Any:
        return self.embeddings.embed_query(text)


class SentenceTransformerPeer(Peer):
    """sentence-transformers; its ONNX and OpenVINO backends too, through ``backend`` and ``model_kwargs``."""

    modules = ("torch", "sentence_transformers")
    distributions = (*Peer.distributions, "optimum-onnx", "onnxruntime", "optimum-intel", "openvino")

    def load(self, model: str, options: dict[str, Any]) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(model, **{"device": "cpu", **options})

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.model.encode(inputs, show_progress_bar=False, **setting)


class LlamaIndexPeer(Peer):
    modules = ("torch", "sentence_transformers", "llama_index.embeddings.huggingface")
    distributions = (*Peer.distributions, "llama-index-core", "llama-index-embeddings-huggingface")

    def load(self, model: str, options: dict[str, Any]) -> None:
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding

        self.embedding = HuggingFaceEmbedding(model_name=model, **{"device": "cpu", **options})

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.embedding.get_text_embedding_batch(inputs, **setting)

    def query(self, text: str) -> Any:
        return self.embedding.get_query_embedding(text)


class LangChainPeer(Peer):
    modules = ("torch", "sentence_transformers", "langchain_huggingface")
    distributions = (*Peer.distributions, "langchain-core", "langchain-huggingface")

    def load(self, model: str, options: dict[str, Any]) -> None:
        from langchain_huggingface import HuggingFaceEmbeddings

        self.embeddings = HuggingFaceEmbeddings(model_name=model, **{"model_kwargs": {"device": "cpu"}, **options})

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.embeddings.embed_documents(inputs)

    def query(self, text: str) -> Any:
        return self.embeddings.embed_query(text)


class FlagModelPeer(Peer):
    modules = ("torch", "FlagEmbedding")
    distributions = ("FlagEmbedding", "torch", "transformers")

    def load(self, model: str, options: dict[str, Any]) -> None:
        from FlagEmbedding import FlagModel

        # Mean pooling and normalising are what the model's own modules say; fp32 as everyone else here.
        fixed = {"pooling_method": "mean", "normalize_embeddings": True, "use_fp16": False, "devices": "cpu"}
        options = dict(options)
        fixed["passage_max_length"] = options.pop("max_length")
        self.model = FlagModel(model, **{**fixed, **options})

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.model.encode(inputs, **setting)


class FastEmbedPeer(Peer):
    modules = ("fastembed",)
    distributions = ("fastembed", "onnxruntime")

    def load(self, model: str, options: dict[str, Any]) -> None:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        TextEmbedding.add_custom_model(
            model="benchmark/local",
            pooling=PoolingType.MEAN,
            normalization=True,
            sources=ModelSource(hf="benchmark/local"),
            dim=options.get("dimension", 384),
            model_file="onnx/model.onnx",
        )
        self.model = TextEmbedding("benchmark/local", specific_model_path=model)
        # It would cut at what tokenizer_config.json says; everyone here cuts where the model's own settings do.
        self.model.model.tokenizer.enable_truncation(max_length=options["max_length"])

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return list(self.model.embed(inputs, **setting))


class InfinityPeer(Peer):
    """Infinity's engine inside the process, without its web server."""

    modules = ("torch", "infinity_emb")
    distributions = ("infinity-emb", "torch", "transformers", "sentence-transformers", "optimum", "onnxruntime")

    def load(self, model: str, options: dict[str, Any]) -> None:
        import asyncio

        from infinity_emb import AsyncEmbeddingEngine, EngineArgs

        fixed = {"device": "cpu", "engine": "torch", "dtype": "float32", "model_warmup": False, "compile": False}
        self.loop = asyncio.new_event_loop()
        args = EngineArgs(model_name_or_path=model, **{**fixed, **options})
        self.engine = AsyncEmbeddingEngine.from_args(args)
        self.loop.run_until_complete(self.engine.astart())

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        embeddings, _usage = self.loop.run_until_complete(self.engine.embed(sentences=inputs))
        return embeddings


class MemsafeReranker(_Reporting):
    modules = ("torch", "sentence_transformers", "memsafe")
    distributions = ("memsafe", *Peer.distributions)

    def load(self, model: str, options: dict[str, Any]) -> None:
        from memsafe import Reranker

        options = dict(options)
        self.reranker = Reranker(model, memory=_policy(options), **options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        run = self.reranker.run([tuple(pair) for pair in inputs], **setting)
        self._last = run.report
        return run.scores


class CrossEncoderPeer(Peer):
    modules = ("torch", "sentence_transformers")
    distributions = SentenceTransformerPeer.distributions

    def load(self, model: str, options: dict[str, Any]) -> None:
        from sentence_transformers import CrossEncoder

        self.model = CrossEncoder(model, **{"device": "cpu", **options})

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.model.predict([tuple(pair) for pair in inputs], show_progress_bar=False, **setting)


class LlamaIndexRerankPeer(Peer):
    """SentenceTransformerRerank over all documents of one query; the scores are put back into the callers' order."""

    modules = ("torch", "sentence_transformers", "llama_index.postprocessor.sbert_rerank")
    distributions = (*Peer.distributions, "llama-index-core", "llama-index-postprocessor-sbert-rerank")

    def load(self, model: str, options: dict[str, Any]) -> None:
        from llama_index.postprocessor.sbert_rerank import SentenceTransformerRerank

        self.rerank = SentenceTransformerRerank(model=model, top_n=1_000_000, **{"device": "cpu", **options})

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        from llama_index.core.schema import NodeWithScore, TextNode

        nodes = [NodeWithScore(node=TextNode(text=text, id_=str(row))) for row, (_, text) in enumerate(inputs)]
        ranked = self.rerank.postprocess_nodes(nodes, query_str=inputs[0][0])
        scores = {int(found.node.node_id): found.score for found in ranked}
        return [scores[row] for row in range(len(inputs))]


class FlagRerankerPeer(Peer):
    modules = ("torch", "FlagEmbedding")
    distributions = FlagModelPeer.distributions

    def load(self, model: str, options: dict[str, Any]) -> None:
        from FlagEmbedding import FlagReranker

        # normalize=True is the sigmoid that CrossEncoder applies to a single label.
        fixed = {"use_fp16": False, "devices": "cpu", "normalize": True}
        self.model = FlagReranker(model, **{**fixed, **options})

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        return self.model.compute_score([list(pair) for pair in inputs], **setting)


class RerankersPeer(Peer):
    modules = ("torch", "rerankers")
    distributions = ("rerankers", "torch", "transformers")

    def load(self, model: str, options: dict[str, Any]) -> None:
        from rerankers import Reranker

        self.model = Reranker(model, model_type="cross-encoder", device="cpu", verbose=0, **options)
        if self.model is None:
            raise RuntimeError("rerankers could not load the model")

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        batch = {} if not setting else {"batch_size": setting["batch_size"]}
        ranked = self.model.rank(inputs[0][0], [text for _, text in inputs], **batch)
        scores = {found.doc_id: found.score for found in ranked.results}
        # It gives logits; everyone else here applies the sigmoid of a single label.
        return [1 / (1 + math.exp(-scores[row])) for row in range(len(inputs))]


class FastEmbedRerankerPeer(Peer):
    modules = ("fastembed",)
    distributions = FastEmbedPeer.distributions

    def load(self, model: str, options: dict[str, Any]) -> None:
        from fastembed.common.model_description import ModelSource
        from fastembed.rerank.cross_encoder import TextCrossEncoder

        name = "benchmark/local-reranker"
        TextCrossEncoder.add_custom_model(model=name, sources=ModelSource(hf=name), model_file="onnx/model.onnx")
        self.model = TextCrossEncoder(name, specific_model_path=model)
        self.model.model.tokenizer.enable_truncation(max_length=options["max_length"])

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        scores = self.model.rerank_pairs([tuple(pair) for pair in inputs], **setting)
        return [1 / (1 + math.exp(-score)) for score in scores]  # it gives logits


EMBEDDERS: dict[str, type[Peer]] = {
    "memsafe": MemsafeEmbedder,
    "memsafe-llama-index": MemsafeLlamaIndex,
    "memsafe-langchain": MemsafeLangChain,
    "sentence-transformers": SentenceTransformerPeer,
    "llama-index": LlamaIndexPeer,
    "langchain": LangChainPeer,
    "flag-embedding": FlagModelPeer,
    "fastembed": FastEmbedPeer,
    "infinity": InfinityPeer,
}
RERANKERS: dict[str, type[Peer]] = {
    "memsafe-reranker": MemsafeReranker,
    "cross-encoder": CrossEncoderPeer,
    "llama-index-rerank": LlamaIndexRerankPeer,
    "flag-reranker": FlagRerankerPeer,
    "rerankers": RerankersPeer,
    "fastembed-reranker": FastEmbedRerankerPeer,
}


def create(name: str) -> Peer:
    """The contender called `name`; "roofline", "concurrency:NAME" and others are the measurements of this suite."""
    if name in EMBEDDERS:
        return EMBEDDERS[name]()
    if name in RERANKERS:
        return RERANKERS[name]()
    kind, _, rest = name.partition(":")
    if kind == "outputs":
        from benchmarks.outputs_peers import OUTPUTS

        return OUTPUTS[rest]()
    if kind == "roofline":
        from benchmarks.roofline import Roofline

        return Roofline()
    if kind == "concurrency":
        from benchmarks.concurrency_peer import Concurrent

        return Concurrent(create(rest))
    if kind == "prediction":
        from benchmarks.prediction_peer import Prediction

        return Prediction()
    if kind == "overhead":
        from benchmarks.overhead_peer import Overhead

        return Overhead()
    raise ValueError(f"no contender is called {name!r}")
