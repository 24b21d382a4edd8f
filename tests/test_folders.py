"""Which images and which labels a folder, a tar or a list has, as people's folders really are."""

import os
import shutil
import socket
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import Result
from PIL import Image

import folders
from data import build_dataset
from folders import DRAWN_MARK, FoundSplits, find_images
from harness.monitor import write_picture
from harness.pictures import MARK
from pixels import image_suffixes


def write(root: Path, *files: str) -> Path:
    """Write files below `root`: images as noise, all others as text; `a/3` is three PNGs in `a`."""
    names: list[str] = []
    for file in files:
        folder, _, last = file.rpartition("/")
        names += [f"{folder}/{i}.png" for i in range(int(last))] if last.isdigit() else [file]
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in image_suffixes():
            pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        else:
            path.write_text("text")
    return root


def find(root: Path, take_splits: bool = True) -> FoundSplits:
    return find_images(root, image_suffixes(), take_splits)


def classes(found: FoundSplits) -> dict[str, int] | None:
    """Return how many training images each class has."""
    if found.train.classes is None:
        return None
    names, counts = np.unique(found.train.classes, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def as_tar(root: Path, folder: Path) -> Path:
    """Write what `tar cf root.tar root` does."""
    path = folder / f"{root.name}.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(root, arcname=root.name)
    return path


# ---------------------------------------------------------------- wrapped


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_folder_that_holds_one_folder_is_entered(kind: str, tmp_path: Path) -> None:
    pets = write(tmp_path / "x" / "pets", "train/cat/3", "train/dog/2", "val/cat/1", "LICENSE")
    source = pets.parent if kind == "folder" else as_tar(pets, tmp_path)
    found = find(source)
    assert classes(found) == {"cat": 3, "dog": 2}
    assert len(found.test.images) == 1
    assert "entered pets/" in found.notes
    assert {"trains on train", "evaluates on val"} <= set(found.notes)
    assert "left out, no images: 1 without suffix" in found.notes


def test_folders_in_each_other_are_entered_to_the_innermost(tmp_path: Path) -> None:
    write(tmp_path, "pets/pets/pets/cat/3", "pets/pets/pets/dog/2")
    found = find(tmp_path)
    assert classes(found) == {"cat": 3, "dog": 2}
    assert found.notes == ["entered pets/pets/pets/"]


def test_split_is_entered_too(tmp_path: Path) -> None:
    """Kaggle's archives hold train/train and val/val."""
    write(tmp_path, "train/train/cat/3", "train/train/dog/2", "val/val/dog/2")
    found = find(tmp_path)
    assert classes(found) == {"cat": 3, "dog": 2}
    assert found.test.classes.tolist() == ["dog", "dog"]


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "Validation", "dev", "test", "Testing"])
def test_splits_are_known_by_all_their_names(train: str, val: str, tmp_path: Path) -> None:
    write(tmp_path, f"{train}/cat/3", f"{train}/dog/2", f"{val}/cat/1", f"{val}/dog/4")
    found = find(tmp_path)
    assert (len(found.train.images), len(found.test.images)) == (5, 5)
    assert {f"trains on {train}", f"evaluates on {val}"} <= set(found.notes)


