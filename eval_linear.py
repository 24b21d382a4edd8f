"""Evaluate a frozen backbone by a linear probe, for several learning rates at once.

    python eval_linear.py runs/patterns-resnet10_half/ckpt.safetensors
    python eval_linear.py dino_vits16 --data /imagenet --num-workers 16 --json-out linear.json
    torchrun --nproc_per_node 8 eval_linear.py ckpt.safetensors --data /imagenet --augment

All probes train in one pass, with the optimizer of DINO (arXiv 2104.14294, appendix F.2): SGD with
momentum 0.9, no weight decay, cosine learning rate, 100 epochs, on the last blocks' class tokens.
With --augment on random crops, as published; else on features of center crops, computed once.
Axes: n images, b batch, d features, c classes, r learning rates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from einops import einsum, rearrange
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from config import read_flags
from data import (
    ImageDataset,
    StepSampler,
    boxes_on_canvas,
    collate,
    draw_boxes,
    hash_keys,
    permutation,
    resized_crops,
    to_canvas,
    uniforms,
)
from distributed import make_accelerator
from features import (
    EvalConfig,
    Network,
    features_of_splits,
    is_vit,
    layer_features,
    open_backbone,
    open_splits,
    report,
    size_facts,
)
from monitor import iterate, run_command


@dataclass(frozen=True)
class LinearConfig:
    evaluation: EvalConfig
    # for a batch of 256; ResNets want the large ones, ViTs the small [paper: 0.001, ResNet-50 0.3]
    lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    epochs: int = 100  # [paper: 100]
    probe_batch_size: int = 256  # images a step, over all processes [paper: 1024]
    # last blocks of a ViT whose class tokens are read; None: 4 up to a width of 384, above that 1
    # with --avgpool [paper: so]
    n_last_blocks: int | None = None
    avgpool: bool = False  # read the mean of the patch tokens too
    # train on random crops and flips, a pass of the network an epoch, instead of on center crops
    # that it sees once [paper: yes]
    augment: bool = False
    seed: int = 0  # of initial weights, order and crops


class Probes:
    """A linear classifier for each rate of lrs (r,): weight (r, c, d), bias (r, c).

    They share their batches and nothing else: each ends as if trained alone.
    """

    def __init__(self, features: Tensor, num_classes: int, lrs: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_classes, features.shape[-1])
        weight = (0.01 * torch.randn(shape, generator=generator)).to(features)
        self.lrs, self.num_classes = lrs, num_classes
        self.weight = weight.expand(len(lrs), *shape).clone()
        self.bias = torch.zeros_like(self.weight[..., 0])
        self.velocities = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """Classify features (b, d): (r, b, c)."""
        return einsum(features, self.weight, "b d, r c d -> r b c") + self.bias[:, None]

    def step(self, features: Tensor, labels: Tensor, progress: float) -> None:
        """Take a step of SGD, `progress` of the way down the cosine, in place."""
        rates = self.lrs * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)))
        # the gradient of the mean cross-entropy, in closed form
        error = self.logits(features).softmax(dim=-1) - F.one_hot(labels, self.num_classes)
        error = error / len(labels)
        grads = einsum(error, features, "r b c, b d -> r c d"), error.sum(dim=1)
        for param, velocity, grad in zip(
            (self.weight, self.bias), self.velocities, grads, strict=True
        ):
            velocity.mul_(0.9).add_(grad)
            param -= rates.view(-1, *[1] * (param.ndim - 1)) * velocity


def train_probes(
    features: Tensor, labels: Tensor, num_classes: int, lrs: Tensor, config: LinearConfig
) -> Probes:
    """Train probes on features (n, d) and labels (n,) that are computed already."""
    probes = Probes(features, num_classes, lrs, config.seed)
    for epoch in range(config.epochs):
        order = permutation(len(labels), config.seed, epoch)
        for rows in order.to(labels.device).split(config.probe_batch_size):
            probes.step(features[rows], labels[rows], epoch / config.epochs)
    return probes


@torch.no_grad()
def train_on_crops(
    forward: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    network: Network,
    num_classes: int,
    config: LinearConfig,
    accelerator: Accelerator,
) -> Probes:
    """Train probes on a random crop and flip of each image and epoch, as published. A collective.

    `forward` gives the features of crops in 0..1. Crops are bicubic, the original's bilinear, and
    of the shares 0.08 to 1 of the area; they depend on seed, epoch and image alone. The probes are
    the same in all processes, which share the images of a step.
    """
    size, device = network.config["crops"]["global_crop_size"], accelerator.device
    canvas = min(384, round(size * 12 / 7))
    dataset.transform = partial(to_canvas, size=canvas)
    rank, world = accelerator.process_index, accelerator.num_processes
    each = max(1, min(config.probe_batch_size, len(dataset)) // world)
    count = StepSampler(len(dataset), each, config.seed, rank, world, range(0))
    total = count.steps_per_epoch * config.epochs
    sampler = StepSampler(len(dataset), each, config.seed, rank, world, range(total))
    workers = config.evaluation.num_workers
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    lrs = torch.tensor(config.lrs, device=device) * each * world / 256
    probes = None
    num_unreadable = torch.zeros((), dtype=torch.int64)
    batches = iterate(loader)
    shows = accelerator.is_main_process
    for step in track(range(total), "training probes", disable=not shows, transient=True):
        batch = next(batches)
        if step < count.steps_per_epoch:  # which take each image once
            num_unreadable += (batch.source != batch.index).sum()
        images, sizes, epoch, index = (
            part.to(device) for part in (batch.image, batch.size, batch.epoch, batch.index)
        )
        draws = uniforms(hash_keys(config.seed, epoch, index), 23)
        boxes = boxes_on_canvas(draw_boxes(draws[:, :22], sizes, (0.08, 1.0)), sizes, canvas)
        crops = resized_crops(images, boxes[None], size)
        crops = torch.where((draws[:, 22] < 0.5)[:, None, None, None], crops.flip(-1), crops)
        features, labels = gather((forward(crops).float(), batch.label.to(device)))
        if probes is None:
            probes = Probes(features, num_classes, lrs, config.seed)
        probes.step(features, labels, step // count.steps_per_epoch / config.epochs)
    num = int(accelerator.reduce(num_unreadable.to(device)))
    if num:
        accelerator.print(f"warning: {num} images cannot be decoded: others took their place")
    return probes


def check_probes(config: LinearConfig) -> None:
    """Raise ValueError for settings that cannot be meant."""
    if min(config.lrs, default=0) <= 0 or config.epochs < 1 or config.probe_batch_size < 1:
        given = f"lrs {config.lrs}, epochs {config.epochs}, batch {config.probe_batch_size}"
        raise ValueError(f"need lrs > 0, epochs >= 1 and a batch >= 1, got {given}")


def fit_probes(
    train_features: Tensor, train_labels: Tensor, test_labels: Tensor, config: LinearConfig
) -> Probes:
    """Train a probe for each of the config's rates, scaled by the batch, on given features."""
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    lrs = torch.tensor(config.lrs, device=train_features.device) * config.probe_batch_size / 256
    return train_probes(train_features, train_labels, num_classes, lrs, config)


