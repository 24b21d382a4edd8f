"""Images a second of the data path, against one pipeline of Pillow images a crop in the workers.

    python benchmarks/bench_data.py FOLDER                    # of photographs
    python benchmarks/bench_data.py FOLDER --original PATH    # of a facebookresearch/dino checkout
    python benchmarks/bench_data.py FOLDER --crops 32 16 4 --canvas 32    # of small images

The host part is what a loader's worker does: decode and resize to the canvas here, decode and cut
all crops there. The whole is decoding and multi-crop, 2 of 224 and 8 of 96 px without --crops; from
memory it is what a run does after its first epoch, where memory holds all canvases.
lightly and lightly-train are measured beside it where they are installed. The detail that a canvas
keeps is the mean absolute Laplacian of its crops, by that of the same boxes of the images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import baseline
import measure
import peers
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

from data import (
    CropConfig,
    ImageDataset,
    MultiCrop,
    build_dataset,
    collate,
    hash_keys,
    to_canvas,
)
from harness.command import run_command
from harness.decoded_once import DecodedOnce
from harness.distributed import has_compiler
from harness.flags import is_installed
from harness.freed_memory import keep_freed_memory
from multicrop import (
    BOX,
    NUM_DRAWS,
    boxes_on_canvas,
    draw_boxes,
    resized_crops,
    resolve_crop_sizes,
    uniforms,
)


@dataclass(frozen=True)
class Options:
    folder: tyro.conf.Positional[Path]  # with images of real size
    original: Path | None = None  # a checkout of facebookresearch/dino, compared too
    canvas: tuple[int, ...] = (256, 384, 512, 640)  # pixels
    # pixels of the large and the small crops, and how many of these; below 64 px no crop is blurred
    crops: tuple[int, int, int] = (224, 96, 8)
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


def sharpness(crops: Tensor) -> float:
    """Return the mean absolute Laplacian of crops (n, 3, h, w) in 0..1."""
    inner = crops[:, :, 1:-1, 1:-1]
    beside = crops[:, :, 1:-1, :-2] + crops[:, :, 1:-1, 2:]
    above = crops[:, :, :-2, 1:-1] + crops[:, :, 2:, 1:-1]
    return (beside + above - 4 * inner).abs().mean().item()


def kept_detail(options: Options, config: CropConfig) -> list[list[str]]:
    """Return rows of canvas and the share of sharpness that its crops keep, global then local.

    All is what the same boxes hold when they are cut out of the images themselves.
    """
    dataset = build_dataset(str(options.folder))
    kinds = (
        (config.global_crop_size, config.global_crop_scale, 2),
        (config.local_crop_size, config.local_crop_scale, config.num_local_crops),
    )
    sums = torch.zeros(len(options.canvas) + 1, 2)
    for index in range(min(options.images, len(dataset))):
        image = dataset[index].image
        for kind, (crop_size, scale, views) in enumerate(kinds):
            sizes = torch.tensor([image.shape[1:]]).expand(views, 2)
            draws = uniforms(hash_keys(0, index, kind, torch.arange(views)), NUM_DRAWS)
            boxes = draw_boxes(draws[:, BOX], sizes, scale)
            whole = [
                TF.resized_crop(image, *box, [crop_size] * 2, TF.InterpolationMode.BICUBIC)
                for box in boxes.tolist()
            ]
            sums[-1, kind] += sharpness(torch.stack(whole) / 255)
            for row, canvas_size in enumerate(options.canvas):
                canvas = to_canvas(image, canvas_size)[None]
                on_canvas = boxes_on_canvas(boxes, sizes, canvas_size)
                sums[row, kind] += sharpness(resized_crops(canvas, on_canvas[:, None], crop_size))
    shares = sums[:-1] / sums[-1]
    return [
        [f"canvas {size}", *(f"{share:.0%}" for share in row)]
        for size, row in zip(options.canvas, shares.tolist(), strict=True)
    ]


def main() -> None:
    options = measure.read(Options, __doc__)
    global_size, local_size, num_local = options.crops
    config = CropConfig(
        global_crop_size=global_size, local_crop_size=local_size, num_local_crops=num_local
    )
    config = resolve_crop_sizes(config, image_size=224)
    machine = measure.machine("uint8 and float32, one worker and one thread", threads=1)
    device = measure.device()
    if device.type == "cpu":  # as training does; all variants have it
        keep_freed_memory()
    paths = [path.decode() for path in build_dataset(str(options.folder)).images.tolist()]
    pipelines = baseline.plain_pipelines(config)
    augmentations = {"plain": lambda image: [cut(image) for cut in pipelines]}
    if options.original:
        original = baseline.load_original(options.original)
        augmentations["original"] = baseline.original_augmentation(original, config)
    if is_installed("lightly"):
        augmentations[peers.with_version("lightly")] = peers.lightly_augmentation(config)
    theirs = {name: baseline.PlainDataset(paths, a) for name, a in augmentations.items()}
    if is_installed("lightly-train"):
        theirs[peers.with_version("lightly-train")] = peers.LightlyTrainDataset(paths, config)

    def ours(size: int) -> Dataset:
        return build_dataset(str(options.folder), canvas_size=size)

    # ---- what the canvas costs in detail
    title = "sharpness that crops of a canvas keep of the image's"
    measure.show(title, ["", "global", "local"], kept_detail(options, config), machine)

    # ---- host part
    variants = {name: loaded(dataset, options) for name, dataset in theirs.items()}
    variants |= {f"ours, canvas {size}": loaded(ours(size), options) for size in options.canvas}
    report(
        "host part, images/s a core", measure.in_turn(variants, options.rounds), options, machine
    )

    # ---- decoding and multi-crop
    multi_crop, keys = MultiCrop(config).to(device), torch.arange(options.batch_size)
    if torch.cuda.is_available() and has_compiler():  # as training does
        multi_crop.use_torch_compile()
    num = min(options.images, 64)

    def crop_all(dataset: Dataset) -> None:
        for start in range(0, num, options.batch_size):
            stop = min(start + options.batch_size, num)
            batch = collate([dataset[i % len(dataset)] for i in range(start, stop)])
            keys_of_batch = hash_keys(0, start, keys[: stop - start]).to(device)
            multi_crop(batch.image.to(device), batch.size.to(device), keys_of_batch)

    def cut_all(dataset: Dataset) -> None:
        for i in range(num):
            dataset[i % len(dataset)]

    variants = {name: partial(cut_all, dataset) for name, dataset in theirs.items()}
    for size in options.canvas:
        variants[f"ours, canvas {size}"] = partial(crop_all, ours(size))
        in_memory = DecodedOnce(ours(size), size, channels=3)
        variants[f"ours, canvas {size}, from memory"] = partial(crop_all, in_memory)
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
    others = [name for name in seconds if not name.startswith("ours")]
    rows = []
    for name, values in seconds.items():
        row = [name, f"{images / measure.median(values):.1f}", f"{measure.spread(values):.0f} %"]
        for other in others:
            ratio = measure.median(seconds[other]) / measure.median(values)
            row.append(f"{ratio:.2f}x")
        rows.append(row)
    against = [f"against {other}" for other in others]
    measure.show(title, ["", "images/s", "spread", *against], rows, machine)


if __name__ == "__main__":
    run_command(main)
