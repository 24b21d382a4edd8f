import itertools

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from harness.feature_maps import (
    PCA,
    class_attention,
    feature_map,
    fit_patches,
    has_class_attention,
    mass_mask,
    patch_map,
)
from models import get_backbone

pytestmark = pytest.mark.slow  # seconds as a whole


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),  # a second prefix token
        ("vit_little_patch16_reg4_gap_256", None),  # no class token: pools its patches
    ],
)
def test_attention_is_what_the_block_computes(name: str, prefix: int | None) -> None:
    backbone = get_backbone(name, patch_size=8, image_size=32).eval()
    assert has_class_attention(backbone) == (prefix is not None)
    if prefix is None:
        return
    images = torch.randn(2, 3, 24, 40)
    ours = class_attention(backbone, images)
    seen = []
    attention = backbone.blocks[-1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda *call: seen.append(call[1][0]))
    with torch.no_grad():
        backbone(images)
    torch.testing.assert_close(ours, seen[0][:, :, 0])
    torch.testing.assert_close(ours.sum(dim=-1), torch.ones(2, 3))
    grid = patch_map(ours, backbone, images)
    assert grid.shape == (2, 3, 3, 5)
    torch.testing.assert_close(grid[..., 1, 2], ours[..., prefix + 7])


def test_attention_with_normed_queries_and_keys() -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", qk_norm=True, img_size=32, depth=2).eval()
    for norm in (backbone.blocks[-1].attn.q_norm, backbone.blocks[-1].attn.k_norm):
        nn.init.normal_(norm.weight)
    attention, images, seen = backbone.blocks[-1].attn, torch.randn(1, 3, 32, 32), []
    ours = class_attention(backbone, images)
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda *call: seen.append(call[1][0]))
    backbone(images)
    torch.testing.assert_close(ours, seen[0][:, :, 0])


@pytest.mark.parametrize("mass", [0.01, 0.6, 0.95, 1.0])
def test_mask_keeps_the_fewest_patches_with_the_mass(mass: float) -> None:
    attention = torch.rand(3, 3, dtype=torch.float64) ** 4
    mask, shares = mass_mask(attention, mass), (attention / attention.sum()).flatten()
    fewest = next(
        num
        for num in range(1, 10)
        if any(sum(x) >= mass - 1e-9 for x in itertools.combinations(shares.tolist(), num))
    )
    assert mask.sum() == fewest
    assert shares[mask.flatten()].sum() >= mass - 1e-9


def test_components_are_those_of_the_singular_value_decomposition() -> None:
    vectors = torch.randn(200, 12) * torch.arange(1.0, 13)
    pca = PCA.fit(vectors, 3)
    _, values, axes = torch.linalg.svd((vectors - vectors.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(
        (pca.axes.double() @ axes[:3].T).abs(), torch.eye(3).double(), atol=1e-5, rtol=0
    )
    shares = values.square() / values.square().sum()
    assert pca.shares == pytest.approx(shares[:3].tolist())
    assert (pca.axes.gather(1, pca.axes.abs().argmax(1, keepdim=True)) > 0).all()
    again = PCA.fit(vectors.flip(0), 3)
    torch.testing.assert_close(again.axes, pca.axes)


def test_colours_are_common_to_all_images() -> None:
    maps = [torch.randn(6, 4, 5), 3 + torch.randn(6, 2, 3)]
    pca = PCA.of_maps(maps)
    joined = torch.cat([x.flatten(1) for x in maps], dim=1)[:, None]
    alone = np.concatenate([pca.colours(x).reshape(-1, 3) for x in maps])
    np.testing.assert_array_equal(PCA.of_maps([joined]).colours(joined)[0], alone)
    assert alone.min() == 0 and alone.max() == 255
    # by itself, the second has the whole range of colours; beside the first it has not
    assert PCA.of_maps(maps[1:]).colours(maps[1]).std() > pca.colours(maps[1]).std()


def test_colours_of_one_cell_are_finite() -> None:
    one = torch.randn(6, 1, 1)
    assert PCA.of_maps([one]).colours(one).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("arch", "size", "shape"),
    [
        ("resnet10_half", 32, (256, 4, 8)),
        ("resnet18", 224, (512, 2, 4)),
        ("vit_tiny_patch16_224", 64, (192, 4, 8)),
        ("convnext_atto", None, (320, 2, 4)),
        ("swin_tiny_patch4_window7_224", None, (768, 2, 4)),  # its map is (h, w, d)
    ],
)
def test_feature_maps_pool_to_the_features(arch: str, size: int | None, shape: tuple) -> None:
    backbone = get_backbone(arch, image_size=size if "net" in arch or "vit" in arch else None)
    images = torch.randn(2, 3, shape[1] * 32, shape[2] * 32)
    if arch == "resnet10_half":
        images = images[:, :, :32, :64]
    if arch.startswith("vit"):
        images = images[:, :, :64, :128]
    backbone.eval()
    features = feature_map(backbone, images)
    assert features.shape == (2, *shape)
    if arch.startswith("vit"):
        tokens = backbone.forward_features(images)
        torch.testing.assert_close(features[:, :, 1, 3], tokens[:, 1 + 8 + 3])
    elif arch != "convnext_atto":  # which normalises after pooling
        torch.testing.assert_close(
            features.mean(dim=(2, 3)), backbone(images), atol=1e-5, rtol=1e-4
        )


def test_unknown_layout_is_named() -> None:
    class Odd(nn.Module):
        num_features, patch_size = 5, 1

        def forward_features(self, images: Tensor) -> Tensor:
            return images

    with pytest.raises(ValueError, match=r"5 channels, got shape \(1, 3, 8, 8\)"):
        feature_map(Odd(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("shape", "size", "patch", "expected"),
    [
        ((100, 200), 64, 16, (64, 128)),
        ((200, 100), 60, 16, (128, 64)),
        ((10, 10), 3, 8, (8, 8)),
        ((333, 500), 480, 16, (480, 720)),
        ((10, 1000), 32, 1, (32, 256)),  # a strip, cut
    ],
)
def test_aspect_is_kept(shape: tuple, size: int, patch: int, expected: tuple) -> None:
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    assert fit_patches(image, size, patch).shape[1:] == expected
