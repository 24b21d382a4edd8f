"""Where bf16 is taken on a CPU, and that its gradients are right for small images."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data import build_dataset
from harness import bf16_on_cpu, flags
from harness.bf16_on_cpu import bf16_gain, pad_small_images
from harness.flags import choose_precision, default_precision, finish, parse_config
from harness.outlook import precision_on_cpu
from models import ModelConfig, get_backbone


def _cpu_with(flags: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(bf16_on_cpu, "CPUINFO", folder / "cpuinfo")
    bf16_on_cpu.CPUINFO.write_text(f"flags : sse {flags}\n")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not ask how exactly the gain was measured."""
    monkeypatch.setattr(bf16_on_cpu, "LEAST_MEASURED", 0.0)


def test_gain_is_measured_on_the_network_and_leaves_random_numbers_alone(short: None) -> None:
    backbone = get_backbone("resnet10_half", image_size=16)
    state = torch.get_rng_state()
    assert 0.001 < bf16_gain(backbone, image_size=16, batch_size=4) < 100
    assert torch.equal(torch.get_rng_state(), state)


def test_gain_is_the_ratio_of_the_fastest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second in float32, an eighth in bf16; the first steps do not count."""
    seconds = {False: iter([0.5, 0.25, 0.75]), True: iter([9.0, 1.0, 0.125])}
    batches: list[int] = []

    def step(backbone: nn.Module, images: Tensor, uses_bf16: bool) -> float:
        batches.append(len(images))
        return next(seconds[uses_bf16])

    monkeypatch.setattr(bf16_on_cpu, "_seconds_of_step", step)
    assert bf16_gain(get_backbone("resnet10_half"), 16, batch_size=64) == 2
    assert set(batches) == {4}


@pytest.mark.parametrize("step_of_bf16", [0, 1, 2])
def test_one_gradient_that_is_not_finite_is_enough_to_refuse_bf16(
    step_of_bf16: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step, too, though its time does not count: such faults come and go."""
    in_bf16 = [0.1, 0.1, 0.1]
    in_bf16[step_of_bf16] = torch.inf
    seconds = {False: iter([0.5] * 9), True: iter(in_bf16)}
    monkeypatch.setattr(
        bf16_on_cpu, "_seconds_of_step", lambda *_, uses_bf16: next(seconds[uses_bf16])
    )
    assert bf16_gain(get_backbone("resnet10_half"), 16, batch_size=4) == 0


def test_steps_that_are_too_short_to_measure_take_more_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[int] = []

    def step(backbone: nn.Module, images: Tensor, uses_bf16: bool) -> float:
        batches.append(len(images))
        return 0.001 * len(images)

    monkeypatch.setattr(bf16_on_cpu, "_seconds_of_step", step)
    assert bf16_gain(get_backbone("resnet10_half"), 16, batch_size=20) == 1
    assert batches[:4] == [4, 8, 16, 20]
    steps = batches[5:]  # after the first one in bf16
    assert set(steps) == {20}
    assert len(steps) % 2 == 0  # in turn
    assert 0.001 * sum(steps) == pytest.approx(bf16_on_cpu.LEAST_MEASURED, abs=0.05)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_bf16_is_not_taken_where_a_gradient_of_it_is_not_finite(value: float) -> None:
    class Spoilt(nn.Linear):
        num_channels = 3

        def forward(self, images: Tensor) -> Tensor:
            features = super().forward(images.flatten(1))
            return features * value if torch.is_autocast_enabled("cpu") else features

    assert bf16_gain(Spoilt(3 * 4 * 4, 5), 4, batch_size=4) == 0


