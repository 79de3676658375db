# SPDX-License-Identifier: MIT
"""How each public op is called rightly: random sizes and options, its float64 reference, its tolerances."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dalle_fast import ops
from dalle_fast.ops.conv2d.cases import ROOM as CONV2D
from dalle_fast.ops.decode_attention.cases import ROOM as DECODE
from dalle_fast.ops.dropout.cases import ROOM as DROPOUT
from dalle_fast.ops.gumbel_softmax.cases import ROOM as GUMBEL
from dalle_fast.ops.gumbel_softmax.reference import gumbel_noise
from dalle_fast.ops.householder.reference import orthonormalize_reference
from dalle_fast.ops.linear_cross_entropy.cases import ROOM as LINEAR_CE
from dalle_fast.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from dalle_fast.ops.max_pool2d.reference import max_pool2d_reference
from dalle_fast.ops.minifloat.reference import (
    minifloat_decode_reference,
    minifloat_encode_reference,
)
from dalle_fast.ops.null.reference import null_reference
from dalle_fast.ops.powersgd.reference import powersgd_project_reference, powersgd_reconstruct_reference
from dalle_fast.ops.sparse_attention.cases import ROOM as ATTENTION
from dalle_fast.ops.vq_bottleneck.cases import ROOM as VQ

from .arguments import FLOATS, Draw

Arguments = dict[str, Any]
Tolerance = dict[torch.dtype, tuple[float, float]]
EXACT: Tolerance = dict.fromkeys((*FLOATS, torch.uint16), (0.0, 0.0))
KINDS = ("row", "column", "conv", "dense")


@dataclass(frozen=True)
class Signature:
    """A public function, seen from outside."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    """Takes the arguments by name, `backend` excepted."""
    draw: Callable[[Draw], Arguments]
    """Arguments of a right call. `draw.dtype` is that of its floating tensors."""
    tolerance: Tolerance
    grad_tolerance: Tolerance = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (*FLOATS[:2], *FLOATS)
    writes: tuple[str, ...] = ()
    """Arguments that it changes."""
    returns: str = ""
    """The argument that it returns, if any."""
    differentiable: bool = False
    casts: bool = False
    """Whether autocast rounds its operands."""
    refuses: Callable[[Arguments], bool] = lambda arguments: False
    """Whether a size that is 0, of arguments otherwise right, is refused."""
    decodes: bool = False
    """Whether results of uint16 are codes of 1-6-9, to be compared as numbers."""
    accepts: Callable[[Arguments, list[torch.Tensor]], bool] | None = None
    """(arguments, results) -> whether results that differ from the reference's are right too."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.function).parameters)


# ---- one op after the other


def _null(draw: Draw) -> Arguments:
    return {"x": draw.tensor(draw.size(), draw.size())}


def _conv2d(draw: Draw) -> Arguments:
    batch, num_in, num_out = draw.size(most=5), draw.size(most=9), draw.size(most=9)
    height, width, kernel = draw.size(most=17), draw.size(), draw.choice((1, 1, 3, 3, 5, 7))
    upsample = draw.chance(0.3)
    weight = draw.tensor(num_out, num_in, kernel, kernel, scale=max(num_in * kernel**2, 1) ** -0.5)
    arguments = {"x": draw.tensor(batch, num_in, height, width), "weight": weight, "bias": draw.tensor(num_out)}
    if draw.chance(0.5):
        arguments["residual"] = draw.tensor(batch, num_out, (1 + upsample) * height, (1 + upsample) * width)
    options = {"gain": draw.choice((0.25, -2.0, 1, 0)), "relu": draw.chance(0.5), "upsample": upsample}
    return arguments | {name: value for name, value in options.items() if draw.chance(0.7) or name == "upsample"}


def _pattern(draw: Draw, most: int = 6) -> ops.AttentionPattern:
    kind, grid = draw.choice(KINDS), (draw.integer(1, most), draw.integer(1, most))
    options: Arguments = {}
    if kind == "row" and draw.chance(0.5):
        options["extent"] = draw.choice((1, 2, grid[1], 50))
    if kind == "conv":
        options = {"kernel": draw.choice((1, 3, 5, 11)), "wraparound": draw.chance(0.5)}
    return ops.AttentionPattern(kind, draw.choice((0, 1, 3, 8, 17)), grid, **options)


