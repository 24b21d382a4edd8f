"""Evaluate a frozen backbone by copy detection: which image a distorted copy was made of.

    python eval_copies.py runs/vits16 --data photos
    python eval_copies.py runs/vits16 --data photos --distractors more_photos --whitening others
    python eval_copies.py dino_vits16 --copydays copydays --distractors more_photos --image-size 320

Copies of some of the images are made here, by a list of distortions; each is to find its image
among all of --data and --distractors. No labels are needed. DINO trains for crops, blur, flips
and most of these colours, so that those rows say whether it learned what it was asked; JPEG,
rotation and text are new to it. With --copydays the copies are the published ones (Douze et al.,
2009), as DINO has it (arXiv 2104.14294, section 4.2.1). Images are squashed to squares. A ViT gives
its class token and the generalised mean of its patch tokens, other networks their output.
Similarity is the cosine, and the first 20 images count.
Axes: n images of the database, m queries, d features, b batch, c h w image.
"""

import copy
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2 import functional as TF

from config import setting
from data import NAMED_SETS, ImageDataset, Sample, require_source
from folders import images_in, some_of
from harness.command import read_flags, run_command
from harness.distributed import make_accelerator
from harness.evaluation import (
    EvalConfig,
    Extracted,
    FrozenBackbone,
    extract,
    is_vit,
    open_backbone,
    open_split,
    open_training_images,
    report,
    size_facts,
    write_results,
)
from harness.feature_maps import generalised_mean, sizes_named
from harness.feature_quality import evenly
from harness.flags import check_ranges
from harness.opened_network import Preparation, normalized
from harness.ranking import average_precision
from multicrop import hash_keys, uniforms
from pixels import image_suffixes, to_canvas
from tar_shards import as_bytes

COUNTED = 20  # images that a query finds, as the published protocol has it
SMALLEST_SHARE = 1e-5  # of the largest eigenvalue: smaller ones are whitened as if they were this
WHITENING_IMAGES = 20_000  # that whitening is learned from at most: as many as published
ROWS = 65_536  # of features that are whitened at once
LARGEST = 1024  # pixels, shorter side of what copies are made of: larger photographs are reduced


@dataclass(frozen=True)
class CopiesConfig:
    evaluation: EvalConfig
    # images that copies are made of, evenly spaced in --data
    num_queries: int = setting(100, above=0, most=100_000)
    # more images to search among, as --data takes them
    distractors: str | None = None
    # images that whitening is learned from, as --data takes them: none of the others, and more than
    # there are features
    whitening: str | None = None
    # folder of the published copies: original/, strong/, jpegqual/15/ ..., crops/10/ ...
    copydays: Path | None = None
    # pixels, side of the squares that images are squashed to [paper: 320]; None: the evaluations'
    # crop
    image_size: int | None = setting(None, above=0, most=4096)
    # fixes where copies are cropped, and what is written on them
    seed: int = setting(0, most=1 << 62)


# ---------------------------------------------------------------- distortions

Distortion = Callable[[Tensor, Sequence[float]], Tensor]  # image (c, h, w) uint8, draws in 0..1
NUM_DRAWS = 8  # random numbers that a copy has
WORDS = ("COPY", "sample", "not for sale", "2009", "breaking news", "property of")


def jpeg(image: Tensor, draws: Sequence[float], quality: int) -> Tensor:
    content = io.BytesIO()
    TF.to_pil_image(image).save(content, "JPEG", quality=quality)
    return TF.pil_to_tensor(Image.open(content))


def crop(image: Tensor, draws: Sequence[float], percent: int) -> Tensor:
    """Keep so many percent of the area, anywhere, in the image's aspect ratio."""
    height, width = image.shape[1:]
    new_height, new_width = (
        max(1, round(side * (percent / 100) ** 0.5)) for side in (height, width)
    )
    top = round(draws[0] * (height - new_height))
    left = round(draws[1] * (width - new_width))
    return image[:, top : top + new_height, left : left + new_width]


def blur(image: Tensor, draws: Sequence[float], percent: float) -> Tensor:
    """Blur by a standard deviation of so many percent of the shorter side."""
    sigma = percent / 100 * min(image.shape[1:])
    radius = min(math.ceil(3 * sigma), min(image.shape[1:]) - 1)
    width = 2 * radius + 1
    # rows, then columns: torchvision's kernel of both takes width / 2 times as long
    rows = TF.gaussian_blur(image.float(), [width, 1], sigma)
    blurred = TF.gaussian_blur(rows, [1, width], sigma)
    return blurred.round().to(torch.uint8)


