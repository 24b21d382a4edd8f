"""bf16 on a CPU: whether it is faster there, and what makes its gradients right.

    bf16_gain() >= WORTH_CHANGING  # then --mixed-precision bf16 pays
    pad_small_images(backbone)     # else some of its gradients are what memory held before

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


def bf16_gain(rounds: int = 5) -> float:
    """Return how many times as fast as in float32 this CPU convolves in bf16; 0: not at all.

    By a convolution and its gradients, for about a tenth of a second. Only CPUs with arithmetic
    for bf16 are tried. 0 where a gradient is not finite, as those of 1x1 images are on some CPUs.
    """
    if not _cpu_flags() & ARITHMETIC:
        return 0.0
    fastest: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        times = [_seconds_of_convolution(dtype, size=16) for _ in range(rounds)]
        times_of_dots = [_seconds_of_convolution(dtype, size=1) for _ in range(rounds)]
        if math.inf in times + times_of_dots:
            return 0.0
        fastest[dtype] = min(times)
    return fastest[torch.float32] / fastest[torch.bfloat16]


def emulates_bf16() -> bool:
    """Tell whether bf16 is slower than float32 on this CPU, since it has no arithmetic for it.

    That of an AMD EPYC without it took ten times as long for a step of resnet10_half.
    """
    flags = _cpu_flags()
    return "avx2" in flags and not flags & ARITHMETIC


def _cpu_flags() -> set[str]:
    """Return what Linux says that an x86 CPU can do, nothing elsewhere."""
    return set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()


def _seconds_of_convolution(dtype: torch.dtype, size: int) -> float:
    """Return how long a convolution and its gradients take; inf: a gradient is not finite."""
    images = torch.randn(32, 64, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    images.requires_grad_()
    weight = torch.randn(64, 64, 3, 3, dtype=dtype, requires_grad=True)
    began = time.perf_counter()
    torch.conv2d(images, weight, padding=1).mean().backward()
    seconds = time.perf_counter() - began
    is_finite = weight.grad.isfinite().all() and images.grad.isfinite().all()
    return seconds if is_finite else math.inf


class _PaddedConv2d(nn.Conv2d):
    """A convolution that pads small images before it, not within.

    A 3x3 kernel of stride 2 sees a 1x1 image with its middle alone. The gradients of the other
    eight weights are zero; oneDNN, in bf16, leaves what the memory held: 1e30, NaN or nothing.
    """

    def forward(self, images: Tensor) -> Tensor:
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        # on larger images each weight meets a pixel at some position
        if min(images.shape[-2:]) >= max(reach) + max(self.stride):
            return super().forward(images)
        vertical, horizontal = self.padding
        padded = F.pad(images, (horizontal, horizontal, vertical, vertical))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def pad_small_images(network: nn.Module) -> None:
    """Let a network's convolutions have right bf16 gradients on CPUs for images of any size.

    In place; parameters and their names stay. Found with torch 2.14 on an AMD EPYC with
    avx512_bf16: wrong were gradients of strides above 1 and of kernels above 3x3, for weights that
    meet padding alone.
    """
    for module in network.modules():
        is_at_risk = type(module) is nn.Conv2d and (
            max(module.stride) > 1 or max(module.kernel_size) > 3
        )
        if is_at_risk and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = _PaddedConv2d
