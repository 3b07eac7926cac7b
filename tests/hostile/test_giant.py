"""Queries and documents of millions of characters, both at once, in a container that their tokens would never fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from memsafe.config import MiB
from tests.hostile.cgroup import limited

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("program_giant.py")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}


@pytest.mark.parametrize("way", ["fast", "features", "opaque"])
@pytest.mark.timeout(300)
def test_giant_texts_in_every_way_of_tokenising(way: str, minilm: str, demo_reranker: str) -> None:
    """Words without end, no spaces, endless white space, one letter, unknown characters, as query and document at once, five
    million characters each: 1.5 GiB suffice, of which the program and the texts take half. (Tokenising one pair
    whole takes 2 to 4 GiB.)"""
    folder = minilm if way == "opaque" else demo_reranker
    with limited(1536 * MiB) as box:
        done = box.run(PROGRAM, way, folder, "5000000", timeout_s=280, env=ENV).check()
    assert json.loads(done.stdout.splitlines()[-1])["same"] < 1e-5
