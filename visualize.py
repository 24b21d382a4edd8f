"""Draw what a trained backbone sees, as PNG or GIF.

    python visualize.py runs/vits16/ckpt.safetensors photo.jpg
    python visualize.py runs/vits16/ckpt.safetensors images/ --kind neighbours scatter
    python visualize.py runs/vits16/ckpt.safetensors frames/ --video gif

attention: the class token's, in a ViT's last block; pca: components of the last feature map as
colours, common to all images; crops: what training sees; neighbours: the most similar images;
scatter: features by class. index.html shows them all. Source: DINO, arXiv 2104.14294. Pillow
draws everything.
Axes: b batch, n images, d features, p tokens, c h w image or map.
"""

import html
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, get_args
from urllib.parse import quote

import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from config import setting
from data import (
    NAMED_SETS,
    ImageDataset,
    build_dataset,
    center_crop,
    to_canvas,
)
from folders import by_numbers, is_list, was_drawn_here
from harness.command import read_flags, run_command, write_whole
from harness.distributed import is_on_cpu
from harness.feature_maps import (
    MIN_CELLS,
    PCA,
    PHOTO_SIDE,
    chosen_side,
    class_attention,
    feature_map,
    fit_patches,
    fixed_sides,
    mass_mask,
    patch_map,
    peak,
    sizes_named,
    why_attention_is_untrained,
    why_no_class_attention,
)
from harness.feature_quality import evenly
from harness.flags import check_ranges
from harness.opened_network import normalized, open_network, require_preparation
from harness.pictures import (
    CARD,
    INK,
    MARK,
    SMALL_TILE,
    WRONG,
    Cell,
    crop_cells,
    divider,
    enlarged,
    framed,
    heat,
    overlay,
    png_mark,
    scatter,
    sheet,
    shown_channels,
    tile,
    with_scale,
)
from harness.terminal import printable, printable_name
from harness.weights import as_file
from multicrop import MultiCrop, hash_keys
from tar_shards import TarMember

MOST_FEATURES = 2000  # images that are compared and scattered
FEATURE_BATCH = 64  # images
SAMPLED_FRAMES = 16  # frames of a video that fix the scale of its colours
NUM_QUERIES = 6
NUM_NEIGHBOURS = 8
TILE = 240  # pixels
VIDEO_TILE = 320  # pixels
FRAME = "{:06}.png"  # a file in a folder of frames
FIRST_FRAME = FRAME.format(1)

