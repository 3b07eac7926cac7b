"""The kernel's limit is what the device reports: programs in memory cgroups, and under rlimits, that the kernel enforces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from memsafe.config import MiB
from tests.hostile.cgroup import Box, Finished, limited, where

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory limits of Linux")

# Without torch: what is tested is small against 100 MiB, and starts fast.
HEAD = """
import json, mmap, os, sys
from memsafe.machine.host import open_host
MiB = 2**20
host = open_host()
def say(**figures): print(json.dumps(figures), flush=True)
def hold(num_bytes):
    block = mmap.mmap(-1, num_bytes)      # pages of its own: no malloc in between
    for at in range(0, num_bytes, 4096): block[at] = 1
    return block
"""


def figures(done: Finished) -> list[dict[str, int]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_limit_is_the_total_and_bounds_what_is_free() -> None:
    """In a cgroup of 192 MiB the snapshot says 192 MiB in all; free and what is used make up the limit."""
    with limited(192 * MiB) as box:
        done = box.run(HEAD + "s = host.snapshot(); say(total=s.total_bytes, free=s.free_bytes, own=s.reserved_bytes)")
    (seen,) = figures(done.check())
    assert seen["total"] == 192 * MiB
    assert 128 * MiB < seen["free"] < 192 * MiB


def test_what_is_called_free_can_really_be_had() -> None:
    """A program that takes what the snapshot calls free, less 4 MiB, lives; nothing was promised that is not there."""
    with limited(192 * MiB) as box:
        done = box.run(HEAD + "b = hold(host.snapshot().free_bytes - 4 * MiB); say(left=host.snapshot().free_bytes)")
        (seen,) = figures(done.check())
        assert seen["left"] <= 6 * MiB
        assert done.peak_bytes is None or done.peak_bytes > 180 * MiB


def test_beyond_what_is_called_free_the_kernel_kills() -> None:
    """16 MiB more than that, and there is no exception but SIGKILL: the snapshot is not timid either."""
    with limited(192 * MiB) as box:
        done = box.run(HEAD + "say(free=0); b = hold(host.snapshot().free_bytes + 16 * MiB); say(free=1)")
    assert done.killed and done.returncode == -9
    assert figures(done) == [{"free": 0}]


def test_page_cache_is_not_counted_as_used(tmp_path: Path) -> None:
    """Reading a file of 160 MiB fills the cgroup with page cache; free stays what it was, and can still be had."""
    file = tmp_path / "weights"
    with file.open("wb") as out:
        for _ in range(160):
            out.write(b"\1" * MiB)
    code = """
import ctypes, os
before = host.snapshot().free_bytes
descriptor = os.open(sys.argv[1], os.O_RDWR)
os.fsync(descriptor)                          # dirty pages cannot be dropped
os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
while os.read(descriptor, MiB): pass
after = host.snapshot().free_bytes
b = hold(after - 8 * MiB)
say(before=before, after=after)
"""
    with limited(192 * MiB) as box:
        done = box.run(HEAD + code, str(file))
        (seen,) = figures(done.check())
        assert abs(seen["before"] - seen["after"]) < 24 * MiB
        assert seen["after"] > 128 * MiB
        assert done.peak_bytes is None or done.peak_bytes > 180 * MiB


def test_a_neighbour_in_the_same_container_is_seen() -> None:
    """What another process of the cgroup takes is no longer free for this one."""
    with limited(256 * MiB) as box:
        neighbour = box.start(HEAD + "b = hold(96 * MiB); say(held=1); import time; time.sleep(600)")
        assert neighbour.stdout is not None and json.loads(neighbour.stdout.readline()) == {"held": 1}
        (beside,) = figures(box.run(HEAD + "say(free=host.snapshot().free_bytes)").check())
        neighbour.kill()
        neighbour.wait()
        (alone,) = figures(box.run(HEAD + "say(free=host.snapshot().free_bytes)").check())
    assert alone["free"] - beside["free"] > 90 * MiB


def test_a_box_that_is_resized_while_the_program_runs() -> None:
    """A container whose limit is raised (docker update, in-place resize of a pod) has more within about a second."""
    code = """
import time
say(total=host.snapshot().total_bytes)
for _ in range(100):
    if host.snapshot().total_bytes != 160 * MiB: break
    time.sleep(0.05)
say(total=host.snapshot().total_bytes)
"""
    with limited(160 * MiB) as box:
        process = box.start(HEAD + code)
        assert process.stdout is not None and json.loads(process.stdout.readline()) == {"total": 160 * MiB}
        box.set_limit(224 * MiB)
        assert json.loads(process.stdout.readline()) == {"total": 224 * MiB}
        assert process.wait(10) == 0


def test_the_device_of_torch_says_the_same() -> None:
    """open_device("cpu") in a container: its total is the limit, and a tensor shows up in what is free and held."""
    code = """
import json, torch
from memsafe.machine.device import open_device
device = open_device("cpu")
torch.ones(10)
before = device.snapshot()
x = torch.ones(32 * 2**20)
after = device.snapshot()
print(json.dumps([before.total_bytes, before.free_bytes - after.free_bytes, after.reserved_bytes - before.reserved_bytes]))
"""
    with limited(1024 * MiB) as box:
        total, less, more = json.loads(box.run(code).check().stdout)
    assert total == 1024 * MiB
    assert abs(less - 128 * MiB) < 8 * MiB and abs(more - 128 * MiB) < 8 * MiB


def test_under_an_rlimit_torch_raises_what_we_recognise() -> None:
    """Where the kernel refuses instead of killing: torch's error is classified, and the program goes on."""
    code = """
import resource, torch
from memsafe.machine.device import open_device
from memsafe.machine.refusals import is_out_of_memory
device = open_device("cpu")
size = device.snapshot().reserved_bytes
with open("/proc/self/statm") as file: virtual = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + 256 * 2**20,) * 2)
device = open_device("cpu")
free = device.snapshot().free_bytes
assert 200 * 2**20 < free <= 256 * 2**20, free
try:
    torch.empty(free + 2**20, dtype=torch.uint8)
except RuntimeError as error:
    assert is_out_of_memory(error), error
    x = torch.ones(2**20)
    print("refused, recognised, still alive")
"""
    box = Box(64 * 1024 * MiB, None)
    try:
        assert box.run(code).check().stdout == "refused, recognised, still alive\n"
    finally:
        box.close()


def test_the_box_is_always_removed() -> None:
    """Whether a program is killed, still runs, or the test fails: no cgroup stays behind."""
    folders = []
    with limited(64 * MiB) as box:
        folders.append(box.folder)
        box.start("import time; time.sleep(600)")
        assert box.run("x = bytearray(200 * 2**20)").killed

    def fail() -> None:
        with limited(64 * MiB) as box:
            folders.append(box.folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(folder is not None and not folder.exists() for folder in folders)


def test_the_reason_without_cgroups_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where nothing can be made: the reason names what was tried, and no folder is left."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    reason = where()
    assert isinstance(reason, str) and reason.startswith("no memory cgroup can be made")
    with pytest.raises(pytest.skip.Exception, match="no memory cgroup can be made"), limited(64 * MiB):
        pass
    with limited(8 * 1024 * MiB, rlimit=True) as box:
        assert box.folder is None and box.run("print(1)").check().stdout == "1\n"
