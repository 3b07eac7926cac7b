"""Reading back: ids, rows, batches, search, export, verification; what is refused; what an update computes."""

from __future__ import annotations

import json
import pickle
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsafe import ConfigError, Embedder, InputError, Store, StoreError, embed_corpus, open_store
from memsafe.stores import known, reader
from memsafe.stores.known import SeenIds
from tests.corpus.helpers import made_texts, simulated, tree
from tests.corpus.test_crashes import after
from tests.tiny_models import save_embedder

TEXTS = made_texts(700)
IDS = [f"id {number}" for number in range(700)]


def embed(path: Path, source: Any = None, model: dict[str, Any] | None = None, **options: Any) -> Any:
    source = list(zip(IDS, TEXTS, strict=True)) if source is None else source
    with simulated(**(model or {})) as embedder:
        return embed_corpus(embedder, source, path, **{"block_texts": 64, "shard_bytes": 4 * 8 * 150, **options})


@pytest.fixture(scope="module")
def rows() -> Any:
    with simulated() as embedder:
        return embedder.embed_documents(TEXTS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store") / "store"
    embed(path)
    return open_store(path)


# reading


def test_rows_are_one_array(store: Store, rows: Any) -> None:
    """Over all shards: ints, slices, lists, masks and columns give what numpy would."""
    assert len(store.shards) == 6
    assert (store.rows.shape, store.rows.dtype, len(store)) == ((700, 8), np.float32, 700)
    mask = np.arange(700) % 3 == 0
    for index in (0, -1, 699, slice(None), slice(120, 140), slice(3, 600, 7), slice(None, None, -1), slice(5, 5), [3, 650, 3, -2],
                  np.array([[1, 2], [699, 0]]), mask, (5, 2), (slice(100, 300), 2), (slice(None), slice(0, 3)), []):  # fmt: skip
        expected = (
            rows[np.asarray(index, int) if index == [] else index] if not isinstance(index, np.ndarray) else rows[index]
        )
        np.testing.assert_array_equal(store.rows[index], expected)
    np.testing.assert_array_equal(np.asarray(store.rows), rows)
    np.testing.assert_array_equal(np.asarray(store.rows, dtype=np.float64), rows.astype(np.float64))
    for wrong in (700, -701, [0, 700]):
        with pytest.raises(IndexError):
            store.rows[wrong]
    with pytest.raises(IndexError, match="mask"):
        store.rows[mask[:5]]


def test_a_slice_of_one_shard_is_a_view(store: Store) -> None:
    """Nothing is copied, and nothing can be written by accident."""
    part = store.rows[10:20]
    assert isinstance(part.base, np.memmap) or isinstance(part, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        part[0, 0] = 1


def test_ids_are_a_sequence(store: Store) -> None:
    """Read from the disk when asked for."""
    ids = store.ids
    assert (ids[0], ids[-1], ids[130], len(ids)) == ("id 0", "id 699", "id 130", 700)
    assert list(ids) == IDS and ids[120:135] == IDS[120:135] and ids[::-100] == IDS[::-100]
    with pytest.raises(IndexError):
        ids[700]


def test_batches(store: Store, rows: Any) -> None:
    """All rows once, in order, with their ids, none larger than asked."""
    found = list(store.iter_batches(100))
    assert max(len(part) for _, part in found) <= 100
    assert [name for names, _ in found for name in names] == IDS
    np.testing.assert_array_equal(np.concatenate([part for _, part in found]), rows)
    with pytest.raises(ConfigError, match="max_rows"):
        next(store.iter_batches(0))


def test_it_says_what_it_is(store: Store) -> None:
    """`info` is ready for JSON and holds everything that the rows depend on."""
    info = json.loads(json.dumps(store.info))
    assert (info["rows"], info["complete"], info["shards"], info["dtype"], info["dimension"]) == (
        700,
        True,
        6,
        "float32",
        8,
    )
    assert info["model"]["content"] == "simulated" and info["options"]["kind"] == "document"
    assert info["bytes"] > 700 * 48
    assert "700 rows of 8 x float32" in repr(store)


def test_it_pickles_as_its_path(store: Store) -> None:
    """So that workers each map it themselves."""
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.rows[5], store.rows[5])


# searching


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("max_bytes", [1 << 25, 1000])
@pytest.mark.parametrize("k", [1, 10, 700, 1000])
def test_search_is_exact(store: Store, rows: Any, metric: str, max_bytes: int, k: int) -> None:
    """The same rows, scores and order as of one product of everything, however small the blocks are."""
    queries = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    scores = queries @ rows.T
    if metric == "cosine":
        scores /= np.linalg.norm(rows, axis=1) * np.linalg.norm(queries, axis=1)[:, None]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = open_store(store.path).search(queries, k, metric=metric, max_bytes=max_bytes)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, best, axis=1), atol=1e-6)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert found.positions.shape == (5, min(k, 700)) and (found.positions.dtype, found.scores.dtype) == (
        np.int64,
        np.float32,
    )
    assert all(len(set(row)) == len(row) for row in found.positions.tolist())
    assert found.ids == [[IDS[place] for place in row] for row in found.positions.tolist()]