def linear_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    config: LinearConfig,
) -> dict[float, tuple[float, float]]:
    """Give {learning rate: (top-1, top-5)} in % on the test features, one probe a rate."""
    check_probes(config)
    probes = fit_probes(train_features, train_labels, test_labels, config)
    return accuracies_of(probes, test_features, test_labels, config.lrs)


def accuracies_of(
    probes: Probes, features: Tensor, labels: Tensor, lrs: Sequence[float]
) -> dict[float, tuple[float, float]]:
    """Give {learning rate: (top-1, top-5)} in % on features (m, d) of labels (m,)."""
    hits = torch.zeros(len(lrs), 2, dtype=torch.float64)
    for rows, targets in zip(features.split(1024), labels.split(1024), strict=True):
        best = probes.logits(rows).topk(min(5, probes.num_classes), dim=-1).indices
        best = best == rearrange(targets, "b -> b 1")
        hits += torch.stack([best[..., 0].sum(dim=1), best.any(dim=-1).sum(dim=1)], dim=1).cpu()
    percent = (100 * hits / len(labels)).tolist()
    return {lr: tuple(accuracy) for lr, accuracy in zip(lrs, percent, strict=True)}


def confusion_matrix(probes: Probes, features: Tensor, labels: Tensor, row: int) -> Tensor:
    """Count (c, c) the features of each true class (rows) that probe `row` takes for which."""
    guesses = [probes.logits(part)[row].argmax(dim=-1) for part in features.split(1024)]
    num_classes = probes.num_classes
    pairs = labels * num_classes + torch.cat(guesses)
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def by_class(confusion: Tensor, classes: Sequence[str] | None) -> dict[str, object]:
    """Give the confusion matrix and each class's accuracy in %, None where it has no images."""
    totals, rights = confusion.sum(dim=1).tolist(), confusion.diag().tolist()
    names = classes or [str(label) for label in range(len(confusion))]
    shares = [100 * right / n if n else None for right, n in zip(rights, totals, strict=True)]
    per_class = dict(zip(map(str, names), shares, strict=False))
    return {"per_class_top1": per_class, "confusion": confusion.tolist()}


