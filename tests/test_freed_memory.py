"""What a process on a CPU frees it uses again, and a user's own settings stay."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from harness import freed_memory

REPOSITORY = Path(__file__).parent.parent

# 64 MiB are filled and freed ten times, after some times in which the memory finds its place
COUNT_FAULTS = """
import resource
import torch
from harness.distributed import make_accelerator

make_accelerator()
def fill():
    torch.ones(2**24)
for _ in range(20):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def num_page_faults(**variables: str) -> int:
    """Return the page faults of ten fills, in a process that has an accelerator on a CPU."""
    set_by_user = freed_memory.SET_BY_USER
    of_others = {name: os.environ[name] for name in os.environ if name not in set_by_user}
    out = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS],
        cwd=REPOSITORY,
        env={**of_others, "ACCELERATE_USE_CPU": "true", **variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(out)


LIBC, VERSION = platform.libc_ver()
IS_GLIBC_2_35 = LIBC == "glibc" and [int(part) for part in VERSION.split(".")] >= [2, 35]


@pytest.mark.slow
@pytest.mark.skipif(not IS_GLIBC_2_35, reason="another C library keeps less")
def test_what_is_freed_is_used_again_unless_the_user_says_otherwise() -> None:
    assert num_page_faults() < num_page_faults(MALLOC_MMAP_THRESHOLD_="1000000") / 5


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1 << 31, [(-3, 1 << 30), (-1, 1 << 30)]),
        (1 << 25, [(-3, 1 << 30), (-3, 1 << 25), (-1, 1 << 25)]),  # glibc below 2.35
        (0, [(-3, 1 << 30), (-3, 1 << 25)]),
    ],
)
def test_nothing_is_half_set(
    largest: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    class Libc:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            calls.append((option, value))
            return int(option != freed_memory.MMAP_THRESHOLD or value <= largest)

    for name in freed_memory.SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(freed_memory.sys, "platform", "linux")
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: Libc)
    assert freed_memory.keep_freed_memory() is (largest > 0)
    assert calls == expected
