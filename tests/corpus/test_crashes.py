"""A run over a corpus may end at any moment: what is finished stays, and going on gives the very same files."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsafe import StoreError, embed_corpus, open_store
from memsafe.stores import manifest as manifests
from memsafe.stores import shards, writer
from tests.corpus.helpers import in_child, made_texts, needs_fork, simulated, tree

TEXTS = [(f"id {number}", text) for number, text in enumerate(made_texts(1200))]
BLOCK, SHARD_BYTES = 64, 8 * 4 * 200


def embed(path: Path, texts: Any = TEXTS, **options: Any) -> Any:
    with simulated() as embedder:
        return embed_corpus(embedder, texts, path, **{"block_texts": BLOCK, "shard_bytes": SHARD_BYTES, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "store"
    embed(path)
    files = tree(path)
    assert len(files) > 10  # several shards
    return files


def finished(path: Path) -> int:
    """Texts that the manifest says are finished."""
    return len(open_store(path)) if (path / "manifest.jsonl").exists() else 0


def check_resumed(path: Path, whole: dict[str, bytes]) -> None:
    """Going on computes exactly what is missing, and the files are those of `whole`."""
    before = finished(path)
    report = embed(path)
    assert (report.skipped, report.computed, report.complete) == (before, len(TEXTS) - before, True)
    assert tree(path) == whole
    assert open_store(path).verify().ok


@needs_fork
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_moment(seed: int, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """SIGKILL at any moment, several times over: nothing finished is computed again, and the files are the same."""
    kill_and_go_on(seed, tmp_path / "store", whole)


@needs_fork
@pytest.mark.timeout(900)
def test_killed_at_fifty_random_moments(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """The same, fifty times."""
    started = [kill_and_go_on(1000 + seed, tmp_path / f"store{seed}", whole) for seed in range(50)]
    assert sum(0 < texts < len(TEXTS) for texts in started) >= 10  # it was in the middle of it


_seconds: list[float] = []
"""What a whole run takes in a child, once that was measured."""


def kill_and_go_on(seed: int, path: Path, whole: dict[str, bytes]) -> int:
    """Kill a run, and another that goes on; how many texts were finished when the first one was killed."""
    chance = random.Random(seed)
    while len(_seconds) < 3:
        begun = time.monotonic()
        assert in_child(lambda: embed(path.with_name(f"timed{len(_seconds)}"))) == 0
        _seconds.append(time.monotonic() - begun)
    texts = []
    for _ in range(2):
        in_child(lambda: embed(path), kill_after_s=chance.uniform(0, min(_seconds)))
        texts.append(finished(path))
    check_resumed(path, whole)
    return texts[0]


@needs_fork
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_step_to_the_disk(when: str, tmp_path: Path) -> None:
    """A run of a few blocks is killed before, and after, each of its steps to the disk in turn."""
    few = 2 * BLOCK
    embed(tmp_path / "few", TEXTS[:few])
    due = tree(tmp_path / "few")
    for step in range(1, 200):
        path = tmp_path / f"{step}"

        def work(path: Path = path, step: int = step) -> None:
            kill_at(step, when == "before")
            embed(path, TEXTS[:few])

        if in_child(work) == 0:
            assert step > 15  # there were no more steps
            break
        before = finished(path)
        report = embed(path, TEXTS[:few])
        assert (report.skipped, report.computed) == (before, few - before)
        assert tree(path) == due
    else:
        raise AssertionError("it never came to its end")


def kill_at(step: int, before: bool) -> None:
    """Let this process be killed at its `step`-th write, fsync or rename."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if before and count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    shards._write = counted(shards._write)


