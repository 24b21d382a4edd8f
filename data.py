"""Images in, augmented crops out: decode once in the workers, augment in batches on the device.

    dataset = build_dataset("path/to/images", canvas_size=384)  # uint8 canvases and true sizes
    multi_crop = MultiCrop(CropConfig())                        # works alone, in any project
    crops = multi_crop(images_uint8, sizes, keys)               # 2 of (b, 3, 224, 224), 8 of 96 px

Every random choice is a function of (seed, epoch, image, crop): there is no generator and no state,
so batch, worker, process and resumption change nothing. Stands alone: needs torch, torchvision and
einops. Source: DINO, arXiv 2104.14294. Axes: b batch, v views, n = v b, c h w image.
"""

import contextlib
import difflib
import hashlib
import io
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from einops import einsum, rearrange, repeat
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision.transforms.v2 import functional as TF

# ---------------------------------------------------------------- randomness without state

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants as signed 64-bit integers
MULTIPLIERS = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _mix(bits: Tensor) -> Tensor:
    """Scramble int64 bits by splitmix64's finaliser. Products wrap; masks make shifts logical."""
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * MULTIPLIERS[0]
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * MULTIPLIERS[1]
    return bits ^ (bits >> 31 & (1 << 33) - 1)


def hash_keys(*parts: int | Tensor) -> Tensor:
    """Hash integers and int64 tensors that broadcast, say (seed, epoch, index), to int64 keys."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _mix(key + GOLDEN + part)
    return key


def uniforms(keys: Tensor, num: int) -> Tensor:
    """Draw (b, num) float32 in [0, 1) for keys (b,); the first draws do not depend on `num`."""
    counters = GOLDEN * torch.arange(1, num + 1, device=keys.device)
    return (_mix(keys[:, None] + counters) >> 40 & (1 << 24) - 1) / (1 << 24)


def permutation(num: int, *parts: int) -> Tensor:
    """Give 0 to num - 1 in the order that the integers `parts` fix."""
    return hash_keys(*parts, torch.arange(num)).argsort()


def batch_factors(batch_size: int, world: int, accumulation_steps: int) -> str:
    """Say what a step's batch is made of, as `4 x 2 processes`."""
    factors = {"processes": world, "accumulation steps": accumulation_steps}
    return f"{batch_size}" + "".join(f" x {num} {x}" for x, num in factors.items() if num > 1)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Yield the (epoch, index) pairs of each micro-batch, from any step on, cut by rank.

    An epoch's order is one permutation for all ranks: a step takes its next images, whatever the
    processes and micro-batches that share them. What does not fill a last step is dropped. Raises
    ValueError where the data do not fill one.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, rank: int, world: int, steps: range,
        accumulation_steps: int = 1,
    ) -> None:  # fmt: skip
        self.num_images, self.batch_size, self.steps = num_images, batch_size, steps
        self.seed, self.rank, self.world, self.micro = seed, rank, world, accumulation_steps
        self.steps_per_epoch = num_images // (batch_size * world * accumulation_steps)
        if self.steps_per_epoch == 0:
            batch = batch_factors(batch_size, world, accumulation_steps)
            raise ValueError(f"need a batch of at most {num_images} images, the data; got {batch}")

    def __len__(self) -> int:
        return len(self.steps) * self.micro

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch = None
        for step in self.steps:
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch = epoch
                order = permutation(self.num_images, self.seed, epoch)
            for micro in range(batch * self.micro, (batch + 1) * self.micro):
                start = (micro * self.world + self.rank) * self.batch_size
                yield [(epoch, i) for i in order[start : start + self.batch_size].tolist()]


# ---------------------------------------------------------------- multi-crop


@dataclass(frozen=True)
class CropConfig:
    global_crop_size: int | None = None  # pixels [paper: 224]; None: by the images' own size
    local_crop_size: int | None = None  # pixels [paper: 96]; None: by the images' own size
    num_local_crops: int = 8  # besides the two global ones [paper: 8 or 10]; 0: no multi-crop
    global_crop_scale: tuple[float, float] = (0.4, 1.0)  # shares of the area [paper: 0.4 1]
    local_crop_scale: tuple[float, float] = (0.05, 0.4)  # shares of the area [paper: 0.05 0.4]
    flip_probability: float = 0.5  # of a horizontal flip [paper: 0.5]
    jitter_probability: float = 0.8  # of the next four together, in random order [paper: 0.8]
    brightness: float = 0.4  # factor within 1 +- this [paper: 0.4]
    contrast: float = 0.4  # factor within 1 +- this [paper: 0.4]
    saturation: float = 0.2  # factor within 1 +- this [paper: 0.2]
    hue: float = 0.1  # turn within +- this share of the colour circle [paper: 0.1]
    grayscale_probability: float = 0.2  # of losing all colour [paper: 0.2]
    # for first global, second global, local crops [paper: 1 0.1 0.5]; 0 for images of 32 px or so
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # spread of the blur in pixels [paper: 0.1 2]
    # of inverting the light half, for the same three kinds [paper: 0 0.2 0]
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB within 0..1 [ImageNet's]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # of RGB within 0..1 [ImageNet's]


