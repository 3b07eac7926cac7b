"""What is known of a model before it is loaded: a folder's or the hub's config.json and headers, or the table of known models."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from memsafe.advice import known
from memsafe.errors import ConfigError, ModelNotFoundError
from memsafe.models import weights
from memsafe.models.weights import Checkpoint
from memsafe.planning.architecture import Architecture

__all__ = ["DTYPES", "ModelFacts", "look", "of_known"]

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number."""
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Model types whose positions start behind the padding index: so many fewer tokens than positions."""


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it. kind: as of a ``Checkpoint``. config: attributes by transformers' names.

    max_length: tokens after which it cuts; None if nothing says. told_by: "folder", "cache", "hub" or "table".
    languages, parameters (millions): of the table where it is listed, else guessed from vocabulary and headers.
    """

    name: str
    kind: str
    config: Any
    checkpoint: Checkpoint
    max_length: int | None
    told_by: str

    @property
    def stored_dtype(self) -> str:
        """What most of the weights are stored in."""
        floats = {n: count for n, count in self.checkpoint.elements.items() if n in _SAFETENSORS}
        if floats:
            return _SAFETENSORS[max(floats, key=floats.__getitem__)]
        said = getattr(self.config, "dtype", None) or getattr(self.config, "torch_dtype", None)
        return str(said).removeprefix("torch.") if said is not None else "float32"

    def weights_bytes(self, dtype: str) -> int:
        """Bytes of the weights in `dtype`. What has no readable header (pytorch_model.bin) is scaled from what it is stored in."""
        stored = DTYPES.get(self.stored_dtype, 4)
        other = self.checkpoint.other_bytes * DTYPES[dtype] // stored
        return replace(self.checkpoint, other_bytes=0).bytes_as(dtype) + other

    @property
    def parameters(self) -> float:
        """Millions."""
        return self.weights_bytes("float32") / 4e6

    @property
    def architecture(self) -> Architecture:
        return Architecture.of(self.config, self.weights_bytes("float32"))

    @property
    def class_name(self) -> str:
        """Of the transformers model, as the config says; "" if it does not."""
        names = getattr(self.config, "architectures", None) or [""]
        return str(names[0])

    @property
    def eager_only(self) -> bool:
        """Whether transformers computes its attention itself, with all scores in memory: no sdpa in its class."""
        model_type = str(getattr(self.config, "model_type", "")).replace("_", "-")
        return model_type in ("mpnet", "deberta", "deberta-v2")

    @property
    def languages(self) -> str:
        listed = known.find(self.name)
        if listed is not None:
            return listed.languages
        vocab = self.architecture.vocab_size
        return "multilingual" if vocab > 100_000 else "zh" if vocab == 21128 else "en"


def look(
    model: str, *, rerank: bool | None, revision: str | None = None, cache_folder: str | None = None
) -> ModelFacts:
    """The facts of a folder, of a hub id in this machine's cache, else of the hub itself (config.json and headers only), else
    of the table of known models.

    Raises :class:`ModelNotFoundError` if none of them knows it, :class:`ModelError` for a damaged folder.
    """
    kind = "reranker" if rerank else "embedding"
    found: ModelFacts | None = None
    with _quiet():  # that it was saved as another kind is the user's choice here, or none at all
        checkpoint = weights.inspect(model, kind=kind, revision=revision, cache_folder=cache_folder)
    if checkpoint is not None:
        found = _of_folder(model, checkpoint, "folder" if Path(model).expanduser().is_dir() else "cache")
    else:
        found = _of_hub(model, revision)
    if found is None:
        listed = known.find(model)
        if listed is None:
            weights.check_hub(model, revision=revision, cache_folder=cache_folder)
            raise ModelNotFoundError(
                f"model: {model!r} is no folder, not in this machine's cache, not on the hub as far as it could be asked, and not in "
                "the table of known models; give a local folder, or fetch its config.json and weights first"
            )
        found = of_known(listed)
    return found if rerank is None else replace(found, kind=kind)


