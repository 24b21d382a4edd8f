"""Weight gradients by matrix products: equal to autograd's, and taken where they are faster."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

import dino_train
from config import Config, RunConfig
from harness import convolutions
from harness.convolutions import multiply_for_weight_gradients, weight_gradient
from models import ModelConfig, get_backbone

KERNELS = [
    {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0)},
    {"kernel": (1, 1), "stride": (2, 2), "padding": (0, 0)},
    {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1)},
    {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    {"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0)},
    {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)},
    {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    {"kernel": (3, 1), "stride": (1, 3), "padding": (2, 0)},
    {"kernel": (4, 3), "stride": (5, 2), "padding": (3, 1)},
]


@pytest.mark.parametrize("options", KERNELS)
def test_gradient_is_autograds(options: dict) -> None:
    """In float64, for images of 1 to 9 px, in both layouts."""
    kernel, stride, padding = options.values()
    for height, width in itertools.product((1, 2, 3, 6, 9), repeat=2):
        if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
            continue  # smaller than the kernel
        images = torch.randn(3, 5, height, width).double()
        weight = torch.randn(4, 5, *kernel).double().requires_grad_()
        output = F.conv2d(images, weight, None, stride, padding)
        output_grad = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, weight, output_grad)
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = [tensor.to(memory_format=layout) for tensor in (images, output_grad)]
            gradient = weight_gradient(*laid_out, kernel, stride, padding)
            torch.testing.assert_close(gradient, expected)
            assert gradient.is_contiguous(memory_format=torch.channels_last)


def _gradients(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.clone().requires_grad_()
    network.zero_grad()
    network(images).square().sum().backward()
    return {"images": images.grad, **{k: p.grad for k, p in network.named_parameters()}}


@pytest.mark.parametrize("size", [16, 40])
def test_network_has_the_same_outputs_and_gradients(size: int) -> None:
    network = get_backbone("resnet10t").to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last)
    names, features = list(network.state_dict()), network(images)
    expected = _gradients(network, images)
    multiply_for_weight_gradients(network)
    assert list(network.state_dict()) == names
    assert torch.equal(network(images), features)
    for name, gradient in _gradients(network, images).items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-5 * expected[name].norm(), name  # some are 0 at the start


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes of the images whose weight gradient was a product."""
    shapes: list[tuple[int, ...]] = []

    def spied(images: Tensor, *others: object) -> Tensor:
        shapes.append(tuple(images.shape))
        return weight_gradient(images, *others)

    monkeypatch.setattr(convolutions, "weight_gradient", spied)
    return shapes


def test_small_outputs_and_many_channels_take_products(multiplied: list) -> None:
    few = nn.Conv2d(8, 4, 3, 2, 1, bias=False)
    many = nn.Conv2d(256, 4, 3, 2, 1, bias=False)
    for convolution in (few, many):
        multiply_for_weight_gradients(convolution)
        for size in (6, 7):  # of 3 and 4 px output
            _gradients(convolution, torch.randn(1, convolution.in_channels, size, size))
    _gradients(few, torch.randn(1, 8, 6, 7))
    _gradients(few.double(), torch.randn(1, 8, 6, 6).double())  # which is not oneDNN's
    assert multiplied == [(1, 8, 6, 6), (1, 256, 6, 6), (1, 256, 7, 7)]


def test_frozen_weights_and_images_get_no_gradient(multiplied: list) -> None:
    convolution = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    multiply_for_weight_gradients(convolution)
    convolution(torch.randn(2, 4, 3, 3)).sum().backward()
    assert len(multiplied) == 1
    convolution.requires_grad_(False)
    images = torch.randn(2, 4, 3, 3, requires_grad=True)
    convolution(images).sum().backward()
    assert images.grad is not None
    assert len(multiplied) == 1


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


@pytest.mark.parametrize(
    ("capability", "precision", "compiles", "is_taken"),
    [
        ("AVX2", "no", False, True),
        ("AVX512", "no", False, False),
        ("DEFAULT", "no", False, False),
        ("AVX2", "bf16", False, False),
        ("AVX2", "no", True, False),
    ],
)
def test_training_takes_products_in_float32_without_avx512(
    monkeypatch: pytest.MonkeyPatch,
    multiplied: list,
    capability: str,
    precision: str,
    compiles: bool,
    is_taken: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(dino_train, "has_compiler", lambda: compiles)
    model = ModelConfig(arch="resnet10t", projection_output_dim=16)
    config = Config(model=model, run=RunConfig(compile=True))
    monkeypatch.setattr(Accelerator, "mixed_precision", precision)
    system, _ = dino_train.build_networks(config, Accelerator(cpu=True))
    kinds = {type(module) for module in system.student.backbone.modules()}
    assert (convolutions._MultiplyingConv2d in kinds) is is_taken
    assert convolutions._MultiplyingConv2d not in {type(m) for m in system.teacher.modules()}
