"""Judge a frozen backbone's patches by segmentation: k-NN of patches, and its attention's masks.

    python eval_segmentation.py runs/vits16/ckpt.safetensors --data photos
    python eval_segmentation.py dino_vits16 --data VOCdevkit/VOC2012

--data holds images/ and masks/ with files of the same names: PNGs with the number of a class for
each pixel, palettised or grey, 0 the background, 255 not judged. With train/ and val/ in it, each
of which holds these two, the first is remembered and the second tests; --val names another folder;
else a fixed tenth tests. Also PASCAL VOC as it is unpacked.

Patch k-NN: the memory holds patches of the training images, each with the class of most of its
pixels. A patch of a test image is classified by its most similar ones there, which vote with weight
exp(cosine / 0.07), as images do in eval_knn.py. The votes' shares are enlarged to the mask's size,
bilinear, and each pixel takes the largest. Mean IoU: of all test images' pixels together, by class,
then over the classes that occur in the test's masks or are predicted.

Attention (DINO, arXiv 2104.14294, section 4.2.2): the patches that hold 60 % of the class token's
attention in the last block are compared with all that is no background, by the Jaccard index, in
each test image: of the best head of each image, and of the heads' mean.
Axes: n patches remembered, p patches of an image, d features, c classes, h w map or mask.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from config import setting
from data import held_out, permutation
from folders import images_in, number_of, some_of
from harness.command import own_input, read_flags, run_command
from harness.distributed import make_accelerator
from harness.evaluation import (
    FrozenBackbone,
    MapsConfig,
    check_folder,
    open_for_maps,
    report,
    with_levels_of,
    write_results,
)
from harness.feature_maps import (
    class_attention,
    feature_map,
    mass_mask,
    patch_map,
    resize_to_patches,
    sizes_named,
    why_attention_is_untrained,
    why_no_class_attention,
)
from harness.flags import check_ranges
from harness.masks import (
    VOID,
    jaccard,
    majority_on_grid,
    read_mask,
    read_names,
    require_each_name_once,
    require_same_size,
)
from harness.opened_network import normalized
from harness.terminal import printable_name
from pixels import decode, image_suffixes

IMAGE_FOLDERS = ("images", "JPEGImages")  # the second is PASCAL VOC's
MASK_FOLDERS = ("masks", "SegmentationClass")
VOC_LISTS = Path("ImageSets", "Segmentation")
MOST_CLASSES = 30  # that are printed one by one
ENTRIES = 1 << 24  # of a block of similarities: 64 MiB


@dataclass(frozen=True)
class SegmentationConfig:
    maps: MapsConfig
    # folder with images/ and masks/, or with train/ and val/ of these; or PASCAL VOC
    data: Path
    # folder with images/ and masks/ to test on; None: val/ or test/ in --data, else a fixed tenth
    val: Path | None = None
    # neighbours that vote for a patch
    k: int = setting(20, above=0, most=1_000_000)
    # temperature of the votes
    temperature: float = setting(0.07, above=0, most=100)
    # patches that are remembered, about: equally many of each training image, at least one, drawn
    # by chance
    memory_patches: int = setting(100_000, above=0, most=1_000_000_000)
    # fixes which patches are drawn
    draw_seed: int = setting(0, most=1 << 62)
    # share of the attention that its mask keeps [paper: 0.6]
    mass: float = setting(0.6, above=0, most=1)


# ---------------------------------------------------------------- images and masks


class Pair(NamedTuple):
    image: Path
    mask: Path


def pairs_in(folder: Path, notes: list[str]) -> list[Pair]:
    """Return the images of a folder that have a mask; how many have none goes into the notes.

    Raises ValueError where none has one.
    """
    images, masks = (
        next((folder / name for name in names if (folder / name).is_dir()), None)
        for names in (IMAGE_FOLDERS, MASK_FOLDERS)
    )
    if images is None or masks is None:
        raise ValueError(f"need folders images and masks in {folder}")
    paths = images_in(images, image_suffixes())
    masks_by_name = {path.stem: path for path in masks.iterdir() if path.suffix.lower() == ".png"}
    pairs = [Pair(path, masks_by_name[path.stem]) for path in paths if path.stem in masks_by_name]
    if not pairs:
        raise ValueError(f"need images in {images} with a PNG of the same name in {masks}")
    require_each_name_once([pair.image for pair in pairs], images, "image")
    without_mask = [path.name for path in paths if path.stem not in masks_by_name]
    if without_mask:
        what = f"{number_of(len(without_mask), 'image')} ({some_of(without_mask)})"
        notes.append(f"left out, without a mask in {masks}: {what}")
    return pairs


def read_splits(data: Path, val: Path | None, notes: list[str]) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs that are remembered and those that test; what is left out is noted."""
    test = next((data / name for name in ("val", "test") if (data / name).is_dir()), None)
    train = data / "train" if (data / "train").is_dir() else data
    if val or test:
        return pairs_in(train, notes), pairs_in(val or test, notes)
    pairs = pairs_in(data, notes)
    lists = [data / VOC_LISTS / f"{name}.txt" for name in ("train", "val")]
    if all(path.is_file() for path in lists):
        names = [set(read_names(path)) for path in lists]
        splits = [[pair for pair in pairs if pair.image.stem in of_split] for of_split in names]
        if not all(splits):
            raise ValueError(f"need images and masks that {lists[0]} and {lists[1]} name")
        return splits[0], splits[1]
    if len(pairs) < 2:
        raise ValueError(f"need >= 2 images with masks in {data}, got {len(pairs)}")
    is_test = held_out(len(pairs))
    train = [pair for pair, tests in zip(pairs, is_test, strict=True) if not tests]
    return train, [pair for pair, tests in zip(pairs, is_test, strict=True) if tests]


