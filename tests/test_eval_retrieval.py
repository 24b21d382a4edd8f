import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import eval_retrieval
from data import draw_patterns
from eval_retrieval import (
    RetrievalConfig,
    fit_longer_side,
    pooled,
    read_ground_truth,
    retrieval_scores,
    revisited_scores,
)
from harness.evaluation import EvalConfig
from harness.feature_maps import feature_map
from harness.ranking import average_precision
from models import get_backbone, load_checkpoint


def area_by_a_loop(ranked: list[int], positives: set[int]) -> float:
    """Return the average precision of one query: precision before and after each that is found."""
    area, found = 0.0, 0
    for place, image in enumerate(ranked):
        if image in positives:
            before = found / place if place else 1.0
            after = (found + 1) / (place + 1)
            area += (before + after) * (1 / len(positives)) / 2
            found += 1
    return area


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("rows_a_block", [1, 7, 1000])
def test_equals_a_double_loop_to_the_last_digit(
    rows_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = torch.randn(60, 8), torch.randint(6, (60,))
    labels[17] = 99  # alone in its class
    monkeypatch.setattr(eval_retrieval, "ENTRIES", 60 * rows_a_block)
    scores = retrieval_scores(features, labels, ks=(1, 3, 10))
    areas, hits = [], {1: 0, 3: 0, 10: 0}
    for query in range(60):
        others = [image for image in range(60) if image != query]
        similarity = F.cosine_similarity(features[query][None], features).tolist()
        ranked = sorted(others, key=lambda image: -similarity[image])
        positives = {image for image in others if labels[image] == labels[query]}
        if positives:
            areas.append(area_by_a_loop(ranked, positives))
            for k in hits:
                hits[k] += any(image in positives for image in ranked[:k])
    assert scores["queries"] == len(areas) == 59
    assert scores["map"] == 100 * float(np.mean(areas))
    assert scores["recall"] == {str(k): 100 * float(num / 59) for k, num in hits.items()}


def test_perfect_and_worst_rankings_have_known_areas() -> None:
    assert average_precision(np.arange(5), 5) == pytest.approx(1)
    assert average_precision(np.array([1]), 1) == (0 / 1 + 1 / 2) / 2
    assert average_precision(np.array([], np.int64), 3) == 0
    apart = torch.eye(4).repeat_interleave(5, dim=0)
    scores = retrieval_scores(apart, torch.arange(4).repeat_interleave(5))
    assert scores["map"] == pytest.approx(100) and scores["recall"]["1"] == 100


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_network_that_sees_no_difference_finds_nothing(value: float) -> None:
    """Whatever the order of the images: all of other classes come first."""
    labels = torch.arange(4).repeat_interleave(5)
    scores = retrieval_scores(torch.full((20, 3), value), labels, ks=(1, 15, 16))
    last = np.arange(15, 19)
    assert scores["map"] == pytest.approx(100 * average_precision(last, 4))
    assert scores["recall"] == {"1": 0, "15": 0, "16": 100}


def test_nothing_to_be_found_is_said() -> None:
    with pytest.raises(ValueError, match="no class has two images"):
        retrieval_scores(torch.randn(4, 3), torch.arange(4))


def test_images_are_the_test_split_or_all(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    split, out = tmp_path / "split", tmp_path / "out.json"
    shutil.copytree(image_folder, split / "train")
    for name in ("checks", "stripes"):
        (split / "test" / name).mkdir(parents=True)
        for file in sorted(image_folder.glob(f"{name}/*.jpg"))[:9]:
            shutil.copy(file, split / "test" / name)
    for data, num in ((image_folder, 80), (split, 18)):
        result = script("eval_retrieval", tiny_run, "--data", data, "--json-out", out)
        assert result.returncode == 0, result.stderr
        report = json.loads(out.read_text())
        assert report["num_images"] == report["retrieval"]["queries"] == num
        assert f"{report['retrieval']['map']:.2f}" in result.stdout
        assert list(report["retrieval"]["recall"]) == ["1", "5", "10"]


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "resnet10_half"])
def test_gem_is_the_generalised_mean_of_the_feature_map(arch: str) -> None:
    sizes = {"image_size": 32} | ({"patch_size": 8} if arch.startswith("vit") else {})
    backbone = get_backbone(arch, **sizes).eval()
    images = torch.randn(2, 3, 35, 50)
    evaluation = EvalConfig("none")
    with torch.no_grad():
        whole = images[..., :32, :48] if arch.startswith("vit") else images
        maps = feature_map(backbone, whole).clamp(min=1e-6)
        for power in (1.0, 3.0):
            config = RetrievalConfig(evaluation, pooling="gem", gem_power=power)
            expected = maps.pow(power).mean(dim=(2, 3)).pow(1 / power)
            torch.testing.assert_close(pooled(backbone, config)(images), expected)
        scales = [F.interpolate(images, scale_factor=s, mode="bilinear") for s in (0.5**0.5, 0.5)]
        one = pooled(backbone, RetrievalConfig(evaluation))
        mean = pooled(backbone, RetrievalConfig(evaluation, multiscale=True))(images)
        expected = sum(one(scaled) for scaled in [images, *scales]) / 3
        torch.testing.assert_close(mean, expected)


