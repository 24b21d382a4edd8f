"""Which pixels an image has, whatever its depth, its frames and its size."""

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_folders import flags_of, write

from data import build_dataset
from dino_train import train
from harness.flags import parse_config
from harness.opened_network import open_network
from pixels import decode, image_facts, measured_levels, read_pixels, to_canvas


def bytes_of(path: Path) -> bytes:
    return str(path).encode()


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """Write (h, w) or (h, w, c) uint16 as a PNG of 16 bits, as the format's definition says."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    height, width = pixels.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[1 if pixels.ndim == 2 else pixels.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))


def expected(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return, by a plain loop, what each number is of 255 between two levels."""
    flat = [round(255 * min(max((float(v) - low) / (high - low), 0), 1)) for v in values.ravel()]
    return np.array(flat, np.uint8).reshape(values.shape)


RAMP = np.linspace(0, 1, 48).reshape(6, 8)
KINDS = {
    "uint16.png": (60000 * RAMP).astype(np.uint16),
    "twelve_bits.tif": (4095 * RAMP).astype(np.uint16),
    "int16.tif": (2000 * RAMP - 1000).astype(np.int16),
    "int32.tif": (200_000 * RAMP - 100_000).astype(np.int32),
    "uint32.tif": (4e9 * RAMP).astype(np.uint32),
    "float32.tif": (3 * RAMP - 1).astype(np.float32),
    "big_endian.tif": (60000 * RAMP).astype(">u2"),
}


def write_tiff(path: Path, values: np.ndarray) -> None:
    """Write numbers as an uncompressed TIFF of one strip, by the format's definition."""
    big = values.dtype.byteorder == ">"
    order = ">" if big else "<"
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.tobytes()
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 1, 8 * values.dtype.itemsize),
        (259, 3, 1, 1),
        (262, 3, 1, 1 if channels == 1 else 2),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (339, 3, 1, kind),
    ]
    directory = struct.pack(order + "H", len(entries))
    for tag, field, count, value in entries:
        content = struct.pack(
            order + ("HH" if field == 3 else "I"), *([value, 0] if field == 3 else [value])
        )
        directory += struct.pack(order + "HHI", tag, field, count) + content
    header = (b"MM\0*" if big else b"II*\0") + struct.pack(order + "I", 8 + len(data))
    path.write_bytes(header + data + directory + struct.pack(order + "I", 0))


def write_deep(path: Path, values: np.ndarray) -> None:
    if path.suffix == ".png":
        write_png16(path, values)
    else:
        write_tiff(path, values)


# ---------------------------------------------------------------- depth


@pytest.mark.parametrize("name", KINDS)
def test_more_than_8_bits_are_mapped_by_levels(name: str, tmp_path: Path) -> None:
    values = KINDS[name]
    write_deep(tmp_path / name, values)
    low, high = float(values.min()) + 1, 0.7 * float(values.max())
    image = decode(bytes_of(tmp_path / name), (low, high))
    for channel in image.numpy():
        assert np.abs(channel.astype(int) - expected(values, low, high)).max() <= 1
    own = decode(bytes_of(tmp_path / name))[0].numpy()
    low, high = np.percentile(values.astype(np.float64), [0.1, 99.9])
    assert np.abs(own.astype(int) - expected(values, low, high)).max() <= 1
    assert len(np.unique(own)) > 40


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_colours_of_16_bits_are_mapped_too(channels: int, tmp_path: Path) -> None:
    """Pillow alone keeps the upper 8 bits: of 12 bits in 16, 16 levels that are nearly black."""
    values = np.random.default_rng(0).integers(0, 4096, (6, 8, channels), dtype=np.uint16)
    write_png16(tmp_path / "a.png", values)
    image = decode(bytes_of(tmp_path / "a.png"), (0, 4095)).numpy()
    for channel in range(3):
        shown = values[..., channel if channels > 2 else 0]
        assert np.abs(image[channel].astype(int) - expected(shown, 0, 4095)).max() <= 1


