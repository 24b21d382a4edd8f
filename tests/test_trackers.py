"""Trackers go on where the run goes on, and end no run. Absent packages are skipped."""

import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from conftest import MEASURED, read_log, run_script

import harness.flags
import harness.run
from harness.distributed import make_accelerator
from harness.saved_run import SavedRun
from models import load_tensors


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told, and fails in what it is told to fail in."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, fails_in: str = "") -> None:
        super().__init__()
        self.fails_in = fails_in
        self.settings: dict = {}
        self.lines: list[dict] = []
        self.calls: Counter = Counter()

    @property
    def tracker(self) -> object:
        return self

    def _note(self, call: str) -> None:
        self.calls[call] += 1
        if call == self.fails_in:
            raise RuntimeError("no key\nwas given")

    @on_main_process
    def start(self) -> None:
        self._note("start")

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        self._note("store_init_configuration")
        self.settings = values

    @on_main_process
    def log(self, values: dict, step: int | None, **kwargs: object) -> None:
        self._note("log")
        self.lines.append({"step": step} | values)

    @on_main_process
    def finish(self) -> None:
        self._note("finish")


def track_with(tracker: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs with --log-with wandb have another tracker, whether W&B is installed or not."""

    def make(precision: str, log_with: str | None) -> object:
        return make_accelerator(precision, tracker if log_with else None)

    monkeypatch.setattr(harness.run, "make_accelerator", make)
    monkeypatch.setattr(harness.flags, "is_installed", lambda package: True)


def tracker_id_of(folder: Path) -> str:
    return SavedRun.read(folder / "state.safetensors").tracker_id


@pytest.mark.slow
def test_tracker_gets_settings_counts_and_every_logged_figure(
    tmp_path: Path, tiny_flags: list[str], monkeypatch
) -> None:
    recorder, folder = Recorder(), tmp_path / "run"
    track_with(recorder, monkeypatch)
    flags = [*tiny_flags, "--output-dir", folder, "--log-with", "wandb", "--log-every", 5]
    assert run_script("dino_train", *flags).returncode == 0
    assert recorder.lines == read_log(folder)
    assert [line["step"] for line in recorder.lines if "knn_top1" in line] == [0, 10, 20]
    figures = {"epoch", "loss", "lr", "teacher_entropy", "kl", "feature_spread", "data_wait"}
    assert figures <= recorder.lines[1].keys()
    settings = recorder.settings
    assert settings["model.arch"] == "test_resnet"
    assert settings["optim.batch_size"] == 8
    assert (settings["num_images"], settings["num_classes"]) == (80, 2)
    tensors, _ = load_tensors(folder / "ckpt.safetensors")
    weights = {name: x for name, x in tensors.items() if not name.startswith("backbone.")}
    assert settings["num_head_parameters"] == sum(x.numel() for x in weights.values())
    assert all(type(x) in (bool, int, float, str, type(None)) for x in settings.values())
    assert recorder.calls["finish"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("call", ["start", "store_init_configuration", "log", "finish"])
def test_tracker_that_fails_is_said_in_one_line_and_ends_nothing(
    call: str, tmp_path: Path, tiny_flags: list[str], tiny_run: Path, monkeypatch
) -> None:
    recorder, folder = Recorder(fails_in=call), tmp_path / "run"
    track_with(recorder, monkeypatch)
    flags = [*tiny_flags, "--output-dir", folder, "--log-with", "wandb"]
    result = run_script("dino_train", *flags)
    assert result.returncode == 0, result.stderr
    line = "warning: --log-with wandb: no key was given; the run goes on without it\n"
    assert result.stdout.count("warning: --log-with") == 1
    assert line in result.stdout
    assert recorder.calls[call] == 1  # it is not asked again
    own, other = read_log(folder), read_log(tiny_run)
    for values in own + other:
        for name in MEASURED:
            values.pop(name, None)
    assert own == other


@pytest.mark.slow
def test_run_has_one_id_for_wandb_over_all_its_starts(
    tmp_path: Path, tiny_flags: list[str], monkeypatch
) -> None:
    track_with(Recorder(), monkeypatch)
    folder, other = tmp_path / "run", tmp_path / "other"
    for each in (folder, other):
        flags = [*tiny_flags, "--output-dir", each, "--log-with", "wandb", "--epochs", 1]
        assert run_script("dino_train", *flags).returncode == 0
    first = tracker_id_of(folder)
    assert len(first) == 8
    assert first != tracker_id_of(other)
    # a start without a tracker keeps it for the next one
    for epochs, more in ((2, ["--log-with", "None"]), (3, ["--log-with", "wandb"])):
        result = run_script("dino_train", "--resume", folder, "--epochs", epochs, *more)
        assert result.returncode == 0, result.stderr
        assert tracker_id_of(folder) == first


# ---------------------------------------------------------------- the real ones


def shown_by_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = importlib.import_module(module).EventAccumulator(str(folder / "dino"))
    events.Reload()
    return {
        tag: [(each.step, each.value) for each in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return a figure of log.jsonl in the float32 that TensorBoard keeps."""
    lines = [line for line in read_log(folder) if name in line]
    return [(line["step"], torch.tensor(line[name]).item()) for line in lines]


def test_tensorboard_shows_each_step_once_after_kill_resume_and_overwrite(
    tmp_path: Path, tiny_flags: list[str], launch
) -> None:
    pytest.importorskip("tensorboard", reason="an optional package")
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--output-dir", folder, "--log-with", "tensorboard", "--log-every", 1]
    flags += ["--save-every", 4, "--save-minutes", 0, "--knn-every", 1]
    killed = launch(flags, kill_at=["harness.monitor.Monitor.log_step", 16])
    assert killed.codes == [-9]
    before = shown_by_tensorboard(folder)["loss"]
    assert [step for step, _ in before] == [*range(1, 16)]  # saved after step 12
    assert launch(["--resume", folder]).codes == [0]
    shown = shown_by_tensorboard(folder)
    for name in ("loss", "lr", "kl", "teacher_entropy", "knn_top1", "epoch"):
        assert shown[name] == logged(folder, name), name
    assert [step for step, _ in shown["loss"]] == [*range(1, 21)]
    # another run in its place
    assert launch([*flags, "--overwrite", "--epochs", 1, "--seed", 1]).codes == [0]
    shown = shown_by_tensorboard(folder)
    assert shown["loss"] == logged(folder, "loss")
    assert shown["knn_top1"] == logged(folder, "knn_top1")


def test_tensorboard_shows_each_step_once_after_a_step_back(
    tmp_path: Path, tiny_flags: list[str], launch
) -> None:
    pytest.importorskip("tensorboard", reason="an optional package")
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--output-dir", folder, "--log-with", "tensorboard", "--log-every", 1]
    assert launch([*flags, "--save-every", 5, "--keep-last", 9]).codes == [0]
    (folder / "state-00000005.safetensors").replace(folder / "state.safetensors")
    assert launch(["--resume", folder]).codes == [0]
    shown = shown_by_tensorboard(folder)
    assert shown["loss"] == logged(folder, "loss")
    assert [step for step, _ in shown["loss"]] == [*range(1, 21)]


def test_wandb_goes_on_with_its_run(tmp_path: Path, tiny_flags: list[str], launch) -> None:
    pytest.importorskip("wandb", reason="an optional package")
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--output-dir", folder, "--log-with", "wandb", "--epochs", 1]
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    assert launch(flags, env=env).codes == [0]
    assert launch(["--resume", folder, "--epochs", 2], env=env).codes == [0]
    own_id = tracker_id_of(folder)
    names = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(names) == 2
    assert all(name.endswith(f"-{own_id}") for name in names)


def test_wandb_without_a_key_ends_no_run(tmp_path: Path, tiny_flags: list[str], launch) -> None:
    pytest.importorskip("wandb", reason="an optional package")
    env = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_MODE": "online"}
    flags = [*tiny_flags, "--output-dir", tmp_path / "run", "--log-with", "wandb"]
    answer = launch(flags, env=env)
    assert answer.codes == [0]
    assert "warning: --log-with wandb: " in answer.text
    assert "the run goes on without it" in answer.text
