import copy
import dataclasses
import errno
import json
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import models
from models import (
    DinoModel,
    DinoProjectionHead,
    ModelConfig,
    PrototypeLayer,
    get_backbone,
    load_checkpoint,
    save_checkpoint,
    save_tensors,
    update_teacher_EMA,
)

PARAMETERS_AND_DIMS = {
    "resnet18": (11_176_512, 512),
    "resnet34": (21_284_672, 512),
    "resnet50": (23_508_032, 2048),
    "resnet101": (42_500_160, 2048),
    "resnet152": (58_143_808, 2048),
    "dino_vits8": (21_670_272, 384),
    "dino_vits16": (21_665_664, 384),
    "dino_vitb8": (85_807_872, 768),
    "dino_vitb16": (85_798_656, 768),
}
TINY = ModelConfig(
    arch="resnet10_half",
    image_size=32,
    projection_hidden_dim=16,
    projection_bottleneck_dim=8,
    projection_output_dim=12,
)


@pytest.mark.parametrize("arch", PARAMETERS_AND_DIMS)
def test_published_number_of_parameters_and_dimension(arch: str) -> None:
    parameters, dim = PARAMETERS_AND_DIMS[arch]
    with torch.device("meta"):
        backbone = get_backbone(arch)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone.output_dim == dim


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("resnet18", (64, 32)),
        ("resnet50", (64, 48)),
        ("dino_vits16", (64, 32)),
        ("efficientnet_b0", (64, 33)),
        ("convnext_atto", (64, 32)),
        ("vit_tiny_patch16_224", (64, 32)),
        ("mobilenetv3_small_050", (64, 32)),
    ],
)
def test_backbone_maps_any_size_to_its_output_dim(arch: str, sizes: tuple[int, int]) -> None:
    backbone = get_backbone(arch).eval()
    for size in sizes:
        assert backbone(torch.randn(2, 3, size, size)).shape == (2, backbone.output_dim)


def test_vit_takes_another_patch_size_and_image_size() -> None:
    backbone = get_backbone("dino_vits16", patch_size=4, image_size=32)
    assert backbone.patch_size == 4
    assert backbone.pos_embed.shape == (1, 1 + 8 * 8, 384)
    assert backbone(torch.randn(2, 3, 16, 16)).shape == (2, 384)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["beit_base_patch16_224", "convit_tiny", "levit_128s"])
def test_network_of_one_size_is_built_for_that_of_its_images(arch: str) -> None:
    with torch.device("meta"):
        backbone = get_backbone(arch, image_size=64)
        assert backbone(torch.empty(2, 3, 64, 64)).shape == (2, backbone.output_dim)
        with pytest.raises((AssertionError, RuntimeError)):
            backbone(torch.empty(2, 3, 224, 224))