@pytest.mark.parametrize(
    ("cpu", "world", "expected"),
    [
        ("avx2 amx_bf16 amx_tile", "1", None),
        ("avx2 avx512_bf16", "1", None),
        ("avx2 avx512f", "1", "no"),
        ("avx2 amx_bf16", "2", "no"),
    ],
)
def test_cpu_with_arithmetic_for_bf16_is_measured(
    cpu: str, world: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _cpu_with(cpu, monkeypatch, tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert default_precision() == expected


@pytest.mark.parametrize(("gain", "expected"), [(2.2, "bf16"), (1.1, "no"), (0.0, "no")])
def test_precision_is_that_which_was_measured_to_be_faster_and_why_is_said(
    gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flags, "default_precision", lambda: None)
    monkeypatch.setattr(flags, "gain_of_bf16", lambda model, crop_size, num_crops: gain)
    model = ModelConfig("resnet10_half")
    precision, reasons = choose_precision(None, model, crop_size=32, batch_size=8)
    assert precision == expected
    measured = f"resnet10_half trains {gain} times as fast in bf16 as in float32"
    assert reasons == [f"chosen for this CPU: --mixed-precision {expected}; {measured}"]
    assert choose_precision("no", model, crop_size=32, batch_size=8) == ("no", [])


@pytest.mark.slow
def test_network_is_measured_once_at_the_crops_that_follow_from_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[tuple[int, int, int]] = []

    def gain(backbone: nn.Module, size: int, batch_size: int) -> float:
        measured.append((backbone.patch_size, size, batch_size))
        return 2.0

    monkeypatch.setattr(flags, "default_precision", lambda: None)
    monkeypatch.setattr(flags, "bf16_gain", gain)
    uncached = flags.gain_of_bf16.__wrapped__
    monkeypatch.setattr(flags, "gain_of_bf16", functools.cache(uncached))
    config = parse_config(["--data", "patterns", "--arch", "dino_vits8", "--batch-size", "7"])
    for _ in range(2):  # as --minutes does, whose first steps are a run of their own
        dataset = build_dataset("patterns")
        finished = finish(config, dataset, dataset.survey())
        assert finished.run.mixed_precision == "bf16"
        assert "dino_vits8 trains 2.0 times as fast" in dataset.notes[-1]
    assert measured == [(8, 48, 14)]
    config = parse_config(
        ["--data", "patterns", "--arch", "dino_vits16", "--global-crop-size", "8"]
    )
    with pytest.raises(ValueError, match="patch of 16 px divides, such as 16, got 8"):
        finish(config, dataset, dataset.survey())
    assert len(measured) == 1


def test_network_whose_maps_end_as_one_cell_is_measured_on_a_batch_of_one(
    short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm refuses one value, and a step has two: the crops."""
    monkeypatch.setattr(flags, "default_precision", lambda: None)
    precision, _ = choose_precision(None, ModelConfig("resnet10t"), crop_size=32, batch_size=1)
    assert precision in ("bf16", "no")


@pytest.mark.parametrize(
    ("precision", "cpu", "said"),
    [
        ("no", "avx2 amx_bf16", "float32"),
        ("bf16", "avx2 amx_bf16", "bf16"),
        ("bf16", "avx2", "bf16 (float32 is faster here: --mixed-precision no)"),
        ("bf16", "avx2 avx512_bf16", "bf16"),
        ("bf16", "asimd", "bf16"),
    ],
)
def test_header_says_the_precision_and_a_faster_one(
    precision: str, cpu: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _cpu_with(cpu, monkeypatch, tmp_path)
    assert precision_on_cpu(precision, num_processes=1) == said


@pytest.mark.parametrize(
    ("cpu", "said"),
    [
        ("avx2 avx512_bf16", "float32 (bf16 may be faster here: --mixed-precision bf16)"),
        ("avx2", "float32"),
    ],
)
def test_header_of_several_processes_names_bf16_that_none_has_measured(
    cpu: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _cpu_with(cpu, monkeypatch, tmp_path)
    assert precision_on_cpu("no", num_processes=2) == said


KERNELS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 4, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": (5, 3), "stride": (1, 2), "padding": (2, 1)},
    {"kernel_size": 7, "stride": 2, "padding": 3, "groups": 16},
    {"kernel_size": 1, "stride": 2, "bias": False},
]


def _results(convolution: nn.Conv2d, images: Tensor) -> list[Tensor]:
    """Return a convolution's output, and gradients of images, weight and bias."""
    convolution.zero_grad()
    images = images.clone().requires_grad_()
    output = convolution(images)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return [output, images.grad, *(param.grad for param in convolution.parameters())]


@pytest.mark.parametrize("options", KERNELS)
@pytest.mark.parametrize("height", [1, 2, 3, 6, 12])
def test_padded_images_give_the_same_convolution(options: dict, height: int) -> None:
    convolution = nn.Conv2d(16, 16, **options).double()
    images = torch.randn(3, 16, height, 5).double()
    expected = _results(convolution, images)
    pad_small_images(convolution)
    assert type(convolution) is not nn.Conv2d
    for mine, plain in zip(_results(convolution, images), expected, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bf16_gradients_of_small_images_are_those_of_float32(size: int) -> None:
    """Among freed memory full of NaN: on some CPUs torch's own gradient holds what was there."""
    convolution = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
    pad_small_images(convolution)
    images = torch.randn(64, 64, size, size).to(memory_format=torch.channels_last)
    expected = _results(convolution, images)
    for _ in range(5):
        spoilt = [torch.full((1 << power,), torch.nan) for power in range(8, 20)]
        del spoilt
        with torch.autocast("cpu", torch.bfloat16):
            results = _results(convolution, images)
        for mine, exact in zip(results, expected, strict=True):
            assert (mine.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_networks_keep_their_names_and_features() -> None:
    network = get_backbone("resnet10t").eval()
    images = torch.randn(2, 3, 40, 40)
    names, features = list(network.state_dict()), network(images)
    pad_small_images(network)
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(images), features)


def test_convolutions_with_a_padding_of_another_kind_stay_as_they_are() -> None:
    convolutions = nn.Sequential(
        nn.Conv2d(4, 4, 3, 2, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 7, padding="same"),
    )
    pad_small_images(convolutions)
    assert all(type(module) is nn.Conv2d for module in convolutions)
