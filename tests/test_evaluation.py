import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_log
from PIL import Image
from test_visualize import write_checkpoint
from torch import nn
from torch.utils.data import Subset

from data import ImageDataset
from harness.distributed import make_accelerator
from harness.evaluation import (
    EvalConfig,
    FrozenBackbone,
    layer_features,
    open_backbone,
    with_levels_of,
    workers_for,
)
from harness.opened_network import Preparation, normalized, open_network
from models import get_backbone, load_checkpoint, save_checkpoint
from pixels import center_crop, decode


@pytest.mark.slow
def test_crop_of_evaluations_may_be_larger_than_those_of_training(
    tmp_path: Path, tiny_flags: list[str], script
) -> None:
    """In the run, in eval_knn.py and in what is exported alike."""
    run, out, answer = (tmp_path / name for name in ("run", "b.safetensors", "a.json"))
    flags = [*tiny_flags, "--epochs", 1, "--eval-size", 24, "--output-dir", run]
    assert script("dino_train", *flags).returncode == 0
    assert script("export", run, out).returncode == 0
    images = ["--data", tiny_flags[1]]
    for source in ([run], [out, *images]):
        assert script("eval_knn", *source, "--ks", 20, "--json-out", answer).returncode == 0
        top1 = json.loads(answer.read_text())["knn"]["20"]["top1"]
        assert top1 == pytest.approx(read_log(run)[-1]["knn_top1"])
        network = open_network(source[0])
        assert (network.preparation.size, network.preparation.resize) == (24, 24)
    assert open_network(run).crops.global_crop_size == 16


@pytest.mark.parametrize("avgpool", [False, True])
@pytest.mark.parametrize("num_last_blocks", [1, 4])
def test_layers_are_the_normalised_tokens_of_the_last_blocks(
    num_last_blocks: int, avgpool: bool
) -> None:
    """Against the blocks run one by one, as the original's get_intermediate_layers has them."""
    vit = get_backbone("vit_tiny_patch16_224", patch_size=8, image_size=32).eval()
    images = torch.randn(2, 3, 32, 48)  # not square
    with torch.no_grad():
        features = layer_features(vit, num_last_blocks, avgpool)(images)
        tokens, outputs = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), []
        for block in vit.blocks:
            tokens = block(tokens)
            outputs.append(vit.norm(tokens))
    expected = [output[:, 0] for output in outputs[-num_last_blocks:]]
    expected += [outputs[-1][:, 1:].mean(dim=1)] * avgpool
    torch.testing.assert_close(features, torch.cat(expected, dim=1))


def test_layers_that_a_network_lacks_are_named() -> None:
    vit = get_backbone("vit_tiny_patch16_224", patch_size=8, image_size=32)
    with pytest.raises(ValueError, match="from 1 to 12, got 13"):
        layer_features(vit, 13)
    with pytest.raises(ValueError, match="need a ViT"):
        layer_features(get_backbone("resnet18"), 4)


def test_levels_of_images_that_are_opened_one_by_one_are_the_same_for_all(tmp_path: Path) -> None:
    paths = [tmp_path / "dark.png", tmp_path / "light.png"]
    values = [np.full((8, 8), level, np.uint16) for level in (100, 5000)]
    for path, pixels in zip(paths, values, strict=True):
        Image.fromarray(pixels).save(path)
    preparation = Preparation(None, 8, 8, (0.5,) * 3, (0.5,) * 3)
    network = FrozenBackbone(nn.Identity(), preparation, {})
    accelerator = make_accelerator()
    assert with_levels_of(network, paths, accelerator).preparation.levels == (100, 5000)
    given = replace(network, preparation=replace(preparation, levels=(0, 9)))
    assert with_levels_of(given, paths, accelerator).preparation.levels == (0, 9)


def test_student_of_a_checkpoint_is_that_of_the_state_beside_it(
    tmp_path: Path, tiny_run: Path
) -> None:
    accelerator = make_accelerator()

    def checksum(path: Path, network: str) -> int:
        return open_backbone(EvalConfig(str(path), network=network), accelerator).facts[
            "backbone_crc32"
        ]

    of_run = {role: checksum(tiny_run, role) for role in ("teacher", "student")}
    assert of_run["teacher"] != of_run["student"]
    assert checksum(tiny_run / "ckpt.safetensors", "student") == of_run["student"]
    alone = tmp_path / "best.safetensors"
    shutil.copy(tiny_run / "ckpt.safetensors", alone)
    assert checksum(alone, "teacher") == of_run["teacher"]
    with pytest.raises(ValueError, match="holds the teacher alone: need the run"):
        checksum(alone, "student")


