"""Exported files, read by the libraries that they are for, and back by the evaluations."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_weights import RESNET, SMALL, VIT, as_original, build, same_state
from torch import nn

import export
from harness.opened_network import Preparation, open_network
from harness.weights import BACKBONE_CONFIG, load_weights
from models import DinoModel, DinoProjectionHead, ModelConfig, save_checkpoint

pytestmark = pytest.mark.slow  # seconds as a whole

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
PREPARED = {
    "config": {
        "data": {"data": "photos", "eval_resize": 40},
        "crops": {"global_crop_size": 32, "mean": MEAN, "std": STD},
    }
}
IMAGES = torch.randn(3, 3, 32, 32)
FORMATS = {"backbone": "b.safetensors", "timm": "folder", "original": "o.pth"}

# of the original's MultiCropWrapper(vit_tiny(), DINOHead(192, 12)), of whose blocks the first
BLOCK = [
    f"blocks.0.{name}.{kind}"
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]
PATCHES = ["patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
ORIGINAL_BACKBONE = ["cls_token", "pos_embed", *PATCHES, *BLOCK]
ORIGINAL_HEAD = [
    *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
    "last_layer.weight_g",
    "last_layer.weight_v",
]


@pytest.fixture
def exported(tmp_path: Path, script: Callable) -> Callable[[DinoModel, str, str], Path]:
    """Export a model that was trained on images of 32 px, and return what was written."""

    def write(model: DinoModel, kind: str, name: str) -> Path:
        save_checkpoint(tmp_path / "ckpt.safetensors", model, PREPARED)
        out = tmp_path / name
        result = script("export", tmp_path / "ckpt.safetensors", out, "--format", kind)
        assert result.returncode == 0, result.stderr
        return out

    return write


@torch.no_grad()
def features(net: nn.Module) -> torch.Tensor:
    return net(IMAGES)


# ---------------------------------------------------------------- read back

ARCHS = {
    "original's positions": replace(VIT, original_pos_embed=True),
    "small stem": SMALL,
    "large stem": replace(SMALL, image_size=96),
    "convnext": ModelConfig("test_convnext"),
    "efficientnet": ModelConfig("test_efficientnet"),
    "xcit": ModelConfig("xcit_nano_12_p16_224", image_size=32),
    "eva02": ModelConfig("eva02_tiny_patch14_224", patch_size=16, image_size=32),
    "registers and pooling": ModelConfig("test_vit3", image_size=32),
}


@pytest.mark.parametrize("name", ARCHS)
def test_files_are_read_back_without_arch(name: str, tmp_path: Path, exported: Callable) -> None:
    config = replace(ARCHS[name], projection_output_dim=16, projection_hidden_dim=8)
    model = build(config)
    for kind, file in FORMATS.items():
        if kind == "timm" and name == "small stem":
            continue  # which timm has not
        network = open_network(exported(model, kind, file))
        assert network.arch == config.arch
        assert network.model.config.original_pos_embed == config.original_pos_embed
        prepared = network.preparation
        assert (prepared.size, prepared.resize) == (32, 40)
        assert (prepared.mean, prepared.std) == (MEAN, STD)
        assert not network.notes  # nothing is guessed
        assert torch.equal(features(network.model.backbone), features(model.backbone))


def test_exported_file_is_evaluated_like_its_run(
    tiny_run: Path, image_folder: Path, tmp_path: Path, script: Callable
) -> None:
    assert script("export", tiny_run, tmp_path / "b.safetensors").returncode == 0
    reports: list[dict] = []
    for source in (tiny_run, tmp_path / "b.safetensors"):
        flags = ("--data", image_folder, "--json-out", tmp_path / "out.json")
        result = script("eval_knn", source, *flags)
        assert result.returncode == 0, result.stderr
        reports.append(json.loads((tmp_path / "out.json").read_text()))
    assert reports[0]["backbone_crc32"] == reports[1]["backbone_crc32"]
    assert reports[0]["rankme"] == reports[1]["rankme"]  # of images prepared alike


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("{", "is damaged: Expecting"),
        ("3", "need sections"),
        ('{"model": {"arch": 3}}', "need arch as"),
        ('{"model": {"arch": "resnet81"}}', "unknown arch 'resnet81'"),
        ('{"model": {"arch": "resnet18", "depth": 3}}', "unknown settings: depth"),
        ('{"crops": {}, "data": {}}', "is damaged"),
        ('{"model": {"arch": "resnet18"}, "crops": {}, "data": {}}', "is damaged"),
    ],
)
def test_damaged_description_is_one_line(said: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_file(build(RESNET).backbone.state_dict(), path, metadata={BACKBONE_CONFIG: said})
    with pytest.raises(ValueError, match=expected) as raised:
        open_network(path)
    assert "\n" not in str(raised.value)


def test_arch_that_is_not_the_files_own_is_an_error(exported: Callable) -> None:
    out = exported(build(RESNET), "backbone", "b.safetensors")
    assert open_network(out, arch="resnet18").arch == "resnet18"
    with pytest.raises(ValueError, match="says that it is resnet18: not with --arch resnet34"):
        open_network(out, arch="resnet34")


class Custom(nn.Linear):
    output_dim = 4


def test_network_of_no_known_architecture_is_exported_and_that_is_said(
    tmp_path: Path, script: Callable
) -> None:
    torch.save({"teacher": {"backbone.stem.weight": torch.ones(2, 3)}}, tmp_path / "a.pth")
    result = script("export", tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert "of no known architecture: to evaluate them, --arch" in result.stdout
    assert list(load_file(tmp_path / "b.safetensors")) == ["stem.weight"]
    result = script("export", tmp_path / "a.pth", tmp_path / "folder", "--format", "timm")
    assert result.returncode == 2 and "is of no known architecture" in result.stderr
    model = DinoModel(Custom(3, 4), DinoProjectionHead(4, 8, 4, 16))
    save_checkpoint(tmp_path / "ckpt.safetensors", model, {})
    result = script("export", tmp_path / "ckpt.safetensors", tmp_path / "b.safetensors")
    assert result.returncode == 0, result.stderr
    assert sorted(load_file(tmp_path / "b.safetensors")) == ["bias", "weight"]


# ---------------------------------------------------------------- timm and torchvision


def test_backbone_loads_strictly_in_timm(tmp_path: Path, script: Callable) -> None:
    model, out = build(VIT), tmp_path / "backbone.safetensors"
    save_checkpoint(tmp_path / "ckpt.safetensors", model, {})
    result = script("export", tmp_path / "ckpt.safetensors", out)
    assert "150 tensors, patch_size 8, image_size 32; vit_tiny_patch16_224" in result.stdout
    sizes = {"patch_size": 8, "img_size": 32}
    net = timm.create_model(VIT.arch, num_classes=0, checkpoint_path=str(out), **sizes).eval()
    assert torch.equal(features(net), features(model.backbone))


def test_backbone_loads_strictly_in_torchvision(exported: Callable) -> None:
    model = build(RESNET)
    net = torchvision.models.resnet18().eval()
    net.fc = nn.Identity()
    net.load_state_dict(load_file(exported(model, "backbone", "b.safetensors")), strict=True)
    assert torch.equal(features(net), features(model.backbone))


def test_small_stem_fits_no_other_and_that_is_said(tmp_path: Path, script: Callable) -> None:
    save_checkpoint(tmp_path / "c.safetensors", build(replace(RESNET, image_size=32)), {})
    result = script("export", tmp_path / "c.safetensors", tmp_path / "b.safetensors")
    assert "3x3 stem for small images does not fit an ImageNet ResNet's 7x7 conv1" in result.stdout
    result = script("export", tmp_path / "c.safetensors", tmp_path / "t", "--format", "timm")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "3x3 stem without max-pool, which timm's ResNets lack" in result.stderr
    assert not (tmp_path / "t").exists()


def test_network_of_timms_own_whose_stem_is_3x3_is_no_resnet_for_small_images() -> None:
    stem = {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    assert not export._has_stem_for_small_images("hrnet_w18_small", stem)
    assert export._has_stem_for_small_images("resnet34", stem)


def test_resnet_of_other_channels_is_read_by_timm(tmp_path: Path, script: Callable) -> None:
    config = replace(RESNET, channels=2)
    model, folder = build(config), tmp_path / "folder"
    crops = {"global_crop_size": 32, "mean": MEAN[:2], "std": STD[:2]}
    data = {"data": "photos", "eval_resize": 40}
    said = {"model": {"channels": 2}, "data": data, "crops": crops}
    save_checkpoint(tmp_path / "ckpt.safetensors", model, {"config": said})
    result = script("export", tmp_path / "ckpt.safetensors", folder, "--format", "timm")
    assert result.returncode == 0, result.stderr
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(net(IMAGES[:, :2]), model.backbone(IMAGES[:, :2]))


FOR_TIMM = {
    "vit": VIT,
    "resnet of torchvision": RESNET,
    "resnet10_half": replace(SMALL, image_size=96),
    "convnext": ModelConfig("test_convnext", projection_output_dim=16),
}


@pytest.mark.parametrize("name", FOR_TIMM)
def test_folder_is_read_by_timm(name: str, exported: Callable) -> None:
    model = build(FOR_TIMM[name])
    folder = exported(model, "timm", "folder")
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(features(net), features(model.backbone))
    data = timm.data.resolve_model_data_config(net)
    assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN, STD)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert data["crop_pct"] == pytest.approx(32 / 40)


@pytest.mark.parametrize("name", FOR_TIMM)
def test_folder_is_read_by_transformers(name: str, exported: Callable) -> None:
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    model = build(FOR_TIMM[name])
    folder = exported(model, "timm", "folder")
    net = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled = net(IMAGES).pooler_output.flatten(1)
    assert torch.equal(pooled, features(model.backbone))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert tuple(processor.data_config["mean"]) == MEAN
    assert processor.data_config["input_size"][-1] == 32


def test_folder_of_timms_own_is_read_with_its_preparation(tmp_path: Path) -> None:
    net = timm.create_model("test_convnext", num_classes=10).eval()
    net.pretrained_cfg = net.pretrained_cfg | {"mean": MEAN, "std": STD}
    timm.models.save_for_hf(net, tmp_path, safe_serialization=True)
    network = open_network(tmp_path)
    assert network.arch == "test_convnext"
    assert (network.preparation.mean, network.preparation.std) == (MEAN, STD)
    net.reset_classifier(0)
    assert torch.equal(features(network.model.backbone), features(net))
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = "red"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json beside .* is damaged"):
        open_network(tmp_path)


def test_folder_that_holds_something_is_left_alone(tmp_path: Path, script: Callable) -> None:
    save_checkpoint(tmp_path / "ckpt.safetensors", build(RESNET), PREPARED)
    result = script("export", tmp_path / "ckpt.safetensors", tmp_path, "--format", "timm")
    assert result.returncode == 2
    assert result.stderr.startswith("error: need a new or empty folder")


def test_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write"), export.whole_folder(tmp_path / "a") as new:
        (new / "half").write_text("")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- ONNX


FOR_ONNX = {
    "vit": ModelConfig("test_vit", image_size=32, original_pos_embed=True),
    "small stem": SMALL,
}


@pytest.mark.parametrize("name", FOR_ONNX)
def test_onnxruntime_computes_the_features_of_any_batch(name: str, exported: Callable) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs pip install {package}")
    import onnxruntime

    model = build(FOR_ONNX[name])
    out = exported(model, "onnx", "a.onnx")
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == ["images"]
    for batch in (1, 3):
        (found,) = session.run(["features"], {"images": IMAGES[:batch].numpy()})
        expected = features(model.backbone)[:batch]
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    said = json.loads(session.get_modelmeta().custom_metadata_map[BACKBONE_CONFIG])
    assert said["crops"] == {"global_crop_size": 32, "mean": list(MEAN), "std": list(STD)}
    other = build(FOR_ONNX[name], 2).backbone
    preparation = Preparation(data=None, size=32, resize=32, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"differ from torch's by .*: nothing was"):
        export.compare_with_onnxruntime(other, out.read_bytes(), preparation)


def test_missing_packages_are_one_line(
    tmp_path: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "ckpt.safetensors", build(RESNET), PREPARED)
    find = importlib.util.find_spec
    hidden = ("onnx", "onnxscript")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )
    flags = (tmp_path / "ckpt.safetensors", tmp_path / "a.onnx", "--format", "onnx")
    result = script("export", *flags)
    assert result.returncode == 2
    assert result.stderr == "error: --format onnx needs packages: pip install onnx onnxscript\n"
    assert not (tmp_path / "a.onnx").exists()


# ---------------------------------------------------------------- facebookresearch/dino


@pytest.mark.parametrize("options", [{}, {"norm_last_layer": False}, {"use_weight_norm": False}])
def test_file_for_the_original_has_its_keys_and_comes_back(
    options: dict, tmp_path: Path, exported: Callable
) -> None:
    model = build(replace(VIT, **options))
    out = exported(model, "original", "dino.pth")
    teacher = torch.load(out, weights_only=True)["teacher"]
    keys = [f"backbone.{key}" for key in ORIGINAL_BACKBONE]
    for index in range(1, 12):
        keys += [f"backbone.{key.replace('0', str(index), 1)}" for key in BLOCK]
    assert sorted(teacher) == sorted([*keys, *(f"head.{key}" for key in ORIGINAL_HEAD)])
    # a plain layer is one whose learned gain undoes the normalisation
    loaded = build(replace(VIT, norm_last_layer=not options), 2)
    load_weights(loaded, out)
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.safetensors", "dino.pth"]


def test_student_of_a_full_checkpoint_is_exported(tmp_path: Path, script: Callable) -> None:
    learned = replace(SMALL, norm_last_layer=False)
    student = as_original(build(learned, 2), "module.backbone.", "module.head.")
    full, out = tmp_path / "full.pth", tmp_path / "student.pth"
    torch.save({"student": student, "teacher": as_original(build(SMALL))}, full)
    result = script("export", full, out, "--format", "original", "--network", "student")
    assert result.returncode == 0, result.stderr
    assert set(torch.load(out, weights_only=True)) == {"student", BACKBONE_CONFIG}
    loaded = build(learned)
    load_weights(loaded, out, "student")
    assert same_state(loaded, build(learned, 2))


# ---------------------------------------------------------------- wrong places


def test_wrong_places_are_refused(tmp_path: Path, script: Callable) -> None:
    source = tmp_path / "ckpt.safetensors"
    save_checkpoint(source, build(SMALL), {})
    before = source.read_bytes()
    (tmp_path / "folder.safetensors").mkdir()
    for out, said in (
        (source, f"need another file than {source}, which a run saved or the weights are from"),
        (tmp_path / "a.pth", f"need a file that ends in .safetensors, got {tmp_path}/a.pth"),
        (tmp_path / "none" / "a.safetensors", f"no such folder for the weights: {tmp_path}/none"),
        (tmp_path / "folder.safetensors", "need a file that ends in .safetensors, got"),
    ):
        result = script("export", source, out)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1
    assert source.read_bytes() == before
    source = tmp_path / "ckpt-epoch-2.safetensors"
    source.write_bytes(before)
    (tmp_path / "config.yaml").touch()
    for out in (tmp_path / "ckpt.safetensors", source):  # of one run
        result = script("export", tmp_path, out)
        assert result.returncode == 2
        assert f"need another file than {out}, which a run saved" in result.stderr
        assert out.read_bytes() == before
    assert script("export", tmp_path / "b.pth", tmp_path / "a.safetensors").stderr == (
        f"error: no such checkpoint: {tmp_path / 'b.pth'}\n"
    )


def test_metadata_is_neither_a_checkpoints_nor_a_runs_state(exported: Callable) -> None:
    with safe_open(exported(build(RESNET), "backbone", "b.safetensors"), "pt") as file:
        assert not {"model_config", "metadata"} & file.metadata().keys()