@pytest.mark.parametrize("arch", ["convit_tiny", "coat_tiny", "lcnet_035"])
def test_networks_of_other_families_train_and_are_rebuilt(arch: str, tmp_path: Path) -> None:
    """Some are made for one size, CoaT has weights that several of its layers share."""
    config = dataclasses.replace(TINY, arch=arch)
    student, teacher = DinoModel.from_config(config), DinoModel.from_config(config)
    images = torch.randn(2, 3, 32, 32)
    student([images, images]).square().mean().backward()
    gradients = [parameter.grad for parameter in student.backbone.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    update_teacher_EMA(student, teacher, 0.5)
    save_checkpoint(tmp_path / "c.safetensors", teacher, {})
    rebuilt, _ = load_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(rebuilt.backbone(images), teacher.eval().backbone(images))


@pytest.mark.parametrize(("image_size", "last_side"), [(32, 4), (48, 3), (64, 4), (224, 7)])
def test_small_images_are_not_reduced_to_a_point(image_size: int, last_side: int) -> None:
    backbone = get_backbone("resnet18", image_size=image_size)
    seen = []
    backbone.layer4.register_forward_hook(lambda *args: seen.append(args[2].shape[-1]))
    backbone(torch.randn(2, 3, image_size, image_size))
    assert seen == [last_side]


@pytest.mark.parametrize("name", ["resnet18", "resnet10_half"])
def test_random_kernels_of_many_bands_are_all_different(name: str) -> None:
    first = next(m for m in get_backbone(name, channels=13).modules() if isinstance(m, nn.Conv2d))
    kernels = first.weight.detach().transpose(0, 1).flatten(1)
    assert len(kernels) == 13 and torch.pdist(kernels).min() > 0.1 * kernels[0].norm()


def test_unknown_arch_names_close_matches() -> None:
    with pytest.raises(ValueError, match="unknown arch 'vit_small'") as raised:
        get_backbone("vit_small")
    names = str(raised.value).split("matches: ")[1].split(", ")
    assert {"dino_vits16", "vit_small_patch16_224"} <= set(names) and len(names) == len(set(names))
    with pytest.raises(ValueError, match=r"unknown arch 'resnet51'; close matches: .*resnet50"):
        get_backbone("resnet51")
    with pytest.raises(ValueError, match="dino_vits16"):
        get_backbone("dino_vits17")
    with pytest.raises(ValueError, match=r"matches: .*vit_small_patch16_224\.dino(,|$)"):
        get_backbone("vit_small_patch16_224.dinno")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet18", "drop_path_rate": 0.1}, "resnet18 has neither drop path nor patches"),
        ({"name": "resnet18", "patch_size": 8}, "got patch_size=8"),
        ({"name": "efficientnet_b0", "patch_size": 8}, "efficientnet_b0 has no such option"),
        ({"name": "vgg11", "drop_path_rate": 0.1}, "vgg11 has no such option"),
        ({"name": "resnet18", "pretrained": True, "image_size": 32}, "no published weights"),
    ],
)
def test_option_that_a_model_lacks_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_backbone(**options)


def test_pretrained_without_network_is_an_error_never_random_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OSError, match="cannot load the published weights of resnet18"):
        get_backbone("resnet18", pretrained=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="cannot load the published weights of dino_vits16"):
        get_backbone("dino_vits16", pretrained=True)


# ---------------------------------------------------------------- head


@pytest.mark.parametrize("variant", ["default", "gain", "bn"])
def test_head_equals_the_original(variant: str, parity: dict) -> None:
    prefix = f"head.{variant}.state."
    names = {"last_layer.weight_v": "last_layer.weight", "last_layer.weight_g": "last_layer.gain"}
    state = {
        names.get(key.removeprefix(prefix), key.removeprefix(prefix)): value
        for key, value in parity.items()
        if key.startswith(prefix)
    }
    if variant != "gain":
        assert (state.pop("last_layer.gain") == 1).all()
    head = DinoProjectionHead(
        24, 16, 8, 40, norm_last_layer=variant != "gain", use_bn=variant == "bn"
    )
    head.load_state_dict(state)
    logits = head(parity[f"head.{variant}.input"])
    torch.testing.assert_close(logits, parity[f"head.{variant}.output"], rtol=1e-5, atol=1e-5)


def test_logits_are_cosines_when_the_gain_is_fixed() -> None:
    head = DinoProjectionHead(20, 16, 8, 50)
    assert head(100 * torch.randn(64, 20)).abs().max() <= 1 + 1e-6
    assert "last_layer.gain" not in head.state_dict()
    assert DinoProjectionHead(20, 16, 8, 50, norm_last_layer=False).last_layer.gain.requires_grad


def test_plain_last_layer_is_not_normalised() -> None:
    head = DinoProjectionHead(20, 16, 8, 50, use_weight_norm=False)
    assert isinstance(head.last_layer, nn.Linear)
    with torch.no_grad():
        before = head(torch.ones(2, 20))
        head.last_layer.weight *= 3
        torch.testing.assert_close(head(torch.ones(2, 20)), 3 * before)


