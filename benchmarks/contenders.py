"""Who takes part, in which environment, with which settings; and who cannot, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.client import Unavailable, Worker
from benchmarks.environments import python_of

__all__ = ["EMBED", "NOT_COMPARED", "RERANK", "Contender", "start"]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEW = (1, 4, 8, 32, 128)


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    default: the setting that a user gets who sets nothing ({} leaves all to the library); None if there is no such.
    sweep: batch sizes tried to find its best.
    export: "onnx" or "openvino" where the model has to be exported first, by environment `exporter`; with "-int8" made int8 too.
    """

    label: str
    peer: str
    environment: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    default: str = "default"
    sweep: tuple[int, ...] = ()
    export: str = ""
    ours: bool = False
    takes_max_length: bool = False

    @property
    def exporter(self) -> str:
        return "onnx" if self.export.startswith("onnx") else self.environment


_F32 = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}

EMBED = (
    Contender("memsafe", "memsafe", ours=True),
    Contender("memsafe in LlamaIndex", "memsafe-llama-index", ours=True),
    Contender("memsafe in LangChain", "memsafe-langchain", ours=True),
    Contender("SentenceTransformer.encode", "sentence-transformers", default="batch 32", sweep=BATCHES),
    Contender("HuggingFaceEmbedding (LlamaIndex)", "llama-index", default="batch 10"),
    Contender("HuggingFaceEmbeddings (LangChain)", "langchain", default="batch 32"),
    Contender(
        "SentenceTransformer, ONNX", "sentence-transformers", "onnx", {"backend": "onnx"}, "batch 32", FEW, "onnx"
    ),
    Contender(
        "SentenceTransformer, OpenVINO fp32",
        "sentence-transformers",
        "openvino",
        {"backend": "openvino", "model_kwargs": _F32},
        "batch 32",
        FEW,
        "openvino",
    ),
    Contender(
        "FlagModel (FlagEmbedding)", "flag-embedding", "flag", {}, "batch 256", (4, 8, 32), takes_max_length=True
    ),
    Contender("fastembed", "fastembed", "fastembed", {}, "batch 256", (1, 4, 8, 32), "onnx", takes_max_length=True),
    Contender("Infinity engine", "infinity", "infinity", {}, "batch 32"),
)

RERANK = (
    Contender("memsafe", "memsafe-reranker", ours=True),
    Contender("CrossEncoder.predict", "cross-encoder", default="batch 32", sweep=BATCHES),
    Contender("SentenceTransformerRerank (LlamaIndex)", "llama-index-rerank", default="batch 32"),
    Contender("CrossEncoder, ONNX", "cross-encoder", "onnx", {"backend": "onnx"}, "batch 32", FEW, "onnx"),
    Contender(
        "CrossEncoder, OpenVINO fp32",
        "cross-encoder",
        "openvino",
        {"backend": "openvino", "model_kwargs": _F32},
        "batch 32",
        FEW,
        "openvino",
    ),
    Contender("FlagReranker (FlagEmbedding)", "flag-reranker", "flag", {}, "batch 128", (4, 8, 32)),
    Contender("rerankers", "rerankers", "flag", {}, "batch 16", (4, 8)),
    Contender(
        "fastembed cross-encoder",
        "fastembed-reranker",
        "fastembed",
        {},
        "batch 64",
        (1, 4, 8),
        "onnx",
        takes_max_length=True,
    ),
)

NOT_COMPARED = (
    ("text-embeddings-inference", "a server written in Rust: not installable as a Python package"),
    ("vLLM", "a server, for GPUs first of all"),
    ("FlashAttention-2, xformers, Hub kernels", "need a CUDA device or a download at run time"),
    ("Haystack, txtai", "call SentenceTransformer.encode with a fixed batch size, which is in the table"),
    (
        "LangChain's CrossEncoderReranker",
        "calls CrossEncoder.predict once with its default batch size, which is in the table",
    ),
)


def start(contender: Contender, model: str, *, folder: Path, max_length: int) -> tuple[Worker, dict[str, Any]]:
    """A loaded worker and what loading took; :class:`Unavailable` with the reason if it cannot be had."""
    if python_of(contender.environment) is None or (contender.export and python_of(contender.exporter) is None):
        missing = contender.environment if python_of(contender.environment) is None else contender.exporter
        raise Unavailable(f"environment {missing!r} is not there: python -m benchmarks.environments {missing}")
    try:
        exporter = python_of(contender.exporter)
        path = models.exported(model, contender.export, exporter) if contender.export and exporter else None
    except RuntimeError as error:
        raise Unavailable(str(error)) from None
    options = dict(contender.options)
    if contender.takes_max_length:
        options["max_length"] = max_length
    worker = Worker(contender.peer, folder=folder, environment=contender.environment)
    try:
        return worker, worker.load(path or models.model_path(model), options)
    except Unavailable:
        worker.close()
        raise
