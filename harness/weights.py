"""Weights from elsewhere: read a file, match its names to ours, load them into a model.

A source is a file (ours, or the original's .pth: backbone alone, or a full checkpoint) or the name
of a published network (dino_vits16, resnet50, any of timm's). Every key is accounted for, where the
original goes on with random weights.
"""

import argparse
import contextlib
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models import (
    RESNETS,
    TIMM_NAMES,
    DinoModel,
    ModelConfig,
    PrototypeLayer,
    get_backbone,
    load_tensors,
)

Tensors = dict[str, Tensor]
Role = Literal["teacher", "student"]  # which of a file's two networks

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
CLASSIFIER = ("fc.weight", "fc.bias", "head.weight", "head.bias")  # of supervised networks
UNREAD = "num_batches_tracked"  # a counter of BatchNorm's that old files lack
HEAD_NAMES = {  # weight_norm's two spellings, and ours
    "last_layer.weight_g": "last_layer.gain",
    "last_layer.weight_v": "last_layer.weight",
    "last_layer.parametrizations.weight.original0": "last_layer.gain",
    "last_layer.parametrizations.weight.original1": "last_layer.weight",
}

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


class Weights(NamedTuple):
    """A network's tensors by our names; no head is {}."""

    backbone: Tensors
    head: Tensors


def as_file(source: str | Path, role: Role = "teacher") -> Path | None:
    """Return the file that `source` names, or None for a network's name.

    Of a run's folder it is the teacher's checkpoint; the state where that is missing, or the
    student is wanted. Raises FileNotFoundError where it looks like a file and there is none.
    """
    path = Path(source)
    in_folder = [path / "ckpt.safetensors", path / "state.safetensors"]
    if role == "student":
        in_folder.reverse()
    for file in in_folder:
        if file.is_file():
            return file
    if path.is_file():
        return path
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise FileNotFoundError(f"no such checkpoint: {path}")
    return None


def read_file(path: str | Path) -> WeightsFile:
    """Read a .safetensors or a .pth, once. ValueError where it is neither, or damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        return WeightsFile(path, *load_tensors(path))
    return WeightsFile(path, _unpickle(path), {})


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
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {refused[1]}" if refused else str(error).split("\n")[0]
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
    """Return one network's backbone and projection head, by our names.

    A weight-normalised head always has its gain, a plain one has none. Raises ValueError for what
    is neither ours, the original's nor a backbone's own state dict.
    """
    tensors = _tensors_of(file, role)
    tensors = {re.sub(r"^(module\.)+", "", key): tensor for key, tensor in tensors.items()}
    if not any(key.startswith("backbone.") for key in tensors):
        return Weights(tensors, {})
    parts: dict[str, Tensors] = {"backbone": {}, "head": {}, "projection_head": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise ValueError(f"{file.path} has keys of neither backbone nor head: {key}")
        parts[part][HEAD_NAMES.get(name, name)] = tensor
    head = parts["head"] | parts["projection_head"]
    last = head.get("last_layer.weight")
    if parts["projection_head"] and last is not None and _has_weight_norm(file):
        head.setdefault("last_layer.gain", torch.ones(len(last), 1))  # ours leaves out a fixed one
    return Weights(parts["backbone"], head)


def _tensors_of(file: WeightsFile, role: Role) -> Tensors:
    """Return the tensors of one network of a file. ValueError where there are none, or others."""
    if role == "student" and file.is_checkpoint:
        raise ValueError(f"{file.path} holds the teacher alone: need the run's state.safetensors")
    networks = networks_in(file)
    if networks and role not in networks:
        raise ValueError(f"{file.path} holds no {role}, but {', '.join(networks)}")
    # what else a full checkpoint holds is optimizer, center, step and arguments
    tensors = networks[role] if networks else file.content
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{file.path} is no state dict: need tensors by name")
    others = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        held = ", ".join(others[:10]) or "nothing"
        raise ValueError(f"{file.path} is no state dict: need tensors alone, it holds {held}")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not key.endswith(UNREAD):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{file.path}: need floating-point weights, got {key} of {kind}")
        if tensor.ndim == 0 and key.endswith(("last_layer.weight", "last_layer.weight_v")):
            raise ValueError(f"{file.path}: need a matrix {key}, got a number")
    return tensors


def networks_in(file: WeightsFile) -> dict[str, Tensors]:
    """Return the networks in a file by their role; {} for a bare state dict."""
    if file.path.suffix != ".safetensors":
        return {role: file.content[role] for role in ("student", "teacher") if role in file.content}
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
    return {"patch_size": patch_size, "image_size": patch_size * math.isqrt(positions.shape[1] - 1)}


def config_of(backbone: Tensors, path: str | Path) -> ModelConfig:
    """Return the architecture whose keys and shapes a backbone has. ValueError for none."""
    sizes = sizes_of(backbone)
    if sizes:
        suffix = str(sizes["patch_size"])  # names that end in it are tried first
        archs = sorted(TIMM_NAMES, key=lambda arch: not arch.endswith(suffix))
        archs.append("vit_tiny_patch16_224")
    else:
        archs = list(RESNETS)
    for arch in archs:
        with torch.device("meta"):  # shapes alone
            own = get_backbone(arch, **sizes).state_dict()
        differ = own.keys() ^ backbone.keys()
        differ |= {key for key in own if key in backbone and own[key].shape != backbone[key].shape}
        if all(key in CLASSIFIER or key.endswith(UNREAD) for key in differ):
            return ModelConfig(arch, **sizes)
    some = ", ".join(f"{key} {(*x.shape,)}" for key, x in list(backbone.items())[:3])
    wanted = "a ViT-T, S or B of the original or a torchvision ResNet"
    raise ValueError(f"{path} is of no known architecture: need {wanted}, got {some} ...")


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
    lines = [f"backbone: from {source}, {len(weights.backbone)} tensors"]
    own = model.state_dict()
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
            text += f"; it is {config_of(backbone, source).arch}"
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
