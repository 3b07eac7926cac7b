"""What the self-check runs: texts that are hard on a model, and what the model's own methods make of each one alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memsafe.machine.refusals import is_out_of_memory
from memsafe.models import sbert
from memsafe.models.packed import find_hf_model
from memsafe.models.private import ForwardState, private_copy
from memsafe.models.segments import each

__all__ = [
    "BARE",
    "Call",
    "Probe",
    "budget_tokens",
    "calls",
    "is_large",
    "longest_wanted",
    "probe_inputs",
    "reference",
    "reference_model",
    "telling",
]

OPERATIONS = 2.3e11
"""Floating-point operations of all forwards of a check together, at most: about two seconds on two CPU cores."""
_PASSES = 3
"""The model's own forwards, packed ones, and the way that was found, once more from the texts on."""
_LONG_TOKENS = 90
_FEW_TOKENS = 300
"""A budget that models of 130 million parameters and more, without their vocabulary, stay below."""
_WORDS = "the river runs past nine old mills and one red bridge before it meets a wide grey sea".split()


@dataclass(frozen=True)
class Call:
    """One way to call a model. kind: "query", "document" or None for plain ``encode`` / ``predict``; prompt: "" for none;
    task: of the model's own."""

    kind: str | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    task: str | None = None

    @property
    def options(self) -> dict[str, str]:
        return {} if self.task is None else {"task": self.task}


BARE = Call(prompt="")
"""Without the default prompt, which some poolings leave out, so that heads can be told apart."""


@dataclass(frozen=True)
class Probe:
    """One input, called alone. row: shape (dim or labels,); hidden: the encoder's last hidden states, shape
    (tokens, hidden size), where its output shows them without padding."""

    value: Any
    call: Call
    row: Tensor
    hidden: Tensor | None


def budget_tokens(encoder: nn.Module | None, device: torch.device) -> int:
    """Tokens that the probes of one pass may have together: fewer for a large model on a CPU."""
    if encoder is None or device.type != "cpu":
        return 10_000
    embeddings = encoder.get_input_embeddings().weight.numel()  # type: ignore[operator]
    parameters = max(1, sum(parameter.numel() for parameter in encoder.parameters()) - embeddings)
    return int(OPERATIONS / (2 * parameters * _PASSES))


def is_large(encoder: nn.Module | None, device: torch.device) -> bool:
    """Whether a forward of `encoder` takes long, however short its input: reading so many weights does."""
    return budget_tokens(encoder, device) < _FEW_TOKENS


