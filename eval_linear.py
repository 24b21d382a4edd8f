"""Evaluate a frozen backbone by a linear probe, for several learning rates at once.

    python eval_linear.py runs/patterns-resnet10_half/ckpt.safetensors
    python eval_linear.py dino_vits16 --data /imagenet --json-out linear.json
    python eval_linear.py dino_vits16 --data photos --shots 1 5 10 20
    torchrun --nproc_per_node 8 eval_linear.py ckpt.safetensors --data /imagenet --augment

All probes train in one pass, with the optimizer of DINO (arXiv 2104.14294, appendix F.2): SGD with
momentum 0.9, no weight decay, cosine learning rate, 100 epochs, on the last blocks' class tokens.
With --augment on random crops, as published; else on features of center crops, computed once.
Axes: n images, b batch, d features, c classes, r learning rates.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from einops import einsum, rearrange
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from config import setting
from data import ImageDataset, Sample, StepSampler, collate, permutation
from harness.command import iterate, read_flags, run_command
from harness.decoded_once import ImageMemory
from harness.distributed import make_accelerator
from harness.evaluation import (
    EvalConfig,
    check_folder,
    features_of_splits,
    is_vit,
    layer_features,
    open_backbone,
    open_splits,
    report,
    size_facts,
    workers_for,
    write_results,
)
from harness.few_labels import (
    ShotsConfig,
    caption_of_shots,
    draw_shots,
    mean_and_spread,
)
from harness.flags import check_ranges
from harness.linear_probe import num_classes_of
from harness.opened_network import Preparation
from models import save_tensors
from multicrop import boxes_on_canvas, draw_boxes, hash_keys, resized_crops, uniforms

CROP_SCALE = (0.08, 1.0)  # shares of the area that --augment cuts
MOST_DENSE_CLASSES = 100  # above them, most pairs of the confusion matrix are 0
Accuracies = dict[float, tuple[float, float]]  # by learning rate: top-1 and top-5 in %


@dataclass(frozen=True)
class LinearConfig:
    evaluation: EvalConfig
    few_labels: ShotsConfig = field(default_factory=ShotsConfig)
    # learning rates for a batch of 256; ResNets want the large ones, ViTs the small [paper: 0.001,
    # ResNet-50: 0.3]
    lrs: tuple[float, ...] = setting(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), above=0, most=1000
    )
    # passes over the training images [paper: 100]
    epochs: int = setting(100, above=0, most=1_000_000)
    # images a step, over all processes [paper: 1024]
    probe_batch_size: int = setting(256, above=0, most=1_000_000)
    # last blocks of a ViT whose class tokens are read; None, as in the paper: 4 up to a width of
    # 384, above that 1 with --avgpool
    n_last_blocks: int | None = setting(None, above=0, most=1000)
    # read the mean of the patch tokens too
    avgpool: bool = False
    # train on random crops and flips, one pass of the network each epoch, instead of on center
    # crops that it sees once; images that do not fill an epoch's last batch are left out of that
    # epoch [paper: yes]
    augment: bool = False
    # file for the best rate's probe, as safetensors: weight (classes, features) and bias. The
    # features are those of embed.py with --n-last-blocks 1, with --avgpool those of its --tokens
    # concat
    probe_out: Path | None = None
    # fixes the initial weights, the order of the images and their crops
    seed: int = setting(0, most=1 << 62)


class Probes:
    """A linear classifier for each rate of lrs (r,): weight (r, c, d), bias (r, c).

    They share their batches and nothing else: each ends as if trained alone.
    """

    def __init__(self, features: Tensor, num_classes: int, lrs: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_classes, features.shape[-1])
        weight = (0.01 * torch.randn(shape, generator=generator)).to(features)
        self.lrs = lrs
        self.num_classes = num_classes
        self.weight = weight.expand(len(lrs), *shape).clone()
        self.bias = torch.zeros_like(self.weight[..., 0])
        self.weight_velocity = torch.zeros_like(self.weight)
        self.bias_velocity = torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (r, b, c) of features (b, d)."""
        return einsum(features, self.weight, "b d, r c d -> r b c") + self.bias[:, None]

    def step(self, features: Tensor, labels: Tensor, progress: float) -> None:
        """Take a step of SGD, `progress` of the way down the cosine, in place."""
        rates = self.lrs * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)))
        # the gradient of the mean cross-entropy, in closed form
        error = self.logits(features).softmax(dim=-1) - F.one_hot(labels, self.num_classes)
        error = error / len(labels)
        self.weight_velocity.mul_(0.9).add_(einsum(error, features, "r b c, b d -> r c d"))
        self.bias_velocity.mul_(0.9).add_(error.sum(dim=1))
        self.weight -= rates[:, None, None] * self.weight_velocity
        self.bias -= rates[:, None] * self.bias_velocity