def _decode(draw: Draw) -> Arguments:
    pattern, dim = _pattern(draw), draw.size(most=17)
    text_batch, heads = draw.size(most=3), draw.size(most=3)
    group = draw.choice((1, 1, 2))
    position = draw.integer(0, pattern.length - 1)
    share = 1 if position < pattern.text_len else draw.choice((1, 2, 3))
    batch, slots = text_batch * share, pattern.image_cache_len + draw.choice((0, 0, 1, 5))
    text, image = (text_batch, heads, pattern.text_len, dim), (batch, heads, slots, dim)
    names = {"q": (batch, heads * group, dim), "k": (batch, heads, dim), "v": (batch, heads, dim)}
    names |= {"text_k": text, "text_v": text, "image_k": image, "image_v": image}
    arguments = {name: draw.tensor(*shape) for name, shape in names.items()} | {"pattern": pattern}
    on_device = draw.chance(0.3)
    arguments["position"] = torch.tensor(position).view(draw.choice(((), (1,)))) if on_device else position
    return arguments | ({"scale": draw.choice((0.3, 1, None))} if draw.chance(0.4) else {})


def _decode_refuses(a: Arguments) -> bool:
    return 0 in (*a["q"].shape[1:], a["k"].shape[1]) or (a["text_k"].shape[0] == 0 and a["q"].shape[0] > 0)


def _noise(draw: Draw, rows: int) -> Arguments:
    numbers = (0, 1, 7, 2**31, 2**40 + 1, 2**63 - 1, 2**63 + 5, 2**64 - 1, -1, -(2**63))
    row_offset = draw.choice((0, 1, 11, 2**31, 2**32 - rows))
    return {"seed": draw.choice(numbers), "offset": draw.choice(numbers), "row_offset": row_offset}


def _some(draw: Draw, arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if draw.chance(0.6)}


def _dropout(draw: Draw) -> Arguments:
    shape = [draw.size(most=17) for _ in range(draw.integer(1, 4))]
    rows = math.prod(shape[:-1]) if shape[-1] else 0
    noise = _noise(draw, rows)
    if draw.chance(0.4):
        noise.pop("row_offset")
    return {"x": draw.tensor(*shape), "p": draw.choice((0.0, 0, 0.1, 0.5, 0.99, 1e-12))} | noise


def _gumbel(draw: Draw) -> Arguments:
    shape = [draw.size(most=17) for _ in range(draw.integer(1, 4))]
    dim = draw.integer(-len(shape), len(shape) - 1)
    rows = math.prod(shape) // shape[dim] if shape[dim] else 0
    options = _some(draw, _noise(draw, rows) | {"hard": draw.chance(0.4), "return_kl": draw.chance(0.4)})
    return {"logits": draw.tensor(*shape), "tau": draw.choice((0.5, 1, 0.7, 4.0)), "dim": dim} | options


def _gumbel_accepts(a: Arguments, results: list[torch.Tensor]) -> bool:
    """A hard sample within rounding of the largest."""
    if not a.get("hard"):
        return False
    last = a["logits"].movedim(a["dim"], -1).double()
    noise = gumbel_noise(
        results[0].numel(),
        last.shape[-1],
        seed=a.get("seed", 0),
        offset=a.get("offset", 0),
        row_offset=a.get("row_offset", 0),
    )
    perturbed = last + noise.reshape(last.shape)
    chosen = perturbed.gather(-1, results[0].unsqueeze(-1)).squeeze(-1)
    return bool(((perturbed.amax(-1) - chosen) < 1e-5 * (1 + chosen.abs())).all())


def _linear_ce(draw: Draw) -> Arguments:
    rows, width, codes = draw.size(), draw.size(), draw.size()
    target = draw.integers(0, codes, rows)
    arguments = {"x": draw.tensor(rows, width), "weight": draw.tensor(codes, width), "target": target}
    if draw.chance(0.5):
        arguments["bias"] = draw.tensor(codes)
    options = {"chunk_rows": draw.choice((None, 1, 3, 100)), "upstream": draw.choice((1.0, 0.3, 2, 0.0))}
    if draw.chance(0.4):
        options["ignore_index"] = draw.choice((-100, 0, 2, -1))
        target[draw.integers(0, 2, rows).bool()] = options["ignore_index"]
    if not codes:
        target.fill_(options.get("ignore_index", -100))
    return arguments | {name: value for name, value in options.items() if name == "ignore_index" or draw.chance(0.6)}


