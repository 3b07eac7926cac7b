"""Memory trouble on demand, for tests: a device with exact arithmetic, and models on it that cost no time.

A program that uses memsafe can be tested against a device that is too small, shared, or refuses memory::

    device = SimulatedDevice(total="1GiB")
    embedder = SimulatedEmbedder(device, memory=MemoryPolicy(wait_s=0))
    device.take("900MiB")                       # a neighbour comes
    vectors = embedder.embed_documents(texts)   # smaller micro-batches, the same vectors
    device.at(3, lambda: device.take("80MiB"))  # another one comes before the third forward from now
    device.refuse(2)                            # the next two requests fail although there is room

Everything but the device and the model is the real thing: planning, admission, recovery, reports, errors. A row depends
on its own input only, so runs with and without trouble must give equal arrays. Nothing is read or written on disk.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from memsafe.config import GiB, MemoryPolicy, MiB, Size, parse_size
from memsafe.embedder import Embedder
from memsafe.engine.engine import Engine
from memsafe.engine.residence import Residence
from memsafe.engine.sinks import Rows
from memsafe.errors import ConfigError
from memsafe.events import EventHook
from memsafe.machine.device import Device, Peak
from memsafe.models import weights
from memsafe.models.model import ModelSpec
from memsafe.models.ways import Encoded, Limits, Way
from memsafe.planning.batch import BatchShape, MicroBatch
from memsafe.planning.budget import MemorySnapshot
from memsafe.planning.cost import CostKey, CostPrior
from memsafe.reranker import Reranker

__all__ = ["Forward", "SimulatedDevice", "SimulatedEmbedder", "SimulatedModel", "SimulatedReranker"]

_numbers = itertools.count()


@dataclass(frozen=True)
class Forward:
    """What the device saw of one forward. room_bytes: what could be had when it began; rung: of the fallback ladder."""

    sequences: int
    tokens: int
    asked_bytes: int
    room_bytes: int
    rung: str | None
    outcome: str
    """``"done"``, ``"out of memory"`` or ``"error"``."""


class SimulatedDevice(Device):
    """A device of `total` bytes, shared with neighbours, behind an allocator that caches what is freed. Thread-safe.

    out_of_memory: makes the exception for a refused request of so many bytes; None for torch.OutOfMemoryError.
    kind: what memsafe takes it for; other than ``"cpu"``: an accelerator, on which forwards run one after another.
    """

    def __init__(
        self,
        total: Size = GiB,
        *,
        out_of_memory: Callable[[int], Exception] | None = None,
        kind: str = "simulated",
    ) -> None:
        size = parse_size(total, name="total")
        if isinstance(size, float) or size < 1:
            raise ConfigError(f"total: got {total!r}; give bytes or a size such as '1GiB'")
        self.kind = kind
        self.index = next(_numbers)
        self.name = f"{kind}:{self.index}"
        self.forwards: list[Forward] = []
        self._total = size
        self._out_of_memory = out_of_memory or _refusal
        self._lock = threading.RLock()
        self._allocated = self._reserved = self._neighbours = self._unusable = self._refusals = 0
        self._peaks = [0, 0]  # allocated, reserved
        self._actions: list[tuple[int, Callable[[], object]]] = []
        self._started = 0

    # what a test does to it

    def take(self, size: Size) -> None:
        """A neighbour takes memory: at most what is free, as a real one would."""
        with self._lock:
            self._neighbours += min(self._bytes(size), self._free_bytes())

    def give(self, size: Size | None = None) -> None:
        """Neighbours give memory back; None: all of it."""
        with self._lock:
            self._neighbours -= self._neighbours if size is None else min(self._bytes(size), self._neighbours)

    def refuse(self, times: int = 1) -> None:
        """Refuse the next requests, whatever is free."""
        self._refusals = times

    def fragment(self, size: Size) -> None:
        """Let the cache hold so much that serves no request until the cache is released."""
        with self._lock:
            num_bytes = min(self._bytes(size), self._free_bytes())
            self._reserved += num_bytes
            self._unusable += num_bytes

    def at(self, forward: int, action: Callable[[], object]) -> None:
        """Call `action` right before the `forward`-th forward from now (1: the next one)."""
        self._actions.append((self._started + forward, action))

    # what memsafe asks of it

    @property
    def total_bytes(self) -> int:
        return self._total

    @property
    def num_cores(self) -> int:
        return 1

    def snapshot(self) -> MemorySnapshot:
        with self._lock:
            return MemorySnapshot(self._free_bytes(), self._total, self._allocated, self._reserved)

    def process_bytes(self) -> int:
        return self._reserved

    def supports(self, dtype_name: str) -> bool:
        return dtype_name.removeprefix("torch.") in ("float32", "float16", "bfloat16")

    def release(self) -> int:
        with self._lock:
            released = self._reserved - self._allocated
            self._reserved, self._unusable = self._allocated, 0
            return released

    @contextmanager
    def measure(self, live: bool = False) -> Iterator[Peak]:
        with self._lock:
            before = (self._allocated, self._reserved)
            self._peaks = list(before)
        peak = Peak()
        try:
            yield peak
        finally:
            with self._lock:
                peak.live_bytes, peak.resident_bytes = self._peaks[0] - before[0], self._peaks[1] - before[1]

    # what models on it do

    def allocate(self, num_bytes: int) -> None:
        """Take bytes for tensors, from the cache as far as it goes; raises the device's out-of-memory error."""
        with self._lock:
            cached = self._reserved - self._allocated - self._unusable
            grown = max(num_bytes - cached, 0)
            if num_bytes and (self._refusals or grown > self._free_bytes()):  # the CPU's rung asks for nothing here
                self._refusals = max(self._refusals - 1, 0)
                raise self._out_of_memory(num_bytes)
            self._allocated += num_bytes
            self._reserved += grown
            self._peaks = [max(self._peaks[0], self._allocated), max(self._peaks[1], self._reserved)]

    def free(self, num_bytes: int) -> None:
        """Give bytes of tensors back to the cache."""
        with self._lock:
            self._allocated -= num_bytes

    @contextmanager
    def forward(self, shape: BatchShape, num_bytes: int, rung: str | None = None) -> Iterator[None]:
        """Hold `num_bytes` during the block, and record it in :attr:`forwards`."""
        with self._lock:
            self._started += 1
            due = [action for number, action in self._actions if number == self._started]
        for action in due:
            action()
        snapshot, outcome = self.snapshot(), "out of memory"
        try:
            self.allocate(num_bytes)
            outcome = "error"
            try:
                yield
            finally:
                self.free(num_bytes)
            outcome = "done"
        finally:
            room = snapshot.free_bytes + snapshot.reusable_bytes
            self.forwards.append(Forward(shape.sequences, shape.tokens, num_bytes, room, rung, outcome))

    def _free_bytes(self) -> int:
        return self._total - self._neighbours - self._reserved

    def _bytes(self, size: Size) -> int:
        parsed = parse_size(size)
        return parsed if isinstance(parsed, int) else int(parsed * self._total)


