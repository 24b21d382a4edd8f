"""Write the features of images to a file: of a folder, a tar or a list, with or without classes.

    python embed.py runs/vits16/ckpt.safetensors --data photos --out features.safetensors
    python embed.py dino_vits16 --data photos --out features.npy --near-duplicates 0.95
    torchrun --nproc_per_node 8 embed.py dino_vits16 --data /imagenet --out f.safetensors

A .safetensors holds all there is to know. To read it:

    tensors = safetensors.torch.load_file("features.safetensors")
    features, labels = tensors["features"], tensors.get("labels")
    names = tensors["names"].numpy().tobytes().decode(errors="surrogateescape").split("\\0")

A .csv or .parquet has a line per image: name, label, class, f0, f1 ... A .npy holds features alone.
These three have a .json beside them, with the rest. Each file is written whole or not at all. Of
data with splits those to train on are taken: --no-splits takes all.
Axes: n images, d features, p patches, b batch.
"""

import csv
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from data import NAMED_SETS, ImageDataset
from harness.command import read_flags, run_command, whole_file, write_whole
from harness.distributed import make_accelerator
from harness.evaluation import (
    EvalConfig,
    check_folder,
    extract,
    is_vit,
    layer_features,
    open_backbone,
    open_training_images,
    report,
    write_results,
)
from harness.feature_maps import feature_map
from harness.flags import check_ranges
from harness.opened_network import normalized
from harness.terminal import printable_name
from models import save_tensors
from tar_shards import TarImages

SUFFIXES = (".safetensors", ".npy", ".csv", ".parquet")
MOST_PAIRS = 100_000  # of near duplicates that are kept, the most similar
PRINTED_PAIRS = 20
BEGIN = b'{\n "facts": '  # of a .json that was written beside features
ENTRIES = 1 << 24  # of a block of similarities: 64 MiB
Tokens = Literal["class", "mean", "patch", "concat"]


@dataclass(frozen=True)
class EmbedConfig:
    evaluation: EvalConfig
    # file to write: .safetensors, .npy, .csv or .parquet
    out: Path
    # class: a ViT's class token, or what a network pools; mean: of the patch tokens; patch: all
    # patch tokens (p, d) of each image; concat: class and mean
    tokens: Tokens = "class"
    # type of the numbers in the file
    dtype: Literal["float32", "float16"] = "float32"
    # list pairs of images whose cosine similarity is above this, most similar first, and write
    # them beside the features: OUT-duplicates.csv
    near_duplicates: float | None = None


def check_flags(options: EmbedConfig) -> None:
    """Raise ValueError for what cannot be written, before anything is computed."""
    out, suffix = options.out, options.out.suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"need --out with one of {', '.join(SUFFIXES)}, got {out}")
    check_ranges(options.evaluation)
    check_folder(out, "features")
    if options.evaluation.val is not None:
        raise ValueError("embed takes the images of --data: not with --val")
    if options.tokens == "patch" and suffix in (".csv", ".parquet"):
        wanted = "--tokens patch has a matrix for each image: need .safetensors or .npy"
        raise ValueError(f"{wanted}, got {out}")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("a .parquet needs the package pyarrow: pip install pyarrow")
    threshold = options.near_duplicates
    if threshold is not None and options.tokens == "patch":
        raise ValueError("--near-duplicates compares images by one vector: not with --tokens patch")
    if threshold is not None and not -1 <= threshold < 1:
        raise ValueError(f"need --near-duplicates from -1 to below 1, got {threshold:g}")
    _check_file_beside(out, options.evaluation.json_out)


def _is_of_features(path: Path) -> bool:
    """Tell whether a .json was written beside features, by its first bytes."""
    with open(path, "rb") as file:
        return file.read(len(BEGIN)) == BEGIN


def _check_file_beside(out: Path, json_out: Path | None) -> None:
    """Raise ValueError where the .json beside the features would replace another file."""
    written = [out]
    if out.suffix != ".safetensors":
        beside = out.with_suffix(".json")
        written.append(beside)
        others = [out.with_suffix(suffix) for suffix in SUFFIXES[1:] if suffix != out.suffix]
        is_of_others = any(other.exists() for other in others)
        if beside.exists() and (is_of_others or not _is_of_features(beside)):
            text = f"{beside}, which would be written beside it, is there and of something else"
            raise ValueError(f"need another --out than {out}: {text}")
    if json_out is not None and json_out.resolve() in [path.resolve() for path in written]:
        raise ValueError(f"need another --json-out than {json_out}, where the features go")


