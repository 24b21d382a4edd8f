"""Train lightly's DINO with the network and the images of one of our runs, for so many minutes.

    python benchmarks/train_lightly.py runs/NAME --minutes 42 --out runs/lightly
    python eval_knn.py runs/lightly/ckpt.safetensors

The backbone starts untrained. All else is lightly's own benchmark on CIFAR-10, which holds its
settings for small images: two global crops, no blur, a head of two layers with BatchNorm, SGD at
0.06 along a cosine, batches of 128. `--local-crops` adds as many local crops as the run has.
Needs lightly; tried with lightly 1.6.0.
"""

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import measure  # noqa: F401, which makes the files above importable
import peers
import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness.command import run_command
from harness.flags import is_installed
from models import DinoModel, load_checkpoint, save_checkpoint

PEAK_LR = 0.06
TEACHER_MOMENTUM = 0.99
NUM_PROTOTYPES = 2048


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]  # a run's folder, whose network, images and sizes are taken
    out: Path  # folder for ckpt.safetensors
    minutes: float = 42
    local_crops: bool = False  # as many as the run has, of their size
    batch_size: int = 128
    num_workers: int = 0
    seed: int = 0


def build_head(input_dim: int) -> nn.Module:
    from lightly.models.modules.heads import DINOProjectionHead, ProjectionHead

    head = DINOProjectionHead(input_dim, 2048, 256, NUM_PROTOTYPES, batch_norm=True)
    blocks = [(input_dim, 2048, nn.BatchNorm1d(2048), nn.GELU()), (2048, 256, None, None)]
    head.layers = ProjectionHead(blocks).layers
    return head


def build_loader(options: Options, config: dict) -> DataLoader:
    """Return batches of lightly's crops of a run's training images."""
    from lightly.data import LightlyDataset
    from lightly.transforms import DINOTransform

    crops = config["crops"]
    transform = DINOTransform(
        global_crop_size=crops["global_crop_size"],
        local_crop_size=crops["local_crop_size"],
        n_local_views=crops["num_local_crops"] if options.local_crops else 0,
        cj_strength=0.5,
        gaussian_blur=(0, 0, 0),
        normalize={"mean": crops["mean"], "std": crops["std"]},
    )
    folder = Path(config["data"]["data"])
    if not folder.is_dir():
        raise ValueError(f"need a run on a folder of images, got one on {folder}")
    train = folder / "train"
    dataset = LightlyDataset(str(train if train.is_dir() else folder), transform=transform)
    if len(dataset) < options.batch_size:
        raise ValueError(f"need --batch-size of at most {len(dataset)}, got {options.batch_size}")
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.num_workers,
    )


def train(options: Options) -> None:
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    torch.manual_seed(options.seed)
    run_model, metadata = load_checkpoint(options.run / "ckpt.safetensors")
    loader = build_loader(options, metadata["config"])
    model = DinoModel.from_config(run_model.config)
    dim = model.backbone.output_dim
    student = nn.Sequential(model.backbone, build_head(dim))
    # the teacher's head starts from other weights than the student's, as in lightly's benchmark
    teacher = nn.Sequential(copy.deepcopy(model.backbone), build_head(dim))
    deactivate_requires_grad(teacher)
    dino_loss = peers.lightly_loss(NUM_PROTOTYPES)
    optimizer = torch.optim.SGD(student.parameters(), PEAK_LR, momentum=0.9, weight_decay=5e-4)

    start, epoch, num_images, next_report = time.monotonic(), 0, 0, 0.0
    share = 0.0  # of the time that is over
    while share < 1:
        for views, _, _ in loader:
            update_momentum(student, teacher, m=TEACHER_MOMENTUM)
            teacher_out: list[Tensor] = [teacher(view) for view in views[:2]]
            student_out = [student(view) for view in views]
            loss = dino_loss(teacher_out, student_out, epoch=epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            num_images += len(views[0])
            share = (time.monotonic() - start) / (60 * options.minutes)
            if share >= 1:
                break
        epoch += 1
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * (1 + math.cos(math.pi * min(share, 1))) / 2
        if share >= next_report:
            speed = num_images / (time.monotonic() - start)
            print(f"epoch {epoch}: loss {loss:.3f}, {speed:.0f} images/s, {share:.0%} of the time")
            next_report += 0.1
    model.backbone = teacher[0]
    options.out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(options.out / "ckpt.safetensors", model, {"config": metadata["config"]})


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if not is_installed("lightly"):
        raise ValueError("need the package lightly: pip install lightly")
    train(options)


if __name__ == "__main__":
    run_command(main)
