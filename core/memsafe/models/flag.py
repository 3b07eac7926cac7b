"""FlagEmbedding's rerankers of decoders: a prompt behind the pair, and the logit of "Yes" at its last token, or of one layer's head.

Such a folder is a plain causal language model; what makes it a reranker is how FlagEmbedding reads pairs (inference/reranker/
decoder_only of its version 1.4): ``<bos> A: query \\n B: passage \\n prompt``, each part tokenised by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from memsafe.errors import ConfigError, ModelError

__all__ = ["PROMPT", "Pairs", "assemble"]

PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a prediction of "
    "either 'Yes' or 'No'."
)
_MAX_LENGTH = 512
"""Tokens of query and passage, as there."""


class Pairs(nn.Module):
    """From (query, passage) pairs to logits, in the place of sentence-transformers' Transformer. model: a causal language model.

    cutoff_layer: of a layerwise model, whose head of that layer gives the score; None: "causal_logits" of the last token.
    max_seq_length: tokens of query and passage; the query alone has three quarters of them at most, and only the passage
    gives way. Separators and the prompt are not cut. cut: of the pairs preprocessed last, which lost tokens; see
    :func:`memsafe.models.sbert.reported_cuts`.
    """

    def __init__(self, model: Any, tokenizer: Any, cutoff_layer: int | None, max_length: int | None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.cutoff_layer = cutoff_layer
        self.max_seq_length = max_length or _MAX_LENGTH
        self.cut: list[bool] = []
        tokenizer.model_max_length = 1 << 40  # nothing but this cuts
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def config(self) -> Any:
        return self.model.config

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Ids and mask of `inputs`, padded on the left. prompt: in the place of :data:`PROMPT`."""
        most, line, asked = self.max_seq_length, self._ids(["\n"])[0], self._ids([prompt or PROMPT])[0]
        # one more than may be kept, which shows that something is cut
        queries = self._ids([f"A: {query}" for query, _ in inputs], most * 3 // 4 + 1)
        passages = self._ids([f"B: {passage}" for _, passage in inputs], most + 1)
        bos, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        first = [] if bos is None or (bos == pad and self.cutoff_layer is None) else [bos]
        rows, self.cut = [], []
        for query, passage in zip(queries, passages, strict=True):
            head, tail = [*first, *query[: most * 3 // 4]], [*line, *passage[:most]]
            room = max(most + len(line) + len(asked) - len(head), 0)
            rows.append([*head, *tail[:room], *line, *asked])
            self.cut.append(len(query) > most * 3 // 4 or len(passage) > most or len(tail) > room)
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        given = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        given = {name: given[name] for name in ("input_ids", "attention_mask", "position_ids") if name in given}
        if self.cutoff_layer is None:
            features["causal_logits"] = self.model(**given, use_cache=False, logits_to_keep=1).logits
            return features
        (logits,) = self.model(
            **given, use_cache=False, output_hidden_states=True, return_dict=True, cutoff_layers=[self.cutoff_layer]
        ).logits
        features["scores"] = logits[:, -1:]
        return features

    def _ids(self, texts: list[str], most: int | None = None) -> list[list[int]]:
        cut = {} if most is None else {"truncation": True, "max_length": most}
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, **cut)["input_ids"]
        return found


def _layerwise(config: Any) -> bool:
    """Whether a model of this `config` has heads at several layers."""
    return getattr(config, "start_layer", None) is not None and getattr(config, "head_type", None) is not None


def assemble(name: str, options: Mapping[str, Any], max_length: int | None, device: str) -> Any:
    """The CrossEncoder of a folder or hub id. options: of the CrossEncoder, with ``cutoff_layer``.

    Raises :class:`ModelError` where sentence-transformers is too old, :class:`ConfigError` for a layer that has no head.
    """
    library = importlib.import_module("sentence_transformers")
    try:
        score = importlib.import_module("sentence_transformers.cross_encoder.modules").LogitScore
    except (ImportError, AttributeError):
        raise ModelError(
            'decoder="flag" needs sentence-transformers 6; run: pip install --upgrade "sentence-transformers>=6"'
        ) from None
    shared = {
        key: options[key] for key in ("token", "revision", "local_files_only", "trust_remote_code") if key in options
    }
    shared |= {"cache_dir": options["cache_folder"]} if "cache_folder" in options else {}
    tokens = options.get("processor_kwargs") or options.get("tokenizer_kwargs") or {}
    tokenizer = AutoTokenizer.from_pretrained(name, **shared, **tokens)
    weights = {**(options.get("config_kwargs") or {}), **(options.get("model_kwargs") or {})}
    model = AutoModelForCausalLM.from_pretrained(name, **shared, **weights).eval()
    layer = options.get("cutoff_layer")
    if layer is None and _layerwise(model.config):
        layer = model.config.num_hidden_layers
    if layer is not None:
        first = getattr(model.config, "start_layer", None)
        if first is None or not first <= layer <= model.config.num_hidden_layers:
            has = "only at the end" if first is None else f"from layer {first} to {model.config.num_hidden_layers}"
            raise ConfigError(f"cutoff_layer: got {layer}, but the model has heads {has}")
    pairs = Pairs(model, tokenizer, layer, max_length)
    modules: list[Any] = [pairs]
    if layer is None:
        modules.append(score(true_token_id=tokenizer("Yes", add_special_tokens=False)["input_ids"][0]))
    activation = options.get("activation_fn") or nn.Identity()
    return library.CrossEncoder(modules=modules, device=device, activation_fn=activation).eval()
