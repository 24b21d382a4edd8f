"""From a command line to a finished Config: recipes, checks, what follows from data and machine.

A Config is built by `parse_config`, checked by `check_values` before anything is opened, and
finished by `finish` once the images are known.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import nn

from config import SETTINGS, Config
from data import NAMED_SETS, ImageDataset, Survey
from harness.bf16_on_cpu import WORTH_CHANGING, bf16_gain, has_bf16
from harness.command import read_flags
from harness.convolutions import multiply_for_weight_gradients, products_are_faster
from harness.defaults import RECIPE_DEFAULTS, fill_in
from harness.distributed import (
    crashes_in_channels_last,
    is_on_cpu,
    is_set,
    num_local_processes,
    num_shards,
    usual_workers,
)
from harness.estimate import memory_of_machine
from models import ModelConfig, get_backbone, load_tensors
from multicrop import IMAGENET_MEAN, IMAGENET_STD, CropConfig, resolve_crop_sizes

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"

# ---------------------------------------------------------------- the command line


def parse_config(args: Sequence[str], description: str | None = None) -> Config:
    """Return the Config of a command line: recipe, resumed run or quick start, then the flags.

    Raises ValueError for a recipe or run that cannot be read; wrong flags exit with code 2.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", nargs="?", const="", default=None)  # with or without a folder
    early.add_argument("--output-dir", "--output_dir", type=Path)
    known, flags = early.parse_known_args(args)
    recipe, output_dir = _recipe_file(known.config), known.output_dir
    names_data = any(flag.split("=")[0] == "--data" for flag in flags)
    if known.resume is not None:
        output_dir = _folder_to_resume(known.resume, known.output_dir, flags)
        recipe = recipe or output_dir / "config.yaml"
        flags = [*flags, "--resume"]
    elif recipe is None and not names_data:
        recipe = QUICKSTART
    if recipe is not None:
        file_flags = recipe_flags(recipe)
        if "--data" not in file_flags and not names_data:
            of_recipe = _data_of(recipe) or "images of your own"
            raise ValueError(f"need --data PATH: {recipe} is for {of_recipe}")
        if known.resume is not None and known.config is None:
            file_flags += _batch_flags(output_dir / "state.safetensors")
        if known.resume is not None and known.config is not None:
            file_flags += _flags_that_stay(output_dir / "config.yaml")
        # of a flag that stands several times the last counts: what was typed overrides the file
        flags = [*_recipe_default_flags(), *file_flags, *flags, "--config", str(recipe)]
    if output_dir is not None:
        flags = [*flags, "--output-dir", str(output_dir)]
    return read_flags(Config, flags, description)


def _flags_that_stay(config_file: Path) -> list[str]:
    """Return the flags of a run's config.yaml that a resumed run changes where they are typed.

    Another recipe beside --resume, or another machine, does not change them.
    """
    saved = recipe_flags(config_file)
    staying: list[str] = []
    for flag in ("--lr", "--clip-grad", "--mixed-precision"):
        if flag in saved:
            place = saved.index(flag)
            staying += saved[place : place + 2]
    return staying


def _recipe_default_flags() -> list[str]:
    """Return what holds for all that a recipe does not say, as flags."""
    flags: list[str] = []
    for name, value in RECIPE_DEFAULTS.items():
        flags += _flags_of(name.replace("_", "-"), value)
    return flags


def _recipe_file(given: Path | None) -> Path | None:
    """Return the file of --config, which may be the name alone of one of our recipes."""
    if given is None or (given.exists() and not given.is_dir()):
        return given
    ours = {file.stem: file for file in sorted(QUICKSTART.parent.glob("*.yaml"))}
    if str(given) in ours:  # also beside a folder of that name
        return ours[str(given)]
    if (given / "config.yaml").is_file():  # the folder of a run
        return given / "config.yaml"
    if given.stem in ours and given.parent.name in ("", "recipes"):  # else a file that is not there
        return ours[given.stem]
    close = ", ".join(difflib.get_close_matches(given.stem, ours)) or ", ".join(ours)
    raise ValueError(f"no such recipe: {given}; close matches in {QUICKSTART.parent}: {close}")


def _data_of(recipe: Path) -> str:
    """Return what a recipe's header says of the images that it is for, or nothing."""
    found = re.search(r"^#\s+data\s+(.+)$", recipe.read_text(), flags=re.MULTILINE)
    return found[1] if found else ""


