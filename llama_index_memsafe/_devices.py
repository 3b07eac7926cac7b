"""Device names, as the replaced classes choose them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["device_list"]


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
