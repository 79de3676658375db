# SPDX-License-Identifier: MIT
"""max_pool2d beyond the generic tests: equals, NaN, and where it hands over to torch's op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle_fast.ops import _backend, max_pool2d

pytestmark = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_and_nan_are_as_in_torch(dtype):
    x = torch.randint(3, (3, 5, 8, 40)).to(dtype)
    x[torch.rand(x.shape) < 0.05] = torch.nan
    x.requires_grad_()
    expected, actual = F.max_pool2d(x, 2), max_pool2d(x, backend="cpu")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    upstream = torch.randn_like(expected)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (actual, expected)]
    assert torch.equal(*grads)


def test_odd_sizes_channels_last_and_other_dtypes_are_torchs():
    for x in (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 4, dtype=torch.float64)):
        assert torch.equal(max_pool2d(x), F.max_pool2d(x, 2))
        with pytest.raises(RuntimeError, match="cannot run max_pool2d: it takes float32 and bfloat16"):
            max_pool2d(x, backend="cpu")
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert max_pool2d(x).is_contiguous(memory_format=torch.channels_last)


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="x: expected a floating"):
        max_pool2d(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected shape \[B, C, H, W\]"):
        max_pool2d(torch.zeros(2, 2))
