"""What a step is said to take, against real steps and counted by hand."""

import os
from pathlib import Path

import pytest
import torch
from conftest import run_script

from harness import estimate, outlook
from harness.estimate import StepCost, flops_per_second, memory_of_machine, step_cost
from models import DinoModel, ModelConfig


def test_cost_of_a_linear_network_is_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone of one product alone, and a head of one more."""

    class Product(torch.nn.Module):
        def __init__(self, num_in: int, num_out: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(num_in, num_out))
            self.output_dim = num_out

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.weight

    def build(config: ModelConfig) -> DinoModel:
        return DinoModel(Product(3 * 4 * 4, 10), Product(10, 7))

    monkeypatch.setattr(DinoModel, "from_config", build)
    cost = step_cost(ModelConfig(), crop_sizes=[4, 4, 4], batch_size=6)
    products = 2 * (48 * 10 + 10 * 7)  # of an image's crop
    # forward and twice backward for three crops, and the teacher's forward for two
    assert cost.flops == 6 * (3 * 3 + 2) * products
    weights = 4 * 5 * (48 * 10 + 10 * 7)
    activations = 4 * 6 * 3 * (48 + 10)  # what the two products read
    assert weights + activations == cost.num_bytes


def test_cost_grows_with_batch_and_crops() -> None:
    config = ModelConfig(arch="resnet10_half", image_size=32)
    one, two = (step_cost(config, [32, 32, 16], batch) for batch in (8, 16))
    assert two.flops == 2 * one.flops
    assert one.num_bytes < two.num_bytes < 2 * one.num_bytes
    assert step_cost(config, [32, 32], 8).flops < one.flops


def test_machine_has_a_speed_and_memory() -> None:
    assert 1e8 < flops_per_second() < 1e14
    assert 1 << 28 < memory_of_machine() < 1 << 46


@pytest.mark.slow
def test_step_that_is_too_much_is_named_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, tiny_flags, tmp_path
) -> None:
    flags = [*tiny_flags, "--epochs", 1, "--knn-every", 0, "--output-dir"]
    result = run_script("dino_train", *flags, tmp_path / "small")
    assert "a step will take" not in result.stdout
    monkeypatch.setattr(outlook, "step_cost", lambda *args: StepCost(int(1e15), 20 << 30))
    monkeypatch.setattr(outlook, "flops_per_second", lambda: 1e13)
    monkeypatch.setattr(outlook, "memory_of_machine", lambda: 24 << 30)
    result = run_script("dino_train", *flags, tmp_path / "large")
    said = "a step will take about 1 min 40 s on this CPU and 20.0 GiB of this machine's 24.0, the "
    assert said + "run about 16 min 40 s: smaller --batch-size" in result.stdout


@pytest.mark.slow
def test_cost_of_a_network_whose_layers_take_parameters_as_inputs() -> None:
    """PiT and CaiT hand their class token to a layer, which torch's counter stumbles over."""
    for arch in ("pit_ti_224", "cait_xxs24_224"):
        model = ModelConfig(arch, image_size=64, projection_output_dim=16)
        cost = step_cost(model, crop_sizes=[64, 64], batch_size=2)
        assert cost.flops > 0 and cost.num_bytes > 0


V1 = "11:cpu,cpuacct:/job\n9:memory:/slurm/job_7\n1:name=systemd:/job\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "1073741824"}, 1 << 30),  # a container, which is its own root
        ("0::/a/b\n", {"a/memory.max": "4096", "a/b/memory.max": "8192"}, 4096),
        ("0::/a/b\n", {"a/memory.max": "max", "a/b/memory.max": "8192"}, 8192),
        ("0::/docker/7\n", {"memory.max": "4096"}, 4096),  # whose path the container does not see
        (V1, {"memory/slurm/job_7/memory.limit_in_bytes": "12288"}, 12288),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),  # of version 1: none
        (V1, {"memory.max": "no number"}, None),
        ("", {}, None),
        (None, {}, None),  # no such file: not Linux
    ],
)
def test_memory_is_what_a_container_or_slurm_leaves(
    groups: str | None,
    limits: dict[str, str],
    expected: int | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(estimate, "GROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(estimate, "GROUPS", tmp_path / "groups")
    if groups is not None:
        (tmp_path / "cgroup").write_text(groups)
    for name, limit in limits.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit + "\n")
    assert memory_of_machine() == (expected or whole)
