"""bf16 on a CPU: whether it is faster there, and what makes its gradients right.

    bf16_gain(backbone, image_size=224, batch_size=64) >= WORTH_CHANGING  # then bf16 pays
    pad_small_images(backbone)  # else some of its bf16 gradients are what memory held before

Stands alone: needs torch.
"""

import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CPUINFO = Path("/proc/cpuinfo")
ARITHMETIC = {"amx_bf16", "avx512_bf16"}  # of x86 CPUs, as Linux names it
WORTH_CHANGING = 1.2  # times as fast, from which on bf16 is taken in place of float32
LEAST_MEASURED = 1.0  # seconds of steps: the gain of shorter ones was 1.2 once and 1.5 once


def bf16_gain(backbone: nn.Module, image_size: int, batch_size: int) -> float:
    """Return how many times as fast as in float32 a backbone trains in bf16 on this CPU.

    By its forward and backward pass over as many random images as take a tenth of a second, at
    most `batch_size`. These steps are repeated for a second, at least twice each, and the fastest
    of each precision are compared. 0 where a gradient is not finite. It pads small images from then
    on.
    """
    pad_small_images(backbone)
    num_images = min(4, batch_size)
    with torch.random.fork_rng(devices=[]):
        while True:
            images = torch.randn(num_images, backbone.num_channels, image_size, image_size)
            seconds = _seconds_of_step(backbone, images, uses_bf16=False)
            if seconds > 0.1 or num_images == batch_size:
                break
            num_images = min(2 * num_images, batch_size)
        first = _seconds_of_step(backbone, images, uses_bf16=True)  # which builds kernels, too
        in_float32: list[float] = []
        in_bf16: list[float] = []
        while len(in_bf16) < 2 or sum(in_float32) + sum(in_bf16) < LEAST_MEASURED:
            in_float32.append(_seconds_of_step(backbone, images, uses_bf16=False))
            in_bf16.append(_seconds_of_step(backbone, images, uses_bf16=True))
    if not all(math.isfinite(seconds) for seconds in [first, *in_float32, *in_bf16]):
        return 0.0  # one such step is enough: the fault does not show in each
    return min(in_float32) / min(in_bf16)


def _seconds_of_step(backbone: nn.Module, images: Tensor, uses_bf16: bool) -> float:
    """Return how long a forward and backward pass take; infinity where a gradient is not finite."""
    backbone.zero_grad()
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16):
        features = backbone(images)
    features.float().square().mean().backward()
    seconds = time.perf_counter() - began
    grads = [param.grad for param in backbone.parameters() if param.grad is not None]
    return seconds if all(grad.isfinite().all() for grad in grads) else math.inf


def has_bf16() -> bool:
    """Tell whether this CPU has arithmetic for bf16."""
    return bool(_cpu_flags() & ARITHMETIC)


def emulates_bf16() -> bool:
    """Tell whether bf16 is slower than float32 on this CPU, since it has no arithmetic for it.

    That of an AMD EPYC without it took ten times as long for a step of resnet10_half.
    """
    flags = _cpu_flags()
    return "avx2" in flags and not flags & ARITHMETIC


def _cpu_flags() -> set[str]:
    """Return what Linux says that an x86 CPU can do, nothing elsewhere."""
    return set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()


class _PaddedConv2d(nn.Conv2d):
    """A convolution that pads an image smaller than its stride or padding beforehand.

    Padded within, oneDNN's bf16 gradient has entries that were never written: 1e30, NaN, or zero.
    """

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        least = max(*self.stride, *self.padding)
        if height >= least and width >= least:
            return super().forward(images)
        vertical, horizontal = self.padding
        # further zeros, up to the stride, add no position
        right = max(horizontal, self.stride[1] - width - horizontal)
        below = max(vertical, self.stride[0] - height - vertical)
        padded = F.pad(images, (horizontal, right, vertical, below))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def pad_small_images(network: nn.Module) -> None:
    """Let a network's convolutions have right bf16 gradients on CPUs for images of any size.

    In place; parameters and their names stay. Without it, with torch 2.14 on an AMD EPYC with
    avx512_bf16, 42 of 560 kinds of convolution had wrong ones, such as 3x3 of stride 2 on 1x1.
    """
    for module in network.modules():
        is_plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
        if is_plain and not isinstance(module.padding, str):
            module.__class__ = _PaddedConv2d
