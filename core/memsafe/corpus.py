"""Corpora larger than memory: texts stream in, rows go to mapped files, a run that was killed goes on.

report = embed_corpus(embedder, "passages.jsonl", "passages.store")     # again after a crash: goes on
store = open_store("passages.store")
nearest = store.search(embedder.embed_queries(["which birds are tall?"]), k=5)

The embedder may be a SparseEmbedder or a MultiVectorEmbedder: rows, files and search are then of that kind.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from memsafe import inputs
from memsafe.calls import Model
from memsafe.corpus_run import CorpusRun
from memsafe.embedder import Embedder
from memsafe.errors import ConfigError, InputError
from memsafe.multi_vector import MultiVectorEmbedder
from memsafe.sparse import SparseEmbedder
from memsafe.stores.manifest import Header
from memsafe.stores.reader import Store, Verification, open_store
from memsafe.stores.reports import CorpusProgress, CorpusReport
from memsafe.stores.search import Neighbours
from memsafe.stores.sources import open_source, windows
from memsafe.stores.writer import StoreWriter, layout_of

__all__ = ["CorpusProgress", "CorpusReport", "Neighbours", "Store", "Verification", "embed_corpus", "open_store"]

_SHARD_BYTES = 1 << 30
_BLOCK_CHARS = 1 << 24


_KINDS = {"embedding": "dense", "sparse": "sparse", "multi_vector": "multi_vector"}
"""What a store's rows are, by what embedders call themselves."""
_NOT_OPTIONS = ("model", "dtype", "max_length", "dimension", "precision")
"""Of an identity: what the manifest keeps elsewhere."""


def embed_corpus(
    embedder: Embedder | SparseEmbedder | MultiVectorEmbedder,
    source: Any,
    path: str | os.PathLike[str],
    *,
    text: str = "text",
    id: str | None = None,
    kind: str | None = "document",
    dtype: str = "float32",
    update: bool = False,
    block_texts: int | None = None,
    shard_bytes: int = _SHARD_BYTES,
    fixed_tokens: int | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[CorpusProgress], None] | None = None,
    show_progress: bool = False,
    **options: Any,
) -> CorpusReport:
    """Embed all texts of `source` into a store at `path`, or go on with what an earlier run began there.

    Texts are read in blocks. While one is computed, longest text first, the next is read and tokenised and the last one
    written: rows, digests of the texts and ids to the files, those to the disk, then the block's line to the manifest. A run
    that ends in the middle, however it does, loses the blocks in progress and nothing else. The same call again reads the
    source from the start, compares what it reads with the digests of what is finished, and goes on behind that.

    What is computed together depends on the block's texts alone, so a store that was gone on with is the same, byte for byte,
    as one that was made in one go: with the same source and arguments, on the same device with the same libraries, as long as
    memory suffices for micro-batches of `fixed_tokens` tokens.

    Args:
        embedder: its rows are what the store holds: dense ones, sparse ones, or a vector for every token.
        source: an iterable of texts, of (id, text) or of dicts; the path of a ``.jsonl``, ``.txt`` (a text a line; both may be
            gzipped), ``.parquet``, ``.arrow`` or ``.feather`` file; a folder of text files (ids are their paths); an Arrow table or
            reader; a Hugging Face Dataset. It is read once and must give the same texts in the same order if a run is to go on.
        path: a folder, made if it is missing; an empty one or a store's.
        text, id: names of the fields or columns. Ids are str or int and differ from each other; without them a row goes by
            its position. None: ``"id"`` if there is such a field.
        kind: ``"document"``, ``"query"`` or None: as in :meth:`Embedder.run`.
        dtype: of the rows on the disk, ``"float32"`` or ``"float16"``.
        update: the source has changed: make the store anew, taking the rows of texts that it has already (same model, same
            options), computing the others, dropping what is gone. The old store stays as it is until the new one is complete,
            and needs room beside it meanwhile. Looking up takes 17 bytes of memory a row.
        block_texts: texts in a block, None for 1,024 on a CPU and 8,192 elsewhere; at most 16 Mi characters (then the text
            with which they are reached is the last).
        shard_bytes: about how large a file of rows gets.
        fixed_tokens: of one micro-batch; None for ``MemoryPolicy.max_tokens``, or what suits the device. See :meth:`Embedder.run`.
        stop: asked between blocks; once it says True, the block in progress is finished and no other is begun.
        progress: called with a :class:`CorpusProgress` after every micro-batch, from a worker's thread, and after every block.
        show_progress: a tqdm bar.
        options: others of :meth:`Embedder.run`: prompt, prompt_name, normalize, truncate_dim, urgent, max_rows, ``task`` and so on.

    Returns:
        A :class:`CorpusReport`; ``complete`` is False if `stop` ended it.

    Raises:
        InputError: an entry, a line or a file cannot be used, two ids are equal, there is none, or it changed while it was read;
            ``index`` is its position. StoreError: the store was made of another source, by another model or with other options
            (``differences``), is being written by another process, or cannot be written. ConfigError: an option is unknown.
            InputTooLargeError: a text does not fit alone. Whichever it is, finished blocks stay.
    """
    kind_of_rows = _check(embedder, dtype, options)
    if kind_of_rows == "multi_vector":
        options["precision"] = "float32"  # dtype says what is kept
    started = time.perf_counter()
    folder = Path(path)
    opened = open_source(source, text, id)
    identity = embedder.identity(kind=kind, **options)
    layout = _layout(embedder, folder, block_texts, shard_bytes, fixed_tokens, update=update)
    reading = windows(opened, layout["block_texts"], layout["block_chars"])
    first = next(reading, None)
    if first is None:
        raise InputError(f"source: empty; there is nothing to embed ({opened.description})", index=None)
    header = Header(
        folder="data-1",
        dtype=dtype,
        dimension=identity["dimension"],
        ids="positions" if first.ids is None else type(first.ids[0]).__name__,
        model={"content": identity["model"], "dtype": identity["dtype"], "max_length": identity["max_length"]},
        options={name: value for name, value in identity.items() if name not in _NOT_OPTIONS},
        source=opened.description,
        layout=layout,
        made_with=_made_with(embedder),
        kind=kind_of_rows,
    )
    with (
        StoreWriter(folder, header, shard_bytes=layout["shard_bytes"], update=update) as writer,
        inputs.progress_bar(opened.total or 0, show_progress, None, "text") as bar,
    ):
        run = CorpusRun(
            embedder,
            writer,
            opened,
            {"kind": kind, **options, "fixed_tokens": layout["fixed_tokens"], "show_progress": False, "warn": False},
            stop=stop,
            tell=_teller(progress, bar),
            started=started,
        )
        return run.go(chain([first], reading))