def layers_to_read(backbone: nn.Module, options: LinearConfig) -> tuple[int, bool]:
    """Give how many last blocks and whether patch tokens are read; the paper's choice if open."""
    if options.n_last_blocks is not None or not is_vit(backbone):
        return 1 if options.n_last_blocks is None else options.n_last_blocks, options.avgpool
    if backbone.output_dim <= 384:
        return min(4, len(backbone.blocks)), options.avgpool
    return 1, True


def best_of(accuracies: dict[float, tuple[float, float]]) -> float:
    """Give the learning rate of the highest top-1."""
    return max(accuracies, key=lambda lr: accuracies[lr][0])


def evaluate(
    options: LinearConfig, accelerator: Accelerator
) -> tuple[dict, dict[float, tuple[float, float]], dict[str, object]]:
    """Give facts, accuracies by learning rate and what the best one confuses. A collective."""
    evaluation = options.evaluation
    network = open_backbone(evaluation, accelerator)
    blocks, avgpool = layers_to_read(network.backbone, options)
    forward = layer_features(network.backbone, blocks, avgpool)
    splits = open_splits(network, evaluation, accelerator)
    sizes = evaluation.batch_size, evaluation.num_workers
    classes = splits[1].classes
    if options.augment:  # the test alone is of center crops
        test = features_of_splits(forward, splits[1:], network.config, accelerator, *sizes)
        num_classes = int(max(splits[0].labels.max(), test[1].max())) + 1
        mean, std = (network.config["crops"][name] for name in ("mean", "std"))
        normal = lambda crops: forward(TF.normalize(crops, mean, std))  # noqa: E731
        args = num_classes, options, accelerator
        probes = train_on_crops(normal, splits[0], network, *args)
        facts = {"num_train": len(splits[0]), "num_test": len(test[0])}
        facts["features"] = test[0].shape[1]
    else:
        train_x, train_y, *test = features_of_splits(
            forward, splits, network.config, accelerator, *sizes
        )
        probes = fit_probes(train_x, train_y, test[1], options)
        facts = size_facts(train_x, test[0])
    facts |= {"n_last_blocks": blocks, "avgpool": avgpool, "augment": options.augment}
    accuracies = accuracies_of(probes, *test, options.lrs)
    confusion = confusion_matrix(probes, *test, options.lrs.index(best_of(accuracies)))
    return network.facts | facts, accuracies, by_class(confusion, classes)


def main() -> None:
    options = read_flags(LinearConfig, None, __doc__)
    check_probes(options)
    accelerator = make_accelerator()
    facts, accuracies, classes = evaluate(options, accelerator)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    best = best_of(accuracies)
    table = Table("learning rate", "top-1 %", "top-5 %", title="linear probe")
    for lr, (top1, top5) in accuracies.items():
        style, mark = ("bold", " best") if lr == best else (None, "")
        table.add_row(f"{lr:g}", f"{top1:.2f}{mark}", f"{top5:.2f}", style=style)
    table.caption = "best: chosen on the test images"
    results = [{"lr": lr, "top1": top1, "top5": top5} for lr, (top1, top5) in accuracies.items()]
    summary = {"epochs": options.epochs, "best_lr": best, "best_top1": accuracies[best][0]}
    report(facts, table, summary | {"linear": results} | classes, options.evaluation.json_out)


if __name__ == "__main__":
    run_command(main)