Kind = Literal["attention", "pca", "crops", "neighbours", "scatter"]
KINDS = get_args(Kind)
MEANINGS = {
    "attention": "Where the class token looks, in the last block: bright is much. Each map has its "
    "own scale, in % of the attention to all patches.",
    "pca": "Features of the last layer as colours. What has one colour is alike to the network, in "
    "all images.",
    "crops": "What training sees of an image: the teacher the global crops, the student all.",
    "neighbours": "The images that are most alike to the network, with cosine similarity. A red "
    "frame is of another class than the query's.",
    "scatter": "All images on the two components of their features that vary most.",
}
PAGE_HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{MARK.decode()}">
<meta name="viewport" content="width=device-width">
<title>what the backbone sees</title>
<style>
body {{ background: {CARD}; color: {INK}; font-family: sans-serif; margin: 2em; }}
figure {{ margin: 0 0 2em; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>"""

Pictures = dict[str, Image.Image | Iterator[Image.Image]]  # by file name; a video's frames


@dataclass(frozen=True)
class VisualizeConfig:
    # a run's folder, its ckpt.safetensors, what export.py wrote, a .pth of DINO, DINOv2, MAE ...
    # (docs/weights.md), or the name of published weights: dino_vits16
    checkpoint: tyro.conf.Positional[str]
    # a photo, a folder of images or of class folders, or what --data takes in training
    images: tyro.conf.Positional[str]
    # what to draw; none: all that apply
    kind: tuple[Kind, ...] = ()
    # folder for the pictures; None: pictures/IMAGES beside the checkpoint
    output_dir: Path | None = None
    # pixels, shorter side of what attention and pca see; None: 480 for photographs, as the
    # original; small images are enlarged from the evaluations' crop until 14 cells lie on it
    size: int | None = setting(None, above=0, most=4096)
    # images of a folder, evenly spaced, for attention, pca and crops
    num_images: int = setting(8, above=0, most=10_000)
    # share of the attention that the mask keeps [paper: 0.6]
    mass: float = setting(0.6, above=0, most=1)
    # a photo whose neighbours to find; None: those of some of the images
    query: str | None = None
    # draw a folder of frames one after the other, with the attention beside each; or pca, where
    # there is no attention or --kind says so
    video: Literal["gif", "frames"] | None = None
    # fixes the crops
    seed: int = setting(0, most=1 << 62)
    # architecture of a file that does not say it and is not recognised: a name of timm's
    arch: str | None = None
    # take folders called train, val and test for splits, of which the first is drawn; --no-splits:
    # folders for classes
    splits: bool = True


# ---------------------------------------------------------------- what the network sees


class Observer:
    """A frozen backbone that looks at images, prepared as it knows them."""

    def __init__(self, source: str, size: int | None, arch: str | None = None) -> None:
        network = open_network(source, arch=arch)
        self.notes = network.notes
        self.preparation = require_preparation(network, source)
        self.crops = network.crops
        self.knows_crops = "config" in network.metadata
        self.canvas_size = network.canvas_size
        self.arch = network.arch
        has_gpu = torch.cuda.is_available() and not is_on_cpu()
        self.device = torch.device("cuda" if has_gpu else "cpu")
        self.backbone = network.model.backbone.to(self.device)
        self.given_size = size

    @cached_property
    def size(self) -> int:
        """The shorter side of what maps are made of, in pixels: as given, or the usual one."""
        return chosen_side(self.backbone, self.preparation.size, self.given_size)

    @property
    def said_size(self) -> str:
        """How large the images are that maps are made of, and why they were enlarged."""
        if self.given_size or self.size in (PHOTO_SIDE, self.preparation.size):
            return f"images of {self.size} px"
        factor = f"{self.size / self.preparation.size:.2g} x the evaluations' crop"
        return f"images enlarged to {self.size} px, {factor}, for {MIN_CELLS} cells"

    def fit(self, image: Tensor) -> Tensor:
        """Return (c, h, w) uint8 in the size that attention and feature maps are made of."""
        if fixed_sides(self.backbone):
            return center_crop(image, self.size, self.size)
        return fit_patches(image, self.size, self.backbone.patch_size)

    def map_of(self, kind: str, image: Tensor) -> Tensor:
        """Return the attention (head, h, w) or the feature map (d, h, w) of a fitted image."""
        pixels = normalized(image[None].to(self.device), self.preparation)
        with sizes_named(self.arch, pixels):
            if kind == "pca":
                return feature_map(self.backbone, pixels)[0].float().cpu()
            tokens = class_attention(self.backbone, pixels)
            return patch_map(tokens, self.backbone, pixels)[0].cpu()

    def crop(self, image: Tensor) -> Tensor:
        """Return the center crop that evaluations take."""
        return center_crop(image, self.preparation.resize, self.preparation.size)

    @torch.no_grad()
    def features(self, crops: list[Tensor]) -> Tensor:
        """Return features (n, d) of norm 1, on the CPU."""
        pixels = normalized(torch.stack(crops).to(self.device), self.preparation)
        return F.normalize(self.backbone(pixels).float(), dim=1).cpu()


# ---------------------------------------------------------------- images


def open_images(source: str, channels: int = 3, take_splits: bool = True) -> ImageDataset:
    """Open a photo, a folder or a data set by name. ValueError where there are no images."""
    path = Path(source)
    if path.is_file() and path.suffix.lower() != ".tar" and not is_list(path):
        photo = ImageDataset([os.fsencode(path)], None)
        photo.channels = channels
        return photo
    if not path.exists() and source not in NAMED_SETS:
        raise ValueError(f"no such photo, folder or data set: {source}")
    images = build_dataset(source, channels=channels, take_splits=take_splits)
    for note in images.notes:
        print(f"data: {printable(note)}")
    return images


def class_of(images: ImageDataset, row: int) -> str:
    """Return the name of an image's class, or nothing where it has none."""
    if images.labels is None or images.labels[row] < 0:  # -1: STL-10's unlabelled images
        return ""
    label = images.labels[row]
    return images.classes[label] if images.classes else f"class {label}"


def file_name_of(images: ImageDataset, row: int) -> str:
    """Return the name of an image's file, of a member in a tar, or its number in a data set."""
    image = images.images[row]
    if isinstance(image, bytes):
        return Path(os.fsdecode(image)).name
    return PurePosixPath(image.name).name if isinstance(image, TarMember) else f"image {row}"


def label_of(images: ImageDataset, row: int) -> str:
    """Return an image's class, where there is one, and its name, a line each."""
    return "\n".join(filter(None, (class_of(images, row), file_name_of(images, row))))


def spread(images: ImageDataset, most: int) -> list[int]:
    """Return at most `most` rows of images, evenly spaced, over the classes if there are any."""
    rows = evenly(len(images), most).tolist()
    if images.labels is None:
        return rows
    return images.labels.argsort(kind="stable")[rows].tolist()


def read(images: ImageDataset, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Decode images one by one; in a folder, what cannot be decoded is left out, and said."""
    num_read = 0
    for row in rows:
        try:
            image = images.decode(images.images[row])
        except ValueError as error:
            if len(images) == 1:
                raise
            print(f"left out: {printable_name(error)}")
        else:
            num_read += 1
            yield row, image
    if not num_read:
        raise ValueError(f"none of {len(rows)} images can be decoded")


# ---------------------------------------------------------------- drawing


def attention_sheet(image: Tensor, attention: Tensor, mass: float, title: str) -> Image.Image:
    """Draw an image, the mean of its attention (head, h, w) beside and over it, and each head.

    Each heat map has its own scale: a patch's share of the attention to all patches.
    """
    picture, mean = tile(image, TILE), attention.mean(0)
    mask = mass_mask(mean, mass)
    dark = Image.blend(picture, Image.new("RGB", picture.size), 0.85)
    kept = Image.composite(picture, dark, enlarged(255 * mask.byte().numpy(), picture))
    num_cells = f"{mean.shape[1]} x {mean.shape[0]} cells"
    cells = [
        (picture, f"{image.shape[2]} x {image.shape[1]} px"),
        (_scaled_heat(picture, mean), f"mean of {len(attention)} heads, {num_cells}"),
        (overlay(picture, mean, peak(mean)), "mean, over the image"),
        (kept, f"{mass:.0%} of the attention in {mask.double().mean():.0%} of the area"),
    ]
    for head, values in enumerate(attention, start=1):
        cells.append((_scaled_heat(picture, values), f"head {head} of {len(attention)}"))
    return sheet(title, cells, 4)


def _scaled_heat(picture: Image.Image, attention: Tensor) -> Image.Image:
    """Draw attention (h, w) with its scale, in % of all that patches get."""
    shares = attention / attention.sum()
    return with_scale(heat(picture, shares, peak(shares)), f"{100 * peak(shares):.2g} %")


def draw_attention(
    observer: Observer, images: ImageDataset, fitted: dict[int, Tensor], mass: float
) -> Pictures:
    """Draw the attention of each fitted image, by its row, in a picture of its own."""
    pictures: Pictures = {}
    for number, (row, image) in enumerate(fitted.items(), start=1):
        label = class_of(images, row) or Path(file_name_of(images, row)).stem
        attention = observer.map_of("attention", image)
        safe_label = re.sub(r"[^0-9A-Za-z._-]+", "-", label)[:80]
        name = f"attention-{number:02}-{safe_label}.png"
        named = ", ".join(label_of(images, row).split("\n"))
        title = f"the class token's attention in the last block: {named}; {observer.said_size}"
        pictures[name] = attention_sheet(image, attention, mass, title)
    return pictures


def pca_sheet(observer: Observer, images: ImageDataset, fitted: dict[int, Tensor]) -> Image.Image:
    """Draw each fitted image beside its feature map, in colours that are common to all images."""
    maps = {row: observer.map_of("pca", image) for row, image in fitted.items()}
    pca = PCA.of_maps(list(maps.values()))
    cells: list[Cell] = []
    for row, features in maps.items():
        picture = tile(fitted[row], TILE)
        drawn = enlarged(pca.colours(features), picture)
        cells.append((picture, label_of(images, row)))
        cells.append((drawn, f"{features.shape[2]} x {features.shape[1]} cells"))
    shares = f"{sum(pca.shares):.0%} of variance"
    title = f"PCA of the last layer as RGB: {shares}; {observer.said_size}"
    return sheet(title, cells, 4)


def crops_sheet(
    observer: Observer, images: ImageDataset, chosen: dict[int, Tensor], seed: int
) -> Image.Image:
    """Draw each image and its crops, as a training of that seed sees them in its first epoch."""
    multi_crop = MultiCrop(observer.crops)
    cells: list[Cell] = []
    for row, image in chosen.items():
        canvas = to_canvas(image, observer.canvas_size)
        size = torch.tensor(image.shape[1:])
        keys = hash_keys(seed, 0, torch.tensor([row]))
        cells.append((tile(image, SMALL_TILE), label_of(images, row)))
        crops = multi_crop(canvas[None], size[None], keys)
        cells += crop_cells(crops, multi_crop.mean, multi_crop.std, 0)
    config = multi_crop.config
    title = (
        f"training crops: global {config.global_crop_size} px, local {config.local_crop_size} px"
    )
    shown = shown_channels(multi_crop.num_channels)
    if shown:
        title += f"; {shown}"
    return sheet(title, cells, 1 + multi_crop.num_views)


def compute_features(observer: Observer, images: ImageDataset) -> tuple[list[int], Tensor]:
    """Return the rows of images that could be read, MOST_FEATURES at most, and their features."""
    rows: list[int] = []
    parts: list[Tensor] = []
    batches = read(images, spread(images, MOST_FEATURES))
    while batch := list(itertools.islice(batches, FEATURE_BATCH)):
        rows += [row for row, _ in batch]
        parts.append(observer.features([observer.crop(image) for _, image in batch]))
    return rows, torch.cat(parts)


def neighbours_sheet(
    observer: Observer,
    images: ImageDataset,
    rows: list[int],
    features: Tensor,
    query: str | None,
) -> Image.Image:
    """Draw each query and the images of most similar features (n, d); none is its own neighbour."""
    own_places = _own_places(images, rows, query)
    num_others = min(len(rows) - (own is not None) for own in own_places)
    num_neighbours = min(NUM_NEIGHBOURS, num_others)
    cells: list[Cell] = []
    for own in own_places:
        if own is None:  # a photo from elsewhere, whose class is not known
            source, query_class, query_label = os.fsencode(query), "", Path(query).name
        else:
            row = rows[own]
            source, query_class = images.images[row], class_of(images, row)
            query_label = label_of(images, row)
        query_crop = observer.crop(images.decode(source))
        similarity = features @ observer.features([query_crop])[0]
        order = [i for i in similarity.argsort(descending=True).tolist() if i != own]
        cells.append((framed(tile(query_crop, SMALL_TILE), INK), f"query\n{query_label}"))
        cells.append((divider(SMALL_TILE), ""))
        for i in order[:num_neighbours]:
            picture = tile(observer.crop(images.decode(images.images[rows[i]])), SMALL_TILE)
            if query_class and class_of(images, rows[i]) != query_class:
                picture = framed(picture, WRONG)
            cells.append((picture, f"{similarity[i]:.2f} {label_of(images, rows[i])}"))
    title = f"query | nearest of {len(rows):,} images, with cosine similarity"
    if images.labels is not None:
        title += "; red: of another class"
    return sheet(title, cells, 2 + num_neighbours)


def _own_places(images: ImageDataset, rows: list[int], query: str | None) -> list[int | None]:
    """Return where in `rows` each query stands; None for a photo that is none of the images."""
    if query is None:
        return evenly(len(rows), NUM_QUERIES).tolist()
    sources = [images.images[row] for row in rows]
    for place, source in enumerate(sources):
        if isinstance(source, bytes) and os.path.samefile(source, query):
            return [place]
    return [None]


def scatter_sheet(features: Tensor, classes: list[str]) -> Image.Image:
    """Draw features (n, d) on their first two components."""
    pca = PCA.fit(features, 2)
    of_first, of_second = (f"{share:.0%} of the variance" for share in pca.shares)
    axes = (f"component 1, {of_first}", f"component 2, {of_second}")
    points = (features - pca.mean) @ pca.axes.T
    return scatter(f"features of {len(features):,} images", points, classes, axes)


def _in_order_of_numbers(images: ImageDataset) -> list[int]:
    """Return the rows of images by their names, frame-10 after frame-9."""
    names = [os.fsdecode(x) if isinstance(x, bytes) else "" for x in images.images]
    return sorted(range(len(names)), key=lambda row: by_numbers(names[row]))


def video_frames(observer: Observer, images: ImageDataset, kind: str) -> Iterator[Image.Image]:
    """Yield each frame beside its mean attention or feature map, in the order of their names."""
    # one scale of colours for all frames, else they flicker
    sample = read(images, spread(images, SAMPLED_FRAMES))
    maps = [observer.map_of(kind, observer.fit(frame)) for _, frame in sample]
    pca = PCA.of_maps(maps) if kind == "pca" else None
    brightest = 0 if pca else max(peak(attention.mean(0)) for attention in maps)
    size = None
    for _, frame in read(images, _in_order_of_numbers(images)):
        fitted = observer.fit(frame)
        picture, values = tile(fitted, VIDEO_TILE), observer.map_of(kind, fitted)
        if pca:
            drawn = enlarged(pca.colours(values), picture)
        else:
            drawn = overlay(picture, values.mean(0), brightest)
        card = sheet("", [(picture, ""), (drawn, "")], 2)
        size = size or card.size  # the first frame's: a GIF has one size
        yield card if card.size == size else ImageOps.pad(card, size, color=CARD)


def draw_video(observer: Observer, images: ImageDataset, kind: str, video: str) -> Pictures:
    """Draw the first frame at once, so that an error comes before a file; the others when asked."""
    frames = video_frames(observer, images, kind)
    first = next(frames)
    name = f"{kind}.gif" if video == "gif" else f"{kind}-frames"
    return {name: itertools.chain([first], frames)}


# ---------------------------------------------------------------- which pictures


def kinds_to_draw(options: VisualizeConfig, observer: Observer, images: ImageDataset) -> list[str]:
    """Return the kinds that apply. Raises ValueError for one that was asked for and does not."""
    why_not = _why_not(options, observer, images)
    asked = set(options.kind)
    if options.query is not None:
        asked.add("neighbours")
    for kind in KINDS:
        if kind in asked and kind in why_not:
            raise ValueError(f"no {kind}: {why_not[kind]}")
    if options.kind:
        kinds = [kind for kind in KINDS if kind in asked]
    else:
        kinds = [kind for kind in KINDS if kind not in why_not]
    if options.video and len(options.kind) > 1:
        raise ValueError(f"a video shows one --kind, got {' '.join(options.kind)}")
    return kinds[:1] if options.video else kinds


def _why_not(options: VisualizeConfig, observer: Observer, images: ImageDataset) -> dict[str, str]:
    """Return why each kind that does not apply does not; ValueError for a video of one image."""
    reasons: dict[str, str] = {}
    if why := why_no_class_attention(observer.backbone):
        reasons["attention"] = f"{observer.arch} {why}"
    if len(images) < 3:
        reasons["neighbours"] = f"need a folder of >= 3 images, got {options.images}"
    if len(images) < 3 or images.labels is None:
        reasons["scatter"] = f"need a folder of class folders, got {options.images}"
    if options.video is not None:
        if len(images) < 2:
            raise ValueError(f"need a folder of frames for --video, got {options.images}")
        for kind in ("crops", "neighbours", "scatter"):
            reasons[kind] = "a video shows attention or pca"
    return reasons


def draw_pictures(options: VisualizeConfig) -> Pictures:
    """Compute all pictures; of a video the first frame, and the others when they are asked for."""
    observer = Observer(options.checkpoint, options.size, options.arch)
    for note in observer.notes:
        print(printable_name(f"weights: {note}"))
    images = open_images(options.images, observer.preparation.channels, options.splits)
    shown = shown_channels(images.channels)
    if shown:
        print(f"images are shown by {shown}")
    images.set_levels(observer.preparation.levels)
    kinds = kinds_to_draw(options, observer, images)
    if options.video:
        return draw_video(observer, images, kinds[0], options.video)
    pictures: Pictures = {}
    if {"attention", "pca", "crops"} & set(kinds):
        chosen = dict(read(images, spread(images, options.num_images)))
        print(f"{len(chosen)} of {len(images):,} images drawn one by one")
        fitted = {}
        if {"attention", "pca"} & set(kinds):
            print(f"maps of the last layer: {observer.said_size}")
            fitted = {row: observer.fit(image) for row, image in chosen.items()}
        if "attention" in kinds:
            if why := why_attention_is_untrained(observer.backbone):
                print(f"{observer.arch} {why}")
            pictures |= draw_attention(observer, images, fitted, options.mass)
        if "pca" in kinds:
            pictures["pca.png"] = pca_sheet(observer, images, fitted)
        if "crops" in kinds:
            if not observer.knows_crops:
                print("crops: the paper's scales, since the weights do not say theirs")
            pictures["crops.png"] = crops_sheet(observer, images, chosen, options.seed)
    if {"neighbours", "scatter"} & set(kinds):
        rows, features = compute_features(observer, images)
        print(f"{len(rows):,} of {len(images):,} images compared")
        if "neighbours" in kinds:
            picture = neighbours_sheet(observer, images, rows, features, options.query)
            pictures["neighbours.png"] = picture
        if "scatter" in kinds:
            classes = [class_of(images, row) for row in rows]
            pictures["scatter.png"] = scatter_sheet(features, classes)
    return pictures


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Write all pictures, then put them in their places and print their names.

    Raises ValueError rather than replace a folder of frames.
    """
    for name in pictures:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} exists: delete it or give another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as staging:
        for name, picture in pictures.items():
            path = Path(staging, name)
            if isinstance(picture, Image.Image):
                picture.save(path, pnginfo=png_mark())
            elif path.suffix == ".gif":
                next(picture).save(
                    path,
                    save_all=True,
                    append_images=picture,
                    duration=40,
                    loop=0,
                    comment=MARK,
                )
            else:
                path.mkdir()
                for number, frame in enumerate(picture, start=1):
                    frame.save(path / FRAME.format(number), pnginfo=png_mark())
        for name in pictures:
            os.replace(Path(staging, name), folder / name)
            print(printable_name(folder / name))


# ---------------------------------------------------------------- index.html


def index_page(root: Path, folders: Sequence[Path]) -> str:
    """Return a page that shows all pictures that were drawn into folders in `root`."""
    parts = [PAGE_HEAD]
    for folder in folders:
        files = [x for x in sorted(folder.iterdir()) if was_drawn_here(os.fspath(x))]
        frames = [x for x in sorted(folder.iterdir()) if was_drawn_here(f"{x / FIRST_FRAME}")]
        if not files and not frames:
            continue
        parts.append(f"<h1>{_escaped(folder.resolve().name)}</h1>")
        for kind, meaning in MEANINGS.items():
            of_kind = [x for x in files if x.name.startswith(kind)]
            of_kind += [x / FIRST_FRAME for x in frames if x.name.startswith(kind)]
            if of_kind:
                parts.append(f"<h2>{kind}</h2>\n<p>{meaning}</p>")
            parts += [_figure(path.relative_to(root)) for path in of_kind]
    return "\n".join(parts) + "\n</body>\n</html>\n"


def _figure(path: Path) -> str:
    """Return a picture that leads to its file, or its folder of frames."""
    picture = quote(os.fsencode(path))
    shown, name = path, path.name
    if path.name == FIRST_FRAME:
        shown, name = path.parent, f"{path.parent.name}, the first frame"
    caption = f"<figcaption>{_escaped(name)}</figcaption>"
    image = f'<img src="{picture}" alt="{_escaped(name)}">'
    return f'<figure><a href="{quote(os.fsencode(shown))}">{image}</a>{caption}</figure>'


def _escaped(name: str) -> str:
    return html.escape(printable(os.fsencode(name).decode("utf-8", "replace")))


def write_index(root: Path, folders: Sequence[Path]) -> None:
    """Write index.html anew and print its name; a page that is not ours is left as it is."""
    page = root / "index.html"
    if page.exists() and MARK not in page.read_bytes()[:400]:
        print(f"left as it is: {printable_name(page)}, not written by visualize.py")
        return
    write_whole(page, index_page(root, folders).encode())
    print(printable_name(page))


# ---------------------------------------------------------------- main


def check_options(options: VisualizeConfig) -> None:
    """Raise ValueError for options out of range, and for a query that is no file."""
    check_ranges(options)
    if options.query is not None and not Path(options.query).is_file():
        raise ValueError(f"no such photo: {options.query}")


def main() -> None:
    options = read_flags(VisualizeConfig, None, __doc__)
    check_options(options)
    source = as_file(options.checkpoint) or Path(options.checkpoint)
    images = Path(options.images).resolve()
    name = images.name if images.is_dir() else images.stem  # a folder may be called a.b
    pictures = source.parent / "pictures"
    folder = options.output_dir or pictures / name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"need a folder for --output-dir, got {folder}")
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"no pictures can be written to {folder}: give another --output-dir")
    write_pictures(folder, draw_pictures(options))
    if options.output_dir:
        write_index(folder, [folder])
    else:
        write_index(pictures, sorted(x for x in pictures.iterdir() if x.is_dir()))


if __name__ == "__main__":
    run_command(main)