def _folder_to_resume(given: str, output_dir: Path | None, flags: list[str]) -> Path:
    """Return the folder of --resume FOLDER, or of --resume with --output-dir."""
    folder = Path(given) if given else output_dir
    if folder is None or not (folder / "config.yaml").is_file():
        raise ValueError(f"no run to resume: need a folder with config.yaml, got {folder}")
    if output_dir not in (None, folder):
        raise ValueError(f"got --resume {folder} and --output-dir {output_dir}: need one folder")
    if any(flag.startswith("--overwrite") for flag in flags):
        raise ValueError("--resume goes on with a run and --overwrite deletes it: need one")
    return folder


def _batch_flags(state_file: Path) -> list[str]:
    """Return the batch that a saved state goes with, as flags.

    config.yaml may have another: that of a start on other processes which was killed unsaved.
    """
    if not state_file.is_file():
        return []
    _, texts = load_tensors(state_file, only_metadata=True)
    try:
        optim = json.loads(texts["metadata"])["config"]["optim"]
    except (KeyError, TypeError, ValueError):  # SavedRun.read says it
        return []
    flags: list[str] = []
    for name in ("batch_size", "accumulation_steps"):
        if name in optim:
            flags += _flags_of(name.replace("_", "-"), optim[name])
    return flags


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which can multiply without end, tags, and keys that stand twice."""

    def compose_node(self, parent: object, index: object) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError(f"need values, got an alias in line {event.start_mark.line + 1}")
        if getattr(event, "tag", None):
            place = f"the tag {event.tag} in line {event.start_mark.line + 1}"
            raise yaml.YAMLError(f"need plain values, got {place}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {name!r:.50} stands twice, from line {line} on")
        return super().construct_mapping(node, deep)


def recipe_flags(path: Path) -> list[str]:
    """Read a YAML recipe, {section: {setting: value}}, as the flags that say the same.

    Raises ValueError for a file that is no recipe, and for unknown keys, with close matches.
    """
    try:
        recipe = yaml.load(path.read_text(), Loader=_PlainLoader) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if isinstance(recipe, dict):
        _require_known(recipe, SETTINGS, path)
    if not isinstance(recipe, dict) or not all(isinstance(x, dict) for x in recipe.values()):
        raise ValueError(f"{path}: need sections {', '.join(SETTINGS)} with keys under them")
    flags: list[str] = []
    for section, values in recipe.items():
        _require_known(values, SETTINGS[section], path)
        for name, value in values.items():
            flags += _flags_of(name.replace("_", "-"), value)
    if not _can_be_read(flags):
        _name_wrong_value(recipe, path)
    return flags


def _can_be_read(flags: list[str]) -> bool:
    try:
        read_flags(Config, flags, None, is_silent=True)
    except SystemExit:
        return False
    return True


def _name_wrong_value(recipe: dict, path: Path) -> None:
    """Raise ValueError for the first value that is of another type than its setting."""
    for section, values in recipe.items():
        for name, value in values.items():
            if not _can_be_read(_flags_of(name.replace("_", "-"), value)):
                kind = SETTINGS[section][name].type
                words = kind.__name__ if isinstance(kind, type) else str(kind)
                words = words.replace("typing.", "").replace("pathlib.", "")
                raise ValueError(f"{path}: need {words} for {name}, got {value!r:.100}")


def _require_known(given: dict, known: dict, path: Path) -> None:
    for name in given:
        if name not in known:
            close = ", ".join(difflib.get_close_matches(str(name), known)) or "none"
            raise ValueError(f"{path}: unknown key {name!r}; close matches: {close}")


def _flags_of(flag: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}", *map(str, values)]


# ---------------------------------------------------------------- checks

LARGEST = 1e38  # near the end of float32's range


def check_values(config: Config) -> None:
    """Raise ValueError for numbers out of range, and for flags that contradict each other."""
    check_ranges(config)
    _check_precision(config)
    _check_channels(config)
    run = config.run
    for flag, text in (
        ("--output-dir", None if run.output_dir is None else os.fspath(run.output_dir)),
        ("--init-from", run.init_from),
        ("--data", config.data.data),
    ):
        # Path("") is ".": the current folder is never meant for a run's files
        if text is not None and (not text.strip() or (flag == "--output-dir" and text == ".")):
            raise ValueError(f"need a name for {flag}, got {text!r}")
    _require_memory_for_weights(config)
    if run.overwrite and run.output_dir is None:
        raise ValueError("--overwrite needs the --output-dir whose run it deletes")
    if config.optim.minutes is not None and run.resume:
        raise ValueError("--minutes chooses the epochs of a new run: not with --resume")
    if run.dry_run and (run.resume or run.overwrite):
        text = "--dry-run starts anew and deletes nothing: no --resume or --overwrite with it"
        raise ValueError(text)
    if run.init_from and config.model.pretrained:
        raise ValueError("--init-from and --pretrained both name weights to start from: need one")
    if run.probe_every and (not run.knn_every or run.probe_every % run.knn_every):
        given = f"--probe-every {run.probe_every}"
        text = "a multiple of --knn-every, with which it shares its features"
        raise ValueError(f"{given}: need {text}, and that is {run.knn_every}")
    if run.log_with and not is_installed(run.log_with):
        text = f"--log-with {run.log_with} needs that package: pip install {run.log_with}"
        raise ValueError(text)


def _check_channels(config: Config) -> None:
    """Raise ValueError for numbers by channel that are not as many as the channels."""
    channels, levels = config.model.channels, config.data.levels
    if levels is not None:
        given = " ".join(f"{level:g}" for level in levels)
        if len(levels) not in (2, 2 * channels):
            counts = "two" if channels == 1 else f"two or {2 * channels}"
            raise ValueError(f"need {counts} numbers for --levels, got {len(levels)}: {given}")
        for low, high in zip(levels[::2], levels[1::2], strict=True):
            if not low < high:
                raise ValueError(f"need --levels LOW HIGH with LOW < HIGH, got {low} {high}")
    for name in ("mean", "std"):
        values = getattr(config.crops, name)
        if values is not None and len(values) != channels:
            given = f"{len(values)} with --channels {channels}"
            raise ValueError(f"need as many numbers for --{name} as channels, got {given}")


def memory_of_process() -> tuple[int, str]:
    """Return the bytes that a process can have for its networks, and where; 0: it is not known."""
    if torch.cuda.is_available() and not is_on_cpu():
        return torch.cuda.get_device_properties(0).total_memory, "the GPU has"
    total = memory_of_machine() or 0
    return total // num_local_processes(), "the machine has for each process"


def _require_memory(num_bytes: int, what: str, flags: str) -> None:
    """Raise ValueError where that many bytes are more than there can be.

    It is less than a run takes, which needs memory for the network's activations, too.
    """
    total, where = memory_of_process()
    if total and num_bytes > total:
        given = f"{what} need {num_bytes:,} bytes, and {where} {total:,}"
        raise ValueError(f"{given}: need a smaller {flags}")


def _require_memory_for_weights(config: Config, num_backbone: int = 0) -> None:
    """Raise ValueError where student, teacher, gradient and optimizer are more than there is."""
    model = config.model
    hidden, bottleneck = model.projection_hidden_dim, model.projection_bottleneck_dim
    output_dim = model.projection_output_dim or 0  # as long as it is not known
    num_head = hidden * hidden + hidden * bottleneck + bottleneck * output_dim
    copies = 5 if config.optim.optimizer == "adamw" else 4  # the others keep one of AdamW's two
    num_bytes = 4 * copies * (num_head + num_backbone) // num_shards()
    flags = "--projection-output-dim, --projection-hidden-dim or --projection-bottleneck-dim"
    if num_backbone > num_head:
        flags = "--arch"
    _require_memory(num_bytes, "student, teacher, gradients and optimizer", flags)


def _require_memory_for_batch(config: Config) -> None:
    """Raise ValueError where a batch's canvases and crops are more than there is."""
    crops = config.crops
    pixels = 2 * crops.global_crop_size**2 + crops.num_local_crops * crops.local_crop_size**2
    channels = config.model.channels
    each = channels * (config.data.canvas_size**2 + 4 * pixels)  # uint8 canvases, float32 crops
    flags = "--batch-size (with more --accumulation-steps), --canvas-size or crop size"
    _require_memory(config.optim.batch_size * each, "a batch's canvases and crops", flags)


