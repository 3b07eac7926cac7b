"""Model folders that are damaged on purpose: nothing waits, nothing reads without end, nothing but a ModelError comes out.

Most tests only look at a folder, as every load does first; a few load the model, where the libraries read what was looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memsafe import Embedder, ModelError, ModelNotFoundError
from memsafe.machine.files import parse_json
from memsafe.models import folder as model_folder
from memsafe.models import weights
from memsafe.models.weights import Checkpoint, inspect
from tests.odd_files import bound_socket, fifo
from tests.tiny_models import save_embedder

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings(
        "ignore:model. .* was saved as:UserWarning"
    ),  # what a kind is guessed from is damaged here
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="the places are Linux's")
hypothesis = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_embedder(tmp_path_factory.mktemp("saved") / "model", "bert", hidden_size=32, num_layers=1)
    (made / "README.md").write_text("# a model")
    return made


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def looked(folder: Path) -> Checkpoint:
    checkpoint = inspect(str(folder), kind="embedding")
    assert checkpoint is not None
    return checkpoint


def refused(folder: Path, *words: str) -> None:
    """Looking at `folder` raises a ModelError that holds `words`: the file, what is wrong, what to do."""
    with pytest.raises(ModelError) as caught:
        looked(folder)
    for word in (*words, ";"):
        assert word in str(caught.value)


# what is no file


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


NO_FILES = {
    "FIFO": fifo,
    "socket": bound_socket,
    "device": link_to("/dev/zero"),
    "device, a terminal": link_to("/dev/ptmx"),
}
PARSED = (
    "config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "adapter_config.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "1_Pooling/config.json",
)
OTHERS = ("model.safetensors", "tokenizer.json", "vocab.txt", "README.md", "modeling_own.py")


def put(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    file = folder / name
    file.unlink(missing_ok=True)
    make(file)
    return file


@linux
@pytest.mark.parametrize("name", [*PARSED, *OTHERS])
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_not_opened(folder: Path, name: str, what: str) -> None:
    """By us, nor by the libraries, some of which would wait for ever: the model is refused before they see it."""
    file = put(folder, name, NO_FILES[what])
    refused(folder, str(file), what.partition(",")[0], "fetch it again")


@linux
@pytest.mark.parametrize("name", PARSED)
def test_a_folder_where_a_file_is_due(folder: Path, name: str) -> None:
    file = put(folder, name, Path.mkdir)
    refused(folder, str(file), "a folder")


@linux
@pytest.mark.parametrize("name", PARSED)
def test_a_loop_of_links(folder: Path, name: str) -> None:
    """Where we read it, it is an error; else it is not there, as for the libraries."""
    file = put(folder, name, lambda path: path.symlink_to(path.name))
    if name in PARSED[:4]:
        refused(folder, str(file), "symbolic links")
    else:
        looked(folder)


@linux
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_link_to_nothing_is_a_file_that_is_missing(folder: Path, name: str) -> None:
    """A cache whose large files somebody has deleted: what is missing is named, and it is no damage."""
    put(folder, name, link_to("nowhere"))
    for other in ("vocab.txt", "tokenizer_config.json"):
        (folder / other).unlink()
    with pytest.raises(ModelNotFoundError, match="not complete"):
        looked(folder)


@linux
def test_a_folder_in_place_of_a_tokenizer_is_none(folder: Path) -> None:
    """transformers would make up an empty tokenizer."""
    for file in (*folder.glob("tokenizer*"), folder / "vocab.txt"):
        file.unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        looked(folder)


@linux
def test_what_nobody_reads_may_be_anything(folder: Path) -> None:
    """A socket of some program, a device, a loop, an unfinished log in JSON: not our affair, nor the libraries'."""
    fifo(folder / "control")
    bound_socket(folder / "editor.sock")
    (folder / "null").symlink_to("/dev/null")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "trainer_state.json").write_text("[" * 100_000)
    (folder / "generation_config.json").write_text("{")
    assert looked(folder).revision
    with Embedder(str(folder), device="cpu") as embedder:
        assert embedder.embed_documents(["a"]).shape == (1, 32)


# what is too large, or too deep


