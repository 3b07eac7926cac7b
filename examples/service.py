"""Embedding and reranking over HTTP, for clients of Hugging Face's text-embeddings-inference (TEI), of OpenAI and of Cohere.

python examples/service.py [--model FOLDER_OR_ID] [--reranker FOLDER_OR_ID] [--host 127.0.0.1] [--port 8080]

Needs ``pip install fastapi uvicorn``. POST /embed, POST /rerank, GET /info, GET /health, as TEI has them; POST / is /embed,
where huggingface_hub's InferenceClient sends its requests; POST /v1/embeddings and POST /v2/rerank (service_apis.py). An
example, not a server: no authentication, so it listens on this machine only unless told otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from memsafe import (
    BusyError,
    ClosedError,
    Embedder,
    InputTooLargeError,
    MemoryPolicy,
    MemsafeError,
    Reranker,
    __version__,
)

sys.path.insert(0, str(Path(__file__).parent))  # wherever this is run or imported from
from service_apis import add_routes, refusal


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: more is refused with 413, before anything is computed."""

    inputs: int = 1024
    chars: int = 1_000_000
    body_bytes: int = 4_000_000
    pending: int = 20_000
    """Inputs that may wait in all; more is refused with 429."""


class EmbedRequest(BaseModel):
    """TEI's request. truncate: False refuses texts that are longer than the model takes; otherwise they are cut."""

    inputs: str | Annotated[list[str], Field(min_length=1)]
    truncate: bool | None = None
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


class RerankRequest(BaseModel):
    query: str
    texts: Annotated[list[str], Field(min_length=1)]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None


class TooLarge(Exception):
    """A request beyond the limits."""


def make_app(
    embedder: Embedder | None, reranker: Reranker | None, limits: Limits = Limits(), *, model_id: str = ""
) -> FastAPI:
    """The service over loaded models, which it closes when it ends: after the requests in progress."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for model in (embedder, reranker):
            if model is not None:
                await asyncio.to_thread(model.close)

    app = FastAPI(title="memsafe", version=__version__, lifespan=lifespan)

    @app.post("/embed")
    @app.post("/")
    async def embed(request: EmbedRequest) -> Response:
        if embedder is None:
            raise ValueError("no embedding model is served here")
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        check(texts, limits)
        # one text is most likely a user's question, who is waiting: it goes before documents
        kind = "query" if len(texts) == 1 else "document"
        # as TEI: no prompt but the one that is asked for
        prompt = {"prompt_name": request.prompt_name} if request.prompt_name else {"prompt": ""}
        run = await embedder.arun(
            texts, kind=kind, normalize=request.normalize, truncate_dim=request.dimensions, **prompt
        )
        if request.truncate is False and run.report.truncated:
            raise TooLarge(f"{run.report.truncated} of the inputs have more than {embedder.max_length} tokens")
        body = await asyncio.to_thread(lambda: json.dumps(run.embeddings.tolist()).encode())
        return Response(body, media_type="application/json")

    @app.post("/rerank")
    async def rerank(request: RerankRequest) -> list[dict[str, Any]]:
        if reranker is None:
            raise ValueError("no reranker is served here")
        check([request.query, *request.texts], limits)
        options = {"activation_fn": _as_it_is} if request.raw_scores else {}
        pairs = [(request.query, text) for text in request.texts]
        run = await reranker.arun(pairs, kind="query", **options)
        if request.truncate is False and run.report.truncated:
            raise TooLarge(f"{run.report.truncated} of the inputs have more than {reranker.max_length} tokens")
        best = (-run.scores).argsort(kind="stable").tolist()
        text = (lambda i: {"text": request.texts[i]}) if request.return_text else (lambda i: {})
        return [{"index": i, "score": float(run.scores[i]), **text(i)} for i in best]

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({})

    @app.get("/info")
    async def info() -> dict[str, Any]:
        served = embedder if embedder is not None else reranker
        return {
            "model_id": model_id,
            "model_type": {"embedding": {}} if embedder is not None else {"reranker": {}},
            "max_input_length": served.max_length if served is not None else None,
            "max_client_batch_size": limits.inputs,
            "version": __version__,
        }

    add_routes(app, embedder, reranker, model_id, lambda texts: check(texts, limits))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return refuse(request.url.path, 422, "Validation", f"{where}: {first['msg']}")

    @app.exception_handler(TooLarge)
    async def too_large(request: Request, error: TooLarge) -> JSONResponse:
        return refuse(request.url.path, 413, "Validation", str(error))

    @app.exception_handler(ValueError)
    async def unusable(request: Request, error: ValueError) -> JSONResponse:
        return refuse(request.url.path, 422, "Validation", str(error))

    @app.exception_handler(MemsafeError)
    async def failed(request: Request, error: MemsafeError) -> JSONResponse:
        path = request.url.path
        if isinstance(error, ValueError):  # an input or an option that cannot be used
            return refuse(path, 422, "Validation", str(error))
        if isinstance(error, BusyError):
            return refuse(path, 429, "Overloaded", "Model is overloaded")
        if isinstance(error, InputTooLargeError):
            return refuse(path, 507, "Backend", str(error))
        return refuse(path, 503 if isinstance(error, ClosedError) else 500, "Backend", str(error))

    app.add_middleware(BodyLimit, body_bytes=limits.body_bytes)
    return app


class BodyLimit:
    """Refuses bodies beyond the limit, by their announced length or, if none is announced, as soon as they pass it."""

    def __init__(self, app: Callable[..., Awaitable[None]], body_bytes: int) -> None:
        self._app = app
        self._most = body_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body, more = bytearray(), True
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = announced.isdigit() and int(announced) > self._most
        while more and not too_large:
            message = await _received(receive)
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more, too_large = message.get("more_body", False), len(body) > self._most
        if too_large:
            refused = refuse(scope["path"], 413, "Validation", f"the body is larger than {self._most:,} bytes")
            refused.headers["connection"] = "close"  # what is left of the body is not read
            return await refused(scope, receive, send)
        return await _serve_while_connected(self._app, scope, bytes(body), receive, send)


_GONE = {"type": "http.disconnect"}


async def _received(receive: Any) -> dict[str, Any]:
    """The next message of the client; a connection that was closed a moment ago has one, too."""
    try:
        return dict(await receive())
    except (RuntimeError, OSError) as error:
        if not _is_closed(error):
            raise
        return dict(_GONE)


def _is_closed(error: Exception) -> bool:
    """Whether `error` says that the client's connection was closed; uvloop's is "unable to perform operation on <TCPTransport
    closed=True ...>; the handler is closed"."""
    return isinstance(error, OSError) or "handler is closed" in str(error)


