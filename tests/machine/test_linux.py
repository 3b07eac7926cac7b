"""machine/linux.py: what the operating system lets this process have, on machines made of files and on this one."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memsafe.config import GiB, KiB, MiB
from memsafe.machine.host import open_host
from memsafe.machine.linux import LinuxHost

PAGE = 4096
NO_LIMIT_V1 = 9223372036854771712  # what the kernel writes: LONG_MAX rounded down to a page
V1 = "36 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V1_CPU = "33 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2 = "29 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V2_BESIDE_V1 = "41 31 0:38 {root} /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"


class Machine:
    """A made-up Linux below a folder: 16 GiB, 12 of them available; the process has 1 GiB resident."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", meminfo(MemTotal=16 * GiB, MemFree=4 * GiB, MemAvailable=12 * GiB))
        self.statm(virtual=8 * GiB, resident=1 * GiB, data=2 * GiB)
        self.write("proc/sys/vm/overcommit_memory", "0\n")
        self.write("proc/self/cgroup", "")
        self.write("proc/self/mountinfo", "23 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n")
        self.rlimits = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
        self.cores = 8
        self.now_s = 100.0

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def statm(self, *, virtual: int, resident: int, data: int) -> None:
        self.write("proc/self/statm", f"{virtual // PAGE} {resident // PAGE} 1000 1 0 {data // PAGE} 0\n")

    def mounts(self, *lines: str) -> None:
        self.write("proc/self/mountinfo", "23 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n" + "\n".join(lines) + "\n")

    def v1(
        self, place: str, limit: int, usage: int = 0, inactive: int = 0, memsw: tuple[int, int] | None = None
    ) -> None:
        folder = f"sys/fs/cgroup/memory{place}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{usage}\n")
        # The plain lines are this level's own and must not be taken for the totals.
        self.write(
            f"{folder}/memory.stat", f"cache 7\ninactive_file 7\ntotal_cache 9\ntotal_inactive_file {inactive}\n"
        )
        if memsw is not None:
            self.write(f"{folder}/memory.memsw.limit_in_bytes", f"{memsw[0]}\n")
            self.write(f"{folder}/memory.memsw.usage_in_bytes", f"{memsw[1]}\n")

    def v2(self, place: str, limit: str, usage: int = 0, inactive: int = 0, high: str = "max") -> None:
        folder = f"sys/fs/cgroup{place}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{usage}\n")
        stat = f"anon 5\nfile 6\nactive_file 3\nworkingset_inactive_file 1\ninactive_file {inactive}\nslab 1\n"
        self.write(f"{folder}/memory.stat", stat)

    def host(self, **options: float) -> LinuxHost:
        return LinuxHost(
            str(self.root),
            page_bytes=PAGE,
            getrlimit=lambda which: (self.rlimits[which], self.rlimits[which]),
            affinity=lambda: self.cores,
            clock=lambda: self.now_s,
            **options,
        )


def meminfo(**sizes: int) -> str:
    return "".join(f"{name + ':':<16}{size // KiB:>8} kB\n" for name, size in sizes.items())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_limits_the_machine_itself_is_the_limit(machine: Machine) -> None:
    """No cgroup, no rlimit: free is MemAvailable, total is MemTotal, held is the resident size."""
    snapshot = machine.host().snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes) == (12 * GiB, 16 * GiB)
    assert (snapshot.allocated_bytes, snapshot.reserved_bytes) == (GiB, GiB)
    assert snapshot.reusable_bytes == 0


def test_page_cache_is_not_counted_as_used_v1(machine: Machine) -> None:
    """cgroup v1: free is the limit minus usage without the inactive file pages of the whole subtree."""
    machine.write("proc/self/cgroup", "5:memory:/docker/abc\n0::/\n")
    machine.mounts(V1.format(root="/"), V2_BESIDE_V1.format(root="/"))
    machine.v1("/docker/abc", 4 * GiB, usage=3 * GiB, inactive=GiB)
    machine.v1("/docker", NO_LIMIT_V1)
    machine.v1("", NO_LIMIT_V1)
    snapshot = machine.host().snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes) == (2 * GiB, 4 * GiB)


