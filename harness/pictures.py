"""Pictures drawn by Pillow: sheets of images with labels, and the curves of a run.

    curves(lines_of_log_jsonl, output_dim=4096).save("curves.png")

Stands alone: needs Pillow, NumPy, torch and torchvision. A card has its own colours, which can be
read on light and dark pages. Axes: b batch, n points, c h w image or map.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

MARK = b"drawn by DINO"  # in each file, by which folders.py knows it again: it is no data
CARD = "#202226"  # background of a sheet
INK = "#e4e6e9"  # its texts
PLOT = "#141518"  # background of curves and points
GRID = "#303338"  # lines behind curves
OTHER = "#70747a"  # what has no colour of its own
WRONG = "#e6454a"  # frame of what is of another class
# from no attention to the most, in red, green and blue
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
CLASS_COLOURS = (
    "#e6454a",
    "#4cc46a",
    "#ffe14a",
    "#5b86f5",
    "#f58b3c",
    "#b565e0",
    "#4fd8f2",
    "#f25be0",
    "#c3ee55",
    "#f9bdd3",
    "#4fa3a0",
    "#d9bfff",
    "#b0784a",
    "#fff6c0",
    "#a8432f",
    "#aaf5c0",
    "#90902c",
    "#ffd3a8",
    "#6a6ad0",
    "#a9a9a9",
)
LINES = ("#5b86f5", "#f58b3c", "#4cc46a")  # colours of a panel's curves

GAP = 8  # pixels between pictures
TITLE_HEIGHT = 40  # pixels of one line
TITLE_LINE = 22  # pixels of each further line
LABEL_HEIGHT = 22  # pixels of one line
LABEL_LINE = 17  # pixels of each further line
MOST_LINES = 5  # of a label: a file name may be longer than its picture is wide
SCALE_TEXT = 48  # pixels beside a bar of colours
SMALL_TILE = 120  # pixels, the least width of a column that has labels
WIDTH = 400  # pixels of a panel of curves
HEIGHT = 240  # pixels of a panel of curves
MOST_POINTS = 400  # of a curve: about as many as it has pixels

Cell = tuple[Image.Image, str]  # a picture and the label under it
Curve = tuple[str, list[float], list[float]]  # name, epochs, values


def png_mark() -> PngInfo:
    """Return what a PNG says of who drew it."""
    info = PngInfo()
    info.add_text("Software", MARK.decode())
    return info


def as_rgb(image: Tensor) -> Tensor:
    """Return (3, h, w) of an image (c, h, w): its first three channels, or its first as grey."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def shown_channels(channels: int) -> str:
    """Return which channels of an image `as_rgb` shows, in words; nothing for RGB and grey."""
    if channels in (1, 3):
        return ""
    which = "channel 1 as grey" if channels == 2 else "channels 1, 2, 3 as red, green, blue"
    return f"{which} of {channels}"


def tile(image: Tensor, side: int) -> Image.Image:
    """Return (c, h, w) uint8 fitted into a square, aspect kept; enlarged, it keeps its pixels.

    It is shown as by `as_rgb`.
    """
    scale = side / max(image.shape[1:])
    height, width = (max(1, round(scale * length)) for length in image.shape[1:])
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return TF.to_pil_image(as_rgb(image)).resize((width, height), resample)


