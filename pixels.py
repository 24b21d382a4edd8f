"""Which pixels: images as uint8, more than 8 bits by two levels, any number of bands, canvases.

    image = decode(b"photo.jpg")                        # (3, h, w) uint8
    image = decode(b"cells.tif", levels=(200, 4095))    # up to 200 black, from 4,095 white
    image = decode(b"satellite.tif", channels=13)       # (13, h, w), each band by its own levels
    canvas = to_canvas(image, 384)                      # (3, 384, 384), whatever its aspect ratio

Of several pages or frames the first is taken, an image is turned as EXIF says, and transparency is
dropped: what a transparent pixel's colour was is seen. With `channels` 1 the image becomes grey;
with a number above 3, or 2, it must have so many bands. Stands alone: needs torch, torchvision,
NumPy and Pillow; tifffile for TIFFs of other bands than 1 or 3, and for colours of 16 bits.
Axes: c h w image.
"""

import contextlib
import functools
import io
import itertools
import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

# the values that become black and white: two for all bands, or two of each band in turn
Levels = tuple[float, ...]

MAX_PIXELS = 64_000_000  # 0.9 GiB while it is decoded; a JPEG is decoded at a part of its size
ORIENTATION = 0x0112  # the tag of TIFF and EXIF that says how an image is to be turned
BITS_PER_SAMPLE = 258  # this and the next three: tags of TIFF, by the names of its standard
SAMPLES_PER_PIXEL = 277
EXTRA_SAMPLES = 338
SAMPLE_FORMAT = 339
NPY = b"\x93NUMPY"  # what a file of NumPy's begins with
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # and a TIFF or a BigTIFF of either byte order
# Formats of Pillow's that run another program, or that it knows but cannot decode
NOT_DECODED = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF", "PDF"}
JPEGS = ("JPEG", "MPO")  # MPO: a JPEG with more of them behind it, as phones write
COMMON_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")  # tried first


# ---------------------------------------------------------------- what Pillow reads


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that are read: Pillow's and, where installed, HEIC."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    readable = [name for name in Image.ID if name in Image.OPEN and name not in NOT_DECODED]
    return (*COMMON_FORMATS, *(name for name in readable if name not in COMMON_FORMATS))


