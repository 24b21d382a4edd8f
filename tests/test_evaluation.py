import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from harness.evaluation import (
    draw_shots,
    evenly,
    feature_quality,
    layer_features,
    mean_and_spread,
    rank_me,
)
from models import get_backbone, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("avgpool", [False, True])
@pytest.mark.parametrize("num_last_blocks", [1, 4])
def test_layers_are_the_normalised_tokens_of_the_last_blocks(
    num_last_blocks: int, avgpool: bool
) -> None:
    """Against the blocks run one by one, as the original's get_intermediate_layers has them."""
    vit = get_backbone("vit_tiny_patch16_224", patch_size=8, image_size=32).eval()
    images = torch.randn(2, 3, 32, 48)  # not square
    with torch.no_grad():
        features = layer_features(vit, num_last_blocks, avgpool)(images)
        tokens, outputs = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), []
        for block in vit.blocks:
            tokens = block(tokens)
            outputs.append(vit.norm(tokens))
    expected = [output[:, 0] for output in outputs[-num_last_blocks:]]
    expected += [outputs[-1][:, 1:].mean(dim=1)] * avgpool
    torch.testing.assert_close(features, torch.cat(expected, dim=1))


def test_layers_that_a_network_lacks_are_named() -> None:
    vit = get_backbone("vit_tiny_patch16_224", patch_size=8, image_size=32)
    with pytest.raises(ValueError, match="from 1 to 12, got 13"):
        layer_features(vit, 13)
    with pytest.raises(ValueError, match="need a ViT"):
        layer_features(get_backbone("resnet18"), 4)


def test_rank_is_the_number_of_directions_in_use() -> None:
    axes = torch.linalg.qr(torch.randn(16, 16)).Q
    for rank in (1, 3, 16):  # as many orthogonal directions, of the same size
        features = axes[:rank].repeat(16, 1)
        quality = feature_quality(features)
        assert quality["rankme"] == pytest.approx(rank, rel=1e-3)
    assert feature_quality(torch.ones(50, 8))["rankme"] == pytest.approx(1, rel=1e-3)


def test_rank_and_shares_against_their_formulas() -> None:
    features = torch.randn(60, 12) * torch.arange(1, 13)
    quality = feature_quality(features)
    values = torch.linalg.svdvals(features.double()).tolist()
    shares = [value / sum(values) + 1e-7 for value in values]
    entropy = -sum(share * math.log(share) for share in shares)
    assert quality["rankme"] == pytest.approx(math.exp(entropy))
    variances = torch.linalg.eigvalsh(torch.cov(features.double().T)).flip(0)
    for k, share in quality["variance_share"].items():
        assert share == pytest.approx((variances[:k].sum() / variances.sum()).item())
    assert list(quality["variance_share"]) == [1, 10]


def test_quality_of_many_images_is_that_of_some() -> None:
    features = torch.randn(60_000, 4)
    rows = evenly(60_000)
    assert len(rows) == 25_600 and rows[0] == 0 and rows[-1] == 59_999
    assert set(rows.diff().tolist()) == {2, 3}
    assert feature_quality(features) == feature_quality(features[rows])
    assert torch.equal(evenly(9), torch.arange(9))


def test_evaluation_reports_the_rank(tmp_path: Path, tiny_run: Path, script) -> None:
    out = tmp_path / "knn.json"
    result = script("eval_knn", tiny_run / "ckpt.safetensors", "--json-out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert 1 <= report["rankme"] <= 72
    assert f"RankMe {report['rankme']:.1f}" in result.stdout


def test_rank_alone_needs_no_classes(tmp_path: Path, tiny_run: Path, image_folder, script) -> None:
    folder, out = tmp_path / "flat", tmp_path / "rank.json"
    folder.mkdir()
    for file in list(image_folder.glob("stripes/*.jpg"))[:9]:
        (folder / file.name).write_bytes(file.read_bytes())
    flags = ("--data", folder, "--rank-only", "--json-out", out)
    result = script("eval_knn", tiny_run / "ckpt.safetensors", *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["num_train"] == 9 and 1 <= report["rankme"] <= 9


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["eval_knn", "eval_linear"])
def test_weights_that_are_not_finite_are_named(
    name: str, value: float, tmp_path: Path, tiny_run: Path, script
) -> None:
    model, metadata = load_checkpoint(tiny_run / "ckpt.safetensors")
    model.backbone.bn1.weight.data[0] = value
    path = tmp_path / "ckpt.safetensors"
    save_checkpoint(path, model, metadata)
    result = script(name, path, "--json-out", tmp_path / "out.json")
    assert result.returncode == 2
    expected = f"error: {path} is damaged: backbone.bn1.weight holds a nan or an infinity\n"
    assert result.stderr == expected
    assert not (tmp_path / "out.json").exists()


def test_brackets_in_a_folders_name_are_text(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    folder, out = tmp_path / "a[/b] [red]", tmp_path / "out.json"
    shutil.copytree(image_folder, folder)
    flags = ("--data", folder, "--json-out", out)
    result = script("eval_knn", tiny_run / "ckpt.safetensors", *flags)
    assert result.returncode == 0, result.stderr
    assert "a[/b] [red]: " in result.stdout
    assert json.loads(out.read_text())["data"] == str(folder)


def test_rank_of_features_is_that_of_the_report_and_nan_of_what_is_not_finite() -> None:
    features = torch.randn(60, 8)
    assert rank_me(features) == feature_quality(features)["rankme"]
    features[3, 4] = math.inf
    assert math.isnan(rank_me(features))
    assert all(math.isnan(x) for x in feature_quality(features)["variance_share"].values())


def test_shots_are_random_images_of_each_class() -> None:
    labels = torch.tensor([0, 3, 1, 0, 3, 3, 0, 3, 1, 0])  # no image of class 2
    drawn = {tuple(draw_shots(labels, 2, seed=0, draw=draw).tolist()) for draw in range(30)}
    assert len(drawn) > 5
    for rows in drawn:
        assert list(rows) == sorted(set(rows))
        assert sorted(labels[list(rows)].tolist()) == [0, 0, 1, 1, 3, 3]
    for draw in range(5):
        one, two, many = (draw_shots(labels, shots, 7, draw) for shots in (1, 2, 100))
        assert set(one.tolist()) < set(two.tolist())  # more shots of a draw add to the fewer
        assert torch.equal(two, draw_shots(labels, 2, 7, draw))
        assert many.tolist() == list(range(10))  # a class that has fewer gives all


def test_every_image_is_drawn_about_as_often() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    rows = torch.cat([draw_shots(labels, 3, seed=1, draw=draw) for draw in range(1000)])
    assert (rows.bincount(minlength=10) - 300).abs().max() < 60  # four standard deviations


def test_spread_is_the_standard_deviation_of_a_sample() -> None:
    values = [3.0, 5.0, 10.0]
    found = mean_and_spread(values)
    assert found["mean"] == 6 and found["draws"] == values
    assert found["std"] == pytest.approx(torch.tensor(values).std().item())
    assert mean_and_spread([4.0]) == {"mean": 4.0, "std": 0.0, "draws": [4.0]}


@pytest.mark.parametrize("name", ["eval_knn", "eval_linear"])
def test_impossible_shots_are_one_line(name: str, tiny_run: Path, script) -> None:
    unfit = "--rank-only" if name == "eval_knn" else "--augment"
    for flags, said in (
        (("--shots", 0, 5), "need --shots >= 1"),
        (("--shots", 5, "--draws", 0), "--draws >= 1"),
        (("--shots", 5, unfit), f"not with {unfit}"),
    ):
        result = script(name, tiny_run, *flags)
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1
