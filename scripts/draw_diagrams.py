"""The diagrams of the documents as checked-in pictures: docs/assets/NAME.svg for the one in docs/NAME.md.

    npm install mermaid && python scripts/draw_diagrams.py node_modules/mermaid/dist/mermaid.min.js

Zensical leaves drawing to mermaid in the reader's browser, which it would fetch (three megabytes); the site is to work offline. So the
pages keep their source, which GitHub draws itself, and the site shows the picture. Needs playwright and a Chromium, on the path or in
MEMSAFE_CHROMIUM. A picture remembers the source that it is of (:func:`digest`); scripts/build_docs.py and a test compare.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```mermaid\n(?P<source>.*?)^```\n", re.M | re.S)
_DRAW = """async source => {
  mermaid.initialize({startOnLoad: false, theme: "neutral", htmlLabels: false, flowchart: {htmlLabels: false, wrappingWidth: 420}});
  return (await mermaid.render("diagram", source)).svg;
}"""


def diagrams() -> Iterator[tuple[Path, str, Path]]:
    """(page, source, picture) of each page with a diagram; a page has one at most."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for found in FENCE.finditer(page.read_text(encoding="utf-8")):
            yield page, found["source"], ROOT / "docs" / "assets" / f"{page.stem}.svg"


def digest(source: str) -> str:
    """As the picture remembers it."""
    return f"source {hashlib.sha256(source.encode()).hexdigest()}"


def chromium() -> str | None:
    """A browser of this machine; None: playwright's own."""
    return os.environ.get("MEMSAFE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def main() -> None:
    from playwright.sync_api import sync_playwright

    library = Path(sys.argv[1]).read_text(encoding="utf-8")
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"]).new_page()
        page.set_content("<!DOCTYPE html><html><body></body></html>")
        page.add_script_tag(content=library)
        for document, source, picture in diagrams():
            svg = page.evaluate(_DRAW, source)
            width, height = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg).groups()  # type: ignore[union-attr]
            svg = re.sub(r'width="100%"', f'width="{float(width):.0f}" height="{float(height):.0f}"', svg, count=1)
            svg = svg.replace('style="max-width', 'style="background:#fff;max-width', 1)  # legible on a dark page too
            picture.parent.mkdir(exist_ok=True)
            picture.write_text(f"{svg}<!-- {digest(source)} -->\n", encoding="utf-8")
            print(f"{picture.relative_to(ROOT)}, {len(svg):,} characters, of {document.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
