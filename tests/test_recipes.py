"""Each recipe loads and trains, and the published ones hold the published numbers."""

import functools
import re
import shlex
import signal
from pathlib import Path

import pytest
from conftest import ROOT, stop_at

from config import Config
from dino_train import schedules, train
from harness.flags import parse_config
from harness.outlook import ema_half_life

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# The original's published arguments. Processes, images a step, epochs, peak lr, its end, decay at
# both ends, temperature at both ends and its warm-up, clip, frozen epochs, local crops.
PUBLISHED = {
    "vits16_100ep": (8, 512, 100, 1e-3, 1e-6, 0.04, 0.4, 0.04, 0.04, 0, 3, 1, 8),
    "vits16_300ep": (16, 1024, 300, 2e-3, 1e-6, 0.04, 0.4, 0.04, 0.07, 30, 3, 1, 8),
    "vits16_800ep": (16, 1024, 800, 2e-3, 1e-5, 0.04, 0.4, 0.04, 0.07, 30, 0, 1, 10),
    "vits8_800ep": (64, 1024, 800, 2e-3, 1e-6, 0.04, 0.4, 0.04, 0.07, 30, 3, 1, 10),
    "vitb16_400ep": (32, 1024, 400, 3e-3, 2e-6, 0.04, 0.4, 0.04, 0.07, 50, 0.3, 3, 10),
    "vitb8_300ep": (176, 1056, 300, 2.0625e-3, 2e-6, 0.04, 0.4, 0.03, 0.07, 50, 3, 3, 10),
    "resnet50_100ep": (8, 512, 100, 0.06, 1e-6, 1e-4, 1e-4, 0.04, 0.04, 0, 3, 1, 8),
    "resnet50_800ep": (80, 4080, 800, 4.78125, 0.0048, 1e-6, 1e-6, 0.04, 0.07, 50, 0, 1, 6),
}


VITS_ARGUMENTS = {
    "model.drop_path_rate": 0.1,
    "model.original_pos_embed": True,
    "model.projection_hidden_dim": 2048,
    "model.projection_bottleneck_dim": 256,
    "model.projection_output_dim": 65536,
    "model.use_bn": False,
    "optim.optimizer": "adamw",
    "teacher.student_temp": 0.1,
    "teacher.center_momentum": 0.9,
}
RESNETS_ARGUMENTS = VITS_ARGUMENTS | {
    "model.arch": "resnet50",
    "model.drop_path_rate": None,  # ResNets have none
    "model.original_pos_embed": False,
    "model.norm_last_layer": True,
    "crops.global_crop_scale": (0.14, 1.0),
    "crops.local_crop_scale": (0.05, 0.14),
}
SCALES_OF_8 = {"crops.global_crop_scale": (0.4, 1.0), "crops.local_crop_scale": (0.05, 0.4)}
SCALES_OF_10 = {"crops.global_crop_scale": (0.25, 1.0), "crops.local_crop_scale": (0.05, 0.25)}
FREE, FIXED = {"model.norm_last_layer": False}, {"model.norm_last_layer": True}
OTHER_ARGUMENTS = {
    "vits16_100ep": VITS_ARGUMENTS | SCALES_OF_8 | FIXED | {"model.arch": "dino_vits16"},
    "vits16_300ep": VITS_ARGUMENTS | SCALES_OF_8 | FREE | {"model.arch": "dino_vits16"},
    "vits16_800ep": VITS_ARGUMENTS | SCALES_OF_10 | FREE | {"model.arch": "dino_vits16"},
    "vits8_800ep": VITS_ARGUMENTS | SCALES_OF_8 | FREE | {"model.arch": "dino_vits8"},
    "vitb16_400ep": VITS_ARGUMENTS | SCALES_OF_10 | FIXED | {"model.arch": "dino_vitb16"},
    "vitb8_300ep": VITS_ARGUMENTS | SCALES_OF_10 | FIXED | {"model.arch": "dino_vitb8"},
    "resnet50_100ep": RESNETS_ARGUMENTS | {"optim.optimizer": "sgd"},
    "resnet50_800ep": RESNETS_ARGUMENTS
    | {"optim.optimizer": "lars", "model.use_bn": True, "model.projection_output_dim": 60000},
}