@functools.cache
def image_suffixes(channels: int = 3) -> frozenset[str]:
    """Return the suffixes, in small letters, of the files that are read as images.

    With other channels than 3 .npy is among them; beside photographs it rather is a file of
    features or labels.
    """
    formats = image_formats()
    suffixes = Image.registered_extensions().items()
    of_pillow = frozenset(suffix for suffix, name in suffixes if name in formats)
    return of_pillow if channels == 3 else of_pillow | {".npy"}


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Open an encoded image, of which Pillow reads the header alone."""
    # The content decides about the format, whatever the file is called: but none that runs others.
    with warnings.catch_warnings():
        # Pillow warns of large images, for which MAX_PIXELS is there, and of damaged EXIF
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=image_formats()) as image:
            yield image


# ---------------------------------------------------------------- more than 8 bits


def _raw_mode(image: Image.Image) -> str:
    """Return how a file stores its pixels, in Pillow's words: `RGB;16B` is 16 bits a channel."""
    if not getattr(image, "tile", None):  # one that was made in memory
        return ""
    args = image.tile[0][3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _is_deep(image: Image.Image) -> bool:
    """Tell whether an opened image has more than 8 bits a channel."""
    raw_mode = _raw_mode(image)
    is_rgb565 = raw_mode == "BGR;16"  # 16 bits for all three colours
    if image.mode == "CMYK":  # which Pillow makes RGB of, at 8 bits
        return False
    return image.mode.startswith(("I", "F")) or (";16" in raw_mode and not is_rgb565)


def _deep_values(image: Image.Image, content: bytes) -> np.ndarray:
    """Return the numbers (h, w) or (h, w, 3) of an opened image of more than 8 bits, unscaled."""
    values = _deep_channels(image, content)
    if values.ndim == 3:
        values = values[..., :3] if values.shape[-1] >= 3 else values[..., 0]  # no transparency
    return _turned(values, _orientation_of(image))


def _deep_channels(image: Image.Image, content: bytes) -> np.ndarray:
    """Return the numbers (h, w) or (h, w, c) as they are stored, not turned."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        # Pillow has no unsigned 32 bits: it reads them as signed. A TIFF without SAMPLE_FORMAT has
        # them.
        if image.format == "TIFF" and image.mode == "I":
            tags = image.tag_v2
            bits, sample_format = tags.get(BITS_PER_SAMPLE), tags.get(SAMPLE_FORMAT, (1,))
            if bits == (32,) and sample_format == (1,):  # 1: unsigned integers
                values = values.view(np.uint32)
    elif image.format == "PNG":  # of colours, Pillow keeps the upper 8 bits alone
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        values = np.moveaxis(torchvision.io.decode_png(encoded).numpy(), 0, -1)
    elif image.format == "TIFF":
        values = _read_deep_tiff(content)
    else:
        raise ValueError(f"colours of 16 bits in a file of {image.format} are not read")
    return values


def _tifffile(what: str) -> ModuleType:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"{what} needs the package tifffile") from error
    return tifffile


def _read_deep_tiff(content: bytes) -> np.ndarray:
    """Return the first page (h, w, c) of a TIFF with 16 bits a colour."""
    values = _tifffile("a colour TIFF of 16 bits").imread(io.BytesIO(content), key=0)
    is_channel_first = values.ndim == 3 and values.shape[0] <= 4 < values.shape[-1]
    return np.moveaxis(values, 0, -1) if is_channel_first else values


def _orientation_of(image: Image.Image) -> int:
    """Return the number of how an image's pixels are turned, 1 to 8, by EXIF or else by XMP.

    1 where neither says it. Of a TIFF it is 1 once Pillow has read its pixels, which turns them.
    """
    with contextlib.suppress(Exception):  # a broken EXIF says nothing of the pixels
        return image.getexif().get(ORIENTATION, 1)
    return 1


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels (h, w, ...) turned as EXIF's number of their orientation, 1 to 8, says."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


def _to_8_bits(values: np.ndarray, levels: Levels | None) -> np.ndarray:
    """Return numbers (h, w) or (h, w, c) as uint8: linear between two levels, which are 0 and 255.

    Levels are two numbers, or two of each band in turn; None: the image's own.
    """
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise ValueError("it holds a nan or an infinity")
    low, high = np.array(levels or measured_levels([_some_of(values)])).reshape(-1, 2).T
    num_bands = 1 if values.ndim == 2 else values.shape[-1]
    if len(low) not in (1, num_bands):
        raise ValueError(f"need levels of {num_bands} bands, got those of {len(low)}")
    scaled = np.empty(values.shape, np.uint8)
    num_rows = max(1, 1_000_000 // values[0].size)  # at a time, since float64 takes much memory
    for start in range(0, len(values), num_rows):
        rows = slice(start, start + num_rows)
        shares = (values[rows].astype(np.float64) - low) / (high - low)
        scaled[rows] = (255 * shares.clip(0, 1)).round()
    return scaled


def measured_levels(images: Sequence[np.ndarray]) -> Levels:
    """Return the 0.1 and 99.9 percentile of some images' numbers, which never are the same.

    Of grey images (h, w) or (h, w, 1) and of colours (h, w, 3) they are two, whatever the colour;
    of other images (h, w, c) two of each band.
    """
    num_bands = max(values.shape[2] if values.ndim == 3 else 1 for values in images)
    if num_bands in (1, 3):
        return _percentiles([values.ravel() for values in images])
    of_bands = [
        _percentiles([values[..., band].ravel() for values in images]) for band in range(num_bands)
    ]
    return tuple(itertools.chain.from_iterable(of_bands))


def _percentiles(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    numbers = np.concatenate(parts).astype(np.float64)
    low, high = np.percentile(numbers, [0.1, 99.9]).tolist()
    if high <= low:
        high = low + 1
    return low, high


def levels_in_words(levels: Levels) -> str:
    """Return what becomes black and white: `of more than 8 bits, 0 is black and 4095 white`."""
    pairs = list(zip(levels[::2], levels[1::2], strict=True))
    if len(pairs) == 1:
        low, high = levels
        return f"of more than 8 bits, {low:g} is black and {high:g} white"
    first = ", ".join(f"{low:g} to {high:g}" for low, high in pairs[:4])
    more = f" and {len(pairs) - 4} more" if len(pairs) > 4 else ""
    return f"of more than 8 bits; black and white of each band: {first}{more}"


# ---------------------------------------------------------------- bands


def _is_of_bands(content: bytes, channels: int) -> bool:
    """Tell whether a file is read band by band, and not as grey or RGB by Pillow.

    So are TIFFs that Pillow does not know, such as those with three floats a pixel.
    """
    if channels not in (1, 3) or content.startswith(NPY):
        return True
    if not content.startswith(TIFFS):
        return False
    try:
        with _opened(content):
            return False
    except Image.UnidentifiedImageError:
        return True


def _read_bands(content: bytes, channels: int) -> np.ndarray:
    """Return the numbers (h, w, c) of a file, unscaled, of so many bands as there are channels.

    Grey and RGB are also taken for each other's: for 1 and 3 channels c may be 3 or 1.
    """
    orientation = 1
    if content.startswith(NPY):
        values = np.load(io.BytesIO(content), allow_pickle=False)
        _require_few_numbers(values.size)
    elif content.startswith(TIFFS):
        values, orientation = _read_bands_of_tiff(content)
    else:
        with _opened(content) as opened:
            _require_few(opened.width * opened.height)
            orientation = _orientation_of(opened)
            if _is_deep(opened):
                values = _deep_channels(opened, content)
            elif opened.mode in ("P", "PA"):
                values = np.asarray(opened.convert("RGBA"))  # not the palette's numbers
            else:
                values = np.asarray(opened)
    if values.dtype.kind not in "uif":
        raise ValueError(f"need integers or floats, got {values.dtype}")
    if values.ndim == 2:
        values = values[..., None]
    wanted = (1, 3) if channels in (1, 3) else (channels,)
    if values.ndim == 3 and values.shape[-1] not in wanted and values.shape[0] in wanted:
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 3 or values.shape[-1] not in wanted or not values.size:
        text = f"need an image (h, w, {channels}), got shape {values.shape}"
        raise ValueError(f"{text}; --channels takes another number of bands")
    return _turned(values, orientation)


def _read_bands_of_tiff(content: bytes) -> tuple[np.ndarray, int]:
    """Return a TIFF's first image, whose bands may be samples of a page or pages, and its turn."""
    tifffile = _tifffile("a TIFF of several bands")
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        first = file.series[0]
        _require_few_numbers(first.size)
        tag = file.pages[0].tags.get(ORIENTATION)
        values = first.asarray()
        if values.ndim > 3:
            values = values.squeeze()
        if values.ndim == 4:  # pages of several bands each
            values = values[0]
        return values, 1 if tag is None else int(tag.value)


def _decode_bands(content: bytes, levels: Levels | None, channels: int) -> Tensor:
    """Return (channels, h, w) uint8 of a file that is read band by band."""
    values = _read_bands(content, channels)
    if values.dtype != np.uint8:
        values = _to_8_bits(values, levels)
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 0)))
    return _of_channels(pixels, channels)