def resolve_crop_sizes(config: CropConfig, image_size: int, patch_size: int = 1) -> CropConfig:
    """Fill in the crop sizes that are None, for images of `image_size` pixels (shorter side).

    Photographs get the paper's 224 and 96, small images their own size and half of it, each
    rounded up to whole patches. Raises ValueError for given sizes that are too small or that the
    patch does not divide.
    """
    own = image_size // 8 * 8 if image_size >= 32 else max(image_size, 16)
    global_size, local_size = config.global_crop_size, config.local_crop_size
    if global_size is None:
        global_size = math.ceil((224 if image_size >= 192 else own) / patch_size) * patch_size
    if local_size is None:
        local_size = 96 if global_size >= 192 else max(8, global_size // 2)
        local_size = math.ceil(local_size / patch_size) * patch_size
    for size in (global_size, local_size):
        if size < 8 or size % patch_size:
            multiple = f" that the patch of {patch_size} px divides" if patch_size > 1 else ""
            raise ValueError(f"need a crop size of at least 8 px{multiple}, got {size}")
    return replace(config, global_crop_size=global_size, local_crop_size=local_size)


def draw_boxes(draws: Tensor, sizes: Tensor, scale: tuple[float, float]) -> Tensor:
    """Draw boxes (n, 4) for images of sizes (n, 2) from draws (n, 22), as RandomResizedCrop does.

    A box is top, left, height, width in the image's whole pixels. Ten tries of area and aspect
    ratio are made at once, and the first that fits is taken; else the largest central box.
    """
    low, high = 3 / 4, 4 / 3  # aspect ratios, log-uniform
    height, width = sizes.float().split(1, dim=1)
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :10])
    aspects = (math.log(low) + math.log(high / low) * draws[:, 10:20]).exp()
    heights, widths = (areas / aspects).sqrt().round(), (areas * aspects).sqrt().round()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = (fits * torch.arange(10, 0, -1, device=draws.device)).argmax(dim=1, keepdim=True)
    found = fits.any(dim=1, keepdim=True)
    largest_height = height.minimum((width / low).round())
    largest_width = width.minimum((height * high).round())
    box_height = heights.gather(1, first).where(found, largest_height)
    box_width = widths.gather(1, first).where(found, largest_width)
    spare = torch.cat([height - box_height, width - box_width], dim=1)
    corner = (draws[:, 20:22] * (spare + 1)).where(found, spare / 2).floor()
    return torch.cat([corner, box_height, box_width], dim=1).long()


def boxes_on_canvas(boxes: Tensor, sizes: Tensor, canvas_size: int) -> Tensor:
    """Map boxes (n, 4) in images of sizes (n, 2) to whole pixels of their square canvases."""
    start = (boxes[:, :2] * canvas_size / sizes).round().clamp(max=canvas_size - 1)
    end = ((boxes[:, :2] + boxes[:, 2:]) * canvas_size / sizes).round()
    return torch.cat([start, (end - start).clamp(min=1)], dim=1).long()


