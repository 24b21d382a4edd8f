"""Evaluate with a few labelled images of each class: which are drawn, and what the draws come to.

Axes: n images, m of them drawn.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config import setting
from data import permutation


@dataclass(frozen=True)
class ShotsConfig:
    # labelled images of each class that are used, drawn by chance: 1 5 10 20; none: all images
    shots: tuple[int, ...] = setting((), above=0, most=1_000_000)
    # draws for each number of --shots, of which mean and spread are shown
    draws: int = setting(5, above=0, most=1_000_000)
    # fixes what is drawn
    draw_seed: int = setting(0, most=1 << 62)


def draw_shots(labels: Tensor, shots: int, seed: int, draw: int) -> Tensor:
    """Return the rows of `shots` random images of each class, all of a class that has fewer.

    Labels are (n,), rows (m,) ascending, on the labels' device. More shots of the same draw add to
    the fewer. The plain loop, which takes a pass over all labels for each class:

        taken = [order[labels[order] == label][:shots] for label in labels.unique()]
    """
    order = permutation(len(labels), seed, draw).to(labels.device)
    # places in `order`, sorted by class; those of one class stay as they were drawn
    sorted_labels, places = labels[order].sort(stable=True)
    _, sizes = sorted_labels.unique_consecutive(return_counts=True)
    starts = sizes.cumsum(0) - sizes  # of each class among the sorted
    # 0 for the first image drawn of a class, 1 for the second, and so on
    place_in_class = torch.arange(len(labels), device=labels.device)
    place_in_class -= starts.repeat_interleave(sizes)
    return order[places[place_in_class < shots]].sort().values


def mean_and_spread(values: Sequence[float]) -> dict[str, object]:
    """Return mean and standard deviation (of a sample: by n - 1) of one value a draw, and these."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread, "draws": list(values)}


def caption_of_shots(labels: Tensor, config: ShotsConfig) -> str:
    """Return what stands below a table of few labels drawn from labels (n,)."""
    text = f"mean ± standard deviation of {config.draws} draws"
    smallest = int(labels.bincount()[labels.unique()].min())
    if max(config.shots) > smallest:
        text += f"; of classes with fewer images, down to {smallest}, all are used"
    return text
