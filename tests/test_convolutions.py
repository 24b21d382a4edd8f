"""Weight gradients by matrix products: equal to autograd's, and taken where they are faster."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import read_log
from torch import Tensor, nn
from torch.nn import functional as F

import dino_train
from config import Config, RunConfig
from harness import bf16_on_cpu, convolutions
from harness.bf16_on_cpu import pad_small_images
from harness.convolutions import multiply_for_weight_gradients, weight_gradient
from models import ModelConfig, get_backbone

Shapes = list[tuple[int, ...]]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Return a list that gets the shapes of images whose weight gradient is a product."""
    shapes: Shapes = []

    def spied(images: Tensor, *others: object) -> Tensor:
        shapes.append(tuple(images.shape))
        return weight_gradient(images, *others)

    monkeypatch.setattr(convolutions, "weight_gradient", spied)
    return shapes


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((1, 1), (1, 1), (0, 0)),
        ((1, 1), (2, 2), (0, 0)),
        ((3, 3), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1)),
        ((3, 3), (1, 1), (0, 0)),
        ((2, 2), (2, 2), (0, 0)),
        ((7, 7), (2, 2), (3, 3)),
        ((3, 1), (1, 3), (2, 0)),
        ((4, 3), (5, 2), (3, 1)),
    ],
)
def test_weight_gradient_is_autograds(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    """In float64, for images of 1 to 9 px, in the layout of the weight."""
    for height, width in itertools.product((1, 2, 3, 6, 9), repeat=2):
        if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
            continue  # smaller than the kernel
        images = torch.randn(3, 5, height, width).double()
        weight = torch.randn(4, 5, *kernel).double().requires_grad_()
        output = F.conv2d(images, weight, None, stride, padding)
        output_grad = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, weight, output_grad)
        for of_images, of_weight in itertools.product(LAYOUTS, repeat=2):
            laid_out = weight.detach().to(memory_format=of_weight)
            gradient = weight_gradient(
                images.to(memory_format=of_images), laid_out, output_grad, stride, padding
            )
            torch.testing.assert_close(gradient, expected)
            assert gradient.stride() == laid_out.stride()


def _gradients(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.clone().requires_grad_()
    network.zero_grad()
    network(images).square().sum().backward()
    return {"images": images.grad, **{k: p.grad for k, p in network.named_parameters()}}


@pytest.mark.parametrize("size", [16, 40])
def test_network_has_the_same_outputs_and_gradients(size: int, multiplied: Shapes) -> None:
    network = get_backbone("resnet10t").to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's zeros would make most gradients zero
    images = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last)
    names, features = list(network.state_dict()), network(images)
    expected = _gradients(network, images)
    assert not multiplied
    multiply_for_weight_gradients(network)
    assert list(network.state_dict()) == names
    assert torch.equal(network(images), features)
    for name, gradient in _gradients(network, images).items():
        norm = expected[name].norm()
        assert norm > 0, name
        assert (gradient - expected[name]).norm() < 1e-4 * norm, name
    assert multiplied


