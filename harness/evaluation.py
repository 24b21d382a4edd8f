"""Evaluations of a frozen backbone: open it, prepare images as it knows them, compute features.

To add an evaluation: a script like eval_knn.py, whose main calls read_flags, open_backbone,
open_splits, features_of_splits, report and write_results. Images that cannot be decoded have no row
of features.

Source: DINO, arXiv 2104.14294, appendix F. Axes: n images, d features, b batch.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather
from einops import rearrange
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.table import Table
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as TF

from config import SETTINGS, Config, setting
from data import ImageDataset, Sample, build_dataset, collate
from folders import cache_folder
from harness.command import iterate, write_whole
from harness.feature_maps import PHOTO_CROP, chosen_side
from harness.feature_quality import feature_quality
from harness.flags import wrong_setting
from harness.foreign import Role
from harness.terminal import printable, printable_name
from harness.weights import (
    BACKBONE_CONFIG,
    UnknownArchitecture,
    Weights,
    WeightsFile,
    as_file,
    load_parts,
    networks_in,
    read_file,
    recognise,
    weights_of,
)
from models import (
    RESNETS,
    TIMM_NAMES,
    DinoModel,
    ModelConfig,
    get_backbone,
    rebuild_model,
    tensors_checksum,
    what_is_left,
)
from multicrop import CropConfig
from pixels import Levels, levels_in_words
from tar_shards import as_bytes


@dataclass(frozen=True)
class EvalConfig:
    # a run's folder, its ckpt.safetensors or state.safetensors, what export.py wrote, a .pth of
    # DINO, DINOv2, MAE ... (docs/weights.md), or the name of published weights: dino_vits16
    checkpoint: tyro.conf.Positional[str]
    # architecture of a file that does not say it and is not recognised: a name of timm's
    arch: str | None = None
    # images as training takes them: a folder, a tar, a list or a data set's name; None: what the
    # run trained on, or its --knn-data
    data: str | None = None
    # images to test on, as --data takes them; None: those of the run or, with --data, its own val
    # or test split, else a fixed tenth
    val: str | None = None
    # take folders called train, val and test for splits, and tars with these words in their names;
    # --no-splits: folders for classes, all tars for one data set
    splits: bool = True
    # which of a run's networks; the student is in state.safetensors, beside the checkpoint
    network: Role = "teacher"
    # images a forward pass
    batch_size: int = setting(256, above=0, most=1_000_000)
    # processes that decode images; 0: the script itself does; for photographs as many as cores
    num_workers: int = setting(0, most=512)
    # file for the results, as JSON
    json_out: Path | None = None


@dataclass(frozen=True)
class MapsConfig:
    # a run's folder, its ckpt.safetensors or state.safetensors, what export.py wrote, a .pth of
    # DINO, DINOv2, MAE ... (docs/weights.md), or the name of published weights: dino_vits16
    checkpoint: tyro.conf.Positional[str]
    # architecture of a file that does not say it and is not recognised: a name of timm's
    arch: str | None = None
    # pixels, shorter side of the images as the network sees them; None: 480 for photographs, as in
    # the paper; small images are enlarged from the evaluations' crop until 14 cells lie on it
    size: int | None = setting(None, above=0, most=4096)
    # which of a run's networks; the student is in state.safetensors, beside the checkpoint
    network: Role = "teacher"
    # file for the results, as JSON
    json_out: Path | None = None


# ---------------------------------------------------------------- open


@dataclass(frozen=True)
class Preparation:
    """Which images a network is evaluated on, and how they are prepared for it."""

    data: str | None  # a folder or a data set's name; None where the weights come without
    size: int  # pixels, side of the central crop
    resize: int  # pixels, shorter side before it
    mean: tuple[float, ...]  # of each channel within 0..1
    std: tuple[float, ...]
    val: str | None = None  # what tests; None: the data's own split, or a fixed tenth
    take_splits: bool = True  # folders called train, val and test are splits, not classes
    levels: Levels | None = None  # of images with more than 8 bits; None: measured
    channels: int = 3

    @classmethod
    def of_run(cls, config: Config) -> "Preparation":
        """Return how a run's own evaluations prepare images, by its finished config."""
        return cls(
            data=config.data.knn_data or config.data.data,
            size=config.data.eval_size,
            resize=config.data.eval_resize,
            mean=config.crops.mean,
            std=config.crops.std,
            val=config.data.val,
            take_splits=config.data.splits,
            levels=config.data.levels,
            channels=config.model.channels,
        )

    @classmethod
    def of_checkpoint(cls, metadata: dict) -> "Preparation | None":
        """Return what a checkpoint's metadata says, None where that is nothing."""
        config = metadata.get("config", {})
        if not {"data", "crops"} <= config.keys():
            return None
        data, crops = config["data"], config["crops"]
        levels = data.get("levels")  # not in the checkpoints of earlier versions, like the others
        return cls(
            data=data.get("knn_data") or data.get("data"),
            size=data.get("eval_size") or crops["global_crop_size"],
            resize=data["eval_resize"],
            mean=tuple(crops["mean"]),
            std=tuple(crops["std"]),
            val=data.get("val"),
            take_splits=data.get("splits", True),
            levels=None if levels is None else tuple(levels),
            channels=config.get("model", {}).get("channels", 3),
        )

    @classmethod
    def of_published(cls, backbone: nn.Module, config: ModelConfig) -> "Preparation":
        """Return what the paper has or, for another model of timm's, what timm says of it."""
        is_timms = config.pretrained and config.arch not in (*RESNETS, *TIMM_NAMES)
        return cls.of_timm(backbone.pretrained_cfg if is_timms else {}, config)

    @classmethod
    def of_timm(cls, timms: dict, config: ModelConfig) -> "Preparation":
        """Return what a configuration of timm's says, and the paper's where it does not.

        Its `interpolation` is not read: images are resized by bicubic interpolation here.
        """
        if config.channels != 3 and not {"mean", "std"} <= timms.keys():
            text = (
                f"need a file that says mean and standard deviation of {config.channels} channels"
            )
            raise ValueError(f"{text}, as those of export.py do")
        size = config.image_size or timms.get("input_size", (3, 224, 224))[-1]
        share = timms.get("crop_pct", 0.875 if size >= PHOTO_CROP else 1.0)
        return cls(
            data=None,
            size=size,
            resize=math.floor(size / share),  # as timm rounds it
            mean=tuple(timms.get("mean", IMAGENET_DEFAULT_MEAN)),
            std=tuple(timms.get("std", IMAGENET_DEFAULT_STD)),
            channels=config.channels,
        )