def _refusal(num_bytes: int) -> Exception:
    import torch

    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes} bytes (simulated).")


class SimulatedModel:
    """A model whose forwards cost exactly ``fixed + per_token*tokens + per_sequence*sequences + per_square*squares``.

    A token is a word; two more mark the ends. Rows are a function of the input's own words.

    packed: without padding. dimension: of rows (1 for a reranker). dtype: ``"float16"`` makes :meth:`overflow_on` work.
    rungs: what each possible fallback costs on the device, as a fraction. prior_scale: how wrong memsafe's first
    prediction is (0.3: it expects 0.3 of the truth).
    """

    def __init__(
        self,
        device: SimulatedDevice,
        *,
        dimension: int = 8,
        max_length: int | None = 8192,
        weights_bytes: int = 64 * MiB,
        fixed_bytes: int = 1 * MiB,
        per_token_bytes: int = 16 * 1024,
        per_sequence_bytes: int = 1024,
        per_square_bytes: int = 0,
        packed: bool = True,
        dtype: str = "float32",
        rungs: Mapping[str, float] | None = None,
        prior_scale: float = 1.0,
    ) -> None:
        self.device = device
        self.dim = dimension
        self.packed = packed
        self.pad_multiple = 1
        self.workspace_bytes = 0
        self.path = "packed" if packed else "padded (simulated)"
        self.dtype_name = dtype
        self.weights_bytes = weights_bytes
        self.encoder = _WordEncoder(max_length)
        self.st = SimpleNamespace(
            prompts={"query": "query: ", "document": ""},
            default_prompt_name=None,
            num_labels=dimension,
            activation_fn=None,
            get_embedding_dimension=lambda: dimension,
        )
        self._costs = (fixed_bytes, per_token_bytes, per_sequence_bytes, per_square_bytes)
        self._rungs = {"chunk": 0.7, "half": 0.5, "cpu": 0.0} if rungs is None else dict(rungs)
        self._prior_scale = prior_scale
        self._errors: dict[bytes, Exception] = {}
        self._overflows: set[bytes] = set()
        self.open()

    # what a test does to it

    def fail_on(self, text: Any, error: Exception) -> None:
        """Every forward that holds `text` raises `error`."""
        self._errors[self._key(text)] = error

    def overflow_on(self, text: Any) -> None:
        """The row of `text` is NaN in half precision."""
        self._overflows.add(self._key(text))

    def num_bytes(self, shape: BatchShape, rung: str | None = None) -> int:
        """What a forward of `shape` takes on the device."""
        fixed, token, sequence, square = self._costs
        exact = fixed + token * shape.tokens + sequence * shape.sequences + square * shape.squares
        return int(exact * (1.0 if rung is None else self._rungs[rung]))

    # what memsafe asks of it: see memsafe.models.model.LoadedModel

    name, content, commit = "simulated", "simulated", None
    notes: tuple[str, ...] = ()
    one_core_each, counts_process, survives_fork = False, False, True
    most_padding: float | None = None

    def measure(self, live: bool) -> AbstractContextManager[Peak]:
        return self.device.measure(live)

    def release(self) -> int:
        return 0

    def cost_key(self) -> CostKey:
        layout = "packed" if self.packed else "padded"
        return CostKey("simulated", "", self.dtype_name, "", layout, self.device.name, "")

    def cost_prior(self) -> CostPrior:
        fixed, token, sequence, square = (self._prior_scale * cost for cost in self._costs)
        return CostPrior(fixed, token, sequence, square)

    def cost_shape(self, batch: MicroBatch) -> BatchShape:
        return batch.shape

    def flops(self, shape: BatchShape) -> float:
        return float(shape.tokens)

    def can(self, rung: str) -> bool:
        return rung in self._rungs

    def rung_bound(self, rung: str, shape: BatchShape, bound_bytes: int) -> int:
        return int(bound_bytes * self._rungs[rung])

    def forward(self, batch: MicroBatch, extras: Mapping[str, Any], rung: str | None = None) -> Rows:
        with self.device.forward(batch.shape, self.num_bytes(batch.shape, rung), rung):
            keys = [item.input_ids.tobytes() for item in batch.items if item.input_ids is not None]
            for key in keys:
                if key in self._errors:
                    raise self._errors[key]
            half = self.dtype_name != "float32"
            rows = self._rows(batch, np.float16 if half or rung == "half" else np.float32)
            if half:
                rows[[key in self._overflows for key in keys]] = np.nan
            return rows

    def redo_in_float32(self, batch: MicroBatch, extras: Mapping[str, Any]) -> Rows:
        return self._rows(batch, np.float32)

    def after_fork(self) -> None:
        return

    def drop_host_copy(self) -> None:
        return

    def open(self) -> None:
        """Take the memory of the weights."""
        self.device.allocate(self.weights_bytes)
        self.here = True

    def close(self) -> None:
        self.here = False
        self.device.free(self.weights_bytes)

    def _rows(self, batch: MicroBatch, dtype: Any) -> Rows:
        scale = np.arange(1, self.dim + 1, dtype=np.float64)
        rows = [np.sin(np.asarray(item.input_ids, np.float64)[:, None] * scale).mean(axis=0) for item in batch.items]
        return np.stack(rows).astype(dtype).astype(np.float32)

    def _key(self, text: Any) -> bytes:
        ids = self.encoder.encode([text])[0].input_ids
        return b"" if ids is None else ids.tobytes()