def test_model_can_be_deep_copied_and_pickled_after_a_step() -> None:
    model = DinoModel.from_config(TINY)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for mine, other in zip(
            model.state_dict().values(), clone.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(mine, other)


# ---------------------------------------------------------------- model


def test_from_config_takes_a_config_or_what_holds_one() -> None:
    holders = TINY, SimpleNamespace(model=TINY), SimpleNamespace(model_config=TINY)
    for config in holders:
        model = DinoModel.from_config(config)
        assert model.config == TINY
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 12)


def test_custom_backbone() -> None:
    class EfficientNet(nn.Module):
        output_dim = 1280

        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("efficientnet_b0", num_classes=0)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images)

    model = DinoModel(EfficientNet(), DinoProjectionHead(1280, output_dim=30))
    assert model([torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)]).shape == (2, 2, 30)


def test_crops_of_one_size_share_a_backbone_call_and_keep_their_order() -> None:
    model = DinoModel.from_config(TINY).eval()
    crops = [torch.randn(2, 3, size, size) for size in (32, 16, 32, 16, 24)]
    with torch.no_grad():
        alone = torch.stack([model(crop) for crop in crops])
        calls = []
        model.backbone.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
        features, projections = model(crops, return_backbone_features=True)
    assert calls == [4, 4, 2]
    assert features.shape == (5, 2, 256)
    torch.testing.assert_close(projections, alone)


@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("dim, num_prototypes", [(8, 50), (64, 65536)])
def test_prototype_layer_equals_cosine_similarities_with_their_gradients(
    num_rows: int, dim: int, num_prototypes: int
) -> None:
    layer = PrototypeLayer(dim, num_prototypes, learn_gain=True)
    rows = torch.randn(num_rows, dim, requires_grad=True)
    direction = torch.randn(num_rows, num_prototypes)
    inputs = [rows, layer.weight, layer.gain]
    rows64, weight, gain = (tensor.detach().double().requires_grad_() for tensor in inputs)
    wanted = rows64 @ (gain * weight / weight.norm(dim=1, keepdim=True)).T
    wanted_grads = torch.autograd.grad((wanted * direction).sum(), [rows64, weight, gain])
    logits = layer(rows)
    grads = torch.autograd.grad((logits * direction).sum(), inputs)
    for mine, other in zip([logits, *grads], [wanted, *wanted_grads], strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-5 * scale)


def test_no_crops_is_an_error() -> None:
    with pytest.raises(ValueError, match="need >= 1 crop"):
        DinoModel.from_config(TINY)([])


def test_drop_path_default_is_the_papers_for_dino_vits_only() -> None:
    vit = DinoModel.from_config(ModelConfig("dino_vits16", image_size=32))
    assert vit.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    teacher = DinoModel.from_config(ModelConfig("dino_vits16", image_size=32, drop_path_rate=0.0))
    assert isinstance(teacher.backbone.blocks[-1].drop_path1, nn.Identity)
    teacher.load_state_dict(vit.state_dict())


# ---------------------------------------------------------------- EMA


def test_ema_equals_its_formula_and_leaves_buffers_alone() -> None:
    student, teacher = DinoModel.from_config(TINY), DinoModel.from_config(TINY)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    before = copy.deepcopy(teacher.state_dict())
    update_teacher_EMA(student, teacher, momentum=0.996)
    params = dict(student.named_parameters())
    for name, value in teacher.state_dict().items():
        expected = 0.996 * before[name] + 0.004 * params[name] if name in params else before[name]
        torch.testing.assert_close(value, expected)
    assert not torch.equal(
        before["projection_head.mlp.0.weight"], params["projection_head.mlp.0.weight"]
    )


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_rebuilds_the_model_from_its_path_alone(tmp_path: Path) -> None:
    model = DinoModel.from_config(TINY)
    model(torch.randn(4, 3, 32, 32))  # moves the BatchNorm statistics
    metadata = {"step": 3, "config": {"crops": {"mean": [0.5, 0.5, 0.5]}}}
    save_checkpoint(tmp_path / "ckpt.safetensors", model, metadata)
    loaded, read = load_checkpoint(tmp_path / "ckpt.safetensors")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model.eval()(images), rtol=0, atol=0)
    assert read == metadata
    assert loaded.config == TINY
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.safetensors"]