def _max_pool2d(draw: Draw) -> Arguments:
    even = [2 * draw.size(most=9) for _ in range(2)] if draw.chance(0.7) else [draw.size(), draw.size()]
    return {"x": draw.tensor(draw.size(most=4), draw.size(most=4), *even)}


def _shape(draw: Draw) -> list[int]:
    return [draw.size(most=17) for _ in range(draw.integer(0, 4))]


def _encode(draw: Draw) -> Arguments:
    shape = _shape(draw)
    x = torch.ldexp(torch.randn(shape, generator=draw.generator), draw.integers(-70, 5, *shape)).to(draw.dtype)
    return {"x": x, "fmt": draw.choice(("1-6-9", "0-6-10"))}


def _encode_reference(x: torch.Tensor, fmt: str) -> torch.Tensor:
    return minifloat_encode_reference(x.float(), fmt)


def _encode_accepts(a: Arguments, results: list[torch.Tensor]) -> bool:
    """Any code of NaN for NaN."""
    expected = _encode_reference(**{name: a[name] for name in ("x", "fmt")})
    nan = minifloat_decode_reference(results[0], a["fmt"]).isnan() & a["x"].isnan()
    return bool((nan | (results[0].int() == expected.int())).all())


def _decode_codes(draw: Draw) -> Arguments:
    return {"code": draw.integers(0, 2**16, *_shape(draw), dtype=torch.uint16), "fmt": draw.choice(("1-6-9", "0-6-10"))}


def _orthonormalize(draw: Draw) -> Arguments:
    def matrix() -> torch.Tensor:
        r, batch = draw.size(most=17), [draw.size(most=3)] if draw.chance(0.5) else []
        return draw.tensor(*batch, r + draw.choice((0, 1, 5, 20)), r, dtype=dtype)

    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    p = matrix() if draw.chance(0.6) else [matrix() for _ in range(draw.integer(0, 3))]
    if draw.chance(0.2) and isinstance(p, torch.Tensor):
        p = minifloat_encode_reference(p.float(), "1-6-9")
    return {"p": p} | ({"eps": draw.choice((0.0, 0.5, 1, 1e-6))} if draw.chance(0.5) else {})


def _orthonormalize_reference(p: Any, eps: float = 1e-6) -> Any:
    if isinstance(p, torch.Tensor):
        return orthonormalize_reference(p, eps)
    return [orthonormalize_reference(t, eps) for t in p]


def _orthonormalize_accepts(a: Arguments, results: list[torch.Tensor]) -> bool:
    """Of a matrix of nearly dependent columns any basis of what they span: orthonormal, and P = Q (Q^T P)."""
    matrices = a["p"] if isinstance(a["p"], list) else [a["p"]]
    for p, q in zip(matrices, results, strict=True):
        codes = p.dtype == torch.uint16
        p, q = (minifloat_decode_reference(t, "1-6-9").double() if codes else t.double() for t in (p, q))
        p = p + a.get("eps", 1e-6) * torch.eye(*p.shape[-2:], dtype=torch.float64)
        bound = 2e-2 if codes else 1e-4
        if (q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).abs().gt(bound).any():
            return False
        if (q @ (q.mT @ p) - p).abs().gt(bound * (1 + p.abs().amax())).any():
            return False
    return True


def _project(draw: Draw) -> Arguments:
    m, n, r = draw.size(), draw.size(most=17), draw.size(most=9)
    factor = draw.short(n, r)
    arguments = {
        "error": minifloat_encode_reference(draw.short(m, n), "1-6-9"),
        "factor": minifloat_encode_reference(factor, "1-6-9") if draw.chance(0.5) else factor,
    }
    if draw.chance(0.6):
        arguments["grad"] = draw.short(m, n).to(draw.dtype)
    return arguments | _some(draw, {"inverse_grad_scale": draw.choice((0.5, 1)), "scale": draw.choice((2.0, 1))})