def clipped(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return a text as one line of at most `width` pixels, shortened by an ellipsis."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return a text's lines, broken to at most `width` pixels, even within a word.

    A text that needs more than MOST_LINES ends in an ellipsis.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        rest = clipped(paragraph, font, math.inf)
        while rest:
            lengths = range(len(rest), 0, -1)
            fits = next((n for n in lengths if font.getlength(rest[:n]) <= width), 1)
            if len(lines) == MOST_LINES - 1 or fits >= len(rest):
                lines.append(clipped(rest, font, width))
                break
            space = rest.rfind(" ", 0, fits + 1)
            end = space if space > 0 else fits
            lines.append(rest[:end])
            rest = rest[end:].lstrip()
    return lines[:MOST_LINES]


def sheet(title: str, cells: Sequence[Cell], num_columns: int) -> Image.Image:
    """Lay out pictures in rows, each with its label below, under a title. Sizes follow theirs.

    Labels and title take as many lines as they need.
    """
    title_font, label_font = ImageFont.load_default(17), ImageFont.load_default(14)
    columns = [cells[i::num_columns] for i in range(min(num_columns, len(cells)))]
    column_widths = [_column_width(column) for column in columns]
    width = sum(column_widths) + GAP * (len(column_widths) + 1)
    labels = [
        wrapped(label, label_font, column_widths[i % num_columns])
        for i, (_, label) in enumerate(cells)
    ]
    title_lines = wrapped(title, title_font, width - 2 * GAP)
    top = TITLE_HEIGHT + TITLE_LINE * (len(title_lines) - 1) if title_lines else GAP
    row_starts = range(0, len(cells), num_columns)
    rows = [list(zip(cells, labels, strict=True))[i : i + num_columns] for i in row_starts]
    row_sizes = [_row_size(row) for row in rows]
    height = sum(picture_height + below for picture_height, below in row_sizes)
    card = Image.new("RGB", (width, top + height), CARD)
    draw = ImageDraw.Draw(card)
    for i, line in enumerate(title_lines):
        draw.text((GAP, 10 + TITLE_LINE * i), line, INK, title_font)
    for row, (picture_height, below) in zip(rows, row_sizes, strict=True):
        label_top = top + picture_height
        left = GAP
        for ((picture, _), lines), column_width in zip(row, column_widths, strict=False):
            middle = left + column_width // 2
            card.paste(picture, (middle - picture.width // 2, label_top - picture.height))
            for i, line in enumerate(lines):
                line_top = label_top + 3 + LABEL_LINE * i
                draw.text((middle, line_top), line, INK, label_font, anchor="ma")
            left += column_width + GAP
        top = label_top + below
    return card


def _row_size(row: Sequence[tuple[Cell, list[str]]]) -> tuple[int, int]:
    """Return the heights of a row's pictures and of what is below them."""
    picture_height = max(picture.height for (picture, _), _ in row)
    num_lines = max(len(lines) for _, lines in row)
    below = LABEL_HEIGHT + LABEL_LINE * (num_lines - 1) if num_lines else 0
    return picture_height, below + GAP


def _column_width(column: Sequence[Cell]) -> int:
    width = max(picture.width for picture, _ in column)
    has_labels = any(label for _, label in column)
    return max(width, SMALL_TILE) if has_labels else width


# ---------------------------------------------------------------- curves


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    steps = [power * factor for factor in (1, 2, 5, 10, 20)]
    step = next(step for step in steps if (high - low) / step <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


class _Axes:
    """Where values over epochs lie on a panel of twice its size, for smooth lines."""

    left, right = 120, 2 * WIDTH - 24
    top, bottom = 64, 2 * HEIGHT - 56

    def __init__(self, end: float, values: Sequence[float]) -> None:
        """Cover epochs from 0 to `end` and all values, with some room around them."""
        low, high = min(values), max(values)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.end = end
        self.low = low if low == 0 else low - room
        self.high = high + room

    def place(self, epoch: float, value: float) -> tuple[float, float]:
        across = epoch / self.end
        up = (value - self.low) / (self.high - self.low)
        x = self.left + (self.right - self.left) * across
        y = self.bottom - (self.bottom - self.top) * up
        return x, y


def panel(
    title: str,
    curves: Sequence[Curve],
    guides: dict[str, float],
    without_values: str = "nothing yet",
) -> Image.Image:
    """Draw curves over epochs, with dashed guides by name; a text where there are no values."""
    font = ImageFont.load_default(26)
    card = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), PLOT)
    draw = ImageDraw.Draw(card)
    draw.text((20, 12), title, INK, font)
    epochs: list[float] = []
    values = list(guides.values())
    for _, curve_epochs, curve_values in curves:
        for epoch, value in zip(curve_epochs, curve_values, strict=True):
            if math.isfinite(value):
                epochs.append(epoch)
                values.append(value)
    if not epochs:
        draw.text((WIDTH, HEIGHT), without_values, OTHER, font, anchor="mm")
        return card.reduce(2)
    axes = _Axes(max(epochs) or 1.0, values)
    _draw_grid(draw, axes, font)
    name_right = axes.right
    for curve, colour in zip(curves, LINES, strict=False):
        _draw_curve(draw, axes, curve, colour)
        draw.text((name_right, 12), curve[0], colour, font, anchor="ra")
        name_right -= font.getlength(curve[0]) + 24
    for name, value in guides.items():
        _draw_guide(draw, axes, name, value, font)
    return card.reduce(2)


def _draw_grid(draw: ImageDraw.ImageDraw, axes: _Axes, font: ImageFont.FreeTypeFont) -> None:
    for value in ticks(axes.low, axes.high, 4):
        start, end = axes.place(0, value), axes.place(axes.end, value)
        draw.line([start, end], GRID, 2)
        draw.text((axes.left - 12, start[1]), f"{value:.4g}", OTHER, font, anchor="rm")
    for epoch in ticks(0, axes.end, 6):
        x, _ = axes.place(epoch, axes.low)
        draw.text((x, axes.bottom + 12), f"{epoch:g}", OTHER, font, anchor="ma")


def _draw_curve(draw: ImageDraw.ImageDraw, axes: _Axes, curve: Curve, colour: str) -> None:
    _, epochs, values = curve
    every = math.ceil(len(epochs) / MOST_POINTS) or 1
    points = zip(epochs[::every], values[::every], strict=True)
    line = [axes.place(x, y) for x, y in points if math.isfinite(y)]
    draw.line(line, colour, 4, joint="curve")
    if len(line) <= 30:  # so few that their places can be told
        for spot in line:
            draw.circle(spot, 7, colour)


def _draw_guide(
    draw: ImageDraw.ImageDraw,
    axes: _Axes,
    name: str,
    value: float,
    font: ImageFont.FreeTypeFont,
) -> None:
    _, y = axes.place(0, value)
    for start in range(axes.left, axes.right, 24):
        draw.line([(start, y), (start + 12, y)], OTHER, 2)
    draw.text((axes.right, y + 4), name, OTHER, font, anchor="ra")


def curves(log: Sequence[dict], output_dim: int) -> Image.Image:
    """Draw a run's lines of log.jsonl: what was measured above, how it is trained below."""

    def curve(key: str, name: str) -> Curve:
        rows = [row for row in log if key in row]
        return name, [row["epoch"] for row in rows], [row[key] for row in rows]

    def untrained(curve: Curve) -> dict[str, float]:
        _, epochs, values = curve
        # not of a run whose first lines were written before RankMe was measured
        is_known = len(values) > 1 and epochs[0] == 0 and math.isfinite(values[0])
        return {"untrained": values[0]} if is_known else {}

    knn, rankme = curve("knn_top1", ""), curve("rankme", "")
    top1_title, top1_curves = "k-NN top-1, %", [knn]
    if any("probe_top1" in row for row in log):
        top1_title = "top-1, %"
        top1_curves = [curve("knn_top1", "k-NN"), curve("probe_top1", "linear probe")]
    spreads = [
        curve("feature_spread", "spread"),
        curve("variance_share_1", "in 1"),
        curve("variance_share_10", "in 10"),
    ]
    without_knn = "no k-NN: RankMe alone" if any("rankme" in row for row in log) else "nothing yet"
    uniform = {f"ln K = {math.log(output_dim):.2f}: uniform": math.log(output_dim)}
    entropies = [curve("teacher_entropy", "entropy"), curve("kl", "KL")]
    panels = [
        panel("loss", [curve("loss", "")], {}),
        panel(top1_title, top1_curves, untrained(knn), without_knn),
        panel("RankMe: dimensions in use", [rankme], untrained(rankme)),
        panel("teacher entropy and KL", entropies, uniform),
        panel("spread, share of variance", spreads, {}),
        panel("learning rate", [curve("lr", "")], {}),
    ]
    epoch = max((row["epoch"] for row in log), default=0)
    return sheet(f"by epoch, up to {epoch:g}", [(picture, "") for picture in panels], 3)


# ---------------------------------------------------------------- images, maps and points


def crop_cells(crops: Sequence[Tensor], mean: Tensor, std: Tensor, row: int) -> list[Cell]:
    """Return the crops, (b, c, h, w) each and globals first, of image `row` of a batch, as seen."""
    cells = []
    for view, crop in enumerate(crops):
        pixels = (crop[row] * std + mean).clamp(0, 1).cpu()
        label = f"global {view + 1}" if view < 2 else f"local {view - 1}"
        cells.append((tile(TF.to_dtype(pixels, torch.uint8, scale=True), SMALL_TILE), label))
    return cells


def enlarged(values: np.ndarray, like: Image.Image) -> Image.Image:
    """Return a map (h, w) or (h, w, 3) uint8 in a picture's size, its cells kept visible."""
    return Image.fromarray(values).resize(like.size, Image.Resampling.NEAREST)


def framed(picture: Image.Image, colour: str) -> Image.Image:
    """Return a picture with a frame along its edges, inside it."""
    picture = picture.copy()
    corner = (picture.width - 1, picture.height - 1)
    ImageDraw.Draw(picture).rectangle([(0, 0), corner], outline=colour, width=4)
    return picture


def divider(height: int) -> Image.Image:
    """Return a line that sets the columns left of it apart."""
    line = Image.new("RGB", (2 * GAP + 2, height), CARD)
    line.paste(OTHER, (GAP, 0, GAP + 2, height))
    return line


def _heat_colours(share: np.ndarray) -> np.ndarray:
    """Return the colours (h, w, 3) uint8 of values from 0, dark, to 1, bright."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(share, stops, levels) for levels in zip(*HEAT, strict=True)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def heat(like: Image.Image, attention: Tensor, brightest: float) -> Image.Image:
    """Draw attention (h, w) in a picture's size: dark at 0, bright at `brightest` and above."""
    return enlarged(_heat_colours((attention / brightest).clamp(0, 1).numpy()), like)


def overlay(picture: Image.Image, attention: Tensor, brightest: float) -> Image.Image:
    """Draw attention (h, w) over a picture in grey, of which all can still be told."""
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.blend(grey, heat(picture, attention, brightest), 0.45)


def with_scale(picture: Image.Image, highest: str) -> Image.Image:
    """Return a heat map with a bar of its colours at its right, from 0 to the text `highest`."""
    font = ImageFont.load_default(13)
    bar_width = 12
    text_left = picture.width + 6 + bar_width + 5
    card = Image.new("RGB", (text_left + SCALE_TEXT, picture.height), CARD)
    card.paste(picture)
    levels = np.linspace(1, 0, picture.height)[:, None].repeat(bar_width, axis=1)
    card.paste(Image.fromarray(_heat_colours(levels)), (picture.width + 6, 0))
    draw = ImageDraw.Draw(card)
    draw.text((text_left, 0), highest, INK, font)
    draw.text((text_left, picture.height), "0", INK, font, anchor="ld")
    return card


def scatter(title: str, points: Tensor, classes: list[str], axes: tuple[str, str]) -> Image.Image:
    """Draw points (n, 2) in their classes' colours, on one scale, with a legend.

    `axes` says what lies across and what lies up.
    """
    names = sorted(set(classes))
    colours = dict(zip(names, CLASS_COLOURS, strict=False))
    low, high = points.min(0).values, points.max(0).values
    # three times as large as shown, for smooth edges
    scale = 1800 / (high - low).max().clamp(min=1e-6)
    margin, radius = 48, 10
    # never so narrow that an axis's text does not fit
    width, height = ((high - low) * scale).long().clamp(min=720).tolist()
    plot = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PLOT)
    draw = ImageDraw.Draw(plot)
    # in a random order, else the last class hides the others
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    for i in order.tolist():
        x, y = ((points[i] - low) * scale + margin).tolist()
        draw.circle((x, plot.height - y), radius, colours.get(classes[i], OTHER))
    plot = plot.reduce(3)
    across, up = axes
    labels = list(colours)
    if len(names) > len(colours):
        labels.append(f"{len(names) - len(colours)} more")
    legend = _legend(labels, colours, plot.height)
    cells = [(_upwards(up, plot.height), ""), (plot, across), (legend, "")]
    return sheet(title, cells, 3)


def _upwards(text: str, height: int) -> Image.Image:
    """Draw a text that is read from below to above, in the middle of `height`."""
    font = ImageFont.load_default(14)
    line = Image.new("RGB", (height, LABEL_HEIGHT), CARD)
    middle = (height // 2, LABEL_HEIGHT // 2)
    ImageDraw.Draw(line).text(middle, clipped(text, font, height), INK, font, anchor="mm")
    return line.transpose(Image.Transpose.ROTATE_90)


def _legend(labels: list[str], colours: dict[str, str], height: int) -> Image.Image:
    """Draw labels below each other, each beside a spot of its colour."""
    font = ImageFont.load_default(14)
    longest = max(font.getlength(clipped(label, font, 160)) for label in labels)
    width = min(160, 30 + int(longest))
    legend = Image.new("RGB", (width, max(height, LABEL_HEIGHT * len(labels))), CARD)
    draw = ImageDraw.Draw(legend)
    for i, label in enumerate(labels):
        top = LABEL_HEIGHT * i
        draw.circle((9, top + 10), 5, colours.get(label, OTHER))
        draw.text((22, top + 2), clipped(label, font, width - 24), INK, font)
    return legend