def train_probes(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    num_classes: int,
    lrs: Tensor,
    config: LinearConfig,
) -> Probes:
    """Train probes on some rows (m,) of features (n, d) and labels (n,) that are computed."""
    probes = Probes(features, num_classes, lrs, config.seed)
    for epoch in range(config.epochs):
        order = permutation(len(rows), config.seed, epoch).to(rows.device)
        for of_batch in rows[order].split(config.probe_batch_size):
            probes.step(features[of_batch], labels[of_batch], epoch / config.epochs)
    return probes


def random_crops(batch: Sample, size: int, seed: int, device: torch.device) -> Tensor:
    """Return a random crop (b, c, size, size) in 0..1 of each image, half of them flipped.

    Crops are bicubic, the original's bilinear. They depend on seed, epoch and image alone.
    """
    images, sizes, epoch, index = (
        part.to(device, non_blocking=device.type == "cuda")
        for part in (batch.image, batch.size, batch.epoch, batch.index)
    )
    draws = uniforms(hash_keys(seed, epoch, index), 23)
    boxes = draw_boxes(draws[:, :22], sizes, CROP_SCALE)
    boxes = boxes_on_canvas(boxes, sizes, images.shape[-1])
    crops = resized_crops(images, boxes[None], size)
    is_flipped = (draws[:, 22] < 0.5)[:, None, None, None]
    return torch.where(is_flipped, crops.flip(-1), crops)


