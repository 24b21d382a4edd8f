"""Runs that are killed, stopped or out of disk, against runs that were left alone."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import MEASURED, ROOT, Answer, read_log, same_files
from safetensors.torch import load_file

from dino_train import train
from harness.command import iterate
from harness.flags import parse_config
from harness.run import Run
from models import load_checkpoint

Launch = Callable[..., Answer]


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses, and the same tensors bit for bit; each step once in the log."""
    logs = []
    for folder in (one, other):
        lines = [line for line in read_log(folder) if "loss" in line]
        assert len({line["step"] for line in lines}) == len(lines)
        for line in lines:
            for measured in MEASURED:
                del line[measured]
        logs.append(lines + [line for line in read_log(folder) if "knn_top1" in line])
    assert logs[0] == logs[1]
    for name in ("state.safetensors", "ckpt.safetensors"):
        tensors, others = (load_file(folder / name) for folder in (one, other))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)


def run_to_the_end(
    launch: Launch, flags: list, folder: Path, kills: list[dict], **launch_as: object
) -> int:
    """Start a run, kill it as each of `kills` says, resume, and let the last go on to its end.

    Gives how many of them killed a run that had not ended.
    """
    killed = 0
    for kill in [*kills, {}]:
        started = (folder / "config.yaml").exists()
        args = ["--resume", folder] if started else [*flags, "--output-dir", folder]
        answer = launch(args, **launch_as, **kill)
        killed += -signal.SIGKILL in answer.codes
        if not kill:
            assert set(answer.codes) == {0}, answer.text
        else:
            assert set(answer.codes) <= {0, -signal.SIGKILL}, answer.text
    return killed


INTERRUPTED = """
    --batch-size 2 --accumulation-steps 2 --num-workers 2 --epochs 2 --log-every 1
    --save-every 3 --keep-last 2 --keep-every 1
""".split()
# each dies at the n-th such call of its start: while a file is written, between checkpoint and
# state, with the run's folder half open, in an evaluation, in a step
PLACES = (
    ["os.replace", 3],
    ["os.replace", 5],
    ["harness.run.save_tensors", 2],
    ["harness.run.copy_whole", 3],
    ["harness.run.write_whole", 1],
    ["harness.run.write_whole", 2],
    ["shutil.copyfile", 1],
    ["os.fsync", 2],
    ["harness.online_knn.features_of_splits", 1],
    ["dino_train.clip_gradients", 4],
)


@pytest.fixture(scope="session")
def left_alone(
    tmp_path_factory: pytest.TempPathFactory, launch: Launch, tiny_flags: list[str]
) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("left_alone") / "run"
    answer = launch([*tiny_flags, *INTERRUPTED, "--output-dir", folder])
    assert answer.codes == [0], answer.text
    return folder


@pytest.mark.slow
def test_kills_leave_the_run_as_if_there_had_been_none(
    first_kill: int, tmp_path: Path, launch: Launch, tiny_flags: list[str], left_alone: Path
) -> None:
    """Five kills, after which a run is over: two at places, then one at a random moment."""
    kills: list[dict] = []
    for number in range(first_kill, first_kill + 5):
        if number % 3 == 2:
            kills.append({"kill_after": random.Random(number).uniform(0.2, 3)})
        else:
            num_at_places = number - number // 3  # before this one
            kills.append({"kill_at": PLACES[num_at_places % len(PLACES)]})
    folder = tmp_path / "killed"
    killed = run_to_the_end(launch, [*tiny_flags, *INTERRUPTED], folder, kills)
    assert_same_run(left_alone, folder)
    assert same_files(left_alone, folder)
    assert killed >= 2


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_killed_processes_leave_the_run_as_if_they_had_not_been(
    fsdp: bool, tmp_path: Path, launch: Launch, tiny_flags: list[str]
) -> None:
    flags = [*tiny_flags, *INTERRUPTED, "--epochs", "1"]
    launch_as = {"world": 2, "fsdp": fsdp}
    alone = launch([*flags, "--output-dir", tmp_path / "alone"], **launch_as)
    assert alone.codes == [0, 0], alone.text
    kills = [{"kill_at": place} for place in (["harness.run.save_tensors", 2], ["os.replace", 4])]
    folder = tmp_path / "killed"
    assert run_to_the_end(launch, flags, folder, kills, **launch_as) == 2
    assert_same_run(tmp_path / "alone", folder)


