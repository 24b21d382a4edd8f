"""Gradients of convolutions' weights as matrix products, for CPUs where oneDNN's are slow.

    if weight_gradients_are_slow():  # on CPUs with AVX2 and without AVX-512
        multiply_for_weight_gradients(backbone)  # in place; parameters and their names stay

On such a CPU oneDNN takes two to four times as long for the gradient of a layer's weights as for
its outputs, and 15 times as long for images of 1 px. With matrix products for those layers,
ResNet-18 trains 1.6 times as fast at crops of 96 and 48 px, 1.2 times at 224 and 96 px
(docs/speed.md). The gradients differ by float32's rounding.

Stands alone: needs torch.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

# Where products win. They skip the padding, most of what a kernel reads of a small image; and they
# copy the image for each position in the kernel, which only a layer of many channels makes up for.
SMALL = 3  # px of the output
MANY_CHANNELS = 256  # of the input


def weight_gradients_are_slow() -> bool:
    """Tell whether this is a CPU with AVX2 and without AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def multiply_for_weight_gradients(network: nn.Module) -> None:
    """Let a network's convolutions compute their weights' gradients by products where these win.

    In place; parameters, their names and the outputs stay. Convolutions with a bias, groups,
    dilation or a padding other than zeros stay as they are.
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
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.float32 and self._gains(*images.shape[-2:]):
            return _Convolution.apply(images, self.weight, self.stride, self.padding)
        return super().forward(images)

    def _gains(self, height: int, width: int) -> bool:
        """Tell whether products are faster than oneDNN for images of this size."""
        if self.in_channels >= MANY_CHANNELS:
            return True
        longest = max(
            (size + 2 * padding - kernel) // stride + 1  # of the output
            for size, padding, kernel, stride in zip(
                (height, width), self.padding, self.kernel_size, self.stride, strict=True
            )
        )
        return longest <= SMALL


class _Convolution(torch.autograd.Function):
    """conv2d, but for the gradient of its weight."""

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
            images_grad = nn.grad.conv2d_input(
                images.shape, weight, output_grad, ctx.stride, ctx.padding
            )
        if ctx.needs_input_grad[1]:
            kernel = (weight.shape[2], weight.shape[3])
            weight_grad = weight_gradient(images, output_grad, kernel, ctx.stride, ctx.padding)
        return images_grad, weight_grad, None, None


def weight_gradient(
    images: Tensor,
    output_grad: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Return the gradient of a convolution's weight, (outputs, inputs, *kernel), in channels_last.

    images: (b, inputs, height, width); output_grad: (b, outputs, height', width'); both are fastest
    in channels_last. Each position in the kernel is one product: of the output's gradient with the
    pixels that this position reads. Where it reads the padding, it reads zeros, which are left out.
    """
    num_inputs, num_outputs = images.shape[1], output_grad.shape[1]
    pixels = images.permute(0, 2, 3, 1)
    grads = output_grad.permute(0, 2, 3, 1)
    gradient = images.new_empty(num_outputs, *kernel, num_inputs)
    for i in range(kernel[0]):
        rows, rows_read = _inside(i - padding[0], stride[0], grads.shape[1], pixels.shape[1])
        for j in range(kernel[1]):
            columns, columns_read = _inside(
                j - padding[1], stride[1], grads.shape[2], pixels.shape[2]
            )
            written = grads[:, rows, columns].reshape(-1, num_outputs)
            read = pixels[:, rows_read, columns_read].reshape(-1, num_inputs)
            torch.mm(written.T, read, out=gradient[:, i, j])
    return gradient.permute(0, 3, 1, 2)


def _inside(offset: int, stride: int, num_outputs: int, num_pixels: int) -> tuple[slice, slice]:
    """Return which outputs read a pixel inside of the image, and these pixels, along one axis.

    Output k reads pixel `offset + k * stride`, which is outside where it is padding.
    """
    outputs = [k for k in range(num_outputs) if 0 <= offset + k * stride < num_pixels]
    if not outputs:
        return slice(0), slice(0)
    first, last = outputs[0], outputs[-1]
    read = slice(offset + first * stride, offset + last * stride + 1, stride)
    return slice(first, last + 1), read
