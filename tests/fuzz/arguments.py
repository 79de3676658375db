# SPDX-License-Identifier: MIT
"""What tensors and numbers may look like: sizes, layouts that keep the values, and things that are no arguments."""

from __future__ import annotations

import decimal
import fractions
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _can_be_copied(dtype: torch.dtype) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros(2, dtype=torch.uint8).to(dtype)[::2].clone()
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


# All that torch has, those almost without arithmetic included.
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype) and _can_be_copied(d)}, key=str)
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)


class Draw:
    """Random numbers of a case: Python's for choices, torch's for values."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        self.dtype = torch.float32

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def choice(self, values: Sequence[Any]) -> Any:
        return self.random.choice(values)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def size(self, zero: float = 0.06, most: int = 33) -> int:
        """0 and 1 more often than their share."""
        if self.chance(zero):
            return 0
        return 1 if self.chance(0.12) else self.choice([s for s in SIZES if s <= most])

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers, rounded to `dtype`."""
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """In [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator).to(dtype)

    def short(self, *shape: int) -> torch.Tensor:
        """Multiples of 1/8 in (-1, 1): products and sums of some of them are exact in float32."""
        return torch.randint(-7, 8, shape, generator=self.generator) / 8


# ---- layouts that keep the values


def _padded(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    dim, before, after = draw.integer(0, t.dim() - 1), draw.integer(0, 3), draw.integer(0, 5)
    shape = list(t.shape)
    shape[dim] += before + after
    storage = torch.zeros(shape, dtype=torch.uint8).to(t.dtype)
    view = storage.narrow(dim, before, t.shape[dim])
    view.copy_(t)
    return view


def _permuted(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    order = list(range(t.dim()))
    draw.random.shuffle(order)
    inverse = [order.index(i) for i in range(t.dim())]
    return t.permute(order).contiguous().permute(inverse)


def _every_second(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    dim, step = draw.integer(0, t.dim() - 1), draw.choice((2, 3))
    shape = list(t.shape)
    shape[dim] *= step
    index = [slice(None)] * t.dim()
    index[dim] = slice(None, None, step)
    view = torch.zeros(shape, dtype=torch.uint8).to(t.dtype)[tuple(index)]
    view.copy_(t)
    return view


def _offset(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    begin = draw.integer(1, 9)
    view = torch.zeros(t.numel() + begin, dtype=torch.uint8).to(t.dtype)[begin:].view(t.shape)
    view.copy_(t)
    return view


def _dense(t: torch.Tensor) -> torch.Tensor:
    """A copy whose strides are those of its shape, even where nothing depends on them."""
    return t.detach().resolve_neg().resolve_conj().new_empty(t.shape).copy_(t)


def _between_elements(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """At an address that is no multiple of the element's size."""
    if t.numel() == 0 or t.itemsize == 1 or t.dtype.is_complex:
        return t
    size = t.numel() * t.itemsize
    begin = draw.integer(1, t.itemsize - 1)
    buffer = bytearray(begin + size)
    buffer[begin:] = _dense(t).view(-1).view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=begin).view(t.shape)


