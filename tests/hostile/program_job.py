"""Run inside a box: one job by one contender. Writes its rows to a file and prints one JSON line.

Arguments: contender, folder of the models and texts, name of the job's inputs in `jobs.json`, file for the rows.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def memsafe_embedder(folder: Path, texts: list[str]) -> Any:
    from memsafe import Embedder

    with Embedder(str(folder / "embedder"), device="cpu") as embedder:
        run = embedder.run(texts)
    print(json.dumps({"report": run.report.to_dict()}))
    return run.embeddings


def sentence_transformers(folder: Path, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder / "embedder"), device="cpu").encode(texts)


def llama_index(folder: Path, texts: list[str]) -> Any:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding(str(folder / "embedder"), device="cpu", normalize=False)
    return model.get_text_embedding_batch(texts)


def langchain(folder: Path, texts: list[str]) -> Any:
    from langchain_huggingface import HuggingFaceEmbeddings

    return HuggingFaceEmbeddings(model_name=str(folder / "embedder"), model_kwargs={"device": "cpu"}).embed_documents(
        texts
    )


def memsafe_int8(folder: Path, texts: list[str]) -> Any:
    from memsafe import Embedder

    with Embedder(str(folder / "embedder"), engine="openvino", dtype="int8") as embedder:
        run = embedder.run(texts)
    print(json.dumps({"report": run.report.to_dict()}))
    return run.embeddings


def encode_over_the_same_export(folder: Path, texts: list[str]) -> Any:
    """sentence-transformers' own encode, at its default batch size, over the export that memsafe runs."""
    from memsafe import Embedder

    return Embedder(str(folder / "embedder"), engine="openvino", dtype="int8").model.encode(texts)


def memsafe_reranker(folder: Path, pairs: list[Any]) -> Any:
    from memsafe import Reranker

    with Reranker(str(folder / "reranker"), device="cpu") as reranker:
        run = reranker.run([(query, document) for query, document in pairs])
    print(json.dumps({"report": run.report.to_dict()}))
    return run.scores


def cross_encoder(folder: Path, pairs: list[Any]) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder / "reranker"), device="cpu").predict([tuple(pair) for pair in pairs])


CONTENDERS = {
    "memsafe.Embedder": memsafe_embedder,
    "SentenceTransformer.encode": sentence_transformers,
    "llama_index HuggingFaceEmbedding": llama_index,
    "langchain HuggingFaceEmbeddings": langchain,
    "memsafe.Embedder, OpenVINO int8": memsafe_int8,
    "SentenceTransformer.encode, OpenVINO int8": encode_over_the_same_export,
    "memsafe.Reranker": memsafe_reranker,
    "CrossEncoder.predict": cross_encoder,
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    name, folder_, job, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    inputs = json.loads((folder_ / "jobs.json").read_text())[job]
    started = time.perf_counter()
    rows = CONTENDERS[name](folder_, inputs)
    seconds = time.perf_counter() - started
    np.save(out, np.asarray(rows, dtype=np.float32))
    print(json.dumps({"contender": name, "seconds": seconds}))
