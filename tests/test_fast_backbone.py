import copy

import pytest
import torch

from harness.fast_backbone import DropPath, share_drop_path, skip_unread_tokens
from models import get_backbone


@pytest.mark.parametrize(
    "arch", ["dino_vits16", pytest.param("vit_small_patch14_dinov2", marks=pytest.mark.slow)]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    ["resnet18", "convnext_atto", "vit_base_patch16_siglip_224", "deit_tiny_distilled_patch16_224"],
)
def test_other_networks_are_left_as_they_are(arch: str) -> None:
    backbone = get_backbone(arch)
    assert not skip_unread_tokens(backbone)


def test_drop_path_leaves_out_a_share_of_samples_and_scales_the_rest() -> None:
    branch = torch.randn(20_000, 3, 2)
    layer = DropPath(0.3)
    dropped = layer(branch)
    is_left_out = (dropped == 0).flatten(1).all(dim=1)
    assert is_left_out.float().mean().item() == pytest.approx(0.3, abs=0.015)
    torch.testing.assert_close(dropped[~is_left_out], branch[~is_left_out] / 0.7)
    assert torch.equal(layer.eval()(branch), branch)
    assert torch.equal(DropPath(0.0)(branch), branch)
    assert not layer.state_dict()


def test_drop_path_rates_rise_along_the_depth_as_timms() -> None:
    vit = get_backbone("vit_tiny_patch16_224", drop_path_rate=0.2, image_size=32)
    share_drop_path(vit)
    rates = [block.drop_path2.drop_prob for block in vit.blocks]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert all(isinstance(block.drop_path1, DropPath) for block in vit.blocks)


def test_network_without_drop_path_keeps_its_identities() -> None:
    vit = get_backbone("vit_tiny_patch16_224", image_size=32)
    share_drop_path(vit)
    assert not any(isinstance(module, DropPath) for module in vit.modules())
