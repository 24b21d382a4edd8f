"""The run's own arithmetic, the dry run, collapse and curves, by real runs."""

import io
import math
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import MEASURED, read_log, stop_at
from PIL import Image
from rich.console import Console
from torch import nn

import dino_train
from config import Config, RunConfig
from dino_train import train
from harness import online_knn, outlook
from harness.flags import parse_config
from harness.monitor import collapse_of, duration
from harness.outlook import ema_half_life, time_to_stop
from harness.run import Run
from models import load_checkpoint

UNIFORM = """
    --teacher-temp 5 --warmup-teacher-temp 5 --teacher-momentum 0.5 --student-temp 1
""".split()
ONE_HOT = """
    --teacher-temp 0.002 --warmup-teacher-temp 0.002 --center-momentum 0.999999
    --teacher-momentum 0.5
""".split()
MORE = """
    --knn-every 0 --epochs 6 --lr 0.05 --log-every 1 --freeze-last-layer-epochs 0
""".split()


def test_half_life_is_when_half_of_the_average_is_new() -> None:
    for momentum in (0.5, 0.98, 0.996, 0.9995):
        assert momentum ** ema_half_life(momentum) == pytest.approx(0.5)
    assert ema_half_life(0.0) == 0
    assert ema_half_life(1.0) == math.inf


def test_durations_are_said_in_two_units() -> None:
    seconds = (7, 246, 3 * 3600 + 5 * 60 + 59, 2 * 86400 + 3 * 3600)
    assert [duration(x) for x in seconds] == ["7 s", "4 min 06 s", "3 h 05 min", "2 d 03 h"]


@pytest.mark.slow
def test_what_cannot_be_meant_is_a_warning_that_names_the_flag(
    tmp_path: Path, tiny_flags, script
) -> None:
    flags = ("--teacher-momentum", "0.9995", "--projection-output-dim", "128", "--knn-images", "9")
    more = ("--epochs", "1", "--warmup-epochs", "5", "--warmup-teacher-temp-epochs", "3")
    more += ("--freeze-last-layer-epochs", "1")
    result = script("dino_train", *tiny_flags, *flags, *more, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    warned = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    for flag in (
        "--teacher-momentum 0.9995",
        "--projection-output-dim 128",
        "k-NN asks 20 neighbours and has 9 images (--knn-images)",
        "--warmup-epochs 5",
        "--warmup-teacher-temp-epochs 3",
        "--freeze-last-layer-epochs 1 covers",
    ):
        assert sum(flag in line for line in warned) == 1, flag
    assert (
        "leaves half of the teacher as it began for 1,386 steps, and the run has 10"
        in result.stdout
    )


@pytest.mark.slow
def test_frozen_backbone_is_a_warning_where_it_has_learned_nothing_or_never_will(
    tiny_flags, tmp_path: Path
) -> None:
    student = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    flags = [*tiny_flags, "--freeze-backbone-epochs", "1", "--output-dir", str(tmp_path / "run")]
    for more, said in (
        ([], "--freeze-backbone-epochs 1 freezes random weights: need --init-from, or 0"),
        (["--init-from", "weights.pth"], ""),
        (
            ["--init-from", "weights.pth", "--epochs", "1"],
            "--freeze-backbone-epochs 1 covers the run of 1 epoch: the backbone stays as it is, "
            "and so do k-NN and RankMe",
        ),
    ):
        lines = outlook.unlikely_settings(Run.prepare(parse_config([*flags, *more])), student)
        assert [line for line in lines if "backbone" in line] == ([said] if said else [])


@pytest.mark.slow
def test_header_says_whether_blocks_are_compiled_and_what_is_missing(
    tiny_flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config([*tiny_flags, "--compile", "--output-dir", str(tmp_path / "run")])
    run = Run.prepare(config)

    def header_of(student: nn.Module) -> str:
        console = Console(width=300, file=io.StringIO())
        console.print(outlook.header(run, student))
        return re.sub(" *\n", "\n", console.file.getvalue())

    student = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))  # backbone and head
    assert "1 x cpu, float32, blocks not compiled\n" in header_of(student)
    student[0].compile()
    assert "1 x cpu, float32, blocks compiled\n" in header_of(student)
    needed = "a C compiler, Python's headers and, on a GPU, Triton"
    missing = f"--compile needs {needed}: not all were found"
    for found in (False, True):
        monkeypatch.setattr(outlook, "has_compiler", lambda found=found: found)
        assert (missing in outlook.unlikely_settings(run, student)) != found
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_header_shows_the_arithmetic(tiny_run: Path, tiny_flags, tmp_path: Path, script) -> None:
    flags = ("--teacher-temp", "0.07", "--warmup-teacher-temp-epochs", "1", "--dry-run")
    flags += ("--output-dir", tmp_path / "run", "--teacher-momentum", "0.9")
    result = script("dino_train", *tiny_flags, *flags)
    said = " ".join(result.stdout.split())
    for text in (
        f"folder {tmp_path}/run network",
        "M in its head of 16 prototypes",
        "batch 8 images steps 20: 2 epochs of 10 steps",
        "lr 0.000313 (0.01 x 8 / 256)",
        "0.04 to 0.07 in 1 of 2 epochs",
        "averages about the last 10 steps at first",
        "data: chosen for 80 images: --warmup-teacher-temp 0.04",
        "data: chosen for 2 epochs of 10 steps: --freeze-last-layer-epochs 0",
    ):
        assert text in said, said


