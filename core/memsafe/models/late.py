"""Sparse rows without a matrix of tokens times vocabulary: it is made tile by tile, and only its maxima stay.

A SPLADE model scores every word of its vocabulary at every token, and keeps the largest score of each word: 8.2 GB of scores
for one text of 8,192 tokens and a vocabulary of 250,002, for a row of some hundred numbers. Here the last matrix of the
model is taken out of its head, which then ends in hidden states, and the pooling behind it multiplies, activates and
reduces tile by tile. All other modules are the model's own, and the self-check compares with the model as it was.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsafe.models import products, segments
from memsafe.models.m3 import ends_in_heads
from memsafe.models.private import private_copy
from memsafe.models.segments import Segmented

__all__ = ["Tiles", "rows_of_kind", "tiles", "variant"]

TILE_BYTES = 16 << 20
"""Scores of one tile on a CPU, at most: larger tiles were not faster."""
ACCELERATOR_TILE_BYTES = 256 << 20
_WORDS = 8192
"""Words of one tile, at most."""
_LEAST_WORDS = 2048
_WIDTHS = 6
"""Words of one tile on a CPU for each of the encoder's hidden sizes. At its own peak the encoder holds 8 to 11 hidden sizes per token,
behind it two are left: so what a tile takes was there already, and sparse rows need hardly more memory than dense ones.
Smaller tiles were as fast there; more of them would be more launches elsewhere, which nobody has measured."""


class Tiles:
    """How large a tile of scores is. tokens, words: at most; size: bytes of an element; config: of the transformers model."""

    def __init__(self, vocabulary: int, width: int, size: int, kind: str, config: Any) -> None:
        """width: the encoder's hidden size. kind: of device."""
        self.size = size
        self.config = config
        most = max(_WIDTHS * width, _LEAST_WORDS) if kind == "cpu" else _WORDS
        self.words = min(_WORDS, most, vocabulary)
        whole = TILE_BYTES if kind == "cpu" else ACCELERATOR_TILE_BYTES
        self.tokens = max(whole // (self.words * size), 64)


def variant(model: Any, kind: str) -> Any:
    """What runs of `model`, which is private: itself, unless models of its kind end in something else than dense rows."""
    if ends_in_heads(model):
        return model
    if kind == "sparse":
        tiled = _sparse(model)
        return model if tiled is None else tiled
    if kind == "reranker":
        return _two_words(model)
    if kind == "multi_vector":
        clone = private_copy(model)
        clone.add_module("rows", _Ragged())
        return clone
    return model


def _two_words(model: Any) -> Any:
    """`model`, or if it scores with the logits of one or two words of a decoder's vocabulary (LogitScore), a private copy that
    computes no others: of each pair there would be as many numbers as words."""
    if [type(module).__name__ for module in list(model._modules.values())[1:]] != ["LogitScore"]:
        return model
    clone = private_copy(model)
    transformer, score = cast(Any, clone)._modules.values()
    found = _without_projection(transformer)
    if found is None:
        return model
    holder, name, projection = found
    words = [word for word in (score.true_token_id, score.false_token_id) if word is not None]
    holder._modules[name] = few = nn.Linear(projection.in_features, len(words), bias=projection.bias is not None)
    few.weight = nn.Parameter(projection.weight.detach()[words], requires_grad=False)
    if projection.bias is not None:
        few.bias = nn.Parameter(projection.bias.detach()[words], requires_grad=False)
    few.training = False
    vars(score).update(true_token_id=0, false_token_id=None if score.false_token_id is None else 1)
    return clone


def rows_of_kind(kind: str, rows: Any, model: Any) -> Any:
    """`rows` of a forward as those of `kind` leave it: sparse ones without zeros, and with as many numbers as `model` keeps."""
    if kind != "sparse":
        return rows
    rows = segments.sparse(rows) if isinstance(rows, Tensor) else rows
    return segments.select(rows, getattr(model, "max_active_dims", None))


def _sparse(model: nn.Module) -> nn.Module | None:
    """A private copy of `model` that makes its sparse rows tile by tile; None if nothing in it could."""
    clone = private_copy(model)
    found = 0
    for holder in list(clone.modules()):
        names = list(holder._modules)
        for name, following in zip_longest(names, names[1:]):
            module: Any = holder._modules[name]
            pooling = None if following is None else holder._modules[following]
            if type(module).__name__ == "SparseStaticEmbedding":
                _static(module)
                found += 1
            elif type(module).__name__ == "SparseAutoEncoder" and getattr(clone, "max_active_dims", None) is not None:
                vars(module)["k"] = clone.max_active_dims  # as encode tells it, with every call
                found += 1
            elif type(pooling).__name__ == "SpladePooling" and following is not None:
                late = _late(module, pooling)
                if late is not None:
                    holder._modules[following] = late
                    found += 1
    return clone if found else None


def tiles(model: nn.Module, kind: str) -> Tiles | None:
    """The tiles of `model`, as :func:`variant` made it; None if it has none."""
    late = next((module for module in model.modules() if isinstance(module, _LateSplade)), None)
    return None if late is None else late.tiles(kind)


def _late(transformer: Any, pooling: Any) -> _LateSplade | None:
    """The pooling that takes over the last matrix of `transformer`'s masked language model."""
    found = _without_projection(transformer)
    if found is None:
        return None
    return _LateSplade(found[2], pooling, (getattr(transformer, "model", None) or transformer.auto_model).config)


def _without_projection(transformer: Any) -> tuple[nn.Module, str, nn.Linear] | None:
    """Take the projection onto the vocabulary out of the language model in `transformer`, which then gives hidden states;
    returns where it was, and it. None where there is none that is known."""
    model = getattr(transformer, "model", None) or getattr(transformer, "auto_model", None)
    if not isinstance(model, PreTrainedModel):
        return None
    projection = model.get_output_embeddings()
    if type(projection) is not nn.Linear or projection._forward_hooks or projection._forward_pre_hooks:
        return None
    for holder in model.modules():
        for name, module in holder._modules.items():
            if module is projection:
                holder._modules[name] = nn.Identity()
                return holder, name, projection
    return None


class _LateSplade(nn.Module):
    """SpladePooling behind the projection onto the vocabulary, both at once."""

    def __init__(self, projection: nn.Linear, pooling: Any, config: Any) -> None:
        super().__init__()
        self.config = config
        self.projection = projection
        self.sums = pooling.pooling_strategy == "sum"
        self.logs = 2 if pooling.activation_function == "log1p_relu" else 1
        self.training = False

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states = features["token_embeddings"]
        if "cu_seq_lens_q" in features:
            states, lengths = states[0], features["cu_seq_lens_q"].diff().tolist()
        else:
            mask = features["attention_mask"].bool()
            lengths = mask.sum(dim=1).tolist()
            same = len(set(lengths)) == 1 and lengths[0] == states.shape[1]
            states = states.reshape(-1, states.shape[-1]) if same else states[mask]
        features["sentence_embedding"] = self._rows(states, lengths)
        return features

    def tiles(self, kind: str) -> Tiles:
        """On a device of that `kind`."""
        weight = self.projection.weight
        vocabulary, width = weight.shape
        return Tiles(vocabulary, width, weight.element_size(), kind, self.config)

    def _rows(self, states: Tensor, lengths: list[int]) -> Segmented:
        """states: shape (tokens, hidden size), sequences of `lengths` end to end."""
        sizes = self.tiles(states.device.type)
        found, start, place = [], 0, 0
        while place < len(lengths):
            stop, end = place + 1, start + lengths[place]
            while stop < len(lengths) and end - start + lengths[stop] <= sizes.tokens:
                end += lengths[stop]
                stop += 1
            found.append(self._block(states[start:end], lengths[place:stop], sizes))
            start, place = end, stop
        if not found:
            empty = states.new_zeros(0)
            return Segmented(empty.long(), empty, empty.int(), self.projection.weight.shape[0])
        joined: Segmented = segments.join(found)
        return joined

    def _block(self, states: Tensor, lengths: list[int], sizes: Tiles) -> Segmented:
        """Rows of sequences that make one tile together, or of one sequence of several tiles."""
        vocabulary = self.projection.weight.shape[0]
        slices = []
        for first in range(0, vocabulary, sizes.words):
            rows = self._slice(states, lengths, sizes.tokens, slice(first, first + sizes.words))
            kept = rows != 0
            columns = kept.nonzero()[:, 1].to(torch.int32)
            slices.append((kept.sum(dim=1), columns.add_(first), rows[kept]))
        counts = torch.stack([each for each, _, _ in slices]).sum(dim=0)
        columns = torch.empty(int(counts.sum()), dtype=torch.int32, device=states.device)
        values = states.new_empty(len(columns))
        places = counts.cumsum(0) - counts  # where each row's next number goes
        while slices:
            some, found, numbers = slices.pop(0)
            into = torch.repeat_interleave(places - (some.cumsum(0) - some), some)
            into += torch.arange(len(into), device=into.device)
            columns[into], values[into] = found, numbers
            places = places + some
        return Segmented(counts, values, columns, vocabulary)

    def _slice(self, states: Tensor, lengths: list[int], most: int, words: slice) -> Tensor:
        """Numbers of some `words`, shape (sequences, words)."""
        weight = self.projection.weight[words]
        bias = None if self.projection.bias is None else self.projection.bias[words]
        if len(states) <= most:
            return self._reduced(products.linear(states, weight, bias), lengths)
        rows: Tensor = weight.new_full((1, weight.shape[0]), 0 if self.sums else -torch.inf)
        for part in torch.split(states, most):  # one sequence of several tiles
            # No name holds a tile: the next one is made while it would.
            if self.sums:
                rows += self._active(products.linear(part, weight, bias)).sum(dim=0, keepdim=True)
            else:
                rows = torch.maximum(rows, products.linear(part, weight, bias).amax(dim=0, keepdim=True))
        return rows if self.sums else self._active(rows)

    def _reduced(self, scores: Tensor, lengths: list[int]) -> Tensor:
        """Of each sequence's scores, shape (tokens, words), one row. What is activated rises with the score, so that the
        largest score gives the largest number."""
        if self.sums:
            scores = self._active(scores)
        rows = scores.new_zeros(len(lengths), scores.shape[1])
        start = place = 0
        while place < len(lengths):
            length, stop = lengths[place], place + 1
            while stop < len(lengths) and lengths[stop] == length:
                stop += 1
            end = start + length * (stop - place)
            if length:
                some = scores[start:end].view(stop - place, length, -1)
                rows[place:stop] = some.sum(dim=1) if self.sums else some.amax(dim=1)
            start, place = end, stop
        return rows if self.sums else self._active(rows)

    def _active(self, scores: Tensor) -> Tensor:
        scores = scores.relu_()
        for _ in range(self.logs):
            scores = scores.log1p_()
        return scores


class _Ragged(nn.Module):
    """Behind the last module of a late-interaction model: the vectors of the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states, mask = features["token_embeddings"], features["attention_mask"].bool()
        features["sentence_embedding"] = Segmented(mask.sum(dim=1), states[mask], None, states.shape[-1])
        return features


def _static(module: nn.Module) -> None:
    """Let `module`, a SparseStaticEmbedding, give sparse rows: it made integers of texts times vocabulary."""
    kind = type(module)

    def forward(self: Any, features: dict[str, Any]) -> dict[str, Any]:
        if features.get("sentence_embedding") is not None:
            known: dict[str, Any] = kind.forward(self, features)
            return known
        ids, mask = features["input_ids"], features["attention_mask"].bool()
        width = int(self.weight.shape[0])
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        found = torch.unique(rows[mask] * width + ids[mask])  # sorted
        numbers = self.weight[found % width]
        found, numbers = found[numbers != 0], numbers[numbers != 0]
        counts = torch.bincount(found // width, minlength=len(ids))
        features["sentence_embedding"] = Segmented(counts, numbers, (found % width).to(torch.int32), width)
        return features

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