@torch.no_grad()
def train_on_crops(
    forward: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    size: int,
    num_classes: int,
    config: LinearConfig,
    accelerator: Accelerator,
) -> Probes:
    """Train probes on random crops and flips, drawn anew each epoch, as published. A collective.

    `forward` returns the features of crops in 0..1 of `size` pixels. The probes are the same in all
    processes, which share the images of a step.
    """
    device = accelerator.device
    # A crop may show as little as 0.08 of an image, so canvases are larger than crops: 384 px for
    # 224, in that proportion for others, at most 384 or the crop's own size.
    canvas_size = max(size, min(384, round(size * 384 / 224)))
    images = dataset.as_canvases(canvas_size)
    num_workers = config.evaluation.num_workers
    if num_workers is None:
        num_workers = workers_for(dataset, device)
    memory = ImageMemory(is_wanted=True, num_workers=num_workers)
    images = memory.keep(images, canvas_size, dataset.channels)
    rank, world = accelerator.process_index, accelerator.num_processes
    each = max(1, min(config.probe_batch_size, len(dataset)) // world)

    def sampler(steps: range) -> StepSampler:
        return StepSampler(len(dataset), each, config.seed, rank, world, steps)

    steps_per_epoch = sampler(range(0)).steps_per_epoch
    total_steps = steps_per_epoch * config.epochs
    loader = DataLoader(
        images,
        batch_sampler=sampler(range(total_steps)),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    lrs = torch.tensor(config.lrs, device=device) * each * world / 256
    probes = None
    num_unreadable = torch.zeros((), dtype=torch.int64)
    batches = iterate(loader)
    is_hidden = not accelerator.is_main_process
    for step in track(range(total_steps), "training probes", disable=is_hidden, transient=True):
        batch = next(batches)
        epoch = step // steps_per_epoch
        if epoch == 0:  # which takes each image once at most
            num_unreadable += (batch.source != batch.index).sum()
        crops = random_crops(batch, size, config.seed, device)
        with accelerator.autocast():
            features = forward(crops).float()
        features, labels = gather((features, batch.label.to(device)))
        if probes is None:
            probes = Probes(features, num_classes, lrs, config.seed)
        probes.step(features, labels, epoch / config.epochs)
    num = int(accelerator.reduce(num_unreadable.to(device)))
    if num:
        accelerator.print(f"warning: {num} images cannot be decoded: others took their place")
    return probes


def check_probes(config: LinearConfig) -> None:
    """Raise ValueError for settings out of range."""
    if min(config.lrs, default=0) <= 0 or config.epochs < 1 or config.probe_batch_size < 1:
        given = f"lrs {config.lrs}, epochs {config.epochs}, batch {config.probe_batch_size}"
        raise ValueError(f"need lrs > 0, epochs >= 1 and a batch >= 1, got {given}")


def fit_probes(
    features: Tensor, labels: Tensor, rows: Tensor, num_classes: int, config: LinearConfig
) -> Probes:
    """Train a probe for each of the config's rates, scaled by the batch, on rows of features."""
    # by the batch that was asked for, also where there are fewer images: their few steps want
    # large rates
    lrs = torch.tensor(config.lrs, device=features.device) * config.probe_batch_size / 256
    return train_probes(features, labels, rows, num_classes, lrs, config)


def all_rows(labels: Tensor) -> Tensor:
    return torch.arange(len(labels), device=labels.device)


def linear_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    config: LinearConfig,
) -> Accuracies:
    """Return the accuracies on the test features (m, d), of a probe for each learning rate."""
    check_probes(config)
    num_classes = num_classes_of(train_labels, test_labels)
    rows = all_rows(train_labels)
    probes = fit_probes(train_features, train_labels, rows, num_classes, config)
    return accuracies_of(probes, test_features, test_labels, config.lrs)


def linear_of_shots(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    config: LinearConfig,
) -> dict[str, dict]:
    """Return top-1 in % by number of shots: of probes that a few images a class train.

    Mean and spread are over the draws of these few; `best_lr` has the highest mean.
    """
    few_labels = config.few_labels
    results: dict[str, dict] = {}
    for shots in few_labels.shots:
        accuracies: list[Accuracies] = []
        for draw in range(few_labels.draws):
            rows = draw_shots(train_labels, shots, few_labels.draw_seed, draw)
            some_features, some_labels = train_features[rows], train_labels[rows]
            accuracies.append(
                linear_accuracy(some_features, some_labels, test_features, test_labels, config)
            )
        by_lr = {
            f"{lr:g}": mean_and_spread([of_draw[lr][0] for of_draw in accuracies])
            for lr in config.lrs
        }
        best = max(by_lr, key=lambda lr: by_lr[lr]["mean"])
        results[str(shots)] = {"best_lr": float(best), "best_top1": by_lr[best], "by_lr": by_lr}
    return results


def table_of_shots(results: dict[str, dict]) -> Table:
    """Return a table of linear_of_shots: a line for each number of shots."""
    title = "few labels, linear probe"
    table = Table(
        "images a class", "top-1 %", "learning rate, best on the test images", title=title
    )
    for shots, of_shots in results.items():
        top1 = of_shots["best_top1"]
        cells = (f"{top1['mean']:.2f} ± {top1['std']:.2f}", f"{of_shots['best_lr']:g}")
        table.add_row(shots, *cells)
    return table


def accuracies_of(
    probes: Probes, features: Tensor, labels: Tensor, lrs: Sequence[float]
) -> Accuracies:
    """Return the accuracies of probes on features (m, d) of labels (m,)."""
    right_top1 = torch.zeros(len(lrs), dtype=torch.float64)
    right_top5 = torch.zeros(len(lrs), dtype=torch.float64)
    for rows, targets in zip(features.split(1024), labels.split(1024), strict=True):
        guesses = probes.logits(rows).topk(min(5, probes.num_classes), dim=-1).indices
        hits = guesses == rearrange(targets, "b -> b 1")
        right_top1 += hits[..., 0].sum(dim=1).cpu()
        right_top5 += hits.any(dim=-1).sum(dim=1).cpu()
    top1 = (100 * right_top1 / len(labels)).tolist()
    top5 = (100 * right_top5 / len(labels)).tolist()
    return dict(zip(lrs, zip(top1, top5, strict=True), strict=True))


def confusion_matrix(probes: Probes, features: Tensor, labels: Tensor, row: int) -> Tensor:
    """Return counts (c, c): features of each true class (rows), by what probe `row` says.

    They are a sparse tensor above MOST_DENSE_CLASSES.
    """
    guesses = [probes.logits(part)[row].argmax(dim=-1) for part in features.split(1024)]
    num_classes = probes.num_classes
    if num_classes > MOST_DENSE_CLASSES:
        pairs = torch.stack([labels, torch.cat(guesses)])
        ones = torch.ones_like(labels)
        size = (num_classes, num_classes)
        return torch.sparse_coo_tensor(pairs, ones, size, check_invariants=False).coalesce()
    pairs = labels * num_classes + torch.cat(guesses)
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def by_class(confusion: Tensor, classes: Sequence[str] | None) -> dict[str, object]:
    """Return the confusion matrix and each class's accuracy in %, None where it has no images.

    A sparse matrix is its pairs above 0: [true class, said class, images].
    """
    names = classes or [str(label) for label in range(len(confusion))]
    if confusion.is_sparse:
        num_images = confusion.sum(dim=1).to_dense().tolist()
        rows, columns = confusion.indices()
        is_right = rows == columns
        right = torch.zeros(len(confusion), dtype=torch.int64, device=confusion.device)
        right[rows[is_right]] = confusion.values()[is_right]
        num_right = right.tolist()
        pairs = torch.cat([confusion.indices(), confusion.values()[None]]).T.tolist()
        counts = {"confusion_pairs": pairs}
    else:
        num_images, num_right = confusion.sum(dim=1).tolist(), confusion.diag().tolist()
        counts = {"confusion": confusion.tolist()}
    per_class = {}
    for name, num, right in zip(names, num_images, num_right, strict=False):
        per_class[str(name)] = 100 * right / num if num else None
    return {"per_class_top1": per_class, **counts}


def best_of(accuracies: Accuracies) -> float:
    """Return the learning rate of the highest top-1."""
    return max(accuracies, key=lambda lr: accuracies[lr][0])


def chosen_lr(features: Tensor, labels: Tensor, config: LinearConfig) -> float:
    """Return the learning rate that is best on a tenth of the training images.

    The probes that are compared train on the rest. It is no choice by the test images, which makes
    the best of several rates look better than it is.
    """
    order = permutation(len(features), config.seed).to(features.device)
    held_out, rest = order.tensor_split([max(1, len(order) // 10)])
    num_classes = num_classes_of(labels, labels)
    # rows, not their features, which would be copied
    probes = fit_probes(features, labels, rest, num_classes, config)
    return best_of(accuracies_of(probes, features[held_out], labels[held_out], config.lrs))


def layers_to_read(backbone: nn.Module, options: LinearConfig) -> tuple[int, bool]:
    """Return how many last blocks are read, and whether patch tokens are; None: as the paper."""
    if options.n_last_blocks is not None:
        return options.n_last_blocks, options.avgpool
    if not is_vit(backbone):
        return 1, options.avgpool
    if backbone.output_dim <= 384:
        return min(4, len(backbone.blocks)), options.avgpool
    return 1, True


def normalized_forward(
    forward: Callable[[Tensor], Tensor], preparation: Preparation, crops: Tensor
) -> Tensor:
    """Return the features of crops in 0..1."""
    return forward(TF.normalize(crops, list(preparation.mean), list(preparation.std)))


class Evaluated(NamedTuple):
    facts: dict
    accuracies: Accuracies
    classes: dict[str, object]  # what the best learning rate confuses
    probes: Probes
    class_names: Sequence[str] | None
    shots: dict[str, dict]  # of linear_of_shots
    shots_caption: str


def evaluate(options: LinearConfig, accelerator: Accelerator) -> Evaluated:
    """Train and test the probes that `options` name. A collective."""
    evaluation = options.evaluation
    network = open_backbone(evaluation, accelerator)
    blocks, avgpool = layers_to_read(network.backbone, options)
    forward = layer_features(network.backbone, blocks, avgpool)
    train_images, test_images = open_splits(network, accelerator)
    center_crop_features = partial(
        features_of_splits,
        forward,
        preparation=network.preparation,
        accelerator=accelerator,
        batch_size=evaluation.batch_size,
        num_workers=evaluation.num_workers,
    )
    shots: dict[str, dict] = {}
    shots_caption = ""
    if options.augment:  # the test alone is of center crops
        ((test_features, test_labels),) = center_crop_features([test_images])
        num_classes = num_classes_of(train_images.labels, test_labels)
        probes = train_on_crops(
            partial(normalized_forward, forward, network.preparation),
            train_images,
            network.preparation.size,
            num_classes,
            options,
            accelerator,
        )
        facts: dict[str, object] = {
            "num_train": len(train_images),
            "num_test": len(test_features),
            "features": test_features.shape[1],
        }
    else:
        of_train, of_test = center_crop_features([train_images, test_images])
        train_features, train_labels = of_train
        test_features, test_labels = of_test
        num_classes = num_classes_of(train_labels, test_labels)
        rows = all_rows(train_labels)
        probes = fit_probes(train_features, train_labels, rows, num_classes, options)
        facts = size_facts(train_features, test_features)
        if len(options.lrs) > 1 and len(train_features) > 1:
            facts["chosen_lr"] = chosen_lr(train_features, train_labels, options)
        if options.few_labels.shots:
            shots = linear_of_shots(
                train_features, train_labels, test_features, test_labels, options
            )
            shots_caption = caption_of_shots(train_labels, options.few_labels)
    facts["num_classes"] = probes.num_classes
    facts |= {"n_last_blocks": blocks, "avgpool": avgpool, "augment": options.augment}
    accuracies = accuracies_of(probes, test_features, test_labels, options.lrs)
    classes: dict[str, object] = {}
    if evaluation.json_out is not None:
        best_row = options.lrs.index(best_of(accuracies))
        confusion = confusion_matrix(probes, test_features, test_labels, best_row)
        classes = by_class(confusion, test_images.classes)
    return Evaluated(
        network.facts | facts,
        accuracies,
        classes,
        probes,
        test_images.classes,
        shots,
        shots_caption,
    )


def write_probe(path: Path, evaluated: Evaluated, row: int) -> None:
    """Write the probe of a row of rates; its metadata say of which features and classes it is."""
    probes, facts = evaluated.probes, evaluated.facts
    tensors = {"weight": probes.weight[row], "bias": probes.bias[row]}
    names = ("checkpoint", "network", "backbone_crc32", "eval_size", "n_last_blocks", "avgpool")
    metadata = {name: facts[name] for name in names} | {"classes": evaluated.class_names}
    save_tensors(path, tensors, {"metadata": json.dumps(metadata)})


def main() -> None:
    options = read_flags(LinearConfig, None, __doc__)
    check_ranges(options)
    check_probes(options)
    check_folder(options.probe_out, "probe")
    if options.probe_out is not None and options.probe_out == options.evaluation.json_out:
        raise ValueError(f"need two files for --probe-out and --json-out, got {options.probe_out}")
    if options.few_labels.shots and options.augment:
        raise ValueError("--shots takes features that are computed once: not with --augment")
    accelerator = make_accelerator(options.evaluation.mixed_precision)
    evaluated = evaluate(options, accelerator)
    accuracies = evaluated.accuracies
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    best = best_of(accuracies)
    table = Table("learning rate", "top-1 %", title="linear probe")
    if evaluated.facts["num_classes"] > 5:  # else any guess is among the five
        table.add_column("top-5 %")
    for lr, (top1, top5) in accuracies.items():
        style = "bold" if lr == best else None
        cells = (f"{lr:g}", f"{top1:.2f}", f"{top5:.2f}")
        table.add_row(*cells[: len(table.columns)], style=style)
    results = {
        "epochs": options.epochs,
        "best_lr": best,
        "best_top1": accuracies[best][0],
        "linear": [{"lr": lr, "top1": x, "top5": y} for lr, (x, y) in accuracies.items()],
    }
    results |= evaluated.classes
    if evaluated.shots:
        results["shots"] = evaluated.shots
    report(evaluated.facts, table)
    print(f"best: {accuracies[best][0]:.2f} % with {best:g}, chosen on the test images")
    if "chosen_lr" in evaluated.facts:
        chosen = evaluated.facts["chosen_lr"]
        where = "chosen on a tenth of the training images"
        print(f"{accuracies[chosen][0]:.2f} % with {chosen:g}, {where}")
    if evaluated.shots:
        table = table_of_shots(evaluated.shots)
        table.caption = evaluated.shots_caption
        Console().print(table)
    write_results(options.evaluation.json_out, evaluated.facts, results)
    if options.probe_out is not None:
        write_probe(options.probe_out, evaluated, options.lrs.index(best))


if __name__ == "__main__":
    run_command(main)
