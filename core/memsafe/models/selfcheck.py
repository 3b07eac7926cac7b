"""At load, once per model: does the packed forward give this very model's own numbers?

A handful of sequences of random tokens goes through the plain padded forward and through the packed one; hidden
states and final rows are compared, and the small padding mask likewise. Whatever differs, fails or yields a
non-number is left off, with the reason.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memsafe.attention import interface
from memsafe.config import cache_dir
from memsafe.machine.refusals import is_out_of_memory
from memsafe.machine.store import Store, document, read_fields
from memsafe.models import fuse
from memsafe.models.packed import HEADS, PackedModel

__all__ = ["CheckStore", "SelfCheck", "run_self_check", "tolerance"]


@dataclass(frozen=True)
class SelfCheck:
    """What a model may use.

    packed_ok: packed forwards. small_mask_ok: the small mask of padded ones. reason: why not packed. max_difference: of
    packed rows and hidden states, relative to the norm of the plain ones. in_place_ok: `fuse.install`. head: for
    `PackedModel`, the first of `stub.HEADS` after "groups" that gives the same rows.
    """

    packed_ok: bool
    small_mask_ok: bool
    reason: str = ""
    max_difference: float = 0.0
    seconds: float = 0.0
    in_place_ok: bool = False
    head: str = "groups"


_LENGTHS = (90, 33, 33, 17, 5, 3, 2)
"""Tokens: equal lengths twice, an empty text (its two special tokens), one and three tokens beside the specials."""
_OPERATIONS = 2.3e11
"""Floating-point operations of all forwards together, at most: about two seconds on two CPU cores."""


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference, relative to the norm, that sums in another order explain.

    Seen for correct packing: float32 1e-6 (all-MiniLM-L6-v2, 6 layers), float16 1.7e-3, bfloat16 1.5e-2; it grows with
    the root of the number of layers. Half precision: twelve roundings of 2**-11 and 2**-8. TF32 multiplies as coarsely
    as float16. A sequence that sees another's tokens, or misplaces its own, differs by 0.1 and more.
    """
    if dtype is torch.float32 and device.type == "cuda" and _tf32():
        return 6e-3
    return {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 6e-3}.get(dtype, 5e-2)


def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # set by its newer name, fp32_precision (torch 2.9), which forbids asking by the older one
        return bool(matmul.fp32_precision != "ieee")


def run_self_check(model: nn.Module, *, seed: int = 0) -> SelfCheck:
    """Check a SentenceTransformer or CrossEncoder in eval mode on which `interface.install` has succeeded.

    Takes milliseconds for small models, and leaves the model as it was. Out-of-memory errors pass through; every other
    failure is a reason.
    """
    began = time.perf_counter()
    try:
        packed_model = PackedModel(model)
        trial = _Trial(packed_model, seed)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return SelfCheck(False, False, _because(error), seconds=time.perf_counter() - began)
    in_place = fuse.install(packed_model.hf_model) > 0
    try:
        (packed_ok, difference, reason), (small_mask_ok, _, _) = _judge(trial.packed), _judge(trial.small_mask)
    finally:
        fuse.uninstall(packed_model.hf_model)
    if in_place and not (packed_ok and small_mask_ok):
        careful, careful_small = _judge(trial.packed), _judge(trial.small_mask)
        if (careful[0], careful_small[0]) != (
            packed_ok,
            small_mask_ok,
        ):  # it was working in place that made the difference
            (packed_ok, difference, reason), small_mask_ok, in_place = careful, careful_small[0], False
    in_place = in_place and (packed_ok or small_mask_ok)
    head = next((head for head in HEADS[1:] if packed_ok and _judge(partial(trial.head, head))[0]), "groups")
    return SelfCheck(packed_ok, small_mask_ok, reason, difference, time.perf_counter() - began, in_place, head)


def _judge(compare: Any) -> tuple[bool, float, str]:
    """(equal, largest difference, reason) of one comparison; a failure is a difference."""
    try:
        difference, allowed = compare()
    except Exception as error:  # any failure of a fast path means that the plain path serves
        if is_out_of_memory(error):
            raise
        return False, float("inf"), _because(error)
    if difference != difference:
        return False, float("inf"), "the result is not a number"
    if difference > allowed:
        return False, difference, f"results differ by {difference:.1g} of their norm, more than {allowed:.1g}"
    return True, difference, ""


