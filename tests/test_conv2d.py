# SPDX-License-Identifier: MIT
"""conv2d beyond the generic tests: what it keeps, what it refuses, and where it hands over to torch's ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle_fast.nn import DecoderBlock, EncoderBlock
from dalle_fast.ops import _backend, conv2d
from dalle_fast.ops.conv2d import MAX_CHANNELS, conv2d_reference

pytestmark = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


def arguments(num_in=3, num_out=4, size=6, kernel=3, dtype=torch.float32):
    x = torch.randn(2, num_in, size, size, dtype=dtype)
    return x, torch.randn(num_out, num_in, kernel, kernel, dtype=dtype), torch.randn(num_out, dtype=dtype)


def test_nan_goes_through_the_relu_as_in_torch():
    x, weight, bias = arguments()
    x[0, 1, 2, 3] = torch.nan
    expected = conv2d_reference(x, weight, bias, relu=True)
    torch.testing.assert_close(conv2d(x, weight, bias, relu=True, backend="cpu"), expected, equal_nan=True)


def test_zeros_of_the_padding_never_meet_what_memory_held():
    """Scratch is kept between calls: planes full of NaN must not show at the borders of smaller ones."""
    x, weight, bias = arguments(num_in=8, size=20, kernel=5)
    conv2d(torch.full_like(x, torch.nan), weight, bias, backend="cpu")
    for kernel, size in ((3, 5), (7, 2), (1, 9)):
        args = [t.requires_grad_() for t in arguments(size=size, kernel=kernel)]
        out = conv2d(*args, backend="cpu")
        grads = torch.autograd.grad(out.sum(), args)
        assert all(bool(t.isfinite().all()) for t in (out, *grads))


@pytest.mark.parametrize("block", [EncoderBlock, DecoderBlock])
def test_a_residual_block_equals_its_layers(block):
    torch.manual_seed(0)
    module = block(12, 24, 6)
    x = torch.randn(2, 12, 8, 8, requires_grad=True)
    actual = module(x)
    with torch.no_grad():
        h = x
        for layer in module.res_path:
            h = (
                F.relu(h)
                if isinstance(layer, torch.nn.ReLU)
                else F.conv2d(h, layer.w, layer.b, padding=layer.kernel // 2)
            )
        id_path = F.conv2d(x, module.id_path.w, module.id_path.b)
        torch.testing.assert_close(actual, id_path + module.post_gain * h)
    assert type(actual.grad_fn).__name__ == "conv2dBackward"


def test_other_dtypes_and_many_channels_are_torchs():
    wide = arguments(num_in=MAX_CHANNELS + 1, num_out=MAX_CHANNELS + 1)
    assert torch.equal(conv2d(*wide), conv2d_reference(*wide))
    double = arguments(dtype=torch.float64)
    assert torch.equal(conv2d(*double), conv2d_reference(*double))
    with torch.autocast("cpu", torch.float16):
        assert conv2d(*arguments()).dtype == torch.float16
        with pytest.raises(RuntimeError, match="cannot run conv2d: it takes float32 and bfloat16"):
            conv2d(*arguments(), backend="cpu")
    x, weight, bias = arguments()
    with pytest.raises(RuntimeError, match="all of one dtype outside autocast"):
        conv2d(x.bfloat16(), weight, bias, backend="cpu")


@pytest.mark.parametrize("level", [0, 3, 4, 5, 6])
def test_autocast_rounds_x_and_weight_and_keeps_gradients_of_weights_in_float32(level):
    if level not in _backend.usable_cpu_levels():
        pytest.skip(f"this processor or this build has no level {level}")
    args = [t.requires_grad_() for t in arguments(num_in=5, num_out=7, size=9)]
    residual = torch.randn(2, 7, 9, 9, dtype=torch.bfloat16)
    exact = [t.detach().bfloat16().double().requires_grad_() for t in args[:2]]
    exact.append(args[2].detach().double().requires_grad_())
    expected = conv2d_reference(*exact, residual.double(), gain=0.5, relu=True)
    upstream = torch.randn_like(residual)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    _backend._C.set_cpu_level(level)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            out = conv2d(*args, residual, gain=0.5, relu=True, backend="cpu")
        grads = torch.autograd.grad(out, args, upstream)
    finally:
        _backend._C.set_cpu_level(_backend._C.best_cpu_level())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=8e-3, atol=8e-3)
    for grad, wanted, rtol in zip(grads, expected_grads, (8e-3, 1e-4, 1e-4), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.double(), wanted, rtol=rtol, atol=rtol)


def test_the_weights_gradient_lies_as_the_weight():
    x, weight, bias = arguments()
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(conv2d(x, weight, bias, backend="cpu").sum(), weight)
    assert grad.stride() == weight.stride()
    (expected,) = torch.autograd.grad(conv2d_reference(x, weight, bias).sum(), weight)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_errors_name_the_argument():
    x, weight, bias = arguments()
    with pytest.raises(TypeError, match="x: expected a floating"):
        conv2d(x.long(), weight, bias)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, C, H, W\]"):
        conv2d(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, 3, k, k\], k odd"):
        conv2d(x, weight[..., :2, :2], bias)
    with pytest.raises(ValueError, match=r"bias: expected shape \[4\]"):
        conv2d(x, weight, bias[:1])
    with pytest.raises(ValueError, match=r"residual: expected shape \[2, 4, 6, 6\]"):
        conv2d(x, weight, bias, x)
