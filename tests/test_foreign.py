"""Files with the layouts of other projects, by the names of keys that their code has.

Each is made from the tensors of a network of timm's or torchvision's, which is the oracle.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from harness.foreign import by_timms_names, counted, find_network, open_containers
from harness.opened_network import open_network
from harness.weights import VITS, Weights, load_weights, recognise
from models import DinoModel, ModelConfig, get_backbone

pytestmark = pytest.mark.slow  # seconds as a whole

State = dict[str, Tensor]


def randomised(net: nn.Module, seed: int = 1) -> nn.Module:
    """A network whose every tensor is random, in eval mode."""
    torch.manual_seed(seed)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.02 * torch.rand_like(tensor))
    return net.eval()


def tiny_vit(seed: int = 1, **options: object) -> nn.Module:
    return randomised(timm.create_model("test_vit", num_classes=0, img_size=32, **options), seed)


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def mlp(*names: str) -> State:
    return {f"{name}.weight": torch.ones(2, 2) for name in names}


HEAD = mlp("mlp.0", "mlp.2") | {
    "last_layer.weight_g": torch.ones(4, 1),
    "last_layer.weight_v": torch.ones(4, 2),
}


# ---------------------------------------------------------------- layouts of ViTs


def mae(net: State, other: State) -> dict:
    decoder = mlp("decoder_embed", "decoder_blocks.0.attn.qkv", "decoder_norm", "decoder_pred")
    decoder |= {"mask_token": torch.ones(1, 1, 9), "decoder_pos_embed": torch.ones(1, 5, 9)}
    return {"model": net | decoder, "epoch": 3, "args": argparse.Namespace(model="mae")}


def deit(net: State, other: State) -> dict:
    return {"model": net | mlp("head") | {"head.bias": torch.ones(2)}}


def ibot(net: State, other: State) -> dict:
    head = prefixed("head.", HEAD | {"last_layer2.weight_g": torch.ones(3, 1)})
    of_teacher = prefixed("backbone.", net) | {"backbone.masked_embed": torch.ones(1, 64)} | head
    of_student = prefixed("module.backbone.", other) | prefixed("module.", head)
    return {"student": of_student, "teacher": of_teacher, "ibot_loss": {"center": torch.ones(1)}}


def ibots_teacher(net: State, other: State) -> dict:
    return {"state_dict": net | {"masked_embed": torch.ones(1, 64)}}


def dinov2s_training(net: State, other: State) -> dict:
    """Blocks in chunks, whose second number goes on."""
    chunked = {key.replace("blocks.", "blocks.0.").replace("blocks.0.3", "blocks.1.3"): x
               for key, x in net.items()}  # fmt: skip
    heads = prefixed("dino_head.", HEAD) | prefixed("ibot_head.", HEAD)
    return {"teacher": prefixed("backbone.", chunked | {"mask_token": torch.ones(1, 64)}) | heads}


def moco_v3(net: State, other: State) -> dict:
    state = prefixed("module.base_encoder.", other | mlp("head.0", "head.3"))
    state |= prefixed("module.momentum_encoder.", net | mlp("head.0", "head.3"))
    return {"arch": "vit_small", "state_dict": state | prefixed("module.predictor.", mlp("0"))}


def timms_training(net: State, other: State) -> dict:
    compiled = prefixed("_orig_mod.", other | mlp("head"))
    return {"arch": "test_vit", "state_dict": compiled, "state_dict_ema": net | mlp("head")}


def lightning(net: State, other: State) -> dict:
    state = prefixed("model.backbone.", net) | prefixed("model.projector.", mlp("0", "2"))
    return {"state_dict": state, "hyper_parameters": {"lr": 0.1}, "callbacks": {}, "epoch": 1}


def compiled_lightning(net: State, other: State) -> dict:
    return {"state_dict": prefixed("net._orig_mod.vit.", net), "pytorch-lightning_version": "2"}


def lightlys_dinov2(net: State, other: State) -> dict:
    state = prefixed("teacher_backbone.vit.", net)
    state |= {"teacher_backbone.mask_token": torch.ones(1, 1, 64)}
    state |= prefixed("student_backbone.vit.", other)
    state |= {"student_backbone.mask_token": torch.ones(1, 1, 64)}
    state |= prefixed("teacher_head.dino_head.", HEAD) | prefixed("student_head.ibot_head.", HEAD)
    return {"state_dict": state | {"dino_criterion.center.center": torch.ones(1, 1, 4)}}


def fsdp(net: State, other: State) -> dict:
    return {key.replace("blocks.", "_fsdp_wrapped_module.blocks."): x for key, x in net.items()}


VIT_LAYOUTS: dict[Callable[[State, State], dict], str] = {
    mae: "left out: decoder_embed, decoder_blocks, decoder_norm, decoder_pred, mask_token, "
    "decoder_pos_embed",
    deit: "classifier: left out (head.weight, head.bias)",
    ibot: "left out of the head: last_layer2",
    ibots_teacher: "left out: masked_embed",
    dinov2s_training: "left out: dino_head (4), ibot_head (4), mask_token",
    moco_v3: "teacher: its momentum_encoder",
    timms_training: "of state_dict_ema, state_dict the first is taken",
    lightning: "left out: projector (2)",
    compiled_lightning: "",
    lightlys_dinov2: "teacher: its teacher_backbone",
    fsdp: "",
}


@pytest.mark.parametrize("layout", VIT_LAYOUTS, ids=lambda layout: layout.__name__)
def test_layout_gives_the_features_of_its_network(layout: Callable, tmp_path: Path) -> None:
    net, other = tiny_vit(1), tiny_vit(2)
    torch.save(layout(net.state_dict(), other.state_dict()), tmp_path / "a.pth")
    network = open_network(tmp_path / "a.pth", arch="test_vit")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.model.backbone(images), net(images))
    said = VIT_LAYOUTS[layout]
    assert not said or said in network.notes


@pytest.mark.parametrize("layout", [ibot, moco_v3, lightlys_dinov2])
def test_student_is_the_other_network(layout: Callable, tmp_path: Path) -> None:
    net, other = tiny_vit(1), tiny_vit(2)
    torch.save(layout(net.state_dict(), other.state_dict()), tmp_path / "a.pth")
    network = open_network(tmp_path / "a.pth", "student", arch="test_vit")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.model.backbone(images), other(images))


def test_timms_training_says_its_architecture(tmp_path: Path) -> None:
    net = tiny_vit()
    torch.save(timms_training(net.state_dict(), net.state_dict()), tmp_path / "a.pth")
    assert open_network(tmp_path / "a.pth").arch == "test_vit"


def test_training_starts_from_another_projects_file(tmp_path: Path) -> None:
    net = tiny_vit()
    torch.save(mae(net.state_dict(), {}), tmp_path / "a.pth")
    config = ModelConfig("test_vit", image_size=32, projection_output_dim=16)
    model = DinoModel.from_config(config)
    lines = load_weights(model, tmp_path / "a.pth")
    assert lines[1].startswith("left out: decoder_embed")
    assert all(
        torch.equal(x, net.state_dict()[key]) for key, x in model.backbone.named_parameters()
    )


# ---------------------------------------------------------------- DINOv2 and DINOv3


def test_dinov2_with_registers_is_recognised_and_gives_its_features(tmp_path: Path) -> None:
    """Its class token has a position of its own; timm adds the two once and for all."""
    net = get_backbone("vit_small_patch14_reg4_dinov2", image_size=28)
    net = randomised(net)
    state = net.state_dict()
    position = 0.1 * torch.randn(1, 1, 384)
    published = {key: x for key, x in state.items() if key != "reg_token"}
    published |= {
        "mask_token": torch.ones(1, 384),
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - position,
        "pos_embed": torch.cat([position, state["pos_embed"]], dim=1),
    }
    torch.save(published, tmp_path / "a.pth")
    network = open_network(tmp_path / "a.pth")
    assert network.arch == "vit_small_patch14_reg4_dinov2"
    assert "left out: mask_token" in network.notes
    images = torch.randn(2, 3, 28, 28)
    features = network.model.backbone(images)
    torch.testing.assert_close(features, net(images), rtol=1e-3, atol=1e-4)


def dinov3_of(net: nn.Module) -> State:
    """A state of timm's DINOv3, by the names that its authors' has."""
    state: State = {"mask_token": torch.ones(1, 384), "rope_embed.periods": torch.ones(16)}
    for key, tensor in net.state_dict().items():
        if key.endswith("q_bias"):
            other = net.state_dict()[key.replace("q_bias", "v_bias")]
            whole = torch.cat([tensor, torch.zeros_like(tensor), other])
            state[key.replace("q_bias", "qkv.bias")] = whole
            state[key.replace("q_bias", "qkv.bias_mask")] = torch.ones_like(whole)
        elif not key.endswith("v_bias"):
            for name in ("1", "2"):
                key = key.replace(f"gamma_{name}", f"ls{name}.gamma")
            state[key.replace("reg_token", "storage_tokens")] = tensor
    return state


def test_dinov3_is_recognised_and_gives_its_features(tmp_path: Path) -> None:
    net = randomised(get_backbone("vit_small_patch16_dinov3_qkvb"))
    torch.save(dinov3_of(net), tmp_path / "a.pth")
    network = open_network(tmp_path / "a.pth")
    assert network.arch == "vit_small_patch16_dinov3_qkvb"
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(network.model.backbone(images), net(images))
    with pytest.raises(ValueError, match=r"biases that this architecture lacks: blocks\.0\.attn"):
        open_network(tmp_path / "a.pth", arch="vit_small_patch16_dinov3")


@pytest.mark.parametrize("arch", sorted({arch for row in VITS.values() for arch in row}))
def test_every_row_of_the_table_is_recognised_by_its_shapes(arch: str) -> None:
    with torch.device("meta"):
        state = get_backbone(arch).state_dict()
    assert recognise(Weights(state, {}), "a.pth").config.arch == arch


# ---------------------------------------------------------------- ResNets


def resnet18(seed: int, is_small: bool = False) -> nn.Module:
    return randomised(get_backbone("resnet18", image_size=32 if is_small else 224), seed)


def as_children(prefix: str, net: nn.Module) -> State:
    """A state of nn.Sequential(*list(resnet.children())[:-1]), which lightly's examples train."""
    return prefixed(prefix, nn.Sequential(*list(net.children())[:-1]).state_dict())


