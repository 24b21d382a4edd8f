import copy

import pytest
import torch
from torch import nn

from fast_backbone import convolve_linear, skip_unread_tokens
from models import get_backbone


@pytest.mark.parametrize(
    "arch", ["dino_vits16", pytest.param("vit_base_patch14_dinov2", marks=pytest.mark.slow)]
)
def test_last_block_for_the_class_token_alone_is_exact(arch: str) -> None:
    patch = 14 if "14" in arch else 16
    backbone = get_backbone(arch, image_size=4 * patch, drop_path_rate=0.1)
    images = torch.randn(2, 3, 4 * patch, 4 * patch)
    results = []
    for skips in (False, True):
        assert not skips or skip_unread_tokens(backbone)
        torch.manual_seed(1)
        features = backbone.train()(images)
        grads = torch.autograd.grad(features.square().sum(), list(backbone.parameters()))
        results.append([features, *grads])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    copied = copy.deepcopy(backbone)
    copied.load_state_dict(get_backbone(arch, image_size=4 * patch).state_dict())


@pytest.mark.parametrize(
    "arch",
    ["resnet18", "convnext_atto", "vit_base_patch16_siglip_224", "deit_tiny_distilled_patch16_224"],
)
def test_other_networks_are_left_as_they_are(arch: str) -> None:
    backbone = get_backbone(arch)
    assert not skip_unread_tokens(backbone)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 4, 5), (2, 3, 4, 5), (0, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_as_convolution_equals_the_plain_product(
    shape: tuple[int, ...], has_bias: bool
) -> None:
    layer = nn.Sequential(nn.Linear(5, 7, bias=has_bias))
    tokens = torch.randn(shape, requires_grad=True)
    direction = torch.randn(*shape[:-1], 7)
    wanted = layer.double()(tokens.double())
    inputs = [tokens, *layer.parameters()]
    wanted_grads = torch.autograd.grad((wanted * direction).sum(), inputs)
    convolve_linear(layer.float())
    mine = layer(tokens)
    grads = torch.autograd.grad((mine * direction).sum(), [tokens, *layer.parameters()])
    torch.testing.assert_close(mine, wanted.float(), rtol=1e-5, atol=1e-6)
    for grad, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, other.float(), rtol=1e-5, atol=1e-6)


def test_convolved_backbone_keeps_its_names_and_values_and_is_really_convolved() -> None:
    backbone = get_backbone("vit_tiny_patch16_224", image_size=32).train()
    images = torch.randn(3, 3, 32, 32)
    wanted, names = backbone(images), backbone.state_dict().keys()
    convolve_linear(backbone)
    with torch.profiler.profile() as profile:
        features = backbone(images)
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
    assert backbone.state_dict().keys() == names
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::conv2d"] == 1 + 4 * 12 and "aten::addmm" not in calls
    torch.testing.assert_close(copy.deepcopy(backbone)(images), features, rtol=0, atol=0)


def test_other_precisions_take_the_plain_product() -> None:
    layer = nn.Sequential(nn.Linear(5, 7))
    convolve_linear(layer)
    tokens = torch.randn(3, 5)
    with torch.profiler.profile() as profile:
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(tokens).dtype == torch.bfloat16
        layer.double()(tokens.double())
    assert "aten::conv2d" not in {event.key for event in profile.key_averages()}
