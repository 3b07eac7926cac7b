"""examples/service.py for OpenAI's and Cohere's clients, their errors, and clients that hang up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from memsafe import BusyError, Embedder, MemoryPolicy, Reranker
from memsafe.testing import SimulatedDevice, SimulatedEmbedder, SimulatedReranker

pytest.importorskip("fastapi", reason="the service needs fastapi")
pytest.importorskip("uvicorn", reason="the service needs uvicorn")
pytest.importorskip("httpx", reason="the tests speak HTTP with httpx")

from examples.service import BodyLimit, Limits, make_app
from tests.service.test_service import TEXTS, Server, ask
from tests.tiny_models import save_embedder, save_reranker


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Embedder, Reranker]]:
    home = tmp_path_factory.mktemp("tiny")
    folder, pairs = save_embedder(home / "model", num_layers=1), save_reranker(home / "pairs", num_layers=1)
    with Embedder(folder, device="cpu") as embedder, Reranker(pairs, device="cpu") as reranker:
        yield embedder, reranker


@pytest.fixture(scope="module")
def url(models: tuple[Embedder, Reranker]) -> Iterator[str]:
    server = Server(make_app(*models, Limits(inputs=20), model_id="tiny"))
    yield server.url
    server.ask_to_stop()
    server.join()


def test_openai(url: str, models: tuple[Embedder, Reranker]) -> None:
    """The official client, sync and async: one text, several, floats and base64, fewer dimensions, usage."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    run = models[0].run(TEXTS, prompt="", normalize=True)
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="any", input=TEXTS, **options)
        rows = [_decoded(each.embedding) for each in answer.data]
        np.testing.assert_allclose(rows, run.embeddings, rtol=0, atol=1e-6)
        assert [each.index for each in answer.data] == [0, 1, 2, 3] and answer.model == "tiny"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == run.report.tokens > 0
    one = client.embeddings.create(model="any", input=TEXTS[1], dimensions=8)
    wanted = models[0].run([TEXTS[1]], prompt="", normalize=True, truncate_dim=8).embeddings
    np.testing.assert_allclose([each.embedding for each in one.data], wanted, rtol=0, atol=1e-6)

    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused") as client:
            return await client.embeddings.create(model="any", input=TEXTS)

    np.testing.assert_allclose([each.embedding for each in asyncio.run(main()).data], run.embeddings, rtol=0, atol=1e-6)
    for wrong, match in (
        ([1, 2, 3], "token ids"),
        ([[1, 2], [3]], "token ids"),
        ([], "empty"),
        (["a"] * 21, "batch size 21"),
    ):
        with pytest.raises(openai.BadRequestError, match=match):
            client.embeddings.create(model="any", input=wrong)


def _decoded(embedding: Any) -> Any:
    """What the client leaves to us where base64 was asked for by name."""
    import base64

    return np.frombuffer(base64.b64decode(embedding), "<f4") if isinstance(embedding, str) else embedding


def test_cohere(url: str, models: tuple[Embedder, Reranker]) -> None:
    """The official client, sync and async: indices and scores of the best, and its own class of errors."""
    cohere = pytest.importorskip("cohere", reason="cohere is not installed")
    client = cohere.ClientV2(api_key="unused", base_url=url)
    wanted = models[1].rerank("what is a heap", TEXTS)
    for top_n in (None, 2):
        answer = client.rerank(model="any", query="what is a heap", documents=TEXTS, top_n=top_n)
        assert [each.index for each in answer.results] == [each.index for each in wanted[:top_n]]
        scores = [each.relevance_score for each in answer.results]
        np.testing.assert_allclose(scores, [each.score for each in wanted[:top_n]], rtol=0, atol=1e-6)

    async def main() -> Any:
        client = cohere.AsyncClientV2(api_key="unused", base_url=url)
        return await client.rerank(model="any", query="what is a heap", documents=TEXTS)

    assert [each.index for each in asyncio.run(main()).results] == [each.index for each in wanted]
    for wrong in ({"documents": []}, {"documents": ["a"] * 20}, {"documents": TEXTS, "max_tokens_per_doc": 3}):
        with pytest.raises(cohere.BadRequestError) as caught:
            client.rerank(model="any", query="q", **wrong)
        assert set(caught.value.body) == {"message"}