# ---------------------------------------------------------------- features


def token_features(backbone: nn.Module, tokens: Tokens) -> Callable[[Tensor], Tensor]:
    """Return the function from images (b, c, h, w) to features (b, d), of `patch` (b, p, d).

    For a network without class token the mean of its last feature map stands for the patch tokens'.
    """

    def patches(images: Tensor) -> Tensor:
        return rearrange(feature_map(backbone, images), "b d h w -> b (h w) d")

    def mean(images: Tensor) -> Tensor:
        return reduce(feature_map(backbone, images), "b d h w -> b d", "mean")

    if tokens == "concat" and not is_vit(backbone):
        raise ValueError("--tokens concat needs a ViT of timm with a class token")
    if tokens == "concat":
        return layer_features(backbone, num_last_blocks=1, avgpool=True)
    return {"class": backbone, "mean": mean, "patch": patches}[tokens]


def names_of(dataset: ImageDataset, data: str) -> list[str]:
    """Return the images' names: paths below the data's folder, members of a tar, or numbers.

    A path outside of that folder, which a list may have, is whole.
    """
    images = dataset.images
    place = Path(os.path.abspath(data))
    folder = f"{place if place.is_dir() else place.parent}/"
    if isinstance(images, TarImages):
        names = [str(images[row]) for row in range(len(images))]
        folder = f"{place}:" if place.is_file() else folder
    elif isinstance(images, np.ndarray):
        names = [os.fsdecode(path) for path in images.tolist()]
    else:
        return [str(row) for row in range(len(images))]
    return [name.removeprefix(folder) for name in names]


# ---------------------------------------------------------------- near duplicates


