import json
from pathlib import Path

import pytest
import torch
from torch import nn

from eval_knn import EvalConfig
from eval_linear import LinearConfig, linear_accuracy, train_probes


def config(**kwargs: object) -> LinearConfig:
    return LinearConfig(EvalConfig(Path("none")), **kwargs)


def test_probe_equals_torch_sgd_on_a_linear_layer() -> None:
    """One probe of several, against nn.Linear, CrossEntropyLoss, SGD and its cosine scheduler."""
    features, labels = torch.randn(40, 6).double(), torch.randint(3, (40,))
    lrs = torch.tensor([0.05, 0.5, 2.0], dtype=torch.float64)
    settings = config(epochs=4, probe_batch_size=40, seed=3)
    weight, bias = train_probes(features, labels, 3, lrs, settings)
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
        torch.testing.assert_close(weight[i], layer.weight.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(bias[i], layer.bias.detach(), rtol=1e-6, atol=1e-7)


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
    assert f"{report['best_top1']:.2f} best" in result.stdout
    assert report["linear"][0]["top5"] == 100  # two classes
