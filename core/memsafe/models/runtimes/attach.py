"""From a loaded model to the same model run by another runtime: export found or made, its agreement known, put in place."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe.config import format_bytes
from memsafe.errors import ConfigError, MemsafeError, ModelError, ModelNotFoundError, ModelTooLargeError
from memsafe.machine.device import Device
from memsafe.machine.refusals import is_out_of_memory
from memsafe.models import checkstore, sbert
from memsafe.models.features import TOKENS, FeatureRows
from memsafe.models.runtimes import onnx, openvino
from memsafe.models.runtimes.agreement import agreement, inputs_for, rows_of
from memsafe.models.runtimes.exports import Shelf, beside
from memsafe.models.runtimes.session import RuntimeModel, Session
from memsafe.runtimes import Quantization, int8_instructions

__all__ = ["Attached", "Wanted", "attach"]

Array = NDArray[Any]
_MAKERS: dict[str, ModuleType] = {"openvino": openvino, "onnx": onnx}
_FILES = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
_TAKES = 3.5
"""Making an export is taken to need so many times the bytes of the weights in float32: they, the export, it once more as it is
written and read again to be made int8, and the half for what the tools hold beside."""
_SAY_NOTHING = ("token", "use_auth_token", "cache_folder", "local_files_only")
"""Options that change no row."""
_MOST_SAMPLES, _LEAST_SAMPLES = 64, 16
_OPERATIONS = 2e12
"""For measuring agreement, and again for finding scales, at most: some ten seconds on two cores."""
_TOKENS = 100
"""Of a sample, about."""


_AS_EXPORTED = "as exported"
_EXACT = 0.999
"""How well an export must agree that is not int8: half precision reached 0.99999."""
_ROUNDING = {"int8": 1e-3, "bfloat16": 5e-3, "float16": 6e-4}
"""See :class:`RuntimeModel`."""


@dataclass(frozen=True)
class Wanted:
    """What is to run: a model of `kind`, from files of `revision` under `name` in `folder`, by `engine` in `dtype`.

    options: of loading, all of which may change rows. file_name: an export in the folder; None to choose.
    """

    kind: str
    engine: str
    dtype: str
    name: str
    folder: Path | None
    revision: str
    options: Mapping[str, Any]
    quantization: Quantization
    file_name: str | None = None
    keep: bool = True


@dataclass(frozen=True)
class Attached:
    """What runs now. note: what the user should know, "" for nothing. session: None where torch's float32 runs instead. small_mask:
    whether the mask over pairs of tokens was left out, as far as the model allows."""

    session: Session | None
    told: str
    note: str = ""
    agreement: float | None = None
    small_mask: bool = False


def attach(st: Any, wanted: Wanted, device: Device, room_bytes: int) -> Attached:
    """Put `wanted.engine`'s session in the place of the transformers model of `st`, which is changed; or leave it as it is, with
    a warning, where int8 loses more than the user allows.

    Raises :class:`ModelTooLargeError` where `room_bytes` do not suffice to make an export, :class:`ModelError` for a model that
    cannot be exported, :class:`MissingExtraError`.
    """
    maker, hf = _MAKERS[wanted.engine], sbert.hf_model(st)
    inputs = _inputs_of(st)
    if hf is None or not inputs:
        raise ModelError(
            f"engine={wanted.engine!r}: the model does not run on token ids through transformers; leave engine out"
        )
    features = device.cpu_features()
    there = None
    if wanted.folder is not None:
        there = beside(wanted.folder, wanted.engine, wanted.dtype, wanted.file_name, features)
    scheme = _scheme(wanted) if there is None else _AS_EXPORTED
    shelf = Shelf(_key(wanted, maker, there), _FILES[wanted.engine], keep=wanted.keep and bool(wanted.revision))
    try:
        file = there or shelf.find() or _made(st, hf, wanted, maker, inputs, shelf, room_bytes, device)
        reference = _reference(st, hf, wanted, shelf, _processor(features))
        session = _opened(maker, file, wanted, device)
        runtime = " ".join((wanted.engine, wanted.dtype, scheme, _digest(file)))
        sbert.replace_hf_model(st, RuntimeModel(session, hf.config, runtime, _ROUNDING.get(wanted.dtype, 0.0)))
        agreed = _agreed(st, shelf, _processor(features), reference)
    finally:
        shelf.close()
    words = f"{session.told} {wanted.dtype}"
    if wanted.dtype == "int8":
        words += f" ({scheme}{'' if scheme == _AS_EXPORTED else ' scales'}, by {int8_instructions(features)[0]})"
    note = _objection(words, wanted, agreed)
    if not note:
        return Attached(session, words, "", agreed, small_mask=scheme != _AS_EXPORTED)
    sbert.replace_hf_model(st, hf)
    session.close()
    warnings.warn(f"model: {wanted.name}: {note}", stacklevel=6)
    return Attached(None, "torch float32", note, agreed)


def _reference(st: Any, hf: Any, wanted: Wanted, shelf: Shelf, processor: str) -> tuple[list[Any], Array] | None:
    """Samples and their rows in float32, where agreement is not known yet; None too where there is nothing to measure against."""
    if processor in shelf.agreement() or isinstance(hf, sbert.Hollow):
        return None
    samples = inputs_for(wanted.kind, wanted.quantization.texts, _count(hf))
    return samples, rows_of(st, samples)


def _agreed(st: Any, shelf: Shelf, processor: str, reference: tuple[list[Any], Array] | None) -> float | None:
    """How well the export that is in place now agrees with float32, as it was measured, now or earlier; None if nobody has."""
    if reference is None:
        return shelf.agreement().get(processor)
    samples, rows = reference
    found = agreement(rows_of(st, samples), rows)
    shelf.agreed(processor, found)
    return found


def _objection(words: str, wanted: Wanted, agreed: float | None) -> str:
    """What speaks against an export; "" if nothing does."""
    least = wanted.quantization.least_agreement if wanted.dtype == "int8" else _EXACT
    if agreed is None or agreed >= least:
        return ""
    limit = f"least_agreement={least:g}" if wanted.dtype == "int8" else f"{least:g}"
    return f"{words} agrees with float32 to {agreed:.4f} only, less than {limit}: torch computes in float32 instead"


def _processor(features: frozenset[str]) -> str:
    """What int8 products depend on: two processors of one name have the same numbers."""
    return " ".join(sorted(each for each in features if each.startswith(("avx", "amx", "sve", "asimd"))))


def _inputs_of(st: Any) -> list[str]:
    """Names of the features of tokens that the model's own preprocessing gives."""
    kind = ("a", "b") if sbert.is_reranker(st) else "a"
    found = FeatureRows.of(sbert.preprocess(st, [kind], None))
    return [] if found is None else [name for name in TOKENS if name in found.names]


