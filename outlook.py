"""What a run is about to do, by its own arithmetic, and what its figures say of the teacher."""

import math
import sys

try:
    import resource
except ImportError:
    resource = None

import torch
from accelerate import Accelerator
from rich.markup import escape
from rich.table import Table
from torch import nn

from config import Config
from data import batch_factors
from distributed import has_compiler

# seconds of a unit, its name, and those of the unit that is said beside it
DURATIONS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
KNOBS = {
    "uniform": "lower --teacher-temp and --warmup-teacher-temp, take --use-bn, or fewer prototypes "
    "by --projection-output-dim",
    "one-hot": "raise --teacher-temp and --warmup-teacher-temp, or lower --center-momentum or --lr",
}


def ema_half_life(momentum: float) -> float:
    """Give the steps after which half of an EMA is newer."""
    if not 0 < momentum < 1:
        return math.inf if momentum else 0.0
    return math.log(0.5) / math.log(momentum)


def figure(number: float) -> str:
    """Write a number by three digits, or in whole thousands."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def num_epochs(number: float) -> str:
    return f"{number:g} epoch{'s' * (number != 1)}"


def header(config: Config, accelerator: Accelerator, num_images: int, model: nn.Module) -> Table:
    """Lay out what is about to be trained, on what, and how."""
    optim, crops, world = config.optim, config.crops, accelerator.num_processes
    batch = optim.images_per_step(world)
    factors = batch_factors(optim.batch_size, world, optim.accumulation_steps)
    device = accelerator.device.type
    name = torch.cuda.get_device_name() if device == "cuda" else device
    backbone, head = (sum(p.numel() for p in part.parameters()) / 1e6 for part in model.children())
    local = f" + {crops.num_local_crops} of {crops.local_crop_size}" * (crops.num_local_crops > 0)
    precision = f"mixed precision: {config.run.mixed_precision}"
    compiled = ""
    if config.run.compile:
        is_compiled = any(module._compiled_call_impl for module in model.modules())
        why_not = "the backbone repeats none"
        if not has_compiler():
            why_not = "a C compiler and Python's headers were not found"
        elif any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            why_not = "its BatchNorm is over all GPUs"
        compiled = ", blocks compiled" if is_compiled else f", blocks not compiled: {why_not}"
    kind = " FSDP" if accelerator.is_fsdp2 else " DDP" if world > 1 else ""
    output_dim = config.model.projection_output_dim
    first, last = config.teacher.warmup_teacher_temp, config.teacher.teacher_temp
    warmup = config.teacher.warmup_teacher_temp_epochs
    temp = (
        f"{first:g} to {last:g} in {warmup} of {num_epochs(optim.epochs)}"
        if warmup
        else f"{last:g}"
    )
    half_life = ema_half_life(config.teacher.teacher_momentum)
    rows = {
        "arch": f"{config.model.arch}: {backbone:.2f} M parameters, {head:.2f} M in the head",
        "head": f"K {output_dim:,} prototypes, {figure(num_images / output_dim)} images to each",
        "data": f"{config.data.data}: {num_images:,} images, "
        f"crops 2 of {crops.global_crop_size}{local} px",
        "device": f"{world} x {name}{kind}, {precision}{compiled}",
        "batch": f"{batch} images{f' ({factors})' * (optim.batch_size < batch)}, "
        f"{num_images // batch:,} steps an epoch, {num_epochs(optim.epochs)}",
        "optimizer": f"{optim.optimizer}, lr {optim.lr * batch / 256:.3g} "
        f"({optim.lr:g} x {batch} / 256), warm-up of {num_epochs(optim.warmup_epochs)}",
        "teacher": f"half of it newer than {figure(half_life)} steps at first "
        f"({figure(half_life / (num_images // batch))} epochs), temperature {temp}",
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(text))
    return table


def warnings(
    config: Config, accelerator: Accelerator, num_images: int, model: nn.Module
) -> list[str]:
    """Name what is likely not meant."""
    lines, epochs = [], config.optim.epochs
    batch = config.optim.images_per_step(accelerator.num_processes)
    steps, half_life = num_images // batch * epochs, ema_half_life(config.teacher.teacher_momentum)
    if half_life > steps:
        lines.append(
            f"--teacher-momentum {config.teacher.teacher_momentum:g} has a half-life of "
            f"{figure(half_life)} steps, the run {steps:,}: the teacher stays as it is"
        )
    if config.model.projection_output_dim > num_images:
        given = f"--projection-output-dim {config.model.projection_output_dim}"
        lines.append(f"{given} is more prototypes than the {num_images:,} images")
    if config.run.knn_every and min(config.run.knn_images, num_images) < 20:
        flag = "--knn-images" if config.run.knn_images < 20 else "--data"
        lines.append(f"k-NN asks 20 images, {flag} gives it fewer")
    warm_ups = {
        "--warmup-epochs": config.optim.warmup_epochs,
        "--warmup-teacher-temp-epochs": config.teacher.warmup_teacher_temp_epochs,
    }
    for flag, warm_up in warm_ups.items():
        if warm_up > epochs:
            lines.append(f"{flag} {warm_up:g} is longer than the run of {num_epochs(epochs)}")
    frozen = config.optim.freeze_last_layer_epochs
    if frozen >= epochs:
        flag = f"--freeze-last-layer-epochs {frozen}"
        lines.append(
            f"{flag} covers the run of {num_epochs(epochs)}: the last layer stays as it is"
        )
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if accelerator.num_processes > 1 and any(not isinstance(m, nn.SyncBatchNorm) for m in norms):
        why = "--no-sync-bn" if accelerator.device.type == "cuda" else "only GPUs share them"
        lines.append(f"BatchNorm sees {config.optim.batch_size} images at a time: {why}")
    return lines


def duration(seconds: float) -> str:
    """Give a time as `2 d 03 h`, `3 h 05 min`, `4 min 06 s`, or `7 s`."""
    seconds = round(seconds)
    for size, unit, part, name in DURATIONS:
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part:02} {name}"
    return f"{seconds} s"


def peak_memory() -> float:
    """Give the most memory in GiB that the main process has taken so far, of its GPU or its own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def collapse_of(entropy: float, kl: float, output_dim: int) -> str:
    """Name what a teacher of this entropy has collapsed to: `uniform`, `one-hot` or nothing.

    Uniform is within 2 % of ln K, with a student that says the same; one-hot below 1 % of it. The
    logged steps of the quick start, which is healthy, are between 1.2 and 78 %, with a KL
    divergence above 1.2 % of it.
    """
    most = math.log(output_dim)
    if entropy > 0.98 * most and kl < 0.01 * most:
        return "uniform"
    return "one-hot" if entropy < 0.01 * most else ""
