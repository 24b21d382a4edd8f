"""Weights from elsewhere, to start from or to evaluate, and export of a run's own.

    python weights.py runs/vits16/ckpt.safetensors backbone.safetensors
    python weights.py runs/vits16/ckpt.safetensors dino.pth --format original

The first is for `timm.create_model(NAME, num_classes=0, checkpoint_path="backbone.safetensors")`,
or torchvision's ResNets once `fc` is an nn.Identity(); the second for `--pretrained_weights` of
facebookresearch/dino. A source is a file (ours, or the original's .pth: backbone alone, or a full
checkpoint) or the name of a published network (dino_vits16, resnet50, any of timm's). Every key is
accounted for, where the original goes on with random weights. `--student` takes a run's student
from its state.safetensors.
"""

import argparse
import dataclasses
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from config import read_flags
from models import (
    RESNETS,
    TIMM_NAMES,
    DinoModel,
    ModelConfig,
    PrototypeLayer,
    get_backbone,
    load_checkpoint,
    load_tensors,
    save_tensors,
)
from monitor import run_command
from run_io import write_bytes

Tensors = dict[str, Tensor]
Network = Literal["teacher", "student"]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
CLASSIFIER = ("fc.weight", "fc.bias", "head.weight", "head.bias")  # of supervised networks
UNREAD = "num_batches_tracked"  # a counter that old files lack
HEAD_NAMES = {  # weight_norm's two spellings, and ours
    "last_layer.weight_g": "last_layer.gain",
    "last_layer.weight_v": "last_layer.weight",
    "last_layer.parametrizations.weight.original0": "last_layer.gain",
    "last_layer.parametrizations.weight.original1": "last_layer.weight",
}


@dataclass(frozen=True)
class ExportConfig:
    source: tyro.conf.Positional[Path]  # ckpt.safetensors or state.safetensors of a run, or a .pth
    out: tyro.conf.Positional[Path]  # the file to write
    # backbone: a .safetensors for timm or torchvision; original: a .pth for facebookresearch/dino
    format: Literal["backbone", "original"] = "backbone"
    student: bool = False  # export the student, from state.safetensors or a full .pth


def as_file(source: str | Path) -> Path | None:
    """Give the file that `source` names, None for a network's name, FileNotFoundError for none."""
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise FileNotFoundError(f"no such checkpoint: {path}")
    return None


def _unpickle(path: Path) -> dict:
    """Read a .pth. Plain data alone is allowed: what else it holds is refused, and never run."""
    number = np.float64(0)  # the original's schedules leave such learning rates in the optimizer
    make = number.__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # of either numpy
    numbers = [*((make, name) for name in names), np.dtype, type(number.dtype)]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *numbers]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler's are of many kinds
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {refused[1]}" if refused else str(error).split("\n")[0]
        raise ValueError(f"{path} is no file of plain weights: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: need a dict of tensors")
    return content


def _of_network(path: Path, network: Network) -> tuple[dict, dict]:
    """Read the tensors of one network of a file, and its run's settings of the model, if any."""
    if path.suffix != ".safetensors":
        content, settings = _unpickle(path), {}
        parts = {key: x for key, x in content.items() if key in ("student", "teacher")}
    else:
        content, texts = load_tensors(path)
        settings = json.loads(texts.get("metadata", "{}")).get("config", {}).get("model", {})
        settings |= json.loads(texts.get("model_config", "{}")) or {}
        if network == "student" and "model_config" in texts:
            raise ValueError(f"{path} holds the teacher alone: need the run's state.safetensors")
        parts = {}
        for key, tensor in content.items():
            if key.startswith(("student.", "teacher.")):
                name, key = key.split(".", 1)
                parts.setdefault(name, {})[key] = tensor
    if parts and network not in parts:
        raise ValueError(f"{path} holds no {network}, but {', '.join(parts)}")
    # the rest of a full checkpoint is optimizer, center, step and arguments
    return parts.get(network, content), settings


