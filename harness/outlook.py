"""What a run is about to do, by its own arithmetic: header, warnings, and the dry run."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from config import Config
from data import ImageDataset, batch_factors
from folders import some_of
from harness.bf16_on_cpu import emulates_bf16, has_bf16
from harness.command import in_epochs, print_rows, unused_path
from harness.distributed import has_compiler, is_compiled, num_local_processes, wait_for
from harness.estimate import flops_per_second, memory_of_machine, step_cost
from harness.flags import as_plain_data, fastest_on_gpu
from harness.monitor import Monitor, duration, peak_memory, three_digits, write_picture
from harness.pictures import crop_cells, sheet, shown_channels
from harness.run import Due, Run
from harness.run_lock import FolderLock
from harness.saved_run import TrainingState
from harness.terminal import printable
from multicrop import MultiCrop
from pixels import levels_in_words

# ---------------------------------------------------------------- words and numbers


def ema_half_life(momentum: float) -> float:
    """Return the steps after which half of an EMA is newer."""
    if momentum <= 0:
        return 0.0
    if momentum >= 1:
        return math.inf
    return math.log(0.5) / math.log(momentum)


# ---------------------------------------------------------------- header


def introduce(
    run: Run,
    monitor: Monitor,
    student: nn.Module,
    why_no_knn: str,
    num_knn_images: int | None,
) -> None:
    """Say what is about to be trained, what is likely not meant, and where it goes on.

    `num_knn_images` are those that k-NN compares with, None where there is no k-NN.
    """
    monitor.console.print(header(run, student))
    for note in run.dataset.notes:
        monitor.say(f"data: {note}")
    if run.decodes_once:
        world = run.accelerator.num_processes
        gib = run.images.num_bytes * world / 2**30
        once = "decoded once" if world == 1 else "decoded once by each process"
        monitor.say(f"data: each image is {once}, and kept: {gib:.2f} GiB of memory")
    if why_no_knn:
        monitor.say(f"no k-NN during training: {why_no_knn}")
    for line in advice_on_stopping(run, has_knn=not why_no_knn) + time_to_stop(run):
        monitor.say(line)
    for warning in unlikely_settings(run, student, num_knn_images):
        monitor.say(f"warning: {warning}")
    if run.is_resumed:
        text = f"after step {run.steps_before:,} of {run.total_steps:,}"
        monitor.say(f"resumed {run.folder} {text}")
    elif run.config.run.resume:
        monitor.say(f"no state was saved in {run.folder}: it starts from its first step")
    for change in run.changes:
        monitor.say(f"taken over: {change}")


def advice_on_stopping(run: Run, has_knn: bool) -> list[str]:
    """Return a line on when to stop where there is no k-NN, and on what keeps the way back."""
    if has_knn or not run.config.run.knn_every or run.config.run.dry_run:
        return []
    text = "when to stop: once RankMe has risen and falls, while one component's share grows"
    if not run.config.run.keep_every:
        text += f"; --keep-every {run.config.run.knn_every} keeps the teachers from before"
    return [f"{text} (docs/science.md: When to stop without labels)"]


def time_to_stop(run: Run) -> list[str]:
    """Return a line where torchrun or accelerate launch kills a stopped run before it may save.

    The variable is read by torch 2.12 and newer; before, it was always 30 seconds.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or run.config.run.dry_run:
        return []
    needed = math.ceil(60 * run.config.run.stop_minutes) or 600
    more = f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={needed} before it is launched"
    if TorchVersion(torch.__version__) >= "2.12":
        seconds = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    else:
        seconds = 30
        more = f"take torch 2.12 or newer, and {more}"
    if seconds >= needed:
        return []
    text = f"a run that is stopped has {seconds} s to save: then its launcher kills it"
    return [f"{text}; for more time, {more}"]


