"""``SentenceTransformer`` and ``CrossEncoder`` as their library has them, whose ``encode`` and ``predict`` go through memsafe.

They are subclasses and hold the library's own modules, so that everything else (``similarity``, ``tokenizer``, ``save``, ``prompts``,
``rank``) is the library's. The name of this module is in the name of the classes: BERTopic asks for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from sentence_transformers import CrossEncoder as _CrossEncoder
from sentence_transformers import SentenceTransformer as _SentenceTransformer

from memsafe import inputs as checks
from memsafe.config import MemoryPolicy
from memsafe.embedder import Embedder
from memsafe.errors import ConfigError
from memsafe.events import EventHook
from memsafe.handle import PerProcess
from memsafe.models import sbert
from memsafe.reranker import Reranker

__all__ = ["CrossEncoder", "SentenceTransformer"]

_Method = TypeVar("_Method", bound=Callable[..., Any])
_OLD_NAMES = {"sentences": "inputs", "activation_fct": "activation_fn"}
_UNUSED = ("chunk_size", "num_workers")
"""How the library feeds its processes; the planner feeds ours."""


def _signature_of(replaced: Any) -> Callable[[_Method], _Method]:
    """Show a method with the parameters of the one that it replaces, whatever the library's version."""

    def decorate(method: _Method) -> _Method:
        vars(method)["__signature__"] = inspect.signature(replaced)
        return method

    return decorate