# ---------------------------------------------------------------- revisited Oxford and Paris


def test_revisited_equals_a_double_loop_to_the_last_digit() -> None:
    generator = np.random.default_rng(0)
    num, answers = 40, []
    for _ in range(12):
        parts = np.split(generator.permutation(num)[:20], np.sort(generator.integers(0, 20, 2)))
        answers.append(dict(zip(("easy", "hard", "junk"), parts, strict=True)))
    ranking = np.stack([generator.permutation(num) for _ in answers])
    scores = revisited_scores(ranking, answers)
    kinds = {"easy": "e", "medium": "eh", "hard": "h"}  # first letters of what is to be found
    for mode, letters in kinds.items():
        areas, precisions = [], []
        for ranked, answer in zip(ranking.tolist(), answers, strict=True):
            positives = {row for kind in answer if kind[0] in letters for row in answer[kind]}
            ignored = {row for kind in answer if kind[0] not in letters for row in answer[kind]}
            if not positives:
                continue
            counted = [row for row in ranked if row not in ignored]
            areas.append(area_by_a_loop(counted, positives))
            last = max(place for place, row in enumerate(counted) if row in positives) + 1
            depths = [min(last, k) for k in (1, 5, 10)]
            precisions.append(
                [sum(row in positives for row in counted[:depth]) / depth for depth in depths]
            )
        assert scores[mode]["queries"] == len(areas)
        assert scores[mode]["map"] == 100 * float(np.mean(areas))
        assert (
            list(scores[mode]["precision"].values()) == (100 * np.mean(precisions, axis=0)).tolist()
        )


@pytest.fixture
def landmarks(tmp_path: Path) -> Path:
    """The ground truth of 3 queries in 12 images of other sizes, in the published layout."""
    (tmp_path / "jpg").mkdir()
    images = draw_patterns(torch.arange(15), size=40)
    names = [f"all_souls_{i:06}" for i in range(15)]
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((0, 0, 40, 24 + i))
        picture.save(tmp_path / "jpg" / f"{name}.jpg")
    truth = [
        {"bbx": [0.0, 0.0, 9.5, 9.5], "easy": [0, 1], "hard": [2], "junk": [3]},
        {"bbx": [0.0, 0.0, 9.5, 9.5], "easy": np.array([4]), "hard": [], "junk": []},
        {"bbx": [0.0, 0.0, 9.5, 9.5], "easy": [], "hard": np.array([7, 8]), "junk": [9]},
    ]
    content = {"imlist": names[:12], "qimlist": names[12:], "gnd": truth}
    file = tmp_path / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(content, protocol=2))
    return file


def test_ground_truth_of_every_protocol_is_read(landmarks: Path) -> None:
    content = pickle.loads(landmarks.read_bytes())
    for protocol in range(6):
        landmarks.write_bytes(pickle.dumps(content, protocol=protocol))
        truth = read_ground_truth(landmarks)
        assert truth.images == content["imlist"] and truth.queries == content["qimlist"]
        assert truth.answers[2]["hard"].tolist() == [7, 8]
        assert truth.answers[1]["hard"].tolist() == []