def header(run: Run, student: nn.Module) -> Table:
    """Return a table of what is about to be trained, on what, and how."""
    config, num_images = run.config, len(run.dataset)
    output_dim = config.model.projection_output_dim
    rows = {
        "folder": str(run.folder),
        "network": f"{config.model.arch}, {_sizes_of(student, output_dim)}",
        "data": config.data.data,
        "images": f"{num_images:,} images, {_classes_of(run.dataset)}",
        "crops": f"{_crops_of(config)} px, from images resized to {config.data.canvas_size} px",
        "batch": _batch_of(run),
        "steps": f"{run.total_steps:,}: {in_epochs(config.optim.epochs)} of "
        f"{run.steps_per_epoch:,} steps",
        "optimizer": _optimizer_of(run),
        "teacher": _teacher_of(run),
        "device": f"{_devices_of(run)}, {_precision_of(run)}{_compiling_of(config, student)}",
    }
    if config.data.levels is not None:
        rows["levels"] = levels_in_words(config.data.levels)
    if config.model.channels != 3:
        rows["channels"] = _channels_of(config)
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(printable(text)))
    return table


def _channels_of(config: Config) -> str:
    """Return how many channels the images have, and what follows from that."""
    mean, std = _some_numbers(config.crops.mean), _some_numbers(config.crops.std)
    rgb_alone = "hue, saturation and grayscale are for RGB alone"
    return f"{config.model.channels}; mean {mean}, standard deviation {std}; {rgb_alone}"


MOST_NUMBERS = 16  # of a channel each, that a line has


def _some_numbers(numbers: Sequence[float]) -> str:
    first = " ".join(f"{number:.3g}" for number in numbers[:MOST_NUMBERS])
    num_more = len(numbers) - MOST_NUMBERS
    return f"{first} and {num_more} more" if num_more > 0 else first


def tracked_settings(run: Run, student: nn.Module) -> dict[str, bool | int | float | str | None]:
    """Return all settings as `section.name`, and the header's counts, as a tracker takes them."""
    settings: dict[str, bool | int | float | str | None] = {}
    for section, values in as_plain_data(run.config).items():
        for name, value in values.items():
            is_list = isinstance(value, list)  # TensorBoard takes none
            settings[f"{section}.{name}"] = str(value) if is_list else value
    backbone, head = _num_parameters(student)
    return settings | {
        "num_images": len(run.dataset),
        "num_classes": _num_classes(run.dataset),
        "num_backbone_parameters": backbone,
        "num_head_parameters": head,
        "num_processes": run.accelerator.num_processes,
        "images_per_step": run.images_per_step,
        "steps_per_epoch": run.steps_per_epoch,
    }


def _num_classes(dataset: ImageDataset) -> int:
    if dataset.labels is None:
        return 0
    return len(dataset.classes or ()) or int(dataset.labels.max()) + 1


def _num_parameters(student: nn.Module) -> list[int]:
    """Return how many parameters backbone and head have."""
    return [sum(p.numel() for p in part.parameters()) for part in student.children()]


def _classes_of(dataset: ImageDataset) -> str:
    """Return how many classes there are, and the first of them."""
    if dataset.labels is None:
        return "no classes"
    if not dataset.classes:
        return f"{_num_classes(dataset):,} classes"
    return f"{len(dataset.classes):,} classes: {some_of(dataset.classes, 4)}"


def _sizes_of(student: nn.Module, output_dim: int) -> str:
    backbone, head = (number / 1e6 for number in _num_parameters(student))
    of_head = f"{head:.2f} M in its head of {output_dim:,} prototypes"
    return f"{backbone:.2f} M parameters, and {of_head}"


def _crops_of(config: Config) -> str:
    crops = config.crops
    text = f"2 of {crops.global_crop_size}"
    if crops.num_local_crops:
        text += f" and {crops.num_local_crops} of {crops.local_crop_size}"
    return text


def _devices_of(run: Run) -> str:
    world, device = run.accelerator.num_processes, run.accelerator.device.type
    text = f"{world} x {torch.cuda.get_device_name() if device == 'cuda' else device}"
    if run.accelerator.is_fsdp2:
        return f"{text} FSDP"
    return f"{text} DDP" if world > 1 else text