def of_known(listed: known.Known) -> ModelFacts:
    """The facts of an entry of the table; its weights as float32."""
    elements = {"F32": round(listed.parameters * 1e6)}
    checkpoint = Checkpoint(Path(listed.name), listed.kind, elements, 0)
    return ModelFacts(listed.name, listed.kind, config_of(listed.config), checkpoint, listed.max_length, "table")


def config_of(values: Mapping[str, Any]) -> Any:
    """A transformers config with its class's defaults; of a type that transformers lacks, the values alone."""
    transformers = importlib.import_module("transformers")
    given = {name: value for name, value in values.items() if name != "model_type"}
    try:
        return transformers.AutoConfig.for_model(str(values.get("model_type")), **given)
    except Exception:  # an unknown type, or values of another version's config: each says so in its own way
        return SimpleNamespace(**values)


def _of_folder(model: str, checkpoint: Checkpoint, told_by: str) -> ModelFacts:
    values = _first_config(checkpoint)
    config = config_of(values)
    length = _saved_length(checkpoint.folder)
    return ModelFacts(
        model, checkpoint.kind or "embedding", config, checkpoint, _shortest(length, _positions(config)), told_by
    )


def _first_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the folder, of the first module that has one, or of an adapter's base. {} if there is none."""
    for folder in (checkpoint.folder, *(base.folder for base in checkpoint.bases)):
        for file in (folder / "config.json", *sorted(folder.glob("0_*/config.json"))):
            values = _json(file)
            if "model_type" in values or "hidden_size" in values:
                return values
    return {}


def _saved_length(folder: Path) -> int | None:
    module = next((each for each in (folder, *sorted(folder.glob("0_*"))) if (each / "config.json").is_file()), folder)
    said = _json(module / "sentence_bert_config.json").get("max_seq_length")
    if said is None:
        said = _json(module / "tokenizer_config.json").get("model_max_length")
    return int(said) if isinstance(said, (int, float)) and 0 < said < 10**9 else None


def _positions(config: Any) -> int | None:
    """Tokens for which `config` has positions; None if it does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    padding = getattr(config, "pad_token_id", None)
    if getattr(config, "model_type", None) in _BEHIND_PADDING:
        positions -= 1 + (padding if isinstance(padding, int) else 1)
    return positions


def _shortest(*lengths: int | None) -> int | None:
    return min((length for length in lengths if length is not None), default=None)


def _of_hub(model: str, revision: str | None) -> ModelFacts | None:
    """What the hub tells in two small answers; None where it cannot be asked, or does not know."""
    hub = importlib.import_module("huggingface_hub")
    if "/" not in model or bool(getattr(hub.constants, "HF_HUB_OFFLINE", False)):
        return None
    try:
        # First one question that is not repeated: downloads are tried for half a minute where there is no network.
        files = hub.HfApi().model_info(model, revision=revision, files_metadata=True, timeout=10.0).siblings or []
        values = _json(Path(hub.hf_hub_download(model, "config.json", revision=revision)))
        names = {file.rfilename: file.size or 0 for file in files}
        elements: dict[str, int] = {}
        other = 0
        if any(name.endswith(".safetensors") for name in names):
            elements = dict(hub.HfApi().get_safetensors_metadata(model, revision=revision).parameter_count)
        else:
            other = sum(
                size for name, size in names.items() if name.startswith("pytorch_model") and name.endswith(".bin")
            )
    except Exception:  # no network, no such model, no licence accepted: the hub has an error class for each
        return None
    if not elements and not other:
        return None
    config = config_of(values)
    heads = any(str(name).endswith("ForSequenceClassification") for name in values.get("architectures") or [])
    kind = "reranker" if heads and "modules.json" not in names else "embedding"
    listed = known.find(model)
    length = _shortest(listed.max_length if listed is not None else None, _positions(config))
    return ModelFacts(model, kind, config, Checkpoint(Path(model), kind, elements, other), length, "hub")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def _quiet() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_dtype(dtype: Any, stored: str) -> str:
    """The dtype to compute in. None: as stored; "auto": half precision. Raises :class:`ConfigError` for an unknown one."""
    if dtype is None:
        return stored if stored in DTYPES else "float32"
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return "float16"
    if name not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}; choose from None, 'auto', 'float32', 'float16', 'bfloat16'")
    return name