def test_revisited_of_files_equals_a_loop_over_files(
    tmp_path: Path, landmarks: Path, tiny_run: Path, script
) -> None:
    out = tmp_path / "out.json"
    flags = ("--ground-truth", landmarks, "--image-size", 32, "--json-out", out)
    result = script("eval_retrieval", tiny_run, *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    model, metadata = load_checkpoint(tiny_run / "ckpt.safetensors")
    crops = metadata["config"]["crops"]
    mean, std = (torch.tensor(crops[name])[:, None, None] for name in ("mean", "std"))
    features = []
    for file in sorted((tmp_path / "jpg").iterdir()):  # images, then queries
        picture = Image.open(file)
        picture.thumbnail((32, 32), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255
        with torch.no_grad():
            features.append(model.backbone(((pixels - mean) / std)[None])[0])
    images, queries = features[:12], features[12:]
    ranking = []
    for query in queries:
        similarity = [F.cosine_similarity(query, image, dim=0).item() for image in images]
        ranking.append(sorted(range(12), key=lambda row: -similarity[row]))
    expected = revisited_scores(np.array(ranking), read_ground_truth(landmarks).answers)
    assert report["revisited"] == expected
    assert {mode: scores["queries"] for mode, scores in expected.items()} == {
        "easy": 2,
        "medium": 3,
        "hard": 2,
    }
    assert "3 queries in 12 images" in result.stdout
    assert f"{expected['medium']['map']:.2f}" in result.stdout


def test_image_size_is_the_longer_side() -> None:
    image = torch.randint(256, (3, 30, 60), dtype=torch.uint8)
    assert fit_longer_side(image, 20).shape == (3, 10, 20)
    assert torch.equal(fit_longer_side(image, 100), image)  # none is enlarged


class Harmful:
    def __reduce__(self) -> tuple:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_that_would_run_code_is_refused(
    protocol: int, tmp_path: Path, tiny_run: Path, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (
        {"imlist": [], "qimlist": [], "gnd": Harmful()},
        np.array([Harmful()], dtype=object),
        {"imlist": eval, "qimlist": getattr, "gnd": np.load},
    ):
        file = tmp_path / "gnd.pkl"
        file.write_bytes(pickle.dumps(content, protocol=protocol))
        result = script("eval_retrieval", tiny_run, "--ground-truth", file)
        assert result.returncode == 2
        assert "which could run code" in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "harmed").exists()


def test_other_pickles_are_refused_in_one_line(landmarks: Path, tiny_run: Path, script) -> None:
    whole = pickle.loads(landmarks.read_bytes())
    answer = {"easy": [12], "hard": [], "junk": []}
    for content, said in (
        (pickle.dumps([1, 2]), "no ground truth"),
        (b"hello", "no ground truth"),
        (landmarks.read_bytes()[:-40], "no ground truth"),
        (pickle.dumps({"imlist": []}), "lacks 'qimlist'"),
        (pickle.dumps(whole | {"gnd": whole["gnd"][:2]}), "an answer for each query, got 2 and 3"),
        (pickle.dumps(whole | {"gnd": [answer] * 3}), "need rows of its 12 images"),
        (pickle.dumps(whole | {"gnd": [answer | {"easy": ["a"]}] * 3}), "need rows of its"),
        (pickle.dumps(whole | {"imlist": ["gone"] * 12}), "12 of 15 images are not in"),
    ):
        landmarks.write_bytes(content)
        result = script("eval_retrieval", tiny_run, "--ground-truth", landmarks)
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1
    for flags, said in (
        (("--ground-truth", landmarks.parent / "none.pkl"), "No such file"),
        (("--gem-power", 0), "need --gem-power > 0"),
        (("--gem-power", "inf"), "need --gem-power > 0 and <= 16, got inf"),
        (("--image-size", 0), "need --image-size > 0"),
        (("--image-size", 512), "--image-size is for --ground-truth"),
    ):
        result = script("eval_retrieval", tiny_run, *flags)
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1


def test_unreadable_landmark_is_named(landmarks: Path, tiny_run: Path, script) -> None:
    (landmarks.parent / "jpg" / "all_souls_000003.jpg").write_bytes(b"no image")
    result = script("eval_retrieval", tiny_run, "--ground-truth", landmarks)
    assert result.returncode == 2
    assert "all_souls_000003.jpg" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_several_processes_score_as_one(tmp_path: Path, landmarks: Path, tiny_run, launch) -> None:
    for flags in ((), ("--ground-truth", landmarks, "--image-size", 32)):
        reports = []
        for world in (1, 2):
            out = tmp_path / f"{world}.json"
            answer = launch(
                [tiny_run, "--json-out", out, *flags], script="eval_retrieval", world=world
            )
            assert answer.codes == [0] * world, answer.text
            reports.append(json.loads(out.read_text()))
        name = "revisited" if flags else "retrieval"
        assert reports[0][name] == reports[1][name]