def _precision_of(run: Run) -> str:
    """Return the precision of the networks, and one that is faster on this device."""
    precision, device = run.config.run.mixed_precision, run.accelerator.device.type
    if device == "cpu":
        return precision_on_cpu(precision, run.accelerator.num_processes)
    if precision != "no":
        return precision
    if device != "cuda":
        return "float32"
    faster = fastest_on_gpu()
    return "float32" if faster == "no" else f"float32 (faster: --mixed-precision {faster})"


def precision_on_cpu(precision: str, num_processes: int) -> str:
    """Return the precision of networks on a CPU, and how a faster one is asked for."""
    if precision == "bf16":
        return "bf16 (float32 is faster here: --mixed-precision no)" if emulates_bf16() else "bf16"
    if num_processes > 1 and has_bf16():  # one process has measured it
        return "float32 (bf16 may be faster here: --mixed-precision bf16)"
    return "float32"


def _compiling_of(config: Config, student: nn.Module) -> str:
    if not config.run.compile:
        return ""
    return ", blocks compiled" if is_compiled(student) else ", blocks not compiled"


def _batch_of(run: Run) -> str:
    optim, world = run.config.optim, run.accelerator.num_processes
    text = f"{run.images_per_step} images"
    if optim.batch_size == run.images_per_step:
        return text
    return f"{text} ({batch_factors(optim.batch_size, world, optim.accumulation_steps)})"


def _optimizer_of(run: Run) -> str:
    optim = run.config.optim
    images = run.images_per_step
    peak = f"lr {optim.lr * images / 256:.3g} ({optim.lr:g} x {images} / 256)"
    warm_up = (
        f"warm-up of {in_epochs(optim.warmup_epochs)}" if optim.warmup_epochs else "no warm-up"
    )
    return f"{optim.optimizer}, {peak}, {warm_up}"


def _teacher_of(run: Run) -> str:
    teacher, epochs = run.config.teacher, in_epochs(run.config.optim.epochs)
    averaged = three_digits(1 / (1 - teacher.teacher_momentum))
    temperature = f"{teacher.teacher_temp:g}"
    if teacher.warmup_teacher_temp_epochs:
        warmup = f"in {teacher.warmup_teacher_temp_epochs} of {epochs}"
        temperature = f"{teacher.warmup_teacher_temp:g} to {teacher.teacher_temp:g} {warmup}"
    centering = "; sinkhorn in place of the center" if teacher.centering == "sinkhorn" else ""
    return (
        f"averages about the last {averaged} steps at first; temperature {temperature}{centering}"
    )


# ---------------------------------------------------------------- warnings


def unlikely_settings(run: Run, student: nn.Module, num_knn_images: int | None = None) -> list[str]:
    """Return a line for each setting that is likely not meant so."""
    config = run.config
    num_images, epochs = len(run.dataset), config.optim.epochs
    lines: list[str] = []
    half_life = ema_half_life(config.teacher.teacher_momentum)
    if half_life > run.total_steps:
        lines.append(
            f"--teacher-momentum {config.teacher.teacher_momentum:g} leaves half of the teacher as "
            f"it began for {three_digits(half_life)} steps, and the run has {run.total_steps:,}: "
            "need a lower one, or more --epochs"
        )
    output_dim = config.model.projection_output_dim
    if output_dim > num_images:
        given = f"--projection-output-dim {output_dim}"
        lines.append(f"{given} is more prototypes than the {num_images:,} images")
    if num_knn_images is not None and num_knn_images < 20:
        limit = " (--knn-images)" if num_knn_images == config.run.knn_images else ""
        lines.append(f"k-NN asks 20 neighbours and has {num_knn_images} images{limit}")
    warm_ups = {
        "--warmup-epochs": config.optim.warmup_epochs,
        "--warmup-teacher-temp-epochs": config.teacher.warmup_teacher_temp_epochs,
    }
    for flag, warm_up in warm_ups.items():
        if warm_up > epochs:
            lines.append(f"{flag} {warm_up:g} is longer than the run of {in_epochs(epochs)}")
    frozen = config.optim.freeze_last_layer_epochs
    if frozen >= epochs:
        given = f"--freeze-last-layer-epochs {frozen}"
        text = f"covers the run of {in_epochs(epochs)}: the last layer stays as it is"
        lines.append(f"{given} {text}")
    lines += _frozen_backbone(config)
    if run.accelerator.num_processes > 1 and _has_plain_batch_norm(student):
        is_on_gpus = run.accelerator.device.type == "cuda"
        reason = "since --no-sync-bn was given" if is_on_gpus else "as only GPUs share them"
        lines.append(f"BatchNorm sees {config.optim.batch_size} images at a time, {reason}")
    if run.accelerator.device.type == "cpu" and run.accelerator.is_main_process:  # which says it
        lines += _too_much_for_a_cpu(run)
    if config.run.compile and not has_compiler():
        needed = "a C compiler, Python's headers and, on a GPU, Triton"
        lines.append(f"--compile needs {needed}: not all were found")
    return lines