def test_evaluation_reports_the_rank(tmp_path: Path, tiny_run: Path, script) -> None:
    out = tmp_path / "knn.json"
    result = script("eval_knn", tiny_run / "ckpt.safetensors", "--json-out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert 1 <= report["rankme"] <= 72
    assert f"RankMe {report['rankme']:.1f}" in result.stdout


def test_rank_alone_needs_no_classes(tmp_path: Path, tiny_run: Path, image_folder, script) -> None:
    folder, out = tmp_path / "flat", tmp_path / "rank.json"
    folder.mkdir()
    for file in list(image_folder.glob("stripes/*.jpg"))[:9]:
        (folder / file.name).write_bytes(file.read_bytes())
    flags = ("--data", folder, "--rank-only", "--json-out", out)
    result = script("eval_knn", tiny_run / "ckpt.safetensors", *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["num_images"] == 9 and 1 <= report["rankme"] <= 9


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["eval_knn", "eval_linear"])
def test_weights_that_are_not_finite_are_named(
    name: str, value: float, tmp_path: Path, tiny_run: Path, script
) -> None:
    model, metadata = load_checkpoint(tiny_run / "ckpt.safetensors")
    model.backbone.bn1.weight.data[0] = value
    path = tmp_path / "ckpt.safetensors"
    save_checkpoint(path, model, metadata)
    result = script(name, path, "--json-out", tmp_path / "out.json")
    assert result.returncode == 2
    expected = f"error: {path} is damaged: backbone.bn1.weight holds a nan or an infinity\n"
    assert result.stderr == expected
    assert not (tmp_path / "out.json").exists()


def test_brackets_in_a_folders_name_are_text(
    tmp_path: Path, tiny_run: Path, image_folder: Path, script
) -> None:
    folder, out = tmp_path / "a[/b] [red]", tmp_path / "out.json"
    shutil.copytree(image_folder, folder)
    flags = ("--data", folder, "--json-out", out)
    result = script("eval_knn", tiny_run / "ckpt.safetensors", *flags)
    assert result.returncode == 0, result.stderr
    assert "a[/b] [red]: " in result.stdout
    assert json.loads(out.read_text())["data"] == str(folder)


@pytest.mark.slow
def test_size_and_precision_of_an_evaluation_are_the_users(
    tmp_path: Path, tiny_run: Path, image_folder: Path, launch, script
) -> None:
    features = {}
    for name, flags in {
        "own": [],
        "larger": ["--eval-size", 24],
        "bf16": ["--mixed-precision", "bf16"],
    }.items():
        out = tmp_path / f"{name}.npy"
        answer = launch([tiny_run, "--out", out, *flags], script="embed")
        assert answer.codes == [0], answer.text
        features[name] = torch.from_numpy(np.load(out))
        facts = json.loads(out.with_suffix(".json").read_text())["facts"]
        assert facts["eval_size"] == (24 if name == "larger" else 16)
        assert facts["mixed_precision"] == ("bf16" if name == "bf16" else "no")
    assert features["own"].dtype == features["bf16"].dtype == torch.float32
    assert not torch.equal(features["own"], features["bf16"])
    torch.testing.assert_close(features["bf16"], features["own"], rtol=0.1, atol=0.1)
    crop = center_crop(decode(sorted(image_folder.glob("checks/*.jpg"))[0]), 24, 24)
    network = open_network(tiny_run)
    with torch.no_grad():
        expected = network.model.backbone(normalized(crop[None], network.preparation))
    distances = (features["larger"] - expected).norm(dim=1)
    assert distances.min() < 1e-4 < distances.median()


def test_size_that_a_network_does_not_take_is_one_line(tmp_path: Path, script) -> None:
    file = write_checkpoint(tmp_path / "ckpt.safetensors", "test_vit", size=16, patch_size=8)
    result = script(
        "embed", file, "--data", "patterns", "--out", tmp_path / "f.npy", "--eval-size", 9
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "no features of test_vit at 9 x 9 px" in result.stderr


def test_images_are_decoded_beside_a_gpu_and_not_where_that_gains_nothing() -> None:
    decoded = ImageDataset(np.array([b"a.jpg"]), None)
    in_memory = ImageDataset(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), None)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert workers_for(decoded, cpu) == workers_for(Subset(in_memory, [0]), gpu) == 0
    assert workers_for(Subset(decoded, [0]), gpu) == workers_for(decoded, gpu) >= 1


@pytest.mark.parametrize("name", ["eval_knn", "embed"])
def test_fp16_on_a_cpu_is_refused(name: str, tiny_run: Path, tmp_path: Path, script) -> None:
    more = ["--out", tmp_path / "f.npy"] if name == "embed" else []
    result = script(name, tiny_run, "--mixed-precision", "fp16", *more)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--mixed-precision fp16 needs a GPU" in result.stderr