def test_test_is_left_alone_where_there_is_a_val(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/3", "train/dog/2", "val/cat/1", "val/dog/1", "test/cat/7")
    found = find(tmp_path)
    assert (len(found.train.images), len(found.test.images)) == (5, 2)
    assert "left alone: test (7 images)" in found.notes


def test_few_images_above_a_lone_train_are_left_alone_and_counted(tmp_path: Path) -> None:
    found = find(write(tmp_path, "./2", "train/cat/3", "train/dog/2"))
    assert len(found.train.images) == 5
    assert "left alone: above them (2 images)" in found.notes


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("val/a/2", "test/a/2"),
            r"val, test and no train: need \S+/val to take that split, or --no-splits",
        ),
        (
            ("val/a/2", "val/b/2"),
            r"holds val and no train: need \S+/val to take that split, or --no-splits",
        ),
        (
            ("train/2", "cat/3", "dog/3"),
            r"train beside cat, dog: need \S+/train to .* --no-",
        ),
        (("test/2", "cat/3", "dog/3"), "holds test beside cat, dog"),
        (
            ("./7", "train/2"),
            r"train beside 7 images: need \S+/train to .*, or --no-splits to take all im",
        ),
        (
            ("val/a/2", "valid/a/2", "train/a/2"),
            "holds val and valid: need one val, or --no-splits",
        ),
        (
            ("seg_train/a/2", "seg_test/a/2", "seg_pred/2"),
            r"like splits: need --data \S+_train --val \S+_test",
        ),
    ],
)
def test_what_may_be_splits_or_classes_is_refused(
    folders: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    write(tmp_path, *folders)
    with pytest.raises(ValueError, match=message):
        find(tmp_path)
    assert len(set(find(tmp_path, take_splits=False).train.images.tolist())) >= 4


def test_no_splits_takes_train_for_a_class(tmp_path: Path) -> None:
    write(tmp_path, "train/4", "car/3", "bus/2")
    assert classes(find(tmp_path, take_splits=False)) == {"bus": 2, "car": 3, "train": 4}


def test_val_of_another_folder(tmp_path: Path) -> None:
    write(tmp_path / "x", "seg_train/a/4", "seg_train/b/4", "seg_test/b/3")
    train, val = str(tmp_path / "x" / "seg_train"), str(tmp_path / "x" / "seg_test")
    memory = build_dataset(train, "memory", val=val)
    test = build_dataset(train, "test", val=val)
    assert (len(memory), test.labels.tolist()) == (8, [1, 1, 1])
    for val, message in {
        "nowhere": "no such data 'nowhere': need for --val a folder",
        "cifar10": "no such data 'cifar10': need for --val a folder",
        "": "need a name for --val, got ''",
    }.items():
        with pytest.raises(ValueError, match=message):
            build_dataset(train, "test", val=val)


def test_val_without_classes_is_what_is_blamed(tmp_path: Path) -> None:
    write(tmp_path, "pets/train/cat/4", "pets/train/dog/4", "pets/val/cat/1", "flat/3")
    pets, flat = str(tmp_path / "pets"), str(tmp_path / "flat")
    with pytest.raises(ValueError, match=f"no class folders in the test images of {flat}: k-NN"):
        build_dataset(pets, "test", val=flat)
    notes = build_dataset(pets, val=flat).notes
    assert [note for note in notes if "evaluates" in note] == [f"evaluates on {flat}"]


# ---------------------------------------------------------------- what is a class


@pytest.mark.parametrize("files", [("cat/4",), ("train/cat/4", "val/cat/2")])
def test_one_class_is_none(files: tuple[str, ...], tmp_path: Path) -> None:
    found = find(write(tmp_path, *files))
    assert found.train.classes is None
    assert len(found.train.images) == 4
    assert "no classes: all images lie in one folder, cat" in found.notes
    with pytest.raises(ValueError, match="no classes: all images lie in one folder, cat"):
        build_dataset(str(tmp_path), "memory")


def test_list_of_another_split_alone_says_how_to_take_it(tmp_path: Path) -> None:
    write(tmp_path, "./2")
    (tmp_path / "list.csv").write_text("path,label,split\n0.png,cat,val\n1.png,dog,val\n")
    with pytest.raises(ValueError, match=r"split train, got val; --no-splits takes all lines"):
        find(tmp_path / "list.csv")
    assert len(find(tmp_path / "list.csv", take_splits=False).train.images) == 2


def test_index_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path, **arrays: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space left"):
        folders._write_index(tmp_path / "index.npz", str(tmp_path), {"a": np.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_image_above_class_folders_is_left_out_and_named(tmp_path: Path) -> None:
    found = find(write(tmp_path, "cat/3", "dog/2", "overview.png"))
    assert classes(found) == {"cat": 3, "dog": 2}
    assert found.notes == ["left out, above the class folders: 1 image (overview.png)"]


def test_many_images_above_folders_are_kept_without_classes(tmp_path: Path) -> None:
    found = find(write(tmp_path, "cat/3", "dog/2", "./9"))
    assert (len(found.train.images), classes(found)) == (14, None)
    assert found.notes == ["no classes: cat, dog have 9 images beside them"]


def test_annotations_beside_images_are_no_class(tmp_path: Path) -> None:
    found = find(write(tmp_path, "images/cat/3", "images/dog/2", "masks/cat/3", "labels/a.txt"))
    assert classes(found) == {"cat": 3, "dog": 2}
    assert "left out, annotations: masks (3 images)" in found.notes
    assert "entered images/" in found.notes
    assert "left out, no images: 1 .txt" in found.notes


@pytest.mark.parametrize(
    "files",
    [
        ("DCIM/Camera/3", "DCIM/Shots/2"),
        ("100APPLE/3", "101APPLE/2"),
        ("10160425/3", "10260501/2"),  # numbers and dates
    ],
)
def test_folders_of_a_camera_are_no_classes(files: tuple[str, ...], tmp_path: Path) -> None:
    found = find(write(tmp_path, *files))
    assert (len(found.train.images), classes(found)) == (5, None)
    assert any("are a camera's folders; a .csv may name them" in note for note in found.notes)


@pytest.mark.parametrize("names", [("00000000", "00000001"), ("10000001", "10000002")])
def test_folders_of_eight_digits_are_classes(names: tuple[str, str], tmp_path: Path) -> None:
    """A camera's folders have numbers from 100, and a date behind them."""
    found = find(write(tmp_path, *(f"{name}/2" for name in names)))
    assert classes(found) == dict.fromkeys(names, 2)


def test_class_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = "café", unicodedata.normalize("NFD", "café")
    write(tmp_path / "linux", f"train/{composed}/2", "train/zebra/2", f"val/{composed}/1")
    write(tmp_path / "mac", f"train/{decomposed}/2", "train/zebra/2", f"val/{decomposed}/1")
    write(tmp_path / "mixed", f"train/{composed}/2", "train/zebra/2", f"val/{decomposed}/1")
    linux, mac = (build_dataset(str(tmp_path / name)) for name in ("linux", "mac"))
    assert linux.classes == mac.classes == [composed, "zebra"]
    assert linux.fingerprint() == mac.fingerprint()
    assert build_dataset(str(tmp_path / "mixed"), "test").labels.tolist() == [0]


def test_files_are_sorted_alike_in_both_unicode_forms(tmp_path: Path) -> None:
    names = ["e.png", "é.png", "f.png", "zz.png"]
    for form in ("NFC", "NFD"):
        write(tmp_path / form, *(unicodedata.normalize(form, name) for name in names))
    orders = [
        [unicodedata.normalize("NFC", Path(os.fsdecode(path)).name) for path in images.tolist()]
        for images in (find(tmp_path / form).train.images for form in ("NFC", "NFD"))
    ]
    assert orders[0] == orders[1]


# ---------------------------------------------------------------- what is no image


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_systems_leave_behind_is_neither_class_nor_image(kind: str, tmp_path: Path) -> None:
    left = (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", ".thumbnails", "cat/@eaDir")
    pets = write(tmp_path / "pets", "cat/3", "dog/2", *(f"{folder}/1" for folder in left))
    write(pets, "cat/._0.jpg", ".DS_Store", "dog/Thumbs.db")
    found = find(pets if kind == "folder" else as_tar(pets, tmp_path))
    assert classes(found) == {"cat": 3, "dog": 2}


def test_runs_and_environments_and_their_pictures_are_no_data(tmp_path: Path) -> None:
    write(tmp_path, "cat/3", "dog/2", "runs/one/curves.png", "runs/one/pictures/x/pca.png")
    write(tmp_path, "runs/one/config.yaml", "runs/one/log.jsonl", "venv/pyvenv.cfg", "venv/a.png")
    write(tmp_path, "shots/2", "shots/crops.png")
    write_picture(tmp_path / "crops.png", Image.new("RGB", (20, 20)))
    found = find(tmp_path)
    assert classes(found) == {"cat": 3, "dog": 2, "shots": 3}  # that crops.png is a user's own
    assert "left out, pictures that were drawn here: 1 (crops.png)" in found.notes
    assert MARK == DRAWN_MARK


def test_each_real_folder_is_read_once_and_loops_end(tmp_path: Path) -> None:
    root = write(tmp_path / "store" / "pets", "cat/10", "dog/10")
    write(tmp_path / "store", "other/5")
    (root / "cat" / "up").symlink_to("..")
    (root / "dog" / "far_up").symlink_to("../../..")
    (root / "again").symlink_to(root / "cat")
    (root / "bird").symlink_to(tmp_path / "store" / "other")
    found = find(root)
    assert classes(found) == {"bird": 5, "cat": 10, "dog": 10}
    expected = "left out, links to folders that were read already: 3"
    assert any(note.startswith(expected) for note in found.notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "cat/3", "dog/2", "secret/4")
    (tmp_path / "secret").chmod(0)
    assert "left out, may not be read: 1 (secret)" in find(tmp_path).notes
    (tmp_path / "secret").chmod(0o700)


def test_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "cat/3", "dog/2", "secret/4")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("folders.os.scandir", refuse)
    assert "left out, may not be read: 1 (secret)" in find(tmp_path).notes


def test_only_regular_files_are_images(tmp_path: Path) -> None:
    write(tmp_path, "cat/3", "dog/2")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    (tmp_path / "dog" / "gone.jpg").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(tmp_path)
        listener.bind("socket.jpg")
        found = find(tmp_path)
    assert classes(found) == {"cat": 3, "dog": 2}
    (note,) = found.notes
    assert note.startswith("left out, broken links or no files: 3 (")


def test_suffixes_that_are_no_images_are_counted(tmp_path: Path) -> None:
    write(
        tmp_path, "cat/3", "dog/2", *(f"cat/{i}.dcm" for i in range(12)), "dog/a.svg", "dog/b.svg"
    )
    assert find(tmp_path).notes == ["left out, no images: 12 .dcm, 2 .svg"]
    empty = write(tmp_path / "empty", "a.dcm", "b.dcm")
    with pytest.raises(ValueError, match=r"no images in \S+: need files like .*: 2 \.dcm"):
        find(empty)


@pytest.mark.parametrize(
    "suffix", "jfif jpe pgm ppm pnm jp2 avif apng bmp tga pcx ico dib sgi qoi webp tif".split()
)
def test_what_pillow_reads_is_an_image(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix.upper()}"
    Image.new("RGB", (32, 32), (250, 10, 10)).save(path)
    dataset = build_dataset(str(tmp_path))
    red, green, blue = dataset[0].image.float().mean(dim=(1, 2)).tolist()
    assert red > 2 * max(green, blue) or suffix == "pgm"


def test_tar_beside_class_folders_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, "cat/3", "dog/2")
    as_tar(tmp_path / "cat", tmp_path)
    write(tmp_path, "pets.zip")
    found = find(tmp_path)
    assert classes(found) == {"cat": 3, "dog": 2}
    assert "left out, tars beside images: cat.tar" in found.notes
    assert "left out, no images: 1 .zip" in found.notes


def test_picture_beside_tars_is_left_out_and_named(tmp_path: Path) -> None:
    pets = write(tmp_path / "store" / "pets", "cat/3", "dog/2")
    shards = write(tmp_path / "shards", "preview.png")
    as_tar(pets, shards)
    found = find(shards)
    assert classes(found) == {"cat": 3, "dog": 2}
    assert "left out, images beside tars: preview.png" in found.notes


# ---------------------------------------------------------------- damaged tars


def test_large_class_file_of_a_tar_is_refused_unread(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        (tmp_path / "0.cls").write_bytes(b"7" * 50_000_000)
        tar.add(tmp_path / "0.cls", arcname="0.cls")
    with pytest.raises(ValueError, match=r"0\.cls has 50,000,000 bytes"):
        find(tmp_path / "x.tar")


def test_tars_in_each_other_are_refused_from_a_depth_on(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    inner = tmp_path / "a.png"
    for depth in range(1200):
        outer = tmp_path / f"{depth % 2}.tar"
        with tarfile.open(outer, "w") as tar:
            tar.add(inner, arcname="x.tar" if depth else "a.png")
        inner = outer
        if depth > 30:  # as deep as it gets without writing gigabytes
            break
    with pytest.raises(ValueError, match="holds tars in each other: need at most 4") as raised:
        find(inner)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("members", [(), ("a.txt",)])
def test_tar_without_images_says_so(members: tuple[str, ...], tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", *members)
    empty.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="no images in"):
        find(as_tar(empty, tmp_path))


# ---------------------------------------------------------------- lists


def test_list_of_paths(tmp_path: Path) -> None:
    write(tmp_path, "photos/4")
    (tmp_path / "list.txt").write_text("photos/2.png\nphotos/0.png\n\nphotos/gone.png\n")
    found = find(tmp_path / "list.txt")
    assert [Path(os.fsdecode(path)).name for path in found.train.images.tolist()] == [
        "2.png",
        "0.png",
    ]
    assert classes(found) is None
    assert found.notes == ["left out, named in the list but not there: 1 (photos/gone.png)"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_list_with_labels_and_splits(delimiter: str, tmp_path: Path) -> None:
    write(tmp_path, "photos/6")
    rows = [("filename", "Label", "split")]
    rows += [(f"photos/{i}.png", "cat" if i % 2 else "dog", "train") for i in range(4)]
    rows += [("photos/4.png", "dog", "valid"), (str(tmp_path / "photos/5.png"), "cat", "test")]
    lines = "\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "list.csv").write_text(lines)
    found = find(tmp_path / "list.csv")
    assert found.train.classes.tolist() == ["dog", "cat", "dog", "cat"]
    assert found.test.classes.tolist() == ["dog"]
    assert found.notes == ["trains on train", "evaluates on val", "left alone: test (1 image)"]


def test_unlabelled_lines_of_one_split_leave_the_others_their_classes(tmp_path: Path) -> None:
    write(tmp_path, "./6")
    labels = ["cat,train", "dog,train", "cat,val", "dog,val", ",test", ",test"]
    lines = [f"{i}.png,{label}" for i, label in enumerate(labels)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    found = find(tmp_path / "list.csv")
    assert found.train.classes.tolist() == found.test.classes.tolist() == ["cat", "dog"]
    lines[0] = "0.png,,train"
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    found = find(tmp_path / "list.csv")
    assert found.train.classes is None
    assert "no classes: 1 of 2 images have no label" in found.notes


def test_list_takes_names_as_they_are(tmp_path: Path) -> None:
    """With what Python's splitlines takes for the end of a line."""
    names = ["a\u2028b.png", "c\x0bd.png", "e\x85f.png"]
    for name in [*names, "g\nh.png"]:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n", "utf-8")
    assert find_images(tmp_path / "list.txt", [".png"]).notes == []
    quoted = "".join(f'"{name}",cat\n' for name in [*names, "g\nh.png"])
    (tmp_path / "list.csv").write_text(f"path,label\n{quoted}", "utf-8")
    assert len(find_images(tmp_path / "list.csv", [".png"]).train.images) == 4


def test_list_of_one_known_class_keeps_it(tmp_path: Path) -> None:
    write(tmp_path, "pets/cat/4", "pets/dog/4")
    (tmp_path / "cats.csv").write_text("path,label\npets/cat/0.png,cat\npets/cat/1.png,cat\n")
    test = build_dataset(str(tmp_path / "pets"), "test", val=str(tmp_path / "cats.csv"))
    assert test.labels.tolist() == [0, 0]


def test_list_in_another_encoding_says_which_it_needs(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("path,label\n0.png,Bär\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"list\.csv is no text in UTF-8: need .* saved as UTF-8"):
        find(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,kind\na,b\n", "need a first line with a column `path`, got name, kind"),
        ("path,label\ngone.png,cat\n", "names 1 file, none of which exists, the first is gone.png"),
        ("path,split\na.png,holdout\n", "need splits train, val or test, got 'holdout'"),
        ("path,split\na.png,val\n", "need lines of the split train, got val"),
        ("", "need a first line with a column `path`, got an empty file"),
        ("name,kind\n", "need a first line with a column `path`, got name, kind"),
        ('path,label\na.png,1\n"a" b.png,2\n', "list.csv is no table after line 2: "),
        ('path\n"a.png\na.png\n', "list.csv is no table after line 1: unexpected end"),
        ("path,label\n", "names no file: need paths relative to the list"),
    ],
)
def test_wrong_list_is_named(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        find(tmp_path / "list.csv")


# ---------------------------------------------------------------- as a user runs it


def flags_of(data: Path, *more: object) -> list[str]:
    text = """--arch resnet10_half --batch-size 4 --epochs 1 --warmup-epochs 0 --num-local-crops 1
    --projection-hidden-dim 16 --projection-output-dim 8 --projection-bottleneck-dim 8
    --num-workers 0 --knn-every 1"""
    return ["--data", str(data), *text.split(), *map(str, more)]


def one_line(result: Result) -> str:
    """Return the one line of an error of the command line."""
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.slow
def test_header_says_what_was_entered_and_left_out(script, tmp_path: Path) -> None:
    data = write(tmp_path / "data", "pets/train/cat/6", "pets/train/dog/6", "pets/val/cat/2")
    write(data, "pets/val/dog/2", "pets/test/cat/9", "pets/a.txt")
    result = script("dino_train", *flags_of(data, "--output-dir", tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    for text in (
        "12 images, 2 classes: cat, dog",
        "data: entered pets/",
        "data: trains on train",
        "data: evaluates on val",
        "data: left alone: test (9 images)",
        "data: left out, no images: 1 .txt",
    ):
        assert text in result.stdout
    result = script("eval_knn", tmp_path / "run" / "ckpt.safetensors", "--ks", "2")
    assert "12 train, 4 test images" in result.stdout
    assert "data: left alone: test (9 images)" in result.stdout


@pytest.mark.slow
def test_run_within_its_data_goes_on_and_is_evaluated(script, tmp_path: Path, monkeypatch) -> None:
    data = write(tmp_path / "data", "cat/8", "dog/8")
    monkeypatch.chdir(data)
    result = script("dino_train", *flags_of(Path("."), "--output-dir", "runs/x"))
    assert result.returncode == 0, result.stderr
    result = script("dino_train", "--resume", "runs/x", "--epochs", "2")
    assert result.returncode == 0, result.stderr
    assert "16 images, 2 classes: cat, dog" in result.stdout
    result = script("eval_knn", "runs/x/ckpt.safetensors", "--ks", "2")
    assert "15 train, 1 test images" in result.stdout


@pytest.mark.slow
def test_unlabelled_images_are_judged_on_labelled_ones(script, tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", "./12")
    labelled = write(tmp_path / "labelled", "cat/10", "dog/10")
    result = script(
        "dino_train",
        *flags_of(photos, "--knn-data", labelled, "--output-dir", tmp_path / "run"),
    )
    assert result.returncode == 0, result.stderr
    assert "k-NN top-1" in result.stdout
    result = script("eval_knn", tmp_path / "run" / "ckpt.safetensors", "--ks", "2")
    assert "18 train, 2 test images" in result.stdout


@pytest.mark.slow
def test_ambiguous_folder_ends_a_run_before_anything_is_written(script, tmp_path: Path) -> None:
    data = write(tmp_path / "data", "train/4", "cat/4", "dog/4")
    result = script("dino_train", *flags_of(data, "--output-dir", tmp_path / "run"))
    assert f"train beside cat, dog: need {tmp_path}" in one_line(result)
    assert not (tmp_path / "run").exists()
    result = script("dino_train", *flags_of(data, "--no-splits", "--output-dir", tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "3 classes: cat, dog, train" in result.stdout
    result = script("eval_knn", tmp_path / "run" / "ckpt.safetensors", "--ks", "2")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_one_class_is_an_error_of_an_evaluation(script, tmp_path: Path) -> None:
    data = write(tmp_path / "data", "cat/8")
    result = script("dino_train", *flags_of(data, "--output-dir", tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "all images lie in one folder, cat" in result.stdout
    for name in ("eval_knn", "eval_linear"):
        line = one_line(script(name, tmp_path / "run" / "ckpt.safetensors"))
        assert "no classes: all images lie in one folder, cat: k-NN and probes need labels" in line


@pytest.mark.skipif(shutil.which("mkfifo") is None, reason="no named pipes here")
def test_pipe_as_data_is_refused(script, tmp_path: Path) -> None:
    subprocess.run(["mkfifo", tmp_path / "pipe.tar"], check=True)
    line = one_line(script("dino_train", *flags_of(tmp_path / "pipe.tar")))
    assert "no such data" in line


def test_folder_of_unreadable_images_is_an_error_before_anything_is_written(
    script, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "data" / name / f"{i}.jpg").write_text("<html>404</html>")
    flags = flags_of(tmp_path / "data", "--output-dir", tmp_path / "run")
    line = one_line(script("dino_train", *flags))
    assert f"no images in {tmp_path}/data can be read: none of 8 images is readable: " in line
    assert not (tmp_path / "run").exists()
