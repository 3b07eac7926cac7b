"""What a corpus may be made of, and what is said, with its place, of what it may not."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsafe import ConfigError, InputError, InputTooLargeError, MemoryPolicy, StoreError, embed_corpus, open_store
from memsafe.stores.items import Fields, entry_of
from memsafe.stores.sources import Window, open_source, windows
from memsafe.testing import SimulatedDevice, SimulatedEmbedder
from tests.corpus.helpers import made_texts, simulated, tree

TEXTS = made_texts(300)
IDS = [f"näme {number}\u2028" for number in range(300)]


def embed(source: Any, path: Path, **options: Any) -> Any:
    with simulated() as embedder:
        return embed_corpus(embedder, source, path, **{"block_texts": 64, **options})


def lines(path: Path, values: list[Any]) -> Path:
    text = "".join(json.dumps(value) + "\n" for value in values)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def arrow_table(**columns: Any) -> Any:
    return pytest.importorskip("pyarrow").table(columns or {"name": IDS, "body": TEXTS})


def arrow_file(path: Path, *, stream: bool = False) -> Path:
    arrow = pytest.importorskip("pyarrow")
    table = arrow_table()
    with arrow.ipc.new_stream(path, table.schema) if stream else arrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return path


def parquet(path: Path) -> Path:
    arrow_parquet = pytest.importorskip("pyarrow.parquet")
    arrow_parquet.write_table(arrow_table(), path, row_group_size=100)
    return path


def hf_dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"name": IDS, "body": TEXTS, "other": list(range(300))})


FORMS = {
    "pairs": lambda folder: list(zip(IDS, TEXTS, strict=True)),
    "a generator": lambda folder: ((name, text) for name, text in zip(IDS, TEXTS, strict=True)),
    "dicts": lambda folder: [{"name": n, "body": t, "rest": 1} for n, t in zip(IDS, TEXTS, strict=True)],
    "jsonl": lambda folder: lines(
        folder / "a.jsonl", [{"name": n, "body": t} for n, t in zip(IDS, TEXTS, strict=True)]
    ),
    "jsonl.gz": lambda folder: lines(folder / "a.jsonl.gz", [[n, t] for n, t in zip(IDS, TEXTS, strict=True)]),
    "parquet": lambda folder: parquet(folder / "a.parquet"),
    "arrow file": lambda folder: arrow_file(folder / "a.arrow"),
    "arrow stream": lambda folder: arrow_file(folder / "a.arrow", stream=True),
    "table": lambda folder: arrow_table(),
    "reader": lambda folder: arrow_table().to_reader(max_chunksize=50),
    "record batch": lambda folder: arrow_table().combine_chunks().to_batches()[0],
    "dataset": lambda folder: hf_dataset(),
    "streamed dataset": lambda folder: hf_dataset().to_iterable_dataset(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_store(form: str, tmp_path: Path) -> None:
    """Whatever holds the texts and ids, the files of rows, digests and ids are the same ones."""
    embed(list(zip(IDS, TEXTS, strict=True)), tmp_path / "due")
    report = embed(FORMS[form](tmp_path), tmp_path / "store", text="body", id="name")
    assert (report.texts, report.complete) == (300, True)
    due, found = (
        {name: content for name, content in tree(tmp_path / place).items() if name != "manifest.jsonl"}
        for place in ("due", "store")
    )
    assert found == due
    assert list(open_store(tmp_path / "store").ids) == IDS


@pytest.mark.parametrize("form", ["list", "jsonl", "txt", "parquet"])
def test_texts_without_ids(form: str, tmp_path: Path) -> None:
    """A row then goes by its position; empty lines of a file are no entries."""
    source: Any = TEXTS
    if form == "jsonl":
        source = tmp_path / "a.jsonl"
        source.write_text(
            "\n".join(json.dumps(text) for text in TEXTS[:150]) + "\n\n \n" + "\n".join(map(json.dumps, TEXTS[150:]))
        )
    elif form == "txt":
        source = tmp_path / "a.txt"
        source.write_text("\n\n".join(TEXTS))
    elif form == "parquet":
        source = tmp_path / "a.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(arrow_table(text=TEXTS), source)
    embed(source, tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert (len(store), list(store.ids)) == (300, list(range(300)))
    assert not list(tmp_path.rglob("ids-*"))
    with simulated() as embedder:
        np.testing.assert_array_equal(np.asarray(store.rows), embedder.embed_documents(TEXTS))


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    """Each file is an entry, by its path; hidden ones and those of other kinds are left out."""
    for name, text in {
        "b.txt": "second",
        "a/x.md": "first",
        "c.RST": "third",
        "a/.hidden.txt": "no",
        "d.bin": "no",
    }.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    embed(tmp_path / "texts", tmp_path / "store")
    assert list(open_store(tmp_path / "store").ids) == ["a/x.md", "b.txt", "c.RST"]


@pytest.mark.parametrize("kind", [int, np.int64])
def test_ids_may_be_ints(kind: type, tmp_path: Path) -> None:
    """numpy's too; they come back as Python's."""
    embed([(kind(7 * number), text) for number, text in enumerate(TEXTS)], tmp_path / "store")
    ids = list(open_store(tmp_path / "store").ids)
    assert ids == [7 * number for number in range(300)] and type(ids[0]) is int


# what is wrong with it, and where


def failing(message: str, index: int | None, source: Any, path: Path, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        embed(source, path, **options)
    assert caught.value.index == index


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, r"source: entry 130 is None; give a text, \(id, text\) or a dict with 'text'"),
        (3.5, r"source: entry 130 is a float"),
        (b"bytes", r"source: entry 130 is a bytes"),
        ((1, 2, 3), r"source: entry 130 is 3 items"),
        (("x", "text"), r"source: entry 130 has a str as id, but those before it have none"),
        ({"text": None}, r"source: entry 130: the text is None, not a str"),
        ({"body": "x"}, r"source: entry 130 has no field 'text' but 'body'; name the right one"),
        ({"id": 1.5, "text": "x"}, r"source: entry 130: the id is a float; give a str or an int"),
        ({"id": True, "text": "x"}, r"source: entry 130: the id is a bool"),
        ("lone \ud800 surrogate", r"source: entry 130 holds lone surrogates"),
    ],
    ids=repr,
)
def test_an_entry_that_is_none(bad: Any, message: str, tmp_path: Path) -> None:
    """It is named by its position; the blocks before it stay, and with it mended the run goes on."""
    failing(message, 130, [*TEXTS[:130], bad, *TEXTS[131:]], tmp_path / "store")
    before = len(open_store(tmp_path / "store"))
    assert before in (0, 64, 128)
    report = embed(TEXTS, tmp_path / "store")
    assert (report.skipped, report.computed) == (before, 300 - before)


@pytest.mark.parametrize("kinds", [("x", 3), (3, "x"), ("x", None), (None, "x"), (3, None)])
def test_ids_of_different_kinds(kinds: tuple[Any, Any], tmp_path: Path) -> None:
    """All are str, or int, or there are none."""
    entries = [text if kind is None else (kind, text) for kind, text in zip(kinds, TEXTS, strict=False)]
    failing(r"source: entry 1 has .* id, but those before it have", 1, entries, tmp_path / "store")


@pytest.mark.parametrize(("first", "second"), [(3, 5), (3, 200), (100, 299)])
def test_ids_that_are_equal(first: int, second: int, tmp_path: Path) -> None:
    """In one block or far apart: both positions are named; and again when a run goes on."""
    entries = list(zip(IDS, TEXTS, strict=True))
    entries[second] = (IDS[first], TEXTS[second])
    for _ in range(2):
        failing(rf"entry {second} has the id .* which entry {first} has already", second, entries, tmp_path / "store")
    embed(zip(IDS, TEXTS, strict=True), tmp_path / "store")


def test_texts_may_be_equal(tmp_path: Path) -> None:
    """Equal texts are computed once in a block, and have equal rows."""
    report = embed(["the same"] * 100 + ["another"], tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert report.computed == 101 and report.tokens == 4 + (4 + 3)  # the second block begins with it anew
    assert (store.rows[:100] == store.rows[0]).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a.jsonl, line 71: not JSON at column 13; repair it, or leave it out"),
        (b"[" * 100_000, r"a.jsonl, line 71: not JSON"),
        (b'{"text": "\xff"}', r"a.jsonl, line 71: not UTF-8 at byte 10"),
        (b"17", r"a.jsonl, line 71 is a int"),
        (b'{"body": "x"}', r"a.jsonl, line 71 has no field 'text' but 'body'"),
        (b'{"text": ["x"]}', r"a.jsonl, line 71: the text is a list, not a str"),
    ],
    ids=["cut", "deep", "latin", "number", "other", "list"],
)
def test_a_line_that_is_none(line: bytes, message: str, tmp_path: Path) -> None:
    """It is named by its line in the file, empty ones counted."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + b"".join(json.dumps(text).encode() + b"\n" for text in TEXTS[:69]) + line + b"\n")
    failing(message, 69, path, tmp_path / "store")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, of an unknown kind, damaged: said with its name, and nothing is made of it."""
    path = tmp_path / "store"
    failing("nowhere.jsonl does not exist", None, tmp_path / "nowhere.jsonl", path)
    (tmp_path / "a.csv").write_text("x")
    failing(r"a.csv is none of .jsonl", None, tmp_path / "a.csv", path)
    (tmp_path / "empty").mkdir()
    failing("empty holds no file that ends in", None, tmp_path / "empty", path)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'"a"\n' * 10_000)[:-20])
    with pytest.raises(InputError, match=r"cut.jsonl.gz: cannot be read behind line \d+"):
        embed(tmp_path / "cut.jsonl.gz", tmp_path / "other", block_texts=100_000)
    if pytest.importorskip("pyarrow"):
        for name in ("a.parquet", "a.arrow"):
            (tmp_path / name).write_bytes(b"no such thing" * 10)
            failing(f"{name} cannot be read", None, tmp_path / name, path)
    assert not path.exists()


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    """Of a table, before anything is read."""
    failing("source has no column 'text' but 'name', 'body'", None, arrow_table(), tmp_path / "store")
    failing(
        "source has no column 'key' but 'name', 'body'", None, arrow_table(), tmp_path / "store", text="body", id="key"
    )
    failing(r"source: row 1: the text is None", 1, arrow_table(text=["a", None]), tmp_path / "store")


@pytest.mark.parametrize("source", [b"bytes", {"a": "text"}, 5, None])
def test_what_is_no_source(source: Any, tmp_path: Path) -> None:
    """Refused at once, with what could be given."""
    failing(r"source: got a .*; give an iterable of texts", None, source, tmp_path / "store")


def test_a_data_frame_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Iterating over one would give the names of its columns."""
    frame = pytest.importorskip("pandas").DataFrame({"text": ["a"]})
    failing(r"pyarrow.Table.from_pandas\(frame\)", None, frame, tmp_path / "store")