@dataclass(frozen=True)
class OpenedNetwork:
    """What a source holds: a model in eval mode on the CPU, and what is known of its images."""

    model: DinoModel
    metadata: dict  # a run's own, {} for other sources
    preparation: Preparation | None  # None where the file does not say it
    notes: tuple[str, ...] = ()  # lines: what was chosen, left out and guessed

    @property
    def arch(self) -> str:
        return self.model.config.arch

    @property
    def crops(self) -> CropConfig:
        """Return the crops that it was trained on, or the paper's where the file does not say."""
        if "config" in self.metadata:
            return CropConfig(**self.metadata["config"]["crops"])
        size, mean, std = self.preparation.size, self.preparation.mean, self.preparation.std
        return CropConfig(global_crop_size=size, mean=mean, std=std)

    @property
    def canvas_size(self) -> int:
        """Return the side in pixels of the squares that its images were decoded to."""
        return self.metadata.get("config", {}).get("data", {}).get("canvas_size") or 384


def open_network(
    source: str | Path, role: Role = "teacher", arch: str | None = None
) -> OpenedNetwork:
    """Open what is to be evaluated, a file or the name of published weights, and read it once.

    Raises ValueError for files that do not fit, OSError for a name whose published weights cannot
    be loaded.
    """
    path = as_file(source, role)
    if path is not None:
        return open_file(read_file(path), role, arch)
    if arch is not None:
        raise ValueError(f"--arch is for files: {source} is the name of published weights")
    name = str(source)
    config = ModelConfig(name, pretrained=True, original_pos_embed=name in TIMM_NAMES)
    return _open_backbone(config, None, source)