def check_ranges(options: object) -> None:
    """Raise ValueError for a number in a dataclass, or in one within it, that is out of range."""
    for each in dataclasses.fields(options):
        value = getattr(options, each.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        else:
            _check_range(f"--{each.name.replace('_', '-')}", value, each.metadata)


def _check_range(flag: str, value: object, bounds: dict) -> None:
    """Raise ValueError for a number, or one of a tuple's, that is out of its setting's range."""
    lowest = f"> {bounds['above']}" if "above" in bounds else ">= 0"
    most = bounds.get("most", LARGEST)
    for number in value if isinstance(value, tuple | list) else (value,):
        if not isinstance(number, int | float):
            continue
        is_low_enough = number <= most  # false for nan, too
        is_high_enough = number > bounds["above"] if "above" in bounds else number >= 0
        if "below" in bounds and number >= bounds["below"]:
            raise ValueError(f"need {flag} {lowest} and < {bounds['below']}, got {number}")
        if not is_high_enough:
            raise ValueError(f"need {flag} {lowest}, got {number}")
        if not is_low_enough:
            raise ValueError(f"need {flag} {lowest} and <= {most}, got {number}")


def wrong_setting(config: object) -> str:
    """Return what in a saved config is not of its setting's type or range, or nothing.

    Settings that this version does not know, and those that are not there, are left to the caller.
    """
    if not isinstance(config, dict) or not all(isinstance(x, dict) for x in config.values()):
        return f"its config is {config!r:.50}: need sections with settings"
    for section, settings in SETTINGS.items():
        for name, value in config.get(section, {}).items():
            if name not in settings:
                continue
            kind = _kinds_of(section)[name]
            try:
                if not _is_of(value, kind):
                    raise ValueError(f"need {name} as {kind}, got {value!r:.50}")
                _check_range(name, value, settings[name].metadata)
            except ValueError as error:
                return str(error)
    channels = config.get("model", {}).get("channels", 3)
    for name in ("mean", "std"):
        values = config.get("crops", {}).get(name)
        if values is not None and len(values) != channels:
            return f"need {name} of {channels} channels, got {len(values)} numbers"
    return ""


def _kinds_of(section: str) -> dict[str, object]:
    return typing.get_type_hints(type(getattr(Config(), section)))


def _is_of(value: object, kind: object) -> bool:
    """Tell whether a value that YAML or JSON read is of a setting's type."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in parts
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return False
        if parts[-1] is Ellipsis:
            return bool(value) and all(_is_of(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_is_of, value, parts))
    if parts:  # a union
        return any(_is_of(value, part) for part in parts)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (str if kind is Path else kind)


def is_installed(package: str) -> bool:
    """Tell whether a package, by its name for pip, can be imported."""
    # a folder of the package's name is found too, but has no origin
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return spec is not None and spec.origin is not None


def _check_precision(config: Config) -> None:
    """Raise ValueError for fp16 where it cannot be, and for a launcher's fp8."""
    precision = config.run.mixed_precision or default_precision()
    if precision not in (None, "no", "bf16", "fp16"):
        raise ValueError(f"need bf16, fp16 or no for --mixed_precision, got {precision}")
    if precision != "fp16":
        return
    if is_on_cpu() or not torch.cuda.is_available():
        raise ValueError("--mixed-precision fp16 needs a GPU, got none: need bf16 or no")
    if is_set("ACCELERATE_USE_FSDP"):
        raise ValueError("FSDP trains in bf16 or float32, got --mixed-precision fp16")


def choose_precision(
    given: str | None, model: ModelConfig, crop_size: int, batch_size: int
) -> tuple[str, list[str]]:
    """Return the precision given, or what launcher, GPU and CPU imply where it is None; and why.

    Why is one line where it was measured, on steps of the network with two crops of `crop_size`
    pixels for each of `batch_size` images; elsewhere there is none.
    """
    precision = given or default_precision()
    if precision is not None:
        return precision, []
    gain = gain_of_bf16(model, crop_size, num_crops=2 * batch_size)
    precision = "bf16" if gain >= WORTH_CHANGING else "no"
    measured = f"{model.arch} trains {gain:.1f} times as fast in bf16 as in float32"
    return precision, [f"chosen for this CPU: --mixed-precision {precision}; {measured}"]


def default_precision() -> str | None:
    """Return accelerate launch's precision or, where it has none, the best of the GPU.

    On a CPU it is float32; None where bf16 may be faster, by its arithmetic. Several processes
    take float32 there: each would measure for itself, and they could differ.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        return launched
    if is_on_cpu():
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        return None if is_alone and has_bf16() else "no"
    return fastest_on_gpu() if torch.cuda.is_available() else "no"


def fastest_on_gpu() -> str:
    """Return bf16 where the GPU has arithmetic for it, else fp16, which FSDP does not take: no."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "no" if is_set("ACCELERATE_USE_FSDP") else "fp16"


def backbone_of(model: ModelConfig) -> nn.Module:
    """Build a run's backbone to measure or to try it, with random weights."""
    return get_backbone(
        model.arch,
        patch_size=model.patch_size,
        image_size=model.image_size,
        channels=model.channels,
    )


@functools.cache  # so that the two runs of --minutes in one process have one answer
def gain_of_bf16(model: ModelConfig, crop_size: int, num_crops: int) -> float:
    """Measure how many times as fast as in float32 a network trains in bf16 on this CPU."""
    backbone = backbone_of(model)
    if not crashes_in_channels_last(backbone):
        backbone = backbone.to(memory_format=torch.channels_last)
    if products_are_faster():  # as in training, unless blocks are compiled
        multiply_for_weight_gradients(backbone)
    return bf16_gain(backbone, crop_size, num_crops)


# ---------------------------------------------------------------- what follows


def finish(config: Config, dataset: ImageDataset, survey: Survey, world: int = 1) -> Config:
    """Return the config with what follows from images, architecture and machine filled in.

    These are sizes, levels, mean and deviation, workers, the data's path, precision and what else
    was left open; `survey` tells what the images are like, `world` is the number of processes. The
    data set has its levels from then on, and notes what was chosen. Raises ValueError for sizes
    that do not fit each other.
    """
    config, choices = fill_in(config, len(dataset), config.optim.images_per_step(world))
    dataset.notes += choices
    batch_size = config.optim.batch_size
    if config.optim.koleo_weight and batch_size < 2:
        raise ValueError("need --batch-size of at least 2 for --koleo-weight, got 1")
    model, crops = _fit_sizes(
        config.model, config.crops, survey.short, config.data.eval_size, batch_size
    )
    data = config.data
    dataset.levels = data.levels or survey.levels
    crops = _with_mean_and_std(crops, dataset)
    eval_size = data.eval_size or crops.global_crop_size
    eval_resize = data.eval_resize
    if eval_resize is None:  # the paper's 256 for 224, in proportion; no margin for small images
        eval_resize = round(eval_size * 8 / 7) if survey.short >= 192 else eval_size
    if eval_resize < eval_size:
        raise ValueError(f"need --eval-resize >= the crop of {eval_size} px, got {eval_resize}")
    num_workers = data.num_workers
    if num_workers is None:
        is_in_memory = isinstance(dataset.images, torch.Tensor)
        num_workers = 0 if is_in_memory else usual_workers()
    data = replace(
        data,
        data=_absolute(data.data),
        val=_absolute(data.val),
        knn_data=_absolute(data.knn_data),
        levels=dataset.levels,
        canvas_size=data.canvas_size or _canvas_for(survey.long),
        eval_size=eval_size,
        eval_resize=eval_resize,
        num_workers=num_workers,
    )
    if survey.short >= 10 * data.canvas_size:
        resized = f"images of {survey.short:,} px are resized to {data.canvas_size} px"
        more = "cut them into tiles, or raise --canvas-size and the crop sizes"
        dataset.notes.append(f"{resized}: for small things in them, {more}")
    finished = replace(config, model=model, data=data, crops=crops)
    _require_memory_for_batch(finished)
    _require_memory_for_weights(finished, _num_backbone_parameters(model))
    # last, since it may build the network and take steps of it
    precision, why = choose_precision(
        config.run.mixed_precision, model, crops.global_crop_size, batch_size
    )
    dataset.notes += why
    return replace(finished, run=replace(config.run, mixed_precision=precision))


def _with_mean_and_std(crops: CropConfig, dataset: ImageDataset) -> CropConfig:
    """Fill in mean and deviation: ImageNet's for RGB, else those of some images."""
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if dataset.channels != 3 and None in (crops.mean, crops.std):
        mean, std = dataset.measure_mean_and_std()
    return replace(crops, mean=crops.mean or mean, std=crops.std or std)


def _num_backbone_parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        backbone = backbone_of(model)
    return sum(parameter.numel() for parameter in backbone.parameters())


def _absolute(data: str | None) -> str | None:
    """Return where data lie from any folder; the name of a data set stays as it is."""
    if data is None or data in NAMED_SETS or not os.path.exists(data):
        return data
    return os.path.abspath(data)


CANVAS_SIZES = (256, 384, 512)  # pixels; docs/data.md tells what each keeps, and its speed


def _canvas_for(longer_side: int) -> int:
    """Return the smallest canvas that holds a side; small images keep their own size."""
    if longer_side <= CANVAS_SIZES[0]:
        return longer_side
    return next((size for size in CANVAS_SIZES if size >= longer_side), CANVAS_SIZES[-1])


def _fit_sizes(
    model: ModelConfig, crops: CropConfig, image_size: int, eval_size: int | None, batch_size: int
) -> tuple[ModelConfig, CropConfig]:
    """Fill in crop sizes and image size; ValueError where the network does not take its crops.

    These are the crops of training and that of evaluations, if `eval_size` is not None.
    """
    with torch.device("meta"):  # shapes alone: neither memory nor time
        try:
            backbone = get_backbone(model.arch, patch_size=model.patch_size)
        except Exception as error:  # a network can raise anything for a patch of another size
            if isinstance(error, ValueError) or model.patch_size is None:
                raise
            given = f"--patch-size {model.patch_size}"
            raise ValueError(f"{model.arch} does not take {given}: {_reason(error)}") from error
        crops = resolve_crop_sizes(crops, image_size, backbone.patch_size)
        if model.image_size is None and not model.pretrained:
            model = replace(model, image_size=crops.global_crop_size)
        _require_that_it_takes(model, crops, eval_size, batch_size, _own_size(backbone))
    return model, crops


def _own_size(backbone: nn.Module) -> int:
    """Return the side in pixels of the images that a network was designed for."""
    return getattr(backbone, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]


def _require_that_it_takes(
    model: ModelConfig,
    crops: CropConfig,
    eval_size: int | None,
    batch_size: int,
    own_size: int,
) -> None:
    """Raise ValueError where a network cannot be built for its crops, or does not take them."""
    size, local_size = crops.global_crop_size, crops.local_crop_size
    another_size = "need another --global-crop-size"
    if own_size != size:
        another_size += f", such as its own {own_size}"
    try:
        backbone = backbone_of(model).train()  # in which BatchNorm refuses what it cannot normalise
    except Exception as error:  # a network can raise anything for a size that it was not made for
        given = f"images of {model.image_size} px"
        reason = _reason(error)
        raise ValueError(f"{model.arch} does not take {given}: {reason}; {another_size}") from error
    num_local = crops.num_local_crops
    calls = [(size, 2, another_size)]
    if num_local and local_size == size:  # crops of one size share a call
        calls = [(size, 2 + num_local, another_size)]
    elif num_local:
        remedy = f"need --num-local-crops 0, or --local-crop-size {size}"
        calls.append((local_size, num_local, remedy))
    if eval_size is not None:
        calls.append((eval_size, 2, "need another --eval-size"))
    for crop_size, num_views, remedy in calls:
        num = num_views * batch_size
        try:
            features = backbone(torch.empty(num, model.channels, crop_size, crop_size))
            _require_vectors(features, num, backbone.output_dim)
        except Exception as error:
            given = f"crops of {crop_size} px, {num} in a batch"
            reason = _reason(error)
            raise ValueError(f"{model.arch} does not take {given}: {reason}; {remedy}") from error


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__


def _require_vectors(features: object, num: int, output_dim: int) -> None:
    """Raise ValueError where what a network returned is not one vector of features an image."""
    shape = getattr(features, "shape", type(features).__name__)
    if shape != (num, output_dim):
        raise ValueError(f"need features of shape ({num}, {output_dim}), got {shape}")


def fit_batch(config: Config, num_images: int, world: int) -> Config:
    """Return the config with a batch of `num_images` a step over `world` processes.

    A run that goes on on another number of processes keeps its images a step, by which their order
    is fixed. Raises ValueError where they cannot be shared evenly.
    """
    each, left = divmod(num_images, world)
    if left:
        text = f"{num_images} images a step need a number of processes that divides them"
        raise ValueError(f"cannot resume on {world} processes: {text}")
    largest = config.optim.batch_size  # which fitted in memory
    batch_size = max(n for n in range(1, largest + 1) if each % n == 0)
    if config.optim.koleo_weight and batch_size < 2:
        text = f"--koleo-weight needs micro-batches of 2 to {largest} that divide the {each} images"
        text += " of each"
        raise ValueError(f"cannot resume on {world} processes: {text}")
    optim = replace(config.optim, batch_size=batch_size, accumulation_steps=each // batch_size)
    return replace(config, optim=optim)


def as_plain_data(config: Config) -> dict:
    """Return the config as a run keeps it: plain data, without what belongs to one start."""
    kept: dict[str, dict] = {}
    for section, settings in SETTINGS.items():
        values = dataclasses.asdict(getattr(config, section))
        kept[section] = {
            name: _plain(value)
            for name, value in values.items()
            if not settings[name].metadata.get("of_one_start")
        }
    return kept


def _plain(value: object) -> object:
    """Return a value as YAML and JSON read it back: a tuple as a list, a path as text."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