def read_weights(path: str | Path, network: Network = "teacher") -> tuple[Tensors, Tensors]:
    """Read a file's backbone and projection head, by our names; no head is {}.

    A weight-normalised head always has its gain, a plain one has none. Raises ValueError for what
    is neither ours, the original's nor a backbone's own state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    tensors, settings = _of_network(path, network)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{path} is no state dict: need tensors by name")
    others = [key for key, x in tensors.items() if not isinstance(x, Tensor)]
    if others or not tensors:
        held = ", ".join(map(str, others[:10])) or "nothing"
        raise ValueError(f"{path} is no state dict: need tensors alone, it holds {held}")
    tensors = {re.sub(r"^(module\.)+", "", key): x for key, x in tensors.items()}
    if not any(key.startswith("backbone.") for key in tensors):
        return tensors, {}
    parts: dict[str, Tensors] = {"backbone": {}, "head": {}, "projection_head": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise ValueError(f"{path} has keys of neither backbone nor head: {key}")
        parts[part][HEAD_NAMES.get(name, name)] = tensor
    head = parts["head"] | parts["projection_head"]
    last = head.get("last_layer.weight")
    if parts["projection_head"] and last is not None and settings.get("use_weight_norm", True):
        head.setdefault("last_layer.gain", torch.ones(len(last), 1))  # ours leaves out a fixed one
    return parts["backbone"], head


def _load(module: nn.Module, tensors: Tensors, source: object) -> None:
    """Load a whole state dict; ValueError lists the keys that do not fit, and changes nothing."""
    own = module.state_dict()
    both = [key for key in tensors if key in own and tensors[key].shape != own[key].shape]
    problems = {
        "missing": [key for key in own if key not in tensors and not key.endswith(UNREAD)],
        "unexpected": [key for key in tensors if key not in own],
        "of another shape": [f"{x} {(*tensors[x].shape,)} for {(*own[x].shape,)}" for x in both],
    }
    texts = []
    for kind, keys in problems.items():
        more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
        texts += [f"{len(keys)} {kind}: {', '.join(keys[:10])}{more}"] if keys else []
    if texts:
        if all(key.startswith("projection_head.") for keys in problems.values() for key in keys):
            texts += [f"for its backbone alone: python weights.py {source} backbone.safetensors"]
        raise ValueError(f"{source} does not fit: {'; '.join(texts)}")
    module.load_state_dict(tensors, strict=False)


def _load_parts(model: DinoModel, backbone: Tensors, head: Tensors, source: object) -> list[str]:
    own, net = model.state_dict(), model.backbone
    lines = [f"backbone: from {source}, {len(backbone)} tensors"]
    left = [x for x in CLASSIFIER if x in backbone and f"backbone.{x}" not in own]
    if left:
        lines.append(f"classifier: left out ({', '.join(left)})")
    tensors = {f"backbone.{key}": x for key, x in backbone.items() if key not in left}
    name = "backbone.pos_embed"
    if isinstance(net, VisionTransformer) and name in tensors and name in own:
        prefix, grid = 0 if net.no_embed_class else net.num_prefix_tokens, net.patch_embed.grid_size
        num, positions = tensors[name].shape[1] - prefix, tensors[name]
        if num != grid[0] * grid[1] and num == math.isqrt(num) ** 2:
            tensors[name] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
            lines.append(f"position embeddings: resampled from {num} patches to {grid}")
    last = getattr(model.projection_head, "last_layer", None)
    if isinstance(last, PrototypeLayer) and not isinstance(last.gain, nn.Parameter):
        gain = head.pop("last_layer.gain", torch.ones(1))
        # an EMA of ones, as the original's teacher has it, is some roundings away from 1
        if not torch.allclose(gain.float(), torch.ones(1), rtol=0, atol=1e-5):
            raise ValueError(f"{source} has a learned gain in its head: need --no-norm-last-layer")
    if head:
        lines.append(f"projection head: from {source}, {len(head)} tensors")
        tensors |= {f"projection_head.{key}": x for key, x in head.items()}
    else:
        lines.append(f"projection head: as initialised, since {source} has none")
        tensors |= {key: x for key, x in own.items() if key.startswith("projection_head.")}
    _load(model, tensors, source)
    return lines


def load_weights(model: DinoModel, source: str | Path, network: Network = "teacher") -> list[str]:
    """Load a source into the model, in place, and say in lines what was loaded and what was not.

    A source without head leaves the head as it is; one whose head differs is an error. Position
    embeddings of another image size are resampled. Raises ValueError with the keys that do not fit,
    OSError for a name whose published weights cannot be loaded.
    """
    path = as_file(source)
    if path is not None:
        return _load_parts(model, *read_weights(path, network), source)
    return _load_parts(model, get_backbone(str(source), pretrained=True).state_dict(), {}, source)


def _sizes_of(backbone: Tensors) -> dict[str, int]:
    """Tell a ViT's patch size and image size from its tensors."""
    embed, positions = backbone.get("patch_embed.proj.weight"), backbone.get("pos_embed")
    if embed is None or positions is None:
        return {}
    patch_size = embed.shape[-1]
    return {"patch_size": patch_size, "image_size": patch_size * math.isqrt(positions.shape[1] - 1)}


