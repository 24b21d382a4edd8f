"""Backbones, projection head, the DINO model, its EMA update and its checkpoints.

    model = DinoModel(get_backbone("resnet18"), DinoProjectionHead(512, output_dim=2048))
    projections = model(images)                         # (b, 2048)
    projections = model([global_1, global_2, local_1])  # (v, b, 2048), one backbone call a size

Stands alone: needs torch, torchvision, timm, einops, safetensors, and no file of this repository.
Source: DINO, arXiv 2104.14294. Axes: b batch, v views, d features, k output_dim, c h w image.
"""

import dataclasses
import difflib
import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
TIMM_NAMES = {
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
}


@dataclass(frozen=True)
class ModelConfig:
    # resnet18/34/50/101/152, resnet10_half (for small images), dino_vits8/16, dino_vitb8/16, or the
    # name of any timm model
    arch: str = "dino_vits16"
    pretrained: bool = False  # start from published weights: ImageNet's, or DINO's own for dino_*
    patch_size: int | None = None  # pixels, ViTs only [paper: 16 or 8]; None: the arch's own
    # pixels that position embeddings and ResNet stem are made for; None: the global crop size in
    # training, the arch's own where weights are published
    image_size: int | None = None
    # interpolate position embeddings for crops of other sizes as the original does, for its weights
    original_pos_embed: bool = False
    # stochastic depth, student only [paper: 0.1 for ViTs]; None: 0.1 for dino_*, else 0
    drop_path_rate: float | None = None
    projection_hidden_dim: int = 1024  # width of the head's two hidden layers [paper: 2048]
    projection_bottleneck_dim: int = 256  # width of the head's bottleneck [paper: 256]
    projection_output_dim: int = 4096  # prototypes K [paper: 65536]; fewer than images
    use_weight_norm: bool = True  # weight-normalise the head's last layer [paper: yes]
    # fix the last layer's gain at 1 [paper: yes for ViT-B]; learning it can help a small ViT
    norm_last_layer: bool = True
    use_bn: bool = False  # BatchNorm in the head [paper: no; yes in the published ResNet-50]