def test_broken_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.safetensors"
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, DinoModel.from_config(TINY), {})
    whole = path.read_bytes()
    cases = {
        "truncated or not a safetensors": [whole[: len(whole) // 2], whole[:4], b"", b"some text"],
        "is a pickle": [pickle.dumps({"a": 1})],
    }
    torch.save({"model": torch.zeros(2)}, tmp_path / "zip.pth")
    cases["is a pickle"].append((tmp_path / "zip.pth").read_bytes())
    for message, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(ValueError, match=message) as caught:
                load_checkpoint(path)
            assert "\n" not in str(caught.value)
    save_tensors(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="lacks the metadata"):
        load_checkpoint(path)


@pytest.mark.slow
def test_no_length_of_the_metadata_looks_like_a_pickle(tmp_path: Path) -> None:
    model, path = DinoModel(nn.Identity(), nn.Identity()), tmp_path / "c.safetensors"
    model.config = TINY
    for length in range(0, 300, 4):
        save_checkpoint(path, model, {"note": "y" * length})
        with pytest.raises(ValueError, match="cannot rebuild"):  # read, and found to be empty
            load_checkpoint(path)


def test_checkpoint_of_another_version_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    for config in ('{"arch": "resnet18", "new_option": 1}', "{", '{"arch": "resnet18"}'):
        save_tensors(path, {"a": torch.ones(1)}, {"model_config": config, "metadata": "{}"})
        with pytest.raises(
            ValueError, match=r"cannot rebuild the model of .*c\.safetensors"
        ) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple:
        return (open, ("exploded", "w"))


def test_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 5):
        Path("ckpt.safetensors").write_bytes(pickle.dumps(Bomb(), protocol))
        with pytest.raises(ValueError, match=r"ckpt\.safetensors is"):
            load_checkpoint("ckpt.safetensors")
    assert not Path("exploded").exists()


def test_custom_backbone_is_saved_and_says_how_to_load_it(tmp_path: Path) -> None:
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    save_checkpoint(tmp_path / "c.safetensors", DinoModel(backbone, DinoProjectionHead(3)), {})
    with pytest.raises(ValueError, match="custom backbone"):
        load_checkpoint(tmp_path / "c.safetensors")


def test_failed_save_keeps_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(Exception, match="metadata"):
        save_tensors(path, {"a": torch.zeros(2)}, {"step": 3})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.safetensors"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_saved_files_have_the_permissions_of_the_umask(
    umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode


def test_file_system_that_does_not_sync_folders_ends_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


def test_metadata_is_plain_json_in_the_header(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.safetensors", DinoModel.from_config(TINY), {"step": 7})
    raw = (tmp_path / "c.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["metadata"]) == {"step": 7}
    assert json.loads(header["__metadata__"]["model_config"]) == dataclasses.asdict(TINY)
    assert {key.split(".")[0] for key in header} == {"__metadata__", "backbone", "projection_head"}


# ---------------------------------------------------------------- channels


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("name", ["resnet18", "resnet10_half", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("image_size", [32, 96])
def test_backbone_takes_any_number_of_channels(name: str, channels: int, image_size: int) -> None:
    backbone = get_backbone(name, channels=channels, image_size=image_size).eval()
    features = backbone(torch.rand(2, channels, image_size, image_size))
    assert features.shape == (2, backbone.output_dim)


def test_grey_stem_sees_in_grey_what_the_rgb_stem_saw_in_three_equal_channels() -> None:
    """Published weights are summed for one channel, as timm does."""
    rgb = get_backbone("resnet18").eval()
    grey = copy.deepcopy(rgb)
    models._change_stem(grey, 1, pretrained=True)
    images = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(
        grey(images), rgb(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4
    )
    models._change_stem(rgb, 6, pretrained=True)
    assert rgb.conv1.weight.shape == (64, 6, 7, 7)
