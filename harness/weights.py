"""Weights from elsewhere: read a file, match its names to ours, load them into a model.

A source is a file (ours, the original's .pth: backbone alone, or a full checkpoint; those of other
projects: harness/foreign.py) or the name of a published network (dino_vits16, resnet50, any of
timm's). Every key is accounted for, where the original goes on with random weights.
"""

import argparse
import contextlib
import json
import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from harness.foreign import (
    PATCH_HEAD,
    Found,
    Role,
    Tensors,
    by_timms_names,
    counted,
    find_network,
    open_containers,
    peel,
)
from models import (
    ALL_RESNETS,
    RESNETS,
    TIMM_NAMES,
    DinoModel,
    ModelConfig,
    PrototypeLayer,
    get_backbone,
    is_known_backbone,
    load_tensors,
)

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
# classifiers of supervised networks; head_dist is distilled DeiT's
CLASSIFIER = tuple(
    f"{name}.{kind}"
    for name in ("fc", "head", "head.fc", "head_dist", "classifier")
    for kind in ("weight", "bias")
)
UNREAD = "num_batches_tracked"  # a counter of BatchNorm's that old files lack
# others: tables of places in old files of Swin and BEiT, and in EfficientFormer
INTEGERS = (UNREAD, "relative_position_index", "attention_bias_idxs")
HEAD_NAMES = {  # weight_norm's two spellings, and ours
    "last_layer.weight_g": "last_layer.gain",
    "last_layer.weight_v": "last_layer.weight",
    "last_layer.parametrizations.weight.original0": "last_layer.gain",
    "last_layer.parametrizations.weight.original1": "last_layer.weight",
}
# what an exported file says of its network and its images: a JSON of a run's settings
BACKBONE_CONFIG = "backbone_config"
TIMM_CONFIG = "config.json"  # among a file's texts, where it is in the layout of timm's hub

# ---------------------------------------------------------------- read


class WeightsFile(NamedTuple):
    """What a file holds: tensors by name, or whatever is in a pickle; and safetensors' texts."""

    path: Path
    content: dict
    texts: dict[str, str]

    @property
    def is_checkpoint(self) -> bool:
        """Tell whether models.save_checkpoint wrote it."""
        return "model_config" in self.texts

    @property
    def is_state(self) -> bool:
        """Tell whether a run wrote it, to go on from: with student and teacher."""
        return "metadata" in self.texts and not self.is_checkpoint

    @property
    def is_own(self) -> bool:
        """Tell whether this project wrote it, by its own names: export.py, too."""
        return self.is_checkpoint or self.is_state or BACKBONE_CONFIG in self.texts

    @property
    def timm_config(self) -> dict:
        """Return what stands in timm's config.json beside the file, {} for nothing of use."""
        with contextlib.suppress(ValueError):
            config = json.loads(self.texts.get(TIMM_CONFIG, "{}"))
            return config if isinstance(config, dict) else {}
        return {}

    @property
    def arch(self) -> str | None:
        """Return the name of timm's or torchvision's that others wrote beside the weights.

        timm's training has it as `arch`, others within `args`, timm's hub in its config.json.
        """
        args = self.content.get("args")
        said = (self.content.get("arch"), getattr(args, "arch", None))
        for name in (self.timm_config.get("architecture"), *said):
            if isinstance(name, str) and (name in RESNETS or timm.is_model(name)):
                return name
        return None


class Weights(NamedTuple):
    """A network's tensors, the head's by our names; no head is {}."""

    backbone: Tensors
    head: Tensors
    notes: tuple[str, ...] = ()  # lines that say what was chosen and left out


class UnknownArchitecture(ValueError):
    """Weights that do not say what they are, and are not recognised."""


