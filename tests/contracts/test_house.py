"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "llama_index_memsafe", "langchain_memsafe", "chroma_memsafe", "haystack_memsafe")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MEMORY_APIS = {
    "clear_refs",
    "current_allocated_memory",
    "driver_allocated_memory",
    "empty_cache",
    "getrlimit",
    "mallopt",
    "malloc_trim",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "psutil",
    "recommended_max_memory",
    "reset_peak_memory_stats",
    "set_per_process_memory_fraction",
    "virtual_memory",
}
DEVICE_PARTS = ("host", "linux", "meter", "portable")
DEVICE_FAMILY = {f"core/memsafe/machine/{name}.py" for name in ("allocator", "device", "heap", *DEVICE_PARTS)}
"""device.py and what it is made of; nothing else imports its parts."""


def code(path: Path) -> Iterator[tuple[int, str]]:
    """Names, attributes and imported names in the code of `path`, with their lines; comments and strings don't count."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield node.lineno, alias.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_memory_apis_are_called_in_one_place(path: Path) -> None:
    """Only machine/device.py, its parts, machine/allocator.py and machine/heap.py ask torch or the system about memory."""
    if path.relative_to(ROOT).as_posix() not in DEVICE_FAMILY:
        assert [(line, name) for line, name in code(path) if name in MEMORY_APIS] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_checks_input(path: Path) -> None:
    """`python -O` removes asserts, so none of ours may matter: the packages hold none."""
    found = [node.lineno for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Assert)]
    assert found == []


def test_only_the_device_knows_its_parts() -> None:
    """The rest of the core sees the machine through machine/device.py: host, linux, meter and portable are its own."""
    parts = {f"memsafe.machine.{name}" for name in DEVICE_PARTS}
    for path in SOURCES:
        if path.relative_to(ROOT).as_posix() not in DEVICE_FAMILY:
            imported = [
                node.module for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ImportFrom)
            ]
            assert parts.isdisjoint(imported), path
