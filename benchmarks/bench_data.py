"""Images a second of the data path, against one pipeline of Pillow images a crop in the workers.

    python benchmarks/bench_data.py FOLDER                    # of photographs
    python benchmarks/bench_data.py FOLDER --original PATH    # of a facebookresearch/dino checkout

The host part is what a loader's worker does: decode and resize to the canvas here, decode and cut
all crops there. The whole is decoding and multi-crop, 2 of 224 and 8 of 96 px.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import baseline
import measure
import torch
import tyro
from torch.utils.data import DataLoader, Dataset

from data import (
    CropConfig,
    ImageDataset,
    MultiCrop,
    build_dataset,
    collate,
    hash_keys,
)
from harness.command import run_command


@dataclass(frozen=True)
class Options:
    folder: tyro.conf.Positional[Path]  # with images of real size
    original: Path | None = None  # a checkout of facebookresearch/dino, compared too
    canvas: tuple[int, ...] = (256, 384, 512)  # pixels
    images: int = 128  # a measurement
    rounds: int = 5
    batch_size: int = 32


def loaded(dataset: Dataset, options: Options) -> Callable[[], None]:
    """Read a fixed number of images through one worker, which is kept."""
    order = torch.arange(options.images) % len(dataset)
    loader = DataLoader(
        dataset,
        options.batch_size,
        sampler=order.tolist(),
        num_workers=1,
        persistent_workers=True,
        collate_fn=collate if isinstance(dataset, ImageDataset) else None,
    )

    def read() -> None:
        for _ in loader:
            pass

    return read


def main() -> None:
    options = measure.read(Options, __doc__)
    config = CropConfig(global_crop_size=224, local_crop_size=96)
    machine = measure.machine("uint8 and float32, one worker and one thread", threads=1)
    paths = [path.decode() for path in build_dataset(str(options.folder)).images.tolist()]
    pipelines = baseline.plain_pipelines(config)
    augmentations = {"plain": lambda image: [cut(image) for cut in pipelines]}
    if options.original:
        original = baseline.load_original(options.original)
        augmentations["original"] = baseline.original_augmentation(original, config)
    theirs = {name: baseline.PlainDataset(paths, a) for name, a in augmentations.items()}

    def ours(size: int) -> Dataset:
        return build_dataset(str(options.folder), canvas_size=size)

    # ---- host part
    variants = {name: loaded(dataset, options) for name, dataset in theirs.items()}
    variants |= {f"ours, canvas {size}": loaded(ours(size), options) for size in options.canvas}
    report(
        "host part, images/s a core", measure.in_turn(variants, options.rounds), options, machine
    )

    # ---- decoding and multi-crop
    device = measure.device()
    multi_crop, keys = MultiCrop(config).to(device), torch.arange(options.batch_size)
    if torch.cuda.is_available():  # as training does
        multi_crop.use_torch_compile()
    num = min(options.images, 64)

    def crop_all(dataset: Dataset) -> None:
        for start in range(0, num, options.batch_size):
            samples = [dataset[i % len(dataset)] for i in range(start, start + options.batch_size)]
            batch = collate(samples)
            keys_of_batch = hash_keys(0, start, keys).to(device)
            multi_crop(batch.image.to(device), batch.size.to(device), keys_of_batch)

    def cut_all(dataset: Dataset) -> None:
        for i in range(num):
            dataset[i % len(dataset)]

    variants = {name: partial(cut_all, dataset) for name, dataset in theirs.items()}
    for size in options.canvas:
        variants[f"ours, canvas {size}"] = partial(crop_all, ours(size))
    seconds = measure.in_turn(variants, options.rounds)
    title = f"decoding and multi-crop on {device.type}, images/s"
    report(title, seconds, options, machine, num)

    # ---- multi-crop alone
    size = options.canvas[min(1, len(options.canvas) - 1)]
    dataset = ours(size)
    batch = collate([dataset[i % len(dataset)] for i in range(options.batch_size)])
    keys = hash_keys(0, keys).to(device)
    call = partial(multi_crop, batch.image.to(device), batch.size.to(device), keys)
    seconds = measure.in_turn({f"ours, canvas {size}": call}, options.rounds)
    title = f"multi-crop alone on {device.type}, images/s"
    report(title, seconds, options, machine, options.batch_size)


def report(
    title: str, seconds: measure.Seconds, options: Options, machine: str, images: int | None = None
) -> None:
    images = images or options.images
    rows = []
    for name, values in seconds.items():
        row = [name, f"{images / measure.median(values):.1f}", f"{measure.spread(values):.0f} %"]
        for other in ("plain", "original"):
            if other in seconds:
                ratio = measure.median(seconds[other]) / measure.median(values)
                row.append(f"{ratio:.2f}x")
        rows.append(row)
    against = [f"against {other}" for other in ("plain", "original") if other in seconds]
    measure.show(title, ["", "images/s", "spread", *against], rows, machine)


if __name__ == "__main__":
    run_command(main)