def _because(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, NotImplementedError) and text else f"{type(error).__name__}: {text}"


class _Trial:
    """The sequences, and the plain results that both comparisons need; those are computed once."""

    def __init__(self, packed_model: PackedModel, seed: int) -> None:
        self.model = packed_model
        encoder = packed_model.encoder
        parameter = next(encoder.parameters())
        self.device = parameter.device
        self.allowed = tolerance(parameter.dtype, self.device)
        tokenizer = getattr(packed_model.model, "tokenizer", None)
        self.pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        self.pad_left = getattr(tokenizer, "padding_side", "right") == "left"
        self.token_types = "token_type_ids" in (getattr(tokenizer, "model_input_names", None) or ())
        self.ids = _random_ids(encoder, tokenizer, _lengths(encoder, tokenizer, self.device), seed)
        self._output: Any = None
        self._plain: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def packed(self) -> tuple[float, float]:
        """(largest difference, allowed) between packed and plain rows and hidden states."""
        lengths = [len(ids) for ids in self.ids]
        row = torch.cat(self.ids)
        types = torch.zeros_like(row) if self.token_types else None
        with torch.inference_mode():
            output = self.model.hidden_states(row, lengths, types)
            rows = self.model.rows(output, row, lengths, types)
            self._output = output
            hidden = output.last_hidden_state[0].split(lengths)
        got = list(zip(rows, hidden, strict=True))
        return _largest(got, [*self.plain(0, 2), *self.plain(2, len(self.ids))]), self.allowed

    def head(self, head: str) -> tuple[float, float]:
        """The same for rows alone, with what stands behind the encoder run in another way on the last packed output."""
        if self._output is None:
            raise NotImplementedError("nothing was packed")
        lengths, row = [len(ids) for ids in self.ids], torch.cat(self.ids)
        types = torch.zeros_like(row) if self.token_types else None
        rows = PackedModel(self.model.model, head).rows(self._output, row, lengths, types)
        wanted = [*self.plain(0, 2), *self.plain(2, len(self.ids))]
        if rows.shape != (len(lengths), *wanted[0][0].shape):
            raise NotImplementedError(f"the head {head!r} gives no row per sequence")
        return _largest([(got, hidden) for got, (_, hidden) in zip(rows, wanted, strict=True)], wanted), self.allowed

    def small_mask(self) -> tuple[float, float]:
        """The same for padded sequences under the small mask; the short ones suffice."""
        features, _ = self._features(self.ids[2:])
        with interface.padded(uniform=False):
            rows = self.model.plain(features)
        wanted = self.plain(2, len(self.ids))
        return _largest([(row, hidden) for row, (_, hidden) in zip(rows, wanted, strict=True)], wanted), self.allowed

    def plain(self, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """(row, hidden states) of each sequence by the plain forward: no context, so plain sdpa and its own mask."""
        if start not in self._plain:
            features, places = self._features(self.ids[start:stop])
            rows, hidden = self.model.plain_with_hidden_states(features)
            self._plain[start] = [(rows[index], hidden[index, place]) for index, place in enumerate(places)]
        return self._plain[start]

    def _features(self, ids: Sequence[Tensor]) -> tuple[dict[str, Any], list[slice]]:
        """Features of padded rows, and where in each row its tokens lie."""
        width = max(len(row) for row in ids)
        shape = (len(ids), width)
        features: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_id, dtype=torch.long, device=self.device),
            "attention_mask": torch.zeros(shape, dtype=torch.long, device=self.device),
        }
        if self.token_types:
            features["token_type_ids"] = torch.zeros(shape, dtype=torch.long, device=self.device)
        places = [slice(width - len(row), width) if self.pad_left else slice(0, len(row)) for row in ids]
        for index, (row, place) in enumerate(zip(ids, places, strict=True)):
            features["input_ids"][index, place] = row
            features["attention_mask"][index, place] = 1
        return features, places


