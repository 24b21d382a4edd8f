import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_visualize import write_checkpoint
from torch import Tensor

from eval_video import VideoConfig, judge, propagate, read_davis, statistics_of, to_numbers
from harness.evaluation import MapsConfig
from harness.masks import (
    boundary,
    boundary_f_measure,
    dilated,
    jaccard,
    one_hot_on_grid,
    read_mask,
    usual_palette,
)

# ---------------------------------------------------------------- propagation


def propagate_by_loops(
    target: Tensor, sources: Tensor, labels: Tensor, neighbours: int, radius: int, temp: float
) -> Tensor:
    num_frames, num_classes, height, width = labels.shape
    result = torch.zeros(num_classes, height, width)
    for y in range(height):
        for x in range(width):
            near = []
            for t in range(num_frames):
                for v in range(height):
                    for u in range(width):
                        if abs(v - y) <= radius and abs(u - x) <= radius:
                            one, other = target[:, y, x], sources[t, :, v, u]
                            cosine = float(one @ other / one.norm() / other.norm())
                            near.append((cosine, labels[t, :, v, u]))
            near.sort(key=lambda pair: -pair[0])
            weights = [math.exp(cosine / temp) for cosine, _ in near[:neighbours]]
            for weight, (_, label) in zip(weights, near[:neighbours], strict=True):
                result[:, y, x] += weight / sum(weights) * label
    return result


