"""Every setting of a run, its recipes and its command line.

`python dino_train.py --help` shows the comments below as the flags' help; a flag is a field's name.
ModelConfig stands in models.py and CropConfig in data.py, which work without this file.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro
import yaml

from data import CropConfig, ImageDataset, resolve_crop_sizes
from distributed import cores_per_process, is_set
from models import ModelConfig, get_backbone

T = TypeVar("T")
QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"


@dataclass(frozen=True)
class DataConfig:
    # `patterns` (drawn by code), a folder of images with or without class folders, a tar or a
    # folder of tars, or a torchvision set: cifar10, cifar100, stl10, imagenette ... (downloaded to
    # datasets/)
    data: str = "patterns"
    # pixels, side of the square that images are decoded to; None: their own size, at most 384
    canvas_size: int | None = None
    # pixels, shorter side before the center crop of an evaluation [paper: 256 for a crop of 224];
    # None: in that proportion for photographs, no margin for small images
    eval_resize: int | None = None
    # decoding processes of each process; None: one less than its cores, at most 16
    num_workers: int | None = None


@dataclass(frozen=True)
class OptimConfig:
    epochs: int = 100  # passes over the data [paper: 100 to 800]
    # images a process and micro-batch; the header shows the whole batch [paper: 1024]
    batch_size: int = 64
    accumulation_steps: int = 1  # micro-batches a step: a larger batch in the same memory
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"  # [paper: adamw; lars for ResNet-50]
    lr: float = 5e-4  # peak for 256 images, scaled by the whole batch / 256 [paper: 5e-4]
    min_lr: float = 1e-6  # at the end, not scaled [paper: 1e-6]
    warmup_epochs: float = 10  # of the learning rate, from 0 [paper: 10]
    weight_decay: float = 0.04  # at the start; none on biases and 1-d parameters [paper: 0.04]
    weight_decay_end: float = 0.4  # at the end, along a cosine [paper: 0.4]
    clip_grad: float = 3.0  # norm of each parameter's gradient, at most; 0: off [paper: 0 to 3]
    # epochs in which the head's last layer waits; raise it if the loss does not fall [paper: 1]
    freeze_last_layer_epochs: int = 1

    def images_per_step(self, world: int) -> int:
        """Give the whole batch, over `world` processes and their micro-batches."""
        return self.batch_size * world * self.accumulation_steps


@dataclass(frozen=True)
class TeacherConfig:
    student_temp: float = 0.1  # softens the student's softmax [paper: 0.1]
    warmup_teacher_temp: float = 0.04  # at first; lower it if the loss stays at ln K [paper: 0.04]
    teacher_temp: float = 0.04  # after the warm-up; above 0.07 is unstable [paper: 0.04 to 0.07]
    # epochs, linear from one temperature to the other [paper: 30, for a teacher_temp of 0.07]
    warmup_teacher_temp_epochs: int = 0
    # of the EMA at first, 1 at the end; 0.9995 for batch 256, less for short runs [paper: 0.996]
    teacher_momentum: float = 0.996
    center_momentum: float = 0.9  # of the center's EMA [paper: 0.9]


@dataclass(frozen=True)
class RunConfig:
    config: Path | None = None  # a YAML recipe, or a run's config.yaml; flags override it
    output_dir: Path | None = None  # for the run's files; None: runs/DATA-ARCH, numbered
    # a few real steps, then speed, memory, the time that the run will take and crops.png; it writes
    # nothing else
    dry_run: bool = False
    resume: bool = False  # go on with the run of --output-dir; also: --resume FOLDER
    overwrite: bool = False  # delete the run that --output-dir holds
    # weights to start from: a ckpt.safetensors, an original's .pth, or a name such as dino_vits16;
    # its head too, where it has one; --resume goes on with a run instead
    init_from: str | None = None
    init_network: Literal["teacher", "student"] = "teacher"  # of --init-from, where it holds both
    seed: int = 0  # of weights, order and crops
    # of the networks; loss, center and EMA are float32; None: bf16 on a GPU (fp16 on old ones),
    # else no
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    # BatchNorm over the batches of all GPUs, where there are several; CPUs have none
    sync_bn: bool = True
    # torch.compile the networks' blocks, which takes minutes at first; the default is to, on a GPU
    compile: bool = torch.cuda.is_available()
    save_every: int = 1000  # steps between saved states; also at the end
    save_minutes: float = 30.0  # minutes between saved states at most; 0: by steps alone
    keep_last: int = 1  # saved states to keep, the older ones as state-STEP and ckpt-STEP
    keep_every: int = 0  # epochs between teachers to keep for good, as ckpt-epoch-N; 0: none
    log_every: int = 10  # steps between lines of log.jsonl
    stop_on_collapse: bool = False  # end the run where the teacher stays uniform or one-hot
    knn_every: int = 10  # epochs; the teacher's k-NN, also before and after; 0: never
    knn_images: int = 50_000  # training images that this k-NN remembers, at most
    log_with: Literal["tensorboard", "wandb"] | None = None  # a tracker besides log.jsonl


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def model_config(self) -> ModelConfig:
        return self.model


def recipe_flags(path: Path) -> list[str]:
    """Read a YAML recipe, {section: {field: value}}, as the flags that say the same.

    Raises ValueError for a file that is none, and for unknown keys, with close matches.
    """
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    known = {s.name: [f.name for f in fields(s.default_factory)] for s in fields(Config)}
    if not isinstance(recipe, dict) or not all(isinstance(x, dict) for x in recipe.values()):
        raise ValueError(f"{path}: need sections {', '.join(known)} with keys under them")
    flags = []
    for section, values in recipe.items():
        for name in [section] if section not in known else values:
            names = known.get(section, known)
            if name not in names:
                close = ", ".join(difflib.get_close_matches(str(name), names)) or "none"
                raise ValueError(f"{path}: unknown key {name!r}; close matches: {close}")
        for name, value in values.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return flags


SHARES = ("probability", "momentum", "rate", "brightness", "contrast", "saturation", "hue")
ABOVE_ZERO = {
    *("epochs", "batch_size", "lr", "student_temp", "warmup_teacher_temp", "teacher_temp", "std"),
    *("patch_size", "image_size", "canvas_size", "eval_resize", "global_crop_size", "blur_sigma"),
    *("projection_hidden_dim", "projection_bottleneck_dim", "projection_output_dim"),
    *("local_crop_size", "save_every", "log_every", "knn_images", "accumulation_steps"),
    "keep_last",
}


def check_values(config: Config) -> None:
    """Raise ValueError for the first number out of its range, naming its flag."""
    for section in fields(config):
        for name, value in dataclasses.asdict(getattr(config, section.name)).items():
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int | float):
                    continue
                most = 1 if name.endswith(SHARES) else 1 << 62 if name == "seed" else 1e38
                too_low = number <= 0 if name in ABOVE_ZERO else number < 0
                if too_low or not number <= most:
                    bounds = (">" if name in ABOVE_ZERO else ">=") + " 0"
                    bounds += f" and <= {most}" if number > 0 else ""
                    raise ValueError(f"need --{name.replace('_', '-')} {bounds}, got {number}")
    if config.run.overwrite and config.run.output_dir is None:
        raise ValueError("--overwrite needs the --output-dir whose run it deletes")
    if config.run.dry_run and (config.run.resume or config.run.overwrite):
        raise ValueError(
            "--dry-run starts anew and deletes nothing: not with --resume, --overwrite"
        )
    if config.run.init_from and config.model.pretrained:
        raise ValueError("--init-from and --pretrained both name weights to start from: need one")
    tracker = config.run.log_with
    # a folder of its name is found too, without an origin
    if tracker and getattr(importlib.util.find_spec(tracker), "origin", None) is None:
        raise ValueError(f"--log-with {tracker} needs that package: pip install {tracker}")


def default_precision() -> str:
    """Give what --mixed-precision is where neither it nor accelerate launch says."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no" or not torch.cuda.is_available() or is_set("ACCELERATE_USE_CPU"):
        return launched
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "no" if is_set("ACCELERATE_USE_FSDP") else "fp16"


