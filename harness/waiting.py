"""How torch's threads wait for each other; imported before torch, which reads it once.

A thread that has nothing to do looks again and again for work, and only after a while sleeps. That
is fastest as long as each thread has a core of its own. Where other programs want the cores, it
takes from them what the working threads need: beside a busy program, the quick start on two cores
is nearly twice as fast with threads that sleep early (46 images/s in place of 25), and alone a
quarter slower (63 in place of 84). So threads sleep early only where the cores are busy. No result
depends on it.
"""

import os
import sys
import time
from pathlib import Path

# tries before a thread sleeps, for GNU's OpenMP (300,000 by itself) and milliseconds for LLVM's
EARLY_SLEEP = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
LOADAVG = Path("/proc/loadavg")
SAMPLES, SECONDS_BETWEEN = 5, 0.02


def num_busy_tasks() -> float:
    """Return how many threads of other programs run or wait for a core; 0 where nobody tells."""
    counts = []
    for _ in range(SAMPLES):
        try:
            runnable = LOADAVG.read_text().split()[3]  # "3/512": now runnable, of all
        except (OSError, IndexError):
            return 0.0
        counts.append(int(runnable.split("/")[0]) - 1)  # without this one, which reads
        time.sleep(SECONDS_BETWEEN)
    return sorted(counts)[SAMPLES // 2]


def sleep_early_where_cores_are_busy() -> str:
    """Let idle threads of torch sleep early where other programs need cores; return what to say.

    Only in a process that has not imported torch yet, and is alone of its run on this machine.
    Busy means that half of its cores, or more, are wanted by others. What the environment says
    already stays.
    """
    num_cores = os.cpu_count() or 1
    own_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_cores
    is_too_late = "torch" in sys.modules
    is_alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    if is_too_late or own_cores == 1 or not is_alone:
        return ""
    num_busy = num_busy_tasks()
    num_left_to_others = num_cores - own_cores
    if num_busy - num_left_to_others < own_cores / 2:
        return ""
    for name, value in EARLY_SLEEP.items():
        os.environ.setdefault(name, value)
    return (
        f"other programs have {num_busy:g} busy threads on {num_cores} cores: idle threads sleep "
        "early, which is faster then"
    )


NOTE = sleep_early_where_cores_are_busy()