@pytest.mark.parametrize(
    ("neighbours", "radius", "num_frames"), [(5, 2, 3), (5, 12, 2), (1, 1, 2), (7, 0, 3)]
)
def test_labels_equal_those_of_loops_over_patches(
    neighbours: int, radius: int, num_frames: int
) -> None:
    target, sources = torch.randn(6, 5, 7), torch.randn(num_frames, 6, 5, 7)
    labels = torch.rand(num_frames, 3, 5, 7)
    neighbours_there = min(neighbours, num_frames) if radius == 0 else neighbours
    expected = propagate_by_loops(target, sources, labels, neighbours_there, radius, 0.1)
    ours = propagate(target, sources, labels, neighbours, radius, 0.1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_each_object_is_stretched_before_the_largest_is_taken() -> None:
    # the object's largest label is small, but it is the largest of its own
    labels = torch.tensor([[[0.9, 0.8]], [[0.0, 0.3]], [[0.0, 0.0]]])
    numbers = torch.tensor([0, 7, 9], dtype=torch.uint8)
    assert to_numbers(labels, numbers, (1, 2)).tolist() == [[0, 7]]


def test_first_mask_is_taken_at_the_cells_centers() -> None:
    mask = np.zeros((6, 9), np.uint8)
    mask[1, 4] = 5  # the center of the cell in the middle above
    mask[3, 0] = 5  # not that of its cell
    hot = one_hot_on_grid(mask, [0, 5], (2, 3))
    assert hot[1].tolist() == [[0, 1, 0], [0, 0, 0]] and torch.equal(hot[0], 1 - hot[1])


# ---------------------------------------------------------------- J and F


def test_region_and_boundary_equal_brute_force() -> None:
    generator = np.random.default_rng(0)
    for shape in ((9, 13), (150, 130)):
        pair = [generator.random(shape) < 0.5 for _ in range(2)]
        if shape[0] > 100:  # two overlapping boxes
            pair = [np.zeros(shape, bool), np.zeros(shape, bool)]
            pair[0][30:90, 20:100], pair[1][33:88, 24:101] = True, True
        one, other = ({tuple(place) for place in np.argwhere(mask)} for mask in pair)
        assert jaccard(*pair) == len(one & other) / len(one | other)
        edges = []
        for mask in pair:
            edge = set()
            for y in range(shape[0]):
                for x in range(shape[1]):
                    below, right = min(y + 1, shape[0] - 1), min(x + 1, shape[1] - 1)
                    nexts = (mask[below, x], mask[y, right], mask[below, right])
                    if any(value != mask[y, x] for value in nexts):
                        edge.add((y, x))
            assert {tuple(place) for place in np.argwhere(boundary(mask))} == edge
            edges.append(edge)
        tolerance = math.ceil(0.008 * math.sqrt(shape[0] ** 2 + shape[1] ** 2))
        shares = []
        for edge, others in (edges, edges[::-1]):
            near = [
                any((y - v) ** 2 + (x - u) ** 2 <= tolerance**2 for v, u in others) for y, x in edge
            ]
            shares.append(sum(near) / len(near))
        expected = 2 * shares[0] * shares[1] / sum(shares)
        assert boundary_f_measure(*pair) == pytest.approx(expected)
        assert expected > 0.3


def test_masks_that_are_empty_have_known_scores() -> None:
    empty, full = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    full[2:5, 2:5] = True
    assert jaccard(empty, empty) == boundary_f_measure(empty, empty) == 1
    assert jaccard(empty, full) == boundary_f_measure(empty, full) == 0
    assert boundary_f_measure(full, empty) == 0 and boundary_f_measure(full, full) == 1
    far = np.roll(full, 3, axis=0)
    assert 0 < boundary_f_measure(far, full) < 1
    assert dilated(full, 1).sum() == 9 + 4 * 3


def test_recall_and_decay_are_of_frames_and_quarters() -> None:
    found = statistics_of([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert found["mean"] == pytest.approx(50) and found["recall"] == pytest.approx(100 * 4 / 9)
    assert found["decay"] == pytest.approx(100 * (0.8 - 0.2))  # of 0, 1, 2 and of 6, 7, 8
    assert statistics_of([0.25]) == {"mean": 25, "recall": 0, "decay": 0}


# ---------------------------------------------------------------- the script

SIZE = 96  # pixels, a side of the frames
NUM_FRAMES = 6


def texture(low: tuple, high: tuple, generator: torch.Generator) -> np.ndarray:
    """Return coloured squares of 4 px between two colours."""
    values = torch.rand(SIZE // 4, SIZE // 4, 3, generator=generator)
    colours = torch.tensor(low) + (torch.tensor(high) - torch.tensor(low)) * values
    return colours.repeat_interleave(4, 0).repeat_interleave(4, 1).byte().numpy()


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos in DAVIS's layout: a square that moves by 3 px a frame, and two of them."""
    root, generator = tmp_path_factory.mktemp("davis"), torch.Generator().manual_seed(0)
    grass = texture((0.0, 60.0, 60.0), (90.0, 200.0, 200.0), generator)
    reds = texture((150.0, 0.0, 0.0), (255.0, 90.0, 90.0), generator)
    yellows = texture((200.0, 190.0, 0.0), (255.0, 255.0, 60.0), generator)
    for name, num_objects in (("one", 1), ("two", 2)):
        frames, masks = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        for t in range(NUM_FRAMES):
            picture, mask = grass.copy(), np.zeros((SIZE, SIZE), np.uint8)
            places = [(8 + 2 * t, 8 + 3 * t, 44, reds), (64, 60 - 3 * t, 28, yellows)]
            for number, (y, x, side, filling) in enumerate(places[:num_objects], start=1):
                picture[y : y + side, x : x + side] = filling[:side, :side]
                mask[y : y + side, x : x + side] = number
            Image.fromarray(picture).save(frames / f"{t:05}.jpg", quality=95)
            image = Image.fromarray(mask)
            image.putpalette(usual_palette())
            image.save(masks / f"{t:05}.png")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("two\none\n")
    return root


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with random weights, of patches of 4 px."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vit") / "ckpt.safetensors"
    return write_checkpoint(file, "vit_tiny_patch16_224", size=SIZE, patch_size=4)


@pytest.fixture(scope="module")
def followed(
    tmp_path_factory: pytest.TempPathFactory, davis: Path, vit: Path, script: Callable
) -> tuple[Path, dict, str]:
    """Return the folder of masks, the results and what was printed."""
    folder = tmp_path_factory.mktemp("followed")
    flags = ("--data", davis, "--out", folder / "masks", "--json-out", folder / "out.json")
    result = script("eval_video", vit, *flags)
    assert result.returncode == 0, result.stderr
    return folder / "masks", json.loads((folder / "out.json").read_text()), result.stdout


def test_moving_shapes_are_followed(followed: tuple, davis: Path) -> None:
    """Compare the masks with the true ones directly, and the scores with that."""
    masks, results, printed = followed
    for name, num_objects in (("one", 1), ("two", 2)):
        of_objects = []
        for number in range(1, num_objects + 1):
            overlaps = []
            for t in range(1, NUM_FRAMES - 1):
                true = np.asarray(Image.open(davis / f"Annotations/480p/{name}/{t:05}.png"))
                ours = np.asarray(Image.open(masks / name / f"{t:05}.png"))
                both, either = (
                    (true == number) & (ours == number),
                    (true == number) | (ours == number),
                )
                overlaps.append(both.sum() / either.sum())
            of_objects.append(100 * np.mean(overlaps))
            assert of_objects[-1] > 90, (name, number)
        scores = results["videos"][name]
        assert [scores[number]["J"]["mean"] for number in scores] == pytest.approx(of_objects)
    every = [x for objects in results["videos"].values() for x in objects.values()]
    assert results["J_mean"] == pytest.approx(np.mean([x["J"]["mean"] for x in every]))
    assert results["F_mean"] == pytest.approx(np.mean([x["F"]["mean"] for x in every]))
    assert results["J&F"] == pytest.approx((results["J_mean"] + results["F_mean"]) / 2)
    assert f"{results['J&F']:.2f}" in printed and "mean over objects" in printed


def test_masks_are_written_as_they_are_read(followed: tuple, davis: Path) -> None:
    masks, results, _ = followed
    assert list(results["videos"]) == ["two", "one"]
    assert sorted(path.name for path in masks.iterdir()) == ["one", "two"]
    for t in range(NUM_FRAMES):
        mask = Image.open(masks / "two" / f"{t:05}.png")
        true = Image.open(davis / f"Annotations/480p/two/{t:05}.png")
        assert mask.mode == "P" and mask.size == true.size
        assert mask.getpalette() == true.getpalette()
    assert np.array_equal(
        read_mask(masks / "two/00000.png"),
        np.asarray(Image.open(davis / "Annotations/480p/two/00000.png")),
    )


def test_true_masks_score_100_and_an_unjudged_stripe_does_not_count(
    davis: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "davis"
    shutil.copytree(davis, copy)
    video = read_davis(copy)[0]
    masks = [read_mask(path) for path in video.true_masks.values()]
    for path in list(video.true_masks.values())[1:]:
        mask = read_mask(path)
        mask[:, :20] = 255
        Image.fromarray(mask).save(path)
    for mask in masks[1:]:
        mask[:, :20] = 1 - mask[:, :20].clip(0, 1)  # wrong, but not judged
    scores = judge(masks, video)
    assert {x[score]["mean"] for x in scores.values() for score in "JF"} == {100}


def test_frames_of_ones_own_need_a_mask_and_give_masks(
    davis: Path, vit: Path, followed: tuple, tmp_path: Path, script: Callable
) -> None:
    frames = tmp_path / "cat"
    frames.mkdir()
    for t in range(3):  # named without zeros: by number, 10 comes after 9
        source = davis / f"JPEGImages/480p/one/{t:05}.jpg"
        shutil.copy(source, frames / f"frame-{t + 8}.jpg")
    mask = frames / "first.png"
    Image.fromarray(read_mask(davis / "Annotations/480p/one/00000.png")).save(mask)  # grey
    result = script("eval_video", vit, "--data", frames, "--mask", mask, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "J&F" not in result.stdout
    for t in range(3):
        ours = Image.open(tmp_path / f"out/cat/frame-{t + 8}.png")
        assert ours.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        assert np.array_equal(np.asarray(ours), read_mask(followed[0] / f"one/{t:05}.png"))


@pytest.mark.slow
def test_settings_reach_the_propagation(
    davis: Path, tiny_run: Path, tmp_path: Path, script: Callable
) -> None:
    found, out = set(), tmp_path / "out.json"
    settings = ("--radius", 0), ("--neighbours", 1), ("--num-frames", 0), ("--temperature", 9)
    for flags in ((), *settings, ("--size", 64)):
        result = script("eval_video", tiny_run, "--data", davis, "--json-out", out, *flags)
        assert result.returncode == 0, result.stderr
        found.add(json.loads(out.read_text())["J_mean"])
    assert len(found) == 6


@pytest.mark.slow
def test_wrong_input_is_one_line(
    davis: Path, vit: Path, followed: tuple, tmp_path: Path, script: Callable
) -> None:
    small, colours, none = (tmp_path / name for name in ("small.png", "rgb.png", "none.png"))
    Image.new("L", (8, 8), 1).save(small)
    Image.new("RGB", (SIZE, SIZE)).save(colours)
    Image.new("L", (SIZE, SIZE)).save(none)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(small.read_bytes()[:30])
    cut_off = tmp_path / "cut-off.png"
    noise = np.random.default_rng(0).integers(0, 2, (SIZE, SIZE), dtype=np.uint8)
    Image.fromarray(noise).save(cut_off)
    cut_off.write_bytes(cut_off.read_bytes()[:-200])
    (tmp_path / "empty").mkdir()
    frames, out = davis / "JPEGImages/480p/one", tmp_path / "out"
    twice = tmp_path / "twice"
    shutil.copytree(frames, twice)
    Image.open(twice / "00001.jpg").save(twice / "00001.png")
    mixed, first = tmp_path / "mixed", davis / "Annotations/480p/one/00000.png"
    shutil.copytree(frames, mixed)
    unequal, unscored = tmp_path / "unequal", tmp_path / "unscored"
    for copy in (unequal, unscored):
        shutil.copytree(davis, copy)
    shutil.copy(small, unequal / "Annotations/480p/one/00002.png")
    for path in (unscored / "Annotations").rglob("*.png"):  # as in a challenge's videos
        if path.stem != "00000":
            path.unlink()
    Image.new("RGB", (2 * SIZE, SIZE)).save(mixed / "00001.jpg")
    for flags, said in (
        (("--data", tmp_path), "need DAVIS's folders"),
        (("--data", frames, "--mask", small, "--out", out), "need a mask of 96 x 96 px"),
        (("--data", frames, "--mask", colours, "--out", out), "one number a pixel"),
        (("--data", frames, "--mask", none, "--out", out), "need an object"),
        (("--data", frames, "--mask", damaged, "--out", out), "damaged.png"),
        (("--data", frames, "--mask", cut_off, "--out", out), "cannot decode " + str(cut_off)),
        (("--data", twice, "--mask", small, "--out", out), "got more of 00001.*"),
        (("--data", davis, "--out", small), "need a folder for --out, got the file"),
        (("--data", frames, "--mask", tmp_path / "gone.png", "--out", out), "gone.png"),
        (("--data", frames, "--mask", small), "need --out"),
        (("--data", tmp_path / "empty", "--mask", small, "--out", out), "need >= 2 frames"),
        (("--data", davis, "--out", followed[0]), "exists: give another --out"),
        (("--data", davis, "--out", tmp_path / "no" / "out"), "no such folder for the masks"),
        (("--data", davis, "--temperature", 0), "need --temperature > 0"),
        (("--data", unequal, "--out", out), "need all masks as large as the first, got"),
        (("--data", unscored), "has a true mask to score: need --out"),
        (("--data", mixed, "--mask", first, "--out", out), f"got another in {mixed}/00001.jpg"),
    ):
        result = script("eval_video", vit, *flags)
        assert result.returncode == 2 and said in result.stderr, (flags, result.stderr)
        assert result.stderr.count("\n") == 1
    assert not out.exists() or not any(out.iterdir())


def test_defaults_are_the_papers() -> None:
    config = VideoConfig(MapsConfig("none"), Path())
    numbers = (config.num_frames, config.neighbours, config.radius, config.temperature)
    assert numbers == (7, 5, 12, 0.1)


@pytest.mark.slow
def test_several_processes_score_as_one(
    davis: Path, vit: Path, followed: tuple, tmp_path: Path, launch: Callable
) -> None:
    out = tmp_path / "out.json"
    flags = [vit, "--data", davis, "--json-out", out]
    answer = launch(flags, script="eval_video", world=2)
    assert answer.codes == [0, 0], answer.text
    assert json.loads(out.read_text())["videos"] == followed[1]["videos"]
