import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional as F

import eval_knn
from data import ImageDataset, permutation
from eval_knn import knn_accuracy
from harness import evaluation
from harness.evaluation import extract_features


def test_equals_the_original(parity: dict) -> None:
    names = ("train_features", "train_labels", "test_features", "test_labels")
    ks = parity["knn.ks"].tolist()
    accuracies = knn_accuracy(*(parity[f"knn.{name}"] for name in names), ks=ks)
    for i, k in enumerate(ks):
        expected = parity["knn.top1"][i].item(), parity["knn.top5"][i].item()
        assert accuracies[k] == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 8])
def test_equals_brute_force(num_classes: int) -> None:
    train, test = torch.randn(60, 5), torch.randn(33, 5)
    labels, targets = torch.randint(num_classes, (60,)), torch.randint(num_classes, (33,))
    accuracies = knn_accuracy(train, labels, test, targets, ks=(1, 7, 500), temperature=0.3)
    for k, (top1, top5) in accuracies.items():
        hits = [0, 0]
        for image, target in zip(test, targets.tolist(), strict=True):
            similarity = F.cosine_similarity(image[None], train).tolist()
            nearest = sorted(range(60), key=lambda i: -similarity[i])[:k]
            votes: Counter = Counter()
            for i in nearest:
                votes[labels[i].item()] += math.exp(similarity[i] / 0.3)
            ranked = [label for label, _ in votes.most_common(5)]
            hits[0] += ranked[0] == target
            hits[1] += target in ranked
        assert top1 == pytest.approx(100 * hits[0] / 33)
        assert top5 == pytest.approx(100 * hits[1] / 33)


def test_top5_counts_classes_that_have_a_vote_alone() -> None:
    """One image a class, k 1: the one vote decides both; and classes nobody votes for count 0."""
    features, labels = torch.eye(10), torch.arange(10)
    queries = features[[0, *range(9)]]  # the first is right, the others are one class off
    assert knn_accuracy(features, labels, queries, labels, ks=(1,)) == {1: (10.0, 10.0)}
    others = torch.arange(60) + 10
    accuracies = knn_accuracy(features, labels, torch.randn(60, 10), others, ks=(1, 10))
    assert accuracies == {1: (0.0, 0.0), 10: (0.0, 0.0)}


def test_top5_of_fewer_than_six_classes_is_not_printed(tiny_run: Path, script) -> None:
    result = script("eval_knn", tiny_run / "ckpt.safetensors")
    assert result.returncode == 0, result.stderr
    assert "top-1 %" in result.stdout
    assert "top-5 %" not in result.stdout


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = torch.randn(300, 8), torch.randn(50, 8)
    labels, targets = torch.randint(4, (300,)), torch.randint(4, (50,))
    whole = knn_accuracy(train, labels, test, targets)
    monkeypatch.setattr("eval_knn.ENTRIES_ON_CPU", 7 * len(train))  # chunks of 7 and one of 1
    assert knn_accuracy(train, labels, test, targets) == whole


def test_works_with_fewer_images_than_k_and_one_class() -> None:
    features, labels = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    assert knn_accuracy(features, labels, features[:1], labels[:1]) == dict.fromkeys(
        (10, 20, 100, 200), (100.0, 100.0)
    )


def test_scale_of_features_does_not_matter() -> None:
    train, test = torch.randn(50, 4), torch.randn(20, 4)
    labels, targets = torch.randint(3, (50,)), torch.randint(3, (20,))
    scaled = train * torch.rand(50, 1) * 100, labels, test / 7, targets
    assert knn_accuracy(train, labels, test, targets) == knn_accuracy(*scaled)


def test_cold_votes_do_not_overflow() -> None:
    """At a low temperature the nearest neighbour decides, as with k = 1."""
    train, test = torch.randn(50, 4), torch.randn(20, 4)
    labels, targets = torch.randint(3, (50,)), torch.randint(3, (20,))
    cold = knn_accuracy(train, labels, test, targets, ks=(1, 20), temperature=1e-6)
    assert cold[1][0] == cold[20][0]


def test_impossible_votes_are_named() -> None:
    x, y = torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="a temperature > 0"):
        knn_accuracy(x, y, x, y, temperature=0.0)
    for ks in ((), (0,), (-1, 5)):
        with pytest.raises(ValueError, match="need k >= 1"):
            knn_accuracy(x, y, x, y, ks=ks)


def test_features_come_in_order_whatever_the_batch() -> None:
    images = torch.randint(256, (23, 3, 4, 4), dtype=torch.uint8)
    dataset = ImageDataset(images, torch.arange(23).numpy())
    accelerator = Accelerator(cpu=True)
    for batch_size, num_workers in ((5, 0), (100, 2)):
        features, labels = extract_features(
            lambda x: x.flatten(1), dataset, accelerator, batch_size, num_workers
        )
        torch.testing.assert_close(features, images.flatten(1).float())
        assert labels.tolist() == list(range(23))


def test_json_and_features_hold_what_the_table_shows(
    tmp_path: Path, tiny_run: Path, script
) -> None:
    result = script(
        "eval_knn",
        tiny_run / "ckpt.safetensors",
        "--json-out",
        tmp_path / "knn.json",
        "--features-out",
        tmp_path / "f.safetensors",
        "--ks",
        "5",
        "20",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "knn.json").read_text())
    tensors = load_file(tmp_path / "f.safetensors")
    names = ("train_features", "train_labels", "test_features", "test_labels")
    again = knn_accuracy(*(tensors[name] for name in names), ks=(5, 20))
    assert report["num_train"] == len(tensors["train_labels"]) == 72
    assert report["knn"]["5"]["top1"] == pytest.approx(again[5][0])
    assert f"{again[20][0]:.2f}" in result.stdout
    # the run's own evaluation is the same numbers
    last = [json.loads(line) for line in (tiny_run / "log.jsonl").read_text().splitlines()][-1]
    assert report["knn"]["20"]["top1"] == pytest.approx(last["knn_top1"])
    assert report["rankme"] == pytest.approx(last["rankme"], rel=1e-4)


