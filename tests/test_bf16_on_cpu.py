"""Where bf16 is taken on a CPU, and that its gradients are right for small images."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from harness import bf16_on_cpu, flags, outlook
from harness.bf16_on_cpu import bf16_gain, pad_small_images
from harness.flags import default_precision
from harness.outlook import precision_on_cpu
from models import get_backbone


@pytest.mark.parametrize("arithmetic", ["amx_bf16 amx_tile", "avx512_bf16"])
def test_bf16_is_measured_where_the_cpu_has_arithmetic_for_it(
    arithmetic: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bf16_on_cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert bf16_gain() == 0
    bf16_on_cpu.CPUINFO.write_text("flags : sse avx2\n")
    assert bf16_gain() == 0
    bf16_on_cpu.CPUINFO.write_text(f"flags : sse avx2 {arithmetic}\n")
    assert 0.001 < bf16_gain(rounds=2) < 100


@pytest.mark.parametrize("size", [16, 1])
def test_bf16_is_not_taken_where_a_gradient_of_it_is_not_finite(
    size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bf16_on_cpu, "CPUINFO", tmp_path / "cpuinfo")
    bf16_on_cpu.CPUINFO.write_text("flags : sse avx2 amx_bf16 amx_tile\n")
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
        (
            "no",
            2.2,
            "avx2 amx_bf16",
            "float32 (convolutions 2.2 x as fast: --mixed-precision bf16)",
        ),
        (
            "bf16",
            2.2,
            "avx2 amx_bf16",
            "bf16 (convolutions 2.2 x as fast as in float32, --mixed-precision no)",
        ),
        ("bf16", 0.0, "avx2", "bf16 (float32 is faster here: --mixed-precision no)"),
        ("bf16", 0.0, "avx2 avx512_bf16", "bf16"),
        ("bf16", 0.0, "asimd", "bf16"),
    ],
)
def test_header_says_the_precision_and_a_faster_one(
    precision: str, gain: float, cpu: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(bf16_on_cpu, "CPUINFO", tmp_path / "cpuinfo")
    bf16_on_cpu.CPUINFO.write_text(f"flags : {cpu}\n")
    monkeypatch.setattr(outlook, "bf16_gain", lambda: gain)
    assert precision_on_cpu(precision) == said


KERNELS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 4, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": (5, 3), "stride": (1, 2), "padding": (2, 1)},
    {"kernel_size": 7, "stride": 2, "padding": 3, "groups": 16},
    {"kernel_size": 1, "stride": 2, "bias": False},
]


def _results(convolution: nn.Conv2d, images: Tensor) -> list[Tensor]:
    """Return a convolution's output, and gradients of images, weight and bias."""
    convolution.zero_grad()
    images = images.clone().requires_grad_()
    output = convolution(images)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return [output, images.grad, *(param.grad for param in convolution.parameters())]


@pytest.mark.parametrize("options", KERNELS)
@pytest.mark.parametrize("height", [1, 2, 3, 6, 12])
def test_padded_images_give_the_same_convolution(options: dict, height: int) -> None:
    """Exact in float32, as it is after half the weights met padding alone."""
    convolution = nn.Conv2d(16, 16, **options).double()
    images = torch.randn(3, 16, height, 5).double()
    expected = _results(convolution, images)
    pad_small_images(convolution)
    assert type(convolution) is not nn.Conv2d
    for mine, plain in zip(_results(convolution, images), expected, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bf16_gradients_of_small_images_are_those_of_float32(size: int) -> None:
    """Among freed memory full of NaN: on some CPUs torch's own gradient holds what was there."""
    convolution = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
    pad_small_images(convolution)
    images = torch.randn(64, 64, size, size).to(memory_format=torch.channels_last)
    expected = _results(convolution, images)
    for _ in range(5):
        spoilt = [torch.full((1 << power,), torch.nan) for power in range(8, 20)]
        del spoilt
        with torch.autocast("cpu", torch.bfloat16):
            results = _results(convolution, images)
        for mine, exact in zip(results, expected, strict=True):
            assert (mine.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_networks_keep_their_names_and_features(tmp_path: Path) -> None:
    network = get_backbone("resnet10t").eval()
    images = torch.randn(2, 3, 40, 40)
    names, features = list(network.state_dict()), network(images)
    pad_small_images(network)
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(images), features)


def test_convolutions_that_are_right_already_stay_as_they_are() -> None:
    """Of stride 1, padded by reflection, or padded by their size."""
    convolutions = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, 2, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 7, padding="same"),
    )
    pad_small_images(convolutions)
    assert all(type(module) is nn.Conv2d for module in convolutions)
