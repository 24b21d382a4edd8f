import itertools

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from harness.feature_maps import (
    PCA,
    chosen_side,
    class_attention,
    feature_map,
    fit_patches,
    mass_mask,
    patch_map,
    resize_to_patches,
    sizes_named,
    usual_side,
    why_no_class_attention,
)
from models import get_backbone

pytestmark = pytest.mark.slow  # seconds as a whole


def test_a_wrong_size_is_named_and_what_the_machine_lacks_is_not_taken_for_one() -> None:
    images = torch.zeros(1, 3, 30, 40)
    said = "no features of net at 30 x 40 px: too small"
    with pytest.raises(ValueError, match=said), sizes_named("net", images):
        raise RuntimeError("too small")
    for error in (
        torch.OutOfMemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ):
        with pytest.raises(type(error), match=str(error)), sizes_named("net", images):
            raise error


SMALL = {"depth": 2, "num_classes": 0}
NARROW = SMALL | {"embed_dim": 48, "num_heads": 3}
# a network of each kind of attention, its options, its prefix tokens
ATTENTIONS = [
    ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}, 1),
    ("vit_tiny_patch16_224", {"img_size": 32, "qk_norm": True}, 1),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 5),  # registers
    ("deit_tiny_distilled_patch16_224", {"img_size": 32}, 2),
    ("vit_small_patch16_dinov3", {"img_size": 32}, 5),  # registers, rotary positions
    ("eva02_tiny_patch14_224", {"img_size": 56}, 1),  # queries, keys and values apart
    ("eva_giant_patch14_224", {"img_size": 56}, 1),
    ("vit_small_patch16_rope_224", {"img_size": 32}, 1),
    ("beit_base_patch16_224", {"img_size": 32}, 1),  # bias by the relative position
    ("vit_relpos_base_patch16_cls_224", {"img_size": 32}, 1),
    ("cait_xxs24_224", {"img_size": 32}, 1),  # attention of the class token alone
    ("xcit_nano_12_p16_224", {"img_size": 32}, 1),
]


@pytest.mark.parametrize(("name", "options", "num_prefix"), ATTENTIONS)
def test_attention_is_what_the_block_computes(name: str, options: dict, num_prefix: int) -> None:
    width = 64 if "dinov3" in name or "rope" in name else 48
    backbone = timm.create_model(name, **NARROW | options | {"embed_dim": width, "num_heads": 2})
    backbone.eval().patch_size = 8 if options.get("patch_size") else 14 if "14" in name else 16
    for parameter_name, parameter in backbone.named_parameters():  # zeros and ones would hide much
        if "norm" in parameter_name or "bias" in parameter_name:
            nn.init.normal_(parameter)
    assert why_no_class_attention(backbone) == ""
    images = torch.randn(2, 3, options["img_size"], options["img_size"])
    ours = class_attention(backbone, images)
    blocks = ("cls_attn_blocks", "blocks_token_only", "blocks")
    attention = next(getattr(backbone, x) for x in blocks if hasattr(backbone, x))[-1].attn
    assert attention.fused_attn  # as it was
    seen: list[Tensor] = []
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda *call: seen.append(call[1][0]))
    with torch.no_grad():
        backbone(images)
    torch.testing.assert_close(ours, seen[0][:, :, 0])
    torch.testing.assert_close(ours.sum(dim=-1), torch.ones(2, 2))
    assert ours.std() > 1e-4  # not the same everywhere
    side = options["img_size"] // backbone.patch_size
    grid = patch_map(ours, backbone, images)
    assert grid.shape == (2, 2, side, side)
    torch.testing.assert_close(grid[..., 1, 0], ours[..., num_prefix + side])
    torch.testing.assert_close(class_attention(backbone, images), ours)  # fused or not


def test_attention_of_images_that_are_no_squares() -> None:
    for name, size in (("vit_tiny_patch16_224", None), ("vit_small_patch16_dinov3", 64)):
        backbone = get_backbone(name, image_size=size).eval()
        images = torch.randn(1, 3, 48, 80)
        ours, seen = class_attention(backbone, images), []
        attention = backbone.blocks[-1].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(lambda *call, seen=seen: seen.append(call[1][0]))
        backbone(images)
        torch.testing.assert_close(ours, seen[0][:, :, 0])
        assert patch_map(ours, backbone, images).shape[2:] == (3, 5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_little_patch16_reg4_gap_256", "has no class token"),  # pools its patches
        ("swin_tiny_patch4_window7_224", "has no class token"),
        ("convnext_atto", "has no class token"),
        ("resnet18", "has no class token"),
        ("volo_d1_224", "has a class token, but no last block whose attention could be read"),
        ("vit_dlittle_patch16_reg1_gap_256", "has no class token"),
        ("convit_tiny", "has attention of another kind in its last block: MHSA"),
    ],
)
def test_why_there_is_no_attention_is_said(name: str, said: str) -> None:
    with torch.device("meta"):
        backbone = timm.create_model(name)
    assert why_no_class_attention(backbone) == said


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


@pytest.mark.parametrize(
    ("shape", "size", "patch", "multiple", "expected"),
    [
        ((480, 854), 480, 16, 4, (480, 832)),  # as the paper has DAVIS
        ((854, 480), 480, 8, 8, (832, 480)),
        ((500, 375), 480, 16, 1, (640, 480)),
        ((30, 30), 50, 16, 4, (48, 48)),
        ((100, 20), 3, 8, 1, (40, 8)),
    ],
)
def test_whole_image_is_resized_to_whole_patches(
    shape: tuple, size: int, patch: int, multiple: int, expected: tuple
) -> None:
    backbone = nn.Module()
    backbone.patch_size = patch
    ramp = torch.arange(shape[1]) * 255 // (shape[1] - 1)
    image = ramp.byte().expand(3, *shape)
    resized = resize_to_patches(image, size, backbone, multiple)
    assert resized.shape[1:] == expected
    assert resized[0, 0, 0] < 40 and resized[0, 0, -1] > 215  # nothing is cut


def test_side_is_of_whole_patches() -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **NARROW).eval()
    backbone.patch_size = 16
    assert [chosen_side(backbone, 224, given) for given in (None, 100, 7)] == [480, 96, 16]


def test_network_of_one_size_gets_that() -> None:
    backbone = timm.create_model("cait_xxs24_224", img_size=64, **NARROW).eval()
    backbone.patch_size = 16
    assert usual_side(backbone, 224) == chosen_side(backbone, 224, 64) == 64
    image = torch.zeros(3, 30, 90, dtype=torch.uint8)
    assert resize_to_patches(image, 64, backbone).shape == (3, 64, 64)
    with pytest.raises(ValueError, match="need --size 64, as the network takes no other, got 480"):
        chosen_side(backbone, 224, 480)