class _WordEncoder:
    """Words to ids: see memsafe.models.tokenizing.InputEncoder."""

    mode = "fast"

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length

    def way(self, prompt: str | None = None, options: Mapping[str, Any] | None = None) -> Way:
        return _WordWay(prompt or "", Limits(self.max_length))

    def encode(self, inputs: Sequence[Any], prompt: str | None = None) -> list[Encoded]:
        return self.way(prompt).encode(inputs)


class _WordWay(Way):
    mode = "fast"

    def __init__(self, prompt: str, limits: Limits) -> None:
        super().__init__(limits, extras={}, key=())
        self._prompt = prompt

    def encode(self, inputs: Sequence[Any]) -> list[Encoded]:
        encoded = []
        for value in inputs:
            text = self._prompt + (value if isinstance(value, str) else " [SEP] ".join(value))
            ids = [101, *(zlib.crc32(word.encode()) % 30_000 for word in text.split()), 102]
            kept = ids[: self.max_length]
            encoded.append(Encoded(np.array(kept, dtype=np.int32), None, len(kept), len(kept) < len(ids)))
        return encoded


def _engine(models: Sequence[SimulatedModel], policy: MemoryPolicy, hooks: Sequence[EventHook]) -> Engine:
    devices = [model.device for model in models]
    policy = policy.with_options(learn=False)
    return Engine(ModelSpec("simulated", None, {}), devices, policy, hooks, partial(_SimulatedResidence, list(models)))


