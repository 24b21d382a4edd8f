import itertools
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import data
from data import (
    CropConfig,
    Cropper,
    MultiCrop,
    StepSampler,
    build_dataset,
    collate,
    hash_keys,
)

CONFIG = CropConfig(global_crop_size=32, local_crop_size=16, num_local_crops=3)


def photos(batch: int = 4, size: int = 40) -> Tensor:
    """Smooth random images (b, 3, size, size) uint8."""
    coarse = torch.rand(batch, 3, 6, 6)
    images = TF.resize(coarse, [size, size], InterpolationMode.BICUBIC).clamp(0, 1)
    return (255 * images).round().to(torch.uint8)


def test_data_sets_with_test_images_of_their_own_take_no_others() -> None:
    for name in ("patterns", "cifar10"):
        with pytest.raises(ValueError, match=f"--val photos .* images of your own: {name} has its"):
            build_dataset(name, "test", val="photos")


# ---------------------------------------------------------------- sampler


def flat(sampler: StepSampler) -> list[tuple[int, int]]:
    return [item for batch in sampler for item in batch]


def test_every_epoch_is_another_permutation() -> None:
    batches = flat(StepSampler(12, 4, 0, 0, 1, range(6)))
    epochs = [[i for epoch, i in batches if epoch == e] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1] != list(range(12))
    assert flat(StepSampler(12, 4, 1, 0, 1, range(3))) != batches[:12]


def test_sampler_starts_at_any_step() -> None:
    whole = list(StepSampler(14, 4, 0, 0, 1, range(9)))
    for start in range(9):
        assert list(StepSampler(14, 4, 0, 0, 1, range(start, 9))) == whole[start:]


def test_ranks_cut_one_global_order() -> None:
    whole = list(StepSampler(27, 6, 5, 0, 1, range(8)))
    ranks = [list(StepSampler(27, 2, 5, rank, 3, range(8))) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*ranks, strict=True)] == whole


def test_batch_larger_than_the_data_is_named() -> None:
    with pytest.raises(ValueError, match="has 10 images, fewer than a batch of 6 x 2"):
        StepSampler(10, 6, 0, 0, 2, range(1))


# ---------------------------------------------------------------- images


def test_folder_that_is_called_as_a_data_set_is_not_it_which_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_dataset("patterns").notes == []
    (tmp_path / "patterns").mkdir()
    text = "took the data set patterns; the folder of that name is ./patterns"
    assert build_dataset("patterns").notes == [text]


def test_patterns_are_the_same_at_any_time_and_differ() -> None:
    whole = data.draw_patterns(torch.arange(40))
    assert whole.shape == (40, 3, 48, 48)
    assert whole.dtype == torch.uint8
    assert torch.equal(data.draw_patterns(torch.tensor([31, 7])), whole[[31, 7]])
    assert len(whole.flatten(1).unique(dim=0)) == 40
    train, test = build_dataset("patterns"), build_dataset("patterns", "test")
    assert (len(train), len(test)) == (8000, 1000)
    assert np.bincount(train.labels).tolist() == [800] * 10
    both = torch.cat([train.images, test.images]).flatten(1).unique(dim=0)
    assert len(both) == 9000


