"""Packed forwards through sentence-transformers' own modules, unchanged.

The innermost encoder runs once over all sequences laid end to end. Then everything around it (pooling, dense layers,
classification heads, scores) runs per run of equal lengths on rows without padding: on a shallow copy of the model in
which a stub answers in the encoder's place with hidden states that are already there. So no module's arithmetic is
written a second time, and any version's modules do.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsafe.attention import interface

__all__ = ["HEADS", "PackedModel", "final_rows", "find_hf_model"]

HEADS = ("groups", "first", "last", "flat")
"""How the modules behind the encoder see a packed row.

groups: once per run of equal lengths, as rows without padding; right for everything.
first, last: once, every sequence being its first or last token alone; for heads that look at no other.
flat: once, on the row as it is; for pooling that knows where sequences start.
"""


def find_hf_model(model: nn.Module) -> PreTrainedModel:
    """The one transformers model inside a SentenceTransformer or CrossEncoder, with its head if it has one.

    Raises NotImplementedError if there is none, or more than one that none of the others holds.
    """
    found: list[PreTrainedModel] = []

    def visit(module: nn.Module) -> None:
        if isinstance(module, PreTrainedModel):
            if all(module is not other for other in found):
                found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    if len(found) != 1:
        raise NotImplementedError(f"{len(found)} transformers models inside, not one")
    return found[0]


def final_rows(output: Any) -> Tensor:
    """The rows that a forward of the whole model ends in: embeddings, or scores of shape (rows, labels)."""
    if isinstance(output, Mapping) and "sentence_embedding" in output:
        rows = output["sentence_embedding"]
    elif isinstance(output, Mapping) and "scores" in output:
        rows = output["scores"]
    else:
        rows = getattr(output, "logits", None)
    if not isinstance(rows, Tensor):
        raise NotImplementedError("the model ends neither in sentence embeddings nor in scores")
    return rows[:, None] if rows.ndim == 1 else rows


class PackedModel:
    """Runs a SentenceTransformer or CrossEncoder on packed sequences; threads may share it.

    It holds no state of a forward.

    hf_model: the transformers model with its head; `interface.install` must have been called on it.
    encoder: the part of it that turns tokens into hidden states.
    head: how what stands behind the encoder is run; one of :data:`HEADS`, all but the first only after a self-check.
    """

    def __init__(self, model: nn.Module, head: str = "groups") -> None:
        if head not in HEADS:
            raise ValueError(f"head: got {head!r}; choose from {HEADS}")
        self.head = head
        self.model = model
        self.hf_model = find_hf_model(model)
        self.encoder: PreTrainedModel = self.hf_model.base_model
        path = next((name for name, module in model.named_modules() if module is self.encoder), None)
        if not path:
            raise NotImplementedError("the encoder cannot be found inside the model")
        self._path = tuple(path.split("."))
        self._check_path()
        self._takes = frozenset(inspect.signature(self.encoder.forward).parameters)
        if "position_ids" not in self._takes:
            raise NotImplementedError("the encoder takes no position_ids")
        self._position_offset = interface.position_offset(self.encoder)
        tables = (getattr(module, "token_type_embeddings", None) for module in self.encoder.modules())
        self._has_token_types = any(isinstance(table, nn.Embedding) for table in tables)
        # sentence-transformers up to 5.3 hands the transformers model's own keyword arguments to a CrossEncoder.
        self._features_as_dict = not (
            hasattr(model, "predict")
            and isinstance(getattr(model, "model", None), PreTrainedModel)
            and not isinstance(model, nn.Sequential)
        )

    def _check_path(self) -> None:
        """Raise NotImplementedError where a module's forward was replaced on the instance: a copy would not use it."""
        module: nn.Module = self.model
        for name in (None, *self._path):
            module = module if name is None else getattr(module, name)
            if "forward" in vars(module):
                raise NotImplementedError("a module's forward was replaced (by accelerate, or by hand)")
            if vars(module).get("_compiled_call_impl") is not None:
                raise NotImplementedError("the model is compiled")

    def position_ids(self, lengths: Sequence[int], device: torch.device) -> Tensor:
        """int64, shape (1, tokens): see :func:`interface.position_ids`."""
        return interface.positions(self._position_offset, lengths, device)

    def hidden_states(self, input_ids: Tensor, lengths: Sequence[int], token_type_ids: Tensor | None = None) -> Any:
        """Run the encoder alone. input_ids, token_type_ids: int64, shape (tokens,). Returns its output for one row."""
        row = input_ids[None]
        options: dict[str, Any] = {"position_ids": self.position_ids(lengths, row.device)}
        # Of ones, rather than None, so that no model looks for sequence borders in the positions itself.
        options["attention_mask"] = torch.ones_like(row)
        if "token_type_ids" in self._takes and (token_type_ids is not None or self._has_token_types):
            # Zeros, rather than None, since some buffers of zeros end at the model's longest sequence.
            options["token_type_ids"] = torch.zeros_like(row) if token_type_ids is None else token_type_ids[None]
        if "use_cache" in self._takes:
            options["use_cache"] = False  # a cache of keys and values would only hold memory
        with interface.packed(lengths, row.device):
            return self.encoder(input_ids=row, return_dict=True, **options)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        token_type_ids: Tensor | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Rows of the whole model, shape (sequences, dim or labels), in packed order, in the model's dtype.

        input_ids, token_type_ids: int64, shape (tokens,), on the model's device: the sequences end to end, equal
        `lengths` adjacent. features: what else preprocessing gave (modality, prompt_length), the same for all.
        """
        return self.rows(
            self.hidden_states(input_ids, lengths, token_type_ids), input_ids, lengths, token_type_ids, features
        )

    @torch.inference_mode()
    def rows(
        self,
        output: Any,
        input_ids: Tensor,
        lengths: Sequence[int],
        token_type_ids: Tensor | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The second half of :meth:`forward`: everything behind the encoder, whose `output` for one row is given."""
        head = self.head
        one_length = lengths[0] == lengths[-1] and len(set(lengths)) == 1
        if one_length or "prompt_length" in (features or {}) or getattr(output, "hidden_states", None) is not None:
            head = "groups"  # nothing to gain, or more to look at than single tokens
        outer, stub = self._outer()
        if head == "flat":
            return self._flat_rows(outer, stub, output, input_ids, lengths, features)
        if head != "groups":
            ends = torch.tensor([0, *accumulate(lengths)])
            tokens = (ends[:-1] if head == "first" else ends[1:] - 1).to(input_ids.device)
            output = type(output)(last_hidden_state=output.last_hidden_state[:, tokens])
            input_ids = input_ids[tokens]
            token_type_ids = None if token_type_ids is None else token_type_ids[tokens]
            lengths = [1] * len(lengths)
        rows, start = [], 0
        for length, run in groupby(lengths):
            count = sum(1 for _ in run)
            stop = start + count * length
            stub.answer = _slice(output, self.encoder, start, stop, count)
            inputs = {**(features or {}), "input_ids": input_ids[start:stop].view(count, length)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if token_type_ids is not None:
                inputs["token_type_ids"] = token_type_ids[start:stop].view(count, length)
            rows.append(self._run(outer, inputs))
            start = stop
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _flat_rows(
        self,
        outer: nn.Module,
        stub: _Stub,
        output: Any,
        input_ids: Tensor,
        lengths: Sequence[int],
        features: Mapping[str, Any] | None,
    ) -> Tensor:
        """Rows by sentence-transformers' own pooling of a flat row, which it has for flash attention since 5.4."""
        stub.answer = output
        counts = torch.tensor(lengths)
        inputs = {**(features or {}), "input_ids": input_ids[None], "attention_mask": torch.ones_like(input_ids[None])}
        inputs["cu_seq_lens_q"] = torch.tensor([0, *accumulate(lengths)]).to(input_ids.device)
        inputs["seq_idx"] = torch.repeat_interleave(torch.arange(len(lengths)), counts)[None].to(input_ids.device)
        return self._run(outer, inputs)

    @torch.inference_mode()
    def plain(self, features: Mapping[str, Any]) -> Tensor:
        """Rows of the model itself for ordinary padded `features`: what a packed forward must be equal to."""
        return self._run(self.model, dict(features))

    @torch.inference_mode()
    def plain_with_hidden_states(self, features: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The same rows, and the encoder's last hidden states, overheard where the stub would stand."""
        outer, stub = self._outer()
        rows = self._run(outer, dict(features))
        return rows, stub.answer.last_hidden_state

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return final_rows(model(inputs) if self._features_as_dict else model(**inputs))

    def _outer(self) -> tuple[nn.Module, _Stub]:
        """A copy of the modules from the model down to the encoder, sharing everything else, and the stub inside."""
        stub = _Stub(self.encoder)
        outer = _shallow(self.model)
        module, original = outer, self.model
        for name in self._path[:-1]:
            original = getattr(original, name)
            module._modules[name] = _shallow(original)
            module = module._modules[name]  # type: ignore[assignment]
        module._modules[self._path[-1]] = stub
        return outer, stub


class _Stub(nn.Module):
    """Stands where the encoder stood and returns `answer`; for everything else it is the encoder.

    Without an answer it asks the encoder, and keeps what that said.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.answer: Any = None
        self.training = False
        self.__dict__["_encoder"] = encoder  # not a child: nothing that walks the modules shall meet it twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_encoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.answer is None:
            self.answer = self.__dict__["_encoder"](*args, **kwargs)
        return self.answer


def _shallow(module: nn.Module) -> nn.Module:
    """The same module with children of its own; parameters, buffers, hooks and settings are shared."""
    clone: nn.Module = type(module).__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = dict(module._modules)
    return clone


def _slice(output: Any, encoder: nn.Module, start: int, stop: int, count: int) -> Any:
    """The output that the encoder would have given for tokens start to stop as `count` rows; of the same class."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor[0, start:stop].view(count, -1, tensor.shape[-1])

    given: dict[str, Any] = {"last_hidden_state": rows(output.last_hidden_state)}
    names = {item.name for item in dataclasses.fields(output)}
    pooler = getattr(encoder, "pooler", None)
    if pooler is not None and "pooler_output" in names:
        given["pooler_output"] = pooler(given["last_hidden_state"])
    if "hidden_states" in names and output.hidden_states is not None:
        given["hidden_states"] = tuple(rows(layer) for layer in output.hidden_states)
    return type(output)(**given)
