"""What a backbone sees: its class token's attention, its feature map, their components as colours.

    attention = patch_map(class_attention(backbone, images), backbone, images)  # (b, head, h, w)
    maps = feature_map(backbone, images)                                        # (b, d, h, w)
    colours = PCA.of_maps(list(maps)).colours(maps[0])                          # (h, w, 3) uint8

Stands alone: needs torch, torchvision, timm, einops and NumPy. Source: DINO, arXiv 2104.14294.
Axes: b batch, n vectors, d features, p tokens, c h w image or map.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import functional as TF

# attentions of timm's that call torch's fused one with their queries and keys: of ViT, DeiT and
# DINOv2; of ViTs with rotary positions; of BEiT; of CaiT and XCiT; of EVA and DINOv3
READABLE = (Attention, AttentionRope, BeitAttention, ClassAttn, EvaAttention, RelPosAttention)
MOST_VECTORS = 10_000  # of feature maps, that a PCA is fitted to
PHOTO_SIDE = 480  # pixels, shorter side of photographs whose maps are made, as the original has it
PHOTO_CROP = 192  # pixels, the least crop of an evaluation that is of photographs
MIN_CELLS = 14  # on the shorter side of a map: fewer show no shape
COARSEST = 64  # pixels, the largest cell that images are enlarged for
# parts of messages of RuntimeErrors that do not say that a network refuses a size
MACHINE_ERRORS = ("DefaultCPUAllocator", "cuDNN error", "CUBLAS_STATUS", "MPS backend")


def _last_attention(backbone: nn.Module) -> nn.Module | None:
    """Return the last attention that the class token takes part in, None where there is none."""
    for name in ("cls_attn_blocks", "blocks_token_only", "blocks"):  # of XCiT, of CaiT, of others
        blocks = getattr(backbone, name, None)
        if blocks:
            return getattr(blocks[-1], "attn", None)
    return None


def why_no_class_attention(backbone: nn.Module) -> str:
    """Return why a class token's attention cannot be shown: a predicate; nothing where it can."""
    if getattr(backbone, "cls_token", None) is None:
        return "has no class token"
    attention = _last_attention(backbone)
    if attention is None:
        return "has a class token, but no last block whose attention could be read"
    if type(attention) not in READABLE:
        return f"has attention of another kind in its last block: {type(attention).__name__}"
    return ""


def why_attention_is_untrained(backbone: nn.Module) -> str:
    """Return why DINO does not train a class token's attention: a predicate; nothing if it does."""
    if getattr(backbone, "global_pool", "") in ("avg", "avgmax", "max"):
        return "pools its patches: a run of DINO does not train its class token's last attention"
    return ""


class _LastFusedAttention(TorchFunctionMode):
    """Note the queries, keys and bias that fused attention is computed of, the last time."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.queries, self.keys = args[:2]
            self.bias = kwargs.get("attn_mask")  # BEiT's, by the relative position
        return function(*args, **kwargs)


@torch.no_grad()
def class_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the class token's attention (b, head, p) to all tokens in the last block.

    Fused attention returns no weights: they are computed again from what it is called with, which
    has the position embedding of each kind of ViT in it. The class token is the first in all.
    """
    attention = _last_attention(backbone)
    was_fused = attention.fused_attn
    attention.fused_attn = True
    try:
        with _LastFusedAttention() as noted:
            backbone.forward_features(images)
    finally:
        attention.fused_attn = was_fused
    query, keys = noted.queries[:, :, 0].float(), noted.keys.float()  # of the class token
    scores = query.shape[-1] ** -0.5 * einsum(query, keys, "b head d, b head p d -> b head p")
    if noted.bias is not None:
        scores = scores + noted.bias[:, :, 0].float()
    return scores.softmax(dim=-1)


