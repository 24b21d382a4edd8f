"""Each benchmark prints its table; what they measure is not asserted."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def run(name: str, *args: object) -> str:
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield run
    torch.set_num_threads(threads)  # by which the last bits of other tests' runs differ
    torch.set_float32_matmul_precision(precision)


def test_loss_table(benchmark) -> None:
    out = benchmark("bench_loss", "--k", 512, "--batch", 2, 4096, "--rounds", 1, "--most-gib", 0.1)
    assert "loss, logits given" in out
    assert "last layer and loss" in out
    assert out.count("too large") == 4


def test_knn_table_and_equal_accuracies(benchmark) -> None:
    out = benchmark("bench_knn", "--train", 600, "--test", 120, "--classes", 5, "--rounds", 1)
    assert "one search a k" in out
    assert "accuracies differ by 0.000 points" in " ".join(out.split())


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("bench_knn", ("--train", 0), "--train > 0, got 0"),
        ("bench_loss", ("--batch", 64, -1), "--batch > 0, got -1"),
        ("bench_data", ("FOLDER", "--rounds", 0), "--rounds > 0, got 0"),
    ],
)
def test_number_that_measures_nothing_is_one_line(
    name: str, args: tuple, said: str, benchmark, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark(name, *args)
    assert capsys.readouterr().err == f"error: need {said}\n"


def test_missing_lightly_is_one_line(
    benchmark, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        benchmark("train_lightly", "runs/clothes", "--out", "lightly")
    assert capsys.readouterr().err == "error: need the package lightly: pip install lightly\n"


def test_data_table(benchmark, tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (60, 40), (9 * i, 99, 9)).save(tmp_path / f"{i}.jpg")
    args = ("--canvas", 64, "--images", 4, "--rounds", 1, "--batch-size", 2)
    out = benchmark("bench_data", tmp_path, *args)
    for title in ("host part", "decoding and multi-crop on", "multi-crop alone on"):
        assert title in out


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def test_pasted_objects_have_exact_masks(benchmark, tmp_path: Path) -> None:
    for split, colour in (("train", (250, 0, 0)), ("test", (0, 250, 0))):
        for name in CIFAR10:
            (tmp_path / "cifar10" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), colour).save(tmp_path / "cifar10" / split / name / "0.jpg")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 40), (0, 0, 250)).save(tmp_path / "photos" / "0.jpg")
    out, sizes = tmp_path / "out", ("--num-train", 2, "--num-test", 2, "--num-videos", 1)
    benchmark("paste_objects", tmp_path / "cifar10", tmp_path / "photos", out, *sizes)
    for split, channel in (("train", 0), ("val", 1)):
        for number in (1, 2):
            name = f"{number - 1:04}"
            pixels = np.asarray(Image.open(out / "images" / split / "images" / f"{name}.jpg"))
            mask = np.asarray(Image.open(out / "images" / split / "masks" / f"{name}.png"))
            assert set(np.unique(mask)) == {0, number}
            assert ((pixels[..., channel] > 125) == (mask == number)).mean() > 0.97
    assert len(list((out / "videos/Annotations/480p/00").iterdir())) == 16


@pytest.mark.slow
def test_step_and_end_to_end_tables(benchmark, tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (60, 40), (9 * i, 99, 9)).save(tmp_path / f"{i}.jpg")
    args = ("--arch", "test_resnet", "--batch", 2, "--rounds", 1)
    out = benchmark("bench_step", *args, "--no-plain")
    for said in (
        "GFLOP an image",
        "of the peak",
        "backward",
        "center and EMA",
        "test_resnet, ours",
    ):
        assert said in out
    out = benchmark("bench_train", tmp_path, *args, "--steps", 2, "--no-plain")
    assert "waiting for data" in out
