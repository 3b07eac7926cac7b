"""Tokenised inputs to the tensors of one forward: a packed row, or padded rows. Made on the host, sent without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memsafe.attention import interface
from memsafe.attention.transfer import send

__all__ = ["PackedRow", "padded"]

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PackedRow:
    """Sequences end to end, equal lengths adjacent. What the host must know of them stays on the host.

    ids: the tokens, on the host. input_ids, token_type_ids (or None), position_ids: int64, shape (tokens,), on `device`.
    """

    ids: Ids
    lengths: tuple[int, ...]
    device: torch.device
    input_ids: Tensor
    token_type_ids: Tensor | None
    position_ids: Tensor

    @staticmethod
    def of(
        ids: Ids, lengths: Sequence[int], types: Ids | None, device: torch.device, padding: int | None = None
    ) -> PackedRow:
        """ids, types: on the host, shape (tokens,). padding: see :func:`interface.positions`."""
        positions = interface.positions(ids, lengths, padding)
        sent = [None if each is None else send(each, device, torch.int64) for each in (ids, types, positions)]
        return PackedRow(ids, tuple(lengths), device, sent[0], sent[1], sent[2])  # type: ignore[arg-type]

    @cached_property
    def ends(self) -> list[int]:
        """Where each sequence starts, and the end of the last; on the host."""
        return [0, *accumulate(self.lengths)]

    def starts(self) -> Tensor:
        """:attr:`ends` on the device: int64, shape (sequences + 1,)."""
        return send(self.ends, self.device, torch.int64)

    def firsts(self) -> Tensor:
        """Each sequence's first token: int64, shape (sequences,), on the device."""
        return send(self.ends[:-1], self.device, torch.int64)

    def lasts(self) -> Tensor:
        """Each sequence's last token: int64, shape (sequences,), on the device."""
        return send(np.asarray(self.ends[1:]) - 1, self.device, torch.int64)

    def sequence_of_token(self) -> Tensor:
        """int64, shape (tokens,), on the device: 0, 0, 0, 1, 1, ..."""
        return send(np.repeat(np.arange(len(self.lengths)), self.lengths), self.device, torch.int64)

    def ends_in(self, token: int | None) -> bool:
        """Whether the last token of any sequence is `token`."""
        return token is not None and bool((np.asarray(self.ids)[np.asarray(self.ends[1:]) - 1] == token).any())


def padded(
    ids: Sequence[Ids],
    types: Sequence[Ids | None] | None,
    width: int,
    device: torch.device,
    *,
    pad_id: int,
    pad_type_id: int = 0,
    left: bool = False,
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and, if `types` is given, ``token_type_ids`` (None in it: zeros): int64, shape
    (sequences, width), on `device`. left: padding stands before the tokens."""
    shape = (len(ids), width)
    arrays = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
    }
    if types is not None:
        arrays["token_type_ids"] = np.full(shape, pad_type_id, dtype=np.int64)
    for row, tokens in enumerate(ids):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        arrays["input_ids"][row, place] = tokens
        arrays["attention_mask"][row, place] = 1
        if types is not None:
            given = types[row]
            arrays["token_type_ids"][row, place] = 0 if given is None else given
    return {name: send(array, device, torch.int64) for name, array in arrays.items()}
