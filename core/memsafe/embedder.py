"""Texts to embeddings: tokenise, plan, run, in the caller's order. Start reading memsafe here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe import inputs
from memsafe.calls import Model, Options, in_thread
from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError
from memsafe.events import EventHook, RunReport

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
            if any; or ``"float32"``, ``"float16"``, ``"bfloat16"``.
        max_length: tokens after which texts are cut; None as the model says.
        normalize: True scales rows to length 1; None and False leave them as the model makes them.
        truncate_dim: keep only so many leading dimensions.
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
        max_length: int | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
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
            "max_length": max_length,
            "normalize": normalize,
            "truncate_dim": truncate_dim,
            "memory": memory,
            "hooks": hooks,
            "show_progress": show_progress,
        }
        truncate_dim = _check_dim(truncate_dim)
        if truncate_dim is not None and isinstance(model, (str, os.PathLike)):
            options["truncate_dim"] = truncate_dim  # so that the model itself tells the width that users will get
        super().__init__(model, device, dtype=dtype, max_length=max_length, memory=memory, hooks=hooks, options=options)
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
            show_progress: a tqdm bar; progress: called with the number of texts just finished.
            Whatever else the model's own modules take in ``encode``, such as ``task`` (see ``get_model_kwargs()``), goes to them.

        Raises:
            InputError: a text is not a str, with its index. ConfigError: an option is unknown.
            InputTooLargeError: a text does not fit alone; what was finished is in its ``partial``.
        """
        call = self._call(options)
        texts = inputs.check_texts(texts)
        rows, report = self._run(texts, call.options, call.scaled)
        return call.finish(rows, report)

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
        rows, report = await self._arun(texts, call.options, call.scaled)
        return await in_thread(call.finish, rows, report)

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        model = self.model
        name = (
            "get_embedding_dimension"
            if hasattr(model, "get_embedding_dimension")
            else "get_sentence_embedding_dimension"
        )
        width = getattr(model, name)()
        width = int(width) if width is not None else int(self.embed_documents(["a"]).shape[1])
        return width if self._truncate_dim is None else min(width, self._truncate_dim)

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
        from memsafe.models import sbert

        call = self._call(options)
        given, model = call.options, self._engine.model
        try:
            prompt = sbert.resolve_prompt(self.model, given.prompt, given.prompt_name, given.kind)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        width = self.dimension
        return {
            "model": model.content,
            "dtype": model.dtype_name,
            "max_length": self.max_length,
            "kind": given.kind,
            "prompt": prompt or "",
            "model_options": {name: str(value) for name, value in sorted(given.model.items())},
            "normalize": bool(call.normalize),
            "precision": call.precision,
            "dimension": width if call.truncate_dim is None else min(width, call.truncate_dim),
        }

    def _call(self, options: dict[str, Any]) -> _Call:
        given = options.pop("normalize", None), _check_dim(options.pop("truncate_dim", None))
        normalize = self._normalize if given[0] is None else given[0]
        truncate_dim = self._truncate_dim if given[1] is None else given[1]
        precision = options.pop("precision", "float32")
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: got {precision!r}; choose from {', '.join(PRECISIONS)}")
        options.setdefault("show_progress", None)
        if options["show_progress"] is None:
            options["show_progress"] = self._show_progress
        return _Call(self, Options.of(options, self._model_options), normalize, truncate_dim, precision)


@dataclass(frozen=True)
class _Call:
    """What a call wants done to the model's rows."""

    embedder: Embedder
    options: Options
    normalize: bool | None
    truncate_dim: int | None
    precision: str

    def finish(self, rows: Array | None, report: RunReport) -> EmbeddingRun:
        if rows is None:
            width = self.embedder.dimension
            rows = np.empty(
                (0, width if self.truncate_dim is None else min(width, self.truncate_dim)), dtype=np.float32
            )
        rows = self.scaled(rows)
        if self.precision != "float32" and len(rows):
            rows = _quantize(rows, self.precision)
        return EmbeddingRun(np.ascontiguousarray(rows), report)

    def scaled(self, rows: Array) -> Array:
        """`rows` with the leading dimensions and the length that were asked for, float32."""
        if self.truncate_dim is not None:
            rows = rows[:, : self.truncate_dim]
        if self.normalize and len(rows):
            # as torch.nn.functional.normalize(rows, p=2, dim=1) does, which sentence-transformers uses: eps 1e-12
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
        return rows


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
