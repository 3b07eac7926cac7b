"""The answer of :func:`memsafe.advise`: figures, what they mean, and what to change first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memsafe.config import format_bytes

__all__ = ["Advice", "DefaultRun", "ExpectedTime", "Hint", "Lighter"]


_TOLD = {
    "folder": "its folder",
    "cache": "its copy in the hub's cache",
    "hub": "the hub",
    "table": "the table of known models",
}


@dataclass(frozen=True)
class DefaultRun:
    """What the usual default takes: `rows` texts padded to `length` tokens.

    needs_bytes: with sdpa attention, beyond the weights. eager_bytes: with eager attention. outcome, eager_outcome: "fits", "dies"
    (more than 10 % over what is free), or "on the edge".
    """

    rows: int
    length: int
    needs_bytes: int
    outcome: str
    eager_bytes: int
    eager_outcome: str


@dataclass(frozen=True)
class ExpectedTime:
    """From a recorded curve. where: device, versions and date of it. seconds: of the device, for all texts; None without texts."""

    curve: str
    where: str
    micro_batch_tokens: int
    tokens_per_s: float
    seconds: float | None


@dataclass(frozen=True)
class Lighter:
    """A lighter model that covers the same languages. parameters: millions; weights_bytes: in half precision."""

    name: str
    parameters: float
    weights_bytes: int
    max_length: int
    source: str


@dataclass(frozen=True)
class Hint:
    """One thing to change. about: "dtype", "max_length", "reserve" or "model", in this order of trying."""

    about: str
    text: str


@dataclass(frozen=True)
class Advice:
    """What a model takes of a device's memory, before anything is loaded. Sizes in bytes, lengths in tokens; expectations that
    measured peaks met within 10 %. ``print(advice)`` for people, :meth:`to_dict` for programs."""

    model: str
    kind: str
    told_by: str
    """Where the figures are from: "folder", "cache", "hub" (config.json and headers), "table" (of known models)."""
    device: str
    dtype: str
    fits: bool
    """Whether the weights fit and the longest text too."""
    device_memory_bytes: int
    taken_bytes: int
    context_bytes: int
    """What the process takes beside tensors: the driver's context and loaded libraries."""
    reserve_bytes: int
    weights_bytes: int
    weights_by_dtype: dict[str, int]
    room_bytes: int
    """For micro-batches: memory - taken - context - weights - reserve. Negative if the weights do not fit."""
    parameters: float
    """Millions."""
    max_length: int
    bytes_per_token_packed: int
    bytes_per_token_padded: int
    """Of a padded batch at max_length, the mask over pairs of tokens included."""
    longest_text: int
    """Tokens of the longest text that fits alone, up to max_length; 0 if none does."""
    longest_text_bytes: int
    """What a text of max_length tokens takes."""
    largest_micro_batch: int
    """Tokens of the largest micro-batch of texts as given (of 300 tokens if none were given); 0 if none fits."""
    texts: str
    """How long the texts are, and where that is from."""
    defaults: tuple[DefaultRun, ...]
    expected: tuple[ExpectedTime, ...]
    hints: tuple[Hint, ...]
    lighter: tuple[Lighter, ...]
    lighter_as_of: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        verdict = "fits" if self.fits else "does NOT fit"
        weights = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.weights_by_dtype.items())
        rows = [
            ("model", f"{self.model} ({self.kind}, {self.parameters:,.0f}M parameters), told by {_TOLD[self.told_by]}"),
            (
                "device",
                f"{format_bytes(self.device_memory_bytes)} ({self.device}): {format_bytes(self.taken_bytes)} taken by others, "
                f"{format_bytes(self.context_bytes)} context, {format_bytes(self.reserve_bytes)} reserve",
            ),
            ("weights", f"{format_bytes(self.weights_bytes)} in {self.dtype} (by dtype: {weights})"),
            ("left for micro-batches", format_bytes(self.room_bytes)),
            (
                "bytes per token",
                f"{self.bytes_per_token_packed:,} packed (memsafe), {self.bytes_per_token_padded:,} padded to {self.max_length:,}",
            ),
            (
                "longest text",
                f"{self.longest_text:,} of {self.max_length:,} tokens; one of {self.max_length:,} takes {format_bytes(self.longest_text_bytes)}",
            ),
            ("largest micro-batch", f"{self.largest_micro_batch:,} tokens ({self.texts})"),
        ]
        rows += [
            (
                f"default batch of {run.rows}",
                f"{run.rows} x {run.length:,} padded: {format_bytes(run.needs_bytes)}, {run.outcome}; "
                f"with eager attention {format_bytes(run.eager_bytes)}, {run.eager_outcome}",
            )
            for run in self.defaults
        ]
        for time in self.expected:
            took = "" if time.seconds is None else f", {time.seconds:,.1f} s for these texts"
            rows.append(
                (
                    "expected time",
                    f"{time.tokens_per_s:,.0f} tokens/s{took}, in micro-batches of {time.micro_batch_tokens:,} tokens (curve {time.curve}: {time.where})",
                )
            )
        lines = [f"{self.model} {verdict}."]
        lines += [f"  {name:<23} {value}" for name, value in rows]
        if self.hints:
            lines.append("What to change, in this order:")
            lines += [f"  {place}. {hint.about}: {hint.text}" for place, hint in enumerate(self.hints, 1)]
        if self.lighter:
            lines.append(f"Lighter models for the same languages (table of {self.lighter_as_of}; in half precision):")
            lines += [
                f"  {each.name:<60} {each.parameters:>6,.0f}M  {format_bytes(each.weights_bytes):>10}  {each.max_length:>6,} tokens"
                for each in self.lighter
            ]
        lines += [f"Note: {note}" for note in self.notes]
        return lines