@needs_fork
def test_a_torn_block(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Killed in the middle of writing rows, digests or ids: half a block is on the disk and does not count."""
    for torn in range(3, 24, 2):
        path = tmp_path / f"{torn}"
        assert in_child(lambda path=path, torn=torn: (tear(torn), embed(path))) is None  # type: ignore[misc]
        check_resumed(path, whole)


def tear(number: int) -> None:
    """Let this process be killed in the middle of its `number`-th write to a file of rows, digests or ids."""
    write, count = shards._write, 0

    def torn(file: Any, place: int, content: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            write(file, place, memoryview(content)[: max(len(content) // 2, 1)])
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, place, content)

    shards._write = torn


@pytest.mark.parametrize(
    "rest",
    [b'{"block', b'{"number": 3, "rows": 64}\n', b"\0" * 200, b"\xff" * 50 + b"\n"],
    ids=["half", "no-checksum", "zeros", "garbage"],
)
def test_a_torn_last_line_of_the_manifest(rest: bytes, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """What follows the last whole line, be it half a line or garbage, is cut off."""
    path = tmp_path / "store"
    embed(path, stop=after(5))
    with open(path / "manifest.jsonl", "ab") as file:
        file.write(rest)
    check_resumed(path, whole)


def after(calls: int) -> Callable[[], bool]:
    """For `stop`: True from the call with this number on."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def test_damage_inside_the_manifest_is_refused(tmp_path: Path) -> None:
    """A line in the middle that is not what was written is no torn end: nothing is thrown away behind the user's back."""
    path = tmp_path / "store"
    embed(path)
    content = bytearray((path / "manifest.jsonl").read_bytes())
    content[content.index(b'"tokens"') + 10] ^= 1
    (path / "manifest.jsonl").write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest.jsonl, line 2: damaged"):
        embed(path)
    with pytest.raises(StoreError, match="line 2"):
        open_store(path)


def test_rows_are_on_the_disk_before_the_manifest_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a power cut leaves of the order of writes: data, fsync of each file, the line, its fsync; then the headers."""
    dirty: set[str] = set()
    lines = 0
    fsync, write, append = os.fsync, shards._write, manifests.ManifestWriter._append

    def synced(handle: int) -> None:
        fsync(handle)
        dirty.discard(os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else "")

    def written(file: Any, place: int, content: Any) -> None:
        write(file, place, content)
        if place:  # a header promises less than there is until it is replaced
            dirty.add(str(file.name))

    def line(self: Any, fields: dict[str, Any]) -> None:
        nonlocal lines
        if os.path.exists("/proc/self/fd"):
            assert not dirty
        append(self, fields)
        lines += 1

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(shards, "_write", written)
    monkeypatch.setattr(manifests.ManifestWriter, "_append", line)
    embed(tmp_path / "store", TEXTS[:300])
    assert lines == 6  # five blocks and the end


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk(tiny_disk: Path, tmp_path: Path) -> None:
    """No room in the middle: an error that says so, what is finished kept; with room made, the same files as ever."""
    texts = made_texts(6000)  # 6000 rows of 48 bytes in all
    embed(tmp_path / "whole", texts)
    (tiny_disk / "ballast").write_bytes(bytes(100 << 10))
    path = tiny_disk / "store"
    with pytest.raises(StoreError, match=r"cannot be written: No space left.*what is finished is kept"):
        embed(path, texts)
    before = finished(path)
    assert 0 < before < 6000
    assert open_store(path).verify().ok
    with pytest.raises(StoreError, match="No space left"):
        embed(path, texts)
    (tiny_disk / "ballast").unlink()
    with pytest.raises(StoreError, match="No space left"):
        embed(path, texts)
    assert before < finished(path) < 6000
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    report = embed(path, texts)
    assert report.complete and report.skipped > before
    assert tree(path) == tree(tmp_path / "whole")


@pytest.mark.parametrize("failing", ["rows", "manifest"])
def test_a_write_that_fails_once(
    failing: str, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk, in the data or in the manifest: a StoreError now, and the next run goes on."""
    count = 0
    fsync = os.fsync

    def fails(handle: int) -> None:
        nonlocal count
        count += 1
        if count == (16 if failing == "rows" else 19):
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StoreError, match="Input/output error"):
        embed(tmp_path / "store")
    monkeypatch.undo()
    assert open_store(tmp_path / "store").verify().ok
    check_resumed(tmp_path / "store", whole)


@needs_fork
def test_a_second_process_is_refused(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """While one writes, another one is told so, with its name; once that is killed, its lock holds nobody up."""
    path = tmp_path / "store"
    child = os.fork()
    if child == 0:
        try:
            embed(path, slowly(TEXTS))
        finally:
            os._exit(0)
    try:
        deadline = time.monotonic() + 60
        while not (path / "manifest.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(StoreError, match=rf"is being written by process {child} on .*wait until"):
            embed(path)
        assert len(open_store(path)) >= 0  # reading is free
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    check_resumed(path, whole)


def slowly(texts: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(texts):
        if number % BLOCK == 0:
            time.sleep(0.1)
        yield text


def test_a_second_writer_in_this_process_is_refused(tmp_path: Path) -> None:
    """The lock holds among threads too."""
    path = tmp_path / "store"
    with writer.WriterLock(tmp_path), pytest.raises(StoreError, match=f"process {os.getpid()}"):
        writer.WriterLock(tmp_path)
    embed(path)


def test_stopping_between_blocks(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """`stop` ends a run with whole blocks only, and the report says that it is not complete."""
    path = tmp_path / "store"
    report = embed(path, stop=after(7))
    assert not report.complete and 0 < report.texts < len(TEXTS) and report.texts % BLOCK == 0
    assert not open_store(path).complete and len(open_store(path)) == report.texts
    assert "not complete" in str(report)
    check_resumed(path, whole)


def test_an_error_of_the_callers_own_source(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """An iterator that fails in the middle: its error, as it is, and what was finished is kept."""

    def failing() -> Iterator[tuple[str, str]]:
        yield from TEXTS[:500]
        raise RuntimeError("the database went away")

    path = tmp_path / "store"
    with pytest.raises(RuntimeError, match="the database went away"):
        embed(path, failing())
    assert finished(path) >= 500 // BLOCK * BLOCK - 2 * BLOCK
    check_resumed(path, whole)


def test_rows_are_those_of_the_embedder(whole: dict[str, bytes], tmp_path: Path) -> None:
    """Plain numpy and json read what was written; rows and ids are those of the texts, in order."""
    for name, content in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    rows = [np.load(path, mmap_mode="r") for path in sorted(tmp_path.glob("data-1/rows-*.npy"))]
    ids = "".join(path.read_text() for path in sorted(tmp_path.glob("data-1/ids-*.jsonl")))
    assert ids.splitlines() == [f'"{name}"' for name, _ in TEXTS]
    with simulated() as embedder:
        np.testing.assert_array_equal(np.concatenate(rows), embedder.embed_documents([text for _, text in TEXTS]))
