"""OpenAI's POST /v1/embeddings and Cohere's POST /v2/rerank, for examples/service.py: their requests, answers and errors.

Token ids in the place of text are refused: those of another model's tokenizer would be read as other words. ``usage`` and
``prompt_tokens`` are the tokens that were computed: equal texts of a request once.
"""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from memsafe import Embedder, Reranker

__all__ = ["add_routes", "refusal"]

_TOKEN_IDS = (
    "input: token ids are those of one model's tokenizer, and which one is not said; send text (in LangChain's OpenAIEmbeddings: "
    "check_embedding_ctx_length=False)"
)


class EmbeddingsRequest(BaseModel):
    """OpenAI's request. model: any name; what is served is said in the answer."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class CohereRerankRequest(BaseModel):
    model: str = ""
    query: str
    documents: Annotated[list[str], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None


def add_routes(
    app: FastAPI,
    embedder: Embedder | None,
    reranker: Reranker | None,
    model_id: str,
    check: Callable[[list[str]], None],
) -> None:
    """Serve both. check: raises for texts beyond what a request may ask for."""

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingsRequest) -> Response:
        if embedder is None:
            raise ValueError("no embedding model is served here")
        texts = [request.input] if isinstance(request.input, str) else request.input
        if not texts:
            raise ValueError("input: got an empty list; send at least one text")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(_TOKEN_IDS)
        check(texts)
        # of length 1, and without a prompt, as OpenAI's; a single text goes before documents
        kind = "query" if len(texts) == 1 else "document"
        run = await embedder.arun(texts, kind=kind, prompt="", normalize=True, truncate_dim=request.dimensions)
        encode = _base64 if request.encoding_format == "base64" else _floats
        answer = {"object": "list", "model": model_id or request.model}
        answer["usage"] = {"prompt_tokens": run.report.tokens, "total_tokens": run.report.tokens}
        return await asyncio.to_thread(_answered, answer, run.embeddings, encode)

    @app.post("/v2/rerank")
    async def rerank(request: CohereRerankRequest) -> dict[str, Any]:
        if reranker is None:
            raise ValueError("no reranker is served here")
        cut = request.max_tokens_per_doc
        if cut is not None and (reranker.max_length is None or cut < reranker.max_length):
            raise ValueError(
                f"max_tokens_per_doc: got {cut}, but texts are cut where the model ends ({reranker.max_length} tokens of query "
                "and document); leave it out"
            )
        check([request.query, *request.documents])
        best = await reranker.arerank(request.query, request.documents, request.top_n)
        results = [{"index": each.index, "relevance_score": each.score} for each in best]
        return {"id": str(uuid.uuid4()), "results": results, "meta": {"api_version": {"version": "2"}}}


def _answered(answer: dict[str, Any], rows: Any, encode: Callable[[Any], Any]) -> Response:
    answer["data"] = [{"object": "embedding", "index": i, "embedding": encode(row)} for i, row in enumerate(rows)]
    return Response(json.dumps(answer).encode(), media_type="application/json")


def _floats(row: Any) -> list[float]:
    return row.tolist()


def _base64(row: Any) -> str:
    """float32, little-endian, as OpenAI's clients read it."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def refusal(path: str, status: int, message: str) -> JSONResponse | None:
    """An error in the form of the API that `path` belongs to; None for neither.

    Both say 400 to whatever is wrong with a request, its size included.
    """
    openai, cohere = path.startswith("/v1/"), path.startswith("/v2/")
    if not openai and not cohere:
        return None
    said = 400 if status in (413, 422) else status
    # a text that does not fit will not fit in a second either
    headers = {"x-should-retry": "false"} if said == 507 else None
    if cohere:
        return JSONResponse({"message": message}, said, headers)
    kind = "invalid_request_error" if said == 400 else "rate_limit_error" if said == 429 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, said, headers)
