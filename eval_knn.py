"""Evaluate a frozen backbone by weighted k-nearest neighbours.

    python eval_knn.py runs/patterns-resnet10_half/ckpt.safetensors
    python eval_knn.py dino_vits16 --data /imagenet --num-workers 16
    python eval_knn.py dino_vits16 --data photos --shots 1 5 10 20
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
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset

from config import setting
from harness.command import read_flags, run_command
from harness.distributed import make_accelerator
from harness.evaluation import (
    EvalConfig,
    FrozenBackbone,
    check_folder,
    features_of_splits,
    open_backbone,
    open_splits,
    open_training_images,
    report,
    size_facts,
    write_results,
)
from harness.feature_quality import evenly
from harness.few_labels import (
    ShotsConfig,
    caption_of_shots,
    draw_shots,
    mean_and_spread,
)
from harness.flags import check_ranges
from harness.linear_probe import num_classes_of
from models import save_tensors

# similarities of one chunk: 64 MiB suit a CPU's caches, 1 GiB a GPU
ENTRIES_ON_CPU = 1 << 24
ENTRIES_ON_GPU = 1 << 28

Accuracies = dict[int, tuple[float, float]]  # by k: top-1 and top-5, in %


@dataclass(frozen=True)
class KnnConfig:
    evaluation: EvalConfig
    few_labels: ShotsConfig
    # numbers of neighbours [paper: 10 20 100 200]
    ks: tuple[int, ...] = setting((10, 20, 100, 200), above=0, most=1_000_000)
    # temperature of the votes [paper: 0.07]
    temperature: float = setting(0.07, above=0, most=100)
    # RankMe alone, of up to 25,600 training images: needs no classes
    rank_only: bool = False
    # file for features and labels, as safetensors
    features_out: Path | None = None


def check_votes(ks: Sequence[int], temperature: float) -> None:
    """Raise ValueError for numbers of neighbours or a temperature out of range."""
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
) -> Accuracies:
    """Return {k: (top-1, top-5)} in % of test (m, d), classified by neighbours in train (n, d).

    Similarity is the cosine; a neighbour votes for its class with exp(similarity / temperature). A
    class without a vote is none of the five. A k above n uses all n. Features may be on any device;
    labels (n,) and (m,) are int64.
    """
    check_votes(ks, temperature)
    train_features = F.normalize(train_features.float(), dim=1)
    test_features = F.normalize(test_features.float(), dim=1)
    num_train = len(train_features)
    num_classes = num_classes_of(train_labels, test_labels)
    nums_of_neighbours = sorted({min(k, num_train) for k in ks})
    entries = ENTRIES_ON_CPU if train_features.device.type == "cpu" else ENTRIES_ON_GPU
    right_top1 = dict.fromkeys(nums_of_neighbours, 0)
    right_top5 = dict.fromkeys(nums_of_neighbours, 0)
    for rows in torch.arange(len(test_features)).split(max(1, entries // num_train)):
        similarity = test_features[rows] @ train_features.T
        nearest, neighbours = similarity.topk(nums_of_neighbours[-1], dim=1)
        # less the nearest's similarity: that ranks alike, and cannot overflow
        votes = ((nearest - nearest[:, :1]) / temperature).exp()
        classes = train_labels[neighbours]
        scores = torch.zeros(len(rows), num_classes, device=votes.device)
        target = test_labels[rows][:, None]
        start = 0
        for end in nums_of_neighbours:  # each number adds its votes to those of the one before
            scores.scatter_add_(1, classes[:, start:end], votes[:, start:end])
            best_scores, best_classes = scores.topk(min(5, num_classes), dim=1)
            # the original takes a class without a vote, too, for one of the five best guesses
            hits = (best_classes == target) & (best_scores > 0)
            right_top1[end] += int(hits[:, 0].sum())
            right_top5[end] += int(hits.any(dim=1).sum())
            start = end
    percent = 100 / len(test_features)
    return {
        k: (percent * right_top1[min(k, num_train)], percent * right_top5[min(k, num_train)])
        for k in ks
    }


def knn_of_shots(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    options: KnnConfig,
) -> dict[str, dict]:
    """Return top-1 in % by number of shots, then by k: neighbours among a few images a class.

    Mean and spread are over the draws of these few.
    """
    config = options.few_labels
    results: dict[str, dict] = {}
    for shots in config.shots:
        accuracies = []
        for draw in range(config.draws):
            rows = draw_shots(train_labels, shots, config.draw_seed, draw)
            memory = train_features[rows], train_labels[rows]
            accuracies.append(
                knn_accuracy(*memory, test_features, test_labels, options.ks, options.temperature)
            )
        results[str(shots)] = {
            str(k): mean_and_spread([of_draw[k][0] for of_draw in accuracies]) for k in options.ks
        }
    return results


def table_of_shots(results: dict[str, dict], ks: Sequence[int]) -> Table:
    """Return a table of knn_of_shots: a line for each number of shots, a column for each k."""
    table = Table("images a class", *(f"k {k}" for k in ks), title="few labels, k-NN top-1 %")
    for shots, by_k in results.items():
        table.add_row(shots, *(f"{x['mean']:.2f} ± {x['std']:.2f}" for x in by_k.values()))
    return table


def print_rank(network: FrozenBackbone, options: EvalConfig, accelerator: Accelerator) -> None:
    """Print how good the training images' features are, without labels. A collective."""
    images = open_training_images(network.preparation, accelerator)
    some_images = Subset(images, evenly(len(images)).tolist())
    ((features, _),) = features_of_splits(
        network.backbone,
        [some_images],
        network.preparation,
        accelerator,
        options.batch_size,
        options.num_workers,
    )
    accelerator.end_training()
    if accelerator.is_main_process:
        facts = network.facts | size_facts(features)
        report(facts, None)
        write_results(options.json_out, facts, {})


