import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from harness import opened_network
from harness.opened_network import open_network
from harness.weights import load_weights, read_weights
from models import (
    DinoModel,
    ModelConfig,
    get_backbone,
    interpolate_as_original,
    save_checkpoint,
    save_tensors,
)

pytestmark = pytest.mark.slow  # seconds as a whole

HEAD = {
    "projection_hidden_dim": 16,
    "projection_bottleneck_dim": 8,
    "projection_output_dim": 12,
}
VIT = ModelConfig("vit_tiny_patch16_224", patch_size=8, image_size=32, **HEAD)
RESNET = ModelConfig("resnet18", **HEAD)
SMALL = ModelConfig("resnet10_half", image_size=32, **HEAD)


def build(config: ModelConfig, seed: int = 1) -> DinoModel:
    """A model whose every tensor is random, in eval mode."""
    torch.manual_seed(seed)
    model = DinoModel.from_config(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("gain"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(0.02 * torch.rand_like(tensor))
    return model


def as_original(model: DinoModel, backbone: str = "backbone.", head: str = "head.") -> dict:
    """What the original's state dict of such a network is, with weight_norm's first spelling."""
    state = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("backbone.", backbone).replace("projection_head.", head)
        state[key.replace("last_layer.weight", "last_layer.weight_v")] = tensor.clone()
    gain = state.pop(f"{head}last_layer.gain", torch.ones(12, 1))
    return state | {f"{head}last_layer.weight_g": gain}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A full checkpoint as the original writes it, of a student with a learned gain."""
    rate = np.linspace(0, 0.1, 3)[1]  # the original's schedules leave numpy's numbers
    content = {
        "student": as_original(
            build(replace(SMALL, norm_last_layer=False), 2), "module.backbone.", "module.head."
        ),
        "teacher": as_original(build(SMALL)),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": rate}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="resnet10_half", lr=0.1, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 12)},
        "fp16_scaler": None,
    }
    torch.save(content, tmp_path / "full.pth")
    return tmp_path / "full.pth"


# ---------------------------------------------------------------- from elsewhere


def test_full_checkpoint_of_the_original_gives_teacher_and_student(full: Path) -> None:
    teacher, student = build(SMALL, 3), build(replace(SMALL, norm_last_layer=False), 3)
    lines = load_weights(teacher, full)
    assert same_state(teacher, build(SMALL))
    assert lines[1] == f"projection head: from {full}, 7 tensors"
    load_weights(student, full, "student")
    assert same_state(student, build(replace(SMALL, norm_last_layer=False), 2))


def test_a_learned_gain_is_not_dropped(full: Path) -> None:
    fixed = build(SMALL)
    with pytest.raises(ValueError, match="has a learned gain in its head: need --no-norm-last"):
        load_weights(fixed, full, "student")
    assert same_state(fixed, build(SMALL))
    learned = build(replace(SMALL, norm_last_layer=False))
    load_weights(learned, full)  # whose gain is 1
    assert (learned.projection_head.last_layer.gain == 1).all()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(learned(images), build(SMALL)(images))


def test_an_ema_of_ones_is_a_fixed_gain(tmp_path: Path) -> None:
    state = as_original(build(SMALL))
    state["head.last_layer.weight_g"] += 5e-7
    torch.save({"teacher": state}, tmp_path / "a.pth")
    load_weights(build(SMALL, 2), tmp_path / "a.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_backbone_alone_leaves_the_head_as_it_is(prefix: str, tmp_path: Path) -> None:
    source, model, other = build(SMALL), build(SMALL, 2), build(SMALL, 2)
    state = {f"{prefix}{key}": x for key, x in source.backbone.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    lines = load_weights(model, tmp_path / "a.pth")
    assert lines[-1].startswith("projection head: as initialised")
    assert same_state(model.backbone, source.backbone)
    assert same_state(model.projection_head, other.projection_head)


def test_parametrised_weight_norm_is_read(tmp_path: Path) -> None:
    model = build(SMALL)
    state = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor
        for key, tensor in as_original(model).items()
    }
    torch.save(state, tmp_path / "a.pth")
    loaded = build(SMALL, 2)
    load_weights(loaded, tmp_path / "a.pth")
    assert same_state(loaded, model)


def test_own_checkpoint_and_state_are_sources(tmp_path: Path) -> None:
    teacher, student = build(SMALL, 2), build(SMALL, 3)
    save_checkpoint(tmp_path / "ckpt.safetensors", teacher, {})
    loaded = build(SMALL)
    load_weights(loaded, tmp_path / "ckpt.safetensors")
    assert same_state(loaded, teacher)
    with pytest.raises(ValueError, match=r"teacher alone: need the run's state\.safetensors"):
        load_weights(loaded, tmp_path / "ckpt.safetensors", "student")
    both = {"student": student, "teacher": teacher}
    state = {f"{name}.{key}": x for name in both for key, x in both[name].state_dict().items()}
    save_tensors(tmp_path / "state.safetensors", state | {"center": torch.zeros(1, 12)}, {})
    load_weights(loaded, tmp_path / "state.safetensors", "student")
    assert same_state(loaded, student)


def test_head_without_weight_norm_is_another_head(tmp_path: Path) -> None:
    plain = replace(SMALL, use_weight_norm=False)
    save_checkpoint(tmp_path / "ckpt.safetensors", build(plain), {})
    load_weights(build(plain, 2), tmp_path / "ckpt.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: projection_head\.last_layer\.gain"):
        load_weights(build(replace(SMALL, norm_last_layer=False)), tmp_path / "ckpt.safetensors")


def test_classifier_of_a_supervised_network_is_left_out_and_said(tmp_path: Path) -> None:
    net, model = torchvision.models.resnet18(), build(RESNET)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    lines = load_weights(model, tmp_path / "resnet18.pth")
    assert lines[1] == "classifier: left out (fc.weight, fc.bias)"
    assert torch.equal(model.backbone.layer4[1].conv2.weight, net.layer4[1].conv2.weight)


def test_keys_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = build(SMALL, 2)
    state = as_original(build(SMALL))
    del state["backbone.bn1.weight"], state["head.mlp.0.bias"]
    state |= {"backbone.bn1.scale": torch.ones(1), "head.mlp.2.weight": torch.ones(2, 3)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(model, tmp_path / "a.pth")
    assert str(caught.value).endswith(
        "2 missing: backbone.bn1.weight, projection_head.mlp.0.bias; "
        "1 unexpected: backbone.bn1.scale; "
        "1 of another shape: projection_head.mlp.2.weight (2, 3) for (16, 16)"
    )
    assert same_state(model, build(SMALL, 2))
    said = r"^\S+ holds another network than --arch resnet18: 12 of 120 tensors fit$"
    with pytest.raises(ValueError, match=said):
        load_weights(build(RESNET), tmp_path / "a.pth")
    state = as_original(build(SMALL))
    for key in [key for key in state if key.startswith("backbone.layer1.0")][:5]:
        del state[key]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"5 missing: \S+, \S+, \S+ and 2 more$"):
        load_weights(model, tmp_path / "a.pth")
    torch.save({"backbone.a": torch.ones(1), "neck.b": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"keys of neither backbone nor head: neck\.b"):
        load_weights(model, tmp_path / "a.pth")


def test_a_small_stem_does_not_fit_the_large_one(tmp_path: Path) -> None:
    torch.save(get_backbone("resnet18").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"1 of another shape: backbone\.conv1\.weight"):
        load_weights(build(replace(RESNET, image_size=32)), tmp_path / "a.pth")


def test_head_of_another_size_names_the_way_around_it(tmp_path: Path, script: Callable) -> None:
    source, backbone = tmp_path / "ckpt.safetensors", tmp_path / "backbone.safetensors"
    save_checkpoint(source, build(SMALL), {})
    wide = build(replace(SMALL, projection_output_dim=20), 2)
    with pytest.raises(ValueError, match=f"alone: python export.py {source} backbone"):
        load_weights(wide, source)
    assert script("export", source, backbone).returncode == 0
    load_weights(wide, backbone)
    assert same_state(wide.backbone, build(SMALL).backbone)


class Bomb:
    def __reduce__(self) -> tuple:
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_other_classes_in_a_pickle_are_refused_in_one_line(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"teacher": as_original(build(SMALL)), "args": Bomb()}
    torch.save(content, "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"a\.pth is no file of plain weights: it holds io\.open"):
        read_weights("a.pth")
    result = script("export", "a.pth", "b.safetensors")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert not Path("exploded").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # nor elsewhere, later


def test_files_that_are_no_weights_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    cases = {
        "holds a list": [torch.ones(1)],
        "need tensors alone, it holds model, epoch": {"model": {}, "epoch": 1},
        "it holds nothing": {},
        "holds no teacher, but student": {"student": {"a": torch.ones(1)}},
    }
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read_weights(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:3], b"", b"some text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no file of plain weights") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


def test_a_name_without_network_or_meaning_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    empty = DinoModel(nn.Identity(), nn.Identity())
    for call in (partial(load_weights, empty), open_network):
        with pytest.raises(OSError, match="cannot load the published weights of resnet18") as error:
            call("resnet18")
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="unknown arch 'resnet81'; close matches: resnet"):
            call("resnet81")
        for name in ("a.pth", "runs/vits16"):
            with pytest.raises(FileNotFoundError, match=f"no such checkpoint: {name}"):
                call(name)
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no checkpoint in the folder"):
            call(str(tmp_path / "folder"))


# ---------------------------------------------------------------- position embeddings


def test_position_embeddings_equal_the_originals(parity: dict[str, Tensor]) -> None:
    vit = get_backbone(VIT.arch, patch_size=8, image_size=32, original_pos_embed=True)
    vit.pos_embed = nn.Parameter(parity["positions.embed"])
    vit.cls_token = nn.Parameter(torch.zeros(1, 1, 6))
    timms = {}
    sizes = [key.removeprefix("positions.") for key in parity if key.startswith("positions.")]
    for size in set(sizes) - {"embed"}:
        height, width = map(int, size.split("x"))
        recorded = parity[f"positions.{size}"]
        torch.testing.assert_close(
            interpolate_as_original(parity["positions.embed"], height, width), recorded
        )
        patches = torch.zeros(1, height, width, 6)
        torch.testing.assert_close(vit._pos_embed(patches), recorded)
        timms[size] = timm.models.vision_transformer.VisionTransformer._pos_embed(vit, patches)
    differ = [
        x for x, other in timms.items() if not torch.allclose(other, parity[f"positions.{x}"])
    ]
    assert sorted(differ) == ["2x2", "2x8", "3x5", "6x6"]


def test_position_option_changes_other_sizes_alone() -> None:
    model, original = build(VIT), build(replace(VIT, original_pos_embed=True))
    assert same_state(model, original)
    for size, agrees in {(32, 32): True, (16, 16): False, (24, 40): False}.items():
        images = torch.randn(1, 3, *size)
        assert torch.allclose(model(images), original(images)) == agrees


@pytest.mark.parametrize("arch", ["resnet18", "vit_base_patch16_siglip_224"])
def test_position_option_needs_the_originals_positions(arch: str) -> None:
    with pytest.raises(ValueError, match=f"{arch} has no position embeddings of the original's"):
        get_backbone(arch, original_pos_embed=True)


def test_position_embeddings_of_another_image_size_are_resampled(tmp_path: Path) -> None:
    source, model = build(VIT), build(replace(VIT, image_size=48), 2)
    torch.save(source.backbone.state_dict(), tmp_path / "a.pth")
    lines = load_weights(model, tmp_path / "a.pth")
    assert lines[1] == "position embeddings: resampled from 16 patches to (6, 6)"
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(model.backbone(images), source.backbone(images))


# ---------------------------------------------------------------- to evaluate


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig("dino_vits16", patch_size=16, image_size=224, original_pos_embed=True),
        ModelConfig("dino_vits8", patch_size=8, image_size=96, original_pos_embed=True),
        ModelConfig("vit_tiny_patch16_224", patch_size=8, image_size=32),
        ModelConfig("resnet34"),
        ModelConfig("resnet50"),
    ],
)
def test_architecture_follows_from_the_weights(config: ModelConfig, tmp_path: Path) -> None:
    sizes = {"patch_size": config.patch_size, "image_size": config.image_size}
    backbone = get_backbone(config.arch, **sizes)
    torch.save(
        {"teacher": {f"backbone.{k}": x for k, x in backbone.state_dict().items()}},
        tmp_path / "a.pth",
    )
    network = open_network(tmp_path / "a.pth")
    assert network.model.config == config
    assert not network.model.training
    assert same_state(network.model.backbone, backbone)
    assert network.arch == config.arch
    size = config.image_size or 224
    assert network.crops.global_crop_size == network.preparation.size == size
    assert network.preparation.data is None
    assert network.preparation.resize == (256 if size == 224 else size)


def test_unknown_architecture_names_what_it_found(tmp_path: Path) -> None:
    torch.save({"stem.weight": torch.ones(2, 3)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"known architecture: need .*, got stem\.weight \(2, 3\)"):
        open_network(tmp_path / "a.pth")


def test_own_checkpoint_opens_with_its_metadata(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ckpt.safetensors", build(SMALL), {"step": 3})
    network = open_network(tmp_path / "ckpt.safetensors")
    assert same_state(network.model, build(SMALL))
    assert network.metadata == {"step": 3}
    assert network.preparation is None


def test_published_names_say_how_images_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    build_net = get_backbone
    monkeypatch.setattr(opened_network, "get_backbone", lambda name, *_, **__: build_net(name))
    expected = {
        "dino_vits16": (224, 256, 0.485),  # the paper's, where timm says 248
        "resnet18": (224, 256, 0.485),
        "vit_tiny_patch16_224": (224, 248, 0.5),
    }
    for name, facts in expected.items():
        network = open_network(name)
        preparation = network.preparation
        assert (preparation.size, preparation.resize, preparation.mean[0]) == facts
        assert network.crops.global_crop_size == preparation.size
        assert network.crops.mean == preparation.mean
        assert network.model.config.pretrained


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("pos_embed", torch.tensor(1.0), "is of no known architecture"),
        ("patch_embed.proj.weight", torch.ones(3), "is of no known architecture"),
        ("cls_token", torch.ones(1, 1, 192, dtype=torch.int8), "got cls_token of int8"),
        ("blocks.0.norm1.weight", torch.tensor(1.0), "is of no known architecture"),
    ],
)
def test_tensors_of_odd_kinds_are_one_line(
    key: str, value: Tensor, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    torch.save(build(VIT).backbone.state_dict() | {key: value}, path)
    for use in (open_network, partial(load_weights, build(VIT))):
        with pytest.raises(ValueError) as raised:
            use(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=said):
        open_network(path)


@pytest.mark.parametrize("value", [1e38, float("inf"), float("nan")])
def test_absurd_weights_are_named_on_opening(value: float, tmp_path: Path) -> None:
    path, model = tmp_path / "ckpt.safetensors", build(SMALL)
    with torch.no_grad():
        model.backbone.conv1.weight[0, 0, 0, 0] = value
    save_checkpoint(path, model, {})
    with pytest.raises(ValueError, match=r"is damaged: backbone.conv1.weight holds"):
        open_network(path)


@pytest.mark.parametrize("arch", ["resnet10_half", "vit_tiny_patch16_224"])
def test_rgb_weights_are_fitted_to_other_channels_and_that_is_said(
    arch: str, tmp_path: Path
) -> None:
    config = ModelConfig(arch, image_size=32, projection_output_dim=8)
    rgb = DinoModel.from_config(config).eval()
    save_checkpoint(tmp_path / "ckpt.safetensors", rgb, {})
    grey = DinoModel.from_config(replace(config, channels=1)).eval()
    lines = load_weights(grey, tmp_path / "ckpt.safetensors")
    assert "stem: the weights of its 3 channels are summed for 1" in lines
    images = torch.rand(2, 1, 32, 32)
    expected = rgb(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey(images), expected, rtol=1e-4, atol=1e-4)
    many = DinoModel.from_config(replace(config, channels=6))
    lines = load_weights(many, tmp_path / "ckpt.safetensors")
    assert "stem: the weights of its 3 channels are repeated and rescaled for 6" in lines