def _reconstruct(draw: Draw) -> Arguments:
    m, n, r = draw.size(), draw.size(most=17), draw.size(most=9)
    arguments = {name: minifloat_encode_reference(draw.short(k, r), "1-6-9") for name, k in (("p", m), ("q", n))}
    if draw.chance(0.6):
        arguments["error"] = minifloat_encode_reference(draw.short(m, n), "1-6-9")
    if draw.chance(0.4):
        arguments["out"] = torch.full((m, n), torch.nan)
    return arguments | _some(draw, {"grad_factor": draw.choice((0.25, 1)), "error_factor": draw.choice((0.5, 1))})


def _reconstruct_reference(p, q, error=None, *, out=None, grad_factor=1.0, error_factor=1.0):
    grad = powersgd_reconstruct_reference(p, q, error, grad_factor, error_factor)
    return grad if out is None else out.copy_(grad)


def _attention(draw: Draw) -> Arguments:
    pattern, dim, batch = _pattern(draw), draw.size(most=33), draw.size(most=3)
    heads, group, length = draw.size(most=3), draw.choice((1, 1, 2)), draw.integer(0, pattern.length)
    if draw.chance(0.4):
        length = pattern.length
    arguments = {"q": draw.tensor(batch, heads * group, length, dim)}
    arguments |= {name: draw.tensor(batch, heads, length, dim) for name in ("k", "v")}
    return arguments | {"pattern": pattern} | ({"scale": draw.choice((0.3, 1, None))} if draw.chance(0.4) else {})


def _vq(draw: Draw) -> Arguments:
    batch, channels, codes, width = draw.size(most=4), draw.size(), draw.size(), draw.size(most=17)
    grid = [draw.size(most=5), draw.size(most=5)] if draw.chance(0.7) else []
    ones = [1, 1] if draw.chance(0.3) else []
    arguments = {
        "x": draw.tensor(batch, channels, *grid),
        "head_weight": draw.tensor(codes, channels, *ones, scale=max(channels, 1) ** -0.5),
        "head_bias": draw.choice((None, draw.tensor(codes))),
        "codebook": draw.tensor(width, codes, *ones),
        "tau": draw.choice((0.5, 1, 4.0)),
    }
    options = _noise(draw, math.prod([batch, *grid])) | {"codebook_bias": draw.choice((None, draw.tensor(width)))}
    return arguments | _some(draw, options)


def _attention_pattern(draw: Draw) -> Arguments:
    pattern = _pattern(draw)
    fields = {"kind": pattern.kind, "text_len": pattern.text_len, "grid": draw.choice((tuple, list))(pattern.grid)}
    options = {"kernel": pattern.kernel, "wraparound": pattern.wraparound}
    if pattern.kind == "row":
        options["extent"] = pattern.extent
    return fields | {name: value for name, value in options.items() if draw.chance(0.7) or pattern.kind == "conv"}


def _mask(*args: Any, **arguments: Any) -> torch.Tensor:
    """The pattern's mask: what a pattern is."""
    pattern = ops.AttentionPattern(*args, **arguments)
    mask = pattern.mask()
    assert pattern.num_pairs() == int(mask.sum())
    return mask


_mask.__signature__ = inspect.signature(ops.AttentionPattern)


def _mask_reference(kind, text_len, grid, extent=None, kernel=11, wraparound=True) -> torch.Tensor:
    height, width = grid
    half, extent = kernel // 2, width + 1 if extent is None else extent

    def sees(q: int, k: int) -> bool:
        if k > q or (q < text_len or k < text_len):
            return k <= q
        q, k = q - text_len, k - text_len
        if kind == "row":
            return q - k < extent
        if kind == "column":
            return (q - k) % width == 0
        if kind == "dense":
            return True
        if wraparound:
            return any(q - k == width * dy - dx for dy in range(half + 1) for dx in range(-half, half + 1))
        return q // width - k // width <= half and abs(q % width - k % width) <= half

    length = text_len + height * width
    return torch.tensor([[sees(q, k) for k in range(length)] for q in range(length)]).view(length, length)


