"""What stands behind the encoder of a packed forward: how sentence-transformers' own modules see the packed row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from memsafe.models.collate import PackedRow
from memsafe.models.segments import join

__all__ = ["HEADS", "Stub", "rows", "shallow"]

HEADS = ("groups", "first", "last", "flat")
"""How the modules behind the encoder see a packed row.

groups: once per run of equal lengths, as rows without padding; right for everything.
first, last: once, every sequence being its first or last token alone; for heads that look at no other.
flat: once, on the row as it is; for pooling that knows where sequences start.
"""

Run = Callable[[dict[str, Any]], Any]
"""From features to final rows: the modules around the encoder, in whose place `stub.answer` stands."""


def rows(
    head: str,
    run: Run,
    stub: Stub,
    output: Any,
    row: PackedRow,
    features: Mapping[str, Any],
    pad_id: int | None,
    *,
    strict: bool = False,
) -> Any:
    """Final rows, shape (sequences, width), of `output`, the encoder's for one packed row. head: of :data:`HEADS`.

    pad_id: the token that a classifier of a decoder takes for padding. It reads the last token that is none, so where
    a text itself ends in one, the last token of the sequence is the wrong one. strict: raise NotImplementedError where
    `head` would step back for "groups": a check that compared "groups" with itself would let any head through.
    """
    same = len(set(row.lengths)) == 1
    whole = "prompt_length" in features or getattr(output, "hidden_states", None) is not None
    if same or whole or (head == "last" and row.ends_in(pad_id)):
        if strict and head != "groups":
            raise NotImplementedError(f"the head {head!r} cannot be tried on these")
        head = "groups"  # nothing to gain, or more to look at than single tokens
    if head == "flat":
        return _flat(run, stub, output, row, features)
    if head == "groups":
        return _groups(run, stub, output, row.input_ids, row.token_type_ids, row.lengths, features)
    tokens = row.firsts() if head == "first" else row.lasts()
    output = type(output)(last_hidden_state=output.last_hidden_state[:, tokens])
    types = None if row.token_type_ids is None else row.token_type_ids[tokens]
    return _groups(run, stub, output, row.input_ids[tokens], types, (1,) * len(row.lengths), features)


def _groups(
    run: Run,
    stub: Stub,
    output: Any,
    input_ids: Tensor,
    types: Tensor | None,
    lengths: tuple[int, ...],
    features: Mapping[str, Any],
) -> Any:
    found, start = [], 0
    for length, same in groupby(lengths):
        count = sum(1 for _ in same)
        stop = start + count * length
        stub.answer = _slice(output, stub._encoder, start, stop, count)
        inputs = {**features, "input_ids": input_ids[start:stop].view(count, length)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if types is not None:
            inputs["token_type_ids"] = types[start:stop].view(count, length)
        found.append(run(inputs))
        start = stop
    return join(found)


def _flat(run: Run, stub: Stub, output: Any, row: PackedRow, features: Mapping[str, Any]) -> Any:
    """By sentence-transformers' own pooling of a flat row, which it has for flash attention since 5.4."""
    stub.answer = output
    ids = row.input_ids[None]
    inputs = {**features, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["cu_seq_lens_q"] = row.starts()
    inputs["seq_idx"] = row.sequence_of_token()[None]
    return run(inputs)


class Stub(nn.Module):
    """Stands where the encoder stood and returns `answer`; for everything else it is the encoder.

    Without an answer it asks the encoder, and keeps what that said.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.answer: Any = None
        self.training = False
        self.__dict__["_encoder"] = encoder  # not a child: nothing that walks the modules shall meet it twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_encoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.answer is None:
            self.answer = self.__dict__["_encoder"](*args, **kwargs)
        return self.answer


def shallow(module: nn.Module) -> nn.Module:
    """The same module with children of its own; parameters, buffers, hooks and settings are shared."""
    clone: nn.Module = type(module).__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = dict(module._modules)
    return clone


def _slice(output: Any, encoder: nn.Module, start: int, stop: int, count: int) -> Any:
    """The output that the encoder would have given for tokens start to stop as `count` rows; of the same class."""

    def of(tensor: Tensor) -> Tensor:
        return tensor[0, start:stop].view(count, -1, tensor.shape[-1])

    given: dict[str, Any] = {"last_hidden_state": of(output.last_hidden_state)}
    names = {item.name for item in dataclasses.fields(output)}
    pooler = getattr(encoder, "pooler", None)
    if pooler is not None and "pooler_output" in names:
        states = given["last_hidden_state"]
        if isinstance(pooler, nn.Linear):  # ALBERT's encoder takes the first token and adds the activation itself
            states = states[:, 0]
        pooled = pooler(states)
        activation = getattr(encoder, "pooler_activation", None) if isinstance(pooler, nn.Linear) else None
        given["pooler_output"] = pooled if activation is None else activation(pooled)
    if "hidden_states" in names and output.hidden_states is not None:
        given["hidden_states"] = tuple(of(layer) for layer in output.hidden_states)
    return type(output)(**given)