def _resnet(name: str, pretrained: bool, image_size: int | None) -> nn.Module:
    small = image_size is not None and image_size <= 64
    if pretrained and (small or name == "resnet10_half"):
        raise ValueError(f"{name} at {image_size} px has no published weights: need a torchvision "
                         "ResNet above 64 px")  # fmt: skip
    if name == "resnet10_half":  # one BasicBlock a stage, half the width
        shape = {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), "stem_width": 16}
        net = timm.create_model("resnet18", num_classes=0, stem_type="deep", **shape)
    else:
        net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
        net.num_features, net.fc = net.fc.in_features, nn.Identity()
    if small:  # the ImageNet stem would leave 1 x 1 pixel of 32 x 32 for the last stage
        stride = 1 if image_size <= 32 else 2
        net.conv1 = nn.Conv2d(3, net.bn1.num_features, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


class DropPath(nn.Module):
    """Leave out a residual branch of each sample with probability `rate`, in training; scale up.

    timm's keeps the rate as a number, for each of which torch.compile makes a graph of its own, up
    to its limit of 8: the other blocks of a ViT then stay uncompiled. A buffer is one graph.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"need a drop path rate >= 0 and < 1, got {rate}")
        self.drop_prob = rate
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        draws = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device)
        return branch * ((draws < self.keep) / self.keep).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


def _share_drop_path(net: nn.Module) -> None:
    """Put our DropPath where timm has its own, and the Identity that stands for a rate of 0."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if "drop_path" in name and isinstance(child, timm.layers.DropPath | nn.Identity):
                setattr(module, name, DropPath(getattr(child, "drop_prob", 0.0)))


def _timm(name: str, pretrained: bool, drop_path_rate: float, **sizes: int) -> nn.Module:
    options = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    # timm's two ways to accept any image size; convolutional networks take neither, nor a size
    for any_size in ({"dynamic_img_size": True}, {"strict_img_size": False}, None):
        kwargs = options | (sizes | any_size if any_size else {})
        try:
            if any_size is None and "patch_size" in sizes:
                raise TypeError("unexpected keyword argument 'patch_size'")
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            refusal = str(error)
    raise ValueError(f"{name} has no such option: {refusal}")


def interpolate_as_original(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """Resample position embeddings (1, 1 + n * n, d), class token first, to height * width patches.

    Not antialiased, and with the scale of 0.1 patch more: what the published weights were trained
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


class _OriginalPositions(timm.models.vision_transformer.VisionTransformer):
    """timm's ViT with the original's position embeddings at sizes other than its own."""

    def _pos_embed(self, patches: Tensor) -> Tensor:
        batch, height, width, _ = patches.shape
        tokens = rearrange(patches, "b h w d -> b (h w) d")
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        return self.pos_drop(tokens + interpolate_as_original(self.pos_embed, height, width))


def _use_original_positions(net: nn.Module, name: str) -> None:
    plain = type(net) is timm.models.vision_transformer.VisionTransformer
    if not plain or net.pos_embed is None or net.no_embed_class or net.num_prefix_tokens != 1:
        raise ValueError(f"{name} has no position embeddings of the original's kind")
    net.__class__ = _OriginalPositions


def get_backbone(
    name: str,
    pretrained: bool = False,
    *,
    drop_path_rate: float = 0.0,
    patch_size: int | None = None,
    image_size: int | None = None,
    original_pos_embed: bool = False,
) -> nn.Module:
    """Build a backbone without classifier: (b, 3, h, w) to (b, output_dim), at any h and w.

    It has `.output_dim`, `.patch_size` (1 for convolutional networks; must divide h and w) and the
    parameter names of torchvision or timm. ResNets for an `image_size` up to 64 px get a 3x3 stem
    without max-pool, of stride 1 up to 32 px and 2 above. Raises ValueError for an unknown name
    (with close matches) or option, OSError where published weights cannot be loaded.
    """
    is_resnet = name in RESNETS or name == "resnet10_half"
    if not is_resnet and name not in TIMM_NAMES and not timm.is_model(name):
        known = [*RESNETS, "resnet10_half", *TIMM_NAMES, *timm.list_models()]
        close = ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.5)) or "none"
        raise ValueError(f"unknown arch {name!r}; close matches: {close}")
    if is_resnet and (drop_path_rate or patch_size):
        given = f"drop_path_rate={drop_path_rate}" if drop_path_rate else f"patch_size={patch_size}"
        raise ValueError(f"{name} has neither drop path nor patches, got {given}")
    sizes = {"patch_size": patch_size, "img_size": image_size}
    sizes = {key: size for key, size in sizes.items() if size is not None}
    try:
        if is_resnet:
            net = _resnet(name, pretrained, image_size)
        else:
            timm_name = TIMM_NAMES.get(name, name)
            net = _timm(timm_name, pretrained, drop_path_rate, **sizes)
    except (OSError, RuntimeError) as error:  # what hubs and URLs raise
        if not pretrained:
            raise
        reason = str(error).split("\n")[0]
        raise OSError(f"cannot load the published weights of {name}: {reason}") from error
    if original_pos_embed:
        _use_original_positions(net, name)
    if drop_path_rate:
        _share_drop_path(net)
    if name in TIMM_NAMES and not pretrained:
        nn.init.trunc_normal_(net.cls_token, std=0.02)  # the original's; timm's is 1e-6
    net.output_dim = getattr(net, "head_hidden_size", None) or net.num_features
    embed = getattr(net, "patch_embed", None)
    stride = getattr(getattr(embed, "proj", None), "stride", getattr(embed, "patch_size", 1))
    net.patch_size = stride[0] if isinstance(stride, tuple) else stride
    return net


WIDE = 1 << 22  # entries of a last layer: 16,384 prototypes of 256


class _WideProduct(torch.autograd.Function):
    """rows @ weight.T, forward by oneDNN's 1x1 convolution: 0.8 of MKL's time for many columns."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        pixels = rows[None, None].permute(0, 3, 1, 2)  # channels last without a copy
        return F.conv2d(pixels, weight[:, :, None, None]).permute(0, 2, 3, 1)[0, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ rows  # as fast as the convolution's, or faster


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
        # what torch's own weight_norm calls; F.normalize takes 4 times as long, with its gradient
        weight = torch._weight_norm(self.weight.float(), self.gain.float(), 0)
        is_plain = bottleneck.device.type == "cpu" and bottleneck.dtype == torch.float32
        is_plain = is_plain and bottleneck.ndim == 2 and not torch.is_autocast_enabled("cpu")
        if is_plain and weight.numel() >= WIDE:
            return _WideProduct.apply(bottleneck, weight)
        return F.linear(bottleneck, weight)


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
            norm = [nn.BatchNorm1d(hidden_dim)] if use_bn else []
            layers += [nn.Linear(width, hidden_dim), *norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        if use_weight_norm:  # either keeps nn.Linear's own initialisation, as in the original
            self.last_layer = PrototypeLayer(bottleneck_dim, output_dim, not norm_last_layer)
        else:
            self.last_layer = nn.Linear(bottleneck_dim, output_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        bottleneck = self.mlp(features).float()  # float32: the norm's squares overflow in fp16
        return self.last_layer(F.normalize(bottleneck, dim=-1))


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
        rate = config.drop_path_rate
        if rate is None:
            rate = 0.1 if config.arch in TIMM_NAMES else 0.0
        options = {"patch_size": config.patch_size, "image_size": config.image_size}
        options |= {"original_pos_embed": config.original_pos_embed, "drop_path_rate": rate}
        backbone = get_backbone(config.arch, config.pretrained, **options)
        dims = config.projection_hidden_dim, config.projection_bottleneck_dim
        kind = config.use_weight_norm, config.norm_last_layer, config.use_bn
        output_dim = config.projection_output_dim
        model = cls(backbone, DinoProjectionHead(backbone.output_dim, *dims, output_dim, *kind))
        model.config = config
        return model

    def forward(
        self, images: Tensor | Sequence[Tensor], return_backbone_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Project images (b, c, h, w) to (b, k), or v crops of b images each to (v, b, k).

        `return_backbone_features=True` gives (features, projections), features (b, d) or (v, b, d).
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
        """Give features (v, b, d) of v crops (b, c, h, w): one backbone call a crop size."""
        if not crops:
            raise ValueError("need >= 1 crop, got an empty list")
        views_of_size = defaultdict(list)
        for view, crop in enumerate(crops):
            views_of_size[crop.shape[-2:]].append(view)
        features = {}
        for views in views_of_size.values():
            of_size = self.backbone(torch.cat([crops[view] for view in views]))
            features |= zip(views, of_size.chunk(len(views)), strict=True)
        return torch.stack([features[view] for view in range(len(crops))])


@torch.no_grad()
def update_teacher_EMA(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Set the teacher's parameters to momentum * teacher + (1 - momentum) * student, in place.

    Parameters only: BatchNorm buffers follow the teacher's own forward passes, as in the original.
    Works on FSDP2's sharded parameters, each process on its shards. Section 3.1.
    """
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    pairs = [[p.to_local() if hasattr(p, "to_local") else p for p in pair] for pair in pairs]
    teachers, students = zip(*pairs, strict=True)
    torch._foreach_lerp_(list(teachers), list(students), 1 - momentum)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """Write a safetensors file with `texts` as metadata, whole or not at all: OSError, then."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata=texts)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (SafetensorError, OSError) as error:  # a full disk, say
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:  # a power cut may otherwise undo what was written, or the rename
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def load_tensors(
    path: str | Path, only_metadata: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: (tensors, metadata). Errors as load_checkpoint's."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = () if only_metadata else file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start == b"PK" or start[:1] == b"\x80":
            reason = "is a pickle, which can run code: need a .safetensors file"
        else:
            reason = f"is truncated or not a safetensors file: {error}"
        raise ValueError(f"{path} {reason}") from error


def save_checkpoint(
    path: str | Path,
    model: DinoModel,
    metadata: dict,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write `backbone.*` and `projection_head.*` with JSON metadata, atomically.

    `state_dict` gives the tensors where the model's own are sharded.
    """
    config = None if model.config is None else dataclasses.asdict(model.config)
    texts = {"model_config": json.dumps(config), "metadata": json.dumps(metadata)}
    save_tensors(path, model.state_dict() if state_dict is None else state_dict, texts)


def load_checkpoint(path: str | Path) -> tuple[DinoModel, dict]:
    """Rebuild what `save_checkpoint` wrote: (model in eval mode on the CPU, metadata).

    Nothing is unpickled. Raises FileNotFoundError, or ValueError for a file that is truncated, not
    safetensors, or not as save_checkpoint writes it.
    """
    tensors, texts = load_tensors(path)
    if not {"model_config", "metadata"} <= texts.keys():
        raise ValueError(f"{path} lacks the metadata of save_checkpoint: cannot tell its model")
    try:
        fields, metadata = json.loads(texts["model_config"]), json.loads(texts["metadata"])
        if fields is None:
            raise ValueError("it has a custom backbone: build it, then load the file's tensors")
        model = DinoModel.from_config(ModelConfig(**fields | {"pretrained": False}))
        model.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot rebuild the model of {path}: {reason}") from error
    return model.eval(), metadata