def test_lightlys_resnet_is_named_by_order(tmp_path: Path) -> None:
    net, other = resnet18(1), resnet18(2)
    state = as_children("teacher_backbone.", net) | as_children("student_backbone.", other)
    state |= prefixed("student_head.layers.", mlp("0", "3"))
    torch.save({"state_dict": state, "loops": {}}, tmp_path / "a.pth")
    images = torch.randn(1, 3, 64, 64)
    for role, expected in (("teacher", net), ("student", other)):
        network = open_network(tmp_path / "a.pth", role)
        assert network.arch == "resnet18"
        assert torch.equal(network.model.backbone(images), expected(images))


def test_lightlys_own_resnet_is_read_where_it_is_whole(tmp_path: Path) -> None:
    """In a Sequential it has no ReLU after its first layer, since that is no module of it."""
    net = resnet18(1, is_small=True)
    state = {key.replace("downsample", "shortcut"): x for key, x in net.state_dict().items()}
    whole = prefixed("backbone.", state | mlp("linear"))
    torch.save({"state_dict": whole | mlp("projection_head.layers.0")}, tmp_path / "a.pth")
    network = open_network(tmp_path / "a.pth")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(network.model.backbone(images), net(images))
    assert any("3x3 stem is taken for one of stride 1" in note for note in network.notes)
    children = [net.conv1, net.bn1, net.layer1, net.layer2, net.layer3, net.layer4]
    torch.save(nn.Sequential(*children).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no ReLU after its first layer"):
        open_network(tmp_path / "a.pth")


def test_solo_learns_checkpoint_gives_both_networks(tmp_path: Path) -> None:
    net, other = resnet18(1), resnet18(2)
    state = prefixed("momentum_backbone.", net.state_dict())
    state |= prefixed("backbone.", other.state_dict())
    state |= prefixed("head.", HEAD) | prefixed("momentum_head.", HEAD) | mlp("classifier")
    state |= {"dino_loss_func.center": torch.ones(1, 4)}
    torch.save({"state_dict": state, "hyper_parameters": {}}, tmp_path / "a.ckpt")
    images = torch.randn(1, 3, 64, 64)
    for role, expected in (("teacher", net), ("student", other)):
        network = open_network(tmp_path / "a.ckpt", role)
        assert torch.equal(network.model.backbone(images), expected(images))
    assert "left out: head (4)" in network.notes
    assert "left out: momentum_head (4), classifier, dino_loss_func" in network.notes


def test_moco_v2_gives_its_momentum_encoder(tmp_path: Path) -> None:
    net, other = resnet18(1), resnet18(2)
    state = prefixed("module.encoder_k.", net.state_dict() | mlp("fc.0", "fc.2"))
    state |= prefixed("module.encoder_q.", other.state_dict() | mlp("fc.0", "fc.2"))
    state |= {"module.queue": torch.ones(2, 4), "module.queue_ptr": torch.tensor([3])}
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "a.pth.tar")
    network = open_network(tmp_path / "a.pth.tar")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(network.model.backbone(images), net(images))


