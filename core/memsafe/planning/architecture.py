"""What a transformers config says of a model's shape, under the many names that configs use."""

from __future__ import annotations

from collections.abc import Sequence
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
        window = _first(config, ("sliding_window", "local_attention"))
        vocab_size = _first(config, ("vocab_size",)) or 0
        get = getattr(config, "get_text_config", None)
        config = get() if callable(get) else config
        hidden = int(
            _first(config, ("hidden_size", "dim", "d_model")) or max(64, int((weights_bytes / 48) ** 0.5) // 8)
        )
        heads = int(_first(config, ("num_attention_heads", "n_heads", "num_heads")) or max(1, hidden // 64))
        rotary = _first(config, ("rope_parameters", "rope_theta")) is not None
        return Architecture(
            hidden_size=hidden,
            intermediate_size=int(
                _first(config, ("intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "n_inner")) or 4 * hidden
            ),
            gated=str(getattr(config, "model_type", "")) not in _PLAIN,
            num_heads=heads,
            num_layers=int(_first(config, ("num_hidden_layers", "n_layers", "num_layers")) or 12),
            rotary_size=int(_first(config, ("head_dim",)) or hidden // heads) if rotary else 0,
            window=window if isinstance(window, int) else None,
            vocab_size=int(vocab_size),
        )

    def flops(self, shape: BatchShape) -> float:
        """Floating-point operations of one forward: 2 per weight and token, and 4*H per pair of tokens and layer."""
        h, i = self.hidden_size, self.intermediate_size
        per_token = 2 * self.num_layers * (4 * h * h + (3 if self.gated else 2) * h * i)
        return float(per_token * shape.tokens + 4 * self.num_layers * h * shape.squares)


def _first(config: Any, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
