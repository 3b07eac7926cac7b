"""What a checkpoint holds, read from its headers before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsafe.config import format_bytes
from memsafe.errors import ModelError, ModelNotFoundError, ModelTooLargeError
from memsafe.models import m3

__all__ = ["Checkpoint", "check_fits", "check_hub", "inspect"]

# Bits of a safetensors dtype: https://github.com/huggingface/safetensors#format
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_FLOATS = ("F64", "F32", "F16", "BF16")
# What tokenizers, and processors of other than text, are saved as.
_PREPROCESSING = (
    "tokenizer*",
    "*vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.bpe",
    "*processor_config.json",
    "*.tiktoken",
)
_HUB_WAIT_S = 10.0
"""How long the hub's first answer may take, which is huggingface_hub's own time for it."""
_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Checkpoint:
    """A model folder as found on disk. elements: parameters by safetensors dtype; kind: of `_KINDS`, or None."""

    folder: Path
    kind: str | None
    elements: dict[str, int]
    other_bytes: int
    """Size of weight files whose headers cannot be read cheaply (pytorch_model.bin)."""
    bases: tuple[Checkpoint, ...] = ()
    """What adapters in the folder were trained on; their weights are counted in the above."""

    def bytes_as(self, dtype: str | None) -> int:
        """Bytes of the weights in memory, float weights in `dtype` ("float32", ...), or as stored if None."""
        total = self.other_bytes
        for name, count in self.elements.items():
            as_stored = _BITS.get(name, 32) // 8
            total += count * (_DTYPE_BYTES.get(dtype or "", as_stored) if name in _FLOATS else as_stored)
        return total

    @property
    def revision(self) -> str:
        """Changes when weights, configuration, tokenizer or code do: names, sizes and times of the files of the folder and
        of what its adapters stand on."""
        stats = [
            (str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns)
            for folder in (self.folder, *(base.folder for base in self.bases))
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not file.name.endswith((".md", ".lock"))
        ]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def inspect(
    model: str,
    *,
    kind: str,
    revision: str | None = None,
    cache_folder: str | None = None,
    backend: str = "torch",
    elsewhere: bool = False,
) -> Checkpoint | None:
    """Look at a local folder, or at the local cache of a hub id; None if that is not all on this machine yet, or
    `elsewhere`: options name a place inside the folder, which only upstream knows to find.

    Nothing that sentence-transformers would load is refused: it fetches what a cache lacks, takes the base of an adapter
    from elsewhere, and makes an embedder of a classifier or a reranker of an encoder (with a warning of ours).
    Raises :class:`ModelError` for a folder that is missing, empty, half-written or damaged.
    """
    path = Path(model).expanduser()
    looks_local = (
        path.is_absolute()
        or model.startswith((".", "~"))
        or model.count("/") > 1
        or (os.sep != "/" and os.sep in model)
    )
    if elsewhere and not path.is_file():
        return None
    if path.is_dir():
        checkpoint = _read(path, backend, cache_folder)
    elif path.exists():
        raise ModelNotFoundError(f"model: {model} is a file; give the folder that holds it, or a hub id")
    elif looks_local:
        raise ModelNotFoundError(
            f"model: the folder {model} does not exist; give an existing folder or a hub id like 'BAAI/bge-m3'"
        )
    else:
        cached = _from_cache(model, revision, cache_folder)
        if cached is None:
            return None
        try:
            checkpoint = _read(cached, backend, cache_folder)
        except ModelNotFoundError:  # a part of it: upstream fetches the rest, or says why it cannot
            return None
    of_all = kind in m3.KINDS and m3.has_heads(checkpoint.folder)
    if checkpoint.kind is not None and checkpoint.kind != kind and not of_all:
        warnings.warn(f"model: {model} was saved as {_SAVED_AS[checkpoint.kind]}; {_MADE_OF_IT[kind]}", stacklevel=4)
    return checkpoint


_SAVED_AS = {
    "embedding": "an embedding model",
    "reranker": "a cross-encoder",
    "sparse": "a sparse encoder",
    "multi_vector": "a late-interaction model",
}
_MADE_OF_IT = {
    "embedding": "SentenceTransformer takes its encoder and averages hidden states that nobody trained for it",
    "reranker": "CrossEncoder puts a new head on it, whose scores are random until it is trained",
    "sparse": "SparseEncoder takes its encoder, and what it puts behind that nobody has trained",
    "multi_vector": "MultiVectorEncoder puts a new projection on it, whose vectors are random until it is trained",
    "hybrid": "it has no heads for words and tokens",
}


def check_hub(model: str, *, revision: str | None = None, cache_folder: str | None = None, token: Any = None) -> None:
    """Raise :class:`ModelNotFoundError` if nothing of `model` is here and the hub, from which it must come, cannot be asked:
    with one question, where loading would repeat it for minutes. Whatever it answers is left to loading."""
    if "/" not in model or Path(model).expanduser().exists():  # sentence-transformers has names of its own
        return
    if _from_cache(model, revision, cache_folder) is not None:  # upstream may need no more, or says what it lacks
        return
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(model, revision=revision, token=token, timeout=_HUB_WAIT_S)
    except Exception as error:
        # No answer: requests' errors and the hub's own are OSErrors, httpx's (huggingface_hub 1) are not.
        silent = getattr(error, "response", None) is None
        if not silent or not (isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))):
            return
        reason = " ".join(str(error).split())[:200]
        raise ModelNotFoundError(
            f"model: {model!r} is neither a folder nor in this machine's cache of the hub, and the hub cannot be asked "
            f"({type(error).__name__}: {reason}); give a local folder, or fill the cache where there is a network ("
            f"hf download {model}; HF_HOME says where it lies) and set HF_HUB_OFFLINE=1"
        ) from error


def check_fits(checkpoint: Checkpoint, dtype: str | None, room_bytes: int, device: str) -> None:
    """Raise :class:`ModelTooLargeError` if the weights in `dtype` need more than `room_bytes` on `device`."""
    need = checkpoint.bytes_as(dtype)
    if need > room_bytes:
        raise too_large(checkpoint.folder.name, checkpoint, need, room_bytes, device)


def too_large(name: str, checkpoint: Checkpoint | None, need: int, room_bytes: int, device: str) -> ModelTooLargeError:
    """The error for weights of `need` bytes (0: unknown) where `room_bytes` are free, with what would fit."""
    half = need if checkpoint is None else checkpoint.bytes_as("float16")
    if half < need and half <= room_bytes:
        remedy = f"dtype='bfloat16' or 'float16' needs {format_bytes(half)} and would fit"
    else:
        remedy = (
            f"choose a model of at most {room_bytes // 2 // 10**6:,}M parameters in half precision, or another device"
        )
    needs = format_bytes(need) if need else "more than there is"
    return ModelTooLargeError(
        f"the weights of {name} need {needs}, but {format_bytes(max(room_bytes, 0))} are free for this on {device}; {remedy}",
        need_bytes=need,
        free_bytes=room_bytes,
    )


def _from_cache(model: str, revision: str | None, cache_folder: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    cache = cache_folder or os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    for name in ("config.json", "modules.json"):
        found = try_to_load_from_cache(model, name, cache_dir=cache, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _read(folder: Path, backend: str, cache_folder: str | None, *, is_base: bool = False) -> Checkpoint:
    """What is in `folder`; is_base: for an adapter elsewhere, not looked for its own bases. Raises :class:`ModelNotFoundError` where something is missing, :class:`ModelError` where something is damaged."""
    if not any(folder.iterdir()):
        raise ModelNotFoundError(
            f"model: the folder {folder} is empty; it needs a saved model (config.json and weights)"
        )
    config, modules = _json(folder / "config.json", dict), _json(folder / "modules.json", list)
    folders = [folder, *(folder / m["path"] for m in modules or [] if isinstance(m, dict) and m.get("path"))]
    folders = list(dict.fromkeys(folders))
    adapters = [found for place in folders if (found := _json(place / "adapter_config.json", dict)) is not None]
    if config is None and modules is None and not adapters:
        raise ModelNotFoundError(
            f"model: {folder} has neither config.json nor modules.json; it is no saved model, or half a copy of one"
        )
    elements: dict[str, int] = {}
    other_bytes, found_any = 0, False
    for place in folders:
        tensors = sorted(place.glob("*.safetensors"))
        missing = _missing_shards(place) if tensors else []
        if missing:
            raise ModelNotFoundError(f"model: {place} lacks {', '.join(missing[:3])}; the copy is not complete")
        for file in tensors:
            found_any = True
            for name, count in _header(file).items():
                elements[name] = elements.get(name, 0) + count
        if not tensors:
            sizes = [file.stat().st_size for file in place.glob("*.bin")]
            found_any, other_bytes = found_any or bool(sizes), other_bytes + sum(sizes)
    if not found_any and backend == "torch" and (config is not None or adapters):
        raise ModelNotFoundError(
            f"model: {folder} has a configuration but no weights (*.safetensors, *.bin); the copy is not complete"
        )
    bases = tuple(base for adapter in adapters if not is_base and (base := _base(adapter, cache_folder)) is not None)
    places = [*folders, *(base.folder for base in bases)]
    if (
        found_any
        and config is not None
        and not any(any(place.glob(name)) for place in places for name in _PREPROCESSING)
    ):
        # transformers 5 would make up an empty tokenizer, to which every word is unknown
        raise ModelNotFoundError(
            f"model: {folder} has weights but no tokenizer (tokenizer.json, ...); the copy is not complete"
        )
    for base in bases:
        other_bytes += base.other_bytes
        for name, count in base.elements.items():
            elements[name] = elements.get(name, 0) + count
    return Checkpoint(folder, _kind(folder, config, modules), elements, other_bytes, bases)


def _missing_shards(folder: Path) -> list[str]:
    """Files that an index of several names and that are not there: a download was interrupted."""
    names: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        names |= {str(name) for name in (_json(index, dict).get("weight_map") or {}).values()}
    return sorted(name for name in names if not (folder / name).is_file())


def _base(adapter: Mapping[str, Any], cache_folder: str | None) -> Checkpoint | None:
    """What the adapter of a folder was trained on, if that is on this machine."""
    name = adapter.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    folder = Path(name) if Path(name).is_dir() else _from_cache(name, adapter.get("revision"), cache_folder)
    try:
        return None if folder is None else _read(folder, "torch", cache_folder, is_base=True)
    except ModelNotFoundError:  # upstream fetches it, or says what it lacks
        return None


_KINDS = {
    "SentenceTransformer": "embedding",
    "CrossEncoder": "reranker",
    "SparseEncoder": "sparse",
    "MultiVectorEncoder": "multi_vector",
    "ColBERT": "multi_vector",  # PyLate's
}


def _kind(folder: Path, config: Any, modules: Any) -> str | None:
    saved = (_json(folder / "config_sentence_transformers.json", dict) or {}).get("model_type")
    if saved in _KINDS:
        return _KINDS[saved]
    if modules is not None:
        return "sparse" if any("sparse_encoder" in str(each.get("type")) for each in modules) else "embedding"
    architectures = (config or {}).get("architectures") or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "reranker"
    return "embedding" if architectures and all(name.endswith("Model") for name in architectures) else None


def _json(file: Path, kind: type) -> Any:
    """The content of `file`, a `kind`; None if there is no such file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__} where a {kind.__name__} is needed")
        return content
    except (ValueError, OSError) as error:
        raise ModelError(
            f"model: {file} cannot be read as JSON ({error}); the copy is damaged, fetch it again"
        ) from error


def _header(file: Path) -> dict[str, int]:
    """Elements by dtype, from a safetensors file's header; checks that the file is as long as the header says."""
    damaged = f"model: {file} is damaged or not complete; fetch it again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ModelError(f"{damaged} ({size:,} bytes, header cut off)")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{damaged} (header is not JSON)") from error
    elements: dict[str, int] = {}
    end = 0
    try:
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            count = math.prod(int(extent) for extent in tensor["shape"])
            elements[tensor["dtype"]] = elements.get(tensor["dtype"], 0) + count
            end = max(end, int(tensor["data_offsets"][1]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{damaged} (header is not of safetensors)") from error
    if 8 + length + end > size:
        raise ModelError(f"{damaged} ({size:,} bytes of {8 + length + end:,})")
    return elements