def write_images(folder: Path, num: int, size: tuple[int, int] = (20, 30)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    for name, num in (("train/b", 3), ("train/a", 2), ("val/b", 1), ("val/a", 4)):
        write_images(tmp_path / name, num)
    train, memory, test = (build_dataset(str(tmp_path), split) for split in data.SPLITS)
    assert train.labels.tolist() == memory.labels.tolist() == [0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 0, 0, 1]


def test_any_other_folder_holds_out_a_fixed_tenth(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 15)
    write_images(tmp_path / "b", 15)
    train, memory, test = (build_dataset(str(tmp_path), split) for split in data.SPLITS)
    assert (len(train), len(memory), len(test)) == (30, 27, 3)
    assert set(memory.images) | set(test.images) == set(train.images)
    assert build_dataset(str(tmp_path), "test").images.tolist() == test.images.tolist()


def test_folder_without_classes_trains_and_has_no_test(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    dataset = build_dataset(str(tmp_path), canvas_size=16)
    assert (len(dataset), dataset.labels, dataset[2].label) == (4, None, -1)
    assert dataset[2].image.shape == (3, 16, 16)
    assert dataset[2].size.tolist() == [20, 30]
    with pytest.raises(ValueError, match="no class folders"):
        build_dataset(str(tmp_path), "test")


def test_linked_folders_are_followed_and_hidden_files_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "store" / "x", 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "store" / "x" / "._0.png").write_text("not an image")
    dataset = build_dataset(str(tmp_path / "set"))
    assert len(dataset) == 3
    assert dataset[1].image.shape == (3, 20, 30)


def scans_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each scan seem to take two seconds, so that what it found is kept."""
    seconds = itertools.count(step=2)
    monkeypatch.setattr("folders.time.monotonic", lambda: next(seconds))


def test_a_path_is_a_path_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index that one spelling left serves the others, from other folders too."""
    root = tmp_path / "pets"
    for name in ("cat", "dog"):
        write_images(root / name, 20)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(root)
    expected = build_dataset(str(root))
    scans_take_long(monkeypatch)
    for folder, spelling in (
        (tmp_path, "pets"),
        (tmp_path, "./pets/"),
        (tmp_path / "elsewhere", "../pets"),
        (root, "."),
        (tmp_path, str(root)),
        (tmp_path, "link"),
    ):
        monkeypatch.chdir(folder)
        for split in ("train", "memory", "test"):
            dataset = build_dataset(spelling, split, index_folder=tmp_path / ".index")
            assert dataset.classes == ["cat", "dog"]
            assert dataset.labels.tolist() == build_dataset(str(root), split).labels.tolist()
        dataset = build_dataset(spelling, index_folder=tmp_path / ".index")
        assert dataset.fingerprint() == expected.fingerprint()
        assert all(torch.equal(dataset[i].image, expected[i].image) for i in (0, 39))
    assert len(list((tmp_path / ".index").iterdir())) == 2  # of the folder and of the link


def test_damaged_index_is_scanned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, 3)
    scans_take_long(monkeypatch)
    expected = build_dataset(str(tmp_path / "pets"), index_folder=tmp_path / ".index")
    (index,) = (tmp_path / ".index").iterdir()
    whole = index.read_bytes()
    generator = random.Random(0)
    for kind in ("flip", "cut", "zero", "text") * 40:
        content = bytearray(whole)
        place = generator.randrange(len(content))
        if kind == "flip":
            content[place] ^= 1 << generator.randrange(8)
        elif kind == "cut":
            content = content[:place]
        elif kind == "zero":
            content[place : place + 50] = bytes(50)
        else:
            content = bytearray(b"no index")
        index.write_bytes(content)
        dataset = build_dataset(str(tmp_path / "pets"), index_folder=tmp_path / ".index")
        assert dataset.images.tolist() == expected.images.tolist()
        assert dataset.labels.tolist() == expected.labels.tolist()