@functools.cache
def load(path: Path, *flags: str) -> Config:
    return parse_config(["--config", str(path), "--data", "images", *flags])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_to_run_it_and_what_to_expect(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(re.match("# +hardware ", line) for line in header)
    assert any("accuracy" in line or "result" in line for line in header)
    text = re.sub(r"\\\n# +", "", path.read_text())  # a command that goes on in the next line
    (command,) = re.findall(r"^# +command +.*dino_train\.py(.*)$", text, flags=re.MULTILINE)
    config = parse_config(shlex.split(command))
    expected = load(path, "--data", config.data.data)
    assert (config.model, config.crops, config.optim, config.teacher) == (
        expected.model,
        expected.crops,
        expected.optim,
        expected.teacher,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_has_the_published_schedules(name: str) -> None:
    world, batch, epochs, peak, end, decay, decay_end, temp, temp_end, warm, *rest = PUBLISHED[name]
    config = load(ROOT / "recipes" / f"{name}.yaml")
    assert config.optim.batch_size * world == batch
    steps = 1_281_167 // batch
    first, last = (schedules(config, step, steps, batch) for step in (0, epochs * steps - 1))
    warmed = schedules(config, 10 * steps, steps, batch)
    assert config.optim.epochs == epochs
    assert (first.lr, warmed.lr) == (0, pytest.approx(peak))
    assert last.lr == pytest.approx(end, rel=0.01, abs=1e-7)
    assert (first.weight_decay, last.weight_decay) == pytest.approx((decay, decay_end), rel=1e-4)
    assert (first.teacher_temp, last.teacher_temp) == pytest.approx((temp, temp_end))
    if warm:
        before, after = (schedules(config, e * steps, steps, batch) for e in (warm - 2, warm - 1))
        assert before.teacher_temp < after.teacher_temp == pytest.approx(temp_end)
    assert (first.teacher_momentum, last.teacher_momentum) == pytest.approx((0.996, 1), abs=1e-6)
    clip, frozen, num_local = rest
    assert config.optim.clip_grad == clip
    assert config.optim.freeze_last_layer_epochs == frozen
    assert config.crops.num_local_crops == num_local


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_has_the_other_published_arguments(name: str) -> None:
    config = load(ROOT / "recipes" / f"{name}.yaml")
    for place, expected in OTHER_ARGUMENTS[name].items():
        section, setting = place.split(".")
        assert getattr(getattr(config, section), setting) == expected, place


def test_going_on_from_weights_is_gentler_than_starting_from_nothing() -> None:
    """By its schedules, for 10,000 images."""
    config, anew = (
        load(ROOT / "recipes" / f"{name}.yaml") for name in ("continue_vits16", "vits16_one_gpu")
    )
    assert config.model.arch == anew.model.arch and config.crops == anew.crops
    images = config.optim.images_per_step(world=1)
    steps = 10_000 // images
    rates = [schedules(config, step, steps, images) for step in range(config.optim.epochs * steps)]
    assert max(rate.lr for rate in rates) / images <= 0.1 * anew.optim.lr / 256
    assert rates[0].teacher_momentum == anew.teacher.teacher_momentum
    assert ema_half_life(rates[0].teacher_momentum) < len(rates) - 2 * steps
    # the head has had its warm-up before the backbone is free
    assert 0 < config.optim.warmup_epochs < config.optim.freeze_backbone_epochs
    assert config.optim.freeze_last_layer_epochs < config.optim.freeze_backbone_epochs
    assert config.run.knn_every == 1 and config.run.keep_every


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_a_step_in_a_tiny_size(
    path: Path, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_vit = "vit" in load(path).model.arch
    flags = ["--arch", "test_vit" if is_vit else "test_resnet", "--data", str(image_folder)]
    flags += """
        --batch-size 8 --projection-hidden-dim 16 --projection-output-dim 32 --num-local-crops 1
        --num-workers 0 --knn-every 0 --log-every 1
    """.split()
    stop_at(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(load(path, *flags, "--output-dir", str(tmp_path / "run")))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "run" / "ckpt.safetensors").exists()
