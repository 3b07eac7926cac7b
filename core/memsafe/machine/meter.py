"""Peak metering: the most bytes that a block of code held at once.

`StorageMeter` follows torch's storages one by one (exact, for one thread, a few microseconds per operation);
`Overlap` tells whether a process-wide high-water mark was shared by several measurements and so belongs to none.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Overlap", "Peak", "StorageMeter"]


@dataclass
class Peak:
    """What a measured block took at its peak beyond what was there at its entry, in bytes. Filled at its exit.

    live_bytes: of tensors alive at once; None if it was not asked for or cannot be known.
    resident_bytes: of the process on the device in all (the allocator's reserve, the resident size on the CPU); None
        if unknown, or if another measurement ran meanwhile, so that the peak cannot be said to be this block's.
    """

    live_bytes: int | None = None
    resident_bytes: int | None = None


class Overlap:
    """Measurements of one high-water mark, of which there is only one per process and device."""

    _all: dict[tuple[str, int], Overlap] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[object, bool] = {}

    @classmethod
    def of(cls, device_name: str) -> Overlap:
        """The one of this device. A forked child has its own: what its parent measured ended with the fork."""
        return cls._all.setdefault((device_name, os.getpid()), cls())

    def enter(self) -> object:
        """A measurement begins; every other one that is under way has company from now on, and so has this one."""
        token = object()
        with self._lock:
            alone = not self._active
            for other in self._active:
                self._active[other] = False
            self._active[token] = alone
        return token

    def leave(self, token: object) -> bool:
        """A measurement ends; True if it was alone from beginning to end."""
        with self._lock:
            return self._active.pop(token)


class _Tracked(weakref.ref):  # type: ignore[type-arg]
    """A storage that was made inside the block; does not keep it alive."""

    __slots__ = ("key", "num_bytes")
    key: int
    num_bytes: int


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Exact peak of the bytes of storages of one device kind that are made, or grown, inside the block.

    Only this thread's operations are seen. Memory that a kernel takes and gives back within itself is not (the
    resident measurement sees it), nor is a compiled graph's (torch.compile), which makes no storages of its own.
    Operations run as they would without the meter, and with the same results.
    """

    supports_higher_order_operators = True  # they run as they are; what they call inside is seen

    def __init__(self, device_kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._kind = device_kind
        self._tracked: dict[int, _Tracked] = {}
        # Filled by weak-reference callbacks, which may run at any moment in any thread; emptied by this thread only.
        self._freed: deque[_Tracked] = deque()
        self._traits: dict[Any, _Traits] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled module stays compiled under the meter: falling back to eager could change its last digits."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traits = self._traits.get(func)
        if traits is None:
            traits = self._traits[func] = _Traits(func, self._kind)
        if traits.composite is not None and all(_is_plain(t) for t in _tensors((args, kwargs))):
            with self:
                return traits.composite(*args, **kwargs)
        self._settle()
        live_bytes = self._live_bytes
        sizes = {s._cdata: s.nbytes() for s in self._storages((args, kwargs))} if traits.mutates else None
        out = func(*args, **kwargs)
        self._settle()
        added = self._record(out, args, kwargs, fresh=traits.fresh)
        if sizes is not None:
            added += self._record_growth(sizes, args, kwargs)
        self._live_bytes += added
        self.peak_bytes = max(self.peak_bytes, live_bytes + added)
        return out

    def _settle(self) -> None:
        """Take account of the storages that were freed since the last time."""
        while self._freed:
            gone = self._freed.popleft()
            self._live_bytes -= gone.num_bytes
            if self._tracked.get(gone.key) is gone:
                del self._tracked[gone.key]

    def _record(self, out: Any, args: Any, kwargs: Any, *, fresh: bool) -> int:
        """Track the storages of `out` that did not come in with the arguments; return their bytes."""
        added, given = 0, None
        for storage in self._storages(out):
            key = storage._cdata
            known = self._tracked.get(key)
            if known is not None and known() is not None:
                continue  # a view, or changed in place: growth is looked at for operations that declare it
            if fresh:
                if not storage.resizable():
                    continue  # torch.from_numpy: the memory is numpy's
            else:
                if given is None:
                    given = {s._cdata for s in self._storages((args, kwargs))}
                if key in given:
                    continue  # of a tensor that is older than the block
            added += self._track(storage, key, storage.nbytes())
        return added

    def _record_growth(self, sizes: dict[int, int], args: Any, kwargs: Any) -> int:
        """Storages that an operation resized (``out=``, ``resize_``); return the bytes that they grew by."""
        added = 0
        for storage in self._storages((args, kwargs)):
            key, num_bytes = storage._cdata, storage.nbytes()
            grown = num_bytes - sizes.get(key, num_bytes)
            if grown == 0:
                continue
            sizes[key] = num_bytes
            known = self._tracked.get(key)
            if known is not None and known() is not None:
                known.num_bytes += grown
                added += grown
            elif grown > 0:
                added += self._track(storage, key, grown)
        return added

    def _track(self, storage: torch.UntypedStorage, key: int, num_bytes: int) -> int:
        tracked = _Tracked(storage, self._freed.append)
        tracked.key, tracked.num_bytes = key, num_bytes
        self._tracked[key] = tracked
        return num_bytes

    def _storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        for tensor in _tensors(tree):
            if tensor.device.type != self._kind:
                continue
            try:
                yield tensor.untyped_storage()
            except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
                continue


class _Traits:
    """What the meter must know of an operation, looked up once.

    composite: its decomposition into other operations, or None. In inference mode the dispatcher hands over
        composite operations whole; running the same kernel under the meter shows what they hold in between.
    mutates: it changes an argument, and so might resize it.
    fresh: its argument was made a moment ago outside the dispatcher (``torch.tensor([...])``).
    """

    __slots__ = ("composite", "fresh", "mutates")

    def __init__(self, func: Any, device_kind: str) -> None:
        schema = getattr(func, "_schema", None)
        self.mutates = bool(schema is not None and schema.is_mutable)
        self.fresh = str(func) == "aten.lift_fresh.default"
        self.composite = None
        run = getattr(func, "_op_dk", None)
        has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
        if schema is None or run is None or has_kernel is None:
            return
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        if has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), device_kind.upper()):
            self.composite = lambda *args, **kwargs: run(key, *args, **kwargs)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Quantized, nested, sparse and oneDNN tensors have kernels of their own for some composite operations."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Tensors in an operation's arguments or results: alone, or in tuples, lists and dicts."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            if isinstance(item, torch.Tensor):
                yield item
            elif isinstance(item, (tuple, list, dict)):
                yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)
