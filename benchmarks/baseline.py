"""The paper's algorithm in plain form, and the original's own code, to be compared with ours.

The plain form is what the paper's pseudocode says: one pipeline of Pillow images a crop in the
loader's workers, a loss that takes each pair of views in turn, EMA and clipping by parameter. The
original's code is imported from a checkout of facebookresearch/dino; nothing of it is kept here.
"""

import importlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import measure  # noqa: F401, which makes the files above importable
import torch
import torch.distributed as dist
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from data import CropConfig
from multicrop import IMAGENET_MEAN, IMAGENET_STD


class PairwiseLoss(nn.Module):
    """The loss of all pairs of views, one after the other."""

    def __init__(self, output_dim: int, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.register_buffer("center", torch.zeros(1, output_dim))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> Tensor:
        total, num_pairs = 0.0, 0
        views = (student.float() / self.student_temp).unbind(0)
        targets = F.softmax((teacher.float() - self.center) / teacher_temp, dim=-1).unbind(0)
        for i, target in enumerate(targets):
            for j, view in enumerate(views):
                if i != j:
                    loss = torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1)
                    total, num_pairs = total + loss.mean(), num_pairs + 1
        return total / num_pairs

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        mean = teacher.float().flatten(end_dim=1).mean(dim=0, keepdim=True)
        self.center = self.center * 0.9 + mean * 0.1


def plain_pipelines(config: CropConfig) -> list[Callable[[Image.Image], Tensor]]:
    """Build one pipeline a crop, of Pillow images, as the paper describes them."""

    def pipeline(size: int, scale: tuple[float, float], kind: int) -> v2.Compose:
        jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        blur = v2.Lambda(
            lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(*config.blur_sigma)))
        )
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(config.flip_probability),
                v2.RandomApply([jitter], config.jitter_probability),
                v2.RandomGrayscale(config.grayscale_probability),
                v2.RandomApply([blur], config.blur_probability[kind]),
                v2.RandomSolarize(128, config.solarize_probability[kind]),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    large = [pipeline(config.global_crop_size, config.global_crop_scale, i) for i in range(2)]
    small = pipeline(config.local_crop_size, config.local_crop_scale, 2)
    return large + [small] * config.num_local_crops


class PlainDataset(Dataset):
    """Paths, each opened by Pillow and cut into crops by `augment`."""

    def __init__(self, paths: list[str], augment: Callable[[Image.Image], list[Tensor]]) -> None:
        self.paths, self.augment = paths, augment

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        with open(self.paths[index], "rb") as file:
            return self.augment(Image.open(file).convert("RGB"))


class Original(NamedTuple):
    """Modules of a facebookresearch/dino checkout."""

    main: ModuleType
    utils: ModuleType
    vits: ModuleType


def load_original(path: Path) -> Original:
    """Import a checkout; on a CPU, `cuda` calls of its code leave tensors where they are."""
    if not (path / "main_dino.py").is_file():
        raise ValueError(f"need a checkout of facebookresearch/dino, got {path}")
    ours = {name: sys.modules.pop(name) for name in ("eval_knn",) if name in sys.modules}
    sys.path.insert(0, str(path))
    modules = [importlib.import_module(name) for name in ("main_dino", "utils")]
    modules.append(importlib.import_module("vision_transformer"))
    sys.path.remove(str(path))
    sys.modules.update(ours)
    if not dist.is_initialized():  # its loss reduces unconditionally
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29511")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1)
    return Original(*modules)


def original_augmentation(original: Original, config: CropConfig) -> Callable:
    """Build the original's augmentation, whose crop sizes are 224 and 96."""
    scales = config.global_crop_scale, config.local_crop_scale
    return original.main.DataAugmentationDINO(*scales, config.num_local_crops)
