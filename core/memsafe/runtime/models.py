"""A model on a device: loaded through sentence-transformers, checked, and ready to run micro-batches."""

from __future__ import annotations

import importlib
import json
import logging
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memsafe.config import MemoryPolicy, cache_dir
from memsafe.errors import ConfigError, MemsafeError, ModelError
from memsafe.planning.batch import BatchShape, MicroBatch
from memsafe.planning.cost import CostKey, CostPrior
from memsafe.runtime import fuse, kernels, ladder, packing, sbert, weights
from memsafe.runtime.device import Device, is_out_of_memory, open_device
from memsafe.runtime.selfcheck import SelfCheck, run_self_check
from memsafe.runtime.stub import PackedModel
from memsafe.runtime.tokenizing import InputEncoder

__all__ = ["LoadedModel", "ModelSpec", "load"]

log = logging.getLogger("memsafe")

_TOKEN_NAMES = ("input_ids", "token_type_ids", "attention_mask")
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ModelSpec:
    """What to load. model: folder, hub id, or a loaded SentenceTransformer / CrossEncoder; options: for its class."""

    kind: str
    model: Any
    options: Mapping[str, Any]
    dtype: str | None = None
    max_length: int | None = None
    truncation: str = "longest_first"
    query_max_length: int | None = None


