"""What the documents say is so: their Python runs, their commands, targets, extras and links exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers

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
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text) + re.findall(r'\b(?:src|srcset)="([^"]+)"', text)
    for link in links:
        assert (document.parent / link).exists(), link


def code_in(text: str) -> list[str]:
    fenced = [block["code"] for block in FENCE.finditer(text)]
    return fenced + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.mark.parametrize("block", named(blocks("python")))
def test_python_compiles(block: re.Match[str]) -> None:
    """Every Python block is whole."""
    compile(block["code"], "block", "exec", dont_inherit=True)


PAGES = {document: [block for _, block in blocks("python", [document])] for document in DOCUMENTS}
BEFORE = {
    "corpora.md": "open('passages.jsonl', 'w').write(''.join(f'{{\"text\": \"Note {n}: a crane flies.\"}}\\n' for n in range(40)))",
    "outputs.md": "texts = ['A crane is a bird.', 'A crane lifts loads.', 'Paris is a city.', 'Bread is baked.']",
}
"""What a page takes for granted: a reader's own files and texts."""
INSTEAD = {("corpora.md", "1024"): "384", ("corpora.md", "4096"): "16"}
"""What follows from another model's width: in which page, what, and by what it is replaced."""


@pytest.fixture(scope="module")
def local_models(tmp_path_factory: pytest.TempPathFactory, minilm: str, demo_reranker: str) -> Any:
    """hub id, page -> folder: of what the page uses the model for; real ones, but for sparse rows and vectors of tokens."""
    made: dict[str, str] = {}

    def folder(name: str, page: str) -> str:
        from tests import sparse_models

        if page == "outputs.md" or "splade" in name:
            from tests.core.test_flag_rerankers import save_gemma

            save = {
                "naver/splade-v3": sparse_models.save_splade,
                "BAAI/bge-m3": sparse_models.save_m3,
                "BAAI/bge-reranker-v2-gemma": save_gemma,
            }
            if name not in made:
                make = save.get(name, sparse_models.save_late_interaction)
                made[name] = str(make(tmp_path_factory.mktemp("made") / "model"))
            return made[name]
        return demo_reranker if "rerank" in name else minilm

    return folder


@pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if PAGES[document]], ids=lambda path: path.name
)
def test_python_runs(document: Path, local_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's Python runs from top to bottom as printed; models on the hub are replaced by local ones, but where only advice is
    asked, nothing else is."""
    monkeypatch.chdir(tmp_path)
    for name in ("SentenceTransformer", "CrossEncoder"):  # a page puts ours in their place
        monkeypatch.setattr(sentence_transformers, name, getattr(sentence_transformers, name))
    namespace: dict[str, Any] = {"__name__": document.stem}
    exec(BEFORE.get(document.name, ""), namespace)
    for block in PAGES[document]:
        if block["note"]:
            continue
        code = "\n".join(
            line if "advise(" in line else HUB_ID.sub(lambda name: local_models(name[0], document.name), line)
            for line in block["code"].splitlines()
        )
        for (page, old), new in INSTEAD.items():
            code = code.replace(old, new) if page == document.name else code
        wanted = re.findall(r"^(?:import|from) (\w+)", code, re.M)
        if not all(map(find_spec, wanted)):  # a store, a framework: an example for those who have it
            continue
        exec(compile(code, document.name, "exec", dont_inherit=True), namespace)
    for made in namespace.values():
        if hasattr(made, "close") and type(made).__module__.startswith("memsafe"):
            made.close()


PLANS = [
    pytest.param(block["code"], id=f"{document.name}-{block.start()}")
    for document, block in blocks("text")
    if block["code"].startswith("$ memsafe plan ")
]


@pytest.mark.parametrize("shown", PLANS)
def test_plans_print_what_is_shown(shown: str) -> None:
    """The output of `memsafe plan` in a page is that of today, line by line; "..." stands for lines that are left out."""
    testing = pytest.importorskip("typer.testing", reason="the command line needs typer and rich")
    from memsafe.cli import app

    command, *lines = shown.rstrip("\n").split("\n")
    done = testing.CliRunner().invoke(app, shlex.split(command)[2:])
    printed = done.output.rstrip("\n").split("\n")
    assert done.exit_code in (0, 1), done.output
    if "..." not in lines:
        assert lines == printed
    assert [line for line in lines if line not in (*printed, "...")] == []


@pytest.mark.parametrize("block", named(blocks("bash")))
def test_commands_are_known(block: re.Match[str]) -> None:
    """Each `memsafe` command in a page has the subcommand and the options that it names."""
    typer = pytest.importorskip("typer", reason="the command line needs typer and rich")
    from memsafe.cli import app

    for line in re.findall(r"^memsafe (.*)$", block["code"], re.M):
        words = shlex.split(line)
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, line
