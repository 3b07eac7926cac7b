"""The documentation site: every error and warning of ours has its paragraph, every public name its place, and it builds strictly."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import memsafe
from memsafe import errors
from scripts import draw_diagrams

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PACKAGES = ("core/memsafe", "llama_index_memsafe", "langchain_memsafe", "chroma_memsafe", "haystack_memsafe")
_WORDS = 4
"""Consecutive words of a message that the page must quote, or all of a shorter one."""


def messages() -> Iterator[tuple[str, list[str]]]:
    """Where our packages warn, and the literal parts of what is said there."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                    continue
                if node.func.attr in ("warn", "warning") and ast.unparse(node.func.value).lower().endswith(
                    ("log", "logger", "warnings")
                ):
                    yield f"{path.name}:{node.lineno}", parts(node.args[0])


def parts(message: ast.expr) -> list[str]:
    """Literal pieces of a message between its figures."""
    if isinstance(message, ast.Constant):
        return re.split(r"%[sdrg]", str(message.value))
    if isinstance(message, ast.JoinedStr):
        return [str(piece.value) for piece in message.values if isinstance(piece, ast.Constant)]
    return []


def plain(text: str) -> str:
    return " ".join(re.sub(r"[`*]", "", text).split())


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_has_its_paragraph(name: str) -> None:
    """A heading of its name, a message to search for (but for the base of all), and what to do."""
    found = re.search(rf"^### {name}\n(.*?)(?=^##)", PAGE, re.M | re.S)
    assert found, name
    assert len(found[1].split()) > 20 and "`" in found[1]


@pytest.mark.parametrize(("where", "pieces"), [pytest.param(*each, id=each[0]) for each in messages()])
def test_every_warning_has_its_paragraph(where: str, pieces: list[str]) -> None:
    """Four words in a row of each warning and of each warning in the log are on the page, so that searching finds it."""
    page = plain(PAGE)
    runs = []
    for piece in pieces:
        words = plain(piece).split()
        runs += [" ".join(words[at : at + _WORDS]) for at in range(max(len(words) - _WORDS, 0) + 1) if words]
    longest = max(len(run.split()) for run in runs)
    assert any(run in page for run in runs if len(run.split()) == longest), (where, pieces)


def test_warnings_are_found() -> None:
    """The search for them sees those that there are."""
    assert len(list(messages())) >= 16


def test_every_public_name_is_in_the_reference() -> None:
    """What `memsafe` and the adapters export has its place in docs/api.md, and nothing there is of the past."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: (\S+)$", page, re.M)
    modules = {name for name in named if name.islower()}
    for name in memsafe.__all__:
        home = getattr(getattr(memsafe, name), "__module__", "")
        assert f"memsafe.{name}" in named or home in modules or name in ("GiB", "MiB", "__version__"), name
    for package in PACKAGES[1:]:
        tree = ast.parse((ROOT / package / "__init__.py").read_bytes())
        (names,) = (
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        )
        assert {f"{package}.{name}" for name in names} <= set(named)


def test_every_page_is_in_the_navigation() -> None:
    """A page that nothing leads to is not read."""
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md")):
        assert f'"{path.relative_to(ROOT).as_posix()}"' in settings, path


def test_pictures_of_diagrams_are_of_today() -> None:
    """Each diagram has its picture, which remembers the very source, needs nothing from elsewhere and has a ground of its own."""
    found = list(draw_diagrams.diagrams())
    assert [page.name for page, _, _ in found] == ["architecture.md"]
    for _, source, picture in found:
        svg = picture.read_text(encoding="utf-8")
        assert draw_diagrams.digest(source) in svg, "draw it again: scripts/draw_diagrams.py"
        assert "background:#fff" in svg and "foreignObject" not in svg and "**" not in svg
        assert not re.search(r"""(?:href|src)=["']?http|url\(["']?http|@import""", svg)


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """No link without a target, no page that needs the network, every name of the reference found."""
    if find_spec("zensical") is None or find_spec("mkdocstrings_handlers") is None:
        pytest.skip("needs the dependency group docs (make docs installs it)")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "build_docs.py"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = (tmp_path / "site" / "docs" / "architecture.html").read_text(encoding="utf-8")
    assert 'src="assets/architecture.svg"' in shown and "flowchart" not in shown
    assert (tmp_path / "site" / "docs" / "assets" / "architecture.svg").exists()
    api = (tmp_path / "site" / "docs" / "api.html").read_text(encoding="utf-8")
    for name in ("embed_documents", "unload_after_s", "MicroBatchDone", "SimulatedDevice", "compress_documents"):
        assert name in api
    assert ":class:" not in api and ":meth:" not in api
