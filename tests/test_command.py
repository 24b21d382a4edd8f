"""Signals, terminals and workers that fail: what stands around every main."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_log, stop_at
from torch.utils.data import DataLoader, Dataset

from dino_train import train
from harness import command
from harness.command import WorkerError, iterate, own_input, run_command, stop_requests
from harness.flags import parse_config
from models import load_checkpoint, replace_file


@pytest.fixture(scope="module")
def runs_without_output(
    tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]
) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """Runs, started together, whose output cannot be written, and their folders."""
    root = tmp_path_factory.mktemp("without_output")
    started: dict[str, tuple[subprocess.Popen, Path]] = {}

    def start(name: str, folder: Path, **options: object) -> subprocess.Popen:
        words = [sys.executable, ROOT / "dino_train.py", *tiny_flags, "--epochs", "1"]
        words += ["--output-dir", folder]
        process = subprocess.Popen(words, text=True, stderr=subprocess.PIPE, **options)
        started[name] = process, folder
        return process

    with open("/dev/full", "w") as full:
        start("/dev/full", root / "full", stdout=full)
    start("closed pipe", root / "pipe", stdout=subprocess.PIPE).stdout.close()
    start("closed", root / "closed", preexec_fn=lambda: os.close(1))
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["/dev/full", "closed pipe", "closed"])
def test_run_outlives_its_output(stdout: str, runs_without_output: dict) -> None:
    process, folder = runs_without_output[stdout]
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "Exception" not in err
    assert err.count("cannot print") == (stdout == "/dev/full")
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 10
    assert read_log(folder)[-1]["step"] == 10


def test_names_that_are_no_utf8_are_printed(capsys: pytest.CaptureFixture) -> None:
    run_command(lambda: print("a\udcff"))
    assert capsys.readouterr().out in ("a\\udcff\n", "a\udcff\n")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU", "SIGUSR2"])
def test_signal_saves_and_stops(
    name: str, tmp_path: Path, tiny_flags: list[str], script, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    stop_at(monkeypatch, 3, number)
    folder = tmp_path / "run"
    before = signal.signal(number, signal.SIG_DFL)  # SIGHUP is ignored where pytest is under nohup
    try:
        result = script("dino_train", *tiny_flags, "--knn-every", 0, "--output-dir", folder)
    finally:
        signal.signal(number, before)
    assert result.returncode == 128 + number, result.stderr
    assert "stopped after step 3 of 20" in result.stdout
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 3


def test_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


STALL = """
import sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from harness.command import iterate, stop_requests