def open_file(file: WeightsFile, role: Role, arch: str | None = None) -> OpenedNetwork:
    """Open a network of a file that was read. What a run wrote has its head, others have none.

    `arch` is for a file that does not say it. Raises ValueError for what does not fit, of them
    UnknownArchitecture where only an `arch` is missing.
    """
    if file.is_checkpoint and file.texts["model_config"] == "null":
        text = "has a custom backbone: build it, then load the file's tensors"
        raise UnknownArchitecture(f"{file.path} {text}")
    if file.is_checkpoint:
        model, metadata = rebuild_model(file.path, file.content, file.texts)
        _check_metadata(metadata, file.path)
        if role == "student":
            _load_student_beside(file.path, model, metadata.get("step"))
        _require_finite(model, file.path)
        network = OpenedNetwork(model, metadata, Preparation.of_checkpoint(metadata))
    elif file.is_state:
        network = _open_state(file, role)
    elif BACKBONE_CONFIG in file.texts:
        config, preparation = _described(file)
        network = _open_backbone(config, weights_of(file, role), file.path, preparation)
    else:
        return _open_foreign(file, role, arch)
    if arch not in (None, network.arch):
        raise ValueError(f"{file.path} says that it is {network.arch}: not with --arch {arch}")
    return network


def _open_foreign(file: WeightsFile, role: Role, arch: str | None) -> OpenedNetwork:
    """Open a file that does not say of itself what this project's files say."""
    weights = weights_of(file, role)
    if arch is None and file.timm_config:
        arch = file.arch
    try:
        recognised = recognise(weights, file.path, arch)
    except UnknownArchitecture:
        if file.arch is None:
            raise
        recognised = recognise(weights, file.path, file.arch)
    config = recognised.config
    preparation, guessed = _preparation_beside(file, config), ()
    if preparation is None:
        size = config.image_size or 224
        text = f"it does not say how its images were prepared: ImageNet's colours, {size} px"
        guessed = (text,)
    weights = weights._replace(backbone=recognised.backbone)
    network = _open_backbone(config, weights, file.path, preparation)
    return replace(network, notes=(*network.notes, *recognised.notes, *guessed))


def _preparation_beside(file: WeightsFile, config: ModelConfig) -> Preparation | None:
    """Return what timm's config.json beside a file says, None where there is none."""
    timms = file.timm_config.get("pretrained_cfg")
    if not isinstance(timms, dict):
        return None
    try:
        preparation = Preparation.of_timm(timms, config)
        said = {
            "model": {"channels": config.channels},
            "crops": {"mean": preparation.mean, "std": preparation.std},
            "data": {"eval_resize": preparation.resize},
        }
        wrong = wrong_setting(said)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        wrong = str(error)
    if wrong:
        raise ValueError(f"config.json beside {file.path} is damaged: {wrong}")
    return preparation


# what an exported file says of its network, and of the preparation of its images
DESCRIBED = {
    "model": ("arch", "patch_size", "image_size", "original_pos_embed", "channels"),
    "crops": ("global_crop_size", "mean", "std"),
    "data": ("eval_size", "eval_resize", "levels"),
}


def describe(network: OpenedNetwork) -> str:
    """Return what an exported file has to say of its network, as JSON with names of settings.

    The network has a preparation, that of a run or one that was guessed.
    """
    config, preparation = network.model.config, network.preparation
    described = {"model": {name: getattr(config, name) for name in DESCRIBED["model"]}}
    described["crops"] = {
        "global_crop_size": network.crops.global_crop_size,
        "mean": preparation.mean,
        "std": preparation.std,
    }
    described["data"] = {
        "eval_size": preparation.size,
        "eval_resize": preparation.resize,
        "levels": preparation.levels,
    }
    return json.dumps(described)


def _wrong_in_described(said: object) -> str:
    """Return what in an exported file's words on itself is not as `describe` writes it."""
    wrong = wrong_setting(said)
    if wrong:
        return wrong
    for section, names in DESCRIBED.items():
        unknown = said.get(section, {}).keys() - set(names)
        if unknown:
            return f"it has unknown settings: {', '.join(unknown)}"
    resize = said.get("data", {}).get("eval_resize", 1)
    if resize is None or None in said.get("crops", {}).values():
        return "it lacks how its images were prepared"
    return ""


def _described(file: WeightsFile) -> tuple[ModelConfig, Preparation | None]:
    """Return what an exported file says of itself. ValueError where that is damaged."""
    try:
        said = json.loads(file.texts[BACKBONE_CONFIG])
        wrong = _wrong_in_described(said)
        if wrong:
            raise ValueError(wrong)
        return ModelConfig(**said["model"]), Preparation.of_checkpoint({"config": said})
    except (ValueError, KeyError, TypeError) as error:
        text = f"{BACKBONE_CONFIG} in the metadata of {file.path} is damaged: {error}"
        raise ValueError(text) from error


