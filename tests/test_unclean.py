"""Files that are no clean photographs: decoded if they can be, else replaced and named."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Answer, read_log
from PIL import Image

from data import (
    CropConfig,
    ImageDataset,
    MultiCrop,
    StepSampler,
    build_dataset,
    center_crop,
    decode,
    permutation,
    to_canvas,
)
from dino_train import train
from harness.flags import parse_config
from harness.monitor import Monitor


def colours(height: int = 24, width: int = 40) -> np.ndarray:
    """Four flat quarters, which JPEG keeps within a few levels."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = 200, 60, 40
    pixels[: height // 2, width // 2 :] = 40, 180, 90
    pixels[height // 2 :, : width // 2] = 60, 70, 210
    pixels[height // 2 :, width // 2 :] = 230, 220, 120
    return pixels


def write(kind: str, folder: Path) -> tuple[Path, np.ndarray]:
    """Write an image of a kind; gives its path and the RGB that it shows."""
    pixels, image = colours(), Image.fromarray(colours())
    path = folder / f"{kind}.png"
    if kind == "cmyk":
        image.convert("CMYK").save(path := folder / "cmyk.jpg", quality=95)
    elif kind == "16_bit":
        levels = np.linspace(0, 65535, 24 * 40, dtype=np.uint16).reshape(24, 40)
        Image.fromarray(levels).save(path)
    elif kind in ("grayscale", "grayscale_jpeg"):
        path = path.with_suffix(".jpg") if "jpeg" in kind else path
        image.convert("L").save(path, quality=95)
        pixels = np.asarray(image.convert("L").convert("RGB"))
    elif kind == "palette":
        image.quantize(4).save(path, transparency=0)
    elif kind == "transparent":
        image.putalpha(128)
        image.save(path)
    elif kind == "gif":
        image.save(path := folder / "a.gif", save_all=True, append_images=[image.rotate(180)])
    elif kind == "webp":
        frames = [image.rotate(180)]
        path = folder / "a.webp"
        image.save(path, save_all=True, append_images=frames, lossless=True)
    elif kind in ("exif_jpeg", "exif_png"):  # 6: turned by 90 degrees clockwise to be shown
        exif = Image.Exif()
        exif[0x0112] = 6
        path = path.with_suffix(".jpg") if "jpeg" in kind else path
        image.save(path, exif=exif, quality=95)
        pixels = np.rot90(pixels, k=-1)
    elif kind == "jpeg_called_png":
        image.save(path, format="JPEG", quality=95)
    elif kind == "one_pixel":
        pixels = pixels[:1, :1]
        Image.fromarray(pixels).save(path)
    elif kind == "long":
        pixels = colours(10, 20_000)
        Image.fromarray(pixels).save(path)
    return path, pixels


def png_of_size(path: Path, width: int, height: int) -> None:
    """Write a PNG whose header promises a size, and little more: a decompression bomb."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))


UNREADABLE = ("truncated.jpg", "empty.jpg", "text.jpg", "bomb.png", "bomb.jpg", "gone.jpg")


def write_unreadable(folder: Path, names: tuple[str, ...] = UNREADABLE) -> list[Path]:
    for name in names:
        path = folder / name
        if name == "truncated.jpg":
            Image.fromarray(colours(200, 200)).save(path, quality=95)
            path.write_bytes(path.read_bytes()[:-200])
        elif name == "empty.jpg":
            path.write_bytes(b"")
        elif name == "text.jpg":
            path.write_text("not an image\n")
        elif name == "bomb.png":
            png_of_size(path, 60_000, 60_000)
        elif name == "bomb.jpg":  # the size stands in the frame's header
            Image.fromarray(colours()).save(path)
            content = bytearray(path.read_bytes())
            frame = content.index(b"\xff\xc0")
            content[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
            path.write_bytes(content)
    return [folder / name for name in names]


KINDS = (
    "cmyk",
    "grayscale",
    "grayscale_jpeg",
    "palette",
    "transparent",
    "gif",
    "webp",
    "exif_jpeg",
    "exif_png",
    "jpeg_called_png",
    "one_pixel",
    "long",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_decoded_is_decoded_rightly_and_makes_crops(kind: str, tmp_path: Path) -> None:
    path, pixels = write(kind, tmp_path)
    image = decode(str(path).encode())
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    assert image.shape == expected.shape
    difference = (image.int() - expected.int()).abs().float()
    assert difference.mean() < (4 if path.suffix == ".jpg" or "called" in kind else 1e-6)
    assert center_crop(image, 18, 16).shape == (3, 16, 16)
    canvas, size = to_canvas(image, 24), torch.tensor([image.shape[1:]])
    crops = MultiCrop(CropConfig(global_crop_size=16, local_crop_size=8))(
        canvas[None], size, torch.tensor([3])
    )
    assert all(crop.isfinite().all() for crop in crops)


def test_center_of_a_long_strip_is_what_a_full_resize_has() -> None:
    strip = torch.from_numpy(colours(10, 200)).permute(2, 0, 1)
    full = torch.nn.functional.interpolate(
        strip[None].float(), (40, 800), mode="bicubic", antialias=True
    )[0, :, 4:36, 384:416]
    assert (center_crop(strip, 40, 32).float() - full).abs().mean() < 1


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_decoded_is_an_error_with_its_path(name: str, tmp_path: Path) -> None:
    (path,) = write_unreadable(tmp_path, (name,))
    with pytest.raises(ValueError, match=f"cannot decode {path}: .") as raised:
        decode(str(path).encode())
    if "bomb" in name:
        assert "decompression bomb" in str(raised.value)


@pytest.fixture
def unclean(tmp_path: Path) -> Path:
    """700 images in two class folders, 6 of them unreadable, one of each kind in `a`."""
    folder = tmp_path / "unclean"
    for name in "ab":
        (folder / name).mkdir(parents=True)
    for i in range(344):
        image = Image.fromarray(np.roll(colours(16, 16), i, axis=1))
        image.save(folder / "ab"[i % 2] / f"{i:03}.jpg")
        image.rotate(90).save(folder / "ab"[i % 2] / f"{i:03}-turned.jpg")
    for path in write_unreadable(folder / "a"):
        path.touch()
    for kind in ("cmyk", "16_bit", "palette", "gif", "one_pixel", "long"):
        write(kind, folder / "a")
    return folder


def test_unreadable_image_is_replaced_by_the_next_readable_of_the_epochs_order(
    unclean: Path,
) -> None:
    dataset = build_dataset(str(unclean), canvas_size=16)
    dataset.seed = 5
    paths = [Path(path.decode()) for path in dataset.images.tolist()]
    assert len(paths) == 700
    bad = {i for i, path in enumerate(paths) if path.name in UNREADABLE}
    assert len(bad) == 6
    orders = []
    for epoch in (0, 1):
        order = permutation(700, 5, epoch).tolist()
        for place, index in enumerate(order):
            if index in bad:
                follow = (order[(place + i) % 700] for i in range(1, 700))
                expected = next(i for i in follow if i not in bad)
                sample = dataset[epoch, index]
                assert (sample.index, sample.source, sample.epoch) == (index, expected, epoch)
                assert torch.equal(sample.image, dataset[expected].image)
                orders.append((epoch, index, expected))
    assert len(orders) == 12
    batch = next(iter(StepSampler(700, 700, 5, 0, 1, range(1))))
    assert sum(dataset[key].source != dataset[key].index for key in batch) == 6


def test_set_of_nothing_readable_says_so(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("x")
    with pytest.raises(ValueError, match=r"none of 3 images is readable: cannot decode .*\.jpg"):
        build_dataset(str(tmp_path))[0]
    dataset = ImageDataset(np.array([b"/none"]), None)
    with pytest.raises(ValueError, match="none of 1 images is readable"):
        dataset.survey()


SMALL = ("--batch-size", "50", "--log-every", "1", "--save-every", "2", "--knn-every", "0")


@pytest.mark.slow
def test_run_names_each_unreadable_file_once_and_counts_them(
    unclean: Path, tmp_path: Path, launch: Callable[..., Answer], tiny_flags: list[str]
) -> None:
    """Killed after three steps, too, it counts none twice and none less."""
    flags = [*tiny_flags, "--data", unclean, *SMALL, "--batch-size", 25]
    flags += ["--global-crop-size", 16, "--local-crop-size", 8, "--knn-every", 1]
    first = launch(
        [*flags, "--output-dir", tmp_path / "run"],
        world=2,
        kill_at=["dino_train.clip_gradients", 4],
    )
    last = launch(["--resume", tmp_path / "run"], world=2)
    assert last.codes == [0, 0], last.text
    assert "unreadable  6 images, replaced; log.jsonl names them" in last.text
    reasons = [r for line in read_log(tmp_path / "run") for r in line.get("unreadable", [])]
    assert len(reasons) == len(set(reasons)) == 6
    for name in UNREADABLE:
        assert sum(f"cannot decode {unclean}/a/{name}: " in reason for reason in reasons) == 1
        said = [line for line in (first.text + last.text).splitlines() if f"/a/{name}" in line]
        # once more where the kill came before the state that knew of it
        assert 1 <= len(said) <= 2
        assert all(line.endswith("; replaced by the next") for line in said)
    assert "images cannot be decoded: left out" in last.text


@pytest.mark.slow
@pytest.mark.parametrize("is_kept", [False, True])
def test_file_that_vanishes_during_the_run_is_replaced_unless_it_is_in_memory(
    is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_flags: list[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(120):
        Image.fromarray(np.roll(colours(16, 16), i, axis=1)).save(folder / f"{i:03}.png")
    flags = [*tiny_flags, "--data", str(folder), *SMALL, "--batch-size", "40", "--epochs", "2"]
    flags.append("--in-memory" if is_kept else "--no-in-memory")
    seen = []

    def remove_one(*args: object) -> float:
        seen.append(1)
        if len(seen) == 4:  # the first of the second epoch
            (folder / "007.png").unlink()
        return check(*args)

    check = Monitor.check_finite
    monkeypatch.setattr(Monitor, "check_finite", remove_one)
    result = train(parse_config([*flags, "--output-dir", str(tmp_path / "run")]))
    assert len(seen) > 4 and not (folder / "007.png").exists()
    assert result["unreadable_images"] == (0 if is_kept else 1)
    lines = [line["unreadable"] for line in read_log(tmp_path / "run") if "unreadable" in line]
    if is_kept:
        assert not lines
        return
    (reasons,) = lines
    assert "007.png: " in reasons[0]
    assert "No such file" in reasons[0]


@pytest.mark.slow
def test_more_than_1_percent_unreadable_stops_the_run_with_a_list(
    unclean: Path, tmp_path: Path, script, tiny_flags: list[str]
) -> None:
    for i in range(9):
        (unclean / "b" / f"bad{i}.jpg").write_text("x")
    flags = [*tiny_flags, "--data", unclean, *SMALL, "--output-dir", tmp_path / "run"]
    result = script("dino_train", *flags)
    assert result.returncode == 1
    assert "of 709 images cannot be decoded: need at most a share of 0.01" in result.stderr
    num = int(result.stderr.split("error: ")[1].split(" of ")[0])
    assert num >= 8
    assert result.stderr.count("cannot decode ") == min(10, num)
    assert "Traceback" not in result.stderr
    flags += ["--most-unreadable", "0.03", "--overwrite", "--batch-size", "700"]
    result = script("dino_train", *flags)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if "replaced by the next" in line]
    assert len(said) == 10
    assert "and 5 more images, in " in " ".join(result.stdout.split())


def test_evaluation_leaves_out_what_cannot_be_decoded(
    tmp_path: Path, script, tiny_run: Path, image_folder: Path
) -> None:
    results = []
    for name in ("clean", "unclean"):
        folder = tmp_path / name
        for kind in ("checks", "stripes"):
            (folder / kind).mkdir(parents=True)
            for path in sorted((image_folder / kind).iterdir()):
                (folder / kind / path.name).write_bytes(path.read_bytes())
        if name == "unclean":
            (folder / "train").mkdir()
            (folder / "val").mkdir()
            for kind in ("checks", "stripes"):
                (folder / kind).rename(folder / "train" / kind)
                (folder / "val" / kind).mkdir()
                (folder / "val" / kind / "x.jpg").write_text("x")
                (folder / "val" / kind / "y.jpg").write_bytes(
                    (folder / "train" / kind / "3.jpg").read_bytes()
                )
        out = tmp_path / f"{name}.json"
        flags = ("--data", folder, "--json-out", out)
        results.append(script("eval_knn", tiny_run / "ckpt.safetensors", *flags))
    assert results[0].returncode == results[1].returncode == 0, results[1].stderr
    assert "warning: 2 of 4 images cannot be decoded: left out" in results[1].stdout
    facts = json.loads((tmp_path / "unclean.json").read_text())
    assert (facts["num_train"], facts["num_test"]) == (80, 2)
