"""Loading a model through sentence-transformers, once its weights are known to fit."""

from __future__ import annotations

import copy
import importlib
import os
import threading
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError, MemsafeError, ModelError, ModelNotFoundError
from memsafe.machine.device import Device, open_device
from memsafe.machine.refusals import is_out_of_memory
from memsafe.models import flag, m3, sbert, weights
from memsafe.models.model import LoadedModel, ModelSpec, limit_length
from memsafe.models.runtimes.attach import Wanted, attach
from memsafe.runtimes import DTYPES as RUNTIME_DTYPES

__all__ = ["load", "move", "size_of"]

DTYPES = ("float32", "float16", "bfloat16")


def load(
    spec: ModelSpec, device: Device, policy: MemoryPolicy, room_bytes: int, *, copied: bool = False
) -> LoadedModel:
    """Load `spec` onto `device`; `room_bytes` is what the weights may take. copied: whether a model that is handed in loaded is
    copied there, rather than used where it is.

    Raises :class:`ModelTooLargeError` before anything is loaded, :class:`ModelError` for a model that cannot be used.
    """
    if not isinstance(spec.model, str):
        if spec.engine != "torch":
            raise ConfigError(
                f"engine: got {spec.engine!r} with a loaded model; give its folder or its hub id, which is exported once and kept"
            )
        if spec.dtype is not None:
            raise ConfigError(f"dtype: got {spec.dtype!r} with a loaded model; load it in that dtype, or pass its name")
        spec = _given(spec, device, room_bytes, copied)
        return LoadedModel(spec.model, spec, device, policy, revision="", name=type(spec.model).__name__)
    if spec.engine != "torch":
        return _load_for_runtime(spec, device, policy, room_bytes)
    st, checkpoint = _load_from(spec, device, room_bytes)
    try:
        return LoadedModel(st, spec, device, policy, checkpoint.revision if checkpoint else "", spec.model)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unusable(spec, error) from error


def _load_for_runtime(spec: ModelSpec, device: Device, policy: MemoryPolicy, room_bytes: int) -> LoadedModel:
    """`spec` as its engine runs it. What the engine loads is a float32 export, or one made of such; its own dtype is another."""
    dtype = _dtype_name(spec.dtype, device, RUNTIME_DTYPES[spec.engine]) or "float32"
    options = dict(spec.options)
    model_kwargs = dict(options.pop("model_kwargs", None) or {})
    file_name = model_kwargs.pop("file_name", None)
    if model_kwargs:
        options["model_kwargs"] = model_kwargs
    plain = replace(spec, dtype="float32", options=options)
    st, checkpoint = _load_from(plain, device, room_bytes)
    limit_length(st, spec.max_length)
    wanted = Wanted(
        kind=spec.kind,
        engine=spec.engine,
        dtype=dtype,
        name=str(spec.model),
        folder=checkpoint.folder if checkpoint else None,
        revision=checkpoint.revision if checkpoint else "",
        options=options,
        quantization=spec.quantization,
        file_name=file_name,
        keep=policy.learn,
    )
    attached = attach(st, wanted, device, room_bytes)
    if policy.release != "never":
        device.release()
    try:
        return LoadedModel(st, spec, device, policy, wanted.revision, wanted.name, attached)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unusable(spec, error) from error


