"""Memory that a process frees stays with it, for the next step on a CPU.

Every step on a CPU needs tensors of the same tens of megabytes. The C library gives what is larger
than 32 MiB back to the system as soon as it is free, and at times what is smaller; it gets it anew
page by page, each filled with zeros. Where it is kept instead, a step of ResNet-18 at 96 px is 1.06
times as fast, and photographs are decoded and cut into crops of 224 px 1.1 times as fast
(docs/speed.md). No result depends on it.
"""

import ctypes
import os
import sys

# what glibc's mallopt calls them, and the variables by which a user sets them
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
# Blocks of up to so many bytes come from the heap, whose free end is given back only once it is
# larger than this: a process may keep its peak. The smaller one is the most that glibc accepted
# before 2.35.
BYTES_KEPT = (1 << 30, 1 << 25)


def keep_freed_memory() -> bool:
    """Let this process, and workers that it forks, keep what they free; return whether they do.

    Only glibc can, on Linux. What the environment says already stays.
    """
    if sys.platform != "linux" or any(name in os.environ for name in SET_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl, another C library, has none
    if mallopt is None:
        return False
    for num_bytes in BYTES_KEPT:
        # In this order: the second alone would have every block above 128 KiB given back.
        if mallopt(MMAP_THRESHOLD, num_bytes) == 1:
            return mallopt(TRIM_THRESHOLD, num_bytes) == 1
    return False
