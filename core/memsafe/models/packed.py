"""Packed forwards through sentence-transformers' own modules, unchanged.

The innermost encoder runs once over all sequences laid end to end. Then everything around it (pooling, dense layers,
classification heads, scores) runs per run of equal lengths on rows without padding: on a shallow copy of the model in
which a stub answers in the encoder's place with hidden states that are already there. So no module's arithmetic is
written a second time, and any version's modules do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsafe.attention import interface, regrouped
from memsafe.attention.transfer import send
from memsafe.models import heads
from memsafe.models.collate import PackedRow
from memsafe.models.heads import HEADS
from memsafe.models.segments import Segmented, Several

__all__ = ["PackedModel", "final_rows", "find_hf_model"]


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


def final_rows(output: Any) -> Any:
    """The rows that a forward of the whole model ends in: embeddings, or scores of shape (rows, labels); see
    :mod:`memsafe.models.segments` for what is not dense."""
    if isinstance(output, Mapping) and "sentence_embedding" in output:
        rows = output["sentence_embedding"]
    elif isinstance(output, Mapping) and "scores" in output:
        rows = output["scores"]
    else:
        rows = getattr(output, "logits", None)
    if isinstance(rows, (Segmented, Several)):
        return rows
    if not isinstance(rows, Tensor):
        raise NotImplementedError("the model ends neither in sentence embeddings nor in scores")
    return rows[:, None] if rows.ndim == 1 else rows


class PackedModel:
    """Runs a SentenceTransformer or CrossEncoder on packed sequences; threads may share it.

    It holds no state of a forward.

    hf_model: the transformers model with its head; `interface.install` or `regrouped.install` was called on it.
    encoder: the part of it that turns tokens into hidden states.
    head: how what stands behind the encoder is run; one of :data:`heads.HEADS`, all but the first only after a self-check.
    typed: whether the encoder is given token types, be they zeros: GPT-2 and its kin, which have no table of their own for them,
    add them from that of tokens.
    """

    def __init__(self, model: nn.Module, head: str = "groups", typed: bool = False) -> None:
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
        self._regrouped = regrouped.is_installed(self.encoder)
        self._padding_position = interface.padding_position(self.encoder)
        config = self.hf_model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._pad_id = getattr(text, "pad_token_id", None)
        tables = (getattr(module, "token_type_embeddings", None) for module in self.encoder.modules())
        self._has_token_types = typed or any(isinstance(table, nn.Embedding) for table in tables)
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

    def ends_in_padding(self, ids: Any) -> bool:
        """Whether a sequence of these ids ends in what its classifier takes for padding."""
        return len(ids) > 0 and self._pad_id is not None and int(ids[-1]) == self._pad_id

    def pack(self, ids: Any, lengths: Sequence[int], types: Any = None) -> PackedRow:
        """The sequences on the model's device. ids, types: integers of shape (tokens,) on the host: the sequences end to
        end, equal `lengths` adjacent; types: None for zeros."""
        device = next(self.encoder.parameters()).device
        types = None if types is None else np.asarray(types)
        return PackedRow.of(np.asarray(ids), lengths, types, device, self._padding_position)

    def hidden_states(self, row: PackedRow) -> Any:
        """Run the encoder alone. Returns its output for one row of `row`'s tokens."""
        ids = row.input_ids[None]
        options: dict[str, Any] = {"position_ids": row.position_ids[None]}
        # Of ones, rather than None, so that no model looks for sequence borders in the positions itself.
        options["attention_mask"] = torch.ones_like(ids)
        if self._regrouped:  # of four dimensions, which nobody widens to pairs of the whole row
            options["attention_mask"] = options["attention_mask"][:, None, None]
        if "token_type_ids" in self._takes and (row.token_type_ids is not None or self._has_token_types):
            # Zeros, rather than None, since some buffers of zeros end at the model's longest sequence.
            options["token_type_ids"] = (
                torch.zeros_like(ids) if row.token_type_ids is None else row.token_type_ids[None]
            )
        if "use_cache" in self._takes:
            options["use_cache"] = False  # a cache of keys and values would only hold memory
        with interface.packed(row.lengths, ids.device):
            return self.encoder(input_ids=ids, return_dict=True, **options)

    @torch.inference_mode()
    def forward(
        self,
        ids: Any,
        lengths: Sequence[int],
        types: Any = None,
        features: Mapping[str, Any] | None = None,
    ) -> Any:
        """Rows of the whole model, shape (sequences, dim or labels), in packed order, in the model's dtype.

        ids, types: see :meth:`pack`. features: what else preprocessing gave (modality, prompt_length), the same for all.
        """
        row = self.pack(ids, lengths, types)
        return self.rows(self.hidden_states(row), row, features)

    @torch.inference_mode()
    def chunks(
        self,
        ids: Any,
        types: Any,
        chunks: Sequence[tuple[int, int]],
        features: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Rows of `chunks`, (first token, behind the last), of one text, which the encoder sees as a whole: (chunks, dim)."""
        output = self.hidden_states(self.pack(ids, [len(ids)], types))
        tokens = np.concatenate([np.arange(start, stop) for start, stop in chunks])
        part = self.pack(
            ids[tokens], [stop - start for start, stop in chunks], None if types is None else types[tokens]
        )
        states = output.last_hidden_state[:, send(tokens, part.device, torch.int64)]
        rows: Tensor = self.rows(type(output)(last_hidden_state=states), part, features)
        return rows

    @torch.inference_mode()
    def rows(
        self, output: Any, row: PackedRow, features: Mapping[str, Any] | None = None, *, strict: bool = False
    ) -> Any:
        """The second half of :meth:`forward`: everything behind the encoder, whose `output` for one row is given.
        strict: see :func:`heads.rows`."""
        outer, stub = self._outer()

        def run(inputs: dict[str, Any]) -> Any:
            return self._run(outer, inputs)

        return heads.rows(self.head, run, stub, output, row, features or {}, self._pad_id, strict=strict)

    @torch.inference_mode()
    def plain(self, features: Mapping[str, Any]) -> Any:
        """Rows of the model itself for ordinary padded `features`: what a packed forward must be equal to."""
        return self._run(self.model, dict(features))

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        return final_rows(model(inputs) if self._features_as_dict else model(**inputs))

    def _outer(self) -> tuple[nn.Module, heads.Stub]:
        """A copy of the modules from the model down to the encoder, sharing everything else, and the stub inside."""
        stub = heads.Stub(self.encoder)
        outer = heads.shallow(self.model)
        module, original = outer, self.model
        for name in self._path[:-1]:
            original = getattr(original, name)
            module._modules[name] = heads.shallow(original)
            module = module._modules[name]  # type: ignore[assignment]
        module._modules[self._path[-1]] = stub
        return outer, stub
