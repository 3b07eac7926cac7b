"""The three heads of BGE-M3 and its kin: a dense row, weights of words, and a vector for every token, of one pass.

Such a folder has the encoder's own files, and beside them ``sparse_linear.pt`` and ``colbert_linear.pt``. The numbers are
those of FlagEmbedding's ``BGEM3FlagModel.encode``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memsafe.errors import ModelError
from memsafe.models.segments import DeviceRows, Segmented, Several

__all__ = ["FILES", "KINDS", "Heads", "assemble", "ends_in_heads", "find", "has_heads"]

FILES = {"sparse": "sparse_linear.pt", "multi_vector": "colbert_linear.pt"}
"""By output, the file with its one matrix."""
KINDS = ("sparse", "multi_vector", "hybrid")
"""Kinds of models that such a folder can serve; an embedding model it is to sentence-transformers already."""


class Heads(nn.Module):
    """Behind the encoder of a SentenceTransformer. outputs: of "dense", "sparse", "multi_vector"; several give :class:`Several`.

    linears: by output, the matrix of its file. width: of the encoder. special: ids of tokens that are no words.
    """

    def __init__(
        self,
        outputs: Sequence[str],
        linears: Mapping[str, nn.Linear],
        special: Sequence[int],
        vocabulary: int,
        width: int,
    ) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self.linears = nn.ModuleDict(linears)
        self.special = tuple(special)
        self.vocabulary = vocabulary
        self.width = width

    def get_embedding_dimension(self) -> int:
        """Columns of a sparse row, or numbers of a vector."""
        if self.outputs == ("sparse",):
            return self.vocabulary
        return self.width

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states, ids = features["token_embeddings"], features["input_ids"]
        if "cu_seq_lens_q" in features:
            states, ids, lengths = states[0], ids[0], features["cu_seq_lens_q"].diff()
        else:
            mask = features["attention_mask"].bool()
            states, ids, lengths = states[mask], ids[mask], mask.sum(dim=1)
        make = {"dense": self._dense, "sparse": self._sparse, "multi_vector": self._vectors}
        found = {name: make[name](states, ids, lengths) for name in self.outputs}
        features["sentence_embedding"] = Several(found) if len(found) > 1 else next(iter(found.values()))
        return features

    def _dense(self, states: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """The first token of each sequence, of length 1."""
        return nn.functional.normalize(states[lengths.cumsum(0) - lengths], dim=-1)

    def _sparse(self, states: Tensor, ids: Tensor, lengths: Tensor) -> DeviceRows:
        """The largest weight of each token among those of equal id."""
        weights = self.linears["sparse"](states)[:, 0].relu()
        special = torch.tensor(self.special, device=ids.device, dtype=ids.dtype)
        kept = (weights > 0) & ~torch.isin(ids, special) | weights.isnan()
        row_of = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
        words, place = torch.unique(row_of[kept] * self.vocabulary + ids[kept], return_inverse=True)  # sorted
        values = weights.new_zeros(len(words)).scatter_reduce_(0, place, weights[kept], "amax")
        counts = torch.bincount(words // self.vocabulary, minlength=len(lengths))
        return Segmented(counts, values, (words % self.vocabulary).to(torch.int32), self.vocabulary)

    def _vectors(self, states: Tensor, ids: Tensor, lengths: Tensor) -> DeviceRows:
        """Of every token but the first, of length 1."""
        kept = torch.ones(len(states), dtype=torch.bool, device=states.device)
        kept[lengths.cumsum(0) - lengths] = False
        vectors = nn.functional.normalize(self.linears["multi_vector"](states[kept]), dim=-1)
        return Segmented(lengths - 1, vectors, None, vectors.shape[1])


def ends_in_heads(model: Any) -> bool:
    """Whether `model` is one that :func:`assemble` made."""
    return isinstance(model, nn.Module) and isinstance(next(reversed(model._modules.values()), None), Heads)


def has_heads(folder: Path) -> bool:
    """Whether `folder` is of a model with these heads."""
    return all((folder / name).is_file() for name in FILES.values())


def find(model: str, options: Mapping[str, Any]) -> dict[str, str] | None:
    """The files of the heads of `model`, a folder or a hub id, fetched if need be; None if it has none."""
    load = importlib.import_module("sentence_transformers.util").load_file_path
    names = ("token", "cache_folder", "revision", "local_files_only")
    given = {name: options[name] for name in names if options.get(name) is not None}
    found: dict[str, str] = {}
    for output, name in FILES.items():
        path = load(model, name, **given)
        if path is None:
            return None
        found[output] = path
    return found


def assemble(st: Any, files: Mapping[str, str], outputs: Sequence[str], device: str) -> Any:
    """A SentenceTransformer of the encoder of `st` and the heads for `outputs`.

    Raises :class:`ModelError` for files that do not fit the encoder.
    """
    transformer = next(iter(st.children()))
    encoder = getattr(transformer, "model", None) or transformer.auto_model
    like, width = next(encoder.parameters()), encoder.config.hidden_size
    linears = {name: _linear(files[name], width, like) for name in outputs if name in files}
    tokenizer = transformer.tokenizer
    special = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    heads = Heads(outputs, linears, sorted(special - {None}), encoder.config.vocab_size, width)
    given = {"prompts": st.prompts, "default_prompt_name": st.default_prompt_name}
    return type(st)(modules=[transformer, heads], device=device, **given).eval()


def _linear(file: str, width: int, like: Tensor) -> nn.Linear:
    state = torch.load(file, map_location="cpu", weights_only=True)
    weight, bias = state.get("weight"), state.get("bias")
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != width:
        raise ModelError(f"model: {file} does not hold a matrix for an encoder of width {width}; the copy is damaged")
    linear = nn.Linear(width, weight.shape[0], bias=bias is not None)
    linear.load_state_dict({name: value for name, value in (("weight", weight), ("bias", bias)) if value is not None})
    return linear.to(device=like.device, dtype=like.dtype).requires_grad_(False)