def as_file(source: str | Path, role: Role = "teacher") -> Path | None:
    """Return the file that `source` names, or None for a network's name.

    Of a run's folder it is the teacher's checkpoint; the state where that is missing, or the
    student is wanted; of a folder in the layout of timm's hub its model.safetensors. Raises
    FileNotFoundError where it looks like a file and there is none.
    """
    path = Path(source)
    in_folder = [path / "ckpt.safetensors", path / "state.safetensors"]
    if role == "student":
        in_folder.reverse()
    for file in (*in_folder, path / "model.safetensors"):
        if file.is_file():
            return file
    if path.is_file():
        return path
    if path.is_dir() and not is_known_backbone(str(source)):
        names = " or ".join(file.name for file in (*in_folder, path / "model.safetensors"))
        raise FileNotFoundError(f"no checkpoint in the folder {path}: need {names}")
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise FileNotFoundError(f"no such checkpoint: {path}")
    return None


def read_file(path: str | Path) -> WeightsFile:
    """Read a .safetensors or a .pth, once. ValueError where it is neither, or damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        tensors, texts = load_tensors(path)
        return WeightsFile(path, tensors, _config_of_timm(path) | texts)
    content = _unpickle(path)
    said = content.get(BACKBONE_CONFIG)
    return WeightsFile(path, content, {BACKBONE_CONFIG: said} if isinstance(said, str) else {})


def _config_of_timm(path: Path) -> dict[str, str]:
    """Return the config.json beside a file in the layout of timm's hub; {} where it is none."""
    beside = path.with_name("config.json")
    if path.name != "model.safetensors" or not beside.is_file():
        return {}
    return {TIMM_CONFIG: beside.read_text(errors="replace")}


# Lightning writes hyperparameters of any class; only their author can say that they do no harm
HOW_TO_KEEP = (
    "; where you trust it, keep its tensors: "
    'torch.save(torch.load(FILE, weights_only=False)["state_dict"], "weights.pth")'
)


def _unpickle(path: Path) -> dict:
    """Read a .pth. Plain data alone is allowed: what else it holds is refused, and never run."""
    # the original's schedules leave NumPy's learning rates in the optimizer
    number = np.float64(0)
    make_number = number.__reduce__()[0]
    numpy_names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # old and new
    allowed = [argparse.Namespace, np.dtype, type(number.dtype)]
    allowed += [(make_number, name) for name in numpy_names]
    try:
        _require_undamaged_archive(path)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles, which are read all the same
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {refused[1]}{HOW_TO_KEEP}" if refused else str(error).split("\n")[0]
        raise ValueError(f"{path} is no file of plain weights: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: need a dict of tensors")
    return content