class Stalled(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        time.sleep(1000)

with stop_requests(float(sys.argv[1]), lambda: "ckpt is kept") as received:
    batches = iterate(DataLoader(Stalled(), num_workers=2))
    print("stalled", flush=True)
    next(batches)
"""


UNFINISHED = """
import gc
from torch.utils.data import DataLoader
from harness.command import iterate

gc.disable()
batches = iterate(DataLoader(range(100), num_workers=2))
next(batches)
kept = [batches]
kept.append(kept)  # as the traceback of an error keeps it
"""

PROGRAMS = {  # each with its argument
    "SIGTERM": (STALL, "0"),
    "SIGINT": (STALL, "0"),
    "passed on": (STALL, "0"),
    "after a warning": (STALL, "0"),
    "for minutes": (STALL, "0.02"),
    "unfinished": (UNFINISHED, ""),
}


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, subprocess.Popen]]:
    """All PROGRAMS, started together: each takes seconds to import torch."""
    pipe = subprocess.PIPE
    options = {"cwd": ROOT, "text": True, "stdout": pipe, "stderr": pipe}
    processes: dict[str, subprocess.Popen] = {}
    for name, (program, argument) in PROGRAMS.items():
        words = [sys.executable, "-W", "ignore", "-c", program, argument]
        processes[name] = subprocess.Popen(words, **options)
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def wait_until_stalled(process: subprocess.Popen) -> None:
    assert process.stdout.readline() == "stalled\n"
    time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_a_stalled_run_and_its_workers(number: int, started: dict) -> None:
    process = started[signal.Signals(number).name]
    wait_until_stalled(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(number)
    time.sleep(command.PASSED_ON + 0.2)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    assert err == f"error: stopped at once, by a second {name}; ckpt is kept\n"
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_signal_that_a_launcher_passes_on_is_no_second_one(started: dict) -> None:
    process = started["passed on"]
    wait_until_stalled(process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None


@pytest.mark.slow
def test_sigterm_after_a_warning_is_the_first_one(started: dict) -> None:
    """Slurm's SIGUSR1, then scancel: the run still saves. A second SIGTERM ends it."""
    process = started["after a warning"]
    wait_until_stalled(process)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(command.PASSED_ON + 0.2)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert err == "error: stopped at once, by a second SIGTERM; ckpt is kept\n"


@pytest.mark.slow
def test_stalled_run_ends_after_so_many_minutes(started: dict) -> None:
    process = started["for minutes"]
    wait_until_stalled(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "error: what was under way did not end within 0.02 min of SIGTERM; ckpt is kept\n"


@pytest.mark.slow
def test_process_with_an_unfinished_iterator_ends(started: dict) -> None:
    _, err = started["unfinished"].communicate(timeout=60)
    assert started["unfinished"].returncode == 0
    assert err == ""


@pytest.mark.slow
def test_workers_end_with_the_run(
    tmp_path: Path, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped or at its end: a process that goes on afterwards keeps none of them."""
    flags = [*tiny_flags, "--num-workers", "2", "--epochs", "1"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 3, signal.SIGINT)
        train(parse_config([*flags, "--output-dir", str(tmp_path / "stopped")]))
    assert multiprocessing.active_children() == []
    assert train(parse_config([*flags, "--output-dir", str(tmp_path / "whole")]))["step"] == 10
    assert multiprocessing.active_children() == []


class Failing(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no such thing"), "RuntimeError: no such thing (with --num"),
        (OSError(errno.ENOSPC, "No space left on device"), "--shm-size"),
        (RuntimeError("unable to write to file </torch_1>: shared memory"), "--shm-size"),
    ],
)
def test_workers_own_error_is_told_with_its_last_line(error: Exception, said: str) -> None:
    batches = iterate(DataLoader(Failing(error), num_workers=1))
    with pytest.raises(WorkerError, match="a process that decodes images failed") as raised:
        next(batches)
    assert said in str(raised.value)
    assert "out of memory" not in str(raised.value)
    assert "\n" not in str(raised.value)


class FailingLater(Dataset):
    """Two items can be read, the third is wrong."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise ValueError("no image")
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_wrong_item_is_wrong_input_at_first_and_a_broken_run_later(
    num_workers: int, capsys: pytest.CaptureFixture
) -> None:
    def read(dataset: Dataset) -> None:
        for _ in iterate(DataLoader(dataset, num_workers=num_workers)):
            pass

    for dataset, code in ((Failing(ValueError("no image")), 2), (FailingLater(), 1)):
        with pytest.raises(SystemExit) as stop:
            run_command(partial(read, dataset))
        assert stop.value.code == code
        text = capsys.readouterr().err
        assert "no image" in text
        assert text.count("\n") == 1


@pytest.mark.parametrize(("is_own", "num_lines"), [(True, 1), (False, 0)])
def test_wrong_input_that_one_process_read_is_said_by_it(
    is_own: bool, num_lines: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all have read is said by the first of them."""
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main() -> None:
        with own_input() if is_own else nullcontext():
            raise ValueError("need a mask of 3 px")

    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    assert capsys.readouterr().err == num_lines * "error: need a mask of 3 px\n"


def test_want_of_memory_is_one_line(capsys: pytest.CaptureFixture) -> None:
    def allocate() -> None:
        torch.empty(1 << 50)

    for main in (allocate, partial(np.zeros, 1 << 50)):
        with pytest.raises(SystemExit) as stop:
            run_command(main)
        assert stop.value.code == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "need smaller images or batches" in text


def test_full_shared_memory_is_named(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        text = "DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that "
        raise RuntimeError(text + "dataloader's workers are out of shared memory.")

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 1
    assert "--shm-size 8g; or --num-workers 0" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM])
def test_file_system_that_renames_to_free_names_alone(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    (tmp_path / "new").write_text("new")
    (tmp_path / "file").write_text("old")
    replace_file(tmp_path / "new", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_names_reach_the_terminal_as_text_of_one_line(
    num_workers: int, capsys: pytest.CaptureFixture
) -> None:
    error = ValueError("no such folder: a\nb[/b]{c}\x1b[2J\\")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: next(iterate(DataLoader(Failing(error), num_workers=num_workers))))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no such folder: a\\nb[/b]{c}\\x1b[2J\\\n"


def test_names_that_are_no_text_reach_the_terminal(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise ValueError("no such folder: \udcff")

    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err == "error: no such folder: \\udcff\n"
