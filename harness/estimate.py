"""What a step will take on this machine, told before the first one: memory and seconds.

    cost = step_cost(config.model, crop_sizes=[224, 224, 96], batch_size=64)
    cost.num_bytes, cost.flops / flops_per_second()

The networks are built on the meta device, where tensors have shapes and no memory.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from models import DinoModel, ModelConfig

# The seconds of steps of five networks were 1.3 to 4 times those of the arithmetic at the speed of
# a product of matrices, on one core of an AMD EPYC; the median was 1.7.
SLOWER_THAN_PRODUCTS = 1.7
SECONDS_OF_PRODUCTS = 0.05  # by which the speed is measured
GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
IMAGES = 2  # whose cost is measured and scaled up: BatchNorm needs more than one


class StepCost(NamedTuple):
    """What a step of one process needs."""

    flops: int
    num_bytes: int  # weights, gradients, AdamW's moments, and what the backward pass needs


def step_cost(model: ModelConfig, crop_sizes: Sequence[int], batch_size: int) -> StepCost:
    """Return what a step needs on `batch_size` images, in float32.

    `crop_sizes` has the side of each crop of an image in pixels, the two global ones first. For a
    ViT and four convolutional networks real steps took 0.97 to 1.25 times `num_bytes`.
    """
    with torch.device("meta"):
        student = DinoModel.from_config(replace(model, pretrained=False, drop_path_rate=0.0))
        crops = [torch.empty(IMAGES, model.channels, size, size) for size in crop_sizes]
    weights = {StorageWeakRef(param.untyped_storage()): param for param in student.parameters()}
    saved: dict[StorageWeakRef, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in weights:
            saved[storage] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        student(crops)
    # the counter follows gradients, and fails where a parameter itself is a layer's input
    student.requires_grad_(False)
    of_student, of_teacher = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with of_student:
        student(crops)
    with of_teacher:
        student(crops[:2])
    # the backward pass is two products for each of the forward pass
    flops = 3 * of_student.get_total_flops() + of_teacher.get_total_flops()
    activations = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    num_weights = sum(param.numel() for param in student.parameters())
    copies = 5  # student, teacher, gradient, and the optimizer's two
    num_bytes = activations * batch_size // IMAGES + 4 * copies * num_weights
    return StepCost(flops * batch_size // IMAGES, num_bytes)


def flops_per_second() -> float:
    """Return how many multiplications and additions of a step this CPU does in a second."""
    matrix = torch.randn(512, 512)
    matrix @ matrix  # starts the threads
    num_products, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS_OF_PRODUCTS:
        matrix @ matrix
        num_products += 1
    rate = 2 * 512**3 * num_products / (time.perf_counter() - began)
    return rate / SLOWER_THAN_PRODUCTS


def memory_of_machine() -> int | None:
    """Return the bytes of memory that processes may take here, or None where it is not said.

    They are the machine's or, where that is less, what a container or Slurm leaves of them.
    """
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not hasattr(os, "sysconf") or not all(name in os.sysconf_names for name in names):
        return None
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([of_machine, *_limits_of_groups()])


def _limits_of_groups() -> list[int]:
    """Return the limits of memory, in bytes, of the control groups that hold this process.

    /proc/self/cgroup names a group for each line, `0::/path` of version 2 or `9:memory:/path` of
    version 1. A container may see its own group as the root, whatever path that line has, and the
    groups above one limit it, too: so a limit is read of each folder on the way.
    """
    if not GROUPS_OF_PROCESS.exists():
        return []
    limits: list[int] = []
    for line in GROUPS_OF_PROCESS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # no such file, or `max`: no limit
                limits.append(int((folder / name).read_text()))
    return limits