def _of_channels(pixels: Tensor, channels: int) -> Tensor:
    """Return (c, h, w) uint8 with so many channels: grey is made of RGB, and RGB of grey."""
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 3 and channels == 1:
        return TF.pil_to_tensor(TF.to_pil_image(pixels).convert("L"))
    if len(pixels) == 1 and channels == 3:
        return pixels.expand(3, -1, -1)
    raise ValueError(f"need an image of {channels} channels, got {len(pixels)}")


# ---------------------------------------------------------------- decode


class Pixels(NamedTuple):
    image: Tensor  # (c, h, w) uint8; of a large JPEG at a part of its size
    size: tuple[int, int]  # the true height and width


def decode(image: object, levels: Levels | None = None, channels: int = 3) -> Tensor:
    """Return (channels, h, w) uint8 of a path, of what has read(), or of a Pillow image of 8 bits.

    8 bits stay as they are. More, and floats, are mapped by `levels`: what becomes black and what
    white; None: the image's own 0.1 and 99.9 percentile. 3 channels are RGB, 1 is grey; other
    numbers are the bands of a TIFF, of a .npy (h, w, c) or (c, h, w), or of a picture with
    transparency. A path is bytes, text or a Path. A pair (Pillow image, label) is taken for its
    image; a uint8 tensor (c, h, w) for one. Raises ValueError with the name where a file cannot be
    decoded, has other channels, is no regular file, or has more than 64 megapixels (a JPEG: 179).
    """
    return read_pixels(image, levels, channels=channels).image