def test_ties_go_to_the_first(tmp_path: Path) -> None:
    """Of equal rows the one that comes first, over blocks and shards."""
    embed(tmp_path / "store", ["same"] * 300 + ["other words"] * 300)
    with simulated() as embedder:
        query = embedder.embed_queries(["same"], prompt="")
    for max_bytes in (1 << 25, 500):
        found = open_store(tmp_path / "store").search(query, 7, max_bytes=max_bytes)
        assert found.positions.tolist() == [list(range(7))]


@pytest.mark.parametrize(
    ("queries", "k", "metric"), [(np.zeros((1, 7)), 1, "dot"), (np.zeros(8), 0, "dot"), (np.zeros(8), 1, "l2")]
)
def test_searches_that_are_refused(store: Store, queries: Any, k: Any, metric: str) -> None:
    """Another width, no k, an unknown metric."""
    with pytest.raises(ConfigError, match=r"dimensions|k: got|metric"):
        store.search(queries, k, metric=metric)


# exporting


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_export(ending: str, dtype: str, tmp_path: Path, rows: Any) -> None:
    """Parquet and Arrow hold the same ids and rows, to the bit."""
    arrow = pytest.importorskip("pyarrow")
    embed(tmp_path / "store", dtype=dtype)
    path = tmp_path / f"rows.{ending}"
    assert open_store(tmp_path / "store").export(path, max_rows=90) == 700
    if ending == "parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
    else:
        table = arrow.ipc.open_file(path).read_all()
    assert table.column("id").to_pylist() == IDS
    flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(flat.reshape(700, 8), rows.astype(dtype))
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, "store"]


def test_exports_that_are_refused(store: Store, tmp_path: Path) -> None:
    """An unknown ending; a place that cannot be written: nothing is left behind."""
    with pytest.raises(ConfigError, match=r"ends in .parquet, .arrow or .feather"):
        store.export(tmp_path / "rows.csv")
    with pytest.raises(StoreError, match="cannot be written"):
        store.export(tmp_path / "nowhere" / "rows.parquet")
    assert list(tmp_path.iterdir()) == []


def test_float16_rows_that_overflow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row beyond float16 is named; never an infinity on the disk."""
    with simulated() as embedder:
        model = embedder.simulated[0]
        plain = model._rows
        monkeypatch.setattr(model, "_rows", lambda batch, dtype: plain(batch, dtype) * np.float32(1e6))
        with pytest.raises(ConfigError, match=r"dtype: source: entry \d+ has a row that float16 cannot hold"):
            embed_corpus(embedder, TEXTS, tmp_path / "store", dtype="float16", fixed_tokens=64)


# verifying


@pytest.mark.parametrize("name", ["rows-00002.npy", "texts-00000.npy", "ids-00005.jsonl"])
def test_one_bit_is_noticed(name: str, tmp_path: Path) -> None:
    """Wherever it has turned over; the block and its rows are named."""
    path = tmp_path / "store"
    embed(path)
    assert open_store(path).verify().ok
    file = path / "data-1" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    found = open_store(path).verify()
    assert not found.ok and len(found.problems) == 1
    assert found.problems[0].startswith(f"{name}: block ") and "is damaged" in found.problems[0]
    assert (found.rows, found.blocks) == (700, 11)


def test_a_header_that_lies_is_noticed(tmp_path: Path) -> None:
    """Our rows do not depend on it, but numpy.load does."""
    path = tmp_path / "store"
    embed(path)
    file = path / "data-1" / "rows-00001.npy"
    file.write_bytes(file.read_bytes().replace(b"(128, 8)", b"(127, 8)"))
    assert open_store(path).verify().problems == ["rows-00001.npy: its header does not say what it holds"]


def test_a_file_that_is_cut_or_gone(tmp_path: Path) -> None:
    """Opening says which, rather than mapping what is not there."""
    path = tmp_path / "store"
    embed(path)
    file = path / "data-1" / "rows-00001.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(StoreError, match=r"rows-00001.npy has \d+ bytes where \d+ were written; restore it"):
        open_store(path)
    file.unlink()
    with pytest.raises(StoreError, match=r"rows-00001.npy cannot be read: No such file"):
        open_store(path)


def test_no_store_is_there(tmp_path: Path) -> None:
    """Neither a missing folder nor an empty one nor a file is a store."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(StoreError, match="no store of embeddings is there"):
            open_store(path)


