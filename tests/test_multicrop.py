import colorsys
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import multicrop
from data import build_dataset
from multicrop import CropConfig, MultiCrop, hash_keys, uniforms

CONFIG = CropConfig(global_crop_size=32, local_crop_size=16, num_local_crops=3)


def photos(batch: int = 4, size: int = 40) -> Tensor:
    """Smooth random images (b, 3, size, size) uint8."""
    coarse = torch.rand(batch, 3, 6, 6)
    images = TF.resize(coarse, [size, size], InterpolationMode.BICUBIC).clamp(0, 1)
    return (255 * images).round().to(torch.uint8)


# ---------------------------------------------------------------- randomness


def splitmix64(state: int, num: int) -> list[int]:
    """The published generator, in Python's integers."""
    mask, out = (1 << 64) - 1, []
    for _ in range(num):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_uniforms_are_splitmix64() -> None:
    keys = torch.tensor([0, 1, -5, 1 << 62])
    for key, row in zip(keys.tolist(), uniforms(keys, 6), strict=True):
        assert row.tolist() == [(bits >> 40) / (1 << 24) for bits in splitmix64(key, 6)]


def test_uniforms_are_uniform_and_independent() -> None:
    draws = uniforms(hash_keys(0, 3, torch.arange(20_000)), 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(dim=0), torch.full((8,), 0.5), atol=0.01, rtol=0)
    correlation = torch.corrcoef(torch.cat([draws.T, draws[1:].T[:, :1].expand(8, 20_000)]))[:8, :8]
    assert (correlation - torch.eye(8)).abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([draws[1:, 0], draws[:-1, 0]]))[0, 1]
    assert abs(neighbours) < 0.03


def test_keys_depend_on_each_part_and_on_their_order() -> None:
    keys = {
        hash_keys(*parts).item() for parts in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1), (0, 1, 3)]
    }
    assert len(keys) == 5


# ---------------------------------------------------------------- crops


@pytest.mark.parametrize("size", [8, 24, 60])
def test_crop_equals_torchvisions_resized_crop(size: int) -> None:
    images = photos(5)
    boxes = torch.tensor(
        [[0, 0, 40, 40], [3, 5, 20, 31], [39, 39, 1, 1], [10, 0, 7, 40], [0, 8, 24, 24]]
    )
    crops = multicrop.resized_crops(images, boxes[None], size)
    for image, box, crop in zip(images, boxes.tolist(), crops, strict=True):
        expected = TF.resized_crop(
            image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True
        )
        torch.testing.assert_close((crop * 255).round().to(torch.uint8), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [8, 24, 60])
def test_crop_by_matrices_equals_torchvisions_float_crop(size: int) -> None:
    images = photos(4)
    boxes = torch.tensor([[0, 0, 40, 40], [3, 5, 20, 31], [10, 0, 7, 40], [38, 2, 2, 9]])
    crops = multicrop.crops_by_matrices(images, boxes[None], size, torch.float32)
    for image, box, crop in zip(images, boxes.tolist(), crops, strict=True):
        expected = TF.resized_crop(
            image.float(), *box, [size, size], InterpolationMode.BICUBIC, antialias=True
        )
        torch.testing.assert_close(crop * 255, expected.clamp(0, 255), rtol=0, atol=2e-3)


@pytest.mark.slow
def test_box_statistics_match_random_resized_crop() -> None:
    num, scale, ratio = 8000, (0.1, 0.7), (3 / 4, 4 / 3)
    for height, width in ((50, 50), (30, 90), (200, 20)):
        draws = uniforms(hash_keys(torch.arange(num)), 22)
        sizes = torch.tensor([height, width]).expand(num, 2)
        boxes = multicrop.draw_boxes(draws, sizes, scale).double()
        image = torch.zeros(1, height, width)
        expected = torch.tensor(
            [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(num)]
        ).double()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
        spread = expected.std(dim=0)
        # five standard errors of the difference of the means
        tolerance = 5 * spread * math.sqrt(2 / num) + 1e-9
        assert ((boxes.mean(dim=0) - expected.mean(dim=0)).abs() <= tolerance).all()
        torch.testing.assert_close(boxes.std(dim=0), spread, rtol=0.05, atol=0.05)


