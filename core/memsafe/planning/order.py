"""In which order, and in pieces of which size, the inputs of one call are tokenised and so reach the queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

__all__ = ["PIECE_CHARS", "pieces"]

FIRST, LARGEST = 64, 1024
"""Inputs in a piece: few at first, so that computing starts at once, then more."""
PIECE_CHARS = 1 << 18
"""Characters in a piece, unless one input has more: a tokenizer takes about 100 bytes per token meanwhile. A call that
has no more in all is one piece, so that what is small can be one micro-batch."""


def pieces(chars: Sequence[int], learning: Callable[[], bool]) -> Iterator[Sequence[int]]:
    """Indices of all inputs, each once. chars: of each input.

    Longest first, so that a run that cannot finish fails early and neighbours are of about one length. While `learning`
    (asked before each piece), a piece is a sample across all lengths instead: the long ones alone would not fill small sizes,
    and would not stand for the rest.
    """
    left: Sequence[int] = sorted(range(len(chars)), key=chars.__getitem__, reverse=True)
    if sum(chars) <= PIECE_CHARS and left:
        yield left
        return
    size, start, chars_left = FIRST, 0, sum(chars)
    while start < len(left):
        if learning():
            each = max(chars_left // (len(left) - start), 1)
            step = max((len(left) - start) // max(min(size, PIECE_CHARS // each), 1), 1)
            piece = left[start + step // 2 :: step] or left[start:]
            taken = set(piece)
            left, start = [index for index in left[start:] if index not in taken], 0
        else:
            stop = start + min(size, max(PIECE_CHARS // max(chars[left[start]], 1), 1))
            piece, start = left[start:stop], min(stop, len(left))
        chars_left -= sum(chars[index] for index in piece)
        yield piece
        size = min(2 * size, LARGEST)
