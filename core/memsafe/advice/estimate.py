"""Bytes that forwards of a model will take, from the same priors that the engine starts from. Nothing is measured here.

Where the engine begins with a dearer guess than was measured, to be corrected by its first micro-batches, the measured figure
is said here: nobody measures after an advice. Those figures are of transformers 5.23 on a CPU, by the meter of
:mod:`memsafe.machine.meter`; tests/advice measures them again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memsafe.advice.facts import ModelFacts
from memsafe.planning.batch import BatchShape
from memsafe.planning.prior import CostPrior

__all__ = ["MARGIN", "Estimate"]

MARGIN = 0.1
"""Measured peaks lie within this of what is said here: tests/advice compares, architecture by architecture, and with an H200."""
_IN_PLACE = ("gelu", "gelu_pytorch_tanh", "gelu_fast", "silu", "swish", "relu")
"""``hidden_act`` of which memsafe has a form that works in place (:mod:`memsafe.models.fuse`); not "gelu_new"."""
_ALIGNED = 8
"""A mask whose rows are no multiple of this is copied once more by CUDA's memory-efficient attention, and padded."""
_MOST_TOKENS = 1 << 24
_ROW_VALUES = 512
"""Numbers of a sparse row: trained SPLADE models leave some hundred."""


@dataclass(frozen=True)
class Estimate:
    """`facts` in `dtype` on a device of `kind` ("cuda", "cpu"). All bytes are live tensors beyond the weights."""

    facts: ModelFacts
    dtype: str
    kind: str

    def packed(self, shape: BatchShape) -> int:
        """As memsafe runs it where its self-check agrees: without padding."""
        return int(
            max(self._packed.bytes(shape), self._packed.attention_bytes(shape) + self._shared_square * shape.longest**2)
        )

    def padded(self, rows: int, length: int, *, uniform: bool = False) -> int:
        """As upstream runs `rows` texts padded to `length`, the longest: with a mask over all pairs of tokens, which it leaves out
        where all are of one length (`uniform`)."""
        shape = BatchShape.of([length] * rows, packed=False)
        prior, window = self._padded, self.facts.architecture.window
        if uniform and window is None and not self.facts.eager_only:
            shape = replace(shape, squares=0)
        if self.kind == "cuda" and length % _ALIGNED:
            prior = replace(prior, masked_square_bytes=prior.masked_square_bytes + self._size)
        making = 15 * length**2 if window is not None else 0  # masks of windows, of int64 numbers, one for all rows
        return int(max(prior.bytes(shape), prior.attention_bytes(shape) + self._shared_square * length**2, making))

    def eager(self, rows: int, length: int) -> int:
        """The same with eager attention, all scores in memory: what older transformers and some servers force."""
        if self.facts.eager_only:
            return self.padded(rows, length)
        shape = BatchShape.of([length] * rows, packed=False)
        # Scores and their softmax, and the mask; five hidden states beside them. Where the softmax is asked for in float32, the scores
        # and it are there in float32 too (in half precision: 2 + 4 + 4 bytes a score), and rotated queries and keys beside them.
        casts = self._softmax_in_float32
        scores = 2.0 * self._size + (6.0 if casts and self._size < 4 else 0.0)
        masks = 1 if self.facts.architecture.window is None else 2
        prior = replace(
            self._padded,
            attention_token_bytes=(8.0 if casts else 5.0) * self.facts.architecture.hidden_size * self._size,
            masked_square_bytes=scores * self.facts.architecture.num_heads + masks * self._size,
        )
        return int(prior.bytes(shape))

    def one_text(self, length: int) -> int:
        """Bytes of one text of `length` tokens, packed."""
        return self.packed(BatchShape.of([length], packed=True))

    def longest_text(self, room_bytes: int, most: int) -> int:
        """The longest text, in tokens and up to `most`, that fits into `room_bytes` alone; 0 if none."""
        return _largest(lambda length: (1 + MARGIN) * self.one_text(length) <= room_bytes, most)

    def largest_micro_batch(self, room_bytes: int, mean_length: float) -> int:
        """The most tokens, in texts of about `mean_length`, that fit into `room_bytes` together; 0 if none."""

        def fits(tokens: int) -> bool:
            sequences = max(round(tokens / mean_length), 1)
            length = min(mean_length, tokens)
            shape = BatchShape(tokens, sequences, round(tokens * length), round(length))
            return (1 + MARGIN) * self.packed(shape) <= room_bytes

        return _largest(fits, _MOST_TOKENS)

    @cached_property
    def _softmax_in_float32(self) -> bool:
        """Whether the installed transformers' eager attention of this type says so: ModernBERT's and most decoders' does, BERT's not."""
        name = str(getattr(self.facts.config, "model_type", "")).replace("-", "_")
        try:
            found = find_spec(f"transformers.models.{name}.modeling_{name}")
            source = Path(found.origin).read_text(encoding="utf-8") if found is not None and found.origin else ""
        except (ImportError, OSError, ValueError):  # a model whose code is its own, or a transformers without files
            return False
        return re.search(r"softmax\([^)]*dtype=torch\.float32", source) is not None

    @cached_property
    def _size(self) -> int:
        return int(_torch_dtype(self.dtype).itemsize)

    @cached_property
    def _packed(self) -> CostPrior:
        act = getattr(self.facts.config, "hidden_act", None) or getattr(self.facts.config, "activation", None) or ""
        ours = self.kind == "cpu" and not self.facts.eager_only
        prior = self._tight(self._prior(packed=True, ours=ours, in_place=act in _IN_PLACE))
        return self._tiled(prior) if self._tiles_words else prior

    @property
    def _tiles_words(self) -> bool:
        """Whether memsafe makes scores over the vocabulary tile by tile: of a SPLADE model, when it packs."""
        return self.facts.kind == "sparse" and "MaskedLM" in self.facts.class_name

    def _tiled(self, prior: CostPrior) -> CostPrior:
        from memsafe.models.late import Tiles
        from memsafe.models.priors import tiled

        shape = self.facts.architecture
        tiles = Tiles(shape.vocab_size, shape.hidden_size, self._size, self.kind, self.facts.config)
        return tiled(prior, shape, tiles, _ROW_VALUES)

    @cached_property
    def _padded(self) -> CostPrior:
        prior = self._tight(self._prior(packed=False, ours=False, in_place=False))
        if self.facts.eager_only:
            return prior
        if self.facts.architecture.window is not None:  # two masks as bool, and one of them as numbers
            return replace(prior, per_square_bytes=2.0, masked_square_bytes=3.0 + self._size)
        # The feed-forward step holds the mask as bool only; the attention step, which has it as numbers too, counts for itself.
        return replace(prior, per_square_bytes=1.0)

    @property
    def _shared_square(self) -> float:
        """Bytes per pair of tokens of the longest text that all rows share: DeBERTa's relative positions, int64."""
        return 12.0 if getattr(self.facts.config, "relative_attention", False) else 0.0

    def _tight(self, prior: CostPrior) -> CostPrior:
        """`prior` as measured, for architectures that compute attention themselves: 3 matrices of scores in MPNet; 6 in DeBERTa,
        and each token against each relative position, twice. They are there in the attention step only."""
        if not self.facts.eager_only:
            return prior
        shape, relative = self.facts.architecture, bool(getattr(self.facts.config, "relative_attention", False))
        plain = self._prior(
            packed=True, ours=False, in_place=prior.per_token_bytes < self._out_of_place, attention="sdpa"
        )
        per_token = plain.per_token_bytes
        if relative:  # without what prior_of adds for the attention step
            per_token -= 8 * shape.num_heads * self._span * self._size
        return replace(
            plain,
            per_token_bytes=per_token,
            per_square_bytes=0.0,
            attention_token_bytes=(5.8 if relative else 6.2) * shape.hidden_size * self._size
            + (2 * shape.num_heads * self._span * self._size if relative else 0.0),
            masked_square_bytes=(6.0 if relative else 3.0) * shape.num_heads * self._size,
        )

    @cached_property
    def _out_of_place(self) -> float:
        return self._prior(packed=True, ours=False, in_place=False).per_token_bytes

    @property
    def _span(self) -> int:
        config = self.facts.config
        buckets = max(getattr(config, "position_buckets", -1), 0)
        return int(buckets or max(getattr(config, "max_relative_positions", -1), 0) or 512)

    def _prior(self, *, packed: bool, ours: bool, in_place: bool, attention: str | None = None) -> CostPrior:
        from memsafe.models.priors import prior_of

        return prior_of(
            self.facts.architecture,
            self.facts.config,
            _torch_dtype(self.dtype),
            attention=attention or ("eager" if self.facts.eager_only else "sdpa"),
            packed=packed,
            small_mask=False,
            ours=ours,
            class_name="" if packed and self._tiles_words else self.facts.class_name,
            in_place=in_place,
        )


def _largest(fits: Any, most: int) -> int:
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
