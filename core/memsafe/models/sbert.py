"""The only door to sentence-transformers: what differs between its versions 5 and 6 is settled here."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from memsafe.errors import ModelError
from memsafe.models.m3 import ends_in_heads
from memsafe.models.segments import Segmented

__all__ = [
    "CLASSES",
    "Hollow",
    "build",
    "call_options",
    "check_handed_in",
    "declared_lengths",
    "forward",
    "forward_chunks",
    "forward_options",
    "has_own_methods",
    "has_own_preprocessing",
    "hf_model",
    "hf_tokenizer",
    "is_reranker",
    "max_length",
    "normalises",
    "own_rows",
    "pooling_modes",
    "preprocess",
    "replace_hf_model",
    "reported_cuts",
    "resolve_prompt",
    "rust_tokenizer",
    "set_max_length",
    "tasks",
    "with_task",
    "without_weights",
]


_KNOWN = ("sentence_transformers.", "transformers.")
_TOKENWISE = {
    "BoW", "CNN", "Dense", "Dropout", "LSTM", "LayerNorm", "Normalize", "Pooling", "SentenceTransformer", "StaticEmbedding",
    "WordEmbeddings", "WordWeights",
}  # fmt: skip
"""Modules of sentence-transformers that hold nothing for pairs of tokens."""

CLASSES = {
    "embedding": ("SentenceTransformer", "Embedder"),
    "reranker": ("CrossEncoder", "Reranker"),
    "sparse": ("SparseEncoder", "SparseEmbedder"),
    "multi_vector": ("MultiVectorEncoder", "MultiVectorEmbedder"),
    "hybrid": ("SentenceTransformer", "HybridEmbedder"),
}
"""By kind of model: the class of sentence-transformers, and ours. Sparse ones came with version 5, multi-vector ones with 6."""


def _library(name: str) -> Any | None:
    """The library's class called `name`, also where a program has put that of `memsafe.compat` in its place; None if it has none."""
    found = getattr(importlib.import_module("sentence_transformers"), name, None)
    return next((each for each in getattr(found, "__mro__", ()) if not each.__module__.startswith("memsafe.")), found)


def is_reranker(model: Any) -> bool:
    """True for a CrossEncoder, False for a SentenceTransformer."""
    cross_encoder: Any = _library("CrossEncoder")
    return isinstance(model, cross_encoder)


def build(kind: str) -> Any:
    """The class of sentence-transformers that loads models of `kind`. Raises :class:`ModelError` where it has none yet."""
    name, ours = CLASSES[kind]
    found = _library(name)
    if found is None:
        raise ModelError(
            f"{ours} needs {name}, which this sentence-transformers does not have; run: "
            'pip install --upgrade "sentence-transformers>=6"'
        )
    return found


def check_handed_in(model: Any, kind: str) -> None:
    """Raise :class:`ModelError` for a loaded object that is neither name nor model of the right class."""
    wanted = build(kind)
    if kind == "hybrid":
        raise ModelError(
            f"model: got a {type(model).__name__}; give a folder or a hub id like 'BAAI/bge-m3', where the heads lie beside the "
            "encoder"
        )
    if isinstance(model, wanted):
        return
    others = [(_library(name), ours) for other, (name, ours) in CLASSES.items() if other != kind]
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    taker = next((ours for other, ours in others if other is not None and isinstance(model, other)), None)
    if taker is not None:
        remedy = f"give it to {taker}, or give a {wanted.__name__} here"
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


class Hollow(torch.nn.Module):
    """Stands for a transformers model whose weights are not there: what sentence-transformers asks of one as it loads."""

    def __init__(self, kind: type, config: Any) -> None:
        super().__init__()
        self.config = config
        self.forward = partial(kind.forward, self)  # type: ignore[attr-defined]


@contextmanager
def without_weights() -> Iterator[None]:
    """Transformers models that are loaded meanwhile, in any thread, are :class:`Hollow`: an export of theirs is all there is."""
    base = importlib.import_module("transformers").PreTrainedModel
    own = base.__dict__["from_pretrained"]

    def hollow(kind: type[Any], /, *args: Any, config: Any = None, **kwargs: Any) -> Hollow:
        return Hollow(kind, config)

    base.from_pretrained = classmethod(hollow)
    try:
        yield
    finally:
        base.from_pretrained = own


def replace_hf_model(model: Any, place: torch.nn.Module) -> None:
    """Put `place` where :func:`hf_model` finds the transformers model; it must take and give what that does."""
    if is_reranker(model) and not _has_modules(model):
        model.model = place
        return
    first = _first(model)
    setattr(first, "model" if "model" in first._modules else "auto_model", place)