@pytest.mark.slow
def test_dry_run_writes_its_crops_alone_and_changes_nothing(
    tmp_path: Path, tiny_run: Path, tiny_flags, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    result = script("dino_train", *tiny_flags, "--dry-run", "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    for text in ("images/s", "for data", "GiB at most", "for 20 steps", str(folder / "crops.png")):
        assert text in " ".join(result.stdout.split())
    assert " to go" not in result.stdout
    assert [path.name for path in folder.iterdir()] == ["crops.png"]
    Image.open(folder / "crops.png").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    result = script("dino_train", *tiny_flags, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    for mine, other in zip(read_log(folder), read_log(tiny_run), strict=True):
        assert {**mine, **dict.fromkeys(MEASURED)} == {**other, **dict.fromkeys(MEASURED)}


def test_dry_run_of_a_short_run_times_its_steps_alone(
    tmp_path: Path, tiny_flags, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_parts = dino_train.build_parts

    def build_as_if_slowly(run: Run) -> dino_train.Parts:
        run.began -= 1000
        return build_parts(run)

    timed: list[float] = []
    stop_loading = Run.stop_loading

    def stop_slowly(run: Run) -> None:
        timed.append(run.seconds_a_step(2)[0])
        time.sleep(0.5)
        stop_loading(run)

    monkeypatch.setattr(dino_train, "build_parts", build_as_if_slowly)
    monkeypatch.setattr(Run, "stop_loading", stop_slowly)
    flags = ["--batch-size", 40, "--epochs", 1, "--dry-run", "--output-dir", tmp_path / "run"]
    said = " ".join(script("dino_train", *tiny_flags, *flags).stdout.split())
    seconds_a_step = re.search(r"images/s, (\S+) s a step, over 2", said)
    assert float(seconds_a_step[1]) < 100, said
    assert seconds_a_step[1] == f"{timed[0]:.3g}"  # the end of the workers is no step's time


@pytest.mark.slow
def test_dry_run_of_two_processes_times_what_workers_have_not_made_ahead(
    tmp_path: Path, tiny_flags, launch
) -> None:
    flags = ["--batch-size", 4, "--num-workers", 2, "--dry-run", "--output-dir", tmp_path / "run"]
    answer = launch([*tiny_flags, *flags], world=2)
    assert answer.codes == [0, 0], answer.text
    said = " ".join(answer.text.split())
    assert "8 images (4 x 2 processes)" in said and "s a step, over 12" in said
    assert said.count("nothing but crops.png was written") == 1
    again = launch([*tiny_flags, *flags], world=2)
    assert "nothing but crops-2.png was written" in " ".join(again.text.split())
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"crops.png", "crops-2.png"}


def test_dry_run_leaves_a_run_alone(tiny_run: Path, script) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tiny_run.iterdir()}
    result = script("dino_train", "--resume", tiny_run, "--dry-run")
    assert result.returncode == 2 and "--dry-run" in result.stderr
    assert result.stderr.count("\n") == 1
    assert before == {path.name: path.stat().st_mtime_ns for path in tiny_run.iterdir()}


@pytest.mark.slow
def test_dry_run_may_draw_its_crops_into_the_folder_of_a_run(
    tiny_run: Path, tiny_flags, tmp_path: Path, script
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = script("dino_train", *tiny_flags, "--dry-run", "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    (folder / "crops.png").unlink()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_collapse_is_judged_by_entropy_and_kl() -> None:
    most = math.log(1024)
    assert collapse_of(most, 0.0, 1024) == "uniform"
    assert collapse_of(most, 0.5, 1024) == ""  # a new teacher, which the student does not match yet
    assert collapse_of(0.0, 3.0, 1024) == "one-hot"
    assert collapse_of(0.5 * most, 0.0, 1024) == ""


@pytest.mark.parametrize(
    "kind, flags",
    [pytest.param("uniform", UNIFORM, marks=pytest.mark.slow), ("one-hot", ONE_HOT)],
)
def test_provoked_collapse_is_named_and_stops_the_run(
    kind: str, flags: tuple, tmp_path: Path, tiny_flags, script
) -> None:
    more = (*flags, *MORE, "--output-dir", tmp_path, "--save-every", "5")
    result = script("dino_train", *tiny_flags, *more, "--stop-on-collapse")
    assert result.returncode == 1, result.stdout
    assert f"the teacher has been {kind} since step" in result.stderr
    assert "--teacher-temp" in result.stderr and "ckpt.safetensors is kept" in result.stderr
    log = read_log(tmp_path)
    assert "collapse" not in log[9] and log[-1]["collapse"] == kind  # not before it has lasted


@pytest.mark.slow
def test_collapse_is_named_alike_by_a_resumed_run(
    tmp_path: Path, tiny_flags, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*tiny_flags, *UNIFORM, *MORE]
    result = script("dino_train", *flags, "--output-dir", whole)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("warning: step") == 1  # said once, in the log on every line
    with monkeypatch.context() as patch:
        stop_at(patch, 32, signal.SIGTERM)
        assert script("dino_train", *flags, "--output-dir", parts).returncode == 143
    assert script("dino_train", "--resume", parts).returncode == 0
    kinds = [[line.get("collapse") for line in read_log(folder)] for folder in (whole, parts)]
    assert kinds[0] == kinds[1] and "uniform" in kinds[0]


def test_healthy_run_is_not_called_collapsed(tiny_run: Path) -> None:
    assert not any("collapse" in line for line in read_log(tiny_run))


@pytest.mark.slow
@pytest.mark.parametrize("has_classes", [True, False])
def test_teacher_that_is_worse_than_untrained_for_a_fifth_of_the_run_is_named(
    has_classes: bool,
    tmp_path: Path,
    image_folder: Path,
    tiny_flags,
    script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = iter([50.0, 40, 40, 40, 60, 40, 40, 40, 40, 50, 40])  # before, and after ten epochs
    source = image_folder if has_classes else image_folder / "checks"
    if has_classes:
        monkeypatch.setattr(dino_train, "knn_accuracy", lambda *_, **__: {20: (next(figures), 0)})
    else:
        monkeypatch.setattr(online_knn, "quality_figures", lambda _: {"rankme": next(figures)})
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--data", source, "--epochs", "10", "--output-dir", folder]
    flags += ["--teacher-momentum", "0.996"]  # with which it does not collapse
    each = 10 if has_classes else 5  # steps of an epoch
    with monkeypatch.context() as patch:
        stop_at(patch, 6 * each + 2, signal.SIGTERM)
        first = script("dino_train", *flags)
    assert first.returncode == 143, first.stderr
    assert load_checkpoint(folder / "ckpt.safetensors")[1]["metrics"]["worse_since"] == 5 * each
    second = script("dino_train", "--resume", folder)
    assert second.returncode == 0, second.stderr

    evaluations = [line for line in read_log(folder) if "rankme" in line]
    named = [line["step"] for line in evaluations if line.get("worse_than_untrained")]
    assert named == [3 * each, 7 * each, 8 * each]
    name = "k-NN top-1 is below the 50.0 %" if has_classes else "RankMe is below the 50.0"
    for result, epoch, since in ((first, 3, 1), (second, 7, 5)):
        (line,) = (line for line in result.stdout.splitlines() if line.startswith("warning: step"))
        assert line.startswith(
            f"warning: step {epoch * each}: {name} of before training since step {since * each};"
        )
        assert "--koleo-weight 0.1" in line


@pytest.mark.slow
def test_curves_are_drawn_and_no_failure_of_theirs_ends_a_run(
    tmp_path: Path, tiny_run: Path, tiny_flags
) -> None:
    Image.open(tiny_run / "curves.png").verify()
    (tmp_path / "curves.png").mkdir()
    config = parse_config([*tiny_flags, "--epochs", "1", "--output-dir", str(tmp_path)])
    assert train(config)["step"] == 10


@pytest.mark.parametrize(
    ("version", "minutes", "seconds", "said"),
    [
        ("2.12.0", 5, None, "has 30 s to save: then its launcher kills it; for more time, export"),
        ("2.12.0", 5, None, "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 before it is launched"),
        ("2.14.1+cpu", 5, "299", "has 299 s to save"),
        ("2.12.0", 5, "300", ""),
        ("2.12.0", 0, "60", "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 before"),
        ("2.12.0", 0, "3600", ""),
        ("2.11.0+cu128", 5, "300", "has 30 s to save"),
        ("2.11.0", 5, None, "for more time, take torch 2.12 or newer, and export TORCH_"),
    ],
)
def test_launcher_that_would_kill_a_run_while_it_saves_is_named(
    version: str,
    minutes: float,
    seconds: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    if seconds is not None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
    run = Run.__new__(Run)
    run.config = Config(run=RunConfig(stop_minutes=minutes))
    lines = time_to_stop(run)
    assert [said in line for line in lines] == ([True] if said else [])