def _require_undamaged_archive(path: Path) -> None:
    """Raise ValueError where a part of a .pth has another checksum; torch.load does not look.

    Files of torch before 1.6 are no archives and have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")


def read_weights(path: str | Path, role: Role = "teacher") -> Weights:
    """Read a network's backbone and projection head from a file. Errors as weights_of's."""
    return weights_of(read_file(as_file(path, role) or path), role)


def weights_of(file: WeightsFile, role: Role) -> Weights:
    """Return one network's backbone and projection head.

    A weight-normalised head always has its gain, a plain one has none. A backbone still has the
    names of its project: `recognise` and load_parts make them those of its architecture. Raises
    ValueError for what holds no network, or other things beside it that are not known.
    """
    try:
        tensors, notes = _tensors_of(file, role)
        found = Found(tensors, []) if file.is_own else find_network(tensors, role)
        notes += found.notes
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(file.path) in text else f"{file.path} {text}") from error
    if not any(key.startswith("backbone.") for key in found.tensors):
        weights = Weights(found.tensors, {}, tuple(notes))
        _check_kinds(weights, file.path)
        return weights
    parts: dict[str, Tensors] = {"backbone": {}, "head": {}, "projection_head": {}}
    for key, tensor in found.tensors.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise ValueError(f"{file.path} has keys of neither backbone nor head: {key}")
        parts[part][HEAD_NAMES.get(name, name)] = tensor
    backbone = Found(parts["backbone"], []) if file.is_own else peel(parts["backbone"])
    head = parts["head"] | parts["projection_head"]
    others = [key for key in head if key.startswith(PATCH_HEAD) or f"head.{key}" in CLASSIFIER]
    if others:
        notes.append(f"left out of the head: {counted(others)}")
        head = {key: tensor for key, tensor in head.items() if key not in others}
    weights = Weights(backbone.tensors, head, (*notes, *backbone.notes))
    _check_kinds(weights, file.path)
    last_layer = head.get("last_layer.weight")
    # this project's files name the head so, and leave out a gain that is fixed at 1
    is_ours = bool(parts["projection_head"])
    lacks_gain = last_layer is not None and "last_layer.gain" not in head
    if is_ours and lacks_gain and _has_weight_norm(file):
        head["last_layer.gain"] = torch.ones(len(last_layer), 1)
    return weights


def _tensors_of(file: WeightsFile, role: Role) -> tuple[Tensors, list[str]]:
    """Return the state dict in a file, and lines that say which. ValueError where there is none."""
    if role == "student" and file.is_checkpoint:
        raise ValueError(f"{file.path} holds the teacher alone: need the run's state.safetensors")
    if file.path.suffix == ".safetensors":
        networks = networks_in(file)
        if networks and role not in networks:
            raise ValueError(f"holds no {role}, but {', '.join(networks)}")
        # what else a run's state holds is optimizer and center
        tensors, notes = networks.get(role, file.content), []
    else:
        tensors, notes = open_containers(file.content, role)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise ValueError("is no state dict: need tensors by name")
    others = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        held = ", ".join(others[:10]) or "nothing"
        raise ValueError(f"is no state dict: need tensors alone, it holds {held}")
    return tensors, notes


def _check_kinds(weights: Weights, path: Path) -> None:
    """Raise ValueError where a tensor is of another kind than weights are."""
    for key, tensor in (weights.backbone | weights.head).items():
        if not tensor.is_floating_point() and not key.endswith(INTEGERS):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: need floating-point weights, got {key} of {kind}")
    last = weights.head.get("last_layer.weight")
    if last is not None and last.ndim == 0:
        raise ValueError(f"{path}: need a matrix last_layer.weight, got a number")


def networks_in(file: WeightsFile) -> dict[str, Tensors]:
    """Return the networks in a safetensors file by their role; {} for a bare state dict."""
    networks: dict[str, Tensors] = {}
    for key, tensor in file.content.items():
        if key.startswith(("student.", "teacher.")):
            role, name = key.split(".", 1)
            networks.setdefault(role, {})[name] = tensor
    return networks


def _has_weight_norm(file: WeightsFile) -> bool:
    """Tell whether the last layer in a run's file is weight-normalised, by the run's settings."""
    try:
        settings = json.loads(file.texts.get("metadata", "{}")).get("config", {}).get("model", {})
        settings |= json.loads(file.texts.get("model_config", "{}")) or {}
        return bool(settings.get("use_weight_norm", True))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the metadata of {file.path} is damaged: {error}") from error


# ---------------------------------------------------------------- match


def sizes_of(backbone: Tensors) -> dict[str, int]:
    """Return a ViT's patch_size and image_size in pixels, told by its tensors; {} for others."""
    embed, positions = backbone.get("patch_embed.proj.weight"), backbone.get("pos_embed")
    if embed is None or positions is None or embed.ndim != 4 or positions.ndim != 3:
        return {}
    patch_size = embed.shape[-1]
    # A row for each patch of a square grid, and a few for a class token and registers: too few to
    # reach the next square, so that the root, rounded down, is the grid's side.
    side = math.isqrt(positions.shape[1])
    return {"patch_size": patch_size, "image_size": patch_size * side}