@torch.no_grad()
def near_duplicates(
    features: Tensor, threshold: float, most: int = MOST_PAIRS
) -> tuple[Tensor, Tensor, int]:
    """Return pairs (m, 2) of features (n, d) whose cosine is above a threshold, most similar first.

    With them their similarities (m,), and how many pairs there are in all, of which at most `most`
    are kept. Of blocks of similarities, so that n^2 of them are never in memory:

        pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if cosine(i, j) > threshold]
    """
    features = F.normalize(features.float(), dim=1)
    num = len(features)
    rows_a_block = max(1, ENTRIES // num)
    pairs = torch.empty(0, 2, dtype=torch.int64, device=features.device)
    similarities = torch.empty(0, device=features.device)
    num_found = 0
    for start in range(0, num, rows_a_block):
        block = features[start : start + rows_a_block] @ features[start:].T
        is_pair = (block > threshold).triu(diagonal=1)
        found = is_pair.nonzero()
        num_found += len(found)
        pairs = torch.cat([pairs, found + start])
        similarities = torch.cat([similarities, block[is_pair].clamp(max=1)])
        # stable: among the same similarity the first images come first
        similarities, order = similarities.sort(descending=True, stable=True)
        similarities, pairs = similarities[:most], pairs[order[:most]]
    return pairs, similarities, num_found


def report_duplicates(features: Tensor, names: list[str], options: EmbedConfig) -> int:
    """Print the most similar pairs, write all of them beside the features, return their number."""
    pairs, similarities, num_found = near_duplicates(features, options.near_duplicates)
    file = options.out.with_name(f"{options.out.stem}-duplicates.csv")
    rows = [
        (f"{similarity:.6f}", names[one], names[other])
        for (one, other), similarity in zip(pairs.tolist(), similarities.tolist(), strict=True)
    ]
    with whole_file(file) as temporary:
        write_csv(temporary, ["similarity", "image", "other"], rows)
    text = f"{num_found:,} pairs above a similarity of {options.near_duplicates:g}"
    print(f"{text}: {printable_name(file)}")
    if num_found > len(rows):
        print(f"the {len(rows):,} most similar of them are kept")
    for row in rows[:PRINTED_PAIRS]:
        print(printable_name("  ".join(row)))
    return num_found


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Embedded:
    features: np.ndarray  # (n, d) or (n, p, d)
    names: list[str]
    labels: list[int] | None  # None without classes
    classes: list[str] | None  # the labels' names
    facts: dict  # network, its step and checksum, data, what was asked for

    def columns(self) -> dict[str, list]:
        """Return what is known of each image beside its features."""
        columns: dict[str, list] = {"name": self.names}
        if self.labels is not None:
            columns["label"] = self.labels
        if self.classes is not None:
            columns["class"] = [self.classes[label] if label >= 0 else "" for label in self.labels]
        return columns


def write_csv(path: Path, header: list[str], rows: list | map) -> None:
    """Write lines of a table. Names that are no UTF-8 keep their bytes."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_safetensors(path: Path, embedded: Embedded) -> None:
    # safetensors limits its texts to 100 MB: names are a tensor, of bytes, with zeros between them
    names = "\0".join(embedded.names).encode(errors="surrogateescape")
    tensors = {
        "features": torch.from_numpy(embedded.features),
        "names": torch.from_numpy(np.frombuffer(names, np.uint8).copy()),
    }
    if embedded.labels is not None:
        tensors["labels"] = torch.tensor(embedded.labels)
    texts = {"facts": json.dumps(embedded.facts), "classes": json.dumps(embedded.classes)}
    save_tensors(path, tensors, texts)


def write_npy(path: Path, embedded: Embedded) -> None:
    np.save(path, embedded.features)


def write_table(path: Path, embedded: Embedded) -> None:
    columns = embedded.columns()
    header = [*columns, *(f"f{i}" for i in range(embedded.features.shape[1]))]
    digits = 9 if embedded.features.dtype == np.float32 else 5  # that tell all numbers apart

    def line(row: int) -> list:
        numbers = [f"{number:.{digits}g}" for number in embedded.features[row].tolist()]
        return [*(column[row] for column in columns.values()), *numbers]

    write_csv(path, header, map(line, range(len(embedded.names))))


def write_parquet(path: Path, embedded: Embedded) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = dict(embedded.columns())
    for key in columns.keys() & {"name", "class"}:  # Parquet's texts are UTF-8
        columns[key] = [text.encode(errors="backslashreplace").decode() for text in columns[key]]
    columns |= {f"f{i}": column for i, column in enumerate(embedded.features.T)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


WRITERS = {".npy": write_npy, ".csv": write_table, ".parquet": write_parquet}


def write_features(path: Path, embedded: Embedded) -> None:
    """Write what was embedded, in the kind of file that the suffix says."""
    if path.suffix == ".safetensors":
        write_safetensors(path, embedded)
        return
    described = {"facts": embedded.facts, "classes": embedded.classes}
    if path.suffix == ".npy":
        described |= {"names": embedded.names, "labels": embedded.labels}
    text = json.dumps(described, indent=1) + "\n"
    beside = path.with_suffix(".json")
    with whole_file(path) as temporary:
        WRITERS[path.suffix](temporary, embedded)
        beside.unlink(missing_ok=True)  # it is of the features that are replaced now
    write_whole(beside, text)


def main() -> None:
    options = read_flags(EmbedConfig, None, __doc__)
    check_flags(options)
    evaluation = options.evaluation
    accelerator = make_accelerator(evaluation.mixed_precision)
    network = open_backbone(evaluation, accelerator)
    features_of = token_features(network.backbone, options.tokens)
    images = open_training_images(network.preparation, accelerator)
    has_own_test = images.has_test and network.preparation.val is None
    if has_own_test and network.preparation.data not in NAMED_SETS:
        accelerator.print("data: of its splits the one to train on; --no-splits takes all images")

    def forward(pixels: Tensor) -> Tensor:
        return features_of(normalized(pixels, network.preparation))

    start = time.monotonic()
    extracted = extract(
        forward,
        images,
        accelerator,
        evaluation.batch_size,
        evaluation.num_workers,
        getattr(torch, options.dtype),
    )
    images_per_second = len(extracted.rows) / (time.monotonic() - start)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    names = names_of(images, network.preparation.data)
    names = [names[row] for row in extracted.rows.tolist()]
    facts = network.facts | {"tokens": options.tokens, "dtype": options.dtype}
    embedded = Embedded(
        extracted.features.cpu().numpy(),
        names,
        None if images.labels is None else extracted.labels.tolist(),
        None if images.classes is None else list(images.classes),
        facts,
    )
    write_features(options.out, embedded)
    results: dict[str, object] = {"out": str(options.out), "images_per_second": images_per_second}
    facts |= {"num_images": len(names), "features": embedded.features.shape[-1]}
    if options.near_duplicates is not None:
        results["near_duplicates"] = report_duplicates(extracted.features, names, options)
    report(facts, None)
    print(f"{printable_name(options.out)}: {images_per_second:,.1f} images/s")
    write_results(evaluation.json_out, facts, results)


if __name__ == "__main__":
    run_command(main)