def test_student_is_another_network(tmp_path: Path, tiny_run: Path, script) -> None:
    features = []
    for network, flag in (("teacher", []), ("student", ["--network", "student"])):
        out = tmp_path / f"{network}.safetensors"
        result = script("eval_knn", tiny_run / "ckpt.safetensors", "--features-out", out, *flag)
        assert result.returncode == 0, result.stderr
        assert network in result.stdout
        features.append(load_file(out)["test_features"])
    assert not torch.equal(*features)


def test_folder_checkpoint_and_state_are_one_run(tmp_path: Path, tiny_run: Path, script) -> None:
    sources = [tiny_run, tiny_run / "ckpt.safetensors", tiny_run / "state.safetensors"]
    for network in ("teacher", "student"):
        features = []
        for source in sources:
            out = tmp_path / "features.safetensors"
            flags = ("--network", network, "--features-out", out, "--ks", 5)
            result = script("eval_knn", source, *flags)
            assert result.returncode == 0, result.stderr
            assert f"{network} at step 20" in result.stdout
            features.append(load_file(out)["test_features"])
        assert all(torch.equal(features[0], others) for others in features)


@pytest.mark.parametrize("name", ["eval_knn", "eval_linear"])
def test_wrong_checkpoint_is_one_line_and_code_2(name: str, tmp_path: Path, script) -> None:
    import pickle

    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps([1]))
    for file, said in (
        ("none.safetensors", "no such"),
        ("text.safetensors", "truncated"),
        ("pickle.pth", "pickle"),
    ):
        result = script(name, tmp_path / file, "--json-out", tmp_path / "out.json")
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and said in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out.json").exists()


def test_data_of_another_kind_or_without_classes_is_refused(
    tmp_path: Path, tiny_run: Path, script
) -> None:
    from torchvision.io import write_jpeg

    write_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / "a.jpg"))
    out = tmp_path / "none" / "out.json"
    for flag, said in (("--json-out", "results"), ("--features-out", "features")):
        result = script("eval_knn", tiny_run / "ckpt.safetensors", flag, out)
        assert result.returncode == 2
        assert f"no such folder for the {said}" in result.stderr
        result = script("eval_knn", tiny_run / "ckpt.safetensors", flag, tmp_path)
        assert result.returncode == 2
        assert f"need a file for the {said}, got the folder {tmp_path}" in result.stderr
    for data, said in (
        (tmp_path, "no class folders"),
        (tmp_path / "none", "NEW with their place, if the images were moved"),
    ):
        result = script("eval_knn", tiny_run / "ckpt.safetensors", "--data", data)
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1


def test_disk_that_is_full_costs_the_file_and_not_the_table(
    tmp_path: Path, tiny_run: Path, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    flags = ("--json-out", tmp_path / "out.json", "--shots", 1)
    with monkeypatch.context() as patch:  # for features alone, which are large
        patch.setattr(eval_knn, "save_tensors", fail)
        result = script("eval_knn", tiny_run, *flags, "--features-out", tmp_path / "f.safetensors")
    assert result.returncode != 0 and "No space left" in result.stderr
    assert "knn" in json.loads((tmp_path / "out.json").read_text())
    monkeypatch.setattr(evaluation, "write_whole", fail)
    for name, more, said in (
        ("eval_knn", (), "weighted k-NN"),
        ("eval_linear", ("--epochs", 1), "best: "),
    ):
        result = script(name, tiny_run, *flags, *more)
        assert result.returncode != 0 and "No space left" in result.stderr
        assert said in result.stdout and "few labels" in result.stdout


def test_few_labels_equal_brute_force(tmp_path: Path, tiny_run: Path, script) -> None:
    """Each draw's nearest neighbour, among so many images of each class, one by one."""
    out, file = tmp_path / "knn.json", tmp_path / "f.safetensors"
    flags = ("--shots", 1, 3, 99, "--draws", 4, "--ks", 1, "--draw-seed", 5)
    result = script("eval_knn", tiny_run, *flags, "--json-out", out, "--features-out", file)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    train, labels, test, targets = (
        load_file(file)[name]
        for name in ("train_features", "train_labels", "test_features", "test_labels")
    )
    for shots in (1, 3, 99):
        top1 = []
        for draw in range(4):
            counts: Counter = Counter()
            memory = []
            for row in permutation(len(labels), 5, draw).tolist():
                counts[labels[row].item()] += 1
                if counts[labels[row].item()] <= shots:
                    memory.append(row)
            hits = 0
            for image, target in zip(test, targets, strict=True):
                nearest = memory[int(F.cosine_similarity(image[None], train[memory]).argmax())]
                hits += (labels[nearest] == target).item()
            top1.append(100 * hits / len(test))
        found = report["shots"][str(shots)]["1"]
        assert found["draws"] == pytest.approx(top1)
        assert found["mean"] == pytest.approx(sum(top1) / 4)
        assert f"{found['mean']:.2f} ± {found['std']:.2f}" in result.stdout
    everything = report["shots"]["99"]["1"]
    assert everything["std"] == 0
    assert everything["mean"] == pytest.approx(report["knn"]["1"]["top1"])
    assert "of 4 draws" in " ".join(result.stdout.split())  # the caption has several lines
