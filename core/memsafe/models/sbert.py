"""The only door to sentence-transformers: what differs between its versions 5 and 6 is settled here."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from memsafe.errors import ModelError

__all__ = [
    "check_handed_in",
    "forward",
    "hf_model",
    "hf_tokenizer",
    "is_reranker",
    "max_length",
    "own_rows",
    "preprocess",
    "prompt_features",
    "resolve_prompt",
    "set_max_length",
]

Pair = tuple[str, str]


def is_reranker(model: Any) -> bool:
    """True for a CrossEncoder, False for a SentenceTransformer."""
    cross_encoder = importlib.import_module("sentence_transformers").CrossEncoder
    return isinstance(model, cross_encoder)


def check_handed_in(model: Any, reranker: bool) -> None:
    """Raise :class:`ModelError` for a loaded object that is neither name nor model of the right class."""
    library = importlib.import_module("sentence_transformers")
    wanted, other = library.SentenceTransformer, library.CrossEncoder
    if reranker:
        wanted, other = other, wanted
    if isinstance(model, wanted):
        return
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    if isinstance(model, other):
        remedy = f"give it to {'Embedder' if reranker else 'Reranker'}, or give a {wanted.__name__} here"
    else:
        remedy = f"give a folder, a hub id like 'BAAI/bge-m3', or a loaded {wanted.__name__}"
        if hasattr(model, "config"):
            remedy += " (of a transformers model: SentenceTransformer(modules=[Transformer(folder), Pooling(width)]))"
    raise ModelError(f"model: got {got}; {remedy}")


def hf_model(model: Any) -> Any | None:
    """The transformers model inside, or None where there is none (static embeddings, bag of words, routers, ...)."""
    if is_reranker(model) and not _has_modules(model):
        return model.model
    first = _first(model)
    for name in ("model", "auto_model"):
        inner = getattr(first, name, None)
        if inner is not None and hasattr(inner, "config"):
            return inner
    return None


def hf_tokenizer(model: Any) -> Any | None:
    """The transformers tokenizer inside, or None."""
    tokenizer = getattr(_first(model) if _has_modules(model) else model, "tokenizer", None)
    return tokenizer if hasattr(tokenizer, "model_max_length") else None


def max_length(model: Any) -> int | None:
    """Tokens after which `model` cuts inputs; None if it takes any length (transformers says 10**30 for "unknown")."""
    tokenizer = hf_tokenizer(model)
    length = getattr(model, "max_seq_length", None)
    if length is None:
        length = getattr(model, "max_length", None) or getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 10**9 else None


def set_max_length(model: Any, tokens: int) -> None:
    """Let `model`, a private copy, cut inputs after `tokens` tokens, without changing the original's tokenizer."""
    holder = _first(model) if _has_modules(model) else model
    for name in ("processor", "tokenizer"):
        if name in vars(holder):
            vars(holder)[name] = copy.deepcopy(vars(holder)[name])
    if hasattr(type(model), "max_seq_length"):
        model.max_seq_length = tokens
    else:
        model.max_length = tokens
        model.tokenizer.model_max_length = tokens


def preprocess(model: Any, inputs: Sequence[Any], prompt: str | None) -> dict[str, Any]:
    """Features of `inputs` exactly as the model's own ``encode`` / ``predict`` would make them, padded, on the CPU."""
    if hasattr(model, "preprocess"):
        return dict(model.preprocess(list(inputs), prompt=prompt))
    if is_reranker(model):
        pairs = [((prompt or "") + query, document) for query, document in inputs]
        return dict(model.tokenizer(pairs, padding=True, truncation=True, return_tensors="pt"))
    features = dict(model.tokenize([(prompt or "") + text for text in inputs]))
    return features | prompt_features(model, prompt)


def prompt_features(model: Any, prompt: str | None) -> dict[str, Any]:
    """What pooling must know about a prompt: ``{"prompt_length": tokens}`` where the prompt is left out of the mean."""
    if not prompt or is_reranker(model):
        return {}
    if hasattr(model, "preprocess"):
        features = model.preprocess(["x"], prompt=prompt)
        return {"prompt_length": features["prompt_length"]} if "prompt_length" in features else {}
    tokens = model.tokenize([prompt]).get("input_ids")
    return {} if tokens is None else {"prompt_length": tokens.shape[-1] - 1}


def forward(model: Any, features: Mapping[str, Any]) -> torch.Tensor:
    """Rows of a forward: (rows, dim) embeddings, or (rows, labels) or (rows,) raw scores before any activation."""
    if is_reranker(model):
        if not _has_modules(model):
            logits: torch.Tensor = model.model(**features, return_dict=True).logits
            return logits
        scores: torch.Tensor = model(dict(features))["scores"]
        return scores
    out = model(dict(features))
    embeddings: torch.Tensor = out["sentence_embedding"]
    return embeddings


def own_rows(
    model: Any,
    inputs: Sequence[Any],
    *,
    kind: str | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
) -> torch.Tensor:
    """Rows of `inputs` by the model's own ``encode``, ``encode_query``, ``encode_document`` or ``predict``, one input at
    a time, on its device: (inputs, dim), or (inputs, labels) or (inputs,) raw scores."""
    given = {"prompt": prompt, "prompt_name": prompt_name}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options |= {"batch_size": 1, "show_progress_bar": False, "convert_to_tensor": True}
    if is_reranker(model):
        if not prompt and not hasattr(model, "preprocess"):  # before version 5.4 they had none
            options.pop("prompt", None)
        scores: torch.Tensor = model.predict(list(inputs), activation_fn=torch.nn.Identity(), **options)
        return scores
    method = {None: "encode", "query": "encode_query", "document": "encode_document"}[kind]
    rows: torch.Tensor = getattr(model, method)(list(inputs), normalize_embeddings=False, **options)
    return rows


def resolve_prompt(model: Any, prompt: str | None, prompt_name: str | None, kind: str | None) -> str | None:
    """The prompt that ``encode`` (kind None), ``encode_query`` or ``encode_document`` would use; None for none.

    Raises ValueError for a name the model does not have.
    """
    prompts: dict[str, str] = getattr(model, "prompts", None) or {}
    if prompt is not None:
        return prompt or None
    if prompt_name is None and kind is not None:
        names = ("query",) if kind == "query" else ("document", "passage", "corpus")
        prompt_name = next((name for name in names if prompts.get(name) is not None), None)
    if prompt_name is None:
        prompt_name = getattr(model, "default_prompt_name", None)
    if prompt_name is None:
        return None
    if prompt_name not in prompts:
        raise ValueError(f"prompt_name: got {prompt_name!r}, but the model has {sorted(prompts)}")
    return prompts[prompt_name] or None


def _has_modules(model: Any) -> bool:
    """Whether `model` is a chain of sentence-transformers modules (a CrossEncoder is one since version 5.4)."""
    return not is_reranker(model) or hasattr(model, "preprocess")


def _first(model: Any) -> Any:
    return next(iter(model.children()), model)
