"""Images in: files, tars, data sets or drawn patterns, decoded once to uint8 canvases; samplers.

    dataset = build_dataset("path/to/images", canvas_size=384)  # uint8 canvases and true sizes
    sampler = StepSampler(len(dataset), batch_size=64, seed=0, rank=0, world=1, steps=range(1000))
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    crops_of = Cropper(MultiCrop(CropConfig()), seed=0, device=torch.device("cuda"))
    for batch in loader:
        crops = crops_of(batch)  # 2 of (b, 3, 224, 224), then 8 of 96 px

The order of the images and every crop are functions of (seed, epoch, image): there is no generator
and no state, so batch, worker, process and resumption change nothing. To copy this file, copy
multicrop.py and tar_shards.py with it; it needs torch, torchvision, einops and Pillow besides.
Axes: b batch, n images, c h w image.
"""

import contextlib
import difflib
import hashlib
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision.transforms.v2 import functional as TF

from multicrop import CropConfig, MultiCrop, hash_keys, uniforms
from tar_shards import TarImages, scan_tars

__all__ = [
    "CropConfig",
    "Cropper",
    "ImageDataset",
    "MultiCrop",
    "Sample",
    "StepSampler",
    "build_dataset",
    "collate",
    "hash_keys",
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
            raise ValueError(f"need a batch of at most {num_images} images, the data; got {batch}")

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

    def from_center(position: Tensor, period: float = 1.0) -> Tensor:
        """Return the offset from the center of the nearest cell."""
        return (position / period - (position / period).round()) * period

    u, v = from_center(x), from_center(y)
    near, far, radius = u.abs().minimum(v.abs()), u.abs().maximum(v.abs()), u.hypot(v)
    brick = from_center(x + y.round() % 2, period=2.0)
    # honeycomb cells stand in rows, of which every other one is shifted by half a cell
    row, shifted_row = from_center(y, 3**0.5), from_center(y - 3**0.5 / 2, 3**0.5)
    shifted_u = from_center(x - 0.5)
    nearer = u.hypot(row) < shifted_u.hypot(shifted_row)
    hex_x, hex_y = u.where(nearer, shifted_u).abs(), row.where(nearer, shifted_row).abs()
    distances = {  # from the figure's edge, in cells, positive inside
        "stripes": 0.25 - u.abs(),
        "checks": (math.pi * x).sin() * (math.pi * y).sin() / 3,
        "dots": 0.3 - radius,
        "rings": 0.1 - (radius - 0.33).abs(),
        "waves": 0.25 - from_center(x + 0.3 * (math.pi * y).sin()).abs(),
        "grid": far - 0.38,
        "bricks": (v.abs() - 0.38).maximum(brick.abs() - 0.88),
        "honeycomb": hex_x.maximum(hex_x / 2 + hex_y * 3**0.5 / 2) - 0.4,
        "crosses": (0.42 - far).minimum(0.13 - near),
        "triangles": (v + 0.3).minimum(0.4 - v - 1.7 * u.abs()),
    }
    figure = sum(
        distances[name] * (index % 10 == label)[:, None, None]
        for label, name in enumerate(PATTERNS)
    )
    figure = (0.5 + figure * size / cells).clamp(0, 1)[:, None]  # edges are one pixel soft
    levels = 0.1 * rearrange(draws[:, 4:6], "n two -> two n 1 1 1")
    tints = 0.04 * rearrange(draws[:, 6:12] - 0.5, "n (two c) -> two n c 1 1", two=2)
    dark, light = 0.2 + levels[0] + tints[0], 0.65 + levels[1] + tints[1]
    return (255 * torch.lerp(dark, light, figure)).round().to(torch.uint8)


# ---------------------------------------------------------------- images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
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
SPLITS = ("train", "memory", "test")


class Sample(NamedTuple):
    image: Tensor  # (3, s, s) uint8
    size: Tensor  # (2,) int64, the true height and width
    label: int  # -1 without classes
    epoch: int
    index: int
    source: int  # of the image that was read: not `index`, where that one cannot be decoded


class ImageDataset(Dataset):
    """Read images[i], a path, Pillow image or uint8 tensor (3, h, w), and transform it.

    An item is asked for by its index or by (epoch, index). `labels` is None without classes. An
    image that cannot be decoded is replaced by the next one of the epoch's order that can; `seed`
    fixes that order.
    """

    def __init__(
        self, images: Sequence, labels: np.ndarray | None, classes: Sequence[str] | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes  # the labels' names, where they have any
        self.seed = 0
        self.transform: Callable[[Tensor], Tensor] = torch.nn.Identity()
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that needed it last

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        source, image = self._read(epoch, index)
        label = -1 if self.labels is None else int(self.labels[source])
        size = torch.tensor(image.shape[1:])
        return Sample(self.transform(image), size, label, epoch, index, source)

    def _decode(self, index: int) -> Tensor:
        try:
            return decode(self.images[index])
        except OSError as error:  # torchvision's sets open their files themselves
            raise ValueError(f"cannot decode image {index}: {error}") from error

    def _read(self, epoch: int, index: int) -> tuple[int, Tensor]:
        """Return (index, image): the one asked for, or the next readable of the epoch's order."""
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

    def typical_size(self) -> tuple[int, int]:
        """Return the median shorter and longer side in pixels, of 64 to 127 images at most."""
        step = max(1, len(self) // 64)
        sides = [sorted(self._read(0, i)[1].shape[1:]) for i in range(0, len(self), step)]
        short, long = np.median(sides, axis=0).astype(int).tolist()
        return short, long

    def fingerprint(self) -> str:
        """Return a hash of the images' names and labels; that of a moved folder stays the same."""
        content = hashlib.sha256(str(len(self)).encode())
        if isinstance(self.images, TarImages):
            content.update(b"\n".join(self.images.members["names"].tolist()))
        elif isinstance(self.images, np.ndarray):
            # the paths are sorted: what the first and the last begin with is the folder of all
            root = os.path.commonpath([os.path.dirname(self.images[i]) for i in (0, -1)])
            content.update(b"\n".join(path[len(root) :] for path in self.images.tolist()))
        if self.labels is not None:
            content.update(self.labels.astype(np.int64).tobytes())
        return content.hexdigest()[:16]


def decode(image: object) -> Tensor:
    """Return (3, h, w) uint8 RGB of a path (bytes), a tar's member or a Pillow image.

    An animation's first frame is taken, an image is turned as EXIF says, transparency is dropped,
    and of 16 bits the upper 8 are kept. A pair (Pillow image, label) is taken for its image, and a
    tensor is returned as it is. Raises ValueError with the name where a file cannot be decoded, or
    has more than twice Pillow's MAX_IMAGE_PIXELS (179 million).
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, tuple):
        image = image[0]
    if isinstance(image, Image.Image):
        return TF.pil_to_tensor(image.convert("RGB"))
    # a path is bytes, also as an item of a NumPy array, which all workers share without copies
    is_path = isinstance(image, bytes)
    name = os.fsdecode(image) if is_path else str(image)
    try:
        content = Path(name).read_bytes() if is_path else image.read()
        with Image.open(io.BytesIO(content)) as opened:  # reads the header alone
            return _decode_opened(opened, content)
    except Exception as error:  # a broken file can make a decoder raise anything
        reason = str(error).replace(repr(name), "").strip(" :")
        raise ValueError(f"cannot decode {name}: {reason}") from error


def _decode_opened(image: Image.Image, content: bytes) -> Tensor:
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        # torchvision's decoder is faster; where it fails, or is not there, Pillow's decides
        with contextlib.suppress(RuntimeError, AttributeError):
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            is_turned = "exif" in image.info
            return torchvision.io.decode_jpeg(encoded, "RGB", apply_exif_orientation=is_turned)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would cut off at 255
        upper_bits = np.asarray(image) >> 8
        image = Image.fromarray(upper_bits.astype(np.uint8))
    return TF.pil_to_tensor(image.convert("RGB"))


def to_canvas(image: Tensor, size: int) -> Tensor:
    """Return (3, h, w) uint8 resized to a square (3, size, size), whatever its aspect ratio."""
    return TF.resize(image, [size, size], TF.InterpolationMode.BICUBIC)


def collate(samples: list[Sample]) -> Sample:
    """Return samples as one Sample of tensors, with images (b, 3, s, s) stored channels last.

    That is how decoders store them: for 384 px it takes a tenth of the time of another layout.
    """
    rows = [sample._replace(image=sample.image.permute(1, 2, 0)) for sample in samples]
    batch = default_collate(rows)
    return batch._replace(image=batch.image.permute(0, 3, 1, 2))


def center_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Return the central square of (3, h, w) uint8 whose shorter side is resized to `resize`."""
    longest = 8 * min(image.shape[1:])  # of a strip of 20,000 x 10, only the middle is enlarged
    if max(image.shape[1:]) > longest:
        image = TF.center_crop(image, [min(side, longest) for side in image.shape[1:]])
    image = TF.resize(image, [resize], TF.InterpolationMode.BICUBIC)
    return TF.center_crop(image, [size, size])


class _Found(NamedTuple):
    """What a folder, a tar or a folder of tars holds."""

    images: Sequence  # paths as bytes, or TarImages
    classes: np.ndarray | None  # (n,) names, where all images have one


def _walk(folder: Path) -> dict[str, np.ndarray]:
    """Return a folder's images, `paths`, sorted, and all `folders` that were looked into."""
    folders: list[str] = []
    paths: list[str] = []
    for parent, _, files in os.walk(folder, followlinks=True):
        folders.append(parent)
        for file in files:
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                paths.append(os.path.join(parent, file))
    return {
        "paths": np.array([os.fsencode(path) for path in sorted(paths)]),
        "folders": np.array([os.fsencode(path) for path in folders]),
    }


def _scan(source: Path, index_folder: Path | None) -> _Found:
    """Find the images in a folder, a tar or a folder of tars, and the class of each.

    In a folder a class is an image's first sub-folder; there are none where an image lies above
    them. In tars a class is what scan_tars says.
    """
    source = Path(os.path.abspath(source))  # an index is found again from any working directory
    tars = [source] if source.is_file() else sorted(source.glob("*.tar"))
    if tars:
        members = _indexed(source, index_folder, partial(scan_tars, tars, IMAGE_SUFFIXES))
        classes = np.char.decode(members.pop("classes"), "utf-8", "surrogateescape")
        found = _Found(TarImages(members), classes if all(classes) else None)
    else:
        paths = _indexed(source, index_folder, partial(_walk, source))["paths"]
        start = len(os.fsencode(source)) + 1
        parts = [os.fsdecode(path[start:]).split(os.sep) for path in paths.tolist()]
        is_flat = any(len(part) == 1 for part in parts)
        found = _Found(paths, None if is_flat else np.array([part[0] for part in parts]))
    if not len(found.images):
        kinds = ", ".join(IMAGE_SUFFIXES[:4])
        raise ValueError(f"no images in {source}: need files like {kinds}, or tars of them")
    return found


def _indexed(
    source: Path, index_folder: Path | None, scan: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return what `scan` finds, or what it found before where no file or folder has changed since.

    What a scan found is kept in `index_folder` where it took more than a second, or read tars.
    """
    if index_folder is None:
        return scan()
    name = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    file = index_folder / f"{name}.npz"
    found = _read_index(file, source)
    if found is not None:
        return found
    start = time.monotonic()
    found = scan()
    if "tars" in found or time.monotonic() - start > 1:
        with contextlib.suppress(OSError):  # an index that cannot be written saves no time
            _write_index(file, source, found)
    return found


INDEX_VERSION = 2  # 1 had paths as they were spelled


def _write_index(file: Path, source: Path, found: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    np.savez(
        temporary,
        version=INDEX_VERSION,
        source=np.array(os.fsencode(source)),
        stamps=_stamps(found),
        **found,
    )
    os.replace(temporary, file)


def _read_index(file: Path, source: Path) -> dict[str, np.ndarray] | None:
    """Return what was found in a source, or None where that is not known or has changed since."""
    try:
        with np.load(file) as arrays:
            found = dict(arrays)
        is_of_source = (
            found.pop("version") == INDEX_VERSION
            and found.pop("source").item() == os.fsencode(source)
            and np.array_equal(found.pop("stamps"), _stamps(found))
        )
    except Exception:  # a damaged file can make NumPy raise anything: the scan is done anew then
        return None
    return found if is_of_source else None


def index_folder_beside(run_folder: Path) -> Path:
    """Return the folder beside a run's own that keeps what long scans of data found."""
    return run_folder.absolute().parent / ".index"


def _stamps(found: dict[str, np.ndarray]) -> np.ndarray:
    """Return size and time of change of what was looked into: adding to a folder changes them."""
    paths = found["tars"] if "tars" in found else found["folders"]
    stats = [os.stat(path) for path in paths.tolist()]
    return np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats])


def _first_existing(root: Path, names: Sequence[str]) -> Path | None:
    """Return the first of the folders or tars so called in `root`."""
    for name in names:
        for place in (root / name, root / f"{name}.tar"):
            if place.exists():
                return place
    return None


def _folder(root: Path, split: str, index_folder: Path | None) -> ImageDataset:
    """Open a split of a folder or tar.

    Without a test of its own, `test` is a fixed tenth of the images and `memory` the others, while
    `train` has all of them.
    """
    train = _first_existing(root, ["train"]) or root
    test = _first_existing(root, ["val", "test"])
    has_test = train != root and test is not None
    found = _scan(train, index_folder)
    class_names = None if found.classes is None else np.unique(found.classes)
    if split == "test" and has_test:
        found = _scan(test, index_folder)
        if class_names is not None and found.classes is not None:
            unknown = np.setdiff1d(found.classes, class_names)
            if len(unknown):
                raise ValueError(f"{test} has classes that {train} lacks: {', '.join(unknown[:5])}")
    elif split != "train" and not has_test:
        rows = np.flatnonzero(held_out(len(found.images)) == (split == "test"))
        classes = None if found.classes is None else found.classes[rows]
        found = _Found(found.images[rows], classes)
    if class_names is None or found.classes is None:
        return ImageDataset(found.images, None)
    labels = np.searchsorted(class_names, found.classes)
    return ImageDataset(found.images, labels, class_names.tolist())


def held_out(num_images: int) -> np.ndarray:
    """Return a boolean mask of a fixed tenth of the images, at least one."""
    order = permutation(num_images, 0).numpy()
    return np.isin(np.arange(num_images), order[: max(1, num_images // 10)])


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


def build_dataset(
    data: str,
    split: str = "train",
    canvas_size: int | None = None,
    index_folder: Path | None = None,
) -> ImageDataset:
    """Open `patterns`, a torchvision set by name, or a folder, a tar or a folder of tars.

    `split` is `train`, or one of the two that k-NN needs: `memory`, the labelled images that it
    remembers, and `test`, those that it is tested on. A folder with train/ and val/ or test/, or
    tars so called, has its own test; of any other a fixed tenth is the test. `canvas_size` resizes
    each image to a square canvas; `index_folder` keeps what a long scan found. Raises ValueError
    for unknown data, for a folder without images and, except for `train`, without classes.

    To add a source: a row in TORCHVISION_SETS or a branch here that returns an ImageDataset, whose
    images `decode` reads; and what tells its images from others, in ImageDataset.fingerprint.
    """
    if data == "patterns":
        num_images, first = (1000, 1 << 32) if split == "test" else (2000, 0)
        index = torch.arange(first, first + num_images)
        dataset = ImageDataset(draw_patterns(index), (index % 10).numpy(), PATTERNS)
    elif data in TORCHVISION_SETS:
        dataset = _torchvision_set(data, split)
    elif Path(data).is_dir() or (data.endswith(".tar") and Path(data).is_file()):
        dataset = _folder(Path(data), split, index_folder)
    else:
        known = ["patterns", *TORCHVISION_SETS]
        close = difflib.get_close_matches(data, known, n=2)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise ValueError(
            f"no such data {data!r}{hint}: need a folder, a .tar or one of {', '.join(known)}"
        )
    if split != "train" and dataset.labels is None:
        raise ValueError(f"no class folders in the {split} images of {data}: k-NN needs labels")
    if not len(dataset):
        raise ValueError(f"no {split} images are left in {data}: need at least 2 images")
    if canvas_size is not None:
        dataset.transform = partial(to_canvas, size=canvas_size)
    return dataset


# ---------------------------------------------------------------- onto the device


class Cropper:
    """Move a loader's batches to the device and return their crops, by keys (seed, epoch, index).

    On a GPU this is done on a stream of its own, while the step before still runs.
    """

    def __init__(self, multi_crop: MultiCrop, seed: int, device: torch.device) -> None:
        self.multi_crop = multi_crop
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
        images, sizes, epoch, index = (
            part.to(self.device, non_blocking=True)
            for part in (batch.image, batch.size, batch.epoch, batch.index)
        )
        return self.multi_crop(images, sizes, hash_keys(self.seed, epoch, index))
