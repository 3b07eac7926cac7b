"""The data that crosses the seam between planning and running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchShape", "MicroBatch", "TokenizedInput"]


class TokenizedInput:
    """One input, tokenised once. Identity matters, not equality.

    index: position among the distinct inputs of its call, which is also its row in the call's output.
    input_ids: int32, shape (num_tokens,); None for a model whose own preprocessing must see the raw input.
    token_type_ids: int32, shape (num_tokens,), or None where the model takes none.
    num_tokens: the unit of planning; for an opaque input an estimate.
    job: whom the row belongs to (opaque to planning).
    raw: the input itself, kept only for opaque inputs.
    """

    __slots__ = ("index", "input_ids", "job", "num_tokens", "raw", "token_type_ids")

    def __init__(
        self,
        index: int,
        input_ids: NDArray[np.int32] | None,
        token_type_ids: NDArray[np.int32] | None = None,
        *,
        num_tokens: int | None = None,
        job: Any = None,
        raw: Any = None,
    ) -> None:
        self.index = index
        self.input_ids = input_ids
        self.token_type_ids = token_type_ids
        self.num_tokens = len(input_ids) if num_tokens is None and input_ids is not None else int(num_tokens or 0)
        self.job = job
        self.raw = raw

    def __repr__(self) -> str:
        return f"TokenizedInput(index={self.index}, num_tokens={self.num_tokens})"


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the memory of a micro-batch depends on.

    tokens: tokens that are computed: the sum of lengths if packed, rows times longest if padded.
    sequences: rows.
    squares: sum of squared computed lengths: the quadratic term of masks and attention scores.
    longest: tokens of the longest sequence as computed.
    """

    tokens: int
    sequences: int
    squares: int
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], *, packed: bool, multiple: int = 1) -> BatchShape:
        """The shape of sequences of `lengths` tokens; padded ones are padded to the longest, rounded up to `multiple`."""
        if not len(lengths):
            return BatchShape(0, 0, 0, 0)
        longest = max(lengths)
        if packed:
            return BatchShape(sum(lengths), len(lengths), sum(n * n for n in lengths), longest)
        width = -(-longest // multiple) * multiple
        return BatchShape(width * len(lengths), len(lengths), width * width * len(lengths), width)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Inputs that run in one forward, longest first."""

    items: tuple[TokenizedInput, ...]
    packed: bool
    multiple: int = 1
    """Padded lengths are rounded up to a multiple of this (8 on CUDA); 1 when packed."""

    @cached_property
    def lengths(self) -> list[int]:
        return [item.num_tokens for item in self.items]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the inputs themselves, without padding."""
        return sum(self.lengths)

    @cached_property
    def shape(self) -> BatchShape:
        return BatchShape.of(self.lengths, packed=self.packed, multiple=self.multiple)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        kind = "packed" if self.packed else "padded"
        return f"MicroBatch({len(self)} sequences, {self.num_tokens} tokens, {kind})"

    def split(self) -> tuple[MicroBatch, MicroBatch]:
        """Two halves of about equal computed size, order kept. Only for two inputs or more."""
        if len(self.items) < 2:
            raise ValueError("a micro-batch of one input cannot be split")
        if self.packed:
            half, cut, seen = self.num_tokens / 2, 0, 0
            while cut < len(self.items) - 1 and (cut == 0 or seen + self.lengths[cut] / 2 <= half):
                seen += self.lengths[cut]
                cut += 1
        else:
            cut = len(self.items) // 2
        return (
            MicroBatch(self.items[:cut], self.packed, self.multiple),
            MicroBatch(self.items[cut:], self.packed, self.multiple),
        )
