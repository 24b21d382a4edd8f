"""Weight gradients of convolutions by matrix products, on CPUs where oneDNN is slow at them.

    if products_are_faster():  # on CPUs with AVX2 or AVX-512
        multiply_for_weight_gradients(backbone)  # in place; parameters and their names stay

There oneDNN takes one and a half to four times as long for a layer's weight gradient as for its
outputs, and ten times and more for images of 1 px. Layers with many channels for their output's
size use matrix products instead, in float32 and in bf16: ResNets at small crops train up to 1.3
times as fast (docs/speed.md). The gradients differ from oneDNN's by rounding.

Stands alone: needs torch.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

# Products are taken for layers with at least CHANNELS_A_PIXEL input channels for each px of their
# output's longer side, and at least LEAST_CHANNELS. They copy the image for each position in the
# kernel, which many channels repay. They leave out the padding, which is 40 % of what a 3x3 kernel
# reads of an image of 3 px, and 89 % for 1 px.
CHANNELS_A_PIXEL = 32
LEAST_CHANNELS = 64

MEASURED = ("AVX2", "AVX512")  # what CPUs have, as torch names it
PRECISIONS = (torch.float32, torch.bfloat16)


def products_are_faster() -> bool:
    """Tell whether torch finds AVX2 or AVX-512 on this CPU: on others nothing was measured."""
    return torch.backends.cpu.get_cpu_capability() in MEASURED


def multiply_for_weight_gradients(network: nn.Module) -> None:
    """Let a network's convolutions compute their weight gradients by products where that is faster.

    Images smaller than stride or padding always take products: oneDNN's bf16 gradients of them have
    entries that were never written. In place; parameters, their names and all outputs stay.
    Convolutions with a bias, groups, dilation or a padding other than a number of zeros are left as
    they are.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = _MultiplyingConv2d


def _is_plain(convolution: nn.Conv2d) -> bool:
    return (
        convolution.bias is None
        and convolution.groups == 1
        and convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and isinstance(convolution.padding, tuple)
    )


class _MultiplyingConv2d(nn.Conv2d):
    """A convolution that computes its weight gradient by products where that is faster."""

    def forward(self, images: Tensor) -> Tensor:
        precision = images.dtype
        if torch.is_autocast_enabled("cpu") and precision in PRECISIONS:
            precision = torch.get_autocast_dtype("cpu")
        if precision not in PRECISIONS or not self._multiplies_for(images):
            return super().forward(images)
        # autocast, which casts what a convolution gets, does not know this function
        images, weight = images.to(precision), self.weight.to(precision)
        return _Convolution.apply(images, weight, self.stride, self.padding)

    def _multiplies_for(self, images: Tensor) -> bool:
        if min(images.shape[-2:]) < max(*self.stride, *self.padding):
            return True  # oneDNN's bf16 gradients of these have entries that were never written
        least = max(CHANNELS_A_PIXEL * self._longer_output(images), LEAST_CHANNELS)
        return self.in_channels >= least

    def _longer_output(self, images: Tensor) -> int:
        """Return the longer side of the output for such images, in px."""
        sides = zip(images.shape[-2:], self.padding, self.kernel_size, self.stride, strict=True)
        return max((side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in sides)


class _Convolution(torch.autograd.Function):
    """Compute conv2d, and its weight's gradient by `weight_gradient`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        images: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, output_grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        images, weight = ctx.saved_tensors
        images_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            images_grad = _images_gradient(images, weight, output_grad, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            weight_grad = weight_gradient(images, weight, output_grad, ctx.stride, ctx.padding)
        return images_grad, weight_grad, None, None


def _images_gradient(
    images: Tensor,
    weight: Tensor,
    output_grad: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Return the gradient of a convolution's images, by oneDNN."""
    # torch.nn.grad.conv2d_input would fill images of its own before it starts
    gradient, _, _ = torch.ops.aten.convolution_backward(
        output_grad,
        images,
        weight,
        bias_sizes=None,
        stride=stride,
        padding=padding,
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=1,
        output_mask=(True, False, False),
    )
    return gradient


def weight_gradient(
    images: Tensor,
    weight: Tensor,
    output_grad: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Return the gradient of a convolution's weight, in the weight's shape and layout.

    images: (b, inputs, height, width); weight: (outputs, inputs, kernel height, kernel width);
    output_grad: (b, outputs, height', width'). Each position in the kernel is one product: of the
    outputs' gradients with the pixels that this position reads. Outputs for which it reads padding
    are left out: they would add zeros.
    """
    num_outputs, num_inputs, kernel_height, kernel_width = weight.shape
    pixels = images.permute(0, 2, 3, 1).contiguous()  # no copy in channels_last
    grads = output_grad.permute(0, 2, 3, 1).contiguous()
    gradient = torch.empty_like(weight)
    for i in range(kernel_height):
        rows, pixel_rows = _inside(i - padding[0], stride[0], grads.shape[1], pixels.shape[1])
        for j in range(kernel_width):
            columns, pixel_columns = _inside(
                j - padding[1], stride[1], grads.shape[2], pixels.shape[2]
            )
            written = grads[:, rows, columns].reshape(-1, num_outputs)
            read = pixels[:, pixel_rows, pixel_columns].reshape(-1, num_inputs)
            torch.mm(written.T, read, out=gradient[:, :, i, j])
    return gradient


def _inside(offset: int, stride: int, num_outputs: int, num_pixels: int) -> tuple[slice, slice]:
    """Return the outputs that read a pixel of the image, and those pixels, along one axis.

    Output k reads pixel `offset + k * stride`; one below 0, or from `num_pixels` on, is padding.
    """
    outputs = [k for k in range(num_outputs) if 0 <= offset + k * stride < num_pixels]
    if not outputs:
        return slice(0), slice(0)
    first, last = outputs[0], outputs[-1]
    pixels = slice(offset + first * stride, offset + last * stride + 1, stride)
    return slice(first, last + 1), pixels