CONTENTS = {
    "deep": (b"[" * 100_000, "too deeply nested"),
    "deep, closed": (b'{"a":' * 101 + b"1" + b"}" * 101, "too deeply nested"),
    "deep behind a string": (b'["[\\"]\\\\", ' * 101, "too deeply nested"),
}


@pytest.mark.parametrize("name", PARSED)
@pytest.mark.parametrize("content", CONTENTS)
def test_what_would_overflow_the_stack_is_not_parsed(folder: Path, name: str, content: str) -> None:
    """Neither here nor by the libraries."""
    (folder / name).write_bytes(CONTENTS[content][0])
    refused(folder, str(folder / name), CONTENTS[content][1])


@pytest.mark.parametrize("name", [*PARSED, "tokenizer.json", "README.md"])
def test_what_is_huge_is_not_read(folder: Path, name: str) -> None:
    """A hole of four GiB: refused by its size, in no memory."""
    with (folder / name).open("wb") as stream:
        stream.truncate(4 << 30)
    tracemalloc.start()
    try:
        refused(folder, str(folder / name), "4.0 GiB")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_depth_is_that_of_the_document() -> None:
    """Brackets inside strings do not count, whatever is escaped; levels, not brackets, are what is limited."""
    value = {"a": "[" * 5000 + '"{\\' * 300, "b": [[] for _ in range(5000)], "[" * 300: '\\"[' * 200}
    assert parse_json(json.dumps(value).encode()) == value
    deepest: Any = 1
    for _ in range(100):
        deepest = [deepest]
    assert parse_json(json.dumps(deepest).encode()) == deepest
    with pytest.raises(ValueError, match="deeply"):
        parse_json(json.dumps([deepest]).encode())


@given(st.text(alphabet='[]{}",:\\a1 ', max_size=400))
@hypothesis
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    try:
        parsed = parse_json(text.encode())
    except ValueError:
        return
    assert parsed == json.loads(text)


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
def test_a_stack_or_memory_that_is_nearly_used_up(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the caller: what the parser raises then is a ValueError like any other."""

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(json, "loads", fail)
    with pytest.raises(ValueError, match=r"there is|stack"):
        parse_json(b"{}")


@pytest.mark.parametrize("name", PARSED[:4])
@pytest.mark.parametrize("content", [b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\x80", b"1" * 5000, b"5", b'"x"', b""])
def test_bytes_that_are_no_json_of_ours(folder: Path, name: str, content: bytes) -> None:
    """UTF-16, a byte order mark, no UTF-8, a number of 5,000 digits, values of another type, nothing."""
    (folder / name).write_bytes(content)
    refused(folder, str(folder / name), "cannot be read as JSON")


def test_the_file_that_is_no_json_is_named_though_its_loader_does_not(folder: Path) -> None:
    """sentence-transformers says "Expecting value: line 1 column 1", of whatever file."""
    (folder / "sentence_bert_config.json").write_text("half a f")
    with pytest.raises(ModelError, match=r"sentence_bert_config.json is no JSON.*fetch it again"):
        Embedder(str(folder), device="cpu")


# values that nothing can have


WRONG = (None, True, 0, -1, 10**30, 1e999, "", "x", "a\0b", "\ud800", "x" * 5000, "../..", [], [1, "x"], {}, {"a": []})
FIELDS = [
    *(("config.json", name) for name in ("architectures", "model_type")),
    *(("modules.json", name) for name in ("path", "type")),
    ("config_sentence_transformers.json", "model_type"),
    *(("adapter_config.json", name) for name in ("base_model_name_or_path", "revision")),
    ("model.safetensors.index.json", "weight_map"),
]


def change(folder: Path, file: str, name: str, value: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    if isinstance(content, list):
        content[-1][name] = value
    else:
        content[name] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(("file", "name"), FIELDS)
def test_a_field_of_any_type(folder: Path, file: str, name: str, value: Any) -> None:
    """What sentence-transformers might make of it is for it to say: nothing is raised here but a ModelError."""
    if file == "adapter_config.json":
        change(folder, file, "base_model_name_or_path", "some-org/some-base")
    try:
        change(folder, file, name, value)
        assert looked(folder).bytes_as("float16") > 0
        if file.endswith("index.json") and isinstance(value, dict):
            change(folder, file, name, {"a": value, "b": "x" * 5000, "c": "\ud800"})
            looked(folder)
    except ModelError:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([name for _, name in FIELDS])


@given(file=st.sampled_from(sorted({file for file, _ in FIELDS})), value=json_values)
@hypothesis
def test_files_of_any_json(saved: Path, file: str, value: Any) -> None:
    """Whatever a file holds."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(saved, Path(place, "model"), copy_function=os.link))
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_text(json.dumps(value))
        with suppress(ModelError):
            looked(folder)


@pytest.mark.parametrize(
    "paths",
    [["../.."], ["/"], ["config.json"], ["", "1_Pooling/..", "./", "1_Pooling/../1_Pooling"], ["x"] * 900],
    ids=["above", "the root", "a file", "itself", "many"],
)
def test_paths_of_modules(folder: Path, paths: list[str]) -> None:
    """Upstream says whether it takes them; each place counts once, and outside the folder nothing is searched."""
    once = looked(folder).elements
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"idx": i, "name": "x", "path": path, "type": "X"} for i, path in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert looked(folder).elements == once


