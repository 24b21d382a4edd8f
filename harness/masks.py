"""Masks of objects: read from files, written to them, compared with the true ones.

A mask is an array (h, w) uint8 with a number for each object or class: 0 is the background, 255 is
not judged. The files are PNGs with one number a pixel, palettised or grey, as those of DAVIS and
PASCAL VOC. Axes: h w image.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from folders import some_of

VOID = 255  # the number of pixels that are not judged
TOLERANCE = 0.008  # of the diagonal, by which a boundary may be off
ONE_NUMBER = ("1", "L", "P")  # Pillow's modes with one number of at most 8 bits a pixel


# ---------------------------------------------------------------- files


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a mask, of which Pillow reads the header alone. ValueError where it is none."""
    try:
        with Image.open(path) as image:
            if image.mode not in ONE_NUMBER:
                text = "need a mask with one number a pixel, palettised or grey"
                raise ValueError(f"{text}, got {path} of mode {image.mode}")
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow reads") from error
    except (OSError, SyntaxError, EOFError) as error:
        if getattr(error, "filename", None):  # of a file that cannot be opened
            raise
        raise ValueError(f"cannot decode {path}: {error}") from error  # Pillow's, of damaged files


def read_mask(path: Path) -> np.ndarray:
    """Read the numbers (h, w) uint8 of a mask. Raises ValueError where the file holds none."""
    with _opened(path) as image:
        return np.array(image, dtype=np.uint8)


def mask_shape(path: Path) -> tuple[int, int]:
    """Read a mask's height and width from its header. Raises ValueError where it is no mask."""
    with _opened(path) as image:
        return image.height, image.width


def read_names(path: Path) -> list[str]:
    """Return the names that a data set's list has. Raises ValueError where it is no text."""
    try:
        return path.read_text("utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list of names: need text in UTF-8") from error


def require_each_name_once(images: Sequence[Path], folder: Path, what: str) -> None:
    """Raise ValueError where two images, which `what` calls so, would have one mask."""
    counts = Counter(path.stem for path in images)
    twice = [f"{name}.*" for name, num in counts.items() if num > 1]
    if twice:
        raise ValueError(f"need one {what} of each name in {folder}, got more of {some_of(twice)}")


def require_same_size(mask: np.ndarray, path: Path, image: Tensor) -> None:
    """Raise ValueError where a mask (h, w), of the file `path`, is not as large as (c, h, w)."""
    height, width = image.shape[1:]
    if mask.shape != (height, width):
        given = f"{path} of {mask.shape[1]} x {mask.shape[0]}"
        raise ValueError(f"need a mask of {width} x {height} px, as its image, got {given}")


def read_palette(path: Path) -> list[int]:
    """Return a mask's colours as Pillow takes them, those of DAVIS and VOC where it has none."""
    with Image.open(path) as image:
        return image.getpalette() or usual_palette()


def usual_palette() -> list[int]:
    """Return the 256 colours of DAVIS and PASCAL VOC as red, green, blue, red ...

    Three bits of a number go to the highest bits of red, green and blue, the next three below.
    """
    colours: list[int] = []
    for number in range(256):
        for channel in range(3):
            bits = [number >> (3 * place + channel) & 1 for place in range(3)]
            colours.append(sum(bit << (7 - place) for place, bit in enumerate(bits)))
    return colours


def save_mask(path: Path, mask: np.ndarray, palette: list[int]) -> None:
    """Write a mask (h, w) uint8 as a palettised PNG."""
    image = Image.fromarray(mask)  # of mode L, which becomes P with a palette
    image.putpalette(palette)
    image.save(path)


# ---------------------------------------------------------------- scores


def jaccard(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the intersection over the union of two boolean masks, 1 where both are empty."""
    union = int((predicted | true).sum())
    return int((predicted & true).sum()) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return a boolean mask's boundary: pixels that differ from the next one right or below.

    Or from the one that is both right and below, as the evaluation of DAVIS has it.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != both)


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Return all pixels at most `radius` pixels away from one of a boolean mask."""
    offsets = torch.arange(-radius, radius + 1)
    disk = (offsets[:, None].square() + offsets.square() <= radius * radius).float()
    pixels = rearrange(torch.from_numpy(mask), "h w -> 1 1 h w").float()
    counts = F.conv2d(pixels, rearrange(disk, "h w -> 1 1 h w"), padding=radius)
    return (counts[0, 0] > 0.5).numpy()


def boundary_f_measure(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the F-measure of two boolean masks' boundaries, with DAVIS's tolerance.

    Precision is the share of the predicted boundary that is within TOLERANCE of the true one,
    recall the share of the true one within TOLERANCE of the predicted.
    Source: Perazzi et al., CVPR 2016.
    """
    radius = math.ceil(TOLERANCE * math.hypot(*true.shape))
    predicted, true = boundary(predicted), boundary(true)
    if not predicted.any() or not true.any():
        return float(predicted.any() == true.any())
    precision = (predicted & dilated(true, radius)).sum() / predicted.sum()
    recall = (true & dilated(predicted, radius)).sum() / true.sum()
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


# ---------------------------------------------------------------- patches


def one_hot_on_grid(mask: np.ndarray, classes: Iterable[int], shape: tuple[int, int]) -> Tensor:
    """Return for each class 1 on the cells of a grid whose central pixel is of it, else 0.

    The result is (c, *shape) float32.
    """
    pixels = torch.from_numpy(mask)[None, None].float()
    cells = F.interpolate(pixels, size=shape, mode="nearest-exact")[0, 0]
    return torch.stack([(cells == number).float() for number in classes])


def majority_on_grid(mask: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """Return for each cell of a grid (h, w) the number of most of its pixels, int64.

    Pixels that are not judged do not count; a cell of none else is VOID. Of equally many the
    smallest number is taken. A pixel on a border of cells counts for both.
    """
    numbers = [number for number in np.unique(mask).tolist() if number != VOID]
    if not numbers:
        return torch.full(shape, VOID)
    is_of = torch.stack([torch.from_numpy(mask == number) for number in numbers]).float()
    shares = F.adaptive_avg_pool2d(is_of, shape)
    largest, places = shares.max(dim=0)
    return torch.where(largest > 0, torch.tensor(numbers)[places], VOID)