def hf_tokenizer(model: Any, options: Mapping[str, Any] | None = None) -> Any | None:
    """The transformers tokenizer inside (of the route that `options` take), or None."""
    holder = _input_module(model, options or {}) if _has_modules(model) else model
    tokenizer = getattr(holder, "tokenizer", None)
    return tokenizer if hasattr(tokenizer, "model_max_length") else None


def rust_tokenizer(model: Any, options: Mapping[str, Any]) -> Any | None:
    """The tokenizer of the `tokenizers` library that texts of a call with `options` go to, or None."""
    tokenizer = hf_tokenizer(model, options)
    if tokenizer is None and _has_modules(model):  # that of static embeddings
        tokenizer = getattr(_input_module(model, options), "tokenizer", None)
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return tokenizer if type(tokenizer).__module__.startswith("tokenizers") else None


def max_length(model: Any) -> int | None:
    """Tokens after which `model` cuts inputs; None if it takes any length (transformers says 10**30 for "unknown")."""
    tokenizer = hf_tokenizer(model)
    length = getattr(model, "max_seq_length", None)
    if length is None:
        length = getattr(model, "max_length", None) or getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 10**9 else None


def set_max_length(model: Any, tokens: int) -> None:
    """Let `model`, a private copy, cut inputs after `tokens` tokens, without changing the original's tokenizers."""
    copied: dict[int, Any] = {}  # modules of several routes may share one, and a processor holds a tokenizer
    for holder in {id(each): each for each in (model, *model.modules())}.values():
        for name in ("processor", "tokenizer"):
            if name in vars(holder):
                vars(holder)[name] = copy.deepcopy(vars(holder)[name], copied)
    rust = rust_tokenizer(model, {})
    if rust is not None and hf_tokenizer(model) is None:  # static embeddings have no length that could be set
        rust.enable_truncation(tokens)
    elif hasattr(type(model), "max_seq_length"):
        model.max_seq_length = tokens
    else:
        model.max_length = tokens
        model.tokenizer.model_max_length = tokens