def load(spec: ModelSpec, device: Device, policy: MemoryPolicy, room_bytes: int) -> LoadedModel:
    """Load `spec` onto `device`; `room_bytes` is what the weights may take.

    Raises :class:`ModelTooLargeError` before anything is loaded, :class:`ModelError` for a model that cannot be used.
    """
    reranker = spec.kind == "reranker"
    if not isinstance(spec.model, str):
        if spec.dtype is not None:
            raise ConfigError(f"dtype: got {spec.dtype!r} with a loaded model; load it in that dtype, or pass its name")
        if sbert.is_reranker(spec.model) != reranker:
            other, wanted = ("Embedder", "CrossEncoder") if reranker else ("Reranker", "SentenceTransformer")
            raise ModelError(f"model: got a {type(spec.model).__name__}; give it to {other}, or give a {wanted} here")
        return LoadedModel(spec.model.eval(), spec, device, policy, revision="", name=type(spec.model).__name__)
    options = dict(spec.options)
    known = {name: options.get(name) for name in ("revision", "cache_folder")}
    backend = options.get("backend", "torch")
    checkpoint = weights.inspect(spec.model, kind=spec.kind, backend=backend, **known)
    dtype = _dtype_name(spec.dtype, device)
    model_kwargs = dict(options.get("model_kwargs") or {})
    if dtype is not None:
        if any(name in model_kwargs for name in ("dtype", "torch_dtype")):
            raise ConfigError("dtype: given twice, as dtype and in model_kwargs; give it once")
        model_kwargs["dtype"] = getattr(torch, dtype)
    chosen = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    target = str(chosen).removeprefix("torch.") if chosen not in (None, "auto") else _default_dtype(chosen)
    if checkpoint is not None:
        weights.check_fits(checkpoint, target, room_bytes, device.name)
        if device.kind != "cpu":  # they pass through main memory, where nobody would say that it does not suffice
            host = open_device("cpu")
            weights.check_fits(checkpoint, target, host.snapshot().free_bytes, "cpu")
    if model_kwargs:
        options["model_kwargs"] = model_kwargs
    library = importlib.import_module("sentence_transformers")
    build = library.CrossEncoder if reranker else library.SentenceTransformer
    st = None
    try:
        st = build(spec.model, device=device.name, **options).eval()
    except MemsafeError:
        raise
    except Exception as error:  # whatever a damaged file makes of itself: pickle, zip, JSON, shapes, types
        if isinstance(error, TypeError) and "argument" in str(error):
            raise ConfigError(f"options: {error}") from error
        if not is_out_of_memory(error):
            raise ModelError(f"model: {spec.model!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if st is None:  # outside the block above, whose traceback holds what was loaded so far
        device.release()
        need = checkpoint.bytes_as(target) if checkpoint is not None else 0
        raise weights.too_large(spec.model, checkpoint, need, device.snapshot().free_bytes, device.name)
    if checkpoint is None:  # a hub id that was not on this machine before
        checkpoint = weights.inspect(spec.model, kind=spec.kind, backend=backend, **known)
    return LoadedModel(st, spec, device, policy, checkpoint.revision if checkpoint else "", spec.model)


class LoadedModel:
    """One copy of a model on one device. :meth:`forward` may be called from several threads at once.

    dim: width of a row of output, or None until known. packed: whether micro-batches run without padding; `path` says
    so with the reason. pad_multiple: what padded lengths are rounded up to.
    """

    def __init__(
        self, st: Any, spec: ModelSpec, device: Device, policy: MemoryPolicy, revision: str, name: str
    ) -> None:
        self.st = st
        self.device = device
        self.kind = spec.kind
        self.name = name
        self._policy = policy
        self._torch_device = torch.device(device.name)
        self._revision = revision
        if spec.max_length is not None:
            _set_max_length(st, spec.max_length)
        self.encoder = InputEncoder(
            st, pairs=spec.kind == "reranker", truncation=spec.truncation, query_max_length=spec.query_max_length
        )
        if (spec.truncation != "longest_first" or spec.query_max_length) and self.encoder.mode != "fast":
            raise ConfigError(
                f"truncation: got {spec.truncation!r}, but this model's own preprocessing must run unchanged"
            )
        self.hf = sbert.hf_model(st)
        self.dtype = next((p.dtype for p in st.parameters() if p.is_floating_point()), torch.float32)
        self.weights_bytes = sum(t.numel() * t.element_size() for t in (*st.parameters(), *st.buffers()))
        self._packed_model: PackedModel | None = None
        self._host: Any = None
        self._host_lock = threading.Lock()
        self._installed = False
        self.check = self._self_check(policy)
        self.packed = self.check.packed_ok
        self.path = "packed" if self.packed else f"padded ({self.check.reason})"
        self.pad_multiple = 8 if device.kind == "cuda" and not self.packed else 1

    # what planning wants to know

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def config(self) -> Any:
        return getattr(self.hf, "config", None)

    @property
    def attention(self) -> str:
        return str(getattr(self.config, "_attn_implementation", None) or "none")

    def cost_key(self) -> CostKey:
        chunks = "packed" if self.packed else "padded"
        return CostKey(
            model=f"{self.kind}:{self.name}",
            revision=self._revision or f"{self.weights_bytes}:{self.hf.__class__.__name__}",
            dtype=self.dtype_name,
            attention=f"{self.attention}:{self.check.small_mask_ok}:{self.check.in_place_ok}",
            layout=chunks,
            device=f"{_card(self.device)}:{self.device.total_bytes >> 30}:{self.device.num_cores}",
            torch_version=torch.__version__,
        )

    def cost_prior(self) -> CostPrior:
        hidden, intermediate, gated, heads, _ = _architecture(self.config, self.weights_bytes)
        logits = getattr(self.config, "vocab_size", 0) if "MaskedLM" in type(self.hf).__name__ else 0
        prior = CostPrior.for_architecture(
            hidden_size=hidden,
            intermediate_size=intermediate,
            gated=gated,
            num_heads=heads,
            bytes_per_element=self.dtype.itemsize,
            layout="packed" if self.packed else "padded",
            attention="eager" if self.attention in ("eager", "none") else "sdpa",
            vocab_logits=logits,
            small_mask=self.check.small_mask_ok,
            rotary_size=_rotary_size(self.config, hidden // heads),
            score_limit=kernels.score_limit(heads) if self.workspace_bytes and self.dtype == torch.float32 else 0,
        )
        window = _first(self.config, ("sliding_window", "local_attention"))
        if isinstance(window, int) and self.packed:
            prior = replace(prior, fixed_bytes=prior.fixed_bytes + packing.window_bytes(window, self.dtype.itemsize))
        elif isinstance(window, int):  # padded: a mask for the window, one for all, and one in the making
            prior = replace(prior, per_square_bytes=3 * prior.per_square_bytes)
        if prior.per_square_bytes and self.attention == "eager":
            # Models with attention of their own add position biases: 1.3 times the plain scores in MPNet, 3 in DeBERTa-v2.
            prior = replace(prior, per_square_bytes=3 * prior.per_square_bytes)
        return prior

    def cost_shape(self, batch: MicroBatch) -> BatchShape:
        """The shape of `batch` as its memory shows it: where nothing is padded, transformers makes no mask over pairs."""
        shape = batch.shape
        masked = batch.num_tokens < shape.tokens or _first(self.config, ("sliding_window", "local_attention"))
        if batch.packed or masked or self.check.small_mask_ok or self.attention != "sdpa":
            return shape
        return replace(shape, squares=0)

    @property
    def workspace_bytes(self) -> int:
        """What a kernel may hold at its own peak beside all that grows with tokens: the scores of one short sequence,
        which show where a micro-batch is so small that its feed-forward layers need less."""
        return kernels.SHORT_SCORES_BYTES if self.packed and self.device.kind == "cpu" else 0

    def rung_bound(self, rung: str, shape: BatchShape, bound_bytes: int) -> int:
        """The most that a rung takes on this device for `shape`, whose plain forward takes `bound_bytes` at most.

        Measured for one input of 4,000 tokens over nine architectures with feed-forward layers of four (gated: three)
        hidden sizes: chunk 0.65 (0.71) of the plain forward, half 0.33 to 0.55 (0.60 to 0.69). What grows with the
        square of the length stays.
        """
        if rung == "cpu":
            return 0
        prior = self.cost_prior()
        h, i, gated, _, _ = _architecture(self.config, self.weights_bytes)
        size = self.dtype.itemsize
        # What cost.py counts for the plain forward, with the widest tensors cut to one slice.
        slices = min(ladder.SLICE_TOKENS / max(shape.tokens, 1), 1.0) if self.can("chunk") else 1.0
        units = max(10 * h, 4 * h + 3 * i * slices) if gated else max(8 * h, 3 * h + 2 * i * slices)
        if rung == "half":
            units *= 0.95 if gated else 0.8
        per_token = units * size + 4 * 8
        plain = prior.fixed_bytes + prior.per_sequence_bytes * shape.sequences + prior.per_square_bytes * shape.squares
        return min(int(1.1 * (plain + per_token * shape.tokens)), bound_bytes)

    def flops(self, shape: BatchShape) -> float:
        """Floating-point operations of one forward: 2 per weight and token, and 4*H per pair of tokens and layer."""
        hidden, intermediate, gated, _, layers = _architecture(self.config, self.weights_bytes)
        per_token = 2 * layers * (4 * hidden * hidden + (3 if gated else 2) * hidden * intermediate)
        return float(per_token * shape.tokens + 4 * layers * hidden * shape.squares)

    # running

    @torch.inference_mode()
    def forward(self, batch: MicroBatch, extras: Mapping[str, Any], rung: str | None = None) -> Tensor:
        """Rows of `batch`, shape (len(batch), dim or labels), on the device, before any activation or normalisation.

        `rung`: one of :data:`memsafe.config.FALLBACKS`. Device memory errors pass through.
        """
        if rung == "cpu":
            return self._forward_on_host(batch, extras)
        with ExitStack() as stack:
            if rung is not None and self.can("chunk"):  # of equal numbers, so the other rungs may as well
                stack.enter_context(ladder.sliced_feed_forward(self.st))
            if rung == "half":
                stack.enter_context(ladder.lower_precision(self.device.kind, self.half))
            if self._packed_model is not None and batch.packed:
                ids, types = self._packed_tensors(batch)
                return self._packed_model.forward(ids, batch.lengths, types, extras)
            features, uniform = self._padded_features(batch, extras)
            if self.check.small_mask_ok:
                stack.enter_context(packing.padded(uniform=uniform))
            return final_rows_of(self.st, features)

    @property
    def half(self) -> torch.dtype:
        """The half precision that the device computes natively; bfloat16 before float16."""
        return torch.bfloat16 if self.device.supports("bfloat16") else torch.float16

    def can(self, rung: str) -> bool:
        """Whether a rung of the ladder exists for this model on this device."""
        if rung == "chunk":
            return self.hf is not None and isinstance(self.st, torch.nn.Module) and ladder.can_slice(self.st)
        if rung == "half":
            return self.dtype == torch.float32 and (self.device.supports("bfloat16") or self.device.supports("float16"))
        return self.device.kind != "cpu"

    def redo_in_float32(self, batch: MicroBatch, extras: Mapping[str, Any]) -> Tensor:
        """Rows computed on the CPU in float32: for those that came out of half precision as NaN."""
        return self._forward_on_host(batch, extras)

    @torch.inference_mode()
    def _forward_on_host(self, batch: MicroBatch, extras: Mapping[str, Any]) -> Tensor:
        with self._host_lock:
            own = self.device.kind == "cpu" and self.dtype == torch.float32
            self._check_host(batch, copied=self._host is None and not own)
            if self._host is None:
                self._host = self.st if own else ladder.host_copy(self.st)
            features, _ = self._padded_features(batch, extras, torch.device("cpu"))
            return final_rows_of(self._host, features)

    def _check_host(self, batch: MicroBatch, *, copied: bool) -> None:
        """Raise MemoryError if the machine lacks room for `batch`, and for a copy of the weights: it would not raise."""
        host = self.device if self.device.kind == "cpu" else open_device("cpu")
        weights = sum(t.numel() * max(t.element_size(), 4) for t in (*self.st.parameters(), *self.st.buffers()))
        prior = replace(self.cost_prior(), per_square_bytes=0.0)
        shape = BatchShape.of(batch.lengths, packed=False)
        per_token = prior.per_token_bytes * 4 / self.dtype.itemsize
        need = 1.5 * (per_token * shape.tokens + 5 * shape.squares) + (weights if copied else 0)
        snapshot = host.snapshot()
        free = snapshot.free_bytes - self._policy.reserve_bytes(snapshot.total_bytes)
        if need > free:
            raise MemoryError(f"{need:.0f} bytes of main memory for a forward in float32, {free} are free")

    def after_fork(self) -> None:
        """In a forked child: locks that other threads of the parent may have held are made anew."""
        self._host_lock = threading.Lock()
        self.encoder.after_fork()

    def drop_host_copy(self) -> None:
        with self._host_lock:
            self._host = None

    def close(self) -> None:
        """Undo what was installed in the transformers model. The caller drops its references to free the memory."""
        if self._installed:
            packing.uninstall(self.hf)
            if self.check.in_place_ok:
                fuse.uninstall(self.hf)
        self._installed = False
        self._packed_model = self._host = None

    # tensors

    def _packed_tensors(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        ids = self._to_device(np.concatenate([item.input_ids for item in batch.items]))
        if batch.items[0].token_type_ids is None:
            return ids, None
        return ids, self._to_device(np.concatenate([item.token_type_ids for item in batch.items]))

    def _to_device(self, values: Any) -> Tensor:
        """int64 on the device. Pinned on the way to an accelerator, so that the copy does not stop the host."""
        tensor = torch.from_numpy(values).long()
        if self._torch_device.type == "cuda":
            return tensor.pin_memory().to(self._torch_device, non_blocking=True)
        return tensor.to(self._torch_device)

    def _padded_features(
        self, batch: MicroBatch, extras: Mapping[str, Any], device: torch.device | None = None
    ) -> tuple[dict[str, Any], bool]:
        """Features of shape (rows, width) on the device, and whether all rows have the same length."""
        device = device or self._torch_device
        if batch.items[0].input_ids is None:
            raw = [item.raw for item in batch.items]
            features = sbert.preprocess(self.st, raw, extras.get("prompt"))
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}, False
        width = batch.shape.longest if not batch.packed else max(batch.lengths)
        rows = len(batch.items)
        arrays = {
            "input_ids": np.full((rows, width), self.encoder.pad_id, dtype=np.int64),
            "attention_mask": np.zeros((rows, width), dtype=np.int64),
        }
        if "token_type_ids" in self.encoder.feature_names:
            arrays["token_type_ids"] = np.full((rows, width), self.encoder.pad_type_id, dtype=np.int64)
        for row, item in enumerate(batch.items):
            place = slice(width - item.num_tokens, width) if self.encoder.pad_left else slice(0, item.num_tokens)
            arrays["input_ids"][row, place] = np.asarray(item.input_ids)
            arrays["attention_mask"][row, place] = 1
            if "token_type_ids" in arrays:
                types = item.token_type_ids
                arrays["token_type_ids"][row, place] = np.asarray(0 if types is None else types)
        there = device == self._torch_device
        tensors = {n: self._to_device(a) if there else torch.from_numpy(a).to(device) for n, a in arrays.items()}
        return {**extras, **tensors}, min(batch.lengths) == width

    # the self-check

    def _self_check(self, policy: MemoryPolicy) -> SelfCheck:
        """Decide packed or padded for this very model; remembered by revision, so that a second load is quick."""
        if self.encoder.mode == "opaque" or self.hf is None or not isinstance(self.hf, torch.nn.Module):
            return SelfCheck(False, False, "the model does not run on token ids through transformers")
        installed = packing.install(self.hf)
        if not installed:
            return SelfCheck(False, False, installed.reason)
        store = _CheckStore(self, policy)
        check = store.load()
        if check is None:
            check = self._run_self_check()
            store.save(check)
        if not check.packed_ok and not check.small_mask_ok:
            packing.uninstall(self.hf)
        else:
            self._installed = True
            if check.in_place_ok:
                fuse.install(self.hf)
        if check.packed_ok:
            self._packed_model = PackedModel(self.st, head=check.head)
        return check

    def _run_self_check(self) -> SelfCheck:
        """Once more after an out-of-memory error; a neighbour may have come. Raises :class:`ModelTooLargeError`."""
        for _ in range(2):
            try:
                return run_self_check(self.st)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self.device.release()  # outside the block above, whose traceback holds the failed tensors
        packing.uninstall(self.hf)
        raise weights.too_large(self.name, None, 0, self.device.snapshot().free_bytes, self.device.name)


def final_rows_of(st: Any, features: Mapping[str, Any]) -> Tensor:
    """Rows of a padded forward of a whole model, always of rank 2."""
    rows = sbert.forward(st, features)
    return rows[:, None] if rows.ndim == 1 else rows


def _card(device: Device) -> str:
    """What kernels and speeds depend on: cards have kernels of their own, and machines of a cluster share the cache."""
    return torch.cuda.get_device_name(torch.device(device.name)) if device.kind == "cuda" else device.kind


class _CheckStore:
    """Remembers self-checks by model revision, dtype, device kind and library versions."""

    def __init__(self, model: LoadedModel, policy: MemoryPolicy) -> None:
        import hashlib
        import os

        import transformers

        st_version = importlib.import_module("sentence_transformers").__version__
        key = [model.kind, model.name, model._revision, str(model.dtype), _card(model.device), torch.__version__]
        key += [transformers.__version__, st_version, "2"]
        self._usable = bool(model._revision) and policy.learn
        self._file = os.path.join(
            cache_dir(), "checks", hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32] + ".json"
        )

    def load(self) -> SelfCheck | None:
        if not self._usable:
            return None
        try:
            with open(self._file, encoding="utf-8") as stream:
                return SelfCheck(**json.load(stream))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, check: SelfCheck) -> None:
        if not self._usable:
            return
        import os
        from dataclasses import asdict

        try:
            os.makedirs(os.path.dirname(self._file), exist_ok=True)
            with open(f"{self._file}.{os.getpid()}", "w", encoding="utf-8") as stream:
                json.dump(asdict(check), stream)
            os.replace(f"{self._file}.{os.getpid()}", self._file)
        except OSError as error:
            log.debug("the self-check could not be remembered: %s", error)