# by width and number of blocks: the original's, DeiT's and MAE's; DINOv2's; DINOv3's
VITS = {
    (192, 12): ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    (384, 12): (
        "dino_vits16",
        "dino_vits8",
        "deit_small_distilled_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3_qkvb",
        "vit_small_plus_patch16_dinov3_qkvb",
    ),
    (768, 12): (
        "dino_vitb16",
        "dino_vitb8",
        "deit_base_distilled_patch16_224",
        "vit_base_patch14_dinov2",
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_dinov3_qkvb",
    ),
    (1024, 24): (
        "vit_large_patch16_224",
        "vit_large_patch14_dinov2",
        "vit_large_patch14_reg4_dinov2",
        "vit_large_patch16_dinov3_qkvb",
    ),
    (1280, 32): ("vit_huge_patch14_224", "vit_huge_plus_patch16_dinov3_qkvb"),
    (1536, 40): ("vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"),
}


def _candidates(backbone: Tensors) -> list[str]:
    """Return the architectures that a backbone may be, by width and depth, likely ones first."""
    embed = backbone.get("patch_embed.proj.weight")
    if embed is None or embed.ndim != 4:
        return list(ALL_RESNETS)
    depth = len({key.split(".")[1] for key in backbone if key.startswith("blocks.")})
    suffix = str(embed.shape[-1])  # names that end in the patch size come first
    archs = VITS.get((embed.shape[0], depth), ())
    known = [arch for arch in archs if arch in TIMM_NAMES or timm.is_model(arch)]  # to this timm
    return sorted(known, key=lambda arch: not arch.endswith(suffix))


def _config_with(arch: str, backbone: Tensors) -> ModelConfig:
    """Return an architecture with the sizes that a backbone's tensors tell."""
    stem = backbone.get("conv1.weight")
    is_resnet = arch in ALL_RESNETS
    if is_resnet:
        is_small = stem is not None and stem.ndim == 4 and stem.shape[-1] == 3
        size = 32 if is_small else None
        return ModelConfig(arch, image_size=size, channels=_channels_of(backbone))
    # what differs between the original's positions and timm's does not matter at their own size
    is_original = arch in TIMM_NAMES
    sizes = sizes_of(backbone)
    return ModelConfig(
        arch, **sizes, original_pos_embed=is_original, channels=_channels_of(backbone)
    )


def _channels_of(backbone: Tensors) -> int:
    """Return the channels of the images that a backbone's first convolution takes; 3 if unknown."""
    for name in ("patch_embed.proj.weight", "conv1.weight", "conv1.0.weight"):
        stem = backbone.get(name)
        if stem is not None and stem.ndim == 4:
            return stem.shape[1]
    return 3


def _build_on_meta(config: ModelConfig) -> nn.Module:
    """Return a backbone that has names and shapes alone. ValueError where it cannot be built."""
    sizes = {"patch_size": config.patch_size, "image_size": config.image_size}
    try:
        with torch.device("meta"):
            return get_backbone(config.arch, **sizes, channels=config.channels)
    except (RuntimeError, AssertionError, TypeError, ZeroDivisionError) as error:
        # of sizes that are those of damaged tensors
        raise ValueError(f"no {config.arch} of {sizes}: {error}") from error


class Recognised(NamedTuple):
    """An architecture, a backbone's tensors by its names, and lines that say what was guessed."""

    config: ModelConfig
    backbone: Tensors
    notes: tuple[str, ...]


def recognise(weights: Weights, path: str | Path, arch: str | None = None) -> Recognised:
    """Return the architecture whose keys and shapes a backbone has, or `arch` with its sizes.

    Raises UnknownArchitecture where none has them, ValueError for an `arch` that is none.
    """
    backbone = weights.backbone
    if arch is not None:
        config = _config_with(arch, backbone)
        try:
            return _recognised(config, by_timms_names(backbone, _build_on_meta(config)))
        except ValueError as error:
            raise ValueError(f"{path} as {arch}: {error}") from error
    least: tuple[int, str] | None = None  # how many keys differ from the closest, and a text on it
    for candidate in _candidates(backbone):
        with contextlib.suppress(ValueError):  # it cannot be this one
            config = _config_with(candidate, backbone)
            net = _build_on_meta(config)
            renamed = by_timms_names(backbone, net)
            differ = _differing(net.state_dict(), renamed)
            if not differ:
                return _recognised(config, renamed)
            if len(differ) < len(renamed) / 2 and (least is None or len(differ) < least[0]):
                least = len(differ), f"{candidate} but for {len(differ)}: {', '.join(differ[:3])}"
    some = ", ".join(f"{key} {(*x.shape,)}" for key, x in list(backbone.items())[:3])
    wanted = "a ViT of DINO, DINOv2, DINOv3, MAE or DeiT, a torchvision ResNet, or --arch"
    almost = "" if least is None else f"; its tensors are those of {least[1]}"
    raise UnknownArchitecture(
        f"{path} is of no known architecture: need {wanted}, got {some} ...{almost}"
    )


