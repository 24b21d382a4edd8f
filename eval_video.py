"""Follow objects through a video by a frozen backbone, from the first frame's mask.

    python eval_video.py runs/vits16/ckpt.safetensors --data DAVIS --out masks
    python eval_video.py dino_vits8 --data frames --mask first.png --out masks

--data is DAVIS 2017 or laid out like it: JPEGImages/480p/VIDEO/00000.jpg, the true masks in
Annotations/480p/VIDEO/00000.png, and the names of the videos in ImageSets/2017/val.txt, without
which all are taken. With --mask it is a folder of frames of one's own, which has no true masks.

Protocol of DINO (arXiv 2104.14294, section 4.2.2), nothing is trained: each patch of a frame takes
the labels of its most similar patches in the first frame and the seven before, in its
neighbourhood. J is the Jaccard index of regions, F the F-measure of boundaries: the mean over
frames, without the first and the last, then over objects (Pont-Tuset et al., arXiv 1704.00675).
Axes: t frames, c objects and background, d features, h w patches of a map, y x one of them.
"""

import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import einsum, rearrange
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from config import setting
from folders import images_in, is_hidden
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
    PHOTO_SIDE,
    feature_map,
    resize_to_patches,
    sizes_named,
)
from harness.flags import check_ranges
from harness.masks import (
    VOID,
    boundary_f_measure,
    jaccard,
    mask_shape,
    one_hot_on_grid,
    read_mask,
    read_names,
    read_palette,
    require_each_name_once,
    require_same_size,
    save_mask,
)
from harness.opened_network import Preparation, normalized
from harness.terminal import printable, printable_name
from pixels import decode, image_suffixes

FRAMES = Path("JPEGImages", "480p")
MASKS = Path("Annotations", "480p")
NAMES = Path("ImageSets", "2017", "val.txt")
DAVIS_MULTIPLE = 64  # pixels, of the longer side of frames in the original's protocol


@dataclass(frozen=True)
class VideoConfig:
    maps: MapsConfig
    # DAVIS 2017, a folder laid out like it or, with --mask, a folder of frames
    data: Path
    # the first frame's mask, with which --data is a folder of frames: a PNG, palettised or grey, of
    # one number a pixel: 0 background, from 1 on an object each
    mask: Path | None = None
    # folder for the masks, OUT/VIDEO/00000.png, palettised; None: scores alone
    out: Path | None = None
    # frames before, beside the first, whose labels are handed on [paper: 7]
    num_frames: int = setting(7, most=1000)
    # most similar patches whose labels each patch takes [paper: 5]
    neighbours: int = setting(5, above=0, most=10_000)
    # patches, up, down, left and right, within which similar ones are sought [paper: 12]
    radius: int = setting(12, most=4096)
    # temperature of the softmax over their similarities [paper: 0.1]
    temperature: float = setting(0.1, above=0, most=100)


# ---------------------------------------------------------------- videos


class Video(NamedTuple):
    name: str
    frames: list[Path]
    first_mask: Path
    true_masks: dict[int, Path]  # by the frame's place; {} where there are none


def read_davis(root: Path) -> list[Video]:
    """Return the videos of a folder in DAVIS's layout. Raises ValueError where it is none."""
    if not (root / FRAMES).is_dir() or not (root / MASKS).is_dir():
        text = f"need DAVIS's folders {FRAMES} and {MASKS} in --data, got {root}"
        raise ValueError(f"{text}; for frames of your own add --mask")
    if (root / NAMES).is_file():
        names = read_names(root / NAMES)
    else:
        names = sorted(path.name for path in (root / MASKS).iterdir() if not is_hidden(path.name))
    if not names:
        raise ValueError(f"need videos, found none in {root}")
    return [_read_davis_video(root, name) for name in names]


def _read_davis_video(root: Path, name: str) -> Video:
    frames = list_frames(root / FRAMES / name)
    require_each_name_once(frames, root / FRAMES / name, "frame")
    masks = {place: root / MASKS / name / f"{path.stem}.png" for place, path in enumerate(frames)}
    if not masks[0].is_file():
        raise ValueError(f"no mask of the first frame: {masks[0]}")
    true_masks = {place: path for place, path in masks.items() if path.is_file()}
    # a video to be submitted has its first mask alone
    return Video(name, frames, masks[0], true_masks if len(true_masks) > 1 else {})