def settle_precision(config: Config) -> Config:
    """Fill in --mixed-precision where it is None. Raises ValueError for values out of range."""
    check_values(config)
    precision = config.run.mixed_precision or default_precision()
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed-precision fp16 needs a GPU, got none: need bf16 or no")
    return replace(config, run=replace(config.run, mixed_precision=precision))


def resolve(config: Config, dataset: ImageDataset) -> Config:
    """Fill in what follows from data and architecture where it is None, for checked values.

    Raises ValueError for sizes that do not fit each other.
    """
    model, source = config.model, config.data
    short, long = dataset.typical_size()
    with torch.device("meta"):  # shapes alone: neither memory nor time
        patch_size = get_backbone(model.arch, patch_size=model.patch_size).patch_size
        crops = resolve_crop_sizes(config.crops, short, patch_size)
        size = crops.global_crop_size
        if model.image_size is None and not model.pretrained:
            model = replace(model, image_size=size)
        sizes = {"patch_size": model.patch_size, "image_size": model.image_size}
        backbone = get_backbone(model.arch, **sizes).eval()
        for crop_size in (size, crops.local_crop_size):
            try:
                backbone(torch.empty(1, 3, crop_size, crop_size))
            except Exception as error:
                reason = str(error).split("\n")[0]
                message = f"{model.arch} does not take crops of {crop_size} px: {reason}"
                raise ValueError(message) from error
    num_workers = source.num_workers
    if num_workers is None:
        in_memory = isinstance(dataset.images, torch.Tensor)
        num_workers = 0 if in_memory else min(16, max(1, cores_per_process() - 1))
    source = replace(
        source,
        data=os.path.abspath(source.data) if os.path.exists(source.data) else source.data,
        canvas_size=source.canvas_size or min(long, 384),
        eval_resize=source.eval_resize or (round(size * 8 / 7) if short >= 192 else size),
        num_workers=num_workers,
    )
    if source.eval_resize < size:
        raise ValueError(f"need --eval-resize >= the crop of {size} px, got {source.eval_resize}")
    return replace(config, model=model, data=source, crops=crops)


