"""A network from a file or by name: opened, checked, and how its images are prepared.

    network = open_network("runs/vits16")           # or an exported file, or a name: dino_vits16
    network.model.backbone, network.preparation     # in eval mode on the CPU

Axes: b batch, c h w image.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from config import SETTINGS, Config
from harness.feature_maps import PHOTO_CROP
from harness.flags import wrong_setting
from harness.foreign import Role
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
    what_is_left,
)
from multicrop import CropConfig
from pixels import Levels


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
        if "crop_pct" in timms:
            resize = math.floor(size / timms["crop_pct"])  # as timm rounds it
        else:
            resize = round(size / (0.875 if size >= PHOTO_CROP else 1.0))
        return cls(
            data=None,
            size=size,
            resize=resize,
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


def normalized(images: Tensor, preparation: Preparation) -> Tensor:
    """Return uint8 images (b, c, h, w) as the network was trained on them: float32, normalised."""
    images = TF.to_dtype(images, torch.float32, scale=True)
    return TF.normalize(images, list(preparation.mean), list(preparation.std))


def is_of_run(path: Path) -> bool:
    """Tell whether a file or folder is what a run saved in its own folder."""
    if not (path.parent / "config.yaml").is_file() or not path.exists():
        return False
    is_of_weights = path.suffix == ".safetensors" and path.name.startswith(("ckpt", "state"))
    return is_of_weights or path.name in ("config.yaml", "log.jsonl")
