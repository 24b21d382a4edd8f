import csv
import importlib.util
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

import embed
from embed import Embedded, near_duplicates, token_features, write_features
from harness.evaluation import layer_features
from models import get_backbone, load_checkpoint, tensors_checksum


def read_names(tensors: dict) -> list[str]:
    """Return the names in a file, as embed.py's docstring says to read them."""
    return tensors["names"].numpy().tobytes().decode(errors="surrogateescape").split("\0")


def embedded(script, checkpoint: Path, data: Path, out: Path, *flags: object) -> str:
    result = script("embed", checkpoint, "--data", data, "--out", out, *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_file_holds_features_names_labels_and_the_network(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    out, run_json = tmp_path / "f.safetensors", tmp_path / "run.json"
    said = embedded(script, tiny_run, image_folder, out, "--json-out", run_json)
    assert "80 images" in said and "images/s" in said
    tensors = load_file(out)
    names = read_names(tensors)
    files = sorted(str(file.relative_to(image_folder)) for file in image_folder.rglob("*.jpg"))
    assert names == files and tensors["features"].shape == (80, 96)
    with safe_open(out, framework="pt") as file:
        texts = file.metadata()
    classes, facts = json.loads(texts["classes"]), json.loads(texts["facts"])
    assert [classes[label] for label in tensors["labels"].tolist()] == [
        name.split("/")[0] for name in names
    ]
    model, metadata = load_checkpoint(tiny_run / "ckpt.safetensors")
    assert facts["step"] == metadata["step"] == 20
    assert facts["backbone_crc32"] == tensors_checksum(model.backbone.state_dict())
    assert json.loads(run_json.read_text())["num_images"] == 80
    # the same features as the evaluations see
    split = tmp_path / "knn.safetensors"
    flags = ("--data", image_folder, "--features-out", split)
    assert script("eval_knn", tiny_run, *flags).returncode == 0
    of_knn = load_file(split)
    rows = torch.cat([of_knn["train_features"], of_knn["test_features"]])
    nearest = torch.cdist(rows.double(), tensors["features"].double()).amin(dim=1)
    assert nearest.max() < 1e-4


def test_every_kind_of_file_holds_the_same(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    for suffix in ("safetensors", "npy"):
        embedded(script, tiny_run, image_folder, tmp_path / f"f.{suffix}")
    described = json.loads((tmp_path / "f.json").read_text())
    flags = (tiny_run, "--data", image_folder, "--out", tmp_path / "f.csv")
    assert "f.json, which would be written beside it" in script("embed", *flags).stderr
    embedded(script, tiny_run, image_folder, tmp_path / "table.csv")
    tensors = load_file(tmp_path / "f.safetensors")
    features, names = tensors["features"].numpy(), read_names(tensors)
    assert np.array_equal(np.load(tmp_path / "f.npy"), features)
    assert described["names"] == names and described["labels"] == tensors["labels"].tolist()
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    assert [row["class"] for row in rows] == [name.split("/")[0] for name in names]
    from_csv = [[float(row[f"f{i}"]) for i in range(96)] for row in rows]
    assert np.array_equal(np.array(from_csv, np.float32), features)  # to the last bit
    assert json.loads((tmp_path / "table.json").read_text())["facts"] == described["facts"]


def test_parquet_holds_the_same_or_its_package_is_named(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    out = tmp_path / "f.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        result = script("embed", tiny_run, "--data", image_folder, "--out", out)
        assert result.returncode == 2
        assert result.stderr == (
            "error: a .parquet needs the package pyarrow: pip install pyarrow\n"
        )
        return
    from pyarrow import parquet

    embedded(script, tiny_run, image_folder, out)
    embedded(script, tiny_run, image_folder, tmp_path / "f.safetensors")
    table, tensors = parquet.read_table(out), load_file(tmp_path / "f.safetensors")
    assert table["name"].to_pylist() == read_names(tensors)
    assert table["label"].to_pylist() == tensors["labels"].tolist()
    assert np.array_equal(table["f7"].to_numpy(), tensors["features"][:, 7].numpy())


def test_file_beside_the_features_replaces_none_of_something_else(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    flags = (tiny_run, "--data", image_folder, "--out", tmp_path / "f.csv")
    (tmp_path / "f.json").write_text('{"mine": 1}')
    result = script("embed", *flags)
    assert result.returncode == 2
    assert "f.json, which would be written beside it, is there and of" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
    (tmp_path / "f.json").unlink()
    for name in ("f.json", "f.csv"):
        result = script("embed", *flags, "--json-out", tmp_path / name)
        assert result.returncode == 2
        assert f"need another --json-out than {tmp_path / name}" in result.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("2 requested and 1 written"), KeyboardInterrupt()])
def test_features_that_cannot_be_written_leave_those_before(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.npy"
    old, new = (Embedded(np.full((1, 2), i), [f"{i}.jpg"], None, None, {}) for i in range(2))
    write_features(path, old)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(file: Path, features: np.ndarray) -> None:
        file.write_bytes(b"1")
        raise error

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(type(error)) as raised:
        write_features(path, new)
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write {path}: 2 requested and 1 written"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_images_without_classes_of_a_list_and_of_a_tar(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    files = sorted(image_folder.glob("stripes/*.jpg"))[:6]
    flat, shard, paths = tmp_path / "flat", tmp_path / "flat.tar", tmp_path / "list.txt"
    flat.mkdir()
    for file in files:
        shutil.copy(file, flat)
    paths.write_text("".join(f"{file}\n" for file in [flat / files[0].name, *files[1:]]))
    with tarfile.open(shard, "w") as tar:
        tar.add(flat, ".")
    features = []
    for data in (flat, shard, paths):
        out = tmp_path / "f.safetensors"
        embedded(script, tiny_run, data, out)
        tensors = load_file(out)
        assert "labels" not in tensors
        names = read_names(tensors)
        if data == paths:  # what lies below the list's folder is relative to it
            assert names == [f"flat/{files[0].name}", *map(str, files[1:])]
        else:
            assert names == [file.name for file in files]
        features.append(tensors["features"])
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[0], features[2])


def test_names_stay_beside_their_features_where_an_image_is_broken(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    folder, out = tmp_path / "images", tmp_path / "f.safetensors"
    shutil.copytree(image_folder, folder)
    broken = folder / "checks" / "11.jpg"
    broken.write_bytes(b"no image")
    odd = os.fsencode(folder / "checks") + b"/\xff \n.jpg"  # no UTF-8, and a line's end
    os.rename(os.fsencode(folder / "checks" / "12.jpg"), odd)
    assert "1 of 80 images cannot be decoded" in embedded(script, tiny_run, folder, out)
    some = load_file(out)
    by_name = dict(zip(read_names(some), some["features"], strict=True))
    assert len(by_name) == 79 and "checks/11.jpg" not in by_name
    embedded(script, tiny_run, image_folder, out)
    whole = load_file(out)
    expected = dict(zip(read_names(whole), whole["features"], strict=True))
    torch.testing.assert_close(by_name["checks/13.jpg"], expected["checks/13.jpg"])
    renamed = os.fsdecode(b"checks/\xff \n.jpg")
    torch.testing.assert_close(by_name[renamed], expected["checks/12.jpg"])


def test_half_precision_and_splits(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    folder, out = tmp_path / "split", tmp_path / "f.npy"
    for split in ("train", "test"):
        shutil.copytree(image_folder, folder / split)
    assert "--no-splits takes all images" in embedded(script, tiny_run, folder, out)
    whole = np.load(out)
    assert whole.shape == (80, 96)
    embedded(script, tiny_run, folder, out, "--no-splits", "--dtype", "float16")
    halves = np.load(out)
    assert halves.shape == (160, 96) and halves.dtype == np.float16
    np.testing.assert_allclose(halves[80:], whole, rtol=1e-2, atol=1e-3)


def test_tokens_are_those_of_the_network() -> None:
    vit = get_backbone("vit_tiny_patch16_224", patch_size=8, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = vit.forward_features(images)
        found = {
            kind: token_features(vit, kind)(images) for kind in ("class", "mean", "patch", "concat")
        }
    torch.testing.assert_close(found["class"], tokens[:, 0])
    torch.testing.assert_close(found["patch"], tokens[:, 1:])
    torch.testing.assert_close(found["mean"], tokens[:, 1:].mean(dim=1))
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(found["concat"], expected)
    assert layer_features(vit, 1, avgpool=True)(images).shape == (2, 384)
    resnet = get_backbone("resnet10_half", image_size=32).eval()
    with torch.no_grad():
        pooled, mean = resnet(images), token_features(resnet, "mean")(images)
    torch.testing.assert_close(mean, pooled)
    with pytest.raises(ValueError, match="needs a ViT"):
        token_features(resnet, "concat")


def test_patch_tokens_are_a_matrix_an_image(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    embedded(script, tiny_run, image_folder, tmp_path / "f.npy", "--tokens", "patch")
    patches = np.load(tmp_path / "f.npy")
    embedded(script, tiny_run, image_folder, tmp_path / "f.npy", "--tokens", "mean")
    assert patches.ndim == 3
    np.testing.assert_allclose(patches.mean(axis=1), np.load(tmp_path / "f.npy"), rtol=1e-4)


def test_wrong_flags_are_one_line(tmp_path: Path, tiny_run: Path, script) -> None:
    f = tmp_path / "f.safetensors"
    for flags, said in (
        (("--out", tmp_path / "f.pkl"), "need --out with one of"),
        (("--out", tmp_path / "none" / "f.npy"), "no such folder for the features"),
        (("--out", tmp_path / "f.csv", "--tokens", "patch"), "need .safetensors or .npy"),
        (("--out", f, "--near-duplicates", 1.5), "from -1 to below 1, got 1.5"),
        (
            ("--out", f, "--tokens", "patch", "--near-duplicates", 0.9),
            "compares images by one vector",
        ),
        (("--out", f, "--val", tmp_path), "not with --val"),
        (("--out", f, "--tokens", "concat"), "needs a ViT"),
        (("--out", tiny_run / "ckpt.safetensors"), "which a run saved"),
        (("--out", f, "--batch-size", 0), "need --batch-size > 0, got 0"),
        (("--out", f, "--num-workers", -1), "need --num-workers >= 0"),
    ):
        result = script("embed", tiny_run, *flags)
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    for suffix, owner, function in (("npy", np, "save"), ("csv", csv, "writer")):
        out = tmp_path / f"f.{suffix}"
        out.write_text("old")
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fail)
            result = script("embed", tiny_run, "--data", image_folder, "--out", out)
        assert result.returncode == 2
        assert result.stderr == f"error: cannot write {out}: No space left on device\n"
        assert [file.name for file in tmp_path.iterdir()] == [out.name]
        assert out.read_text() == "old"
        out.unlink()


# ---------------------------------------------------------------- near duplicates


@pytest.mark.parametrize("rows_a_block", [1, 7, 1000])
def test_pairs_equal_brute_force(rows_a_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(40, 6)
    features[31] = 3 * features[4]  # the same direction
    features[12] = features[4] + 0.01
    monkeypatch.setattr(embed, "ENTRIES", 40 * rows_a_block)
    pairs, similarities, num_found = near_duplicates(features, threshold=0.3)
    expected = {}
    for i in range(40):
        for j in range(i + 1, 40):
            similarity = F.cosine_similarity(features[i], features[j], dim=0).item()
            if similarity > 0.3:
                expected[i, j] = similarity
    found = [tuple(pair) for pair in pairs.tolist()]
    assert num_found == len(found) == len(expected) and set(found) == expected.keys()
    assert similarities.tolist() == pytest.approx([expected[pair] for pair in found], abs=1e-6)
    assert similarities.tolist() == sorted(similarities.tolist(), reverse=True)
    assert found[0] == (4, 31) and similarities.max() <= 1


def test_most_similar_pairs_are_kept() -> None:
    features = torch.randn(50, 4)
    everything = near_duplicates(features, threshold=0.0)
    some = near_duplicates(features, threshold=0.0, most=10)
    assert torch.equal(some[0], everything[0][:10]) and some[2] == everything[2] > 10


def test_copies_are_listed_first(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    shutil.copy(folder / "checks" / "7.jpg", folder / "stripes" / "copy.jpg")
    flags = ("--near-duplicates", 0.5)
    said = embedded(script, tiny_run, folder, tmp_path / "f.npy", *flags).splitlines()
    file = tmp_path / "f-duplicates.csv"
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    first = {"similarity": "1.000000", "image": "checks/7.jpg", "other": "stripes/copy.jpg"}
    assert rows[0] == first
    assert said[0] == f"{len(rows):,} pairs above a similarity of 0.5: {file}"
    assert said[1].split() == list(first.values())
    assert sum(line.startswith(("0.", "1.0")) for line in said) == 20


@pytest.mark.slow
def test_several_processes_write_what_one_does(
    tmp_path: Path, tiny_run: Path, image_folder: Path, launch
) -> None:
    outs = []
    for world in (1, 3):
        out = tmp_path / f"{world}.safetensors"
        flags = [tiny_run, "--data", image_folder, "--out", out]
        answer = launch(flags, script="embed", world=world)
        assert answer.codes == [0] * world, answer.text
        outs.append(load_file(out))
    assert read_names(outs[0]) == read_names(outs[1])
    torch.testing.assert_close(outs[0]["features"], outs[1]["features"])