def _load_from(spec: ModelSpec, device: Device, room_bytes: int) -> tuple[Any, weights.Checkpoint | None]:
    """The model of a name as sentence-transformers loads it, and what its folder holds."""
    options = dict(spec.options)
    known: dict[str, Any] = {name: options.get(name) for name in ("revision", "cache_folder")}
    known["backend"] = options.get("backend", "torch") if spec.engine == "torch" else spec.engine
    known["elsewhere"] = any(name in (options.get("model_kwargs") or {}) for name in ("subfolder", "gguf_file"))
    checkpoint = weights.inspect(spec.model, kind=spec.kind, **known)
    dtype = _dtype_name(spec.dtype, device)
    model_kwargs = dict(options.get("model_kwargs") or {})
    if dtype is not None:
        if any(name in model_kwargs for name in ("dtype", "torch_dtype")):
            raise ConfigError("dtype: given twice, as dtype and in model_kwargs; give it once")
        model_kwargs["dtype"] = getattr(torch, dtype)
    chosen = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    target = str(chosen).removeprefix("torch.") if chosen not in (None, "auto") else _default_dtype(chosen)
    if checkpoint is None:
        weights.check_hub(
            spec.model,
            revision=known["revision"],
            cache_folder=known["cache_folder"],
            token=options.get("token"),
        )
    if checkpoint is not None:
        weights.check_fits(checkpoint, target, room_bytes, device.name)
        if device.kind != "cpu":  # they pass through main memory, where nobody would say that it does not suffice
            host = open_device("cpu")
            weights.check_fits(checkpoint, target, host.snapshot().free_bytes, "cpu")
    if model_kwargs:
        options["model_kwargs"] = model_kwargs
    saved = checkpoint is not None and checkpoint.kind == spec.kind
    heads = m3.find(spec.model, options) if spec.kind in m3.KINDS and not saved else None
    if spec.kind == "hybrid" and heads is None:
        raise ModelError(
            f"model: {spec.model!r} has one output; several need {' and '.join(m3.FILES.values())} beside the encoder, as BGE-M3 has"
        )
    build = sbert.build(spec.kind if heads is None else "embedding")
    st = None
    try:
        hollow = spec.engine != "torch" and checkpoint is not None and checkpoint.hollow
        with _loading, sbert.without_weights() if hollow else nullcontext():
            st = _built(build, spec, device, options, heads)
    except MemsafeError:
        raise
    except BaseException as error:  # whatever a damaged file makes of itself: pickle, zip, JSON, shapes, types
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a Rust library
            raise
        if isinstance(error, TypeError) and "argument" in str(error):
            raise ConfigError(f"options: {error}") from error
        if not is_out_of_memory(error):
            kind = ModelNotFoundError if isinstance(error, OSError) else ModelError
            where = weights.damaged(checkpoint) if isinstance(error, ValueError) else ""
            raise kind(f"model: {spec.model!r} cannot be loaded: {type(error).__name__}: {error}{where}") from error
    if st is None:  # outside the block above, whose traceback holds what was loaded so far
        device.release()
        need = checkpoint.bytes_as(target) if checkpoint is not None else 0
        raise weights.too_large(spec.model, checkpoint, need, device.snapshot().free_bytes, device.name)
    if checkpoint is None:  # a hub id that was not on this machine before
        checkpoint = weights.inspect(spec.model, kind=spec.kind, **known)
    return st, checkpoint


def _unusable(spec: ModelSpec, error: Exception) -> Exception:
    """What to raise where a loaded model turned out not to work."""
    if isinstance(error, MemsafeError) or is_out_of_memory(error):
        return error
    return ModelError(
        f"model: {spec.model!r} was loaded but cannot be used: {type(error).__name__}: {error}; something in its "
        "configuration has a value that it cannot have"
    )


def _built(build: Any, spec: ModelSpec, device: Device, options: dict[str, Any], heads: dict[str, str] | None) -> Any:
    if options.get("decoder") is not None:
        return flag.assemble(spec.model, options, spec.max_length, device.name)
    st = build(spec.model, device=device.name, **options).eval()
    return st if heads is None else m3.assemble(st, heads, spec.outputs or (spec.kind,), device.name)


def size_of(model: torch.nn.Module) -> int:
    """Bytes of the weights of `model`, as it is."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def move(model: Any, device: Device, room_bytes: int) -> None:
    """A model that was handed in loaded, to `device`, where `room_bytes` may be taken. Raises :class:`ModelTooLargeError`, and
    leaves it in main memory then."""
    need = size_of(model)
    if need <= room_bytes:
        try:
            model.to(device.name)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        model.to("cpu")  # outside the block above; some of it had moved
        device.release()
        room_bytes = device.snapshot().free_bytes
    raise weights.given_too_large(type(model).__name__, need, need, room_bytes, device.name)


def _given(spec: ModelSpec, device: Device, room_bytes: int, copied: bool) -> ModelSpec:
    """`spec` with its loaded model, or a copy of it, on `device`. Raises :class:`ModelTooLargeError`."""
    model, need = spec.model, size_of(spec.model)
    floats = sum(
        t.numel() for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.float32, torch.float64)
    )
    half = need if floats == 0 else need - 2 * floats
    if need <= room_bytes:
        if not copied:
            return spec
        try:
            return replace(spec, model=copy.deepcopy(model).to(device.name))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        device.release()  # outside the block above, whose traceback holds what was copied so far
        room_bytes = device.snapshot().free_bytes
    raise weights.given_too_large(type(model).__name__, need, half, room_bytes, device.name)


_loading = threading.Lock()
"""transformers sets torch's default dtype, which is one for all threads, while it builds a model."""


def _new_lock() -> None:
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held it


def _dtype_name(dtype: Any, device: Device, known: Sequence[str] = DTYPES) -> str | None:
    """The dtype to load in, or None for the checkpoint's. Raises :class:`ConfigError` for one that is not `known`."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return next((half for half in ("bfloat16", "float16") if half in known and device.supports(half)), "float32")
    if name not in known:
        raise ConfigError(f"dtype: got {dtype!r}; choose from None, 'auto', {', '.join(map(repr, known))}")
    if name in ("float16", "bfloat16") and not device.supports(name):
        warnings.warn(f"{device.name} has no native {name}; it will be emulated, slowly", stacklevel=4)
    return name


def _default_dtype(chosen: Any) -> str | None:
    """What transformers loads in when nothing is said: the stored dtype since version 5, float32 before."""
    version = importlib.import_module("transformers").__version__
    return None if chosen == "auto" or int(version.split(".")[0]) >= 5 else "float32"
