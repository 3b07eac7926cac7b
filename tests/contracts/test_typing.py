"""A typed program that uses memsafe type-checks, with both checkers, against the installed packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSUMER = Path(__file__).with_name("typing_consumer.py")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "checker",
    [
        pytest.param(["mypy", "--strict", "--no-error-summary"], id="mypy"),
        # pyright, from the distribution that needs neither node nor a download at run time
        pytest.param(["basedpyright", "--level", "error", "--pythonpath", sys.executable], id="pyright"),
    ],
)
def test_consumer_type_checks(checker: list[str]) -> None:
    """What the front door promises to a type checker: precise results, no Any where a type is known."""
    done = subprocess.run([sys.executable, "-m", *checker, str(CONSUMER)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_checker_sees_our_types(tmp_path: Path) -> None:
    """A wrong call is an error: our types are found (py.typed), not taken for Any."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from memsafe import MemoryPolicy\nMemoryPolicy(limit='1GiB', release='sometimes')\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(wrong)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert 'Argument "release" to "MemoryPolicy" has incompatible type' in done.stdout
