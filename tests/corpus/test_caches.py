"""What the frameworks keep between runs: nothing is computed twice, and nobody gets another model's rows."""

from __future__ import annotations

import asyncio
import pickle
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from memsafe import CacheFile, Embedder, StoreError
from tests.corpus.helpers import in_child, needs_fork
from tests.tiny_models import save_embedder

TEXTS = ["a crane is a bird", "a crane lifts loads", "Paris is a city"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("caches") / "model"
    return str(save_embedder(folder, num_layers=1, prompts={"query": "query: ", "document": "passage: "}))


# the file itself


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    """By another object, another thread, after pickling; missing keys are None, in the order asked."""
    cache = CacheFile(tmp_path / "deep" / "cache.db")
    cache.set([("a", b"1"), ("", b"empty"), ("ü", b"\0\xff")])
    cache.set([("a", b"2")])
    assert CacheFile(tmp_path / "deep" / "cache.db").get(["ü", "none", "", "a"]) == [b"\0\xff", None, b"empty", b"2"]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(pickle.loads(pickle.dumps(cache)).get(["a"])))
    thread.start()
    thread.join()
    assert found == [b"2"]
    assert (cache.delete(["a", "none"]), cache.get(["a"])) == (1, [None])


def test_many_keys(tmp_path: Path) -> None:
    """More than sqlite takes variables, in order, by prefix, with signs that patterns would take for theirs."""
    cache = CacheFile(tmp_path / "cache.db")
    names = [f"{prefix}{number:05}" for prefix in ("a%_", "a%x", "b") for number in range(1200)]
    cache.set((name, name.encode()) for name in names)
    assert cache.get(names) == [name.encode() for name in names]
    assert [key for key, _ in cache.items("a%_")] == names[:1200]
    assert [key for key, _ in cache.items()] == sorted(names)
    assert list(cache.items("zz")) == []


def test_scopes_are_apart(tmp_path: Path) -> None:
    """Equal keys of different scopes have nothing to do with each other."""
    one, two = (CacheFile(tmp_path / "cache.db", {"model": name, "dimension": 8}) for name in ("one", "two"))
    one.set([("k", b"one")])
    assert two.get(["k"]) == [None] and list(two.items()) == []
    two.set([("k", b"two")])
    assert one.delete(["k"]) == 1 and two.get(["k"]) == [b"two"]


@needs_fork
def test_several_processes(tmp_path: Path) -> None:
    """A connection is not taken through a fork; what children write is there."""
    cache = CacheFile(tmp_path / "cache.db")
    cache.set([("parent", b"1")])
    for number in range(3):
        assert in_child(lambda number=number: cache.set([(f"child {number}", b"x")])) == 0  # type: ignore[misc]
    assert len(list(cache.items("child"))) == 3


def test_files_that_are_none(tmp_path: Path) -> None:
    """Something else, a newer version, a folder: said with the name, and left as it was."""
    (tmp_path / "text").write_text("no database, but quite some text in its place " * 50)
    (tmp_path / "folder").mkdir()
    CacheFile(tmp_path / "new").set([("a", b"1")])
    with sqlite3.connect(tmp_path / "new") as connection:
        connection.execute("PRAGMA user_version = 2")
    for name, why in (("text", "not a database"), ("folder", "unable to open"), ("new", "version 2")):
        with pytest.raises(StoreError, match=rf"{name} cannot be used as a cache: .*{why}"):
            CacheFile(tmp_path / name).get(["a"])


# what rows depend on


@pytest.mark.parametrize(
    "options",
    [{"prompt": "p: "}, {"kind": "query"}, {"normalize": True}, {"truncate_dim": 8}, {"precision": "int8"}],
    ids=lambda options: next(iter(options)),
)
def test_an_identity_tells_calls_apart(options: dict[str, Any], model: str) -> None:
    """Each option that changes rows changes it; one that does not leaves it."""
    with Embedder(model, device="cpu", memory={"learn": False}) as embedder:
        plain = embedder.identity(kind="document")
        assert embedder.identity(kind="document", max_rows=3, urgent=True) == plain
        assert embedder.identity(**{"kind": "document", **options}) != plain


def test_an_identity_tells_models_apart(tmp_path: Path) -> None:
    """Weights, lengths, poolings and dtypes; not where the folder is."""
    made = {
        "one": {}, "copy": {}, "seed": {"seed": 1}, "length": {"max_length": 99}, "pooling": {"pooling": "cls"}, "dense": {"dense_dim": 32},
    }  # fmt: skip
    found = {}
    for name, options in made.items():
        save_embedder(tmp_path / name, num_layers=1, **options)  # type: ignore[arg-type]
        with Embedder(str(tmp_path / name), device="cpu", memory={"learn": False}) as embedder:
            found[name] = embedder.identity()
            if name == "one":
                embedder.embed_documents(TEXTS)
                assert embedder.identity() == found[name]  # using it changes nothing
    assert found.pop("copy") == found["one"]
    assert len({str(identity) for identity in found.values()}) == len(found)