class Seen(NamedTuple):
    pixels: Tensor  # (1, c, h, w), normalised, on the device
    mask: np.ndarray  # (h, w) uint8, as large as the file's image


def see(pair: Pair, network: FrozenBackbone, size: int, faults: list[str]) -> Seen | None:
    """Read an image as the network sees it, and its mask.

    None where one of them cannot be read, or their sizes differ: why is added to `faults`.
    """
    preparation = network.preparation
    try:
        image = decode(os.fsencode(pair.image), preparation.levels, preparation.channels)
        mask = read_mask(pair.mask)
        require_same_size(mask, pair.mask, image)
    except (OSError, ValueError) as error:
        faults.append(str(error))
        return None
    resized = resize_to_patches(image, size, network.backbone)
    device = next(network.backbone.parameters()).device
    return Seen(normalized(resized[None].to(device), preparation), mask)


# ---------------------------------------------------------------- patch k-NN


def patches_of(pixels: Tensor, network: FrozenBackbone) -> tuple[Tensor, tuple[int, int]]:
    """Return the patches' features (p, d) of norm 1, and the shape (h, w) of their map."""
    with sizes_named(network.facts["arch"], pixels):
        features = feature_map(network.backbone, pixels)[0].float()
    return F.normalize(rearrange(features, "d h w -> (h w) d"), dim=1), features.shape[1:]


def remember(
    pairs: Iterable[tuple[int, Pair]],
    budget: int,
    network: FrozenBackbone,
    size: int,
    seed: int,
    faults: list[str],
) -> tuple[Tensor, Tensor]:
    """Return features (n, d) and classes (n,) of patches, at most `budget` of each numbered pair.

    Patches none of whose pixels is judged are left out, and so are pairs that cannot be used: why
    is added to `faults`. Both are on the CPU.
    """
    features_of_images: list[Tensor] = []
    classes_of_images: list[Tensor] = []
    for row, pair in pairs:
        seen = see(pair, network, size, faults)
        if seen is None:
            continue
        features, shape = patches_of(seen.pixels, network)
        classes = majority_on_grid(seen.mask, shape).flatten()
        judged = (classes != VOID).nonzero()[:, 0]
        drawn = judged[permutation(len(judged), seed, row)[:budget]]
        features_of_images.append(features[drawn.to(features.device)].cpu())
        classes_of_images.append(classes[drawn])
    if not features_of_images:  # a process that has no image
        return torch.empty(0, network.backbone.num_features), torch.empty(0, dtype=torch.int64)
    return torch.cat(features_of_images), torch.cat(classes_of_images)


