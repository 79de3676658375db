# SPDX-License-Identifier: MIT
"""One call registers an op with torch: schema, implementation, fake, autograd.

Rooms know this function only, so the form of registration can change here alone. `Library.define/impl` costs about
2.5 us a call, a third of `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "dalle_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
IMPLEMENTATIONS: dict[str, Callable] = {}
"""What was registered, by op name: tests run it on tensors of a device that is not there."""


def no_second_derivative(op: str) -> dict[str, Callable]:
    """`setup_context` and `backward` for a backward op: without them autograd would take its derivative for zero."""

    def backward(ctx, *_):
        raise RuntimeError(f'{op} has no second derivative; backend="reference" (plain torch) has one')

    return {"setup_context": lambda ctx, inputs, output: None, "backward": backward}


def is_eager(x: torch.Tensor) -> bool:
    """Whether nothing but autograd watches the CPU tensor `x`: no compiler, mode, transform or subclass.

    An op may then run without the dispatcher, whose turns through Python cost some 60 us for a forward and a backward.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def register_op(
    name: str,
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> torch._ops.OpOverload:
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
        The overload to call.
    """
    # Kernels read any strides, but saved tensors and fakes agree only if a compiler keeps the eager ones.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(name + schema, tags=tags)
    IMPLEMENTATIONS[name] = implementation
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
