"""How the forwards of one model run: packed, padded, one input at a time, or by the model's own methods."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memsafe.attention import interface, regrouped
from memsafe.models import collate, fuse, late, products, sbert, segments
from memsafe.models.heads import HEADS
from memsafe.models.m3 import ends_in_heads
from memsafe.models.packed import PackedModel
from memsafe.models.private import ForwardState, length_switch
from memsafe.models.probes import Call, reference_model
from memsafe.models.runtimes.session import RuntimeModel
from memsafe.models.selfcheck import SelfCheck
from memsafe.models.tokenizing import InputEncoder
from memsafe.planning.batch import MicroBatch, TokenizedInput

__all__ = ["Routes", "Solo", "rows_of_features"]

UNCHECKED = SelfCheck(False, False, "not checked yet")


class Solo:
    """A model that runs one input at a time, and finds itself in the same state before each."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._state = ForwardState(model)
        self._lock = threading.Lock()

    def rows(self, forward: Callable[[Any], Any]) -> Any:
        """``forward(model)``, with nobody beside it."""
        with self._lock:
            try:
                return forward(self.model)
            finally:
                self._state.restore()

    def after_fork(self) -> None:
        self._lock = threading.Lock()


class Routes:
    """A private copy of a model (`own`), what runs of it (`run`: the same, unless rows of its kind are made otherwise), and the
    way that it takes (`check`).

    A :class:`memsafe.models.selfcheck.Subject`: the check tries ways by :meth:`use`. limit: tokens beyond which inputs
    run alone, since they change what runs with them, as does an input whose tokens are not known; None without.
    """

    def __init__(self, own: Any, kind: str, encoder: InputEncoder, device: torch.device) -> None:
        self.own = own
        self.run = run = late.variant(own, kind)
        self.kind = kind
        self.encoder = encoder
        self.check = UNCHECKED
        self.device_of_rows = device
        self.hf: Any = sbert.hf_model(run)
        self.tokenizer = sbert.hf_tokenizer(run)
        self.dtype = next((p.dtype for p in run.parameters() if p.is_floating_point()), torch.float32)
        self.max_length = encoder.max_length
        self._packed: PackedModel | None = None
        self._last: tuple[Any, ...] | None = None
        """What :meth:`pack` did last; only while a check runs."""
        self._installed = False
        self.can_mask = False
        self.least_tolerance = self.hf.rounding if isinstance(self.hf, RuntimeModel) else 0.0
        self.refusal = self._refusal()
        self.can_fuse = not self.refusal and fuse.install(self.hf) > 0
        if self.can_fuse:
            fuse.uninstall(self.hf)
        # A late-interaction model's own modules pad a flat row again, to the longest of all.
        self.can_flat = kind != "multi_vector" or ends_in_heads(run)
        self.limit = self._limit()
        self._state = ForwardState(run)
        self._solo: Solo | None = None
        self._solo_lock = threading.Lock()

    @property
    def encoder_module(self) -> Any:
        """The transformers encoder inside; None without."""
        return self.hf.base_model if isinstance(self.hf, nn.Module) and hasattr(self.hf, "base_model") else None

    @property
    def products_bytes(self) -> int:
        """What a matrix product of ours takes beside its result."""
        return products.workspace_bytes(self.hf) if self._installed else 0

    def _refusal(self) -> str:
        """Why packing cannot be tried; "" if it can."""
        if isinstance(self.hf, RuntimeModel):
            return "an export takes padded rows"
        if self.encoder.mode == "opaque" or not isinstance(self.hf, nn.Module):
            return "the model does not run on token ids through transformers"
        installed = interface.install(self.hf)
        self.can_mask = bool(installed)
        if installed:
            interface.uninstall(self.hf)
            return ""
        if regrouped.install(self.hf):
            regrouped.uninstall(self.hf)
            return ""
        return installed.reason

    def _limit(self) -> int | None:
        limit = length_switch(self.run)
        opaque = self.encoder.mode == "opaque"
        if limit is None or (opaque and self.max_length is not None and self.max_length <= limit):
            return None
        return limit

    # which way

    def use(self, check: SelfCheck) -> None:
        """Take the way `check` from now on. Raises NotImplementedError where it does not exist."""
        self.uninstall()
        self._state.restore()
        self.check = check
        self.encoder.use_own(check.own, check.cut)
        if check.packed_ok or check.small_mask_ok:
            self._installed = True
            if not interface.install(self.hf):
                regrouped.install(self.hf)
            if check.in_place_ok:
                fuse.install(self.hf)
            products.install(self.hf)
        if check.packed_ok:
            self._packed = self._pack_with(check.head)

    def uninstall(self) -> None:
        """Leave `run` as a private copy is made."""
        if self._installed:
            products.uninstall(self.hf)
            fuse.uninstall(self.hf)
            interface.uninstall(self.hf)
            regrouped.uninstall(self.hf)
        self._installed, self._packed, self._last = False, None, None

    def _pack_with(self, head: str) -> PackedModel:
        return PackedModel(self.run, head, typed="token_type_ids" in self.encoder.feature_names)

    def after_fork(self) -> None:
        """See :meth:`memsafe.models.model.LoadedModel.after_fork`."""
        self._solo_lock = threading.Lock()
        if self._solo is not None:
            self._solo.after_fork()

    # forwards

    def alone(self, items: Sequence[TokenizedInput]) -> list[int]:
        """Which of `items` must run alone: all, if the check says so; those that change what runs with them; those that
        have no token at all."""
        if self.check.alone:
            return list(range(len(items)))
        return [place for place, item in enumerate(items) if self._apart(item)]

    def _apart(self, item: TokenizedInput) -> bool:
        if item.input_ids is None:
            return self.limit is not None
        return len(item.input_ids) == 0 or (self.limit is not None and item.num_tokens > self.limit)

    def forward(self, batch: MicroBatch, extras: Mapping[str, Any], around: Callable[[Any], Any] | None = None) -> Any:
        """Rows of `batch`, shape (len(batch), dim or labels). around: a context manager for each forward, of its model."""
        if "chunks" in extras:
            return self._chunks(batch, extras, around)
        return late.rows_of_kind(self.kind, self._forward(batch, extras, around), self.own)

    def _forward(self, batch: MicroBatch, extras: Mapping[str, Any], around: Callable[[Any], Any] | None) -> Any:
        apart = self.alone(batch.items)
        if not apart:
            with nullcontext() if around is None else around(self.run):
                return self._together(batch, extras)
        stateless = isinstance(self.hf, RuntimeModel)  # then lanes need not wait for each other
        run = self._run_here if stateless else self._solo_copy().rows
        found = [run(partial(self.one_on, item=batch.items[place], extras=extras, around=around)) for place in apart]
        rest = sorted(set(range(len(batch))) - set(apart))
        if rest:
            others = MicroBatch(tuple(batch.items[place] for place in rest), batch.packed, batch.multiple)
            found.append(self._forward(others, extras, around))
        rows, order = segments.join(found), np.argsort([*apart, *rest])
        return rows if apart == list(range(len(apart))) else segments.pick(rows, order)

    def _run_here(self, forward: Callable[[Any], Any]) -> Any:
        return forward(self.run)

    def _solo_copy(self) -> Solo:
        with self._solo_lock:
            if self._solo is None:
                self._solo = Solo(reference_model(self.own if self.check.own else self.run))
            return self._solo

    def _together(self, batch: MicroBatch, extras: Mapping[str, Any]) -> Any:
        if self._packed is not None and batch.packed and batch.items[0].input_ids is not None:
            return self._packed.forward(*_end_to_end(batch), extras)
        features, uniform = self.features(self.run, batch.items, extras, self.device_of_rows, batch.multiple)
        with interface.padded(uniform=uniform) if self.check.small_mask_ok else nullcontext():
            return rows_of_features(self.run, features, extras.get("options"))

    def _chunks(
        self, batch: MicroBatch, extras: Mapping[str, Any], around: Callable[[Any], Any] | None = None
    ) -> Tensor:
        """The row of one document: the rows of its chunks end to end, shape (1, chunks * dim)."""
        if self._packed is None or not batch.packed or self.alone(batch.items):
            chunks = partial(
                self.chunks_on, item=batch.items[0], extras=extras, device=self.device_of_rows, around=around
            )
            row: Tensor = self._solo_copy().rows(chunks)
            return row
        ids, _, types = _end_to_end(batch)
        rest = {name: value for name, value in extras.items() if name != "chunks"}
        with nullcontext() if around is None else around(self.run):
            return self._packed.chunks(ids, types, extras["chunks"], rest).reshape(1, -1)

    def chunks_on(
        self,
        model: Any,
        item: TokenizedInput,
        extras: Mapping[str, Any],
        device: torch.device,
        around: Callable[[Any], Any] | None = None,
    ) -> Tensor:
        """The same by `model`'s own modules on `device`."""
        rest = {name: value for name, value in extras.items() if name != "chunks"}
        with nullcontext() if around is None else around(model):
            features, _ = self.features(model, [item], rest, device)
            return sbert.forward_chunks(model, features, extras["chunks"], extras.get("options")).reshape(1, -1)

    def one_on(
        self,
        model: Any,
        item: TokenizedInput,
        extras: Mapping[str, Any],
        around: Callable[[Any], Any] | None = None,
        device: torch.device | None = None,
    ) -> Any:
        """The row of `item` by `model`'s own code, shape (1, dim or labels). device: of `model`; None for that of rows."""
        with nullcontext() if around is None else around(model):
            if self.check.own:
                rows = sbert.own_rows(model, [item.raw], prompt=extras["prompt"] or "", options=extras["options"])
                return _of_rank_2(rows)
            features, _ = self.features(model, [item], extras, device or self.device_of_rows)
            return rows_of_features(model, features, extras.get("options"))

    def features(
        self,
        model: Any,
        items: Sequence[TokenizedInput],
        extras: Mapping[str, Any],
        device: torch.device,
        multiple: int = 1,
    ) -> tuple[dict[str, Any], bool]:
        """Features of padded rows on `device`, and whether all rows have the same length."""
        if items[0].input_ids is None:
            features = self.encoder.preprocess(model, [item.raw for item in items], extras)
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}, False
        longest = max(item.num_tokens for item in items)  # an input without tokens is one of padding
        width = -(-longest // multiple) * multiple
        typed = "token_type_ids" in self.encoder.feature_names
        tensors = collate.padded(
            [item.input_ids for item in items],  # type: ignore[misc]
            [item.token_type_ids for item in items] if typed else None,
            width,
            device,
            pad_id=self.encoder.pad_id,
            pad_type_id=self.encoder.pad_type_id,
            left=self.encoder.pad_left,
        )
        return {**extras, **tensors}, min(item.num_tokens for item in items) == width

    # what the check runs

    def batch_of(self, values: Sequence[Any], call: Call) -> tuple[MicroBatch, dict[str, Any]]:
        """`values` as the micro-batch of a call, longest first, each with its place in `values` as index; and its extras."""
        prompt = sbert.resolve_prompt(self.run, call.prompt, call.prompt_name, call.kind)
        options = sbert.with_task(self.run, call.kind, call.options, self.encoder.accepts)
        way = self.encoder.model_way(prompt, options)
        items = [
            TokenizedInput(place, one.input_ids, one.token_type_ids, num_tokens=max(one.num_tokens, 1), raw=one.raw)
            for place, one in enumerate(way.encode(values) if values else [])
        ]
        items.sort(key=lambda item: item.num_tokens, reverse=True)
        return MicroBatch(tuple(items), self.check.packed_ok), way.extras

    @torch.inference_mode()
    def rows_of(self, values: Sequence[Any], call: Call) -> Any:
        """Rows of `values`, in their order, as one micro-batch of a call makes them."""
        batch, extras = self.batch_of(values, call)
        return segments.pick(self.forward(batch, extras), _places(batch))

    def ends_in_padding(self, values: Sequence[Any], call: Call) -> list[bool]:
        """Which of `values` end in a padding token written in them."""
        batch, _ = self.batch_of(values, call)
        packed = self._pack_with(HEADS[0])
        return [packed.ends_in_padding(batch.items[place].input_ids) for place in _places(batch)]

    def company(self, values: Sequence[Any], call: Call) -> list[bool]:
        """Which of `values` may run with others."""
        batch, _ = self.batch_of(values, call)
        apart = {batch.items[place].index for place in self.alone(batch.items)}
        return [place not in apart for place in range(len(values))]

    @torch.inference_mode()
    def pack(self, values: Sequence[Any], call: Call) -> list[Tensor]:
        """Pack `values` through the encoder: its last hidden states of each, shape (tokens, hidden size)."""
        if self._packed is None:
            raise NotImplementedError("nothing is packed")
        batch, extras = self.batch_of(values, call)
        row = self._packed.pack(*_end_to_end(batch))
        output = self._packed.hidden_states(row)
        self._last = batch, extras, row, output
        hidden = output.last_hidden_state[0].split(batch.lengths)
        return [hidden[place] for place in _places(batch)]

    @torch.inference_mode()
    def rows_by(self, head: str) -> Any:
        """Rows of the values packed last, in their order, through `head`."""
        if self._last is None:
            raise NotImplementedError("nothing was packed")
        batch, extras, row, output = self._last
        rows = self._pack_with(head).rows(output, row, extras, strict=True)
        return segments.pick(late.rows_of_kind(self.kind, rows, self.own), _places(batch))


def _places(batch: MicroBatch) -> list[int]:
    """Where in `batch` the items of index 0, 1, ... lie."""
    return sorted(range(len(batch)), key=[item.index for item in batch.items].__getitem__)


def _end_to_end(batch: MicroBatch) -> tuple[Any, list[int], Any]:
    """(ids, lengths, token types or None) of a packed micro-batch, on the host."""
    ids = np.concatenate([item.input_ids for item in batch.items])
    if all(item.token_type_ids is None for item in batch.items):
        return ids, batch.lengths, None
    types = [
        np.zeros(item.num_tokens, np.int32) if item.token_type_ids is None else item.token_type_ids
        for item in batch.items
    ]
    return ids, batch.lengths, np.concatenate(types)


def rows_of_features(model: Any, features: Mapping[str, Any], options: Mapping[str, Any] | None) -> Any:
    """Rows of a padded forward of a whole model, dense ones of rank 2. options: of the call, for the modules' forwards."""
    return _of_rank_2(sbert.forward(model, features, options))


def _of_rank_2(rows: Any) -> Any:
    return rows[:, None] if isinstance(rows, Tensor) and rows.ndim == 1 else rows