def list_frames(folder: Path) -> list[Path]:
    """Return a folder's images, in the order of the numbers in their names."""
    if not folder.is_dir():
        raise ValueError(f"no such folder of frames: {folder}")
    frames = images_in(folder, image_suffixes())
    if len(frames) < 2:
        raise ValueError(f"need >= 2 frames in {folder}, got {len(frames)}")
    return frames


def read_own(folder: Path, mask: Path) -> list[Video]:
    """Return a folder of frames and a mask of the first as a video of the folder's name."""
    frames = [path for path in list_frames(folder) if not (mask.exists() and path.samefile(mask))]
    require_each_name_once(frames, folder, "frame")
    return [Video(folder.resolve().name, frames, mask, {})]


# ---------------------------------------------------------------- propagation


@torch.no_grad()
def propagate(
    target: Tensor,
    sources: Tensor,
    labels: Tensor,
    neighbours: int = 5,
    radius: int = 12,
    temperature: float = 0.1,
) -> Tensor:
    """Return labels (c, h, w) for a frame's features (d, h, w), by those of other frames.

    These have features (t, d, h, w) and labels (t, c, h, w). The plain loop:

        for y, x in patches of the target:
            near = patches of the sources at most `radius` rows and columns away from y, x
            best = the `neighbours` most similar of them, by the cosine
            result[:, y, x] = (softmax(cosine(best) / temperature) * labels(best)).sum()

    Computed a row of the target at a time, since all similarities at once would fill gigabytes.
    """
    height, width = target.shape[1:]
    target_rows = rearrange(F.normalize(target, dim=0), "d h w -> h w d")
    source_rows = rearrange(F.normalize(sources, dim=1), "t d h w -> h t w d").contiguous()
    label_rows = rearrange(labels, "t c h w -> h t w c").contiguous()
    columns = torch.arange(width, device=target.device)
    is_far = (columns[:, None] - columns).abs() > radius  # a target's column, a source's
    rows: list[Tensor] = []
    for y in range(height):
        near_rows = slice(max(0, y - radius), y + radius + 1)
        similarity = einsum(target_rows[y], source_rows[near_rows], "x d, h t w d -> x h t w")
        similarity = similarity.masked_fill(is_far[:, None, None], -torch.inf).flatten(start_dim=1)
        best, places = similarity.topk(min(neighbours, similarity.shape[1]), dim=1)
        # a patch that is too far has a weight of 0, should fewer than `neighbours` be near
        weights = (best / temperature).softmax(dim=1)
        near_labels = label_rows[near_rows].flatten(end_dim=2)
        rows.append(einsum(weights, near_labels[places], "x k, x k c -> c x"))
    return torch.stack(rows, dim=1)