# going on with something else


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({"dtype": "float16"}, "dtype: the store has 'float32', this run has 'float16'"),
        ({"block_texts": 65}, "layout.block_texts: the store has 64, this run has 65"),
        ({"fixed_tokens": 99}, "layout.fixed_tokens: the store has 65536, this run has 99"),
        ({"normalize": True}, "options.normalize: the store has False, this run has True"),
        ({"kind": "query"}, "options.kind: the store has 'document', this run has 'query'"),
        ({"prompt": "p: "}, "options.prompt: the store has '', this run has 'p: '"),
        ({"truncate_dim": 5}, "dimension: the store has 8, this run has 5"),
        ({"model": {"dtype": "float16"}}, "model.dtype: the store has 'float32', this run has 'float16'"),
        ({"model": {"max_length": 77}}, "model.max_length: the store has 8192, this run has 77"),
        ({"source": TEXTS}, "ids: the store has 'str', this run has 'positions'"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("finished", [True, False])
def test_something_else_is_refused_by_name(options: dict[str, Any], due: str, finished: bool, tmp_path: Path) -> None:
    """A finished store or half of one: the error names what differs, and nothing changes."""
    path = tmp_path / "store"
    embed(path, stop=None if finished else after(6))
    before = tree(path)
    with pytest.raises(StoreError, match="was made of something else") as caught:
        embed(path, **options)
    assert due in caught.value.differences
    assert all(difference in str(caught.value) for difference in caught.value.differences)
    assert tree(path) == before


@pytest.mark.parametrize(
    ("change", "due"),
    [
        (lambda texts: [*texts[:100], ("id 100", "changed"), *texts[101:]], "entries 64 to 127.*their content differs"),
        (lambda texts: [*texts[:100], ("id x", TEXTS[100]), *texts[101:]], "entries 64 to 127.*their ids differ"),
        (lambda texts: texts[1:], "entries 0 to 63.*their content differs"),
        (lambda texts: texts[:70], "entries 64 to 69.*the store has 64 there"),
        (lambda texts: texts[:64], r"it ends after 64 entries, and the store has \d+"),
    ],
    ids=["text", "id", "shifted", "cut", "cut at a block"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_source_is_refused_with_the_place(change: Any, due: str, finished: bool, tmp_path: Path) -> None:
    """Where it is not what the store was made of."""
    path = tmp_path / "store"
    embed(path, stop=None if finished else after(6))
    before = tree(path)
    with pytest.raises(StoreError, match=due):
        embed(path, change(list(zip(IDS, TEXTS, strict=True))))
    assert tree(path) == before


def test_a_source_that_has_grown_is_refused(tmp_path: Path) -> None:
    """A complete store is complete; update=True is named as the way."""
    path = tmp_path / "store"
    embed(path)
    longer = [*zip(IDS, TEXTS, strict=True), ("one", "more")]
    with pytest.raises(StoreError, match=r"entries 640 to 700.*update=True"):
        embed(path, longer)
    embed(tmp_path / "even", longer[:640])
    with pytest.raises(StoreError, match=r"entries 640 to 700.*the store has no more"):
        embed(tmp_path / "even", longer)


def test_what_was_not_said_again_is_as_it_was_begun(tmp_path: Path) -> None:
    """Sizes of blocks and micro-batches that were chosen at the beginning hold for whoever goes on without naming them."""
    path = tmp_path / "store"
    embed(path, fixed_tokens=128, stop=after(4))
    with simulated() as embedder:
        report = embed_corpus(embedder, zip(IDS, TEXTS, strict=True), path, shard_bytes=4 * 8 * 150)
    assert report.complete and report.skipped > 0
    assert open_store(path).info["layout"] == {
        "block_texts": 64, "block_chars": 1 << 24, "shard_bytes": 4 * 8 * 150, "fixed_tokens": 128,
    }  # fmt: skip


def test_a_store_of_a_newer_version(tmp_path: Path) -> None:
    """Neither read nor written, and left alone."""
    path = tmp_path / "store"
    embed(path)
    first, rest = (path / "manifest.jsonl").read_text().split("\n", 1)
    text = first.rpartition(', "crc"')[0].replace('"schema": 2', '"schema": 3') + "}"
    crc = zlib.crc32(text.encode())
    (path / "manifest.jsonl").write_text(f'{text[:-1]}, "crc": {crc}}}\n{rest}')
    before = tree(path)
    for attempt in (lambda: open_store(path), lambda: embed(path), lambda: embed(path, update=True)):
        with pytest.raises(StoreError, match=r"a store of version 3; this memsafe reads up to 2"):
            attempt()
    assert tree(path) == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    """By what the model holds: a copy elsewhere is the same one, other weights are another, whatever it is called."""
    same = [save_embedder(tmp_path / name, seed=3) for name in ("one", "two")]
    for folder in same:
        with Embedder(str(folder), device="cpu", memory={"learn": False}) as embedder:
            report = embed_corpus(embedder, TEXTS[:20], tmp_path / "store")
    assert report.skipped == 20
    save_embedder(same[1], seed=4)
    with (
        Embedder(str(same[1]), device="cpu", memory={"learn": False}) as embedder,
        pytest.raises(StoreError, match=r"model.content: the store has '\w{32}', this run has '\w{32}'"),
    ):
        embed_corpus(embedder, TEXTS[:20], tmp_path / "store")


def test_texts_that_are_cut_are_told_once(tmp_path: Path) -> None:
    """One warning a run, not one a block; the report and the store count them."""
    with pytest.warns(UserWarning, match="longer than 9 tokens are cut there") as caught:
        report = embed(tmp_path / "store", model={"max_length": 9})
    assert len(caught) == 1
    assert report.truncated == open_store(tmp_path / "store").info["truncated"] > 300


# updates


def test_an_update_computes_what_is_new(tmp_path: Path) -> None:
    """Unchanged texts keep their rows to the bit, wherever they have moved; the report counts each kind."""
    path = tmp_path / "store"
    embed(path)
    old = np.asarray(open_store(path).rows)
    entries = list(zip(IDS, TEXTS, strict=True))
    changed = [
        ("new 1", "quite new"),
        *reversed(entries[:300]),
        ("id 300", "changed"),
        *entries[310:],
        ("new 2", "new too"),
    ]
    report = embed(path, changed, update=True)
    assert (report.texts, report.computed, report.reused, report.dropped) == (693, 3, 690, 10)
    store = open_store(path)
    assert list(store.ids) == [name for name, _ in changed]
    np.testing.assert_array_equal(store.rows[1:301], old[:300][::-1])
    np.testing.assert_array_equal(store.rows[302:-1], old[310:])
    with simulated() as embedder:
        np.testing.assert_array_equal(np.asarray(store.rows), embedder.embed_documents([text for _, text in changed]))
    assert store.verify().ok and store.complete
    assert sorted(each.name for each in path.iterdir()) == ["data-2", "lock", "manifest.jsonl"]
    again = embed(path, changed, update=True)
    assert (again.computed, again.reused, again.dropped) == (0, 693, 0)
    assert embed(path, changed).skipped == 693  # and without: nothing to do


def test_an_update_of_nothing_is_a_first_run(tmp_path: Path) -> None:
    """So that a nightly job needs no special case."""
    report = embed(tmp_path / "store", update=True)
    assert (report.computed, report.reused, report.complete) == (700, 0, True)


def test_an_update_by_another_model_reuses_nothing(tmp_path: Path) -> None:
    """Nor with another prompt: rows of one are never taken for the other's."""
    path = tmp_path / "store"
    embed(path)
    for options in ({"prompt": "p: "}, {"model": {"max_length": 9}}, {"dtype": "float16"}):
        cut = pytest.warns(UserWarning, match="longer than 9 tokens") if "model" in options else nullcontext()
        with cut:
            report = embed(path, update=True, **options)
        assert (report.computed, report.reused, report.dropped) == (700, 0, 700)
    assert open_store(path).verify().ok


def test_readers_keep_what_they_have_open(tmp_path: Path, rows: Any) -> None:
    """An update takes the place of a store, not the pages under those who read it."""
    path = tmp_path / "store"
    embed(path)
    before = open_store(path)
    embed(path, TEXTS[100:], update=True)
    np.testing.assert_array_equal(np.asarray(before.rows), rows)
    assert list(before.ids) == IDS
    assert len(open_store(path)) == 600


def test_an_update_that_is_broken_off(tmp_path: Path) -> None:
    """The store stays as it was; the next update takes what was computed, and ends as one that was never interrupted."""
    entries = list(zip(IDS, TEXTS, strict=True))
    changed = [(name, text if number % 3 else text + "more") for number, (name, text) in enumerate(entries)]
    for name in ("whole", "broken"):
        embed(tmp_path / name)
    whole = embed(tmp_path / "whole", changed, update=True)
    path = tmp_path / "broken"
    before = tree(path)
    first = embed(path, changed, update=True, stop=after(6))
    assert not first.complete and 0 < first.computed < whole.computed
    assert {name: content for name, content in tree(path).items() if name in before} == before
    assert len(open_store(path)) == 700 and open_store(path).complete
    second = embed(path, changed, update=True)
    assert second.computed == whole.computed - first.computed
    assert (second.texts, second.complete) == (700, True)
    due, found = (
        {name.partition("/")[2]: content for name, content in tree(tmp_path / place).items() if "/" in name}
        for place in ("whole", "broken")
    )
    assert found == due
    assert sorted(each.name for each in path.iterdir() if each.name.startswith("data")) == ["data-3"]


def test_an_update_that_is_broken_off_and_another_source(tmp_path: Path) -> None:
    """What it computed is used even if the next update is of something else."""
    path = tmp_path / "store"
    embed(path, TEXTS)
    embed(path, [text + "x" for text in TEXTS], update=True, stop=after(6))
    report = embed(path, ["first", *(text + "x" for text in TEXTS)], update=True)
    assert report.reused > 0 and report.reused + report.computed == 701


def test_a_damaged_row_is_not_used_again(tmp_path: Path, rows: Any) -> None:
    """An update computes the rows of a block whose checksum is wrong."""
    path = tmp_path / "store"
    embed(path)
    file = path / "data-1" / "rows-00000.npy"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    entries = list(zip(IDS, TEXTS, strict=True))
    report = embed(path, entries[::-1], update=True)
    assert (report.computed, report.reused) == (64, 636)
    np.testing.assert_array_equal(np.asarray(open_store(path).rows), rows[::-1])


def test_half_a_store_is_updated_too(tmp_path: Path, rows: Any) -> None:
    """What is finished of it is used."""
    path = tmp_path / "store"
    done = embed(path, stop=after(6)).texts
    report = embed(path, update=True)
    assert (report.reused, report.computed) == (done, 700 - done)
    np.testing.assert_array_equal(np.asarray(open_store(path).rows), rows)


def test_digests_that_begin_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Any) -> None:
    """Rows are found by whole digests, even where the eight bytes that are sorted are equal for many."""
    path = tmp_path / "store"
    embed(path)
    monkeypatch.setattr(known, "_prefix", lambda texts: (texts[:, 0] % 4).astype(np.uint64))
    report = embed(path, list(zip(IDS, TEXTS, strict=True))[::-1], update=True)
    assert (report.reused, report.computed) == (700, 0)
    np.testing.assert_array_equal(np.asarray(open_store(path).rows), rows[::-1])


def test_ids_whose_digests_meet_are_not_equal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A suspicion is looked into: only equal ids are refused."""
    monkeypatch.setattr(known, "_id_digest", lambda one: len(str(one)).to_bytes(8, "little"))
    assert embed(tmp_path / "store").complete
    entries = list(zip(IDS, TEXTS, strict=True))
    entries[500] = ("id 3", TEXTS[500])
    with pytest.raises(InputError, match="entry 500 has the id 'id 3', which entry 3 has already"):
        embed(tmp_path / "other", entries)


def test_seen_ids_remember_everything() -> None:
    """Over many blocks of different sizes, as a set would."""
    seen, chance, before = SeenIds(), np.random.default_rng(1), set()
    for _ in range(60):
        ids = chance.integers(0, 4000, size=int(chance.integers(1, 90))).tolist()
        due = [place for place, one in enumerate(ids) if one in before or one in ids[:place]]
        assert seen.suspects(ids) == due
        before.update(ids)


def test_blocks_must_follow_one_another() -> None:
    """A manifest that leaves rows out, or names them twice, is no store."""
    from memsafe.stores.manifest import Block

    def block(number: int, shard: int, start: int, rows: int = 5) -> Block:
        return Block(number, shard, start, rows, 0, "", "", "")

    good = [block(0, 0, 0), block(1, 0, 5), block(2, 1, 0), block(3, 1, 5)]
    assert [len(blocks) for blocks in reader.by_shard(good)] == [2, 2]
    for bad in ([block(0, 0, 5)], [block(0, 1, 0)], [block(0, 0, 0), block(1, 0, 6)], [block(0, 0, 0), block(1, 2, 0)]):
        with pytest.raises(StoreError, match="does not follow"):
            reader.by_shard(bad)
