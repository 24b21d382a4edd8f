"""What a run measures of its teacher, against the checkpoint read by other means."""

import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import read_log, stop_at
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as TF

from harness.linear_probe import probe_accuracy
from harness.online_knn import in_words
from harness.run import Run
from models import load_checkpoint


def features_of(checkpoint: Path, files: list[Path]) -> torch.Tensor:
    """Return the teacher's features (n, d) of images that are as large as its crops."""
    model, metadata = load_checkpoint(checkpoint)
    crops = metadata["config"]["crops"]
    assert crops["global_crop_size"] == Image.open(files[0]).width
    images = torch.stack([TF.pil_to_tensor(Image.open(file).convert("RGB")) for file in files])
    images = TF.normalize(images / 255, list(crops["mean"]), list(crops["std"]))
    with torch.no_grad():
        return model.eval().backbone(images)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, tiny_flags, image_folder, script):
    """A run on images without classes: what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("unlabelled") / "run"
    source = image_folder / "checks"
    result = script("dino_train", *tiny_flags, "--data", source, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return result.stdout, folder


def test_run_without_labels_logs_rank_and_shares_of_its_teachers_features(
    unlabelled: tuple[str, Path], image_folder: Path
) -> None:
    """By singular values and covariance in float64, of images read by Pillow."""
    said, folder = unlabelled
    measured = [line for line in read_log(folder) if "rankme" in line]
    assert [line["step"] for line in measured] == [0, 5, 10]
    files = sorted((image_folder / "checks").glob("*.jpg"))
    features = features_of(folder / "ckpt.safetensors", files).double()
    values = torch.linalg.svdvals(features)
    shares = values / values.sum() + 1e-7
    rank = math.exp(-(shares * shares.log()).sum().item())
    assert measured[-1]["rankme"] == pytest.approx(rank, rel=1e-3)
    variances = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)
    for k in (1, 10):
        share = (variances[:k].sum() / variances.sum()).item()
        assert measured[-1][f"variance_share_{k}"] == pytest.approx(share, rel=1e-3)
    assert "variance_share_100" not in measured[-1]  # of 40 images
    assert f"the teacher's {in_words(measured[-1])}" in said


@pytest.mark.slow
def test_header_without_labels_says_when_to_stop_and_what_keeps_the_way_back(
    unlabelled: tuple[str, Path], tmp_path: Path, tiny_flags, image_folder, script
) -> None:
    (advice,) = (line for line in unlabelled[0].splitlines() if line.startswith("when to stop"))
    assert "RankMe" in advice and "--keep-every 1 keeps" in advice
    flags = [*tiny_flags, "--dry-run", "--output-dir", tmp_path / "run"]
    assert "when to stop" not in script("dino_train", *flags).stdout


@pytest.mark.slow
def test_labelled_run_logs_the_probe_that_its_checkpoint_gives(
    tmp_path: Path, tiny_flags, image_folder: Path, script
) -> None:
    folder = tmp_path / "run"
    flags = ["--val", image_folder, "--probe-every", 2, "--output-dir", folder]
    result = script("dino_train", *tiny_flags, *flags)
    assert result.returncode == 0, result.stderr
    files = [path for name in ("checks", "stripes") for path in (image_folder / name).glob("*.jpg")]
    features = features_of(folder / "ckpt.safetensors", files)
    labels = torch.tensor([int(file.parent.name == "stripes") for file in files])
    expected = probe_accuracy(features, labels, features, labels)
    # one image of 80 may lie on the boundary
    assert read_log(folder)[-1]["probe_top1"] == pytest.approx(expected, abs=1.3)
    assert f"linear probe {read_log(folder)[-1]['probe_top1']:.1f} %" in result.stdout


@pytest.mark.slow
def test_resumed_run_measures_what_the_uninterrupted_one_does(
    tmp_path: Path, tiny_flags, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a probe after the stop, in the log and in the last tensors, bit for bit."""
    flags = [*tiny_flags, "--probe-every", 1, "--log-every", 1, "--output-dir"]
    assert script("dino_train", *flags, tmp_path / "whole").returncode == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 10, signal.SIGTERM)  # where an evaluation is due, and put off
        assert script("dino_train", *flags, tmp_path / "cut").returncode == 128 + signal.SIGTERM
    with monkeypatch.context() as patch:  # killed once it has been made up for

        def be_killed(*args: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(Run, "start_loading", be_killed)
        assert script("dino_train", "--resume", tmp_path / "cut").returncode == 130
    assert script("dino_train", "--resume", tmp_path / "cut").returncode == 0
    whole, cut = (
        [line for line in read_log(tmp_path / name) if "rankme" in line]
        for name in ("whole", "cut")
    )
    assert [line["step"] for line in whole] == [0, 10, 20]
    assert cut == whole and all("probe_top1" in line for line in whole)
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
def test_untrained_is_what_was_measured_before_the_first_step_alone(
    tmp_path: Path, tiny_flags, image_folder: Path, script
) -> None:
    late = [*tiny_flags, "--knn-every", 0, "--epochs", 1, "--output-dir", tmp_path / "late"]
    assert script("dino_train", *late).returncode == 0
    went_on = script("dino_train", "--resume", tmp_path / "late", "--epochs", 2, "--knn-every", 1)
    assert went_on.returncode == 0, went_on.stderr
    assert "% trained, the teacher's" in went_on.stdout and "% untrained" not in went_on.stdout
    others = [*tiny_flags, "--epochs", 1, "--output-dir", tmp_path / "others"]
    assert "% untrained, " in script("dino_train", *others).stdout
    flags = ["--epochs", 2, "--knn-data", image_folder]  # of which it was the tenth before
    changed = script("dino_train", "--resume", tmp_path / "others", *flags)
    assert "% trained, the teacher's" in changed.stdout and "% untrained" not in changed.stdout


@pytest.mark.slow
def test_finished_run_saves_what_it_measures_on_other_images(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    flags = ["--resume", folder, "--val", image_folder]
    assert script("dino_train", *flags).returncode == 0
    _, metadata = load_checkpoint(folder / "ckpt.safetensors")
    last = read_log(folder)[-1]
    assert metadata["config"]["data"]["val"] == str(image_folder)
    assert metadata["metrics"]["knn_top1"] == last["knn_top1"] and last["step"] == 20
    log = (folder / "log.jsonl").read_text()
    assert script("dino_train", *flags).returncode == 0  # it knows already
    assert (folder / "log.jsonl").read_text() == log


def test_knn_data_that_cannot_be_used_is_one_line(tmp_path: Path, tiny_flags, script) -> None:
    flags = ["--knn-data", tmp_path / "none", "--output-dir", tmp_path / "run"]
    result = script("dino_train", *tiny_flags, *flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    given = f"no such folder or file: {tmp_path / 'none'}; need --knn-data NEW"
    assert given in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_log_says_of_how_many_images_knn_takes_some(tmp_path: Path, tiny_flags, script) -> None:
    for most, said in ((30, True), (72, False)):  # 72 of 80 images, as a tenth tests
        flags = ["--epochs", 1, "--knn-images", most, "--output-dir", tmp_path / str(most)]
        result = script("dino_train", *tiny_flags, *flags)
        text = "k-NN during training compares with 30 of 72 images (--knn-images)"
        assert (text in result.stdout) is said, result.stdout


def test_evaluation_is_said_in_words() -> None:
    measured = {"knn_top1": 44.64, "probe_top1": 51.2, "rankme": 17.31}
    measured |= {"variance_share_1": 0.604, "variance_share_10": 0.9}
    expected = "k-NN top-1 44.6 %, linear probe 51.2 %, RankMe 17.3; variance by components: "
    assert in_words(measured) == expected + "60 % in 1, 90 % in 10"
    assert in_words({"rankme": math.nan}) == "RankMe nan"
