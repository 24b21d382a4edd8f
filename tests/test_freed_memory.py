"""Freed memory is used again without a page fault, and a user's own settings stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import distributed
from harness.freed_memory import SET_BY_USER

REPOSITORY = Path(__file__).parent.parent

# 64 MiB are filled and freed ten times, after some times in which the memory finds its place
COUNT_FAULTS = """
import resource
import torch
from harness.freed_memory import keep_freed_memory

print(keep_freed_memory())
def fill():
    torch.ones(2**24)
for _ in range(20):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def kept_and_faults(**variables: str) -> tuple[bool, int]:
    """Return whether memory is kept in a process with these variables, and its page faults."""
    of_others = {name: os.environ[name] for name in os.environ if name not in SET_BY_USER}
    out = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS],
        cwd=REPOSITORY,
        env={**of_others, **variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kept, faults = out.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    kept, faults = kept_and_faults()
    assert kept
    kept, faults_of_the_user = kept_and_faults(MALLOC_MMAP_THRESHOLD_="1000000")
    assert not kept
    assert faults < 100
    assert faults_of_the_user > 10 * faults + 100


def test_evaluations_and_training_on_a_cpu_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    distributed.make_accelerator()
    assert calls == [True]
