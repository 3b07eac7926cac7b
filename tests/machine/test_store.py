"""machine/store.py: what is remembered on disk, whatever happens to the disk. Learnt costs and self-checks alike."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memsafe.machine.store import CostStore, Store
from memsafe.models import checkstore
from memsafe.models.checkstore import CheckStore
from memsafe.models.selfcheck import SelfCheck
from memsafe.planning.batch import BatchShape
from memsafe.planning.cost import CostKey, CostModel, CostPrior
from memsafe.planning.speed import Sample
from tests.odd_files import bound_socket, fifo

KEY = CostKey("some/model", "abc", "float32", "sdpa", "packed", "cpu", "2.13.0")
CHECK_KEY = "0123456789abcdef" * 4
CHECK = SelfCheck(True, True, "", 1.5e-7, 0.25, True, "first")


def model(key: CostKey = KEY, tokens: int = 512) -> CostModel:
    made = CostModel(key, CostPrior(0.0, 17_000.0, 0.0, 0.0))
    made.observe(BatchShape(tokens, 4, tokens * tokens // 4, tokens // 4), tokens * 18_000, tokens * 19_000)
    made.lanes = 2
    made.speed.observe(Sample(tokens, tokens * 1e-5, 1e-3))
    return made


class Kind(NamedTuple):
    """One of the two things that are remembered."""

    load: Callable[[], Any]
    save: Callable[[], object]
    path: Path
    value: Any  # of the file, parsed


def costs() -> Kind:
    store = CostStore(os.path.join(os.environ["MEMSAFE_CACHE_DIR"], "costs"))
    return Kind(lambda: store.load(KEY), lambda: store.save(model()), store.path(KEY), json.loads(model().to_json()))


def checks() -> Kind:
    store = CheckStore(CHECK_KEY)
    inner: Store[SelfCheck] = store._store
    value = {"schema": checkstore._SCHEMA, "key": store._key, **dataclasses.asdict(CHECK)}
    return Kind(store.load, lambda: store.save(CHECK), inner.path(store._key), value)


both_kinds = pytest.mark.parametrize("kind", [costs, checks])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MEMSAFE_CACHE_DIR: a folder that does not exist yet."""
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def as_json(value: Any) -> Any:
    return json.loads(value.to_json()) if isinstance(value, CostModel) else value


# A good disk


@both_kinds
def test_what_was_saved_is_loaded(kind: Callable[[], Kind], caplog: pytest.LogCaptureFixture) -> None:
    """A value comes back whole, by another store too, from a folder that did not exist before, without a word."""
    it = kind()
    assert it.load() is None
    it.save()
    expected = it.value if kind is costs else CHECK
    assert as_json(it.load()) == as_json(kind().load()) == expected
    assert list(it.path.parent.iterdir()) == [it.path]
    assert warnings_in(caplog) == []


def test_a_difference_without_a_limit_is_remembered() -> None:
    """A model whose packed forward failed has an infinite difference, which JSON does not know."""
    failed = SelfCheck(False, True, "NotImplementedError: of its own", math.inf, 0.5)
    store = CheckStore(CHECK_KEY)
    store.save(failed)
    assert store.load() == failed
    assert "Infinity" not in store._store.path(store._key).read_text()


