"""Take one network of each of timm's families through training, evaluation and export.

    python benchmarks/sweep_families.py                          # all: writes docs/architectures.md
    python benchmarks/sweep_families.py --families beit cait --out two.md

A family is a file of timm's models. The network with the fewest parameters stands for it, but for
those called test_, which are for timm's own tests. Each goes through dino_train.py for one step,
eval_knn.py and export.py, and what was exported through timm. Two images a step, in crops of 64 px,
else of 224, else of the network's own size, and half of that for two local crops, else without
these. The errors are those that the scripts print.
"""

import io
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import measure
import timm
import torch
from rich.progress import track
from torchvision.transforms.v2 import functional as TF

import dino_train
import eval_knn
import export
from data import draw_patterns
from harness.command import run_command, write_whole
from models import load_checkpoint

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
SIZES = (64, 224)  # pixels, sides of the global crops that are tried before the network's own


@dataclass(frozen=True)
class Options:
    families: tuple[str, ...] = ()  # files of timm.models; none: all
    out: Path = PAGE  # the Markdown file to write
    seconds: int = 900  # that a family may take


@dataclass(frozen=True)
class Row:
    """What one network came to."""

    family: str
    arch: str = ""
    num_parameters: int = 0
    crops: str = ""  # pixels, global and local
    is_trained: bool = False
    has_local_crops: bool = False
    is_evaluated: bool = False
    is_exported: bool = False
    why_not: str = ""

    def cells(self) -> list[str]:
        trained = "yes" if self.has_local_crops else "two global crops"
        return [
            self.family,
            f"`{self.arch}`",
            f"{self.num_parameters / 1e6:.1f}",
            self.crops,
            trained if self.is_trained else "no",
            "yes" if self.is_evaluated else "no",
            "yes" if self.is_exported else "no",
            self.why_not.replace("|", "\\|"),
        ]


# ---------------------------------------------------------------- one family


def smallest_of(family: str) -> tuple[str, int, int]:
    """Return a family's network with the fewest parameters, their number, and its image size."""
    found: list[tuple[int, str, int]] = []
    for arch in timm.list_models(module=family, exclude_filters="test_*"):
        with torch.device("meta"):  # shapes alone
            net = timm.create_model(arch, num_classes=0)
        num_parameters = sum(parameter.numel() for parameter in net.parameters())
        found.append((num_parameters, arch, net.pretrained_cfg["input_size"][-1]))
    num_parameters, arch, size = min(found)
    return arch, num_parameters, size


def draw_images(folder: Path) -> None:
    """Write two images to train on and two to evaluate on, of two classes."""
    images = iter(draw_patterns(torch.tensor([0, 1, 10, 11]), size=64))
    for split in ("train", "val"):
        for label in ("checks", "stripes"):
            (folder / split / label).mkdir(parents=True)
            TF.to_pil_image(next(images)).save(folder / split / label / "1.png")


def run_script(main: Callable[[], None], *args: object) -> str:
    """Run a script's main, quietly. Return nothing, or the line that says what went wrong."""
    sys.argv = ["", *map(str, args)]
    said, errors = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(errors):
            run_command(main)
    except SystemExit:
        return errors.getvalue().strip().split("\n")[-1].removeprefix("error: ")
    except Exception as error:
        return f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def train(arch: str, own_size: int, images: Path, folder: Path) -> tuple[str, int, str]:
    """Train for a step, with local crops if the network takes them.

    Return crop sizes, the number of local crops and what was wrong; no sizes where nothing worked.
    """
    sizes = dict.fromkeys([*SIZES, own_size])
    errors: dict[int, str] = {}
    for num_local in (2, 0):
        for size in sizes:
            flags = f"""--epochs 1 --batch-size 2 --warmup-epochs 0 --knn-every 0 --num-workers 0
                --global-crop-size {size} --num-local-crops {num_local} --drop-path-rate 0
                --projection-hidden-dim 16 --projection-output-dim 16 --overwrite"""
            command = ["--data", images, "--arch", arch, "--output-dir", folder, *flags.split()]
            error = run_script(dino_train.main, *command)
            if not error:
                crops = load_checkpoint(folder / "ckpt.safetensors")[1]["config"]["crops"]
                text = f"{size}, {crops['local_crop_size']}" if num_local else str(size)
                return text, num_local, errors.get(size, "")
            errors[size] = error
    return "", 0, errors[own_size]


def evaluate(folder: Path) -> str:
    """Compute features and k-NN. Return nothing, or what was wrong."""
    out = folder / "knn.json"
    error = run_script(eval_knn.main, folder, "--ks", 1, "--json-out", out)
    if error:
        return error
    width = json.loads(out.read_text())["features"]
    expected = load_checkpoint(folder / "ckpt.safetensors")[0].backbone.output_dim
    return "" if width == expected else f"need {expected} features, got {width}"


