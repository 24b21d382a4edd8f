"""Evaluations of a frozen backbone: its images as it knows them, its features, what is reported.

To add an evaluation: a script like eval_knn.py, whose main calls read_flags, open_backbone,
open_splits, features_of_splits, report and write_results. Images that cannot be decoded have no row
of features.

Source: DINO, arXiv 2104.14294, appendix F. Axes: n images, d features, b batch.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from config import setting
from data import ImageDataset, Sample, build_dataset, collate
from folders import cache_folder
from harness.command import iterate, write_whole
from harness.distributed import usual_workers
from harness.feature_maps import chosen_side, sizes_named
from harness.feature_quality import feature_quality
from harness.foreign import Role
from harness.opened_network import (
    Preparation,
    is_of_run,
    normalized,
    open_network,
    require_preparation,
)
from harness.terminal import printable, printable_name
from harness.weights import as_file
from models import tensors_checksum
from pixels import levels_in_words
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
    # pixels, side of the central crop; None: as the network's own evaluation. Smaller is faster:
    # DINOv2's weights are made for 518
    eval_size: int | None = setting(None, above=0, most=4096)
    # precision of the network; its features are float32 all the same
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    # images a forward pass
    batch_size: int = setting(256, above=0, most=1_000_000)
    # processes that decode images; 0: the script itself does; None: 0 on a CPU, where 1 or 2 help
    # with photographs, and with a GPU one for each core but one, at most 16
    num_workers: int | None = setting(None, most=512)
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
    if options.eval_size is not None:
        preparation = _at_size(preparation, options.eval_size)
    facts = {
        "checkpoint": str(source),
        "network": role,
        "arch": network.arch,
        "step": step,
        "backbone_crc32": tensors_checksum(network.model.backbone.state_dict()),
        "data": preparation.data,
        "eval_size": preparation.size,
        "mixed_precision": options.mixed_precision,
    }
    metrics = network.metadata.get("metrics") or {}
    are_own_images = options.data is None and options.val is None and options.splits
    if are_own_images and options.eval_size is None and "knn_top1_untrained" in metrics:
        facts["knn_top1_untrained"] = metrics["knn_top1_untrained"]  # measured by the run itself
    backbone = network.model.backbone.to(accelerator.device).eval()
    if options.eval_size is not None:  # one that it may not take
        side, channels = preparation.size, preparation.channels
        blank = torch.zeros(1, channels, side, side, device=accelerator.device)
        with sizes_named(network.arch, blank), torch.no_grad():
            backbone(blank)
    return FrozenBackbone(backbone, preparation, facts)


def _at_size(preparation: Preparation, size: int) -> Preparation:
    """Return how images are prepared for another central crop, which keeps its share of them."""
    resize = round(preparation.resize * size / preparation.size)
    return replace(preparation, size=size, resize=max(resize, size))


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
    del network.facts["eval_size"]  # its images are no central crops
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


def workers_for(dataset: Dataset, device: torch.device) -> int:
    """Return how many processes should decode images.

    None on a CPU, where they would take the network's time, or for images that are in memory.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    is_in_memory = isinstance(getattr(dataset, "images", None), Tensor)
    return 0 if device.type == "cpu" or is_in_memory else usual_workers()


@torch.no_grad()
def extract(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int | None,
    dtype: torch.dtype = torch.float32,
) -> Extracted:
    """Compute the features of all images, in the data's order.

    `forward` maps uint8 images on the device to features. `num_workers` None are those of
    `workers_for`. An image that cannot be decoded is left out, and that is said. A collective: each
    process takes every world-th image, and all get all features.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    last = len(dataset) - 1
    # all processes must gather as many: the last image is repeated, and the cut below drops it
    rows_per_process = last // world + 1
    rows = [min(rank + world * number, last) for number in range(rows_per_process)]
    device = accelerator.device
    loader = DataLoader(
        Subset(dataset, rows),
        batch_size,
        num_workers=workers_for(dataset, device) if num_workers is None else num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    # filled batch by batch: to join all of them at the end would take twice the memory
    filled: tuple[Tensor, ...] = ()
    start = 0
    for batch in _with_progress(iterate(loader), len(rows), accelerator):
        with accelerator.autocast():
            # from pinned memory alone: an Apple GPU might read a batch that is freed already
            images = batch.image.to(device, non_blocking=device.type == "cuda")
            features = forward(images).to(dtype)
        is_read = batch.source == batch.index
        facts = (x.to(device) for x in (batch.label, batch.index, is_read))
        of_ranks = gather((features, *facts))
        # they come process by process: put back in the data set's order, one image of each in turn
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
    num_workers: int | None,
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
    num_workers: int | None,
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

    Called once everything is printed: a full disk then costs nothing that was computed.
    """
    if json_out is not None:
        write_whole(json_out, json.dumps(facts | results, indent=2) + "\n")