def _architecture(config: Any, weights_bytes: int) -> tuple[int, int, bool, int, int]:
    """(hidden size, feed-forward size, gated, heads, layers), by the names that transformers' configs use."""
    get = getattr(config, "get_text_config", None)
    config = get() if callable(get) else config
    hidden = int(_first(config, ("hidden_size", "dim", "d_model")) or max(64, int((weights_bytes / 48) ** 0.5) // 8))
    intermediate = int(_first(config, ("intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "n_inner")) or 4 * hidden)
    heads = int(_first(config, ("num_attention_heads", "n_heads", "num_heads")) or max(1, hidden // 64))
    layers = int(_first(config, ("num_hidden_layers", "n_layers", "num_layers")) or 12)
    kind = str(getattr(config, "model_type", ""))
    gated = kind not in (
        "bert",
        "roberta",
        "xlm-roberta",
        "electra",
        "distilbert",
        "mpnet",
        "deberta-v2",
        "camembert",
        "albert",
    )
    return hidden, intermediate, gated, heads, layers


def _rotary_size(config: Any, head_size: int) -> int:
    """Elements per head that positions rotate, `head_size` where the config does not say; 0 without rotary positions."""
    get = getattr(config, "get_text_config", None)
    config = get() if callable(get) else config
    rotary = _first(config, ("rope_parameters", "rope_theta")) is not None
    return int(_first(config, ("head_dim",)) or head_size) if rotary else 0


def _first(config: Any, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _dtype_name(dtype: Any, device: Device) -> str | None:
    """The dtype to load in, or None for the checkpoint's. Raises :class:`ConfigError` for one that is unknown."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return next((half for half in ("bfloat16", "float16") if device.supports(half)), "float32")
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype: got {dtype!r}; choose from None, 'auto', 'float32', 'float16', 'bfloat16'")
    if name != "float32" and not device.supports(name):
        warnings.warn(f"{device.name} has no native {name}; it will be emulated, slowly", stacklevel=4)
    return name


def _default_dtype(chosen: Any) -> str | None:
    """What transformers loads in when nothing is said: the stored dtype since version 5, float32 before."""
    version = importlib.import_module("transformers").__version__
    return None if chosen == "auto" or int(version.split(".")[0]) >= 5 else "float32"


def _set_max_length(st: Any, max_length: int) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ConfigError(f"max_length: got {max_length!r}; give an int of at least 1, in tokens")
    config = getattr(sbert.hf_model(st), "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigError(f"max_length: got {max_length}, but the model has {positions} positions; give at most that")
    if hasattr(type(st), "max_seq_length"):
        st.max_seq_length = max_length
    else:
        st.max_length = max_length
        st.tokenizer.model_max_length = max_length
