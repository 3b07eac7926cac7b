"""Run inside a box, beside a job: waits for a file, takes memory, says so, and gives it back when a second file is there.

Arguments: bytes to take, folder of the files (`take`, `taken`, `give`, `given`). Needs nothing but the standard library.
"""

import mmap
import sys
import time
from pathlib import Path

size, folder = int(sys.argv[1]), Path(sys.argv[2])


def wait_for(name: str) -> None:
    while not (folder / name).exists():
        time.sleep(0.01)


wait_for("take")
block = mmap.mmap(-1, size)
for place in range(0, size, mmap.PAGESIZE):
    block[place] = 1
(folder / "taken").touch()
wait_for("give")
block.close()
(folder / "given").touch()
