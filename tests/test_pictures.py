import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from harness import pictures
from harness.pictures import (
    CLASS_COLOURS,
    LABEL_LINE,
    LINES,
    MOST_LINES,
    WIDTH,
    clipped,
    crop_cells,
    curves,
    panel,
    scatter,
    sheet,
    ticks,
    wrapped,
)


@pytest.mark.parametrize("low, high", [(0, 1), (-0.3, 6.9), (28.1, 86.3), (0, 0.0075), (0, 800)])
def test_ticks_are_few_round_numbers_in_range(low: float, high: float) -> None:
    values = ticks(low, high, 4)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    step = values[1] - values[0]
    digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digits - x) for x in (1, 2, 5)) < 1e-6


def colour(picture: Image.Image, text: str) -> list[tuple[int, int]]:
    """Find the pixels of about a colour."""
    wanted = torch.tensor([int(text[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = torch.from_numpy(np.array(picture)).long()
    return ((pixels - wanted).abs().amax(dim=-1) < 40).nonzero().tolist()


def test_rising_curve_rises_from_left_to_right() -> None:
    picture = panel("loss", [("", [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])], {})
    spots = sorted(colour(picture, LINES[0]), key=lambda spot: spot[1])
    rows = [row for row, _ in spots]
    assert spots[0][1] < WIDTH / 4 and spots[-1][1] > WIDTH * 3 / 4
    assert rows[0] > rows[len(rows) // 2] > rows[-1]


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"step": 0, "epoch": 0.0, "knn_top1": 30.0}],
        [{"step": 1, "epoch": 0.1, "loss": math.nan, "lr": 0.0, "teacher_entropy": 1.0, "kl": 0.0}],
        [{"step": i, "epoch": i / 9, "loss": 5.0, "lr": 1e-5} for i in range(20_000)],
    ],
)
def test_curves_of_any_log_have_one_size(log: list[dict]) -> None:
    assert curves(log, 1024).size == curves([], 1024).size


def test_rank_is_drawn_beside_knn_and_alone_without_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first value is a guide only where it is the untrained network's."""
    drawn: list = []
    monkeypatch.setattr(
        pictures, "panel", lambda *args: drawn.append(args) or Image.new("RGB", (9, 9))
    )
    log = [{"epoch": i, "knn_top1": 30.0 + i, "rankme": 5.0 + i} for i in range(3)]
    curves(log, 1024)
    knn, rank = drawn[1:3]
    assert knn[:3] == ("k-NN top-1, %", [("", [0, 1, 2], [30, 31, 32])], {"untrained": 30})
    assert rank[1:3] == ([("", [0, 1, 2], [5, 6, 7])], {"untrained": 5})
    drawn.clear()
    curves([{"epoch": i, "rankme": 5.0 + i} for i in (1, 2)], 1024)
    knn, rank = drawn[1:3]
    assert knn[1:] == ([("", [], [])], {}, "no k-NN: RankMe alone")
    assert rank[1:3] == ([("", [1, 2], [6, 7])], {})


def test_probe_is_drawn_beside_knn_and_shares_of_variance_beside_the_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: dict[str, list] = {}

    def panel_of(title: str, curves: list, *more: object) -> Image.Image:
        drawn[title] = curves
        return Image.new("RGB", (9, 9))

    monkeypatch.setattr(pictures, "panel", panel_of)
    log = [{"epoch": 0, "knn_top1": 30.0, "probe_top1": 40.0, "variance_share_1": 0.5}]
    log += [{"epoch": 1, "knn_top1": 31.0, "variance_share_1": 0.6, "variance_share_10": 0.9}]
    curves([*log, {"epoch": 2, "feature_spread": 0.7}], 1024)
    assert drawn["top-1, %"] == [("k-NN", [0, 1], [30, 31]), ("linear probe", [0], [40])]
    assert drawn["spread, share of variance"] == [
        ("spread", [2], [0.7]),
        ("in 1", [0, 1], [0.5, 0.6]),
        ("in 10", [1], [0.9]),
    ]


def test_curve_leaves_out_what_is_no_number() -> None:
    epochs = [0.0, 1.0, 2.0, 3.0]
    with_nan = panel("RankMe", [("", epochs, [1.0, math.nan, 3.0, 4.0])], {})
    without = panel("RankMe", [("", [0.0, 2.0, 3.0], [1.0, 3.0, 4.0])], {})
    assert with_nan.tobytes() == without.tobytes()


def test_crops_are_shown_as_they_were_before_normalisation() -> None:
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.full((3, 1, 1), 0.2)
    crop = (pixels / 255 - mean) / std
    cells = crop_cells([crop, crop, crop], mean, std, row=1)
    assert [label for _, label in cells] == ["global 1", "global 2", "local 1"]
    picture = cells[0][0].resize((8, 8), Image.Resampling.NEAREST)
    shown = torch.from_numpy(np.array(picture)).long().permute(2, 0, 1)
    assert (shown - pixels[1].long()).abs().max() <= 1


def test_text_is_shortened_to_its_width() -> None:
    font = ImageFont.load_default(14)
    assert clipped("cat", font, 100) == "cat"
    short = clipped("a name that is far too long\nfor this", font, 100)
    assert short.endswith("…") and font.getlength(short) <= 100
    assert "a name that is far too long".startswith(short[:-1])
    assert clipped("x" * 9, font, 3) == "…"


def test_text_takes_the_lines_that_it_needs() -> None:
    font = ImageFont.load_default(14)
    assert wrapped("", font, 100) == []
    assert wrapped("cat\nof\n\nmine", font, 100) == ["cat", "of", "mine"]
    for text in ("a name of some words that is far too long", "x" * 40):
        lines = wrapped(text, font, 120)
        assert len(lines) > 1 and all(font.getlength(line) <= 120 for line in lines)
        assert "".join(lines) == text.replace(" ", "") or " ".join(lines) == text
    endless = wrapped("x" * 400, font, 120)
    assert len(endless) == MOST_LINES and endless[-1].endswith("…")


def test_sheet_is_as_high_as_its_longest_label_needs() -> None:
    picture = Image.new("RGB", (150, 50), "red")
    low, high = (sheet("", [(picture, "a"), (picture, label)], 2) for label in ("a", "a\nb\nc"))
    assert high.height == low.height + 2 * LABEL_LINE


def test_sheet_holds_its_pictures() -> None:
    cells = [(Image.new("RGB", (150, 40 + 10 * i), "red"), f"label {i}") for i in range(5)]
    card = np.asarray(sheet("title", cells, 2))
    red = (card == (255, 0, 0)).all(axis=-1)
    assert red.sum() == sum(picture.width * picture.height for picture, _ in cells)
    assert card.shape[1] == 2 * 150 + 3 * 8


def test_points_have_a_legend_and_room_for_the_axes_on_any_scale() -> None:
    for spread in ((1.0, 0.01), (0.01, 1.0), (0.0, 0.0)):
        points = torch.randn(9, 2) * torch.tensor(spread)
        card = scatter("title", points, ["cat"] * 5 + ["dog"] * 4, ("component 1", "component 2"))
        assert min(card.size) > 240
        assert all(colour(card, CLASS_COLOURS[i]) for i in range(2))