@torch.no_grad()
def patch_votes(
    patches: Tensor,
    memory: Tensor,
    classes: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Return each patch's shares of votes (p, c), which sum to 1, by its k nearest in memory.

    Patches (p, d) and memory (n, d) have norm 1; classes are (n,) int64.
    """
    shares: list[Tensor] = []
    for some in patches.split(max(1, ENTRIES // len(memory))):
        nearest, places = (some @ memory.T).topk(min(k, len(memory)), dim=1)
        votes = (nearest / temperature).softmax(dim=1)
        of_classes = torch.zeros(len(some), num_classes, device=votes.device)
        shares.append(of_classes.scatter_add_(1, classes[places], votes))
    return torch.cat(shares)


def enlarged_classes(shares: Tensor, shape: tuple[int, int], mask_shape: Sequence[int]) -> Tensor:
    """Return the class (h, w) of each pixel of a mask, by the shares (p, c) of a map's patches."""
    # Only classes with a vote are enlarged: maps of all, perhaps 255, would fill gigabytes for a
    # large photograph.
    with_votes = shares.any(dim=0).nonzero()[:, 0]
    maps = rearrange(shares[:, with_votes], "(h w) c -> 1 c h w", h=shape[0])
    enlarged = F.interpolate(maps, size=tuple(mask_shape), mode="bilinear", align_corners=False)
    return with_votes[enlarged[0].argmax(dim=0)]


def confusion_of(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the number of judged pixels (c, c) of each true class, by rows, and each predicted."""
    is_judged = true != VOID
    # one number for each pair of a true and a predicted class: bincount counts the pixels of each
    cells = num_classes * true[is_judged].astype(np.int64) + predicted[is_judged]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores_of(confusion: np.ndarray) -> dict[str, object]:
    """Return mean IoU, pixels that are right, and IoU by class, in %.

    With them the mean IoU of a guess that is the most frequent class everywhere. Classes that
    neither occur nor are predicted do not count.
    """
    right, true, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    union = true + predicted - right
    iou = {int(c): 100 * float(right[c] / union[c]) for c in np.flatnonzero(union)}
    share = {c: 100 * float(true[c] / true.sum()) for c in iou}
    return {
        "mean_iou": float(np.mean(list(iou.values()))),
        "pixels_right": 100 * float(right.sum() / true.sum()),
        "iou": iou,
        "share_of_pixels": share,
        # everywhere predicted, a class has its share as IoU, and all others that occur have 0
        "mean_iou_of_one_class": max(share.values()) / int((true > 0).sum()),
    }


# ---------------------------------------------------------------- attention


def attention_jaccards(attention: Tensor, mask: np.ndarray, mass: float) -> tuple[float, float]:
    """Return the Jaccard index of the best head's mask, and of the heads' mean attention's.

    Attention is (head, h, w). Its masks hold the share `mass`; they are compared with all pixels of
    a mask that are neither background nor unjudged.
    """
    is_judged, is_object = mask != VOID, (mask > 0) & (mask != VOID)
    jaccards = []
    for of_head in [*attention, attention.mean(dim=0)]:
        cells = mass_mask(of_head, mass)[None, None].float()
        pixels = F.interpolate(cells, size=mask.shape, mode="nearest-exact")[0, 0]
        jaccards.append(jaccard((pixels > 0).numpy() & is_judged, is_object))
    return max(jaccards[:-1]), jaccards[-1]


def attention_of(pixels: Tensor, network: FrozenBackbone) -> Tensor:
    """Return the class token's attention to the patches (head, h, w), on the CPU."""
    with sizes_named(network.facts["arch"], pixels):
        tokens = class_attention(network.backbone, pixels)
        return patch_map(tokens, network.backbone, pixels)[0].cpu()


# ---------------------------------------------------------------- main


class Evaluated(NamedTuple):
    confusion: np.ndarray  # (c, c)
    jaccards: list[tuple[float, float]]  # one an image with an object
    num_memory: int
    num_train: int  # images that could be used
    num_test: int


def joined(parts: Iterable[list]) -> list:
    return [each for part in parts for each in part]


def number_used(num_images: int, faults: list[str], accelerator: Accelerator) -> int:
    """Return how many images could be used, and say once how many could not.

    Raises ValueError where none could.
    """
    if len(faults) == num_images:
        raise ValueError(faults[0])
    if faults:
        what = f"{number_of(len(faults), 'image')} with masks, the first because: {faults[0]}"
        accelerator.print(f"warning: left out, {printable_name(what)}")
    return num_images - len(faults)


def _with_progress(items: list, text: str, accelerator: Accelerator) -> Iterable:
    is_shown = accelerator.is_main_process and Console().is_terminal
    return track(items, text, transient=True, disable=not is_shown)


def evaluate(
    train: Sequence[Pair],
    test: Sequence[Pair],
    network: FrozenBackbone,
    size: int,
    options: SegmentationConfig,
    accelerator: Accelerator,
) -> Evaluated:
    """Remember the patches of the training pairs and judge those that test. A collective."""
    rank, world = accelerator.process_index, accelerator.num_processes
    budget = max(1, options.memory_patches // len(train))
    own_train = _with_progress(list(enumerate(train))[rank::world], "memory", accelerator)
    faults: list[str] = []
    with own_input():
        own_memory = remember(own_train, budget, network, size, options.draw_seed, faults)
    parts = gather_object([(*own_memory, faults)])
    features_of_parts, classes_of_parts, faults_of_parts = zip(*parts, strict=True)
    memory = torch.cat(features_of_parts).to(accelerator.device)
    classes = torch.cat(classes_of_parts).to(accelerator.device)
    num_train = number_used(len(train), joined(faults_of_parts), accelerator)
    if not len(memory):
        raise ValueError(f"no pixel of the masks in {options.data} is judged: all are {VOID}")
    has_attention = not why_no_class_attention(network.backbone)
    num_classes = VOID  # a mask's numbers are below it: 0 to 254
    confusion = np.zeros((num_classes, num_classes), np.int64)
    jaccards: list[tuple[float, float]] = []
    faults = []
    for pair in _with_progress(test[rank::world], "test", accelerator):
        seen = see(pair, network, size, faults)
        if seen is None:
            continue
        with own_input():
            patches, shape = patches_of(seen.pixels, network)
        votes = patch_votes(
            patches, memory, classes, int(classes.max()) + 1, options.k, options.temperature
        )
        predicted = enlarged_classes(votes, shape, seen.mask.shape).cpu().numpy()
        confusion += confusion_of(seen.mask, predicted, num_classes)
        if has_attention and ((seen.mask > 0) & (seen.mask != VOID)).any():
            attention = attention_of(seen.pixels, network)
            jaccards.append(attention_jaccards(attention, seen.mask, options.mass))
    parts = gather_object([(confusion, jaccards, faults)])
    confusions, jaccards_of_parts, faults_of_parts = zip(*parts, strict=True)
    num_test = number_used(len(test), joined(faults_of_parts), accelerator)
    of_all = sum(confusions)
    if not of_all.any():
        raise ValueError(f"the test masks have no pixel that is judged: all are {VOID}")
    return Evaluated(of_all, joined(jaccards_of_parts), len(memory), num_train, num_test)


def table_of(scores: dict[str, object], options: SegmentationConfig) -> Table:
    """Return a table with a line a class, where they are few, and one of the mean."""
    table = Table("class", "IoU %", "% of pixels", title=f"patch k-NN, k {options.k}")
    if len(scores["iou"]) <= MOST_CLASSES:
        for number, iou in scores["iou"].items():
            name = "background" if number == 0 else str(number)
            table.add_row(name, f"{iou:.2f}", f"{scores['share_of_pixels'][number]:.2f}")
        table.add_section()
    table.add_row("mean", f"{scores['mean_iou']:.2f}", "")
    table.caption = (
        f"{scores['pixels_right']:.2f} % of the pixels are right; the most frequent class "
        f"everywhere: mean IoU {scores['mean_iou_of_one_class']:.2f} %"
    )
    return table


def say_attention(attention: dict[str, object], network: FrozenBackbone) -> None:
    """Print how well the attention finds objects, or why there is none to judge."""
    arch = network.facts["arch"]
    if "why_not" in attention:
        print(f"no attention to judge: {attention['why_not']}")
        return
    best, mean = attention["jaccard_best_head"], attention["jaccard_mean_of_heads"]
    held = f"{attention['mass']:.0%} of the class token's attention"
    images = number_of(attention["num_images"], "image")
    print(f"{held}, Jaccard: best head {best:.2f} %, mean of heads {mean:.2f} %, {images}")
    if why := why_attention_is_untrained(network.backbone):
        print(f"{arch} {why}")


def judged_attention(
    jaccards: Sequence[tuple[float, float]], network: FrozenBackbone, mass: float
) -> dict[str, object]:
    """Return the mean Jaccard indices in %, or why there are none."""
    why = why_no_class_attention(network.backbone)
    if why:
        return {"why_not": f"{network.facts['arch']} {why}"}
    if not jaccards:
        return {"why_not": "no test image has an object in its mask"}
    best, mean = (100 * float(np.mean(values)) for values in zip(*jaccards, strict=True))
    return {
        "jaccard_best_head": best,
        "jaccard_mean_of_heads": mean,
        "mass": mass,
        "num_images": len(jaccards),
    }


def main() -> None:
    options = read_flags(SegmentationConfig, None, __doc__)
    check_ranges(options)
    check_folder(options.maps.json_out, "results")
    accelerator = make_accelerator()
    notes: list[str] = []
    train, test = read_splits(options.data, options.val, notes)
    for note in notes:
        accelerator.print(f"data: {printable_name(note)}")
    network, size = open_for_maps(options.maps, options.data, accelerator)
    network = with_levels_of(network, [pair.image for pair in [*train, *test]], accelerator)
    evaluated = evaluate(train, test, network, size, options, accelerator)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    print(f"{evaluated.num_memory:,} patches remembered")
    scores = scores_of(evaluated.confusion)
    attention = judged_attention(evaluated.jaccards, network, options.mass)
    facts = network.facts | {
        "num_train": evaluated.num_train,
        "num_test": evaluated.num_test,
        "features": network.backbone.num_features,
        "size": size,
        "k": options.k,
        "temperature": options.temperature,
        "memory_patches": evaluated.num_memory,
    }
    results = {"knn": scores, "attention": attention}
    report(facts, table_of(scores, options))
    say_attention(attention, network)
    write_results(options.maps.json_out, facts, results)


if __name__ == "__main__":
    run_command(main)
