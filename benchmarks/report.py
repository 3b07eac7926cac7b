"""Results as Markdown: the whole tables beside the JSON, and README's part between its two markers.

`python -m benchmarks.report` renders the newest full result into README.md; `--check` only tells whether it is up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import SECTIONS, headline

__all__ = ["BEGIN", "END", "inject", "newest", "render", "summary"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def render(result: dict[str, Any]) -> str:
    """All sections of one result as a Markdown page."""
    lines = [f"# Benchmarks: {result['machine']['kind']}, {result['machine']['date'][:10]}", "", *_head(result), ""]
    if result["mode"] == "quick":
        lines += ["A quick run: few texts, few rounds. Look at the full one for figures to rely on.", ""]
    for name, table in SECTIONS.items():
        if name in result["sections"]:
            lines += [*table(result["sections"][name]), ""]
    for name, reason in result.get("failed", {}).items():
        lines += [f"Section `{name}` did not finish: {reason}", ""]
    return "\n".join(lines).rstrip() + "\n"


def summary(result: dict[str, Any], link: str) -> str:
    """README's part: what was measured where, the main tables, and where the rest is."""
    lines = [*_head(result), "", *headline(result["sections"])]
    lines += [
        "",
        f"All of it, losing cases and spreads included: [{link}]({link}); how it is measured: docs/benchmarks.md.",
    ]
    return "\n".join(lines) + "\n"


def _head(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    extensions = f" ({', '.join(machine['extensions'])})" if machine["extensions"] else ""
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    return [
        f"Measured {machine['date'][:10]} on {machine['cores']} cores of {machine['cpu']}{extensions}{memory}, "
        f"Python {machine['python']}, {versions}."
    ]


def newest(folder: Path = RESULTS, *, mode: str = "full") -> Path | None:
    """The latest result of that mode, by the date inside; None if there is none."""
    dated = []
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and result.get("mode") == mode and "machine" in result:
            dated.append((result["machine"]["date"], path))
    return max(dated)[1] if dated else None


def inject(document: str, part: str) -> str:
    """`document` with what is between the markers replaced; ValueError if they are not there once, in order."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"the document needs one {BEGIN} and one {END} after it")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{part.strip()}\n{END}{rest.split(END)[1]}"


def write(result: dict[str, Any], folder: Path, name: str) -> tuple[Path, Path]:
    """Write NAME.json and NAME.md; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    data.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page.write_text(render(result), encoding="utf-8")
    return data, page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--result", type=Path, help="default: the newest full result in benchmarks/results/")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md is not up to date")
    parser.add_argument("--print", action="store_true", help="print the part instead of writing it")
    chosen = parser.parse_args(arguments)
    path = chosen.result or newest()
    if path is None:
        print("there is no full result yet: make bench", file=sys.stderr)
        return 1
    result = json.loads(path.read_text(encoding="utf-8"))
    page = path.with_suffix(".md").resolve()
    link = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    part = summary(result, link)
    if chosen.print:
        print(part)
        return 0
    old = chosen.readme.read_text(encoding="utf-8")
    try:
        new = inject(old, part)
    except ValueError as error:
        print(f"{chosen.readme}: {error}", file=sys.stderr)
        return 1
    if chosen.check:
        if new != old:
            print(f"{chosen.readme} is not what {path.name} gives: python -m benchmarks.report", file=sys.stderr)
        return int(new != old)
    chosen.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
