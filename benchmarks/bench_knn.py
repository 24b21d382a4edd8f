"""k-NN of given features for four k, against one search for each k.

python benchmarks/bench_knn.py
python benchmarks/bench_knn.py --train 1281167 --test 50000      # as many as ImageNet has
"""

from dataclasses import dataclass

import measure
import torch
from torch import Tensor
from torch.nn import functional as F

from eval_knn import knn_accuracy
from harness.command import run_command

KS = (10, 20, 100, 200)


@dataclass(frozen=True)
class Options:
    train: int = 50_000  # features remembered
    test: int = 10_000  # features classified
    dim: int = 384
    classes: int = 1000
    rounds: int = 3
    threads: int | None = None


def one_search_a_k(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> dict:
    """Search, vote and count for each k anew, in a hundred chunks of test features."""
    train, test, accuracies = F.normalize(train, dim=1), F.normalize(test, dim=1), {}
    num_classes = int(labels.max()) + 1
    for k in KS:
        top1 = top5 = 0
        for rows in torch.arange(len(test)).chunk(100):
            similarity, neighbours = (test[rows] @ train.T).topk(k, dim=1, sorted=True)
            votes = (
                F.one_hot(labels[neighbours], num_classes) * (similarity / 0.07).exp()[..., None]
            )
            ranking = votes.sum(dim=1).argsort(dim=1, descending=True)
            hits = ranking[:, :5] == test_labels[rows][:, None]
            top1, top5 = top1 + hits[:, 0].sum(), top5 + hits.sum()
        accuracies[k] = (100 * float(top1) / len(test), 100 * float(top5) / len(test))
    return accuracies


def main() -> None:
    options = measure.read(Options, __doc__)
    machine = measure.machine("float32", options.threads)
    device = measure.device()
    centers = torch.randn(options.classes, options.dim, device=device)

    def features(num: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(options.classes, (num,), device=device)
        return centers[labels] + 3 * torch.randn(num, options.dim, device=device), labels

    data = (*features(options.train), *features(options.test))
    results = {}

    def run(name: str, search: object) -> None:
        results[name] = search(*data)

    variants = {
        "one search a k": lambda: run("plain", one_search_a_k),
        "ours": lambda: run("ours", lambda *x: knn_accuracy(*x, ks=KS)),
    }
    seconds = measure.in_turn(variants, options.rounds)
    worst = max(
        abs(a - b) for k in KS for a, b in zip(results["plain"][k], results["ours"][k], strict=True)
    )
    times = {name: measure.median(values) for name, values in seconds.items()}
    plain = times["one search a k"]
    rows = [
        [name, f"{time:.2f}", f"{measure.spread(seconds[name]):.0f} %", f"{plain / time:.1f}x"]
        for name, time in times.items()
    ]
    title = f"k-NN, k {KS}: {options.test:,} among {options.train:,} features of {options.dim}"
    caption = f"{machine}; accuracies differ by {worst:.3f} points at most"
    measure.show(title, ["", "seconds", "spread", "speed"], rows, caption)


if __name__ == "__main__":
    run_command(main)
