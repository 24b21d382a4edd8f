"""Settings that were left open: by the number of images, the length of the run and the network.

The paper's suit ViTs, a million images and hundreds of epochs. A recipe (--config) is a whole
configuration: what it does not say is in RECIPE_DEFAULTS. docs/science.md has the measurements.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from config import SETTINGS, Config
from harness.command import in_epochs
from models import NUM_PROTOTYPES
from multicrop import PAPER_BLUR

# the paper's, but for the prototypes, of which it has 65,536
RECIPE_DEFAULTS = {
    "blur_probability": list(PAPER_BLUR),
    "projection_output_dim": NUM_PROTOTYPES,
    "lr": 5e-4,
    "warmup_epochs": 10,
    "freeze_last_layer_epochs": 1,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "teacher_momentum": 0.996,
}


class Rung(NamedTuple):
    """What suits up to so many images."""

    most_images: float
    num_prototypes: int
    teacher_temp: float


LADDER = (
    Rung(20_000, 1024, 0.02),
    Rung(50_000, 2048, 0.03),
    Rung(100_000, 4096, 0.04),
    Rung(200_000, 16_384, 0.04),
    Rung(500_000, 32_768, 0.04),
    Rung(math.inf, 65_536, 0.04),
)
# largest share of a run for the warm-up, the frozen last layer and what the teacher averages
PART_OF_RUN = 0.1
LEARNING_RATES = {"adamw": 5e-4, "sgd": 0.03, "lars": 0.3}  # the paper's, by optimizer
ADAMW_ON_RESNETS = 4e-3  # for which 5e-4 is too little
GOING_ON = 0.1  # of these rates, so that trained weights are not lost
LEAST_AVERAGED = 2  # steps that the teacher averages at first, however short the run


def fill_in(config: Config, num_images: int, images_per_step: int) -> tuple[Config, list[str]]:
    """Return the config with what was left open, and a line on each thing that it follows from."""
    rung = next(rung for rung in LADDER if num_images <= rung.most_images)
    teacher_temp = config.teacher.teacher_temp or rung.teacher_temp
    by_images = {
        "projection_output_dim": rung.num_prototypes,
        "teacher_temp": teacher_temp,
        "warmup_teacher_temp": min(RECIPE_DEFAULTS["warmup_teacher_temp"], teacher_temp),
    }
    epochs, steps_per_epoch = config.optim.epochs, num_images // images_per_step
    part = PART_OF_RUN * epochs
    by_length = {
        "warmup_epochs": min(RECIPE_DEFAULTS["warmup_epochs"], part),
        "freeze_last_layer_epochs": min(RECIPE_DEFAULTS["freeze_last_layer_epochs"], int(part)),
        "teacher_momentum": _momentum_for(part * steps_per_epoch),
    }
    optimizer, arch = config.optim.optimizer, config.model.arch
    rate = LEARNING_RATES[optimizer]
    if optimizer == "adamw" and "resnet" in arch:
        rate = ADAMW_ON_RESNETS
    of_network = f"{optimizer} on {arch}"
    if config.run.init_from is not None or config.model.pretrained:
        rate *= GOING_ON
        of_network += ", which is trained already"
    by_network = {"lr": rate}
    lines: list[str] = []
    of_images = f"{num_images:,} images"
    of_length = f"{in_epochs(epochs)} of {steps_per_epoch:,} steps"
    reasons = {of_images: by_images, of_length: by_length, of_network: by_network}
    for reason, values in reasons.items():
        config, filled = _with_values(config, values)
        if filled:
            flags = ", ".join(f"--{name.replace('_', '-')} {values[name]:g}" for name in filled)
            lines.append(f"chosen for {reason}: {flags}")
    return config, lines


def _momentum_for(most_averaged: float) -> float:
    """Return the momentum of a teacher that averages that many steps at first, at most 0.996."""
    momentum = 1 - 1 / max(LEAST_AVERAGED, most_averaged)
    return min(RECIPE_DEFAULTS["teacher_momentum"], round(momentum, 4))


def _with_values(config: Config, values: dict[str, float]) -> tuple[Config, list[str]]:
    """Return the config with values for the settings among these that are open, and their names."""
    filled: list[str] = []
    for section, settings in SETTINGS.items():
        current = getattr(config, section)
        new = {
            name: value
            for name, value in values.items()
            if name in settings and getattr(current, name) is None
        }
        config = replace(config, **{section: replace(current, **new)})
        filled += new
    return config, filled
