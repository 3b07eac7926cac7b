"""A runtime's session in the place of a transformers model: sentence-transformers' own modules before and behind it stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

__all__ = ["RuntimeModel", "Session"]

Array = NDArray[Any]


class Session(Protocol):
    """An export that is open. Thread-safe: each thread that calls :meth:`run` computes on one core.

    inputs: names of what it takes, int64 of shape (rows, tokens). weights_bytes: of its file. told: what was chosen, in words.
    dtype: what its products are computed in. survives_fork: whether a forked child may use it.
    fuses_attention: whether it makes no scores of all pairs of tokens.
    """

    inputs: tuple[str, ...]
    weights_bytes: int
    told: str
    dtype: str
    survives_fork: bool
    fuses_attention: bool

    def run(self, features: Mapping[str, Array]) -> Array:
        """Last hidden states, float32 (rows, tokens, width), or scores, (rows, labels)."""
        ...

    def release(self) -> None:
        """Give back what forwards hold between them."""
        ...

    def close(self) -> None: ...


class RuntimeModel(nn.Module):
    """Looks to sentence-transformers like the transformers model that was exported. It has no weights that torch knows of.

    runtime: what it is and was made by; a setting, which changes with all that can change rows. rounding: by how much of its
    norm a row may differ when sums are taken in another order, since a number that lies between two steps of int8 goes to
    either.
    """

    def __init__(self, session: Session, config: Any, runtime: str, rounding: float) -> None:
        super().__init__()
        self.config = config
        self.runtime = runtime
        self.rounding = rounding
        self._session = session

    @property
    def session(self) -> Session:
        return self._session

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """As a transformers model's, with `return_dict`."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        features = {}
        for name in self._session.inputs:
            tensor = given.get(name)
            if tensor is None:
                tensor = torch.ones_like(input_ids) if name == "attention_mask" else torch.zeros_like(input_ids)
            features[name] = np.ascontiguousarray(tensor.numpy(), dtype=np.int64)
        found = torch.from_numpy(self._session.run(features))
        return BaseModelOutput(last_hidden_state=found) if found.ndim == 3 else SequenceClassifierOutput(logits=found)