def preprocess(
    model: Any, inputs: Sequence[Any], prompt: str | None, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Features of `inputs` exactly as the model's own ``encode`` / ``predict`` would make them, padded, on the CPU.

    options: keyword arguments of the call, such as ``task``, which the model's input module may use.
    """
    given = dict(options or {})
    if hasattr(model, "preprocess"):
        return dict(model.preprocess(list(inputs), prompt=prompt, **given))
    if is_reranker(model):
        pairs = [((prompt or "") + query, document) for query, document in inputs]
        return dict(model.tokenizer(pairs, padding=True, truncation=True, return_tensors="pt"))
    older: Any = model  # before 5.4
    features = dict(older.tokenize([(prompt or "") + text for text in inputs], **given))
    length = older._get_prompt_length(prompt, **given) if prompt else None  # what pooling leaves out of the mean
    return features if length is None else features | {"prompt_length": length}


def forward(model: Any, features: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
    """Rows of a forward: (rows, dim) embeddings, or (rows, labels) or (rows,) raw scores before any activation; for what is
    not dense, see :mod:`memsafe.models.segments`."""
    if is_reranker(model):
        if not _has_modules(model):
            logits: torch.Tensor = model.model(**features, return_dict=True).logits
            return logits
        scores: torch.Tensor = model(dict(features), **(options or {}))["scores"]
        return scores
    return model(dict(features), **(options or {}))["sentence_embedding"]


def forward_chunks(
    model: Any, features: Mapping[str, Any], chunks: Sequence[tuple[int, int]], options: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """Rows of `chunks`, (first token, behind the last), of the one text in `features`: the first module runs on all of it, the others on
    the tokens of each chunk."""
    first, *others = model.children()
    out = dict(first(dict(features), **(options or {})))
    rows = []
    for start, stop in chunks:
        part = {name: value for name, value in out.items() if name not in ("sentence_embedding", "prompt_length")}
        part["token_embeddings"] = out["token_embeddings"][:, start:stop]
        part["attention_mask"] = torch.ones_like(out["attention_mask"][:, start:stop])
        part["input_ids"] = out["input_ids"][:, start:stop] if "input_ids" in out else part["attention_mask"]
        for module in others:
            part = module(part)
        rows.append(part["sentence_embedding"])
    return torch.cat(rows)


def call_options(model: Any) -> set[str]:
    """Names of keyword arguments that the model's ``encode`` / ``predict`` takes for its own modules."""
    if not isinstance(model, torch.nn.Module) or not _has_modules(model):
        return set()
    own = {"task", "processing_kwargs"} if hasattr(model, "preprocess") else {"task"}
    return own | _forward_names(model)


def with_task(
    model: Any, kind: str | None, options: Mapping[str, Any], accepts: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """`options` of a call, in which `kind` is the ``task`` too unless one is given, as for ``encode_query`` and
    ``encode_document``; not where `accepts` says that the model has tasks of other names."""
    given = dict(options)
    if kind is not None and "task" not in given and "task" in call_options(model):
        with_it = {**given, "task": kind}
        return with_it if accepts(with_it) else given
    return given


def tasks(model: Any) -> list[str]:
    """Names of tasks that the modules of `model` say they have: routes of a Router, adapters of a config."""
    found: dict[str, None] = {}
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        mappings = getattr(module, "route_mappings", None)
        if isinstance(mappings, Mapping):  # of (task, modality)
            found |= {str(key[0]): None for key in mappings if isinstance(key, tuple) and isinstance(key[0], str)}
        routes = getattr(module, "sub_modules", None)
        if isinstance(routes, torch.nn.ModuleDict):
            found |= dict.fromkeys(routes)
        config = getattr(module, "config", None)
        for name in ("lora_adaptations", "task_names"):
            named = getattr(config, name, None)
            if isinstance(named, (list, tuple)):
                found |= {each: None for each in named if isinstance(each, str)}
    return list(found) if "task" in call_options(model) else []


def forward_options(model: Any, options: Mapping[str, Any]) -> set[str]:
    """Which of `options` a module's forward takes: they change rows beyond what preprocessing shows. A late-interaction
    model's own modules take the absence of a task for "document"."""
    names = _forward_names(model) if _has_modules(model) else set()
    if options.get("task") == "document" and _family(model) == "multi_vector":
        takers = [module for module in model.modules() if "task" in getattr(module, "forward_kwargs", ())]
        if all(type(module).__module__.startswith(_KNOWN) and not hasattr(module, "sub_modules") for module in takers):
            names -= {"task"}
    return names & set(options)


def _family(model: Any) -> str | None:
    """The kind of model that `model` is an object of."""
    for kind in ("reranker", "sparse", "multi_vector", "embedding"):
        known = _library(CLASSES[kind][0])
        if known is not None and isinstance(model, known):
            return kind
    return None


def _forward_names(model: Any) -> set[str]:
    return set(model.get_model_kwargs()) if hasattr(model, "get_model_kwargs") else set()


def has_own_preprocessing(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether texts become features by code that is not sentence-transformers' and transformers' (remote code, a user's
    module, a method replaced on the object), which may do anything with a text."""
    holders = [model, _input_module(model, options)] if _has_modules(model) else [model]
    methods = [(holder, name) for holder in holders for name in ("preprocess", "tokenize")]
    methods.append((getattr(holders[-1], "tokenizer", None), "__call__"))
    for holder, name in methods:
        if holder is None:
            continue
        home = inspect.getattr_static(type(holder), name, None)
        if name in vars(holder) or not str(getattr(home, "__module__", "transformers.")).startswith(_KNOWN):
            return True
    return False


def has_own_methods(model: Any) -> bool:
    """Whether inputs may become rows by more than features and forwards: ``encode`` and its kin, or ``predict``, replaced on the
    object or in a class of its own, as of models that give a vector for every token."""
    names = ("predict", "forward") if is_reranker(model) else ("encode", "encode_query", "encode_document", "forward")
    homes = [getattr(inspect.getattr_static(type(model), name, None), "__module__", "") for name in names]
    known = type(model).__name__ in ("CrossEncoder", "SentenceTransformer") and not ends_in_heads(model)
    return not known or any(name in vars(model) for name in names) or not all(str(h).startswith(_KNOWN) for h in homes)


def reported_cuts(model: Any, options: Mapping[str, Any]) -> Callable[[], list[bool]] | None:
    """Asks the module that preprocesses which of the inputs that it saw last lost tokens; None where none says so by its own."""
    module = _input_module(model, options) if _has_modules(model) else model
    return (lambda: list(module.cut)) if isinstance(getattr(module, "cut", None), list) else None


def is_tokenwise(model: Any) -> bool:
    """Whether nothing in `model` holds numbers for pairs of tokens: static embeddings and their kin, without attention."""
    for module in model.modules():
        home, name = type(module).__module__, type(module).__name__
        torchs = home.startswith("torch.nn.modules.") and not name.startswith(("MultiheadAttention", "Transformer"))
        if not torchs and not (home.startswith("sentence_transformers.") and name in _TOKENWISE):
            return False
    return True


def declared_lengths(model: Any, options: Mapping[str, Any]) -> list[int]:
    """Every number of tokens at which something says that inputs are cut; the model's own comes first."""
    module = _input_module(model, options) if _has_modules(model) else model
    saved = getattr(module, "processing_kwargs", None) or {}
    given = options.get("processing_kwargs") or {}
    found = [getattr(model, "max_seq_length" if _has_modules(model) else "max_length", None), options.get("max_length")]
    found += [getattr(module, name, None) for name in ("max_seq_length", "query_length", "document_length")]
    tokenizer = getattr(module, "tokenizer", None)
    found += [getattr(tokenizer, "model_max_length", None)]
    truncation = getattr(tokenizer, "truncation", None)  # saved with a tokenizer of the `tokenizers` library
    found += [truncation.get("max_length")] if isinstance(truncation, Mapping) else []
    found += [kwargs.get("max_length") for kwargs in (*saved.values(), *given.values()) if isinstance(kwargs, Mapping)]
    # transformers says 10**30 for "unknown", static embeddings infinity
    return [int(length) for length in found if isinstance(length, (int, float)) and 0 < length < 10**9]


def own_rows(
    model: Any,
    inputs: Sequence[Any],
    *,
    kind: str | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Rows of `inputs` by the model's own ``encode``, ``encode_query``, ``encode_document`` or ``predict``, one input at
    a time, on its device: (inputs, dim), or (inputs, labels) or (inputs,) raw scores; ragged ones of a MultiVectorEncoder.

    prompt: "" for none, not even the model's default. options: of the call; a task "query" or "document" is that kind.
    """
    if ends_in_heads(model):
        features = preprocess(model, inputs, resolve_prompt(model, prompt, prompt_name, kind), options)
        moved = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        with torch.inference_mode():
            return forward(model, moved)
    prompts = {"prompt": prompt, "prompt_name": prompt_name}
    given: dict[str, Any] = {name: value for name, value in prompts.items() if value is not None}
    given |= {**(options or {}), "batch_size": 1, "show_progress_bar": False, "convert_to_tensor": True}
    if is_reranker(model):
        if not prompt and not hasattr(model, "preprocess"):  # before version 5.4 they had none
            given.pop("prompt", None)
        scores: torch.Tensor = model.predict(list(inputs), activation_fn=torch.nn.Identity(), **given)
        return scores
    methods = {"query": "encode_query", "document": "encode_document"}
    if kind is None and given.get("task") in methods:
        kind = given.pop("task")
    own = getattr(model, methods.get(kind or "", "encode"))
    family = _family(model)
    if family == "sparse":
        return own(list(inputs), convert_to_sparse_tensor=False, **given)
    if family == "multi_vector":
        del given["convert_to_tensor"]
        return Segmented.ragged(own(list(inputs), **given))
    return own(list(inputs), normalize_embeddings=False, **given)


def pooling_modes(model: Any) -> list[str]:
    """What the Pooling module of `model` does ("mean", "cls", ...); [] without one, or with several."""
    found = [module for module in model.modules() if type(module).__name__ == "Pooling"]
    if len(found) != 1:
        return []
    mode = getattr(found[0], "pooling_mode", None)
    if mode is None:  # before sentence-transformers 6
        mode = str(found[0].get_pooling_mode_str()).split("+")
    return [mode] if isinstance(mode, str) else [str(each) for each in mode]


def normalises(model: Any) -> bool:
    """Whether the last module of `model` scales rows to length 1."""
    last = next(reversed(list(model.children())), None)
    return type(last).__name__ == "Normalize"


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


def _input_module(model: Any, options: Mapping[str, Any]) -> Any:
    """What preprocesses texts: the first module, or the first of the route that a Router takes for `options`."""
    module = _first(model)
    routes = getattr(module, "sub_modules", None)
    if routes is None:
        return module
    task = options.get("task")
    try:
        name = module._resolve_route(task=task, modality="text") if hasattr(module, "_resolve_route") else task
    except ValueError:  # no such route: the model itself will say so
        name = None
    route = routes[name] if name in routes else next(iter(routes.values()))
    return next(iter(route.children()), module)