@pytest.mark.parametrize("form", ["list", "iterator", "file"])
def test_an_empty_source(form: str, tmp_path: Path) -> None:
    """There is nothing to embed: said so, and no store is begun."""
    (tmp_path / "a.jsonl").write_text("\n\n")
    source: Any = {"list": [], "iterator": iter(()), "file": tmp_path / "a.jsonl"}[form]
    failing("source: empty", None, source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """What was read is kept, but the store is not called complete: nobody knows of what."""
    path = lines(tmp_path / "a.jsonl", TEXTS)
    grown = iter([True])

    def grow(_: object) -> None:
        if next(grown, False):
            with open(path, "a") as file:
                file.write('"one more"\n')

    failing(r"a.jsonl was changed while it was read", None, path, tmp_path / "store", progress=grow)
    assert not open_store(tmp_path / "store").complete
    with pytest.raises(StoreError, match=r"source.bytes: the store has \d+, this run has \d+"):
        embed(path, tmp_path / "store")
    assert embed(path, tmp_path / "store", update=True).texts == 301


def test_a_text_that_does_not_fit(tmp_path: Path) -> None:
    """It is named by its place in the source; what was finished before stays."""
    device = SimulatedDevice("128MiB")
    with SimulatedEmbedder(device, memory=MemoryPolicy(wait_s=0, fallback=(), reserve=0)) as embedder:
        texts = [*TEXTS[:100], "w " * 8000, *TEXTS[100:]]
        with pytest.raises(InputTooLargeError, match=r"^source: entry 100 needs") as caught:
            embed_corpus(embedder, texts, tmp_path / "store", block_texts=64)
    assert (caught.value.index, caught.value.failed) == (100, [100])
    assert len(open_store(tmp_path / "store")) == 64


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("dtype", "int8"), ("block_texts", 0), ("block_texts", True), ("shard_bytes", 0), ("fixed_tokens", 0)),
        *(("precision", "int8"), ("kind", "passage"), ("nonsense", 1), ("prompt_name", "nobody's")),
    ],
)
def test_options_that_are_unknown_or_out_of_range(option: str, value: Any, tmp_path: Path) -> None:
    """Refused by name before a store is begun."""
    with pytest.raises(ConfigError, match=option):
        embed(TEXTS, tmp_path / "store", **{option: value})
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other rules")
def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in its place, a folder of other things, a folder without permission."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="file cannot be written"):
        embed(TEXTS, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="full holds other things; give an empty folder"):
        embed(TEXTS, tmp_path / "full")
    assert [each.name for each in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreError, match="cannot be written"):
        embed(TEXTS, Path("/proc/memsafe") if os.path.isdir("/proc") else Path("/nowhere/at/all"))


