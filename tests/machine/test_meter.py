"""machine/meter.py: what the tensors of a block took."""

from __future__ import annotations

import gc
import threading
import time
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from memsafe.machine.meter import StorageMeter


def live_peak(block: Callable[[], Any], *, inference: bool = True) -> int:
    with torch.inference_mode(inference), torch.no_grad(), StorageMeter("cpu") as meter:
        block()
    return meter.peak_bytes


both_modes = pytest.mark.parametrize("inference", [True, False])


@both_modes
def test_storages_alive_at_once(inference: bool) -> None:
    """A chain of operations: inputs and outputs together, without what was freed on the way."""

    def block() -> None:
        x = torch.zeros(1000)  # 4000
        y = x + 1  # 8000
        del x
        z = y * 2  # 8000
        del y, z
        torch.zeros(1500)  # 6000

    assert live_peak(block, inference=inference) == 8000


@both_modes
def test_views_and_in_place_operations_cost_nothing(inference: bool) -> None:
    """A view keeps its storage alive and is not counted again; in-place operations make none."""

    def block() -> None:
        x = torch.zeros(1000)
        view = x[:10].view(2, 5).t()
        x.add_(1).mul_(2).relu_()
        del x  # the view still holds all 4000 bytes
        torch.ones(250)
        view.numel()

    assert live_peak(block, inference=inference) == 5000


@both_modes
def test_older_tensors_are_not_the_blocks(inference: bool) -> None:
    """What was live at entry is not counted, whether it is viewed, changed or read."""
    old = torch.zeros(1000)

    def block() -> None:
        old.view(10, 100).t().contiguous()[0]  # contiguous copies: 4000
        old[5:].add_(1)
        old.copy_(torch.ones(1000))  # 4000
        old.detach().reshape(-1).to(torch.float32)

    assert live_peak(block, inference=inference) == 4000


@both_modes
def test_out_arguments(inference: bool) -> None:
    """``out=`` into enough room costs nothing; where it makes room, the growth is counted, and freed with it."""
    with torch.inference_mode(inference):
        ready, empty = torch.zeros(1000), torch.empty(0)
    assert live_peak(lambda: torch.add(ready, 1, out=ready), inference=inference) == 0
    assert live_peak(lambda: torch.add(ready, 1, out=empty), inference=inference) == 4000

    def inside() -> None:
        target = torch.empty(10)
        target.resize_(0)
        torch.add(ready, 1, out=target)  # 4000
        del target
        torch.ones(900)

    assert live_peak(inside, inference=inference) == 4000


@both_modes
def test_lists_of_tensors(inference: bool) -> None:
    """Operations that take and give lists: split gives views of one storage, cat makes one."""
    old = torch.zeros(40, 10)

    def block() -> None:
        parts = old.split(10)
        whole = torch.cat(parts)  # 1600
        torch.cat([part.clone() for part in whole.unbind()])  # + 1600 + 1600

    assert live_peak(block, inference=inference) == 4800


@both_modes
def test_tensors_made_from_python_and_from_numpy(inference: bool) -> None:
    """torch.tensor copies, once; torch.from_numpy shares what numpy owns."""
    array = np.ones(1000, dtype=np.float32)
    assert live_peak(lambda: torch.tensor([1.0, 2.0, 3.0]), inference=inference) == 12
    assert live_peak(lambda: torch.from_numpy(array), inference=inference) == 0
    assert live_peak(lambda: torch.from_numpy(array) + 1, inference=inference) == 4000


@both_modes
def test_what_composite_operations_hold_in_between(inference: bool) -> None:
    """Attention by plain matrix products holds the scores; inference mode hides the parts from a simple observer,
    not from the meter: both modes agree, and the scores are in."""
    q = torch.randn(2, 4, 128, 16)
    with sdpa_kernel(SDPBackend.MATH):
        peak = live_peak(lambda: F.scaled_dot_product_attention(q, q, q), inference=inference)
    scores = 2 * 4 * 128 * 128 * 4
    assert scores <= peak <= 3 * scores
    with sdpa_kernel(SDPBackend.MATH):
        assert peak == live_peak(lambda: F.scaled_dot_product_attention(q, q, q), inference=not inference)


def test_other_devices_are_not_counted() -> None:
    """A meter of CPU memory does not count a meta tensor, which has none."""
    assert live_peak(lambda: torch.empty(1 << 40, device="meta") + 1) == 0


