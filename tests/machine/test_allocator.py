"""machine/allocator.py: set-up before torch begins, and giving memory back."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator

import pytest
import torch

from memsafe.machine import allocator

CUDA_NAME, NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
CONF = "expandable_segments:True"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process on a plain Linux: nothing set, nothing begun."""
    saved = {name: os.environ.pop(name) for name in (CUDA_NAME, NAME, "PYTORCH_HIP_ALLOC_CONF") if name in os.environ}
    monkeypatch.setattr(allocator, "_ours", None)
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with warnings.catch_warnings():
        yield
    for name in (CUDA_NAME, NAME, "PYTORCH_HIP_ALLOC_CONF"):
        os.environ.pop(name, None)
    os.environ.update(saved)


def test_both_names_are_set_to_the_same_string() -> None:
    """torch versions differ in which name they read for which key; both hold the policy's string."""
    state = allocator.configure(CONF)
    assert (state.status, state.in_force) == ("set", CONF)
    assert os.environ[CUDA_NAME] == os.environ[NAME] == CONF


def test_again_is_the_same() -> None:
    """A second model in one process finds the setting in force; it is ours and not "the user's"."""
    allocator.configure(CONF)
    state = allocator.configure(CONF)
    assert (state.status, state.in_force) == ("set", CONF)
    changed = allocator.configure("max_split_size_mb:64")
    assert (changed.status, os.environ[NAME], os.environ[CUDA_NAME]) == (
        "set",
        "max_split_size_mb:64",
        "max_split_size_mb:64",
    )