def patch_map(tokens: Tensor, backbone: nn.Module, images: Tensor) -> Tensor:
    """Return tokens (b, k, p) laid out on the patches, (b, k, h, w), prefix tokens left out."""
    height, width = (side // backbone.patch_size for side in images.shape[2:])
    patches = tokens[..., getattr(backbone, "num_prefix_tokens", 0) :]
    if patches.shape[2] != height * width:
        raise ValueError(f"need {height} x {width} patch tokens, got {patches.shape[2]}")
    return rearrange(patches, "b k (h w) -> b k h w", h=height)


@torch.no_grad()
def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the last feature map (b, d, h, w): a ViT's patches after the norm, a CNN's last stage.

    Raises ValueError where its layout is unknown.
    """
    if hasattr(backbone, "forward_features"):
        features = backbone.forward_features(images)
    else:  # torchvision's ResNets, without pooling and classifier
        features = nn.Sequential(*list(backbone.children())[:-2])(images)
    shape, width = tuple(features.shape), backbone.num_features
    if len(shape) == 3 and shape[2] == width:  # tokens
        return patch_map(features.mT, backbone, images)
    if len(shape) == 4 and shape[3] == width and getattr(backbone, "output_fmt", "") == "NHWC":
        return rearrange(features, "b h w d -> b d h w")
    if len(shape) == 4 and shape[1] == width:
        return features
    raise ValueError(f"need a feature map of {width} channels, got shape {shape}")


def generalised_mean(features: Tensor, power: float) -> Tensor:
    """Return (b, d) of features (b, d, ...): of power 1 their mean, of a large one their largest.

    Negative ones count as 0.
    """
    positive = features.flatten(start_dim=2).clamp(min=1e-6)
    return (positive**power).mean(dim=2) ** (1 / power)


def fixed_sides(backbone: nn.Module) -> list[int] | None:
    """Return the only height and width that a network takes, None where it takes others, too."""
    embed = getattr(backbone, "patch_embed", None)
    return list(embed.img_size) if getattr(embed, "strict_img_size", False) else None


def usual_side(backbone: nn.Module, crop_size: int) -> int:
    """Return the shorter side in pixels of images that maps are made of, by evaluations' crop.

    480 for photographs, as the original has it. Small images are enlarged until MIN_CELLS cells lie
    on it, where the network takes other sizes than its own.
    """
    fixed = fixed_sides(backbone)
    if fixed:
        return min(fixed)
    usual = PHOTO_SIDE if crop_size >= PHOTO_CROP else crop_size
    size = usual
    try:
        while (num_cells := _num_cells(backbone, size)) < MIN_CELLS:
            size = math.ceil(size * MIN_CELLS / num_cells)
            if size > MIN_CELLS * COARSEST:
                return usual
    except (AssertionError, RuntimeError, ValueError):  # what networks raise at other sizes
        return usual
    return size


def chosen_side(backbone: nn.Module, crop_size: int, given: int | None) -> int:
    """Return the shorter side that is given, or the usual one, in whole patches.

    Raises ValueError where the network takes another side alone.
    """
    usual = usual_side(backbone, crop_size)
    if not fixed_sides(backbone):
        return _whole_patches(given or usual, backbone.patch_size)
    if given is not None and given != usual:
        raise ValueError(f"need --size {usual}, as the network takes no other, got {given}")
    return usual


def _whole_patches(size: int, patch_size: int) -> int:
    """Return a side in pixels, rounded to whole patches, of which it has at least one."""
    return max(1, round(size / patch_size)) * patch_size


def _num_cells(backbone: nn.Module, size: int) -> int:
    """Return the cells of a feature map on a side of a square image."""
    side = _whole_patches(size, backbone.patch_size)
    device = next(backbone.parameters()).device
    channels = getattr(backbone, "num_channels", 3)
    blank = torch.zeros(1, channels, side, side, device=device)
    return feature_map(backbone, blank).shape[-1]


def resize_to_patches(
    image: Tensor, size: int, backbone: nn.Module, longer_multiple: int = 1
) -> Tensor:
    """Return (c, h, w) uint8 whose shorter side is `size`, both rounded to whole patches.

    Nothing is cut, so that a map of it covers the whole image: the aspect ratio changes a little.
    The longer side is rounded down, to a multiple of `longer_multiple` patches. A network that
    takes one size only gets that.
    """
    shorter, longer = sorted(image.shape[1:])
    num_shorter = max(1, round(size / backbone.patch_size))
    num_longer = int(num_shorter * longer / shorter) // longer_multiple * longer_multiple
    sides = [num * backbone.patch_size for num in (num_shorter, max(num_shorter, num_longer))]
    sides = sides if image.shape[1] <= image.shape[2] else sides[::-1]
    return TF.resize(image, fixed_sides(backbone) or sides, TF.InterpolationMode.BICUBIC)


@contextmanager
def sizes_named(arch: str, images: Tensor) -> Iterator[None]:
    """Raise ValueError naming the size of images (b, c, h, w) that a network does not take."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        if any(part in str(error) for part in MACHINE_ERRORS):
            raise
        given = f"{arch} at {images.shape[2]} x {images.shape[3]} px"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"no features of {given}: {reason}") from error


