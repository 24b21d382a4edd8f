"""Backbones, projection head, the DINO model, its EMA update and its checkpoints.

    model = DinoModel(get_backbone("resnet18"), DinoProjectionHead(512, output_dim=2048))
    projections = model(images)                         # (b, 2048)
    projections = model([global_1, global_2, local_1])  # (v, b, 2048), one backbone call a size

Stands alone: needs torch, torchvision, timm, einops and safetensors.
Source: DINO, arXiv 2104.14294. Axes: b batch, v views, d features, k output_dim, c h w image.
"""

import contextlib
import dataclasses
import difflib
import errno
import json
import math
import os
import socket
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import timm
import torch
import torchvision
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # of torchvision
ALL_RESNETS = (*RESNETS, "resnet10_half")
TIMM_NAMES = {
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
}


NUM_PROTOTYPES = 4096  # where nothing says how many


# what a setting's numbers may be; without "above", they are at least 0
ABOVE_ZERO = {"above": 0}
SHARE = {"most": 1}
PIXELS = {"above": 0, "most": 4096}


@dataclass(frozen=True)
class ModelConfig:
    # resnet18/34/50/101/152, resnet10_half (for small images), dino_vits8/16, dino_vitb8/16, or the
    # name of any timm model
    arch: str = "dino_vits16"
    # channels of an image: 3 for RGB, 1 for grey, others for the bands of TIFF and .npy files
    channels: int = field(default=3, metadata={"above": 0, "most": 1024})
    # start from published weights: DINO's own for dino_*, for others what timm or torchvision has,
    # which mostly saw ImageNet's labels
    pretrained: bool = False
    # pixels, ViTs only [paper: 16 or 8]; None: the arch's own
    patch_size: int | None = field(default=None, metadata=PIXELS)
    # pixels that position embeddings and ResNet stem are made for; None: the global crop size in
    # training, the arch's own with --pretrained
    image_size: int | None = field(default=None, metadata=PIXELS)
    # interpolate position embeddings for crops of other sizes as the original does, for its weights
    original_pos_embed: bool = False
    # stochastic depth, student only [paper: 0.1 for ViTs]; None: 0.1 for dino_*, else 0
    drop_path_rate: float | None = field(default=None, metadata=SHARE)
    # width of the head's two hidden layers [paper: 2048]
    projection_hidden_dim: int = field(default=1024, metadata=ABOVE_ZERO)
    # width of the head's bottleneck [paper: 256]
    projection_bottleneck_dim: int = field(default=256, metadata=ABOVE_ZERO)
    # prototypes K [paper: 65536]; fewer than the images; of one alone the loss is always 0; None:
    # 4,096; in training without a recipe, 1,024 up to 20,000 images, 2,048 up to 50,000, 4,096 up
    # to 100,000, 16,384 up to 200,000, 32,768 up to 500,000, then the paper's
    projection_output_dim: int | None = field(default=None, metadata={"above": 1})
    # weight-normalise the head's last layer [paper: yes]
    use_weight_norm: bool = True
    # fix the last layer's gain at 1 [paper: yes for ViT-B]; learning it can help a small ViT
    norm_last_layer: bool = True
    # BatchNorm in the head [paper: no; yes in the published ResNet-50]
    use_bn: bool = False


# ---------------------------------------------------------------- backbones