def test_colour_tiff_of_16_bits_is_read_or_says_what_it_needs(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (6, 8, 3), dtype=np.uint16)
    path = tmp_path / "a.tif"
    offset = 8 + values.nbytes  # three bit depths do not fit into their entry: they stand behind
    write_tiff(path, values)
    content = bytearray(path.read_bytes())
    place = offset + 2 + 12 * 2
    content[place : place + 12] = struct.pack("<HHII", 258, 3, 3, len(content))
    path.write_bytes(bytes(content) + struct.pack("<HHH", 16, 16, 16))
    try:
        import tifffile  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"a\.tif: a colour TIFF of 16 bits needs .* tifffile"):
            decode(bytes_of(path))
        return
    image = decode(bytes_of(path), (0, 4095)).numpy()
    assert np.abs(image.astype(int) - expected(np.moveaxis(values, -1, 0), 0, 4095)).max() <= 1


def test_cmyk_of_16_bits_has_the_colours_of_8(tmp_path: Path) -> None:
    """Pillow writes 8 bits alone: the depth, the length and the values are changed behind it."""
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    shallow, deep = tmp_path / "8.tif", tmp_path / "16.tif"
    write_tiff(shallow, values)
    write_tiff(deep, values.astype(np.uint16) * 257)
    for path, bits in ((shallow, 8), (deep, 16)):
        content = bytearray(path.read_bytes())
        start = struct.unpack_from("<I", content, 4)[0] + 2
        for entry in range(start, len(content) - 4, 12):
            tag = struct.unpack_from("<H", content, entry)[0]
            if tag == 258:  # four depths, which stand behind
                struct.pack_into("<II", content, entry + 4, 4, len(content))
            if tag == 262:  # separated colours
                struct.pack_into("<H", content, entry + 8, 5)
        path.write_bytes(content + struct.pack("<4H", *[bits] * 4))
    assert Image.open(shallow).mode == Image.open(deep).mode == "CMYK"
    rgb = np.asarray(Image.open(shallow).convert("RGB"))
    for path in (shallow, deep):
        np.testing.assert_array_equal(decode(bytes_of(path)).permute(1, 2, 0).numpy(), rgb)


def test_paths_of_any_kind_and_pillows_images_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = photo(5, 9).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((5, 9)))
    exif = Image.Exif()
    exif[274] = 6  # to be turned
    image.save(path, exif=exif)
    for channels in (1, 3, 4):
        expected = decode(bytes_of(path), channels=channels)
        assert expected.shape == (channels, 5, 9)
        for given in (path, str(path), Image.open(path)):
            assert torch.equal(decode(given, channels=channels), expected)
    write_png16(path, np.zeros((4, 4, 1), np.uint16))
    with pytest.raises(ValueError, match="need a Pillow image of 8 bits a channel, got one of mod"):
        decode(Image.open(path))


def test_palette_with_transparency_has_four_channels(tmp_path: Path) -> None:
    image = Image.new("P", (3, 2))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([255, 7]))
    decoded = decode(bytes_of(tmp_path / "a.png"), channels=4)
    assert decoded[:, 0, 0].tolist() == [10, 20, 30, 255]
    assert decoded[:, 0, 1].tolist() == [40, 50, 60, 7]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_as_exif_says(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = (255 * RAMP).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "flat.png", exif=exif)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png", exif=exif)
    flat, deep = (decode(bytes_of(tmp_path / f"{x}.png"), (0, 255)) for x in ("flat", "deep"))
    assert torch.equal(flat, deep)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_image_that_is_not_finite_cannot_be_decoded(value: float, tmp_path: Path) -> None:
    values = RAMP.astype(np.float32).copy()
    values[2, 3] = value
    write_tiff(tmp_path / "a.tif", values)
    with pytest.raises(ValueError, match=r"cannot decode .*a\.tif: it holds a nan or an infinity"):
        decode(bytes_of(tmp_path / "a.tif"))


def test_levels_of_a_data_set_are_those_of_up_to_64_images(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(200, 3000, (20, 30)).astype(np.uint16) for _ in range(40)]
    for i, values in enumerate(images):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        write_tiff(tmp_path / "ab"[i % 2] / f"{i:02}.tif", values)
    low, high = build_dataset(str(tmp_path)).survey().levels
    pooled = np.percentile(np.concatenate([values.ravel() for values in images]), [0.1, 99.9])
    assert (low, high) == pytest.approx(tuple(pooled))
    assert build_dataset("patterns").survey().levels is None


