"""Device names, as the replaced classes choose them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["device_list", "own_device"]


def device_list(target_devices: Sequence[str] | None = None) -> list[str]:
    """The devices of upstream's process pool, one worker each.

    None means every CUDA device. Without CUDA upstream starts four CPU processes, each with its own copy of the weights;
    one worker that uses all cores is as fast with a quarter of the memory, so names are kept once.
    """
    if target_devices:
        return list(dict.fromkeys(target_devices))
    import torch

    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu"]


def own_device(options: Mapping[str, Any]) -> str | None:
    """The only device of an engine that has one, where `options` of the core name such; None for the best of the machine."""
    return None if options.get("engine", "torch") == "torch" else "cpu"