def _load_student_beside(checkpoint: Path, model: DinoModel, step: int | None) -> None:
    """Load a run's student, which its state keeps beside the teacher's checkpoint.

    Raises ValueError where there is no such state, or that of another step.
    """
    state_file = checkpoint.with_name(checkpoint.name.replace("ckpt", "state", 1))
    if state_file == checkpoint or not state_file.is_file():
        raise ValueError(f"{checkpoint} holds the teacher alone: need the run's state.safetensors")
    state = read_file(state_file)
    step_of_state = json.loads(state.texts.get("metadata", "{}")).get("step")
    if step_of_state != step:
        text = f"the student in {state_file.name} is of step {step_of_state}"
        raise ValueError(f"{text}: need step {step} of {checkpoint}")
    model.load_state_dict(networks_in(state).get("student", {}))


def _open_state(file: WeightsFile, role: Role) -> OpenedNetwork:
    """Rebuild one of the two networks in a run's state, with its head."""
    networks = networks_in(file)
    try:
        settings = json.loads(file.texts["metadata"])["config"]["model"]
        tensors = networks[role]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file.path} is no state of a run: it lacks its {role}") from error
    texts = {"model_config": json.dumps(settings), "metadata": file.texts["metadata"]}
    model, metadata = rebuild_model(file.path, tensors, texts)
    _check_metadata(metadata, file.path)
    _require_finite(model, file.path)
    return OpenedNetwork(model, metadata, Preparation.of_checkpoint(metadata))


def _check_metadata(metadata: dict, path: Path) -> None:
    """Raise ValueError naming what in a run's metadata is not what a run writes."""
    wrong = wrong_setting(metadata.get("config", {}))
    step, config = metadata.get("step"), metadata.get("config", {})
    if step is not None and (type(step) is not int or step < 0):
        wrong = f"need a step >= 0, got {step!r:.50}"
    if not wrong and {"data", "crops"} <= config.keys():
        needed = [("data", "data"), ("data", "eval_resize")]
        needed += [("crops", name) for name in ("global_crop_size", "mean", "std")]
        lacking = [name for section, name in needed if config[section].get(name) is None]
        if lacking:
            wrong = f"it lacks {', '.join(lacking)}"
        unknown = config["crops"].keys() - SETTINGS["crops"].keys()
        if unknown:
            wrong = f"it has unknown settings: {', '.join(sorted(unknown))}"
    if wrong:
        raise ValueError(f"the metadata of {path} is damaged: {wrong}{what_is_left(path)}")


def _open_backbone(
    config: ModelConfig,
    weights: Weights | None,
    source: object,
    preparation: Preparation | None = None,
) -> OpenedNetwork:
    """Build a backbone without head, with given weights or with those that are published."""
    backbone = get_backbone(
        config.arch,
        config.pretrained,
        patch_size=config.patch_size,
        image_size=config.image_size,
        original_pos_embed=config.original_pos_embed,
        channels=config.channels,
    )
    model = DinoModel(backbone, nn.Identity())
    model.config = config
    notes: tuple[str, ...] = ()
    if weights is not None:
        _, *lines, _ = load_parts(model, weights._replace(head={}), source)
        notes = tuple(lines)  # but for the first, on the backbone, and the last, on the head
        _require_finite(model, source)
    preparation = preparation or Preparation.of_published(backbone, config)
    return OpenedNetwork(model.eval(), {}, preparation, notes)


LARGEST_WEIGHT = 1e18  # its square is near the end of float32's range


def _require_finite(model: nn.Module, source: object) -> None:
    """Raise ValueError naming the first tensor of a model that has a nan or an infinity."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source} is damaged: {name} holds a nan or an infinity")
        if tensor.is_floating_point() and (tensor.abs() > LARGEST_WEIGHT).any():
            largest = tensor.abs().max().item()
            raise ValueError(f"{source} is damaged: {name} holds {largest:.3g}")


def require_preparation(network: OpenedNetwork, source: object) -> Preparation:
    """Return how the network's images are prepared. ValueError where its file does not say it."""
    if network.preparation is None:
        raise ValueError(f"{source} does not say how its images were prepared")
    return network.preparation