def test_levels_never_are_the_same() -> None:
    assert measured_levels([np.full((3, 3), 7, np.uint16)]) == (7, 8)


def test_own_levels_of_an_image_are_of_all_its_colours(tmp_path: Path) -> None:
    values = np.zeros((1080, 1920, 3), np.uint16)
    values[..., 0] = 100
    values[..., 1] = np.linspace(0, 60_000, 1920)
    np.save(tmp_path / "colours.npy", values)
    green = decode(bytes_of(tmp_path / "colours.npy"), channels=3)[1].double()
    expected = torch.from_numpy(values[..., 1] / 60_000 * 255)
    assert (green - expected).abs().max() < 2


def test_levels_of_grey_images_of_several_forms_are_of_all_of_them() -> None:
    random = np.random.default_rng(0)
    shapes = ((20, 30, 1), (20, 30), (20, 30, 3))
    images = [random.integers(0, 3000, shape).astype(np.uint16) for shape in shapes]
    numbers = np.concatenate([image.ravel() for image in images])
    assert measured_levels(images) == pytest.approx(tuple(np.percentile(numbers, [0.1, 99.9])))


@pytest.mark.slow
def test_levels_are_kept_by_run_and_checkpoint_and_used_by_evaluations(
    script, tmp_path: Path
) -> None:
    data = tmp_path / "cells"
    all_values: list[np.ndarray] = []
    for i in range(24):
        name = "ab"[i % 2]
        (data / name).mkdir(parents=True, exist_ok=True)
        values = (1000 + (2000 + 500 * (i % 2)) * RAMP.repeat(3, 0).repeat(3, 1)).astype(np.uint16)
        write_tiff(data / name / f"{i:02}.tif", values)
        all_values.append(values)
    low, high = np.percentile(all_values, [0.1, 99.9])
    result = script("dino_train", *flags_of(data, "--output-dir", tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert f"of more than 8 bits, {low:g} is black and {high:g} white" in result.stdout
    assert f"  levels:\n  - {low}\n  - {high}\n" in (tmp_path / "run" / "config.yaml").read_text()
    for name in ("eval_knn", "eval_linear"):
        result = script(name, tmp_path / "run" / "ckpt.safetensors")
        assert f"data: of more than 8 bits, {low:g} is black and {high:g} white" in result.stdout
    result = script(
        "visualize", tmp_path / "run" / "ckpt.safetensors", data, "--output-dir", tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    result = script("dino_train", "--resume", tmp_path / "run", "--epochs", "2")
    assert result.returncode == 0, result.stderr


def test_given_levels_are_taken_and_checked(script, tmp_path: Path) -> None:
    write(tmp_path / "data", "a/4", "b/4")
    flags = flags_of(tmp_path / "data", "--output-dir", tmp_path / "run", "--levels")
    result = script("dino_train", *flags, "-1000", "2000")
    assert result.returncode == 0, result.stderr
    result = script("dino_train", *flags, "5", "5", "--overwrite")
    assert (result.returncode, result.stderr) == (
        2,
        "error: need --levels LOW HIGH with LOW < HIGH, got 5.0 5.0\n",
    )


@pytest.mark.slow
def test_levels_of_a_run_are_the_same_in_a_resumed_one(tmp_path: Path) -> None:
    for i in range(16):
        (tmp_path / "x").mkdir(exist_ok=True)
        write_tiff(tmp_path / "x" / f"{i}.tif", ((100 + i) * RAMP.repeat(3, 0)).astype(np.uint16))
    run = tmp_path / "run"
    flags = [*flags_of(tmp_path / "x"), "--output-dir", str(run), "--knn-every", "0"]
    train(parse_config([*flags, "--epochs", "1", "--levels", "90", "130"]))
    for i in range(16):  # other numbers, which would have other levels
        write_tiff(tmp_path / "x" / f"{i}.tif", ((300 + i) * RAMP.repeat(3, 0)).astype(np.uint16))
    resumed = parse_config(["--resume", str(run), "--epochs", "2"])
    assert train(resumed)["step"] == 8
    assert open_network(run / "ckpt.safetensors").preparation.levels == (90, 130)


# ---------------------------------------------------------------- frames, formats, sizes


def test_first_of_several_frames_is_taken_and_that_is_said(script, tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    write(tmp_path / "data", "./6")
    for name in ("a.tif", "b.gif", "c.webp", "d.apng"):
        first.save(tmp_path / "data" / name, save_all=True, append_images=[second])
        red, _, blue = decode(bytes_of(tmp_path / "data" / name)).float().mean(dim=(1, 2))
        assert red > 200 > blue
    flags = flags_of(tmp_path / "data", "--output-dir", tmp_path / "run")
    result = script("dino_train", *flags)
    assert "4 of 10 images looked at have several pages or frames: the first is" in result.stdout


def test_postscript_never_reaches_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("was run"))
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.jpg: it is no image that Pillow reads"):
        decode(bytes_of(tmp_path / "a.jpg"))


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    for path in ("/dev/zero", "/proc", str(tmp_path)):
        with pytest.raises(ValueError, match="it is no regular file"):
            decode(path.encode())


def test_more_than_64_megapixels_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("L", (8100, 8000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: need at most 64 megapixels, got 65 megapixels"):
        decode(bytes_of(tmp_path / "a.png"))


def photo(width: int, height: int) -> Image.Image:
    """Return smooth colours of a photograph's kind."""
    coarse = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_image_with_broken_exif_is_read_without_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    options = {"dpi": (72, 72)} if suffix == "jpg" else {"lossless": True}
    photo(64, 48).save(path, exif=b"Exif\0\0no header of a TIFF", **options)
    pixels = read_pixels(bytes_of(path))
    assert pixels.size == (48, 64)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
    assert (pixels.image.float() - expected.float()).abs().mean() < 0.5


@pytest.mark.parametrize("at_least", [0, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("block", ["exif", "xmp"])
def test_jpeg_is_turned_as_exif_or_xmp_says(
    block: str, orientation: int, at_least: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    options = {"exif": exif} if block == "exif" else {"xmp": xmp.encode()}
    photo(96, 64).save(tmp_path / "a.jpg", quality=95, **options)
    pixels = read_pixels(bytes_of(tmp_path / "a.jpg"), at_least=at_least)
    with Image.open(tmp_path / "a.jpg") as image:
        turned = ImageOps.exif_transpose(image)
    assert pixels.size == (turned.height, turned.width)
    expected = torch.from_numpy(np.asarray(turned).copy()).permute(2, 0, 1)
    difference = to_canvas(pixels.image, 16).float() - to_canvas(expected, 16).float()
    assert difference.abs().mean() < 6  # turned otherwise, it is above 30


def test_bitmap_of_five_and_six_bits_a_colour_is_read(tmp_path: Path) -> None:
    """Pillow's name for it, BGR;16, is of 16 bits for all three colours."""
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    pixels = struct.pack("<HH", 0xF800, 0x001F)  # red, blue
    content = b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + header + masks + pixels
    (tmp_path / "a.bmp").write_bytes(content)
    red, blue = decode(bytes_of(tmp_path / "a.bmp"))[:, 0].T.tolist()
    assert (red, blue) == ([255, 0, 0], [0, 0, 255])


def test_bands_are_counted_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixels.MAX_PIXELS", 1_000_000)
    np.save(tmp_path / "a.npy", np.zeros((500, 600, 13), np.uint8))
    with pytest.raises(ValueError, match=r"need at most 3 million numbers .*, got 4 million"):
        decode(bytes_of(tmp_path / "a.npy"), channels=13)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpeg_is_decoded_at_a_part_of_its_size(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(1600, 1200).save(tmp_path / "a.jpg", quality=95, exif=exif)
    whole = read_pixels(bytes_of(tmp_path / "a.jpg"))
    part = read_pixels(bytes_of(tmp_path / "a.jpg"), at_least=128)
    assert part.size == whole.size == ((1200, 1600) if orientation == 1 else (1600, 1200))
    assert max(part.image.shape[1:]) == 400
    difference = to_canvas(whole.image, 128).float() - to_canvas(part.image, 128).float()
    assert difference.abs().mean() < 0.5
    not_large = read_pixels(bytes_of(tmp_path / "a.jpg"), at_least=200)
    assert torch.equal(not_large.image, whole.image)


def test_boxes_of_a_large_jpeg_are_drawn_in_its_true_size(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    photo(1600, 1200).save(tmp_path / "x" / "a.jpg")
    sample = build_dataset(str(tmp_path), canvas_size=64)[0]
    assert sample.size.tolist() == [1200, 1600]
    assert sample.image.shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("longer", "canvas"), [(32, 32), (200, 200), (257, 384), (400, 512), (500, 512), (900, 512)]
)
def test_canvas_is_the_smallest_that_holds_the_longer_side(
    longer: int, canvas: int, script, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    for i in range(4):
        photo(longer, longer * 3 // 4).save(tmp_path / "x" / f"{i}.jpg")
    sizes = ["--global-crop-size", "16", "--local-crop-size", "8"]
    result = script("dino_train", *flags_of(tmp_path, "--output-dir", tmp_path / "run", *sizes))
    assert result.returncode == 0, result.stderr
    assert f"from images resized to {canvas} px" in result.stdout


# ---------------------------------------------------------------- bands


def bands(dtype: str, num: int = 5) -> np.ndarray:
    """Return (9, 7, num) numbers, each band on a scale of its own."""
    scales = np.arange(1, num + 1)
    return (np.random.default_rng(0).random((9, 7, num)) * 40 * scales + scales).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", ">u2", "float32", "float64"])
def test_bands_of_an_array_are_mapped_by_the_levels_of_each(dtype: str, tmp_path: Path) -> None:
    values = bands(dtype)
    np.save(tmp_path / "last.npy", values)
    np.save(tmp_path / "first.npy", np.moveaxis(values, -1, 0))
    levels = (0, 100, 10, 110, 20, 120, 30, 130, 40, 140)
    for name in ("last.npy", "first.npy"):
        image = decode(bytes_of(tmp_path / name), levels, channels=5).numpy()
        own = decode(bytes_of(tmp_path / name), channels=5).numpy()
        for band in range(5):
            if dtype == "uint8":  # 8 bits stay as they are
                assert np.array_equal(image[band], values[..., band])
                continue
            low, high = levels[2 * band : 2 * band + 2]
            of_band = expected(values[..., band], low, high)
            assert np.abs(image[band].astype(int) - of_band).max() <= 1
            low, high = np.percentile(values[..., band].astype(np.float64), [0.1, 99.9])
            of_band = expected(values[..., band], low, high)
            assert np.abs(own[band].astype(int) - of_band).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_of_a_tiff_are_turned_as_it_says(orientation: int, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the optional package tifffile reads bands")
    values = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    path, tag = tmp_path / "a.tif", (274, "H", 1, orientation, True)
    tifffile.imwrite(path, values[..., :2], photometric="minisblack", extratags=[tag])
    Image.fromarray(values).save(tmp_path / "rgb.tif", exif={274: orientation})
    rgb = decode(bytes_of(tmp_path / "rgb.tif"))  # which Pillow turns
    assert torch.equal(decode(bytes_of(path), channels=2), rgb[:2])


@pytest.mark.parametrize("layout", ["samples", "planes", "pages", "float", "big"])
def test_bands_of_a_tiff_are_samples_planes_or_pages(layout: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the optional package tifffile reads bands")
    values = bands("float32" if layout == "float" else "uint16")
    planes = np.moveaxis(values, -1, 0)
    path = tmp_path / "a.tif"
    if layout == "planes":
        tifffile.imwrite(path, planes, photometric="minisblack", planarconfig="separate")
    elif layout == "pages":
        tifffile.imwrite(path, planes, photometric="minisblack")
    else:
        is_big = layout == "big"
        tifffile.imwrite(
            path, values, photometric="minisblack", planarconfig="contig", bigtiff=is_big
        )
    np.save(tmp_path / "a.npy", values)
    of_tiff = decode(bytes_of(path), channels=5)
    assert torch.equal(of_tiff, decode(bytes_of(tmp_path / "a.npy"), channels=5))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "uint32"])
def test_colours_of_a_kind_that_pillow_does_not_know_are_read_band_by_band(
    dtype: str, channels: int, tmp_path: Path
) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the optional package tifffile reads bands")
    values = bands(dtype, 3)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    np.save(tmp_path / "a.npy", values)
    path, same = bytes_of(tmp_path / "a.tif"), bytes_of(tmp_path / "a.npy")
    assert torch.equal(decode(path, channels=channels), decode(same, channels=channels))
    assert image_facts(path, channels).values is not None


def test_tiff_of_bands_says_which_package_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiff(tmp_path / "a.tif", KINDS["uint32.tif"])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match="a TIFF of several bands needs the package tifffile"):
        decode(bytes_of(tmp_path / "a.tif"), channels=5)


def test_transparency_is_a_band_where_four_are_asked_for(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    Image.fromarray(values, "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(
        decode(bytes_of(tmp_path / "a.png"), channels=4), values.transpose(2, 0, 1)
    )
    assert np.array_equal(decode(bytes_of(tmp_path / "a.png")), values[..., :3].transpose(2, 0, 1))
    deep = values.astype(np.uint16) * 256
    write_png16(tmp_path / "deep.png", deep)
    image = decode(bytes_of(tmp_path / "deep.png"), (0, 255 * 256), channels=4)
    assert np.array_equal(image, values.transpose(2, 0, 1))


def test_one_channel_is_grey_and_grey_stays_as_it_is(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "rgb.png")
    Image.fromarray(colours).save(tmp_path / "rgb.jpg")
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")
    write_tiff(tmp_path / "deep.tif", KINDS["twelve_bits.tif"])
    np.save(tmp_path / "rgb.npy", colours)
    as_grey = np.asarray(Image.fromarray(colours).convert("L"))
    for name in ("rgb.png", "rgb.npy"):
        assert np.array_equal(decode(bytes_of(tmp_path / name), channels=1)[0], as_grey)
    grey = decode(bytes_of(tmp_path / "grey.png"), channels=1)
    assert np.array_equal(grey[0], colours[..., 0])
    jpeg = decode(bytes_of(tmp_path / "rgb.jpg"), channels=1)[0].numpy().astype(float)
    with Image.open(tmp_path / "rgb.jpg") as image:
        assert np.abs(jpeg - np.asarray(image.convert("L"))).mean() < 1.5
    deep = decode(bytes_of(tmp_path / "deep.tif"), (0, 4095), channels=1)
    assert torch.equal(deep[0], decode(bytes_of(tmp_path / "deep.tif"), (0, 4095))[0])
    pattern = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    assert decode(pattern, channels=1).shape == (1, 5, 5)


def test_file_of_other_channels_is_named_with_its_shape(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", bands("uint16", 4))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(tmp_path / "a.png")
    cases = {
        "a.npy": r"a\.npy: need an image \(h, w, 5\), got shape \(9, 7, 4\); --channels takes",
        "a.png": r"a\.png: need an image \(h, w, 5\), got shape \(9, 7, 3\)",
        "text.npy": "need integers or floats, got <U1",
        "objects.npy": "Object arrays cannot be loaded",
    }
    for name, text in cases.items():
        with pytest.raises(ValueError, match=text):
            decode(bytes_of(tmp_path / name), channels=5)
    with pytest.raises(ValueError, match=r"need an image \(h, w, 3\), got shape \(9, 7, 4\)"):
        decode(bytes_of(tmp_path / "a.npy"))
    with pytest.raises(ValueError, match="need an image of 5 channels, got 3"):
        decode(torch.zeros(3, 4, 4, dtype=torch.uint8), channels=5)


def test_folder_of_arrays_has_levels_mean_and_deviation_by_band(tmp_path: Path) -> None:
    images = []
    for i in range(12):
        values = np.random.default_rng(i).random((8, 6, 4)) * [1, 2, 0, 4]
        images.append(values.astype(np.float32))
        np.save(tmp_path / f"{i:02}.npy", images[-1])
    dataset = build_dataset(str(tmp_path), channels=4)
    levels = dataset.survey().levels
    pooled = np.stack(images).reshape(-1, 4).astype(np.float64)
    bounds = np.percentile(pooled, [0.1, 99.9], axis=0).T
    bounds[2] = 0, 1  # nothing is in that band
    assert levels == pytest.approx(tuple(bounds.ravel()))
    dataset.levels = levels
    mean, std = dataset.measure_mean_and_std()
    shares = (pooled - bounds[:, 0]) / (bounds[:, 1] - bounds[:, 0])
    shares = (255 * shares.clip(0, 1)).round() / 255
    assert mean == pytest.approx(tuple(shares.mean(axis=0)), abs=1e-4)
    assert std == pytest.approx((*shares.std(axis=0)[:2], 1 / 255, shares.std(axis=0)[3]), abs=1e-4)


def test_arrays_are_images_only_where_channels_are_given(tmp_path: Path) -> None:
    """Beside photographs a .npy is a file of features or labels."""
    write(tmp_path, "a/3", "b/3")
    np.save(tmp_path / "a" / "features.npy", np.zeros((6, 8), np.float32))
    assert len(build_dataset(str(tmp_path))) == 6
    assert len(build_dataset(str(tmp_path), channels=1)) == 7


def test_pages_that_cannot_be_counted_end_no_survey(tmp_path: Path) -> None:
    pages = [Image.new("L", (40, 30), 9 * i) for i in range(4)]
    pages[0].save(tmp_path / "whole.tif", save_all=True, append_images=pages[1:])
    content = (tmp_path / "whole.tif").read_bytes()
    surveyed = 0
    for size in range(len(content) // 4, len(content), 40):
        (tmp_path / "cut.tif").write_bytes(content[:size])
        if decodes(tmp_path / "cut.tif"):
            surveyed += 1
            assert build_dataset(str(tmp_path)).survey().num_images == 2
    assert surveyed > 9


def decodes(path: Path) -> bool:
    try:
        decode(os.fsencode(path))
    except ValueError:
        return False
    return True


def test_levels_of_bands_are_refused_for_a_grey_image_of_as_many_columns(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", np.full((5, 3), 300, np.uint16))
    with pytest.raises(ValueError, match="need levels of 1 bands, got those of 3"):
        decode(bytes_of(tmp_path / "a.tif"), levels=(0, 1, 0, 1, 0, 1))


def test_large_image_is_mapped_by_levels_like_a_small_one(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 5000, (1300, 1100), dtype=np.uint16)
    write_tiff(tmp_path / "a.tif", values)
    pixels = decode(bytes_of(tmp_path / "a.tif"), levels=(100, 4000))
    expected = (255 * ((values - 100.0) / 3900).clip(0, 1)).round()
    assert (pixels[0].numpy() == expected).all()
    facts = image_facts(bytes_of(tmp_path / "a.tif"))
    assert (facts.values == values[::3, ::3]).all()


def test_bands_that_are_not_taken_are_said(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    Image.fromarray(values, "RGBA").save(tmp_path / "transparent.tif")
    assert build_dataset(str(tmp_path)).survey().notes() == []
    write_interleaved_tiff(tmp_path / "infrared.tif", values)
    (note,) = build_dataset(str(tmp_path)).survey().notes()
    assert note == "of images with 4 bands the first three are taken: --channels 4 takes all"


def write_interleaved_tiff(path: Path, values: np.ndarray) -> None:
    """Write (h, w, 4) uint8 as RGB with a fourth band that is no transparency."""
    height, width, num = values.shape
    bits = 8 + values.nbytes
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 4, bits),  # four bit depths do not fit into their entry
        (259, 3, 1, 1),
        (262, 3, 1, 2),  # RGB
        (273, 4, 1, 8),
        (277, 3, 1, num),
        (278, 4, 1, height),
        (279, 4, 1, values.nbytes),
        (338, 3, 1, 0),  # the fourth is not said what it is
    ]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + b"\0\0\0\0"
    header = b"II*\0" + struct.pack("<I", bits + 8)
    path.write_bytes(header + values.tobytes() + struct.pack("<4H", 8, 8, 8, 8) + directory)
