import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from data import CropConfig, ImageDataset, draw_patterns
from harness.pictures import INK, WRONG
from models import DinoModel, ModelConfig, save_checkpoint
from multicrop import IMAGENET_MEAN, IMAGENET_STD, resolve_crop_sizes
from visualize import VisualizeConfig, class_of, draw_pictures, open_images

pytestmark = pytest.mark.slow  # seconds as a whole


def write_checkpoint(path: Path, arch: str, size: int = 32, patch_size: int | None = None) -> Path:
    """Write a random network as a run on small images leaves it."""
    head = {"projection_hidden_dim": 8, "projection_bottleneck_dim": 8, "projection_output_dim": 8}
    config = ModelConfig(arch, patch_size=patch_size, image_size=size, **head)
    model = DinoModel.from_config(config)
    crops = CropConfig(num_local_crops=2, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    crops = resolve_crop_sizes(crops, size, model.backbone.patch_size)
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
    drawn = ["attention-01-wide.png", "crops.png", "pca.png"]
    assert names(tmp_path) == sorted([*drawn, "index.html"])
    assert result.stdout.splitlines()[-4:] == [
        str(tmp_path / name)
        for name in ("attention-01-wide.png", "pca.png", "crops.png", "index.html")
    ]
    sizes = {name: Image.open(tmp_path / name).size for name in drawn}
    scale = 6 + 12 + 5 + 48  # the bar of colours and its text
    width = 3 * (248 + scale) + 248 + 8  # the column of the mask has none
    # 2:1 is kept; the label of the mask has two lines
    assert sizes["attention-01-wide.png"] == (width, 40 + 2 * (120 + 30) + 17)
    assert sizes["pca.png"] == (2 * 248 + 8, 40 + 22 + 150)  # two lines of title
    assert sizes["crops.png"] == (5 * 128 + 8, 40 + 150)


def test_a_folder_of_classes_gives_every_picture(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script: Callable
) -> None:
    result = script("visualize", tiny_run / "ckpt.safetensors", image_folder, "--num-images", "2")
    assert result.returncode == 0, result.stderr
    folder = tiny_run / "pictures" / image_folder.name
    drawn = ["crops.png", "neighbours.png", "pca.png", "scatter.png"]
    assert names(folder) == drawn and (folder.parent / "index.html").is_file()
    assert "2 of 80 images drawn" in result.stdout and "80 of 80 images compared" in result.stdout
    assert all(Image.open(path).convert("RGB").getcolors(1 << 20) for path in folder.iterdir())


@pytest.fixture
def drawn_sheets(monkeypatch: pytest.MonkeyPatch) -> list:
    """Collect what sheets are made of: title, cells, number of columns."""
    import visualize

    collected: list = []
    monkeypatch.setattr(visualize, "sheet", lambda *args: collected.append(args))
    return collected


def similarities(checkpoint: Path, folder: Path, query: Path) -> dict[str, float]:
    """Compute a query's cosine similarity to each image of a folder, by path."""
    import visualize

    network = visualize.Observer(str(checkpoint), None)
    images = visualize.open_images(str(folder))
    crops = [network.crop(images.decode(path)) for path in [*images.images, str(query).encode()]]
    with torch.no_grad():
        features = network.backbone(visualize.normalized(torch.stack(crops), network.preparation))
    values = F.cosine_similarity(features[-1:], features[:-1]).tolist()
    return dict(zip((path.decode() for path in images.images), values, strict=True))


@pytest.mark.parametrize("inside", [True, False])
def test_neighbours_are_those_of_brute_force_without_the_query(
    inside: bool, tmp_path: Path, drawn_sheets: list, tiny_run: Path, image_folder: Path
) -> None:
    """A query finds its own copy from elsewhere first; one of the images does not find itself."""
    query = image_folder / "stripes" / "7.jpg"
    if not inside:
        query = tmp_path / "a.b.jpg"
        shutil.copyfile(image_folder / "stripes" / "7.jpg", query)
    checkpoint = tiny_run / "ckpt.safetensors"
    draw_pictures(
        VisualizeConfig(str(checkpoint), str(image_folder), ("neighbours",), query=str(query))
    )
    cells = drawn_sheets[0][1]
    ranked = sorted(similarities(checkpoint, image_folder, query).items(), key=lambda x: -x[1])
    others = [(Path(path), value) for path, value in ranked if path != str(query)][:8]
    labels = [f"{value:.2f} {path.parent.name}\n{path.name}" for path, value in others]
    own = "query\nstripes\n7.jpg" if inside else "query\na.b.jpg"
    assert [label for _, label in cells] == [own, "", *labels]
    same = np.array_equal(np.asarray(cells[0][0])[4:-4, 4:-4], np.asarray(cells[2][0])[4:-4, 4:-4])
    assert same is not inside


def test_query_by_another_name_does_not_find_itself(
    tmp_path: Path, drawn_sheets: list, tiny_run: Path, image_folder: Path
) -> None:
    query = tmp_path / "link.jpg"
    query.symlink_to(image_folder / "stripes" / "7.jpg")
    checkpoint = str(tiny_run / "ckpt.safetensors")
    draw_pictures(VisualizeConfig(checkpoint, str(image_folder), ("neighbours",), query=str(query)))
    labels = [label for _, label in drawn_sheets[0][1]]
    assert labels[0] == "query\nstripes\n7.jpg"
    assert not any(label.endswith("stripes\n7.jpg") for label in labels[1:])


def test_neighbours_of_another_class_are_framed(
    drawn_sheets: list, tiny_run: Path, image_folder: Path
) -> None:
    checkpoint = str(tiny_run / "ckpt.safetensors")
    draw_pictures(VisualizeConfig(checkpoint, str(image_folder), ("neighbours",)))
    title, cells, num_columns = drawn_sheets[0]
    assert "red: of another class" in title and len(cells) == 6 * num_columns == 6 * 10
    red, ink = ((int(x[1:3], 16), int(x[3:5], 16), int(x[5:], 16)) for x in (WRONG, INK))
    num_wrong = 0
    for i in range(0, len(cells), num_columns):
        query_class = cells[i][1].split("\n")[1]
        assert cells[i][0].getpixel((0, 60)) == ink
        for picture, label in cells[i + 2 : i + num_columns]:
            is_wrong = label.split("\n")[0].split(" ")[1] != query_class
            assert (picture.getpixel((0, 60)) == red) == is_wrong
            num_wrong += is_wrong
    assert num_wrong


def test_heat_maps_have_a_scale_and_heads_a_name(
    drawn_sheets: list, vit: Path, photo: Path
) -> None:
    draw_pictures(VisualizeConfig(str(vit), str(photo), ("attention",)))
    title, cells, _ = drawn_sheets[0]
    assert "wide.png" in title
    assert [label for _, label in cells[4:]] == ["head 1 of 3", "head 2 of 3", "head 3 of 3"]
    for picture, _ in [cells[1], *cells[4:]]:
        bar = np.asarray(picture)[:, cells[0][0].width + 6 + 4].astype(int).sum(axis=-1)
        assert bar[0] > 600 and bar[-1] < 10 and (np.diff(bar) <= 3).all()
    # the photo is still told: what is over it follows its grey
    grey = np.asarray(cells[0][0].convert("L")).ravel()
    over = np.asarray(cells[2][0].convert("L")).ravel()
    assert np.corrcoef(grey, over)[0, 1] > 0.5


@pytest.mark.parametrize(
    ("arch", "cells"),
    [
        ("vit_small_patch16_dinov3", "28 x 14 cells"),  # registers, rotary positions
        ("cait_xxs24_224", "2 x 2 cells"),  # takes one size alone: the photo's middle
    ],
)
def test_attention_of_other_kinds_is_drawn(
    arch: str, cells: str, tmp_path: Path, photo: Path, drawn_sheets: list
) -> None:
    checkpoint = write_checkpoint(tmp_path / "ckpt.safetensors", arch, size=32)
    draw_pictures(VisualizeConfig(str(checkpoint), str(photo), ("attention",)))
    labels = [label for _, label in drawn_sheets[0][1]]
    assert any(cells in label for label in labels), labels


@pytest.mark.parametrize("kind", ["attention", "pca"])
def test_maps_of_small_images_have_cells_enough_to_show_a_shape(
    kind: str, drawn_sheets: list, vit: Path, tiny_run: Path, photo: Path
) -> None:
    """The title says how; a size that is asked for is taken as it is."""
    checkpoint = vit if kind == "attention" else tiny_run / "ckpt.safetensors"
    draw_pictures(VisualizeConfig(str(checkpoint), str(photo), (kind,)))
    draw_pictures(VisualizeConfig(str(checkpoint), str(photo), (kind,), size=32))
    (title, cells, _), (small_title, small_cells, _) = drawn_sheets
    # crops of 32 and 16 px, cells of 8 and 32 px
    enlarged = "112 px, 3.5 x" if kind == "attention" else "448 px, 28 x"
    assert title.endswith(f"images enlarged to {enlarged} the evaluations' crop, for 14 cells")
    assert "28 x 14 cells" in cells[1][1]
    small = "8 x 4 cells" if kind == "attention" else "2 x 1 cells"
    assert small_title.endswith("images of 32 px") and small in small_cells[1][1]


def test_photographs_are_not_enlarged_further(vit: Path, tmp_path: Path) -> None:
    """A network that takes one size only keeps the usual one, and says that it has no map of it."""
    import visualize

    for arch in ("resnet10_half", "pit_ti_224"):
        checkpoint = write_checkpoint(tmp_path / f"{arch}.safetensors", arch, size=224)
        observer = visualize.Observer(str(checkpoint), None)
        assert observer.size == 480 and observer.said_size == "images of 480 px"
    with pytest.raises(ValueError, match="no features of pit_ti_224 at 480 x 480 px"):
        observer.map_of("pca", torch.zeros(3, 480, 480, dtype=torch.uint8))


def test_index_shows_all_pictures_and_escapes_their_names(
    tmp_path: Path, vit: Path, photo: Path, script: Callable
) -> None:
    """A folder's name loses nothing behind a dot; pages of others are left alone."""
    run = tmp_path / "run"
    run.mkdir()
    checkpoint = shutil.copyfile(vit, run / "ckpt.safetensors")
    for name in ("a.b", "a<i>&.c"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(photo, folder / "wide.png")
        flags = ("--video", "frames") if name == "a.b" else ()
        if flags:
            shutil.copyfile(photo, folder / "wider.png")
        result = script("visualize", checkpoint, folder, "--kind", "pca", *flags)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == str(run / "pictures" / "index.html")
    page = (run / "pictures" / "index.html").read_text()
    assert re.findall(r'src="(.*?)"', page) == [
        "a.b/pca-frames/000001.png",
        "a%3Ci%3E%26.c/pca.png",
    ]
    links = re.findall(r'(?:src|href)="(.*?)"', page)
    assert all((run / "pictures" / unquote(link)).exists() for link in links)
    assert "<h1>a&lt;i&gt;&amp;.c</h1>" in page and "<script" not in page and "max-width" in page

    other = tmp_path / "site"
    other.mkdir()
    (other / "index.html").write_text("mine")
    result = script("visualize", vit, photo, "--kind", "pca", "--output-dir", other)
    assert result.returncode == 0 and "left as it is" in result.stdout
    assert (other / "index.html").read_text() == "mine"


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
    (source / "bro\nken[b].jpg").write_text("no image")
    for kind in ("neighbours", "attention"):
        result = script("visualize", vit, source, "--kind", kind, "--output-dir", out)
        assert result.returncode == 0, result.stderr
        assert "left out: cannot decode" in result.stdout and "3 of 4 images" in result.stdout
        assert "bro\\nken[b].jpg" in result.stdout


def test_image_without_a_label_among_others_has_no_class() -> None:
    images = ImageDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), np.array([1, -1]), ["a", "b"])
    assert [class_of(images, row) for row in range(2)] == ["b", ""]


