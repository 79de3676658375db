# SPDX-License-Identifier: MIT
"""Convolution and residual blocks of the dVAE, with the parameter names of the released model."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import conv2d, max_pool2d
from ..ops.conv2d import has_kernel
from .precision import full_precision


class Conv2d(nn.Module):
    """Stride-1 convolution with an odd kernel and "same" padding; weight `w`, bias `b`.

    Initialised N(0, 1 / sqrt(num_in * kernel^2)), bias 0, as in the released model. With `full_precision` autocast is
    off inside: the layers that touch logits and codes stay in float32 (paper section 2.4).
    """

    def __init__(self, num_in: int, num_out: int, kernel: int, *, full_precision: bool = False) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd size, got {kernel}")
        self.kernel = kernel
        self.full_precision = full_precision
        self.backend = "auto"
        self.w = nn.Parameter(torch.empty(num_out, num_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(num_out))
        nn.init.normal_(self.w, std=(num_in * kernel**2) ** -0.5)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, **options: float | bool) -> torch.Tensor:
        """residual + gain * conv(relu(x)); options of `ops.conv2d`."""
        options["backend"] = self.backend
        if self.full_precision:
            with full_precision(x):
                return conv2d(x.float(), self.w, self.b, residual, **options)
        return conv2d(x, self.w, self.b, residual, **options)

    def extra_repr(self) -> str:
        return f"{self.w.shape[1]}, {self.w.shape[0]}, kernel={self.kernel}"


class MaxPool2d(nn.Module):
    """The largest of each two by two pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H // 2, W // 2]."""
        return max_pool2d(x)


class _Block(nn.Module):
    """out = id(x) + post_gain * res(x); ReLU before every convolution; hidden width num_out / 4.

    With `upsample` x is doubled first, each pixel two by two; then num_in != num_out.
    """

    kernels: tuple[int, ...]

    def __init__(self, num_in: int, num_out: int, num_layers: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.upsample = upsample
        self.post_gain = 1 / num_layers**2
        hidden = num_out // 4
        self.id_path = Conv2d(num_in, num_out, 1) if num_in != num_out else nn.Identity()
        widths = [num_in, hidden, hidden, hidden, num_out]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(self.kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """id_path(x) + post_gain * res_path(x), each ReLU and the sum within a convolution."""
        *convs, last = [layer for layer in self.res_path if isinstance(layer, Conv2d)]
        within = {}
        if self.upsample:
            if convs[0].backend != "reference" and has_kernel(x, convs[0].w):  # it need not lie in memory
                within = {"upsample": True}
            else:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        h = convs[0](x, relu=True, **within)
        for conv in convs[1:]:
            h = conv(h, relu=True)
        return last(h, self.id_path(x, **within), gain=self.post_gain, relu=True)


class EncoderBlock(_Block):
    """Kernels 3, 3, 3, 1: 1x1 next to the relaxation keeps the receptive field small (paper appendix A.1)."""

    kernels = (3, 3, 3, 1)


class DecoderBlock(_Block):
    """Kernels 1, 3, 3, 3."""

    kernels = (1, 3, 3, 3)