def test_page_cache_is_not_counted_as_used_v2(machine: Machine) -> None:
    """cgroup v2: the same, from memory.max, memory.current and memory.stat."""
    machine.write("proc/self/cgroup", "0::/system.slice/app.service\n")
    machine.mounts(V2.format(root="/"))
    machine.v2("/system.slice/app.service", str(6 * GiB), usage=5 * GiB, inactive=2 * GiB)
    machine.v2("/system.slice", "max", usage=9 * GiB)
    snapshot = machine.host().snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes) == (3 * GiB, 6 * GiB)


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_nested_cgroups_binds(machine: Machine, version: int) -> None:
    """A parent with a larger limit that its other children have nearly used up binds before the child's own limit;
    the total is the smallest limit of all."""
    path = "/pod/container"
    if version == 1:
        machine.write("proc/self/cgroup", f"4:memory:{path}\n")
        machine.mounts(V1.format(root="/"))
        machine.v1(path, 4 * GiB, usage=GiB)
        machine.v1("/pod", 6 * GiB, usage=5 * GiB, inactive=512 * MiB)
        machine.v1("", NO_LIMIT_V1)
    else:
        machine.write("proc/self/cgroup", f"0::{path}\n")
        machine.mounts(V2.format(root="/"))
        machine.v2(path, str(4 * GiB), usage=GiB)
        machine.v2("/pod", str(6 * GiB), usage=5 * GiB, inactive=512 * MiB)
    snapshot = machine.host().snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes) == (GiB + 512 * MiB, 4 * GiB)


def test_both_versions_at_once(machine: Machine) -> None:
    """Hybrid: v1 has the memory controller, v2 is mounted beside it and has none; v1 counts."""
    machine.write("proc/self/cgroup", "9:name=systemd:/x\n4:memory:/x\n0::/x\n")
    machine.mounts(V1.format(root="/"), V2_BESIDE_V1.format(root="/"))
    machine.v1("/x", 2 * GiB, usage=GiB)
    machine.write("sys/fs/cgroup/unified/x/cgroup.procs", "1\n")
    assert machine.host().snapshot().free_bytes == GiB


@pytest.mark.parametrize("version", [1, 2])
def test_inside_a_cgroup_namespace(machine: Machine, version: int) -> None:
    """A container with its own namespace sees the path "/"; the mount itself is its cgroup."""
    if version == 1:
        machine.write("proc/self/cgroup", "4:memory:/\n")
        machine.mounts(V1.format(root="/"))
        machine.v1("", 3 * GiB, usage=GiB)
    else:
        machine.write("proc/self/cgroup", "0::/\n")
        machine.mounts(V2.format(root="/"))
        machine.v2("", str(3 * GiB), usage=GiB)
    assert machine.host().snapshot().free_bytes == 2 * GiB


def test_inside_a_container_without_a_namespace(machine: Machine) -> None:
    """docker with cgroup v1: the host's path is shown, but only the container's own part is mounted."""
    machine.write("proc/self/cgroup", "4:memory:/docker/0123abc\n")
    machine.mounts(V1.format(root="/docker/0123abc"))
    machine.v1("", 3 * GiB, usage=GiB)
    assert machine.host().snapshot().free_bytes == 2 * GiB


@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/mounted/here", "/docker-other"])
def test_a_path_that_is_not_visible_falls_back_to_what_is(machine: Machine, path: str) -> None:
    """A process outside of its namespace's root, or below a folder that is not shown, still has the mount's limit."""
    machine.write("proc/self/cgroup", f"0::{path}\n")
    machine.mounts(V2.format(root="/docker" if path == "/docker-other" else "/"))
    machine.v2("", str(3 * GiB), usage=GiB)
    assert machine.host().snapshot().free_bytes == 2 * GiB