def check_folder(path: Path | None, content: str) -> None:
    """Raise ValueError where a file `path` could not be written, or would replace a run's own."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"no such folder for the {content}: {path.parent}")
    if path.is_dir():
        raise ValueError(f"need a file for the {content}, got the folder {path}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"no file for the {content} can be written to {path.parent}")
    if is_of_run(path):
        raise ValueError(f"need another file for the {content} than {path}, which a run saved")


def is_of_run(path: Path) -> bool:
    """Tell whether a file or folder is what a run saved in its own folder."""
    if not (path.parent / "config.yaml").is_file() or not path.exists():
        return False
    is_of_weights = path.suffix == ".safetensors" and path.name.startswith(("ckpt", "state"))
    return is_of_weights or path.name in ("config.yaml", "log.jsonl")


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone to evaluate, on its device, how its images are prepared, and facts to report."""

    backbone: nn.Module
    preparation: Preparation
    facts: dict


def open_backbone(options: EvalConfig, accelerator: Accelerator) -> FrozenBackbone:
    """Load what `options` name. Raises ValueError or OSError for what cannot be used."""
    check_folder(options.json_out, "results")
    role = options.network
    source = as_file(options.checkpoint, role) or options.checkpoint
    if role == "student" and not isinstance(source, Path):
        raise ValueError(f"{source} is published as one network: not with --network student")
    network = open_network(source, role, options.arch)
    for note in network.notes:
        accelerator.print(f"weights: {printable_name(note)}")
    step = network.metadata.get("step")
    preparation = require_preparation(network, source)
    if options.data is not None:
        preparation = replace(preparation, data=options.data, val=None, take_splits=True)
    if options.val is not None:
        preparation = replace(preparation, val=options.val)
    if not options.splits:
        preparation = replace(preparation, take_splits=False)
    if not preparation.data:
        raise ValueError(f"{source} does not come with data: need --data")
    facts = {
        "checkpoint": str(source),
        "network": role,
        "arch": network.arch,
        "step": step,
        "backbone_crc32": tensors_checksum(network.model.backbone.state_dict()),
        "data": preparation.data,
    }
    metrics = network.metadata.get("metrics") or {}
    are_own_images = options.data is None and options.val is None and options.splits
    if are_own_images and "knn_top1_untrained" in metrics:
        facts["knn_top1_untrained"] = metrics["knn_top1_untrained"]  # measured by the run itself
    backbone = network.model.backbone.to(accelerator.device).eval()
    return FrozenBackbone(backbone, preparation, facts)


def with_levels_of(
    network: FrozenBackbone, images: Sequence[Path], accelerator: Accelerator
) -> FrozenBackbone:
    """Return the network with levels of these images, the same for all, where it has none yet."""
    if network.preparation.levels is not None:
        return network
    dataset = ImageDataset(as_bytes(map(str, images)), None)
    dataset.channels = network.preparation.channels
    dataset.set_levels(None)
    say_notes(dataset, accelerator)
    return replace(network, preparation=replace(network.preparation, levels=dataset.levels))


def open_for_maps(
    options: MapsConfig, data: Path, accelerator: Accelerator
) -> tuple[FrozenBackbone, int]:
    """Open a network whose patches are judged on `data`, and choose the shorter side of its images.

    The side is in pixels. Errors as those of open_backbone, and ValueError for a side that the
    network does not take.
    """
    evaluation = EvalConfig(
        options.checkpoint,
        arch=options.arch,
        data=str(data),
        network=options.network,
        json_out=options.json_out,
    )
    network = open_backbone(evaluation, accelerator)
    size = chosen_side(network.backbone, network.preparation.size, options.size)
    accelerator.print(f"images as the network sees them: {size} px, shorter side")
    return network, size


# ---------------------------------------------------------------- images


def open_split(preparation: Preparation, split: str) -> ImageDataset:
    """Open `train`, `memory` or `test` of the images that a network is evaluated on.

    They are center crops, as the paper's evaluation has them. ValueError without classes, but for
    `train`.
    """
    dataset = build_dataset(
        preparation.data,
        split,
        index_folder=cache_folder(),
        val=preparation.val,
        take_splits=preparation.take_splits,
        channels=preparation.channels,
    )
    dataset.levels = preparation.levels
    return dataset.as_center_crops(preparation.resize, preparation.size)


