"""The probe against the conditions of a minimum, against a plain descent, and in a run."""

import math
from pathlib import Path

import pytest
import torch
from conftest import read_log
from safetensors.torch import load_file
from torch.nn import functional as F

from harness.linear_probe import WEIGHT_PENALTY, LogisticRegression, probe_accuracy
from models import load_checkpoint


def clouds(num: int, distance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (n, 5) around three places, of very different scales, with their labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    points = torch.randn(num, 5, generator=generator)
    points[:, :3] += distance * F.one_hot(labels, 3)
    return points * torch.tensor([1.0, 100.0, 0.01, 1.0, 10.0]) + 7, labels


@pytest.mark.slow
def test_fit_is_the_minimum_that_plain_descent_finds() -> None:
    """In float64, by a gradient written out, 20,000 small steps."""
    features, labels = clouds(90, 1.0, seed=0)
    probe = LogisticRegression(features, labels, 3)
    x = features.double()
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    weight, bias = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(20_000):
        error = ((x @ weight.T + bias).softmax(dim=1) - F.one_hot(labels, 3)) / 90
        weight -= 0.5 * (error.T @ x + WEIGHT_PENALTY * weight)
        bias -= 0.5 * error.sum(dim=0)
    torch.testing.assert_close(probe.weight[:, :5].double(), weight, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(probe.weight[:, 5].double(), bias, rtol=1e-2, atol=2e-3)
    assert torch.equal(probe.predict(features), (x @ weight.T + bias).argmax(dim=1))


def test_separable_classes_are_told_apart_and_mixed_ones_at_chance() -> None:
    train, test = clouds(300, 12.0, seed=0), clouds(300, 12.0, seed=1)
    assert probe_accuracy(*train, *test) == 100
    mixed = clouds(3000, 0.0, seed=0)
    assert 25 < probe_accuracy(*mixed, *clouds(3000, 0.0, seed=1)) < 42
    wrong = (test[1] + 1) % 3
    assert probe_accuracy(*train, test[0], wrong) == 0


def test_a_class_without_training_images_is_never_said_and_constant_features_do_no_harm() -> None:
    features, labels = clouds(60, 12.0, seed=0)
    features[:, 4] = 3.0
    assert probe_accuracy(features, labels, features, labels + 3) == 0
    assert probe_accuracy(features, labels, features, labels) == 100


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_probe(value: float) -> None:
    features, labels = clouds(60, 12.0, seed=0)
    features[7, 1] = value
    assert math.isnan(probe_accuracy(features, labels, features, labels))


def test_probe_draws_nothing_by_chance_and_gives_no_gradient_to_its_features() -> None:
    features, labels = clouds(60, 1.0, seed=0)
    features.requires_grad_()
    before = torch.get_rng_state()
    first = LogisticRegression(features, labels, 3).weight
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, LogisticRegression(features, labels, 3).weight)
    assert features.grad is None and not first.requires_grad


@pytest.mark.slow
def test_run_with_probe_is_the_run_without_and_logs_what_its_checkpoint_gives(
    tmp_path: Path, tiny_run: Path, tiny_flags, script
) -> None:
    folder = tmp_path / "run"
    flags = ("--probe-every", 2, "--output-dir", folder)
    result = script("dino_train", *tiny_flags, *flags)
    assert result.returncode == 0, result.stderr
    tensors, others = (load_file(run / "state.safetensors") for run in (folder, tiny_run))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    measured = [line for line in read_log(folder) if "knn_top1" in line]
    assert [line["step"] for line in measured if "probe_top1" in line] == [0, 20]
    without = [line for line in read_log(tiny_run) if "knn_top1" in line]
    assert [line | {"probe_top1": 0} for line in measured] == [
        line | {"probe_top1": 0} for line in without
    ]
    assert f"linear probe {measured[-1]['probe_top1']:.1f} %" in result.stdout
    metrics = load_checkpoint(folder / "ckpt.safetensors")[1]["metrics"]
    assert metrics["probe_top1"] == measured[-1]["probe_top1"]


def test_probe_needs_the_evaluations_that_it_shares_features_with(
    tmp_path: Path, tiny_flags, script
) -> None:
    for knn, probe in ((0, 2), (2, 3), (4, 2)):
        flags = ("--knn-every", knn, "--probe-every", probe, "--output-dir", tmp_path / "run")
        result = script("dino_train", *tiny_flags, *flags)
        assert result.returncode == 2
        assert f"--probe-every {probe}: need a multiple of --knn-every" in result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
