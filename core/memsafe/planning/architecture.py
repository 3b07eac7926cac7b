"""What a transformers config says of a model's shape, under the many names that configs use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memsafe.planning.batch import BatchShape

__all__ = ["Architecture"]

_PLAIN = (
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "distilbert",
    "mpnet",
    "deberta-v2",
    "camembert",
    "albert",
)
"""Model types with two matrices in a feed-forward layer; any other counts as gated, with three: the dearer guess."""

_LARGEST = 1 << 31
"""No size of a model reaches it."""


@dataclass(frozen=True)
class Architecture:
    """The sizes that memory and time depend on.

    gated: three matrices in a feed-forward layer instead of two. window: of local attention, in tokens; None without.
    rotary_size: elements per head that positions rotate; 0 without rotary positions. vocab_size: 0 where unknown.
    """

    hidden_size: int
    intermediate_size: int
    gated: bool
    num_heads: int
    num_layers: int
    rotary_size: int
    window: int | None
    vocab_size: int

    @staticmethod
    def of(config: Any, weights_bytes: int) -> Architecture:
        """`config`: a transformers config or None; what it does not say is guessed, from `weights_bytes` if need be."""
        window = _size(config, "sliding_window", "local_attention")
        vocab_size = _size(config, "vocab_size") or 0
        get = getattr(config, "get_text_config", None)
        config = get() if callable(get) else config
        hidden = _size(config, "hidden_size", "dim", "d_model") or max(64, int((weights_bytes / 48) ** 0.5) // 8)
        heads = _size(config, "num_attention_heads", "n_heads", "num_heads") or max(1, hidden // 64)
        rotary = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta"))
        return Architecture(
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "n_inner")
            or 4 * hidden,
            gated=str(getattr(config, "model_type", "")) not in _PLAIN,
            num_heads=heads,
            num_layers=_size(config, "num_hidden_layers", "n_layers", "num_layers") or 12,
            rotary_size=_size(config, "head_dim") or hidden // heads if rotary else 0,
            window=window,
            vocab_size=vocab_size,
        )

    def flops(self, shape: BatchShape) -> float:
        """Floating-point operations of one forward: 2 per weight and token, and 4*H per pair of tokens and layer."""
        h, i = self.hidden_size, self.intermediate_size
        per_token = 2 * self.num_layers * (4 * h * h + (3 if self.gated else 2) * h * i)
        return float(per_token * shape.tokens + 4 * self.num_layers * h * shape.squares)


def _size(config: Any, *names: str) -> int | None:
    """The first of `names` that the config has, if that is a number something can have: a file may say anything under a name
    that its model does not read."""
    value = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST
    return value if fits else None
