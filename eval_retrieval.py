"""Evaluate a frozen backbone by retrieval: which images are most similar to a given one.

    python eval_retrieval.py runs/vits16/ckpt.safetensors
    python eval_retrieval.py dino_vits16 --data photos
    python eval_retrieval.py dino_vits16 --ground-truth roxford5k/gnd_roxford5k.pkl

Each labelled image of the test split, or of all where there are no splits, is a query, and the
others of its class are to come first. With --ground-truth it is revisited Oxford or Paris
(Radenovic et al., arXiv 1803.11285), as DINO has it (arXiv 2104.14294, section 4.2.1): whole images
in their aspect ratio, queries not cropped; Paris with --image-size 512 --multiscale. Similarity is
the cosine.
Axes: n images, m queries, d features, b batch.
"""

import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from config import setting
from data import ImageDataset
from folders import some_of
from harness.command import own_input, read_flags, run_command
from harness.distributed import make_accelerator
from harness.evaluation import (
    EvalConfig,
    FrozenBackbone,
    extract,
    open_backbone,
    open_split,
    open_splits,
    report,
    say_notes,
    size_facts,
    write_results,
)
from harness.feature_maps import feature_map, generalised_mean, sizes_named
from harness.flags import check_ranges
from harness.opened_network import normalized
from harness.ranking import average_precision
from tar_shards import as_bytes

KS = (1, 5, 10)
USUAL_SIZE = 224  # pixels, of the images of Oxford and Paris
ENTRIES = 1 << 24  # of a block of similarities: 64 MiB


@dataclass(frozen=True)
class RetrievalConfig:
    evaluation: EvalConfig
    # gnd_roxford5k.pkl or gnd_rparis6k.pkl; its images are those of --data, or of jpg/ beside it
    ground_truth: Path | None = None
    # pixels, longer side of the images that --ground-truth names [paper: 224; 512 for Paris]; None:
    # 224
    image_size: int | None = setting(None, above=0, most=4096)
    # class: a ViT's class token, or what a network pools; gem: the generalised mean of its patches
    pooling: Literal["class", "gem"] = "class"
    # exponent of the generalised mean: 1 is the mean, a large one nearly the maximum
    gem_power: float = setting(3.0, above=0, most=16)
    # mean over three sizes of each image: whole, 0.71 and 0.5
    multiscale: bool = False


def check_flags(options: RetrievalConfig) -> None:
    """Raise ValueError for settings out of range, or that contradict each other."""
    check_ranges(options)
    if options.ground_truth is not None and options.evaluation.val is not None:
        raise ValueError("--ground-truth names its queries: not with --val")
    if options.ground_truth is not None and options.evaluation.eval_size is not None:
        raise ValueError("--ground-truth takes whole images, of --image-size: not with --eval-size")
    if options.ground_truth is None and options.image_size is not None:
        raise ValueError(
            "--image-size is for --ground-truth: classes are searched at the run's size"
        )


# ---------------------------------------------------------------- scores


