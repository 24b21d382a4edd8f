"""Pictures drawn by Pillow: sheets of images with labels, and the curves of a run.

    curves(lines_of_log_jsonl, output_dim=4096).save("curves.png")

Stands alone: needs Pillow, numpy, torch and torchvision, and no file of this repository. Colours
are a card's own, legible on light and dark pages.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

CARD, INK, PLOT, OTHER = "#202226", "#e4e6e9", "#141518", "#70747a"
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
CLASS_COLOURS = (
    *("#e6454a", "#4cc46a", "#ffe14a", "#5b86f5", "#f58b3c", "#b565e0", "#4fd8f2", "#f25be0"),
    *("#c3ee55", "#f9bdd3", "#4fa3a0", "#d9bfff", "#b0784a", "#fff6c0", "#a8432f", "#aaf5c0"),
    *("#90902c", "#ffd3a8", "#6a6ad0", "#a9a9a9"),
)
LINES = ("#5b86f5", "#f58b3c")
GAP, SMALL_TILE = 8, 120  # pixels
WIDTH, HEIGHT = 400, 240  # of a panel of curves
MOST_POINTS = 400  # of a curve: the pixels that it has

Cell = tuple[Image.Image, str]  # a picture and the label under it
Curve = tuple[str, list[float], list[float]]  # name, epochs, values


def tile(image: Tensor, side: int) -> Image.Image:
    """Fit (3, h, w) uint8 into a square, aspect kept; what grows much keeps its pixels."""
    scale = side / max(image.shape[1:])
    height, width = (max(1, round(scale * length)) for length in image.shape[1:])
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return TF.to_pil_image(image).resize((width, height), resample)


def clipped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten a text to one line of at most `width` pixels, by an ellipsis."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def sheet(title: str, cells: Sequence[Cell], num_columns: int) -> Image.Image:
    """Lay out pictures in rows, each with its label below, under a title. Sizes follow theirs."""
    large, small = ImageFont.load_default(17), ImageFont.load_default(14)
    rows = [cells[i : i + num_columns] for i in range(0, len(cells), num_columns)]
    columns = [cells[i::num_columns] for i in range(min(num_columns, len(cells)))]
    least = [SMALL_TILE * any(label for _, label in column) for column in columns]
    widths = [max(x, *(p.width for p, _ in y)) for x, y in zip(least, columns, strict=True)]
    below = GAP + 22 * any(label for _, label in cells)
    heights = [max(picture.height for picture, _ in row) + below for row in rows]
    top, width = 40 if title else GAP, sum(widths) + GAP * (len(widths) + 1)
    card = Image.new("RGB", (width, top + sum(heights)), CARD)
    draw = ImageDraw.Draw(card)
    draw.text((GAP, 10), clipped(title, large, width - 2 * GAP), INK, large)
    for row, height in zip(rows, heights, strict=True):
        left, top = GAP, top + height
        for (picture, label), column in zip(row, widths, strict=False):
            middle = left + column // 2
            card.paste(picture, (middle - picture.width // 2, top - below - picture.height))
            text = clipped(label, small, column)
            draw.text((middle, top - below + 3), text, INK, small, anchor="ma")
            left += column + GAP
    return card


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Give round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * x for x in (1, 2, 5, 10, 20) if (high - low) / (step * x) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def panel(title: str, curves: Sequence[Curve], guides: dict[str, float]) -> Image.Image:
    """Draw curves over epochs, with dashed guides by name; at twice the size, for smooth lines."""
    font = ImageFont.load_default(26)
    width, height = 2 * WIDTH, 2 * HEIGHT
    card = Image.new("RGB", (width, height), PLOT)
    draw = ImageDraw.Draw(card)
    draw.text((20, 12), title, INK, font)
    points = [
        (x, y) for _, xs, ys in curves for x, y in zip(xs, ys, strict=True) if math.isfinite(y)
    ]
    if not points:
        draw.text((width // 2, height // 2), "nothing yet", OTHER, font, anchor="mm")
        return card.reduce(2)
    end = max(x for x, _ in points) or 1.0
    values = [y for _, y in points] + list(guides.values())
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room * (low != 0), high + room
    left, right, top, bottom = 120, width - 24, 64, height - 56

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / end, bottom - (bottom - top) * (y - low) / (high - low)

    for y in ticks(low, high, 4):
        draw.line([place(0, y), place(end, y)], "#303338", 2)
        draw.text((left - 12, place(0, y)[1]), f"{y:.4g}", OTHER, font, anchor="rm")
    for x in ticks(0, end, 6):
        draw.text((place(x, 0)[0], bottom + 12), f"{x:g}", OTHER, font, anchor="ma")
    names = right
    for (name, xs, ys), colour in zip(curves, LINES, strict=False):
        every = -(-len(xs) // MOST_POINTS)
        line = [place(*point) for point in zip(xs[::every], ys[::every], strict=True)]
        draw.line(line, colour, 4, joint="curve")
        if len(line) <= 30:
            for spot in line:
                draw.circle(spot, 7, colour)
        draw.text((names, 12), name, colour, font, anchor="ra")
        names -= font.getlength(name) + 24
    for name, y in guides.items():
        for start in range(left, right, 24):
            draw.line([(start, place(0, y)[1]), (start + 12, place(0, y)[1])], OTHER, 2)
        draw.text((right, place(0, y)[1] + 4), name, OTHER, font, anchor="ra")
    return card.reduce(2)


def curves(log: Sequence[dict], output_dim: int) -> Image.Image:
    """Draw a run's lines of log.jsonl: loss, k-NN, entropy with KL, and learning rate."""

    def curve(key: str, name: str) -> Curve:
        rows = [row for row in log if key in row]
        return name, [row["epoch"] for row in rows], [row[key] for row in rows]

    knn = curve("knn_top1", "")
    untrained = {"untrained": knn[2][0]} if len(knn[2]) > 1 else {}
    uniform = {f"ln K = {math.log(output_dim):.2f}: uniform": math.log(output_dim)}
    entropies = [curve("teacher_entropy", "entropy"), curve("kl", "KL")]
    panels = [
        panel("loss", [curve("loss", "")], {}),
        panel("k-NN top-1, %", [knn], untrained),
        panel("teacher entropy and KL", entropies, uniform),
        panel("learning rate", [curve("lr", "")], {}),
    ]
    epoch = max((row["epoch"] for row in log), default=0)
    return sheet(f"by epoch, up to {epoch:g}", [(picture, "") for picture in panels], 2)


