"""Draw what a trained backbone sees, as PNG or GIF.

    python visualize.py runs/vits16/ckpt.safetensors photo.jpg
    python visualize.py runs/vits16/ckpt.safetensors images/ --kind neighbours scatter
    python visualize.py runs/vits16/ckpt.safetensors frames/ --video gif

attention: the class token's, in a ViT's last block; pca: components of the last feature map as
colours, common to all images; crops: what training sees; neighbours: the most similar images;
scatter: features by class. Source: DINO, arXiv 2104.14294. Pillow draws everything.
Axes: b batch, n images, d features, p tokens, c h w image or map.
"""

import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

import data
from config import read_flags
from feature_maps import (
    PCA,
    class_attention,
    feature_map,
    fit_patches,
    has_class_attention,
    mass_mask,
    patch_map,
    peak,
)
from features import evenly, normalized
from monitor import run_command
from pictures import CARD, SMALL_TILE, Cell, crop_cells, enlarged, heat, scatter, sheet, tile
from weights import open_network, preparation_of

MOST_FEATURES = 2000  # images that are compared and scattered
SAMPLED_FRAMES = 16  # of a video, that fix the scale of its colours
NUM_QUERIES, NUM_NEIGHBOURS = 6, 8
TILE = 240  # pixels

Kind = Literal["attention", "pca", "crops", "neighbours", "scatter"]
KINDS = get_args(Kind)
Pictures = dict[str, Image.Image | Iterator[Image.Image]]  # by file name; a video's frames


@dataclass(frozen=True)
class VisualizeConfig:
    # ckpt.safetensors of a run, an original's .pth, or the name of published weights: dino_vits16
    checkpoint: tyro.conf.Positional[str]
    # a photo, a folder of images or of class folders, or what --data takes in training
    images: tyro.conf.Positional[str]
    kind: tuple[Kind, ...] = ()  # what to draw; none: all that apply
    output_dir: Path | None = None  # None: pictures/IMAGES beside the checkpoint
    # pixels, shorter side of what attention and pca see; None: 480 for photographs, as the
    # original, and the training crop's for small images
    size: int | None = None
    num_images: int = 8  # images of a folder, evenly spaced, for attention, pca and crops
    mass: float = 0.6  # share of the attention that the mask keeps [paper: 0.6]
    query: str | None = None  # a photo whose neighbours to find; None: those of some of the images
    # of a folder of frames: attention beside each, or pca where there is none or --kind says so
    video: Literal["gif", "frames"] | None = None
    seed: int = 0  # of the crops


# ---------------------------------------------------------------- what the network sees


class Network:
    """A frozen backbone, and how its images are prepared."""

    def __init__(self, source: str, size: int | None) -> None:
        model, metadata = open_network(source)
        self.config = preparation_of(metadata, source)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone, self.arch = model.backbone.to(self.device), self.config["model"]["arch"]
        self.crop_size = self.config["crops"]["global_crop_size"]
        self.size = size or (480 if self.crop_size >= 192 else self.crop_size)

    def fit(self, image: Tensor) -> Tensor:
        return fit_patches(image, self.size, self.backbone.patch_size)

    def map(self, kind: str, image: Tensor) -> Tensor:
        """Give the attention (head, h, w) or the feature map (d, h, w) of a fitted image."""
        pixels = normalized(image[None].to(self.device), self.config)
        try:
            if kind == "pca":
                return feature_map(self.backbone, pixels)[0].float().cpu()
            tokens = class_attention(self.backbone, pixels)
            return patch_map(tokens, self.backbone, pixels)[0].cpu()
        except (AssertionError, RuntimeError, ValueError) as error:  # of nets for certain sizes
            given = f"{self.arch} at {pixels.shape[2]} x {pixels.shape[3]} px"
            raise ValueError(f"no map of {given}: {' '.join(str(error).split())}") from error

    def crop(self, image: Tensor) -> Tensor:
        return data.center_crop(image, self.config["data"]["eval_resize"], self.crop_size)

    @torch.no_grad()
    def features(self, crops: list[Tensor]) -> Tensor:
        """Give features (n, d) of norm 1, on the CPU."""
        pixels = normalized(torch.stack(crops).to(self.device), self.config)
        return F.normalize(self.backbone(pixels).float(), dim=1).cpu()


