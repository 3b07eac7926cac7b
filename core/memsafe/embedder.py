"""Texts to embeddings: tokenise, plan, run, in the caller's order. Start reading memsafe here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe import inputs
from memsafe.calls import Model, Options, Prepare, in_thread
from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError, InputError
from memsafe.events import EventHook, RunReport
from memsafe.long_documents import EMBEDDING, MAX_WINDOWS, check, check_spans, prepare_chunks, weighted
from memsafe.runtimes import Quantization
from memsafe.texts import identity_of

__all__ = ["Embedder", "EmbeddingRun"]

Array = NDArray[Any]
PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


@dataclass(frozen=True)
class EmbeddingRun:
    """embeddings: float32, shape (texts, dim), in the caller's order (other dtypes for other precisions); report: what it took."""

    embeddings: Array
    report: RunReport


class Embedder(Model):
    """Embeds texts with any model that sentence-transformers can load, inside the memory that is really there.

    Numbers and prompts are those of ``SentenceTransformer.encode_query`` / ``encode_document``; there is no batch size.

    Args:
        model: folder, hub id such as ``"BAAI/bge-m3"``, or a loaded SentenceTransformer.
        device: None for the best one (cuda, mps, xpu, cpu), a name, or several names: one copy of the model on each.
        dtype: None keeps the checkpoint's numbers; ``"auto"`` the half precision that the device computes natively,
            if any; or ``"float32"``, ``"float16"``, ``"bfloat16"``; with another engine than torch ``"int8"`` too.
        engine: what computes: ``"torch"``; or, on a CPU, ``"openvino"`` or ``"onnx"`` (extras of these names), from an export that
            lies in the model's folder, or is made once and kept. None is float32 there.
        quantization: how a model becomes int8 and what that may cost: a :class:`Quantization`, or a dict of its fields.
        max_length: tokens after which texts are cut; None as the model says.
        normalize: True scales rows to length 1; None and False leave them as the model makes them.
        truncate_dim: keep only so many leading dimensions; None as many as the model says (all, mostly).
        long_documents: what becomes of a text that the model cannot read at once: ``"truncate"``, or ``"mean_windows"``: it is read in
            windows of tokens, and its row is the mean of theirs, weighted by their tokens, of length 1 where the model gives
            such rows. window_overlap: tokens that two windows share; None for an eighth. max_windows: of one text; what is
            beyond is cut, counted and warned of.
        memory: a :class:`MemoryPolicy`, or a dict of its fields.
        hooks: callables that get events (:mod:`memsafe.events`) while work runs.
        show_progress: show a bar for every call.
        options: whatever else the installed SentenceTransformer takes: prompts, default_prompt_name, revision,
            cache_folder, token, local_files_only, trust_remote_code, model_kwargs, processor_kwargs, config_kwargs, backend.

    Raises:
        ConfigError: an option is unknown or out of range. ModelError, ModelTooLargeError: see there.
    """

    _kind = "embedding"

    def __init__(
        self,
        model: Any,
        *,
        device: Any = None,
        dtype: Any = None,
        engine: str = "torch",
        quantization: Quantization | dict[str, Any] | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        long_documents: str = "truncate",
        window_overlap: int | None = None,
        max_windows: int = MAX_WINDOWS,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        show_progress: bool = False,
        **options: Any,
    ) -> None:
        self._settings = {
            **options,
            "model": model,
            "device": device,
            "dtype": dtype,
            "engine": engine,
            "quantization": quantization,
            "max_length": max_length,
            "normalize": normalize,
            "truncate_dim": truncate_dim,
            "long_documents": long_documents,
            "window_overlap": window_overlap,
            "max_windows": max_windows,
            "memory": memory,
            "hooks": hooks,
            "show_progress": show_progress,
        }
        self._long = check(long_documents, EMBEDDING, window_overlap, max_windows)
        truncate_dim = _check_dim(truncate_dim)
        if truncate_dim is not None and isinstance(model, (str, os.PathLike)):
            options["truncate_dim"] = truncate_dim  # so that the model itself tells the width that users will get
        super().__init__(
            model,
            device,
            dtype=dtype,
            engine=engine,
            quantization=quantization,
            max_length=max_length,
            memory=memory,
            hooks=hooks,
            options=options,
        )
        self._normalize = normalize
        self._truncate_dim = truncate_dim
        self._show_progress = show_progress

    def embed_documents(self, texts: Sequence[str], **options: Any) -> Array:
        """Embeddings of `texts` as documents: float32, shape (len(texts), dim). Options as for :meth:`run`."""
        return self.run(texts, kind="document", **options).embeddings

    def embed_queries(self, texts: Sequence[str], **options: Any) -> Array:
        """Embeddings of `texts` as queries: float32, shape (len(texts), dim). Queries overtake documents that wait."""
        return self.run(texts, kind="query", **options).embeddings

    def run(self, texts: Sequence[str], **options: Any) -> EmbeddingRun:
        """Embed `texts` and report what it took.

        Options, all optional:
            kind: ``"query"`` or ``"document"`` does as ``encode_query`` or ``encode_document``: the prompt that the model
                saved for it, and that ``task``, if its modules know one by that name; None the default prompt only.
            prompt, prompt_name: put before every text, as in ``SentenceTransformer.encode``; ``""`` for none.
            normalize, truncate_dim: override those given at construction; None leaves them.
            urgent: whether the call goes before bulk work that waits; None: queries do.
            precision: float32, int8, uint8, binary, ubinary, as sentence-transformers' ``quantize_embeddings``.
            max_rows: the most texts in one micro-batch.
            fixed_tokens: let the texts alone decide what is computed together: micro-batches of at most so many tokens, shared
                with no other call, on a CPU one core each. The same texts then give the same bits again, on the same device and
                with the same libraries, as long as memory suffices for such micro-batches.
            warn: False leaves it to the report to say that texts were cut.
            show_progress: a tqdm bar; progress: called with the number of texts just finished, in the thread that computed
                them, which waits for it; what it raises is raised here.
            on_report: called with the report, for methods that return rows only.
            Whatever else the model's own modules take in ``encode``, such as ``task`` (see ``get_model_kwargs()``), goes to them.

        Raises:
            InputError: a text is not a str, with its index. ConfigError: an option is unknown.
            InputTooLargeError: a text does not fit alone; what was finished is in its ``partial``.
        """
        call = self._call(options)
        texts = inputs.check_texts(texts)
        rows, report = self._run(texts, call.options, call.scaled, call.prepare)
        return call.finish(rows, report)

    def embed_chunks(self, document: str, spans: Sequence[tuple[int, int]], **options: Any) -> Array:
        """Late chunking: one embedding for each span of `document`, each of which has seen all of it: float32, (len(spans), dim).

        One forward over the whole document; then the model's own pooling and what follows it, over the tokens of each span. For
        models whose pooling is a mean.

        Args:
            spans: (start, stop) of each chunk, in characters of `document`; they may overlap, and need not cover it. A token
                belongs to the span that holds its last character.
            options: as for :meth:`run`; ``kind`` is ``"document"`` unless given.

        Raises:
            InputError: a span is out of range or holds no token, or the document has more tokens than the model reads at once.
            ConfigError: the model's pooling is no mean, or it shows no tokens.
        """
        call, checked = self._chunks(document, spans, options)
        if not checked:
            return np.empty((0, self.dimension), dtype=np.float32)
        text, prepare = [str.__str__(document)], prepare_chunks(checked)
        rows, report = self._run(text, call.options, lambda rows: _one_each(rows, len(checked)), prepare)
        return call.finish(_one_each(rows, len(checked)), report).embeddings

    async def aembed_chunks(self, document: str, spans: Sequence[tuple[int, int]], **options: Any) -> Array:
        """:meth:`embed_chunks` for asyncio."""
        call, checked = await in_thread(self._chunks, document, spans, options)
        if not checked:
            return np.empty((0, self.dimension), dtype=np.float32)
        text, prepare = [str.__str__(document)], prepare_chunks(checked)
        rows, report = await self._arun(text, call.options, lambda rows: _one_each(rows, len(checked)), prepare)
        return (await in_thread(call.finish, _one_each(rows, len(checked)), report)).embeddings

    def _chunks(self, document: Any, spans: Any, options: dict[str, Any]) -> tuple[_Call, list[tuple[int, int]]]:
        """The call and the spans, checked."""
        call = self._call({"kind": "document", **options})
        if not isinstance(document, str):
            raise InputError(f"document: got a {type(document).__name__}; give one str", index=None)
        checked = check_spans(spans, len(document))
        self._check_mean()
        return call, checked

    def _check_mean(self) -> None:
        from memsafe.models import sbert

        modes = sbert.pooling_modes(self.model)
        if modes != ["mean"]:
            raise ConfigError(
                f"embed_chunks: the model's pooling is {' and '.join(modes) or 'none that is known'}, and only a mean can be taken over a "
                "part of a text; embed the chunks themselves with embed_documents"
            )

    # the same, without blocking an event loop; cancelling the task cancels the work

    async def aembed_documents(self, texts: Sequence[str], **options: Any) -> Array:
        """:meth:`embed_documents` for asyncio."""
        return (await self.arun(texts, kind="document", **options)).embeddings

    async def aembed_queries(self, texts: Sequence[str], **options: Any) -> Array:
        """:meth:`embed_queries` for asyncio."""
        return (await self.arun(texts, kind="query", **options)).embeddings

    async def arun(self, texts: Sequence[str], **options: Any) -> EmbeddingRun:
        """:meth:`run` for asyncio."""
        call = self._call(options)
        texts = inputs.check_texts(texts)
        rows, report = await self._arun(texts, call.options, call.scaled, call.prepare)
        return await in_thread(call.finish, rows, report)

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        return self._width(self._kept_dim())

    def _kept_dim(self) -> int | None:
        """How many leading dimensions a call keeps that says nothing of it: as given here, or else as the model has it saved."""
        return self._truncate_dim or getattr(self.model, "truncate_dim", None)

    def _width(self, kept: int | None) -> int:
        """Of a row of which `kept` dimensions are kept."""
        model = self.model
        own = getattr(model, "truncate_dim", None)
        if kept is not None and own is not None and kept > own:  # the model tells the lesser of its two only
            return int(self.run(["a"], truncate_dim=kept).embeddings.shape[1])
        name = (
            "get_embedding_dimension"
            if hasattr(model, "get_embedding_dimension")
            else "get_sentence_embedding_dimension"
        )
        width = getattr(model, name)()
        width = int(width) if width is not None else int(self.embed_documents(["a"]).shape[1])
        return width if kept is None else min(width, kept)

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that the model saved, by name."""
        return dict(getattr(self.model, "prompts", None) or {})

    def identity(self, **options: Any) -> dict[str, Any]:
        """What decides the rows of a call with these options of :meth:`run`, beside the texts; ready for JSON.

        Two embedders with equal identities give the same rows (to rounding: device and libraries are not part of it), so rows
        may be kept under it. ``model`` is a digest of what the model holds, so that a folder that moves stays the same model
        and one that is trained further does not; ``dimension``: of a row.
        """
        call = self._call(options)
        return {
            **identity_of(self, call.options),
            "normalize": bool(call.normalize),
            "precision": call.precision,
            "dimension": self._width(call.truncate_dim),
        }

    def _call(self, options: dict[str, Any]) -> _Call:
        given = options.pop("normalize", None), _check_dim(options.pop("truncate_dim", None))
        normalize = self._normalize if given[0] is None else given[0]
        precision = options.pop("precision", "float32")
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: got {precision!r}; choose from {', '.join(PRECISIONS)}")
        options.setdefault("show_progress", None)
        if options["show_progress"] is None:
            options["show_progress"] = self._show_progress
        return _Call(self, Options.of(options, self._model_options), normalize, given[1], precision)


@dataclass(frozen=True)
class _Call:
    """What a call wants done to the model's rows."""

    embedder: Embedder
    options: Options
    normalize: bool | None
    given_dim: int | None
    precision: str

    @property
    def truncate_dim(self) -> int | None:
        """How many leading dimensions are kept; asked once there are rows, since the model may have to be loaded for it."""
        return self.embedder._kept_dim() if self.given_dim is None else self.given_dim

    def finish(self, rows: Array | None, report: RunReport) -> EmbeddingRun:
        if rows is None:
            rows = np.empty((0, self.embedder._width(self.truncate_dim)), dtype=np.float32)
        rows = self.scaled(rows)
        if self.precision != "float32" and len(rows):
            rows = _quantize(rows, self.precision)
        return EmbeddingRun(np.ascontiguousarray(rows), report)

    @property
    def prepare(self) -> Prepare | None:
        """Windows of long texts; None where they are cut."""
        long = self.embedder._long
        if long is None:
            return None
        from memsafe.models import sbert

        normalises = sbert.normalises(self.embedder.model)

        def fold(rows: Array, owners: Array, tokens: Array) -> Array:
            found = weighted(rows, owners, tokens)
            several = np.bincount(owners) > 1
            if normalises:
                found[several] = _of_length_one(found[several])
            return found

        return long.prepare(fold)

    def scaled(self, rows: Array) -> Array:
        """`rows` with the leading dimensions and the length that were asked for, float32."""
        if self.truncate_dim is not None:
            rows = rows[:, : self.truncate_dim]
        if self.normalize and len(rows):
            rows = _of_length_one(rows)
        return rows


def _one_each(rows: Array, chunks: int) -> Array:
    """The row of a document, shape (1, chunks * dim), as (chunks, dim)."""
    return rows.reshape(chunks, -1)


def _of_length_one(rows: Array) -> Array:
    """As torch.nn.functional.normalize(rows, p=2, dim=1), which sentence-transformers uses: eps 1e-12."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12)))


def _quantize(rows: Array, precision: str) -> Array:
    try:
        from sentence_transformers.util import quantize_embeddings
    except ImportError:  # before sentence-transformers 5.3
        from sentence_transformers.quantization import quantize_embeddings
    return np.asarray(quantize_embeddings(rows, precision=precision))


def _check_dim(truncate_dim: Any) -> int | None:
    if truncate_dim is None:
        return None
    if isinstance(truncate_dim, bool) or not isinstance(truncate_dim, int) or truncate_dim < 1:
        raise ConfigError(f"truncate_dim: got {truncate_dim!r}; give an int of at least 1, or None for all dimensions")
    return truncate_dim
