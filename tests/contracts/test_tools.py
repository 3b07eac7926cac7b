"""The linters are tests like any other: `make test` fails where `make lint` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT_LINTER = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-m", "ruff", "check", "--output-format", "concise", "."], id="ruff-check"),
        pytest.param(["-m", "ruff", "format", "--check", "--quiet", "."], id="ruff-format"),
        pytest.param(["-m", "mypy"], id="mypy-strict"),
        pytest.param(["-c", IMPORT_LINTER], id="import-contracts"),
    ],
)
def test_linter_is_content(command: list[str]) -> None:
    """Style, strict types and the floors of the house hold over the whole tree."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_ci_passes_on_what_make_says(tmp_path: Path) -> None:
    """.ci/run calls `make test-all` at the root of the checkout, from wherever it is started, and exits as make does."""
    fake = tmp_path / "make"
    fake.write_text('#!/bin/sh\necho "$PWD: $*"\nexit 7\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith(f"{ROOT}: ")
    assert done.stdout.split()[-1] == "test-all"
