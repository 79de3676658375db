# SPDX-License-Identifier: MIT
"""The 16-bit formats, code by code."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_fast.ops import _backend, minifloat_decode, minifloat_encode
from dalle_fast.ops.minifloat.reference import FORMATS, minifloat_decode_reference, minifloat_encode_reference

needs_extension = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
ALL = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, but any NaN equals any other."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_survives_the_round_trip(backend, fmt):
    values = minifloat_decode(ALL, fmt, backend=backend)
    assert same(values, minifloat_decode_reference(ALL, fmt))
    again = minifloat_encode(values, fmt, backend=backend)
    nan = values.isnan()
    assert torch.equal(again[~nan].int(), ALL[~nan].int())
    assert minifloat_decode(again[nan], fmt, backend=backend).isnan().all()
    has_sign, bits = FORMATS[fmt]
    assert int(nan.sum()) == (2 if has_sign else 1) * ((1 << bits) - 1)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_round_to_the_nearest_code_and_ties_to_even(backend, fmt):
    _, bits = FORMATS[fmt]
    codes = torch.arange(63 << bits, dtype=torch.int32).to(torch.uint16)  # finite, not negative
    values = minifloat_decode_reference(codes, fmt).double()
    middle = ((values[:-1] + values[1:]) / 2).float()  # exact: float32 has more bits
    lower = codes[:-1].int()
    even = lower + (lower & 1)
    assert torch.equal(minifloat_encode(middle, fmt, backend=backend).int(), even)
    below = torch.nextafter(middle, torch.tensor(0.0))
    above = torch.nextafter(middle, torch.tensor(100.0))
    assert torch.equal(minifloat_encode(below, fmt, backend=backend).int(), lower)
    assert torch.equal(minifloat_encode(above, fmt, backend=backend).int(), lower + 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "fmt", "code"),
    [
        (0.0, "1-6-9", 0),
        (-0.0, "1-6-9", 0x8000),
        (1.0, "1-6-9", 59 << 9),
        (-1.0, "1-6-9", 0x8000 | 59 << 9),
        (15.984375, "1-6-9", (63 << 9) - 1),
        (15.98, "1-6-9", (63 << 9) - 1),
        (15.99, "1-6-9", (63 << 9) - 1),
        (16.0, "1-6-9", 63 << 9),
        (math.inf, "1-6-9", 63 << 9),
        (-1e30, "1-6-9", 0x8000 | 63 << 9),
        (2.0**-58, "1-6-9", 1 << 9),
        (2.0**-67, "1-6-9", 1),
        (2.0**-68, "1-6-9", 0),  # a tie: to even
        (2.0**-69, "1-6-9", 0),
        (1e-40, "1-6-9", 0),
        (5.0, "0-6-10", (61 << 10) | 256),
        (15.9921875, "0-6-10", (63 << 10) - 1),
        (16.0, "0-6-10", 63 << 10),
        (-3.0, "0-6-10", 0),
        (-0.0, "0-6-10", 0),
        (-math.inf, "0-6-10", 0),
        (2.0**-68, "0-6-10", 1),
    ],
)
def test_edges(backend, value, fmt, code):
    # 17 copies: vector lanes and the rest behind them
    found = minifloat_encode(torch.full((17,), value), fmt, backend=backend)
    assert found.int().tolist() == [code] * 17


@needs_extension
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bias", [59, 60, 31])
def test_the_scalar_header_with_any_bias(fmt, bias):
    has_sign, _ = FORMATS[fmt]
    codes = ALL[:: 1 if bias == 59 else 13]
    values = minifloat_decode_reference(codes, fmt, bias)
    found = torch.tensor([_backend._C.minifloat_decode_scalar(c, has_sign, bias) for c in codes.tolist()])
    assert same(found, values)
    generator = torch.Generator().manual_seed(bias)
    x = torch.ldexp(torch.randn(3000, generator=generator), torch.randint(-80, 40, (3000,), generator=generator))
    x = torch.cat((x, values[~values.isnan()][::7], torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])))
    expected = minifloat_encode_reference(x, fmt, bias).int().tolist()
    assert [_backend._C.minifloat_encode_scalar(v, has_sign, bias) for v in x.tolist()] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_either_sign_stays_nan(backend):
    x = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf]).repeat(5)
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # smallest and full payload
    for fmt in FORMATS:
        assert minifloat_decode(minifloat_encode(bits, fmt, backend=backend), fmt, backend=backend).isnan().all()
        out = minifloat_decode(minifloat_encode(x, fmt, backend=backend), fmt, backend=backend)
        assert torch.equal(out.isnan(), x.isnan())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="fmt: expected one of 1-6-9, 0-6-10, got '1-5-10'"):
        minifloat_encode(torch.zeros(2), "1-5-10")
    with pytest.raises(TypeError, match="x: expected a floating"):
        minifloat_encode(torch.zeros(2, dtype=torch.int64), "1-6-9")
    with pytest.raises(TypeError, match=r"code: expected a uint16 torch.Tensor, got torch.int16"):
        minifloat_decode(torch.zeros(2, dtype=torch.int16), "1-6-9")