class _SimulatedResidence(Residence):
    """Has models that are given, not loaded."""

    def __init__(self, models: list[SimulatedModel], *args: Any) -> None:
        self._given = models
        super().__init__(*args)

    def _load(self, spec: Any, device: Device, position: int) -> None:
        model: Any = self._given[position]
        if not model.here:  # it has left for a while (unload_after_s)
            seen = device.snapshot()
            need, room = model.weights_bytes, self._budget(device, seen.allocated_bytes).headroom_bytes(seen)
            if need > room:
                raise weights.given_too_large(model.name, need, need, room, device.name)
            model.open()
        self.models.append(model)
        self._baselines.append(device.snapshot().allocated_bytes - model.weights_bytes)


class SimulatedEmbedder(Embedder):
    """An :class:`memsafe.Embedder` on simulated devices. options: of :class:`SimulatedModel`.

    simulated: the models, one a device.
    """

    def __init__(
        self,
        device: SimulatedDevice | Sequence[SimulatedDevice],
        *,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        **options: Any,
    ) -> None:
        self.simulated = _models(device, options)
        super().__init__("simulated", memory=memory, hooks=hooks)

    def _make_engine(self, spec: Any, devices: Any, policy: MemoryPolicy, hooks: Sequence[EventHook]) -> Engine:
        return _engine(self.simulated, policy, hooks)


class SimulatedReranker(Reranker):
    """A :class:`memsafe.Reranker` on simulated devices, with one score a pair. options: of :class:`SimulatedModel`."""

    def __init__(
        self,
        device: SimulatedDevice | Sequence[SimulatedDevice],
        *,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        **options: Any,
    ) -> None:
        self.simulated = _models(device, {"dimension": 1, **options})
        super().__init__("simulated", memory=memory, hooks=hooks)

    def _make_engine(self, spec: Any, devices: Any, policy: MemoryPolicy, hooks: Sequence[EventHook]) -> Engine:
        return _engine(self.simulated, policy, hooks)


def _models(device: Any, options: Mapping[str, Any]) -> list[SimulatedModel]:
    devices = [device] if isinstance(device, SimulatedDevice) else list(device)
    return [SimulatedModel(each, **options) for each in devices]