def _arguments(replaced: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call gives, by the names of the library's method. Raises TypeError where that would."""
    for old, new in _OLD_NAMES.items():
        if old in kwargs and old not in inspect.signature(replaced).parameters:
            kwargs.setdefault(new, kwargs[old])
            del kwargs[old]
    given = dict(inspect.signature(replaced).bind(None, *args, **kwargs).arguments)
    del given["self"]
    given |= given.pop("kwargs", {})
    for old, new in _OLD_NAMES.items():
        if old in given:
            given[new] = given.pop(old)
    return {name: value for name, value in given.items() if name not in _UNUSED}


class _Core:
    """The memsafe object behind one of the library's, made anew when that was changed: another maximum length, dtype or device.

    Pickles and copies as its settings: the weights are those of the library's object.
    """

    def __init__(self, kind: type[Embedder] | type[Reranker], device: Any, settings: dict[str, Any]) -> None:
        policy = checks.policy(settings.get("memory"))
        if policy.unload_after_s is not None:
            raise ConfigError(
                "unload_after_s: this object holds its weights, as the class that it replaces does; use "
                f"memsafe.{kind.__name__}, or leave unload_after_s out"
            )
        self._kind, self._device, self._settings = kind, device, settings
        self._now: tuple[Any, PerProcess[Any]] = (None, PerProcess())

    def load(self, name: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
        """Load the model called `name`; returns the library's object, and the one to give to :meth:`keep`."""
        made = self._kind(name, device=self._device, **self._settings, **options)
        return made.model, made

    def keep(self, owner: Any, made: Any) -> None:
        """Use `made`, over the weights of `owner`, as long as nobody changes that."""
        shared: PerProcess[Any] = PerProcess()
        shared.get(lambda: made)
        self._now = _state(owner), shared

    def get(self, owner: Any) -> Any:
        state, shared = self._now
        seen = _state(owner)
        if seen != state:
            shared = PerProcess()
            self._now = seen, shared
        return shared.get(lambda: self._over(owner))

    def _over(self, owner: Any) -> Any:
        """Over the modules of `owner`, as the library's own class has them: what it encodes with is what ours are checked against."""
        library = sbert.build(self._kind._kind)
        plain = library.__new__(library)
        vars(plain).update({name: value for name, value in vars(owner).items() if name != "_memsafe"})
        _ask_each_time(plain)
        several = isinstance(self._device, (list, tuple)) and _same(owner.device, self._device[0])
        return self._kind(plain, device=self._device if several else str(owner.device), **self._settings)

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self._kind, "device": self._device, "settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _ask_each_time(model: Any) -> None:
    """Of the object below ours nothing is kept that every call of ours says, since ours may be changed: `truncate_dim` to None, too."""
    if getattr(model, "truncate_dim", None) is not None:
        model.truncate_dim = None


def _state(owner: Any) -> tuple[Any, ...]:
    """What of the library's object changes what ours must do."""
    first = next(owner.parameters(), None)
    return sbert.max_length(owner), *(() if first is None else (first.dtype, first.device))


def _same(device: Any, other: Any) -> bool:
    one, two = torch.device(device), torch.device(other)
    return one.type == two.type and (one.index or 0) == (two.index or 0)


class _Ours:
    """What both classes do. In front of the library's class among the bases."""

    _core_kind: type[Embedder] | type[Reranker]
    _memsafe: _Core
    device: Any

    def _begin(self, model: Any, device: Any, own: dict[str, Any], options: dict[str, Any]) -> None:
        """Be the model called `model`, or that object of the library's, or one of the `modules` among `options`."""
        core = _Core(self._core_kind, device, own)
        options = {name: value for name, value in options.items() if value is not None}
        if model is None and "modules" in options:
            super().__init__(device=device, **options)  # type: ignore[call-arg]
        elif model is None or isinstance(model, str) or not isinstance(model, torch.nn.Module):
            loaded, made = core.load(model, options)
            vars(self).update(vars(loaded))
            _ask_each_time(loaded)
            core.keep(self, made)
        elif options:
            raise ConfigError(
                f"{next(iter(options))}: got one with a loaded model; set it there, or give the model's name"
            )
        else:
            sbert.check_handed_in(model, self._core_kind._kind)
            vars(self).update({name: value for name, value in vars(model).items() if name != "_memsafe"})
        self._memsafe = core
        core.get(self)  # what cannot be used is refused here

    def _options(self, given: dict[str, Any], kind: str | None = None) -> dict[str, Any]:
        """Of what a call gives, take what both methods have, as options of ours."""
        if given.pop("pool", None) is not None:
            raise ConfigError(
                "pool: processes with a copy of the weights each; construct with device=['cuda:0', 'cuda:1']"
            )
        device = given.pop("device", None)
        if device is not None and (isinstance(device, (list, tuple)) or not _same(device, self.device)):
            raise ConfigError(
                f"device: got {device!r} in a call, but the model is on {str(self.device)!r}; construct with that device, or list"
            )
        size = given.pop("batch_size", None)
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1):
            raise ConfigError(
                f"batch_size must be a positive integer, got {size!r}; leave it out and the planner decides"
            )
        try:
            prompt = sbert.resolve_prompt(self, given.pop("prompt", None), given.pop("prompt_name", None), kind)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return {
            "prompt": prompt or "",
            "max_rows": None if size is None else int(size),
            "show_progress": bool(given.pop("show_progress_bar", False)),
        }

    def start_multi_process_pool(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: give ``device=["cuda:0", "cuda:1"]`` to the constructor instead. Raises :class:`ConfigError`."""
        raise ConfigError("pool: processes with a copy of the weights each; construct with device=['cuda:0', 'cuda:1']")


class SentenceTransformer(_Ours, _SentenceTransformer):  # type: ignore[misc]
    """``sentence_transformers.SentenceTransformer`` inside the memory that is really there: same results, types and dtypes.

    Differences: ``batch_size`` caps the sequences of a micro-batch, and without one the planner decides; texts only; ``output_value``
    is ``"sentence_embedding"``; a call's ``device`` is the model's; no process pools (``device`` of the constructor may be a list).

    Args:
        model_name_or_path: a folder, a hub id, or a loaded SentenceTransformer, whose modules are used.
        modules, device: as there.
        memory, hooks, dtype, long_documents, window_overlap, max_windows: as for :class:`memsafe.Embedder`.
        options: what else the installed class takes: prompts, similarity_fn_name, truncate_dim, model_kwargs and so on.

    Raises:
        ConfigError, ModelError, ModelTooLargeError: as :class:`memsafe.Embedder`.
    """

    _core_kind = Embedder

    def __init__(
        self,
        model_name_or_path: Any = None,
        modules: Any = None,
        device: Any = None,
        *,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"memory": memory, "hooks": hooks}
        own |= {
            name: options.pop(name) for name in ("long_documents", "window_overlap", "max_windows") if name in options
        }
        truncate_dim = options.pop("truncate_dim", None)
        self._begin(model_name_or_path, device, own, {"modules": modules, **options})
        if truncate_dim is not None:  # asked for with every call, so that `truncate_embeddings` may change it
            self.truncate_dim = truncate_dim

    @property
    def embedder(self) -> Embedder:
        """What does the work, for what the library has no words for: ``embedder.run(texts).report``."""
        found: Embedder = self._memsafe.get(self)
        return found

    @_signature_of(_SentenceTransformer.encode)
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embeddings of a text, or of several: ndarray (texts, dim); a Tensor with ``convert_to_tensor``; one row for one str.

        Raises:
            InputError: an input is no str. ConfigError: an option is unknown, or cannot be had here.
            InputTooLargeError: a text does not fit alone.
        """
        return self._embed(None, _arguments(_SentenceTransformer.encode, args, kwargs))

    @_signature_of(_SentenceTransformer.encode_query)
    def encode_query(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`encode`, with the prompt and task of queries; overtakes documents that wait."""
        return self._embed("query", _arguments(_SentenceTransformer.encode_query, args, kwargs))

    @_signature_of(_SentenceTransformer.encode_document)
    def encode_document(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`encode`, with the prompt and task of documents."""
        return self._embed("document", _arguments(_SentenceTransformer.encode_document, args, kwargs))

    def _embed(self, kind: str | None, given: dict[str, Any]) -> Any:
        texts = given.pop("inputs")
        output = given.pop("output_value", "sentence_embedding")
        if output != "sentence_embedding":
            raise ConfigError(
                f"output_value: got {output!r}; here a text becomes one row ('sentence_embedding'). A vector for every token: "
                "memsafe.MultiVectorEmbedder; everything that the model makes: sentence_transformers.SentenceTransformer"
            )
        as_tensor, as_numpy = given.pop("convert_to_tensor", False), given.pop("convert_to_numpy", True)
        precision = given.pop("precision", None) or "float32"
        truncate_dim = given.pop("truncate_dim", None)
        options = self._options(given, kind)
        options["truncate_dim"] = self.truncate_dim if truncate_dim is None else truncate_dim
        options["normalize"] = bool(given.pop("normalize_embeddings", False))
        single = isinstance(texts, str)
        core = self.embedder
        rows = core.run([texts] if single else texts, kind=kind, precision=precision, **options, **given).embeddings
        made = self._made(rows, precision, as_tensor, as_numpy, core._engine.model.dtype)
        return made[0] if single else made

    def _made(self, rows: Any, precision: str, as_tensor: bool, as_numpy: bool, dtype: torch.dtype) -> Any:
        """`rows`, ours, as the library would return them."""
        if not len(rows):
            nothing = np.array([])
            return torch.tensor([], device=self.device) if as_tensor else nothing if as_numpy else []
        made = torch.from_numpy(rows)
        if precision == "float32":
            made = made.to(dtype)
            made = made.to(self.device) if as_tensor or not as_numpy else made
        if as_tensor:
            return made
        if as_numpy:
            return (made.float() if made.dtype == torch.bfloat16 else made).numpy()
        return list(made)


class CrossEncoder(_Ours, _CrossEncoder):  # type: ignore[misc]
    """``sentence_transformers.CrossEncoder`` inside the memory that is really there: same results, types and dtypes.

    Differences: as for :class:`SentenceTransformer`.

    Args:
        model_name_or_path: a folder, a hub id, or a loaded CrossEncoder, whose modules are used.
        device: as there. memory, hooks, dtype, long_documents, window_overlap, max_windows, truncation, query_max_length: as for
            :class:`memsafe.Reranker`.
        options: what else the installed class takes: num_labels, max_length, activation_fn, prompts, model_kwargs and so on.
    """

    _core_kind = Reranker
    activation_fn: Any

    def __init__(
        self,
        model_name_or_path: Any = None,
        *,
        device: Any = None,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"memory": memory, "hooks": hooks}
        names = ("long_documents", "window_overlap", "max_windows", "truncation", "query_max_length")
        own |= {name: options.pop(name) for name in names if name in options}
        name = options.pop("model_name", None) if model_name_or_path is None else model_name_or_path
        self._begin(name, device, own, options)

    @property
    def reranker(self) -> Reranker:
        """What does the work, for what the library has no words for: ``reranker.run(pairs).report``."""
        found: Reranker = self._memsafe.get(self)
        return found

    @_signature_of(_CrossEncoder.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Scores of a pair, or of several: ndarray (pairs,) or (pairs, labels); a Tensor with ``convert_to_tensor``.

        Raises:
            InputError: an input is no pair of str. ConfigError: an option is unknown, or cannot be had here.
            InputTooLargeError: a pair does not fit alone.
        """
        given = _arguments(_CrossEncoder.predict, args, kwargs)
        pairs = given.pop("inputs")
        as_tensor, as_numpy = given.pop("convert_to_tensor", False), given.pop("convert_to_numpy", True)
        options = self._options(given)
        options["activation_fn"] = given.pop("activation_fn", None) or self.activation_fn
        options["apply_softmax"] = bool(given.pop("apply_softmax", False))
        single = _is_pair(pairs)
        scores = self.reranker.run([pairs] if single else pairs, **options, **given).scores
        if not len(scores):
            return torch.tensor([], device=self.device) if as_tensor else np.array([]) if as_numpy else []
        made: Any = scores
        if as_tensor or not as_numpy:
            made = torch.from_numpy(scores).to(self.device)
            made = made if as_tensor else list(made)
        return made[0] if single else made


def _is_pair(pairs: Any) -> bool:
    """Whether `pairs` is one pair, as the library has it."""
    if isinstance(pairs, np.ndarray):
        return pairs.ndim == 1 and pairs.size > 0
    return isinstance(pairs, (list, tuple)) and len(pairs) > 0 and isinstance(pairs[0], str)
