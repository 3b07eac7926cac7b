"""A model on a device: checked, and ready to run micro-batches."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memsafe.attention import grouped, interface, kernels
from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError
from memsafe.machine.device import Device, open_device
from memsafe.machine.refusals import is_out_of_memory
from memsafe.models import fallbacks, fuse, sbert, weights
from memsafe.models.packed import PackedModel
from memsafe.models.selfcheck import CheckStore, SelfCheck, run_self_check
from memsafe.models.tokenizing import InputEncoder
from memsafe.planning.architecture import Architecture
from memsafe.planning.batch import BatchShape, MicroBatch
from memsafe.planning.cost import CostKey, CostPrior

__all__ = ["LoadedModel", "ModelSpec"]


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

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.of(self.config, self.weights_bytes)

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
        shape = self.architecture
        heads = shape.num_heads
        prior = CostPrior.for_architecture(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            gated=shape.gated,
            num_heads=heads,
            bytes_per_element=self.dtype.itemsize,
            layout="packed" if self.packed else "padded",
            attention="eager" if self.attention in ("eager", "none") else "sdpa",
            vocab_logits=shape.vocab_size if "MaskedLM" in type(self.hf).__name__ else 0,
            small_mask=self.check.small_mask_ok,
            rotary_size=shape.rotary_size,
            score_limit=kernels.score_limit(heads) if self.workspace_bytes and self.dtype == torch.float32 else 0,
        )
        if shape.window is not None and self.packed:
            masks = grouped.window_bytes(shape.window, self.dtype.itemsize)
            prior = replace(prior, fixed_bytes=prior.fixed_bytes + masks)
        elif shape.window is not None:
            # Padded: a mask for the window, one for all, and one in the making; 20 bytes per pair of tokens were measured
            # for ModernBERT in transformers 4.57, 15 in version 5.
            prior = replace(prior, per_square_bytes=4 * prior.per_square_bytes)
        if prior.per_square_bytes and self.attention == "eager":
            # Models with attention of their own add position biases: 1.3 times the plain scores in MPNet, 3 in DeBERTa-v2.
            prior = replace(prior, per_square_bytes=3 * prior.per_square_bytes)
        return prior

    def cost_shape(self, batch: MicroBatch) -> BatchShape:
        """The shape of `batch` as its memory shows it: where nothing is padded, transformers makes no mask over pairs."""
        shape = batch.shape
        masked = batch.num_tokens < shape.tokens or self.architecture.window
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
        h, i, gated = self.architecture.hidden_size, self.architecture.intermediate_size, self.architecture.gated
        size = self.dtype.itemsize
        # What cost.py counts for the plain forward, with the widest tensors cut to one slice.
        slices = min(fallbacks.SLICE_TOKENS / max(shape.tokens, 1), 1.0) if self.can("chunk") else 1.0
        units = max(10 * h, 4 * h + 3 * i * slices) if gated else max(8 * h, 3 * h + 2 * i * slices)
        if rung == "half":
            units *= 0.95 if gated else 0.8
        per_token = units * size + 4 * 8
        plain = prior.fixed_bytes + prior.per_sequence_bytes * shape.sequences + prior.per_square_bytes * shape.squares
        return min(int(1.1 * (plain + per_token * shape.tokens)), bound_bytes)

    def flops(self, shape: BatchShape) -> float:
        """Floating-point operations of one forward; see :meth:`Architecture.flops`."""
        return self.architecture.flops(shape)

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
                stack.enter_context(fallbacks.sliced_feed_forward(self.st))
            if rung == "half":
                stack.enter_context(fallbacks.lower_precision(self.device.kind, self.half))
            if self._packed_model is not None and batch.packed and _has_tokens(batch):
                ids, types = self._packed_tensors(batch)
                return self._packed_model.forward(ids, batch.lengths, types, extras)
            features, uniform = self._padded_features(batch, extras)
            if self.check.small_mask_ok:
                stack.enter_context(interface.padded(uniform=uniform))
            return final_rows_of(self.st, features, extras.get("options"))

    @property
    def half(self) -> torch.dtype:
        """The half precision that the device computes natively; bfloat16 before float16."""
        return torch.bfloat16 if self.device.supports("bfloat16") else torch.float16

    def can(self, rung: str) -> bool:
        """Whether a rung of the ladder exists for this model on this device."""
        if rung == "chunk":
            return self.hf is not None and isinstance(self.st, torch.nn.Module) and fallbacks.can_slice(self.st)
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
                self._host = self.st if own else fallbacks.host_copy(self.st)
            features, _ = self._padded_features(batch, extras, torch.device("cpu"))
            return final_rows_of(self._host, features, extras.get("options"))

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
            interface.uninstall(self.hf)
            if self.check.in_place_ok:
                fuse.uninstall(self.hf)
        self._installed = False
        self._packed_model = self._host = None

    # tensors

    def _packed_tensors(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        ids = self._to_device(np.concatenate([item.input_ids for item in batch.items]))
        if "token_type_ids" not in self.encoder.feature_names:
            return ids, None
        if all(item.token_type_ids is None for item in batch.items):
            return ids, torch.zeros_like(ids)
        types = [item.token_type_ids for item in batch.items]
        filled = [np.zeros(n, np.int32) if t is None else t for t, n in zip(types, batch.lengths, strict=True)]
        return ids, self._to_device(np.concatenate(filled))

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
            features = self.encoder.preprocess(self.st, raw, extras)
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
            count = len(item.input_ids)  # type: ignore[arg-type]  # not num_tokens, which is 1 where there is none
            place = slice(width - count, width) if self.encoder.pad_left else slice(0, count)
            arrays["input_ids"][row, place] = np.asarray(item.input_ids)
            arrays["attention_mask"][row, place] = 1
            if "token_type_ids" in arrays:
                types = item.token_type_ids
                arrays["token_type_ids"][row, place] = np.asarray(0 if types is None else types)
        there = device == self._torch_device
        tensors = {n: self._to_device(a) if there else torch.from_numpy(a).to(device) for n, a in arrays.items()}
        return {**extras, **tensors}, min(batch.lengths) == width and _has_tokens(batch)

    # the self-check

    def _self_check(self, policy: MemoryPolicy) -> SelfCheck:
        """Decide packed or padded for this very model; remembered by revision, so that a second load is quick."""
        if self.encoder.mode == "opaque" or self.hf is None or not isinstance(self.hf, torch.nn.Module):
            return SelfCheck(False, False, "the model does not run on token ids through transformers")
        installed = interface.install(self.hf)
        if not installed:
            return SelfCheck(False, False, installed.reason)
        store = self._check_store(policy)
        check = store.load() if store is not None else None
        if check is None:
            check = self._run_self_check()
            if self.device.kind == "cpu" and policy.release != "never":
                self.device.release()  # 55 MiB after MiniLM's, which the heap would keep
            if store is not None:
                store.save(check)
        if not check.packed_ok and not check.small_mask_ok:
            interface.uninstall(self.hf)
        else:
            self._installed = True
            if check.in_place_ok:
                fuse.install(self.hf)
        if check.packed_ok:
            self._packed_model = PackedModel(self.st, head=check.head)
        return check

    def _check_store(self, policy: MemoryPolicy) -> CheckStore | None:
        """Where the check of this model is remembered; None for a model without a revision, or if nothing may be."""
        if not self._revision or not policy.learn:
            return None
        return CheckStore([self.kind, self.name, self._revision, str(self.dtype), _card(self.device)])

    def _run_self_check(self) -> SelfCheck:
        """Once more after an out-of-memory error; a neighbour may have come. Raises :class:`ModelTooLargeError`."""
        for _ in range(2):
            try:
                return run_self_check(self.st)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self.device.release()  # outside the block above, whose traceback holds the failed tensors
        interface.uninstall(self.hf)
        raise weights.too_large(self.name, None, 0, self.device.snapshot().free_bytes, self.device.name)


def _has_tokens(batch: MicroBatch) -> bool:
    """Whether each input is known by its tokens and has some: what packing and a forward without a mask need."""
    return all(item.input_ids is not None and len(item.input_ids) for item in batch.items)


def final_rows_of(st: Any, features: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Tensor:
    """Rows of a padded forward of a whole model, always of rank 2. options: of the call, for the modules' forwards."""
    rows = sbert.forward(st, features, options)
    return rows[:, None] if rows.ndim == 1 else rows


def _card(device: Device) -> str:
    """What kernels and speeds depend on: cards have kernels of their own, and machines of a cluster share the cache."""
    return torch.cuda.get_device_name(torch.device(device.name)) if device.kind == "cuda" else device.kind
