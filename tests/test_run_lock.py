"""A run's folder: whose it is, and what is refused rather than begun anew."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Answer, read_log

from dino_train import train
from harness import run_lock
from harness.command import unused_path
from harness.flags import parse_config
from harness.run_lock import FolderLock
from models import load_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


HOLD = """
import sys, time
from pathlib import Path
from harness.run_lock import FolderLock
with FolderLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that has the lock on `tmp_path / "run"`."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_lock_names_its_holder_and_ends_with_it(tmp_path: Path, holder: subprocess.Popen) -> None:
    folder = tmp_path / "run"
    with FolderLock() as lock:
        with pytest.raises(ValueError, match=f"is alive \\(process {holder.pid} on ") as raised:
            lock.take(folder)
        assert "\n" not in str(raised.value)
        holder.kill()  # which leaves its file
        holder.wait()
        assert (folder / ".lock").exists()
        assert lock.take(folder) == ""
        assert f"process {os.getpid()} on " in (folder / ".lock").read_text()
    assert contents(folder) == {}


def test_fork_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Workers that decode images are forks, and outlive a killed run by seconds."""
    held = FolderLock()
    held.take(tmp_path)
    ready, set_ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(set_ready, b"1")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)  # the fork has begun, and dropped the lock before that
    os.close(held.descriptor)  # as a kill does, which leaves the file
    held.descriptor = -1
    try:
        with FolderLock() as lock:
            assert lock.take(tmp_path) == ""
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_folder_without_locks_is_said_once_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script, tiny_flags: list[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    flags = ("--epochs", 1, "--knn-every", 0, "--output-dir", tmp_path / "run")
    result = script("dino_train", *tiny_flags, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"{tmp_path}/run is not locked") == 1
    resumed = script("dino_train", "--resume", tmp_path / "run", "--epochs", 2)
    assert resumed.stdout.count(f"{tmp_path}/run is not locked") == 1
    assert os.strerror(number) in result.stdout
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_live_run_is_neither_resumed_nor_overwritten_nor_joined(
    tmp_path: Path, script, tiny_flags: list[str]
) -> None:
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--knn-every", 0, "--output-dir", folder]
    endless = [str(flag) for flag in [*flags, "--epochs", 2000, "--save-every", 5]]
    command = [sys.executable, str(ROOT / "dino_train.py"), *endless]
    with open(tmp_path / "out.txt", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        while not (folder / "state.safetensors").exists():
            assert process.poll() is None, (tmp_path / "out.txt").read_text()
            time.sleep(0.05)
        for args in (["--resume", folder], [*flags, "--overwrite"]):
            refused = script("dino_train", *args)
            assert refused.returncode == 2
            assert refused.stderr.count("\n") == 1
            assert f"{folder} belongs to a run that is alive (process {process.pid} on " in (
                refused.stderr
            )
        assert script("dino_train", *flags).returncode == 2
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    # what the kill left holds nobody back
    assert (folder / ".lock").exists()
    step = load_checkpoint(folder / "ckpt.safetensors")[1]["step"]
    epochs = step // 10 + 1
    resumed = script("dino_train", "--resume", folder, "--epochs", epochs)
    assert resumed.returncode == 0, resumed.stderr
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 10 * epochs


def test_of_two_runs_that_start_at_once_one_trains(
    tmp_path: Path, holder: subprocess.Popen, script, tiny_flags: list[str]
) -> None:
    """Neither sees a file of the other when it looks; the second one to lock the folder stops."""
    folder = tmp_path / "run"
    result = script("dino_train", *tiny_flags, "--output-dir", folder)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"{folder} belongs to a run that is alive" in result.stderr
    assert contents(folder).keys() == {".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("is_resumed", [False, True])
def test_all_processes_stop_where_the_folder_is_held(
    is_resumed: bool,
    tmp_path: Path,
    holder: subprocess.Popen,
    launch: Callable[..., Answer],
    tiny_run: Path,
    tiny_flags: list[str],
) -> None:
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--output-dir", folder]
    if is_resumed:
        shutil.copytree(tiny_run, folder, dirs_exist_ok=True)
        flags = ["--resume", folder, "--epochs", 3]
    before = contents(folder)
    answer = launch(flags, world=2)
    assert answer.codes == [2, 2], answer.text
    errors = [line for line in answer.text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"belongs to a run that is alive (process {holder.pid} on " in errors[0]
    assert "Traceback" not in answer.text
    assert contents(folder) == before


@pytest.mark.slow
def test_two_runs_that_choose_one_name_at_a_time_get_two_folders(
    tmp_path: Path, tiny_flags: list[str], script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: list[str] = []

    def unused_but_not_for_long(folder: Path, name: str) -> Path:
        path = unused_path(folder, name)
        if not names:  # the other run is faster
            path.mkdir(parents=True)
        names.append(path.name)
        return path

    monkeypatch.setattr("harness.run.unused_path", unused_but_not_for_long)
    result = script("dino_train", *tiny_flags, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    before, after = (Path("runs", name) for name in names)
    assert f"another run took {before} meanwhile: this one is in {after}" in said
    assert not list(before.iterdir())
    assert load_checkpoint(after / "ckpt.safetensors")[1]["step"] == 10


# ---------------------------------------------------------------- nothing begins anew in silence


@pytest.fixture
def run_of_two_states(tmp_path: Path, tiny_flags: list[str]) -> Path:
    """States and teachers of steps 10 and 20."""
    folder = tmp_path / "run"
    flags = ["--knn-every", "0", "--save-every", "10", "--keep-last", "2"]
    train(parse_config([*tiny_flags, *flags, "--output-dir", str(folder)]))
    return folder


@pytest.mark.slow
def test_resume_without_its_state_is_refused_with_the_rename_that_goes_back(
    run_of_two_states: Path, script
) -> None:
    folder = run_of_two_states
    (folder / "state.safetensors").unlink()
    (folder / "state-00000020.safetensors").unlink()
    before = contents(folder)
    result = script("dino_train", "--resume", folder)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"{folder}/state.safetensors is missing" in result.stderr
    rename = f"mv {folder}/state-00000010.safetensors {folder}/state.safetensors"
    assert rename in result.stderr
    assert contents(folder) == before
    subprocess.run(rename.split(), check=True)
    assert train(parse_config(["--resume", str(folder)]))["step"] == 20


@pytest.mark.parametrize("left", [["ckpt.safetensors"], ["log.jsonl"]])
def test_resume_with_no_state_at_all_names_what_there_is(
    left: list[str], run_of_two_states: Path, script
) -> None:
    folder = run_of_two_states
    for path in folder.iterdir():
        if path.name not in ("config.yaml", *left):
            path.unlink()
    before = contents(folder)
    result = script("dino_train", "--resume", folder)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no state is left to resume" in result.stderr
    wanted = "--init-from" if "ckpt.safetensors" in left else "--overwrite"
    assert f"need {wanted}" in result.stderr
    assert contents(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("place", range(1, 4))
def test_kill_in_the_first_save_can_always_be_resumed(
    place: int, tmp_path: Path, launch: Callable[..., Answer], tiny_flags: list[str]
) -> None:
    """The first state comes before the first teacher, which a run of one save then lacks."""
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--epochs", 1, "--knn-every", 0, "--log-every", 1]
    killed = launch([*flags, "--output-dir", folder], kill_at=["models.save_file", place])
    assert killed.codes == [-signal.SIGKILL]
    assert (folder / "state.safetensors").exists() == (place > 1)
    assert (folder / "ckpt.safetensors").exists() == (place > 2)
    resumed = launch(["--resume", folder])
    assert resumed.codes == [0], resumed.text
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 10
    assert [line["step"] for line in read_log(folder)] == list(range(1, 11))


@pytest.mark.slow
def test_damaged_lines_of_the_log_are_kept_aside(run_of_two_states: Path, script) -> None:
    folder = run_of_two_states
    log = folder / "log.jsonl"
    sound = log.read_bytes().splitlines(keepends=True)
    damaged = [b"\xff\xfe\n", b"[3]\n", b'{"loss": 3}\n', b'{"step": "3"}\n', b"null\n"]
    damaged += [b'{"step": true}\n', b"[" * 100_000 + b"\n"]
    log.write_bytes(sound[0] + b"".join(damaged) + sound[1] + b'{"step": 2')
    result = script("dino_train", "--resume", folder, "--epochs", 3)
    assert result.returncode == 0, result.stderr
    assert "damaged lines of log.jsonl: 8, now in " in result.stdout
    assert (folder / "log.jsonl.damaged").read_bytes() == b"".join(damaged) + b'{"step": 2\n'
    assert [line["step"] for line in read_log(folder)] == [10, 20, 30]