def longest_wanted(encoder: nn.Module | None, limit: int | None, device: torch.device) -> int:
    """Tokens of the longest probe: beyond every sliding window and, where that is cheap, beyond the model's longest input."""
    budget = budget_tokens(encoder, device)
    wanted = max(min(_LONG_TOKENS, budget // 3), 40)
    if limit is not None and 2 * limit <= min(budget, 1200):
        wanted = max(wanted, limit + 20)  # cut, by whoever cuts
    config: Any = getattr(encoder, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    windows = [getattr(config, name, None) for name in ("sliding_window", "local_attention")]
    # A window of thousands of tokens costs too much here; the mask and the layer must then agree on it (interface.py).
    most = 600 if device.type == "cpu" else 5000
    return max([wanted, *(window + 9 for window in windows if isinstance(window, int) and window <= most)])


def probe_inputs(tokenizer: Any, *, pairs: bool, longest: int) -> list[Any]:
    """Texts, or pairs both ways: short, of equal length, of other scripts, with special tokens written in them, empty,
    and one of `longest` tokens."""
    special = [str(token) for token in getattr(tokenizer, "all_special_tokens", None) or ("[PAD]", "[SEP]")]
    pad = str(getattr(tokenizer, "pad_token", None) or "[PAD]")
    plain, turned = " ".join(_WORDS[:9]), " ".join(_WORDS[8::-1])
    inside = f"{pad} {pad} a {' '.join(special[:8])} b"
    ended = f"Old mill {pad}"
    long = " ".join(_WORDS[(place * place + place // 7) % len(_WORDS)] for place in range(longest))
    if not pairs:
        return [long, inside, plain, turned, "Ünïcode 你好 \t 1,234.5\n", ended, "a", ""]
    return [
        (long[: len(long) // 4], long),
        (inside, plain),
        (plain, inside),
        (plain, turned),
        (turned, plain),
        ("你好 Ünï", ended),
        ("a", "b"),
        ("a", ""),
        ("", ""),
    ]


def calls(model: Any, pairs: bool) -> list[Call]:
    """Every way to call `model` beside the bare one: by default, with each prompt and task of its own, by kind."""
    prompts: dict[str, str] = getattr(model, "prompts", None) or {}
    named = {text: name for name, text in prompts.items() if text}
    kinds = [] if pairs else ["query", "document"]
    tasks = [name for name in sbert.tasks(model) if name not in kinds]
    return [
        Call(),
        *map(Call, kinds),
        *(Call(prompt_name=name) for name in list(named.values())[:8]),
        *(Call(task=name) for name in tasks[:8]),
    ]


def telling(model: Any, values: Sequence[Any], found: Sequence[Call]) -> list[Call]:
    """Those of `found` that may give `values` other rows than the bare call and those before: all, but for calls of which
    sentence-transformers' own methods make the same features, and which no forward is told of."""
    if sbert.has_own_methods(model):
        return list(found)
    seen, kept = [_features(model, values, BARE)], []
    for call in found:
        features = _features(model, values, call)
        if features is None or not any(_equal(features, each) for each in seen if each is not None):
            kept.append(call)
            seen.append(features)
    return kept


def _features(model: Any, values: Sequence[Any], call: Call) -> dict[str, Any] | None:
    """What the model's forward gets of a call; None if that cannot be known."""
    options = {"task": call.kind, **call.options} if call.kind else call.options
    if sbert.forward_options(model, options):
        return None
    try:
        return sbert.preprocess(
            model, values, sbert.resolve_prompt(model, call.prompt, call.prompt_name, call.kind), options
        )
    except Exception:  # whatever it raises for a call that it does not know: `reference` finds out
        return None


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return isinstance(one, (str, int, float, type(None))) and type(one) is type(other) and one == other


def reference(model: Any, values: Sequence[Any], call: Call) -> list[Probe]:
    """What `model`'s own method gives for each of `values` alone. Values that it refuses itself, or makes no
    finite row of (half precision, whose rows are computed again), are left out.

    model: private to the caller. Every value finds it in the same state.
    """
    state, found = ForwardState(model), []
    for value in values:
        with _overheard(model) as heard:
            try:
                rows = sbert.own_rows(
                    model,
                    [value],
                    kind=call.kind,
                    prompt=call.prompt,
                    prompt_name=call.prompt_name,
                    options=call.options,
                )
                row = each(rows)[0]
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                continue
            finally:
                state.restore()
        if not bool(row.isfinite().all()):
            continue
        hidden = heard[-1] if heard else None
        found.append(Probe(value, call, row, hidden[0] if hidden is not None and len(hidden) == 1 else None))
    return found


@contextmanager
def _overheard(model: nn.Module) -> Iterator[list[Tensor]]:
    """The last hidden states of the encoder inside `model`, of each forward."""
    heard: list[Tensor] = []

    def hear(module: nn.Module, args: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if isinstance(states, Tensor) and states.ndim == 3:
            heard.append(states)

    try:
        handle = find_hf_model(model).base_model.register_forward_hook(hear)
    except NotImplementedError:  # no encoder, or several: the rows must do
        yield heard
        return
    try:
        yield heard
    finally:
        handle.remove()


def reference_model(model: nn.Module) -> Any:
    """A copy of `model` that runs as sentence-transformers runs it, rows uncut."""
    copy: Any = private_copy(model)
    if getattr(copy, "truncate_dim", None) is not None:
        copy.truncate_dim = None
    return copy
