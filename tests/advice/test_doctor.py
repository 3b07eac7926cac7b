"""memsafe.doctor: facts of this machine, findings about machines that are not here, and two machines side by side."""

from __future__ import annotations

import copy
import json
import os
from types import SimpleNamespace
from typing import Any

import pytest

from memsafe import doctor
from memsafe.attention import kernels
from memsafe.config import GiB, MiB
from memsafe.machine import nvml
from memsafe.machine.linux import LinuxHost
from memsafe.models import products
from memsafe.runtimes import int8_instructions


def machine(**changes: Any) -> dict[str, Any]:
    """The facts of a quiet machine with 16 cores and no card, with `changes`."""
    facts: dict[str, Any] = {
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "system": {"platform": "Linux x86_64", "wsl": False, "cards without torch": ""},
        "memory": {"free_bytes": 50 * GiB, "total_bytes": 64 * GiB, "limits": {}},
        "cpu": {"torch threads": 16, "cores to use": 16},
        "devices": [],
        "allocator": {"in_force": "expandable_segments:True", "status": "set", "note": ""},
    }
    return facts | changes


def card(capability: tuple[int, int], **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": "cuda:0",
        "kind": "cuda",
        "capability": list(capability),
        "free_bytes": 15 * GiB,
        "total_bytes": 15 * GiB,
        "reserved_bytes": 0,
        "kernels": kernels.offered(capability),
    }
    return facts | changes


def texts(**changes: Any) -> list[str]:
    return [f"{found.level}: {found.text}" for found in doctor.findings_of(**machine(**changes))]


def test_a_quiet_machine_has_no_findings() -> None:
    """Nothing is said for the sake of saying something."""
    assert texts() == []


def test_what_a_t4_lacks() -> None:
    """No flash, no cuDNN attention, no bfloat16; memory-efficient attention is there. An H200 has all of them."""
    (found,) = texts(devices=[card((7, 5))])
    assert all(word in found for word in ("flash", "cuDNN", "bfloat16", "float16", "warning"))
    offered = kernels.offered((7, 5))
    assert offered["sdpa flash"].startswith("no") and offered["sdpa cuDNN"].startswith("no")
    assert offered["sdpa memory-efficient"] == "yes"
    assert texts(devices=[card((9, 0), kernels={"packed flash (varlen_attn)": "yes"})]) == []
    assert kernels.offered((9, 0))["sdpa flash"] == "yes"


def test_neighbours_on_the_card_are_named() -> None:
    """9 of 15 GiB that are not this process's: who holds them, by program and never by argument."""
    holders = [
        {"pid": 7, "program": "python3", "used_bytes": 9 * GiB, "ours": False},
        {"pid": 8, "program": "pytest", "used_bytes": GiB, "ours": True},
    ]
    (found,) = texts(devices=[card((9, 0), free_bytes=6 * GiB, held_by=holders, kernels={})])
    assert "9.0 GiB of 15.0 GiB" in found and "python3" in found and "pytest" not in found
    (hidden,) = texts(devices=[card((9, 0), free_bytes=6 * GiB, kernels={})])
    assert "the driver does not say" in hidden
    why = nvml.cards(Library(ImportError("no pynvml")))[1]
    (told,) = texts(devices=[card((9, 0), free_bytes=6 * GiB, kernels={}, **{"holders unknown": why})])
    assert "does not say: the NVIDIA driver cannot be asked" in told


@pytest.mark.parametrize(
    ("changes", "level", "says"),
    [
        ({"versions": {"transformers": "4.57.1"}}, "warning", "padded"),
        ({"cpu": {"torch threads": 64, "cores to use": 2}}, "warning", "OMP_NUM_THREADS=2"),
        ({"memory": {"limits": {"cgroup a/memory.max": 800 * MiB}}}, "warning", "800.0 MiB (cgroup a/memory.max)"),
        ({"system": {"cards without torch": "the driver sees a T4"}}, "problem", "the driver sees a T4"),
        ({"system": {"wsl": True}}, "note", "expandable_segments"),
        ({"system": {"platform": "Windows AMD64"}}, "warning", "536.40"),
        ({"allocator": {"in_force": None, "status": "late", "note": "torch had begun"}}, "warning", "torch had begun"),
    ],
)
def test_known_bad_combinations(changes: dict[str, Any], level: str, says: str) -> None:
    """Each is found by its fact alone, and says what to do."""
    (found,) = texts(**changes)
    assert found.startswith(level) and says in found


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real figures, JSON and back, no difference to itself; no secret of the environment, however it is called."""
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("SOME_PASSWORD", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = doctor.examine()
    assert ("oneDNN" in found.cpu["float32"]) is products.pays()
    assert found.cpu["int8"] == ": ".join(int8_instructions(found.cpu["features"]))
    assert found.cpu["cores to use"] >= 1 and found.memory["free_bytes"] > 0
    assert "torch" in found.versions and found.settings["OMP_NUM_THREADS"] == "2"
    told = json.dumps(found.to_dict()) + str(found)
    assert "hf_very_secret" not in told and "hunter2" not in told and os.path.expanduser("~") + "/" not in told
    assert doctor.compare(found.to_dict(), json.loads(json.dumps(found.to_dict()))) == []
    assert found.allocator["status"] in ("set", "user", "late", "unsupported")


@pytest.mark.parametrize(
    ("features", "told", "means"),
    [
        ({"avx2", "avx512f", "avx512_vnni", "amx_int8"}, "AMX", "much faster"),
        ({"avx2", "avx_vnni"}, "VNNI", "int8 is faster"),
        ({"avx2", "fma"}, "AVX without VNNI", "little time"),
        ({"asimd", "asimddp"}, "dot products", "faster"),
        (set(), "unknown instructions", "must be tried"),
    ],
)
def test_what_multiplies_int8_is_said(features: set[str], told: str, means: str) -> None:
    """By the processor's instructions, best first."""
    found = int8_instructions(features)
    assert found[0] == told and means in found[1]


