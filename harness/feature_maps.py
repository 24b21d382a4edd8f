"""What a backbone sees: its class token's attention, its feature map, their components as colours.

    attention = patch_map(class_attention(backbone, images), backbone, images)  # (b, head, h, w)
    maps = feature_map(backbone, images)                                        # (b, d, h, w)
    colours = PCA.of_maps(list(maps)).colours(maps[0])                          # (h, w, 3) uint8

Stands alone: needs torch, torchvision, timm and einops. Source: DINO, arXiv 2104.14294.
Axes: b batch, n vectors, d features, p tokens, c h w image or map.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

MOST_VECTORS = 10_000  # of feature maps, that a PCA is fitted to
PHOTO_SIDE = 480  # pixels, shorter side of photographs whose maps are made, as the original has it
PHOTO_CROP = 192  # pixels, the least crop in training that is of photographs
MIN_CELLS = 14  # on the shorter side of a map: fewer show no shape
COARSEST = 64  # pixels, the largest cell that images are enlarged for


def has_class_attention(backbone: nn.Module) -> bool:
    """Tell whether the last block is timm's plain attention, with a class token."""
    is_vit = isinstance(backbone, VisionTransformer) and backbone.has_class_token
    return is_vit and type(getattr(backbone.blocks[-1], "attn", None)) is Attention


@torch.no_grad()
def class_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the class token's attention (b, head, p) to all tokens in the last block.

    Fused attention returns no weights: they are computed again from its queries and keys.
    """
    attention = backbone.blocks[-1].attn
    seen: list[Tensor] = []

    def note(norm: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen.append(output)

    # queries are normalised before keys; without norm these modules are identities
    hooks = [norm.register_forward_hook(note) for norm in (attention.q_norm, attention.k_norm)]
    try:
        backbone.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    queries, keys = seen
    query, keys = queries[:, :, 0].float(), keys.float()  # of the class token
    return (attention.scale * einsum(query, keys, "b head d, b head p d -> b head p")).softmax(-1)


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


def usual_side(backbone: nn.Module, crop_size: int) -> int:
    """Return the shorter side in pixels of images that maps are made of, by the training crop's.

    480 for photographs, as the original has it. Small images are enlarged until MIN_CELLS cells lie
    on it, where the network takes other sizes than its own.
    """
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


def _num_cells(backbone: nn.Module, size: int) -> int:
    """Return the cells of a feature map on a side of a square image."""
    side = max(1, round(size / backbone.patch_size)) * backbone.patch_size
    device = next(backbone.parameters()).device
    return feature_map(backbone, torch.zeros(1, 3, side, side, device=device)).shape[-1]


def fixed_sides(backbone: nn.Module) -> list[int] | None:
    """Return the only height and width that a network takes, None where it takes others, too."""
    embed = getattr(backbone, "patch_embed", None)
    return list(embed.img_size) if getattr(embed, "strict_img_size", False) else None


def resize_to_patches(
    image: Tensor, size: int, backbone: nn.Module, longer_multiple: int = 1
) -> Tensor:
    """Return (3, h, w) uint8 whose shorter side is `size`, both rounded to whole patches.

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
def sizes_named(images: Tensor) -> Iterator[None]:
    """Raise ValueError naming the size of images (b, 3, h, w) that a network does not take."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        given = f"{images.shape[2]} x {images.shape[3]} px"
        raise ValueError(f"no map of images of {given}: {' '.join(str(error).split())}") from error


def fit_patches(image: Tensor, size: int, patch_size: int) -> Tensor:
    """Return (3, h, w) uint8 whose shorter side is `size`, rounded to whole patches, aspect kept.

    What is left of the longer side is cut; strips of more than 8 to 1 are cut to that.
    """
    longest = 8 * min(image.shape[1:])
    if max(image.shape[1:]) > longest:
        image = TF.center_crop(image, [min(side, longest) for side in image.shape[1:]])
    shorter = max(1, round(size / patch_size)) * patch_size
    image = TF.resize(image, [shorter], TF.InterpolationMode.BICUBIC)
    return TF.center_crop(image, [side // patch_size * patch_size for side in image.shape[1:]])


def mass_mask(attention: Tensor, mass: float) -> Tensor:
    """Return a mask of the fewest patches of (h, w) that hold the share `mass` of all attention."""
    shares = attention.double() / attention.double().sum()
    order = shares.flatten().argsort(descending=True)
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
