import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT, read_log, stop_at
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import dino_train
from config import Config
from data import MultiCrop, StepSampler, build_dataset, hash_keys
from dino_train import (
    build_optimizer,
    cosine_schedule,
    schedules,
    train,
)
from eval_knn import knn_accuracy
from harness.defaults import fill_in
from harness.flags import check_values, default_precision, finish, parse_config
from harness.outlook import DryRun
from harness.run import Run
from harness.saved_run import TrainingState
from losses import DinoLoss
from models import DinoModel, load_checkpoint


@pytest.fixture
def tiny(tiny_flags: list[str]) -> Callable[..., Config]:
    """The Config of a tiny run into a folder, with more flags."""
    return lambda folder, *flags: parse_config(
        [*tiny_flags, "--output-dir", str(folder), *map(str, flags)]
    )


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder) if "loss" in line}


def write_images(folder: Path, num: int, size: int = 32) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")


# ---------------------------------------------------------------- parity with the original


@pytest.mark.parametrize(
    "name", ["lr", "weight_decay", "momentum", "no_warmup_short", "warmup_one_step"]
)
def test_cosine_schedule_equals_the_original_at_every_step(name: str, parity: dict) -> None:
    start, end, epochs, niter, warmup = parity[f"schedule.{name}.args"].tolist()
    expected = parity[f"schedule.{name}.values"].tolist()
    total, warmup_steps = int(epochs * niter), int(warmup * niter)
    values = [cosine_schedule(step, total, start, end, warmup_steps) for step in range(total)]
    assert values == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_teacher_temperature_equals_the_original_by_epoch(parity: dict) -> None:
    config = Config()
    teacher = replace(config.teacher, teacher_temp=0.07, warmup_teacher_temp_epochs=3)
    config = replace(config, teacher=teacher, optim=replace(config.optim, epochs=6))
    config, _ = fill_in(config, num_images=320, images_per_step=64)
    temps = [schedules(config, 5 * epoch + 4, 5, 64).teacher_temp for epoch in range(6)]
    assert temps == pytest.approx(parity["loss.teacher_temps"].tolist())


def test_learning_rate_is_scaled_by_the_whole_batch() -> None:
    config, _ = fill_in(Config(), num_images=7 * 1024, images_per_step=1024)
    warm = schedules(config, 10 * 7 - 1, 7, 1024)
    assert warm.lr == pytest.approx(5e-4 * 4)
    assert schedules(config, 0, 7, 1024).lr == 0
    assert warm.weight_decay > config.optim.weight_decay
    assert warm.teacher_momentum > config.teacher.teacher_momentum
    assert schedules(config, 699, 7, 1024).teacher_momentum == pytest.approx(1, abs=1e-7)


# ---------------------------------------------------------------- the loop