def test_more_modules_than_any_model_has(folder: Path) -> None:
    (folder / "modules.json").write_text(json.dumps([{"path": f"m{i}"} for i in range(2000)]))
    refused(folder, "modules.json", "2,000 modules")


def test_settings_that_the_model_does_not_read(folder: Path) -> None:
    """A configuration may say anything under a name that its model ignores, and we must not trip over it."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "sliding_window": "x",
        "relative_attention": True,
        "position_buckets": "x",
        "head_dim": [1],
        "n_inner": {},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with Embedder(str(folder), device="cpu") as embedder:
        assert np.isfinite(embedder.embed_documents(["a", "b c"])).all()


@pytest.mark.parametrize(
    "model",
    [
        "~nobody-of-this-name/model",
        "./" + "x" * 5000,
        "x" * 5000,
        "a/" + "b" * 300,
        "./a\0b",
        "./\ud800",
        "/proc/1/mem",
    ],
)
def test_names_that_no_model_has(model: str) -> None:
    """Too long for any file system, of an unknown user, no text at all: not there, like any other."""
    with pytest.raises(ModelError):
        Embedder(model, device="cpu")


# headers of weights


def with_header(folder: Path, content: bytes, length: int | None = None, size: int | None = None) -> Path:
    file = folder / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(content) if length is None else length) + content)
        if size is not None:
            stream.truncate(size)
    return file


@pytest.mark.parametrize(
    ("length", "size"),
    [(0, None), (1 << 63, None), ((1 << 64) - 1, 1 << 40), (1 << 39, 1 << 40), (100_000_001, 1 << 30)],
)
def test_absurd_lengths_of_headers(folder: Path, length: int, size: int | None) -> None:
    """In a file that is as long as that, a hole, too: nothing of such a size is read."""
    file = with_header(folder, b"{}", length, size)
    tracemalloc.start()
    try:
        refused(folder, str(file), "fetch it again")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_too_long_to_be_read_counts_by_its_file(folder: Path) -> None:
    """safetensors reads headers of up to 100 MB; of those beyond 8 MiB the size of the data is taken."""
    with_header(folder, b"", 50_000_000, 60_000_008)
    assert looked(folder).bytes_as(None) == 10_000_000


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        "{}".encode("utf-16"),
        b"[]",
        b"null",
        b'{"a": null}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": "12", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": 5}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"4611686018427387903," * 200 + b'1], "data_offsets": [0, 4]}}',
    ],
    ids=lambda header: header[:60].decode("latin1"),
)
def test_headers_that_safetensors_never_writes(folder: Path, header: bytes) -> None:
    file = with_header(folder, header)
    refused(folder, str(file), "damaged")


entries = st.fixed_dictionaries({}, optional={"dtype": json_values, "shape": json_values, "data_offsets": json_values})


@given(
    st.dictionaries(st.text(max_size=4), entries | json_values, max_size=3).map(
        lambda value: json.dumps(value).encode()
    )
    | st.binary()
)
@hypothesis
def test_any_header(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Counts that are none, or a ModelError."""
    with tempfile.TemporaryDirectory() as place:
        file = with_header(Path(place), content)
        try:
            counts, rest = model_folder.header(file)
        except ModelError:
            return
        assert rest == 0 and all(isinstance(name, str) and count >= 0 for name, count in counts.items())