# windows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 200))
def test_windows_cover_everything_once(texts: list[str], most: int, most_chars: int) -> None:
    """In order, none empty, none larger than asked; where they end depends on what stands before that alone."""

    def cut(values: list[str]) -> list[Window]:
        return list(windows(open_source(values), most, most_chars))

    found = cut(texts)
    assert [text for window in found for text in window.texts] == texts
    assert [window.start for window in found] == [sum(len(w.texts) for w in found[:at]) for at in range(len(found))]
    assert [window.number for window in found] == list(range(len(found)))
    for window in found:
        assert 1 <= len(window.texts) <= most
        assert len(window.texts) == 1 or sum(map(len, window.texts[:-1])) < most_chars
    more = cut([*texts, "x", "y"])
    assert [window.texts for window in more[: len(found) - 1]] == [window.texts for window in found[:-1]]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_any_value_is_an_entry_or_an_input_error(value: Any) -> None:
    """Nothing else is raised, and what is taken is a str."""
    refused: InputError | None = None
    name, text = None, ""
    try:
        name, text = entry_of(value, Fields("text", "id", False), lambda: "here", 5)
    except InputError as error:
        refused = error
    assert refused is None or (refused.index == 5 and str(refused).startswith("here"))
    assert type(text) is str and (name is None or type(name) in (str, int))


def test_a_source_is_read_as_it_is_needed(tmp_path: Path) -> None:
    """Not as a whole: when a block is written, no more than a few blocks have been read."""
    read = 0

    def counting() -> Iterator[str]:
        nonlocal read
        for text in made_texts(2000):
            read += 1
            yield text

    ahead = []
    embed(counting(), tmp_path / "store", progress=lambda now: ahead.append(read - 64 * now.blocks))
    assert max(ahead) <= 4 * 64
