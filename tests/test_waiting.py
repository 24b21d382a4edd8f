"""Threads sleep early where other programs want half of the cores, and nowhere else."""

import os
import sys
from pathlib import Path

import pytest
import torch

from harness import waiting


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Set up a machine of some cores, of which a process may use some, with so many tasks."""

    def set_up(num_cores: int, own_cores: int, runnable: int) -> None:
        for name in waiting.EARLY_SLEEP:
            monkeypatch.setenv(name, "")  # so that what is set in the test is taken back
            monkeypatch.delenv(name)
        (tmp_path / "loadavg").write_text(f"0.50 0.40 0.30 {runnable}/300 12345\n")
        monkeypatch.setattr(waiting, "LOADAVG", tmp_path / "loadavg")
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda pid: set(range(own_cores)), raising=False
        )

    return set_up


@pytest.mark.parametrize(
    ("num_cores", "own_cores", "runnable", "is_early"),
    [
        (2, 2, 1, False),  # the process itself
        (2, 2, 2, True),
        (16, 16, 8, False),
        (16, 16, 9, True),
        (16, 4, 13, False),  # the others have 12 cores of their own
        (16, 4, 15, True),
        (1, 1, 9, False),  # a single thread waits for nobody
    ],
)
def test_threads_sleep_early_where_half_of_the_cores_are_wanted(
    num_cores: int, own_cores: int, runnable: int, is_early: bool, machine
) -> None:
    machine(num_cores, own_cores, runnable)
    said = waiting.sleep_early_where_cores_are_busy()
    assert bool(said) is is_early
    assert ("GOMP_SPINCOUNT" in os.environ) is is_early
    if is_early:
        assert said.startswith(
            f"other programs have {runnable - 1} busy threads on {num_cores} cores"
        )


def test_what_the_environment_says_stays(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2, 2, 3)
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert waiting.sleep_early_where_cores_are_busy()
    assert os.environ["GOMP_SPINCOUNT"] == "77"


def test_nothing_is_set_where_torch_has_read_it_already(
    machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2, 2, 3)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert waiting.sleep_early_where_cores_are_busy() == ""
    assert "GOMP_SPINCOUNT" not in os.environ


def test_processes_of_one_run_are_not_others(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2, 2, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert waiting.sleep_early_where_cores_are_busy() == ""


def test_machine_that_does_not_tell_is_not_busy(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2, 2, 3)
    monkeypatch.setattr(waiting, "LOADAVG", Path("/nowhere"))
    assert waiting.num_busy_tasks() == 0
    assert waiting.sleep_early_where_cores_are_busy() == ""
