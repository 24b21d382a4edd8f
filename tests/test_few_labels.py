from pathlib import Path

import pytest
import torch

from harness.few_labels import draw_shots, mean_and_spread


def test_shots_are_random_images_of_each_class() -> None:
    labels = torch.tensor([0, 3, 1, 0, 3, 3, 0, 3, 1, 0])  # no image of class 2
    drawn = {tuple(draw_shots(labels, 2, seed=0, draw=draw).tolist()) for draw in range(30)}
    assert len(drawn) > 5
    for rows in drawn:
        assert list(rows) == sorted(set(rows))
        assert sorted(labels[list(rows)].tolist()) == [0, 0, 1, 1, 3, 3]
    for draw in range(5):
        one, two, many = (draw_shots(labels, shots, 7, draw) for shots in (1, 2, 100))
        assert set(one.tolist()) < set(two.tolist())  # more shots of a draw add to the fewer
        assert torch.equal(two, draw_shots(labels, 2, 7, draw))
        assert many.tolist() == list(range(10))  # a class that has fewer gives all


def test_every_image_is_drawn_about_as_often() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    rows = torch.cat([draw_shots(labels, 3, seed=1, draw=draw) for draw in range(1000)])
    assert (rows.bincount(minlength=10) - 300).abs().max() < 60  # four standard deviations


def test_spread_is_the_standard_deviation_of_a_sample() -> None:
    values = [3.0, 5.0, 10.0]
    found = mean_and_spread(values)
    assert found["mean"] == 6 and found["draws"] == values
    assert found["std"] == pytest.approx(torch.tensor(values).std().item())
    assert mean_and_spread([4.0]) == {"mean": 4.0, "std": 0.0, "draws": [4.0]}


@pytest.mark.parametrize("name", ["eval_knn", "eval_linear"])
def test_impossible_shots_are_one_line(name: str, tiny_run: Path, script) -> None:
    unfit = "--rank-only" if name == "eval_knn" else "--augment"
    for flags, said in (
        (("--shots", 0, 5), "need --shots > 0, got 0"),
        (("--shots", 5, "--draws", 0), "need --draws > 0, got 0"),
        (("--shots", 5, unfit), f"not with {unfit}"),
    ):
        result = script(name, tiny_run, *flags)
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1