def test_sparse_tensors_pass() -> None:
    """Tensors without a storage of their own run as ever; their parts are counted as they are made."""
    dense = torch.eye(100)
    out: list[torch.Tensor] = []
    live_peak(lambda: out.append(torch.sparse.mm(dense.to_sparse(), dense)), inference=False)
    assert torch.equal(out[0], dense)


def test_other_threads_are_not_counted() -> None:
    """Only the measuring thread's tensors are the block's, although another one is at work."""
    stop, made = threading.Event(), threading.Event()

    def other() -> None:
        while not stop.is_set():
            torch.ones(100_000)
            made.set()

    thread = threading.Thread(target=other)
    thread.start()
    try:

        def block() -> None:
            made.clear()
            made.wait(10)
            torch.ones(10)

        assert live_peak(block) == 40
    finally:
        stop.set()
        thread.join()


def test_storages_freed_by_another_thread() -> None:
    """A tensor handed to another thread and dropped there is taken off the count here."""

    def block() -> None:
        box = [torch.ones(1000)]
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        torch.ones(1000)

    assert live_peak(block) == 4000


@both_modes
def test_against_a_count_by_hand_on_a_real_model(inference: bool) -> None:
    """A transformer layer: the meter agrees with the sum of all storages reachable at each step, taken by force."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(3, 20, 32)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        peak = live_peak(lambda: layer(x), inference=inference)
        brute = _brute_force_peak(lambda: layer(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert peak == brute


def _brute_force_peak(block: Callable[[], Any]) -> int:
    """After every operation, all live tensors that the garbage collector knows, storages counted once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    def storages() -> dict[int, int]:
        found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
        return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}

    gc.collect()
    old = storages()
    gc.freeze()  # from here on get_objects lists only what is newer
    tops = [0]

    class Brute(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tops.append(sum(size for key, size in storages().items() if key not in old))
            return out

    try:
        with torch.no_grad(), Brute():
            block()
    finally:
        gc.unfreeze()
    return max(tops)


@both_modes
def test_results_are_the_same_under_the_meter(inference: bool) -> None:
    """Bit for bit, for a model with attention, normalisation, dropout in eval mode and an einsum."""
    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, activation="gelu").eval()
    x = torch.randn(4, 33, 48)
    mask = torch.zeros(4, 33, dtype=torch.bool)
    mask[1:, 20:] = True

    def forward() -> torch.Tensor:
        y = layer(x, src_key_padding_mask=mask)
        y = F.dropout(F.layer_norm(y, (48,)), 0.1, training=False)
        return torch.einsum("bld,bmd->blm", y, y).softmax(-1)

    with torch.inference_mode(inference), torch.no_grad():
        plain = forward()
        with StorageMeter("cpu"):
            metered = forward()
    assert torch.equal(plain, metered)
    assert plain.is_inference() == metered.is_inference() == inference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_kept_under_the_meter(dtype: torch.dtype) -> None:
    """The dtypes that autocast chooses, and the numbers, are those of an unmetered run."""
    layer, x = torch.nn.Linear(16, 16), torch.randn(4, 16)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        plain = layer(x)
        with StorageMeter("cpu"):
            metered = layer(x)
    assert plain.dtype == metered.dtype == dtype
    assert torch.equal(plain, metered)


def test_gradients_flow_under_the_meter() -> None:
    """Not that inference needs them: the meter is transparent."""
    x = torch.ones(5, requires_grad=True)
    with StorageMeter("cpu"):
        (x * 3).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((5,), 3.0))


def test_a_metered_tensor_is_not_kept_alive() -> None:
    """Counting holds no reference: what the caller drops is freed at once."""
    import weakref

    with StorageMeter("cpu") as meter:
        x = torch.ones(1000)
        storage = weakref.ref(x.untyped_storage())
        del x
        assert storage() is None
    assert meter.peak_bytes == 4000


def test_metering_is_affordable() -> None:
    """A metered operation costs less than 200 microseconds: the best of ten runs of fifty, in processor time."""
    x = torch.ones(10)
    with torch.inference_mode(), StorageMeter("cpu"):
        seconds = min(timeit.repeat(lambda: torch.add(x, 1), number=50, repeat=10, timer=time.thread_time))
    assert seconds / 50 < 200e-6