def test_torchvisions_file_leaves_out_its_classifier(tmp_path: Path) -> None:
    net = randomised(torchvision.models.resnet18())
    torch.save(net.state_dict(), tmp_path / "a.pth")
    network = open_network(tmp_path / "a.pth")
    assert "classifier: left out (fc.weight, fc.bias)" in network.notes
    net.fc = nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(network.model.backbone(images), net(images))


# ---------------------------------------------------------------- what does not fit


def test_what_is_not_known_is_an_error_with_counts_and_names(tmp_path: Path) -> None:
    state = tiny_vit().state_dict() | mlp("adapter.0", "adapter.1", "adapter.2", "adapter.3")
    del state["norm.weight"]
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError) as raised:
        open_network(tmp_path / "a.pth", arch="test_vit")
    said = str(raised.value)
    assert "1 missing: backbone.norm.weight" in said
    assert "4 unexpected: backbone.adapter.0.weight" in said and said.endswith("and 1 more")


def test_one_key_too_many_names_the_architecture_that_it_almost_is() -> None:
    with torch.device("meta"):
        state = get_backbone("resnet18").state_dict()
        state["adapter.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"are those of resnet18 but for 1: adapter\.weight"):
        recognise(Weights(state, {}), "a.pth")


def test_arch_of_another_network_or_of_none_is_one_line(tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "a.pth")
    for arch, said in (
        ("resnet18", "holds another network than --arch resnet18"),
        ("test_vat", "unknown arch 'test_vat'; close matches: test_vit"),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            open_network(tmp_path / "a.pth", arch=arch)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="--arch is for files: resnet18 is the name"):
        open_network("resnet18", arch="resnet18")


def test_a_missing_role_is_named() -> None:
    with pytest.raises(ValueError, match="holds no teacher, but student_backbone"):
        find_network({"student_backbone.conv1.weight": torch.ones(1)}, "teacher")


def test_two_tensors_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two tensors of one name"):
        find_network({"module.a": torch.ones(1), "a": torch.ones(1)}, "teacher")


def test_a_dict_that_holds_itself_ends() -> None:
    content: dict = {}
    content["model"] = content
    assert open_containers(content, "teacher")[0] is content


def test_keys_are_counted_by_their_first_part() -> None:
    assert counted(["a.0", "b", "a.1"]) == "a (2), b"


def test_what_timm_cannot_convert_is_an_error() -> None:
    net = tiny_vit()
    with pytest.raises(ValueError, match="timm cannot convert it"):
        by_timms_names({"patch_embed.proj.weight": torch.tensor(1.0)}, net)