def _frozen_backbone(config: Config) -> list[str]:
    """Return a line where a backbone is frozen that has learned nothing, or for the whole run."""
    frozen = config.optim.freeze_backbone_epochs
    given = f"--freeze-backbone-epochs {frozen}"
    if frozen >= config.optim.epochs:
        stays = "the backbone stays as it is, and so do k-NN and RankMe"
        return [f"{given} covers the run of {in_epochs(config.optim.epochs)}: {stays}"]
    if frozen and not config.run.init_from and not config.model.pretrained:
        return [f"{given} freezes random weights: need --init-from, or 0"]
    return []


SLOW_STEP = 5.0  # seconds, from which on a step is said to be slow
MUCH_MEMORY = 0.7  # of the machine's


def _too_much_for_a_cpu(run: Run) -> list[str]:
    """Return a line where a step will be slow, or take most of the machine's memory."""
    config, crops = run.config, run.config.crops
    sizes = [crops.global_crop_size] * 2 + [crops.local_crop_size] * crops.num_local_crops
    cost = step_cost(config.model, sizes, config.optim.batch_size)
    seconds = config.optim.accumulation_steps * cost.flops / flops_per_second()
    own_bytes, all_bytes = cost.num_bytes * num_local_processes(), memory_of_machine()
    is_large = all_bytes is not None and own_bytes > MUCH_MEMORY * all_bytes
    if seconds < SLOW_STEP and not is_large:
        return []
    memory = f"{own_bytes / 2**30:.1f} GiB"
    if all_bytes is not None:
        memory += f" of this machine's {all_bytes / 2**30:.1f}"
    whole = duration(seconds * (run.total_steps - run.steps_before))
    remedies = "smaller --batch-size, --num-local-crops, the crop sizes or --arch help"
    return [
        f"a step will take about {duration(seconds)} on this CPU and {memory}, the run about "
        f"{whole}: {remedies}, and so does --config clothes_cpu; --dry-run measures it"
    ]


def _has_plain_batch_norm(network: nn.Module) -> bool:
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return any(not isinstance(norm, nn.SyncBatchNorm) for norm in norms)


# ---------------------------------------------------------------- dry run

WARM_UP_STEPS = 2  # not timed
TIMED_STEPS = 12  # at most
TIMED_SECONDS = 30  # at most
BATCHES_AHEAD = 2  # that a worker makes: until they are used up, no step seems to wait