def evaluation_splits(preparation: Preparation) -> tuple[ImageDataset, ImageDataset]:
    """Open the labelled images that k-NN remembers, and those that it is tested on."""
    memory, test = (open_split(preparation, split) for split in ("memory", "test"))
    memory.set_levels(preparation.levels)
    test.levels = memory.levels
    return memory, test


def open_splits(
    network: FrozenBackbone, accelerator: Accelerator
) -> tuple[ImageDataset, ImageDataset]:
    """Open the images that a network is evaluated on: those remembered, and those that test.

    What was left out of them is said.
    """
    with accelerator.local_main_process_first():  # which may have to download
        memory, test = evaluation_splits(network.preparation)
    say_notes(memory, accelerator)
    return memory, test


def open_training_images(preparation: Preparation, accelerator: Accelerator) -> ImageDataset:
    """Open the images to train on, which need no classes. What was left out of them is said."""
    with accelerator.local_main_process_first():  # which may have to download
        images = open_split(preparation, "train")
    images.set_levels(preparation.levels)
    say_notes(images, accelerator)
    return images


def say_notes(dataset: ImageDataset, accelerator: Accelerator) -> None:
    """Print what was entered, left out and left alone in a data set, and how it is mapped."""
    for note in dataset.notes:
        accelerator.print(f"data: {note}")
    if dataset.levels is not None:
        accelerator.print(f"data: {levels_in_words(dataset.levels)}")


def normalized(images: Tensor, preparation: Preparation) -> Tensor:
    """Return uint8 images (b, c, h, w) as the network was trained on them: float32, normalised."""
    images = TF.to_dtype(images, torch.float32, scale=True)
    return TF.normalize(images, list(preparation.mean), list(preparation.std))


# ---------------------------------------------------------------- features


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> str:
        return f"{task.speed:,.0f} images/s" if task.speed else ""


def _with_progress(
    batches: Iterator[Sample], num_images: int, accelerator: Accelerator
) -> Iterator[Sample]:
    """Return an iterator over one process's batches; the first shows how many images all have."""
    world = accelerator.num_processes
    is_hidden = not (accelerator.is_main_process and Console().is_terminal)
    columns = ("features", BarColumn(), MofNCompleteColumn(), _ImagesPerSecond())
    with Progress(*columns, TimeRemainingColumn(), disable=is_hidden, transient=True) as bar:
        task = bar.add_task("", total=num_images * world)
        for batch in batches:
            yield batch
            bar.advance(task, len(batch.image) * world)


class Extracted(NamedTuple):
    features: Tensor  # (n, ...)
    labels: Tensor  # (n,) int64, -1 without classes
    rows: Tensor  # (n,) int64, of the images in their data set