def test_boxes_map_to_the_canvas_in_proportion() -> None:
    sizes = torch.tensor([[100, 400], [300, 300], [2, 2000]])
    boxes = torch.tensor([[10, 100, 50, 200], [0, 0, 300, 300], [1, 1990, 1, 10]])
    mapped = multicrop.boxes_on_canvas(boxes, sizes, 200)
    assert mapped.tolist() == [[20, 50, 100, 100], [0, 0, 200, 200], [100, 199, 100, 1]]


# ---------------------------------------------------------------- colour


def test_each_colour_change_equals_torchvisions() -> None:
    images = photos(6, 20) / 255
    all_of_them = torch.ones(6, dtype=torch.bool)
    factors = torch.linspace(0.6, 1.4, 6)
    turns = torch.linspace(-0.1, 0.1, 6)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    params = [factors, factors, factors, turns]
    for kind, change in enumerate(adjust):
        # the neutral value of the other three
        values = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(6, 1)
        values[:, kind] = params[kind]
        order = torch.arange(4).repeat(6, 1)
        result = multicrop.colour_jitter(images.clone(), all_of_them, values, order)
        for image, value, mine in zip(images, params[kind].tolist(), result, strict=True):
            torch.testing.assert_close(mine, change(image, value), rtol=0, atol=2e-6)


def test_hue_turns_all_the_way_round() -> None:
    levels = [0.0, 0.2, 0.5, 1.0]
    colours = list(itertools.product(levels, repeat=3))  # greys, pure colours, ties of two channels
    turns = torch.linspace(-0.5, 0.5, 13)
    images = torch.tensor(colours).T.reshape(1, 3, 8, 8).repeat(13, 1, 1, 1)
    no_factors = torch.ones(13, 3)
    turned = multicrop.colour_jitter(
        images,
        torch.ones(13, dtype=torch.bool),
        torch.cat([no_factors, turns[:, None]], dim=1),
        torch.arange(4).repeat(13, 1),
    )
    for turn, image in zip(turns.tolist(), turned, strict=True):
        expected = []
        for colour in colours:
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
        torch.testing.assert_close(image.flatten(1).T, torch.tensor(expected), rtol=0, atol=2e-6)


def test_jitter_follows_each_samples_own_order() -> None:
    images = photos(6, 20) / 255
    order = torch.stack([torch.randperm(4) for _ in range(6)])
    factors = torch.cat([torch.rand(6, 3) + 0.5, torch.rand(6, 1) * 0.2 - 0.1], dim=1)
    all_of_them = torch.ones(6, dtype=torch.bool)
    result = multicrop.colour_jitter(images.clone(), all_of_them, factors, order)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for image, kinds, values, mine in zip(
        images, order.tolist(), factors.tolist(), result, strict=True
    ):
        for kind in kinds:
            image = adjust[kind](image, values[kind])
        torch.testing.assert_close(mine, image, rtol=0, atol=1e-5)


def test_blur_equals_torchvisions() -> None:
    images, sigmas = photos(5, 30) / 255, torch.tensor([0.1, 0.5, 1.0, 1.7, 2.0])
    for image, sigma, mine in zip(
        images, sigmas, multicrop.gaussian_blur(images, sigmas, 6), strict=True
    ):
        expected = TF.gaussian_blur(image, [13, 13], [sigma.item()] * 2)
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


def neutral(**changes: object) -> CropConfig:
    """One view of each kind of the whole image, changed by nothing but `changes`."""
    off = {
        "global_crop_size": 40,
        "local_crop_size": 40,
        "num_local_crops": 1,
        "global_crop_scale": (1.0, 1.0),
        "local_crop_scale": (1.0, 1.0),
        "flip_probability": 0.0,
        "jitter_probability": 0.0,
        "grayscale_probability": 0.0,
        "blur_probability": (0.0,) * 3,
        "solarize_probability": (0.0,) * 3,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    return CropConfig(**off | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda x: x),
        ({"flip_probability": 1.0}, TF.horizontal_flip),
        ({"grayscale_probability": 1.0}, lambda x: TF.rgb_to_grayscale(x, 3)),
        ({"solarize_probability": (1.0, 1.0, 1.0)}, lambda x: TF.solarize(x, 128 / 255)),
        (
            {"blur_probability": (1.0, 1.0, 1.0), "blur_sigma": (1.5, 1.5)},
            lambda x: TF.gaussian_blur(x, [11, 11], [1.5, 1.5]),
        ),
        (
            {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)},
            lambda x: TF.normalize(x, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]),
        ),
    ],
    ids=["none", "flip", "grayscale", "solarize", "blur", "normalise"],
)
def test_each_change_alone_equals_torchvisions(changes: dict, expected: object) -> None:
    images = photos(3)
    for crop in MultiCrop(neutral(**changes))(images, None, hash_keys(torch.arange(3))):
        torch.testing.assert_close(crop, expected(images / 255), rtol=0, atol=1e-5)