# ---------------------------------------------------------------- images


def open_images(source: str) -> data.ImageDataset:
    """Open a photo, a folder or a data set by name. ValueError where there are no images."""
    path = Path(source)
    if path.is_file() and path.suffix != ".tar":
        return data.ImageDataset([os.fsencode(path)], None)
    if not path.exists() and source not in ("patterns", *data.TORCHVISION_SETS):
        raise ValueError(f"no such photo, folder or data set: {source}")
    return data.build_dataset(source)


def label_of(images: data.ImageDataset, row: int) -> str:
    """Give the name of an image's class, or its own without classes."""
    if images.labels is not None:
        label = images.labels[row]
        return images.classes[label] if images.classes else f"class {label}"
    path = images.images[row]
    return Path(os.fsdecode(path)).stem if isinstance(path, bytes) else f"image {row}"


def spread(images: data.ImageDataset, most: int) -> list[int]:
    """Give at most `most` images, evenly spaced, over the classes if there are any."""
    rows = evenly(len(images), most).tolist()
    return rows if images.labels is None else images.labels.argsort(kind="stable")[rows].tolist()


def read(images: data.ImageDataset, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Decode images one by one; in a folder, what cannot be decoded is left out, and said."""
    num_read = 0
    for row in rows:
        try:
            image = data.decode(images.images[row])
        except ValueError as error:
            if len(images) == 1:
                raise
            print(f"left out: {str(error).encode('utf-8', 'backslashreplace').decode()}")
        else:
            num_read += 1
            yield row, image
    if not num_read:
        raise ValueError(f"none of {len(rows)} images can be decoded")


# ---------------------------------------------------------------- drawing


def attention_sheet(image: Tensor, attention: Tensor, mass: float, label: str) -> Image.Image:
    """Draw an image, the mean of its attention (head, h, w), the mean's mask, and each head."""
    picture, mean = tile(image, TILE), attention.mean(0)
    mask = mass_mask(mean, mass)
    dark = Image.blend(picture, Image.new("RGB", picture.size), 0.85)
    kept = Image.composite(picture, dark, enlarged(255 * mask.byte().numpy(), picture))
    cells = [(picture, f"{image.shape[2]} x {image.shape[1]} px")]
    cells.append((heat(picture, mean, peak(mean)), "mean of heads"))
    cells.append((kept, f"{mass:.0%} in {mask.double().mean():.0%} of area"))
    for head, values in enumerate(attention, start=1):
        cells.append((heat(picture, values, peak(values)), f"head {head}"))
    return sheet(f"attention of the class token: {label}", cells, 3 if len(cells) <= 9 else 5)


def crops_sheet(
    network: Network, images: data.ImageDataset, chosen: dict[int, Tensor], seed: int
) -> Image.Image:
    """Draw each image and its crops, as a training of that seed sees them in its first epoch."""
    multi_crop, cells = data.MultiCrop(data.CropConfig(**network.config["crops"])), []
    canvas_size = network.config["data"].get("canvas_size") or 384
    for row, image in chosen.items():
        canvas, size = data.to_canvas(image, canvas_size), torch.tensor(image.shape[1:])
        keys = data.hash_keys(seed, 0, torch.tensor([row]))
        cells.append((tile(image, SMALL_TILE), label_of(images, row)))
        crops = multi_crop(canvas[None], size[None], keys)
        cells += crop_cells(crops, multi_crop.mean, multi_crop.std, 0)
    sizes = multi_crop.config.global_crop_size, multi_crop.config.local_crop_size
    title = "training crops: global {} px, local {} px".format(*sizes)
    return sheet(title, cells, 1 + multi_crop.num_views)


def neighbours_sheet(
    network: Network,
    images: data.ImageDataset,
    rows: list[int],
    features: Tensor,
    query: str | None,
) -> Image.Image:
    """Draw each query and the images of most similar features (n, d); none is its own neighbour."""
    if query is None:
        own = evenly(len(rows), NUM_QUERIES).tolist()
        queries = [(images.images[rows[i]], label_of(images, rows[i]), i) for i in own]
    else:
        queries = [(os.fsencode(query), Path(query).stem, None)]
    cells: list[Cell] = []
    for source, label, own in queries:
        crop = network.crop(data.decode(source))
        similarity = features @ network.features([crop])[0]
        order = [i for i in similarity.argsort(descending=True).tolist() if i != own]
        cells.append((tile(crop, SMALL_TILE), label))
        for i in order[:NUM_NEIGHBOURS]:
            crop = network.crop(data.decode(images.images[rows[i]]))
            label = f"{similarity[i]:.2f} {label_of(images, rows[i])}"
            cells.append((tile(crop, SMALL_TILE), label))
    title = f"query and neighbours, with cosine similarity, of {len(rows):,} images"
    return sheet(title, cells, 1 + len(order[:NUM_NEIGHBOURS]))


def scatter_sheet(features: Tensor, classes: list[str]) -> Image.Image:
    """Draw features (n, d) on their first two components."""
    pca = PCA.fit(features, 2)
    axes = "across: component 1, {:.0%} of the variance; up: component 2, {:.0%}"
    title = f"features of {len(features):,} images"
    points = (features - pca.mean) @ pca.axes.T
    return scatter(title, points, classes, axes.format(*pca.shares))


def video_frames(network: Network, images: data.ImageDataset, kind: str) -> Iterator[Image.Image]:
    """Yield each frame beside its mean attention or feature map, in the order of their names."""
    names = [os.fsdecode(x) if isinstance(x, bytes) else "" for x in images.images]
    names = [re.sub(r"\d+", lambda number: number[0].zfill(20), name) for name in names]
    order = sorted(range(len(names)), key=names.__getitem__)  # frame-10 after frame-9
    sample = read(images, spread(images, SAMPLED_FRAMES))
    maps = [network.map(kind, network.fit(frame)) for _, frame in sample]
    # one scale of colours for all frames, else they flicker
    pca = PCA.of_maps(maps) if kind == "pca" else None
    top = 0 if pca else max(peak(x.mean(0)) for x in maps)
    size = None
    for _, frame in read(images, order):
        frame = network.fit(frame)
        picture, values = tile(frame, 320), network.map(kind, frame)
        if pca:
            drawn = enlarged(pca.colours(values), picture)
        else:
            drawn = heat(picture, values.mean(0), top)
        card = sheet("", [(picture, ""), (drawn, "")], 2)
        size = size or card.size  # a GIF has one
        yield card if card.size == size else ImageOps.pad(card, size, color=CARD)


# ---------------------------------------------------------------- main


def kinds_to_draw(
    options: VisualizeConfig, network: Network, images: data.ImageDataset
) -> list[str]:
    """Give the kinds that apply. Raises ValueError for one that was asked for and does not."""
    why_not, is_vit = dict.fromkeys(KINDS, ""), has_class_attention(network.backbone)
    if not is_vit:
        why_not["attention"] = f"{network.arch} is no ViT with a class token"
    if len(images) < 3:
        why_not["neighbours"] = f"need a folder of >= 3 images, got {options.images}"
    if len(images) < 3 or images.labels is None:
        why_not["scatter"] = f"need a folder of class folders, got {options.images}"
    if options.video is not None:
        if len(images) < 2:
            raise ValueError(f"need a folder of frames for --video, got {options.images}")
        why_not |= dict.fromkeys(KINDS[2:], "a video shows attention or pca")
    asked = {*options.kind, *["neighbours"] * (options.query is not None)}
    for kind in KINDS:
        if kind in asked and why_not[kind]:
            raise ValueError(f"no {kind}: {why_not[kind]}")
    kinds = [x for x in KINDS if (x in asked if options.kind else not why_not[x])]
    return kinds[:1] if options.video else kinds


def draw_pictures(options: VisualizeConfig) -> Pictures:
    """Compute all pictures; of a video the first frame, and the others when they are asked for."""
    images, network = open_images(options.images), Network(options.checkpoint, options.size)
    kinds, pictures = kinds_to_draw(options, network, images), {}
    if options.video:
        frames = video_frames(network, images, kinds[0])
        name = f"{kinds[0]}.gif" if options.video == "gif" else f"{kinds[0]}-frames"
        return {name: itertools.chain([next(frames)], frames)}
    if {"attention", "pca", "crops"} & set(kinds):
        chosen = dict(read(images, spread(images, options.num_images)))
        print(f"{len(chosen)} of {len(images):,} images drawn one by one")
        fitted = {row: network.fit(image) for row, image in chosen.items()}
    if "attention" in kinds:
        for number, (row, image) in enumerate(fitted.items(), start=1):
            label, attention = label_of(images, row), network.map("attention", image)
            name = f"attention-{number:02}-{re.sub(r'[^0-9A-Za-z._-]+', '-', label)[:80]}.png"
            pictures[name] = attention_sheet(image, attention, options.mass, label)
    if "pca" in kinds:
        maps, cells = [network.map("pca", image) for image in fitted.values()], []
        pca = PCA.of_maps(maps)
        for (row, image), features in zip(fitted.items(), maps, strict=True):
            picture = tile(image, TILE)
            drawn = enlarged(pca.colours(features), picture)
            cells.append((picture, label_of(images, row)))
            cells.append((drawn, f"{features.shape[2]} x {features.shape[1]} cells"))
        title = f"PCA as RGB: {sum(pca.shares):.0%} of variance"
        pictures["pca.png"] = sheet(title, cells, 4)
    if "crops" in kinds:
        pictures["crops.png"] = crops_sheet(network, images, chosen, options.seed)
    if {"neighbours", "scatter"} & set(kinds):
        rows, parts = [], []
        batches = read(images, spread(images, MOST_FEATURES))
        while batch := list(itertools.islice(batches, 64)):
            rows += [row for row, _ in batch]
            parts.append(network.features([network.crop(image) for _, image in batch]))
        features = torch.cat(parts)
        print(f"{len(rows):,} of {len(images):,} images compared")
    if "neighbours" in kinds:
        picture = neighbours_sheet(network, images, rows, features, options.query)
        pictures["neighbours.png"] = picture
    if "scatter" in kinds:
        classes = [label_of(images, row) for row in rows]
        pictures["scatter.png"] = scatter_sheet(features, classes)
    return pictures


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Write all pictures, then put them in their places and name them. Frames replace none."""
    for name in pictures:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} exists: delete it or give another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as staging:
        for name, picture in pictures.items():
            path = Path(staging, name)
            if isinstance(picture, Image.Image):
                picture.save(path)
            elif path.suffix == ".gif":
                next(picture).save(path, save_all=True, append_images=picture, duration=40, loop=0)
            else:
                path.mkdir()
                for number, frame in enumerate(picture, start=1):
                    frame.save(path / f"{number:06}.png")
        for name in pictures:
            os.replace(Path(staging, name), folder / name)
            print(folder / name)


def main() -> None:
    options = read_flags(VisualizeConfig, None, __doc__)
    for flag, value in (("size", options.size), ("num-images", options.num_images)):
        if value is not None and value < 1:
            raise ValueError(f"need --{flag} >= 1, got {value}")
    if not 0 < options.mass <= 1:
        raise ValueError(f"need --mass > 0 and <= 1, got {options.mass}")
    if options.query is not None and not Path(options.query).is_file():
        raise ValueError(f"no such photo: {options.query}")
    name = Path(options.images).resolve().stem
    folder = options.output_dir or Path(options.checkpoint).parent / "pictures" / name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"need a folder for --output-dir, got {folder}")
    write_pictures(folder, draw_pictures(options))


if __name__ == "__main__":
    run_command(main)
