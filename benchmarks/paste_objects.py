"""Make images and videos whose masks are known: objects of CIFAR-10 on photographs.

    python benchmarks/paste_objects.py cifar10 PHOTOS OUT
    python eval_segmentation.py runs/NAME --data OUT/images
    python eval_video.py runs/NAME --data OUT/videos

`cifar10` has train/CLASS/*.jpg and test/CLASS/*.jpg; PHOTOS holds photographs, in folders or not.
Each image of OUT/images has one object, an ellipse of a CIFAR-10 image; its mask says 1 for an
animal, 2 for a vehicle. In each video of OUT/videos, laid out as DAVIS, two objects move, grow and
become darker before a still photograph. Everything is drawn by --seed.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import measure  # noqa: F401  which makes the project's files importable
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageEnhance

from config import setting
from folders import by_numbers
from harness.command import read_flags, run_command
from harness.flags import check_ranges
from harness.masks import save_mask, usual_palette

SIDE = 128  # pixels, of images and frames
NUM_OBJECTS = 2  # in a video
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
VEHICLES = ("airplane", "automobile", "ship", "truck")


@dataclass(frozen=True)
class PasteConfig:
    # folder of CIFAR-10's images: train/CLASS/*.jpg and test/CLASS/*.jpg
    cifar10: tyro.conf.Positional[Path]
    # folder of photographs that are the background
    photos: tyro.conf.Positional[Path]
    # folder that is made
    out: tyro.conf.Positional[Path]
    # images to remember
    num_train: int = 400
    # images to test
    num_test: int = 100
    num_videos: int = 10
    # frames of a video
    num_frames: int = setting(16, above=1, most=100_000)
    # fixes objects, photographs and movements
    seed: int = 0


def files_in(*folders: Path) -> list[Path]:
    """Return all JPEGs of some folders, in order. Raises ValueError where there are none."""
    files = [path for folder in folders for path in folder.rglob("*.jp*g")]
    if not files:
        raise ValueError(f"need JPEGs in {folders[0]}, found none")
    return sorted(files, key=lambda path: by_numbers(str(path)))


def background(photo: Path) -> Image.Image:
    """Return a photograph's middle as a square."""
    image = Image.open(photo).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))


def paste(
    picture: Image.Image,
    mask: Image.Image,
    thing: Image.Image,
    center: tuple[float, float],
    side: float,
    number: int,
) -> None:
    """Paste an ellipse of a thing into a picture, and its number into the mask, in place."""
    size = round(side)
    shape = Image.new("1", (size, size))
    ImageDraw.Draw(shape).ellipse((0, 0, size - 1, size - 1), fill=1)
    place = (round(center[0] - side / 2), round(center[1] - side / 2))
    picture.paste(thing.resize((size, size), Image.Resampling.BICUBIC), place, shape)
    mask.paste(number, (*place, place[0] + size, place[1] + size), shape)


def make_images(
    folder: Path, cifar10: Path, photos: list[Path], num: int, generator: np.random.Generator
) -> None:
    """Make images and masks in a folder, of the classes in a folder of CIFAR-10's."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    kinds = [files_in(*(cifar10 / name for name in names)) for names in (ANIMALS, VEHICLES)]
    for i in range(num):
        number = 1 + i % len(kinds)
        thing = Image.open(generator.choice(kinds[number - 1])).convert("RGB")
        picture, mask = background(generator.choice(photos)), Image.new("L", (SIDE, SIDE))
        side = generator.uniform(40, 80)
        center = tuple(generator.uniform(side / 2, SIDE - side / 2, 2))
        paste(picture, mask, thing, center, side, number)
        picture.save(folder / "images" / f"{i:04}.jpg", quality=95)
        save_mask(folder / "masks" / f"{i:04}.png", np.array(mask), usual_palette())


def make_video(
    root: Path,
    name: str,
    things: list[Path],
    photos: list[Path],
    num_frames: int,
    generator: np.random.Generator,
) -> None:
    """Make one video, with masks, in a folder in DAVIS's layout."""
    frames, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    chosen = [Image.open(generator.choice(things)).convert("RGB") for _ in range(NUM_OBJECTS)]
    still = background(generator.choice(photos))
    sides, angle = generator.uniform(28, 44, NUM_OBJECTS), generator.uniform(0, 2 * math.pi)
    for t in range(num_frames):
        share = t / (num_frames - 1)
        picture, mask = still.copy(), Image.new("L", (SIDE, SIDE))
        for number, (thing, side) in enumerate(zip(chosen, sides, strict=True), start=1):
            turn = angle + 2.5 * share + math.pi * number  # both go round, on two sides
            center = (SIDE * (0.5 + 0.26 * math.cos(turn)), SIDE * (0.5 + 0.26 * math.sin(turn)))
            darker = ImageEnhance.Brightness(thing).enhance(1 - 0.3 * share)
            paste(picture, mask, darker, center, side * (1 + 0.3 * share), number)
        picture.save(frames / f"{t:05}.jpg", quality=95)
        save_mask(masks / f"{t:05}.png", np.array(mask), usual_palette())


def main() -> None:
    options = read_flags(PasteConfig, None, __doc__)
    check_ranges(options)
    if options.out.exists():
        raise ValueError(f"{options.out} exists: give another OUT")
    generator, photos = np.random.default_rng(options.seed), files_in(options.photos)
    for split, folder, num in (
        ("train", "train", options.num_train),
        ("test", "val", options.num_test),
    ):
        cifar10, images = options.cifar10 / split, options.out / "images" / folder
        make_images(images, cifar10, photos, num, generator)
    things, videos = files_in(options.cifar10 / "test"), options.out / "videos"
    for i in range(options.num_videos):
        make_video(videos, f"{i:02}", things, photos, options.num_frames, generator)
    print(f"{options.num_train} + {options.num_test} images, {options.num_videos} videos")


if __name__ == "__main__":
    run_command(main)
