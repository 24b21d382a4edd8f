"""Export a backbone: for timm, transformers, torchvision, ONNX or facebookresearch/dino.

    python export.py runs/vits16 backbone.safetensors
    python export.py runs/vits16 vits16 --format timm
    python export.py runs/vits16 vits16.onnx --format onnx
    python export.py runs/vits16 dino.pth --format original

The first is for `timm.create_model(NAME, num_classes=0, checkpoint_path="backbone.safetensors")`,
or torchvision's ResNets once `fc` is an nn.Identity(). The second is a folder for
`timm.create_model("local-dir:vits16", pretrained=True)` and transformers' `AutoModel` and
`AutoImageProcessor.from_pretrained("vits16")`. The third maps `images` (b, c, size, size), float32
and normalised, to `features` (b, d); its metadata says mean, standard deviation and size. The
fourth is for `--pretrained_weights` of facebookresearch/dino. `--network student` takes a run's
student from its state.safetensors. The evaluations read all but ONNX back, without --arch.
docs/weights.md has the details.
"""

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import timm
import torch
import tyro
from torch import nn

from harness.command import read_flags, run_command, write_whole
from harness.foreign import Role, Tensors
from harness.opened_network import OpenedNetwork, Preparation, describe, is_of_run, open_file
from harness.terminal import printable_name
from harness.weights import (
    BACKBONE_CONFIG,
    UnknownArchitecture,
    Weights,
    as_file,
    read_file,
    sizes_of,
    weights_of,
)
from models import ALL_RESNETS, TIMM_NAMES, save_tensors

SUFFIXES = {"backbone": ".safetensors", "onnx": ".onnx", "original": ".pth"}
LARGEST_ONNX = 2**31 - 2**20  # bytes of weights that fit into one file of protobuf
TOLERANCE = 1e-3  # of onnxruntime's features, relative to their norm


@dataclass(frozen=True)
class ExportConfig:
    source: tyro.conf.Positional[Path]  # a run's folder or checkpoint, or another project's file
    out: tyro.conf.Positional[Path]  # the file to write; a folder for --format timm
    # backbone: a .safetensors for timm or torchvision; timm: a folder for timm and transformers;
    # onnx: an .onnx; original: a .pth for facebookresearch/dino
    format: Literal["backbone", "timm", "onnx", "original"] = "backbone"
    # which of the two networks; the student is in state.safetensors and in a full .pth
    network: Role = "teacher"
    # architecture of a file that does not say it and is not recognised: a name of timm's
    arch: str | None = None


def check_flags(options: ExportConfig) -> None:
    """Raise ValueError for what cannot be written, before anything is read."""
    out, suffix = options.out, SUFFIXES.get(options.format)
    if not out.parent.is_dir():
        raise ValueError(f"no such folder for the weights: {out.parent}")
    if suffix is None:
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        if not is_free or out.suffix in SUFFIXES.values():
            raise ValueError(f"need a new or empty folder, got {out}")
    elif out.suffix != suffix or out.is_dir():
        raise ValueError(f"need a file that ends in {suffix}, got {out}")
    source = as_file(options.source, options.network) or options.source
    is_source = out.exists() and out.resolve() in (source.resolve(), options.source.resolve())
    if is_source or is_of_run(out):
        raise ValueError(f"need another file than {out}, which a run saved or the weights are from")
    if options.format == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
        if missing:
            raise ValueError(f"--format onnx needs packages: pip install {' '.join(missing)}")


# ---------------------------------------------------------------- facebookresearch/dino


def by_original_names(backbone: Tensors, head: Tensors) -> Tensors:
    """Return backbone and head by the original's names."""
    tensors = {f"backbone.{key}": tensor for key, tensor in backbone.items()}
    for key, tensor in head.items():
        if not key.startswith("last_layer"):
            tensors[f"head.{key}"] = tensor
    last = head.get("last_layer.weight")
    if last is not None:  # a layer without weight norm gets the gain that undoes the normalisation
        gain = head.get("last_layer.gain", last.norm(dim=1, keepdim=True))
        tensors["head.last_layer.weight_g"] = gain
        tensors["head.last_layer.weight_v"] = last
    return tensors


def write_original(out: Path, role: Role, tensors: Tensors, texts: dict[str, str]) -> None:
    """Write a .pth; the original reads `role` of it, and the texts are for this project."""
    content = io.BytesIO()
    torch.save({role: tensors, **texts}, content)
    write_whole(out, content.getvalue())