def crop_cells(crops: Sequence[Tensor], mean: Tensor, std: Tensor, row: int) -> list[Cell]:
    """Give the crops, (b, 3, h, w) each and globals first, of image `row` of a batch, as seen."""
    cells = []
    for view, crop in enumerate(crops):
        pixels = (crop[row] * std + mean).clamp(0, 1).cpu()
        label = f"global {view + 1}" if view < 2 else f"local {view - 1}"
        cells.append((tile(TF.to_dtype(pixels, torch.uint8, scale=True), SMALL_TILE), label))
    return cells


def enlarged(values: np.ndarray, like: Image.Image) -> Image.Image:
    """Enlarge a map (h, w) or (h, w, 3) uint8 to a picture's size, its cells kept visible."""
    return Image.fromarray(values).resize(like.size, Image.Resampling.NEAREST)


def heat(picture: Image.Image, attention: Tensor, top: float) -> Image.Image:
    """Lay attention (h, w), from 0 to `top`, as dark to bright colours over a grey picture."""
    share = (attention / top).clamp(0, 1).numpy()
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, stops, x) for x in zip(*HEAT, strict=True)], axis=-1)
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.blend(grey, enlarged(colours.astype(np.uint8), picture), 0.75)


def scatter(title: str, points: Tensor, classes: list[str], axes: str) -> Image.Image:
    """Draw points (n, 2) in their classes' colours, on one scale, with a legend."""
    low, high = points.min(0).values, points.max(0).values
    # three times as large as shown, for smooth edges
    scale, margin, radius = 1800 / (high - low).max().clamp(min=1e-6), 48, 10
    width, height = ((high - low) * scale).long().tolist()
    plot = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PLOT)
    draw, names = ImageDraw.Draw(plot), sorted(set(classes))
    colours = dict(zip(names, CLASS_COLOURS, strict=False))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    for i in order.tolist():  # else the last class hides the others
        x, y = ((points[i] - low) * scale + margin).tolist()
        draw.circle((x, plot.height - y), radius, colours.get(classes[i], OTHER))
    labels = [*colours, *[f"{len(names) - len(colours)} more"] * (len(names) > len(colours))]
    plot, font = plot.reduce(3), ImageFont.load_default(14)
    width = min(160, 30 + int(max(font.getlength(clipped(label, font, 160)) for label in labels)))
    legend = Image.new("RGB", (width, max(plot.height, 22 * len(labels))), CARD)
    draw = ImageDraw.Draw(legend)
    for i, name in enumerate(labels):
        draw.circle((9, 22 * i + 10), 5, colours.get(name, OTHER))
        draw.text((22, 22 * i + 2), clipped(name, font, width - 24), INK, font)
    return sheet(title, [(plot, axes), (legend, "")], 2)
