"""float32 matrix products by oneDNN, on processors of which MKL uses half.

torch multiplies float32 on x86 by MKL, which keeps to its AVX2 kernels on a processor that Intel did not make. oneDNN, which is in torch too and
multiplies its bfloat16, uses AVX-512 wherever it is: 230 to 250 instead of 105 GFLOP/s on one core of an EPYC, the results equal but
for rounding (``python -m benchmarks.fused``). Weights stay as they are: oneDNN puts those of one product into its own
order while it runs, so that nothing is held twice.

As with :mod:`memsafe.models.fuse` this happens inside forwards of memsafe alone.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsafe.attention import interface
from memsafe.machine.device import open_device

__all__ = ["install", "linear", "pays", "uninstall", "workspace_bytes"]

_LEAST_ROWS, _LEAST_WORK = 4, 1 << 21
"""Rows, and multiplications, from which oneDNN was faster: 1.1 to 1.3 times there, 2.0 to 2.4 from 32 times that on. What it does before it
multiplies costs more for less."""


@cache
def pays() -> bool:
    """Whether this processor is one of those, and torch's oneDNN is as we know it."""
    device = open_device("cpu")
    if "avx512f" not in device.cpu_features() or device.cpu_vendor() in ("", "GenuineIntel"):
        return False
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.rand(size, generator=generator) for size in ((2, 3, 5), (7, 5), (7,)))
    try:
        with torch.no_grad():
            found, plain = _product(states, weight, bias), _product(states, weight, None)
    except (AttributeError, RuntimeError, TypeError):  # another version's
        return False
    wanted = nn.functional.linear(states, weight)
    return bool(torch.allclose(plain, wanted, atol=1e-5) and torch.allclose(found, wanted + bias, atol=1e-5))


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, by whichever of the two is faster."""
    rows = states.numel() // max(states.shape[-1], 1)
    if (
        rows < _LEAST_ROWS
        or rows * weight.numel() < _LEAST_WORK
        or not weight.dtype == states.dtype == torch.float32
        or weight.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not weight.is_contiguous()
        or not bool(torch.backends.mkldnn.enabled)
        or not pays()
    ):
        return nn.functional.linear(states, weight, bias)
    return _product(states, weight, bias)


def _product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile makes of a linear layer on a CPU; without anything behind it.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return product


def install(hf_model: PreTrainedModel) -> int:
    """Let the encoder's linear layers multiply so during our forwards; returns how many do. Twice is once."""
    installed = 0
    for module in hf_model.base_model.modules() if pays() else ():
        if _is_plain(module) and "forward" not in vars(module):
            module.forward = partial(_forward, module)
        installed += _is_ours(module)
    return installed


def uninstall(hf_model: PreTrainedModel) -> None:
    """Undo :func:`install`."""
    for module in hf_model.base_model.modules():
        if _is_ours(module):
            del module.forward


def workspace_bytes(hf_model: PreTrainedModel) -> int:
    """What the largest of these products takes beside its result, weights in oneDNN's order; 0 where none is installed."""
    sizes = [module.weight.numel() for module in hf_model.base_model.modules() if _is_ours(module)]
    return 4 * max(sizes, default=0)


def _forward(module: nn.Linear, given: Tensor) -> Tensor:
    return linear(given, module.weight, module.bias) if interface.is_active() else nn.Linear.forward(module, given)


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    )


def _is_ours(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _forward
