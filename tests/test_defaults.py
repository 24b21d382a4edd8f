"""What was left open follows from the images and the run's length; what was given stays."""

from dataclasses import replace
from pathlib import Path

import pytest

from config import Config
from dino_train import schedules
from harness.defaults import RECIPE_DEFAULTS, fill_in
from harness.flags import parse_config


def of_epochs(epochs: int) -> Config:
    config = Config()
    return replace(config, optim=replace(config.optim, epochs=epochs))


@pytest.mark.parametrize(
    ("num_images", "prototypes", "temp"),
    [
        (10, 1024, 0.02),
        (20_000, 1024, 0.02),
        (20_001, 2048, 0.03),
        (50_000, 2048, 0.03),
        (100_000, 4096, 0.04),
        (200_000, 16_384, 0.04),
        (500_000, 32_768, 0.04),
        (1_281_167, 65_536, 0.04),
    ],
)
def test_prototypes_and_temperature_follow_from_the_number_of_images(
    num_images: int, prototypes: int, temp: float
) -> None:
    config, _ = fill_in(Config(), num_images, images_per_step=1)
    assert config.model.projection_output_dim == prototypes
    assert config.teacher.teacher_temp == temp
    assert config.teacher.warmup_teacher_temp == temp


@pytest.mark.parametrize("epochs", [1, 3, 10, 99, 100, 800])
def test_learning_rate_has_its_peak_within_the_first_tenth_of_a_run(epochs: int) -> None:
    steps_per_epoch = 40
    config, _ = fill_in(of_epochs(epochs), num_images=40 * 8, images_per_step=8)
    total = epochs * steps_per_epoch
    rates = [schedules(config, step, steps_per_epoch, 8) for step in range(total)]
    peak = max(range(total), key=lambda step: rates[step].lr)
    assert peak <= total / 10
    assert config.optim.warmup_epochs <= 10
    assert rates[peak].lr == pytest.approx(config.optim.lr * 8 / 256)


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ([], 5e-4),
        (["--arch", "xcit_small_12_p16_224"], 5e-4),
        (["--arch", "resnet50"], 4e-3),
        (["--arch", "resnet10_half"], 4e-3),
        (["--arch", "resnet50", "--optimizer", "sgd"], 0.03),
        (["--optimizer", "lars"], 0.3),
        (["--init-from", "dino_vits16"], 5e-5),
        (["--arch", "resnet50", "--pretrained", "--optimizer", "sgd"], 0.003),
        (["--arch", "resnet50", "--lr", "0.7"], 0.7),
    ],
)
def test_learning_rate_follows_from_network_optimizer_and_start(
    flags: list[str], rate: float
) -> None:
    config, lines = fill_in(parse_config(["--data", "images", *flags]), 3000, 30)
    assert config.optim.lr == pytest.approx(rate)
    assert any(f"--lr {rate:g}" in line for line in lines) is ("--lr" not in flags)


@pytest.mark.parametrize(("epochs", "frozen"), [(1, 0), (9, 0), (10, 1), (800, 1)])
def test_last_layer_is_never_frozen_for_more_than_a_tenth_of_a_run(
    epochs: int, frozen: int
) -> None:
    config, _ = fill_in(of_epochs(epochs), num_images=100, images_per_step=10)
    assert config.optim.freeze_last_layer_epochs == frozen


@pytest.mark.parametrize(
    ("epochs", "momentum"),
    [(1, 0.5), (60, 1 - 1 / 60), (250, 0.996), (100_000, 0.996)],
)
def test_teacher_averages_a_tenth_of_a_run_within_limits(epochs: int, momentum: float) -> None:
    config, _ = fill_in(of_epochs(epochs), num_images=100, images_per_step=10)
    assert config.teacher.teacher_momentum == pytest.approx(momentum, abs=1e-4)


def test_what_is_given_stays_and_what_is_chosen_is_said_with_its_reason() -> None:
    flags = ["--data", "images", "--teacher-temp", "0.03", "--projection-output-dim", "4096"]
    config, lines = fill_in(parse_config([*flags, "--epochs", "20"]), 3000, images_per_step=30)
    assert config.model.projection_output_dim == 4096
    assert (config.teacher.warmup_teacher_temp, config.teacher.teacher_temp) == (0.03, 0.03)
    assert lines == [
        "chosen for 3,000 images: --warmup-teacher-temp 0.03",
        "chosen for 20 epochs of 100 steps: --warmup-epochs 2, --freeze-last-layer-epochs 1, "
        "--teacher-momentum 0.995",
        "chosen for adamw on dino_vits16: --lr 0.0005",
    ]
    assert fill_in(config, 3000, images_per_step=30) == (config, [])
    _, lines = fill_in(of_epochs(1), 3000, images_per_step=30)
    assert "chosen for 1 epoch of 100 steps: " in lines[1]


def test_warm_up_of_a_high_temperature_starts_at_the_papers() -> None:
    config, _ = fill_in(parse_config(["--data", "images", "--teacher-temp", "0.07"]), 3000, 30)
    assert (config.teacher.warmup_teacher_temp, config.teacher.teacher_temp) == (0.04, 0.07)


def test_recipe_leaves_nothing_open(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("optim: {warmup_epochs: 3}\n")
    config = parse_config(
        ["--config", str(recipe), "--data", "images", "--teacher-momentum", "0.9"]
    )
    assert fill_in(config, 10, images_per_step=1) == (config, [])
    assert config.optim.warmup_epochs == 3
    assert config.teacher.teacher_momentum == 0.9
    assert config.teacher.teacher_temp == RECIPE_DEFAULTS["teacher_temp"] == 0.04
    assert config.crops.blur_probability == (1.0, 0.1, 0.5)
