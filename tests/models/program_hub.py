"""A process with a hub (HF_ENDPOINT): models of which a part is in the cache already. Prints, for each case, how far the
rows are from sentence-transformers' own."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = ["a", "the quick brown fox", "", "jumps " * 60]


def difference(ours: Any, theirs: Any) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    from huggingface_hub import hf_hub_download
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from transformers import AutoConfig, AutoTokenizer

    from memsafe import Embedder, Reranker

    quiet = {"learn": False}
    found = {}
    wanted = SentenceTransformer(str(folder / "embedder"), device="cpu").encode(TEXTS)

    AutoTokenizer.from_pretrained("org/tokenizer-first")
    found["tokenizer first"] = Embedder("org/tokenizer-first", device="cpu", memory=quiet).embed_documents(TEXTS)

    AutoConfig.from_pretrained("org/interrupted")
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--org--interrupted"
    (cache / "blobs" / f"{'a' * 64}.incomplete").write_bytes(b"half of it")
    found["interrupted"] = Embedder("org/interrupted", device="cpu", memory=quiet).embed_documents(TEXTS)

    for file in ("config.json", "modules.json", "model.safetensors"):
        hf_hub_download("org/no-tokenizer-yet", file)
    found["no tokenizer yet"] = Embedder("org/no-tokenizer-yet", device="cpu", memory=quiet).embed_documents(TEXTS)

    index = json.loads(Path(hf_hub_download("org/sharded", "model.safetensors.index.json")).read_text())
    for file in ("config.json", min(index["weight_map"].values())):
        hf_hub_download("org/sharded", file)
    found["one shard"] = Embedder("org/sharded", device="cpu", memory=quiet).embed_documents(TEXTS)

    differences = {name: difference(rows, wanted) for name, rows in found.items()}

    pairs = [("a", text) for text in TEXTS]
    AutoTokenizer.from_pretrained("org/reranker")
    scores = CrossEncoder(str(folder / "reranker"), device="cpu").predict(pairs)
    ours = Reranker("org/reranker", device="cpu", memory=quiet).score_pairs(pairs)
    differences["reranker"] = difference(ours, scores)
    print(json.dumps(differences))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