@torch.no_grad()
def extract(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
    dtype: torch.dtype = torch.float32,
) -> Extracted:
    """Compute the features of all images, in the data's order.

    `forward` maps uint8 images on the device to features. An image that cannot be decoded is left
    out, and that is said. A collective: each process takes every world-th image, and all get all
    features.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    # all processes must gather as many: the last image is repeated, and the cut below drops it
    last = len(dataset) - 1
    rows = [min(row, last) for row in range(rank, rank + world * (last // world + 1), world)]
    device = accelerator.device
    loader = DataLoader(
        Subset(dataset, rows),
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    # filled batch by batch: to join all of them at the end would take twice the memory
    filled: tuple[Tensor, ...] = ()
    start = 0
    for batch in _with_progress(iterate(loader), len(rows), accelerator):
        features = forward(batch.image.to(device, non_blocking=True)).to(dtype)
        is_read = batch.source == batch.index
        facts = (x.to(device) for x in (batch.label, batch.index, is_read))
        of_ranks = gather((features, *facts))
        in_order = [rearrange(x, "(w b) ... -> (b w) ...", w=world) for x in of_ranks]
        if not filled:
            filled = tuple(x.new_empty(world * len(rows), *x.shape[1:]) for x in in_order)
        end = start + len(in_order[0])
        for whole, part in zip(filled, in_order, strict=True):
            whole[start:end] = part
        start = end
    features, labels, indices, is_read = (whole[: last + 1] for whole in filled)
    if is_read.all():  # no copy then of what may be large
        return Extracted(features, labels, indices)
    num = int((~is_read).sum())
    accelerator.print(f"warning: {num} of {last + 1:,} images cannot be decoded: left out")
    return Extracted(features[is_read], labels[is_read], indices[is_read])


def extract_features(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> tuple[Tensor, Tensor]:
    """Return features (n, d) float32 and labels (n,) of all images, as `extract` does."""
    extracted = extract(forward, dataset, accelerator, batch_size, num_workers)
    return extracted.features, extracted.labels


def features_of_splits(
    backbone: Callable[[Tensor], Tensor],
    splits: Sequence[Dataset],
    preparation: Preparation,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> list[tuple[Tensor, Tensor]]:
    """Return features (n, d) and labels (n,) of each split. A collective."""

    def forward(images: Tensor) -> Tensor:
        return backbone(normalized(images, preparation))

    return [
        extract_features(forward, split, accelerator, batch_size, num_workers) for split in splits
    ]


def is_vit(backbone: nn.Module) -> bool:
    """Tell whether a network is a ViT of timm with a class token."""
    has_blocks = bool(getattr(backbone, "blocks", None))
    can_be_read = hasattr(backbone, "forward_intermediates")
    return has_blocks and can_be_read and getattr(backbone, "has_class_token", False)


def layer_features(
    backbone: nn.Module, num_last_blocks: int = 1, avgpool: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the function from images to features that the original's linear evaluation reads.

    Of a ViT the normalised class tokens of the last blocks and, with `avgpool`, the mean of the
    last block's patch tokens; of other networks their output. Raises ValueError where a network
    cannot give these.
    """
    if num_last_blocks == 1 and not avgpool:
        return backbone
    if not is_vit(backbone):
        text = "need a ViT with a class token, of timm's VisionTransformer (not EVA, BEiT, DINOv3)"
        raise ValueError(f"--n-last-blocks and --avgpool {text}")
    num_blocks = len(backbone.blocks)
    if not 1 <= num_last_blocks <= num_blocks:
        raise ValueError(f"need --n-last-blocks from 1 to {num_blocks}, got {num_last_blocks}")

    def forward(images: Tensor) -> Tensor:
        blocks = backbone.forward_intermediates(
            images,
            indices=num_last_blocks,
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        tokens = [prefix_tokens[:, 0] for _, prefix_tokens in blocks]
        if avgpool:
            last_patch_tokens, _ = blocks[-1]
            tokens.append(last_patch_tokens.mean(dim=1))
        return torch.cat(tokens, dim=-1)

    return forward


# ---------------------------------------------------------------- report


def size_facts(features: Tensor, test_features: Tensor | None = None) -> dict[str, object]:
    """Count the features (n, d) of images, or of train and test images; say how good they are."""
    if test_features is None:
        counts = {"num_images": len(features)}
    else:
        counts = {"num_train": len(features), "num_test": len(test_features)}
    return counts | {"features": features.shape[1]} | feature_quality(features)


def report(facts: dict, table: Table | None) -> None:
    """Print a line of facts and the table."""
    console = Console()
    step = "" if facts["step"] is None else f" at step {facts['step']:,}"
    if "num_images" in facts:
        images = f"{facts['num_images']:,} images"
    else:
        images = f"{facts['num_train']:,} train, {facts['num_test']:,} test images"
    console.print(
        f"[bold]{facts['arch']}[/] {facts['network']}{step}: {facts['features']} features; "
        f"{escape(printable(str(facts['data'])))}: {images}",
        soft_wrap=True,
    )
    if "rankme" in facts:
        leading = facts["variance_share"].items()
        shares = ", ".join(f"{100 * share:.0f} % in {k}" for k, share in leading)
        shares = f"variance by components: {shares}" if leading else "features that are not finite"
        console.print(f"RankMe {facts['rankme']:.1f}; {shares}")
    if "knn_top1_untrained" in facts:
        before = facts["knn_top1_untrained"]
        console.print(
            f"before training its k-NN was {before:.2f} % with k 20, by the run's own log"
        )
    if table is not None:
        console.print(table)


def write_results(json_out: Path | None, facts: dict, results: dict) -> None:
    """Write facts and results to `json_out`, where it is given.

    The last thing that a script does: a full disk then costs nothing that was computed.
    """
    if json_out is not None:
        write_whole(json_out, json.dumps(facts | results, indent=2) + "\n")
