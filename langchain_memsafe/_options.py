"""From sentence-transformers' keyword arguments to the core's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from memsafe import ConfigError

_LIST_MESSAGE = "Expected embeddings to be a Tensor or a numpy array, got a list instead."  # upstream's words

_ENCODE = ("normalize_embeddings", "precision", "prompt", "prompt_name", "truncate_dim")
_PREDICT = ("activation_fn", "apply_softmax", "prompt", "prompt_name")
_CORE_ONLY = ("dtype", "hooks", "memory", "model", "model_name_or_path", "normalize", "show_progress")


class KeywordError(ConfigError, TypeError):
    """A keyword argument that cannot be given here: the TypeError that calling upstream with it would raise."""


def encode_options(given: Mapping[str, Any], *, device: Any, model: Any) -> dict[str, Any]:
    """Translate `encode_kwargs` (those of ``SentenceTransformer.encode``) into options of ``Embedder.run``.

    Args:
        given: The user's dict; not changed.
        device: What the model was loaded on, as the user gave it.

    Raises:
        TypeError: The options ask for a list of tensors; upstream refuses with the same words.
        KeywordError: ``show_progress_bar`` or the inputs themselves are among them.
        ConfigError: An unknown option, or one that cannot be had per call.
    """
    rest = dict(given)
    _refuse(rest, "encode_kwargs", ("inputs", "sentences", "show_progress_bar"))
    wanted = rest.pop("output_value", "sentence_embedding")
    if wanted not in ("sentence_embedding", "token_embeddings", None):
        raise ConfigError(
            f"encode_kwargs: output_value is {wanted!r}; only 'sentence_embedding' gives one row per text"
        )
    as_tensor, as_numpy = rest.pop("convert_to_tensor", False), rest.pop("convert_to_numpy", True)
    if wanted != "sentence_embedding" or not (as_tensor or as_numpy):
        raise TypeError(_LIST_MESSAGE)
    options = _common(rest, "encode_kwargs", _ENCODE, device, model)
    if "normalize_embeddings" in options:
        options["normalize"] = bool(options.pop("normalize_embeddings"))
    return options


def predict_options(given: Mapping[str, Any], *, device: Any, model: Any) -> dict[str, Any]:
    """Translate `predict_kwargs` (those of ``CrossEncoder.predict``) into options of ``Reranker.run``.

    Raises:
        KeywordError: ``show_progress_bar`` or the inputs themselves are among them.
        ConfigError: An unknown option, or one that cannot be had per call.
    """
    rest = dict(given)
    _refuse(rest, "predict_kwargs", ("inputs", "sentences", "show_progress_bar"))
    for name in ("convert_to_tensor", "convert_to_numpy"):  # the container; the scores are the same
        rest.pop(name, None)
    return _common(rest, "predict_kwargs", _PREDICT, device, model)


def load_options(given: Mapping[str, Any], taken: Iterable[str] = ()) -> dict[str, Any]:
    """Return `model_kwargs` for the core's constructor; refuse what has a field of its own, or `taken` already."""
    for name in (*_CORE_ONLY, *taken):
        if name in given:
            raise KeywordError(f"model_kwargs: {name!r} is not an option of the model; set the field of this class")
    return dict(given)


def chosen_device(*sources: Mapping[str, Any]) -> Any:
    """The first ``device`` that is given, as sentence-transformers lets a call's device win over the model's."""
    return next((source["device"] for source in sources if source.get("device") is not None), None)


def all_devices(device: Any) -> Any:
    """For ``multi_process``: every GPU, as ``start_multi_process_pool`` takes them.

    A list given as `device`, or a named CPU, is kept. Without a GPU there is nothing to spread over: one CPU worker
    with the core's own lanes is faster than four processes with four copies of the weights.
    """
    if isinstance(device, (list, tuple)) or str(device).startswith("cpu"):
        return device
    import torch

    for kind in ("cuda", "npu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            return [f"{kind}:{index}" for index in range(module.device_count())]
    return device


def _refuse(given: Mapping[str, Any], where: str, names: Iterable[str]) -> None:
    for name in names:
        if name in given:
            remedy = "set show_progress instead" if name == "show_progress_bar" else "it is given by the call itself"
            raise KeywordError(f"{where}: got multiple values for keyword argument {name!r}; {remedy}")


def _common(rest: dict[str, Any], where: str, names: tuple[str, ...], device: Any, model: Any) -> dict[str, Any]:
    rest.pop("chunk_size", None)  # how upstream feeds its process pool; the core plans for itself
    if rest.pop("pool", None) is not None:
        raise ConfigError(
            f"{where}: a process pool holds a copy of the weights per process; give model_kwargs "
            "a list of devices, {'device': ['cuda:0', 'cuda:1']}"
        )
    asked = rest.pop("device", None)
    if asked is not None and _names(asked) != _names(device):
        raise ConfigError(
            f"{where}: device is {asked!r}, but the model was loaded on {device!r}; set the device in model_kwargs"
        )
    options: dict[str, Any] = {}
    if "batch_size" in rest:
        size = rest.pop("batch_size")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(
                f"{where}: batch_size must be a positive integer, got {size!r}; leave it out and the planner decides"
            )
        options["max_rows"] = size
    given = {name: rest.pop(name) for name in names if name in rest}
    options |= {name: value for name, value in given.items() if value is not None}  # None: as if it were left out
    own = {"task", "processing_kwargs", *getattr(model, "get_model_kwargs", list)()}
    if unknown := sorted(set(rest) - own):
        known = sorted({*names, *own, "batch_size", "chunk_size", "convert_to_numpy", "convert_to_tensor", "device"})
        raise ConfigError(f"{where}: unknown option {unknown[0]!r}; choose from {', '.join(known)}")
    options |= rest
    return options


def _names(device: Any) -> list[str]:
    return [str(name) for name in device] if isinstance(device, (list, tuple)) else [str(device)]
