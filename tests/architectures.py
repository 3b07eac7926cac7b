"""Every architecture of text that transformers' auto classes can build small, and which way memsafe takes for it.

``python -m tests.architectures [NAME ...]`` writes docs/architectures.md, or some rows of it; tests/models/test_architectures.py checks it.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tests import tiny_models as models

DOCUMENT = Path(__file__).parent.parent / "docs" / "architectures.md"
TEXTS = [
    "[PAD] [PAD] a b [SEP] [MASK] c",
    "the river runs past nine old mills",
    "mills old nine past runs river the",
    "ends in [PAD]",
    "a",
    "",
    "the red bridge before it meets a wide grey sea " * 7,
]
PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[0]), (TEXTS[1], TEXTS[2]), ("a", "[PAD]"), ("a", ""), ("b", TEXTS[6])]
_SIZES: dict[int | float, tuple[str, ...]] = {
    32: ("hidden_size", "d_model", "dim", "n_embd", "emb_dim", "word_embed_proj_dim", "attention_hidden_size"),
    2: (
        "num_hidden_layers",
        "n_layer",
        "num_layers",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_key_value_heads",
    ),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    64: (
        "intermediate_size",
        "d_ff",
        "ffn_dim",
        "hidden_dim",
        "n_inner",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "ffn_hidden_size",
        "shared_expert_intermediate_size",
    ),
    16: ("embedding_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "sliding_window", "local_attention"),
    8: ("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "num_experts", "num_local_experts", "n_routed_experts"),
    512: ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    1: ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"),
    0: ("pad_token_id", "dropout", "attention_dropout", "resid_pdrop", "num_nextn_predict_layers"),
    0.15: ("initializer_range", "init_std", "initializer_factor"),
    30522: ("vocab_size",),
    102: ("eos_token_id", "sep_token_id"),
    101: ("bos_token_id", "cls_token_id"),
}
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"qk_rope_head_dim": 8},
    "deepseek_v3": {"qk_rope_head_dim": 8},
    "modernbert": {"global_attn_every_n_layers": 2},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8, "d_inner": 64},
    "xlnet": {"d_inner": 64, "d_head": 8},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "qwen3_moe": {"num_experts_per_tok": 2},
}


@dataclass(frozen=True)
class Outcome:
    """path: the way taken, or why there is none. difference: of rows, relative to the model's own; None without rows."""

    path: str
    difference: float | None


def names() -> list[str]:
    """Architectures that transformers knows by a name of their own."""
    return sorted(name for name in MODEL_MAPPING_NAMES if name in CONFIG_MAPPING_NAMES)


def config_of(name: str) -> PretrainedConfig:
    """A small configuration; whatever its class raises passes through."""
    given = vars(AutoConfig.for_model(name))
    known = {*given, *inspect.signature(type(AutoConfig.for_model(name)).__init__).parameters}
    known |= set(getattr(AutoConfig.for_model(name), "attribute_map", {}))
    sizes = {each: size for size, group in _SIZES.items() for each in group if each in known}
    return AutoConfig.for_model(name, **{**sizes, **_OWN.get(name, {})})


def model_of(name: str, kind: str) -> PreTrainedModel | None:
    """A small model with random weights that takes token ids and gives hidden states of them; None for any other."""
    if kind == "reranker" and name not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return None
    try:
        config = config_of(name)
        if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
            return None
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
        if size > 20_000_000:
            return None
        torch.manual_seed(0)
        if kind == "reranker":
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config)
        else:  # sentence-transformers takes the encoder alone of T5 and its kin
            own = MODEL_MAPPING_NAMES[name]
            encoder = (
                getattr(transformers, own.removesuffix("Model") + "EncoderModel", None)
                if isinstance(own, str)
                else None
            )
            model = AutoModel.from_config(config) if encoder is None else encoder(config)
        model = model.eval().float()
        with torch.inference_mode():
            base = model.base_model if kind == "reranker" else model
            states = base(input_ids=torch.tensor([[101, 7592, 2088, 2003, 102]])).last_hidden_state
    except Exception:  # it needs more than ids, or sizes that fit each other in a way of its own
        return None
    if states.ndim != 3 or states.shape[:2] != (1, 5) or not bool(states.isfinite().all()):
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def outcome(name: str, kind: str, *, token_types: bool, left: bool) -> Outcome | None:
    """What memsafe does with this architecture; None if sentence-transformers itself cannot run it."""
    model = model_of(name, kind)
    if model is None:
        return None
    with tempfile.TemporaryDirectory() as path, _quiet():
        folder = Path(path)
        try:
            theirs, loaded = _load(folder, kind, model, token_types=token_types, left=left)
            inputs: Any = PAIRS if kind == "reranker" else TEXTS
            wanted = models.own_rows(theirs, inputs)
        except Exception as error:
            if "memsafe" in str(type(error)):
                return Outcome(f"refused ({error})", None)
            return None
        if not np.isfinite(wanted).all():
            return None
        from memsafe.models.probes import Call

        rows = loaded.routes.rows_of(inputs, Call()).numpy()
        norm = np.linalg.norm(wanted, axis=1)
        difference = np.linalg.norm(rows - wanted, axis=1) / np.maximum(norm, 1.0 if wanted.shape[1] < 16 else 1e-9)
        return Outcome(loaded.path, float(difference.max()))