def test_a_mount_point_with_a_space(machine: Machine) -> None:
    """mountinfo escapes blanks in octal."""
    machine.write("proc/self/cgroup", "0::/\n")
    machine.mounts("29 23 0:26 / /sys/fs/my\\040group rw - cgroup2 cgroup2 rw")
    machine.write("sys/fs/my group/memory.max", str(5 * GiB))
    machine.write("sys/fs/my group/memory.current", str(GiB))
    assert machine.host().snapshot().free_bytes == 4 * GiB


def test_memory_high_is_a_limit_too(machine: Machine) -> None:
    """At memory.high the kernel throttles: that much is the total, and free ends there."""
    machine.write("proc/self/cgroup", "0::/app\n")
    machine.mounts(V2.format(root="/"))
    machine.v2("/app", str(8 * GiB), usage=GiB, high=str(4 * GiB))
    snapshot = machine.host().snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes) == (3 * GiB, 4 * GiB)


def test_swapped_out_memory_counts_against_a_limit_on_memory_and_swap(machine: Machine) -> None:
    """cgroup v1 with swap accounting: what was swapped out still uses up memory.memsw."""
    machine.write("proc/self/cgroup", "4:memory:/a\n")
    machine.mounts(V1.format(root="/"))
    machine.v1("/a", 4 * GiB, usage=GiB, memsw=(4 * GiB, 3 * GiB))
    assert machine.host().snapshot().free_bytes == GiB


def test_no_limit_and_more_than_there_is_do_not_bind(machine: Machine) -> None:
    """ "max", v1's huge number, and a limit above the machine's memory leave the machine's own figures."""
    machine.write("proc/self/cgroup", "4:memory:/a\n0::/a\n")
    machine.mounts(V1.format(root="/"), V2.format(root="/"))
    machine.v1("/a", 64 * GiB, usage=40 * GiB)
    machine.v1("", NO_LIMIT_V1, usage=50 * GiB)
    machine.v2("/a", "max", usage=9 * GiB)
    snapshot = machine.host().snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes) == (12 * GiB, 16 * GiB)


def test_a_cgroup_over_its_limit_has_nothing_free(machine: Machine) -> None:
    """Free is never negative."""
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.mounts(V2.format(root="/"))
    machine.v2("/a", str(2 * GiB), usage=3 * GiB)
    assert machine.host().snapshot().free_bytes == 0


def test_rlimits_count_from_the_size_of_now(machine: Machine) -> None:
    """RLIMIT_AS leaves itself minus the virtual size, RLIMIT_DATA itself minus the data size."""
    host = machine.host()
    assert host.snapshot().free_bytes == 12 * GiB
    machine.rlimits[resource.RLIMIT_AS] = 10 * GiB
    snapshot = host.snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes) == (2 * GiB, 10 * GiB)
    machine.rlimits[resource.RLIMIT_DATA] = 3 * GiB
    snapshot = host.snapshot()
    assert (snapshot.free_bytes, snapshot.total_bytes) == (GiB, 3 * GiB)


def test_strict_overcommit_limits_what_malloc_may_promise(machine: Machine) -> None:
    """vm.overcommit_memory=2: free is the commit limit minus what is committed; otherwise that does not matter."""
    sizes = {"MemTotal": 16 * GiB, "MemAvailable": 12 * GiB, "CommitLimit": 8 * GiB, "Committed_AS": 5 * GiB}
    machine.write("proc/meminfo", meminfo(**sizes))
    assert machine.host().snapshot().free_bytes == 12 * GiB
    machine.write("proc/sys/vm/overcommit_memory", "2\n")
    assert machine.host().snapshot().free_bytes == 3 * GiB


def test_kernels_without_memavailable(machine: Machine) -> None:
    """Before Linux 3.14: free, buffers and page cache; SwapCached is something else."""
    sizes = {"MemTotal": 16 * GiB, "MemFree": GiB, "Buffers": GiB, "SwapCached": 7 * GiB, "Cached": 2 * GiB}
    machine.write("proc/meminfo", meminfo(**sizes))
    assert machine.host().snapshot().free_bytes == 4 * GiB


