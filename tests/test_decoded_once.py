"""Images kept in memory: each decoded once, the same pixels, workers and runs as without."""

import multiprocessing
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import MEASURED, read_log
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset

import data
from data import ImageDataset, Sample, StepSampler, build_dataset, collate
from harness import decoded_once, outlook
from harness.decoded_once import DecodedOnce, ImageMemory
from harness.run import Run

SIDE = 12
FORKS = multiprocessing.get_context().get_start_method() == "fork"


@pytest.fixture
def dataset(image_folder: Path) -> ImageDataset:
    return build_dataset(str(image_folder), canvas_size=SIDE)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Count how often each image of a data set is decoded in this process."""
    counts: Counter = Counter()
    decode = ImageDataset._decode

    def counted(self: ImageDataset, index: int) -> object:
        counts[index] += 1
        return decode(self, index)

    monkeypatch.setattr(ImageDataset, "_decode", counted)
    return counts


def _assert_same(sample: Sample, expected: Sample) -> None:
    for mine, other in zip(sample, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(mine, other)
            assert mine.dtype == other.dtype
        else:
            assert (mine, type(mine)) == (other, type(other))


def test_samples_are_the_same_and_decoded_once(dataset: ImageDataset, decoded: Counter) -> None:
    kept = DecodedOnce(dataset, SIDE, channels=3)
    assert len(kept) == len(dataset)
    for epoch in range(3):
        for index in (5, 0, 79):
            _assert_same(kept[epoch, index], dataset[epoch, index])
    assert kept[5].epoch == 0
    assert decoded == {5: 1 + 3, 0: 1 + 3, 79: 1 + 3}  # once, and three times by the plain one


def test_part_of_a_data_set_keeps_its_own_indices(dataset: ImageDataset) -> None:
    part = Subset(dataset, [7, 3])
    kept = DecodedOnce(part, SIDE, channels=3)
    for row in (0, 1, 0, 1):
        _assert_same(kept[row], part[row])
    assert kept[0].index == 7


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_are_not_square_keep_their_true_size(channels: int, tmp_path: Path) -> None:
    for name, size in (("wide", (40, 20)), ("high", (20, 50))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    dataset = build_dataset(str(tmp_path), canvas_size=SIDE, channels=channels)
    kept = DecodedOnce(dataset, SIDE, channels)
    for _ in range(2):
        assert [kept[0].size.tolist(), kept[1].size.tolist()] == [[50, 20], [20, 40]]
        _assert_same(kept[1], dataset[1])


def test_unreadable_image_is_tried_again_and_its_stand_in_differs_by_epoch(
    image_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "checks" / "0.jpg").write_bytes(b"damaged")
    dataset = build_dataset(str(folder), canvas_size=SIDE)
    kept = DecodedOnce(dataset, SIDE, channels=3)
    sources = set()
    for epoch in (0, 1, 0, 1, 2):
        sample = kept[epoch, 0]
        _assert_same(sample, dataset[epoch, 0])
        assert sample.index == 0
        sources.add(sample.source)
    assert 0 not in sources and len(sources) > 1


def test_processes_decode_as_long_as_one_would_for_as_many_epochs(dataset: ImageDataset) -> None:
    """Of 80 images each of two processes has seen a half after one epoch, 3/4 after two, ..."""
    seen: set[int] = set()
    num_decoded = 0
    for epoch in range(12):
        sampler = StepSampler(80, 4, 0, rank=0, world=2, steps=range(10 * epoch, 10 * epoch + 10))
        for batch in sampler:
            num_decoded += sum(index not in seen for _, index in batch)
            seen |= {index for _, index in batch}
    assert num_decoded == len(seen) == 80  # as two epochs of its 40 images


@pytest.mark.skipif(not FORKS, reason="workers are not forked")
def test_forked_workers_fill_the_table_of_all(dataset: ImageDataset, decoded: Counter) -> None:
    kept = DecodedOnce(dataset, SIDE, channels=3)
    for batch in DataLoader(kept, 8, num_workers=2, collate_fn=collate):
        assert (batch.image != 0).any()
    assert kept.facts[:, 0].all()
    for index in range(80):
        sample = kept[index]
        assert not decoded
        _assert_same(sample, dataset[index])
        decoded.clear()


# ---------------------------------------------------------------- where they are kept


def _memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int | None, **options: object) -> object:
    monkeypatch.setattr(decoded_once, "memory_of_machine", lambda: num_bytes)
    return ImageMemory(**({"is_wanted": True, "num_workers": 0} | options))


def test_images_are_kept_while_a_quarter_of_the_memory_holds_them(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 80 * SIDE * SIDE * 3
    few = Subset(dataset, [0, 1, 2])
    memory = _memory(monkeypatch, 4 * needed)
    assert isinstance(memory.keep(dataset, SIDE, 3), DecodedOnce)
    assert memory.keep(few, SIDE, 3) is few  # nothing is left
    memory = _memory(monkeypatch, 4 * needed - 1)
    assert memory.keep(dataset, SIDE, 3) is dataset
    assert isinstance(memory.keep(few, SIDE, 3), DecodedOnce)
    assert _memory(monkeypatch, None).keep(few, SIDE, 3) is few  # it does not say how much it has


def test_processes_of_a_machine_share_its_memory(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 80 * SIDE * SIDE * 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _memory(monkeypatch, 8 * needed - 8).keep(dataset, SIDE, 3) is dataset
    assert isinstance(_memory(monkeypatch, 8 * needed).keep(dataset, SIDE, 3), DecodedOnce)


def test_images_are_not_kept_where_that_is_not_wanted_or_workers_could_not_share_them(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _memory(monkeypatch, 1 << 40, is_wanted=False).keep(dataset, SIDE, 3) is dataset
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "get_context", lambda: spawn)
    assert _memory(monkeypatch, 1 << 40, num_workers=1).keep(dataset, SIDE, 3) is dataset
    assert isinstance(_memory(monkeypatch, 1 << 40).keep(dataset, SIDE, 3), DecodedOnce)


def test_system_that_promises_no_memory_goes_on_without(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(decoded_once, "_shared_zeros", refuse)
    assert _memory(monkeypatch, 1 << 40).keep(dataset, SIDE, 3) is dataset


def test_images_that_are_drawn_are_in_memory_already(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = data.ImageDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None)
    part = Subset(drawn, [0, 1])
    memory = _memory(monkeypatch, 1 << 40)
    assert memory.keep(drawn, 8, 3) is drawn
    assert memory.keep(part, 8, 3) is part


# ---------------------------------------------------------------- in runs


def _log(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_log(folder)]


WITH_WORKERS = [
    pytest.mark.slow,
    pytest.mark.skipif(not FORKS, reason="workers are not forked"),
]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=WITH_WORKERS)])
def test_run_is_the_same_and_decodes_each_image_once(
    num_workers: int, script, tiny_flags: list[str], tmp_path: Path, decoded: Counter
) -> None:
    """Of 80 images to train on, which are those to evaluate on, too: 72 remembered and 8 tested."""
    flags = [*tiny_flags, "--epochs", 3, "--num-workers", num_workers, "--output-dir"]
    result = script("dino_train", *flags, tmp_path / "kept")
    assert result.returncode == 0, result.stderr
    said = "data: each image is decoded once, and kept: 0.00 GiB of memory"
    assert said in result.stdout.splitlines()
    looked_at = 64  # by the survey
    if num_workers == 0:
        assert sum(decoded.values()) == looked_at + 80 + 80
    result = script("dino_train", *flags, tmp_path / "plain", "--no-in-memory")
    assert result.returncode == 0, result.stderr
    assert "is decoded once" not in result.stdout
    assert _log(tmp_path / "kept") == _log(tmp_path / "plain")
    kept, plain = (tmp_path / name / "ckpt.safetensors" for name in ("kept", "plain"))
    expected = load_file(plain)
    for name, tensor in load_file(kept).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("decodes_once", "world", "steps_before", "step", "expected"),
    [
        (False, 1, 0, 5, 25 * 3.0),
        (True, 1, 0, 5, 5 * 3.0 + 20 * 1.0),  # the rest of the first epoch, then two from memory
        (True, 1, 0, 10, 20 * 1.0),
        (True, 1, 0, 25, 5 * 1.0),
        (True, 1, 15, 16, 9 * 3.0 + 5 * 1.0),  # resumed: an epoch from there
        (True, 1, 25, 26, 4 * 3.0),  # it ends before all are decoded
        (True, 1, 0, 30, 0.0),
        (True, 2, 0, 5, 15 * 3.0 + 10 * 1.0),
        (True, 8, 0, 5, 25 * 3.0),
    ],
)
def test_time_to_go_counts_waiting_for_data_while_images_are_decoded(
    decodes_once: bool, world: int, steps_before: int, step: int, expected: float
) -> None:
    """Of three epochs of 10 steps, of 3 s, two of which they wait for data."""
    run = Run.__new__(Run)
    run.accelerator = SimpleNamespace(num_processes=world)
    run.images = DecodedOnce.__new__(DecodedOnce) if decodes_once else None
    run.steps_before, run.steps_per_epoch, run.total_steps = steps_before, 10, 30
    assert run.seconds_left(step, seconds_a_step=3.0, waited_a_step=2.0) == expected


def test_dry_run_does_not_count_on_waiting_after_the_first_epoch(
    script, tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlook.DryRun, "seconds_a_step", lambda *_: (3.0, 2.0))
    flags = [*tiny_flags, "--epochs", 3, "--dry-run", "--output-dir", tmp_path / "run"]
    result = script("dino_train", *flags)
    assert result.returncode == 0, result.stderr
    assert "whole run   50 s for 30 steps" in result.stdout  # 10 of 3 s and 20 of 1 s
    result = script("dino_train", *flags, "--no-in-memory")
    assert "whole run   1 min 30 s for 30 steps" in result.stdout