@pytest.fixture
def app() -> Iterator[Any]:
    """A service with simulated models and tight limits."""
    device = SimulatedDevice("512MiB")
    policy = MemoryPolicy(reserve=0, wait_s=0, fallback=(), max_pending=8, on_full="raise")
    with SimulatedEmbedder(device, memory=policy) as embedder, SimulatedReranker(device, memory=policy) as reranker:
        made = make_app(embedder, reranker, Limits(body_bytes=150_000))
        made.state.embedder, made.state.reranker, made.state.device = embedder, reranker, device
        yield made


def test_errors_have_the_form_of_their_api(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's `error` with message and type, Cohere's `message`, TEI's own: too large, malformed, overloaded, out of memory, gone."""
    assert _error(ask(app, "/v1/embeddings", json={"model": "m"})) == (400, "invalid_request_error")
    assert _error(ask(app, "/v1/embeddings", json={"input": "a", "dimensions": 0})) == (400, "invalid_request_error")
    assert _error(ask(app, "/v1/embeddings", content=b"a" * 200_000)) == (400, "invalid_request_error")
    for body in ({"query": "q"}, {"query": "q", "documents": ["a"], "top_n": 0}):
        refused = ask(app, "/v2/rerank", json=body)
        assert refused.status_code == 400 and set(refused.json()) == {"message"}
    assert ask(app, "/embed", json={}).json()["error_type"] == "Validation"
    app.state.device.take("370MiB")  # a neighbour
    large = ask(app, "/v1/embeddings", json={"input": ["fine", "w " * 8_000]})
    assert _error(large) == (507, "server_error") and large.headers["x-should-retry"] == "false"
    for model, method in ((app.state.embedder, "arun"), (app.state.reranker, "arerank")):
        monkeypatch.setattr(model, method, _busy)
    assert _error(ask(app, "/v1/embeddings", json={"input": "a"})) == (429, "rate_limit_error")
    refused = ask(app, "/v2/rerank", json={"query": "q", "documents": ["a"]})
    assert refused.status_code == 429 and set(refused.json()) == {"message"}
    monkeypatch.undo()
    app.state.embedder.close()
    assert _error(ask(app, "/v1/embeddings", json={"input": "late"})) == (503, "server_error")


async def _busy(*args: Any, **options: Any) -> None:
    raise BusyError("900 inputs wait already")


def _error(answer: Any) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return answer.status_code, error["type"]


# clients that hang up: uvloop's words, as they were seen in the log
CLOSED = "unable to perform operation on <TCPTransport closed=True reading=False 0x7f>; the handler is closed"


@pytest.mark.parametrize("when", ["body", "waiting", "answer"])
@pytest.mark.parametrize("error", [RuntimeError(CLOSED), ConnectionResetError("gone")], ids=["uvloop", "asyncio"])
def test_a_client_that_hangs_up_leaves_no_traceback(when: str, error: Exception) -> None:
    """In the middle of its request, while it waits, in the middle of the answer: the application ends without an exception."""
    sent: list[str] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if when == "waiting":
            await asyncio.sleep(60)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def main() -> None:
        bodies = [{"type": "http.request", "body": b"{}", "more_body": when == "body"}]
        hung_up = asyncio.Event()

        async def receive() -> Any:
            if bodies:
                return bodies.pop()
            if when == "answer":
                await hung_up.wait()
            raise error

        async def send(message: Any) -> None:
            sent.append(message["type"])
            asyncio.get_running_loop().call_soon(hung_up.set)
            raise error

        scope = {"type": "http", "path": "/embed", "headers": []}
        await asyncio.wait_for(BodyLimit(answer, 100)(scope, receive, send), 20)

    asyncio.run(main())
    assert sent == (["http.response.start"] if when == "answer" else [])


def test_other_errors_of_the_server_are_not_hidden() -> None:
    """What is no client hanging up is raised."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def main() -> None:
        bodies = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Any:
            return bodies.pop() if bodies else await asyncio.sleep(60)

        async def send(message: Any) -> None:
            raise RuntimeError("Response content longer than Content-Length")

        await BodyLimit(answer, 100)({"type": "http", "path": "/", "headers": []}, receive, send)

    with pytest.raises(RuntimeError, match="longer than"):
        asyncio.run(main())
