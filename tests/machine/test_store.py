"""memsafe.machine.store: learnt costs on disk, whatever happens to the disk."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from pathlib import Path

import pytest

from memsafe.machine.store import CostStore
from memsafe.planning.batch import BatchShape
from memsafe.planning.cost import CostKey, CostModel, CostPrior

KEY = CostKey("some/model", "abc", "float32", "sdpa", "packed", "cpu", "2.13.0")


def model(key: CostKey = KEY, tokens: int = 512) -> CostModel:
    made = CostModel(key, CostPrior(0.0, 17_000.0, 0.0, 0.0))
    made.observe(BatchShape(tokens, 4, tokens * tokens // 4, tokens // 4), tokens * 18_000)
    return made


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_was_saved_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model comes back whole, from a directory that did not exist before, without a word."""
    store = CostStore(tmp_path / "a" / "b")
    assert store.load(KEY) is None
    saved = model()
    saved.target_tokens = 1024
    assert store.save(saved)
    loaded = store.load(KEY)
    assert loaded is not None
    assert loaded.to_json() == saved.to_json()
    assert [path.name for path in store.directory.iterdir()] == [f"{KEY.digest()}.json"]
    assert warnings_in(caplog) == []


def test_each_key_has_its_own_file(tmp_path: Path) -> None:
    """Another dtype is another model; neither sees the other."""
    store = CostStore(tmp_path)
    half = dataclasses.replace(KEY, dtype="float16")
    store.save(model(KEY, 512))
    assert store.load(half) is None
    store.save(model(half, 1024))
    loaded = store.load(half)
    assert loaded is not None and loaded.key == half
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"null", b'{"schema": 99}', b" " * (2 << 20), b"[" * 50_000],
    ids=["empty", "cut off", "binary", "null", "other schema", "too large", "too deep"],
)
def test_a_broken_file_is_ignored_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """It counts as nothing learnt, is said once per store however often it is met, and the next save repairs it."""
    store = CostStore(tmp_path)
    store.path(KEY).write_bytes(content)
    assert store.load(KEY) is None
    assert store.load(KEY) is None
    assert len(warnings_in(caplog)) == 1
    assert str(store.path(KEY)) in warnings_in(caplog)[0]
    assert store.save(model())
    assert store.load(KEY) is not None
    assert len(warnings_in(caplog)) == 1


def test_the_file_of_another_key_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file under our name that holds another model's figures is foreign: the whole key inside is compared."""
    store = CostStore(tmp_path)
    other = dataclasses.replace(KEY, revision="def")
    store.save(model(other))
    os.replace(store.path(other), store.path(KEY))
    assert store.load(KEY) is None
    assert len(warnings_in(caplog)) == 1


def test_a_file_in_place_of_the_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing can be written, saving says so once and returns False; work goes on."""
    (tmp_path / "occupied").write_text("a file")
    store = CostStore(tmp_path / "occupied")
    assert store.save(model()) is False
    assert store.save(model()) is False
    assert store.load(KEY) is None
    assert len(warnings_in(caplog)) == 1


def test_a_failed_replacement_leaves_the_old_file_and_no_litter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the last step fails (a full disk, a locked file), the old state stays readable and the temporary is gone."""
    store = CostStore(tmp_path)
    store.save(model(tokens=512))
    before = store.path(KEY).read_bytes()

    def refuse(source: str, target: str) -> None:
        raise PermissionError("locked")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        assert store.save(model(tokens=4096)) is False
    assert store.path(KEY).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [store.path(KEY).name]
    assert "PermissionError" in warnings_in(caplog)[0]


def test_a_directory_in_place_of_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Unreadable and unreplaceable: ignored both ways, with one warning."""
    store = CostStore(tmp_path)
    (store.path(KEY) / "something").mkdir(parents=True)
    assert store.load(KEY) is None
    assert store.save(model()) is False
    assert len(warnings_in(caplog)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [store.path(KEY).name]


def test_writers_and_readers_at_once_see_whole_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four writers and two readers on one file: every read is a whole model, and nothing is left lying about."""
    stores = [CostStore(tmp_path) for _ in range(4)]
    stores[0].save(model())
    failures: list[str] = []

    def write(store: CostStore, tokens: int) -> None:
        failures.extend("write" for _ in range(25) if not store.save(model(tokens=tokens)))

    def read() -> None:
        failures.extend("read" for _ in range(50) if CostStore(tmp_path).load(KEY) is None)

    threads = [threading.Thread(target=write, args=(store, 256 << i)) for i, store in enumerate(stores)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert warnings_in(caplog) == []
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY.digest()}.json"]
