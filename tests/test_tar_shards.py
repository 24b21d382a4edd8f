import io
import shutil
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import folders
from data import build_dataset, collate
from dino_train import train
from harness.flags import parse_config
from tar_shards import TarImages, scan_tars


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def class_folders(num: int = 5, first: int = 0) -> dict[str, bytes]:
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(num)]
    return {name: image(first + i) for i, name in enumerate(names)}


def test_suffixes_and_classes_are_read_in_any_spelling(tmp_path: Path) -> None:
    """Tars in capitals, and a class whose accent is a letter of its own in one tar alone."""
    inner = write_tar(tmp_path / "inner.tar", {"0.PNG": image(0)}).read_bytes()
    outer = write_tar(tmp_path / "OUTER.TAR", {"cat.TAR": inner, "dog.tar": inner})
    assert build_dataset(str(outer)).classes == ["cat", "dog"]
    for name, form in (("train", "NFC"), ("val", "NFD")):
        given = {"0": unicodedata.normalize(form, "café"), "1": "zebra"}
        files = {f"{key}.png": image(int(key)) for key in given}
        files |= {f"{key}.CLS": text.encode() for key, text in given.items()}
        write_tar(tmp_path / f"{name}.tar", files)
    train, val = str(tmp_path / "train.tar"), str(tmp_path / "val.tar")
    test = build_dataset(train, "test", val=val)
    assert test.classes == ["café", "zebra"] and test.labels.tolist() == [0, 1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same images as files, to compare with."""
    root = tmp_path / "files"
    for name, content in class_folders().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_kind(kind: str, tmp_path: Path) -> Path:
    files = class_folders()
    if kind == "one":
        return write_tar(tmp_path / "one.tar", files)
    if kind == "imagenet":  # a tar of class tars, of flat images
        inner = {}
        for name in ("cat", "dog"):
            mine = {Path(k).name: v for k, v in files.items() if k.startswith(name)}
            inner[f"{name}.tar"] = write_tar(tmp_path / f"{name}.tar", mine).read_bytes()
        return write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    shards = tmp_path / "shards"
    shards.mkdir()
    pairs = sorted(files.items())
    for number, part in enumerate((pairs[:4], pairs[4:])):
        members = dict(part)
        if kind == "webdataset":
            members = {}
            for name, content in part:
                key = name.replace("/", "_")[:-4]
                members[f"{key}.cls"] = str(int(name.startswith("dog"))).encode()
                members[f"{key}.png"] = content
                members[f"{key}.json"] = b"{}"
        write_tar(shards / f"{number:04}.tar", members)
    return shards


@pytest.mark.parametrize("kind", ["one", "imagenet", "shards", "webdataset"])
def test_tars_hold_what_a_folder_of_files_does(kind: str, tmp_path: Path, folder: Path) -> None:
    tars_path = write_kind(kind, tmp_path)
    files, tars = build_dataset(str(folder)), build_dataset(str(tars_path))
    assert len(files) == len(tars) == 10
    assert np.array_equal(files.labels, tars.labels)
    for i in range(10):
        assert torch.equal(files[i].image, tars[i].image)
    held_out = build_dataset(str(folder), "test")
    assert np.array_equal(held_out.labels, build_dataset(str(tars_path), "test").labels)


def test_tar_without_images_says_so(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "texts.tar", {"notes.txt": b"none"})
    with pytest.raises(ValueError, match=r"no images in .*texts\.tar: need files like \.jpg"):
        build_dataset(str(tar))


def test_members_are_read_in_any_order_by_several_workers(tmp_path: Path, folder: Path) -> None:
    tars, files = build_dataset(str(write_kind("shards", tmp_path))), build_dataset(str(folder))
    order = torch.randperm(10).tolist()
    loader = DataLoader(tars, 5, sampler=order, num_workers=2, collate_fn=collate)
    images = torch.cat([batch.image for batch in loader])
    assert torch.equal(images, torch.stack([files[i].image for i in order]))


def test_train_and_val_tars_are_splits(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    write_tar(root / "train.tar", class_folders(6))
    write_tar(root / "val.tar", class_folders(2, first=100))
    assert len(build_dataset(str(root))) == len(build_dataset(str(root), "memory")) == 12
    assert len(build_dataset(str(root), "test")) == 4
    together = build_dataset(str(root), take_splits=False)
    assert (len(together), together.classes) == (16, ["cat", "dog"])
    write_tar(root / "val.tar", {"bird/0.png": image(0)})
    with pytest.raises(ValueError, match=r"classes that the training images lack: bird"):
        build_dataset(str(root), "test")


def test_splits_of_shards_are_told_by_their_names(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    for number in range(2):
        write_tar(root / f"pets-train-{number:06}.tar", class_folders(3, first=10 * number))
    write_tar(root / "pets-validation-000000.tar", class_folders(2, first=100))
    train = build_dataset(str(root))
    assert (len(train), train.classes) == (12, ["cat", "dog"])
    assert {"trains on train", "evaluates on val"} <= set(train.notes)
    assert len(build_dataset(str(root), "test")) == 4
    assert len(build_dataset(str(root), take_splits=False)) == 16
    write_tar(root / "pets-more.tar", class_folders(2, first=200))
    with pytest.raises(
        ValueError, match=r"train and val, but some name none or two: pets-more.tar; need"
    ):
        build_dataset(str(root))


@pytest.mark.parametrize("start", ["/data/pets/", "../pets/"])
def test_tar_with_absolute_names_holds_classes(start: str, tmp_path: Path) -> None:
    """As `tar -P` writes them."""
    files = {f"{start}{name}": content for name, content in class_folders().items()}
    dataset = build_dataset(str(write_tar(tmp_path / "x.tar", files)))
    assert (len(dataset), dataset.classes) == (10, ["cat", "dog"])
    assert dataset[3].image.shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("place", "note"),
    [
        ("", "no classes: 1 of 4 images have no label"),
        ("cat/", "folders are taken for classes: 1 of 4 images have no label"),
    ],
)
def test_missing_cls_is_said(place: str, note: str, tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(4):
        folder = place if number % 2 else place.replace("cat", "dog")
        files[f"{folder}{number}.png"] = image(number)
        if number:
            files[f"{folder}{number}.cls"] = str(number % 2).encode()
    dataset = build_dataset(str(write_tar(tmp_path / "x.tar", files)))
    assert note in dataset.notes
    assert dataset.classes == (["cat", "dog"] if place else None)


def test_labelled_images_above_the_folder_that_is_entered_are_named(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(12):
        name = f"more/{number % 2}/{number}" if number else "alone"
        files[f"{name}.png"], files[f"{name}.cls"] = image(number), str(number % 2).encode()
    dataset = build_dataset(str(write_tar(tmp_path / "x.tar", files)))
    assert len(dataset) == 11
    assert "left out, above the class folders: 1 image (alone.png)" in dataset.notes


def test_links_in_a_tar_are_followed_where_they_are_hard_and_else_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "linked.tar", {"cat/0.png": image(0), "dog/0.png": image(1)})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("cat/1.png", tarfile.LNKTYPE, "dog/0.png"),
            ("cat/2.png", tarfile.LNKTYPE, "bird/0.png"),
            ("cat/3.png", tarfile.SYMTYPE, "0.png"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    dataset = build_dataset(str(path))
    names = [dataset.images[row].name for row in range(len(dataset))]
    assert names == ["cat/0.png", "dog/0.png", "cat/1.png"]
    assert dataset.images[2].read() == image(1)
    assert dataset.notes == ["left out, links in tars: 2 (cat/2.png, cat/3.png)"]


def test_images_without_folder_or_cls_have_no_class(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "flat.tar", {f"{i}.png": image(i) for i in range(3)})
    assert build_dataset(str(path)).labels is None
    with pytest.raises(ValueError, match="k-NN and probes need labels"):
        build_dataset(str(path), "test")


def test_long_names_are_read(tmp_path: Path) -> None:
    """PAX and GNU put names over 100 characters into headers of their own."""
    name = f"{'k' * 120}/{'n' * 130}.png"
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(image(1))
            tar.addfile(info, io.BytesIO(image(1)))
        members = TarImages(scan_tars([path], (".png",)))
        assert members[0].name == name
        assert members[0].read() == image(1)


@pytest.mark.parametrize("damage", ["cut off", "header", "compressed", "no tar", "nested"])
def test_damaged_tar_names_the_member(damage: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", class_folders())
    content = bytearray(path.read_bytes())
    last = "dog/4.png"
    if damage == "cut off":
        with tarfile.open(path) as tar:
            end = tar.getmember("dog/4.png").offset_data
        content = content[: end + 10]
    elif damage == "header":
        with tarfile.open(path) as tar:
            start = tar.getmember("dog/2.png").offset
        content[start : start + 512] = b"x" * 512
        last = "dog/1.png"
    elif damage == "compressed":
        with tarfile.open(tmp_path / "y.tar", "w:gz") as tar:
            tar.add(path)
        content, last = (tmp_path / "y.tar").read_bytes(), "its beginning"
    elif damage == "no tar":
        content, last = b"text" * 1000, "its beginning"
    else:
        inner = bytes(content[: len(content) // 2])
        write_tar(path, {"cat.tar": inner})
        content, last = path.read_bytes(), r"x.tar:cat.tar is damaged.*at (cat|dog)/\d.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name}.* is damaged, compressed or no tar, at "):
        scan_tars([path], (".png",))
    with pytest.raises(ValueError, match=last):
        scan_tars([path], (".png",))


def test_image_that_is_broken_within_a_tar_is_named_and_replaced(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", class_folders() | {"cat/9.png": b"no image"})
    dataset = build_dataset(str(path))
    assert len(dataset) == 11
    sample = dataset[0, 10]
    assert sample.source != sample.index == 10
    assert dataset.why_unreadable(10).startswith(f"cannot decode {path}:cat/9.png: ")


def test_scan_is_kept_beside_the_run_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, index = write_tar(tmp_path / "x.tar", class_folders()), tmp_path / ".index"
    first = build_dataset(str(path), index_folder=index)
    assert len(list(index.iterdir())) == 1

    def no_scan(*args: object) -> None:
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr("folders.scan_tars", no_scan)
        again = build_dataset(str(path), index_folder=index)
    assert again.fingerprint() == first.fingerprint()
    assert torch.equal(again[7].image, first[7].image)
    write_tar(path, class_folders(num=6))
    assert len(build_dataset(str(path), index_folder=index)) == 12
    next(index.iterdir()).write_bytes(b"broken")
    assert len(build_dataset(str(path), index_folder=index)) == 12


def test_scan_of_a_large_folder_is_kept_until_files_are_added(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / ".index"
    build_dataset(str(folder), index_folder=index)
    assert not index.exists()  # that was quick
    seconds = iter(range(0, 1000, 2))
    monkeypatch.setattr("folders.time.monotonic", lambda: next(seconds))
    build_dataset(str(folder), index_folder=index)
    assert len(list(index.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr("folders._Walk", None)  # it is not walked again
        assert len(build_dataset(str(folder), index_folder=index)) == 10
    shutil.copyfile(folder / "cat" / "0.png", folder / "cat" / "new.png")
    assert len(build_dataset(str(folder), index_folder=index)) == 11


def test_scan_is_not_kept_where_something_could_not_be_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that is mended later leaves no trace in its folder's time of change."""
    index, target = tmp_path / ".index", tmp_path / "mounted.png"
    (folder / "cat" / "link.png").symlink_to(target)
    seconds = iter(range(0, 1000, 2))
    monkeypatch.setattr("folders.time.monotonic", lambda: next(seconds))
    before = build_dataset(str(folder), index_folder=index)
    assert "left out, broken links or no files: 1 (cat/link.png)" in before.notes
    target.write_bytes(image(0))
    assert len(build_dataset(str(folder), index_folder=index)) == len(before) + 1


def test_scan_is_not_kept_where_a_folder_changed_meanwhile(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / ".index"
    seconds = iter(range(0, 1000, 2))
    monkeypatch.setattr("folders.time.monotonic", lambda: next(seconds))
    walk = folders._Walk

    def walk_and_add(*args: object) -> folders._Walk:
        walked = walk(*args)
        shutil.copyfile(folder / "cat" / "0.png", folder / "cat" / "new.png")
        return walked

    with monkeypatch.context() as patch:
        patch.setattr("folders._Walk", walk_and_add)
        assert len(build_dataset(str(folder), index_folder=index)) == 10
    assert len(build_dataset(str(folder), index_folder=index)) == 11


@pytest.mark.slow
def test_run_on_tars_resumes_and_evaluates(
    tmp_path: Path, tiny_flags: list[str], script, image_folder: Path
) -> None:
    files = {
        str(path.relative_to(image_folder)): path.read_bytes()
        for path in sorted(image_folder.rglob("*.jpg"))
    }
    path, run = write_tar(tmp_path / "images.tar", files), tmp_path / "runs" / "tar"
    flags = ["--data", str(path), "--output-dir", str(run), "--epochs", "1"]
    from_tar = train(parse_config([*tiny_flags, *flags]))
    flags = ["--output-dir", str(tmp_path / "files"), "--epochs", "1"]
    from_files = train(parse_config([*tiny_flags, *flags]))
    assert from_tar["loss"] == from_files["loss"]
    assert from_tar["knn_top1"] == from_files["knn_top1"]
    assert train(parse_config(["--resume", str(run), "--epochs", "2"]))["step"] == 20
    result = script("eval_knn", run / "ckpt.safetensors", "--ks", "5")
    assert result.returncode == 0, result.stderr
    assert "72 train, 8 test images" in result.stdout