def test_two_machines_differ_where_it_matters_first() -> None:
    """Versions, cards and limits are compared; free bytes and process numbers are not. What matters comes first, and says why."""
    one = machine(devices=[card((7, 5), held_by=[{"pid": 1}])])
    other = copy.deepcopy(one)
    other["devices"][0] |= {"capability": [9, 0], "free_bytes": 1, "held_by": [{"pid": 2}]}
    other["memory"]["free_bytes"] = 3
    other["versions"] |= {"torch": "2.11.0", "peft": "0.18"}
    found = doctor.compare(one, other)
    assert [(d.where, bool(d.matters)) for d in found] == [
        ("versions.torch", True),
        ("devices.0.capability", True),
        ("versions.peft", False),
    ]
    assert found[1].one == [7, 5] and found[1].other == [9, 0]
    gone = doctor.compare(one, machine())
    assert {d.where for d in gone} == {"devices.0"} and all(d.matters for d in gone)


# NVIDIA's library


class Library:
    """What stands for pynvml: one card of 16 GiB with three processes."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.open = error, 0

    def nvmlInit(self) -> None:
        if self.error is not None:
            raise self.error
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.159.04"

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=16 * GiB, used=9 * GiB)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "Tesla T4"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-1"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        pids = ((os.getpid(), GiB), (99, 8 * GiB), (100, None))
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in pids]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:
        raise RuntimeError("not supported")

    def nvmlSystemGetProcessName(self, pid: int) -> bytes:
        if pid == 100:
            raise RuntimeError("not found")
        return b"/usr/bin/python3 --password=hunter2"


def test_holders_of_a_card() -> None:
    """Ours is known as ours; programs by the last part of their name, without arguments; what is hidden stays hidden."""
    library = Library()
    (found,), why = nvml.cards(library)
    assert why == "" and library.open == 0
    assert (found.name, found.driver, found.used_bytes) == ("Tesla T4", "580.159.04", 9 * GiB)
    by_pid = {holder.pid: holder for holder in found.holders}
    assert by_pid[os.getpid()].ours
    assert (by_pid[99].program, by_pid[99].used_bytes, by_pid[99].ours) == ("python3", 8 * GiB, False)
    assert (by_pid[100].program, by_pid[100].used_bytes) == ("", None)


def test_no_driver_is_said_and_raises_nothing() -> None:
    """As on every machine without a card."""
    found, why = nvml.cards(Library(RuntimeError("Driver Not Loaded")))
    assert found == [] and "Driver Not Loaded" in why


def test_cards_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card and torch's CPU build: a problem, with the remedy."""
    cards = nvml.cards(Library())
    monkeypatch.setattr(nvml, "cards", lambda: cards)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = doctor.examine()
    assert any(each.level == "problem" and "Tesla T4" in each.text for each in found.findings)


def test_limits_of_a_container_have_names(tmp_path: Any) -> None:
    """cgroup levels and rlimits, smallest first, by the names that an administrator knows."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 29 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    job = tmp_path / "sys/fs/cgroup/job"
    job.mkdir(parents=True)
    (job / "memory.max").write_text(str(GiB))
    host = LinuxHost(str(tmp_path), getrlimit=lambda which: (2 * GiB, 2 * GiB))
    names = dict(host.limits())
    assert host.limits()[0] == ("cgroup job/memory.max", GiB)
    assert names["RLIMIT_AS"] == 2 * GiB
