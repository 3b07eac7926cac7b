"""Proof on a CUDA device, section by section; each ends within --minutes by its own clock.

    python -m benchmarks.gpu.prove --sections correctness,prediction --out results
    python -m benchmarks.gpu.prove --targets                # speed and articles again, with what is to be reached
    python -m benchmarks.gpu.prove --dry-run-cpu            # every section with tiny shapes, on the CPU
    python -m benchmarks.gpu.prove --merge a.json b.json --out benchmarks/results

Writes one JSON and one Markdown file to --out, by default to $OUT, else to benchmarks/results: again after each row, so that
a run that is cut short keeps its rows. docs/gpu.md explains.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))
if str(ROOT / "core") not in sys.path and not importlib.util.find_spec("memsafe"):  # not installed on a bare machine
    sys.path.insert(0, str(ROOT / "core"))

from benchmarks.gpu import common, models, processes, targets  # noqa: E402

SECTIONS = ("correctness", "articles", "prediction", "recovery", "speed", "overheads")
BAD = re.compile(r"^(DIFFERS|WRONG|VIOLATED|WAITS|not packed|died|error)")
"""Outcomes that mean a promise was not kept. A peer that runs out of memory is a finding, not a failure of ours."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything that ran kept its promise, 1 if not, 2 if there is no CUDA device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", help=f"of {','.join(SECTIONS)}; by default all, with --targets speed,articles")
    parser.add_argument("--minutes", type=float, help="a section's time; by default 8, with --targets 8.5")
    parser.add_argument(
        "--targets", action="store_true", help="a target that is missed counts as a promise that is not kept"
    )
    parser.add_argument(
        "--total-minutes", type=float, help="time of all sections together; each gets at most what is left"
    )
    parser.add_argument("--out", default=os.environ.get("OUT") or str(ROOT / "benchmarks" / "results"))
    parser.add_argument(
        "--models", default=str(Path(tempfile.gettempdir()) / "memsafe-prove"), help="where they are saved"
    )
    parser.add_argument(
        "--dry-run-cpu", action="store_true", help="tiny shapes on the CPU: tests this script, nothing else"
    )
    parser.add_argument("--merge", nargs="+", metavar="JSON", help="put earlier results together; runs nothing")
    parser.add_argument(
        "--make-tokenizer", metavar="DIR", help="MiniLM's tokenizer alone, to travel without its weights; runs nothing"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        processes.run_child(*given.child)
        return 0
    if given.make_tokenizer:
        print(f"{models.tokenizer_folder(Path(given.make_tokenizer)) / 1e6:.1f} MB in {given.make_tokenizer}")
        return 0
    out = Path(given.out)
    if given.merge:
        result = merge([json.loads(Path(each).read_text(encoding="utf-8")) for each in given.merge])
        tell_targets(result)
        write(out, result, list(result["sections"]))
        return 0
    chosen = (given.sections or ("speed,articles" if given.targets else ",".join(SECTIONS))).split(",")
    given.minutes = given.minutes if given.minutes is not None else 8.5 if given.targets else 8.0
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    before = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory() as cache:  # nothing learnt earlier, nothing left behind
            path = os.pathsep.join([str(ROOT), str(ROOT / "core"), os.environ.get("PYTHONPATH", "")])
            os.environ.update(HF_HUB_OFFLINE="1", MEMSAFE_CACHE_DIR=cache, PYTHONPATH=path.rstrip(os.pathsep))
            return prove(given, chosen, out)
    finally:
        os.environ.clear()
        os.environ.update(before)


def prove(given: Any, chosen: list[str], out: Path) -> int:
    """Run the sections; results are written after each row, so that what ended is kept whatever comes next."""
    dry, device = given.dry_run_cpu, "cpu" if given.dry_run_cpu else "cuda:0"
    started = time.time()
    end = started + 60 * (given.total_minutes if given.total_minutes is not None else 1e6)

    def setting(minutes: float) -> common.Setting:
        return common.Setting(dry, given.models, min(time.time() + 60 * minutes, end), device)

    rows = list(processes.isolated(setting(5), "common:describe"))
    machine = rows[0]
    if "device" not in machine:
        print(f"no CUDA device, or it cannot be used: {machine.get('log', machine)}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"machines": [machine], "sections": {}}
    result["models"] = list(processes.isolated(setting(5), "models:make_models"))
    for name in chosen:
        module = importlib.import_module(f"benchmarks.gpu.{name}")
        began = time.time()
        section: dict[str, Any] = {"rows": [], "seconds": 0.0, "device": machine["device"]}
        section["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        result["sections"][name] = section
        for row in module.run(setting(given.minutes)):
            section["rows"].append(row)
            section["seconds"] = time.time() - began
            line = " ".join(f"{k}={short(v, k)}" for k, v in row.items() if k not in ("detail", "log"))
            print(f"[{name} {section['seconds']:.0f}s] {line}", flush=True)
            write(out, result, chosen)
    missed = tell_targets(result)
    write(out, result, chosen)
    bad = [(name, row) for name, one in result["sections"].items() for row in one["rows"] if kept_not(row)]
    for name, row in bad:
        print(f"NOT KEPT: {name}: { ({k: v for k, v in row.items() if k != 'detail'}) }", flush=True)
    print(f"{len(bad)} promises not kept; {time.time() - started:.0f} s in all")
    return 1 if bad or (missed and given.targets) else 0


def tell_targets(result: dict[str, Any]) -> int:
    """Put what was to be reached beside what was, into `result` and on the screen; returns how many were missed."""
    dry = result["machines"][0]["device"].startswith("CPU")
    rows = list(targets.rows(result["sections"], dry))
    if not rows:
        return 0
    result["targets"] = rows
    print(f"{'target':<58} {'at least':>8} {'reached':>8} {'learnt':>8}")
    for row in rows:
        figures = " ".join(f"{short(row[name]):>8}" for name in ("at_least", "reached", "learnt"))
        print(f"{row['target']:<58} {figures}  {row['outcome']}")
    return sum(row["outcome"] == "MISSED" for row in rows)


def kept_not(row: dict[str, Any]) -> bool:
    """Whether a row shows a promise that was not kept: ours did not finish, or finished wrong."""
    outcome = str(row.get("outcome", ""))
    ours = row.get("who", "memsafe") == "memsafe"
    return ours and bool(BAD.match(outcome) or outcome.startswith("out of memory"))


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Later results replace earlier ones of the same section; every machine that was used is listed."""
    merged: dict[str, Any] = {"machines": [], "models": [], "sections": {}}
    for result in results:
        merged["machines"] += [one for one in result["machines"] if one not in merged["machines"]]
        merged["models"] = result.get("models", [])
        merged["sections"].update(result["sections"])
    return merged


def write(out: Path, result: dict[str, Any], chosen: Sequence[str]) -> None:
    """gpu-DEVICE-SECTIONS.json and .md; without the sections' names if they are all there."""
    out.mkdir(parents=True, exist_ok=True)
    part = "" if set(SECTIONS) <= set(chosen) else "-" + "-".join(name for name in SECTIONS if name in chosen)
    device = re.sub(r"[^A-Za-z0-9]+", "-", result["machines"][0]["device"]).strip("-").lower()[:40]
    stem = f"gpu-{device}{part}"
    for suffix, text in ((".json", json.dumps(result, indent=1, default=str) + "\n"), (".md", table(result))):
        unfinished = out / f"{stem}{suffix}.new"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(out / f"{stem}{suffix}")  # never half a file, whenever the run is ended


def table(result: dict[str, Any]) -> str:
    """Markdown: the machine, then a table for each section; rows with the same columns stand together."""
    lines = ["# Proof on a GPU", ""]
    for machine in result["machines"]:
        lines += [f"- {name}: {short(value, name)}" for name, value in machine.items() if name != "what"] + [""]
    sections = dict(result["sections"])
    if "targets" in result:
        sections = {"targets": {"rows": result["targets"]}, **sections}
    for name, section in sections.items():
        lines += [f"## {name}", ""]
        if "date" in section:
            lines += [f"{section['date']}, {section['device']}, {section['seconds']:.0f} s", ""]
        columns: list[str] = []
        for row in section["rows"]:
            if "detail" in row and "outcome" not in row:  # figures of every shape: in the JSON
                continue
            row = {k: v for k, v in row.items() if k not in ("detail", "log")}
            if list(row) != columns:
                columns = list(row)
                lines += ["", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
            lines.append(f"| {' | '.join(short(value, name).replace('|', '/') for name, value in row.items())} |")
        lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def short(value: Any, name: str = "") -> str:
    """A number with three digits that matter, bytes (by the name of the column) as GiB; anything else as text."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float)) and "bytes" in name and abs(value) >= 1 << 20:
        return f"{value / (1 << 30):.2f}Gi"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {short(v, name)}" for k, v in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return "; ".join(short(each, name) for each in value) or "-"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
