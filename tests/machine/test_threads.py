"""machine/threads.py: what a thread knows about its cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from memsafe.machine.threads import starved_seconds


@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="no /proc/thread-self/schedstat here")
def test_a_thread_knows_how_long_it_had_no_core() -> None:
    """Beside another busy process on the only core it may use, a thread waits for about half of its time; sleeping is no
    waiting."""
    waited: dict[str, float] = {}
    core = min(os.sched_getaffinity(0))

    def work() -> None:
        os.sched_setaffinity(0, {core})  # of this thread alone
        before = starved_seconds()
        time.sleep(0.2)
        waited["asleep"] = starved_seconds() - before
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            pass
        waited["busy"] = starved_seconds() - before - waited["asleep"]

    busy = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as neighbour:
        try:
            time.sleep(0.2)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        finally:
            neighbour.kill()
    assert waited["asleep"] < 0.1
    assert 0.2 < waited["busy"] < 1.0
