"""memsafe.config: sizes are read in one place, and a policy out of range never comes into being."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe.config import FALLBACKS, GiB, KiB, MemoryPolicy, MiB, cache_dir, format_bytes, parse_size
from memsafe.errors import ConfigError


@pytest.mark.parametrize(
    ("given_size", "expected"),
    [
        (0, 0),
        (1, 1),
        (6 * GiB, 6 * GiB),
        (0.8, 0.8),
        (1.0, 1.0),
        ("0", 0),
        ("4096", 4096),
        ("1b", 1),
        ("1k", 1000),
        ("1kB", 1000),
        ("1KiB", KiB),
        ("512MB", 512 * 1000**2),
        ("512 MiB", 512 * MiB),
        ("6GiB", 6 * GiB),
        ("  6 gib ", 6 * GiB),
        ("6g", 6 * 1000**3),
        ("0.5GiB", GiB // 2),
        ("1.5 TiB", 1536 * GiB),
        ("2TB", 2 * 1000**4),
        ("80%", 0.8),
        ("100 %", 1.0),
        ("12.5%", 0.125),
        ("0.8", 0.8),
        ("1.0", 1.0),
    ],
)
def test_sizes_that_are_understood(given_size: Any, expected: Any) -> None:
    """An int is bytes, a float or a percentage a fraction, a unit is decimal or binary as written, case is free."""
    result = parse_size(given_size)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    "size",
    [
        *(
            -1,
            0.0,
            -0.5,
            1.5,
            math.nan,
            math.inf,
            "",
            " ",
            "GiB",
            "-1",
            "-1GiB",
            "1e3",
            ".5GiB",
            "1,5GiB",
            "1_000",
            "6 GiBs",
        ),
        *("0%", "150%", "%", "1.5", "0x10", "all", "nan", "inf", "9" * 400, "9" * 400 + "GiB", "9" * 400 + "%", "5EiB"),
        *(True, False, None, b"6GiB", [], {}, (1,), 1j, np.float64("nan")),
    ],
)
def test_sizes_that_are_refused(size: Any) -> None:
    """Whatever is no size raises ConfigError, and the message names the option and shows what would do."""
    with pytest.raises(ConfigError, match=r'^limit: .*"6GiB"') as caught:
        parse_size(size, name="limit")
    assert isinstance(caught.value, ValueError)


@given(st.text(max_size=12) | st.floats() | st.integers())
def test_a_size_is_read_or_refused_and_never_anything_else(size: Any) -> None:
    """No input makes parse_size raise anything but ConfigError; results are bytes >= 0 or a fraction in (0, 1]."""
    try:
        result = parse_size(size)
    except ConfigError:
        return
    assert (isinstance(result, int) and result >= 0) or (isinstance(result, float) and 0 < result <= 1)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (-1536, "-1.5 KiB"),
        (5 * MiB, "5.0 MiB"),
        (7.25 * GiB, "7.2 GiB"),
        (3000 * GiB, "2.9 TiB"),
        (5000 * 1024 * GiB, "5000.0 TiB"),
    ],
)
def test_format_bytes(num_bytes: float, text: str) -> None:
    """Bytes are printed with a binary unit and one digit."""
    assert format_bytes(num_bytes) == text


def test_the_default_policy_needs_no_thought() -> None:
    """All defaults together are valid, and only the rung that changes no numbers is allowed."""
    policy = MemoryPolicy()
    assert policy.limit is None and policy.limit_bytes(8 * GiB) is None
    assert policy.fallback == ("chunk",)
    assert policy == MemoryPolicy()
    assert hash(policy) == hash(MemoryPolicy())


@pytest.mark.parametrize(
    ("total_bytes", "expected"),
    [(1 * GiB, 64 * MiB), (8 * GiB, 256 * MiB), (80 * GiB, 512 * MiB), (0, 64 * MiB)],
)
def test_the_default_reserve(total_bytes: int, expected: int) -> None:
    """Unset, the reserve is 1/32 of the device, at least 64 MiB and at most 512 MiB."""
    assert MemoryPolicy().reserve_bytes(total_bytes) == expected


@pytest.mark.parametrize(
    ("option", "total_bytes", "expected"),
    [(0, GiB, 0), ("0", GiB, 0), ("100MiB", GiB, 100 * MiB), (0.25, 8 * GiB, 2 * GiB), ("25%", 8 * GiB, 2 * GiB)],
)
def test_a_given_reserve(option: Any, total_bytes: int, expected: int) -> None:
    """A reserve of 0 means none at all; fractions are of the device's total memory."""
    assert MemoryPolicy(reserve=option).reserve_bytes(total_bytes) == expected