def test_what_needs_no_gradient_takes_no_time(
    multiplied: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training begins with images that need none; weights of frozen layers need none."""
    of_images: list[Tensor] = []
    images_gradient = convolutions._images_gradient

    def spied(*args: object) -> Tensor:
        of_images.append(images_gradient(*args))
        return of_images[-1]

    monkeypatch.setattr(convolutions, "_images_gradient", spied)
    convolution = nn.Conv2d(128, 4, 3, padding=1, bias=False)
    multiply_for_weight_gradients(convolution)
    images = torch.randn(2, 128, 3, 3)
    convolution(images).sum().backward()
    assert (len(multiplied), len(of_images)) == (1, 0)
    convolution.requires_grad_(False)
    convolution(images.requires_grad_()).sum().backward()
    assert (len(multiplied), len(of_images)) == (1, 1)
    assert torch.equal(images.grad, of_images[0])


# ---------------------------------------------------------------- where they are taken


@pytest.mark.parametrize(
    ("channels", "least", "most"),
    [(63, 0, 0), (64, 1, 2), (127, 1, 3), (128, 1, 4), (255, 1, 7), (256, 1, 8)],
)
def test_many_channels_for_the_outputs_size_take_products(
    channels: int, least: int, most: int, multiplied: Shapes
) -> None:
    """Outputs of `least` to `most` px do, by their longer side."""
    convolution = nn.Conv2d(channels, 4, 3, 2, 1, bias=False)
    multiply_for_weight_gradients(convolution)
    for size in range(1, 11):
        _gradients(convolution, torch.randn(1, channels, 2, 2 * size))
    expected = [(1, channels, 2, 2 * size) for size in range(1, 11) if least <= size <= most]
    assert multiplied == expected


def test_images_smaller_than_stride_or_padding_take_products(multiplied: Shapes) -> None:
    """Of these, oneDNN's bf16 gradients are wrong."""
    convolution = nn.Conv2d(4, 4, 3, 2, 1, bias=False)
    multiply_for_weight_gradients(convolution)
    for height, width in ((1, 1), (1, 9), (9, 1), (2, 2)):
        _gradients(convolution, torch.randn(1, 4, height, width))
    assert multiplied == [(1, 4, 1, 1), (1, 4, 1, 9), (1, 4, 9, 1)]


def test_other_precisions_take_none(multiplied: Shapes) -> None:
    convolution = nn.Conv2d(64, 4, 3, bias=False)
    multiply_for_weight_gradients(convolution)
    images = torch.randn(1, 64, 3, 3)
    with torch.autocast("cpu", torch.float16):
        convolution(images).sum().backward()
    convolution.double()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
        assert convolution(images.double()).dtype == torch.float64
    _gradients(convolution, images.double())
    assert not multiplied


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_bf16_gradients_are_those_of_float32_but_for_rounding(
    size: int, multiplied: Shapes
) -> None:
    """Among freed memory full of NaN, which oneDNN's gradients of small images show."""
    convolution = nn.Conv2d(128, 96, 3, stride=2, padding=1, bias=False)
    images = torch.randn(64, 128, size, size).to(memory_format=torch.channels_last)
    expected = _gradients(convolution, images)
    multiply_for_weight_gradients(convolution)
    for _ in range(5):
        spoilt = [torch.full((1 << power,), torch.nan) for power in range(8, 20)]
        del spoilt
        with torch.autocast("cpu", torch.bfloat16):
            gradients = _gradients(convolution, images)
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert (gradient - expected[name]).norm() < 0.01 * expected[name].norm(), name
    assert len(multiplied) == 5


def test_one_weight_for_crops_of_two_sizes_has_the_sum_of_both_gradients() -> None:
    """Of which one is a product and one is not, in float32 and in bf16."""
    convolution = nn.Conv2d(64, 8, 3, padding=1, bias=False)
    crops = [torch.randn(4, 64, 5, 5), torch.randn(4, 64, 2, 2)]
    expected = sum(_gradients(convolution, images)["weight"] for images in crops)
    multiply_for_weight_gradients(convolution)
    for precision, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        convolution.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = sum(convolution(images).square().sum() for images in crops)
        loss.backward()
        difference = (convolution.weight.grad - expected).norm()
        assert difference < tolerance * expected.norm()


def test_convolutions_of_another_kind_stay_as_they_are() -> None:
    others = nn.Sequential(
        nn.Conv2d(4, 4, 3),  # with bias
        nn.Conv2d(4, 4, 3, bias=False, groups=2),
        nn.Conv2d(4, 4, 3, bias=False, dilation=2),
        nn.Conv2d(4, 4, 3, bias=False, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, bias=False, padding="same"),
    )
    multiply_for_weight_gradients(others)
    assert all(type(module) is nn.Conv2d for module in others)


def _cpu_with(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


MULTIPLYING = convolutions._MultiplyingConv2d


@pytest.mark.parametrize(
    ("capability", "precision", "compiles", "kind"),
    [
        ("AVX2", "no", False, MULTIPLYING),
        ("AVX2", "bf16", False, MULTIPLYING),
        ("AVX512", "no", False, MULTIPLYING),
        ("AVX512", "bf16", False, MULTIPLYING),
        ("DEFAULT", "no", False, nn.Conv2d),
        ("DEFAULT", "bf16", False, bf16_on_cpu._PaddedConv2d),
        ("AVX512", "no", True, nn.Conv2d),
        ("AVX512", "bf16", True, bf16_on_cpu._PaddedConv2d),
    ],
)
def test_students_convolutions_suit_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capability: str, precision: str, compiles: bool, kind: type
) -> None:
    _cpu_with(capability, monkeypatch)
    monkeypatch.setattr(dino_train, "has_compiler", lambda: True)
    monkeypatch.setattr(Accelerator, "mixed_precision", precision)
    model = ModelConfig(arch="resnet10t", projection_output_dim=16)
    config = Config(model=model, run=RunConfig(compile=compiles))
    system, _ = dino_train.build_networks(config, Accelerator(cpu=True))
    assert type(system.student.backbone.layer1[0].conv1) is kind
    assert type(system.teacher.backbone.layer1[0].conv1) is nn.Conv2d


def test_convolutions_that_do_not_multiply_are_padded() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=2))
    multiply_for_weight_gradients(network)
    pad_small_images(network)
    assert [type(module) for module in network] == [MULTIPLYING, bf16_on_cpu._PaddedConv2d]


def test_training_is_the_same_with_and_without(
    script: Callable,
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    multiplied: Shapes,
) -> None:
    losses = {}
    for capability in ("DEFAULT", "AVX2"):
        assert not multiplied
        _cpu_with(capability, monkeypatch)
        result = script("dino_train", *tiny_flags, "--output-dir", tmp_path / capability)
        assert result.returncode == 0, result.stderr
        rows = read_log(tmp_path / capability)
        losses[capability] = torch.tensor([row["loss"] for row in rows if "loss" in row])
    assert multiplied
    torch.testing.assert_close(losses["AVX2"], losses["DEFAULT"], rtol=1e-3, atol=1e-3)