# ---------------------------------------------------------------- timm and transformers


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder, which becomes `path` at the end; with an error nothing does."""
    temporary = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)  # an empty folder is replaced, too
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _has_stem_for_small_images(arch: str | None, backbone: Tensors) -> bool:
    """Tell whether a backbone is a ResNet with the 3x3 stem that is not timm's or torchvision's."""
    stem = backbone.get("conv1.weight")
    is_resnet = arch in (*ALL_RESNETS, None)
    return is_resnet and stem is not None and stem.shape[-1] == 3


def as_timm(network: OpenedNetwork) -> nn.Module:
    """Return the backbone as timm itself builds it. ValueError where timm has no such network."""
    backbone, arch = network.model.backbone, network.arch
    if _has_stem_for_small_images(arch, backbone.state_dict()):
        size = network.model.config.image_size
        text = f"{arch} for {size} px has a 3x3 stem without max-pool, which timm's ResNets lack"
        raise ValueError(f"{text}: need --format backbone or onnx")
    name = "resnet18" if arch == "resnet10_half" else TIMM_NAMES.get(arch, arch)
    options = getattr(backbone, "timm_options", {})
    net = timm.create_model(name.split(".")[0], num_classes=0, **options)
    net.load_state_dict(backbone.state_dict())
    return net.eval()


def write_timm(out: Path, network: OpenedNetwork, texts: dict[str, str]) -> None:
    """Write config.json and model.safetensors, as timm's hub has them."""
    net, preparation = as_timm(network), network.preparation
    # timm's own save_for_hf adds num_classes to model_args, which transformers 5 cannot read
    config = {
        "architecture": net.pretrained_cfg["architecture"],
        "num_classes": 0,
        "num_features": net.num_features,
        "model_args": getattr(network.model.backbone, "timm_options", {}),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": (preparation.channels, preparation.size, preparation.size),
            "crop_pct": preparation.size / preparation.resize,
            "interpolation": "bicubic",
            "mean": preparation.mean,
            "std": preparation.std,
            "first_conv": net.pretrained_cfg.get("first_conv"),
            "classifier": net.pretrained_cfg.get("classifier"),
        },
    }
    with whole_folder(out) as folder:
        save_tensors(folder / "model.safetensors", net.state_dict(), texts | {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------- ONNX


def write_onnx(out: Path, network: OpenedNetwork, texts: dict[str, str]) -> str:
    """Write a graph of the backbone at its images' size, and return a line on how it was checked.

    Raises ValueError where onnxruntime, if installed, computes other features than torch.
    """
    import onnx

    backbone, size = network.model.backbone, network.preparation.size
    num_bytes = sum(tensor.nbytes for tensor in backbone.state_dict().values())
    if num_bytes > LARGEST_ONNX:
        raise ValueError(f"an .onnx holds at most 2 GiB: the weights have {num_bytes:,} bytes")
    program = torch.onnx.export(
        backbone,
        (torch.zeros(2, network.preparation.channels, size, size),),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    graph = program.model_proto
    onnx.helper.set_model_props(graph, texts)
    content = graph.SerializeToString()
    checked = compare_with_onnxruntime(backbone, content, network.preparation)
    write_whole(out, content)
    return checked


@torch.no_grad()
def compare_with_onnxruntime(backbone: nn.Module, content: bytes, preparation: Preparation) -> str:
    """Return a line that says how far onnxruntime's features are from torch's."""
    if not importlib.util.find_spec("onnxruntime"):
        return "not compared with onnxruntime, which is not installed: pip install onnxruntime"
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    shape = (3, preparation.channels, preparation.size, preparation.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (features,) = session.run(["features"], {"images": images.numpy()})
    expected = backbone(images)
    difference = ((torch.from_numpy(features) - expected).norm() / expected.norm()).item()
    # not `difference > TOLERANCE`: NaN is refused, too
    if not difference <= TOLERANCE:
        text = f"onnxruntime's features differ from torch's by {difference:.2g} of their norm"
        raise ValueError(f"{text}: nothing was written")
    return f"onnxruntime's features differ from torch's by {difference:.2g} of their norm"


# ---------------------------------------------------------------- all


def export(options: ExportConfig) -> list[str]:
    """Write what `options` name, whole or not at all, and return lines that say it."""
    check_flags(options)
    file = read_file(as_file(options.source, options.network) or options.source)
    weights = weights_of(file, options.network)
    try:
        network = open_file(file, options.network, options.arch)
    except UnknownArchitecture:
        if options.format in ("timm", "onnx"):
            raise
        return export_unknown(options, weights)
    if network.preparation is None:
        published = Preparation.of_published(network.model.backbone, network.model.config)
        guessed = f"it does not say how its images were prepared: {published.size} px are taken"
        network = replace(network, preparation=published, notes=(*network.notes, guessed))
    backbone, texts = network.model.backbone.state_dict(), {BACKBONE_CONFIG: describe(network)}
    lines = [f"weights: {note}" for note in network.notes]
    if options.format == "backbone":
        save_tensors(options.out, backbone, texts)
    elif options.format == "timm":
        write_timm(options.out, network, texts)
    elif options.format == "onnx":
        lines.append(write_onnx(options.out, network, texts))
    else:
        tensors = by_original_names(backbone, weights.head)
        write_original(options.out, options.network, tensors, texts)
    if options.format in ("backbone", "timm") and network.model.config.original_pos_embed:
        size = network.model.config.image_size or 224
        text = f"position embeddings: at other sizes than {size} px timm interpolates them its way"
        lines.append(f"{text}, the evaluations here the original's")
    said = f"{network.arch}, images of {network.preparation.size} px"
    return [*lines, f"{describe_tensors(options, backbone, network.arch)}; {said}"]


def export_unknown(options: ExportConfig, weights: Weights) -> list[str]:
    """Write tensors as they are, of a network that this project does not know."""
    if options.format == "backbone":
        save_tensors(options.out, weights.backbone, {})
    else:
        tensors = by_original_names(weights.backbone, weights.head)
        write_original(options.out, options.network, tensors, {})
    text = "weights: of no known architecture: to evaluate them, --arch is needed here or there"
    return [text, describe_tensors(options, weights.backbone, arch=None)]


def describe_tensors(options: ExportConfig, backbone: Tensors, arch: str | None) -> str:
    """Return a line on what was written, and what of it does not fit other projects.

    `arch` is None where it is not known.
    """
    text = f"{options.out}: the {options.network}'s backbone, {len(backbone)} tensors"
    for name, size in sizes_of(backbone).items():
        text += f", {name} {size}"
    if _has_stem_for_small_images(arch, backbone):
        text += "; its 3x3 stem for small images does not fit an ImageNet ResNet's 7x7 conv1"
    return text


def main() -> None:
    for line in export(read_flags(ExportConfig, None, __doc__)):
        print(printable_name(line))


if __name__ == "__main__":
    run_command(main)
