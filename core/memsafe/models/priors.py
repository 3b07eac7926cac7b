"""What a model's forward takes, from its architecture, before anything is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from memsafe.attention import grouped, kernels
from memsafe.models.content import BYTES_PER_CHAR
from memsafe.models.late import Tiles
from memsafe.models.ways import CHARS_PER_TOKEN
from memsafe.planning.architecture import Architecture
from memsafe.planning.cost import CostPrior

__all__ = ["prior_of", "runtime_prior", "tiled", "tokenwise_prior"]


def prior_of(
    shape: Architecture,
    config: Any,
    dtype: torch.dtype,
    *,
    attention: str,
    packed: bool,
    small_mask: bool,
    ours: bool,
    class_name: str,
    in_place: bool = False,
) -> CostPrior:
    """attention: transformers' name for it, "none" without. ours: whether packed attention is :mod:`memsafe.attention`'s on a
    CPU, with a workspace of its own. class_name: of the transformers model. in_place: whether activations work in place."""
    heads = shape.num_heads
    prior = CostPrior.for_architecture(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        gated=shape.gated,
        num_heads=heads,
        bytes_per_element=dtype.itemsize,
        layout="packed" if packed else "padded",
        attention="eager" if attention in ("eager", "none") else "sdpa",
        vocab_logits=shape.vocab_size if "MaskedLM" in class_name else 0,
        small_mask=small_mask,
        rotary_size=shape.rotary_size,
        score_limit=kernels.score_limit(heads) if ours and dtype == torch.float32 else 0,
        in_place=in_place,
        frees_widest=getattr(config, "model_type", None) == "distilbert",
    )
    if shape.window is not None and packed:
        masks = grouped.window_bytes(shape.window, dtype.itemsize)
        # ModernBERT's attention holds query, key and value together while two of them are rotated: 11.5 to 11.7 hidden
        # sizes per token were measured, more than its narrow feed-forward layers need.
        per_token = max(prior.per_token_bytes, 11.5 * shape.hidden_size * dtype.itemsize + 4 * 8)
        prior = replace(prior, fixed_bytes=prior.fixed_bytes + masks, per_token_bytes=per_token)
    elif shape.window is not None:
        # Padded: a mask for the window, one for all, and one in the making; 20 bytes per pair of tokens were measured
        # for ModernBERT in transformers 4.57, 15 in version 5.
        prior = replace(prior, per_square_bytes=4 * prior.per_square_bytes)
    if prior.per_square_bytes and attention == "eager":
        # Models with attention of their own add position biases: 1.3 times the plain scores in MPNet, 3 in DeBERTa-v2.
        prior = replace(prior, per_square_bytes=3 * prior.per_square_bytes)
    if getattr(config, "relative_attention", False):
        # DeBERTa: each token against each relative position, twice with what is gathered from it; and the projected
        # positions once more for each sequence, for keys and for queries (as its code repeats them).
        span = _number(config, "position_buckets") or _number(config, "max_relative_positions") or 512
        per_token = prior.per_token_bytes + 4 * heads * 2 * span * dtype.itemsize
        per_sequence = prior.per_sequence_bytes + 2 * 2 * span * shape.hidden_size * dtype.itemsize
        prior = replace(prior, per_token_bytes=per_token, per_sequence_bytes=per_sequence)
    return prior


def tiled(prior: CostPrior, shape: Architecture, tiles: Tiles, row_values: int) -> CostPrior:
    """`prior` of a model whose sparse rows, of `row_values` numbers, are made in `tiles`.

    Per token the encoder's last states and what the head makes of them; of each sequence in a tile its maxima, a flag for
    each, and once more the maxima while they are made; of each row numbers and columns, and both once more while rows are joined.
    """
    return replace(
        prior,
        head_token_bytes=2.0 * shape.hidden_size * tiles.size + 64,
        head_tile_bytes=float(tiles.words * tiles.size),
        head_sequence_bytes=float(tiles.words * (2 * tiles.size + 1)),
        head_row_bytes=2.0 * row_values * (4 + tiles.size),
        head_tile_tokens=tiles.tokens,
    )


def tokenwise_prior(shape: Architecture, dtype: torch.dtype) -> CostPrior:
    """Of a model without attention whose texts are tokenised in its forward: what that takes is most of it."""
    per_token = CHARS_PER_TOKEN * BYTES_PER_CHAR + 8 * shape.hidden_size * dtype.itemsize
    return CostPrior(64 * 1024.0, per_token, shape.hidden_size * (dtype.itemsize + 4) + 64.0, 0.0)


def runtime_prior(shape: Architecture, *, fused: bool, small_mask: bool) -> CostPrior:
    """Of a model that another runtime runs, in float32 between its products, padded. fused: whether attention makes no scores.

    Growth of the process was measured, in hidden sizes of float32 per token: 16 to 20 by OpenVINO (two layers of 256, 512 to
    8,190 tokens, linear in these), 34 by ONNX Runtime without its arena (MiniLM), which also holds five to six times the scores.
    Both take some MiB at their first forward. small_mask: whether the mask has one row for all queries.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    per_token = 4.0 * (4 * hidden + (5 if shape.gated else 3.5) * inner)
    per_square = 0.0 if small_mask and shape.window is None else 5.0
    if not fused:
        per_token, per_square = 2 * per_token, per_square + 6 * 4 * shape.num_heads
    return CostPrior(8.0 * (1 << 20), per_token, 8.0 * hidden + 64.0, per_square)


def _number(config: Any, name: str) -> int:
    """A size that a config has under `name`; 0 for none, and for what is no size of a model that could be loaded."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and 0 < value < 1 << 31 else 0
