"""A model on a device: checked, and ready to run micro-batches."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from memsafe.attention import interface, kernels
from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError
from memsafe.machine.device import Device, Peak, open_device
from memsafe.machine.refusals import is_out_of_memory
from memsafe.models import checkstore, fallbacks, late, sbert, segments, weights
from memsafe.models.identity import content_digest
from memsafe.models.priors import prior_of, runtime_prior, tiled, tokenwise_prior
from memsafe.models.private import private_copy
from memsafe.models.routes import Routes, Solo, rows_of_features
from memsafe.models.runtimes.attach import Attached
from memsafe.models.runtimes.session import RuntimeModel
from memsafe.models.selfcheck import SelfCheck, run_self_check
from memsafe.models.tokenizing import InputEncoder
from memsafe.planning.architecture import Architecture
from memsafe.planning.batch import BatchShape, MicroBatch
from memsafe.planning.cost import CostKey, CostPrior
from memsafe.runtimes import Quantization

__all__ = ["LoadedModel", "ModelSpec"]

_WARMING = 2
"""Forwards of another runtime that are not believed: the first ones in a process grew it by 28 MiB where 6 were due."""
MOST_PADDING = 0.05
"""Of what another runtime computes, which cannot take packed rows."""


@dataclass(frozen=True)
class ModelSpec:
    """What to load. model: folder, hub id, or a loaded SentenceTransformer / CrossEncoder; options: for its class.

    Raises :class:`ModelError` for an object of another class.
    """

    kind: str
    model: Any
    options: Mapping[str, Any]
    dtype: str | None = None
    max_length: int | None = None
    truncation: str = "longest_first"
    query_max_length: int | None = None
    outputs: tuple[str, ...] = ()
    """Of a model that has several."""
    engine: str = "torch"
    """Of :data:`memsafe.runtimes.ENGINES`."""
    quantization: Quantization = field(default_factory=Quantization)

    def __post_init__(self) -> None:
        if self.model is not None and not isinstance(self.model, str):
            sbert.check_handed_in(self.model, self.kind)


class LoadedModel:
    """One copy of a model on one device. :meth:`forward` may be called from several threads at once.

    st: the SentenceTransformer or CrossEncoder as it was loaded or handed in; it stays as it is. What runs is a private
    copy of its modules over the same weights. pad_multiple: what padded lengths are rounded up to. attached: another runtime in
    the place of its transformers model; None for torch.
    """

    def __init__(
        self,
        st: Any,
        spec: ModelSpec,
        device: Device,
        policy: MemoryPolicy,
        revision: str,
        name: str,
        attached: Attached | None = None,
    ) -> None:
        self.st = st
        self._attached = attached
        self._session = None if attached is None else attached.session
        self.device = device
        self.kind = spec.kind
        self.name = name
        self._policy = policy
        self._torch_device = torch.device(device.name)
        self._revision = revision
        handed_in = not isinstance(spec.model, str)
        if not handed_in:  # then its own encode cuts where we do
            limit_length(st, spec.max_length)
        run = private_copy(st)
        if handed_in:
            limit_length(run, spec.max_length)
        self.encoder = InputEncoder(
            run, pairs=spec.kind == "reranker", truncation=spec.truncation, query_max_length=spec.query_max_length
        )
        self.routes = Routes(run, spec.kind, self.encoder, self._torch_device)
        self.hf, self.dtype = self.routes.hf, self.routes.dtype
        self.weights_bytes = sum(t.numel() * t.element_size() for t in (*st.parameters(), *st.buffers()))
        if self._session is not None:
            self.weights_bytes += self._session.weights_bytes
        self._forwards = itertools.count()  # measured ones
        self._host: Solo | None = None
        self._host_lock = threading.Lock()
        self._self_check(spec, policy)

    @property
    def check(self) -> SelfCheck:
        """The way that forwards take."""
        return self.routes.check

    @property
    def packed(self) -> bool:
        """Whether micro-batches run without padding."""
        return self.check.packed_ok

    @property
    def path(self) -> str:
        """How micro-batches run, and why not packed."""
        if self.packed:
            return "packed"
        if self._attached is not None and self._session is not None:
            how = f"one input at a time: {self.check.reason}" if self.check.alone else "padded"
            return f"{self._attached.told}, {how}"
        if self.check.own:
            return f"the model's own encode or predict, one input at a time ({self.check.reason})"
        return f"{'one input at a time' if self.check.alone else 'padded'} ({self.check.reason})"

    @property
    def notes(self) -> tuple[str, ...]:
        """What every report should say of this model."""
        return (self._attached.note,) if self._attached is not None and self._attached.note else ()

    @property
    def agreement(self) -> float | None:
        """How well an export agrees with float32; see :class:`memsafe.runtimes.Quantization`. None where nobody has measured it."""
        return None if self._attached is None else self._attached.agreement

    @property
    def one_core_each(self) -> bool:
        """Whether each micro-batch computes on one core, however many there are."""
        return self._session is not None

    @property
    def counts_process(self) -> bool:
        """Whether what forwards take is measured at the process, since their tensors cannot be followed."""
        return self._session is not None

    @property
    def most_padding(self) -> float | None:
        """Of the tokens computed at most this share is to be padding; None: as it comes."""
        return None if self._session is None else MOST_PADDING

    @property
    def survives_fork(self) -> bool:
        """Whether a forked child may use it."""
        return self._session is None or self._session.survives_fork

    @property
    def pad_multiple(self) -> int:
        return 8 if self.device.kind == "cuda" and not self.packed else 1

    @cached_property
    def content(self) -> str:
        """The same for the same model, whatever it is called and wherever its files lie: see :mod:`memsafe.models.identity`."""
        place = self.hf if isinstance(self.hf, RuntimeModel) else None
        otherwise = (self._revision or self.name) if place is None else place.runtime
        return content_digest(self.st, self.encoder.way(None, {}).encode, otherwise)

    @property
    def commit(self) -> str | None:
        """The hub's name of the revision that was loaded, where it came from there."""
        return getattr(self.config, "_commit_hash", None)

    # what planning wants to know

    @property
    def dtype_name(self) -> str:
        if self._session is not None:
            return self._session.dtype
        return str(self.dtype).removeprefix("torch.")

    @property
    def config(self) -> Any:
        if self.hf is None and self._tiles is not None:  # inside a Router
            return self._tiles.config
        return getattr(self.hf, "config", None)

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.of(self.config, self.weights_bytes)

    @cached_property
    def _tokenwise(self) -> bool:
        return self.hf is None and sbert.is_tokenwise(self.routes.run)

    @property
    def attention(self) -> str:
        if isinstance(self.hf, RuntimeModel):
            return self.hf.runtime
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
            versions=" ".join(checkstore.versions("memsafe", "torch", "transformers").values()),
        )

    def cost_prior(self) -> CostPrior:
        """What a forward takes, before anything is measured."""
        if self._session is not None and self._attached is not None:
            fused = self._session.fuses_attention and getattr(self.config, "_attn_implementation", None) == "sdpa"
            return runtime_prior(self.architecture, fused=fused, small_mask=self._attached.small_mask)
        if self._tokenwise:
            return tokenwise_prior(self.architecture, self.dtype)
        prior = prior_of(
            self.architecture,
            self.config,
            self.dtype,
            attention=self.attention,
            packed=self.packed,
            small_mask=self.check.small_mask_ok,
            ours=self._ours,
            class_name=type(self.hf).__name__ if self._tiles is None else "",
        )
        return prior if self._tiles is None else tiled(prior, self.architecture, self._tiles, self.check.row_values)

    @cached_property
    def _tiles(self) -> late.Tiles | None:
        """How sparse rows are made; None for rows of other kinds, and where the model's own code makes them."""
        return None if self.check.own else late.tiles(self.routes.run, self.device.kind)

    def cost_shape(self, batch: MicroBatch) -> BatchShape:
        """The shape of `batch` as its memory shows it: where nothing is padded, transformers makes no mask over pairs."""
        shape = batch.shape
        if self._session is not None:
            return shape
        masked = batch.num_tokens < shape.tokens or self.architecture.window
        if batch.packed or masked or self.check.small_mask_ok or self.attention != "sdpa":
            return shape
        return replace(shape, squares=0)

    @property
    def workspace_bytes(self) -> int:
        """What kernels may hold at their own peak beside all that grows with tokens: the scores of one short sequence, which show
        where a micro-batch is so small that its feed-forward layers need less; and what a matrix product puts into another order."""
        return (kernels.SHORT_SCORES_BYTES if self._ours else 0) + self.routes.products_bytes

    @property
    def _ours(self) -> bool:
        """Whether attention is :mod:`memsafe.attention`'s on a CPU; else each model's is its own."""
        return self.packed and self.routes.can_mask and self.device.kind == "cpu"

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
    def forward(self, batch: MicroBatch, extras: Mapping[str, Any], rung: str | None = None) -> Any:
        """Rows of `batch`, shape (len(batch), dim or labels), on the device, before any activation or normalisation.

        `rung`: one of :data:`memsafe.config.FALLBACKS`. Device memory errors pass through.
        """
        if rung == "cpu":
            return self._forward_on_host(batch, extras)
        return self.routes.forward(batch, extras, None if rung is None else partial(self._on_rung, rung))

    @contextmanager
    def _on_rung(self, rung: str, model: Any) -> Iterator[None]:
        """A forward of `model` within runs as `rung` of the ladder says."""
        with ExitStack() as stack:
            if self.can("chunk"):  # of equal numbers, so the other rungs may as well
                stack.enter_context(fallbacks.sliced_feed_forward(model))
            if rung == "half":
                stack.enter_context(fallbacks.lower_precision(self.device.kind, self.half))
            yield

    @property
    def half(self) -> torch.dtype:
        """The half precision that the device computes natively; bfloat16 before float16."""
        return torch.bfloat16 if self.device.supports("bfloat16") else torch.float16

    def can(self, rung: str) -> bool:
        """Whether a rung of the ladder exists for this model on this device."""
        if self._session is not None:
            return False
        if rung == "chunk":
            run = self.routes.run
            return self.hf is not None and isinstance(run, torch.nn.Module) and fallbacks.can_slice(run)
        if rung == "half":
            return self.dtype == torch.float32 and (self.device.supports("bfloat16") or self.device.supports("float16"))
        return self.device.kind != "cpu"

    def redo_in_float32(self, batch: MicroBatch, extras: Mapping[str, Any]) -> Any:
        """Rows computed on the CPU in float32: for those that came out of half precision as NaN."""
        return self._forward_on_host(batch, extras)

    @torch.inference_mode()
    def _forward_on_host(self, batch: MicroBatch, extras: Mapping[str, Any]) -> Any:
        rows = self._rows_on_host(batch, extras)
        return late.rows_of_kind(self.kind, rows, self.routes.own)

    def _rows_on_host(self, batch: MicroBatch, extras: Mapping[str, Any]) -> Any:
        cpu = torch.device("cpu")
        with self._host_lock:
            own = self.device.kind == "cpu" and self.dtype == torch.float32
            self._check_host(batch, copied=self._host is None and not own)
            if self._host is None:
                self._host = Solo(private_copy(self.routes.run) if own else fallbacks.host_copy(self.routes.run))
            host = self._host
            if "chunks" in extras:
                chunks = partial(self.routes.chunks_on, item=batch.items[0], extras=extras, device=cpu)
                return host.rows(chunks)
            if not self.routes.alone(batch.items):
                features, _ = self.routes.features(host.model, batch.items, extras, cpu)
                return rows_of_features(host.model, features, extras.get("options"))
            one = partial(self.routes.one_on, extras=extras, device=cpu)
            return segments.join([host.rows(partial(one, item=item)) for item in batch.items])

    def _check_host(self, batch: MicroBatch, *, copied: bool) -> None:
        """Raise MemoryError if the machine lacks room for `batch`, and for a copy of the weights: it would not raise."""
        host = self.device if self.device.kind == "cpu" else open_device("cpu")
        weights = sum(
            t.numel() * max(t.element_size(), 4) for t in (*self.routes.run.parameters(), *self.routes.run.buffers())
        )
        prior = replace(self.cost_prior(), per_square_bytes=0.0)
        shape = BatchShape.of(batch.lengths, packed=False)
        per_token = prior.per_token_bytes * 4 / self.dtype.itemsize
        need = 1.5 * (per_token * shape.tokens + 5 * shape.squares) + (weights if copied else 0)
        snapshot = host.snapshot()
        free = snapshot.free_bytes - self._policy.reserve_bytes(snapshot.total_bytes)
        if need > free:
            raise MemoryError(f"{need:.0f} bytes of main memory for a forward in float32, {free} are free")

    def measure(self, live: bool) -> AbstractContextManager[Peak]:
        """As :meth:`Device.measure`. Of another runtime all is measured at the process: what `live` asks for is by how much it
        grew from when the runtime held nothing."""
        if self._session is None:
            return self.device.measure(live)
        return self._measure_session(live)

    @contextmanager
    def _measure_session(self, live: bool) -> Iterator[Peak]:
        if live:
            self.release()
            self.device.release()
        with self.device.measure() as peak:
            yield peak
        if next(self._forwards) < _WARMING:
            peak.resident_bytes = None
        if live:
            peak.live_bytes = peak.resident_bytes

    def release(self) -> int:
        """Give back what forwards keep for later ones, of which the device knows nothing; returns how many bytes left the process."""
        if self._session is None:
            return 0
        before = self.device.process_bytes()
        self._session.release()
        return max(before - self.device.process_bytes(), 0)

    def after_fork(self) -> None:
        """In a forked child: locks that other threads of the parent may have held are made anew."""
        self._host_lock = threading.Lock()
        self.encoder.after_fork()
        self.routes.after_fork()

    def drop_host_copy(self) -> None:
        with self._host_lock:
            self._host = None

    def close(self) -> None:
        """Let go of what is beside the weights. The caller drops its references to free those."""
        self._host = None
        self.routes.uninstall()
        if self._session is not None:
            self._session.close()

    # the self-check

    def _self_check(self, spec: ModelSpec, policy: MemoryPolicy) -> None:
        """Find this very model's way; remembered by everything that can change rows, so that a second load is quick."""
        store = self._check_store(spec, policy)
        known = store.load() if store is not None else None
        if known is not None:
            self.routes.use(known)
            return
        check = self._run_self_check()
        if self.device.kind == "cpu" and policy.release != "never":
            self.device.release()  # 55 MiB after MiniLM's, which the heap would keep
        if store is not None:
            store.save(check)

    def _check_store(self, spec: ModelSpec, policy: MemoryPolicy) -> checkstore.CheckStore | None:
        """Where the check of this model is remembered; None for one that was handed in loaded, or if nothing may be."""
        if not self._revision or not policy.learn:
            return None
        key = checkstore.check_key(
            model=self.routes.run,
            spec={**vars(spec), "model": self.name, "options": dict(spec.options)},
            revision=self._revision,
            card=_card(self.device),
            tokenizer=self.routes.tokenizer,
            tokens=self.encoder.mode,
        )
        return checkstore.CheckStore(key)

    def _run_self_check(self) -> SelfCheck:
        """Once more after an out-of-memory error; a neighbour may have come. Raises :class:`ModelTooLargeError`."""
        for _ in range(2):
            try:
                return run_self_check(self.routes)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self.device.release()  # outside the block above, whose traceback holds the failed tensors
        self.routes.uninstall()
        raise weights.too_large(self.name, None, 0, self.device.snapshot().free_bytes, self.device.name)


def limit_length(run: Any, max_length: int | None) -> None:
    """Cut inputs of `run`, a private copy, after `max_length` tokens; and where a learned table of positions ends,
    whether that length was given or saved with the model. Raises :class:`ConfigError` for what is no length."""
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ConfigError(f"max_length: got {max_length!r}; give an int of at least 1, in tokens")
    hf_model = sbert.hf_model(run)
    positions = interface.learned_positions(hf_model) if isinstance(hf_model, torch.nn.Module) else None
    saved = sbert.max_length(run)
    length = saved if max_length is None else max_length
    if positions is not None and length is not None and length > positions:
        whose = "max_length: got" if max_length is not None else "the model was saved with a maximum length of"
        warnings.warn(f"{whose} {length}, but it has learnt {positions} positions; inputs are cut there", stacklevel=5)
        length = positions
    if length != saved and length is not None:
        sbert.set_max_length(run, length)


def _card(device: Device) -> str:
    """What kernels and speeds depend on: cards have kernels of their own, and machines of a cluster share the cache."""
    return torch.cuda.get_device_name(torch.device(device.name)) if device.kind == "cuda" else device.kind