def _largest(got: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest relative difference of rows and of each sequence's hidden states; NaN if anything is not finite.

    Rows of a norm below one count as one: a score near zero is no reason to ask for more digits. Hidden states are
    compared as well because a score, or a mean over many tokens, can hide a wrong token.
    """
    found = []
    for (row, hidden), (plain_row, plain_hidden) in zip(got, wanted, strict=True):
        for one, other, floor in ((row, plain_row, row.numel() < 16), (hidden, plain_hidden, False)):
            one, other = one.double(), other.double()
            norm = torch.linalg.vector_norm(other)
            if floor:
                norm = norm.clamp(min=1.0)
            found.append(torch.linalg.vector_norm(one - other) / norm)
    values = torch.stack(found)
    return float("nan") if not bool(values.isfinite().all()) else float(values.max())


def _lengths(encoder: nn.Module, tokenizer: Any, device: torch.device) -> list[int]:
    """Tokens of each sequence, longest first: fewer for large models, more to reach beyond a sliding window."""
    embeddings = encoder.get_input_embeddings().weight.numel()  # type: ignore[operator]
    parameters = max(1, sum(parameter.numel() for parameter in encoder.parameters()) - embeddings)
    scale = min(1.0, _OPERATIONS / (2 * parameters * 700)) if device.type == "cpu" else 1.0
    lengths = [max(round(length * scale), low) for length, low in zip(_LENGTHS, (40, 15, 15, 8, 4, 3, 2), strict=True)]
    config = encoder.config.get_text_config() if hasattr(encoder.config, "get_text_config") else encoder.config  # type: ignore[operator]
    windows = [getattr(config, name, None) for name in ("sliding_window", "local_attention")]
    # A window of thousands of tokens costs too much here; the mask and the layer must then agree on it (interface.py).
    reach = [
        window for window in windows if isinstance(window, int) and window <= (600 if device.type == "cpu" else 5000)
    ]
    lengths[0] = max([lengths[0], *(window + 9 for window in reach)])
    limits = [getattr(tokenizer, "model_max_length", None)]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - interface.position_offset(encoder))
    limit = min([value for value in limits if isinstance(value, int) and value > 0], default=lengths[0])
    return sorted((min(length, limit) for length in lengths), reverse=True)


def _random_ids(encoder: nn.Module, tokenizer: Any, lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Ordinary tokens between the special tokens of the tokenizer, so that no pad or end token lies inside."""
    generator = torch.Generator().manual_seed(seed)
    size: int = encoder.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    special = {int(index) for index in getattr(tokenizer, "all_special_ids", None) or ()}
    first = _first_of(tokenizer, "cls_token_id", "bos_token_id")
    last = _first_of(tokenizer, "sep_token_id", "eos_token_id")
    device = next(encoder.parameters()).device
    rows = []
    for length in lengths:
        ids = torch.randint(0, size, (4 * length + 16,), generator=generator, device="cpu")
        if special:
            ids = ids[~torch.isin(ids, torch.tensor(sorted(special), device="cpu"))]
        ids = ids[:length]
        if len(ids) < length:
            raise NotImplementedError("the vocabulary holds too few ordinary tokens")
        if first is not None:
            ids[0] = first
        if last is not None and length > 1:
            ids[-1] = last
        rows.append(ids.to(device))
    return rows


def _first_of(tokenizer: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(tokenizer, name, None)) is not None), None)


class CheckStore:
    """Remembers one model's self-check on disk. key: the model, its revision and dtype, and what it runs on; the
    versions of the libraries that its forward goes through are added. Losing it costs another check, nothing else."""

    _SCHEMA = 3

    def __init__(self, key: Sequence[str]) -> None:
        versions = [importlib.import_module(name).__version__ for name in ("transformers", "sentence_transformers")]
        self._key = [*key, str(torch.__version__), *versions]
        self._store = Store(os.path.join(cache_dir(), "checks"), "remembered self-check", self._SCHEMA, _believed)

    def load(self) -> SelfCheck | None:
        """What was found, or None."""
        return self._store.load(self._key)

    def save(self, check: SelfCheck) -> None:
        fields = asdict(check)
        if not math.isfinite(check.max_difference):
            fields["max_difference"] = None
        self._store.write(self._key, document(self._SCHEMA, self._key, fields))


def _believed(state: dict[str, Any]) -> SelfCheck:
    """The check in a remembered file; raises ``ValueError`` for one that `run_self_check` cannot have given."""
    infinite = state["max_difference"] is None  # JSON knows no infinity
    check = SelfCheck(**read_fields(SelfCheck, {**state, "max_difference": 0.0} if infinite else state))
    if check.head not in HEADS or (check.head != "groups" and not check.packed_ok):
        raise ValueError("a head that this check cannot have found")
    if check.in_place_ok and not (check.packed_ok or check.small_mask_ok):
        raise ValueError("working in place is right for no path")
    return replace(check, max_difference=math.inf) if infinite else check