def test_a_resized_container_is_noticed(machine: Machine) -> None:
    """A limit that changes while the process runs counts at once, as usage does; one where there was none within a second."""
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.mounts(V2.format(root="/"))
    machine.v2("/a", str(4 * GiB), usage=GiB)
    host = machine.host()
    assert host.snapshot().free_bytes == 3 * GiB
    for limit in (8 * GiB, 3 * GiB):
        machine.v2("/a", str(limit), usage=2 * GiB)
        snapshot = host.snapshot()
        assert (snapshot.free_bytes, snapshot.total_bytes) == (limit - 2 * GiB, limit)
    machine.v2("/a", "max", usage=2 * GiB)
    assert host.snapshot().free_bytes == 12 * GiB
    machine.now_s += 1.5
    assert host.snapshot().free_bytes == 12 * GiB
    machine.v2("/a", str(4 * GiB), usage=2 * GiB)
    machine.now_s += 1.5
    assert host.snapshot().free_bytes == 2 * GiB


def test_a_process_that_moves_to_another_cgroup_is_followed(machine: Machine) -> None:
    """Moved into another cgroup: its limit counts."""
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.mounts(V2.format(root="/"))
    machine.v2("/a", "max")
    machine.v2("/b", str(GiB), usage=256 * MiB)
    host = machine.host()
    assert host.snapshot().free_bytes == 12 * GiB
    machine.write("proc/self/cgroup", "0::/b\n")
    machine.now_s += 1.5
    assert host.snapshot().free_bytes == 768 * MiB


def test_a_cgroup_that_has_gone_does_not_raise(machine: Machine) -> None:
    """Files that vanish between two readings: the process is somewhere else now, and what limits it there counts."""
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.mounts(V2.format(root="/"))
    machine.v2("/a", str(4 * GiB), usage=GiB)
    host = machine.host()
    host.snapshot()
    for file in (machine.root / "sys/fs/cgroup/a").iterdir():
        file.unlink()
    assert host.snapshot().free_bytes == 12 * GiB
    machine.v2("/b", str(4 * GiB), usage=GiB)
    machine.write("proc/self/cgroup", "0::/b\n")
    machine.now_s += 1.5
    assert host.snapshot().free_bytes == 3 * GiB


def test_hidden_procfs(tmp_path: Path) -> None:
    """Nothing readable at all: the C library's figure for the machine, and no exception."""
    snapshot = LinuxHost(str(tmp_path)).snapshot()
    assert snapshot.total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < snapshot.free_bytes <= snapshot.total_bytes
    assert snapshot.reserved_bytes == 0


@pytest.mark.parametrize(
    ("quota", "cores"),
    [(("-1", "100000"), 8), (("200000", "100000"), 2), (("350000", "100000"), 3), (("50000", "100000"), 1)],
)
def test_cores_under_a_quota_v1(machine: Machine, quota: tuple[str, str], cores: int) -> None:
    """cpu.cfs_quota_us over cpu.cfs_period_us, whole cores, at least one; -1 is no quota."""
    machine.write("proc/self/cgroup", "3:cpu,cpuacct:/a\n2:cpuset:/b\n")
    machine.mounts(V1_CPU.format(root="/"))
    machine.write("sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", quota[0] + "\n")
    machine.write("sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", quota[1] + "\n")
    assert machine.host().num_cores() == cores


@pytest.mark.parametrize(
    ("inner", "outer", "cores"), [("max 100000", "max 100000", 8), ("400000 100000", "150000 50000", 3)]
)
def test_cores_under_nested_quotas_v2(machine: Machine, inner: str, outer: str, cores: int) -> None:
    """cpu.max: the smallest quota of all levels."""
    machine.write("proc/self/cgroup", "0::/pod/a\n")
    machine.mounts(V2.format(root="/"))
    machine.write("sys/fs/cgroup/pod/a/cpu.max", inner + "\n")
    machine.write("sys/fs/cgroup/pod/cpu.max", outer + "\n")
    assert machine.host().num_cores() == cores


