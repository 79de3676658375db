# SPDX-License-Identifier: MIT
"""Which keys a query may attend to in a stream of text tokens followed by an image grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ._checks import shown

KINDS = ("row", "column", "conv", "dense")
_MOST = 2**31 - 1  # positions, and everything that is counted in them


@dataclass(frozen=True)
class AttentionPattern:
    """A causal pattern over `text_len` text tokens and then `grid` image tokens in raster order.

    A text query sees the text keys up to itself. An image query sees all text keys and, of the image keys k up to its
    own raster index q on a grid of width W:

    - "row": q - k < extent, a raster window that crosses row ends (W + 1 keys, itself included);
    - "column": the same column at or above;
    - "conv": the causal half of a kernel x kernel window; with `wraparound` by raster offsets alone, like the row
      window, else only inside the grid's rows;
    - "dense": all.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.

    Example:
        >>> AttentionPattern("row", text_len=256, grid=(32, 32)).num_pairs()
        328304
    """

    kind: str
    """"row", "column", "conv" or "dense"."""
    text_len: int
    """Text tokens before the image, 0 or more."""
    grid: tuple[int, int]
    """(height, width) of the image in tokens, each at least 1."""
    extent: int | None = None
    """Keys a row query sees, itself included; None means width + 1. Only for "row"."""
    kernel: int = 11
    """Side of the conv window, odd."""
    wraparound: bool = True
    """Whether the conv window crosses row ends."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {shown(self.kind)}")
        _check_int("text_len", self.text_len, 0)
        if not isinstance(self.grid, (tuple, list)) or len(self.grid) != 2:
            raise TypeError(f"grid: expected (height, width), got {shown(self.grid)}")
        for side in self.grid:
            _check_int("grid", side, 1)
        if self.length > _MOST:
            raise ValueError(f"grid: expected at most 2^31 - 1 positions with the text, got {self.length}")
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.extent is not None:
            _check_int("extent", self.extent, 1)
            if self.kind != "row":
                raise ValueError(f'extent: only kind "row" has one, got kind {self.kind!r}')
        elif self.kind == "row":
            object.__setattr__(self, "extent", self.grid[1] + 1)
        _check_int("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd size, got {self.kernel}")
        if not isinstance(self.wraparound, bool):
            raise TypeError(f"wraparound: expected a bool, got {shown(self.wraparound)}")

    @property
    def length(self) -> int:
        """Tokens in all: text_len + height * width."""
        return self.text_len + self.grid[0] * self.grid[1]

    @property
    def image_cache_len(self) -> int:
        """Slots that a ring of past image keys needs when one token follows the other."""
        height, width = self.grid
        if self.kind == "row":
            return min(self.extent, height * width)
        if self.kind == "conv":
            return min(self.kernel // 2 * (width + 1) + 1, height * width)
        return height * width

    def integers(self) -> tuple[int, ...]:
        """What kernels read: kind, text_len, height, width, extent, kernel, wraparound."""
        height, width = self.grid
        extent = 1 if self.extent is None else min(self.extent, height * width)
        return KINDS.index(self.kind), self.text_len, height, width, extent, self._kernel(), int(self.wraparound)

    def _kernel(self) -> int:
        """A kernel that reaches no further than over the whole image, and sees the same."""
        return min(self.kernel, 2 * self.grid[0] * self.grid[1] + 1)

    def mask(self, length: int | None = None) -> torch.Tensor:
        """Bool [L, L], True where query (row) may attend to key (column); `length` takes the first L tokens.

        Raises:
            TypeError: `length` is no int.
            ValueError: `length` is not in [0, self.length].
        """
        length = self.length if length is None else length
        _check_int("length", length, 0)
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        # what a mode makes is not what others may find in the cache
        plain = not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
        return (_kept_mask if plain else _mask)(self)[:length, :length].clone()

    def num_pairs(self, length: int | None = None) -> int:
        """Query-key pairs that attend."""
        return int(self.mask(length).sum())


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {shown(value)}")
    if not least <= value <= _MOST:
        raise ValueError(f"{name}: expected at least {least}, at most 2^31 - 1, got {shown(value)}")


def _mask(pattern: AttentionPattern) -> torch.Tensor:
    height, width = pattern.grid
    text_len, length = pattern.text_len, pattern.length
    index = torch.arange(height * width, device="cpu")
    offset = index[:, None] - index[None, :]  # q - k
    past = offset >= 0
    if pattern.kind == "row":
        image = past & (offset < pattern.extent)
    elif pattern.kind == "column":
        image = past & (offset % width == 0)
    elif pattern.kind == "dense":
        image = past
    else:
        half = pattern._kernel() // 2
        dy, dx = (torch.arange(-half, end, device="cpu") for end in (1, half + 1))
        dy, dx = torch.meshgrid(dy, dx, indexing="ij")
        if pattern.wraparound:
            offsets = -(width * dy + dx)
            image = past & torch.isin(offset, offsets)
        else:
            rows = index[:, None] // width - index[None, :] // width  # of q above k
            columns = index[None, :] % width - index[:, None] % width
            image = past & (rows <= half) & (columns.abs() <= half)
    mask = torch.zeros(length, length, dtype=torch.bool, device="cpu")
    mask[:text_len, :text_len] = torch.ones(text_len, text_len, device="cpu").tril().bool()
    mask[text_len:, :text_len] = True
    mask[text_len:, text_len:] = image
    return mask


_kept_mask = lru_cache(maxsize=32)(_mask)