def parse_config(args: Sequence[str], description: str | None = None) -> Config:
    """Build the Config of a command line: recipe, resumed run or quick start, then the flags.

    Raises ValueError for a recipe or run that cannot be read; wrong flags exit with code 2.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", nargs="?", const="", default=None)
    early.add_argument("--output-dir", "--output_dir", type=Path)
    known, flags = early.parse_known_args(args)
    recipe, output_dir = known.config, Path(known.resume) if known.resume else known.output_dir
    if known.resume is not None:
        saved = output_dir and output_dir / "config.yaml"
        if saved is None or not saved.is_file():
            raise ValueError(f"no run to resume: need a folder with config.yaml, got {output_dir}")
        if known.resume and known.output_dir not in (None, output_dir):
            raise ValueError(f"got --resume {output_dir} and --output-dir {known.output_dir}")
        if any(flag.startswith("--overwrite") for flag in flags):
            raise ValueError("--resume goes on with a run and --overwrite deletes it: need one")
        recipe, flags = recipe or saved, [*flags, "--resume"]
    elif recipe is None and not any(flag.split("=")[0] == "--data" for flag in flags):
        recipe = QUICKSTART
    if recipe is not None:
        flags = [*recipe_flags(recipe), *flags, "--config", str(recipe)]
    if output_dir is not None:
        flags += ["--output-dir", str(output_dir)]
    return read_flags(Config, flags, description)


def read_flags(kind: type[T], flags: Sequence[str] | None, description: str | None) -> T:
    """Read flags, or the command line's, as a dataclass; the first of several processes speaks."""
    speaks = os.environ.get("RANK", "0") == "0"
    flat = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, args=flags, description=description, config=flat, console_outputs=speaks)