def test_steps_equal_algorithm_1_written_out(
    tmp_path: Path, tiny: Callable[..., Config], image_folder: Path
) -> None:
    """The whole run against a plain one: pairs of views, unfused AdamW, EMA by hand."""
    flags = (
        "--freeze-last-layer-epochs",
        0,
        "--knn-every",
        0,
        "--clip-grad",
        0.01,
        "--log-every",
        1,
    )
    config = tiny(tmp_path / "run", *flags, "--batch-size", 40, "--save-every", 1)
    train(config)
    config, _ = fill_in(config, num_images=80, images_per_step=40)
    student, teacher = (
        DinoModel.from_config(replace(config.model, image_size=16)).train() for _ in range(2)
    )
    torch.manual_seed(config.run.seed)
    student = DinoModel.from_config(student.config).train()
    teacher.load_state_dict(student.state_dict())
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1]},
        {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    dataset = build_dataset(str(image_folder))
    multi_crop = MultiCrop(replace(config.crops, global_crop_size=16, local_crop_size=8))
    center, seen = torch.zeros(1, 16), []
    for step, batch in enumerate(StepSampler(80, 40, config.run.seed, 0, 1, range(4))):
        now = schedules(config, step, 2, 40)
        optimizer.param_groups[0]["weight_decay"] = now.weight_decay
        for group in optimizer.param_groups:
            group["lr"] = now.lr
        images = torch.stack([dataset[key].image for key in batch])
        keys = [hash_keys(config.run.seed, epoch, index) for epoch, index in batch]
        crops = multi_crop(images, None, torch.stack(keys))
        with torch.no_grad():
            targets = teacher(crops[:2])
        logits = student(crops)
        terms = [
            -(
                ((targets[t] - center) / now.teacher_temp).softmax(-1)
                * (logits[v] / 0.1).log_softmax(-1)
            ).sum(-1)
            for t in range(2)
            for v in range(3)
            if t != v
        ]
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        for param in student.parameters():
            param.grad *= min(1.0, 0.01 / (param.grad.norm().item() + 1e-6))
        optimizer.step()
        center = 0.9 * center + 0.1 * targets.mean(dim=(0, 1))
        with torch.no_grad():
            for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.copy_(now.teacher_momentum * mine + (1 - now.teacher_momentum) * other)
        seen.append(loss.item())
    assert list(losses(tmp_path / "run").values()) == pytest.approx(seen, rel=1e-4)
    state = load_file(tmp_path / "run" / "state.safetensors")
    torch.testing.assert_close(state["loss.center"], center, rtol=1e-3, atol=1e-5)
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(state[f"teacher.{name}"], tensor, rtol=1e-3, atol=1e-4)


def test_run_leaves_its_files_and_log_lines(tiny_run: Path) -> None:
    names = sorted(path.name for path in tiny_run.iterdir())
    assert names[:2] == ["ckpt.safetensors", "config.yaml"]
    assert names[2:] == ["curves.png", "log.jsonl", "state.safetensors"]
    log = read_log(tiny_run)
    shares = {f"variance_share_{k}" for k in (1, 10)}  # of 72 images, fewer than 100
    assert log[0].keys() == {"step", "epoch", "knn_top1", "rankme"} | shares
    assert log[0]["step"] == 0
    steps = [line for line in log if "loss" in line]
    assert {"step", "epoch", "loss", "lr", "images_per_second"} <= steps[0].keys()
    assert {"teacher_entropy", "kl", "feature_spread"} <= steps[0].keys()
    assert 0 <= steps[0]["data_wait"] < 1
    assert 0.1 < steps[0]["peak_memory_gib"] < 64
    assert steps[0]["kl"] + steps[0]["teacher_entropy"] == pytest.approx(steps[0]["loss"], rel=1e-5)
    assert [line["step"] for line in steps] == [10, 20]
    assert log[-1]["step"] == 20
    assert 0 <= log[-1]["knn_top1"] <= 100
    assert 1 <= log[-1]["rankme"] <= 96


def test_checkpoint_is_the_teacher_with_its_recipe(tiny_run: Path) -> None:
    model, metadata = load_checkpoint(tiny_run / "ckpt.safetensors")
    state = load_file(tiny_run / "state.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"teacher.{name}"])
    assert any(
        not torch.equal(tensor, state[f"student.{name}"])
        for name, tensor in model.state_dict().items()
    )
    assert metadata["step"] == 20
    assert Path(metadata["config"]["data"]["data"]).is_dir()
    assert metadata["metrics"]["knn_top1"] == read_log(tiny_run)[-1]["knn_top1"]
    assert metadata["metrics"]["rankme"] == read_log(tiny_run)[-1]["rankme"]


@pytest.mark.slow
def test_same_seed_same_losses_bit_for_bit(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tiny(tmp_path / name, "--seed", seed, "--log-every", 5, "--knn-every", 0))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.slow
def test_config_file_of_a_run_reproduces_it(tmp_path: Path, tiny_run: Path) -> None:
    args = ["--config", str(tiny_run / "config.yaml"), "--output-dir", str(tmp_path / "again")]
    train(parse_config(args))
    assert losses(tmp_path / "again") == losses(tiny_run)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("sgd", marks=SLOW), pytest.param("lars", marks=SLOW)]
)
def test_resumed_run_equals_uninterrupted_run(
    optimizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tiny: Callable[..., Config],
) -> None:
    flags = (
        "--optimizer",
        optimizer,
        "--log-every",
        7,
        "--knn-every",
        0,
        "--freeze-last-layer-epochs",
        0,
    )
    train(tiny(tmp_path / "whole", *flags))
    with monkeypatch.context() as patch:
        stop_at(patch, 9, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            train(tiny(tmp_path / "cut", *flags))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"python dino_train.py --resume {tmp_path / 'cut'}" in capsys.readouterr().out
    train(parse_config(["--resume", str(tmp_path / "cut")]))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any("momentum_buffer" in name or "exp_avg_sq" in name for name in whole)


@pytest.mark.slow
def test_signal_to_the_whole_group_saves_and_can_go_on(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    """As Slurm and `timeout` send it: to the workers too, and more than once."""
    flags = [*tiny_flags, "--num-workers", "2", "--log-every", "1", "--epochs", "6"]
    folder = tmp_path / "run"
    script = [sys.executable, str(ROOT / "dino_train.py"), *flags, "--output-dir", str(folder)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(script, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    while not (folder / "log.jsonl").exists() or not losses(folder):
        time.sleep(0.05)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert f"--resume {folder}" in out
    assert "Traceback" not in err
    saved = load_checkpoint(folder / "ckpt.safetensors")[1]["step"]
    assert saved >= 1
    assert train(parse_config(["--resume", str(folder), "--epochs", "6"]))["step"] == 60


@pytest.mark.slow
def test_drop_path_repeats_on_resume_and_vit_trains_on_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_images(tmp_path / "images", 8)
    common = [
        "--data",
        tmp_path / "images",
        "--arch",
        "test_vit",
        "--drop-path-rate",
        0.5,
        "--batch-size",
        2,
        "--epochs",
        1,
        "--log-every",
        1,
        "--num-local-crops",
        1,
        "--projection-output-dim",
        32,
        "--num-workers",
        1,
    ]

    def config(name: str) -> Config:
        return parse_config([*map(str, common), "--output-dir", str(tmp_path / name)])

    result = train(config("whole"))
    said = capsys.readouterr().out
    assert "no k-NN during training: no class folders" in said and "RankMe alone" in said
    assert "knn_top1" not in result and 1 <= result["rankme"] <= 8
    measured = [line for line in read_log(tmp_path / "whole") if "rankme" in line]
    assert [line["step"] for line in measured] == [0, 4]
    assert measured[0].keys() == {"step", "epoch", "rankme", "variance_share_1"}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 2, signal.SIGINT)
        train(config("cut"))
    train(parse_config(["--resume", str(tmp_path / "cut")]))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4
    assert [line for line in read_log(tmp_path / "cut") if "rankme" in line] == measured


@pytest.mark.slow
def test_last_layer_waits_in_the_first_epochs(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    key = "student.projection_head.last_layer.weight"
    flags = ("--knn-every", 0, "--batch-size", 40, "--epochs", 1)
    for name, epochs in (("frozen", 1), ("free", 0)):
        train(tiny(tmp_path / name, *flags, "--freeze-last-layer-epochs", epochs))
    torch.manual_seed(0)
    initial = DinoModel.from_config(
        replace(tiny(tmp_path / "none").model, image_size=16)
    ).projection_head.last_layer.weight
    frozen, free = (
        load_file(tmp_path / name / "state.safetensors")[key] for name in ("frozen", "free")
    )
    assert torch.equal(frozen, initial)
    assert not torch.equal(free, initial)


@pytest.mark.slow
def test_backbone_waits_bit_for_bit_while_the_head_trains(
    tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    """In both networks; and it is free from the epoch after."""
    flags = ("--knn-every", 0, "--save-every", 10, "--keep-last", 9, "--freeze-backbone-epochs", 1)
    train(tiny(tmp_path / "run", *flags, "--freeze-last-layer-epochs", 0))
    torch.manual_seed(0)
    initial = DinoModel.from_config(replace(tiny(tmp_path / "none").model, image_size=16))
    frozen, freed = (
        load_file(tmp_path / "run" / f"state-{step:08}.safetensors") for step in (10, 20)
    )
    for role in ("student", "teacher"):
        for name, param in initial.named_parameters():
            is_backbone = name.startswith("backbone.")
            is_gain = name.endswith("last_layer.gain")  # fixed at 1
            is_as_before = torch.equal(frozen[f"{role}.{name}"], param)
            assert is_as_before == (is_backbone or is_gain), name
        weight = f"{role}.backbone.conv1.0.weight"
        assert not torch.equal(freed[weight], frozen[weight])


@pytest.mark.slow
def test_bf16_trains_with_a_float32_loss(tmp_path: Path, tiny_flags: list[str], launch) -> None:
    # 48 px, since bfloat16 convolutions of 1 x 1 pixel have broken gradients on some CPUs
    flags = ["--mixed-precision", "bf16", "--knn-every", "0", "--batch-size", "40"]
    flags += ["--global-crop-size", "48", "--local-crop-size", "48"]
    answer = launch([*tiny_flags, *flags, "--output-dir", tmp_path / "bf16"])
    assert answer.codes == [0], answer.text
    assert "1 x cpu, bf16" in answer.text
    logged = torch.tensor(list(losses(tmp_path / "bf16").values()))
    assert logged.isfinite().all()
    assert not torch.equal(logged, logged.bfloat16().float())
    state = load_file(tmp_path / "bf16" / "state.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float32, torch.int64}


@pytest.mark.slow
def test_output_is_plain_and_has_no_progress_bar_where_it_is_no_terminal(
    tmp_path: Path, script, tiny_flags: list[str]
) -> None:
    result = script("dino_train", *tiny_flags, "--output-dir", tmp_path / "run")
    assert "\x1b" not in result.stdout
    assert "ETA" not in result.stdout
    for said in ("test_resnet", "1 x cpu", "2 epochs of 10 steps", "eval_knn.py", "curves.png"):
        assert said in result.stdout
    for said in ("step 10 of 20, epoch 1: loss ", "step 20 of 20, epoch 2: loss "):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(said)]
        assert "k-NN " in line and line.endswith(" s to go")


# ---------------------------------------------------------------- configuration


def test_quick_start_applies_without_data_and_config_only(tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    quick = parse_config([])
    assert quick.model.arch == recipe["model"]["arch"]
    assert quick.optim.epochs == recipe["optim"]["epochs"]
    other = parse_config(["--arch", "resnet50"])
    assert other.model.arch == "resnet50"
    assert other.optim == quick.optim
    (tmp_path / "c.yaml").write_text("optim: {epochs: 3}\n")
    plain = Config()
    for args in (["--data", "patterns"], ["--data=patterns"]):
        config = parse_config(args)
        assert (config.model, config.optim, config.crops) == (plain.model, plain.optim, plain.crops)
    of_file = parse_config(["--config", str(tmp_path / "c.yaml"), "--data", "patterns"])
    assert of_file.model == replace(plain.model, projection_output_dim=4096)


def test_yaml_gives_the_config_and_flags_override_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model:\n  projection_hidden_dim: 1024\n  projection_bottleneck_dim: 256\n"
        "  projection_output_dim: 4096\n  use_weight_norm: true\n  norm_last_layer: false\n"
        "optim:\n  lr: 1e-3\ncrops:\n  global_crop_scale: [0.25, 1]\n  local_crop_size: null\n"
    )
    flags = ["--data", "patterns", "--projection-output-dim", "2048"]
    config = parse_config(["--config", str(path), *flags])
    assert config.model.projection_hidden_dim == 1024
    assert config.model.projection_bottleneck_dim == 256
    assert config.model.projection_output_dim == 2048
    assert config.model.use_weight_norm is True
    assert config.model.norm_last_layer is False
    assert config.optim.lr == 1e-3
    assert config.crops.global_crop_scale == (0.25, 1.0)
    assert config.crops.local_crop_size is None
    config = replace(config, model=replace(config.model, arch="resnet10_half", image_size=32))
    model = DinoModel.from_config(config.model)
    assert model.projection_head.last_layer.weight.shape == (2048, 256)


def test_field_names_are_unique_since_flags_are_flat() -> None:
    names = [f.name for section in fields(Config) for f in fields(section.default_factory)]
    assert len(names) == len(set(names))


def test_help_explains_every_flag(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    assert stopped.value.code == 0
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    # a flag, its kind of value, its explanation and its default
    shown = dict(re.findall(r" --([a-z0-9-]+)(?:,| [A-Z{]) ?(.*?)\(default: ", text))
    for section in fields(Config):
        for f in fields(section.default_factory):
            explanation = shown[f.name.replace("_", "-")]
            assert len(re.findall(r"[a-z]{2,}", explanation)) > 2, f.name
    assert text.count("[paper:") > 25


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arch", "resnet51"], "unknown arch 'resnet51'; close matches: resnet"),
        (["--data", "no/such/folder"], "no such data 'no/such/folder'"),
        (["--data", "EMPTY"], "no images in"),
        (["--arch", "dino_vits16", "--global-crop-size", "50"], "divides, such as 64, got 50"),
        (
            ["--batch-size", "81"],
            "80 images, fewer than a batch of 81: need a smaller --batch",
        ),
        (["--batch-size", "0"], "need --batch-size > 0, got 0"),
        (["--epochs", "-1"], "need --epochs > 0, got -1"),
        (["--local-crop-size", "-96"], "need --local-crop-size > 0, got -96"),
        (["--num-local-crops", "-1"], "need --num-local-crops >= 0, got -1"),
        (["--lr", "nan"], "need --lr > 0, got nan"),
        (["--teacher-momentum", "1.5"], "need --teacher-momentum >= 0 and < 1, got 1.5"),
        (["--brightness", "3"], "need --brightness >= 0 and <= 1, got 3"),
        (["--seed", str(1 << 64)], "need --seed >= 0 and <= "),
        (
            ["--arch", "convit_tiny", "--global-crop-size", "32", "--local-crop-size", "16"],
            "doesn't match model (32); need --num-local-crops 0, or --local-crop-size 32",
        ),
        (
            ["--arch", "maxvit_tiny_tf_224", "--global-crop-size", "80"],
            "need another --global-crop-size, such as its own 224",
        ),
        (
            ["--batch-size", "1", "--local-crop-size", "8"],
            "does not take crops of 8 px, 1 in a batch",
        ),
        (
            ["--arch", "xcit_nano_12_p16_224", "--patch-size", "15"],
            "xcit_nano_12_p16_224 does not take --patch-size 15: ",
        ),
        (
            ["--arch", "xcit_nano_12_p16_224", "--patch-size", "14"],
            "xcit_nano_12_p16_224 does not take --patch-size 14: ",
        ),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16 needs a GPU"),
        (["--output-dir", "u.yaml"], "need a folder for --output-dir, got the file u.yaml"),
        (["--projection-output-dim", "0"], "need --projection-output-dim > 1, got 0"),
        (["--global-crop-scale", "0.9", "0.2"], "need crop scales 0 < low <= high <= 1"),
        (["--eval-resize", "9"], "need --eval-resize >= the crop of 16 px, got 9"),
        (
            ["--eval-size", "24", "--eval-resize", "20"],
            "need --eval-resize >= the crop of 24 px, got 20",
        ),
        (
            ["--arch", "test_vit", "--patch-size", "8", "--eval-size", "20"],
            "test_vit does not take crops of 20 px, 16 in a batch: ",
        ),
        (["--log-with", "wandb"], "--log-with wandb needs that package"),
        (["--config", "none.yaml"], "no such recipe: none.yaml"),
        (["--config", "UNKNOWN"], "unknown key 'archh'; close matches: arch"),
        (["--config", "SECTION"], "unknown key 'modle'; close matches: model"),
        (["--config", "LIST"], "need sections model, data, crops"),
        (["--resume", "no/such/run"], "no run to resume"),
        (["--epochs", "many"], "--epochs"),
        (["--koleo-weight", "0.1", "--batch-size", "1"], "need --batch-size of at least 2"),
        (["--nonsense", "1"], "--nonsense"),
    ],
)
def test_wrong_input_is_one_line_with_code_2_and_writes_nothing(
    flags: list[str],
    said: str,
    tmp_path: Path,
    script,
    monkeypatch: pytest.MonkeyPatch,
    tiny_flags: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("u.yaml").write_text("model: {archh: resnet50}\n")
    Path("s.yaml").write_text("modle: {arch: resnet50}\n")
    Path("l.yaml").write_text("- 1\n- 2\n")
    names = {"EMPTY": "empty", "UNKNOWN": "u.yaml", "SECTION": "s.yaml", "LIST": "l.yaml"}
    flags = [names.get(flag, flag) for flag in flags]
    if "wandb" in flags:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before = sorted(tmp_path.rglob("*"))
    result = script("dino_train", *tiny_flags, "--output-dir", "out", *flags)
    assert result.returncode == 2
    assert said in result.stderr
    if result.stderr.startswith("error: "):
        assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_folder_that_holds_a_run_is_refused_unless_told(
    tmp_path: Path, tiny_run: Path, script, tiny: Callable[..., Config], tiny_flags: list[str]
) -> None:
    before = {path: path.read_bytes() for path in tiny_run.iterdir()}
    result = script("dino_train", *tiny_flags, "--output-dir", tiny_run)
    assert result.returncode == 2
    assert (
        "already holds a run (config.yaml): need --resume, --overwrite or another" in result.stderr
    )
    assert {path: path.read_bytes() for path in tiny_run.iterdir()} == before
    folder = tmp_path / "run"
    train(tiny(folder, "--knn-every", 0))
    (folder / "notes.txt").write_text("mine")
    first = losses(folder)
    train(tiny(folder, "--knn-every", 0, "--overwrite", "--seed", 9))
    assert losses(folder) != first
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_files_of_others_in_the_folder_stay(
    tmp_path: Path, tiny: Callable[..., Config], tiny_flags: list[str]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    names = ("vit-base.safetensors", "ckpt-mine.safetensors", ".tmpnotes", "state-1.safetensors")
    for name in names:
        (folder / name).write_text("mine")
    train(tiny(folder, "--knn-every", 0, "--epochs", 1))
    train(tiny(folder, "--knn-every", 0, "--epochs", 1, "--overwrite"))
    assert all((folder / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize(
    ("env", "bf16", "expected"),
    [
        ({}, True, "bf16"),
        ({}, False, "fp16"),
        # accelerate launch on one GPU sets both
        ({"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no"}, True, "bf16"),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}, True, "no"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, True, "fp16"),
        ({"ACCELERATE_USE_FSDP": "true"}, False, "no"),
    ],
)
def test_precision_follows_launcher_and_gpu(
    env: dict, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert default_precision() == expected


def test_resume_that_contradicts_itself_is_refused(tiny_run: Path, script) -> None:
    result = script("dino_train", "--resume", tiny_run, "--output-dir", "elsewhere")
    assert result.returncode == 2
    assert f"got --resume {tiny_run} and --output-dir elsewhere" in result.stderr
    result = script("dino_train", "--resume", tiny_run, "--overwrite")
    assert result.returncode == 2
    assert "--resume goes on with a run and --overwrite deletes it" in result.stderr


@pytest.mark.slow
def test_resume_with_another_model_or_data_is_refused(
    tmp_path: Path, script, tiny_run: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for flags, said in (
        (["--projection-output-dim", "32"], "--projection-output-dim 32: it has 16"),
        (["--weight-decay", "0.5"], "--weight-decay 0.5: it has 0.04"),
        (["--seed", "7"], "--seed 7: it has 0"),
        (["--arch", "resnet18"], "--arch resnet18: it has test_resnet"),
    ):
        result = script("dino_train", "--resume", folder, *flags)
        assert result.returncode == 2
        assert said in result.stderr
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_more_epochs_go_on_from_a_finished_run(tmp_path: Path, tiny_run: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    result = train(parse_config(["--resume", "--output-dir", str(folder), "--epochs", "3"]))
    assert result["step"] == 30
    assert max(losses(folder)) == 30


def test_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_checkpoint(
    tmp_path: Path, script, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedules = dino_train.schedules
    monkeypatch.setattr(dino_train, "schedules", lambda *args: schedules(*args)._replace(lr=3e34))
    folder = tmp_path / "run"
    flags = ("--clip-grad", "0", "--save-every", "1", "--knn-every", "0")
    flags += ("--freeze-last-layer-epochs", "0")
    result = script("dino_train", *tiny_flags, *flags, "--output-dir", folder)
    assert result.returncode == 1
    match = re.search(
        r"error: the loss is (nan|inf) at step (\d+); .*ckpt.safetensors is kept", result.stderr
    )
    assert match, result.stderr
    _, metadata = load_checkpoint(folder / "ckpt.safetensors")
    assert metadata["step"] == int(match[2]) - 1


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, tiny) -> None:
    config = tiny(tmp_path / "run", "--knn-every", 0)
    train(config)
    dataset = build_dataset(config.data.data)
    config = replace(config, run=replace(config.run, resume=True))
    config = finish(config, dataset, dataset.survey())
    run = Run(config, Accelerator(cpu=True), dataset)
    model = DinoModel.from_config(replace(config.model, image_size=16))
    system = dino_train.DinoSystem(model, DinoModel.from_config(model.config))
    optimizer = build_optimizer(model, "sgd")
    state = TrainingState(system, DinoLoss(16), optimizer, scaler=None)
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    with torch.no_grad():
        model.projection_head.mlp[0].bias[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"mlp\.0\.bias is not finite .*kept"):
        run.save(state, 21, {})
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before


@pytest.mark.slow
def test_unfinished_files_of_others_stay_and_hinder_no_resuming(tmp_path: Path, tiny) -> None:
    """A run that goes on clears away what its own kill left, and nothing of embed or visualize."""
    folder = tmp_path / "run"
    train(tiny(folder, "--knn-every", 0))
    own = [".tmp-config.yaml", ".tmp-state.safetensors", ".tmp-ckpt-epoch-2.safetensors"]
    own.append(".tmpAb12xY")  # as safetensors calls it
    others = [".tmp-features.safetensors", ".tmp-attention.png"]
    for name in own + others:
        (folder / name).touch()
    (folder / ".tmp-Xy12").mkdir()  # of a picture's frames
    train(parse_config(["--resume", str(folder), "--epochs", "3"]))
    left = {path.name for path in folder.iterdir() if path.name.startswith(".tmp")}
    assert left == {*others, ".tmp-Xy12"}


@pytest.mark.slow
def test_train_folder_with_classes_and_flat_val_trains_without_knn(
    tmp_path: Path, tiny_flags: list[str], script
) -> None:
    write_images(tmp_path / "set" / "train" / "a", 8)
    write_images(tmp_path / "set" / "train" / "b", 8)
    write_images(tmp_path / "set" / "val", 4)
    flags = ("--data", tmp_path / "set", "--output-dir", tmp_path / "[odd] name")
    result = script("dino_train", *tiny_flags, *flags)
    assert result.returncode == 0, result.stderr
    assert "no k-NN during training: no class folders in the test images of" in result.stdout
    # eval_knn.py would be refused, for the same reason
    assert f"visualize.py '{tmp_path}/[odd] name/ckpt.safetensors'" in result.stdout
    assert "eval_knn" not in result.stdout


@pytest.mark.slow
def test_warm_up_longer_than_the_run_is_said(tmp_path: Path, tiny_flags: list[str], script) -> None:
    flags = ("--warmup-epochs", 5, "--knn-every", 0, "--output-dir", tmp_path / "run")
    result = script("dino_train", *tiny_flags, *flags)
    assert "warning: --warmup-epochs 5 is longer than the run of 2 epochs" in result.stdout


@pytest.mark.slow
def test_quick_start_learns_within_minutes_and_beats_raw_pixels(
    tmp_path: Path, all_cores: None
) -> None:
    """Two thirds of it, with the schedules of a run that is as short."""
    flags = ["--epochs", "2", "--knn-every", "2", "--output-dir", str(tmp_path / "run")]
    result = train(parse_config(flags))
    assert result["knn_top1"] - result["knn_top1_untrained"] >= 20
    memory, test = (build_dataset("patterns", split) for split in ("memory", "test"))
    for mean in (0, memory.images.float().mean(dim=0)):
        pixels = [(split.images.float() - mean).flatten(1) for split in (memory, test)]
        labels = [torch.from_numpy(split.labels) for split in (memory, test)]
        accuracies = knn_accuracy(pixels[0], labels[0], pixels[1], labels[1], ks=(1, 20))
        assert result["knn_top1"] > max(top1 for top1, _ in accuracies.values())


def test_numbers_in_range_pass() -> None:
    check_values(Config())
    check_values(parse_config([]))


def test_system_trains_the_student_alone() -> None:
    config = replace(parse_config([]).model, image_size=16)
    system = dino_train.DinoSystem(DinoModel.from_config(config), DinoModel.from_config(config))
    crops = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    student_features, student_logits, features, teacher_logits = system.train()(crops)
    assert student_logits.shape[:2] == student_features.shape[:2] == (3, 4)
    assert teacher_logits.shape[:2] == features.shape[:2] == (2, 4)
    student_logits.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in system.teacher.parameters())
    assert all(p.grad is not None for p in system.student.parameters())
    # the teacher normalises by its batch, and keeps statistics of its own
    assert system.teacher.backbone.bn1.training
    assert system.teacher.backbone.bn1.num_batches_tracked == 1
    assert F.normalize(features, dim=-1).isfinite().all()


@pytest.mark.slow
def test_koleo_spreads_features_and_is_no_part_of_the_divergence(tmp_path: Path, tiny) -> None:
    logs = []
    for weight in (0.0, 2.0):
        folder = tmp_path / str(weight)
        train(tiny(folder, "--koleo-weight", weight, "--knn-every", 0, "--log-every", 1))
        logs.append(read_log(folder))
    plain, spread = logs
    # the first step's networks are the same; the loss alone has KoLeo in it
    for name in ("kl", "teacher_entropy", "feature_spread"):
        assert plain[0][name] == spread[0][name]
    assert plain[0]["loss"] != spread[0]["loss"]
    assert spread[-1]["feature_spread"] > plain[-1]["feature_spread"]
    for line in plain:
        assert line["kl"] == pytest.approx(line["loss"] - line["teacher_entropy"], abs=1e-6)


@pytest.mark.slow
def test_run_starts_from_given_weights(tmp_path: Path, tiny_run: Path, tiny_flags, script) -> None:
    """Its untrained k-NN is what the other run ended with; resumed, it does not read them again."""
    weights, folder = tmp_path / "ckpt.safetensors", tmp_path / "run"
    weights.write_bytes((tiny_run / "ckpt.safetensors").read_bytes())
    flags = [*tiny_flags, "--epochs", "1", "--init-from", weights, "--output-dir", folder]
    result = script("dino_train", *flags)
    assert result.returncode == 0, result.stderr
    assert "backbone: from" in result.stdout and "projection head: from" in result.stdout
    assert read_log(folder)[0]["knn_top1"] == read_log(tiny_run)[-1]["knn_top1"]
    weights.unlink()
    result = script("dino_train", "--resume", folder, "--epochs", 2)
    assert result.returncode == 0, result.stderr
    assert read_log(folder)[-1]["step"] == 20


@pytest.mark.slow
def test_run_from_published_weights_goes_on_where_they_are_out_of_reach(
    tmp_path: Path, tiny_flags: list[str], script, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_model = timm.create_model
    is_online = True

    def create(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained and not is_online:
            raise OSError("no network")
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the network is not looked for
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--pretrained", "--epochs", 1, "--output-dir", folder]
    assert script("dino_train", *flags).returncode == 0
    is_online = False
    result = script("dino_train", "--resume", folder, "--epochs", 2)
    assert result.returncode == 0, result.stderr
    result = script("dino_train", *flags[:-1], tmp_path / "other")
    assert result.returncode == 2 and "cannot load the published weights" in result.stderr


@pytest.mark.slow
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, tiny_run: Path, tiny_flags, script
) -> None:
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--output-dir", folder, "--init-from"]
    for source, said in (("none.safetensors", "no such checkpoint"), ("resnet19", "unknown arch")):
        result = script("dino_train", *flags, source)
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1
    checkpoint = tiny_run / "ckpt.safetensors"
    result = script("dino_train", *flags, checkpoint, "--arch", "resnet18")
    said = f"{checkpoint} holds another network than --arch resnet18: "
    assert result.returncode == 2 and said in result.stderr and len(result.stderr) < 300
    result = script("dino_train", *flags, checkpoint, "--projection-output-dim", 32)
    assert result.returncode == 2 and "(16, 8) for (32, 8)" in result.stderr
    result = script("dino_train", *flags, checkpoint, "--pretrained")
    assert result.returncode == 2 and "need one" in result.stderr
    assert not folder.exists()


@pytest.mark.slow
def test_bands_are_trained_on_kept_and_evaluated(script, tmp_path: Path) -> None:
    """The class is in the fourth band alone, whose numbers are on a scale of their own."""
    for i in range(40):
        values = np.random.default_rng(i).random((16, 16, 5)) * [1, 10, 100, 3000, 1e4]
        if i % 2:
            values[:8, :, 3] += 3000
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "data" / "ab"[i % 2] / f"{i:02}.npy", values.astype(np.float32))
    run = tmp_path / "run"
    flags = "--channels 5 --arch resnet10_half --epochs 1 --batch-size 8 --num-local-crops 1"
    flags += " --projection-output-dim 16 --projection-hidden-dim 16 --num-workers 0"
    flags += " --vertical-flip 0.5 --quarter-turns"
    arguments = ["--data", tmp_path / "data", *flags.split(), "--output-dir", run]
    result = script("dino_train", *arguments)
    assert result.returncode == 0, result.stderr
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert len(settings["crops"]["mean"]) == 5 and len(settings["data"]["levels"]) == 10
    kept = [f"{value:.3g}" for value in settings["crops"]["mean"]]
    assert " ".join(kept) in " ".join(result.stdout.split())
    result = script("eval_knn", run)
    assert result.returncode == 0, result.stderr
    logged = [line["knn_top1"] for line in read_log(run) if "knn_top1" in line][-1]
    assert f"{logged:.2f}" in result.stdout
    pictures = tmp_path / "pictures"
    result = script("visualize", run, tmp_path / "data", "--output-dir", pictures)
    assert result.returncode == 0, result.stderr
    assert "channels 1, 2, 3 as red, green, blue of 5" in result.stdout
    assert (pictures / "crops.png").exists() and (pictures / "neighbours.png").exists()


@pytest.mark.slow
def test_minutes_are_as_many_epochs_as_fit_by_the_measured_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_flags: list[str], capfd
) -> None:
    """80 images in batches of 8 are 10 steps an epoch.

    0.5 minutes are a first one of 2 s a step and two more of 0.5 s, since they wait for no data.
    """
    monkeypatch.setattr(DryRun, "seconds_a_step", lambda run, step: (2.0, 1.5))
    flags = [*tiny_flags, "--knn-every", "0"]
    train(parse_config([*flags, "--output-dir", str(tmp_path / "three"), "--epochs", "3"]))
    train(parse_config([*flags, "--output-dir", str(tmp_path / "run")]))
    flags += ["--output-dir", str(tmp_path / "run"), "--minutes", "0.5"]
    with pytest.raises(ValueError, match="already holds a run"):
        train(parse_config(flags))
    train(parse_config([*flags, "--overwrite"]))
    said = "--minutes 0.5: 3 epochs of 10 steps, at 2 s a step, then 0.5 s from memory"
    assert said in capfd.readouterr().out
    expected, found = (load_file(tmp_path / x / "state.safetensors") for x in ("three", "run"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["optim"]["epochs"] == 3 and "minutes" not in settings["optim"]
    with pytest.raises(ValueError, match="--minutes chooses the epochs of a new run"):
        train(parse_config(["--resume", str(tmp_path / "run"), "--minutes", "1"]))
    flags = [*tiny_flags, "--output-dir", str(tmp_path / "one"), "--minutes", "0.001"]
    train(parse_config(flags))
    assert "--minutes 0.001: 1 epoch of 10 steps" in capfd.readouterr().out
