"""Settings that mean nothing, and YAML that is more than plain values: one line each."""

import dataclasses
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dino_train
from config import Config
from data import build_dataset
from embed import EmbedConfig
from eval_copies import CopiesConfig
from eval_knn import KnnConfig
from eval_linear import LinearConfig
from eval_retrieval import RetrievalConfig
from eval_segmentation import SegmentationConfig
from eval_video import VideoConfig
from harness.evaluation import EvalConfig, MapsConfig
from harness.few_labels import ShotsConfig
from harness.flags import (
    QUICKSTART,
    check_values,
    finish,
    fit_batch,
    memory_of_process,
    parse_config,
)
from models import ModelConfig
from visualize import VisualizeConfig


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--projection-output-dim", "1"], "need --projection-output-dim > 1, got 1"),
        (["--teacher-momentum", "1"], "need --teacher-momentum >= 0 and < 1, got 1.0"),
        (["--center-momentum", "1"], "need --center-momentum >= 0 and < 1, got 1.0"),
        (["--canvas-size", "1"], "need --canvas-size > 7, got 1"),
        (["--canvas-size", "100000"], "and <= 4096, got 100000"),
        (["--teacher-temp", "100"], "need --teacher-temp > 0 and <= 10, got 100.0"),
        (["--student-temp", "100"], "need --student-temp > 0 and <= 10, got 100.0"),
        (["--epochs", str(10**20)], "need --epochs > 0 and <= 1000000"),
        (["--num-workers", "1000"], "and <= 512, got 1000"),
        (["--output-dir", ""], "need a name for --output-dir"),
        (["--init-from", ""], "need a name for --init-from, got ''"),
        (["--lr", "1e9"], "need --lr > 0 and <= 100, got 1000000000.0"),
        (["--lr", "inf"], "need --lr > 0 and <= 100, got inf"),
        (["--weight-decay", "1e6"], "need --weight-decay >= 0 and <= 10, got 1000000.0"),
        (["--global-crop-scale", "0.4", "1.5"], "need --global-crop-scale >= 0 and <= 1, got 1.5"),
        (["--blur-sigma", "1", "1e6"], "need --blur-sigma > 0 and <= 100, got 1000000.0"),
        (["--blur-probability", "1", "2", "0"], "need --blur-probability >= 0 and <= 1, got 2.0"),
        (["--mean", "120", "110", "100"], "need --mean >= 0 and <= 1, got 120.0"),
        (["--num-local-crops", "100000"], "need --num-local-crops >= 0 and <= 100, got 100000"),
        (["--stop-minutes", "1e30"], "need --stop-minutes >= 0 and <= 527040, got 1e+30"),
    ],
)
def test_number_that_means_nothing_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        check_values(parse_config(flags))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


# what has no upper end that means something, and a cosine, which embed.py checks
UNBOUNDED = {"levels", "projection_hidden_dim", "projection_bottleneck_dim"}
UNBOUNDED |= {"projection_output_dim", "near_duplicates"}


def test_every_number_has_an_upper_end() -> None:
    for kind in (
        KnnConfig,
        LinearConfig,
        EvalConfig,
        MapsConfig,
        ShotsConfig,
        RetrievalConfig,
        CopiesConfig,
        VideoConfig,
        SegmentationConfig,
        EmbedConfig,
        VisualizeConfig,
    ):
        require_upper_ends(kind)
    for section in dataclasses.fields(Config):
        require_upper_ends(section.default_factory)


def require_upper_ends(kind: type) -> None:
    hints = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        is_number = re.search(r"\b(int|float)\b", str(hints[each.name]))
        if is_number and each.name not in UNBOUNDED:
            assert {"most", "below"} & each.metadata.keys(), each.name