async def _serve_while_connected(app: Any, scope: Any, body: bytes, receive: Any, send: Any) -> None:
    """Run `app` on a request whose body is here; a client that goes away takes its waiting work with it."""
    whole: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    gone, answered = asyncio.ensure_future(_received(receive)), False  # after the body there is only the end to come

    async def receive_body() -> Any:
        return whole.pop() if whole else await asyncio.shield(gone)

    async def send_on(message: dict[str, Any]) -> None:
        nonlocal answered
        answered = message["type"] == "http.response.body" and not message.get("more_body", False)
        try:
            await send(message)
        except (RuntimeError, OSError) as error:  # the client hung up in the middle, and uvicorn is about to hear of it
            if not gone.done() and not _is_closed(error):
                raise
            await asyncio.wait({gone}, timeout=1)

    work = asyncio.ensure_future(app(scope, receive_body, send_on))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and not answered:
            work.cancel()  # cancels the embedder's or reranker's call: its places in the queue are free at once
        with suppress(asyncio.CancelledError):
            await work
    finally:
        work.cancel()
        gone.cancel()


def check(texts: list[str], limits: Limits) -> None:
    if len(texts) > limits.inputs:
        raise TooLarge(f"batch size {len(texts)} > maximum allowed batch size {limits.inputs}")
    if sum(map(len, texts)) > limits.chars:
        raise TooLarge(f"the texts of a request may have {limits.chars:,} characters in all")


def refuse(path: str, status: int, kind: str, message: str) -> JSONResponse:
    """An error in the form of the API that `path` belongs to; `kind` is TEI's word."""
    tei = JSONResponse({"error": message, "error_type": kind}, status_code=status)
    return refusal(path, status, message) or tei


def _as_it_is(scores: Any) -> Any:
    return scores


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Embedding and reranking over HTTP, as TEI, OpenAI and Cohere do it.")
    parser.add_argument("--model", help="folder or hub id; without one: a packaged MiniLM")
    parser.add_argument("--reranker", help="folder or hub id; without one: a small demo reranker")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args(arguments)
    if options.model is None or options.reranker is None:
        from models import demo_reranker, minilm

        options.model = options.model or minilm()
        options.reranker = options.reranker or demo_reranker()
    limits = Limits()
    policy = MemoryPolicy(max_pending=limits.pending, on_full="raise")
    app = make_app(
        Embedder(options.model, memory=policy),
        Reranker(options.reranker, memory=policy),
        limits,
        model_id=options.model,
    )
    # on Ctrl-C or SIGTERM uvicorn takes no new requests, finishes those in progress, then ends the lifespan above
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