def test_probabilities_are_those_of_the_config() -> None:
    images = photos(1).expand(4000, 3, 40, 40)[:, :, :8, :8].contiguous()
    config = neutral(
        global_crop_size=8,
        local_crop_size=8,
        solarize_probability=(0.0, 0.2, 0.7),
        flip_probability=0.5,
        grayscale_probability=0.25,
    )
    crops = MultiCrop(config)(images, None, hash_keys(torch.arange(4000)))
    plain = images[0] / 255
    for crop, solarized in zip(crops, (0.0, 0.2, 0.7), strict=True):
        gray = (crop[:, 0] == crop[:, 1]).flatten(1).all(dim=1).float().mean()
        assert gray.item() == pytest.approx(0.25, abs=0.03)
        kept = [(crop == x).flatten(1).all(dim=1) for x in (plain, TF.horizontal_flip(plain))]
        assert kept[0].float().mean().item() == pytest.approx(
            0.75 * 0.5 * (1 - solarized), abs=0.03
        )
        assert kept[1].float().mean().item() == pytest.approx(
            0.75 * 0.5 * (1 - solarized), abs=0.03
        )


# ---------------------------------------------------------------- multi-crop


def test_gives_global_crops_first_normalised_and_all_different() -> None:
    images = photos(1).expand(3, 3, 40, 40)
    crops = MultiCrop(CONFIG)(images, None, hash_keys(torch.arange(3)))
    assert [tuple(crop.shape) for crop in crops] == [(3, 3, 32, 32)] * 2 + [(3, 3, 16, 16)] * 3
    assert all(crop.dtype == torch.float32 for crop in crops)
    for same_size in (crops[:2], crops[2:]):
        rows = torch.cat(same_size).flatten(1)
        distance = torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows))
        assert distance.min() > 1e-3


