"""The picture of a run in README.md and docs/memory.md: docs/assets/run-light.png and run-dark.png, of a real run on this machine.

    python scripts/draw_run.py

The passages of the examples through all-MiniLM-L6-v2, under a limit; then the top of the page that `Recording.save` writes, in a browser.
Needs playwright and a Chromium, on the path or in MEMSAFE_CHROMIUM.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from playwright.sync_api import sync_playwright  # noqa: E402

from examples.models import minilm  # noqa: E402
from examples.passages import load_passages  # noqa: E402
from memsafe import Embedder, MemoryPolicy, Recording  # noqa: E402
from scripts.draw_diagrams import chromium  # noqa: E402


def main() -> None:
    texts, recording = [passage.text for passage in load_passages()], Recording()
    policy = MemoryPolicy(limit="320MiB", learn=False)
    with Embedder(minilm(), device="cpu", hooks=[recording], memory=policy) as embedder:
        report = embedder.run(texts, warn=False).report
    print(report)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "run.html"
        recording.save(page, report, title=f"{len(texts)} docstrings with all-MiniLM-L6-v2")
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            shown = browser.new_context(viewport={"width": 900, "height": 640}, color_scheme=scheme).new_page()
            shown.goto(page.as_uri())
            shown.screenshot(path=ROOT / "docs" / "assets" / f"run-{scheme}.png")


if __name__ == "__main__":
    main()