def test_cores_are_read_once_a_second(machine: Machine) -> None:
    """They are asked for several times in each call; a quota that changes is seen a second later."""
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.mounts(V2.format(root="/"))
    machine.write("sys/fs/cgroup/a/cpu.max", "400000 100000\n")
    host = machine.host()
    assert host.num_cores() == 4
    machine.write("sys/fs/cgroup/a/cpu.max", "200000 100000\n")
    machine.now_s += 0.9
    assert host.num_cores() == 4
    machine.now_s += 0.2
    assert host.num_cores() == 2


def test_affinity_bounds_the_cores(machine: Machine) -> None:
    """Fewer allowed CPUs than the quota gives."""
    machine.cores = 2
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.mounts(V2.format(root="/"))
    machine.write("sys/fs/cgroup/a/cpu.max", "600000 100000\n")
    assert machine.host().num_cores() == 2


@pytest.mark.parametrize("name", ["flags", "Features"])
def test_instruction_sets(machine: Machine, name: str) -> None:
    """x86 and ARM write them under different names."""
    machine.write(
        "proc/cpuinfo", f"processor\t: 0\nmodel name\t: flags of sorts\n{name}\t\t: fpu bf16 sse\n\nprocessor: 1\n"
    )
    assert machine.host().cpu_features() == {"fpu", "bf16", "sse"}
    assert machine.host().cpu_vendor() == ""
    machine.write("proc/cpuinfo", f"processor: 0\nvendor_id\t: AuthenticAMD\n{name}: fpu\n")
    assert machine.host().cpu_vendor() == "AuthenticAMD"


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads this machine's procfs")


@linux
def test_the_peak_can_be_restarted_here() -> None:
    """After reset_peak the high-water mark starts from the present size and sees 64 MiB come and go."""
    host = open_host()
    if not host.reset_peak():
        pytest.skip("this kernel has no /proc/self/clear_refs")
    before = host.resident_bytes()
    block = mmap.mmap(-1, 64 * MiB)  # not of a heap, which may keep what is freed
    for place in range(0, 64 * MiB, mmap.PAGESIZE):
        block[place] = 1
    block.close()
    peak = host.peak_resident_bytes()
    assert peak is not None and 60 * MiB <= peak - before <= 80 * MiB
    assert host.reset_peak()
    again = host.peak_resident_bytes()
    assert again is not None and again < peak - 32 * MiB


@linux
def test_a_forked_child_sees_itself() -> None:
    """After a fork the same object reports the child's memory, and both go on working."""
    host = open_host()
    host.snapshot()
    parent = host.resident_bytes()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        block = bytearray(96 * MiB)
        os.write(send, f"{host.snapshot().reserved_bytes} {len(block)}".encode())
        os._exit(0)
    os.close(send)
    text = os.read(receive, 100)
    os.close(receive)
    os.waitpid(child, 0)
    assert int(text.split()[0]) > 90 * MiB
    assert abs(host.snapshot().reserved_bytes - parent) < 32 * MiB


@linux
def test_the_address_space_limit_of_a_real_process() -> None:
    """Under a real RLIMIT_AS what the snapshot calls free can be allocated nearly all, and no more than that."""
    code = """
import resource, sys
from memsafe.machine.host import open_host
host = open_host()
resource.setrlimit(resource.RLIMIT_AS, (600 * 2**20, 600 * 2**20))
free = host.snapshot().free_bytes
assert host.snapshot().total_bytes == 600 * 2**20, host.snapshot()
block = bytearray(free - 8 * 2**20)
del block
try:
    bytearray(free + 2 * 2**20)
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr


@linux
def test_a_snapshot_is_cheap() -> None:
    """Well under 100 microseconds: the median of 500 on this machine, in this thread's processor time."""
    host = open_host()
    host.snapshot()
    times = []
    for _ in range(500):
        start = time.thread_time()
        host.snapshot()
        times.append(time.thread_time() - start)
    assert sorted(times)[250] < 100e-6
