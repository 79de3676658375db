# SPDX-License-Identifier: MIT
"""A call: right arguments of an op, what is done to them, where it is called, and what may come of it.

"right" calls have to give the float64 reference's values and leave what they only read as it was. "wrong" calls have to
be refused: RuntimeError, ValueError or TypeError (IndexError for a target, as torch has it), whose message begins with
the argument's name and says what was expected and what came; nothing is changed by them. "either" may be one or the
other, because the fuzzer does not know what an op takes, but then wholly.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo  # or each worker would import it at its first fake tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from dalle_fast.ops.minifloat.reference import minifloat_decode_reference

from . import arguments as kinds
from .arguments import Draw, show
from .ops import SIGNATURES, Arguments, Signature
from .runner import Outcome

REFUSALS = (RuntimeError, ValueError, TypeError)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class WatchFunctions(TorchFunctionMode):
    """Sees calls of torch and changes nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class WatchOps(TorchDispatchMode):
    """Sees operators and changes nothing."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast(bfloat16)": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast(float16)": lambda: torch.autocast("cpu", torch.float16),
    "function mode": WatchFunctions,
    "dispatch mode": WatchOps,
    "two threads inside": lambda: threads(2),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
}


def is_real(value: Any) -> bool:
    """A strided tensor on the CPU, with memory of its own."""
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and not isinstance(value, torch._subclasses.FakeTensor)


def snapshot(value: Any) -> Any:
    """Copies, dense, without history."""

    def copied(t: Any) -> Any:
        if not is_real(t):
            return t
        with torch.no_grad():
            return (
                t.detach()
                .as_subclass(torch.Tensor)
                .resolve_conj()
                .resolve_neg()
                .clone(memory_format=torch.contiguous_format)
            )

    return tree_map(copied, value)


def same_bits(a: Any, b: Any) -> bool:
    flat_a, flat_b = _tensors(a), _tensors(b)
    return len(flat_a) == len(flat_b) and all(
        x.shape == y.shape and x.dtype == y.dtype and _bytes(x) == _bytes(y) for x, y in zip(flat_a, flat_b)
    )


def _bytes(t: torch.Tensor) -> bytes:
    return t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if is_real(t)]


class OpCall:
    """Case `number` of `seed` for one signature."""

    def __init__(self, signature: Signature, seed: int, number: int, without: frozenset[int]) -> None:
        draw = Draw(f"{seed}/{number}")
        self.signature, self.notes = signature, []
        draw.dtype = draw.choice(signature.dtypes)
        self.arguments: Arguments = signature.draw(draw)
        self.dtype = draw.dtype
        self.base, self.faults = "right", {}
        self.compare, self.finite_only, self.gradients, self.at_once = True, False, False, 1
        self.loose = 1.0
        self.contexts: list[str] = []
        self.kind = "real"
        if signature.refuses(self.arguments):
            self.base = "either"
        if draw.chance(0.3) and "backend" in signature.names:
            self.arguments["backend"] = draw.choice(("auto", "cpu", "reference"))
            if self.arguments["backend"] == "cpu":
                self.base = "either"  # there may be no kernel for this
        decorations = [draw.choice(_DECORATIONS) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
        decorations += [draw.choice(_WRONGS) for _ in range(draw.choice((0, 0, 0, 1, 1, 2)))]
        self.num_parts = len(decorations)
        for i, decorate in enumerate(decorations):
            if i not in without:
                note = ""
                with contextlib.suppress(RuntimeError, NotImplementedError, IndexError):  # what torch cannot make
                    note = decorate(self, Draw(f"{seed}/{number}/{i}"))
                if note:
                    self.notes.append(note)
        for name in signature.writes:
            if is_real(self.arguments.get(name)) and overlaps(self.arguments[name]):
                # decode_attention writes to two of four
                self.weaken("either" if signature.name == "decode_attention" else "wrong", f"overlap of {name}")
                self.at_once = 1  # threads get copies
        if "default dtype float64" in self.contexts or "two threads inside" in self.contexts:
            self.at_once = 1  # what is of the process, and set back in another order

    # ---- what decorations use

    def weaken(self, expect: str, name: str = "") -> None:
        """From right to either to wrong, for what has been done to the argument `name`."""
        self.faults[name] = expect

    @property
    def expect(self) -> str:
        return max([self.base, *self.faults.values()], key=("right", "either", "wrong").index)

    def tensor_names(self) -> list[str]:
        return [name for name, value in self.arguments.items() if is_real(value)]

    def floating_names(self) -> list[str]:
        return [
            n for n in self.tensor_names() if self.arguments[n].is_floating_point() and n not in self.signature.writes
        ]

    def pick(self, names: list[str], draw: Draw) -> str | None:
        return draw.choice(sorted(names)) if names else None

    # ---- running

    def describe(self) -> str:
        lines = [f"{self.signature.name}({', '.join(f'{k}={show(v)}' for k, v in self.arguments.items())})"]
        flags = [*self.notes, *self.contexts, *(["with gradients"] if self.gradients else [])]
        return f"{lines[0]}   [{self.expect}{'; ' if flags else ''}{'; '.join(flags)}]"

    def run(self) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.kind != "real":
                return self._run_shapes()
            if self.at_once > 1:
                return self._run_at_once()
            return self._run_once(self.arguments)

    def _invoke(self, arguments: Arguments) -> Any:
        with contextlib.ExitStack() as stack:
            for name in self.contexts:
                if self.kind == "real" or "autocast" not in name:  # which is for devices that compute
                    stack.enter_context(CONTEXTS[name]())
            return self.signature.function(**arguments)

    def _run_once(self, arguments: Arguments) -> Outcome:
        before = snapshot(arguments)
        leaves = self._leaves(arguments) if self.gradients else {}
        try:
            result = self._invoke(arguments)
        except Exception as error:
            return self._refused(error, arguments, before)
        if self.expect == "wrong":
            return Outcome("accepted", f"a wrong call gave {show(result)}")
        read = {k: v for k, v in arguments.items() if k not in self.signature.writes}
        if not same_bits(snapshot(read), {k: v for k, v in before.items() if k in read}):
            return Outcome("changed", "an argument that is only read has other values after the call")
        if self._aliases(result, arguments):
            return Outcome("alias", "the result lies in the memory of an argument")
        return self._check_values(result, arguments, before, leaves)

    def _leaves(self, arguments: Arguments) -> Arguments:
        """The arguments to take gradients of, which become leaves."""
        return {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.requires_grad}

    def _refused(self, error: Exception, arguments: Arguments, before: Arguments) -> Outcome:
        text = f"{type(error).__name__}: {error}"
        if self.expect == "right":
            return Outcome("refused a right call", text)
        if not self._is_refusal(error):
            return Outcome("raw", text)
        if not same_bits(snapshot(arguments), before):
            return Outcome("changed", f"arguments have other values after {text}")
        return Outcome("refused", text)

    def _is_refusal(self, error: Exception) -> bool:
        message = str(error)
        if type(error) not in (*REFUSALS, *([IndexError] if message.startswith("target: ") else [])):
            return False
        if re.match(r'backend="\w+" cannot run \w+: ', message):
            return True
        names = "|".join(self.signature.names)
        return bool(re.match(rf"({names})(\[\d+\])*(\.\w+)?: .*\bgot\b", message, re.DOTALL))

    def _aliases(self, result: Any, arguments: Arguments) -> bool:
        own = {k: v for k, v in arguments.items() if k != self.signature.returns}
        memory = {t.untyped_storage().data_ptr() for t in _tensors(own)} - {0}
        return (
            any(t.numel() and t.untyped_storage().data_ptr() in memory for t in _tensors(result))
            and self.signature.returns not in arguments
        )

    # ---- values

    def _expected(self, before: Arguments, leaves: Arguments) -> tuple[list[torch.Tensor], Arguments]:
        """The reference's results, in float64, and its arguments after the call."""

        def wide(name: str, value: Any) -> Any:
            if not is_real(value) or not value.is_floating_point() or name == "out":
                return value.clone() if is_real(value) else value
            return value.double().requires_grad_(name in leaves)

        arguments = {name: wide(name, v) for name, v in before.items() if name != "backend"}
        if isinstance(arguments.get("p"), (list, tuple)):
            arguments["p"] = [wide("p", t) for t in arguments["p"]]
        with contextlib.nullcontext() if leaves else torch.no_grad():
            return _tensors(self.signature.reference(**arguments)), arguments

    def _check_values(self, result: Any, arguments: Arguments, before: Arguments, leaves: Arguments) -> Outcome:
        try:
            expected, after = self._expected(before, leaves)
        except Exception as error:
            if not self.compare:  # huge numbers may be too much for it
                return Outcome("right")
            return Outcome("accepted", f"the reference refuses the call: {type(error).__name__}: {error}")
        actual = _tensors(result)
        if len(actual) != len(expected):
            return Outcome("value", f"{len(actual)} results, {len(expected)} of the reference")
        wrong = self._differ(actual, expected, self.signature.tolerance)
        if wrong and not (
            self.compare and self.signature.accepts is not None and self.signature.accepts(before, snapshot(actual))
        ):
            return Outcome("value", wrong)
        for name in self.signature.writes:
            if is_real(arguments.get(name)) and (
                wrong := self._differ([arguments[name]], [after[name]], self.signature.tolerance)
            ):
                return Outcome("value", f"{name} after the call: {wrong}")
        return self._check_gradients(result, expected, leaves, after) if leaves else Outcome("right")

    def _differ(self, actual: list, expected: list, tolerances: dict) -> str:
        for i, (a, e) in enumerate(zip(actual, expected)):
            a, e = snapshot(a), snapshot(e)
            if a.shape != e.shape:
                return f"result {i}: shape {list(a.shape)}, {list(e.shape)} of the reference"
            if not self.compare:
                continue
            if a.dtype == e.dtype == torch.uint16 and self.signature.decodes:
                a, e = (minifloat_decode_reference(t, "1-6-9") for t in (a, e))
            if not a.is_floating_point():
                if a.dtype != e.dtype or _bytes(a) != _bytes(e):
                    return f"result {i}: {show(a)}, {show(e)} of the reference"
                continue
            # of the operands where they are coarser: a loss of 16-bit logits is float32
            of_dtype = [tolerances.get(dtype, (0.0, 0.0)) for dtype in (a.dtype, self.dtype)]
            rtol, atol = max(r for r, _ in of_dtype), max(t for _, t in of_dtype)
            if self.loose > 1.0:
                low = tolerances.get(torch.bfloat16, (1e-2, 1e-2))
                rtol, atol = self.loose * max(rtol, low[0]), self.loose * max(atol, low[1])
            a, e = a.double(), e.double()
            off = ~torch.isclose(a, e, rtol=rtol, atol=atol, equal_nan=True)
            if self.finite_only:
                off &= e.isfinite()
            if off.any():
                j = off.flatten().nonzero()[0]
                return (
                    f"result {i}: {int(off.sum())} of {off.numel()} differ, at {int(j)}: "
                    f"{a.flatten()[j].item()}, {e.flatten()[j].item()} of the reference"
                )
        return ""

    def _check_gradients(self, result: Any, expected: list, leaves: Arguments, after: Arguments) -> Outcome:
        pairs = [(a, e) for a, e in zip(_tensors(result), expected) if e.requires_grad]
        if not pairs:
            return Outcome("right")
        if not all(a.requires_grad for a, _ in pairs):
            if any(name in ("no_grad", "inference_mode") for name in self.contexts):
                return Outcome("right")
            return Outcome("value", "the result takes no gradient")
        draw = Draw(f"upstream {len(leaves)} {pairs[0][0].numel()}")
        upstream = [draw.tensor(*a.shape).to(a.dtype) for a, _ in pairs]
        if draw.chance(0.3):
            upstream = [torch.ones((), dtype=a.dtype).expand(a.shape) for a, _ in pairs]
        elif draw.chance(0.5):
            upstream = [kinds._every_second(t, draw) if t.dim() else t for t in upstream]
        inputs = [leaves[name] for name in leaves]
        with contextlib.ExitStack() as stack:
            for name in self.contexts:
                if name in ("dispatch mode", "function mode", "two threads inside"):
                    stack.enter_context(CONTEXTS[name]())
            try:
                actual = torch.autograd.grad([a for a, _ in pairs], inputs, upstream, allow_unused=True)
            except Exception as error:
                return Outcome("raw", f"backward: {type(error).__name__}: {error}")
        if not self.compare:
            return Outcome("right")
        wanted = torch.autograd.grad(
            [e for _, e in pairs],
            [after[name] for name in leaves],
            [u.to(e.dtype) for u, (_, e) in zip(upstream, pairs)],
            allow_unused=True,
        )
        tolerances = self.signature.grad_tolerance or self.signature.tolerance
        self.compare = self.compare and not self.finite_only  # NaN spreads as the order of sums has it
        for name, a, e in zip(leaves, actual, wanted):
            if a is None:
                a = torch.zeros_like(leaves[name])
            if e is None:
                e = torch.zeros_like(after[name])
            if wrong := self._differ([a], [e], tolerances):
                return Outcome("value", f"gradient of {name}: {wrong}")
        return Outcome("right")

    # ---- several threads at once

    def _run_at_once(self) -> Outcome:
        every = [
            {k: snapshot(v) if k in self.signature.writes else v for k, v in self.arguments.items()}
            for _ in range(self.at_once)
        ]
        outcomes: list[Outcome | None] = [None] * self.at_once
        barrier = threading.Barrier(self.at_once)

        def work(i: int) -> None:
            barrier.wait()
            try:
                outcomes[i] = self._run_once(every[i])
            except Exception as error:
                outcomes[i] = Outcome("fuzzer", f"{type(error).__name__}: {error}")

        workers = [threading.Thread(target=work, args=(i,)) for i in range(self.at_once)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        bad = [o for o in outcomes if o.kind not in ("right", "refused")]
        return bad[0] if bad else outcomes[0]

    # ---- tensors without memory

    def _run_shapes(self) -> Outcome:
        """Meta and fake tensors: results look like those of real ones."""
        real = {k: snapshot(v) if k in self.signature.writes else v for k, v in self.arguments.items()}
        if self.kind == "meta":
            shadow = tree_map(lambda t: t.to("meta") if is_real(t) else t, dict(real))
            mode = contextlib.nullcontext()
        else:
            mode = torch._subclasses.FakeTensorMode()
            shadow = tree_map(lambda t: mode.from_tensor(t) if is_real(t) else t, dict(real))
        try:
            with mode:
                seen = self._invoke(shadow)
        except Exception as error:
            if self._is_refusal(error):
                return Outcome("refused", str(error)) if self.expect != "right" else self._only_real(error)
            return Outcome("raw", f"{self.kind}: {type(error).__name__}: {error}")
        try:
            result = self._invoke(real)
        except Exception as error:
            if type(error) is IndexError or "position" in str(error):  # a value that shapes do not show
                return Outcome("refused", str(error))
            return Outcome("accepted", f"{self.kind} tensors, but real ones: {type(error).__name__}: {error}")
        leaves = [
            [t for t in torch.utils._pytree.tree_leaves(r) if isinstance(t, torch.Tensor)] for r in (seen, result)
        ]
        for i, (a, e) in enumerate(zip(*leaves)):
            if (a.shape, a.dtype) != (e.shape, e.dtype):
                return Outcome("value", f"result {i}: {self.kind} {a.dtype} {a.shape}, real {e.dtype} {e.shape}")
        return Outcome("right")

    def _only_real(self, error: Exception) -> Outcome:
        if "meta" in str(error) or "memory" in str(error):
            return Outcome("refused", str(error))
        return Outcome("refused a right call", f"{self.kind}: {error}")


# ---- decorations: each says what it did, or nothing if there was nothing to do


def _layout(call: OpCall, draw: Draw) -> str | None:
    name = call.pick(call.tensor_names(), draw)
    if name is None:
        return None
    layout = draw.choice(sorted(kinds.LAYOUTS))
    tensor = call.arguments[name]
    if layout == "negative view" and name in call.signature.writes:
        return None
    if tensor.dim() == 0 and layout not in ("offset", "between elements", "negative view"):
        return None
    call.arguments[name] = kinds.LAYOUTS[layout](tensor, draw)
    return f"{name} {layout}"


def _view(call: OpCall, draw: Draw) -> str | None:
    """Expanded, or with overlapping rows."""
    name = call.pick([n for n in call.tensor_names() if call.arguments[n].dim()], draw)
    if name is None:
        return None
    change = draw.choice((kinds.expanded, kinds.windows))
    tensor = call.arguments[name]
    view = change(tensor, draw)
    if view is tensor:
        return None
    call.arguments[name] = view
    return f"{name} {change.__name__}"


def overlaps(t: torch.Tensor) -> bool:
    seen = torch.zeros(t.untyped_storage().nbytes() // t.itemsize, dtype=torch.int64)
    index = torch.arange(len(seen)).as_strided(t.shape, t.stride(), t.storage_offset()).flatten()
    return bool(seen.index_add_(0, index, torch.ones_like(index)).gt(1).any())


def _special(call: OpCall, draw: Draw) -> str | None:
    name = call.pick(call.floating_names(), draw)
    if name is None:
        return None
    call.arguments[name] = kinds.special(call.arguments[name], draw)
    call.finite_only = True
    return f"NaN or Inf in {name}"


def _extreme(call: OpCall, draw: Draw) -> str | None:
    name = call.pick(call.floating_names(), draw)
    if name is None:
        return None
    call.arguments[name] = kinds.extreme(call.arguments[name], draw)
    call.compare = False
    return f"extreme numbers in {name}"


def _codes(call: OpCall, draw: Draw) -> str | None:
    """Any 16 bits as a code: NaN and Inf are among them."""
    names = [n for n in call.tensor_names() if call.arguments[n].dtype == torch.uint16]
    name = call.pick(names, draw)
    if name is None or call.signature.name == "minifloat_decode":
        return None
    shape = call.arguments[name].shape
    call.arguments[name] = draw.integers(0, 2**16, *shape, dtype=torch.uint16)
    call.compare = False
    return f"any codes in {name}"


def _subclass(call: OpCall, draw: Draw) -> str | None:
    name = call.pick(call.tensor_names(), draw)
    if name is None:
        return None
    tensor = call.arguments[name]
    kind = draw.choice(("parameter", "subclass", "inference"))
    if tensor.is_inference():
        return None
    if kind == "parameter":
        takes_grad = tensor.is_floating_point() and name not in call.signature.writes and draw.chance(0.5)
        call.arguments[name] = torch.nn.Parameter(tensor, requires_grad=takes_grad)
    elif kind == "subclass":
        call.arguments[name] = tensor.as_subclass(kinds.Plain)
    else:
        with torch.inference_mode():
            call.arguments[name] = tensor.clone()
        call.weaken("either", name)  # it can neither be saved for a backward pass nor changed elsewhere
    return f"{name} {kind}"


def _gradient(call: OpCall, draw: Draw) -> str | None:
    names = [n for n in call.floating_names() if not call.arguments[n].is_inference()]
    if not names or call.kind != "real" or call.at_once > 1:
        return None
    chosen = [n for n in names if draw.chance(0.6)]
    for name in chosen:
        tensor = call.arguments[name]
        if not tensor.requires_grad:
            call.arguments[name] = tensor.requires_grad_() if tensor.is_leaf else tensor
    call.gradients = call.signature.differentiable
    return f"gradients of {', '.join(chosen)}"


def _context(call: OpCall, draw: Draw) -> str | None:
    name = draw.choice(sorted(CONTEXTS))
    if name in call.contexts or (call.contexts and any("autocast" in c for c in (name, *call.contexts))):
        return None
    if name == "default device meta" and call.signature.name == "AttentionPattern":
        return None
    call.contexts.append(name)
    if "autocast" in name and call.signature.casts:
        call.loose = 4.0
    return None


def _at_once(call: OpCall, draw: Draw) -> str | None:
    if call.gradients or call.kind != "real" or set(call.contexts) & {"two threads inside", "default dtype float64"}:
        return None
    call.at_once = 3
    return "three threads at once"


def _shapes_only(call: OpCall, draw: Draw) -> str | None:
    if call.gradients or call.at_once > 1 or call.contexts or call.signature.name == "AttentionPattern":
        return None
    call.kind = draw.choice(("meta", "fake"))
    return f"{call.kind} tensors"


_DECORATIONS = [_layout] * 5 + [_view] * 2 + [_special] * 2 + [_extreme, _codes] + [_subclass] * 2 + [_gradient] * 4
_DECORATIONS += [_context] * 4 + [_at_once, _shapes_only]


def _junk(call: OpCall, draw: Draw) -> str | None:
    """Something else in place of a tensor, a pattern, a word or a flag."""
    names = [n for n, v in call.arguments.items() if not _is_number(v)]
    name = call.pick(names, draw)
    if name is None:
        return None
    value = draw.choice(kinds.JUNK)
    call.arguments[name] = value
    # what some argument takes, as this one may
    odd = name in ("p", "grid", "backend") or value is None or isinstance(value, (int, float))
    call.weaken("either" if odd else "wrong", name)
    return f"{name} replaced"


def _number(call: OpCall, draw: Draw) -> str | None:
    """Another number, or what is none."""
    name = call.pick([n for n, v in call.arguments.items() if _is_number(v)], draw)
    if name is None:
        return None
    old = call.arguments[name]
    value = kinds.number_tensors(draw) if draw.chance(0.1) else draw.choice(kinds.NUMBERS)
    call.arguments[name] = value
    call.compare = call.compare and isinstance(value, (int, float)) and abs(value) < 100
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        call.weaken("either", name)
        return f"{name} another number"
    whole = isinstance(_default(call.signature, name), int) or name in ("text_len", "dim", "position", "seed", "offset")
    refused = isinstance(value, (str, list, complex)) or (isinstance(old, int) and whole and isinstance(value, bool))
    call.weaken("wrong" if refused else "either", name)
    return f"{name} another number"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _default(signature: Signature, name: str) -> Any:
    import inspect

    return inspect.signature(signature.function).parameters[name].default


def _tensor_kind(call: OpCall, draw: Draw) -> str | None:
    name = call.pick(call.tensor_names(), draw)
    if name is None or call.kind != "real":
        return None
    tensor = call.arguments[name].detach()
    kind = draw.choice(("dtype", "dtype", "shape", "shape", "shape", "layout", "meta"))
    if kind == "dtype":
        call.arguments[name] = kinds.other_dtype(tensor, draw)
        call.weaken("wrong" if call.arguments[name].dtype.is_complex else "either", name)
        call.compare = call.compare and tensor.dtype != torch.uint16
        call.loose = max(call.loose, 8.0)
    elif kind == "shape":
        call.arguments[name] = kinds.other_shape(tensor, draw)
        call.weaken("either", name)
        call.compare = call.compare and call.signature.name not in ("gumbel_softmax", "orthonormalize")
    elif kind == "layout":
        call.arguments[name] = kinds.foreign_layout(tensor, draw)
        call.weaken("wrong", name)
    else:
        call.arguments[name] = tensor.to("meta")
        call.weaken("wrong", name)
        if not call.tensor_names():
            for other in [n for n, v in call.arguments.items() if isinstance(v, torch.Tensor)]:
                call.weaken("either", other)
        call.compare = False
    return f"{name}: other {kind}"


def _target(call: OpCall, draw: Draw) -> str | None:
    """An index that is none."""
    target = call.arguments.get("target")
    if not is_real(target) or not target.numel() or target.dtype != torch.int64:
        return _tensor_kind(call, draw)
    target = call.arguments["target"] = target.clone()
    codes = call.arguments["weight"].shape[0] if is_real(call.arguments["weight"]) else 0
    value = draw.choice((codes, codes + 1, -1, -2, 2**40, -(2**63), 2**63 - 1))
    target.view(-1)[draw.integer(0, target.numel() - 1)] = value
    call.weaken("either" if value == call.arguments.get("ignore_index", -100) else "wrong", "target")
    return f"target {value}"


_WRONGS = [_junk] * 3 + [_number] * 4 + [_tensor_kind] * 6 + [_target]


class OpTarget:
    """All public ops, one after the other."""

    name = "ops"

    def __init__(self, only: str = "") -> None:
        self.only = only

    def make(self, seed: int, number: int, without: frozenset[int] = frozenset()) -> OpCall | None:
        signature = SIGNATURES[number % len(SIGNATURES)]
        if not re.search(self.only, signature.name):
            return None
        return OpCall(signature, seed, number, without)