@pytest.mark.parametrize(
    ("script_name", "flags", "said"),
    [
        ("eval_knn", ["--ks", "10", "0"], "need --ks > 0, got 0"),
        ("eval_knn", ["--temperature", "nan"], "need --temperature > 0, got nan"),
        ("eval_knn", ["--batch-size", "0"], "need --batch-size > 0, got 0"),
        ("eval_linear", ["--lrs", "0.1", "inf"], "need --lrs > 0 and <= 1000, got inf"),
        ("eval_linear", ["--num-workers", "100000"], "need --num-workers >= 0 and <= 512"),
    ],
)
def test_evaluations_refuse_numbers_that_mean_nothing(
    script_name: str, flags: list[str], said: str, script
) -> None:
    result = script(script_name, "no/such/file", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1


def test_head_that_no_memory_holds_is_named_with_its_bytes() -> None:
    total, where = memory_of_process()
    with pytest.raises(ValueError) as raised:
        check_values(parse_config(["--projection-output-dim", str(10**10)]))
    weights = 256 * 256 + 256 * 128 + 128 * 10**10  # the quick start's head
    assert f"optimizer need {20 * weights:,} bytes, and {where} {total:,}" in str(raised.value)
    assert "a smaller --projection-output-dim" in str(raised.value)


@pytest.mark.parametrize(
    ("total", "flags", "said"),
    [
        # 8 images of a canvas of 16 px, with crops of 16, 16 and 8 px in float32
        (16_127, [], "a batch's canvases and crops need 61,440 bytes, and "),
        (61_440, [], "student, teacher, gradients and optimizer need "),
        (10**9, ["--arch", "resnet50"], None),
        (10**8, ["--arch", "resnet50"], "need a smaller --arch"),
    ],
)
def test_memory_is_compared_with_the_machines(
    total: int, flags: list[str], said: str | None, tiny_flags: list[str], monkeypatch
) -> None:
    config = parse_config([*tiny_flags, *flags])
    config = replace(config, run=replace(config.run, mixed_precision=None))
    dataset = build_dataset(config.data.data)
    measured: list[str] = []  # the networks that are built, which none is that is too large

    def gain(model: ModelConfig, crop_size: int, num_crops: int) -> float:
        measured.append(model.arch)
        return 1.0

    monkeypatch.setattr("harness.flags.default_precision", lambda: None)
    monkeypatch.setattr("harness.flags.gain_of_bf16", gain)
    monkeypatch.setattr("harness.flags.memory_of_process", lambda: (total, "the machine has"))
    if said is None:
        finish(config, dataset, dataset.survey())
        assert measured == ["resnet50"]
        return
    with pytest.raises(ValueError) as raised:
        finish(config, dataset, dataset.survey())
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert measured == []


@pytest.mark.parametrize(
    ("env", "has_gpu", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, False, "fp16 needs a GPU, got none"),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "true"},
            True,
            "FSDP trains in bf16 or float32, got --mixed-precision fp16",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, True, "need bf16, fp16 or no .* got fp8"),
    ],
)
def test_precision_that_cannot_be_is_named_before_the_images_are_read(
    env: dict, has_gpu: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("harness.flags.memory_of_process", lambda: (0, ""))
    with pytest.raises(ValueError, match=said):
        check_values(parse_config([]))


def test_name_of_a_data_set_stays_where_a_folder_is_called_the_same(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patterns").mkdir()
    monkeypatch.chdir(tmp_path)
    config = parse_config([*tiny_flags, "--data", "patterns"])
    dataset = build_dataset(config.data.data)
    assert finish(config, dataset, dataset.survey()).data.data == "patterns"


def test_recipe_is_found_beside_a_folder_of_its_name_and_a_run_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clothes_cpu").mkdir()
    flags = ["--config", "clothes_cpu", "--data", "photos"]
    assert parse_config(flags).optim.epochs == 60
    (tmp_path / "clothes_cpu" / "config.yaml").write_text("optim: {epochs: 7}\n")
    assert parse_config(flags).optim.epochs == 60
    assert parse_config([*flags, "--config", "./clothes_cpu/"]).optim.epochs == 60
    assert parse_config([*flags, "--config", str(tmp_path / "clothes_cpu")]).optim.epochs == 7


def test_koleo_needs_two_images_also_on_more_processes(tiny_flags: list[str]) -> None:
    config = parse_config([*tiny_flags, "--koleo-weight", "0.1"])
    assert fit_batch(config, 8, 4).optim.batch_size == 2
    with pytest.raises(ValueError, match="8 processes: --koleo-weight needs micro-batches of 2"):
        fit_batch(config, 8, 8)


def bomb() -> str:
    lines = ["optim:", "  a0: &a0 [x, x]"]
    lines += [f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", "the key 'lr' stands twice"),
        (bomb(), "got an alias in line 2"),
        ("optim:\n  lr: !!python/object:os.system x\n", "got the tag tag:yaml.org,2002:python"),
        ("optim:\n  lr: !!float x\n", "got the tag"),
        ("[" * 5000, "cannot read"),
        ("optim:\n  weight_decay: 0.o1\n", "need float for weight_decay, got '0.o1'"),
        ("optim:\n  epochs: 3.5\n", "need int for epochs, got 3.5"),
        ("crops:\n  blur_sigma: [0.5]\n", "need tuple[float, float] for blur_sigma, got [0.5"),
        ("model:\n  arch: --help\n", "need str for arch, got '--help'"),
    ],
    ids=["twice", "bomb", "object", "tag", "deep", "float", "int", "tuple", "flag"],
)
def test_yaml_of_other_than_settings_values_is_refused_in_one_line(
    text: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        parse_config(["--config", str(path)])
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_recipe_is_found_by_its_name_alone() -> None:
    recipe = QUICKSTART.parent / "cifar10_resnet18.yaml"
    assert parse_config(["--config", "cifar10_resnet18"]) == parse_config(["--config", str(recipe)])
    with pytest.raises(ValueError, match=r"no such recipe: cifar10_resnet81; .*cifar10_resnet18"):
        parse_config(["--config", "cifar10_resnet81"])
    for path in ("runs/clothes_cpu", "mine/quickstart.yaml"):  # another's, which is not there
        with pytest.raises(ValueError, match=f"no such recipe: {path}"):
            parse_config(["--config", path])
    assert parse_config(["--config", "recipes/quickstart.yaml"]).data.data == "patterns"


def test_recipe_without_data_names_what_it_is_for() -> None:
    with pytest.raises(ValueError, match=r"need --data PATH: .*vits16_100ep.yaml is for ImageNet"):
        parse_config(["--config", "vits16_100ep"])
    assert parse_config(["--config", "vits16_100ep", "--data", "x"]).data.data == "x"


def test_help_begins_with_flags_that_there_are(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"], dino_train.__doc__)
    assert stop.value.code == 0
    start, options = capsys.readouterr().out.split("Start here")[1].split("Source: DINO")
    flags = re.findall(r"^ +(--[a-z-]+)", start, flags=re.MULTILINE)
    assert len(flags) == 9
    for flag in flags:
        assert re.search(rf"{flag}\b", options), flag


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--channels 5 --mean 0.1 0.2", "as many numbers for --mean as channels, got 2 with .* 5"),
        (
            "--channels 1 --std 0.1 0.2 0.3",
            "as many numbers for --std as channels, got 3 with .* 1",
        ),
        ("--channels 5 --levels 0 1 2", "need two or 10 numbers for --levels, got 3: 0 1 2"),
        ("--channels 2 --levels 0 1 5 4", "need --levels LOW HIGH with LOW < HIGH, got 5.0 4.0"),
        ("--channels 0", "need --channels > 0, got 0"),
    ],
)
def test_numbers_by_channel_are_as_many_as_channels(flags: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_values(parse_config(["--data", "patterns", *flags.split()]))
