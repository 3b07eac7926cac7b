"""What to change, in the order of what it costs: dtype, length, reserve, and only then the model."""

from __future__ import annotations

from collections.abc import Sequence

from memsafe.advice import known
from memsafe.advice.estimate import MARGIN, Estimate
from memsafe.advice.lengths import Lengths
from memsafe.advice.report import DefaultRun, Hint
from memsafe.config import MiB, format_bytes

__all__ = ["hints_of", "notes_of"]


def hints_of(
    estimate: Estimate,
    room: int,
    reserve: int,
    taken: int,
    limit: int,
    longest: int,
    spread: Lengths | None,
    asked_length: int | None,
    has_lighter: bool,
) -> list[Hint]:
    found, hints = estimate.facts, list[Hint]()
    if estimate.dtype == "float32":
        half = Estimate(found, "float16", estimate.kind)
        saved = found.weights_bytes("float32") - found.weights_bytes("float16")
        whole = half.longest_text(room + saved, limit)
        hints.append(
            Hint(
                "dtype",
                f"dtype='float16' saves {format_bytes(saved)} of weights and half of what a token takes: then texts of up to {whole:,} "
                "tokens fit. On cards before Ampere (T4, V100) float16, not bfloat16, which they only emulate.",
            )
        )
    if spread is not None and (cut := _useful_length(spread, limit)) is not None:
        kept = 1 - spread.share_longer(cut)
        hints.append(
            Hint(
                "max_length",
                f"{kept:.0%} of the texts have at most {cut:,} tokens; max_length={cut} would cut the others, and the longest would take "
                f"{format_bytes(estimate.one_text(cut))} instead of {format_bytes(estimate.one_text(min(limit, spread.longest)))}.",
            )
        )
    elif longest < limit:
        hints.append(
            Hint(
                "max_length",
                f"max_length={longest} is the longest that fits." if longest else "no text fits, of any length.",
            )
        )
    elif asked_length is None and limit > 512:
        hints.append(
            Hint(
                "max_length",
                f"{limit:,} tokens fit. If your texts are shorter, max_length=512 keeps a stray long one from taking "
                f"{format_bytes(estimate.one_text(limit))} ({format_bytes(estimate.one_text(512))} then).",
            )
        )
    least = 64 * MiB
    if room < estimate.one_text(limit) and reserve > least:
        hints.append(
            Hint(
                "reserve",
                f"MemoryPolicy(reserve='64MiB') gives {format_bytes(reserve - least)} more, if no neighbour grows.",
            )
        )
    elif taken and estimate.one_text(limit) < room:
        hints.append(
            Hint(
                "reserve",
                f"others hold {format_bytes(taken)} and may want more; MemoryPolicy(reserve=...) keeps that free for them.",
            )
        )
    if has_lighter:
        hints.append(Hint("model", "a lighter model for the same languages, from the table below."))
    return hints


def _useful_length(spread: Lengths, limit: int) -> int | None:
    """A round length that keeps 95 % of the texts whole and is at most half of the longest; None if there is none."""
    longest = min(limit, spread.longest)
    return next(
        (cut for cut in (256, 512, 1024, 2048, 4096) if 2 * cut <= longest and spread.share_longer(cut) <= 0.05), None
    )


def notes_of(estimate: Estimate, defaults: Sequence[DefaultRun]) -> list[str]:
    notes = []
    if estimate.facts.told_by == "table":
        notes.append(
            f"figures from the table of known models ({known.AS_OF}), since neither folder nor hub could be read."
        )
    if estimate.facts.eager_only:
        notes.append("this architecture computes attention itself, so that upstream holds all scores in every version.")
    elif any(run.outcome != run.eager_outcome for run in defaults):
        notes.append("eager attention is what transformers before 4.45 ran XLM-R with, and what some servers force.")
    if estimate.dtype == "bfloat16" and estimate.kind == "cuda":
        notes.append(
            "bfloat16 on a card before Ampere (T4, V100): attention falls to a kernel that holds all scores; take float16."
        )
    notes.append(
        f"expectations, met by measured peaks within {MARGIN:.0%}; the engine measures and corrects them as it runs."
    )
    return notes