def _differing(own: Tensors, tensors: Tensors) -> list[str]:
    """Return the keys that one state dict lacks, or has in another shape, but for classifiers."""
    keys = [key for key in own if key not in tensors or own[key].shape != tensors[key].shape]
    keys += [key for key in tensors if key not in own]
    return [key for key in keys if key not in CLASSIFIER and not key.endswith(UNREAD)]


def _recognised(config: ModelConfig, backbone: Tensors) -> Recognised:
    notes: tuple[str, ...] = ()
    if config.image_size == 32 and "conv1.weight" in backbone:
        text = "its 3x3 stem is taken for one of stride 1 and padding 1, without max-pool"
        notes = (f"{text}; solo-learn's for CIFAR has padding 2, and other features",)
    return Recognised(config, backbone, notes)


# ---------------------------------------------------------------- load


def load_weights(model: DinoModel, source: str | Path, role: Role = "teacher") -> list[str]:
    """Load a source into the model, in place, and return lines: what was loaded and what was not.

    A source without head leaves the head as it is; one whose head differs is an error. Position
    embeddings of another image size are resampled. Raises ValueError with the keys that do not fit,
    OSError for a name whose published weights cannot be loaded.
    """
    path = as_file(source, role)
    if path is not None:
        return load_parts(model, read_weights(path, role), source)
    published = get_backbone(str(source), pretrained=True).state_dict()
    return load_parts(model, Weights(published, {}), source)


def load_parts(model: DinoModel, weights: Weights, source: str | Path) -> list[str]:
    """Load what was read from a source, as load_weights does."""
    lines = [f"backbone: from {source}, {len(weights.backbone)} tensors", *weights.notes]
    own = model.state_dict()
    weights = weights._replace(backbone=_by_names_of(model, weights.backbone))
    left_out = [
        key for key in CLASSIFIER if key in weights.backbone and f"backbone.{key}" not in own
    ]
    if left_out:
        lines.append(f"classifier: left out ({', '.join(left_out)})")
    tensors = {
        f"backbone.{key}": tensor for key, tensor in weights.backbone.items() if key not in left_out
    }
    lines += _resample_positions(tensors, model.backbone)
    lines += _adapt_stem(tensors, own)
    head = _without_fixed_gain(weights.head, model, source)
    if head:
        lines.append(f"projection head: from {source}, {len(head)} tensors")
        tensors |= {f"projection_head.{key}": tensor for key, tensor in head.items()}
    else:
        lines.append(f"projection head: as initialised, since {source} has none")
        tensors |= {key: x for key, x in own.items() if key.startswith("projection_head.")}
    _require_the_same_network(model, weights.backbone, source)
    _load_all(model, tensors, source)
    return lines


def _by_names_of(model: DinoModel, backbone: Tensors) -> Tensors:
    """Return a backbone by the names of the model's architecture, as it is where it is another."""
    if model.config is None:
        return backbone
    arch = model.config.arch
    with contextlib.suppress(ValueError):  # it is another network, which is said later
        return by_timms_names(backbone, _build_on_meta(_config_with(arch, backbone)))
    return backbone


