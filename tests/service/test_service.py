"""examples/service.py: what clients of text-embeddings-inference get from it, and what it refuses."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsafe import ClosedError, Embedder, MemoryPolicy, Reranker
from memsafe.testing import SimulatedDevice, SimulatedEmbedder, SimulatedReranker

fastapi = pytest.importorskip("fastapi", reason="the service needs fastapi")
uvicorn = pytest.importorskip("uvicorn", reason="the service needs uvicorn")
httpx = pytest.importorskip("httpx", reason="the tests speak HTTP with httpx")

from examples.service import Limits, make_app  # noqa: E402 - after the packages it needs
from tests.concurrency.helpers import before_encoding  # noqa: E402 - likewise

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Sorted inputs are merged lazily.", "A heap keeps its smallest item first.", "Sockets carry bytes.", "short"]


def needs(module: str, package: str) -> pytest.MarkDecorator:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


class Server:
    """The app behind uvicorn on a free port of this machine, in a thread."""

    def __init__(self, app: Any) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < deadline and self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)

    def ask_to_stop(self) -> None:
        self._server.should_exit = True

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def models(minilm: str, demo_reranker: str) -> Iterator[tuple[Embedder, Reranker]]:
    with Embedder(minilm, device="cpu") as embedder, Reranker(demo_reranker, device="cpu") as reranker:
        yield embedder, reranker


@pytest.fixture(scope="module")
def url(minilm: str, demo_reranker: str) -> Iterator[str]:
    """A service with real models."""
    server = Server(make_app(Embedder(minilm, device="cpu"), Reranker(demo_reranker, device="cpu"), model_id="minilm"))
    yield server.url
    server.ask_to_stop()
    server.join()


# the clients


@needs("llama_index.embeddings.text_embeddings_inference", "llama-index-embeddings-text-embeddings-inference")
def test_llama_index_embeds_through_the_service(url: str, models: tuple[Embedder, Reranker]) -> None:
    """LlamaIndex's TextEmbeddingsInference, sync and async, gets the rows that the Embedder gives in this process."""
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    client = TextEmbeddingsInference(
        model_name="minilm", base_url=url, text_instruction=" ", query_instruction=" ", embed_batch_size=2
    )
    expected = models[0].run(TEXTS, prompt="", normalize=True).embeddings
    assert np.abs(np.array(client.get_text_embedding_batch(TEXTS)) - expected).max() < 1e-5
    assert np.abs(np.array(client.get_query_embedding(TEXTS[1])) - expected[1]).max() < 1e-5
    rows = asyncio.run(client.aget_text_embedding_batch(TEXTS))
    assert np.abs(np.array(rows) - expected).max() < 1e-5


@needs("llama_index.postprocessor.tei_rerank", "llama-index-postprocessor-tei-rerank")
def test_llama_index_reranks_through_the_service(url: str, models: tuple[Embedder, Reranker]) -> None:
    """LlamaIndex's TextEmbeddingInference postprocessor ranks as the Reranker does in this process."""
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]
    ranked = TextEmbeddingInference(base_url=url, top_n=3).postprocess_nodes(nodes, query_str="What is a heap?")
    expected = models[1].rerank("What is a heap?", TEXTS, top_n=3)
    assert [node.text for node in ranked] == [TEXTS[place.index] for place in expected]
    assert np.allclose([node.score for node in ranked], [place.score for place in expected], atol=1e-5)