def config_of(backbone: Tensors, path: str | Path) -> ModelConfig:
    """Find the architecture whose keys and shapes a backbone has. ValueError for none."""
    sizes = _sizes_of(backbone)
    vits = sorted(TIMM_NAMES, key=lambda arch: not arch.endswith(str(sizes.get("patch_size"))))
    for arch in (*vits, "vit_tiny_patch16_224") if sizes else RESNETS:
        with torch.device("meta"):  # shapes alone
            own = get_backbone(arch, **sizes).state_dict()
        differ = own.keys() ^ backbone.keys()
        differ |= {key for key in own if key in backbone and own[key].shape != backbone[key].shape}
        if all(key in CLASSIFIER or key.endswith(UNREAD) for key in differ):
            return ModelConfig(arch, **sizes)
    some = ", ".join(f"{key} {(*x.shape,)}" for key, x in list(backbone.items())[:3])
    wanted = "a ViT-T, S or B of the original or a torchvision ResNet"
    raise ValueError(f"{path} is of no known architecture: need {wanted}, got {some} ...")


def open_network(source: str | Path, network: Network = "teacher") -> tuple[DinoModel, dict]:
    """Open what is to be evaluated: (model in eval mode on the CPU, metadata).

    A run's ckpt.safetensors as load_checkpoint gives it. Others have no head, and None for data;
    images are prepared as in the paper, or as timm says of its model. Errors as load_weights'.
    """
    path, cfg = as_file(source), {}
    if path is None:
        config = ModelConfig(str(source), pretrained=True)
    elif path.suffix == ".safetensors" and "model_config" in load_tensors(path, True)[1]:
        return load_checkpoint(path)
    else:
        tensors, _ = read_weights(path, network)
        config = config_of(tensors, path)
    sizes = {"patch_size": config.patch_size, "image_size": config.image_size}
    model = DinoModel(get_backbone(config.arch, config.pretrained, **sizes), nn.Identity())
    model.config = config
    if path is not None:
        _load_parts(model, tensors, {}, source)
    elif config.arch not in (*RESNETS, *TIMM_NAMES):
        cfg = model.backbone.pretrained_cfg
    size = config.image_size or cfg.get("input_size", (3, 224, 224))[-1]
    resize = round(size / cfg.get("crop_pct", 0.875))
    crops = {"global_crop_size": size, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    crops |= {key: cfg[key] for key in ("mean", "std") if key in cfg}
    data = {"data": None, "eval_resize": resize}
    settings = {"model": dataclasses.asdict(config), "data": data, "crops": crops}
    return model.eval(), {"config": settings}


def preparation_of(metadata: dict, source: object) -> dict:
    """Give the config that says how a network's images are prepared. ValueError for none."""
    config = metadata.get("config", {})
    if not {"model", "data", "crops"} <= config.keys():
        raise ValueError(f"{source} does not say how its images were prepared")
    return config


def _to_original(backbone: Tensors, head: Tensors) -> Tensors:
    """Give both the original's names."""
    tensors = {f"backbone.{key}": x for key, x in backbone.items()}
    tensors |= {f"head.{key}": x for key, x in head.items() if not key.startswith("last_layer")}
    weight = head.get("last_layer.weight")
    if weight is not None:  # without weight norm, the gain that undoes the normalisation
        gain = head.get("last_layer.gain", weight.norm(dim=1, keepdim=True))
        tensors |= {"head.last_layer.weight_g": gain, "head.last_layer.weight_v": weight}
    return tensors


def export(options: ExportConfig) -> str:
    """Write what `options` name, whole or not at all, and say it in a line."""
    source, out = options.source, options.out
    suffix = ".safetensors" if options.format == "backbone" else ".pth"
    if out.suffix != suffix or not out.parent.is_dir() or out.resolve() == source.resolve():
        raise ValueError(f"need a new file in {suffix}, in a folder that exists, got {out}")
    network = "student" if options.student else "teacher"
    backbone, head = read_weights(source, network)
    if options.format == "backbone":
        save_tensors(out, backbone, {})
    else:
        content = io.BytesIO()
        torch.save({network: _to_original(backbone, head)}, content)
        write_bytes(out, content.getvalue())
    sizes = "".join(f", {name} {size}" for name, size in _sizes_of(backbone).items())
    text = f"{out}: the {network}'s backbone, {len(backbone)} tensors{sizes}"
    stem = backbone.get("conv1.weight")
    if stem is not None and stem.shape[-1] == 3:
        text += "; its 3x3 stem for small images does not fit an ImageNet ResNet's 7x7 conv1"
    return text


def main() -> None:
    print(export(read_flags(ExportConfig, None, __doc__)))


if __name__ == "__main__":
    run_command(main)
