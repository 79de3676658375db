# SPDX-License-Identifier: MIT
"""One call registers an op with torch: schema, implementation, fake, autograd.

Rooms know this function only, so the form of registration can change here alone. `Library.define/impl` costs about
2.5 us a call, a third of `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..memory import is_plain
from ._checks import NOT_KEPT

NAMESPACE = "dalle_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
IMPLEMENTATIONS: dict[str, Callable] = {}
"""What was registered, by op name: tests run it on tensors of a device that is not there."""


def no_second_derivative(op: str) -> dict[str, Callable]:
    """`setup_context` and `backward` for a backward op: without them autograd would take its derivative for zero."""

    def backward(ctx, *_):
        raise RuntimeError(f'{op} has no second derivative; backend="reference" (plain torch) has one')

    return {"setup_context": lambda ctx, inputs, output: None, "backward": backward}


def _is_eager(inputs: tuple) -> bool:
    """Whether nothing but autograd watches: CPU tensors, no profiler, mode, transform, subclass or lazy view.

    An op then runs without the dispatcher, whose turns through Python cost 30 us for a forward and a backward pass.
    """
    for x in inputs:
        if isinstance(x, torch.Tensor) and (not is_plain(x) or x.is_neg()):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _shorter(name: str, overload: Callable, implementation: Callable, setup_context, backward) -> Callable:
    """The op of an overload, past the dispatcher where that makes no difference."""

    def forward(ctx, *inputs):
        output = implementation(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), members)

    def call(*inputs):
        if torch.compiler.is_compiling() or not _is_eager(inputs):
            return overload(*inputs)
        return function.apply(*inputs) if torch.is_grad_enabled() else implementation(*inputs)

    names = [argument.name for argument in overload._schema.arguments]

    def checked(*inputs):
        try:
            return call(*inputs)
        except RuntimeError as error:
            if "nference tensor" in str(error):
                for argument, x in zip(names, inputs):
                    if isinstance(x, torch.Tensor) and x.is_inference():
                        raise RuntimeError(f"{argument}: {NOT_KEPT}") from error
            raise

    return checked


def register_op(
    name: str,
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Defines `dalle_fast::name`.

    Args:
        name: the room's name, with a suffix for its further ops (`null`, `null_backward`).
        schema: arguments and results, e.g. "(Tensor x, float scale) -> Tensor". Mutated arguments are `Tensor(a!)`;
            no result may alias an argument.
        implementation: runs on CPU and CUDA tensors; allocates the results and calls `_C`.
        fake: same arguments; returns empty results with the right shape, strides, dtype, device, and reads no data.
        setup_context: `(ctx, inputs, output)`, saves what `backward` needs.
        backward: `(ctx, *grads)`, one gradient or None per input. It calls registered ops, so it compiles too.

    Returns:
        The op to call, with positional arguments.
    """
    # Kernels read any strides, but saved tensors and fakes agree only if a compiler keeps the eager ones.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(name + schema, tags=tags)
    IMPLEMENTATIONS[name] = implementation
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is None:
        return overload
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return _shorter(name, overload, implementation, setup_context, backward)