# what changes while it is looked at


def after_the_first_look(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Call `change` when all files have been looked at, before any is opened to be read."""
    look = model_folder.check_files

    def looked_at(folder: Path, **options: Any) -> None:
        look(folder, **options)
        change()

    monkeypatch.setattr(model_folder, "check_files", looked_at)


@linux
@pytest.mark.parametrize("name", ["config.json", "modules.json", "adapter_config.json", "model.safetensors"])
def test_a_fifo_that_takes_the_place_of_a_file(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    after_the_first_look(monkeypatch, lambda: put(folder, name, fifo))
    with pytest.raises(ModelError):
        looked(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", ""])
def test_files_that_vanish(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the folder is looked at: as if it had never been there, or an error of ours."""
    vanish = (lambda: (folder / name).unlink()) if name else (lambda: shutil.rmtree(folder))
    after_the_first_look(monkeypatch, vanish)
    with suppress(ModelError):
        looked(folder)


def test_weights_that_vanish_when_they_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = model_folder.open_regular

    def vanish(path: Path) -> Any:
        path.unlink()
        return opened(path)

    monkeypatch.setattr(model_folder, "open_regular", vanish)
    refused(folder, "model.safetensors", "cannot be read")


def test_a_folder_that_vanishes_after_loading(folder: Path) -> None:
    """A temporary folder, deleted while the model is checked: the model is there, and nothing of it is remembered."""
    checkpoint = looked(folder)
    assert checkpoint.revision
    shutil.rmtree(folder)
    assert checkpoint.revision == ""


def test_a_folder_of_too_many_files_has_no_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows then whether it has changed: nothing is remembered of it, and looking at it ends."""
    monkeypatch.setattr(model_folder, "_MOST_FILES", 12)
    assert looked(folder).revision == ""


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Where we are root, who may read everything, be somebody else meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder(saved: Path) -> Iterator[Path]:
    """A copy of the model where others may read it: pytest's own folders are closed to them."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        made = Path(shutil.copytree(saved, Path(place, "model")))
        yield made
        os.chmod(made, 0o755)


@linux
@pytest.mark.parametrize("name", ["config.json", "modules.json", "model.safetensors", ""])
def test_files_that_may_not_be_read(open_folder: Path, name: str, request: pytest.FixtureRequest) -> None:
    os.chmod(open_folder / name, 0)
    request.getfixturevalue("as_nobody")
    refused(open_folder, str(open_folder / name), "ermi", "let this user read it")


def test_a_base_in_a_folder_that_is_damaged(folder: Path, tmp_path: Path) -> None:
    """What an adapter stands on is looked at in the same way, and a folder that is its own base once more only."""
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    (base / "config.json").write_text("[" * 5000)
    change(folder, "adapter_config.json", "base_model_name_or_path", str(base))
    refused(folder, str(base / "config.json"), "deeply")
    change(folder, "adapter_config.json", "base_model_name_or_path", str(folder))
    assert looked(folder).bytes_as(None) > 0


@linux
@pytest.mark.parametrize("name", ["sentence_bert_config.json", "README.md"])
def test_loading_does_not_wait_for_a_fifo(folder: Path, name: str) -> None:
    """sentence-transformers opens these whatever they are."""
    put(folder, name, fifo)
    with pytest.raises(ModelError, match="is a FIFO"):
        Embedder(str(folder), device="cpu")


def test_a_panic_in_a_rust_library_is_a_model_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no Exception, and would pass every handler of a program."""
    import sentence_transformers

    class PanicException(BaseException):
        pass

    def build(*args: Any, **options: Any) -> None:
        raise PanicException("index out of range")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", build)
    with pytest.raises(ModelError, match=r"PanicException: index out of range"):
        Embedder(str(folder), device="cpu")
    assert weights.inspect(str(folder), kind="embedding") is not None