def _build_resnet(name: str, pretrained: bool, image_size: int | None, channels: int) -> nn.Module:
    is_small = image_size is not None and image_size <= 64
    if pretrained and name == "resnet10_half":
        raise ValueError(f"{name} has no published weights: need a ResNet of torchvision")
    if pretrained and is_small:
        text = "the stem for small images has no published weights: need more than 64 px"
        raise ValueError(f"{name} at {image_size} px: {text}")
    if name == "resnet10_half":  # one BasicBlock a stage, half the width
        options = {
            "layers": (1, 1, 1, 1),
            "channels": (32, 64, 128, 256),
            "stem_type": "deep",
            "stem_width": 16,
            "in_chans": channels,
        }
        net = timm.create_model("resnet18", num_classes=0, **options)
        net.timm_options = options
    else:
        net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
        net.num_features = net.fc.in_features
        net.fc = nn.Identity()
        if channels != 3:
            _change_stem(net, channels, pretrained)
            net.timm_options = {"in_chans": channels}
    if is_small:  # the ImageNet stem would leave 1 x 1 pixel of 32 x 32 for the last stage
        stride = 1 if image_size <= 32 else 2
        net.conv1 = nn.Conv2d(channels, net.bn1.num_features, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


def _change_stem(net: nn.Module, channels: int, pretrained: bool) -> None:
    """Let a torchvision ResNet take so many channels; published weights are adapted as in timm."""
    of_rgb = net.conv1.weight.detach()
    net.conv1 = nn.Conv2d(channels, net.bn1.num_features, 7, 2, padding=3, bias=False)
    if pretrained:
        net.conv1.weight = nn.Parameter(adapt_input_conv(channels, of_rgb))
    else:  # random ones would be the same for every third band
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")


def _fail_soon_offline() -> None:
    """Let timm's hub fail at once where it cannot be reached: else it retries for over a minute."""
    if any(name.lower() in ("https_proxy", "all_proxy", "hf_endpoint") for name in os.environ):
        return  # the way to it is another
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # what was downloaded before is found


def _create_timm(name: str, pretrained: bool, options: dict[str, object]) -> nn.Module | None:
    """Return timm's network without classifier, or None where it does not know an option."""
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        return None
    net.timm_options = options  # for export.py, to let timm build it again
    return net


def _build_timm(
    name: str,
    pretrained: bool,
    drop_path_rate: float,
    patch_size: int | None,
    image_size: int | None,
    channels: int,
) -> nn.Module:
    given: dict[str, object] = {}
    if channels != 3:
        given["in_chans"] = channels
    if drop_path_rate:
        given["drop_path_rate"] = drop_path_rate
    if patch_size is not None:
        given["patch_size"] = patch_size
    sizes: dict[str, object] = {} if image_size is None else {"img_size": image_size}
    # timm has two ways to make a network of patches take images of any size. Those that know
    # neither are made for one size, or are convolutional and know no size at all.
    of_any_size = (sizes | {"dynamic_img_size": True}, sizes | {"strict_img_size": False})
    for of_size in (*of_any_size, sizes, {}):
        net = _create_timm(name, pretrained, given | of_size)
        if net is not None:
            return net
    options = ", ".join(f"{option}={value}" for option, value in given.items())
    raise ValueError(f"{name} has no such option: {options}")


def interpolate_as_original(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """Return position embeddings (1, 1 + n * n, d), class token first, for height * width patches.

    Not antialiased, and with a scale of 0.1 patch more: what the published weights were trained
    with at crops of 96 px, where timm's own differs. facebookresearch/dino#8.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if height == width == side:
        return pos_embed
    grid = rearrange(pos_embed[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    patches = rearrange(grid, "1 d h w -> 1 (h w) d").to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


class _OriginalPositions(VisionTransformer):
    """timm's ViT with the original's position embeddings at sizes other than its own."""

    def _pos_embed(self, patches: Tensor) -> Tensor:
        batch, height, width, _ = patches.shape
        tokens = rearrange(patches, "b h w d -> b (h w) d")
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        return self.pos_drop(tokens + interpolate_as_original(self.pos_embed, height, width))


def _use_original_positions(net: nn.Module, name: str) -> None:
    is_plain_vit = type(net) is VisionTransformer
    if (
        not is_plain_vit
        or net.pos_embed is None
        or net.no_embed_class
        or net.num_prefix_tokens != 1
    ):
        raise ValueError(f"{name} has no position embeddings of the original's kind")
    net.__class__ = _OriginalPositions


def _patch_size_of(net: nn.Module) -> int:
    """Return the side in pixels of a network's patches, 1 where it has none."""
    embed = getattr(net, "patch_embed", None)
    patch_size = getattr(embed, "patch_size", 1)
    # where patches overlap, as PVTv2's do, the stride counts
    stride = getattr(getattr(embed, "proj", None), "stride", patch_size)
    return stride[0] if isinstance(stride, tuple) else stride


def is_known_backbone(name: str) -> bool:
    """Tell whether `get_backbone` builds a network of that name."""
    if "." in name:  # timm's, with the name of its weights
        return timm.models.is_model_pretrained(name)
    return name in ALL_RESNETS or name in TIMM_NAMES or timm.is_model(name)


def _close_names(name: str) -> list[str]:
    """Return up to six architectures whose names begin alike or are spelled alike."""
    if timm.is_model(name):  # of which there are no such weights
        return timm.list_pretrained(f"{name.split('.')[0]}.*")[:6]
    published = [own for own, of_timm in TIMM_NAMES.items() if of_timm.startswith(name)]
    # a dict, since torchvision and timm have names in common
    known = dict.fromkeys([*ALL_RESNETS, *TIMM_NAMES, *timm.list_models()])
    longer = sorted((other for other in known if other.startswith(name)), key=len)
    alike = difflib.get_close_matches(name, known, n=6, cutoff=0.5)
    return list(dict.fromkeys([*published, *longer[:4], *alike]))[:6]


def get_backbone(
    name: str,
    pretrained: bool = False,
    *,
    drop_path_rate: float = 0.0,
    patch_size: int | None = None,
    image_size: int | None = None,
    original_pos_embed: bool = False,
    channels: int = 3,
) -> nn.Module:
    """Build a backbone without classifier: (b, channels, h, w) to (b, output_dim).

    It takes images of any h and w, but for those of timm's networks that are made for one size.
    It has `.output_dim`, `.num_channels`, `.patch_size` (1 for convolutional networks; must divide
    h and w) and the parameter names of torchvision or timm. ResNets for an `image_size` up to 64 px
    get a 3x3 stem without max-pool, of stride 1 up to 32 px and 2 above. Published weights are
    fitted to other `channels` than 3 as timm does: summed for 1, repeated and rescaled for more.
    Raises ValueError for an unknown name (with close matches) or option, OSError where published
    weights cannot be loaded.

    To add a backbone: a branch here and its name among the known. It must have `.num_features` and
    build on the meta device. (Any module with `.output_dim` goes into a DinoModel without that.)
    """
    is_resnet = name in ALL_RESNETS
    if not is_known_backbone(name):
        close = ", ".join(_close_names(name)) or "none"
        raise ValueError(f"unknown arch {name!r}; close matches: {close}")
    if is_resnet and (drop_path_rate or patch_size):
        given = f"drop_path_rate={drop_path_rate}" if drop_path_rate else f"patch_size={patch_size}"
        raise ValueError(f"{name} has neither drop path nor patches, got {given}")
    if pretrained and not is_resnet:
        _fail_soon_offline()
    try:
        if is_resnet:
            net = _build_resnet(name, pretrained, image_size, channels)
        else:
            timm_name = TIMM_NAMES.get(name, name)
            net = _build_timm(
                timm_name, pretrained, drop_path_rate, patch_size, image_size, channels
            )
    except (OSError, RuntimeError) as error:  # a hub or URL that cannot be reached
        if not pretrained:
            raise
        reason = str(error).split("\n")[0]
        raise OSError(f"cannot load the published weights of {name}: {reason}") from error
    if original_pos_embed:
        _use_original_positions(net, name)
    if name in TIMM_NAMES and not pretrained:
        nn.init.trunc_normal_(net.cls_token, std=0.02)  # the original's; timm's is 1e-6
    net.output_dim = getattr(net, "head_hidden_size", None) or net.num_features
    net.patch_size = _patch_size_of(net)
    net.num_channels = channels
    return net


# ---------------------------------------------------------------- projection head


def _normalised_rows(weight: Tensor, gain: Tensor) -> Tensor:
    """Return weight (k, d) with its rows scaled to the lengths of gain (k, 1)."""
    # A private function of torch (tried with 2.11 and 2.14), which its own weight_norm calls:
    # weight * (gain / norm) takes 2.9 times as long with its gradient, 137 ms more for 65,536 rows
    # of 256 on two cores of an AMD EPYC. F.normalize takes 4.4 times as long.
    return torch._weight_norm(weight, gain, 0)


class PrototypeLayer(nn.Module):
    """Bias-free linear layer with rows of norm 1, or of a learned gain: weight_norm as one module.

    torch's legacy weight_norm cannot be deep-copied; the parametrised one has awkward keys.
    """

    def __init__(self, input_dim: int, output_dim: int, learn_gain: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(input_dim, output_dim, bias=False).weight.detach())
        if learn_gain:
            self.gain = nn.Parameter(torch.ones(output_dim, 1))
        else:
            self.register_buffer("gain", torch.ones(output_dim, 1), persistent=False)

    def forward(self, bottleneck: Tensor) -> Tensor:
        return F.linear(bottleneck, _normalised_rows(self.weight.float(), self.gain.float()))


class DinoProjectionHead(nn.Module):
    """Map features (b, input_dim) to logits over K prototypes (b, output_dim). Appendix C.

    `norm_last_layer` fixes the gain of the weight-normalised last layer at 1, else it is learned
    per row; `use_weight_norm=False` makes that layer a plain linear one.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 1024,
        bottleneck_dim: int = 256,
        output_dim: int = 4096,
        use_weight_norm: bool = True,
        norm_last_layer: bool = True,
        use_bn: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (input_dim, hidden_dim):
            layers.append(nn.Linear(width, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        layers.append(nn.Linear(hidden_dim, bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        if use_weight_norm:  # either keeps nn.Linear's own initialisation, as in the original
            learn_gain = not norm_last_layer
            self.last_layer = PrototypeLayer(bottleneck_dim, output_dim, learn_gain)
        else:
            self.last_layer = nn.Linear(bottleneck_dim, output_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        bottleneck = self.mlp(features).float()  # float32: the norm's squares overflow in fp16
        return self.last_layer(F.normalize(bottleneck, dim=-1))


# ---------------------------------------------------------------- model


class DinoModel(nn.Module):
    """Backbone and projection head; the backbone is any module with `.output_dim`."""

    def __init__(self, backbone: nn.Module, projection_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = projection_head
        self.config: ModelConfig | None = None  # set where the model was built from one

    @classmethod
    def from_config(cls, config: object) -> "DinoModel":
        """Build from a ModelConfig, or from what holds one as `.model_config` or `.model`."""
        config = getattr(config, "model_config", getattr(config, "model", config))
        drop_path_rate = config.drop_path_rate
        if drop_path_rate is None:
            drop_path_rate = 0.1 if config.arch in TIMM_NAMES else 0.0
        backbone = get_backbone(
            config.arch,
            config.pretrained,
            drop_path_rate=drop_path_rate,
            patch_size=config.patch_size,
            image_size=config.image_size,
            original_pos_embed=config.original_pos_embed,
            channels=config.channels,
        )
        projection_head = DinoProjectionHead(
            input_dim=backbone.output_dim,
            hidden_dim=config.projection_hidden_dim,
            bottleneck_dim=config.projection_bottleneck_dim,
            output_dim=config.projection_output_dim or NUM_PROTOTYPES,
            use_weight_norm=config.use_weight_norm,
            norm_last_layer=config.norm_last_layer,
            use_bn=config.use_bn,
        )
        model = cls(backbone, projection_head)
        model.config = config
        return model

    def forward(
        self, images: Tensor | Sequence[Tensor], return_backbone_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return projections (b, k) of images (b, c, h, w), or (v, b, k) of v crops of b images.

        With `return_backbone_features` it is (features, projections), features (b, d) or (v, b, d).
        """
        if isinstance(images, Tensor):
            features = self.backbone(images)
            projections = self.projection_head(features)
        else:
            features = self._features_of_crops(images)
            # one call, also since a BatchNorm in the head has to see all views
            projections = self.projection_head(rearrange(features, "v b d -> (v b) d"))
            projections = rearrange(projections, "(v b) k -> v b k", v=len(images))
        return (features, projections) if return_backbone_features else projections

    def _features_of_crops(self, crops: Sequence[Tensor]) -> Tensor:
        """Return features (v, b, d) of v crops (b, c, h, w): one backbone call per crop size."""
        if not crops:
            raise ValueError("need >= 1 crop, got an empty list")
        views_of_size = defaultdict(list)
        for view, crop in enumerate(crops):
            views_of_size[crop.shape[-2:]].append(view)
        features_of_view = {}
        for views in views_of_size.values():
            of_size = self.backbone(torch.cat([crops[view] for view in views]))
            for view, features in zip(views, of_size.chunk(len(views)), strict=True):
                features_of_view[view] = features
        return torch.stack([features_of_view[view] for view in range(len(crops))])


@torch.no_grad()
def update_teacher_EMA(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Set the teacher's parameters to momentum * teacher + (1 - momentum) * student, in place.

    Parameters only: BatchNorm buffers follow the teacher's own forward passes, as in the original.
    Works on FSDP2's sharded parameters, each process on its shards. Section 3.1.
    """

    def shards(model: nn.Module) -> list[Tensor]:
        return [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]

    # torch's own average of lists of tensors, in place: on a GPU a few kernels for all parameters
    average_in_place = get_ema_multi_avg_fn(momentum)
    average_in_place(shards(teacher), shards(student), None)  # None: a count that no EMA reads


# ---------------------------------------------------------------- checkpoints


CHECKSUMS = ("tensors_crc32", "texts_crc32")  # the metadata that says what the rest must be


def tensors_checksum(tensors: dict[str, Tensor]) -> str:
    """Return the CRC-32 of names, types, shapes and bytes, in the order of the names.

    It takes 0.9 s a GB on a core of an AMD EPYC; blake2b takes 3.
    """
    checksum = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        checksum = zlib.crc32(f"{name} {tensor.dtype} {(*tensor.shape,)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def _texts_checksum(texts: dict[str, str]) -> str:
    own = {name: text for name, text in texts.items() if name not in CHECKSUMS}
    return f"{zlib.crc32(json.dumps(own, sort_keys=True).encode()):08x}"


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU of which no two share memory, which safetensors refuses.

    The layers of some networks share weights, by several names: timm's CoaT.
    """
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return own


def save_tensors(path: str | Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """Write a safetensors file with `texts` as metadata, whole or, with an OSError, not at all.

    Checksums of tensors and texts are written with them, which load_tensors checks.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        whole = _own_memory(tensors)
        checksums = (tensors_checksum(whole), _texts_checksum(texts))
        texts = texts | dict(zip(CHECKSUMS, checksums, strict=True))
        temporary.touch()
        permissions = temporary.stat().st_mode  # the umask's; safetensors' own are 0600
        save_file(whole, temporary, metadata=texts)
        os.chmod(temporary, permissions)
        _sync(temporary)
        replace_file(temporary, path)
        with contextlib.suppress(OSError):  # not every file system syncs a folder
            _sync(path.parent)
    except (SafetensorError, OSError) as error:  # a full disk, say
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(temporary: Path, path: Path) -> None:
    """Rename a file to `path`, which may exist: at once where the file system can do that."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EPERM, errno.EACCES) or not path.is_file():
            raise
        # Some file systems rename to free names alone. The old file is kept under another name
        # meanwhile, so that a kill loses neither.
        aside = path.with_name(f"{path.name}.old")
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(aside, path)
            raise
        aside.unlink()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk: a power cut cannot undo it then."""
    # Windows syncs only files that are open for writing, and no folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_tensors(
    path: str | Path, only_metadata: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata, both as they were written.

    Raises FileNotFoundError, or ValueError for a file that is truncated, not safetensors, or not
    what its checksums say. Files of other writers have none. With `only_metadata` the tensors are
    neither read nor checked.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = () if only_metadata else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            texts = file.metadata() or {}
    except Exception as error:  # a damaged header can name types and sizes that torch refuses
        with open(path, "rb") as file:
            start = file.read(2)
        if start == b"PK" or start[:1] == b"\x80":
            reason = "is a pickle, which can run code: need a .safetensors file"
            raise ValueError(f"{path} {reason}") from error
        reason = " ".join(str(error).split())[:200]
        text = f"{path} is truncated or not a safetensors file: {reason}"
        raise ValueError(f"{text}{what_is_left(path)}") from error
    expected = {name: texts.pop(name, None) for name in CHECKSUMS}
    if all(checksum is None for checksum in expected.values()):
        return tensors, texts
    found = (
        # tensors that were not read count as right
        expected["tensors_crc32"] if only_metadata else tensors_checksum(tensors),
        _texts_checksum(texts),
    )
    for name, checksum in zip(CHECKSUMS, found, strict=True):
        if expected[name] != checksum:
            was = str(expected[name])[:20]  # None where its own name is damaged
            text = f"{path} is damaged: {name} is {checksum}, was {was} when saved"
            raise ValueError(f"{text}{what_is_left(path)}")
    return tensors, texts


def what_is_left(path: str | Path) -> str:
    """Return `; to go back to: FILE`, the newest older copy beside a damaged one, or nothing."""
    path = Path(path)
    start = f"{path.stem}-"
    copies = [
        file
        for file in path.parent.iterdir()
        if file.name.startswith(start) and file.suffix == path.suffix
    ]
    if not copies:
        return ""
    return f"; to go back to: {max(copies, key=os.path.getmtime)}"


def save_checkpoint(
    path: str | Path,
    model: DinoModel,
    metadata: dict,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write `backbone.*` and `projection_head.*` with JSON metadata, whole or not at all.

    `state_dict` holds the tensors to write, where the model's own are sharded.
    """
    config = None if model.config is None else dataclasses.asdict(model.config)
    texts = {"model_config": json.dumps(config), "metadata": json.dumps(metadata)}
    save_tensors(path, model.state_dict() if state_dict is None else state_dict, texts)


def load_checkpoint(path: str | Path) -> tuple[DinoModel, dict]:
    """Rebuild what `save_checkpoint` wrote: the model, in eval mode on the CPU, and the metadata.

    Nothing is unpickled. Raises FileNotFoundError, or ValueError for a file that is truncated, not
    safetensors, or not as save_checkpoint writes it.
    """
    return rebuild_model(path, *load_tensors(path))


def rebuild_model(
    path: str | Path, tensors: dict[str, Tensor], texts: dict[str, str]
) -> tuple[DinoModel, dict]:
    """Rebuild the model of a file that load_tensors read; returns and raises as load_checkpoint."""
    if not {"model_config", "metadata"} <= texts.keys():
        raise ValueError(f"{path} lacks the metadata of save_checkpoint: cannot tell its model")
    try:
        settings, metadata = json.loads(texts["model_config"]), json.loads(texts["metadata"])
        if settings is None:
            raise ValueError("it has a custom backbone: build it, then load the file's tensors")
        if not isinstance(metadata, dict):
            raise ValueError(f"need metadata by name, got {metadata!r:.50}")
        model = DinoModel.from_config(ModelConfig(**settings | {"pretrained": False}))
        model.load_state_dict(tensors)
    except Exception as error:  # damaged settings can raise anything in the networks
        reason = " ".join(str(error).split())[:1000]
        text = f"cannot rebuild the model of {path}: {reason}"
        raise ValueError(f"{text}{what_is_left(path)}") from error
    return model.eval(), metadata