@needs("langchain_huggingface", "langchain-huggingface")
@pytest.mark.parametrize("path", ["", "/embed"])
def test_langchain_embeds_through_the_service(
    url: str, models: tuple[Embedder, Reranker], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangChain's HuggingFaceEndpointEmbeddings, over huggingface_hub's clients at our address, gets the same rows."""
    from huggingface_hub import AsyncInferenceClient, InferenceClient, constants
    from langchain_huggingface import HuggingFaceEndpointEmbeddings

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which refuses this machine's own addresses too
    endpoint = HuggingFaceEndpointEmbeddings(model="any/name", huggingfacehub_api_token="hf_unused")
    # its `model` takes no address any more, its clients do
    endpoint.client, endpoint.async_client = InferenceClient(url + path), AsyncInferenceClient(url + path)
    expected = models[0].run(TEXTS, prompt="", normalize=True).embeddings
    assert np.abs(np.array(endpoint.embed_documents(TEXTS)) - expected).max() < 1e-5
    assert np.abs(np.array(endpoint.embed_query(TEXTS[2])) - expected[2]).max() < 1e-5
    endpoint.model_kwargs = {"normalize": True, "truncate": True}
    assert np.abs(np.array(asyncio.run(endpoint.aembed_documents(TEXTS))) - expected).max() < 1e-5


def test_the_protocol(url: str, models: tuple[Embedder, Reranker]) -> None:
    """Plain HTTP: /health, /info, one text or many, raw scores, texts on request, best first."""
    with httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        info = client.get("/info").json()
        assert info["model_id"] == "minilm" and info["max_input_length"] == 256
        one = client.post("/embed", json={"inputs": TEXTS[0]}).json()
        many = client.post("/embed", json={"inputs": TEXTS, "dimensions": 64}).json()
        assert (len(one), len(one[0])) == (1, 384) and (len(many), len(many[0])) == (4, 64)
        asked = {"query": "What is a heap?", "texts": TEXTS, "return_text": True}
        ranked = client.post("/rerank", json=asked).json()
        raw = client.post("/rerank", json={**asked, "raw_scores": True}).json()
        assert [place["index"] for place in raw] == [place["index"] for place in ranked]
        assert all(place["text"] == TEXTS[place["index"]] for place in ranked)
        squashed = [1 / (1 + np.exp(-place["score"])) for place in raw]
        assert np.allclose(squashed, [place["score"] for place in ranked], atol=1e-5)
        assert sorted(squashed, reverse=True) == squashed


def test_many_clients_at_once(url: str, models: tuple[Embedder, Reranker]) -> None:
    """Forty requests at a time, embedding and reranking, are all answered, each with its own rows."""

    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            texts = [f"text number {i}" for i in range(30)]
            embedding = [client.post("/embed", json={"inputs": text}) for text in texts]
            ranking = [client.post("/rerank", json={"query": text, "texts": TEXTS}) for text in texts[:10]]
            answers = await asyncio.gather(*embedding, *ranking)
        assert {answer.status_code for answer in answers} == {200}
        expected = models[0].run(texts, prompt="", normalize=True).embeddings
        rows = np.array([answer.json()[0] for answer in answers[:30]])
        assert np.abs(rows - expected).max() < 1e-5
        for text, answer in zip(texts, answers[30:], strict=False):
            best = models[1].rerank(text, TEXTS)[0]
            assert abs(answer.json()[0]["score"] - best.score) < 1e-5

    asyncio.run(main())


# what is refused


def ask(app: Any, path: str, **request: Any) -> Any:
    async def main() -> Any:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.post(path, **request)

    return asyncio.run(main())


@pytest.fixture
def app() -> Iterator[Any]:
    """A service with simulated models and tight limits."""
    device = SimulatedDevice("512MiB")
    policy = MemoryPolicy(reserve=0, wait_s=0, fallback=(), max_pending=8, on_full="raise", max_tokens=64)
    with SimulatedEmbedder(device, memory=policy) as embedder, SimulatedReranker(device, memory=policy) as reranker:
        made = make_app(embedder, reranker, Limits(inputs=20, chars=100_000, body_bytes=150_000))
        made.state.embedder, made.state.device = embedder, device
        yield made


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/embed", {"inputs": ["a"] * 21}, 413),
        ("/embed", {"inputs": "a" * 100_001}, 413),
        ("/embed", {"inputs": "a " * 80_000}, 413),
        ("/embed", {"inputs": "a " * 9_000, "truncate": False}, 413),
        ("/embed", {"inputs": []}, 422),
        ("/embed", {"inputs": ["a", 7]}, 422),
        ("/embed", {"inputs": "a", "prompt_name": "unheard-of"}, 422),
        ("/embed", {"inputs": "a", "dimensions": 0}, 422),
        ("/embed", {}, 422),
        ("/rerank", {"query": "q", "texts": []}, 422),
        ("/rerank", {"texts": ["a"]}, 422),
        ("/rerank", {"query": "q", "texts": ["a"] * 20}, 413),
    ],
)
@pytest.mark.filterwarnings("ignore:.*longer than 8,192 tokens")
def test_requests_that_are_refused(app: Any, path: str, body: dict[str, Any], status: int) -> None:
    """Too large is 413, malformed is 422, with TEI's `error` and `error_type`; no text is repeated in the message."""
    answer = ask(app, path, json=body)
    assert answer.status_code == status
    error = answer.json()
    assert set(error) == {"error", "error_type"} and error["error_type"] == "Validation"
    assert "a a" not in error["error"]
    assert ask(app, "/embed", json={"inputs": "fine"}).status_code == 200


def test_a_body_of_unknown_length_is_cut_off(app: Any) -> None:
    """A body that does not announce its length is refused as soon as it passes the limit, not read to its end."""
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while True:
            sent += 10_000
            yield b" " * 10_000

    answer = ask(app, "/embed", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error_type"] == "Validation"
    assert sent <= 200_000


def test_not_json(app: Any) -> None:
    """A body that is no JSON is 422 as well."""
    answer = ask(app, "/embed", content=b"{not json", headers={"content-type": "application/json"})
    assert answer.status_code == 422 and answer.json()["error_type"] == "Validation"


def test_a_full_queue_is_429(app: Any) -> None:
    """When more inputs wait than may, a request gets 429 and TEI's error type, and later ones are served."""
    entered, go = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go.wait(60)

    before_encoding(app.state.embedder._engine.model.encoder, hold)
    first: list[Any] = []
    caller = threading.Thread(target=lambda: first.append(ask(app, "/embed", json={"inputs": ["a", "b"]})))
    caller.start()
    assert entered.wait(60)
    answer = ask(app, "/embed", json={"inputs": [f"text {i}" for i in range(7)]})
    go.set()
    caller.join(60)
    assert answer.status_code == 429 and answer.json()["error_type"] == "Overloaded"
    assert first[0].status_code == 200
    assert ask(app, "/embed", json={"inputs": [f"text {i}" for i in range(7)]}).status_code == 200


def test_no_memory_is_507_and_a_closed_model_503(app: Any) -> None:
    """An input that does not fit is 507; a model that is gone is 503; both in TEI's form."""
    app.state.device.take("370MiB")  # a neighbour
    answer = ask(app, "/embed", json={"inputs": ["fine", "w " * 8_000]})
    assert answer.status_code == 507 and answer.json()["error_type"] == "Backend"
    app.state.embedder.close()
    answer = ask(app, "/embed", json={"inputs": "late"})
    assert answer.status_code == 503 and answer.json()["error_type"] == "Backend"


# the end


def test_a_client_that_goes_away_takes_its_waiting_work_with_it() -> None:
    """A request whose client has closed the connection leaves the queue at once; other requests are answered."""
    embedder = SimulatedEmbedder(SimulatedDevice("1GiB"), memory={"max_tokens": 32})
    model, go = embedder._engine.models[0], threading.Event()
    forward = model.forward

    def held(*args: Any) -> Any:
        assert go.wait(60)
        return forward(*args)

    model.forward = held  # type: ignore[method-assign]
    server = Server(make_app(embedder, None))
    many = {"inputs": [f"text number {i} of a client who has lost patience" for i in range(30)]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/embed", json=many, timeout=1)
    deadline = time.monotonic() + 60
    while embedder._engine.backlog.pending:
        assert time.monotonic() < deadline, "the work still waits"
        time.sleep(0.01)
    go.set()
    answer = httpx.post(f"{server.url}/embed", json={"inputs": ["one", "two"]}, timeout=60)
    assert answer.status_code == 200 and len(answer.json()) == 2
    server.ask_to_stop()
    server.join()


def test_shutdown_finishes_what_is_in_progress() -> None:
    """Asked to stop, the service answers the request in progress, then closes its models."""
    embedder = SimulatedEmbedder(SimulatedDevice("1GiB"))
    model, entered, go = embedder._engine.models[0], threading.Event(), threading.Event()
    forward = model.forward

    def held(*args: Any) -> Any:
        entered.set()
        assert go.wait(60)
        return forward(*args)

    model.forward = held  # type: ignore[method-assign]
    server = Server(make_app(embedder, None))
    answers: list[Any] = []
    body = {"inputs": ["in progress", "too"]}
    caller = threading.Thread(target=lambda: answers.append(httpx.post(f"{server.url}/embed", json=body, timeout=60)))
    caller.start()
    assert entered.wait(60)
    server.ask_to_stop()
    time.sleep(0.3)  # it has noticed by now
    assert not answers
    go.set()
    caller.join(60)
    server.join()
    assert answers[0].status_code == 200 and len(answers[0].json()) == 2
    with pytest.raises(ClosedError):
        embedder.embed_queries(["late"])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_the_program(demo_reranker: str) -> None:
    """Run as a program it listens on this machine only, serves, and ends well soon after SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "service.py"), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        try:
            deadline = time.monotonic() + 120
            while True:
                assert program.poll() is None and time.monotonic() < deadline
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.2)
            rows = httpx.post(f"http://127.0.0.1:{port}/embed", json={"inputs": TEXTS}, timeout=60).json()
            assert np.array(rows).shape == (4, 384)
            with pytest.raises(OSError), socket.create_connection((_own_address(), port), timeout=2):
                pass
            program.send_signal(signal.SIGTERM)
            assert program.wait(30) in (0, -signal.SIGTERM)
        finally:
            program.kill()


def _own_address() -> str:
    """An address of this machine other than the loopback one that the service is bound to."""
    return "127.0.0.2" if sys.platform == "linux" else socket.gethostbyname(socket.gethostname())
