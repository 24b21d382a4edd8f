"""Images in: files, tars, data sets or drawn patterns, decoded once to uint8 canvases; samplers.

    dataset = build_dataset("path/to/images", canvas_size=384)  # uint8 canvases and true sizes
    sampler = StepSampler(len(dataset), batch_size=64, seed=0, rank=0, world=1, steps=range(1000))
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    crops_of = Cropper(MultiCrop(CropConfig()), seed=0, device=torch.device("cuda"))
    for batch in loader:
        crops = crops_of(batch)  # 2 of (b, 3, 224, 224), then 8 of 96 px

The order of the images and every crop are functions of (seed, epoch, image): there is no generator
and no state, so batch, worker, process and resumption change nothing. folders.py says which images
there are, pixels.py how they are decoded. To copy this file, copy those two, multicrop.py and
tar_shards.py with it; it needs torch, torchvision, einops, NumPy and Pillow besides.
Axes: b batch, n images, c h w image.
"""

import contextlib
import difflib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from folders import EVALUATES_ON, NO_CLASSES, Found, find_images, in_one_form, is_list, some_of
from multicrop import CropConfig, MultiCrop, hash_keys, uniforms
from pixels import (
    ImageFacts,
    Levels,
    Pixels,
    center_crop,
    decode,
    image_facts,
    image_suffixes,
    measured_levels,
    read_pixels,
    to_canvas,
)
from tar_shards import TarImages

__all__ = [
    "CropConfig",
    "Cropper",
    "ImageDataset",
    "MultiCrop",
    "Sample",
    "StepSampler",
    "build_dataset",
    "center_crop",
    "collate",
    "decode",
    "hash_keys",
    "to_canvas",
]

# ---------------------------------------------------------------- the order of the images


def permutation(num: int, *parts: int) -> Tensor:
    """Return 0 to num - 1 in a random order, which the integers `parts` fix."""
    return hash_keys(*parts, torch.arange(num)).argsort()


def batch_factors(batch_size: int, world: int, accumulation_steps: int) -> str:
    """Return what a step's batch is made of in words: `4 x 2 processes`."""
    text = str(batch_size)
    if world > 1:
        text += f" x {world} processes"
    if accumulation_steps > 1:
        text += f" x {accumulation_steps} accumulation steps"
    return text


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Yield the (epoch, index) pairs of one process's micro-batches, for a range of steps.

    An epoch's order is one permutation for all processes. A step takes the next images of it,
    however many processes and micro-batches share them. Images that do not fill a last step are
    dropped. Raises ValueError where the data do not fill even one.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        steps: range,
        accumulation_steps: int = 1,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size  # of a process and micro-batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.steps = steps
        self.accumulation_steps = accumulation_steps
        self.steps_per_epoch = num_images // (batch_size * world * accumulation_steps)
        if self.steps_per_epoch == 0:
            batch = batch_factors(batch_size, world, accumulation_steps)
            text = f"the data has {num_images:,} images, fewer than a batch of {batch}"
            raise ValueError(f"{text}: need a smaller --batch-size")

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch_of_order = None
        for step in self.steps:
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != epoch_of_order:
                order = permutation(self.num_images, self.seed, epoch)
                epoch_of_order = epoch
            for micro in range(self.accumulation_steps):
                micro_of_epoch = step_of_epoch * self.accumulation_steps + micro
                start = (micro_of_epoch * self.world + self.rank) * self.batch_size
                indices = order[start : start + self.batch_size].tolist()
                yield [(epoch, index) for index in indices]


# ---------------------------------------------------------------- patterns


PATTERNS = (
    "stripes",
    "checks",
    "dots",
    "rings",
    "waves",
    "grid",
    "bricks",
    "honeycomb",
    "crosses",
    "triangles",
)


def _from_center(position: Tensor, period: float = 1.0) -> Tensor:
    """Return the offset from the center of the nearest cell."""
    return (position / period - (position / period).round()) * period


