"""Features of a frozen backbone, for the evaluations: which images, which layers, how good.

Source: DINO, arXiv 2104.14294, appendix F. Axes: n images, d features, b batch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as TF

from data import ImageDataset, build_dataset, center_crop, collate, index_folder
from models import load_tensors
from monitor import iterate
from weights import as_file, open_network, preparation_of


@dataclass(frozen=True)
class EvalConfig:
    # ckpt.safetensors of a run, an original's .pth, or the name of published weights: dino_vits16
    checkpoint: tyro.conf.Positional[str]
    data: str | None = None  # a folder or a data set's name; None: what the run trained on
    student: bool = False  # evaluate the student, from state.safetensors beside the checkpoint
    batch_size: int = 256  # images a forward pass
    num_workers: int = 0  # processes that decode images; about the number of cores for photographs
    json_out: Path | None = None  # write the results there


@torch.no_grad()
def extract_features(
    forward: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> tuple[Tensor, Tensor]:
    """Give features (n, d) float32 and labels (n,) of all images, in the data's order.

    `forward` maps uint8 images on the device to features. What cannot be decoded is left out, and
    said. A collective: each process takes every world-th image, and all get all features.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    # all processes must gather as many: the last image is repeated, and the cut below drops it
    last = len(dataset) - 1
    rows = [min(row, last) for row in range(rank, rank + world * (last // world + 1), world)]
    parts: list[tuple[Tensor, ...]] = []
    images = Subset(dataset, rows)
    loader = DataLoader(images, batch_size, num_workers=num_workers, collate_fn=collate)
    for batch in iterate(loader):
        facts = (batch.label, batch.source == batch.index)
        features = forward(batch.image.to(accelerator.device)).float()
        parts.append((features, *(x.to(accelerator.device) for x in facts)))
    of_ranks = gather(tuple(torch.cat(part) for part in zip(*parts, strict=True)))
    of_all = (rearrange(x, "(w i) ... -> (i w) ...", w=world)[: last + 1] for x in of_ranks)
    features, labels, is_read = of_all
    if not is_read.all():
        num = int((~is_read).sum())
        accelerator.print(f"warning: {num} of {last + 1:,} images cannot be decoded: left out")
        features, labels = features[is_read], labels[is_read]  # else no copy of what may be large
    return features, labels


def evaluation_splits(
    config: dict, index_folder: Path | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """Open the labelled images of a run's resolved config: those remembered, and those that test.

    Images are center crops as the paper's evaluation has them. ValueError without classes.
    """
    source = config["data"]["data"]
    memory, test = (build_dataset(source, x, index_folder=index_folder) for x in ("memory", "test"))
    return center_cropped(memory, config), center_cropped(test, config)


def center_cropped(dataset: ImageDataset, config: dict) -> ImageDataset:
    size, resize = config["crops"]["global_crop_size"], config["data"]["eval_resize"]
    dataset.transform = partial(center_crop, resize=resize, size=size)
    return dataset


def normalized(images: Tensor, config: dict) -> Tensor:
    """Turn uint8 images (b, 3, h, w) into what the backbone of a run was trained on."""
    images = TF.to_dtype(images, torch.float32, scale=True)
    return TF.normalize(images, config["crops"]["mean"], config["crops"]["std"])


def features_of_splits(
    backbone: Callable[[Tensor], Tensor],
    splits: Sequence[Dataset],
    config: dict,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> list[Tensor]:
    """Give features and labels of each split in turn, for a run's resolved config. A collective."""
    tensors: list[Tensor] = []
    for split in splits:
        forward = lambda images: backbone(normalized(images, config))  # noqa: E731
        tensors += extract_features(forward, split, accelerator, batch_size, num_workers)
    return tensors


def layer_features(
    backbone: nn.Module, num_last_blocks: int = 1, avgpool: bool = False
) -> Callable[[Tensor], Tensor]:
    """Give the function from images to features that the original's linear evaluation reads.

    Of a ViT the normalised class tokens of the last blocks and, with `avgpool`, the mean of the
    last block's patch tokens; of other networks their output. Raises ValueError for more.
    """
    if num_last_blocks == 1 and not avgpool:
        return backbone
    if not is_vit(backbone):
        raise ValueError("--n-last-blocks and --avgpool need a ViT of timm with a class token")
    num_blocks = len(backbone.blocks)
    if not 1 <= num_last_blocks <= num_blocks:
        raise ValueError(f"need --n-last-blocks from 1 to {num_blocks}, got {num_last_blocks}")
    read = partial(
        backbone.forward_intermediates,
        indices=num_last_blocks,
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )

    def forward(images: Tensor) -> Tensor:
        blocks = read(images)
        tokens = [prefix[:, 0] for _, prefix in blocks]
        if avgpool:
            tokens.append(blocks[-1][0].mean(dim=1))
        return torch.cat(tokens, dim=-1)

    return forward


def is_vit(backbone: nn.Module) -> bool:
    """Tell whether a network is a ViT of timm that is read by its class token."""
    blocks, read = getattr(backbone, "blocks", None), hasattr(backbone, "forward_intermediates")
    return bool(blocks and read and getattr(backbone, "has_class_token", False))


RANKME_IMAGES = 25_600  # as many as its authors took


def evenly(num: int, most: int = RANKME_IMAGES) -> Tensor:
    """Give at most `most` of the rows 0 to num - 1, evenly spaced."""
    return torch.linspace(0, num - 1, min(num, most), dtype=torch.float64).long()


@torch.no_grad()
def feature_quality(features: Tensor) -> dict[str, object]:
    """Judge features (n, d) without labels: RankMe and the leading components' share of variance.

    RankMe (Garrido et al., arXiv 2210.02885) is exp of the entropy of the singular values' shares:
    the number of dimensions in use, 1 for a collapsed network. Of at most RANKME_IMAGES.
    """
    features = features[evenly(len(features)).to(features.device)].double()
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=1e-300) + 1e-7
    variances = torch.linalg.svdvals(features - features.mean(dim=0)).square()
    variances = variances.cumsum(dim=0) / variances.sum().clamp(min=1e-300)
    leading = {k: variances[k - 1].item() for k in (1, 10, 100) if k <= len(variances)}
    rankme = (-(shares * shares.log()).sum()).exp().item()
    return {"rankme": rankme, "variance_share": leading}


def check_folder(path: Path | None, content: str) -> None:
    """Raise ValueError where the file `path` could not be written for want of its folder."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"no such folder for the {content}: {path.parent}")


@dataclass(frozen=True)
class Network:
    """A frozen backbone on its device, the config that says how its images were prepared."""

    backbone: nn.Module
    config: dict
    facts: dict


def open_backbone(options: EvalConfig, accelerator: Accelerator) -> Network:
    """Load what `options` name. Raises ValueError or OSError for what cannot be used."""
    check_folder(options.json_out, "results")
    if options.student and as_file(options.checkpoint) is None:
        raise ValueError(f"{options.checkpoint} is published as one network: not with --student")
    path, wanted = Path(options.checkpoint), "student" if options.student else "teacher"
    model, metadata = open_network(options.checkpoint, wanted)
    if options.student and "step" in metadata:  # a run's own, which keeps it beside the teacher
        name = path.name.replace("ckpt", "state", 1)
        state, texts = load_tensors(path.with_name(name))
        step = json.loads(texts.get("metadata", "{}")).get("step")
        if step != metadata.get("step"):
            wanted = f"step {metadata.get('step')} of {path}"
            raise ValueError(f"the student in {name} is of step {step}: need {wanted}")
        prefix = "student."
        model.load_state_dict(
            {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        )
    config = preparation_of(metadata, path)
    if options.data is not None:
        config["data"]["data"] = options.data
    if not config["data"].get("data"):
        raise ValueError(f"{path} does not come with data: need --data")
    facts = {
        "checkpoint": options.checkpoint,
        "network": wanted,
        "arch": config["model"]["arch"],
        "step": metadata.get("step"),
        "data": config["data"]["data"],
    }
    return Network(model.backbone.to(accelerator.device).eval(), config, facts)


def open_splits(
    network: Network, options: EvalConfig, accelerator: Accelerator
) -> tuple[ImageDataset, ImageDataset]:
    """Open the images that a network is evaluated on: those remembered, and those that test."""
    with accelerator.local_main_process_first():  # which may have to download
        return evaluation_splits(network.config, index_folder(Path(options.checkpoint).parent))


def size_facts(train: Tensor, test: Tensor | None = None) -> dict[str, object]:
    """Count features of images, (n, d) and (m, d), and say how good the first are."""
    sizes = {"num_train": len(train), "num_test": 0 if test is None else len(test)}
    return sizes | {"features": train.shape[1]} | feature_quality(train)


def report(facts: dict, table: Table | None, results: dict, json_out: Path | None) -> None:
    """Print the table under a line of facts, and write both to `json_out`."""
    console = Console()
    step = "" if facts["step"] is None else f" at step {facts['step']:,}"
    num_train, num_test = facts["num_train"], facts["num_test"]
    images = (
        f"{num_train:,} train, {num_test:,} test images" if num_test else f"{num_train:,} images"
    )
    console.print(
        f"[bold]{facts['arch']}[/] {facts['network']}{step}: {facts['features']} features; "
        f"{facts['data']}: {images}",
        soft_wrap=True,
    )
    if "rankme" in facts:
        leading = facts["variance_share"].items()
        shares = ", ".join(f"{100 * x:.0f} % in {k}" for k, x in leading)
        console.print(f"RankMe {facts['rankme']:.1f}; variance by components: {shares}")
    if table is not None:
        console.print(table)
    if json_out is not None:
        json_out.write_text(json.dumps(facts | results, indent=2) + "\n")
