import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_eval_video import texture
from test_visualize import write_checkpoint
from torch.nn import functional as F

from data import held_out
from eval_segmentation import (
    SegmentationConfig,
    attention_jaccards,
    confusion_of,
    enlarged_classes,
    patch_votes,
    read_splits,
    scores_of,
)
from harness.evaluation import MapsConfig
from harness.masks import majority_on_grid

SIZE = 48  # pixels, a side of the images
GREEN, RED, YELLOW = (
    ((0.0, 60.0, 60.0), (90.0, 200.0, 200.0)),
    ((150.0, 0.0, 0.0), (255.0, 90.0, 90.0)),
    ((200.0, 190.0, 0.0), (255.0, 255.0, 60.0)),
)


def write_pairs(folder: Path, num: int, seed: int) -> None:
    """Write images of a red and a yellow square on green, and their masks."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(num):
        picture, mask = texture(*GREEN, generator)[:SIZE, :SIZE], np.zeros((SIZE, SIZE), np.uint8)
        red, yellow = texture(*RED, generator), texture(*YELLOW, generator)
        top, left = torch.randint(0, 24, (2,), generator=generator).tolist()
        picture[top : top + 20, left : left + 20] = red[:20, :20]
        mask[top : top + 20, left : left + 20] = 1
        picture[30:46, 28:46], mask[30:46, 28:46] = yellow[:16, :18], 2
        mask[:3] = 255
        Image.fromarray(picture).save(folder / "images" / f"{i}.jpg", quality=95)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root / "train", 8, seed=0)
    write_pairs(root / "val", 4, seed=1)
    return root


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with random weights, of patches of 4 px."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vit") / "ckpt.safetensors"
    return write_checkpoint(file, "vit_tiny_patch16_224", size=SIZE, patch_size=4)


@pytest.fixture
def evaluate(script: Callable, tmp_path: Path) -> Callable[..., tuple[dict, str]]:
    def run(checkpoint: Path, data: Path, *flags: object) -> tuple[dict, str]:
        out = tmp_path / "out.json"
        command = (checkpoint, "--data", data, "--json-out", out, *flags)
        result = script("eval_segmentation", *command)
        assert result.returncode == 0, result.stderr
        return json.loads(out.read_text()), result.stdout

    return run


# ---------------------------------------------------------------- parts


def test_votes_equal_those_of_loops() -> None:
    patches, memory = (F.normalize(torch.randn(num, 5), dim=1) for num in (9, 40))
    classes = torch.randint(4, (40,))
    for k, temperature in ((1, 0.07), (7, 0.5), (99, 0.07)):
        ours = patch_votes(patches, memory, classes, 6, k, temperature)
        for patch, shares in zip(patches, ours, strict=True):
            cosines = [float(patch @ other) for other in memory]
            nearest = sorted(range(40), key=lambda row: -cosines[row])[:k]
            votes = [0.0] * 6
            for row in nearest:
                votes[int(classes[row])] += math.exp(cosines[row] / temperature)
            expected = torch.tensor(votes) / sum(votes)
            torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-4)


def test_a_cell_is_of_the_class_of_most_of_its_judged_pixels() -> None:
    generator = np.random.default_rng(0)
    mask = generator.choice([0, 3, 9, 255], (12, 20), p=[0.3, 0.2, 0.2, 0.3]).astype(np.uint8)
    mask[:4, :5] = 255
    ours = majority_on_grid(mask, (3, 4))
    for y in range(3):
        for x in range(4):
            cell = mask[4 * y : 4 * y + 4, 5 * x : 5 * x + 5]
            counts = {number: (cell == number).sum() for number in (0, 3, 9)}
            most = max(counts.values())
            assert counts.get(int(ours[y, x])) == most or (most == 0 and ours[y, x] == 255)
    assert ours[0, 0] == 255
    assert majority_on_grid(mask, (24, 40))[5, 17] == mask[2, 8]  # an image that was enlarged


def test_scores_equal_loops_over_pixels() -> None:
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 4, (2, 30, 30))
    predicted[predicted == 2] = 5  # never predicted, never true
    true[:4] = 255
    confusion = confusion_of(true.astype(np.uint8), predicted, 8)
    scores = scores_of(confusion)
    judged = [(int(t), int(p)) for t, p in zip(true.flat, predicted.flat, strict=True) if t != 255]
    expected = {}
    for number in (0, 1, 2, 3, 5):
        both = sum(t == p == number for t, p in judged)
        expected[number] = 100 * both / sum(number in pair for pair in judged)
    assert scores["iou"] == pytest.approx(expected)
    assert scores["mean_iou"] == pytest.approx(np.mean(list(expected.values())))
    assert scores["pixels_right"] == pytest.approx(100 * np.mean([t == p for t, p in judged]))
    most = max(sum(t == number for t, _ in judged) for number in range(4))
    assert scores["mean_iou_of_one_class"] == pytest.approx(100 * most / len(judged) / 4)


def test_classes_are_enlarged_between_the_patches_centers() -> None:
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # a patch of each class, side by side
    assert enlarged_classes(shares, (1, 2), (2, 8)).tolist() == [[0] * 4 + [1] * 4] * 2
    # both have a half at 5/6 of the way from one center, 1.5, to the other, 5.5
    shares = torch.tensor([[1.0, 0.0], [0.4, 0.6]])
    assert enlarged_classes(shares, (1, 2), (1, 8)).tolist() == [[0] * 5 + [1] * 3]
    # classes without a vote change nothing
    of_many = torch.zeros(2, 255)
    of_many[:, [7, 254]] = shares
    assert enlarged_classes(of_many, (1, 2), (1, 8)).tolist() == [[7] * 5 + [254] * 3]


def test_attention_is_compared_with_all_that_is_no_background() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4], mask[:4, 4:6] = 7, 2
    mask[:, 6:] = 255  # not judged
    attention = torch.full((3, 2, 2), 0.01)
    attention[0, 0, 0] = 1.0  # 16 of the 24 pixels of objects
    attention[1, 0] = 1.0  # these and the 8 others
    attention[2, 1, 0] = 1.0  # background
    best, mean = attention_jaccards(attention, mask, 0.6)
    assert best == 1.0
    # the mean's fewest patches with 60 %: 2.01 / 4.07 of it lies in one, 3.02 in two
    assert mean == 1.0
    assert attention_jaccards(attention[2:], mask, 0.6) == (0.0, 0.0)
    assert attention_jaccards(attention[:1], mask, 0.6)[0] == 16 / 24


# ---------------------------------------------------------------- the script


@pytest.mark.slow
def test_patches_of_known_objects_are_told_apart(
    pairs: Path, vit: Path, evaluate: Callable
) -> None:
    results, printed = evaluate(vit, pairs)
    knn = results["knn"]
    assert list(knn["iou"]) == ["0", "1", "2"]
    assert knn["mean_iou"] > 80 > 40 > knn["mean_iou_of_one_class"]
    assert f"{knn['mean_iou']:.2f}" in printed and "background" in printed
    masks = [np.asarray(Image.open(path)) for path in (pairs / "val" / "masks").iterdir()]
    judged = np.stack(masks)[:, 3:]
    for number in (0, 1, 2):
        share = 100 * (judged == number).mean()
        assert knn["share_of_pixels"][str(number)] == pytest.approx(share)
    # enlarged until 14 patches lie on a side, of 48/14 px: more than the 3 rows that do not count
    assert results["size"] == 56 and results["memory_patches"] == 8 * 14 * 14
    assert results["num_train"] == 8 and results["num_test"] == 4
    attention = results["attention"]
    assert attention["num_images"] == 4
    assert 0 < attention["jaccard_mean_of_heads"] <= attention["jaccard_best_head"] < 100
    assert f"best head {attention['jaccard_best_head']:.2f} %" in printed


@pytest.mark.slow
def test_memory_is_drawn_by_its_seed_and_capped(
    pairs: Path, tiny_run: Path, evaluate: Callable
) -> None:
    found = []
    for seed in (0, 0, 1):
        flags = ("--memory-patches", 45, "--k", 1, "--draw-seed", seed)
        results, printed = evaluate(tiny_run, pairs, *flags)
        assert results["memory_patches"] == 40 and "40 patches remembered" in printed
        found.append(results["knn"]["mean_iou"])
    assert found[0] == found[1] != found[2]


def test_network_without_class_token_says_so(
    pairs: Path, tiny_run: Path, evaluate: Callable
) -> None:
    results, printed = evaluate(tiny_run, pairs)
    assert "no attention to judge: test_resnet has no class token" in printed
    assert "jaccard_best_head" not in results["attention"]
    assert 0 < results["knn"]["mean_iou"] < 100


def test_what_cannot_be_used_is_left_out_and_named(
    pairs: Path, tiny_run: Path, tmp_path: Path, evaluate: Callable
) -> None:
    shutil.copytree(pairs, tmp_path / "pairs")
    cut_off = tmp_path / "pairs" / "train" / "images" / "2.jpg"
    cut_off.write_bytes(cut_off.read_bytes()[:200])
    small = tmp_path / "pairs" / "val" / "masks" / "1.png"
    Image.new("L", (8, 8), 1).save(small)
    results, printed = evaluate(tiny_run, tmp_path / "pairs")
    assert (results["num_train"], results["num_test"]) == (7, 3)
    printed = " ".join(printed.split())
    assert f"left out, 1 image with masks, the first because: cannot decode {cut_off}" in printed
    assert f"need a mask of 48 x 48 px, as its image, got {small} of 8 x 8" in printed


def names(pairs: list) -> list[str]:
    return [f"{pair.image.parent.parent.name}/{pair.image.stem}" for pair in pairs]


def test_splits_are_found_named_listed_or_a_tenth(pairs: Path, tmp_path: Path) -> None:
    of_train, of_val = ([f"{x}/{i}" for i in range(n)] for x, n in (("train", 8), ("val", 4)))
    for data, val in ((pairs, None), (pairs / "train", pairs / "val"), (pairs, pairs / "val")):
        train, test = read_splits(data, val, notes := [])
        assert notes == []
        assert (names(train), names(test)) == (of_train, of_val)
    train, test = read_splits(pairs / "train", None, notes)
    assert [int(pair.image.stem) for pair in test] == np.flatnonzero(held_out(8)).tolist()
    assert len(train) + len(test) == 8
    beside = tmp_path / "beside"  # images to train on, and a folder of others to test on
    shutil.copytree(pairs / "train", beside)
    shutil.copytree(pairs / "val", beside / "test")
    train, test = read_splits(beside, None, notes)
    assert {pair.image.parent for pair in train} == {beside / "images"}
    assert {pair.image.parent for pair in test} == {beside / "test" / "images"}
    voc = tmp_path / "VOC2012"
    shutil.copytree(pairs / "train" / "images", voc / "JPEGImages")
    shutil.copytree(pairs / "train" / "masks", voc / "SegmentationClass")
    (voc / "SegmentationClass" / "7.png").unlink()  # VOC has many images without a mask
    (voc / "SegmentationClass" / "3.png").rename(voc / "SegmentationClass" / "3.PNG")
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/train.txt").write_text("0\n3\n")
    (voc / "ImageSets/Segmentation/val.txt").write_text("1\n2\n")
    train, test = read_splits(voc, None, notes)
    assert [pair.mask.stem for pair in train + test] == ["0", "3", "1", "2"]
    masks = voc / "SegmentationClass"
    assert notes == [f"left out, without a mask in {masks}: 1 image (7.jpg)"]


def test_wrong_input_is_one_line(pairs: Path, vit: Path, tmp_path: Path, script: Callable) -> None:
    write_pairs(tmp_path / "small", 3, seed=0)
    (tmp_path / "alone" / "images").mkdir(parents=True)
    (tmp_path / "apart" / "images").mkdir(parents=True)
    (tmp_path / "apart" / "masks").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), 1).save(tmp_path / "small" / "masks" / f"{i}.png")
    shutil.copytree(pairs / "train", tmp_path / "void")
    for path in (tmp_path / "void" / "masks").iterdir():
        Image.new("L", (SIZE, SIZE), 255).save(path)
    shutil.copytree(pairs / "train", tmp_path / "twice")
    shutil.copy(tmp_path / "twice" / "images" / "3.jpg", tmp_path / "twice" / "images" / "3.png")
    lists = tmp_path / "encoded" / "ImageSets" / "Segmentation"
    shutil.copytree(pairs / "train", tmp_path / "encoded")
    lists.mkdir(parents=True)
    for name in ("train", "val"):
        (lists / f"{name}.txt").write_text("0\n1\n", "utf-16")
    for flags, said in (
        (("--data", tmp_path / "twice"), "need one image of each name in"),
        (("--data", tmp_path / "encoded"), "train.txt is no list of names: need text in UTF-8"),
        (("--data", tmp_path / "alone"), "need folders images and masks"),
        (("--data", tmp_path / "apart"), "with a PNG of the same name"),
        (("--data", tmp_path / "small"), "need a mask of 48 x 48 px"),
        (("--data", tmp_path / "void"), "is judged"),
        (("--data", pairs, "--val", tmp_path), "need folders images and masks"),
        (
            ("--data", pairs, "--val", tmp_path / "void"),
            "the test masks have no pixel that is judged: all are 255",
        ),
        (("--data", pairs, "--mass", 2), "need --mass > 0 and <= 1"),
        (("--data", pairs, "--k", 0), "need --k > 0"),
        (("--data", pairs, "--json-out", tmp_path / "no" / "x.json"), "no such folder"),
    ):
        result = script("eval_segmentation", vit, *flags)
        assert result.returncode == 2 and said in result.stderr, (flags, result.stderr)
        assert result.stderr.count("\n") == 1


def test_defaults_are_those_of_the_paper_and_of_eval_knn() -> None:
    config = SegmentationConfig(MapsConfig("none"), Path())
    assert (config.k, config.temperature, config.mass) == (20, 0.07, 0.6)


@pytest.mark.slow
def test_several_processes_score_as_one(
    pairs: Path, vit: Path, tmp_path: Path, launch: Callable
) -> None:
    reports = []
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        flags = [vit, "--data", pairs, "--json-out", out]
        answer = launch(flags, script="eval_segmentation", world=world)
        assert answer.codes == [0] * world, answer.text
        reports.append(json.loads(out.read_text()))
    assert reports[0]["knn"]["iou"] == pytest.approx(reports[1]["knn"]["iou"])
    assert reports[0]["attention"] == pytest.approx(reports[1]["attention"])