# ---------------------------------------------------------------- main


def check_flags(options: KnnConfig) -> None:
    """Raise ValueError for settings out of range, or that contradict each other."""
    check_ranges(options)
    check_votes(options.ks, options.temperature)
    check_folder(options.features_out, "features")
    json_out = options.evaluation.json_out
    if options.features_out is not None and options.features_out == json_out:
        raise ValueError(f"need two files for --features-out and --json-out, got {json_out} twice")
    if options.rank_only and options.features_out is not None:
        raise ValueError("--features-out writes what k-NN compares: not with --rank-only")
    if options.rank_only and options.few_labels.shots:
        raise ValueError("--shots needs k-NN: not with --rank-only")


def table_of(accuracies: Accuracies, num_train: int, num_classes: int) -> Table:
    """Return a table of knn_accuracy: a line for each k up to `num_train`, the number of images.

    If all are larger: for the smallest alone, which then takes all images.
    """
    table = Table("k", "top-1 %", title="weighted k-NN")
    if num_classes > 5:  # else any guess is among the five
        table.add_column("top-5 %")
    for k, (top1, top5) in accuracies.items():
        if k <= num_train or k == min(accuracies):
            cells = (f"{top1:.2f}", f"{top5:.2f}")
            table.add_row(str(k), *cells[: len(table.columns) - 1])
    return table


def main() -> None:
    options = read_flags(KnnConfig, None, __doc__)
    check_flags(options)
    evaluation, few_labels = options.evaluation, options.few_labels
    accelerator = make_accelerator(evaluation.mixed_precision)
    network = open_backbone(evaluation, accelerator)
    if options.rank_only:
        print_rank(network, evaluation, accelerator)
        return
    (train_features, train_labels), (test_features, test_labels) = features_of_splits(
        network.backbone,
        open_splits(network, accelerator),
        network.preparation,
        accelerator,
        evaluation.batch_size,
        evaluation.num_workers,
    )
    compared = (train_features, train_labels, test_features, test_labels)
    accuracies = knn_accuracy(*compared, options.ks, options.temperature)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    results: dict[str, object] = {
        "temperature": options.temperature,
        "knn": {str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in accuracies.items()},
    }
    if few_labels.shots:
        results["shots"] = knn_of_shots(*compared, options)
    facts = network.facts | size_facts(train_features, test_features)
    num_classes = num_classes_of(train_labels, test_labels)
    table = table_of(accuracies, len(train_features), num_classes)
    report(facts, table)
    if few_labels.shots:
        table = table_of_shots(results["shots"], options.ks)
        table.caption = caption_of_shots(train_labels, few_labels)
        Console().print(table)
    # before the features, which may fill the disk
    write_results(evaluation.json_out, facts, results)
    if options.features_out is not None:
        names = ("train_features", "train_labels", "test_features", "test_labels")
        save_tensors(options.features_out, dict(zip(names, compared, strict=True)), {})


if __name__ == "__main__":
    run_command(main)