def fit_patches(image: Tensor, size: int, patch_size: int) -> Tensor:
    """Return (c, h, w) uint8 whose shorter side is `size`, rounded to whole patches, aspect kept.

    What is left of the longer side is cut; strips of more than 8 to 1 are cut to that.
    """
    longest = 8 * min(image.shape[1:])
    if max(image.shape[1:]) > longest:
        image = TF.center_crop(image, [min(side, longest) for side in image.shape[1:]])
    shorter = _whole_patches(size, patch_size)
    image = TF.resize(image, [shorter], TF.InterpolationMode.BICUBIC)
    return TF.center_crop(image, [side // patch_size * patch_size for side in image.shape[1:]])


def mass_mask(attention: Tensor, mass: float) -> Tensor:
    """Return a mask of the fewest patches of (h, w) that hold the share `mass` of all attention."""
    shares = attention.double() / attention.double().sum()
    order = shares.flatten().argsort(descending=True)
    # the patches whose sum is still too small, and the one that completes it; 1e-9 is for rounding
    num = int((shares.flatten()[order].cumsum(0) < mass - 1e-9).sum()) + 1
    mask = torch.zeros(shares.shape, dtype=torch.bool)
    mask.view(-1)[order[:num]] = True
    return mask


def peak(attention: Tensor) -> float:
    """Return what is drawn brightest: above the 99th percentile a few patches hide all others."""
    return attention.quantile(0.99).clamp(min=1e-12).item()


class PCA(NamedTuple):
    mean: Tensor  # (d,)
    axes: Tensor  # (k, d), of norm 1
    shares: list[float]  # (k,) of the variance
    bounds: Tensor  # (2, k), between which 96 % of the vectors lie

    @classmethod
    def fit(cls, vectors: Tensor, num: int) -> "PCA":
        """Fit `num` components to (n, d), each signed so that its largest entry is positive."""
        every = math.ceil(len(vectors) / MOST_VECTORS)
        vectors = vectors[::every].double()
        centered = vectors - vectors.mean(0)
        variances, axes = torch.linalg.eigh(centered.T @ centered)  # ascending
        axes = axes.T.flip(0)[:num]
        largest = axes.abs().argmax(1, keepdim=True)
        axes = axes * axes.gather(1, largest).sign()
        shares = (variances.flip(0)[:num] / variances.sum().clamp(min=1e-12)).tolist()
        bounds = (centered @ axes.T).quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
        return cls(vectors.mean(0).float(), axes.float(), shares, bounds.float())

    @classmethod
    def of_maps(cls, maps: Sequence[Tensor]) -> "PCA":
        return cls.fit(torch.cat([rearrange(x, "d h w -> (h w) d") for x in maps]), 3)

    def colours(self, features: Tensor) -> np.ndarray:
        """Return a feature map (d, h, w) as RGB (h, w, 3) uint8."""
        values = (rearrange(features, "d h w -> h w d") - self.mean) @ self.axes.T
        low, high = self.bounds
        share = (values - low) / (high - low).clamp(min=1e-6)
        return (255 * share.clamp(0, 1)).round().byte().numpy()