def _load(folder: Path, kind: str, model: PreTrainedModel, *, token_types: bool, left: bool) -> tuple[Any, Any]:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    model.save_pretrained(folder)
    models.save_tokenizer(folder, max_length=64, padding_side="left" if left else "right", token_types=token_types)
    if kind == "reranker":
        theirs: Any = CrossEncoder(str(folder), device="cpu")
    else:
        transformer = models.st_modules().Transformer(str(folder))
        theirs = SentenceTransformer(
            modules=[transformer, models.st_modules().Pooling(model.config.get_text_config().hidden_size)], device="cpu"
        )
    return theirs, models.loaded(theirs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# -- the document ----------------------------------------------------------------------------------------------------

_HEAD = """# Which way each architecture takes

Found by the self-check, with small models of random weights, the tokenizer of all-MiniLM-L6-v2 (with token types), texts
with special tokens written in them, empty and long ones; rows equal the model's own `encode` or `predict` to 1e-5 wherever
a way is named. transformers {version}; other versions may take other ways, since the check is made anew at each load.

*packed*: without padding. *padded*: in batches, with the reason. *alone*: one input at a time. "-": transformers has no such
class, or a small one cannot be made and run by sentence-transformers from token ids alone. Written by
`python -m tests.architectures`.

| architecture | `Embedder` | `Reranker` |
|---|---|---|
"""


_TAIL = """
## What the padded ones would need

- *The encoder takes no position_ids*, or *is an encoder-decoder* (T5, mT5, UMT5 and their kin): the first layer's attention makes a
  bias over all pairs of the row, which later layers are handed on. Packed, each run of equal lengths needs its own, so the
  attention would have to be called per run, as MPNet's and DeBERTa's is, and the bias kept per run between layers.
- *Eager attention* (BLOOM, Gemma 2, GPT-OSS, XLNet, Longformer, ...): biases, caps or sinks inside the scores that transformers'
  own sdpa path cannot express either; each would need a description in `attention/regrouped.py`, if its attention mixes no
  further tokens.
- *Packed rows differ*: tokens are mixed beside attention (MobileBERT's trigrams, the state-space layers of Falcon-H1, Zaya, Nemotron-H).
- *Rows depend on what runs together*: BART's and FSMT's classifiers and decoders look for end and padding tokens in the whole batch,
  FNet and ConvBERT mix padding in. No packing helps; the model's own code runs on one text at a time.
"""


def short(found: Outcome | None) -> str:
    """One cell of the table."""
    if found is None:
        return "-"
    path = found.path.replace("one input at a time (", "alone (").replace("|", "/")
    path = re.sub(r"alone \(rows depend on what runs together.*", "alone (rows depend on what runs together)", path)
    path = re.sub(r"results differ by .* of their norm, more than [\d.e-]+", "packed rows differ", path)
    return " ".join(path.split())[:160]


def table() -> dict[str, list[str]]:
    """architecture -> its cells for Embedder and Reranker, as the document has them."""
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    return {name: [embedder, reranker] for name, embedder, reranker in rows if name != "architecture"}


def is_of_this_version() -> bool:
    """Whether the document was written with the installed transformers."""
    return f"transformers {transformers.__version__};" in DOCUMENT.read_text(encoding="utf-8")


def main(wanted: list[str]) -> None:
    """Write the document; with names, only their rows of it."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    cells = table() if wanted else {}
    for name in wanted or names():
        found = [outcome(name, kind, token_types=True, left=False) for kind in ("embedder", "reranker")]
        cells.pop(name, None)
        if any(found):
            cells[name] = [short(each) for each in found]
            print(name, *found, file=sys.stderr, flush=True)
    rows = [f"| {name} | {' | '.join(each)} |" for name, each in sorted(cells.items())]
    DOCUMENT.write_text(
        _HEAD.format(version=transformers.__version__) + "\n".join(rows) + "\n" + _TAIL, encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