def _check(embedder: Any, dtype: str, options: Mapping[str, Any]) -> str:
    """What the rows will be."""
    kind = getattr(embedder, "_kind", None)
    if kind == "hybrid":
        raise ConfigError(
            "embedder: got a HybridEmbedder; a store holds rows of one kind: make one with Embedder, SparseEmbedder and "
            "MultiVectorEmbedder each"
        )
    if kind not in _KINDS:
        raise ConfigError(
            f"embedder: got a {type(embedder).__name__}; give an Embedder, SparseEmbedder or MultiVectorEmbedder"
        )
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"dtype: got {dtype!r}; choose 'float32' or 'float16'")
    for name in ("precision", "warn"):
        if name in options:
            raise ConfigError(f"{name}: not an option of a corpus; rows are kept as float32 or float16 (dtype)")
    return _KINDS[kind]


def _layout(
    embedder: Model,
    folder: Path,
    block_texts: int | None,
    shard_bytes: int,
    fixed_tokens: int | None,
    *,
    update: bool,
) -> dict[str, Any]:
    """How the corpus is cut: as it was asked for; what was not, as the store was begun, or as suits the device."""
    begun = (None if update else layout_of(folder)) or {}
    usual_texts, usual_tokens = embedder._engine.usual_block()
    layout = {
        "block_texts": block_texts if block_texts is not None else begun.get("block_texts", usual_texts),
        "block_chars": begun.get("block_chars", _BLOCK_CHARS),
        "shard_bytes": shard_bytes,
        "fixed_tokens": fixed_tokens if fixed_tokens is not None else begun.get("fixed_tokens", usual_tokens),
    }
    for name, value in layout.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: got {value!r}; give an int of at least 1")
    return layout


def _made_with(embedder: Model) -> dict[str, Any]:
    """For the reader of the manifest; a run that goes on need not share it."""
    model = embedder._engine.model
    versions = {name: importlib.import_module(name).__version__ for name in ("memsafe", "torch", "transformers")}
    return {
        **versions,
        "model": model.name,
        "revision": model.commit,
        "device": model.device.kind,
        "path": embedder.path,
    }


def _teller(
    progress: Callable[[CorpusProgress], None] | None, bar: Callable[[int], None] | None
) -> Callable[[CorpusProgress], None] | None:
    if bar is None:
        return progress
    shown = 0

    def tell(now: CorpusProgress) -> None:
        nonlocal shown
        if now.texts > shown:
            bar(now.texts - shown)
            shown = now.texts
        if progress is not None:
            progress(now)

    return tell
