"""Planning decides with nothing in its hands: no torch, no thread, no clock, no file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SIMULATION = """
import sys
sys.path.insert(0, ROOT)
for name in ("torch", "transformers", "tokenizers", "sentence_transformers", "safetensors"):
    sys.modules[name] = None
import threading, time, builtins
from benchmarks.simulator import CURVES, load_curve, simulate

def never(*args, **options):
    raise AssertionError("planning asked for a thread, a clock or a file")

curve = load_curve(sorted(CURVES.glob("*.json"))[0])
for module, names in ((time, ("time", "monotonic", "perf_counter", "sleep", "thread_time")), (builtins, ("open",))):
    for name in names:
        setattr(module, name, never)
threading.Thread.start = threading.Lock = threading.RLock = threading.Condition = never
outcome = simulate(curve, [50, 400, 30, 2000] * 100, seed=1)
assert outcome.lost == 0 and len(outcome.sizes) > 2 and outcome.total_s > 0
print("simulated")
"""

IMPORTS = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "tokenizers", "sentence_transformers", "safetensors"):
    sys.modules[name] = None
import memsafe.planning
names = [module.name for module in pkgutil.iter_modules(memsafe.planning.__path__)]
for name in names:
    importlib.import_module("memsafe.planning." + name)
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("memsafe.")}
print(len(names), sorted(rooms))
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_can_be_imported_where_there_is_no_torch() -> None:
    """With torch and its family barred, all of planning loads, and brings nothing of memsafe but the vocabulary."""
    number, rooms = run(IMPORTS).split(" ", 1)
    assert int(number) >= 15
    assert rooms.strip() == str(["config", "errors", "events", "planning"])


def test_a_whole_run_asks_for_no_thread_no_clock_and_no_file() -> None:
    """The real scheduling code carries a simulated run through with time, threads and files barred as well."""
    assert "simulated" in run(f"ROOT = {str(ROOT)!r}\n{SIMULATION}")
