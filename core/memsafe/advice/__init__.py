"""Will it fit, and with which settings? Asked before anything is loaded: :func:`advise`.

The figures are those that the engine itself starts from (`planning/prior.py`, `models/priors.py`), for a model of which only
config.json and the headers of its weights were read. No device is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memsafe.advice import facts, known, recorded
from memsafe.advice.estimate import MARGIN, Estimate
from memsafe.advice.facts import ModelFacts
from memsafe.advice.hints import hints_of, notes_of
from memsafe.advice.lengths import Lengths, of_numbers, parse
from memsafe.advice.report import Advice, DefaultRun, ExpectedTime, Hint, Lighter
from memsafe.config import MemoryPolicy, MiB, Size, parse_size
from memsafe.errors import ConfigError
from memsafe.inputs import check_texts, model_name
from memsafe.planning.traits import Traits

__all__ = ["Advice", "DefaultRun", "ExpectedTime", "Hint", "Lighter", "advise"]

DEFAULT_BATCHES = (10, 32)
"""LlamaIndex embeds 10 texts at a time (DEFAULT_EMBED_BATCH_SIZE), sentence-transformers 32."""
WORKSPACE_BYTES = 32 * MiB
"""What cuBLAS keeps for each of memsafe's two lanes, inside torch's allocator: torch's default on Hopper (CublasHandlePool.cpp), 8 MiB on
other cards. Inferred: it explains what two runs on an H200 took beyond the formula, to 0.6 and 3.6 %."""
CONTEXT_BYTES = {"cuda": 527 * MiB + 2 * WORKSPACE_BYTES, "cpu": 512 * MiB}
"""cuda: what an H200's driver had given away with nothing but a context open (total less free of the machine's row in
benchmarks/results/gpu-nvidia-h200-correctness-prediction-recovery.json), and the workspaces. cpu: Python, torch, transformers and
sentence-transformers in memory, rounded up."""
_USUAL_TOKENS = 300
_MODEL_LENGTH = 512
"""Where nothing says how long texts may be."""
_CHARS_PER_TOKEN = 4.0
"""Of English, for texts whose tokenizer is not at hand."""
_MOST_LIGHTER = 5


def advise(
    model: str | os.PathLike[str],
    *,
    device_memory: Size,
    taken: Size = 0,
    max_length: int | None = None,
    dtype: str | None = None,
    texts: Sequence[str] | None = None,
    lengths: Any = None,
    rerank: bool | None = None,
    reserve: Size | None = None,
    device: str = "cuda",
    context: Size | None = None,
    revision: str | None = None,
    cache_folder: str | None = None,
) -> Advice:
    """What `model` takes of a device's memory and what to change if that is too much; nothing is loaded, no device is needed.

    Args:
        model: folder, or hub id. Of one that is not on this machine config.json and headers are asked for; where there is no
            network, models of the table of known ones still have an answer.
        device_memory: what the device has, such as ``"16GiB"`` (what torch reports: a T4 sold with 16 GB has 14.6 GiB).
        taken: what other processes hold of it; a fraction is one of `device_memory`.
        max_length: tokens after which texts are cut; None as the model says.
        dtype: "float32", "float16", "bfloat16", "auto" (half precision), None as stored.
        texts: the texts themselves, counted with the model's own tokenizer if it is at hand.
            (Those of a reranker are its documents; its pairs have the query's tokens beside.)
        lengths: or only how long they are: numbers of tokens, or ``"median=300,longest=8192,count=1000"``.
        rerank: True for a reranker, False for an embedder; None as the model says.
        reserve: as in :class:`MemoryPolicy`. device: "cuda" or "cpu". context: what the process takes beside tensors; None: as
            measured (cuda 591 MiB, cpu 512 MiB).

    Raises:
        ConfigError: an option is out of range. ModelError, ModelNotFoundError: the model is damaged, or nowhere to be found.
    """
    name = model_name(model)
    if not isinstance(name, str):
        raise ConfigError(f"model: got a {type(model).__name__}; give a folder or a hub id: nothing is loaded here")
    if device not in CONTEXT_BYTES:
        raise ConfigError(f"device: got {device!r}; choose from {', '.join(CONTEXT_BYTES)}")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ConfigError(f"max_length: got {max_length!r}; give an int of at least 1, in tokens")
    total = parse_size(device_memory, name="device_memory")
    if not isinstance(total, int) or total == 0:
        raise ConfigError(f"device_memory: got {device_memory!r}; give a size such as '16GiB'")
    found = facts.look(name, rerank=rerank, revision=revision, cache_folder=cache_folder)
    chosen = facts.check_dtype(dtype, found.stored_dtype)
    limit = min(max_length or found.max_length or _MODEL_LENGTH, found.max_length or 1 << 30)
    spread = _lengths(texts, lengths, found)
    policy = MemoryPolicy(reserve=reserve)
    return _advice(
        Estimate(found, chosen, device),
        total,
        min(_bytes("taken", taken, total), total),
        CONTEXT_BYTES[device] if context is None else _bytes("context", context, total),
        policy.reserve_bytes(total),
        limit,
        None if spread is None else spread.cut(limit),
        max_length,
    )


def _advice(
    estimate: Estimate,
    total: int,
    taken: int,
    context: int,
    reserve: int,
    limit: int,
    spread: Lengths | None,
    asked_length: int | None,
) -> Advice:
    found, dtype = estimate.facts, estimate.dtype
    weights = found.weights_bytes(dtype)
    free = total - taken - context  # what the device would report as free, and what upstream may take
    room = free - weights - reserve
    mean = _USUAL_TOKENS if spread is None else spread.tokens / max(spread.texts, 1)
    longest = estimate.longest_text(room, limit)
    batch = estimate.largest_micro_batch(room, min(mean, limit))
    length = limit if spread is None else min(limit, spread.longest)
    defaults = tuple(_default(estimate, rows, length, free - weights) for rows in DEFAULT_BATCHES)
    wide = estimate.padded(DEFAULT_BATCHES[-1], limit) / (DEFAULT_BATCHES[-1] * limit)
    lighter = _lighter(found)
    need = estimate.one_text(limit)
    return Advice(
        model=found.name,
        kind=found.kind,
        told_by=found.told_by,
        device=estimate.kind,
        dtype=dtype,
        fits=room > 0 and longest >= limit,
        device_memory_bytes=total,
        taken_bytes=taken,
        context_bytes=context,
        reserve_bytes=reserve,
        weights_bytes=weights,
        weights_by_dtype={each: found.weights_bytes(each) for each in facts.DTYPES},
        room_bytes=room,
        parameters=found.parameters,
        max_length=limit,
        bytes_per_token_packed=round((estimate.one_text(8192) - estimate.one_text(4096)) / 4096),
        bytes_per_token_padded=round(wide),
        longest_text=longest,
        longest_text_bytes=need,
        largest_micro_batch=batch,
        texts=f"texts of {min(_USUAL_TOKENS, limit)} tokens" if spread is None else spread.said,
        defaults=defaults,
        expected=tuple(_expected(estimate, spread, batch, min(mean, limit))) if batch else (),
        hints=tuple(hints_of(estimate, room, reserve, taken, limit, longest, spread, asked_length, bool(lighter))),
        lighter=lighter,
        lighter_as_of=known.AS_OF,
        notes=tuple(notes_of(estimate, defaults)),
    )


def _default(estimate: Estimate, rows: int, length: int, free: int) -> DefaultRun:
    needs, eager = estimate.padded(rows, length), estimate.eager(rows, length)
    return DefaultRun(rows, length, needs, _outcome(needs, free), eager, _outcome(eager, free))


def _outcome(needs: int, free: int) -> str:
    if needs * (1 + MARGIN) <= free:
        return "fits"
    return "dies" if needs * (1 - MARGIN) > free else "on the edge"


def _expected(estimate: Estimate, spread: Lengths | None, batch: int, mean: float) -> list[ExpectedTime]:
    counts = {max(round(mean), 1): 1000} if spread is None else spread.counts
    tokens = sum(length * count for length, count in counts.items())
    times = []
    for each in recorded.matching(estimate.facts.architecture, estimate.dtype):
        knee = Traits.of("cpu" if each.name.startswith("cpu") else "cuda", 2).knee
        size, seconds = each.run(counts, batch, knee)
        times.append(ExpectedTime(each.name, each.where, size, tokens / seconds, None if spread is None else seconds))
    return times


def _lighter(found: ModelFacts) -> tuple[Lighter, ...]:
    entries = known.lighter(found.kind, found.languages, found.parameters)[:_MOST_LIGHTER]
    return tuple(
        Lighter(each.name, each.parameters, facts.of_known(each).weights_bytes("float16"), each.max_length, each.source)
        for each in entries
    )


def _lengths(texts: Any, lengths: Any, found: ModelFacts) -> Lengths | None:
    if texts is not None and lengths is not None:
        raise ConfigError("texts, lengths: got both; give one of them")
    if lengths is not None:
        return parse(lengths)
    if texts is None:
        return None
    checked = check_texts(texts)
    if not checked:
        raise ConfigError("texts: got none; give some, or leave it out")
    counted = _count(checked, found.checkpoint.folder)
    if counted is not None:
        return of_numbers(counted, f"{len(checked):,} texts, counted with the model's tokenizer")
    return of_numbers(
        [max(round(len(text) / _CHARS_PER_TOKEN), 1) + 2 for text in checked],
        f"{len(checked):,} texts, guessed at {_CHARS_PER_TOKEN:.0f} characters a token: no tokenizer at hand",
    )


def _count(texts: Sequence[str], folder: Path) -> list[int] | None:
    """Tokens of each text by the folder's tokenizer.json; None without one."""
    file = next(
        (f for f in (folder / "tokenizer.json", *sorted(folder.glob("0_*/tokenizer.json"))) if f.is_file()), None
    )
    if file is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts: list[int] = []
    for start in range(0, len(texts), 256):
        counts += [max(len(each.ids), 1) for each in tokenizer.encode_batch(list(texts[start : start + 256]))]
    return counts


def _bytes(name: str, size: Size, total: int) -> int:
    parsed = parse_size(size, name=name)
    return parsed if isinstance(parsed, int) else int(parsed * total)
