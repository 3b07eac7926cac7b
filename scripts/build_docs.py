"""The documentation as a site, strictly and offline: a link without a target, or a page that needs the network, is an error.

    python scripts/build_docs.py [FOLDER]       # build/site if left out; needs the dependency group `docs`, and Python 3.11

Pages lie as they do in the repository, so that links work in both places: README.md becomes the first page. Diagrams are shown as the
checked-in pictures of them, since what draws them in a browser would be fetched (scripts/draw_diagrams.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import draw_diagrams

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs", "benchmarks/results")
OUTSIDE = re.compile(
    r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^>]*>|url\(["']?(?:https?:)?//|class="?mermaid"""
)
"""What a page would fetch from elsewhere. Links that a reader may follow are none of it."""
SOURCES = ("core/memsafe", "llama_index_memsafe", "langchain_memsafe", "chroma_memsafe", "haystack_memsafe")
ROLE = re.compile(r":(?:class|data|func|meth|mod):(?=`)")
"""Docstrings name things as Python's own documentation does; the site's pages are Markdown."""


def main() -> None:
    if find_spec("zensical") is None or find_spec("mkdocstrings_handlers") is None:
        sys.exit(
            "Zensical is not installed, which needs Python 3.11 or newer; run: make docs, or pip install --group docs"
        )
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").resolve()
    with tempfile.TemporaryDirectory(prefix="memsafe-docs-") as folder:
        work = Path(folder)
        pages = work / "pages"
        for name in PAGES:
            target = pages / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target)
            else:
                shutil.copyfile(ROOT / name, target)
        shutil.copyfile(ROOT / "README.md", pages / "index.md")
        for document, source, picture in draw_diagrams.diagrams():
            if not picture.exists() or draw_diagrams.digest(source) not in picture.read_text(encoding="utf-8"):
                sys.exit(
                    f"{picture.relative_to(ROOT)} is not of today's diagram in {document.name}: scripts/draw_diagrams.py"
                )
            page = pages / document.relative_to(ROOT)
            shown = f"![diagram](assets/{picture.name})\n"
            page.write_text(
                draw_diagrams.FENCE.sub(lambda _, shown=shown: shown, page.read_text(encoding="utf-8")),
                encoding="utf-8",
            )
        for name in SOURCES:
            for path in (ROOT / name).rglob("*.py"):
                copy = work / "sources" / Path(name).name / path.relative_to(ROOT / name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(ROLE.sub("", path.read_text(encoding="utf-8")), encoding="utf-8")
        shutil.copyfile(ROOT / "zensical.toml", work / "zensical.toml")
        subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=work, check=True)
        fetched = [
            f"{path.relative_to(work / 'site')}: {found[0][:200]}"
            for path in sorted((work / "site").rglob("*"))
            if path.suffix in (".html", ".css")
            for found in OUTSIDE.finditer(path.read_text(encoding="utf-8"))
        ]
        if fetched:
            sys.exit("pages that need the network:\n" + "\n".join(fetched))
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(work / "site", site)
    print(
        f"{sum(1 for _ in site.rglob('*.html'))} pages in {site}; its search needs a server: python -m http.server -d {site}"
    )


if __name__ == "__main__":
    main()