@torch.no_grad()
def retrieval_scores(features: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> dict:
    """Return mAP and recall at ks in %, each of n images being searched among all others.

    Features are (n, d), labels (n,) int64. Recall at k is the share of the queries that have one of
    their class among the first k. Images that are alone in their class are no queries. Of images
    that are equally similar those of other classes come first, so that a network that sees no
    difference finds nothing; so it is with features that are not finite.
    """
    features = F.normalize(features.float(), dim=1)
    precisions: list[float] = []
    first_places: list[int] = []
    for rows in torch.arange(len(features)).split(max(1, ENTRIES // len(features))):
        similarity = features[rows] @ features.T
        similarity = similarity.nan_to_num(nan=-2)  # less than any cosine
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # the query itself comes last
        is_same_class = labels == labels[rows][:, None]
        # In each row other classes' images are moved before those of the query's class. The sort is
        # stable: among equal similarities they stay first, and the query, at -inf, comes last.
        others_first = is_same_class.byte().argsort(dim=1, stable=True)
        similarity = similarity.gather(1, others_first)
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :-1]
        # what `order` points into is the moved row: `others_first` says which image stands there
        is_positive = is_same_class.gather(1, others_first.gather(1, order)).cpu().numpy()
        for of_query in is_positive:
            places = np.flatnonzero(of_query)
            if len(places):
                precisions.append(average_precision(places, len(places)))
                first_places.append(places[0])
    if not precisions:
        raise ValueError("no class has two images: nothing can be found")
    recall = {str(k): 100 * float(np.mean(np.array(first_places) < k)) for k in ks}
    return {"map": 100 * float(np.mean(precisions)), "recall": recall, "queries": len(precisions)}


# ---------------------------------------------------------------- revisited Oxford and Paris


class GroundTruth(NamedTuple):
    images: list[str]  # (n,) names of the files, without .jpg
    queries: list[str]  # (m,)
    answers: list[dict[str, np.ndarray]]  # (m,) of `easy`, `hard`, `junk`: rows of images


def _latin1(text: str, encoding: str) -> bytes:
    """Stand in for _codecs.encode, as a call of which pickle's old protocols write bytes."""
    return text.encode("latin1")


def _harmless_globals() -> dict[tuple[str, str], object]:
    """Return the functions that make NumPy's arrays and numbers, by their names in any NumPy."""
    found: dict[tuple[str, str], object] = {
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("_codecs", "encode"): _latin1,
    }
    # private ones, asked of an array and a number: where they lie differs by version
    for core in ("numpy.core", "numpy._core"):
        found[f"{core}.multiarray", "_reconstruct"] = np.zeros(1).__reduce__()[0]
        found[f"{core}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
        found[f"{core}.numeric", "_frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]
    return found


class PlainUnpickler(pickle.Unpickler):
    """An unpickler of plain data and NumPy's arrays: what else a file names is never run."""

    harmless = _harmless_globals()

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.harmless:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which could run code")
        return self.harmless[module, name]


def read_ground_truth(path: Path) -> GroundTruth:
    """Read gnd_roxford5k.pkl or gnd_rparis6k.pkl. ValueError where it is no such file.

    It runs no code. The queries' boxes, `bbx`, are not read.
    """
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file, encoding="latin1").load()
        images, queries = list(content["imlist"]), list(content["qimlist"])
        answers = [
            {kind: _rows(answer[kind], len(images)) for kind in ("easy", "hard", "junk")}
            for answer in content["gnd"]
        ]
    except OSError:
        raise
    except Exception as error:  # a damaged file can make the unpickler raise anything
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise ValueError(f"{path} is no ground truth of Oxford or Paris: {reason}") from error
    if len(answers) != len(queries) or not queries:
        text = f"need an answer for each query, got {len(answers)} and {len(queries)}"
        raise ValueError(f"{path} is no ground truth of Oxford or Paris: {text}")
    if not all(isinstance(name, str) for name in images + queries):
        raise ValueError(f"{path} is no ground truth of Oxford or Paris: need images by name")
    return GroundTruth(images, queries, answers)


def _rows(values: object, num_images: int) -> np.ndarray:
    """Return an answer as rows of images. ValueError where it is none."""
    rows = np.asarray(values).ravel()
    if len(rows) == 0:
        return rows.astype(np.int64)
    if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= num_images:
        raise ValueError(f"need rows of its {num_images} images, got {str(rows)[:50]}")
    return rows.astype(np.int64)


MODES = {  # what is to be found, and what does not count where it is found
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


def revisited_scores(
    ranking: np.ndarray, answers: Sequence[dict[str, np.ndarray]], ks: Sequence[int] = KS
) -> dict[str, dict]:
    """Return mAP and mean precision at ks in % for each of MODES.

    `ranking` (m, n) has the rows of all images for each query, most similar first. Queries with
    nothing to be found are left out. As the published protocol has it, precision at k is that at
    the last positive where all of them come before k.
    """
    scores: dict[str, dict] = {}
    for mode, (wanted, ignored) in MODES.items():
        precisions: list[float] = []
        precisions_at: list[list[float]] = []
        for ranked, answer in zip(ranking, answers, strict=True):
            positives = np.concatenate([answer[kind] for kind in wanted])
            junk = np.concatenate([answer[kind] for kind in ignored])
            if not len(positives):
                continue
            # an image that is both is to be found
            counted = ranked[~np.isin(ranked, np.setdiff1d(junk, positives))]
            places = np.flatnonzero(np.isin(counted, positives))
            precisions.append(average_precision(places, len(positives)))
            depths = [min(places[-1] + 1, k) for k in ks]
            precisions_at.append([float((places < depth).sum() / depth) for depth in depths])
        if precisions:
            at = (100 * np.mean(precisions_at, axis=0)).tolist()
            scores[mode] = {
                "map": 100 * float(np.mean(precisions)),
                "precision": {str(k): value for k, value in zip(ks, at, strict=True)},
                "queries": len(precisions),
            }
    return scores


def fit_longer_side(image: Tensor, size: int) -> Tensor:
    """Return (c, h, w) uint8 whose longer side is at most `size`, as Pillow's thumbnails are."""
    thumbnail = TF.to_pil_image(image)
    thumbnail.thumbnail((size, size), Image.Resampling.LANCZOS)
    return TF.pil_to_tensor(thumbnail)


def images_of(truth: GroundTruth, folder: Path, size: int) -> ImageDataset:
    """Open queries, then images. ValueError where some are missing."""
    paths = [folder / f"{name}.jpg" for name in truth.queries + truth.images]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        text = f"{len(missing):,} of {len(paths):,} images are not in {folder}"
        raise ValueError(f"{text}: {some_of(missing)}")
    dataset = ImageDataset(as_bytes(map(str, paths)), None)
    dataset.transform = partial(fit_longer_side, size=size)
    return dataset


# ---------------------------------------------------------------- features


def pooled(backbone: nn.Module, options: RetrievalConfig) -> Callable[[Tensor], Tensor]:
    """Return the function from normalised images (b, c, h, w), of any size, to features (b, d)."""
    patch_size = getattr(backbone, "patch_size", 1)

    def features_of(images: Tensor) -> Tensor:
        # what is left right and below of whole patches is cut, as the original's convolution does
        height, width = (side // patch_size * patch_size for side in images.shape[2:])
        if not height or not width:
            given = f"{images.shape[3]} x {images.shape[2]}"
            raise ValueError(f"need images of at least {patch_size} px a side, got {given} px")
        images = images[..., :height, :width]
        if options.pooling == "class":
            return backbone(images)
        return generalised_mean(feature_map(backbone, images), options.gem_power)

    def over_scales(images: Tensor) -> Tensor:
        smaller = [
            F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
            for scale in (0.5**0.5, 0.5)
        ]
        return torch.stack([features_of(scaled) for scaled in [images, *smaller]]).mean(dim=0)

    return over_scales if options.multiscale else features_of


def features_of_images(
    images: ImageDataset,
    network: FrozenBackbone,
    options: RetrievalConfig,
    accelerator: Accelerator,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Return features (n, d) and labels (n,) of the images that can be read. A collective."""
    features_of = pooled(network.backbone, options)

    def forward(pixels: Tensor) -> Tensor:
        normalised = normalized(pixels, network.preparation)
        # images of --ground-truth differ in size: one process alone may have one that is too small
        fault_of_one = nullcontext() if options.ground_truth is None else own_input()
        with fault_of_one, sizes_named(network.facts["arch"], normalised):
            return features_of(normalised)

    workers = options.evaluation.num_workers
    extracted = extract(forward, images, accelerator, batch_size, workers)
    if images.labels is None and len(extracted.rows) < len(images):
        unread = np.setdiff1d(np.arange(len(images)), extracted.rows.cpu().numpy())
        raise ValueError(images.why_unreadable(int(unread[0])))
    return extracted.features, extracted.labels


# ---------------------------------------------------------------- main


def evaluate_classes(
    options: RetrievalConfig, accelerator: Accelerator
) -> tuple[dict, Table, dict]:
    """Search each labelled image among the others. Return facts, table, results. A collective.

    The images are the data's test split, or all of them where they have no splits.
    """
    network = open_backbone(options.evaluation, accelerator)
    _, images = open_splits(network, accelerator)
    if not images.has_test:
        levels = images.levels
        images = open_split(network.preparation, "train")
        images.levels = levels
    batch_size = options.evaluation.batch_size
    features, labels = features_of_images(images, network, options, accelerator, batch_size)
    scores = retrieval_scores(features, labels)
    table = Table("mAP %", *(f"recall at {k} %" for k in KS), title="retrieval within the classes")
    table.add_row(f"{scores['map']:.2f}", *(f"{x:.2f}" for x in scores["recall"].values()))
    alone = len(features) - scores["queries"]
    if alone:
        table.caption = f"{alone:,} images are alone in their class, and no queries"
    return network.facts | size_facts(features), table, {"retrieval": scores}


def evaluate_revisited(
    options: RetrievalConfig, accelerator: Accelerator
) -> tuple[dict, Table, dict]:
    """Search what a ground truth names. Return facts, table and results. A collective."""
    truth = read_ground_truth(options.ground_truth)
    folder = Path(options.evaluation.data or options.ground_truth.parent / "jpg")
    image_size = options.image_size or USUAL_SIZE
    images = images_of(truth, folder, image_size)
    network = open_backbone(replace(options.evaluation, data=str(folder)), accelerator)
    del network.facts["eval_size"]  # its images are no central crops
    images.channels = network.preparation.channels
    images.set_levels(network.preparation.levels)
    say_notes(images, accelerator)
    # images of different shapes are no batch
    features, _ = features_of_images(images, network, options, accelerator, batch_size=1)
    features = F.normalize(features, dim=1)
    queries, database = features.split([len(truth.queries), len(truth.images)])
    ranking = (queries @ database.T).argsort(dim=1, descending=True, stable=True)
    scores = revisited_scores(ranking.cpu().numpy(), truth.answers)
    title = f"{len(truth.queries):,} queries in {len(truth.images):,} images"
    table = Table("mode", "mAP %", *(f"mP at {k} %" for k in KS), title=title)
    for mode, of_mode in scores.items():
        values = [of_mode["map"], *of_mode["precision"].values()]
        table.add_row(mode, *(f"{value:.2f}" for value in values))
    settings = {"image_size": image_size, "ground_truth": str(options.ground_truth)}
    return network.facts | size_facts(features) | settings, table, {"revisited": scores}


def main() -> None:
    options = read_flags(RetrievalConfig, None, __doc__)
    check_flags(options)
    accelerator = make_accelerator(options.evaluation.mixed_precision)
    evaluate = evaluate_classes if options.ground_truth is None else evaluate_revisited
    facts, table, results = evaluate(options, accelerator)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    settings = {"pooling": options.pooling, "multiscale": options.multiscale}
    if options.pooling == "gem":
        settings["gem_power"] = options.gem_power
    report(facts, table)
    write_results(options.evaluation.json_out, facts | settings, results)


if __name__ == "__main__":
    run_command(main)
