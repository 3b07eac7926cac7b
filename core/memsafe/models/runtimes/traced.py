"""What exporters trace: a transformers model of which one output is wanted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memsafe.attention import interface

__all__ = ["Traced", "example", "tracing", "wanted_output"]


@contextmanager
def tracing(model: Any) -> Iterator[None]:
    """`model` is traced with a mask of one row for all queries, where it can have that: the usual one has a row for each, which
    takes bytes by the square of the length."""
    installed = bool(interface.install(model))
    try:
        with (
            torch.inference_mode(),
            warnings.catch_warnings(),
            interface.padded(uniform=False) if installed else nullcontext(),
        ):
            warnings.simplefilter("ignore")  # that branches are followed as for the example
            yield
    finally:
        if installed:
            interface.uninstall(model)


class Traced(nn.Module):
    """`model` with tensors for arguments, called `inputs` in this order, and one tensor for result."""

    def __init__(self, model: nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self._model = model
        self._inputs = tuple(inputs)
        self.eval()  # exporters leave a model as they found its outermost module

    def forward(self, *tensors: Tensor) -> Any:
        output = self._model(**dict(zip(self._inputs, tensors, strict=True)), return_dict=True)
        return output.logits if "logits" in output else output.last_hidden_state


def example(inputs: Sequence[str]) -> tuple[Tensor, ...]:
    """Features of two rows of seven tokens, of which the second row has three."""
    features = {name: torch.zeros(2, 7, dtype=torch.int64) for name in inputs}
    features["input_ids"] += torch.arange(5, 12)
    if "attention_mask" in features:
        features["attention_mask"] += 1
        features["attention_mask"][1, 3:] = 0
    return tuple(features[name] for name in inputs)


def wanted_output(outputs: Sequence[tuple[str, int]]) -> int:
    """Which of an export's `outputs`, (name, rank) each, is what a transformers model gives first: scores, or states of tokens.

    Raises ValueError if neither is there.
    """
    for name in ("logits", "last_hidden_state", "token_embeddings"):
        for place, (each, _) in enumerate(outputs):
            if each == name:
                return place
    if len(outputs) == 1 and outputs[0][1] in (2, 3):
        return 0
    raise ValueError(f"it gives {', '.join(name for name, _ in outputs)}, but neither logits nor last_hidden_state")
