"""Copies find their image: scores against plain loops, distortions that do what they are called."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from test_eval_retrieval import area_by_a_loop
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

import eval_copies
from data import build_dataset, draw_patterns
from eval_copies import (
    COUNTED,
    DISTORTIONS,
    Copies,
    CopiesConfig,
    Extractor,
    Whitening,
    check_places,
    copy_features,
    copy_scores,
    distortions_for,
    made_copies,
    open_copydays,
)
from harness.distributed import make_accelerator
from harness.evaluation import EvalConfig, open_backbone
from models import get_backbone

DRAWS = [0.3] * eval_copies.NUM_DRAWS


def photo(height: int = 60, width: int = 90) -> torch.Tensor:
    """Return a smooth image (3, h, w) uint8 in which each place has a colour of its own."""
    coarse = torch.rand(3, 5, 7)
    image = TF.resize(coarse, [height, width], TF.InterpolationMode.BICUBIC).clamp(0, 1)
    return (255 * image).to(torch.uint8)


# ---------------------------------------------------------------- scores


def test_scores_equal_a_double_loop() -> None:
    """Some images have two copies of their group among the searched, some queries have none."""
    torch.manual_seed(1)
    queries, database = (F.normalize(torch.randn(n, 4), dim=1) for n in (30, 50))
    query_groups, groups = torch.arange(30) % 20, torch.arange(50) % 19
    areas, hits = [], []
    for query, group in zip(queries, query_groups.tolist(), strict=True):
        similarity = [float(image @ query) for image in database]
        ranked = sorted(range(50), key=lambda image: -similarity[image])
        positives = {image for image in range(50) if groups[image] == group}
        if positives:
            number = len(positives)
            found = set(ranked[:COUNTED]) & positives
            areas.append(area_by_a_loop(ranked[:COUNTED], found) * len(found) / number)
            hits.append(ranked[0] in positives)
    scores = copy_scores(queries, query_groups, database, groups)
    assert scores["queries"] == len(areas) < 30
    assert scores["map"] == pytest.approx(100 * np.mean(areas))
    assert scores["recall_at_1"] == pytest.approx(100 * np.mean(hits))


def test_equal_features_find_themselves_and_a_collapsed_network_nothing() -> None:
    features = F.normalize(torch.randn(30, 8), dim=1)
    rows = torch.arange(30)
    assert copy_scores(features, rows, features, rows)["map"] == 100
    same = F.normalize(torch.ones(30, 8), dim=1)
    assert copy_scores(same, rows, same, rows)["map"] == 0
    nothing = torch.full((30, 8), torch.nan)
    assert copy_scores(nothing, rows, nothing, rows)["map"] == 0
    with pytest.raises(ValueError, match="none of the copies has its image"):
        copy_scores(features, rows + 30, features, rows)


def test_whitened_features_have_the_identity_for_second_moments() -> None:
    with pytest.raises(ValueError, match="need more images for --whitening than 6 features, got 6"):
        Whitening.learn(torch.randn(6, 6))
    features = torch.randn(400, 6) @ torch.randn(6, 6) + 3
    whitening = Whitening.learn(features)
    whitened = (features.double() @ whitening.axes).numpy()
    np.testing.assert_allclose(whitened.T @ whitened / 400, np.eye(6), atol=1e-9)
    np.testing.assert_allclose(whitening(features).mean(dim=0).numpy(), 0, atol=1e-6)
    at_once = whitening(features)
    with pytest.MonkeyPatch.context() as patch:  # a few rows at a time
        patch.setattr(eval_copies, "ROWS", 7)
        torch.testing.assert_close(whitening(features), at_once)
    flat = Whitening.learn(torch.cat([features, torch.zeros(400, 1)], dim=1))  # one axis is empty
    assert flat.axes.isfinite().all()


def test_a_vit_gives_class_token_and_generalised_mean_of_patches() -> None:
    backbone = get_backbone("vit_tiny_patch16_224", image_size=32).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = backbone.forward_features(images).double()
        found = copy_features(backbone)(images)
    for image_tokens, features in zip(tokens, found, strict=True):
        of_patches = [
            sum(max(float(patch[i]), 1e-6) ** 4 for patch in image_tokens[1:]) for i in range(192)
        ]
        expected = [float(x) for x in image_tokens[0]]
        expected += [(total / 4) ** 0.25 for total in of_patches]
        np.testing.assert_allclose(features.numpy(), expected, rtol=1e-3, atol=1e-4)
    resnet = get_backbone("resnet10_half", image_size=32)
    assert copy_features(resnet) is resnet


# ---------------------------------------------------------------- distortions


@pytest.mark.parametrize("name", DISTORTIONS)
def test_distortion_gives_another_image_and_leaves_its_own(name: str) -> None:
    image = photo()
    before = image.clone()
    copy = DISTORTIONS[name](image, DRAWS)
    assert copy.dtype == torch.uint8 and len(copy) == 3
    assert torch.equal(image, before)
    assert copy.shape != image.shape or not torch.equal(copy, image)
    tiny = DISTORTIONS[name](photo(3, 5), DRAWS)
    assert min(tiny.shape) >= 1


@pytest.mark.parametrize("percent", [1, 4])
def test_blur_equals_that_of_a_kernel_of_both_directions(percent: int) -> None:
    image = photo(50, 60)
    sigma = percent / 100 * 50
    radius = math.ceil(3 * sigma)
    expected = TF.gaussian_blur(image.double(), 2 * radius + 1, sigma)
    ours = DISTORTIONS[f"blur by {percent} % of the side"](image, DRAWS)
    assert (ours - expected).abs().max() <= 0.501


def test_distortions_are_what_their_names_say() -> None:
    image = photo(100, 160)

    def error(name: str) -> float:
        return (DISTORTIONS[name](image, DRAWS).float() - image.float()).abs().mean().item()

    assert error("JPEG quality 75") < error("JPEG quality 10") < error("JPEG quality 3")
    assert error("blur by 1 % of the side") < error("blur by 4 % of the side")
    for percent in (80, 50, 30, 20, 10):
        copy = DISTORTIONS[f"crop to {percent} % of the area"](image, DRAWS)
        share = copy.shape[1] * copy.shape[2] / (100 * 160)
        assert share == pytest.approx(percent / 100, abs=0.01)
        assert copy.shape[2] / copy.shape[1] == pytest.approx(1.6, rel=0.05)
        top, left = round(0.3 * (100 - copy.shape[1])), round(0.3 * (160 - copy.shape[2]))
        assert torch.equal(copy, image[:, top : top + copy.shape[1], left : left + copy.shape[2]])
    turned = DISTORTIONS["rotation by 90 degrees"](image, DRAWS)
    assert torch.equal(turned, image.rot90(1, dims=(1, 2)))
    assert torch.equal(DISTORTIONS["flip"](image, DRAWS), image.flip(2))
    gray = DISTORTIONS["gray"](image, DRAWS)
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[1], gray[2])
    dark = DISTORTIONS["half as bright"](image, DRAWS).float()
    assert (dark - image.float() / 2).abs().max() <= 0.5


@pytest.mark.parametrize("degrees", [5, 15, 45])
@pytest.mark.parametrize("shape", [(80, 80), (60, 120), (120, 60)])
def test_rotation_has_no_empty_corners(degrees: int, shape: tuple[int, int]) -> None:
    white = torch.full((3, *shape), 255, dtype=torch.uint8)
    copy = DISTORTIONS[f"rotation by {degrees} degrees"](white, DRAWS)
    assert copy.min() >= 250
    assert copy.shape[2] / copy.shape[1] == pytest.approx(shape[1] / shape[0], rel=0.1)


def test_copies_depend_on_seed_row_and_distortion_alone() -> None:
    images = build_dataset("patterns")
    name = "crop to 30 % of the area"

    def copies(rows: list[int], seed: int) -> list[torch.Tensor]:
        dataset = Copies(images, rows, name, DISTORTIONS[name], 32, seed)
        return [dataset[i].image for i in range(len(rows))]

    first = copies([3, 8, 11], 0)
    assert torch.equal(copies([11], 0)[0], first[2])
    assert not torch.equal(copies([11], 1)[0], first[2])
    assert all(len(set(x)) == 1 for x in zip(*(c.shape for c in first), strict=True))


def test_copy_that_is_not_distorted_has_the_features_of_its_image(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of wide photographs, too, of which evaluations otherwise see the middle alone.

    All images of the data are searched, whatever their split.
    """
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(6):
            TF.to_pil_image(photo(40, 90)).save(tmp_path / split / f"{i}.png")
    monkeypatch.setattr(eval_copies, "DISTORTIONS", {"none": lambda image, draws: image})
    evaluation = EvalConfig(str(tiny_run / "ckpt.safetensors"), data=str(tmp_path))
    options = CopiesConfig(evaluation, num_queries=5)
    accelerator = make_accelerator()
    network = open_backbone(evaluation, accelerator)
    database, copies = made_copies(Extractor(network, options, accelerator))
    assert copies["none"].rows.tolist() == [0, 2, 5, 8, 11]
    torch.testing.assert_close(copies["none"].features, database.features[copies["none"].rows])