@pytest.mark.parametrize(
    ("option", "expected"), [(6 * GiB, 6 * GiB), ("6GiB", 6 * GiB), (0.5, 4 * GiB), ("50%", 4 * GiB), (1.0, 8 * GiB)]
)
def test_a_given_limit(option: Any, expected: int) -> None:
    """The limit in bytes on a device of 8 GiB."""
    assert MemoryPolicy(limit=option).limit_bytes(8 * GiB) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"limit": "0"},
        {"limit": "much"},
        {"reserve": -1},
        {"reserve": 2.0},
        {"fallback": ("gpu",)},
        {"fallback": "CPU"},
        {"fallback": ""},
        {"fallback": 5},
        {"fallback": [["cpu"]]},
        {"release": "always"},
        {"release": None},
        {"on_full": "drop"},
        {"wait_s": -1},
        {"wait_s": math.nan},
        {"wait_s": math.inf},
        {"wait_s": "30"},
        {"wait_s": True},
        {"knee": -0.1},
        {"knee": "3%"},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_pending": 0},
        {"max_pending": "10"},
        {"strict_heap": 1},
        {"learn": None},
        {"alloc_conf": 3},
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    """Every option is validated when the policy is made, and the error begins with its name."""
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}: "):
        MemoryPolicy(**options)


@pytest.mark.parametrize(
    ("fallback", "expected"),
    [
        ((), ()),
        (None, ()),
        ("cpu", ("cpu",)),
        (["cpu", "chunk"], ("chunk", "cpu")),
        ({"half"}, ("half",)),
        (("cpu", "cpu", "half", "chunk"), FALLBACKS),
    ],
)
def test_fallbacks_are_kept_in_the_order_of_the_ladder(fallback: Any, expected: tuple[str, ...]) -> None:
    """In whatever order and form the rungs are given, they are tried from the least to the most intrusive."""
    assert MemoryPolicy(fallback=fallback).fallback == expected


def test_with_options_changes_a_copy_and_refuses_unknown_names() -> None:
    """A copy gets the changes, validated; a misspelt name is told the names that exist."""
    policy = MemoryPolicy()
    assert policy.with_options(wait_s=0).wait_s == 0
    assert policy.wait_s == 30.0
    with pytest.raises(ConfigError, match=r"'wait'.*wait_s"):
        policy.with_options(wait=1)
    with pytest.raises(ConfigError, match=r"^wait_s"):
        policy.with_options(wait_s=-1)


def test_a_policy_cannot_be_changed_or_misspelt() -> None:
    """The policy is frozen, takes keywords only, and knows its own names."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryPolicy().limit = "6GiB"  # type: ignore[misc]
    with pytest.raises(TypeError):
        MemoryPolicy(limits="6GiB")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        MemoryPolicy("6GiB")  # type: ignore[misc]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """MEMSAFE_CACHE_DIR wins; else it is `memsafe` below the platform's cache directory."""
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", "/some/where")
    assert cache_dir() == "/some/where"
    monkeypatch.delenv("MEMSAFE_CACHE_DIR")
    monkeypatch.setattr("os.name", "posix")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir().replace("\\", "/") == "/xdg/memsafe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == "/home/somebody/.cache/memsafe"