class DryRun(Run):
    """A run of a few steps that writes crops.png alone, and ends once it has timed them."""

    writes_nothing = True  # but that picture, under an unused name

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        dataset: ImageDataset,
        lock: FolderLock | None = None,
    ) -> None:
        super().__init__(config, accelerator, dataset, lock)
        # what workers made ahead during the warm-up is used up before the clock starts
        num_ahead = BATCHES_AHEAD * self.config.data.num_workers
        num_ahead = math.ceil(num_ahead / self.config.optim.accumulation_steps)
        self.steady_step = WARM_UP_STEPS + num_ahead
        self.last_step = min(self.total_steps, self.steady_step + TIMED_STEPS)
        self._start_clock(after_step=0)
        self.ended = self.began

    def open(self) -> None:
        """Create nothing."""

    def append_to_log(self, line: str) -> None:
        """Keep nothing."""

    def save(self, state: TrainingState, step: int, metrics: dict, collapse: object = None) -> None:
        """Save nothing."""

    def steps(self) -> Iterator[int]:
        """Yield the steps to take.

        The clock starts with the first, anew after the warm-up, and once more when the batches that
        were made ahead are used up: a short run ends before the second start, a slow one before the
        third.
        """
        for step in range(1, self.last_step + 1):
            if step in (1, WARM_UP_STEPS + 1, self.steady_step + 1):
                self._start_clock(step - 1)
            yield step

    def _start_clock(self, after_step: int) -> None:
        wait_for(self.accelerator.device)
        self.began = time.monotonic()
        self.began_after = after_step
        self.waited_before = self.waited

    def what_is_due(
        self, step: int, stop_signals: list[int], failure: str, knn_is_due: bool
    ) -> Due:
        """Return what follows a step: no file, and the end once enough is timed. A collective."""
        due = super().what_is_due(step, stop_signals, failure, knn_is_due)
        is_long = step > WARM_UP_STEPS and time.monotonic() - self.began > TIMED_SECONDS
        (is_over,) = self.agreement.largest(step == self.last_step or is_long)
        due = due._replace(evaluates=False, saves=False, ends=due.ends or bool(is_over))
        if due.ends:  # here, since the workers may take seconds to end
            wait_for(self.accelerator.device)
            self.ended = time.monotonic()
        return due

    def seconds_a_step(self, step: int) -> tuple[float, float]:
        """Return how long a step took since the clock started, and how long it waited for data.

        `step` is the last one.
        """
        num_steps = step - self.began_after
        seconds = self.ended - self.began
        return seconds / num_steps, (self.waited - self.waited_before) / num_steps

    def report(
        self, console: Console, step: int, crops: list[Tensor], multi_crop: MultiCrop
    ) -> None:
        """Print what the timed steps tell of the run, and write crops.png under an unused name."""
        if not self.accelerator.is_main_process:
            return
        num_steps = step - self.began_after
        seconds_a_step, waited_a_step = self.seconds_a_step(step)
        speed = self.images_per_step / seconds_a_step
        file = self._draw_crops(crops, multi_crop)
        whole_run = duration(self.seconds_left(0, seconds_a_step, waited_a_step))
        device = self.accelerator.device
        memory_of = "device" if device.type == "cuda" else "process"
        console.print(f"dry run: nothing but {file.name} was written", markup=False)
        at_speed = f"{three_digits(speed)} images/s, {seconds_a_step:.3g} s a step"
        rows = {
            "speed": f"{at_speed}, over {num_steps}",
            "waiting": f"{waited_a_step / seconds_a_step:.0%} of the time, for data",
            "memory": f"{peak_memory(device):.2f} GiB at most, of the {memory_of}",
            "whole run": f"{whole_run} for {self.total_steps:,} steps, without k-NN and saving",
            "crops": str(file),
        }
        print_rows(console, rows)

    def _draw_crops(self, crops: list[Tensor], multi_crop: MultiCrop) -> Path:
        """Write all crops of up to eight images as one picture, and return its path."""
        num_images = min(8, len(crops[0]))
        cells = []
        for row in range(num_images):
            cells += crop_cells(crops, multi_crop.mean, multi_crop.std, row)
        title = f"crops of {num_images} images, as the network sees them"
        shown = shown_channels(multi_crop.num_channels)
        if shown:
            title += f"; {shown}"
        if self.config.run.output_dir is None:  # beside the folder that the run itself would take
            folder, name = self.folder.parent, f"{self.folder.name}-crops"
        else:
            folder, name = self.folder, "crops"
        folder.mkdir(parents=True, exist_ok=True)
        file = unused_path(folder, name, ".png")
        write_picture(file, sheet(title, cells, len(crops)))
        return file


class FirstSteps(DryRun):
    """The steps that --minutes is measured by, of a run that follows them in the same folder."""

    writes_nothing = False  # the run can use the index of a long scan
