"""Evaluate a frozen backbone by weighted k-nearest neighbours.

    python eval_knn.py runs/patterns-resnet10_half/ckpt.safetensors
    torchrun --nproc_per_node 8 eval_knn.py runs/vits16/ckpt.safetensors --data /imagenet

Architecture, sizes, normalisation and data come from the checkpoint itself; --data overrides.
Protocol of DINO (arXiv 2104.14294, appendix F.1): teacher backbone, cosine similarity, neighbours
vote with weight exp(similarity / 0.07). One search serves every k.
Axes: n train images, m test images, d features, c classes.
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
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as TF

from config import read_flags
from data import ImageDataset, build_dataset, center_crop, collate, index_folder
from distributed import make_accelerator
from models import load_checkpoint, load_tensors, save_tensors
from monitor import iterate, run_command


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: tyro.conf.Positional[Path]  # ckpt.safetensors of a run
    data: str | None = None  # a folder or a data set's name; None: what the run trained on
    student: bool = False  # evaluate the student, from state.safetensors beside the checkpoint
    batch_size: int = 256  # images a forward pass
    num_workers: int = 0  # processes that decode images; about the number of cores for photographs
    json_out: Path | None = None  # write the results there


@dataclass(frozen=True)
class KnnConfig:
    evaluation: EvalConfig
    ks: tuple[int, ...] = (10, 20, 100, 200)  # numbers of neighbours [paper: 10 20 100 200]
    temperature: float = 0.07  # of the votes [paper: 0.07]
    features_out: Path | None = None  # write features and labels there, as safetensors


def check_votes(ks: Sequence[int], temperature: float) -> None:
    """Raise ValueError for numbers of neighbours or a temperature that cannot be meant."""
    if min(ks, default=0) < 1 or not temperature > 0:
        raise ValueError(f"need k >= 1 and a temperature > 0, got k {list(ks)}, {temperature}")


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """Classify test (m, d) by its nearest neighbours in train (n, d): {k: (top-1, top-5)} in %.

    Cosine similarity; a neighbour votes for its class with exp(similarity / temperature). A k above
    n uses all n. Features on any device, labels (n,) and (m,) int64.
    """
    check_votes(ks, temperature)
    train_features = F.normalize(train_features.float(), dim=1)
    test_features = F.normalize(test_features.float(), dim=1)
    num_train = len(train_features)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    ends = sorted({min(k, num_train) for k in ks})
    # similarities of one chunk: 64 MiB suits a CPU's caches, 1 GiB a GPU
    entries = 1 << 24 if train_features.device.type == "cpu" else 1 << 28
    correct = {end: [0, 0] for end in ends}
    for rows in torch.arange(len(test_features)).split(max(1, entries // num_train)):
        similarity = test_features[rows] @ train_features.T
        nearest, neighbours = similarity.topk(ends[-1], dim=1)
        # less the nearest's similarity, which ranks alike and cannot overflow
        votes = ((nearest - nearest[:, :1]) / temperature).exp()
        classes = train_labels[neighbours]
        scores = torch.zeros(len(rows), num_classes, device=votes.device)
        target = test_labels[rows][:, None]
        for start, end in zip([0, *ends], ends, strict=False):  # each k adds to the one before
            scores.scatter_add_(1, classes[:, start:end], votes[:, start:end])
            hits = scores.topk(min(5, num_classes), dim=1).indices == target
            correct[end][0] += int(hits[:, 0].sum())
            correct[end][1] += int(hits.any(dim=1).sum())
    percent = 100 / len(test_features)
    return {k: tuple(percent * hits for hits in correct[min(k, num_train)]) for k in ks}


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
    return features[is_read], labels[is_read]


def evaluation_splits(
    config: dict, index_folder: Path | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """Open the labelled images of a run's resolved config: those remembered, and those that test.

    Images are center crops as the paper's evaluation has them. ValueError without classes.
    """
    source = config["data"]["data"]
    splits = tuple(
        build_dataset(source, split, index_folder=index_folder) for split in ("memory", "test")
    )
    for split in splits:
        size = config["crops"]["global_crop_size"]
        split.transform = partial(center_crop, resize=config["data"]["eval_resize"], size=size)
    return splits


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


def check_folder(path: Path | None, content: str) -> None:
    """Raise ValueError where the file `path` could not be written for want of its folder."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"no such folder for the {content}: {path.parent}")


def checkpoint_features(options: EvalConfig, accelerator: Accelerator) -> tuple[list[Tensor], dict]:
    """Give [train features, train labels, test features, test labels] and facts about them.

    A collective. Raises ValueError for a checkpoint or data that cannot be used.
    """
    check_folder(options.json_out, "results")
    model, metadata = load_checkpoint(options.checkpoint)
    if options.student:
        name = options.checkpoint.name.replace("ckpt", "state", 1)
        state, texts = load_tensors(options.checkpoint.with_name(name))
        step = json.loads(texts.get("metadata", "{}")).get("step")
        if step != metadata.get("step"):
            wanted = f"step {metadata.get('step')} of {options.checkpoint}"
            raise ValueError(f"the student in {name} is of step {step}: need {wanted}")
        prefix = "student."
        model.load_state_dict(
            {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        )
    config = metadata.get("config", {})
    if not {"model", "data", "crops"} <= config.keys():
        raise ValueError(f"{options.checkpoint} does not say how its images were prepared")
    if options.data is not None:
        config["data"]["data"] = options.data
    backbone = model.backbone.to(accelerator.device)
    sizes = options.batch_size, options.num_workers
    with accelerator.local_main_process_first():  # which may have to download
        splits = evaluation_splits(config, index_folder(options.checkpoint.parent))
    tensors = features_of_splits(backbone, splits, config, accelerator, *sizes)
    facts = {
        "checkpoint": str(options.checkpoint),
        "network": "student" if options.student else "teacher",
        "arch": config["model"]["arch"],
        "step": metadata.get("step"),
        "data": config["data"]["data"],
        "num_train": len(tensors[0]),
        "num_test": len(tensors[2]),
        "features": tensors[0].shape[1],
    }
    return tensors, facts


def report(facts: dict, table: Table, results: dict, json_out: Path | None) -> None:
    """Print the table under a line of facts, and write both to `json_out`."""
    console = Console()
    step = "" if facts["step"] is None else f" at step {facts['step']:,}"
    console.print(
        f"[bold]{facts['arch']}[/] {facts['network']}{step}: {facts['features']} features; "
        f"{facts['data']}: {facts['num_train']:,} train, {facts['num_test']:,} test images",
        soft_wrap=True,
    )
    console.print(table)
    if json_out is not None:
        json_out.write_text(json.dumps(facts | results, indent=2) + "\n")


def main() -> None:
    options = read_flags(KnnConfig, None, __doc__)
    check_votes(options.ks, options.temperature)
    out = options.features_out
    check_folder(out, "features")
    accelerator = make_accelerator()
    tensors, facts = checkpoint_features(options.evaluation, accelerator)
    accuracies = knn_accuracy(*tensors, options.ks, options.temperature)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    table = Table("k", "top-1 %", "top-5 %", title="weighted k-NN")
    for k, (top1, top5) in accuracies.items():
        table.add_row(str(k), f"{top1:.2f}", f"{top5:.2f}")
    results = {str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in accuracies.items()}
    results = {"temperature": options.temperature, "knn": results}
    report(facts, table, results, options.evaluation.json_out)
    if out is not None:
        names = ("train_features", "train_labels", "test_features", "test_labels")
        save_tensors(out, dict(zip(names, tensors, strict=True)), {})


if __name__ == "__main__":
    run_command(main)