@pytest.mark.slow
def test_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, launch: Launch, vit_flags: list[str]
) -> None:
    flags = [*vit_flags, "--batch-size", "8", "--log-every", "1", "--save-every", "1"]
    flags += ["--epochs", "1"]
    alone = launch([*flags, "--output-dir", tmp_path / "alone"])
    assert alone.codes == [0], alone.text
    folder, kill = tmp_path / "moved", {"kill_at": ["dino_train.clip_gradients", 3]}
    launch([*flags, "--output-dir", folder], **kill)
    ddp = launch(["--resume", folder], world=2, **kill)
    assert "taken over: --batch-size 4 (was 8)" in ddp.text
    assert "batch      8 images (4 x 2 processes)" in ddp.text
    launch(["--resume", folder], world=2, fsdp=True, **kill)
    last = launch(["--resume", folder])
    assert last.codes == [0], last.text
    assert "batch      8 images (4 x 2 accumulation steps)" in last.text
    losses = [[line["loss"] for line in read_log(run)] for run in (tmp_path / "alone", folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    three = launch(["--resume", folder, "--epochs", "3"], world=3)
    assert three.codes == [2, 2, 2]
    assert three.text.count("error: ") == 1
    assert "8 images a step need a number of processes that divides them" in three.text


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 4)])
def test_run_that_is_killed_unsaved_on_other_processes_goes_on_where_it_began(
    first: int, second: int, tmp_path: Path, launch: Launch, vit_flags: list[str]
) -> None:
    """What config.yaml then says of the batch belongs to no state."""
    folder, batch_size = tmp_path / "run", 8 // first
    flags = [*vit_flags, "--batch-size", batch_size, "--log-every", 1, "--epochs", 1]
    flags += ["--save-every", 3, "--output-dir", folder]
    launch(flags, world=first, kill_at=["dino_train.clip_gradients", 5])
    killed = launch(["--resume", folder], world=second, kill_at=["dino_train.clip_gradients", 1])
    assert -signal.SIGKILL in killed.codes, killed.text
    refused = launch(["--resume", folder, "--batch-size", 3], world=first)
    assert refused.codes == [2] * first
    assert f"--batch-size 3: it has {batch_size}" in refused.text
    last = launch(["--resume", folder], world=first)
    assert last.codes == [0] * first, last.text
    assert [line["step"] for line in read_log(folder)] == list(range(1, 11))


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step(tmp_path: Path, vit_flags: list[str]) -> None:
    """One of two is told, by torchrun's own launch line."""
    number = signal.SIGUSR1
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2"]
    flags = [*vit_flags, "--epochs", "2000", "--batch-size", "4", "--log-every", "1"]
    command = [*torchrun, str(ROOT / "dino_train.py"), *flags, "--output-dir", str(folder)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    while not (folder / "log.jsonl").exists() or not read_log(folder):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    os.kill(int(Path(children).read_text().split()[1]), number)
    out, err = process.communicate(timeout=60)
    assert f"exitcode  : {128 + number}" in err
    assert f"dino_train.py --resume {folder}" in out
    step = int(out.split("stopped after step ")[1].split(" of ")[0])
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == step
    assert read_log(folder)[-1]["step"] == step


@pytest.mark.slow
def test_signal_to_the_group_during_an_evaluation_saves(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    """To its workers too, which are starting."""
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--num-workers", "2", "--epochs", "20", "--output-dir", str(folder)]
    command = [sys.executable, str(ROOT / "dino_train.py"), *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped after step 1 of" in out
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 1


def test_signal_as_soon_as_the_folder_is_there_saves_a_step(
    tmp_path: Path, tiny_flags: list[str], script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Run.open

    def open_and_signal(self: Run) -> None:
        opened(self)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "open", open_and_signal)
    folder = tmp_path / "run"
    result = script("dino_train", *tiny_flags, "--knn-every", 0, "--output-dir", folder)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 1


@pytest.mark.slow
def test_launcher_that_is_killed_stops_the_run(tmp_path: Path, tiny_flags: list[str]) -> None:
    folder = tmp_path / "run"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    flags = [*tiny_flags, "--epochs", "2000", "--log-every", "1", "--output-dir", str(folder)]
    command = [*accelerate, str(ROOT / "dino_train.py"), *flags]
    with open(tmp_path / "out.txt", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while not (folder / "log.jsonl").exists() or not read_log(folder):
            assert process.poll() is None, (tmp_path / "out.txt").read_text()
            time.sleep(0.05)
        process.terminate()
        process.wait()
    deadline = time.monotonic() + 30
    while "stopped after step" not in (tmp_path / "out.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (folder / "state.safetensors").exists()


@pytest.mark.slow
def test_worker_that_dies_is_an_error_and_no_hang(tmp_path: Path, tiny_flags: list[str]) -> None:
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--epochs", "2000", "--num-workers", "1", "--log-every", "1"]
    command = [sys.executable, str(ROOT / "dino_train.py"), *flags, "--output-dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "log.jsonl").exists() or not [x for x in read_log(folder) if "loss" in x]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "dino_train" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "error: a process that decodes images died: " in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_worker_whose_socket_breaks_before_it_has_ended_is_named(error: type) -> None:
    """As a batch is taken from a worker that is being killed: no error of the input, code 1."""

    def batches() -> Iterator[int]:
        yield 1
        raise error

    taken = iterate(batches())
    assert next(taken) == 1
    with pytest.raises(RuntimeError, match=f"DataLoader worker ended: {error.__name__}"):
        next(taken)


@pytest.mark.slow
def test_older_states_and_teachers_of_epochs_are_kept_as_asked(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    folder = tmp_path / "run"
    flags = ["--epochs", "5", "--save-every", "20", "--keep-last", "2", "--keep-every", "2"]
    flags += ["--knn-every", "0", "--output-dir", str(folder)]
    train(parse_config([*tiny_flags, *flags]))
    kept = {path.name: path for path in folder.glob("*-*.safetensors")}
    assert sorted(kept) == [
        "ckpt-00000040.safetensors",
        "ckpt-00000050.safetensors",
        "ckpt-epoch-0002.safetensors",
        "ckpt-epoch-0004.safetensors",
        "state-00000040.safetensors",
        "state-00000050.safetensors",
    ]
    for name, step in (("ckpt-epoch-0002", 20), ("ckpt-epoch-0004", 40), ("ckpt-00000040", 40)):
        assert load_checkpoint(kept[f"{name}.safetensors"])[1]["step"] == step
    # an older state can be gone back to
    final = load_file(folder / "state.safetensors")
    os.replace(kept["state-00000040.safetensors"], folder / "state.safetensors")
    assert train(parse_config(["--resume", str(folder)]))["step"] == 50
    again = load_file(folder / "state.safetensors")
    assert all(torch.equal(final[name], again[name]) for name in final)


def test_last_line_of_the_log_that_cannot_be_written_is_said(
    tmp_path: Path, tiny_flags: list[str], script, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Run.append_to_log

    def append_or_fail(run: Run, line: str) -> None:
        if json.loads(line)["step"] == run.total_steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(run, line)

    monkeypatch.setattr(Run, "append_to_log", append_or_fail)
    folder = tmp_path / "run"
    flags = ["--epochs", 1, "--knn-every", 0, "--output-dir", folder]
    result = script("dino_train", *tiny_flags, *flags)
    assert result.returncode == 1
    assert f"cannot write {folder / 'log.jsonl'}: No space left" in result.stderr
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 10


@pytest.mark.slow
def test_newest_state_is_kept_though_the_clock_went_back(
    tmp_path: Path, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.run._time_of", lambda file: -file.stat().st_mtime_ns)
    folder = tmp_path / "run"
    flags = ["--save-every", "5", "--keep-last", "2", "--knn-every", "0"]
    train(parse_config([*tiny_flags, *flags, "--output-dir", str(folder)]))
    for stem in ("state", "ckpt"):
        kept = sorted(path.name for path in folder.glob(f"{stem}-*.safetensors"))
        assert len(kept) == 2 and f"{stem}-00000020.safetensors" in kept


@pytest.mark.slow
def test_state_is_saved_after_so_many_minutes(tmp_path: Path, launch, tiny_flags: list) -> None:
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--knn-every", "0", "--save-minutes", "0.0001", "--output-dir", folder]
    launch(flags, kill_at=["dino_train.clip_gradients", 8])
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 7


@pytest.mark.slow
def test_resume_names_all_that_differs_and_takes_over_what_is_harmless(
    tmp_path: Path, script, launch: Launch, tiny_run: Path, tiny_flags: list[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    flags = ("--arch", "resnet18", "--projection-output-dim", 32, "--batch-size", 4, "--epochs", 9)
    refused = script("dino_train", "--resume", folder, *flags)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    for said in ("--arch resnet18: it has", "--projection-output-dim 32: it has 16"):
        assert said in refused.stderr
    assert "--batch-size 4: it has 8" in refused.stderr
    assert "epochs" not in refused.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    fewer = script("dino_train", "--resume", folder, "--epochs", 1)
    assert fewer.returncode == 2 and fewer.stderr.count("\n") == 1
    said = "has made 20 steps: need --epochs of at least 2, got --epochs 1, which is 10"
    assert said in fewer.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    flags = ("--epochs", 3, "--save-every", 7, "--num-workers", 1)
    taken = script("dino_train", "--resume", folder, *flags)
    assert taken.returncode == 0, taken.stderr
    for said in ("--epochs 3 (was 2)", "--save-every 7 (was 1000)", "--num-workers 1 (was 0)"):
        assert f"taken over: {said}" in taken.stdout
    remedies = ["--lr", 0.005, "--clip-grad", 0.3, "--mixed-precision", "bf16", "--epochs", 4]
    gentler = launch(["--resume", folder, *remedies])  # a process has one precision
    assert gentler.codes == [0], gentler.text
    for said in ("--lr 0.005 (was", "--clip-grad 0.3 (was", "--mixed-precision bf16 (was no)"):
        assert f"taken over: {said}" in gentler.text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim:\n  lr: 7.0\n  clip_grad: 9.0\n")
    flags = ["--resume", folder, "--config", recipe, *tiny_flags[:2], "--epochs", 1]
    other = parse_config([str(flag) for flag in flags])  # of these, a recipe changes nothing
    assert (other.optim.lr, other.optim.clip_grad) == (0.005, 0.3)
    assert other.run.mixed_precision == "bf16"
    same_batch = ["--batch-size", 4, "--accumulation-steps", 2, "--epochs", 5]
    assert launch(["--resume", folder, *same_batch]).codes == [0]


@pytest.mark.slow
def test_resume_follows_images_that_were_moved_and_refuses_other_ones(
    tmp_path: Path, script, image_folder: Path, tiny_flags: list[str]
) -> None:
    images, moved, folder = tmp_path / "images", tmp_path / "elsewhere", tmp_path / "run"
    shutil.copytree(image_folder, images)
    flags = ("--knn-every", 0, "--output-dir", folder)
    script("dino_train", *tiny_flags, "--data", images, *flags)
    images.rename(moved)
    taken = script("dino_train", "--resume", folder, "--data", moved, "--epochs", 3)
    assert taken.returncode == 0, taken.stderr
    assert f"taken over: --data {moved} (was {images})" in taken.stdout
    next((moved / "checks").iterdir()).unlink()
    refused = script("dino_train", "--resume", folder)
    assert refused.returncode == 2
    assert f"the images in {moved}: they are not those it began with" in refused.stderr


@pytest.mark.slow
def test_full_disk_names_the_folder_and_keeps_the_last_state(
    tmp_path: Path, launch: Launch, tiny_flags: list[str]
) -> None:
    """A limit on file sizes stands for the disk: the larger network does not fit."""
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--epochs", "1", "--save-every", "3", "--knn-every", "0"]
    answer = launch([*flags, "--output-dir", folder], file_limit_after=[2, 1 << 20])
    assert answer.codes == [1]
    assert f"error: cannot write {folder}/ckpt.safetensors: " in answer.text
    assert f"; {folder}/ckpt.safetensors is kept" in answer.text
    assert "Traceback" not in answer.text
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["step"] == 3
    assert not list(folder.glob(".tmp*"))
    assert train(parse_config(["--resume", str(folder)]))["step"] == 10


@pytest.mark.slow
def test_full_disk_stops_two_processes_with_one_line(
    tmp_path: Path, launch: Launch, vit_flags: list[str]
) -> None:
    flags = [*vit_flags, "--batch-size", "4", "--save-every", "3"]
    answer = launch(
        [*flags, "--output-dir", tmp_path / "run"], world=2, file_limit_after=[1, 1 << 20]
    )
    assert answer.codes == [1, 1]
    assert answer.text.count("error: cannot write") == 1
    assert "no checkpoint was saved yet" in answer.text
    assert "Traceback" not in answer.text
