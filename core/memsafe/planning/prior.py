"""What a micro-batch is expected to need before anything was measured: formulas of the architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from memsafe.planning.batch import BatchShape

__all__ = ["CostPrior"]

_NEAR = 0.02
"""Formulas of the attention step met measured peaks within 1.4 %."""
_NEAR_HEAD = 0.1
"""How many numbers a sparse row has differs from text to text."""


@dataclass(frozen=True)
class CostPrior:
    """Bytes that a forward is expected to need beyond the weights, per unit of each feature.

    per_position_bytes: per token of the longest sequence, shared by all sequences of a padded batch; taken as it is and not
    learnt. attention_token_bytes, masked_square_bytes, score_square_bytes: the attention step, where it may need more than
    every other: for its mask over all pairs of tokens, or for the scores of one sequence of up to `score_limit` tokens.
    Taken as they are too, like those of the step behind the encoder, where rows are made tile by tile (models/late.py):
    head_token_bytes for each token, head_tile_bytes and head_sequence_bytes for each token and each sequence of one tile, of
    at most `head_tile_tokens` tokens, and head_row_bytes for each row that is made.
    """

    fixed_bytes: float
    per_token_bytes: float
    per_sequence_bytes: float
    per_square_bytes: float
    per_position_bytes: float = 0.0
    attention_token_bytes: float = 0.0
    masked_square_bytes: float = 0.0
    score_square_bytes: float = 0.0
    score_limit: int = 0
    head_token_bytes: float = 0.0
    head_tile_bytes: float = 0.0
    head_sequence_bytes: float = 0.0
    head_row_bytes: float = 0.0
    head_tile_tokens: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{field.name}: got {value!r}; give a finite number of at least 0")

    @classmethod
    def for_architecture(
        cls,
        *,
        hidden_size: int,
        intermediate_size: int,
        gated: bool,
        num_heads: int,
        bytes_per_element: int,
        layout: str,
        attention: str,
        vocab_logits: int = 0,
        small_mask: bool = False,
        rotary_size: int = 0,
        score_limit: int = 0,
        in_place: bool = False,
        frees_widest: bool = False,
    ) -> CostPrior:
        """The prior of a transformer encoder with hidden size H, feed-forward size I and s bytes per element.

        Feed-forward step, peak of tensors alive at once, measured with a tracker of torch's dispatcher for I/H from 1
        to 8: ``(3*H + 2*I)*s`` bytes per token (BERT), ``(4*H + 3*I)*s`` if `gated` (GTE, Nomic). The attention step
        is the larger one for a narrow feed-forward: 8*H*s, 10*H*s if gated. Inputs (ids, types, positions, mask) are
        four int64 per token. A padded batch holds its mask per pair of tokens, one bool and one element (one bool
        and one element per token with `small_mask`); eager attention two matrices of scores per head. `vocab_logits`:
        the size of a vocabulary whose logits are computed for every token (SPLADE), else 0. `rotary_size`: elements per
        head that positions rotate, else 0; a padded batch has one table of cosines and sines for all its sequences, a packed one a
        row of them for each token. `score_limit`: the longest packed sequence
        whose scores, (heads, length, length) in float32, are made, else 0. `in_place`: whether the feed-forward
        activation writes where its input was, without gates; then its widest tensor exists once, and the peak is where the
        layer ends: ``(6*H + I)*s``, measured as 10*H*s for BERT's sizes on a CPU and on an H200. `frees_widest`: the layer
        lets go of that tensor before it ends (DistilBERT): ``(4*H + I)*s``.
        """
        h, i, s = hidden_size, intermediate_size, bytes_per_element
        if gated:
            per_token = float(max(4 * h + 3 * i, 10 * h) * s)
        elif in_place:
            per_token = float(max((4 if frees_widest else 6) * h + i, 8 * h) * s)
        else:
            per_token = float(max(3 * h + 2 * i, 8 * h) * s)
        per_token += 4 * 8 + vocab_logits * s
        tables = 2.0 * rotary_size * s
        if layout == "packed":
            per_token += tables
        per_square = 0.0
        step = (0.0, 0.0, 0.0)  # the tensors beside masks and scores were measured with the tracker
        if layout != "packed":
            if small_mask:
                per_token += 1 + s
            else:
                per_square += 1 + s
                if attention != "eager":
                    step = (6.0 * h * s + 16, 1.0 + s, 0.0)  # the mask as bool and as numbers
        elif score_limit:
            step = (7.0 * h * s + 40, 0.0, 4.0 * num_heads)
        if attention == "eager":
            per_square += 2 * num_heads * s
        # one pooled row in the model's dtype, one in float32, offsets; workspaces of kernels as 64 KiB
        per_position = 0.0 if layout == "packed" else tables
        return cls(64 * 1024.0, per_token, h * (s + 4) + 64.0, per_square, per_position, *step, score_limit)

    def linear_bytes(self, shape: BatchShape) -> float:
        """What the feed-forward step of `shape` needs, and all that is there all the time."""
        tokens = self.fixed_bytes + self.per_token_bytes * shape.tokens + self.per_sequence_bytes * shape.sequences
        return tokens + self.per_square_bytes * shape.squares + self.per_position_bytes * shape.longest

    def bytes(self, shape: BatchShape) -> float:
        """What `shape` needs: the dearer one of its steps."""
        return max(self.linear_bytes(shape), self.attention_bytes(shape), self.head_bytes(shape))

    def attention_bytes(self, shape: BatchShape) -> float:
        """What the attention step of `shape` needs, masks or scores included."""
        return self.attention_token_bytes * shape.tokens + self._quadratic_bytes(shape)

    def head_bytes(self, shape: BatchShape) -> float:
        """What the step behind the encoder needs for `shape`, where rows are made tile by tile; else 0."""
        if not self.head_tile_tokens:
            return 0.0
        tokens = min(shape.tokens, self.head_tile_tokens)
        sequences = math.ceil(shape.sequences * tokens / max(shape.tokens, 1))
        tile = self.head_tile_bytes * tokens + self.head_sequence_bytes * sequences
        return self.head_token_bytes * shape.tokens + self.head_row_bytes * shape.sequences + tile

    def explains(self, shape: BatchShape, live_bytes: int) -> bool:
        """Whether a measured peak was that of the attention step, for the sake of masks or scores; or of rows in tiles."""
        head = self.head_bytes(shape)
        if head and abs(head - live_bytes) < _NEAR_HEAD * live_bytes:
            return True
        near = abs(self.attention_bytes(shape) - live_bytes) < _NEAR * live_bytes
        return near and self._quadratic_bytes(shape) > _NEAR * live_bytes

    def _quadratic_bytes(self, shape: BatchShape) -> float:
        scores = self.score_square_bytes * shape.longest**2 if shape.longest <= self.score_limit else 0.0
        return self.masked_square_bytes * shape.squares + scores