def test_crops_depend_on_the_key_alone() -> None:
    images, keys = photos(6), hash_keys(7, 2, torch.arange(6))
    sizes = torch.tensor([[80, 40], [40, 40], [33, 90], [500, 375], [40, 41], [10, 10]])
    multi_crop = MultiCrop(CONFIG)
    whole = multi_crop(images, sizes, keys)
    order = torch.tensor([4, 0, 5])
    part = multi_crop(images[order], sizes[order], keys[order])
    for crop, again in zip(whole, part, strict=True):
        torch.testing.assert_close(crop[order], again, rtol=0, atol=0)
    fewer = MultiCrop(CropConfig(32, 16, num_local_crops=1))(images, sizes, keys)
    for crop, again in zip(whole, fewer, strict=False):
        torch.testing.assert_close(crop, again, rtol=0, atol=0)
    other = multi_crop(images, sizes, hash_keys(7, 3, torch.arange(6)))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_images_are_left_as_they_were() -> None:
    images = photos(2)
    before = images.clone()
    MultiCrop(CONFIG)(images, None, torch.arange(2))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CropConfig(4), "need --global-crop-size of at least 8 px, got 4"),
        (CropConfig(blur_sigma=(2.0, 0.1)), "need blur_sigma 0 < low <= high"),
        (CropConfig(num_local_crops=-1), "need num_local_crops >= 0, got -1"),
        (
            CropConfig(global_crop_scale=(0.5, 0.2)),
            "need crop scales 0 < low <= high <= 1, got 0.5 0.2",
        ),
    ],
)
def test_wrong_config_is_named(config: CropConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiCrop(config)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 3, 8, 9, dtype=torch.uint8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_named(images: Tensor) -> None:
    with pytest.raises(ValueError, match="need uint8 images"):
        MultiCrop(CONFIG)(images, None, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("image_size", "patch", "sizes"),
    [
        (500, 1, (224, 96)),
        (500, 14, (224, 98)),
        (48, 1, (48, 24)),
        (48, 16, (48, 32)),
        (32, 4, (32, 16)),
        (28, 1, (28, 14)),
        (96, 1, (96, 48)),
        (160, 16, (160, 80)),
    ],
)
def test_crop_sizes_follow_from_the_images(image_size: int, patch: int, sizes: tuple) -> None:
    config = multicrop.resolve_crop_sizes(CropConfig(), image_size, patch)
    assert (config.global_crop_size, config.local_crop_size) == sizes


def test_local_crops_follow_from_a_given_global_size() -> None:
    for global_size, local_size in ((96, 48), (64, 32), (256, 96)):
        config = multicrop.resolve_crop_sizes(CropConfig(global_crop_size=global_size), 500, 1)
        assert config.local_crop_size == local_size


def test_small_crops_are_not_blurred_unless_the_config_says_so() -> None:
    for size, blur in ((32, (0.0, 0.0, 0.0)), (63, (0.0, 0.0, 0.0)), (64, (1.0, 0.1, 0.5))):
        config = CropConfig(global_crop_size=size, local_crop_size=16)
        assert multicrop.resolve_crop_sizes(config, 224).blur_probability == blur
    given = CropConfig(global_crop_size=32, blur_probability=(0.3, 0.2, 0.1))
    assert multicrop.resolve_crop_sizes(given, 224).blur_probability == (0.3, 0.2, 0.1)


def test_crop_size_that_the_patch_does_not_divide_is_named() -> None:
    said = r"need --local-crop-size .*patch of 16 px divides, such as 112, got 100"
    with pytest.raises(ValueError, match=said):
        multicrop.resolve_crop_sizes(CropConfig(local_crop_size=100), 224, 16)


def test_size_of_crops_that_are_never_made_is_not_checked() -> None:
    config = CropConfig(local_crop_size=3, num_local_crops=0)
    assert multicrop.resolve_crop_sizes(config, 224, 16).global_crop_size == 224
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    crops = MultiCrop(config)(images, None, torch.zeros(1, dtype=torch.int64))
    assert [crop.shape[-1] for crop in crops] == [224, 224]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_crops_are_the_same_on_what_is_no_cpu(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU computes, on the CPU: matrix products, all samples at once, and compiled."""
    images = build_dataset("patterns").images[:6]
    keys, config = torch.arange(6), CropConfig(global_crop_size=32, local_crop_size=16)
    expected = MultiCrop(config)(images, None, keys)
    monkeypatch.setattr(multicrop, "_on_cpu", lambda images: False)
    multi_crop = MultiCrop(config)
    if compiled:
        multi_crop._augment = torch.compile(
            multi_crop._augment, backend="aot_eager", fullgraph=True
        )
    for crop, other in zip(multi_crop(images, None, keys), expected, strict=True):
        difference = (crop - other).abs() * 0.225 * 255
        # rounding of uint8 crops; solarisation and hue may turn over at a pixel
        assert difference.mean() < 0.6
        assert difference.median() < 0.6


def test_jitter_of_the_rows_alone_and_of_all_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(8, 3, 12, 12)
    factors = torch.rand(8, 4) * torch.tensor([1.0, 1.0, 1.0, 0.2]) + torch.tensor(
        [0.5, 0.5, 0.5, -0.1]
    )
    factors[0, 1] = 0
    order = torch.rand(8, 4).argsort(dim=1)
    is_jittered = torch.tensor([True, False, True, True, True, False, True, True])
    alone = multicrop.colour_jitter(images.clone(), is_jittered, factors, order)
    monkeypatch.setattr(multicrop, "_on_cpu", lambda images: False)
    together = multicrop.colour_jitter(images.clone(), is_jittered, factors, order)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert torch.equal(alone[~is_jittered], images[~is_jittered])


@pytest.mark.parametrize("size", [16, 21])
def test_crops_do_not_depend_on_how_rows_are_put_into_blocks(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photos(7, 24)
    keys = multicrop.hash_keys(3, torch.arange(7))
    config = CropConfig(
        global_crop_size=size, local_crop_size=8, num_local_crops=2, quarter_turns=True
    )
    in_one_block = MultiCrop(config)(images, None, keys)
    monkeypatch.setattr(multicrop, "BLOCK", 2 * 3 * size**2)  # two large crops
    in_small_blocks = MultiCrop(config)(images, None, keys)
    monkeypatch.setattr(multicrop, "BLOCK", 1)  # one crop
    one_by_one = MultiCrop(config)(images, None, keys)
    for crop, other, alone in zip(in_one_block, in_small_blocks, one_by_one, strict=True):
        assert torch.equal(crop, other)
        assert torch.equal(crop, alone)


# ---------------------------------------------------------------- other channels, no up


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_other_channels_than_rgb_change_in_brightness_and_contrast_alone(
    channels: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multicrop, "_on_cpu", lambda images: on_cpu)
    images = torch.rand(6, channels, 12, 12)
    factors = torch.rand(6, 4) + 0.5
    order = torch.rand(6, 4).argsort(dim=1)
    all_of_them = torch.ones(6, dtype=torch.bool)
    changed = multicrop.colour_jitter(images.clone(), all_of_them, factors, order)
    for image, values, kinds, result in zip(images, factors, order.tolist(), changed, strict=True):
        expected = image
        for kind in kinds:
            if kind == 0:
                expected = (values[0] * expected).clamp(0, 1)
            elif kind == 1:
                expected = (values[1] * expected + (1 - values[1]) * expected.mean()).clamp(0, 1)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_number_of_channels_is_that_of_the_mean() -> None:
    config = CropConfig(global_crop_size=16, local_crop_size=8, mean=(0.5,) * 5, std=(0.2,) * 5)
    images = torch.randint(0, 256, (3, 5, 20, 20), dtype=torch.uint8)
    crops = MultiCrop(config)(images, None, torch.arange(3))
    assert [tuple(crop.shape) for crop in crops[1:3]] == [(3, 5, 16, 16), (3, 5, 8, 8)]
    with pytest.raises(ValueError, match=r"need uint8 images \(b, 5, s, s\), got .*\(3, 3, 20, 20"):
        MultiCrop(config)(images[:, :3], None, torch.arange(3))
    with pytest.raises(ValueError, match="need a std for each mean, got 1 for 5"):
        MultiCrop(replace(config, std=(0.2,)))


def without_colour(**settings: object) -> MultiCrop:
    """Return crops that are boxes, and what the settings add to them."""
    nothing = {"jitter_probability": 0.0, "grayscale_probability": 0.0}
    nothing |= {"blur_probability": (0.0, 0.0, 0.0), "solarize_probability": (0.0, 0.0, 0.0)}
    config = CropConfig(global_crop_size=16, local_crop_size=8, num_local_crops=2)
    return MultiCrop(replace(config, **nothing, **settings))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_vertical_flips_leave_the_other_choices_as_they_were(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multicrop, "_on_cpu", lambda images: on_cpu)
    images, keys = photos(40), torch.arange(40)
    plain = without_colour()(images, None, keys)
    always = without_colour(vertical_flip=1.0)(images, None, keys)
    some = without_colour(vertical_flip=0.3)(images, None, keys)
    for crop, flipped, mixed in zip(plain, always, some, strict=True):
        assert torch.equal(flipped, crop.flip(2))
        is_flipped = (mixed == crop.flip(2)).flatten(1).all(dim=1)
        is_plain = (mixed == crop).flatten(1).all(dim=1)
        assert (is_flipped ^ is_plain).all()
        assert 0.05 < is_flipped.float().mean() < 0.6


@pytest.mark.parametrize("on_cpu", [True, False])
def test_quarter_turns_are_all_four_and_change_nothing_else(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multicrop, "_on_cpu", lambda images: on_cpu)
    images, keys = photos(60), torch.arange(60)
    plain = without_colour()(images, None, keys)
    turned = without_colour(quarter_turns=True)(images, None, keys)
    counts = torch.zeros(4)
    for crop, result in zip(plain, turned, strict=True):
        turns = [(result == crop.rot90(k, dims=(2, 3))).flatten(1).all(dim=1) for k in range(4)]
        assert torch.stack(turns).sum(dim=0).eq(1).all()
        counts += torch.stack(turns).sum(dim=1)
    assert (counts / counts.sum() - 0.25).abs().max() < 0.08
