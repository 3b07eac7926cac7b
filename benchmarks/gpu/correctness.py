"""1. Packed against padded, for each attention kernel and dtype, at true shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import inside
from benchmarks.gpu.common import Row, Setting, free_memory
from benchmarks.gpu.models import load, texts
from benchmarks.gpu.processes import isolated

__all__ = ["run"]

DTYPES = ("float32", "float16", "bfloat16")
LENGTHS = (8192, 8192, 5000, 3001, 1500, 700, 512, 512, 300, 300, 300, 100, 64, 33, 17, 5, 4, 4)
ALLOWED = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference of a row, relative to its norm, between packed and padded of the same dtype; a token that sees another
text's differs by 0.1 and more in float32. Half precision is judged by its distance from float32 as well."""
NO_WORSE = 1.5
"""Packed half precision may be this much further from float32 than padded half precision is, plus 1e-3."""


NO_KERNEL = "No available kernel"
"""What sdpa says where it was allowed no kernel that fits; seen with torch 2.11."""


def run(setting: Setting) -> Iterator[Row]:
    """A row per model, dtype and kernel."""
    for model in ("minilm", "bge-m3", "gte-reranker"):
        yield from isolated(setting, "correctness:check", model=model)


def check(setting: Setting, model: str) -> Iterator[Row]:
    """All dtypes of one model in one process; the float32 padded rows are the reference of all."""
    most = setting.pick(256 if model == "minilm" else 8192, 96)
    lengths = [min(length, most) for length in LENGTHS]
    pairs = model == "gte-reranker"
    inputs: Any = texts(lengths, 1, extra=2)
    if pairs:
        inputs = list(zip(texts([8] * len(lengths), 2), texts([max(n - 7, 3) for n in lengths], 3), strict=True))
    wanted = None
    for dtype in setting.pick(DTYPES, DTYPES[:1]):
        free_memory(setting)
        try:
            st = load(setting, model, dtype)
        except LookupError as error:
            yield {"what": model, "outcome": f"skipped: {error}"}
            return
        plain = _plain(st, inputs, pairs, setting.pick(4, 4))
        wanted = plain if wanted is None else wanted
        from_float32 = _largest(plain, wanted)
        for kernel in setting.pick(("default", *inside.KERNELS), ("default", "math")):
            row: Row = {"what": model, "dtype": dtype, "kernel": kernel, "padded_from_float32": from_float32}
            yield {**row, **_compare(setting, st, inputs, pairs, kernel, plain, wanted, dtype)}
        del st


def _compare(
    setting: Setting, st: Any, inputs: Any, pairs: bool, kernel: str, plain: Any, wanted: Any, dtype: str
) -> Row:
    from memsafe import Embedder, MemoryPolicy, Reranker

    try:
        with inside.forced(kernel) as used:
            model = (Reranker if pairs else Embedder)(st, memory=MemoryPolicy(learn=False))
            try:
                used.clear()
                result: Any = model.run(inputs) if not pairs else model.run(inputs, activation_fn=_identity())
            finally:
                model.close()
    except LookupError as error:
        return {"outcome": f"skipped: {error}"}
    except RuntimeError as error:  # a kernel that this card or head size does not have
        return {"outcome": f"not available: {' '.join(str(error).split())[:160]}"}
    rows = result.scores.reshape(len(inputs), -1) if pairs else result.embeddings
    difference, distance = _largest(rows, plain), _largest(rows, wanted)
    padded = _largest(plain, wanted)
    good = difference <= ALLOWED[dtype] or (dtype != "float32" and distance <= NO_WORSE * padded + 1e-3)
    refusal = inside.refused_by_cards(kernel, dtype, _capability(setting))
    return {
        "outcome": outcome_of(good, result.report.path, refusal),
        "difference": difference,
        "packed_from_float32": distance,
        "ran": ", ".join(sorted(set(used))) or "sdpa",
        "longest": max(len(text) for text in inputs) if not pairs else None,
    }


def outcome_of(good: bool, path: str, refusal: bool) -> str:
    """good: the rows are right; path: how they were computed; refusal: whether no card has the kernel that was asked for."""
    if not good:
        return "DIFFERS"
    if path == "packed":
        return "equal"
    # memsafe's self-check must then serve padded rows, and they are right
    return "refused, as expected" if refusal and NO_KERNEL in path else f"not packed: {path}"


def _capability(setting: Setting) -> tuple[int, int]:
    if setting.dry:
        return (0, 0)
    import torch

    return torch.cuda.get_device_capability(0)


def _plain(st: Any, inputs: Any, pairs: bool, batch_size: int) -> Any:
    """The peer's own padded forward: float32 rows."""
    import numpy as np

    if pairs:
        scores = st.predict(inputs, batch_size=batch_size, activation_fn=_identity(), show_progress_bar=False)
        return np.asarray(scores, dtype=np.float32).reshape(len(inputs), -1)
    return np.asarray(st.encode(inputs, batch_size=batch_size, show_progress_bar=False), dtype=np.float32)


def _identity() -> Any:
    import torch

    return torch.nn.Identity()


def _largest(rows: Any, wanted: Any) -> float:
    """The largest difference of a row relative to the wanted row's norm; scores relative to at least 1."""
    import numpy as np

    norms = np.linalg.norm(wanted.astype(np.float64), axis=1)
    if wanted.shape[1] < 16:
        norms = np.maximum(norms, 1.0)
    return float(np.max(np.linalg.norm(rows.astype(np.float64) - wanted, axis=1) / norms))