def _resize_matrix(start: Tensor, length: Tensor, canvas_size: int, size: int) -> Tensor:
    """Weights (b, size, canvas_size) that resample pixels [start, start + length) to `size`.

    Antialiased bicubic with a = -0.5: the weights of PIL and of torchvision's antialias=True.
    """
    start, length = start[:, None, None], length[:, None, None]
    source = torch.arange(canvas_size, device=start.device)
    target = torch.arange(size, device=start.device)[:, None]
    scale = length / size
    center = start + (target + 0.5) * scale
    x = ((source + 0.5 - center) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((source >= start) & (source < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)


def _on_cpu(images: Tensor) -> bool:
    return images.device.type == "cpu"


def crops_by_matrices(images: Tensor, boxes: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Compute `resized_crops` as two matrix products an image, for what is fast at them."""
    canvases, crops = images.to(dtype), []
    for top, left, height, width in rearrange(boxes, "v b side -> v side b"):
        rows = _resize_matrix(top, height, images.shape[-1], size).to(dtype)
        columns = _resize_matrix(left, width, images.shape[-1], size).to(dtype)
        crops.append(einsum(rows, canvases, columns, "b i h, b c h w, b j w -> b c i j"))
    return torch.cat(crops).float().div_(255).clamp_(0, 1)


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Resize boxes (v, b, 4) of uint8 images (b, 3, s, s) to (v b, 3, size, size) in 0..1.

    Equals torchvision's resized_crop(antialias=True, BICUBIC): on the CPU by its uint8 resize, box
    by box; elsewhere by matrices, in float16 on a GPU, whose error is 0.03 of 255.
    """
    if not _on_cpu(images):
        dtype = torch.float16 if images.device.type == "cuda" else torch.float32
        return crops_by_matrices(images, boxes, size, dtype)
    crops = torch.empty(*boxes.shape[:2], 3, size, size)
    for view, view_boxes in enumerate(boxes.tolist()):
        for i, (top, left, height, width) in enumerate(view_boxes):
            region = images[i, :, top : top + height, left : left + width]
            crop = TF.resize(region, [size, size], TF.InterpolationMode.BICUBIC)
            torch.div(crop, 255, out=crops[view, i])
    return rearrange(crops, "v b c h w -> (v b) c h w")


def _where(mask: Tensor, change: Callable[..., Tensor], images: Tensor, *params: Tensor) -> Tensor:
    """Give change(images, *params) where mask (n,), and images elsewhere.

    On the CPU the masked ones are computed, one by one since one fits into its cache, in place;
    elsewhere all are, since picking some would make the host wait for the device.
    """
    if not _on_cpu(images):
        return torch.where(mask[:, None, None, None], change(images, *params), images)
    for i in mask.nonzero()[:, 0].tolist():
        images[i : i + 1] = change(images[i : i + 1], *(param[i : i + 1] for param in params))
    return images


def _grayscale(images: Tensor) -> Tensor:
    return TF.rgb_to_grayscale(images, num_output_channels=3)


def _blend(images: Tensor, factor: Tensor, kind: Tensor) -> Tensor:
    """Brightness, contrast or saturation (kind 0, 1, 2): a mix with black, mean grey or grey."""
    gray = TF.rgb_to_grayscale(images, num_output_channels=1)
    kind, factor = kind[:, None, None, None], factor[:, None, None, None]
    other = torch.where(kind == 1, gray.mean(dim=(1, 2, 3), keepdim=True), gray * (kind == 2))
    return (factor * images + (1 - factor) * other).clamp_(0, 1)


def _blend_one(image: Tensor, factor: float, kind: int) -> Tensor:
    """Compute `_blend` of one image (1, 3, h, w), in place, without what its kind does not need."""
    if kind == 0:
        return image.mul_(factor).clamp_(0, 1)
    gray = TF.rgb_to_grayscale(image, num_output_channels=1).mul_(1 - factor)
    return image.mul_(factor).add_(gray if kind == 2 else gray.mean()).clamp_(0, 1)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue (n,) of RGB images (n, 3, h, w) in 0..1 by a share of the colour circle."""
    red, green, blue = images.unbind(dim=1)
    value = red.maximum(green).maximum(blue)
    chroma = value - red.minimum(green).minimum(blue)
    scale = chroma.clamp(min=1e-12).reciprocal_()
    # the sign of what a channel lacks to the value tells the largest: on a CPU lerp by it takes a
    # fifth of the time of where and ==
    hue = (red - green).mul_(scale).add_(4)
    hue = torch.lerp((blue - red).mul_(scale).add_(2), hue, (value - green).sign_())
    hue = torch.lerp((green - blue).mul_(scale), hue, (value - red).sign_())
    hue = hue.add_(6 * turn[:, None, None])
    hue = hue.sub_((hue / 6).floor_(), alpha=6)
    # HSV to RGB: a channel is lowest within 1 of its place on the circle of 6, highest beyond 2
    turned = torch.empty_like(images)
    for channel, (lowest, again) in enumerate(((3, None), (5, 1 - hue), (1, hue - 5))):
        depth = (hue - lowest).abs_().neg_().add_(2)
        if again is not None:  # the other way round the circle
            depth = torch.maximum(depth, again)
        turned[:, channel] = torch.addcmul(value, chroma, depth.clamp_(0, 1), value=-1)
    return turned


def colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Apply brightness, contrast, saturation and hue to images (n, 3, h, w) in 0..1, in place.

    `factors` (n, 4) holds the three factors and the turn of the hue; `order` (n, 4) is each
    sample's permutation of 0 to 3, in which the four are applied.
    """
    if _on_cpu(images):
        for i, (kinds, values) in enumerate(zip(order.tolist(), factors.tolist(), strict=True)):
            image = images[i : i + 1]
            for kind in kinds:
                if kind == 3:
                    image = _turn_hue(image, factors[i : i + 1, 3])
                else:
                    image = _blend_one(image, values[kind], kind)
            images[i : i + 1] = image
        return images
    for kind in order.unbind(dim=1):
        factor = factors.gather(1, kind[:, None])[:, 0]
        images = _where(kind == 3, _turn_hue, images, factor)
        images = _where(kind != 3, _blend, images, factor, kind)
    return images


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur images (n, c, h, w) by sigma (n,) pixels, cut at `radius`; edges reflect."""
    n, c, height, width = images.shape
    radius = min(radius, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = (-0.5 * (offsets / sigma[:, None]) ** 2).exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    padded = F.pad(images, [radius] * 4, mode="reflect")
    if _on_cpu(images):  # where sums of shifted images take half the time of convolutions
        blurred = torch.zeros_like(images)
        for image, sums, taps in zip(padded, blurred, weights.tolist(), strict=True):
            rows = torch.zeros(c, height + 2 * radius, width)
            taps = [(i, tap) for i, tap in enumerate(taps) if tap > 1e-6]
            for i, tap in taps:
                rows.add_(image[:, :, i : i + width], alpha=tap)
            for i, tap in taps:
                sums.add_(rows[:, i : i + height], alpha=tap)
        return blurred
    weights = repeat(weights, "n taps -> (n c) 1 1 taps", c=c)
    rows = F.conv2d(rearrange(padded, "n c h w -> 1 (n c) h w"), weights, groups=n * c)
    blurred = F.conv2d(rows, weights.mT, groups=n * c)
    return rearrange(blurred, "1 (n c) h w -> n c h w", n=n)


def _solarize(images: Tensor) -> Tensor:
    return torch.where(images >= 128 / 255, 1 - images, images)


# Where each random choice of a crop stands among its draws
BOX, FLIP, JITTER, FACTORS, ORDER = slice(0, 22), 22, 23, slice(24, 28), slice(28, 32)
GRAY, BLUR, SIGMA, SOLARIZE, NUM_DRAWS = 32, 33, 34, 35, 36


class MultiCrop(nn.Module):
    """Cut and augment uint8 images into two global and some local crops, on whatever device.

    images (b, 3, s, s) are square canvases, sizes (b, 2) the true height and width in which boxes
    are drawn (None: square), keys (b,) int64 what fixes a sample's randomness. Gives float32 crops
    (b, 3, size, size), normalised, global ones first. Section 3.1; order as in the original.
    """

    def __init__(self, config: CropConfig) -> None:
        super().__init__()
        self.config = config = resolve_crop_sizes(config, image_size=224)
        if config.num_local_crops < 0:
            raise ValueError(f"need num_local_crops >= 0, got {config.num_local_crops}")
        for low, high in (config.global_crop_scale, config.local_crop_scale):
            if not 0 < low <= high <= 1:
                raise ValueError(f"need crop scales 0 < low <= high <= 1, got {low} {high}")
        if not 0 < config.blur_sigma[0] <= config.blur_sigma[1]:
            raise ValueError(f"need blur_sigma 0 < low <= high, got {config.blur_sigma}")
        self.num_views = 2 + config.num_local_crops
        blur, solarize = config.blur_probability, config.solarize_probability
        constants = {
            "jitter": [config.brightness, config.contrast, config.saturation, config.hue],
            "blur": [*blur[:2], *[blur[2]] * config.num_local_crops],
            "solarize": [*solarize[:2], *[solarize[2]] * config.num_local_crops],
            "mean": [[[value]] for value in config.mean],
            "std": [[[value]] for value in config.std],
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, sizes: Tensor | None, keys: Tensor) -> list[Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != images.shape[-2]:
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"need uint8 images (b, 3, s, s), got {given}")
        if sizes is None:
            sizes = torch.full((len(images), 2), images.shape[-1], device=images.device)
        draws = uniforms(keys, self.num_views * NUM_DRAWS)
        draws = rearrange(draws, "b (v draw) -> v b draw", v=self.num_views)
        config = self.config
        kinds = [(slice(0, 2), config.global_crop_size, config.global_crop_scale)]
        if config.num_local_crops:
            local = slice(2, self.num_views)
            kinds.append((local, config.local_crop_size, config.local_crop_scale))
        return [crop for kind in kinds for crop in self._crops(images, sizes, draws, *kind)]

    def _crops(
        self, images: Tensor, sizes: Tensor, draws: Tensor, views: slice, size: int,
        scale: tuple[float, float],
    ) -> list[Tensor]:  # fmt: skip
        num_views = views.stop - views.start
        draws = rearrange(draws[views], "v b draw -> (v b) draw")
        sizes = repeat(sizes, "b side -> (v b) side", v=num_views)
        blur, solarize = (
            repeat(probability[views], "v -> (v b)", b=len(images))
            for probability in (self.blur, self.solarize)
        )
        boxes = boxes_on_canvas(draw_boxes(draws[:, BOX], sizes, scale), sizes, images.shape[-1])
        pixels = resized_crops(
            images, rearrange(boxes, "(v b) side -> v b side", v=num_views), size
        )
        return list(self._augment(pixels, draws, blur, solarize).chunk(num_views))

    def _augment(self, pixels: Tensor, draws: Tensor, blur: Tensor, solarize: Tensor) -> Tensor:
        """Change crops (n, 3, h, w) in 0..1 by draws (n, draw), in place, and normalise them."""
        config = self.config
        pixels = _where(draws[:, FLIP] < config.flip_probability, TF.horizontal_flip, pixels)
        factors = (2 * draws[:, FACTORS] - 1) * self.jitter
        factors = torch.cat([factors[:, :3] + 1, factors[:, 3:]], dim=1)
        order = draws[:, ORDER].argsort(dim=1)
        is_jittered = draws[:, JITTER] < config.jitter_probability
        pixels = _where(is_jittered, colour_jitter, pixels, factors, order)
        pixels = _where(draws[:, GRAY] < config.grayscale_probability, _grayscale, pixels)
        low, high = config.blur_sigma
        sigma = low + (high - low) * draws[:, SIGMA]
        radius = math.ceil(3 * config.blur_sigma[1])
        pixels = _where(draws[:, BLUR] < blur, partial(gaussian_blur, radius=radius), pixels, sigma)
        pixels = _where(draws[:, SOLARIZE] < solarize, _solarize, pixels)
        return pixels.sub_(self.mean).div_(self.std)

    def compile(self) -> None:
        """Fuse the changes of colour by torch.compile, where there is a C compiler.

        For a GPU: on a CPU they are made crop by crop, each by its own draws.
        """
        # as laid out: channels last would take depthwise convolutions from their own kernels
        options = {"layout_optimization": False}
        self._augment = torch.compile(self._augment, dynamic=False, options=options)


def crops_of(
    batch: "Sample",
    multi_crop: MultiCrop,
    seed: int,
    device: torch.device,
    stream: torch.cuda.Stream | None = None,
) -> list[Tensor]:
    """Move a batch to the device and give its crops, by keys of (seed, epoch, index).

    On a GPU's other stream they are computed while the step before still runs.
    """
    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        images, sizes, epoch, index = (
            part.to(device, non_blocking=True)
            for part in (batch.image, batch.size, batch.epoch, batch.index)
        )
        crops = multi_crop(images, sizes, hash_keys(seed, epoch, index))
    if stream is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for crop in crops:  # else their memory could be taken again while the step reads it
            crop.record_stream(current)
    return crops


# ---------------------------------------------------------------- patterns


PATTERNS = ("stripes", "checks", "dots", "rings", "waves", "grid", "bricks", "honeycomb")
PATTERNS += ("crosses", "triangles")


def draw_patterns(index: Tensor, size: int = 48) -> Tensor:
    """Draw textures (n, 3, size, size) uint8 of ten classes; index % 10 is the class in PATTERNS.

    Angle, scale, phase and near-grey colours are random in the index, so that only the structure
    tells the class.
    """
    draws = uniforms(hash_keys(index), 12)
    angle, scale, right, down = rearrange(draws[:, :4], "n draw -> draw n 1 1")
    angle, cells = math.pi / 4 * (angle - 0.5), 3 + 2.5 * scale
    pixel = torch.arange(0.5, size) / size
    x = cells * (pixel * angle.cos() - pixel[:, None] * angle.sin() + right)
    y = cells * (pixel * angle.sin() + pixel[:, None] * angle.cos() + down)

    def cell(position: Tensor, period: float = 1.0) -> Tensor:  # the offset from the nearest center
        return (position / period - (position / period).round()) * period

    u, v = cell(x), cell(y)
    near, far, radius = u.abs().minimum(v.abs()), u.abs().maximum(v.abs()), u.hypot(v)
    brick = cell(x + y.round() % 2, period=2.0)
    row, shifted = cell(y, 3**0.5), cell(y - 3**0.5 / 2, 3**0.5)
    shifted_u = cell(x - 0.5)
    nearer = u.hypot(row) < shifted_u.hypot(shifted)
    hex_x, hex_y = u.where(nearer, shifted_u).abs(), row.where(nearer, shifted).abs()
    figures = [  # signed distances in cells, positive inside
        0.25 - u.abs(),
        (math.pi * x).sin() * (math.pi * y).sin() / 3,
        0.3 - radius,
        0.1 - (radius - 0.33).abs(),
        0.25 - cell(x + 0.3 * (math.pi * y).sin()).abs(),
        far - 0.38,
        (v.abs() - 0.38).maximum(brick.abs() - 0.88),
        hex_x.maximum(hex_x / 2 + hex_y * 3**0.5 / 2) - 0.4,
        (0.42 - far).minimum(0.13 - near),
        (v + 0.3).minimum(0.4 - v - 1.7 * u.abs()),
    ]
    figure = sum(f * (index % 10 == i)[:, None, None] for i, f in enumerate(figures))
    figure = (0.5 + figure * size / cells).clamp(0, 1)[:, None]  # edges one pixel soft
    levels = 0.1 * rearrange(draws[:, 4:6], "n two -> two n 1 1 1")
    tints = 0.04 * rearrange(draws[:, 6:12] - 0.5, "n (two c) -> two n c 1 1", two=2)
    dark, light = 0.2 + levels[0] + tints[0], 0.65 + levels[1] + tints[1]
    return (255 * torch.lerp(dark, light, figure)).round().to(torch.uint8)


# ---------------------------------------------------------------- images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# name: torchvision class, then the keywords of what trains, what k-NN remembers and what tests it
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": True}, {"train": False}),
    "food101": ("Food101", {"split": "train"}, {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "train"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train"}, {"split": "train"}, {"split": "val"}),
}
SPLITS = ("train", "memory", "test")


class Sample(NamedTuple):
    image: Tensor  # (3, s, s) uint8
    size: Tensor  # (2,) int64, the true height and width
    label: int  # -1 without classes
    epoch: int
    index: int
    source: int  # the image that was read: another than `index` where that one is unreadable


class ImageDataset(Dataset):
    """Read images[i], a path, PIL image or uint8 tensor (3, h, w), as `transform` lays it out.

    An item is asked for by its index or by (epoch, index). `labels` is None without classes. What
    cannot be decoded is replaced by the next of the epoch's order, by `seed`, that can.
    """

    def __init__(
        self, images: Sequence, labels: np.ndarray | None, classes: Sequence[str] | None = None
    ) -> None:
        self.images, self.labels, self.seed = images, labels, 0
        self.classes = classes  # the labels' names, where they have any
        self.transform: Callable[[Tensor], Tensor] = torch.nn.Identity()
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that needed it last

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        source, image = self._read(epoch, index)
        label = -1 if self.labels is None else int(self.labels[source])
        size = torch.tensor(image.shape[1:])
        return Sample(self.transform(image), size, label, epoch, index, source)

    def _decode(self, index: int) -> Tensor:
        try:
            return decode(self.images[index])
        except OSError as error:  # of torchvision's sets, which open files themselves
            raise ValueError(f"cannot decode image {index}: {error}") from error

    def _read(self, epoch: int, index: int) -> tuple[int, Tensor]:
        try:
            return index, self._decode(index)
        except ValueError as error:
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, permutation(len(self), self.seed, epoch).numpy()
            order, first_error = self._order[1], error
        place = int((order == index).argmax())
        for source in np.roll(order, -place)[1:].tolist():
            try:
                return source, self._decode(source)
            except ValueError:
                continue
        raise ValueError(f"none of {len(self)} images is readable: {first_error}") from first_error

    def why_unreadable(self, index: int) -> str:
        """Give the error that reading an image raises, with its path."""
        try:
            self._decode(index)
        except ValueError as error:
            # names that are no UTF-8 cannot be printed everywhere
            return str(error).encode("utf-8", "backslashreplace").decode()
        return f"cannot decode image {index}: it could not be read, and now it can"

    def typical_size(self) -> tuple[int, int]:
        """Give the median shorter and longer side in pixels, of up to 64 images across the set."""
        step = max(1, len(self) // 64)
        sides = [sorted(self._read(0, i)[1].shape[1:]) for i in range(0, len(self), step)]
        short, long = np.median(sides, axis=0).astype(int).tolist()
        return short, long

    def fingerprint(self) -> str:
        """Hash the images' names and labels; a folder that was moved keeps its own."""
        text = hashlib.sha256(str(len(self)).encode())
        if hasattr(self.images, "members"):  # of tars
            text.update(b"\n".join(self.images.members["names"].tolist()))
        elif isinstance(self.images, np.ndarray):  # sorted paths: what all begin with is the folder
            root = os.path.commonpath([os.path.dirname(self.images[i]) for i in (0, -1)])
            text.update(b"\n".join(path[len(root) :] for path in self.images.tolist()))
        if self.labels is not None:
            text.update(self.labels.astype(np.int64).tobytes())
        return text.hexdigest()[:16]


def decode(image: object) -> Tensor:
    """Give (3, h, w) uint8 RGB of a path (bytes), a tar's member, a PIL image, (PIL image, label).

    The first frame of an animation, turned as EXIF says, without transparency, 16 bits to their
    upper 8. Raises ValueError with the name where a file cannot be decoded, or has more than twice
    Pillow's MAX_IMAGE_PIXELS (179 million).
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, tuple):
        image = image[0]
    if isinstance(image, Image.Image):
        return TF.pil_to_tensor(image.convert("RGB"))
    # np.bytes_ too: an array of paths is one block for all workers
    name = os.fsdecode(image) if isinstance(image, bytes) else str(image)
    try:
        content = Path(name).read_bytes() if isinstance(image, bytes) else image.read()
        with Image.open(io.BytesIO(content)) as opened:  # reads the header alone
            return _decode_opened(opened, content)
    except Exception as error:  # decoders raise whatever a broken file makes them
        reason = str(error).replace(repr(name), "").strip(" :")
        raise ValueError(f"cannot decode {name}: {reason}") from error


def _decode_opened(image: Image.Image, content: bytes) -> Tensor:
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        with contextlib.suppress(RuntimeError, AttributeError):  # or a torchvision without it
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            turns = "exif" in image.info
            return torchvision.io.decode_jpeg(encoded, "RGB", apply_exif_orientation=turns)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return TF.pil_to_tensor(image.convert("RGB"))


def to_canvas(image: Tensor, size: int) -> Tensor:
    """Resize (3, h, w) uint8 to the square canvas (3, size, size), whatever its aspect ratio."""
    return TF.resize(image, [size, size], TF.InterpolationMode.BICUBIC)


def collate(samples: list[Sample]) -> Sample:
    """Make a batch of samples, images (b, 3, s, s) in the decoders' memory format, channels last.

    For 384 px that takes a tenth of the time of a copy to another layout.
    """
    rows = [sample._replace(image=sample.image.permute(1, 2, 0)) for sample in samples]
    batch = default_collate(rows)
    return batch._replace(image=batch.image.permute(0, 3, 1, 2))


def center_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Resize the shorter side of (3, h, w) uint8 to `resize`, then cut the central square."""
    most = 8 * min(image.shape[1:])  # of a strip of 20,000 x 10, only the middle is enlarged
    if max(image.shape[1:]) > most:
        image = TF.center_crop(image, [min(side, most) for side in image.shape[1:]])
    image = TF.resize(image, [resize], TF.InterpolationMode.BICUBIC)
    return TF.center_crop(image, [size, size])


class _Found(NamedTuple):
    """What a folder, a tar or a folder of tars holds."""

    images: Sequence  # paths as bytes, or TarImages
    classes: np.ndarray | None  # (n,) names, where all images have one


def _walk(folder: Path) -> dict[str, np.ndarray]:
    """List a folder's images, sorted, and all folders that were looked into."""
    folders, paths = [], []
    for parent, _, files in os.walk(folder, followlinks=True):
        folders.append(parent)
        paths += [
            os.path.join(parent, file)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
        ]
    texts = {"paths": sorted(paths), "folders": folders}
    return {key: np.array([os.fsencode(x) for x in values]) for key, values in texts.items()}


def _scan(source: Path, index_folder: Path | None) -> _Found:
    """Find the images in a folder, a tar or a folder of tars, and the class of each.

    Which is its first sub-folder, where no image lies above one; in tars, what scan_tars says.
    """
    tars = [source] if source.is_file() else sorted(source.glob("*.tar"))
    if tars:
        from tar_shards import TarImages, scan_tars  # here, since this file works without it

        members = _indexed(source, index_folder, partial(scan_tars, tars, IMAGE_SUFFIXES))
        classes = np.char.decode(members.pop("classes"), "utf-8", "surrogateescape")
        found = _Found(TarImages(members), classes if all(classes) else None)
    else:
        paths = _indexed(source, index_folder, partial(_walk, source))["paths"]
        names = [os.fsdecode(path[len(os.fsencode(source)) + 1 :]) for path in paths.tolist()]
        names = [name.split(os.sep) for name in names]
        is_flat = any(len(name) == 1 for name in names)
        found = _Found(paths, None if is_flat else np.array([name[0] for name in names]))
    if not len(found.images):
        kinds = ", ".join(IMAGE_SUFFIXES[:4])
        raise ValueError(f"no images in {source}: need files like {kinds}, or tars of them")
    return found


def _indexed(
    source: Path, index_folder: Path | None, scan: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Give what `scan` finds, or what it found before where no file or folder has changed since.

    It is kept in `index_folder` where it took more than a second, or read tars.
    """
    file = None
    if index_folder is not None:
        name = hashlib.sha256(os.fsencode(os.path.abspath(source))).hexdigest()[:16]
        file = index_folder / f"{name}.npz"
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(file) as arrays:
                found = dict(arrays)
            if np.array_equal(found.pop("stamps"), _stamps(found)):
                return found
    start = time.monotonic()
    found = scan()
    if file is not None and ("tars" in found or time.monotonic() - start > 1):
        with contextlib.suppress(OSError):  # it saves time, no more
            index_folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
            np.savez(temporary, stamps=_stamps(found), **found)
            os.replace(temporary, file)
    return found


def index_folder(run_folder: Path) -> Path:
    """Give the folder beside a run's own that keeps what long scans of data found."""
    return run_folder.absolute().parent / ".index"


def _stamps(found: dict[str, np.ndarray]) -> np.ndarray:
    """Give size and time of change of what was looked into: adding to a folder changes them."""
    paths = found["tars"] if "tars" in found else found["folders"]
    stats = [os.stat(path) for path in paths.tolist()]
    return np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats])


def _folder(root: Path, split: str, index_folder: Path | None) -> ImageDataset:
    def part(*names: str) -> Path | None:
        places = (root / f"{name}{kind}" for name in names for kind in ("", ".tar"))
        return next((place for place in places if place.exists()), None)

    train, test = part("train") or root, part("val", "test")
    has_test = train != root and test is not None
    found = _scan(train, index_folder)
    kinds = None if found.classes is None else np.unique(found.classes)
    if split == "test" and has_test:
        found = _scan(test, index_folder)
        has_classes = kinds is not None and found.classes is not None
        unknown = np.setdiff1d(found.classes, kinds) if has_classes else []
        if len(unknown):
            raise ValueError(f"{test} has classes that {train} lacks: {', '.join(unknown[:5])}")
    elif split != "train" and not has_test:
        rows = np.flatnonzero(held_out(len(found.images)) == (split == "test"))
        found = _Found(found.images[rows], found.classes if kinds is None else found.classes[rows])
    if kinds is None or found.classes is None:
        return ImageDataset(found.images, None)
    labels = np.searchsorted(kinds, found.classes)
    return ImageDataset(found.images, labels, kinds.tolist())


def held_out(num_images: int) -> np.ndarray:
    """Give a boolean mask of a fixed tenth of the images, at least one."""
    order = permutation(num_images, 0).numpy()
    return np.isin(np.arange(num_images), order[: max(1, num_images // 10)])


def _torchvision_set(name: str, split: str) -> ImageDataset:
    class_name, *keywords = TORCHVISION_SETS[name]
    make = getattr(torchvision.datasets, class_name)
    try:
        images = make("datasets", download=True, **keywords[SPLITS.index(split)])
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name} is not in datasets/ and did not download: {reason}") from error
    names = ("targets", "labels", "_labels")
    labels = next((getattr(images, name) for name in names if hasattr(images, name)), None)
    labels = np.array([label for _, label in images._samples] if labels is None else labels)
    names = getattr(images, "classes", None)  # Imagenette's are tuples of synonyms
    names = names and [name if isinstance(name, str) else name[0] for name in names]
    return ImageDataset(images, labels, names)


def build_dataset(
    data: str,
    split: str = "train",
    canvas_size: int | None = None,
    index_folder: Path | None = None,
) -> ImageDataset:
    """Open `patterns`, a torchvision set by name, or a folder, a tar or a folder of tars.

    Splits: `train`; `memory` and `test`, the labelled images that k-NN remembers and is tested on.
    A folder with train/ and val/ or test/, or tars so called, has them so; of any other a fixed
    tenth is the test. `canvas_size` resizes each image to a square canvas; `index_folder` keeps
    what a long scan found. Raises ValueError for unknown data, a folder without images and, but for
    `train`, images without classes.
    """
    if data == "patterns":
        num_images, first = (1000, 1 << 32) if split == "test" else (2000, 0)
        index = torch.arange(first, first + num_images)
        dataset = ImageDataset(draw_patterns(index), (index % 10).numpy(), PATTERNS)
    elif data in TORCHVISION_SETS:
        dataset = _torchvision_set(data, split)
    elif Path(data).is_dir() or (data.endswith(".tar") and Path(data).is_file()):
        dataset = _folder(Path(data), split, index_folder)
    else:
        known = ["patterns", *TORCHVISION_SETS]
        close = difflib.get_close_matches(data, known, n=2)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise ValueError(
            f"no such data {data!r}{hint}: need a folder, a .tar or one of {', '.join(known)}"
        )
    if split != "train" and dataset.labels is None:
        raise ValueError(f"no class folders in the {split} images of {data}: k-NN needs labels")
    if not len(dataset):
        raise ValueError(f"no images are left to {split} with in {data}: need at least 2")
    if canvas_size is not None:
        dataset.transform = partial(to_canvas, size=canvas_size)
    return dataset
