"""From tokenised inputs and a byte budget to micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from memsafe.planning.batch import BatchShape, MicroBatch, TokenizedInput
from memsafe.planning.cost import CostModel

__all__ = ["BatchPlanner"]


class BatchPlanner:
    """Cuts inputs, longest first, into micro-batches that fit. Deterministic, stateless, never loses an input.

    packed: sequences lie end to end, without padding; otherwise they are padded to the longest.
    multiple: padded lengths are rounded up to a multiple of this.
    max_rows: the most inputs in one micro-batch; None for no limit.
    most_padding: where sequences are padded, the largest share of a micro-batch's computed tokens that may be padding; None for
    any.
    """

    def __init__(
        self, packed: bool, multiple: int = 1, max_rows: int | None = None, most_padding: float | None = None
    ) -> None:
        if multiple < 1:
            raise ValueError(f"multiple: got {multiple}; give at least 1")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows: got {max_rows}; give at least 1, or None for no limit")
        self.packed = packed
        self.multiple = 1 if packed else multiple
        self.max_rows = max_rows
        self.most_padding = None if packed else most_padding

    def order(self, items: Iterable[TokenizedInput]) -> list[TokenizedInput]:
        """Longest first; equal lengths keep their order.

        The largest micro-batches come first, so that a run which cannot finish fails early, a caching allocator
        never has to grow in small steps, and neighbours in a micro-batch have about the same length.
        """
        return sorted(items, key=_length, reverse=True)

    def take(
        self,
        backlog: Sequence[TokenizedInput],
        start: int = 0,
        *,
        cost: CostModel,
        budget_bytes: int,
        max_tokens: int,
    ) -> MicroBatch:
        """The next micro-batch of a backlog sorted by :meth:`order`: as many inputs from `start` on as fit.

        Computed tokens stay within `max_tokens` and the cost's resident bound within the budget, except that one input
        is always returned: whether it fits alone is for the caller to judge. Raises ``IndexError`` past the end.
        """
        if not 0 <= start < len(backlog):
            raise IndexError(f"start: got {start}, but the backlog has {len(backlog)} inputs")
        stop = len(backlog) if self.max_rows is None else min(len(backlog), start + self.max_rows)
        choose = self._packed_rows if self.packed else self._padded_rows
        rows = choose(
            backlog, start, stop, cost, budget_bytes, max(min(max_tokens, cost.token_ceiling(budget_bytes)), 1)
        )
        return MicroBatch(tuple(backlog[start : start + rows]), self.packed, self.multiple)

    def _packed_rows(
        self,
        backlog: Sequence[TokenizedInput],
        start: int,
        stop: int,
        cost: CostModel,
        budget_bytes: int,
        max_tokens: int,
    ) -> int:
        tokens = squares = 0
        totals: list[tuple[int, int]] = []  # tokens and squares of the first 1, 2, ... inputs
        append = totals.append
        for position in range(start, stop):
            length = backlog[position].num_tokens
            tokens += length
            if tokens > max_tokens and totals:
                break
            squares += length * length
            append((tokens, squares))
        longest = backlog[start].num_tokens

        def fits(rows: int) -> bool:
            tokens, squares = totals[rows - 1]
            return cost.resident_bound(BatchShape(tokens, rows, squares, longest)) <= budget_bytes

        return _most(fits, len(totals))

    def _padded_rows(
        self,
        backlog: Sequence[TokenizedInput],
        start: int,
        stop: int,
        cost: CostModel,
        budget_bytes: int,
        max_tokens: int,
    ) -> int:
        width = max(-(-backlog[start].num_tokens // self.multiple) * self.multiple, 1)

        def fits(rows: int) -> bool:
            return cost.resident_bound(BatchShape(width * rows, rows, width * width * rows, width)) <= budget_bytes

        rows = min(stop - start, max(max_tokens // width, 1))
        if self.most_padding is not None:
            rows = self._tight(backlog, start, rows, width)
        return _most(fits, rows)

    def _tight(self, backlog: Sequence[TokenizedInput], start: int, rows: int, width: int) -> int:
        """The most of `rows` inputs, padded to `width`, of which no more than :attr:`most_padding` is padding."""
        least = (1 - (self.most_padding or 0.0)) * width
        tokens, found = 0, 1
        for count in range(1, rows + 1):
            tokens += backlog[start + count - 1].num_tokens
            if tokens >= least * count:
                found = count
            elif backlog[start + count - 1].num_tokens < least / 2:
                break  # shorter ones follow, which cannot mend it
        return found


def _length(item: TokenizedInput) -> int:
    return item.num_tokens


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number in 1..most that fits, 1 if none does; `fits` is asked about log2(most) times."""
    if most <= 1 or fits(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