def _of_pillow(image: Image.Image, channels: int) -> Tensor:
    if _is_deep(image):
        text = "need a Pillow image of 8 bits a channel"
        raise ValueError(f"{text}, got one of mode {image.mode}: decode its file instead")
    upright = ImageOps.exif_transpose(image)
    return TF.pil_to_tensor(upright.convert({1: "L", 4: "RGBA"}.get(channels, "RGB")))


def read_pixels(
    image: object, levels: Levels | None = None, at_least: int = 0, channels: int = 3
) -> Pixels:
    """Return what `decode` does, with the true size.

    A JPEG is decoded at a quarter or an eighth of its size where both its sides are still twice
    `at_least` (0: always whole): what is resized to that differs by 0.3 of 255 on average. For a
    canvas of 512 px, 177 megapixels take 0.24 s and 0.06 GiB on a core of an AMD EPYC.
    """
    if isinstance(image, tuple):
        image = image[0]
    if isinstance(image, str | os.PathLike):
        image = os.fsencode(image)
    if isinstance(image, Image.Image):
        image = _of_pillow(image, channels)
    if isinstance(image, Tensor):
        return Pixels(_of_channels(image, channels), tuple(image.shape[1:]))
    name = _name_of(image)
    try:
        content = _content_of(image)
        if _is_of_bands(content, channels):
            pixels = _decode_bands(content, levels, channels)
            return Pixels(pixels, tuple(pixels.shape[1:]))
        with _opened(content) as opened:
            return _decode_opened(opened, content, levels, at_least, channels)
    except Exception as error:  # a broken file can make a decoder raise anything
        raise ValueError(f"cannot decode {name}: {_reason_of(error, name)}") from error


class ImageFacts(NamedTuple):
    values: np.ndarray | None  # some, unscaled, of an image of more than 8 bits
    has_frames: bool  # pages or frames, of which `decode` takes the first
    num_bands: int  # of a TIFF without those of transparency, of which `decode` may take 3; else 0


def image_facts(image: object, channels: int = 3) -> ImageFacts:
    """Return what is to be known of a readable image beside its 8-bit pixels."""
    if isinstance(image, tuple | Tensor | Image.Image):
        return ImageFacts(None, False, 0)
    content = _content_of(image)
    if _is_of_bands(content, channels):
        values = _read_bands(content, channels)
        deep_values = None if values.dtype == np.uint8 else _some_of(values)
        return ImageFacts(deep_values, False, values.shape[-1])
    with _opened(content) as opened:
        # a photograph's other frames, in a JPEG, are its preview or its depth
        has_frames = opened.format not in JPEGS and getattr(opened, "n_frames", 1) > 1
        deep_values = _some_of(_deep_values(opened, content)) if _is_deep(opened) else None
        return ImageFacts(deep_values, has_frames, _num_bands(opened))


def _some_of(values: np.ndarray) -> np.ndarray:
    """Return an image's numbers (h, w) or (h, w, c) at about 250,000 evenly spaced pixels."""
    height, width = values.shape[:2]
    step = math.ceil(math.sqrt(height * width / 250_000))
    return values[::step, ::step].copy()  # of which the whole image need not be kept


def _num_bands(image: Image.Image) -> int:
    """Return how many bands a TIFF has, without transparency; 0 for other formats."""
    if image.format != "TIFF" or image.mode == "CMYK":
        return 0
    extra_samples = image.tag_v2.get(EXTRA_SAMPLES, ())  # 1 and 2 stand for transparency
    transparent = sum(kind in (1, 2) for kind in extra_samples)
    return image.tag_v2.get(SAMPLES_PER_PIXEL, 1) - transparent