def rotate(image: Tensor, draws: Sequence[float], degrees: int) -> Tensor:
    """Rotate, and keep the largest part in the image's aspect ratio that has no empty corners."""
    if degrees % 90 == 0:
        return image.rot90(degrees // 90, dims=(1, 2))
    height, width = image.shape[1:]
    angle, aspect = math.radians(degrees), max(width / height, height / width)
    scale = 1 / (math.cos(angle) + aspect * math.sin(angle))
    rotated = TF.rotate(image, degrees, TF.InterpolationMode.BILINEAR)
    # less two pixels, which are mixed with what is outside
    return TF.center_crop(rotated, [max(1, int(scale * side) - 2) for side in (height, width)])


def text(image: Tensor, draws: Sequence[float]) -> Tensor:
    """Write a line of large white words with dark edges across the image."""
    picture = TF.to_pil_image(image)
    words = WORDS[int(draws[0] * len(WORDS))]
    largest = ImageFont.load_default(100).getlength(words)
    size = max(6, 0.9 * picture.width * 100 / largest)
    font = ImageFont.load_default(min(size, picture.height / 3))
    place = (0.05 * picture.width, draws[1] * 0.7 * picture.height)
    edge = max(1, round(font.size / 16))
    ImageDraw.Draw(picture).text(
        place, words, fill="white", font=font, stroke_width=edge, stroke_fill="black"
    )
    return TF.pil_to_tensor(picture)


def gray(image: Tensor, draws: Sequence[float]) -> Tensor:
    return TF.rgb_to_grayscale(image, num_output_channels=3)


def brightness(image: Tensor, draws: Sequence[float], factor: float) -> Tensor:
    return (image.float() * factor).clamp(0, 255).round().to(torch.uint8)


def hue(image: Tensor, draws: Sequence[float], turn: float) -> Tensor:
    return TF.adjust_hue(image, turn)


def flip(image: Tensor, draws: Sequence[float]) -> Tensor:
    return image.flip(2)


DISTORTIONS: dict[str, Distortion] = {
    **{f"JPEG quality {q}": partial(jpeg, quality=q) for q in (75, 30, 10, 5, 3)},
    **{f"crop to {p} % of the area": partial(crop, percent=p) for p in (80, 50, 30, 20, 10)},
    **{f"blur by {p} % of the side": partial(blur, percent=p) for p in (1, 2, 4)},
    **{f"rotation by {angle} degrees": partial(rotate, degrees=angle) for angle in (5, 15, 45, 90)},
    "text": text,
    "gray": gray,
    "half as bright": partial(brightness, factor=0.5),
    "twice as bright": partial(brightness, factor=2),
    "hue turned by a quarter": partial(hue, turn=0.25),
    "flip": flip,
}
FOR_RGB = ("JPEG", "text", "gray", "hue")  # names that begin so need red, green and blue


def distortions_for(channels: int) -> dict[str, Distortion]:
    """Return the distortions that images of so many channels can have."""
    if channels == 3:
        return DISTORTIONS
    return {name: x for name, x in DISTORTIONS.items() if not name.startswith(FOR_RGB)}


class Copies(Dataset):
    """Distorted copies of some rows of a data set, squashed to squares of `size` pixels.

    A copy depends on seed, row and the distortion's name alone. Its index is its place in `rows`.
    """

    def __init__(
        self,
        images: ImageDataset,
        rows: Sequence[int],
        name: str,
        distortion: Distortion,
        size: int,
        seed: int,
    ) -> None:
        self.images = images  # whole
        self.rows = rows
        self.distortion = distortion
        self.size = size
        # by the name's bytes, one after the other: each distortion has draws of its own
        keys = hash_keys(seed, *name.encode(), torch.tensor(rows))
        self.draws = uniforms(keys, NUM_DRAWS).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        sample = self.images[row]
        image = sample.image
        if min(image.shape[1:]) > LARGEST:
            image = TF.resize(image, [LARGEST])
        distorted = self.distortion(image, self.draws[index])
        # where `row` cannot be decoded, the data set returns another image: extract leaves it out
        is_read = sample.source == row
        canvas = to_canvas(distorted, self.size)
        return sample._replace(image=canvas, index=index, source=index if is_read else -1)


# ---------------------------------------------------------------- the published copies


COPIES = ("strong", "jpegqual", "crops")  # the last two have a folder for each strength


def open_copydays(folder: Path) -> tuple[dict[str, ImageDataset], dict[str, np.ndarray]]:
    """Open Copydays. Return the images of each block, `original` first, and their groups.

    A copy is of the group that the first four digits of its name say, as its original is. Raises
    ValueError for a folder of another layout.
    """
    blocks = {"original": folder / "original", "strong": folder / "strong"}
    for kind in COPIES[1:]:
        of_kind = [path for path in (folder / kind).glob("*") if path.is_dir()]
        of_kind.sort(key=lambda path: path.name.zfill(4))
        blocks |= {f"{kind} {path.name}": path for path in of_kind}
    images: dict[str, ImageDataset] = {}
    groups: dict[str, np.ndarray] = {}
    for name, place in blocks.items():
        paths = images_in(place, image_suffixes()) if place.is_dir() else []
        others = [path.name for path in paths if not path.stem[:4].isdecimal()]
        if others:
            raise ValueError(f"need names like 200001.jpg in {place}, got {some_of(others)}")
        if paths:
            images[name] = ImageDataset(as_bytes(map(str, paths)), None)
            groups[name] = np.array([path.stem[:4] for path in paths], np.int64)
    if "original" not in images or len(images) < 2:
        wanted = "original/ and strong/, jpegqual/* or crops/*"
        raise ValueError(
            f"need {wanted} with images in {folder}, got {', '.join(images) or 'none'}"
        )
    return images, groups


# ---------------------------------------------------------------- features and scores


def copy_features(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function from normalised images (b, c, h, w) to features (b, d).

    Of a ViT the class token and the generalised mean, of power 4, of its patch tokens.
    """
    if not is_vit(backbone):
        return backbone

    def features_of(images: Tensor) -> Tensor:
        tokens = backbone.forward_features(images)
        patches = tokens[:, backbone.num_prefix_tokens :].mT  # (b, d, p)
        return torch.cat([tokens[:, 0], generalised_mean(patches, power=4)], dim=1)

    return features_of


@dataclass(frozen=True)
class Whitening:
    """What makes all directions of some features equally strong: (features - mean) @ axes."""

    mean: Tensor  # (d,) float64, on the CPU
    axes: Tensor  # (d, d) float64, on the CPU

    @staticmethod
    def require_enough(num_images: int, num_features: int) -> None:
        """Raise ValueError for no more images than features: their axes are not known."""
        if num_images <= num_features:
            wanted = f"need more images for --whitening than {num_features:,} features"
            raise ValueError(f"{wanted}, got {num_images:,}")

    @classmethod
    def learn(cls, features: Tensor) -> "Whitening":
        """Learn from features (n, d). As published, the axes are of features not centred."""
        cls.require_enough(*features.shape)
        features = features.cpu().double()  # Apple's GPUs have no float64
        values, vectors = torch.linalg.eigh(features.T @ features / len(features))
        values = values.clamp(min=SMALLEST_SHARE * values.max().item())
        return cls(features.mean(dim=0), vectors / values.sqrt())

    def __call__(self, features: Tensor) -> Tensor:
        """Return features (n, d) whitened, float32, on their device."""
        whitened = torch.empty_like(features, dtype=torch.float32)
        for start in range(0, len(features), ROWS):  # all at once in float64 may not fit
            some = features[start : start + ROWS].cpu().double()
            whitened[start : start + ROWS] = (some - self.mean) @ self.axes
        return whitened


def copy_scores(
    queries: Tensor, query_groups: Tensor, database: Tensor, groups: Tensor
) -> dict[str, float | int]:
    """Return mAP and recall at 1 in % of queries (m, d) among images (n, d) of the same group.

    Both are of norm 1. Images that are as similar as the one searched for come before it, so that
    a network that sees no difference finds nothing.
    """
    precisions: list[float] = []
    is_first: list[bool] = []
    for query, group in zip(queries, query_groups, strict=True):
        similarity = database @ query
        positives = similarity[groups == group].sort(descending=True).values
        if not len(positives):
            continue
        others = similarity[groups != group]
        # not "others >= positive": of features that are not finite, nothing is found
        above = torch.stack([(~(others < positive)).sum() for positive in positives])
        places = (above + torch.arange(len(positives), device=above.device)).cpu().numpy()
        precisions.append(average_precision(places[places < COUNTED], len(positives)))
        is_first.append(bool(places[0] == 0))
    if not precisions:
        raise ValueError("none of the copies has its image among those that are searched")
    return {
        "map": 100 * float(np.mean(precisions)),
        "recall_at_1": 100 * float(np.mean(is_first)),
        "queries": len(precisions),
    }


# ---------------------------------------------------------------- main


class Extractor:
    """Features of images as copy detection wants them, from one frozen backbone."""

    def __init__(
        self, network: FrozenBackbone, options: CopiesConfig, accelerator: Accelerator
    ) -> None:
        self.network = network
        self.options = options
        self.accelerator = accelerator
        self.size = options.image_size or network.preparation.size
        self.features_of = copy_features(network.backbone)
        self.levels = network.preparation.levels  # None until those of what is searched are known

    def _forward(self, pixels: Tensor) -> Tensor:
        images = normalized(pixels, self.network.preparation)
        with sizes_named(self.network.facts["arch"], images):
            return self.features_of(images)

    def features(self, images: Dataset) -> Extracted:
        """Compute features of squares. A collective."""
        evaluation = self.options.evaluation
        return extract(
            self._forward, images, self.accelerator, evaluation.batch_size, evaluation.num_workers
        )

    def require_more_images(self) -> None:
        """Raise ValueError for --distractors or --whitening without images, or with too few.

        Called before features are computed, which takes the time.
        """
        num_features = self.network.backbone.output_dim
        if is_vit(self.network.backbone):
            num_features *= 2  # class token and patch tokens
        for flag, place in more_images(self.options).items():
            with self.accelerator.local_main_process_first():  # which may have to download
                images = open_split(self._preparation_of(place), "train")
            if flag == "--whitening":
                Whitening.require_enough(min(len(images), WHITENING_IMAGES), num_features)

    def _preparation_of(self, data: str) -> Preparation:
        return replace(
            self.network.preparation, data=data, val=None, take_splits=False, levels=self.levels
        )

    def open(self, data: str) -> ImageDataset:
        """Open all images that `data` names, with the levels of those that were opened first."""
        images = open_training_images(self._preparation_of(data), self.accelerator)
        self.levels = images.levels
        return images

    def features_at(self, data: str, most: int | None = None) -> Tensor:
        """Return the features (n, d) of images that --data could name, of `most`. A collective."""
        images = self.open(data)
        rows = evenly(len(images), most or len(images)).tolist()
        return self.features(Subset(images.as_canvases(self.size), rows)).features


def made_copies(extractor: Extractor) -> tuple[Extracted, dict[str, Extracted]]:
    """Return the features of --data, and of the copies made of some of it. A collective."""
    network, options = extractor.network, extractor.options
    images = extractor.open(network.preparation.data)
    # The distortions take whole images: of a copy, since as_canvases changes `images` below. What
    # is much larger than `resized_to` may be decoded at a part of its size.
    whole = copy.copy(images)
    whole.transform, whole.resized_to = nn.Identity(), LARGEST
    database = extractor.features(images.as_canvases(extractor.size))
    rows = evenly(len(images), options.num_queries).tolist()
    copies: dict[str, Extracted] = {}
    for name, distortion in distortions_for(network.preparation.channels).items():
        dataset = Copies(whole, rows, name, distortion, extractor.size, options.seed)
        found = extractor.features(dataset)
        of_rows = torch.tensor(rows, device=found.rows.device)[found.rows]
        copies[name] = found._replace(rows=of_rows)
    return database, copies


def published_copies(extractor: Extractor) -> tuple[Extracted, dict[str, Extracted]]:
    """Return the features of Copydays' originals, and of its copies; rows are groups. A collective.

    The originals are queries, too, as published.
    """
    images, groups = open_copydays(extractor.options.copydays)
    copies: dict[str, Extracted] = {}
    for name, block in images.items():
        block.channels = extractor.network.preparation.channels
        block.set_levels(extractor.levels)
        extractor.levels = block.levels  # of the originals, which come first
        found = extractor.features(block.as_canvases(extractor.size))
        of_group = torch.from_numpy(groups[name]).to(found.rows.device)
        copies[name] = found._replace(rows=of_group[found.rows])
    return copies["original"], copies


def evaluate(options: CopiesConfig, accelerator: Accelerator) -> tuple[dict, Table, dict]:
    """Search each copy's image. Return facts, table and results. A collective."""
    evaluation = options.evaluation
    if options.copydays is not None:
        open_copydays(options.copydays)  # before a network is loaded
        evaluation = replace(evaluation, data=str(options.copydays))
    network = open_backbone(evaluation, accelerator)
    del network.facts["eval_size"]  # its images are no central crops
    check_places(options, network.preparation.data)
    extractor = Extractor(network, options, accelerator)
    extractor.require_more_images()
    compute_copies = made_copies if options.copydays is None else published_copies
    database, copies = compute_copies(extractor)
    features, groups = database.features, database.rows
    if options.distractors is not None:
        more = extractor.features_at(options.distractors)
        features = torch.cat([features, more])
        groups = torch.cat([groups, groups.new_full((len(more),), -1)])
    whiten = torch.nn.Identity()
    if options.whitening is not None:
        whiten = Whitening.learn(extractor.features_at(options.whitening, WHITENING_IMAGES))
    searched = F.normalize(whiten(features), dim=1)
    scores: dict[str, dict] = {}
    for name, of_copy in copies.items():
        queries = F.normalize(whiten(of_copy.features), dim=1)
        scores[name] = copy_scores(queries, of_copy.rows, searched, groups)
    table = Table("copies", "mAP %", "recall at 1 %", title=f"found among {len(features):,} images")
    for name, of_name in scores.items():
        table.add_row(name, f"{of_name['map']:.2f}", f"{of_name['recall_at_1']:.2f}")
    mean = {
        key: float(np.mean([x[key] for x in scores.values()])) for key in ("map", "recall_at_1")
    }
    table.add_section()
    table.add_row("mean", f"{mean['map']:.2f}", f"{mean['recall_at_1']:.2f}")
    counts = [of_name["queries"] for of_name in scores.values()]
    fewest, most = min(counts), max(counts)
    num_copies = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    table.caption = f"{num_copies} copies of each kind"
    settings = {
        "image_size": extractor.size,
        "distractors": options.distractors,
        "whitening": options.whitening,
    }
    facts = network.facts | size_facts(features) | settings
    return facts, table, {"copies": scores, "mean": mean}


def check_flags(options: CopiesConfig) -> None:
    """Raise ValueError for settings out of range, or that contradict each other."""
    check_ranges(options)
    if options.copydays is not None and options.evaluation.data is not None:
        raise ValueError("--copydays brings its images: not with --data")
    if options.copydays is not None:
        for name in ("num_queries", "seed"):
            if getattr(options, name) != getattr(CopiesConfig, name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is for copies that are made here: not with --copydays")
    if options.evaluation.val is not None:
        raise ValueError("copies are made of --data and need no --val")
    if options.evaluation.eval_size is not None:
        raise ValueError("images are squashed to --image-size here: not with --eval-size")
    if not options.evaluation.splits:
        raise ValueError("copies are made of all images of --data: not with --no-splits")
    for flag, place in more_images(options).items():
        require_source(place, flag)


def more_images(options: CopiesConfig) -> dict[str, str]:
    """Return what --distractors and --whitening name, by flag."""
    given = {"--distractors": options.distractors, "--whitening": options.whitening}
    return {flag: place for flag, place in given.items() if place is not None}


def check_places(options: CopiesConfig, data: str) -> None:
    """Raise ValueError where images that must be others are those of `data`, or of another flag.

    Among distractors, an image of `data` would be a copy that counts as wrong. The same holds where
    one folder lies in the other. Copydays' own folders are few, and others may lie beside them.
    """
    others = [data]
    if options.copydays is not None:
        others = [f"{options.copydays}/{name}" for name in ("original", *COPIES)]
    for flag, place in more_images(options).items():
        for other in others:
            if is_within(place, other) or is_within(other, place):
                text = f"need other images for {flag} than those that are searched"
                given = f"{place} for both" if place == other else f"{place} beside {other}"
                raise ValueError(f"{text}, got {given}")
        others.append(place)


def is_within(place: str, folder: str) -> bool:
    """Tell whether a path is another one or lies in it, links being followed.

    Names of data sets are no paths: they are compared as they are.
    """
    if place in NAMED_SETS or folder in NAMED_SETS:
        return place == folder
    return Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder))


def main() -> None:
    options = read_flags(CopiesConfig, None, __doc__)
    check_flags(options)
    accelerator = make_accelerator(options.evaluation.mixed_precision)
    facts, table, results = evaluate(options, accelerator)
    accelerator.end_training()
    if accelerator.is_main_process:
        report(facts, table)
        write_results(options.evaluation.json_out, facts, results)


if __name__ == "__main__":
    run_command(main)