def _require_the_same_network(model: DinoModel, backbone: Tensors, source: str | Path) -> None:
    """Raise ValueError where most of a source's backbone does not fit: it is of another --arch."""
    own = model.backbone.state_dict()
    num_fitting = sum(
        key in backbone and backbone[key].shape == tensor.shape for key, tensor in own.items()
    )
    if num_fitting < len(own) / 2:
        arch = "" if model.config is None else f" --arch {model.config.arch}"
        text = f"{num_fitting} of {len(own)} tensors fit"
        with contextlib.suppress(ValueError):  # of no known architecture
            text += f"; it is {recognise(Weights(backbone, {}), source).config.arch}"
        raise ValueError(f"{source} holds another network than{arch}: {text}")


def _resample_positions(tensors: Tensors, net: nn.Module) -> list[str]:
    """Fit position embeddings to the network's image size, in place; return a line that says so."""
    positions = tensors.get("backbone.pos_embed")
    if positions is None or not isinstance(net, VisionTransformer) or net.pos_embed is None:
        return []
    if positions.ndim != 3:  # which loading refuses, by its shape
        return []
    num_prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    num_patches, grid = positions.shape[1] - num_prefix, net.patch_embed.grid_size
    is_square = num_patches == math.isqrt(num_patches) ** 2
    if num_patches == grid[0] * grid[1] or not is_square:
        return []
    tensors["backbone.pos_embed"] = resample_abs_pos_embed(
        positions, grid, num_prefix_tokens=num_prefix
    )
    return [f"position embeddings: resampled from {num_patches} patches to {grid}"]


def _adapt_stem(tensors: Tensors, own: Tensors) -> list[str]:
    """Fit the first convolution of RGB weights to other channels, in place; return a line of it.

    It is the one tensor that differs in its input channels alone, 3 in the source.
    """
    for key, tensor in tensors.items():
        wanted = own[key].shape if key in own else ()
        if len(wanted) != 4 or tensor.ndim != 4 or tensor.shape[1] != 3 or wanted[1] == 3:
            continue
        if (tensor.shape[0], *tensor.shape[2:]) == (wanted[0], *wanted[2:]):
            tensors[key] = adapt_input_conv(wanted[1], tensor)
            how = "summed" if wanted[1] == 1 else "repeated and rescaled"
            return [f"stem: the weights of its 3 channels are {how} for {wanted[1]}"]
    return []


def _without_fixed_gain(head: Tensors, model: DinoModel, source: str | Path) -> Tensors:
    """Return the head without its gain where the model has fixed that at 1.

    Raises ValueError where the source's gain is another, which was learned.
    """
    last = getattr(model.projection_head, "last_layer", None)
    is_fixed = isinstance(last, PrototypeLayer) and not isinstance(last.gain, nn.Parameter)
    if not is_fixed or "last_layer.gain" not in head:
        return head
    head = dict(head)
    gain = head.pop("last_layer.gain").float()
    # the original's teacher has an EMA of ones, which is some roundings away from 1
    if not torch.allclose(gain, torch.ones(1), rtol=0, atol=1e-5):
        raise ValueError(f"{source} has a learned gain in its head: need --no-norm-last-layer")
    return head


def _load_all(model: nn.Module, tensors: Tensors, source: str | Path) -> None:
    """Load a whole state dict; ValueError lists the keys that do not fit, and changes nothing."""
    own = model.state_dict()
    of_another_shape = [
        f"{key} {(*tensors[key].shape,)} for {(*own[key].shape,)}"
        for key in tensors
        if key in own and tensors[key].shape != own[key].shape
    ]
    problems = {
        "missing": [key for key in own if key not in tensors and not key.endswith(UNREAD)],
        "unexpected": [key for key in tensors if key not in own],
        "of another shape": of_another_shape,
    }
    texts: list[str] = []
    for kind, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            texts.append(f"{len(keys)} {kind}: {', '.join(keys[:3])}{more}")
    if texts:
        all_keys = [key for keys in problems.values() for key in keys]
        if all(key.startswith("projection_head.") for key in all_keys):
            texts.append(f"for its backbone alone: python export.py {source} backbone.safetensors")
        raise ValueError(f"{source} does not fit: {'; '.join(texts)}")
    model.load_state_dict(tensors, strict=False)