def _tolerances(tolerance: Tolerance, factor: float = 2.0) -> Tolerance:
    """Those of the room's cases, with room for sizes that are not theirs; float64 runs on the reference."""
    result = {dtype: (factor * rtol, factor * atol) for dtype, (rtol, atol) in tolerance.items()}
    return {torch.float16: (4e-3, 4e-3), torch.float64: (1e-9, 1e-9)} | result


SIGNATURES = (
    Signature("null", ops.null, null_reference, _null, EXACT, differentiable=True),
    Signature(
        "conv2d",
        ops.conv2d,
        CONV2D.reference,
        _conv2d,
        _tolerances(CONV2D.tolerance),
        _tolerances(CONV2D.grad_tolerance, 4.0),
        differentiable=True,
        casts=True,
    ),
    Signature(
        "decode_attention",
        ops.decode_attention,
        DECODE.reference,
        _decode,
        _tolerances(DECODE.tolerance),
        writes=("text_k", "text_v", "image_k", "image_v"),
        refuses=_decode_refuses,
    ),
    Signature(
        "dropout", ops.dropout, DROPOUT.reference, _dropout, _tolerances(DROPOUT.tolerance, 1.0), differentiable=True
    ),
    Signature(
        "gumbel_softmax",
        ops.gumbel_softmax,
        GUMBEL.reference,
        _gumbel,
        _tolerances(GUMBEL.tolerance),
        _tolerances(GUMBEL.grad_tolerance or GUMBEL.tolerance, 4.0),
        differentiable=True,
        refuses=lambda a: 0 in a["logits"].shape and bool(a.get("hard") or a.get("return_kl")),
        accepts=_gumbel_accepts,
    ),
    Signature(
        "linear_cross_entropy",
        ops.linear_cross_entropy,
        lambda chunk_rows=None, upstream=1.0, **a: linear_cross_entropy_reference(**a),
        _linear_ce,
        _tolerances(LINEAR_CE.tolerance),
        _tolerances(LINEAR_CE.grad_tolerance, 4.0),
        differentiable=True,
        casts=True,
        refuses=lambda a: 0 in a["weight"].shape[:1],
    ),
    Signature("max_pool2d", ops.max_pool2d, max_pool2d_reference, _max_pool2d, EXACT, differentiable=True),
    Signature("minifloat_encode", ops.minifloat_encode, _encode_reference, _encode, EXACT, accepts=_encode_accepts),
    Signature("minifloat_decode", ops.minifloat_decode, minifloat_decode_reference, _decode_codes, EXACT),
    Signature(
        "orthonormalize",
        ops.orthonormalize,
        _orthonormalize_reference,
        _orthonormalize,
        {torch.float32: (0.0, 2e-5), torch.float64: (1e-6, 1e-6), torch.uint16: (0.0, 0.0)},
        accepts=_orthonormalize_accepts,
        decodes=True,
    ),
    Signature(
        "powersgd_project",
        ops.powersgd_project,
        powersgd_project_reference,
        _project,
        EXACT,
        writes=("error",),
        decodes=True,
    ),
    Signature(
        "powersgd_reconstruct",
        ops.powersgd_reconstruct,
        _reconstruct_reference,
        _reconstruct,
        EXACT,
        writes=("error", "out"),
        returns="out",
        decodes=True,
    ),
    Signature(
        "sparse_attention",
        ops.sparse_attention,
        ATTENTION.reference,
        _attention,
        _tolerances(ATTENTION.tolerance),
        _tolerances(ATTENTION.grad_tolerance or ATTENTION.tolerance, 4.0),
        differentiable=True,
        refuses=lambda a: 0 in (a["k"].shape[1], a["q"].shape[3]),
    ),
    Signature(
        "vq_bottleneck",
        ops.vq_bottleneck,
        VQ.reference,
        _vq,
        _tolerances(VQ.tolerance),
        _tolerances(VQ.grad_tolerance or VQ.tolerance, 4.0),
        differentiable=True,
        casts=True,
        refuses=lambda a: 0 in a["head_weight"].shape[:1],
    ),
    Signature("AttentionPattern", _mask, _mask_reference, _attention_pattern, EXACT),
)
assert {s.name for s in SIGNATURES} == set(ops.__all__), "every public op is fuzzed"
