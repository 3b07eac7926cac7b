"""What a model's own preprocessing gives, read back as rows without padding; or nothing, where that would lose something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["TOKENS", "FeatureRows", "Ids"]

Ids = NDArray[np.int32]
TOKENS = ("input_ids", "token_type_ids", "attention_mask")
_CONSTANT = (str, int, float, bool, tuple, type(None))


@dataclass(frozen=True)
class FeatureRows:
    """ids, types: int32 (num_tokens,) of each row; types is None where the preprocessing gives none.

    constants: what it gives beside the tokens, one value for the whole batch (modality, prompt_length). pad_id,
    pad_type_id, pad_left: how the rows were padded; None if none of them was.
    """

    ids: list[Ids]
    types: list[Ids] | None
    names: tuple[str, ...]
    constants: dict[str, Any]
    pad_id: int | None
    pad_type_id: int | None
    pad_left: bool | None

    @staticmethod
    def of(features: Mapping[str, Any]) -> FeatureRows | None:
        """None unless all that differs between rows is in the tokens themselves: no tensor beside ids, types and mask (a
        module's own features of each text), and a mask that hides padding at one end and nothing else."""
        ids, mask, types = (features.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
        given = [tensor for tensor in (ids, mask, types) if tensor is not None]
        if ids is None or mask is None or not all(_is_rows(tensor, ids) for tensor in given):
            return None
        constants = {name: value for name, value in features.items() if name not in TOKENS}
        if not all(isinstance(value, _CONSTANT) for value in constants.values()):
            return None
        kept = mask.numpy() != 0
        if not np.array_equal(kept, mask.numpy()):
            return None  # a mask of other numbers than 0 and 1
        places, lengths = np.arange(kept.shape[1]), kept.sum(axis=1)
        right = np.array_equal(kept, places < lengths[:, None])
        left = np.array_equal(kept, places >= kept.shape[1] - lengths[:, None])
        if not right and not left:
            return None
        padding = _padding(ids.numpy(), kept)
        type_padding = _padding(types.numpy(), kept) if types is not None else padding[:0]
        if len(padding) > 1 or len(type_padding) > 1:
            return None
        ends = np.cumsum(lengths)[:-1]
        return FeatureRows(
            ids=np.split(ids.numpy()[kept].astype(np.int32), ends),
            types=None if types is None else np.split(types.numpy()[kept].astype(np.int32), ends),
            names=tuple(name for name in TOKENS if name in features),
            constants=constants,
            pad_id=int(padding[0]) if len(padding) else None,
            pad_type_id=int(type_padding[0]) if len(type_padding) else None,
            pad_left=None if right and left else left,
        )


def _is_rows(tensor: Any, ids: Any) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.ndim == 2
        and tensor.shape == ids.shape
        and (not tensor.is_floating_point() or not tensor.numel())
    )


def _padding(values: NDArray[Any], kept: NDArray[Any]) -> NDArray[Any]:
    return np.unique(values[~kept])
