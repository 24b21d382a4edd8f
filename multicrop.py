"""Multi-crop: uint8 images in, augmented float crops out, in batches on whatever device they are.

    multi_crop = MultiCrop(CropConfig()).to(images_uint8.device)
    keys = hash_keys(seed, epoch, index)            # (b,) int64, what fixes a sample's randomness
    crops = multi_crop(images_uint8, sizes, keys)   # 2 of (b, 3, 224, 224), then 8 of 96 px

Every random choice is a function of (key, crop, choice): there is no generator and no state, so
batch, worker, process and resumption change nothing. Stands alone: needs torch, torchvision and
einops. Source: DINO, arXiv 2104.14294. Axes: b batch, v views, n = v b, c h w image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

# ---------------------------------------------------------------- randomness without state

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants as signed 64-bit integers
MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def _shifted_right(bits: Tensor, num: int) -> Tensor:
    """Return int64 bits shifted right with zeros coming in, where >> would repeat the sign."""
    zeros_come_in = (1 << 64 - num) - 1
    return bits >> num & zeros_come_in


def _mix(bits: Tensor) -> Tensor:
    """Return int64 bits scrambled by splitmix64's finaliser; its products wrap, as int64's do."""
    bits = (bits ^ _shifted_right(bits, 30)) * MULTIPLIER_1
    bits = (bits ^ _shifted_right(bits, 27)) * MULTIPLIER_2
    return bits ^ _shifted_right(bits, 31)


def hash_keys(*parts: int | Tensor) -> Tensor:
    """Return int64 keys: the hash of integers and int64 tensors that broadcast.

    hash_keys(seed, epoch, index) with an `index` of shape (b,) has shape (b,).
    """
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _mix(key + GOLDEN + part)
    return key


def uniforms(keys: Tensor, num: int) -> Tensor:
    """Draw (b, num) float32 in [0, 1) for keys (b,); the first draws do not depend on `num`."""
    counters = GOLDEN * torch.arange(1, num + 1, device=keys.device)
    bits = _mix(keys[:, None] + counters)
    return _shifted_right(bits, 40) / (1 << 24)  # the upper 24 bits: as many as float32 holds


# ---------------------------------------------------------------- multi-crop


PAPER_BLUR = (1.0, 0.1, 0.5)  # probabilities in the first large, second large and small crops
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# what a setting's numbers may be; without "above", they are at least 0
SHARE = {"most": 1}
PIXELS = {"above": 0, "most": 4096}


@dataclass(frozen=True)
class CropConfig:
    # pixels, side of the two large crops [paper: 224]; None: by the images' own size
    global_crop_size: int | None = field(default=None, metadata=PIXELS)
    # pixels, side of the small crops [paper: 96]; None: by the images' own size
    local_crop_size: int | None = field(default=None, metadata=PIXELS)
    # small crops besides the two large ones [paper: 8 or 10]; 0: no multi-crop
    num_local_crops: int = field(default=8, metadata={"most": 100})
    # least and largest share of the image's area in a large crop [paper: 0.4 1]
    global_crop_scale: tuple[float, float] = field(default=(0.4, 1.0), metadata=SHARE)
    # least and largest share of the image's area in a small crop [paper: 0.05 0.4]
    local_crop_scale: tuple[float, float] = field(default=(0.05, 0.4), metadata=SHARE)
    # probability of a horizontal flip [paper: 0.5]
    flip_probability: float = field(default=0.5, metadata=SHARE)
    # probability of a vertical flip, for images that have no up: 0.5 [paper: 0]
    vertical_flip: float = field(default=0.0, metadata=SHARE)
    # turn each crop by 0, 90, 180 or 270 degrees at random, for images that have no up
    quarter_turns: bool = False
    # probability of changing brightness, contrast and, of RGB, saturation and hue, in random order
    # [paper: 0.8]
    jitter_probability: float = field(default=0.8, metadata=SHARE)
    # brightness is multiplied by 1 - this to 1 + this [paper: 0.4]
    brightness: float = field(default=0.4, metadata=SHARE)
    # contrast is multiplied by 1 - this to 1 + this [paper: 0.4]
    contrast: float = field(default=0.4, metadata=SHARE)
    # saturation is multiplied by 1 - this to 1 + this; RGB alone [paper: 0.2]
    saturation: float = field(default=0.2, metadata=SHARE)
    # hue is turned either way by up to this share of the colour circle; RGB alone [paper: 0.1]
    hue: float = field(default=0.1, metadata=SHARE)
    # probability of losing all colour; RGB alone [paper: 0.2]
    grayscale_probability: float = field(default=0.2, metadata=SHARE)
    # probability of a blur in the first large, the second large and the small crops
    # [paper: 1 0.1 0.5]; None: the paper's; without a recipe, 0 where large crops have less
    # than 64 px, since it would erase what they show
    blur_probability: tuple[float, float, float] | None = field(default=None, metadata=SHARE)
    # pixels, least and largest standard deviation of the blur [paper: 0.1 2]
    blur_sigma: tuple[float, float] = field(default=(0.1, 2.0), metadata={"above": 0, "most": 100})
    # probability of inverting the light half, in the same three kinds of crops [paper: 0 0.2 0]
    solarize_probability: tuple[float, float, float] = field(
        default=(0.0, 0.2, 0.0), metadata=SHARE
    )
    # mean of each channel within 0..1, which is subtracted; None: ImageNet's for RGB, else measured
    # on some training images
    mean: tuple[float, ...] | None = field(default=None, metadata=SHARE)
    # standard deviation of each channel, which is divided by; None: as the mean
    std: tuple[float, ...] | None = field(default=None, metadata={"above": 0, "most": 1})


def resolve_crop_sizes(config: CropConfig, image_size: int, patch_size: int = 1) -> CropConfig:
    """Return the config with its crop sizes filled in, for images of `image_size` pixels.

    `image_size` is the shorter side. Photographs, from 192 px on, get the paper's 224 and 96;
    smaller images their own size, rounded down to a multiple of 8 from 32 px on and at least 16,
    and half of it. Each is rounded up to whole patches. Crops below 64 px are not blurred unless
    the config says so. Raises ValueError for a size below 8 px or no multiple of the patch;
    the local size counts only where there are local crops.
    """

    def whole_patches(size: int) -> int:
        return math.ceil(size / patch_size) * patch_size

    global_size, local_size = config.global_crop_size, config.local_crop_size
    if global_size is None:
        if image_size >= 192:
            global_size = whole_patches(224)
        elif image_size >= 32:
            global_size = whole_patches(image_size // 8 * 8)
        else:
            global_size = whole_patches(max(image_size, 16))
    if local_size is None:
        local_size = whole_patches(96 if global_size >= 192 else max(8, global_size // 2))
    sizes = {"--global-crop-size": global_size}
    if config.num_local_crops:
        sizes["--local-crop-size"] = local_size
    for flag, size in sizes.items():
        if size < 8 or size % patch_size:
            text = f"need {flag} of at least 8 px"
            if patch_size > 1:
                fitting = whole_patches(max(8, size))
                text += f" that the patch of {patch_size} px divides, such as {fitting}"
            raise ValueError(f"{text}, got {size}")
    blur = config.blur_probability
    if blur is None:
        blur = PAPER_BLUR if global_size >= 64 else (0.0, 0.0, 0.0)
    return replace(
        config,
        global_crop_size=global_size,
        local_crop_size=local_size,
        blur_probability=blur,
    )


def draw_boxes(draws: Tensor, sizes: Tensor, scale: tuple[float, float]) -> Tensor:
    """Return boxes (n, 4) for images of sizes (n, 2) from draws (n, 22), as RandomResizedCrop does.

    A box is top, left, height, width in the image's whole pixels. Ten tries are made at once: ten
    draws are for areas, ten for aspect ratios (width / height), and two for the corner. The first
    try that fits is taken; where none does, the largest central box.
    """
    low, high = 3 / 4, 4 / 3  # of the aspect ratio, whose logarithm is uniform
    height, width = sizes.float().split(1, dim=1)
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :10])
    aspects = (math.log(low) + math.log(high / low) * draws[:, 10:20]).exp()
    heights, widths = (areas / aspects).sqrt().round(), (areas * aspects).sqrt().round()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first_fit = fits.int().argmax(dim=1, keepdim=True)  # of equal numbers it takes the first
    has_fit = fits.any(dim=1, keepdim=True)
    largest_height = height.minimum((width / low).round())
    largest_width = width.minimum((height * high).round())
    box_height = heights.gather(1, first_fit).where(has_fit, largest_height)
    box_width = widths.gather(1, first_fit).where(has_fit, largest_width)
    spare = torch.cat([height - box_height, width - box_width], dim=1)
    corner = (draws[:, 20:22] * (spare + 1)).where(has_fit, spare / 2).floor()
    return torch.cat([corner, box_height, box_width], dim=1).long()


def boxes_on_canvas(boxes: Tensor, sizes: Tensor, canvas_size: int) -> Tensor:
    """Return boxes (n, 4), given in images of sizes (n, 2), in whole pixels of square canvases."""
    start = (boxes[:, :2] * canvas_size / sizes).round().clamp(max=canvas_size - 1)
    end = ((boxes[:, :2] + boxes[:, 2:]) * canvas_size / sizes).round()
    return torch.cat([start, (end - start).clamp(min=1)], dim=1).long()


def _resize_matrix(start: Tensor, length: Tensor, canvas_size: int, size: int) -> Tensor:
    """Return weights (b, size, canvas_size) that resample [start, start + length) to `size` pixels.

    Antialiased bicubic with a = -0.5: the weights of Pillow and of torchvision's antialias=True.
    """
    start, length = start[:, None, None], length[:, None, None]
    source = torch.arange(canvas_size, device=start.device)
    target = torch.arange(size, device=start.device)[:, None]
    scale = length / size
    center = start + (target + 0.5) * scale
    x = ((source + 0.5 - center) / scale.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((source >= start) & (source < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)


def _on_cpu(images: Tensor) -> bool:
    return images.device.type == "cpu"


def crops_by_matrices(images: Tensor, boxes: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return what `resized_crops` does by two matrix products an image, in which GPUs are fast."""
    canvases = images.to(dtype)
    crops = []
    for top, left, height, width in rearrange(boxes, "v b side -> v side b"):
        rows = _resize_matrix(top, height, images.shape[-1], size).to(dtype)
        columns = _resize_matrix(left, width, images.shape[-1], size).to(dtype)
        crops.append(einsum(rows, canvases, columns, "b i h, b c h w, b j w -> b c i j"))
    return torch.cat(crops).float().div_(255).clamp_(0, 1)


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return boxes (v, b, 4) of uint8 images (b, c, s, s), resized: (v b, c, size, size) in 0..1.

    Equals torchvision's resized_crop(antialias=True, BICUBIC). On a CPU it is that, box by box.
    Elsewhere it is done by matrix products, on a GPU in float16 with a mean error of 0.03 of 255.
    """
    if not _on_cpu(images):
        dtype = torch.float16 if images.device.type == "cuda" else torch.float32
        return crops_by_matrices(images, boxes, size, dtype)
    crops = torch.empty(*boxes.shape[:2], images.shape[1], size, size)
    for view, view_boxes in enumerate(boxes.tolist()):
        for i, (top, left, height, width) in enumerate(view_boxes):
            region = images[i : i + 1, :, top : top + height, left : left + width]
            # what TF.resize calls, without the 60 microseconds that it adds to each crop
            crop = F.interpolate(region, size=(size, size), mode="bicubic", antialias=True)
            torch.div(crop[0], 255, out=crops[view, i])
    return rearrange(crops, "v b c h w -> (v b) c h w")


# Numbers in a block of images: 1 MiB in float32, which stays in a cache from one operation
# to the next. Of 2^13 to 2^20, 2^17 and 2^18 were fastest on an AMD EPYC, at 32 to 224 px.
BLOCK = 1 << 18


def _where(mask: Tensor, change: Callable[..., None], images: Tensor, *params: Tensor) -> Tensor:
    """Return images (n, c, h, w), of which those where mask (n,) is true are changed.

    `change(images, *params)` changes in place what it is given. On a CPU that is only those images,
    in blocks that fit into its cache, and the result is `images` itself. Elsewhere it is a copy of
    all, since to pick some of them the host would wait for the device.
    """
    if not _on_cpu(images):
        changed = images.clone()
        change(changed, *params)
        return torch.where(mask[:, None, None, None], changed, images)
    rows = mask.nonzero()[:, 0]
    block_size = BLOCK // images[0].numel()
    if block_size <= 1:  # one by one and without a copy
        for i in rows.tolist():
            change(images[i : i + 1], *(param[i : i + 1] for param in params))
        return images
    for block in rows.split(block_size):
        # copies whole rows, in a fifth of the time of images[block]
        due = images.index_select(0, block)
        change(due, *(param[block] for param in params))
        images.index_copy_(0, block, due)
    return images


def _gray(images: Tensor) -> Tensor:
    """Return images (n, c, h, w) in grey, (n, 1, h, w): of other channels than RGB their mean."""
    if images.shape[1] == 3:
        return TF.rgb_to_grayscale(images, num_output_channels=1)
    return images.mean(dim=1, keepdim=True)


# Each of these changes images (n, c, h, w) in 0..1 in place.


def _flip(images: Tensor) -> None:
    images.copy_(images.flip(dims=(3,)))


def _flip_vertically(images: Tensor) -> None:
    images.copy_(images.flip(dims=(2,)))


def _quarter_turn(images: Tensor) -> None:
    images.copy_(images.rot90(1, dims=(2, 3)))


def _half_turn(images: Tensor) -> None:
    images.copy_(images.flip(dims=(2, 3)))


def _remove_colour(images: Tensor) -> None:
    images.copy_(_gray(images))


def _change_brightness(images: Tensor, factor: Tensor) -> None:
    """Mix images with black: multiply them by their factor (n,)."""
    images.mul_(factor[:, None, None, None]).clamp_(0, 1)


def _change_contrast(images: Tensor, factor: Tensor) -> None:
    """Mix images with their mean grey, by their factor (n,)."""
    factor = factor[:, None, None, None]
    mean_gray = _gray(images.mean(dim=(2, 3), keepdim=True))
    images.mul_(factor).add_(mean_gray * (1 - factor)).clamp_(0, 1)


def _change_saturation(images: Tensor, factor: Tensor) -> None:
    """Mix images with themselves in grey, by their factor (n,)."""
    images.lerp_(_gray(images), 1 - factor[:, None, None, None]).clamp_(0, 1)


def _turn_hue(images: Tensor, turn: Tensor) -> None:
    """Turn the hue of RGB images by shares (n,) of the colour circle.

    Hues lie on a circle of 6, from -3 to 3: red is 0, green 2, blue -2, which is also 4. A channel
    is value - chroma * clamp(distance - 1, 0, 1): the distance is that of the turned hue from the
    channel's own, round the circle. Hues and distances are computed times chroma, so that nothing
    is divided and greys need no care.
    """
    red, green, blue = images.unbind(dim=1)
    value = red.maximum(green).maximum(blue)
    least = red.minimum(green).minimum(blue)
    chroma = value - least
    # Where the least channel is 0 and the largest 1, the hue is 1 + green + blue - red, or less
    # than 0 by as much where there is more blue than green. Here it is that times chroma.
    hue = (green + blue).sub_(red).sub_(least).add_(chroma)
    hue.copysign_(green - blue)
    value_plus_chroma = value + chroma
    for channel, own_hue in enumerate((0, 2, 4)):
        # Each pixel's hue stays, and the channel's own hue is turned back instead. The distance
        # from it round the circle is |distance from the opposite hue - 3|: no modulo a pixel.
        opposite = (own_hue - 6 * turn) % 6 - 3  # (n,), from -3 to 3
        to_opposite = torch.addcmul(hue, chroma, opposite[:, None, None], value=-1).abs_()
        distance = to_opposite.sub_(chroma, alpha=3).abs_()
        # value - chroma * clamp(distance - 1, 0, 1), written as one clamp
        images[:, channel].copy_(value_plus_chroma).sub_(distance).clamp_(least, value)


# in the order of a sample's factors
COLOUR_CHANGES = (_change_brightness, _change_contrast, _change_saturation, _turn_hue)


def colour_jitter(images: Tensor, is_jittered: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Return float32 images (n, c, h, w) in 0..1, changed in brightness, contrast, saturation, hue.

    Those where `is_jittered` (n,) is true are changed. `factors` (n, 4) holds three factors and the
    turn of the hue. `order` (n, 4) is each sample's permutation of 0 to 3, the order in which the
    four are applied. Images of other channels than RGB keep saturation and hue. On a CPU the images
    are changed in place.
    """
    changes = COLOUR_CHANGES if images.shape[1] == 3 else COLOUR_CHANGES[:2]
    for kinds in order.unbind(dim=1):
        for kind, change in enumerate(changes):
            is_due = is_jittered & (kinds == kind)
            images = _where(is_due, change, images, factors[:, kind])
    return images


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Return images (n, c, h, w) blurred by sigma (n,) pixels; cut at `radius`, edges reflect."""
    n, c, height, width = images.shape
    radius = min(radius, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = (-0.5 * (offsets / sigma[:, None]) ** 2).exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    padded = F.pad(images, [radius] * 4, mode="reflect")
    if _on_cpu(images):  # sums of shifted images take half the time of convolutions there
        blurred = torch.zeros_like(images)
        for image, sums, taps in zip(padded, blurred, weights.tolist(), strict=True):
            rows = torch.zeros(c, height + 2 * radius, width)
            seen_taps = [(i, tap) for i, tap in enumerate(taps) if tap > 1e-6]
            for i, tap in seen_taps:
                rows.add_(image[:, :, i : i + width], alpha=tap)
            for i, tap in seen_taps:
                sums.add_(rows[:, i : i + height], alpha=tap)
        return blurred
    weights = repeat(weights, "n taps -> (n c) 1 1 taps", c=c)
    rows = F.conv2d(rearrange(padded, "n c h w -> 1 (n c) h w"), weights, groups=n * c)
    blurred = F.conv2d(rows, weights.mT, groups=n * c)
    return rearrange(blurred, "1 (n c) h w -> n c h w", n=n)


def _blur(images: Tensor, sigma: Tensor, radius: int) -> None:
    images.copy_(gaussian_blur(images, sigma, radius))


def _solarize(images: Tensor) -> None:
    """Invert what is lighter than the middle."""
    is_light = (images >= 128 / 255).to(images.dtype)
    images.lerp_(1 - images, is_light)  # on a CPU four times as fast as torch.where


# Where each random choice of a crop stands among the crop's draws
BOX = slice(0, 22)
FLIP = 22
JITTER = 23
FACTORS = slice(24, 28)
ORDER = slice(28, 32)
GRAY = 32
BLUR = 33
SIGMA = 34
SOLARIZE = 35
NUM_DRAWS = 36
# Hashed from keys of their own, so that these options leave all other draws as they were
VERTICAL_FLIP = 0
QUARTER_TURN = 1
HALF_TURN = 2
NUM_TURN_DRAWS = 3


class MultiCrop(nn.Module):
    """Cut and augment uint8 images into two global and some local crops, on whatever device.

    multi_crop(images, sizes, keys) takes images (b, c, s, s), which are square canvases; sizes
    (b, 2), the true heights and widths in which boxes are drawn (None: square); and keys (b,)
    int64, which fix each sample's randomness. It returns float32 crops (b, c, size, size),
    normalised, the global ones first. Section 3.1; changes are made in the original's order.
    Images have as many channels as the config's mean has numbers. Without one they are RGB.
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
        mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
        self.num_channels = len(mean)
        if len(std) != len(mean):
            raise ValueError(f"need a std for each mean, got {len(std)} for {len(mean)}")
        # buffers, so that they follow the module to its device
        constants = {
            "jitter": [config.brightness, config.contrast, config.saturation, config.hue],
            "blur": self._of_views(config.blur_probability),
            "solarize": self._of_views(config.solarize_probability),
            "mean": [[[value]] for value in mean],
            "std": [[[value]] for value in std],
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def _of_views(self, probabilities: tuple[float, float, float]) -> list[float]:
        """Return the probability of each view: of first global, second global, all local crops."""
        first, second, local = probabilities
        return [first, second] + [local] * self.config.num_local_crops

    @torch.no_grad()
    def forward(self, images: Tensor, sizes: Tensor | None, keys: Tensor) -> list[Tensor]:
        shape, channels = tuple(images.shape), self.num_channels
        is_square = len(shape) == 4 and shape[1] == channels and shape[2] == shape[3]
        if images.dtype != torch.uint8 or not is_square:
            given = f"{images.dtype} of shape {shape}"
            raise ValueError(f"need uint8 images (b, {channels}, s, s), got {given}")
        if sizes is None:
            sizes = torch.full((len(images), 2), images.shape[-1], device=images.device)
        keys = keys.to(images.device)
        draws = uniforms(keys, self.num_views * NUM_DRAWS)
        draws = rearrange(draws, "b (v draw) -> v b draw", v=self.num_views)
        config = self.config
        if config.vertical_flip or config.quarter_turns:
            of_turns = uniforms(hash_keys(keys), self.num_views * NUM_TURN_DRAWS)
            of_turns = rearrange(of_turns, "b (v draw) -> v b draw", v=self.num_views)
            draws = torch.cat([draws, of_turns], dim=2)
        crops = self._crops_of_views(
            images,
            sizes,
            draws,
            views=slice(0, 2),
            crop_size=config.global_crop_size,
            scale=config.global_crop_scale,
        )
        if config.num_local_crops:
            crops += self._crops_of_views(
                images,
                sizes,
                draws,
                views=slice(2, self.num_views),
                crop_size=config.local_crop_size,
                scale=config.local_crop_scale,
            )
        return crops

    def _crops_of_views(
        self,
        images: Tensor,
        sizes: Tensor,
        draws: Tensor,
        views: slice,
        crop_size: int,
        scale: tuple[float, float],
    ) -> list[Tensor]:
        """Return the crops of some views, all of one size, from draws (v, b, draw) of all views."""
        num_views = views.stop - views.start
        draws = rearrange(draws[views], "v b draw -> (v b) draw")
        sizes = repeat(sizes, "b side -> (v b) side", v=num_views)
        blur = repeat(self.blur[views], "v -> (v b)", b=len(images))
        solarize = repeat(self.solarize[views], "v -> (v b)", b=len(images))
        boxes = boxes_on_canvas(draw_boxes(draws[:, BOX], sizes, scale), sizes, images.shape[-1])
        boxes = rearrange(boxes, "(v b) side -> v b side", v=num_views)
        pixels = resized_crops(images, boxes, crop_size)
        return list(self._augment(pixels, draws, blur, solarize).chunk(num_views))

    def _augment(self, pixels: Tensor, draws: Tensor, blur: Tensor, solarize: Tensor) -> Tensor:
        """Change crops (n, c, h, w) in 0..1, in place, as draws (n, draw) say; normalise them.

        `blur` and `solarize` (n,) are the probabilities of these changes.
        """
        config = self.config
        pixels = _where(draws[:, FLIP] < config.flip_probability, _flip, pixels)
        turn_draws = draws[:, NUM_DRAWS:]
        if config.vertical_flip:
            is_flipped = turn_draws[:, VERTICAL_FLIP] < config.vertical_flip
            pixels = _where(is_flipped, _flip_vertically, pixels)
        if config.quarter_turns:
            pixels = _where(turn_draws[:, QUARTER_TURN] < 0.5, _quarter_turn, pixels)
            pixels = _where(turn_draws[:, HALF_TURN] < 0.5, _half_turn, pixels)
        changes = (2 * draws[:, FACTORS] - 1) * self.jitter  # each from -jitter to jitter
        # brightness, contrast and saturation are multiplied by 1 + theirs, the hue is turned by its
        factors = torch.cat([changes[:, :3] + 1, changes[:, 3:]], dim=1)
        order = draws[:, ORDER].argsort(dim=1)
        is_jittered = draws[:, JITTER] < config.jitter_probability
        pixels = colour_jitter(pixels, is_jittered, factors, order)
        if self.num_channels == 3:
            is_gray = draws[:, GRAY] < config.grayscale_probability
            pixels = _where(is_gray, _remove_colour, pixels)
        low, high = config.blur_sigma
        sigma = low + (high - low) * draws[:, SIGMA]
        radius = math.ceil(3 * config.blur_sigma[1])
        pixels = _where(draws[:, BLUR] < blur, partial(_blur, radius=radius), pixels, sigma)
        pixels = _where(draws[:, SOLARIZE] < solarize, _solarize, pixels)
        return pixels.sub_(self.mean).div_(self.std)

    def use_torch_compile(self) -> None:
        """Fuse the changes of colour by torch.compile from now on; needs a C compiler.

        For a GPU: on a CPU each is made of those crops alone that drew it.
        """
        # in channels-last layout, depthwise convolutions would not get their own kernels
        options = {"layout_optimization": False}
        self._augment = torch.compile(self._augment, dynamic=False, options=options)