def test_wrong_input_is_one_line_and_code_2(
    tmp_path: Path, vit: Path, photo: Path, tiny_run: Path, script: Callable
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    resnet, out = tiny_run / "ckpt.safetensors", tmp_path / "out"
    half_split = tmp_path / "half"
    for folder in ("val", "cats"):
        (half_split / folder).mkdir(parents=True)
        shutil.copy(photo, half_split / folder / "a.png")
    for args, said in (
        ((vit, tmp_path / "none.jpg"), "no such photo, folder or data set"),
        ((vit, tmp_path / "text.jpg"), "cannot decode"),
        ((vit, tmp_path / "empty"), "no images in"),
        ((tmp_path / "none.safetensors", photo), "no such checkpoint"),
        ((resnet, photo, "--kind", "attention"), "no attention: test_resnet has no class token"),
        ((vit, photo, "--kind", "neighbours"), "no neighbours: need a folder"),
        ((vit, photo, "--kind", "scatter"), "no scatter: need a folder of class folders"),
        ((vit, photo, "--query", photo), "no neighbours: need a folder"),
        ((vit, photo, "--query", tmp_path / "none.jpg"), "no such photo"),
        ((vit, photo, "--video", "gif"), "need a folder of frames"),
        ((vit, "patterns", "--video", "gif", "--kind", "crops"), "a video shows"),
        (
            (vit, "patterns", "--video", "gif", "--kind", "attention", "pca"),
            "a video shows one --kind, got attention pca",
        ),
        ((vit, photo, "--size", "0"), "need --size > 0, got 0"),
        ((vit, photo, "--mass", "1.5"), "need --mass > 0 and <= 1, got 1.5"),
        ((vit, half_split), f"need {half_split}/val to take that split, or --no-splits"),
    ):
        result = script("visualize", *args, "--output-dir", out)
        assert result.returncode == 2, said
        assert result.stderr.startswith("error: ") and said in result.stderr
        assert result.stderr.count("\n") == 1
        assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:  # the superuser may write anywhere
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        result = script("visualize", vit, photo, "--output-dir", out)
    assert result.returncode == 2 and f"no pictures can be written to {out}" in result.stderr
    images = open_images(str(half_split), take_splits=False)
    assert images.classes == ["cats", "val"]