@torch.no_grad()
def export_to_timm(arch: str, size: int, folder: Path) -> str:
    """Export for timm, load it there and compare. Return nothing, or what was wrong."""
    out = folder / "backbone.safetensors"
    error = run_script(export.main, folder / "ckpt.safetensors", out)
    if error:
        return error
    create = partial(timm.create_model, arch, num_classes=0, checkpoint_path=out)
    try:
        try:
            net = create(img_size=size)
        except TypeError:  # a network that knows no size
            net = create()
        images = torch.randn(2, 3, size, size)
        expected = load_checkpoint(folder / "ckpt.safetensors")[0].backbone(images)
        difference = (net.eval()(images) - expected).abs().max().item()
    except Exception as error:
        return f"timm does not load the export: {' '.join(str(error).split())[:300]}"
    allowed = 1e-4 * (1 + expected.abs().max().item())
    return "" if difference <= allowed else f"timm's features differ by {difference:.2g}"


def try_family(family: str, answers: Connection) -> None:
    """Send rows, each with more that was found than the one before."""
    warnings.simplefilter("ignore")
    arch, num_parameters, own_size = smallest_of(family)
    row = Row(family, arch, num_parameters)
    answers.send(row)
    with tempfile.TemporaryDirectory() as temporary:
        images, folder = Path(temporary, "images"), Path(temporary, "run")
        draw_images(images)
        crops, num_local, why_not = train(arch, own_size, images, folder)
        has_local_crops = num_local > 0
        if has_local_crops:
            why_not = ""
        row = replace(
            row,
            crops=crops,
            is_trained=bool(crops),
            has_local_crops=has_local_crops,
            why_not=why_not,
        )
        answers.send(row)
        if not row.is_trained:
            return
        wrong = evaluate(folder)
        row = replace(row, is_evaluated=not wrong, why_not=wrong or row.why_not)
        answers.send(row)
        wrong = export_to_timm(arch, int(crops.split(",")[0]), folder)
        answers.send(replace(row, is_exported=not wrong, why_not=wrong or row.why_not))


def in_a_process(family: str, seconds: int) -> Row:
    """Try a family in a process of its own, which may run out of memory or time."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # forked, since the imports take longer than a network
    process = multiprocessing.get_context("fork").Process(target=try_family, args=(family, sender))
    process.start()
    sender.close()
    process.join(seconds)
    is_late = process.is_alive()
    process.kill()
    process.join()
    row = Row(family)
    while receiver.poll():
        try:
            row = receiver.recv()
        except EOFError:  # all was read
            break
    if is_late:
        row = replace(row, why_not=f"not done within {seconds} seconds")
    elif process.exitcode:
        row = replace(row, why_not=f"its process ended with code {process.exitcode}")
    return row


# ---------------------------------------------------------------- the page

COLUMNS = "family | network | million parameters | crops, px | multi-crop | k-NN | export | why not"


HEADER = """\
# Architectures

`--arch` takes the name of any network of timm, besides those that `python dino_train.py --help`
names. Networks that are made for images of one size get that of the global crops: they train with
`--num-local-crops 0`, or with a `--local-crop-size` as large as `--global-crop-size`.

Below is one network of each family of timm, the one with the fewest parameters: trained for a step
by `dino_train.py`, evaluated by `eval_knn.py`, exported by `export.py`; what was exported gave the
same features in timm. Crops of 64 px were tried first, then of 224, then the network's own. Where
something is missing, the last column has the error that the script prints.
"""


def page_of(rows: list[Row]) -> str:
    """Return the table in Markdown, with what it comes to above it."""
    with_local = sum(row.has_local_crops for row in rows)
    trained = sum(row.is_trained for row in rows)
    whole = sum(row.is_evaluated and row.is_exported for row in rows)
    counts = (
        f"Of {len(rows)} families {with_local} train with local crops, {trained - with_local} with "
        f"two global\ncrops alone, {len(rows) - trained} not at all; {whole} are evaluated and "
        "exported.\n"
    )
    names = COLUMNS.split(" | ")
    lines = [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names))]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    source = f"{measure.machine('float32')}, timm {timm.__version__}"
    command = "`python benchmarks/sweep_families.py`"
    return "\n".join([HEADER, counts, *lines, "", f"{source}: {command}"]) + "\n"


def main() -> None:
    options = measure.read(Options, __doc__)
    known = timm.list_modules()
    unknown = set(options.families) - set(known)
    if unknown:
        raise ValueError(f"no such files of timm.models: {', '.join(sorted(unknown))}")
    if not options.out.parent.is_dir():
        raise ValueError(f"no such folder for the page: {options.out.parent}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # forked processes cannot share a GPU
    rows = []
    for family in track(options.families or known, "families"):
        row = in_a_process(family, options.seconds)
        print("  ".join(row.cells()), flush=True)
        rows.append(row)
    write_whole(options.out, page_of(rows))
    print(f"{options.out}: {len(rows)} families")


if __name__ == "__main__":
    run_command(main)