def _name_of(image: object) -> str:
    # a path is bytes, also as an item of a NumPy array, which all workers share without copies
    return os.fsdecode(image) if isinstance(image, bytes) else str(image)


def _content_of(image: object) -> bytes:
    if not isinstance(image, bytes):
        return image.read()
    path = Path(os.fsdecode(image))
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device could be read for ever
        raise ValueError("it is no regular file")
    return path.read_bytes()


def _reason_of(error: Exception, name: str) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image that Pillow reads"
    return str(error).replace(repr(name), "").strip(" :") or type(error).__name__


def _require_few(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        millions = f"{num_pixels / 1e6:.0f} megapixels"
        raise ValueError(f"need at most {MAX_PIXELS / 1e6:.0f} megapixels, got {millions}")


def _require_few_numbers(num: int) -> None:
    """Raise ValueError for more numbers than the pixels of the largest photograph have."""
    most = 3 * MAX_PIXELS
    if num > most:
        text = f"need at most {most / 1e6:.0f} million numbers in an image of several bands"
        raise ValueError(f"{text}, got {num / 1e6:.0f} million")


def _decode_opened(
    image: Image.Image, content: bytes, levels: Levels | None, at_least: int, channels: int
) -> Pixels:
    """Return the pixels of an opened image, as RGB or, with one channel, grey."""
    mode = "L" if channels == 1 else "RGB"
    width, height = image.size
    if image.format in JPEGS:
        orientation = _orientation_of(image)
        size = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
        return Pixels(_decode_jpeg(image, content, orientation, at_least, mode), size)
    _require_few(width * height)
    if _is_deep(image):
        values = _to_8_bits(_deep_values(image, content), levels)
        pixels = TF.pil_to_tensor(Image.fromarray(values).convert(mode))
    else:
        pixels = _upright(image, mode)
    return Pixels(pixels, tuple(pixels.shape[1:]))


def _decode_jpeg(
    image: Image.Image, content: bytes, orientation: int, at_least: int, mode: str
) -> Tensor:
    quarter = tuple(side // 4 for side in image.size)
    if at_least and min(quarter) >= 2 * at_least:
        image.draft(mode, (2 * at_least, 2 * at_least))  # by the cosine transform: much less work
        return _upright(image, mode)
    if image.mode in ("RGB", "L"):
        # torchvision's decoder is faster; where it fails, or is not there, Pillow's decides
        with contextlib.suppress(RuntimeError, AttributeError):
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            colours = "GRAY" if mode == "L" else "RGB"
            return _turned_tensor(torchvision.io.decode_jpeg(encoded, colours), orientation)
    return _upright(image, mode)


def _upright(image: Image.Image, mode: str) -> Tensor:
    pixels = TF.pil_to_tensor(image.convert(mode))
    return _turned_tensor(pixels, _orientation_of(image))


def _turned_tensor(pixels: Tensor, orientation: int) -> Tensor:
    """Return pixels (c, h, w) turned as EXIF's number of their orientation, 1 to 8, says."""
    if orientation == 1:
        return pixels
    values = _turned(pixels.permute(1, 2, 0).numpy(), orientation)
    return torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1)


# ---------------------------------------------------------------- squares


def to_canvas(image: Tensor, size: int) -> Tensor:
    """Return (c, h, w) uint8 resized to a square (c, size, size), whatever its aspect ratio."""
    return TF.resize(image, [size, size], TF.InterpolationMode.BICUBIC)


def center_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Return the central square of (c, h, w) uint8 whose shorter side is resized to `resize`."""
    longest = 8 * min(image.shape[1:])  # of a strip of 20,000 x 10, only the middle is enlarged
    if max(image.shape[1:]) > longest:
        image = TF.center_crop(image, [min(side, longest) for side in image.shape[1:]])
    image = TF.resize(image, [resize], TF.InterpolationMode.BICUBIC)
    return TF.center_crop(image, [size, size])
