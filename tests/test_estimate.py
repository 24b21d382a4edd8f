"""What a step is said to take, against real steps and counted by hand."""

from pathlib import Path

import pytest
import torch
from conftest import run_script

from harness import estimate, flags, outlook
from harness.estimate import StepCost, bf16_gain, flops_per_second, memory_of_machine, step_cost
from harness.flags import default_precision
from harness.outlook import precision_on_cpu
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


def test_bf16_is_measured_where_the_cpu_has_amx_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(estimate, "CPUINFO", tmp_path / "cpuinfo")
    assert bf16_gain() == 0
    estimate.CPUINFO.write_text("flags : sse avx2\n")
    assert bf16_gain() == 0
    estimate.CPUINFO.write_text("flags : sse avx2 amx_bf16 amx_tile\n")
    assert 0.001 < bf16_gain(rounds=2) < 100


@pytest.mark.parametrize("size", [16, 1])
def test_bf16_is_not_taken_where_a_gradient_of_it_is_not_finite(
    size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(estimate, "CPUINFO", tmp_path / "cpuinfo")
    estimate.CPUINFO.write_text("flags : sse avx2 amx_bf16 amx_tile\n")
    convolve = torch.conv2d

    def overflowing(images: torch.Tensor, *args: torch.Tensor, **options: int) -> torch.Tensor:
        result = convolve(images, *args, **options)
        is_spoilt = result.dtype == torch.bfloat16 and images.shape[-1] == size
        return result * torch.inf if is_spoilt else result

    monkeypatch.setattr(torch, "conv2d", overflowing)
    assert bf16_gain(rounds=2) == 0


@pytest.mark.parametrize(
    ("gain", "world", "expected"),
    [(2.2, "1", "bf16"), (1.1, "1", "no"), (0.0, "1", "no"), (2.2, "2", "no")],
)
def test_bf16_is_taken_on_a_cpu_that_it_speeds_up(
    gain: float, world: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(flags, "bf16_gain", lambda: gain)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert default_precision() == expected


@pytest.mark.parametrize(
    ("precision", "gain", "cpu", "said"),
    [
        ("no", 0.0, "avx2", "float32"),
        ("no", 1.1, "avx2 amx_bf16", "float32"),
        ("no", 2.2, "avx2 amx_bf16", "float32 (2.2 times as fast here: --mixed-precision bf16)"),
        (
            "bf16",
            2.2,
            "avx2 amx_bf16",
            "bf16 (2.2 times as fast here as float32, which is --mixed-precision no)",
        ),
        ("bf16", 0.0, "avx2", "bf16 (float32 is faster here: --mixed-precision no)"),
        ("bf16", 0.0, "avx2 avx512_bf16", "bf16"),
        ("bf16", 0.0, "asimd", "bf16"),
    ],
)
def test_header_says_the_precision_and_a_faster_one(
    precision: str, gain: float, cpu: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(estimate, "CPUINFO", tmp_path / "cpuinfo")
    estimate.CPUINFO.write_text(f"flags : {cpu}\n")
    monkeypatch.setattr(outlook, "bf16_gain", lambda: gain)
    assert precision_on_cpu(precision) == said


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


def test_cost_of_a_network_whose_layers_take_parameters_as_inputs() -> None:
    """PiT and CaiT hand their class token to a layer, which torch's counter stumbles over."""
    for arch in ("pit_ti_224", "cait_xxs24_224"):
        model = ModelConfig(arch, image_size=64, projection_output_dim=16)
        cost = step_cost(model, crop_sizes=[64, 64], batch_size=2)
        assert cost.flops > 0 and cost.num_bytes > 0
