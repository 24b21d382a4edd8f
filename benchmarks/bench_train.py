"""Images a second from JPEGs on disk to optimizer steps, and the share of time waiting for data.

    python benchmarks/bench_train.py FOLDER
    python benchmarks/bench_train.py FOLDER --arch dino_vits16 --original PATH

Each variant is its whole pipeline: ours decodes in the workers and crops in batches on the device;
the plain form and the original cut Pillow crops in the workers. All at one precision.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import baseline
import bench_step
import measure
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader

from data import CropConfig, Cropper, MultiCrop, StepSampler, build_dataset, collate
from harness.command import run_command
from multicrop import resolve_crop_sizes


@dataclass(frozen=True)
class Options(bench_step.Options):
    folder: tyro.conf.Positional[Path] = Path(".")  # with images of real size
    arch: tuple[str, ...] = ("dino_vits16",)
    canvas: int = 384
    workers: int = 1 if not torch.cuda.is_available() else 15
    steps: int = 4 if not torch.cuda.is_available() else 50  # measured, after a warm-up


def our_crops(options: Options) -> Iterator[list[Tensor]]:
    dataset = build_dataset(str(options.folder), canvas_size=options.canvas)
    # as if the images were repeated, for folders smaller than a batch
    images = torch.arange(max(len(dataset), options.batch * 20)) % len(dataset)
    dataset.images = dataset.images[images.numpy()]
    dataset.labels = None
    sampler = StepSampler(len(dataset), options.batch, 0, 0, 1, range(1 << 20))
    device = measure.device()
    multi_crop = MultiCrop(CropConfig()).to(device)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=options.workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    if options.compile:
        multi_crop.use_torch_compile()
    crops_of = Cropper(multi_crop, 0, device)
    for batch in loader:
        yield crops_of(batch)


def cut_in_workers(augment: Callable, options: Options) -> Iterator[list[Tensor]]:
    paths = [path.decode() for path in build_dataset(str(options.folder)).images.tolist()]
    paths *= max(1, options.batch * 20 // len(paths))
    dataset, device = baseline.PlainDataset(paths, augment), measure.device()
    loader = DataLoader(
        dataset,
        options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    while True:
        for crops in loader:
            yield [crop.to(device, non_blocking=True) for crop in crops]


def cut_each(pipelines: list[Callable], image: object) -> list[Tensor]:
    return [pipeline(image) for pipeline in pipelines]


def run(step: Callable, crops: Iterator, steps: int) -> tuple[float, float]:
    """Return the seconds of `steps` steps, and those of them spent waiting for crops."""
    waited, start = 0.0, bench_step.now()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(crops)
        waited += time.perf_counter() - asked
        step(batch)
    return bench_step.now() - start, waited


def main() -> None:
    options = measure.read(Options, __doc__)
    precision = {"no": "float32", "bf16": "bf16 autocast"}[options.precision]
    machine = measure.machine(precision, options.threads)
    config = resolve_crop_sizes(CropConfig(), image_size=224)
    rows = []
    for arch in options.arch:
        pipelines = baseline.plain_pipelines(config)
        variants = {"ours": (bench_step.our_step(arch, options), our_crops(options))}
        if options.plain:
            cut = partial(cut_each, pipelines)
            step = bench_step.plain_step(arch, options)
            variants["plain"] = (step, cut_in_workers(cut, options))
        if options.original:
            original = baseline.load_original(options.original)
            cut = baseline.original_augmentation(original, config)
            step = bench_step.original_step(arch, options)
            variants["original"] = (step, cut_in_workers(cut, options))
        results = {}
        for name in list(variants):  # each alone: its workers would take cores
            step, crops = variants.pop(name)
            run(step, crops, 3 + 2 * options.workers)  # until what workers made ahead is used up
            results[name] = run(step, crops, options.steps)
            del step, crops
        for name, (seconds, waited) in results.items():
            speed = options.batch * options.steps / seconds
            row = [f"{arch}, {name}", f"{speed:.1f}", f"{100 * waited / seconds:.0f} %"]
            rows.append([*row, f"{seconds / results['ours'][0]:.2f}x"])
    sizes = f"batch {options.batch}, {options.workers} workers, canvas {options.canvas}"
    columns = ["from JPEGs to steps", "images/s", "waiting for data", "time to ours"]
    measure.show("training end to end", columns, rows, f"{machine}; {sizes}")


if __name__ == "__main__":
    run_command(main)
