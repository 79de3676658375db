# SPDX-License-Identifier: MIT
"""What every public op asks of its arguments, said in one way: the name, what was expected, what came."""

from __future__ import annotations

from typing import Any

import torch

from .. import errors

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = torch.finfo(torch.float32).max
NOT_KEPT = "expected a tensor that a backward pass can keep, got one of torch.inference_mode; clone it outside"
_LONGEST = 60  # characters of a value in a message


def shown(value: Any) -> str:
    """`value` in a message: of a tensor its dtype and shape, never its data."""
    if isinstance(value, torch.Tensor):
        return f"tensor of {value.dtype}"
    return errors.shown(value, _LONGEST)


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """float32, bfloat16 and float16."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def check_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS, kind: str = "a floating") -> None:
    """Raises TypeError for what is no tensor with strides of one of `dtypes`; `kind` is what messages call them."""
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        rare = isinstance(value, torch.Tensor) and value.is_floating_point() and dtypes is FLOATS
        more = f" ({names_of(dtypes)} are taken)" if rare else ""
        raise TypeError(f"{name}: expected {kind} torch.Tensor, got {got}{more}")
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense torch.Tensor with strides, got {got}")


def check_int(name: str, value: Any, low: int | None = None) -> None:
    """Raises TypeError for what is no int (a bool is none), ValueError for one below `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {shown(value)}")
    if low is not None and value < low:
        raise ValueError(f"{name}: expected at least {low}, got {shown(value)}")


def check_int64(name: str, value: Any) -> None:
    """Raises TypeError or ValueError for what is no int of 64 bits."""
    check_int(name, value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {shown(value)}")


def check_bool(name: str, value: Any) -> None:
    """Raises TypeError for what is no bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")


def check_number(name: str, value: Any) -> None:
    """Raises TypeError for what is no int or float (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")


def finite(name: str, value: Any) -> float:
    """`value` as a float that float32 can hold; raises TypeError or ValueError."""
    if type(value) is float and -_LARGEST <= value <= _LARGEST:
        return value
    check_number(name, value)
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {shown(value)} (float32 ends at 3.4e38)")
    return float(value)


def check_kept(kept: dict[str, torch.Tensor], *others: torch.Tensor | None) -> None:
    """Raises RuntimeError for a tensor of torch.inference_mode among those that a backward pass would have to keep."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if any(tensor is not None and tensor.requires_grad for tensor in (*kept.values(), *others)):
        for name, tensor in kept.items():
            if tensor.is_inference():
                raise RuntimeError(f"{name}: {NOT_KEPT}")


def _may_overlap(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether some elements may share memory: dimensions by stride, each beyond all that the smaller ones reach."""
    if len(shape) == 2 and stride[0] > 0 and stride[1] >= stride[0] * shape[0]:  # a transposed matrix
        return False
    if 0 in shape:
        return False
    reach = 0
    for step, size in sorted((s, n) for s, n in zip(stride, shape) if n > 1):
        if step <= reach:
            return True
        reach += step * (size - 1)
    return False


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for a tensor that cannot be changed in place: elements share memory, or it is frozen."""
    if not tensor.is_contiguous() and _may_overlap(tensor.shape, tensor.stride()):
        raise ValueError(
            f"{name}: expected elements that share no memory, as it is changed in place, "
            f"got shape {list(tensor.shape)} with strides {list(tensor.stride())}"
        )
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name}: expected a tensor that may be changed, got one of torch.inference_mode")