def to_numbers(labels: Tensor, numbers: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Return soft labels (c, h, w) as a mask of `shape` with the objects' numbers (c,).

    As the original has it, each object's labels are stretched to 0..1 before the largest is taken.
    """
    pixels = F.interpolate(labels[None], size=shape, mode="bilinear", align_corners=False)[0]
    lowest, highest = pixels.amin(dim=(1, 2), keepdim=True), pixels.amax(dim=(1, 2), keepdim=True)
    stretched = (pixels - lowest) / (highest - lowest).clamp(min=1e-12)
    # an object that is nowhere stays so
    stretched = torch.where(highest > 0, stretched, 0)
    return numbers.to(labels.device)[stretched.argmax(dim=0)].cpu().numpy()


def read_frame(frame: Path, preparation: Preparation) -> Tensor:
    """Return a frame (c, h, w) uint8 with the channels that the network knows."""
    return decode(os.fsencode(frame), preparation.levels, preparation.channels)


def features_of_frame(frame: Path, network: FrozenBackbone, size: int) -> Tensor:
    """Return the feature map (d, h, w) of a frame."""
    backbone, preparation = network.backbone, network.preparation
    is_davis_size = size >= PHOTO_SIDE and DAVIS_MULTIPLE % backbone.patch_size == 0
    multiple = DAVIS_MULTIPLE // backbone.patch_size if is_davis_size else 1
    image = resize_to_patches(read_frame(frame, preparation), size, backbone, multiple)
    pixels = normalized(image[None].to(next(backbone.parameters()).device), preparation)
    with sizes_named(network.facts["arch"], pixels):
        return feature_map(backbone, pixels)[0].float()


def follow(
    video: Video, network: FrozenBackbone, size: int, options: VideoConfig
) -> Iterator[np.ndarray]:
    """Yield the mask of each frame (h, w) uint8, as large as the first mask, which is the first."""
    first_mask = read_mask(video.first_mask)
    first_features = features_of_frame(video.frames[0], network, size)
    numbers = torch.from_numpy(np.unique(first_mask[first_mask != VOID]))
    first_labels = one_hot_on_grid(first_mask, numbers.tolist(), first_features.shape[1:])
    first_labels = first_labels.to(first_features.device)
    yield first_mask
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=options.num_frames)
    for frame in video.frames[1:]:
        target = features_of_frame(frame, network, size)
        if target.shape != first_features.shape:
            raise ValueError(f"need frames of one aspect ratio, got another in {frame}")
        features, labels = zip((first_features, first_labels), *before, strict=True)
        labels_of_target = propagate(
            target,
            torch.stack(features),
            torch.stack(labels),
            options.neighbours,
            options.radius,
            options.temperature,
        )
        before.append((target, labels_of_target))
        yield to_numbers(labels_of_target, numbers, first_mask.shape)


# ---------------------------------------------------------------- scores


def statistics_of(values: Sequence[float]) -> dict[str, float]:
    """Return mean, recall and decay in % of an object's values, one a frame.

    Recall is the share of frames above 0.5; decay is the mean of the first quarter less that of the
    last. Quarters share the frames at their ends, as in DAVIS's own evaluation.
    """
    # halves are rounded up
    ends = np.round(np.linspace(0, len(values) - 1, 5) + 1e-10).astype(int)
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return {
        "mean": 100 * float(np.mean(values)),
        "recall": 100 * float(np.mean(np.array(values) > 0.5)),
        "decay": 100 * float(np.mean(first) - np.mean(last)),
    }


def judged_places(video: Video) -> list[int]:
    """Return the places of the frames that count: with a true mask, neither first nor last."""
    return [place for place in video.true_masks if 0 < place < len(video.frames) - 1]


def judge(masks: Iterable[np.ndarray], video: Video) -> dict[str, dict]:
    """Return J and F of each object, by its number, over all but the first and the last frame.

    All masks are taken from the iterator, also where no frame has a true mask: that computes and
    writes them.
    """
    values: dict[int, dict[str, list[float]]] = {}
    places = set(judged_places(video))
    for place, mask in enumerate(masks):
        if place == 0:
            objects = np.unique(mask[(mask > 0) & (mask != VOID)]).tolist()
        if place not in places:
            continue
        true = read_mask(video.true_masks[place])
        predicted = np.where(true == VOID, VOID, mask)
        for number in objects:
            pair = predicted == number, true == number
            of_object = values.setdefault(number, {"J": [], "F": []})
            of_object["J"].append(jaccard(*pair))
            of_object["F"].append(boundary_f_measure(*pair))
    return {
        str(number): {score: statistics_of(of_score) for score, of_score in of_object.items()}
        for number, of_object in values.items()
    }


def means_over_objects(objects: Sequence[dict]) -> dict[str, float]:
    """Return J, F and their mean, in %, over objects; recall and decay, too."""
    means = {
        f"{score}_{statistic}": float(np.mean([each[score][statistic] for each in objects]))
        for score in ("J", "F")
        for statistic in ("mean", "recall", "decay")
    }
    return {"J&F": (means["J_mean"] + means["F_mean"]) / 2} | means


def table_of(scores: dict[str, dict[str, dict]], means: dict[str, float]) -> Table:
    """Return a table with a line a video, and one of the means over all objects."""
    table = Table("video", "objects", "J&F %", "J %", "F %", title="masks handed on")
    for name, objects in scores.items():
        of_video = means_over_objects(list(objects.values()))
        table.add_row(escape(printable(name)), str(len(objects)), *_cells(of_video))
    table.add_section()
    num_objects = sum(len(objects) for objects in scores.values())
    table.add_row("mean over objects", str(num_objects), *_cells(means))
    recalls = ", ".join(f"{score} {means[f'{score}_recall']:.1f} %" for score in "JF")
    table.caption = f"recall, frames above 50 %: {recalls}"
    return table


def _cells(means: dict[str, float]) -> list[str]:
    return [f"{means[name]:.2f}" for name in ("J&F", "J_mean", "F_mean")]


# ---------------------------------------------------------------- main


def check_options(options: VideoConfig, videos: Sequence[Video]) -> None:
    """Raise ValueError for what cannot be written, before anything is computed."""
    check_folder(options.maps.json_out, "results")
    if options.mask is not None and options.out is None:
        raise ValueError("a video of your own has no true masks to score: need --out")
    if options.out is None and not any(judged_places(video) for video in videos):
        raise ValueError(f"no frame of {options.data} has a true mask to score: need --out")
    if options.out is not None:
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"need a folder for --out, got the file {options.out}")
        if not options.out.parent.is_dir():
            raise ValueError(f"no such folder for the masks: {options.out.parent}")
        if not os.access(options.out if options.out.exists() else options.out.parent, os.W_OK):
            raise ValueError(f"no masks can be written to {options.out}")
        for video in videos:
            if (options.out / video.name).exists():
                raise ValueError(f"{options.out / video.name} exists: give another --out")


def check_masks(video: Video, preparation: Preparation) -> None:
    """Raise ValueError for a first mask that is empty, or not as large as the first frame.

    Also for a true mask that is of another size or is no mask: found later, it would waste what was
    computed.
    """
    mask = read_mask(video.first_mask)
    require_same_size(mask, video.first_mask, read_frame(video.frames[0], preparation))
    if not ((mask > 0) & (mask != VOID)).any():
        raise ValueError(f"need an object, a number from 1 to 254, in {video.first_mask}")
    for path in video.true_masks.values():
        if mask_shape(path) != mask.shape:
            raise ValueError(f"need all masks as large as the first, got {path}")


def written(masks: Iterable[np.ndarray], out: Path, video: Video) -> Iterator[np.ndarray]:
    """Yield a video's masks, each once it is written. Its folder in `out` gets all or none."""
    out.mkdir(exist_ok=True)
    palette = read_palette(video.first_mask)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out) as staging:
        folder = Path(staging, video.name)
        folder.mkdir()
        for frame, mask in zip(video.frames, masks, strict=True):
            save_mask(folder / f"{frame.stem}.png", mask, palette)
            yield mask
        folder.rename(out / video.name)