def test_one_image_leaves_none_to_remember(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\na/0.png,cat\n")
    write_images(tmp_path / "a", 1)
    with pytest.raises(ValueError, match=r"list\.csv has no classes: all images are of one, cat"):
        build_dataset(str(tmp_path / "list.csv"), "memory")


def test_wrong_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such data 'cifr10'.*close: cifar10"):
        build_dataset("cifr10")
    with pytest.raises(ValueError, match=r"no images in .*: need files like \.jpg"):
        build_dataset(str(tmp_path))
    write_images(tmp_path / "train/a", 1)
    write_images(tmp_path / "train/b", 1)
    write_images(tmp_path / "val/other", 1)
    with pytest.raises(ValueError, match=r"have classes that the training images lack: other"):
        build_dataset(str(tmp_path), "test")


def test_torchvision_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cifar10 is not in datasets/ and did not download"):
        build_dataset("cifar10")
    folder = tmp_path / "datasets" / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        rows = {"data": np.full((4, 3072), i, np.uint8), "labels": [0, 1, 2, i]}
        (folder / name).write_bytes(pickle.dumps(rows))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    train, test = build_dataset("cifar10"), build_dataset("cifar10", "test")
    assert (len(train), len(test)) == (20, 4)
    assert train[5].image.unique().tolist() == [1]
    assert test.labels.tolist() == [0, 1, 2, 5]


MODES_OF_FORMATS = {
    "jpg": ("RGB", "L", "CMYK", "1"),
    "png": ("RGB", "L", "P", "RGBA", "LA", "1"),
    "webp": ("RGB", "RGBA"),
}


@pytest.mark.parametrize(
    ("suffix", "mode"), [(suffix, mode) for suffix, of in MODES_OF_FORMATS.items() for mode in of]
)
def test_decodes_as_pillow_does(mode: str, suffix: str, tmp_path: Path) -> None:
    image = Image.fromarray(photos(1, 40)[0].permute(1, 2, 0).numpy()).convert(mode)
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    decoded = data.decode(str(path).encode())
    expected = TF.pil_to_tensor(Image.open(path).convert("RGB"))
    assert (decoded.float() - expected.float()).abs().mean() < 2


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(photos(1, 40)[0].permute(1, 2, 0).numpy()[:20])
    for suffix in ("jpg", "png"):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright
        path = tmp_path / f"image.{suffix}"
        image.save(path, exif=exif)
        assert data.decode(str(path).encode()).shape == (3, 40, 20)


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    for content in (b"", b"not an image", b"\xff\xd8\xff\xe0 cut"):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot decode .*bad\.jpg"):
            data.decode(str(tmp_path / "bad.jpg").encode())


def test_center_crop_is_the_papers_evaluation(tmp_path: Path) -> None:
    image = photos(1, 64)[0][:, :48]
    expected = TF.center_crop(TF.resize(image, [40], InterpolationMode.BICUBIC), [32, 32])
    assert torch.equal(data.center_crop(image, 40, 32), expected)


def test_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    write_images(tmp_path, 11)
    dataset = build_dataset(str(tmp_path), canvas_size=24)
    multi_crop, seen = MultiCrop(CONFIG), []
    for num_workers in (0, 2):
        sampler = StepSampler(11, 4, 3, 0, 1, range(1, 5))
        for batch in DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers):
            keys = hash_keys(3, batch.epoch, batch.index)
            seen.append([*multi_crop(batch.image, batch.size, keys), batch.index])
    for first, second in zip(seen[:4], seen[4:], strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_batch_keeps_the_decoders_layout_and_their_pixels(tmp_path: Path) -> None:
    dataset = build_dataset("patterns", canvas_size=20)
    samples = [dataset[3, i] for i in (5, 1, 4)]
    batch = collate(samples)
    assert torch.equal(batch.image, torch.stack([sample.image for sample in samples]))
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert batch.index.tolist() == batch.source.tolist() == [5, 1, 4]
    assert batch.epoch.tolist() == [3, 3, 3]
    assert batch.size.shape == (3, 2)


def test_crops_of_a_batch_are_those_of_its_keys() -> None:
    dataset = build_dataset("patterns", canvas_size=32)
    config = CropConfig(global_crop_size=32, local_crop_size=16, num_local_crops=2)
    multi_crop, batch = MultiCrop(config), collate([dataset[2, i] for i in (7, 9)])
    crops = Cropper(multi_crop, 11, torch.device("cpu"))(batch)
    moved = Cropper(MultiCrop(CropConfig()), 11, torch.device("meta"))
    assert moved.multi_crop.mean.device.type == "meta"
    keys = torch.stack([hash_keys(11, 2, i) for i in (7, 9)])
    expected = multi_crop(batch.image, batch.size, keys)
    assert all(torch.equal(a, b) for a, b in zip(crops, expected, strict=True))
