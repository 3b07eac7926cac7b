"""Shared by the tests of the LlamaIndex adapter: both classes on the same model, and recorders of what they emit."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler

from llama_index_memsafe import MemsafeEmbedding, MemsafeRerank
from memsafe import Embedder, Reranker
from tests.tiny_models import save_embedder, save_reranker

# The node parser and the token counter would fetch this file; llama-index-core carries it. Child processes inherit it.
os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache")

OURS = ("class_name", "dtype", "encode_kwargs", "parity", "prompts", "query_encode_kwargs", "revision", "truncate_dim")
"""What events may show beside upstream's fields, where llama-index-core is so old that it shows all fields."""

QUERY, DOCUMENT = "SAVED QUERY: ", "SAVED DOCUMENT: "
TEXTS = [f"text number {n}: " + "a river crosses the plain " * (n % 7) for n in range(23)]


class Log:
    """What one object emitted: ``events`` (instrumentation) and ``callbacks``, each as (name, summary) in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any]] = []
        self.objects: list[Any] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.entries]


class _Callbacks(BaseCallbackHandler):
    def __init__(self, log: Log) -> None:
        super().__init__([], [])
        self.log = log
        self.open: list[str] = []

    def on_event_start(self, event_type: Any, payload: Any = None, event_id: str = "", **kwargs: Any) -> str:
        self.open.append(event_id)
        self.log.entries.append((f"start {event_type.value}", summarise(payload)))
        self.log.objects.append(payload)
        return event_id

    def on_event_end(self, event_type: Any, payload: Any = None, event_id: str = "", **kwargs: Any) -> None:
        self.open.remove(event_id)
        self.log.entries.append((f"end {event_type.value}", summarise(payload)))
        self.log.objects.append(payload)

    def start_trace(self, trace_id: str | None = None) -> None:
        return None

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None:
        return None


class _Events(BaseEventHandler):
    log: Any

    def handle(self, event: Any, **kwargs: Any) -> None:
        content = {name: getattr(event, name) for name in type(event).model_fields}
        for name in ("timestamp", "id_", "span_id", "tags"):
            content.pop(name)
        self.log.entries.append((event.class_name(), summarise(content)))
        self.log.objects.append(event)


def summarise(content: Any) -> Any:
    """A payload without what differs between any two runs: keys, texts and counts stay; vectors become their sizes."""
    if content is None:
        return None
    summary = {}
    for key, value in content.items():
        name = getattr(key, "value", key)
        if name == "embeddings":
            value = [len(vector) for vector in value]
        elif name in ("nodes",):
            value = [node.node.node_id for node in value]
        elif name in ("serialized", "model_dict"):
            value = {k: v for k, v in value.items() if k not in OURS}
        elif name == "exception":
            value = "exception"
        elif name in ("span_id", "err_str"):
            value = name
        summary[name] = value
    return summary


@contextmanager
def recorded(*models: Any) -> Iterator[Log]:
    """Record everything `models` emit inside the block, in one order; at its end no callback may be open."""
    log = Log()
    callbacks, events = _Callbacks(log), _Events(log=log)
    before = [model.callback_manager for model in models]
    root = get_dispatcher()
    root.add_event_handler(events)
    for model in models:
        model.callback_manager = CallbackManager([callbacks])
    try:
        yield log
    finally:
        root.event_handlers.remove(events)
        for model, manager in zip(models, before, strict=True):
            model.callback_manager = manager
    assert callbacks.open == []


class CoreCalls(list[int]):
    """How many inputs each call of the core had; ``options`` holds the keyword arguments beside."""

    def __init__(self) -> None:
        super().__init__()
        self.options: list[dict[str, Any]] = []


@pytest.fixture
def core_calls(monkeypatch: pytest.MonkeyPatch) -> CoreCalls:
    """Every call that an adapter makes of Embedder or Reranker, in order, while the real thing runs."""
    calls = CoreCalls()
    inside: ContextVar[bool] = ContextVar("inside", default=False)

    async def marked(awaitable: Any) -> Any:
        token = inside.set(True)
        try:
            return await awaitable
        finally:
            inside.reset(token)

    def watch(kind: type, name: str, position: int) -> None:
        original = getattr(kind, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            if inside.get():  # the core calling itself, from whatever thread
                return original(self, *args, **options)
            calls.append(len(args[position]))
            calls.options.append(options)
            token = inside.set(True)
            try:
                result = original(self, *args, **options)
            finally:
                inside.reset(token)
            return marked(result) if inspect.isawaitable(result) else result

        monkeypatch.setattr(kind, name, call)

    watch(Embedder, "run", 0)
    watch(Embedder, "arun", 0)
    watch(Reranker, "rerank", 1)
    watch(Reranker, "arerank", 1)
    return calls


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random BERT with saved prompts and no Normalize module."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(save_embedder(folder, prompts={"query": QUERY, "document": DOCUMENT}))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random BERT without prompts."""
    return str(save_embedder(tmp_path_factory.mktemp("models") / "plain"))


@pytest.fixture(scope="session")
def tiny_cross(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random one-label cross-encoder."""
    return str(save_reranker(tmp_path_factory.mktemp("models") / "cross", max_length=512))


@pytest.fixture
def ours(plain: str) -> MemsafeEmbedding:
    return MemsafeEmbedding(plain, device="cpu")


@pytest.fixture
def reranker(tiny_cross: str) -> MemsafeRerank:
    return MemsafeRerank(tiny_cross, device="cpu", top_n=3)


@pytest.fixture(scope="session")
def make_pair(minilm: str) -> Callable[..., tuple[Any, MemsafeEmbedding]]:
    """Upstream's embedding and ours with the same arguments, MiniLM unless told; kept for the session."""
    known: dict[str, tuple[Any, MemsafeEmbedding]] = {}

    def make(model: str = minilm, **options: Any) -> tuple[Any, MemsafeEmbedding]:
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding

        key = repr((model, sorted(options.items(), key=str)))
        if key not in known:
            options.setdefault("device", "cpu")
            known[key] = HuggingFaceEmbedding(model, **options), MemsafeEmbedding(model, **options)
        return known[key]

    return make


def exchange(text: str) -> str:
    """`text` with the names of the classes made the same, to compare messages."""
    return text.replace("MemsafeEmbedding", "X").replace("HuggingFaceEmbedding", "X")
