import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from data import CropConfig, draw_patterns, resolve_crop_sizes
from models import DinoModel, ModelConfig, get_backbone, save_checkpoint
from visualize import (
    PCA,
    VisualizeConfig,
    class_attention,
    clipped,
    draw_pictures,
    feature_map,
    fit_patches,
    mass_mask,
    patch_map,
    sheet,
)

pytestmark = pytest.mark.slow  # seconds as a whole


def write_checkpoint(path: Path, arch: str, size: int = 32, patch_size: int | None = None) -> Path:
    """Write a random network as a run on small images leaves it."""
    head = {"projection_hidden_dim": 8, "projection_bottleneck_dim": 8, "projection_output_dim": 8}
    config = ModelConfig(arch, patch_size=patch_size, image_size=size, **head)
    model = DinoModel.from_config(config)
    crops = resolve_crop_sizes(CropConfig(num_local_crops=2), size, model.backbone.patch_size)
    data = {"data": "patterns", "canvas_size": size, "eval_resize": size}
    sections = {"model": config, "crops": crops}
    sections = {name: dataclasses.asdict(section) for name, section in sections.items()}
    save_checkpoint(path, model, {"config": sections | {"data": data}})
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    return write_checkpoint(folder / "ckpt.safetensors", "vit_tiny_patch16_224", patch_size=8)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of 96 x 48 px."""
    image = torch.cat(list(draw_patterns(torch.tensor([12, 25]))), dim=2)
    path = tmp_path_factory.mktemp("photo") / "wide.png"
    TF.to_pil_image(image).save(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),  # a second prefix token
        ("vit_little_patch16_reg4_gap_256", None),  # no class token: pools its patches
    ],
)
def test_attention_is_what_the_block_computes(name: str, prefix: int | None) -> None:
    from visualize import has_class_attention

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
    torch.testing.assert_close((pca.axes.double() @ axes[:3].T).abs(), torch.eye(3).double(),
                               atol=1e-5, rtol=0)  # fmt: skip
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


def test_text_is_shortened_to_its_width() -> None:
    font = ImageFont.load_default(14)
    assert clipped("cat", font, 100) == "cat"
    short = clipped("a name that is far too long\nfor this", font, 100)
    assert short.endswith("…") and font.getlength(short) <= 100
    assert "a name that is far too long".startswith(short[:-1])
    assert clipped("x" * 9, font, 3) == "…"


def test_sheet_holds_its_pictures() -> None:
    cells = [(Image.new("RGB", (150, 40 + 10 * i), "red"), f"label {i}") for i in range(5)]
    card = np.asarray(sheet("title", cells, 2))
    red = (card == (255, 0, 0)).all(axis=-1)
    assert red.sum() == sum(picture.width * picture.height for picture, _ in cells)
    assert card.shape[1] == 2 * 150 + 3 * 8


def test_a_photo_gives_every_picture_of_its_kind(
    tmp_path: Path, vit: Path, photo: Path, script: Callable
) -> None:
    result = script("visualize", vit, photo, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert names(tmp_path) == ["attention-01-wide.png", "crops.png", "pca.png"]
    assert result.stdout.splitlines()[1:] == [
        str(tmp_path / name) for name in ("attention-01-wide.png", "pca.png", "crops.png")
    ]
    sizes = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes["attention-01-wide.png"] == (3 * 248 + 8, 40 + 2 * (120 + 30))  # 2:1 is kept
    assert sizes["pca.png"] == (2 * 248 + 8, 40 + 150)
    assert sizes["crops.png"] == (5 * 128 + 8, 40 + 150)


def test_a_folder_of_classes_gives_every_picture(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script: Callable
) -> None:
    result = script("visualize", tiny_run / "ckpt.safetensors", image_folder, "--num-images", "2")
    assert result.returncode == 0, result.stderr
    folder = tiny_run / "pictures" / image_folder.name
    assert names(folder) == ["crops.png", "neighbours.png", "pca.png", "scatter.png"]
    assert "2 of 80 images drawn" in result.stdout and "80 of 80 images compared" in result.stdout
    assert all(Image.open(path).convert("RGB").getcolors(1 << 20) for path in folder.iterdir())


def test_neighbours_are_those_of_brute_force(
    monkeypatch: pytest.MonkeyPatch, tiny_run: Path, image_folder: Path
) -> None:
    """A query from the images finds its own copy first; as one of them it is left out."""
    import visualize

    drawn: list = []
    monkeypatch.setattr(visualize, "sheet", lambda *args: drawn.append(args))
    query = image_folder / "stripes" / "7.jpg"
    checkpoint = str(tiny_run / "ckpt.safetensors")
    options = VisualizeConfig(checkpoint, str(image_folder), ("neighbours",), query=str(query))
    draw_pictures(options)
    cells = drawn[0][1]
    assert [label for _, label in cells][:2] == ["7", "1.00 stripes"]
    np.testing.assert_array_equal(np.asarray(cells[0][0]), np.asarray(cells[1][0]))

    network = visualize.Network(checkpoint, None)
    images = visualize.open_images(str(image_folder))
    crops = [network.crop(visualize.data.decode(path)) for path in images.images]
    with torch.no_grad():
        features = network.backbone(visualize.normalized(torch.stack(crops), network.config))
    own = list(images.images).index(str(query).encode())
    similarity = F.cosine_similarity(features[own][None], features).tolist()
    ranked = sorted(range(80), key=lambda row: -similarity[row])
    labels = [f"{similarity[row]:.2f} {visualize.label_of(images, row)}" for row in ranked[:8]]
    assert [label for _, label in cells][1:] == labels

    rows = visualize.spread(images, 80)
    visualize.neighbours_sheet(network, images, rows, F.normalize(features[rows], dim=1), None)
    assert len(drawn[1][1]) == 6 * 9
    for row in range(6):
        query_picture, *others = [
            np.asarray(cell[0]) for cell in drawn[1][1][9 * row : 9 * row + 9]
        ]
        assert not any(np.array_equal(query_picture, other) for other in others)


def frames(folder: Path, num: int) -> Path:
    """Write frames of which frame i has i + 1 white columns; names are not padded."""
    folder.mkdir()
    for i in range(num):
        image = torch.zeros(3, 32, 48, dtype=torch.uint8)
        image[:, :, : i + 1] = 255
        TF.to_pil_image(image).save(folder / f"frame-{i}.png")
    return folder


@pytest.mark.parametrize("kind", [(), ("pca",)])
def test_video_has_every_frame_in_order(
    tmp_path: Path, vit: Path, kind: tuple, script: Callable
) -> None:
    source, flags = frames(tmp_path / "in", 12), ["--kind", *kind] if kind else []
    stem, out = kind[0] if kind else "attention", tmp_path / "out"
    for video in ("gif", "frames"):
        result = script("visualize", vit, source, "--video", video, "--output-dir", out, *flags)
        assert result.returncode == 0, result.stderr
    with Image.open(out / f"{stem}.gif") as gif:
        assert gif.n_frames == 12 and gif.size == (2 * 328 + 8, 213 + 16)
    white = []
    for number in range(1, 13):
        picture = np.asarray(Image.open(out / f"{stem}-frames" / f"{number:06}.png"))
        assert picture.shape == (229, 664, 3)
        white.append((picture[100, 8:328] > 250).all(axis=-1).sum())
    assert white == sorted(set(white))
    result = script("visualize", vit, source, "--video", "frames", "--output-dir", out, *flags)
    assert result.returncode == 2 and "exists: delete it" in result.stderr


def test_unreadable_images_are_left_out_and_said(
    tmp_path: Path, vit: Path, photo: Path, script: Callable
) -> None:
    source, out = frames(tmp_path / "in", 3), tmp_path / "out"
    (source / "broken.jpg").write_text("no image")
    result = script("visualize", vit, source, "--kind", "neighbours", "--output-dir", out)
    assert result.returncode == 0, result.stderr
    assert "left out: cannot decode" in result.stdout and "3 of 4 images" in result.stdout


def test_wrong_input_is_one_line_and_code_2(
    tmp_path: Path, vit: Path, photo: Path, tiny_run: Path, script: Callable
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    resnet, out = tiny_run / "ckpt.safetensors", tmp_path / "out"
    for args, said in (
        ((vit, tmp_path / "none.jpg"), "no such photo, folder or data set"),
        ((vit, tmp_path / "text.jpg"), "cannot decode"),
        ((vit, tmp_path / "empty"), "no images in"),
        ((tmp_path / "none.safetensors", photo), "no such checkpoint"),
        ((resnet, photo, "--kind", "attention"), "no attention: resnet10_half is no ViT"),
        ((vit, photo, "--kind", "neighbours"), "no neighbours: need a folder"),
        ((vit, photo, "--kind", "scatter"), "no scatter: need a folder of class folders"),
        ((vit, photo, "--query", photo), "no neighbours: need a folder"),
        ((vit, photo, "--query", tmp_path / "none.jpg"), "no such photo"),
        ((vit, photo, "--video", "gif"), "need a folder of frames"),
        ((vit, "patterns", "--video", "gif", "--kind", "crops"), "a video shows"),
        ((vit, photo, "--size", "0"), "need --size >= 1, got 0"),
        ((vit, photo, "--mass", "1.5"), "need --mass > 0 and <= 1, got 1.5"),
    ):
        result = script("visualize", *args, "--output-dir", out)
        assert result.returncode == 2, said
        assert result.stderr.startswith("error: ") and said in result.stderr
        assert result.stderr.count("\n") == 1
        assert not out.exists()
