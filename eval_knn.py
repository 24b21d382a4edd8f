"""Evaluate a frozen backbone by weighted k-nearest neighbours.

    python eval_knn.py runs/patterns-resnet10_half/ckpt.safetensors
    python eval_knn.py dino_vits16 --data /imagenet --num-workers 16
    torchrun --nproc_per_node 8 eval_knn.py runs/vits16/ckpt.safetensors --data /imagenet

Architecture, sizes, normalisation and data come from the checkpoint itself; --data overrides.
Protocol of DINO (arXiv 2104.14294, appendix F.1): teacher backbone, cosine similarity, neighbours
vote with weight exp(similarity / 0.07). One search serves every k.
Axes: n train images, m test images, d features, c classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset

from config import read_flags
from data import build_dataset, index_folder
from distributed import make_accelerator
from features import (
    EvalConfig,
    Network,
    center_cropped,
    check_folder,
    evenly,
    features_of_splits,
    open_backbone,
    open_splits,
    report,
    size_facts,
)
from models import save_tensors
from monitor import run_command


@dataclass(frozen=True)
class KnnConfig:
    evaluation: EvalConfig
    ks: tuple[int, ...] = (10, 20, 100, 200)  # numbers of neighbours [paper: 10 20 100 200]
    temperature: float = 0.07  # of the votes [paper: 0.07]
    rank_only: bool = False  # RankMe alone, of up to 25,600 training images: needs no classes
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


def print_rank(network: Network, options: EvalConfig, accelerator: Accelerator) -> None:
    """Judge the features of the training images without labels. A collective."""
    with accelerator.local_main_process_first():  # which may have to download
        folder = index_folder(Path(options.checkpoint).parent)
        images = build_dataset(network.config["data"]["data"], index_folder=folder)
    images = center_cropped(images, network.config)
    images = Subset(images, evenly(len(images)).tolist())
    sizes = options.batch_size, options.num_workers
    args = [images], network.config, accelerator, *sizes
    features, _ = features_of_splits(network.backbone, *args)
    accelerator.end_training()
    if accelerator.is_main_process:
        report(network.facts | size_facts(features), None, {}, options.json_out)


def main() -> None:
    options = read_flags(KnnConfig, None, __doc__)
    check_votes(options.ks, options.temperature)
    out = options.features_out
    check_folder(out, "features")
    if options.rank_only and out is not None:
        raise ValueError("--features-out writes what k-NN compares: not with --rank-only")
    accelerator = make_accelerator()
    evaluation = options.evaluation
    network = open_backbone(evaluation, accelerator)
    if options.rank_only:
        return print_rank(network, evaluation, accelerator)
    splits = open_splits(network, evaluation, accelerator)
    sizes = evaluation.batch_size, evaluation.num_workers
    tensors = features_of_splits(network.backbone, splits, network.config, accelerator, *sizes)
    accuracies = knn_accuracy(*tensors, options.ks, options.temperature)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    table = Table("k", "top-1 %", "top-5 %", title="weighted k-NN")
    for k, (top1, top5) in accuracies.items():
        table.add_row(str(k), f"{top1:.2f}", f"{top5:.2f}")
    results = {str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in accuracies.items()}
    results = {"temperature": options.temperature, "knn": results}
    report(network.facts | size_facts(tensors[0], tensors[2]), table, results, evaluation.json_out)
    if out is not None:
        names = ("train_features", "train_labels", "test_features", "test_labels")
        save_tensors(out, dict(zip(names, tensors, strict=True)), {})


if __name__ == "__main__":
    run_command(main)
