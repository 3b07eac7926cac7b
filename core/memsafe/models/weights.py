"""What a checkpoint holds, read from its headers before any weight is loaded."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsafe.config import format_bytes
from memsafe.errors import ModelError, ModelNotFoundError, ModelTooLargeError

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
    """A model folder as found on disk. elements: parameters by safetensors dtype; kind: "embedding", "reranker" or None."""

    folder: Path
    kind: str | None
    elements: dict[str, int]
    other_bytes: int
    """Size of weight files whose headers cannot be read cheaply (pytorch_model.bin)."""

    def bytes_as(self, dtype: str | None) -> int:
        """Bytes of the weights in memory, float weights in `dtype` ("float32", ...), or as stored if None."""
        total = self.other_bytes
        for name, count in self.elements.items():
            as_stored = _BITS.get(name, 32) // 8
            total += count * (_DTYPE_BYTES.get(dtype or "", as_stored) if name in _FLOATS else as_stored)
        return total

    @property
    def revision(self) -> str:
        """Changes when the weights or the configuration do: names, sizes and times of the folder's files."""
        files = sorted(p for p in self.folder.rglob("*") if p.suffix in (".json", ".safetensors", ".bin"))
        stats = [(str(p.relative_to(self.folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        import hashlib

        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def inspect(
    model: str, *, kind: str, revision: str | None = None, cache_folder: str | None = None, backend: str = "torch"
) -> Checkpoint | None:
    """Look at a local folder, or at the local cache of a hub id; None if nothing of it is on this machine yet.

    Raises :class:`ModelError` for a folder that is missing, empty, half-written, or not of `kind`.
    """
    path = Path(model).expanduser()
    looks_local = (
        path.is_absolute()
        or model.startswith((".", "~"))
        or model.count("/") > 1
        or (os.sep != "/" and os.sep in model)
    )
    if path.is_dir():
        folder = path
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
        folder = cached
    checkpoint = _read(folder, backend)
    if checkpoint.kind is not None and checkpoint.kind != kind:
        wanted, other = ("SentenceTransformer", "Reranker") if kind == "embedding" else ("CrossEncoder", "Embedder")
        found = "a cross-encoder" if checkpoint.kind == "reranker" else "an embedding model"
        raise ModelError(f"model: {model} is {found}, not a {wanted}; give it to {other}, or choose another model")
    return checkpoint


def check_hub(model: str, *, revision: str | None = None, token: Any = None) -> None:
    """Raise :class:`ModelNotFoundError` if the hub, from which `model` must come, cannot be asked: with one question, where
    loading would repeat it for minutes. Whatever it answers is left to loading."""
    if "/" not in model:  # sentence-transformers has names of its own
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


def _read(folder: Path, backend: str) -> Checkpoint:
    if not any(folder.iterdir()):
        raise ModelNotFoundError(
            f"model: the folder {folder} is empty; it needs a saved model (config.json and weights)"
        )
    config, modules = _json(folder / "config.json", dict), _json(folder / "modules.json", list)
    if config is None and modules is None:
        raise ModelNotFoundError(
            f"model: {folder} has neither config.json nor modules.json; it is no saved model, or half a copy of one"
        )
    folders = [folder, *(folder / m["path"] for m in modules or [] if isinstance(m, dict) and m.get("path"))]
    elements: dict[str, int] = {}
    other_bytes, found = 0, False
    for place in dict.fromkeys(folders):
        tensors = sorted(place.glob("*.safetensors"))
        for file in tensors:
            found = True
            for name, count in _header(file).items():
                elements[name] = elements.get(name, 0) + count
        if not tensors:
            sizes = [file.stat().st_size for file in place.glob("*.bin")]
            found, other_bytes = found or bool(sizes), other_bytes + sum(sizes)
    if not found and backend == "torch" and config is not None:
        raise ModelNotFoundError(
            f"model: {folder} has a configuration but no weights (*.safetensors, *.bin); the copy is not complete"
        )
    if found and config is not None and not any(any(place.glob(name)) for place in folders for name in _PREPROCESSING):
        # transformers 5 would make up an empty tokenizer, to which every word is unknown
        raise ModelNotFoundError(
            f"model: {folder} has weights but no tokenizer (tokenizer.json, ...); the copy is not complete"
        )
    return Checkpoint(folder, _kind(folder, config, modules), elements, other_bytes)


def _kind(folder: Path, config: Any, modules: Any) -> str | None:
    saved = (_json(folder / "config_sentence_transformers.json", dict) or {}).get("model_type")
    if saved in ("SentenceTransformer", "CrossEncoder"):
        return "embedding" if saved == "SentenceTransformer" else "reranker"
    if modules is not None:
        return "embedding"
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