def test_each_key_has_its_own_file(folder: Path) -> None:
    """Another dtype is another model; neither sees the other."""
    store = CostStore(folder)
    half = dataclasses.replace(KEY, dtype="float16")
    store.save(model(KEY, 512))
    assert store.load(half) is None
    assert store.write(half, model(half, 1024).to_json())
    loaded = store.load(half)
    assert loaded is not None and loaded.key == half
    assert len(list(folder.iterdir())) == 2
    CheckStore(CHECK_KEY).save(CHECK)
    assert CheckStore(CHECK_KEY[::-1]).load() is None


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@both_kinds
def test_links_to_files_are_followed(
    kind: Callable[[], Kind], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that came with a container (a ConfigMap) consists of links; writing replaces the link, not its target."""
    it = kind()
    it.save()
    os.rename(it.path, tmp_path / "shipped.json")
    it.path.symlink_to(tmp_path / "shipped.json")
    shipped = (tmp_path / "shipped.json").read_bytes()
    assert it.load() is not None
    it.save()
    assert not it.path.is_symlink() and (tmp_path / "shipped.json").read_bytes() == shipped
    assert warnings_in(caplog) == []


def test_writers_and_readers_at_once_see_whole_files(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four writers and two readers on one file: every read is a whole model, and nothing is left lying about."""
    stores = [CostStore(folder) for _ in range(4)]
    stores[0].save(model())
    failures: list[str] = []

    def write(store: CostStore, tokens: int) -> None:
        failures.extend("write" for _ in range(25) if not store.save(model(tokens=tokens)))

    def read() -> None:
        failures.extend("read" for _ in range(50) if CostStore(folder).load(KEY) is None)

    threads = [threading.Thread(target=write, args=(store, 256 << i)) for i, store in enumerate(stores)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert warnings_in(caplog) == []
    assert [path.name for path in folder.iterdir()] == [stores[0].path(KEY).name]


# A bad file


@both_kinds
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b'{"schema": 99}',
        b" " * (2 << 20),
        b"[" * 50_000,
        b"[" * 900,
        b'{"a":' * 50_000,
        b"1" * 500_000,
        b"NaN",
    ],
    ids="empty cut binary null other-schema too-large too-deep deep too-deep-2 digits NaN".split(),
)
def test_a_broken_file_is_ignored_with_one_warning(
    kind: Callable[[], Kind], caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """It counts as nothing learnt, is said once per store however often it is met, and the next save repairs it."""
    it = kind()
    it.path.parent.mkdir(parents=True)
    it.path.write_bytes(content)
    assert it.load() is None
    assert it.load() is None
    assert len(warnings_in(caplog)) == 1
    assert str(it.path) in warnings_in(caplog)[0]
    it.save()
    assert it.load() is not None
    assert len(warnings_in(caplog)) == 1


def folder_with_something(path: Path) -> None:
    (path / "something").mkdir(parents=True)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


PLACES = {
    "a FIFO": fifo,
    "a socket": bound_socket,
    "a folder": folder_with_something,
    "a link to /dev/zero": link_to("/dev/zero"),
    "a link to a terminal": link_to("/dev/ptmx"),
    "a link to the log of the kernel": link_to("/proc/kmsg"),
    "a link to our own memory": link_to("/proc/self/mem"),
    "a loop of links": loop,
}


@pytest.mark.skipif(sys.platform != "linux", reason="the places are Linux's")
@pytest.mark.timeout(20)
@both_kinds
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_what_is_no_file_is_ignored_with_one_warning(
    kind: Callable[[], Kind], caplog: pytest.LogCaptureFixture, place: Callable[[Path], None]
) -> None:
    """Nothing is waited for, nothing without an end is read; saving repairs it, except a folder, which stays."""
    it = kind()
    it.path.parent.mkdir(parents=True)
    place(it.path)
    assert it.load() is None
    assert it.load() is None
    assert len(warnings_in(caplog)) == 1
    it.save()
    assert (it.load() is None) == it.path.is_dir()
    assert list(it.path.parent.iterdir()) == [it.path]
    assert len(warnings_in(caplog)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFO there")
@pytest.mark.timeout(20)
def test_a_fifo_that_comes_between_looking_and_opening(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is looked at again once it is open, and opening does not wait for a writer."""
    it = costs()
    it.save()
    look = os.stat

    def swap(path: Any, **options: Any) -> os.stat_result:
        found = look(path, **options)
        if path == it.path:
            it.path.unlink()
            os.mkfifo(it.path)
        return found

    monkeypatch.setattr(os, "stat", swap)
    assert it.load() is None
    assert "not a regular file" in warnings_in(caplog)[0]


def test_the_file_of_another_key_is_not_believed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file under our name that holds another model's figures is foreign: the whole key inside is compared."""
    store = CostStore(folder)
    other = dataclasses.replace(KEY, revision="def")
    store.save(model(other))
    os.replace(store.path(other), store.path(KEY))
    assert store.load(KEY) is None
    assert len(warnings_in(caplog)) == 1


CHANGES: dict[str, dict[str, Any]] = {
    "unknown head": {"head": "tail"},
    "a head of a model that is not packed": {"packed_ok": False},
    "in place on no path": {"packed_ok": False, "small_mask_ok": False, "head": "groups"},
    "a number for a bool": {"packed_ok": 1},
    "text for a bool": {"small_mask_ok": "true"},
    "a list for text": {"reason": ["x"]},
    "nothing for text": {"reason": None},
    "negative": {"max_difference": -1e-9},
    "text for a number": {"max_difference": "0"},
    "a bool for a number": {"seconds": True},
    "infinite": {"seconds": 1e999},
    "a foreign field": {"colour": "red"},
    "a foreign key": {"key": ["x"]},
    "another version": {"schema": 2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_field_of_a_check_is_looked_at(change: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """One wrong field, and nothing of the file is believed: packing by mistake would give wrong numbers."""
    it = checks()
    it.save()
    it.path.write_text(json.dumps({**it.value, **change}))
    assert it.load() is None
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SelfCheck)])
def test_a_check_with_a_field_missing(name: str) -> None:
    """Defaults are for programs; a file without a field is not ours."""
    it = checks()
    it.save()
    it.path.write_text(json.dumps({key: value for key, value in it.value.items() if key != name}))
    assert it.load() is None


# A bad disk


@both_kinds
def test_a_file_in_place_of_the_folder(
    kind: Callable[[], Kind], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing can be written, saving says so once; work goes on."""
    folder.write_text("a file")
    it = kind()
    assert it.save() in (False, None)
    it.save()
    assert it.load() is None
    assert len(warnings_in(caplog)) == 1


UNWRITABLE = ["/proc/memsafe", "/sys/memsafe", "/dev/null", "/dev/null/memsafe", "/" + "x" * 300, "/" + "x/" * 3000]


@pytest.mark.skipif(sys.platform != "linux", reason="the places are Linux's")
@both_kinds
@pytest.mark.parametrize("where", UNWRITABLE, ids=lambda where: where[:10] + f"({len(where)})")
def test_a_place_that_takes_no_files(
    kind: Callable[[], Kind], where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MEMSAFE_CACHE_DIR may point anywhere: what even root may not write, a device, a name that is too long."""
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", where)
    it = kind()
    it.save()
    assert it.load() is None
    assert len(warnings_in(caplog)) == 1


@both_kinds
def test_a_folder_that_vanishes(kind: Callable[[], Kind], folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody clears the cache while we run: nothing is known, the next save makes the folder again."""
    it = kind()
    it.save()
    for path in (it.path, it.path.parent, folder):
        path.unlink() if path.is_file() else path.rmdir()
    assert it.load() is None
    it.save()
    assert it.load() is not None
    assert warnings_in(caplog) == []


FULL = """
import logging, os, resource, signal, sys
logging.basicConfig(format="%(message)s")
from memsafe.machine.store import CostStore
from memsafe.planning.cost import CostKey, CostModel, CostPrior
store = CostStore(sys.argv[1])
model = CostModel(CostKey(*"abcdefg"), CostPrior(0.0, 1.0, 0.0, 0.0))
assert store.save(model)
before = store.path(model.key).read_bytes()
if sys.argv[2] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
else:
    os.chmod(sys.argv[1], 0o500)
    if os.geteuid() == 0:
        os.setgroups([])
        os.chown(sys.argv[1], 65534, 65534)
        os.chown(store.path(model.key), 65534, 65534)
        os.seteuid(65534)
model.lanes = 4
print(store.save(model), store.save(model), store.path(model.key).read_bytes() == before, len(os.listdir(sys.argv[1])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and rights are Linux's")
@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_takes_no_more(trouble: str) -> None:
    """Really full (no file may pass 16 bytes) and really read-only: the old file stays, no litter, one warning."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        os.chmod(place, 0o755)
        command = [sys.executable, "-c", FULL, os.path.join(place, "costs"), trouble]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "1"]
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "going on without" in done.stderr


@both_kinds
def test_a_failed_replacement_leaves_the_old_file_and_no_litter(
    kind: Callable[[], Kind], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the last step fails (a locked file), the old state stays readable and the temporary is gone."""
    it = kind()
    it.save()
    before = it.path.read_bytes()

    def refuse(source: str, target: str) -> None:
        raise PermissionError("locked")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        it.save()
    assert it.path.read_bytes() == before
    assert list(it.path.parent.iterdir()) == [it.path]
    assert "PermissionError" in warnings_in(caplog)[0]


# Anything at all

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.sampled_from([1e308, -1e308, 1e-308, 2**62 - 1, 2**61, 1e18, "groups", "flat", "first"])
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=8), inner, max_size=8),
    max_leaves=20,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any, how: str) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) > 1 or how == "replace":
        copy[path[0]] = changed(copy[path[0]], path[1:], new, how)
    elif how == "remove":
        del copy[path[0]]
    elif isinstance(copy, dict):
        copy["more"] = new
    else:
        copy.insert(path[0], new)
    return copy


def is_sound(value: Any) -> bool:
    """Whether what was loaded can be worked with: a cost model bounds, a check names a head there is."""
    if value is None:
        return True
    if isinstance(value, SelfCheck):
        return value.head in ("groups", "first", "last", "flat") and value.max_difference >= 0
    for shape in (BatchShape(1, 1, 1, 1), BatchShape(512, 4, 512 * 128, 128), BatchShape(1 << 20, 1, 1 << 40, 1 << 20)):
        assert 0 <= value.predict(shape) <= value.upper_bound(shape) <= value.resident_bound(shape)
    assert value.max_tokens_for(1 << 30, 100.0) >= 0 and value.token_ceiling(1 << 30) >= 1
    assert math.isfinite(value.relative_error)
    return CostModel.from_json(value.to_json()).key == KEY


def check_load(kind: Callable[[], Kind], content: bytes) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("memsafe").addHandler(handler)
    try:
        it = kind()
        it.path.parent.mkdir(parents=True, exist_ok=True)
        it.path.write_bytes(content)
        loaded = it.load()
        again = it.load()
    finally:
        logging.getLogger("memsafe").removeHandler(handler)
    assert is_sound(loaded) and is_sound(again)
    assert len(records) == (loaded is None), [record.getMessage() for record in records]


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@both_kinds
@fuzz
@given(content=st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_any_content_is_a_value_or_nothing(kind: Callable[[], Kind], content: bytes) -> None:
    """Arbitrary bytes and arbitrary JSON: what loads is sound, what does not is said once, and nothing raises."""
    check_load(kind, content)


@both_kinds
@fuzz
@given(data=st.data())
def test_a_file_changed_anywhere_is_a_value_or_nothing(kind: Callable[[], Kind], data: st.DataObject) -> None:
    """A good file with one to three values replaced, added or taken away, or with bytes cut off or changed."""
    value = kind().value
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(value)))
        value = changed(value, path, data.draw(anything), data.draw(st.sampled_from(["replace", "remove", "add"])))
    content = bytearray(json.dumps(value).encode())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    if content and data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check_load(kind, bytes(content))


extremes = st.sampled_from([1, 2, 3, 1000, 10**6, 10**9, 1 << 40, (1 << 62) - 1]) | st.integers(1, 1 << 20)
priors = st.sampled_from([0, 0.0, 5e-324, 1e-9, 1.0, 17_000.0, 1e12, 1e18, 2.0**62, 1e30, 1e308])


@pytest.mark.filterwarnings("error")
@fuzz
@given(data=st.data())
def test_any_figures_are_a_model_or_nothing(data: st.DataObject) -> None:
    """Figures of which each one alone is possible: what loads gives finite bounds."""
    value = costs().value
    value["prior"] = {name: data.draw(priors) for name in value["prior"]} | {"score_limit": data.draw(extremes)}
    row = st.tuples(extremes, extremes, st.just(0) | extremes, extremes, st.none() | extremes, st.none() | extremes)
    value["observations"] = data.draw(st.lists(row | row.map(lambda r: (*r[:4], 0, 0)), max_size=64))
    value["worst"] = data.draw(st.sampled_from([0, 0.0, 0.01, 1.0, 1e6, 1e18, 1e300, 1e308]))
    value["lanes"] = data.draw(st.none() | extremes)
    seconds = st.sampled_from([5e-324, 1e-300, 1e-9, 0.5, 999_999.0])
    value["speed"] = {
        "points": data.draw(st.lists(st.tuples(extremes, seconds, st.integers(1, 1000)), max_size=20)),
        "attention": data.draw(st.sampled_from([0.5, 2.0, 8.0])),
        "host_seconds": data.draw(st.sampled_from([0, 5e-324, 1e-3, 999_999.0])),
    }
    value["probes"] = data.draw(st.lists(extremes, max_size=7))
    check_load(costs, json.dumps(value).encode())
