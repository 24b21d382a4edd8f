import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from data import CropConfig, draw_patterns
from models import DinoModel, ModelConfig, save_checkpoint
from multicrop import resolve_crop_sizes
from visualize import VisualizeConfig, draw_pictures

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

    network = visualize.Observer(checkpoint, None)
    images = visualize.open_images(str(image_folder))
    crops = [network.crop(visualize.decode(path)) for path in images.images]
    with torch.no_grad():
        features = network.backbone(visualize.normalized(torch.stack(crops), network.preparation))
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