@pytest.mark.parametrize("name", [CUDA_NAME, NAME, "PYTORCH_HIP_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["garbage_collection_threshold:0.8", "", CONF])
def test_what_the_user_set_is_left_alone(name: str, value: str) -> None:
    """One name set by the user, even to nothing: no name is changed or added, and the note says which."""
    os.environ[name] = value
    before = dict(os.environ)
    state = allocator.configure(CONF)
    assert (state.status, state.in_force) == ("user", value)
    assert name in state.note
    assert dict(os.environ) == before
    if name != "PYTORCH_HIP_ALLOC_CONF":
        assert ({CUDA_NAME, NAME} - {name}).pop() + " is not set" in state.note


def test_two_names_that_differ_are_reported() -> None:
    """torch would split the keys between them; the user is told, and nothing is changed."""
    os.environ[CUDA_NAME], os.environ[NAME] = "max_split_size_mb:64", "max_split_size_mb:128"
    state = allocator.configure(CONF)
    assert state.status == "user" and "differ" in state.note
    assert (os.environ[CUDA_NAME], os.environ[NAME]) == ("max_split_size_mb:64", "max_split_size_mb:128")


def test_inherited_from_a_parent_process() -> None:
    """A worker whose parent has set both names to the policy's string finds it in force."""
    os.environ[CUDA_NAME] = os.environ[NAME] = CONF
    assert (allocator.configure(CONF).status, allocator.configure(CONF).in_force) == ("set", CONF)


def test_none_asks_for_nothing() -> None:
    """alloc_conf=None: the environment stays as it was; what an earlier call set is reported."""
    assert allocator.configure(None) == allocator.AllocatorState(None, "off", "nothing was asked for")
    assert CUDA_NAME not in os.environ and NAME not in os.environ
    allocator.configure(CONF)
    state = allocator.configure(None)
    assert (state.status, state.in_force, os.environ[NAME]) == ("off", CONF, CONF)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_too_late(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Once torch has used a device its allocator has read its settings: nothing is set, and the report says so."""
    monkeypatch.setattr(getattr(torch, kind), "is_initialized", lambda: True)
    state = allocator.configure(CONF)
    assert (state.status, state.in_force) == ("late", None)
    assert CUDA_NAME not in os.environ and NAME not in os.environ


def test_set_in_time_and_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same string after torch has begun is in force, not late; another one is late, and the first stays."""
    allocator.configure(CONF)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert allocator.configure(CONF).status == "set"
    state = allocator.configure("max_split_size_mb:64")
    assert (state.status, state.in_force, os.environ[NAME]) == ("late", CONF, CONF)


def _platforms(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    if which == "windows":
        monkeypatch.setattr(allocator.sys, "platform", "win32")
    elif which == "wsl":
        monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    elif which == "jetson-kernel":
        monkeypatch.setattr(platform, "release", lambda: "5.15.148-tegra")
    else:
        exists = os.path.exists
        monkeypatch.setattr(os.path, "exists", lambda path: path == "/etc/nv_tegra_release" or exists(path))


@pytest.mark.parametrize("which", ["windows", "wsl", "jetson-kernel", "jetson-file"])
def test_platforms_without_expandable_segments(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Just that key is dropped, and said to be; when nothing else was asked for, nothing is set."""
    _platforms(monkeypatch, which)
    state = allocator.configure(CONF)
    assert (state.status, state.in_force) == ("unsupported", None)
    assert "expandable_segments" in state.note
    assert CUDA_NAME not in os.environ
    conf = "roundup_power2_divisions:[256:1,512:2], expandable_segments:True,max_split_size_mb:64"
    state = allocator.configure(conf)
    assert (state.status, os.environ[NAME]) == ("set", "roundup_power2_divisions:[256:1,512:2],max_split_size_mb:64")
    assert "expandable_segments" in state.note


def test_only_torchs_warning_about_the_old_name_is_filtered() -> None:
    """torch 2.9 to 2.11 warn about a name that we must set; other warnings, of the same category too, still show."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        allocator.configure(CONF)
        warnings.warn("PYTORCH_CUDA_ALLOC_CONF is deprecated, use PYTORCH_ALLOC_CONF instead", stacklevel=1)
        warnings.warn("something else about PYTORCH_ALLOC_CONF", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something else about PYTORCH_ALLOC_CONF"]


def test_works_before_torch_is_imported() -> None:
    """In a new process: configuring imports no torch, and torch then sees both names."""
    code = """
import json, os, sys
from memsafe.machine import allocator
state = allocator.configure("max_split_size_mb:64")
early = "torch" in sys.modules
import torch
print(json.dumps([early, state.status, os.environ["PYTORCH_ALLOC_CONF"], os.environ["PYTORCH_CUDA_ALLOC_CONF"]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, "set", "max_split_size_mb:64", "max_split_size_mb:64"]


class _Gpu:
    """A torch.cuda or torch.xpu with one block in use and one in its cache; it notes under which device it was told
    to empty the cache."""

    def __init__(self) -> None:
        self.current = 0
        self.emptied: list[int] = []
        self.reserved = 3000

    def device(self, index: int) -> Iterator[None]:
        gpu = self

        class Context:
            def __enter__(self) -> None:
                self.before, gpu.current = gpu.current, index

            def __exit__(self, *_: object) -> None:
                gpu.current = self.before

        return Context()  # type: ignore[return-value]

    def empty_cache(self) -> None:
        self.emptied.append(self.current)
        self.reserved = 1000


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_cache_is_emptied_under_the_right_device(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """empty_cache runs with the device in question current, and the caller's current device comes back."""
    gpu = _Gpu()
    for name in ("device", "empty_cache"):
        monkeypatch.setattr(getattr(torch, kind), name, getattr(gpu, name))
    monkeypatch.setattr(getattr(torch, kind), "is_initialized", lambda: True)
    device = types.SimpleNamespace(kind=kind, index=2, process_bytes=lambda: gpu.reserved)
    assert allocator.release_cache(device) == 2000
    assert (gpu.emptied, gpu.current) == ([2], 0)
    assert allocator.release_cache(device) == 0


def test_a_device_that_was_never_used_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releasing must not create a context on a GPU."""
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: False)
    device = types.SimpleNamespace(kind="cuda", index=0, process_bytes=lambda: pytest.fail("asked an unused device"))
    assert allocator.release_cache(device) == 0


def test_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On MPS: its own empty_cache, and the bytes by which the driver's total fell."""
    sizes = [500, 200]
    called: list[str] = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: called.append("empty_cache"))
    device = types.SimpleNamespace(kind="mps", index=None, process_bytes=lambda: sizes.pop(0))
    assert (allocator.release_cache(device), called) == (300, ["empty_cache"])