def _depths_in_figure(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Return how far inside a pattern's figure each point lies, in cells; below 0: outside."""
    u, v = _from_center(x), _from_center(y)
    near, far, radius = u.abs().minimum(v.abs()), u.abs().maximum(v.abs()), u.hypot(v)
    match name:
        case "stripes":
            return 0.25 - u.abs()
        case "checks":
            return (math.pi * x).sin() * (math.pi * y).sin() / 3
        case "dots":
            return 0.3 - radius
        case "rings":
            return 0.1 - (radius - 0.33).abs()
        case "waves":
            return 0.25 - _from_center(x + 0.3 * (math.pi * y).sin()).abs()
        case "grid":
            return far - 0.38
        case "bricks":
            brick = _from_center(x + y.round() % 2, period=2.0)
            return (v.abs() - 0.38).maximum(brick.abs() - 0.88)
        case "honeycomb":  # cells stand in rows, of which every other one is shifted by half a cell
            row, shifted_row = _from_center(y, 3**0.5), _from_center(y - 3**0.5 / 2, 3**0.5)
            shifted_u = _from_center(x - 0.5)
            is_nearer = u.hypot(row) < shifted_u.hypot(shifted_row)
            hex_x = u.where(is_nearer, shifted_u).abs()
            hex_y = row.where(is_nearer, shifted_row).abs()
            return hex_x.maximum(hex_x / 2 + hex_y * 3**0.5 / 2) - 0.4
        case "crosses":
            return (0.42 - far).minimum(0.13 - near)
        case "triangles":
            return (v + 0.3).minimum(0.4 - v - 1.7 * u.abs())
    raise ValueError(f"need a pattern of {PATTERNS}, got {name}")


def draw_patterns(index: Tensor, size: int = 48) -> Tensor:
    """Draw textures (n, 3, size, size) uint8 of ten classes; index % 10 is the class in PATTERNS.

    Angle, scale, phase and colours, which are nearly grey, are random in the index: only the
    structure tells the class.
    """
    draws = uniforms(hash_keys(index), 12)
    angle, scale, right, down = rearrange(draws[:, :4], "n draw -> draw n 1 1")
    angle, cells = math.pi / 4 * (angle - 0.5), 3 + 2.5 * scale
    pixel = torch.arange(0.5, size) / size
    x = cells * (pixel * angle.cos() - pixel[:, None] * angle.sin() + right)
    y = cells * (pixel * angle.sin() + pixel[:, None] * angle.cos() + down)
    depths = torch.empty_like(x)
    for label, name in enumerate(PATTERNS):
        rows = index % 10 == label
        depths[rows] = _depths_in_figure(name, x[rows], y[rows])
    figure = (0.5 + depths * size / cells).clamp(0, 1)[:, None]  # edges are one pixel soft
    levels = 0.1 * rearrange(draws[:, 4:6], "n two -> two n 1 1 1")
    tints = 0.04 * rearrange(draws[:, 6:12] - 0.5, "n (two c) -> two n c 1 1", two=2)
    dark, light = 0.2 + levels[0] + tints[0], 0.65 + levels[1] + tints[1]
    return (255 * torch.lerp(dark, light, figure)).round().to(torch.uint8)


# ---------------------------------------------------------------- images

# name: torchvision class, then the keywords of what trains, what k-NN remembers and what tests it
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": True}, {"train": False}),
    "food101": ("Food101", {"split": "train"}, {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "train"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train"}, {"split": "train"}, {"split": "val"}),
}
NAMED_SETS = ("patterns", *TORCHVISION_SETS)
SPLITS = ("train", "memory", "test")
SURVEYED = 64  # images that are looked at for what a whole data set is like


class Sample(NamedTuple):
    image: Tensor  # (c, s, s) uint8
    size: Tensor  # (2,) int64, the true height and width
    label: int  # -1 without classes
    epoch: int
    index: int
    source: int  # index of the image that was read: another one where `index` cannot be decoded


class Survey(NamedTuple):
    """What some images, evenly spaced, tell of a data set."""

    num_images: int
    short: int  # pixels, median of the shorter side
    long: int  # pixels, median of the longer side
    num_with_frames: int  # with several pages or frames
    num_bands: int  # the most that one has, of which three are taken; 0 where all are read
    levels: Levels | None  # what becomes black and white; None where all have 8 bits

    def notes(self) -> list[str]:
        """Return what is read otherwise than it is stored, in words."""
        notes: list[str] = []
        if self.num_with_frames:
            share = f"{self.num_with_frames} of {self.num_images} images looked at"
            notes.append(f"{share} have several pages or frames: the first is taken")
        if self.num_bands:
            text = f"of images with {self.num_bands} bands the first three are taken"
            notes.append(f"{text}: --channels {self.num_bands} takes all")
        return notes


def _levels_of(facts: Sequence[ImageFacts]) -> Levels | None:
    """Return the levels of those images that have more than 8 bits and are finite, or None."""
    deep = [each.values for each in facts if each.values is not None]
    finite = [values for values in deep if np.isfinite(values).all()]
    return measured_levels(finite) if finite else None


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values.tolist())


class ImageDataset(Dataset):
    """Read images[i], a path, Pillow image or uint8 tensor (c, h, w), and transform it.

    An item is asked for by its index or by (epoch, index). `labels` is None without classes. An
    image that cannot be decoded is replaced by the next one of the epoch's order that can; `seed`
    fixes that order. `channels` and, for images with more than 8 bits, `levels` are as in `decode`.
    """

    def __init__(
        self,
        images: Sequence,
        labels: np.ndarray | None,
        classes: Sequence[str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes  # the labels' names, where they have any
        self.notes = list(notes)  # what was entered, left out and left alone, in words
        self.levels: Levels | None = None
        self.channels = 3
        self.has_test = True  # the data have a split to evaluate on, which is no tenth held out
        self.seed = 0
        self.transform: Callable[[Tensor], Tensor] = torch.nn.Identity()
        self.resized_to = 0  # pixels, what `transform` resizes to; 0: it needs the whole image
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that needed it last

    def as_canvases(self, size: int) -> "ImageDataset":
        """Return this data set, whose images are squares of `size` pixels from now on."""
        self.transform = partial(to_canvas, size=size)
        self.resized_to = size
        return self

    def as_center_crops(self, resize: int, size: int) -> "ImageDataset":
        """Return this data set, whose images are center crops of `size` pixels from now on."""
        self.transform = partial(center_crop, resize=resize, size=size)
        self.resized_to = resize
        return self

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        source, pixels = self._read(epoch, index)
        label = -1 if self.labels is None else int(self.labels[source])
        size = torch.tensor(pixels.size)
        return Sample(self.transform(pixels.image), size, label, epoch, index, source)

    def decode(self, image: object) -> Tensor:
        """Return an image (c, h, w) uint8, of this data set or beside it, as its images are read.

        Raises ValueError as pixels.decode does.
        """
        return decode(image, self.levels, self.channels)

    def _decode(self, index: int) -> Pixels:
        try:
            return read_pixels(self.images[index], self.levels, self.resized_to, self.channels)
        except OSError as error:  # torchvision's sets open their files themselves
            raise ValueError(f"cannot decode image {index}: {error}") from error

    def _read(self, epoch: int, index: int) -> tuple[int, Pixels]:
        """Return (index, pixels): those asked for, or the next readable of the epoch's order."""
        try:
            return index, self._decode(index)
        except ValueError as error:
            first_error = error
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self), self.seed, epoch).numpy()
        order = self._order[1]
        place = int((order == index).argmax())
        for source in np.roll(order, -place)[1:].tolist():
            try:
                return source, self._decode(source)
            except ValueError:
                continue
        raise ValueError(f"none of {len(self)} images is readable: {first_error}") from first_error

    def why_unreadable(self, index: int) -> str:
        """Return the error that reading an image raises, which names its path."""
        try:
            self._decode(index)
        except ValueError as error:
            # a file's name need not be UTF-8, and then it cannot be printed everywhere
            return str(error).encode("utf-8", "backslashreplace").decode()
        return f"cannot decode image {index}: it could not be read, and now it can"

    def survey(self) -> Survey:
        """Look at up to SURVEYED images, evenly spaced, for what all of them are like.

        Raises ValueError where none of all images is readable.
        """
        sizes = {source: pixels.size for source, pixels in self._read_some()}
        sides = [sorted(size) for size in sizes.values()]
        short, long = np.median(sides, axis=0).astype(int).tolist()
        facts = self._facts_of(sizes)
        num_with_frames = sum(each.has_frames for each in facts)
        num_bands = max((each.num_bands for each in facts), default=0)
        if num_bands == self.channels or num_bands <= 3:
            num_bands = 0
        return Survey(len(sizes), short, long, num_with_frames, num_bands, _levels_of(facts))

    def _some(self) -> list[int]:
        """Return the indices of up to SURVEYED images, evenly spaced."""
        return np.linspace(0, len(self) - 1, min(SURVEYED, len(self))).round().astype(int).tolist()

    def _read_some(self) -> Iterator[tuple[int, Pixels]]:
        """Read these images one by one, others where they are broken, each with its index."""
        for index in self._some():
            yield self._read(0, index)

    def set_levels(self, given: Levels | None) -> None:
        """Read images of more than 8 bits with these levels from now on.

        Where none are given: with the 0.1 and 99.9 percentile of some such images, if there are
        any.
        """
        self.levels = given or _levels_of(self._facts_of(self._some()))

    def _facts_of(self, indices: Iterable[int]) -> list[ImageFacts]:
        facts: list[ImageFacts] = []
        for index in indices:
            with contextlib.suppress(Exception):  # a broken file can raise anything
                facts.append(image_facts(self.images[index], self.channels))
        return facts

    def measure_mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel within 0..1, of some images.

        These are those of `survey`, and count alike, however large they are. A channel that is the
        same everywhere gets the deviation of one step of 255.
        """
        means: dict[int, Tensor] = {}
        mean_squares: dict[int, Tensor] = {}
        for source, pixels in self._read_some():
            shares = pixels.image.double() / 255
            means[source] = shares.mean(dim=(1, 2))
            mean_squares[source] = shares.square().mean(dim=(1, 2))
        mean = torch.stack(list(means.values())).mean(dim=0)
        mean_square = torch.stack(list(mean_squares.values())).mean(dim=0)
        std = (mean_square - mean.square()).clamp(min=1 / 255**2).sqrt()
        return _rounded(mean), _rounded(std)

    def fingerprint(self) -> str:
        """Return a hash of the images' names and labels; that of a moved folder stays the same."""
        content = hashlib.sha256(str(len(self)).encode())
        if isinstance(self.images, TarImages):
            content.update(b"\n".join(self.images.members["names"].tolist()))
        elif isinstance(self.images, np.ndarray):
            names = [in_one_form(os.fsdecode(path)) for path in self.images.tolist()]
            # what the first and the last of them begin with is the folder of all
            ends = min(names), max(names)
            root = os.path.commonpath([os.path.dirname(name) for name in ends])
            content.update(b"\n".join(os.fsencode(name[len(root) :]) for name in names))
        if self.labels is not None:
            content.update(self.labels.astype(np.int64).tobytes())
        return content.hexdigest()[:16]


def collate(samples: list[Sample]) -> Sample:
    """Return samples as one Sample of tensors, with images (b, c, s, s) stored channels last.

    That is how decoders store them: for 384 px it takes a tenth of the time of another layout.
    """
    rows = [sample._replace(image=sample.image.permute(1, 2, 0)) for sample in samples]
    batch = default_collate(rows)
    return batch._replace(image=batch.image.permute(0, 3, 1, 2))


# ---------------------------------------------------------------- data sets


def held_out(num_images: int) -> np.ndarray:
    """Return a boolean mask of a fixed tenth of the images, at least one."""
    order = permutation(num_images, 0).numpy()
    return np.isin(np.arange(num_images), order[: max(1, num_images // 10)])


def _found_set(
    data: str,
    split: str,
    val: str | None,
    take_splits: bool,
    channels: int,
    index_folder: Path | None,
) -> ImageDataset:
    """Open a split of a folder, a tar, a folder of tars or a list.

    Without a split to evaluate on, `test` is a fixed tenth of the images and `memory` the others,
    while `train` has all of them.
    """
    find = partial(
        find_images,
        image_suffixes=image_suffixes(channels),
        take_splits=take_splits,
        index_folder=index_folder,
    )
    train, test, notes = find(data)
    names = None if train.classes is None else np.unique(train.classes)
    if val is not None:
        require_source(val, "--val")
        of_val = find(val, known_classes=() if names is None else names.tolist())
        test = of_val.test or of_val.train
        notes = [note for note in notes if not note.startswith(EVALUATES_ON)]
        notes += [f"{EVALUATES_ON} {val}", *(f"{val}: {note}" for note in of_val.notes)]
    found = train
    if split == "test" and test is not None:
        found = test
        _require_known_classes(names, found.classes, val or data)
    elif split != "train" and test is None:
        is_held_out = held_out(len(found.images))
        rows = np.flatnonzero(is_held_out if split == "test" else ~is_held_out)
        classes = None if found.classes is None else found.classes[rows]
        found = Found(found.images[rows], classes)
    dataset = ImageDataset(found.images, None, notes=notes)
    if names is not None and found.classes is not None:
        dataset.labels, dataset.classes = np.searchsorted(names, found.classes), names.tolist()
    dataset.has_test = test is not None
    return dataset


def _require_known_classes(
    names: np.ndarray | None, classes: np.ndarray | None, source: str
) -> None:
    """Raise ValueError where images to evaluate on have classes that those to train on lack."""
    if names is None or classes is None:
        return
    unknown = np.setdiff1d(classes, names)
    if len(unknown):
        text = f"the test images of {source} have classes that the training images lack"
        raise ValueError(f"{text}: {some_of(unknown.tolist(), 5)}")


def _torchvision_set(name: str, split: str) -> ImageDataset:
    class_name, *keywords = TORCHVISION_SETS[name]
    make = getattr(torchvision.datasets, class_name)
    try:
        images = make("datasets", download=True, **keywords[SPLITS.index(split)])
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name} is not in datasets/ and did not download: {reason}") from error
    label_names = ("targets", "labels", "_labels")  # where torchvision's classes keep them
    labels = next((getattr(images, name) for name in label_names if hasattr(images, name)), None)
    if labels is None:
        labels = [label for _, label in images._samples]
    classes = getattr(images, "classes", None)
    if classes:  # Imagenette's are tuples of synonyms
        classes = [name if isinstance(name, str) else name[0] for name in classes]
    return ImageDataset(images, np.array(labels), classes)


def require_source(data: str, flag: str) -> None:
    """Raise ValueError, naming the flag, where data are no folder, no tar, no list and no name.

    --val takes no name of a data set: what tests such a set is its own.
    """
    if not data.strip():  # Path("") is the current folder, which is never meant
        raise ValueError(f"need a name for {flag}, got {data!r}")
    takes_names = flag != "--val"
    if takes_names and data in NAMED_SETS:
        return
    path = Path(data)
    if path.is_dir() or is_list(path) or (path.suffix.lower() == ".tar" and path.is_file()):
        return
    if path.is_absolute() and not path.exists():  # as runs and checkpoints keep it
        text = f"need {flag} NEW with their place, if the images were moved"
        raise ValueError(f"no such folder or file: {data}; {text}")
    kinds = "a folder, a .tar, a .txt or .csv that lists paths"
    if not takes_names:
        raise ValueError(f"no such data {data!r}: need for {flag} {kinds}")
    close = difflib.get_close_matches(data, NAMED_SETS, n=2)
    hint = f" (close: {', '.join(close)})" if close else ""
    names = ", ".join(NAMED_SETS)
    raise ValueError(f"no such data {data!r}{hint}: need for {flag} {kinds} or one of {names}")


def build_dataset(
    data: str,
    split: str = "train",
    canvas_size: int | None = None,
    index_folder: Path | None = None,
    *,
    val: str | None = None,
    take_splits: bool = True,
    channels: int = 3,
) -> ImageDataset:
    """Open `patterns`, a torchvision set by name, or a folder, tar, folder of tars or list.

    `split` is `train`, or one of the two that k-NN needs: `memory`, the labelled images that it
    remembers, and `test`, those that it is tested on: of `val` where that is given, else of the
    data's own val or test split, else a fixed tenth. `take_splits` False takes folders called train
    and val for classes. `channels` is what `decode` takes; with others than 3, folders and tars may
    hold .npy files. `canvas_size` resizes each image to a square canvas; `index_folder` keeps what
    a long scan found. What was left out stands in the data set's `notes`. Raises ValueError for
    unknown data, for data without images and, except for `train`, without classes.

    To add a source: a row in TORCHVISION_SETS or a branch here that returns an ImageDataset, whose
    images `decode` reads; and what tells its images from others, in ImageDataset.fingerprint.
    """
    if data in NAMED_SETS and val is not None:
        raise ValueError(f"--val {val} goes with images of your own: {data} has its own to test on")
    if data == "patterns":
        num_images, first = (1000, 1 << 32) if split == "test" else (8000, 0)
        index = torch.arange(first, first + num_images)
        # in parts, which need little memory
        images = torch.cat([draw_patterns(part) for part in index.split(1000)])
        dataset = ImageDataset(images, (index % 10).numpy(), PATTERNS)
    elif data in TORCHVISION_SETS:
        dataset = _torchvision_set(data, split)
    else:
        require_source(data, "--data")
        dataset = _found_set(data, split, val, take_splits, channels, index_folder)
    if data in NAMED_SETS and os.path.isdir(data):
        dataset.notes.append(f"took the data set {data}; the folder of that name is ./{data}")
    dataset.channels = channels
    if split != "train" and dataset.labels is None:
        source = val if split == "test" and val is not None else data
        start = NO_CLASSES if source == data else f"{val}: {NO_CLASSES}"
        why = next((note for note in dataset.notes if note.startswith(start)), "")
        why = why.removeprefix(f"{val}: ")
        kind = "test" if split == "test" else "training"
        reason = f"no class folders in the {kind} images of {source}"
        if is_list(Path(source)):
            reason = f"{source} has no classes: a .csv names them in a column `label`"
        if why:
            reason = f"{source} has {why}"
        raise ValueError(f"{reason}: k-NN and probes need labels")
    if not len(dataset):
        raise ValueError(f"no {split} images are left in {data}: need at least 2 images")
    return dataset if canvas_size is None else dataset.as_canvases(canvas_size)


# ---------------------------------------------------------------- onto the device


class Cropper:
    """Move a loader's batches to the device and return their crops, by keys (seed, epoch, index).

    On a GPU this is done on a stream of its own, while the step before still runs.
    """

    def __init__(self, multi_crop: MultiCrop, seed: int, device: torch.device) -> None:
        self.multi_crop = multi_crop.to(device)
        self.seed = seed
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Sample) -> list[Tensor]:
        if self.stream is None:
            return self._crops(batch)
        with torch.cuda.stream(self.stream):
            crops = self._crops(batch)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for crop in crops:  # else their memory could be taken again while the step reads it
            crop.record_stream(current)
        return crops

    def _crops(self, batch: Sample) -> list[Tensor]:
        # from pinned memory alone: an Apple GPU might read a batch that is freed already
        is_pinned = self.device.type == "cuda"
        images, sizes, epoch, index = (
            part.to(self.device, non_blocking=is_pinned)
            for part in (batch.image, batch.size, batch.epoch, batch.index)
        )
        return self.multi_crop(images, sizes, hash_keys(self.seed, epoch, index))