def _scheme(wanted: Wanted) -> str:
    scheme = wanted.quantization.scheme
    return "dynamic" if scheme == "auto" else scheme


def _key(wanted: Wanted, maker: ModuleType, file: Path | None) -> list[str]:
    """Everything that an export of ours, or its agreement, depends on."""
    quantization = wanted.quantization
    texts = hashlib.sha256("\0".join(quantization.texts).encode()).hexdigest()
    made = [_scheme(wanted), texts] if wanted.dtype == "int8" else []
    telling = {name: str(value) for name, value in sorted(wanted.options.items()) if name not in _SAY_NOTHING}
    options = hashlib.sha256(json.dumps(telling).encode()).hexdigest()
    versions = {**maker.versions(wanted.dtype), **checkstore.versions("memsafe", "torch", "transformers")}
    beside_it = [] if file is None else [file.name, str(file.stat().st_size)]
    return [
        wanted.kind, wanted.engine, wanted.dtype, wanted.name, wanted.revision, options, json.dumps(versions), *made, *beside_it,
    ]  # fmt: skip


def _made(
    st: Any,
    hf: Any,
    wanted: Wanted,
    maker: ModuleType,
    inputs: Sequence[str],
    shelf: Shelf,
    room_bytes: int,
    device: Device,
) -> Path:
    if isinstance(hf, sbert.Hollow):
        raise ModelNotFoundError(
            f"model: {wanted.name} has neither weights nor an export for engine={wanted.engine!r} in {wanted.dtype}; the copy is not "
            "complete, or another dtype is there"
        )
    need = int(_TAKES * 4 * sum(parameter.numel() for parameter in hf.parameters()))
    too_large = ModelTooLargeError(
        f"exporting {wanted.name} for engine={wanted.engine!r} takes about {format_bytes(need)}, but {format_bytes(room_bytes)} "
        "are free for this; make it where there is more memory, and bring MEMSAFE_CACHE_DIR along, or leave engine out",
        need_bytes=need,
        free_bytes=room_bytes,
    )
    if need > room_bytes:
        raise too_large

    def write(file: Path) -> None:
        plain = file if wanted.dtype != "int8" else file.with_name(f"plain{file.suffix}")
        maker.export(hf, inputs, plain)
        if wanted.dtype == "int8":
            given = inputs_for(wanted.kind, wanted.quantization.texts, _count(hf))
            maker.quantized(plain, file, [_sample(st, inputs, each) for each in given], _scheme(wanted))
            for left in file.parent.glob("plain*"):
                left.unlink()

    try:
        return shelf.make(write)
    except MemsafeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # it took more than was thought
            raise too_large from error
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model: {wanted.name} cannot be exported for engine={wanted.engine!r} ({type(error).__name__}: {reason}); leave engine out, "
            "or put an export of it beside it"
        ) from error
    finally:
        device.release()


def _sample(st: Any, inputs: Sequence[str], value: Any) -> dict[str, Array]:
    features = sbert.preprocess(st, [value], None)
    return {name: np.ascontiguousarray(features[name].numpy(), dtype=np.int64) for name in inputs}


def _count(hf: Any) -> int:
    """How many samples: fewer for a large model."""
    parameters = sum(parameter.numel() for parameter in hf.parameters())
    return int(np.clip(_OPERATIONS / (2 * parameters * _TOKENS), _LEAST_SAMPLES, _MOST_SAMPLES))


def _opened(maker: ModuleType, file: Path, wanted: Wanted, device: Device) -> Session:
    open_it = partial(maker.Opened, dtype=wanted.dtype, cores=device.num_cores)
    try:
        session: Session = open_it(file)
    except Exception as error:
        if isinstance(error, MemsafeError) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"model: {file} cannot be opened by {wanted.engine} ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    missing = [name for name in session.inputs if name not in TOKENS]
    if missing:
        session.close()
        raise ConfigError(
            f"model: {file} wants {', '.join(missing)} beside token ids; give another file_name, or leave engine out"
        )
    return session


def _digest(file: Path) -> str:
    """Of the weights in `file`, by a few of their bytes, so that the same export is the same model wherever it lies."""
    weights = file.with_suffix(".bin") if file.suffix == ".xml" else file
    size = weights.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with weights.open("rb") as stream:
        for place in range(64):
            stream.seek(size * place // 64)
            digest.update(stream.read(64))
    return digest.hexdigest()
