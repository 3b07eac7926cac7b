"""Virtual environments for peers that need other versions than ours. `python -m benchmarks.environments [NAME ...]`.

They are made beside the repository's other environments as `.venv-bench-NAME` (or under $MEMSAFE_BENCH_ENVS), by package
name from the configured package index. Nothing is downloaded while benchmarks run. torch is pinned to the version
that runs memsafe, so that the comparison is of the code above it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Environment", "python_of"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """Packages of one environment, and those that must be installed without their own dependencies (and why)."""

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    why: str = ""


ENVIRONMENTS = {
    "onnx": Environment(
        packages=(
            "torch",
            "sentence-transformers>=5,<6",
            "transformers>=4.57,<4.58",
            "optimum-onnx[onnxruntime]==0.1.0",
        ),
        why="optimum-onnx 0.1.0 needs transformers < 4.58, which sentence-transformers 6 no longer takes",
    ),
    "openvino": Environment(
        packages=(
            "torch",
            "sentence-transformers>=6,<7",
            "transformers>=5,<5.6",
            "optimum==2.3.*",
            "openvino>=2026.0",
            "openvino-tokenizers>=2026.0",
            "nncf>=3.3",
            "huggingface-hub<1.22",
            "requests>=2.33",
            "setuptools",
        ),
        alone=("optimum-intel==2.2.0",),
        why="optimum-intel 2.2 needs transformers < 5.6; its torchvision is left out (text models do not use it)",
    ),
    "flag": Environment(
        packages=("torch", "transformers<5", "FlagEmbedding==1.4.2", "rerankers==0.10.0"),
        why="FlagEmbedding 1.4.2 imports what transformers 5 no longer has",
    ),
    "pylate": Environment(
        packages=(
            "torch",
            "sentence-transformers==5.3.0",
            "transformers<=5.3.0",
            "accelerate",
            "datasets",
            "pandas",
            "ujson==5.12.0",
        ),
        alone=("pylate==1.6.0",),
        why="PyLate 1.6 needs sentence-transformers 5.3; its indexes' packages are left out (encoding does not use them)",
    ),
    "fastembed": Environment(packages=("fastembed==0.9.1",), why="needs no torch at all, which its memory should show"),
    "infinity": Environment(
        packages=(
            "numpy<2",
            "datasets<4",
            "pyarrow<20",
            "torch",
            "transformers<4.49",
            "optimum[onnxruntime]<2",
            "infinity-emb[torch,optimum]==0.0.77",
        ),
        why="needs numpy < 2, sentence-transformers 3 and optimum 1 (with BetterTransformer)",
    ),
}


def directory(name: str) -> Path:
    """Where environment `name` lives, made or not."""
    base = os.environ.get("MEMSAFE_BENCH_ENVS")
    return Path(base) / name if base else ROOT / f".venv-bench-{name}"


def python_of(name: str) -> str | None:
    """The interpreter of environment `name` ("" is the one that runs this); None if it has not been made."""
    if not name:
        return sys.executable
    folder = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    python = directory(name) / folder
    return str(python) if python.exists() else None


def make(name: str) -> None:
    """Make environment `name` and install its packages; raises CalledProcessError if that cannot be done."""
    environment = ENVIRONMENTS[name]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory(name))], check=True)
    python = python_of(name)
    if python is None:
        raise RuntimeError(f"{directory(name)} has no interpreter")
    with tempfile.TemporaryDirectory() as temporary:
        constraints = Path(temporary) / "constraints.txt"
        constraints.write_text(f"torch=={importlib.metadata.version('torch').partition('+')[0]}\n", encoding="utf-8")
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        subprocess.run([*pip, *environment.packages], check=True)
        if environment.alone:
            subprocess.run([*pip, "--no-deps", *environment.alone], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Make the environments that are missing, or the named ones anew; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", choices=[[], *ENVIRONMENTS], help="made anew; default: those that are missing"
    )
    chosen = parser.parse_args(arguments).names or [name for name in ENVIRONMENTS if python_of(name) is None]
    failed = []
    for name in chosen:
        print(f"{name}: {', '.join(ENVIRONMENTS[name].packages + ENVIRONMENTS[name].alone)}", flush=True)
        try:
            make(name)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            failed.append(name)
            print(f"{name}: not made: {error}", file=sys.stderr)
    print(f"made: {', '.join(n for n in chosen if n not in failed) or 'none'}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