# LangChain


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call computed, of all embedders."""
    counts: list[int] = []
    run = Embedder.run

    def counted(self: Embedder, texts: Any, **options: Any) -> Any:
        counts.append(len(texts))
        return run(self, texts, **options)

    monkeypatch.setattr(Embedder, "run", counted)
    return counts


def test_langchain_computes_once(model: str, tmp_path: Path, computed: list[int]) -> None:
    """CacheBackedEmbeddings over the file: a second run, in a new process's place, computes nothing; another model everything."""
    classic = pytest.importorskip("langchain_classic.embeddings.cache")
    from langchain_memsafe import MemsafeByteStore, MemsafeEmbeddings

    def rows(**options: Any) -> list[list[float]]:
        embeddings = MemsafeEmbeddings(model_name=model, model_kwargs={"device": "cpu"}, **options)
        store = MemsafeByteStore(tmp_path / "cache.db", embeddings)
        cached = classic.CacheBackedEmbeddings.from_bytes_store(embeddings, store, key_encoder="sha256")
        computed.clear()
        found: list[list[float]] = cached.embed_documents(TEXTS)
        return found

    first = rows()
    assert computed == [3]
    assert rows() == first and computed == []
    assert rows(use_saved_prompts=True) != first and computed == [3]
    assert rows(encode_kwargs={"normalize_embeddings": True}) != first and computed == [3]
    assert rows() == first and computed == []


def test_langchain_queries_have_rows_of_their_own(model: str, tmp_path: Path) -> None:
    """A text that is a query and a document has two embeddings where the model has prompts."""
    from langchain_memsafe import MemsafeByteStore, MemsafeEmbeddings

    embeddings = MemsafeEmbeddings(model_name=model, model_kwargs={"device": "cpu"}, use_saved_prompts=True)
    documents, queries = (
        MemsafeByteStore(tmp_path / "cache.db", embeddings, kind=kind) for kind in ("document", "query")
    )
    documents.mset([("k", b"document")])
    assert queries.mget(["k"]) == [None]
    with pytest.raises(ValueError, match="kind"):
        MemsafeByteStore(tmp_path / "cache.db", embeddings, kind="passage")


def test_langchain_byte_store(tmp_path: Path) -> None:
    """Every method of the interface."""
    from langchain_memsafe import MemsafeByteStore

    store = MemsafeByteStore(tmp_path / "cache.db")
    store.mset([("a1", b"1"), ("a2", b"2"), ("b", b"3")])
    assert store.mget(["b", "x", "a1"]) == [b"3", None, b"1"]
    assert list(store.yield_keys(prefix="a")) == ["a1", "a2"] and list(store.yield_keys()) == ["a1", "a2", "b"]
    store.mdelete(["a1", "x"])
    assert asyncio.run(store.amget(["a1", "a2"])) == [None, b"2"]


# LlamaIndex


def llama_index(model: str, **options: Any) -> Any:
    from llama_index_memsafe import MemsafeEmbedding

    return MemsafeEmbedding(model, device="cpu", **options)


def test_llama_index_computes_once(model: str, tmp_path: Path, computed: list[int]) -> None:
    """embeddings_cache over the file: kept to the bit, found by the next run, not by another model or instruction."""
    from llama_index_memsafe import MemsafeKVStore

    def rows(**options: Any) -> list[list[float]]:
        embed_model = llama_index(model, **options)
        embed_model.embeddings_cache = MemsafeKVStore(tmp_path / "cache.db", embed_model)
        computed.clear()
        found: list[list[float]] = embed_model.get_text_embedding_batch(TEXTS)
        return found

    first = rows()
    assert computed == [3]
    assert rows() == first and computed == []
    assert rows(text_instruction="represent: ") != first and computed == [3]
    assert rows(normalize=False) != first and computed == [3]
    assert rows() == first and computed == []


def test_llama_index_ingestion_cache(model: str, tmp_path: Path) -> None:
    """A pipeline's second run, with a cache opened anew, embeds nothing."""
    from llama_index.core.ingestion import IngestionCache, IngestionPipeline
    from llama_index.core.schema import TextNode

    from llama_index_memsafe import MemsafeKVStore

    nodes = [TextNode(text=text, id_=str(number)) for number, text in enumerate(TEXTS)]

    def run() -> Any:
        cache = IngestionCache(cache=MemsafeKVStore(tmp_path / "cache.db"))
        return IngestionPipeline(transformations=[llama_index(model)], cache=cache).run(nodes=nodes)

    first = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Embedder, "run", None)
        second = run()
    assert [node.embedding for node in second] == [node.embedding for node in first]


def test_llama_index_kv_store(tmp_path: Path) -> None:
    """Every method of the interface, with collections apart."""
    from llama_index_memsafe import MemsafeKVStore

    store = pickle.loads(pickle.dumps(MemsafeKVStore(tmp_path / "cache.db")))
    store.put("a", {"x": 1})
    store.put_all([("b", {"y": [0.1]}), ("c", {})], collection="other")
    assert (store.get("a"), store.get("b"), store.get("b", "other")) == ({"x": 1}, None, {"y": [0.1]})
    assert store.get_all("other") == {"b": {"y": [0.1]}, "c": {}}
    assert (store.delete("b"), store.delete("b", "other"), store.delete("b", "other")) == (False, True, False)

    async def others() -> None:
        await store.aput("z", {"z": 1})
        await store.aput_all([("q", {"q": 1})])
        assert await store.aget("z") == {"z": 1} and set(await store.aget_all()) == {"a", "q", "z"}
        assert await store.adelete("z") and await store.aget("z") is None

    asyncio.run(others())