def _negative_view(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    if t.dtype not in (torch.float32, torch.float64):
        return t
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _strange_strides(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Dimensions of size 1, and empty tensors, may have any stride."""
    if t.numel() > 0 and 1 not in t.shape:
        return t
    t = t.contiguous()
    strides = [draw.choice((0, 1, 7, 1 << 40)) if n <= 1 or not t.numel() else s for n, s in zip(t.shape, t.stride())]
    return t.as_strided(t.shape, strides)


LAYOUTS: dict[str, Callable[[torch.Tensor, Draw], torch.Tensor]] = {
    "padded": _padded,
    "permuted": _permuted,
    "every second": _every_second,
    "offset": _offset,
    "between elements": _between_elements,
    "negative view": _negative_view,
    "strange strides": _strange_strides,
}


# ---- views that change the values, but are tensors like others to who only reads


def expanded(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """All alike along one dimension, with stride 0."""
    dim = draw.integer(0, t.dim() - 1)
    return t.narrow(dim, 0, 1).expand(t.shape) if t.shape[dim] else t


def windows(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Rows that overlap each other."""
    strides = [1] * t.dim()
    strides[draw.integer(0, t.dim() - 1)] = draw.choice((1, 2))
    need = 1 + sum(s * (n - 1) for s, n in zip(strides, t.shape) if n)
    flat = t.contiguous().view(-1)
    return t if flat.numel() < need or not t.numel() else flat.as_strided(t.shape, strides)


def special(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """NaN and Inf in some places."""
    t = t.clone(memory_format=torch.contiguous_format)
    flat = t.view(-1)
    for _ in range(draw.integer(1, 3)):
        if flat.numel():
            flat[draw.integer(0, flat.numel() - 1)] = draw.choice((float("nan"), float("inf"), -float("inf")))
    return t


def extreme(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Numbers near the ends of the dtype's range, zeros of both signs among them."""
    info = torch.finfo(t.dtype)
    values = torch.tensor(
        [info.max, -info.max, info.tiny, info.smallest_normal / 2, 0.0, -0.0, 1.0], dtype=torch.float64
    )
    index = torch.randint(0, len(values), t.shape, generator=draw.generator)
    return values[index].to(t.dtype)


# ---- tensors of other kinds


class Plain(torch.Tensor):
    """A subclass without behaviour of its own."""


def foreign_layout(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """A tensor without strides: sparse, nested, or oneDNN's."""
    t = t.as_subclass(torch.Tensor)
    if t.dtype not in FLOATS:  # few of the others can be so
        t = t.to(torch.float32)
    kind = draw.choice(("coo", "csr", "nested", "jagged", "mkldnn"))
    if kind == "csr" and t.dim() == 2:
        return t.to_sparse_csr()
    if kind in ("nested", "jagged") and t.dim() > 1 and t.shape[0] > 0:
        layout = torch.strided if kind == "nested" else torch.jagged
        return torch.nested.nested_tensor(list(t.detach().unbind(0)), layout=layout)
    if kind == "mkldnn" and t.dtype == torch.float32 and t.dim() > 0:
        return t.to_mkldnn()
    return t.to_sparse()


def other_dtype(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Of any dtype of torch."""
    return t.to(draw.choice(DTYPES))


def other_shape(t: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Of another rank or another size."""
    kind = draw.choice(("more", "fewer", "flat", "scalar", "size", "size", "size", "swap"))
    if kind == "more":
        return t.unsqueeze(draw.integer(0, t.dim()))
    if kind == "fewer" and t.dim():
        return t.select(0, 0) if t.shape[0] else t.flatten()
    if kind == "flat":
        return t.flatten()
    if kind == "scalar":
        return t.flatten()[0] if t.numel() else t.new_zeros(())
    if kind == "swap" and t.dim() > 1:
        return t.transpose(0, draw.integer(1, t.dim() - 1))
    if not t.dim():
        return t.reshape(1)
    shape = list(t.shape)
    dim = draw.integer(0, t.dim() - 1)
    shape[dim] = draw.choice((0, 1, shape[dim] + 1, max(shape[dim] - 1, 0), 2 * shape[dim]))
    return torch.full(shape, t.flatten()[0].item() if t.numel() else 0, dtype=t.dtype)


# ---- what is no argument at all

JUNK: tuple[Any, ...] = (
    None,
    "x",
    "",
    b"1",
    [],
    [1.0],
    (),
    {},
    object(),
    torch.Tensor,
    float,
    3,
    -1,
    2.5,
    True,
    1j,
    np.zeros((2, 2), dtype=np.float32),
    np.float32(1.5),
    np.int64(2),
    torch.float32,
    torch.Size([2, 2]),
    lambda: None,
)
NUMBERS: tuple[Any, ...] = (
    float("nan"),
    float("inf"),
    -float("inf"),
    1e300,
    -1e300,
    1e-320,
    0,
    0.0,
    -0.0,
    -1,
    -1.0,
    1,
    2,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63),
    -(2**63) - 1,
    10**400,
    True,
    False,
    0.5,
    np.float64(0.5),
    np.float32(0.5),
    np.int64(1),
    np.bool_(True),
    fractions.Fraction(1, 2),
    decimal.Decimal("0.5"),
    "1",
    None,
    [1],
    1j,
)


def number_tensors(draw: Draw) -> torch.Tensor:
    """Numbers as tensors."""
    return draw.choice(
        (torch.tensor(0.5), torch.tensor(1), torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor(1j))
    )


def show(value: Any) -> str:
    """One line for people."""
    if isinstance(value, torch.Tensor):
        try:
            strides = list(value.stride()) if value.layout == torch.strided and not value.is_nested else value.layout
            grad = ", requires_grad" if value.requires_grad else ""
            where = f", {value.device.type}" if value.device.type != "cpu" else ""
            kind = type(value).__name__
            name = str(value.dtype).removeprefix("torch.")
            data = ""
            if value.numel() <= 6 and where == "" and kind in ("Tensor", "Parameter", "Plain"):
                data = f" = {value.tolist()}"
            return f"{kind}({name}, {list(value.shape)}, strides {strides}{where}{grad}){data}"
        except Exception as error:  # a nested tensor tells little
            return f"{type(value).__name__}({error.__class__.__name__})"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(v) for v in value) + "]"
    text = repr(value)
    return text if len(text) < 120 else text[:117] + "..."