def follow_all(
    videos: Sequence[Video], network: FrozenBackbone, size: int, options: VideoConfig
) -> dict[str, dict]:
    """Follow the objects of each video, write the masks and return the scores by video."""
    scores: dict[str, dict] = {}
    for video in videos:
        start = time.monotonic()
        masks = follow(video, network, size, options)
        if options.out is not None:
            masks = written(masks, options.out, video)
        objects = judge(masks, video)
        num_frames, seconds = len(video.frames), time.monotonic() - start
        text = f"{num_frames} frames, {num_frames / seconds:.1f} a second"
        if objects:
            scores[video.name] = objects
            text += f", J&F {means_over_objects(list(objects.values()))['J&F']:.1f} %"
        print(printable_name(f"{video.name}: {text}"))
    return scores


def evaluate(options: VideoConfig, accelerator: Accelerator) -> None:
    videos = (
        read_davis(options.data) if options.mask is None else read_own(options.data, options.mask)
    )
    check_options(options, videos)
    network, size = open_for_maps(options.maps, options.data, accelerator)
    frames = [frame for video in videos for frame in video.frames]
    network = with_levels_of(network, frames, accelerator)
    for video in videos:
        check_masks(video, network.preparation)
    # a process takes every world-th video
    own_videos = videos[accelerator.process_index :: accelerator.num_processes]
    with own_input():
        own_scores = follow_all(own_videos, network, size, options)
    parts = gather_object([own_scores])
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    scores = {name: objects for part in parts for name, objects in part.items()}
    scores = {video.name: scores[video.name] for video in videos if video.name in scores}
    if options.out is not None:
        print(f"masks: {printable_name(options.out)}")
    results: dict[str, object] = {"size": size, "videos": scores}
    table = None
    if scores:
        results |= means_over_objects([x for objects in scores.values() for x in objects.values()])
        table = table_of(scores, results)
    num_frames = sum(len(video.frames) for video in videos)
    facts = {"num_images": num_frames, "features": network.backbone.num_features}
    settings = {
        name: getattr(options, name)
        for name in ("num_frames", "neighbours", "radius", "temperature")
    }
    report(network.facts | facts, table)
    write_results(options.maps.json_out, network.facts | facts | settings, results)


def main() -> None:
    options = read_flags(VideoConfig, None, __doc__)
    check_ranges(options)
    evaluate(options, make_accelerator())


if __name__ == "__main__":
    run_command(main)
