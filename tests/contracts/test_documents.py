"""What the documents say is so: their Python runs, their commands, targets, extras and links exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [path for pattern in ("*.md", "docs/**/*.md") for path in sorted(ROOT.glob(pattern))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FENCE = re.compile(r"^(?P<note><!-- not run:[^\n]*-->\n)?```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```", re.M | re.S)
HUB_ID = re.compile(r"""(?<=["'])[A-Za-z0-9][\w.-]*/[\w.-]+(?=["'])""")


def blocks(language: str, documents: list[Path] = DOCUMENTS) -> Iterator[tuple[Path, re.Match[str]]]:
    for document in documents:
        for block in FENCE.finditer(document.read_text(encoding="utf-8")):
            if block["language"] == language:
                yield document, block


def named(pairs: Iterator[tuple[Path, re.Match[str]]]) -> list[Any]:
    return [pytest.param(block, id=f"{document.name}-{block.start()}") for document, block in pairs]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_links_exist(document: Path) -> None:
    """Each `make` target, example, extra and relative link that a document names is there."""
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`|\s)make (?:PYTHON=\S+ )?([a-z-]+)(?=[`\s]|$)", "\n".join(code_in(text))):
        assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.M), f"make {target}"
    for path in re.findall(r"(?:examples|benchmarks|docs|tests)/[\w/.-]*\w", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)
    assert extras is not None
    for wanted in re.findall(r"memsafe\[([\w,-]+)\]", text):
        for extra in wanted.split(","):
            assert re.search(rf"^{re.escape(extra)} = ", extras[1], re.M), f"memsafe[{extra}]"
    for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text):
        assert (document.parent / link).exists(), link


def code_in(text: str) -> list[str]:
    fenced = [block["code"] for block in FENCE.finditer(text)]
    return fenced + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.mark.parametrize("block", named(blocks("python")))
def test_python_compiles(block: re.Match[str]) -> None:
    """Every Python block is whole."""
    compile(block["code"], "block", "exec", dont_inherit=True)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """One namespace for the README's blocks, which are run in order, as a reader would."""
    return {"__name__": "readme"}


@pytest.mark.parametrize("block", named(blocks("python", [ROOT / "README.md"])))
def test_readme_runs(
    block: re.Match[str],
    page: dict[str, Any],
    minilm: str,
    demo_reranker: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The README's Python runs as printed; models on the hub are replaced by local ones, nothing else is."""
    if block["note"]:
        pytest.skip(block["note"].strip("<!- >\n"))
    monkeypatch.chdir(tmp_path)
    code = HUB_ID.sub(lambda name: demo_reranker if "rerank" in name[0] else minilm, block["code"])
    exec(compile(code, "README.md", "exec", dont_inherit=True), page)
