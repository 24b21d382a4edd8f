"""Export a run's weights, or the original's, for timm, torchvision or facebookresearch/dino.

    python export.py runs/vits16/ckpt.safetensors backbone.safetensors
    python export.py runs/vits16/ckpt.safetensors dino.pth --format original

The first is for `timm.create_model(NAME, num_classes=0, checkpoint_path="backbone.safetensors")`,
or torchvision's ResNets once `fc` is an nn.Identity(); the second for `--pretrained_weights` of
facebookresearch/dino. `--network student` takes a run's student from its state.safetensors.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from harness.command import read_flags, run_command, write_whole
from harness.terminal import printable_name
from harness.weights import Role, Tensors, Weights, read_weights, sizes_of
from models import save_tensors


@dataclass(frozen=True)
class ExportConfig:
    source: tyro.conf.Positional[Path]  # ckpt.safetensors or state.safetensors of a run, or a .pth
    out: tyro.conf.Positional[Path]  # the file to write
    # backbone: a .safetensors for timm or torchvision; original: a .pth for facebookresearch/dino
    format: Literal["backbone", "original"] = "backbone"
    # which of the two networks; the student is in state.safetensors and in a full .pth
    network: Role = "teacher"


def by_original_names(weights: Weights) -> Tensors:
    """Return backbone and head by the original's names."""
    tensors = {f"backbone.{key}": tensor for key, tensor in weights.backbone.items()}
    for key, tensor in weights.head.items():
        if not key.startswith("last_layer"):
            tensors[f"head.{key}"] = tensor
    last = weights.head.get("last_layer.weight")
    if last is not None:  # a layer without weight norm gets the gain that undoes the normalisation
        gain = weights.head.get("last_layer.gain", last.norm(dim=1, keepdim=True))
        tensors["head.last_layer.weight_g"] = gain
        tensors["head.last_layer.weight_v"] = last
    return tensors


def export(options: ExportConfig) -> str:
    """Write what `options` name, whole or not at all, and return a line that says it."""
    source, out = options.source, options.out
    suffix = ".safetensors" if options.format == "backbone" else ".pth"
    if out.suffix != suffix or not out.parent.is_dir() or out.resolve() == source.resolve():
        raise ValueError(f"need a new file in {suffix}, in a folder that exists, got {out}")
    weights = read_weights(source, options.network)
    if options.format == "backbone":
        save_tensors(out, weights.backbone, {})
    else:
        content = io.BytesIO()
        torch.save({options.network: by_original_names(weights)}, content)
        write_whole(out, content.getvalue())
    return describe(out, options.network, weights.backbone)


def describe(out: Path, role: Role, backbone: Tensors) -> str:
    text = f"{out}: the {role}'s backbone, {len(backbone)} tensors"
    for name, size in sizes_of(backbone).items():
        text += f", {name} {size}"
    stem = backbone.get("conv1.weight")
    if stem is not None and stem.shape[-1] == 3:
        text += "; its 3x3 stem for small images does not fit an ImageNet ResNet's 7x7 conv1"
    return text


def main() -> None:
    print(printable_name(export(read_flags(ExportConfig, None, __doc__))))


if __name__ == "__main__":
    run_command(main)
