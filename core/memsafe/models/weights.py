"""What a checkpoint holds, read from its headers before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsafe.config import format_bytes
from memsafe.errors import ModelError, ModelNotFoundError, ModelTooLargeError
from memsafe.models import folder as files
from memsafe.models import m3

__all__ = ["Checkpoint", "check_fits", "check_hub", "damaged", "given_too_large", "inspect", "too_large"]

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
_MOST_MODULES = 1000
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
            as_stored = files.bits_of(name) // 8
            total += count * (_DTYPE_BYTES.get(dtype or "", as_stored) if name in _FLOATS else as_stored)
        return total

    @property
    def hollow(self) -> bool:
        """Whether there are no weights of torch's: an export may be all that was saved."""
        return not self.elements and not self.other_bytes

    @property
    def revision(self) -> str:
        """Changes when weights, configuration, tokenizer or code do: names, sizes and times of the files of the folder and
        of what its adapters stand on. Empty if nobody can tell: there are very many files, or none any more."""
        stats = []
        for folder in (self.folder, *(base.folder for base in self.bases)):
            found, all_of_them = files.files_of(folder)
            if not all_of_them:
                return ""
            for file, state in found:
                if not file.name.endswith((".md", ".lock")):
                    stats.append((str(file.relative_to(folder)), state.st_size, state.st_mtime_ns))
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16] if stats else ""


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
    path = Path(os.path.expanduser(model))
    looks_local = (
        path.is_absolute()
        or model.startswith((".", "~"))
        or model.count("/") > 1
        or (os.sep != "/" and os.sep in model)
    )
    if elsewhere and not os.path.isfile(path):
        return None
    if os.path.isdir(path):
        checkpoint = _read(path, backend, cache_folder)
    elif os.path.exists(path):
        raise ModelNotFoundError(f"model: {model} is a file; give the folder that holds it, or a hub id")
    elif looks_local:
        raise ModelNotFoundError(
            f"model: the folder {model} does not exist, or this user may not read it; give an existing folder or a hub id like 'BAAI/bge-m3'"
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
    if "/" not in model or os.path.exists(os.path.expanduser(model)):  # sentence-transformers has names of its own
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
    return _too_large(name, need, room_bytes, device, remedy)


def given_too_large(name: str, need: int, half_bytes: int, room_bytes: int, device: str) -> ModelTooLargeError:
    """The same for a model that was handed in loaded."""
    remedy = "raise MemoryPolicy(limit=...), or choose a smaller model or another device"
    if half_bytes < need and half_bytes <= room_bytes:
        remedy = f"as model.to(torch.bfloat16) it needs {format_bytes(half_bytes)} and would fit; or raise MemoryPolicy(limit=...)"
    return _too_large(name, need, room_bytes, device, remedy)


def _too_large(name: str, need: int, room_bytes: int, device: str, remedy: str) -> ModelTooLargeError:
    needs = format_bytes(need) if need else "more than there is"
    return ModelTooLargeError(
        f"the weights of {name} need {needs}, but {format_bytes(max(room_bytes, 0))} are free for this on {device}; {remedy}",
        need_bytes=need,
        free_bytes=room_bytes,
    )


def damaged(checkpoint: Checkpoint | None) -> str:
    """What to add to an error of loading: the file that is no JSON, if there is one."""
    file = None if checkpoint is None else files.unparsable(checkpoint.folder)
    return "" if file is None else f" ({file} is no JSON; the copy is damaged, fetch it again)"


def _from_cache(model: str, revision: Any, cache_folder: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    cache = cache_folder or os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    for name in ("config.json", "modules.json"):
        try:
            found = try_to_load_from_cache(model, name, cache_dir=cache, revision=revision)
        except (OSError, TypeError, ValueError):  # no name that a hub could have, or no cache: upstream says so
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _read(folder: Path, backend: str, cache_folder: str | None, *, is_base: bool = False) -> Checkpoint:
    """What is in `folder`; is_base: for an adapter elsewhere, not looked for its own bases.

    Raises :class:`ModelNotFoundError` where something is missing, :class:`ModelError` where something is damaged.
    """
    try:
        return _looked_at(folder, backend, cache_folder, is_base)
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise files.unreadable(folder, error) from error


def _looked_at(folder: Path, backend: str, cache_folder: str | None, is_base: bool) -> Checkpoint:
    with os.scandir(folder) as entries:
        if next(entries, None) is None:
            raise ModelNotFoundError(
                f"model: the folder {folder} is empty; it needs a saved model (config.json and weights)"
            )
    files.check_files(folder)
    config, modules = files.read(folder / "config.json", dict), files.read(folder / "modules.json", list)
    folders = _folders(folder, modules)
    adapters = [found for place in folders if (found := files.read(place / "adapter_config.json", dict)) is not None]
    if config is None and modules is None and not adapters:
        raise ModelNotFoundError(
            f"model: {folder} has neither config.json nor modules.json; it is no saved model, or half a copy of one"
        )
    elements: dict[str, int] = {}
    other_bytes, found_any = 0, False
    for place in folders:
        tensors = sorted(file for file in place.glob("*.safetensors") if os.path.isfile(file))
        missing = files.missing_shards(place) if tensors else []
        if missing:
            raise ModelNotFoundError(f"model: {place} lacks {', '.join(missing[:3])}; the copy is not complete")
        for file in tensors:
            found_any = True
            counts, rest = files.header(file)
            other_bytes += rest
            for name, count in counts.items():
                elements[name] = elements.get(name, 0) + count
        if not tensors:
            sizes = [file.stat().st_size for file in place.glob("*.bin") if os.path.isfile(file)]
            found_any, other_bytes = found_any or bool(sizes), other_bytes + sum(sizes)
    if not found_any and backend == "torch" and (config is not None or adapters):
        raise ModelNotFoundError(
            f"model: {folder} has a configuration but no weights (*.safetensors, *.bin); the copy is not complete"
        )
    bases = tuple(base for adapter in adapters if not is_base and (base := _base(adapter, cache_folder)) is not None)
    places = [*folders, *(base.folder for base in bases)]
    if found_any and config is not None and not any(map(_has_preprocessing, places)):
        # transformers 5 would make up an empty tokenizer, to which every word is unknown
        raise ModelNotFoundError(
            f"model: {folder} has weights but no tokenizer (tokenizer.json, ...); the copy is not complete"
        )
    for base in bases:
        other_bytes += base.other_bytes
        for name, count in base.elements.items():
            elements[name] = elements.get(name, 0) + count
    return Checkpoint(folder, _kind(folder, config, modules), elements, other_bytes, bases)


def _folders(folder: Path, modules: list[Any] | None) -> list[Path]:
    """`folder` and those of its modules, each once. What is no path is left to upstream, which says so."""
    paths = [each["path"] for each in modules or [] if isinstance(each, dict) and isinstance(each.get("path"), str)]
    if len(paths) > _MOST_MODULES:
        raise ModelError(
            f"model: {folder / 'modules.json'} names {len(paths):,} modules; the copy is damaged, fetch it again"
        )
    root = os.path.realpath(folder)
    found = {root: folder}
    for path in paths:
        place = folder / path
        real = os.path.realpath(place) if os.path.isdir(place) else root
        if real not in found:
            found[real] = place
            if not real.startswith(os.path.join(root, "")):  # those below have been looked at
                files.check_files(place, below=False)
    return list(found.values())


def _has_preprocessing(folder: Path) -> bool:
    return any(os.path.isfile(file) for name in _PREPROCESSING for file in folder.glob(name))


def _base(adapter: Mapping[str, Any], cache_folder: str | None) -> Checkpoint | None:
    """What the adapter of a folder was trained on, if that is on this machine."""
    name = adapter.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    folder = Path(name) if os.path.isdir(name) else _from_cache(name, adapter.get("revision"), cache_folder)
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
    saved = (files.read(folder / "config_sentence_transformers.json", dict) or {}).get("model_type")
    if isinstance(saved, str) and saved in _KINDS:
        return _KINDS[saved]
    if modules is not None:
        types = [str(each.get("type")) for each in modules if isinstance(each, dict)]
        return "sparse" if any("sparse_encoder" in name for name in types) else "embedding"
    architectures = (config or {}).get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "reranker"
    return "embedding" if names and all(name.endswith("Model") for name in names) else None
