"""Evaluate a frozen backbone by a linear probe, for several learning rates at once.

    python eval_linear.py runs/patterns-resnet10_half/ckpt.safetensors
    python eval_linear.py ckpt.safetensors --data /imagenet --num-workers 16 --json-out linear.json

Features of center crops are computed once and kept; all probes train on them in one pass, with the
optimizer of DINO (arXiv 2104.14294, appendix F.2): SGD with momentum 0.9, no weight decay, cosine
learning rate, 100 epochs. Architecture, sizes and data come from the checkpoint itself.
Axes: n images, b batch, d features, c classes, r learning rates.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from config import read_flags
from data import permutation
from distributed import make_accelerator
from eval_knn import EvalConfig, checkpoint_features, report
from monitor import run_command


@dataclass(frozen=True)
class LinearConfig:
    evaluation: EvalConfig
    # for a batch of 256; ResNets want the large ones, ViTs the small [paper: 0.001, ResNet-50 0.3]
    lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    epochs: int = 100  # [paper: 100]
    probe_batch_size: int = 256  # features a step [paper: 1024]
    seed: int = 0  # of initial weights and order


def train_probes(
    features: Tensor, labels: Tensor, num_classes: int, lrs: Tensor, config: LinearConfig
) -> tuple[Tensor, Tensor]:
    """Train a linear classifier for each rate of lrs (r,) on features (n, d) and labels (n,).

    Gives weights (r, c, d) and biases (r, c). The probes share their batches and nothing else: each
    ends as if trained alone.
    """
    generator = torch.Generator().manual_seed(config.seed)
    shape = (num_classes, features.shape[1])
    weight = (0.01 * torch.randn(shape, generator=generator)).to(features)
    weight = weight.expand(len(lrs), *shape).clone()
    bias = torch.zeros_like(weight[..., 0])
    velocities = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in range(config.epochs):
        order = permutation(len(labels), config.seed, epoch)
        rates = lrs * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / config.epochs)))
        for rows in order.to(labels.device).split(config.probe_batch_size):
            batch = features[rows]
            logits = einsum(batch, weight, "b d, r c d -> r b c") + bias[:, None]
            # the gradient of the mean cross-entropy, in closed form
            error = (logits.softmax(dim=-1) - F.one_hot(labels[rows], num_classes)) / len(rows)
            grads = einsum(error, batch, "r b c, b d -> r c d"), error.sum(dim=1)
            for param, velocity, grad in zip((weight, bias), velocities, grads, strict=True):
                velocity.mul_(0.9).add_(grad)
                param -= rates.view(-1, *[1] * (param.ndim - 1)) * velocity
    return weight, bias


def check_probes(config: LinearConfig) -> None:
    """Raise ValueError for settings that cannot be meant."""
    if min(config.lrs, default=0) <= 0 or config.epochs < 1 or config.probe_batch_size < 1:
        given = f"lrs {config.lrs}, epochs {config.epochs}, batch {config.probe_batch_size}"
        raise ValueError(f"need lrs > 0, epochs >= 1 and a batch >= 1, got {given}")


def linear_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    config: LinearConfig,
) -> dict[float, tuple[float, float]]:
    """Give {learning rate: (top-1, top-5)} in % on the test features, one probe a rate."""
    check_probes(config)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    lrs = torch.tensor(config.lrs, device=train_features.device) * config.probe_batch_size / 256
    weight, bias = train_probes(train_features, train_labels, num_classes, lrs, config)
    hits = torch.zeros(len(lrs), 2, dtype=torch.float64)
    for features, labels in zip(test_features.split(1024), test_labels.split(1024), strict=True):
        logits = einsum(features, weight, "b d, r c d -> r b c") + bias[:, None]
        best = logits.topk(min(5, num_classes), dim=-1).indices == rearrange(labels, "b -> b 1")
        hits += torch.stack([best[..., 0].sum(dim=1), best.any(dim=-1).sum(dim=1)], dim=1).cpu()
    percent = (100 * hits / len(test_labels)).tolist()
    return {lr: tuple(accuracy) for lr, accuracy in zip(config.lrs, percent, strict=True)}


def main() -> None:
    options = read_flags(LinearConfig, None, __doc__)
    check_probes(options)
    accelerator = make_accelerator()
    tensors, facts = checkpoint_features(options.evaluation, accelerator)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    accuracies = linear_accuracy(*tensors, options)
    best = max(accuracies, key=lambda lr: accuracies[lr][0])
    table = Table("learning rate", "top-1 %", "top-5 %", title="linear probe")
    for lr, (top1, top5) in accuracies.items():
        style, mark = ("bold", " best") if lr == best else (None, "")
        table.add_row(f"{lr:g}", f"{top1:.2f}{mark}", f"{top5:.2f}", style=style)
    table.caption = "best: chosen on the test images"
    results = [{"lr": lr, "top1": top1, "top5": top5} for lr, (top1, top5) in accuracies.items()]
    summary = {"epochs": options.epochs, "best_lr": best, "best_top1": accuracies[best][0]}
    report(facts, table, summary | {"linear": results}, options.evaluation.json_out)


if __name__ == "__main__":
    run_command(main)
