import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import eval_linear
from data import PATTERNS, StepSampler, build_dataset, held_out, permutation
from eval_linear import (
    LinearConfig,
    Probes,
    by_class,
    chosen_lr,
    confusion_matrix,
    fit_probes,
    linear_accuracy,
    train_on_crops,
    train_probes,
)
from harness.evaluation import EvalConfig
from harness.few_labels import draw_shots


def config(**kwargs: object) -> LinearConfig:
    return LinearConfig(EvalConfig("none"), **kwargs)


def test_probe_equals_torch_sgd_on_a_linear_layer() -> None:
    """One probe of several, against nn.Linear, CrossEntropyLoss, SGD and its cosine scheduler."""
    features, labels = torch.randn(40, 6).double(), torch.randint(3, (40,))
    lrs = torch.tensor([0.05, 0.5, 2.0], dtype=torch.float64)
    settings = config(epochs=4, probe_batch_size=40, seed=3)
    probes = train_probes(features, labels, torch.arange(40), 3, lrs, settings)
    for i, lr in enumerate(lrs.tolist()):
        layer = nn.Linear(6, 3).double()
        with torch.no_grad():
            start = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
            layer.weight.copy_(0.01 * start)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(features), labels).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(probes.weight[i], layer.weight.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(probes.bias[i], layer.bias.detach(), rtol=1e-6, atol=1e-7)


def test_two_images_are_enough(tmp_path: Path, tiny_run: Path, image_folder: Path, script) -> None:
    """One to train on, one to test on."""
    for kind in ("stripes", "checks"):
        (tmp_path / "two" / kind).mkdir(parents=True)
        shutil.copy(image_folder / kind / "0.jpg", tmp_path / "two" / kind)
    result = script("eval_linear", tiny_run, "--data", tmp_path / "two", "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert "best: 0.00 %" in result.stdout


def test_separable_classes_are_separated_and_random_labels_are_not() -> None:
    centers = 3 * torch.randn(4, 16)
    labels = torch.randint(4, (400,))
    features = centers[labels] + torch.randn(400, 16)
    split = features[:300], labels[:300], features[300:]
    accuracies = linear_accuracy(*split, labels[300:], config(epochs=20))
    assert max(top1 for top1, _ in accuracies.values()) > 95
    chance = linear_accuracy(*split, torch.randint(4, (100,)), config(epochs=20))
    assert all(top1 < 50 and top5 == 100 for top1, top5 in chance.values())


def test_same_seed_gives_the_same_numbers() -> None:
    data = torch.randn(50, 4), torch.randint(3, (50,)), torch.randn(20, 4), torch.randint(3, (20,))
    assert linear_accuracy(*data, config(epochs=3)) == linear_accuracy(*data, config(epochs=3))


@pytest.mark.parametrize("wrong", [{"lrs": (0.0,)}, {"lrs": ()}, {"epochs": 0}])
def test_wrong_settings_are_named(wrong: dict) -> None:
    x, y = torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="need lrs > 0"):
        linear_accuracy(x, y, x, y, config(**wrong))


def test_table_and_json_report_the_best_rate(tmp_path: Path, tiny_run: Path, script) -> None:
    checkpoint, out = tiny_run / "ckpt.safetensors", tmp_path / "linear.json"
    result = script("eval_linear", checkpoint, "--json-out", out, "--epochs", 5)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert len(report["linear"]) == 8
    assert report["best_top1"] == max(row["top1"] for row in report["linear"])
    said = " ".join(result.stdout.split())
    best = (
        f"best: {report['best_top1']:.2f} % with {report['best_lr']:g}, chosen on the test images"
    )
    assert best in said
    assert f"with {report['chosen_lr']:g}, chosen on a tenth of the training images" in said
    assert "top-5" not in said  # of two classes
    assert report["linear"][0]["top5"] == 100  # two classes
    # the best probe's mistakes, as its accuracy counts them
    confusion = torch.tensor(report["confusion"])
    assert confusion.sum() == report["num_test"]
    right = 100 * confusion.diag().sum().item() / report["num_test"]
    assert right == pytest.approx(report["best_top1"])
    assert list(report["per_class_top1"]) == ["checks", "stripes"]


def test_probe_that_is_kept_is_the_best_rates_of_the_features(
    tmp_path: Path, tiny_run: Path, script
) -> None:
    out, probe = tmp_path / "linear.json", tmp_path / "probe.safetensors"
    flags = ["--json-out", out, "--probe-out", probe, "--epochs", 5, "--eval-size", 20]
    result = script("eval_linear", tiny_run, *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    features = tmp_path / "features.safetensors"
    flags = ["--features-out", features, "--eval-size", 20]
    assert script("eval_knn", tiny_run, *flags).returncode == 0
    tensors, settings = load_file(features), config(epochs=5)
    rows = torch.arange(len(tensors["train_labels"]))
    of_all = fit_probes(tensors["train_features"], tensors["train_labels"], rows, 2, settings)
    best = settings.lrs.index(report["best_lr"])
    torch.testing.assert_close(load_file(probe)["weight"], of_all.weight[best])
    torch.testing.assert_close(load_file(probe)["bias"], of_all.bias[best])
    with safe_open(probe, "pt") as file:
        metadata = json.loads(file.metadata()["metadata"])
    assert metadata["classes"] == ["checks", "stripes"] and metadata["eval_size"] == 20
    assert metadata["backbone_crc32"] == report["backbone_crc32"]
    flags = ["--probe-out", out, "--json-out", out]
    result = script("eval_linear", tiny_run, *flags)
    assert result.returncode == 2 and "need two files" in result.stderr


def test_rate_is_chosen_without_the_test_images() -> None:
    features, labels = torch.randn(200, 6), torch.randint(3, (200,))
    features[:, 0] += 2 * labels
    settings = config(epochs=3, lrs=(0.001, 0.1, 3.0))
    order = permutation(200, settings.seed).tolist()
    held_out, rest = order[:20], order[20:]
    parts = features[rest], labels[rest], features[held_out], labels[held_out]
    accuracies = linear_accuracy(*parts, settings)
    assert len({top1 for top1, _ in accuracies.values()}) > 1
    chosen = chosen_lr(features, labels, settings)
    assert accuracies[chosen][0] == max(top1 for top1, _ in accuracies.values())


def test_confusion_counts_pairs_of_classes() -> None:
    probes = Probes(torch.zeros(1, 3), 3, torch.tensor([0.1, 0.2]), seed=0)
    features, labels = torch.randn(50, 3), torch.randint(3, (50,))
    confusion = confusion_matrix(probes, features, labels, row=1)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for feature, label in zip(features, labels.tolist(), strict=True):
        guess = (probes.weight[1] @ feature + probes.bias[1]).argmax().item()
        expected[label, guess] += 1
    assert torch.equal(confusion, expected)


def test_class_without_images_has_no_accuracy() -> None:
    report = by_class(torch.tensor([[3, 1], [0, 0]]), ["cat", "dog"])
    assert report["per_class_top1"] == {"cat": 75.0, "dog": None}


@pytest.mark.slow
def test_probe_on_crops_equals_torch_sgd_on_the_features_it_saw() -> None:
    """Every epoch sees each image once, in another crop, and one probe is plain SGD."""
    dataset = build_dataset("patterns")
    dataset.images, dataset.labels = dataset.images[:40], dataset.labels[:40]
    seen: list = []

    def forward(crops: torch.Tensor) -> torch.Tensor:
        assert crops.shape[1:] == (3, 16, 16) and crops.min() >= 0 and crops.max() <= 1
        seen.append(crops.mean(dim=(2, 3)))
        return seen[-1]

    settings = config(epochs=3, probe_batch_size=8, lrs=(0.1, 25.6))
    accelerator = Accelerator(cpu=True)
    probes = train_on_crops(forward, dataset, 16, 10, settings, accelerator)
    assert len(seen) == 15
    by_epoch = torch.stack(seen).view(3, 40, 3)
    assert not torch.equal(by_epoch[0].sort(dim=0).values, by_epoch[1].sort(dim=0).values)
    layer = nn.Linear(3, 10)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        layer.weight.copy_(0.01 * torch.randn(10, 3, generator=generator))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=25.6 * 8 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    order = [[i for _, i in rows] for rows in StepSampler(40, 8, 0, 0, 1, range(15))]
    for step, (features, rows) in enumerate(zip(seen, order, strict=True)):
        optimizer.zero_grad()
        targets = torch.tensor([int(dataset.labels[i]) for i in rows])
        nn.functional.cross_entropy(layer(features), targets).backward()
        optimizer.step()
        if step % 5 == 4:
            schedule.step()
    torch.testing.assert_close(probes.weight[1], layer.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_augmented_probe_learns_alike_in_one_and_two_processes(
    tmp_path: Path, tiny_run: Path, launch
) -> None:
    reports = []
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        flags = ("--augment", "--epochs", 20, "--probe-batch-size", 24, "--json-out", out)
        answer = launch([tiny_run / "ckpt.safetensors", *flags], script="eval_linear", world=world)
        assert answer.codes == [0] * world, answer.text
        reports.append(json.loads(out.read_text()))
    report = reports[0]
    assert report == reports[1]
    assert report["augment"] is True and report["num_test"] == 8
    assert report["best_top1"] >= 75
    assert PATTERNS[0] in report["per_class_top1"]  # the classes' folders


def test_blocks_that_a_network_lacks_are_named(tiny_run: Path, script) -> None:
    checkpoint = tiny_run / "ckpt.safetensors"
    for flag in (("--n-last-blocks", 4), ("--avgpool",)):
        result = script("eval_linear", checkpoint, *flag)
        assert result.returncode == 2
        assert "need a ViT" in result.stderr and result.stderr.count("\n") == 1


def test_augmented_probe_counts_what_it_could_not_read(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    held = held_out(len(list(folder.rglob("*.jpg"))))
    files = sorted(folder.rglob("*.jpg"))
    for row in np.flatnonzero(~held)[[3, 30]]:
        files[row].write_bytes(b"no image")
    flags = ("--data", folder, "--augment", "--epochs", 2, "--probe-batch-size", 24)
    result = script("eval_linear", tiny_run / "ckpt.safetensors", *flags)
    assert result.returncode == 0, result.stderr
    assert "2 images cannot be decoded: others took their place" in result.stdout


def test_confusion_of_many_classes_is_its_pairs_above_0() -> None:
    features, labels = torch.randn(300, 8), torch.arange(300) % 150
    probes = eval_linear.Probes(features, 150, torch.tensor([0.1]), seed=0)
    sparse = eval_linear.confusion_matrix(probes, features, labels, 0)
    guesses = probes.logits(features)[0].argmax(dim=-1)
    dense = torch.zeros(150, 150, dtype=torch.int64)
    for label, guess in zip(labels.tolist(), guesses.tolist(), strict=True):
        dense[label, guess] += 1
    assert torch.equal(sparse.to_dense(), dense)
    found, expected = (eval_linear.by_class(matrix, None) for matrix in (sparse, dense))
    assert found["per_class_top1"] == expected["per_class_top1"]
    rebuilt = torch.zeros_like(dense)
    for true, said, count in found["confusion_pairs"]:
        assert count > 0
        rebuilt[true, said] = count
    assert torch.equal(rebuilt, dense)


def test_confusion_is_built_for_json_alone(
    tiny_run: Path, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(eval_linear, "confusion_matrix")
    result = script("eval_linear", tiny_run, "--epochs", 1)
    assert result.returncode == 0, result.stderr


def test_few_labels_are_probes_on_the_drawn_images(tmp_path: Path, tiny_run: Path, script) -> None:
    out, file = tmp_path / "linear.json", tmp_path / "f.safetensors"
    flags = ("--epochs", 5, "--lrs", 0.03, 0.3, "--shots", 1, 4, "--draws", 3, "--json-out", out)
    result = script("eval_linear", tiny_run, *flags)
    assert result.returncode == 0, result.stderr
    shots = json.loads(out.read_text())["shots"]
    assert script("eval_knn", tiny_run, "--features-out", file).returncode == 0
    train, labels, test, targets = (
        load_file(file)[name]
        for name in ("train_features", "train_labels", "test_features", "test_labels")
    )
    for num in (1, 4):
        for i, lr in enumerate((0.03, 0.3)):
            top1 = []
            for draw in range(3):
                rows = draw_shots(labels, num, 0, draw)
                assert len(rows) == 2 * num
                settings = config(epochs=5, lrs=(0.03, 0.3))
                accuracies = linear_accuracy(train[rows], labels[rows], test, targets, settings)
                top1.append(list(accuracies.values())[i][0])
            assert shots[str(num)]["by_lr"][f"{lr:g}"]["draws"] == pytest.approx(top1)
        best = shots[str(num)]["best_top1"]
        assert best["mean"] == max(x["mean"] for x in shots[str(num)]["by_lr"].values())
        assert f"{best['mean']:.2f} ± {best['std']:.2f}" in result.stdout
