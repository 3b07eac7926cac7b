"""At load, once per model: which way from text to final row gives this very model's own rows?

Texts that are hard on a model go alone through its own ``encode`` or ``predict``, and together through each way that
could be taken: tokenising, packing, masking and head as a call would have them. Rows are compared, and hidden states of
packed forwards. Whatever differs, fails or yields a non-number is not taken, down to the model's own code, one input at
a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from memsafe.machine.refusals import is_out_of_memory
from memsafe.models import probes
from memsafe.models.heads import HEADS
from memsafe.models.probes import BARE, Call, Probe
from memsafe.models.samples import long_samples
from memsafe.models.segments import each

__all__ = ["SelfCheck", "Subject", "run_self_check", "tolerance"]


@dataclass(frozen=True)
class SelfCheck:
    """The way that a model takes.

    packed_ok: packed forwards. small_mask_ok: the small mask of padded ones. reason: why not packed. max_difference: of
    rows and of packed hidden states, relative to the norm of the model's own. in_place_ok: `fuse.install`. head: for
    `PackedModel`, one of `heads.HEADS`. alone: one input at a time, since rows depend on what runs together. own: not
    even tokens are taken from us: the model's own ``encode`` or ``predict`` makes each row. cut: nor all of a giant input, since
    what overflows by itself what the model takes was seen to make no difference. row_values: numbers other than zero in a
    sparse row, on average.
    """

    packed_ok: bool
    small_mask_ok: bool
    reason: str = ""
    max_difference: float = 0.0
    seconds: float = 0.0
    in_place_ok: bool = False
    head: str = "groups"
    alone: bool = False
    own: bool = False
    cut: bool = False
    row_values: int = 0


class Subject(Protocol):
    """What the check asks of the model that it checks."""

    kind: str
    run: Any
    """The model, private, to which ways are applied."""
    own: Any
    """The model as it was loaded, private: what gives the rows that all ways are held against."""
    tokenizer: Any
    dtype: torch.dtype
    device_of_rows: torch.device
    max_length: int | None
    refusal: str
    """Why neither packing nor masks of ours can be tried; "" if they can."""
    can_mask: bool
    """Whether the small mask can be tried."""
    can_fuse: bool
    least_tolerance: float
    """Differences that rounding explains, beyond what the dtype does: of a model whose activations become int8."""
    can_flat: bool
    """Whether the head "flat" can be tried."""

    @property
    def encoder_module(self) -> Any:
        """The transformers encoder inside; None without."""

    def use(self, check: SelfCheck) -> None:
        """Take the way `check` from now on. Raises NotImplementedError where it does not exist."""

    def rows_of(self, values: Sequence[Any], call: Call) -> Any:
        """Rows of `values`, in their order, as one micro-batch of a call would make them."""

    def company(self, values: Sequence[Any], call: Call) -> list[bool]:
        """Which of `values` may run with others, however the others run."""

    def ends_in_padding(self, values: Sequence[Any], call: Call) -> list[bool]:
        """Which of `values` end in a padding token written in them."""

    def pack(self, values: Sequence[Any], call: Call) -> list[Tensor]:
        """Pack `values` through the encoder: its last hidden states of each, shape (tokens, hidden size)."""

    def rows_by(self, head: str) -> Any:
        """Rows of the values packed last, in their order, through `head`."""


_ORDER = 10
"""A padded batch of the model's own may differ by so many times more before its inputs run alone: what is wrong differs by
far more than what is rounded otherwise, and running alone is slow."""


def tolerance(dtype: torch.dtype, device: torch.device, layers: int = 1) -> float:
    """The largest difference, relative to the norm, that sums in another order explain, for so many layers.

    Seen for correct packing: float32 1e-6 (all-MiniLM-L6-v2, 6 layers), float16 1.7e-3, bfloat16 1.5e-2; it grows with
    the root of the number of layers. Half precision: twelve roundings of 2**-11 and 2**-8. TF32 multiplies as coarsely
    as float16. A sequence that sees another's tokens, or misplaces its own, differs by 0.1 and more.
    """
    if dtype is torch.float32 and device.type == "cuda" and _tf32():
        return 6e-3
    if dtype is torch.float32:
        return 1e-5 * float(max(layers / 6, 1.0) ** 0.5)
    return {torch.float64: 1e-10, torch.float16: 6e-3}.get(dtype, 5e-2)


def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # set by its newer name, fp32_precision (torch 2.9), which forbids asking by the older one
        return bool(matmul.fp32_precision != "ieee")


def run_self_check(subject: Subject) -> SelfCheck:
    """The quickest way that gives the model's own rows; `subject` uses it afterwards.

    Takes milliseconds for small models. Out-of-memory errors pass through; every other failure is a reason.
    """
    began = time.perf_counter()
    checker = _Checker(subject)
    found = checker.find()
    found = replace(found, seconds=time.perf_counter() - began, row_values=checker.row_values())
    subject.use(found)
    return found


Verdict = tuple[bool, float, str]
"""(equal, largest difference, why not)."""


_CUT_TOKENS = 1024
"""Tokens of a text that is cut even for a model that takes next to none; see :class:`memsafe.models.content.Cutter`."""


class _Checker:
    """The probes of one model, made once, and what each way makes of them."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        device = subject.device_of_rows
        config = getattr(subject.encoder_module, "config", None)
        layers = getattr(config, "num_hidden_layers", None)
        told = tolerance(subject.dtype, device, layers if isinstance(layers, int) else 1)
        self.allowed = max(told, subject.least_tolerance)
        pairs = subject.kind == "reranker"
        longest = probes.longest_wanted(subject.encoder_module, subject.max_length, device)
        values = probes.probe_inputs(subject.tokenizer, pairs=pairs, longest=longest)
        limit, budget = subject.max_length, probes.budget_tokens(subject.encoder_module, device)
        self.giants: list[Any] = []
        if limit is not None and 4 * limit <= budget:
            self.giants = long_samples(max(8 * limit, _CUT_TOKENS), pairs)
        model = probes.reference_model(subject.own)
        self.plain = probes.reference(model, values, BARE)
        company = subject.company([probe.value for probe in self.plain], BARE)
        self.in_company = [probe for probe, may in zip(self.plain, company, strict=True) if may]
        few = values[1:2] + values[-2:-1]  # of two lengths
        calls = probes.telling(model, few, probes.calls(model, pairs))
        if probes.is_large(subject.encoder_module, device):  # of which any forward takes long, however short the text
            few = few[:1]
        self.others = [probes.reference(model, few, call) for call in calls]

    def row_values(self) -> int:
        """See :class:`SelfCheck`."""
        if self.subject.kind != "sparse":
            return 0
        counts = [
            int(probe.row.count_nonzero()) for probe in (*self.plain, *(one for some in self.others for one in some))
        ]
        return -(-sum(counts) // max(len(counts), 1))

    def find(self) -> SelfCheck:
        if not self.plain and any(self.others):  # a Router without a default route
            return self._careful(SelfCheck(False, False, "the model asks for a task or a prompt"))
        if not self.plain:
            return SelfCheck(False, False, "the model itself gives no finite row of any probe")
        quick = self._quick() if not self.subject.refusal else SelfCheck(False, False, self.subject.refusal)
        if quick.packed_ok or quick.small_mask_ok:
            verdict = self._judge(quick, self._all_calls)
            if verdict[0]:
                return quick
            quick = SelfCheck(False, False, verdict[2], verdict[1])
        return self._careful(quick)

    def _quick(self) -> SelfCheck:
        """Packed, or else padded under the small mask; activations in place unless that alone makes the difference."""
        why: Verdict = (False, 0.0, "")
        for in_place in (True, False) if self.subject.can_fuse else (False,):
            way = SelfCheck(True, False, in_place_ok=in_place)
            verdict = self._judge(way, self._packed)
            if verdict[0]:
                return replace(way, head=self._head(), max_difference=verdict[1])
            why = verdict
        for in_place in () if not self.subject.can_mask else (True, False) if self.subject.can_fuse else (False,):
            way = SelfCheck(False, True, why[2], why[1], in_place_ok=in_place)
            if self._judge(way, self._together)[0]:
                return way
        return SelfCheck(False, False, why[2], why[1])

    def _head(self) -> str:
        """The quickest head that gives the same rows, each really taken: none steps back for "groups" here."""
        ends = self.subject.ends_in_padding([probe.value for probe in self.in_company], BARE)
        some = [probe for probe, padding in zip(self.in_company, ends, strict=True) if not padding]
        if len(some) < len(self.in_company):
            self.subject.pack([probe.value for probe in some], BARE)

        def compare(head: str) -> Callable[[], float]:
            return lambda: self._against(some, self.subject.rows_by(head))

        heads = [head for head in HEADS[1:] if head != "flat" or self.subject.can_flat]
        return next((head for head in heads if self._try(compare(head), self.allowed)[0]), HEADS[0])

    def _careful(self, quick: SelfCheck) -> SelfCheck:
        """Padded by the model's own code; one at a time; the model's own methods: the first that is right."""
        padded = SelfCheck(False, False, quick.reason, quick.max_difference)
        verdict = self._judge(padded, self._all_calls, self.allowed * _ORDER)
        if verdict[0]:
            return padded
        alone = SelfCheck(False, False, f"rows depend on what runs together: {verdict[2]}", verdict[1], alone=True)
        verdict = self._judge(alone, self._all_calls)
        if verdict[0]:
            return alone
        own = replace(alone, reason=verdict[2], max_difference=verdict[1], own=True)
        cut = replace(own, cut=True)
        return cut if self.giants and self._judge(cut, self._giants)[0] else own

    # the comparisons: each returns its largest difference

    def _judge(self, way: SelfCheck, compare: Callable[[], float], allowed: float | None = None) -> Verdict:
        def used() -> float:
            self.subject.use(way)
            return compare()

        return self._try(used, self.allowed if allowed is None else allowed)

    def _try(self, compare: Callable[[], float], allowed: float) -> Verdict:
        try:
            difference = compare()
        except Exception as error:  # any failure of a way means that another serves
            if is_out_of_memory(error):
                raise
            return False, float("inf"), _because(error)
        if difference != difference:
            return False, float("inf"), "the result is not a number"
        if difference > allowed:
            return False, difference, f"results differ by {difference:.1g} of their norm, more than {allowed:.1g}"
        return True, difference, ""

    def _together(self) -> float:
        return self._rows(self.plain)

    def _packed(self) -> float:
        """Rows, and hidden states as well: a score, or a mean over many tokens, can hide a wrong token."""
        hidden = self.subject.pack([probe.value for probe in self.in_company], BARE)
        pairs = [(ours, probe.hidden) for ours, probe in zip(hidden, self.in_company, strict=True)]
        shown = [(a, b) for a, b in pairs if b is not None and a.shape == b.shape]
        return _worst(_largest(shown, scores=False), self._against(self.in_company, self.subject.rows_by(HEADS[0])))

    def _giants(self) -> float:
        """Inputs of which parts are left out before the model sees them."""
        wanted = probes.reference(probes.reference_model(self.subject.own), self.giants, BARE)
        return self._rows(wanted) if len(wanted) == len(self.giants) else float("nan")

    def _all_calls(self) -> float:
        return _worst(*(self._rows(each) for each in (self.plain, *self.others) if each))

    def _rows(self, wanted: Sequence[Probe]) -> float:
        return self._against(wanted, self.subject.rows_of([probe.value for probe in wanted], wanted[0].call))

    def _against(self, wanted: Sequence[Probe], rows: Any) -> float:
        found = each(rows)
        if [row.shape for row in found] != [probe.row.shape for probe in wanted]:
            raise NotImplementedError("there is not one row per input")
        return _largest([(row, probe.row) for row, probe in zip(found, wanted, strict=True)], scores=True)


def _worst(*differences: float) -> float:
    """The largest; NaN if one is."""
    return next((value for value in differences if value != value), max(differences))


def _because(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, NotImplementedError) and text else f"{type(error).__name__}: {text}"


def _largest(pairs: Sequence[tuple[Tensor, Tensor]], *, scores: bool) -> float:
    """The largest relative difference of each (got, wanted); NaN if anything is not finite.

    scores: rows of fewer than 16 numbers and of a norm below one count as one: a score near zero is no reason to ask
    for more digits.
    """
    found = []
    for got, wanted in pairs:
        one, other = got.double(), wanted.to(got.device).double()
        norm = torch.linalg.vector_norm(other)
        if scores and other.numel() < 16:
            norm = norm.clamp(min=1.0)
        found.append(torch.linalg.vector_norm(one - other) / norm.clamp(min=1e-30))
    if not found:
        return 0.0
    values = torch.stack(found)
    return float("nan") if not bool(values.isfinite().all()) else float(values.max())