def test_images_of_other_channels_have_no_colours_and_no_jpeg() -> None:
    names = distortions_for(5)
    assert "flip" in names and "crop to 50 % of the area" in names
    assert not any("JPEG" in name or "hue" in name or name in ("text", "gray") for name in names)
    image = torch.randint(0, 256, (5, 40, 30), dtype=torch.uint8)
    assert all(len(distortion(image, DRAWS)) == 5 for distortion in names.values())
    assert distortions_for(3) is DISTORTIONS


# ---------------------------------------------------------------- the published copies


def write_copydays(root: Path) -> Path:
    places = {"original": "00", "strong": "01", "jpegqual/15": "02", "jpegqual/3": "03"}
    for place, suffix in places.items():
        (root / place).mkdir(parents=True)
        for group in range(4):
            image = rearrange(draw_patterns(torch.tensor([group]))[0], "c h w -> h w c")
            quality = 30 if "jpeg" in place else 95
            name = f"20{group:02}{suffix}.jpg"
            Image.fromarray(image.numpy()).save(root / place / name, quality=quality)
    return root


def test_copydays_blocks_and_groups_are_those_of_the_names(tmp_path: Path) -> None:
    images, groups = open_copydays(write_copydays(tmp_path))
    assert list(images) == ["original", "strong", "jpegqual 3", "jpegqual 15"]
    assert groups["strong"].tolist() == groups["original"].tolist() == [2000, 2001, 2002, 2003]
    (tmp_path / "strong" / "._200000.jpg").write_bytes(b"")  # as macOS leaves them
    assert len(open_copydays(tmp_path)[1]["strong"]) == 4
    (tmp_path / "strong" / "cat.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"names like 200001\.jpg in .*strong, got cat\.jpg"):
        open_copydays(tmp_path)
    with pytest.raises(ValueError, match=r"need original/ and strong/, .* got none"):
        open_copydays(tmp_path / "strong")


@pytest.mark.slow
def test_own_images_and_copydays_are_evaluated(script, tiny_run: Path, tmp_path: Path) -> None:
    answer, file = tmp_path / "copies.json", tiny_run / "ckpt.safetensors"
    flags = ["--num-queries", 6, "--json-out", answer]
    more = tmp_path / "more"
    more.mkdir()
    for i, image in enumerate(draw_patterns(torch.arange(120))):
        TF.to_pil_image(image).save(more / f"{i}.png")
    result = script("eval_copies", file, *flags, "--distractors", more)
    assert result.returncode == 0, result.stderr
    found = json.loads(answer.read_text())
    assert set(found["copies"]) == set(DISTORTIONS)
    assert found["num_images"] == 80 + 120
    assert {of_name["queries"] for of_name in found["copies"].values()} == {6}
    assert found["copies"]["JPEG quality 75"]["map"] > found["copies"]["JPEG quality 3"]["map"]
    folder = write_copydays(tmp_path / "copydays")
    few = folder / "original"
    flags = ["--copydays", folder, "--json-out", answer, "--whitening", more]
    result = script("eval_copies", file, *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads(answer.read_text())
    assert list(found["copies"]) == ["original", "strong", "jpegqual 3", "jpegqual 15"]
    assert found["copies"]["original"]["map"] == 100
    (tmp_path / "empty").mkdir()
    for flags, said in (
        (("--copydays", folder, "--data", "patterns"), "not with --data"),
        (("--copydays", folder, "--num-queries", 5), "--num-queries is for copies"),
        (("--data", more, "--no-splits"), "not with --no-splits"),
        (("--data", more, "--distractors", tmp_path / "empty"), f"{tmp_path}/empty"),
        (("--data", more, "--whitening", f"{more}/"), "need other images for --whitening"),
        (("--data", more, "--distractors", more), "need other images for --distractors"),
        (("--distractors", more, "--whitening", more), "need other images for --whitening"),
        (("--whitening", tmp_path / "gone"), f"folder: {tmp_path}/gone; need --whitening"),
        (("--whitening", few), "need more images for --whitening than"),
    ):
        with pytest.MonkeyPatch.context() as patch:  # found before any features are computed
            patch.setattr(eval_copies, "extract", None)
            result = script("eval_copies", file, *flags)
        assert result.returncode == 2 and said in result.stderr.replace(" or file", "")
        assert result.stderr.count("\n") == 1


def test_images_of_the_run_itself_are_no_others(tmp_path: Path) -> None:
    """Which it is searched among, where --data names none."""
    for flag in ("distractors", "whitening"):
        options = CopiesConfig(EvalConfig("runs/x"), **{flag: str(tmp_path)})
        with pytest.raises(ValueError, match=f"need other images for --{flag} than those"):
            check_places(options, f"{tmp_path}/")
        with pytest.raises(ValueError, match=f"got {tmp_path} beside {tmp_path}/some"):
            check_places(options, str(tmp_path / "some"))
        check_places(options, f"{tmp_path}-others")
        of_copydays = replace(options, copydays=tmp_path)  # whose folders are known
        others, originals = str(tmp_path / "others"), str(tmp_path / "original")
        check_places(replace(of_copydays, **{flag: others}), str(tmp_path))
        with pytest.raises(ValueError, match="need other images"):
            check_places(replace(of_copydays, **{flag: originals}), str(tmp_path))
        check_places(options, "cifar10")
        (tmp_path / flag).symlink_to(tmp_path)
        with pytest.raises(ValueError, match="need other images"):
            check_places(options, str(tmp_path / flag))
