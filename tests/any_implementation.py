"""IR ops of every temper: whatever an implementation can do to its arguments, read of them, or return.

Their parameters' names and types say what calls may be given: see ``any_argument``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from torch import Tensor
from torch.types import Number

import dispatch_compile as dc

INT32_MAX = 2**31 - 1

# ---- Functions of their arguments alone, which run compiled for at least some arguments


def arithmetic(x: Tensor, x_other: Tensor | None = None, by: Number = 1) -> Tensor:
    y = x * by if x_other is None else x * by - x_other
    return y + torch.full((), by).reciprocal()  # the reciprocal tells 0.0 from -0.0


def arithmetic_of_floats(x: Tensor, scale: float, flag: bool = False) -> Tensor:
    return torch.where(x > 0, x * scale, x / scale) if flag else x.clamp(max=scale)


def reads_the_state(x: Tensor, weight: Tensor | None = None) -> Tensor:
    seen = (
        1
        + 2 * torch.is_grad_enabled()
        + 4 * torch.is_inference_mode_enabled()
        + 8 * (torch.get_default_dtype() is torch.float64)
        + 16 * torch.are_deterministic_algorithms_enabled()
        + 32 * torch.is_autocast_enabled("cpu")
        + 64 * ["highest", "high", "medium"].index(torch.get_float32_matmul_precision())
        + 256 * torch.get_num_threads()
    )
    return x * seen if weight is None else x * seen + weight


def reads_the_arguments(x: Tensor, weight: Tensor | None = None) -> Tensor:
    seen = 1
    for tensor in (x, weight):
        if tensor is not None:
            seen = 8 * seen + tensor.requires_grad + 2 * tensor.is_inference() + 4 * tensor.is_contiguous()
    return x.to(torch.float64) * seen


def reads_the_strides(x: Tensor) -> Tensor:
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x * 2
    return x * (sum(x.stride()) + 1)


def makes_constants(x: Tensor, flag: bool) -> Tensor:
    constants = torch.tensor([0.5, 1.5]).sum() + torch.arange(3.0).sum()
    return x * constants if flag else torch.ones(x.shape) * constants


def keeps_the_layout(x: Tensor, flag: bool) -> Tensor:
    return torch.empty_like(x).copy_(x) if flag else x.clone()


def changes_the_layout(x: Tensor, x_other: Tensor) -> tuple[Tensor, Tensor]:
    y = x + x_other
    return y, y.mT.contiguous() if y.dim() > 1 else -y


def fixes_the_layout(x: Tensor) -> Tensor:
    return (x * 2).contiguous()


def sums(x: Tensor, dims: list[int] | None, keep: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    return x.sum(dims, keepdim=keep, dtype=dtype)


def multiplies_matrices(x: Tensor, x_other: Tensor) -> Tensor:
    return x @ x_other.t()


def joins(x_items: list[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(x_items, dim)


def adds_what_is_there(x: Tensor, items: list[Tensor | None]) -> Tensor:
    total = x + len(items)
    for i, item in enumerate(items):
        total = total - i if item is None else total + (i + 1) * item
    return total


def needs_no_tensor(x: Tensor | None = None, size: int = 3) -> Tensor:
    return torch.arange(size).float() if x is None else x * size


def selects(x: Tensor, how: str, dim: int = -1) -> Tensor:
    if how == "cumulative":
        return x.cumsum(dim)
    if how == "sorted":
        return x.sort(dim)[0]
    if how == "softmax":
        return x.softmax(dim)
    raise ValueError(f"no such way: {how!r}")


def branches_on_the_dtype(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.abs()
    return x.sigmoid() if x.is_floating_point() else ~x


def branches_on_the_tokens(x: Tensor, more_than: int) -> Tensor:
    tokens = x.shape[0]
    return x * 2 if tokens > more_than else x * 3 if tokens % 2 else x * 5


def branches_on_equal_shapes(x: Tensor, x_other: Tensor) -> Tensor:
    return x * 2 + x_other.sum() if x.shape == x_other.shape else x * 3


def returns_sizes(x: Tensor, flag: bool) -> tuple[Tensor, Tensor]:
    tokens = x.shape[0]
    return torch.arange(tokens) * tokens, x.new_full((2,), tokens // 3 if flag else x.numel())


def slices(x: Tensor, upto: int) -> list[Tensor]:
    return [x[:upto] * 2, x[upto:] + 1, x[-1] * 3]


def pads(x: Tensor, upto: int) -> Tensor:
    return F.pad(x, (0, 0, 0, max(0, upto - x.shape[0]))) + x.shape[0]


def expands_its_result(x: Tensor) -> Tensor:
    return (x * 2).sum(0, keepdim=True).expand(x.shape)


def works_on_tensors_of_its_own(x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total.add_(x).mul_(2)
    total[..., :1] = 7
    return total


def converts(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)  # x itself if it has the dtype already


def makes_contiguous(x: Tensor) -> Tensor:
    return x.contiguous()  # x itself if it is so already


def conjugates(x: Tensor, flag: bool) -> Tensor:
    return (x * 2).conj() if flag else x.conj() * 2  # lazily, if x is complex


def sets_the_state_itself(x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.t() * torch.is_grad_enabled()


def looks_up(x: Tensor, indices: Tensor) -> Tensor:
    return x[indices] * 2


def divides_integers(x: Tensor, x_other: Tensor) -> Tensor:
    return x // x_other


def refuses_many_tokens(x: Tensor) -> Tensor:
    if x.shape[0] > 4:
        raise ValueError(f"too many tokens: {x.shape[0]}")
    return x * 2


def refuses_a_scalar(x: Tensor, by: Number) -> Tensor:
    if by == 1:
        raise ValueError(f"not by {by!r}")
    return x * by


def returns_an_argument(x: Tensor, weight: Tensor | None, flag: bool) -> tuple[Tensor, Tensor]:
    return x * 2, (x if flag or weight is None else weight)


def returns_a_number(x: Tensor) -> int:
    return x.shape[0] * 2


def returns_an_empty_list(x: Tensor) -> list[Tensor]:
    return []


def reshapes(x: Tensor) -> Tensor:
    return (x + 1).view(2, -1)


def calls_another_op(x: Tensor, scale: float) -> Tensor:
    return op_named("arithmetic")(x + 1, x, scale) * 2


def calls_itself(x: Tensor, depth: int) -> Tensor:
    return op_named("calls_itself")(x * 2, depth - 1) + 1 if depth > 0 else x * 3


# ---- For tensors of more elements than a 32-bit index counts: they compute with a few of them


def branches_on_the_number_of_elements(x: Tensor) -> Tensor:
    return x[:2, :2] * (2 if x.numel() > INT32_MAX else 3)


def computes_with_sizes(x: Tensor, flag: bool) -> Tensor:
    tokens = x.shape[0]
    return torch.full((3,), tokens * 3 - 1 if flag else tokens // 7 + x.stride(0))


def takes_the_last_token(x: Tensor) -> Tensor:
    return x[-1] * 2 + x[x.shape[0] // 2]


# ---- Compiled code would not behave as these do, or there can be none


def changes_an_argument(x: Tensor, by: Number, flag: bool) -> Tensor:
    if flag:
        x.mul_(by)
    return x + 1


def changes_an_argument_through_a_view(x: Tensor, x_other: Tensor) -> Tensor:
    x[:1].copy_(x_other[:1])
    return x_other * 2


def changes_an_item(x_items: list[Tensor]) -> Tensor:
    x_items[-1].copy_(x_items[0] + 1)
    return x_items[0] * 2


def writes_a_gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        (x * x).sum().backward()
    return x.detach() * 2


def returns_a_view(x: Tensor, how: str) -> Tensor:
    return x[1:] if how == "sorted" else x.detach() if how == "softmax" else x.mT


def returns_results_that_share_memory(x: Tensor) -> list[Tensor]:
    y = x + 1
    return [y, y[:1], y]


def returns_a_tensor_and_a_number(x: Tensor, by: Number) -> tuple[Tensor, float]:
    return x * by, 0.5


def returns_nothing(x: Tensor) -> None:
    x.add_(1)


def draws_random_numbers(x: Tensor, flag: bool) -> Tensor:
    return F.dropout(x, 0.5, training=True) if flag else x + torch.rand(1)


def reads_an_item(x: Tensor) -> Tensor:
    return x * x.sum().item()


def branches_on_a_value(x: Tensor) -> Tensor:
    return x * 2 if (x > 0).any() else x * 3


def selects_by_value(x: Tensor) -> Tensor:
    return x[x > 0]


def raises(x: Tensor) -> Tensor:
    raise LookupError("never")


def returns_what_its_schema_does_not_say(x: Tensor) -> Tensor:
    return [x * 2, x * 3]


def returns_what_requires_grad(x: Tensor) -> Tensor:
    return (x * 2.0).detach().requires_grad_()


def returns_a_parameter(x: Tensor) -> Tensor:
    return torch.nn.Parameter(x * 2, requires_grad=False)


def returns_an_inference_tensor(x: Tensor, flag: bool) -> Tensor:
    with torch.inference_mode(flag):
        return x * 2


def makes_an_argument_require_grad(x: Tensor) -> Tensor:
    x.requires_grad_()
    return x.detach() * 2


# ---- Not functions of their arguments alone: what the package does not notice

_tables: dict[int, Tensor] = {}


def forget_tables() -> None:
    """Let :func:`remembers_a_table` start anew."""
    _tables.clear()


def remembers_a_table(x: Tensor) -> Tensor:
    width = x.shape[-1]
    if width not in _tables:
        _tables[width] = torch.arange(width)
    return x * _tables[width]


def differentiates(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad((y * y * y).sum(), y)[0]


UNNOTICED = [remembers_a_table, differentiates]

# ---- All of them

COMPILED = [
    arithmetic,
    arithmetic_of_floats,
    reads_the_state,
    reads_the_arguments,
    reads_the_strides,
    makes_constants,
    keeps_the_layout,
    changes_the_layout,
    fixes_the_layout,
    sums,
    multiplies_matrices,
    joins,
    adds_what_is_there,
    needs_no_tensor,
    selects,
    branches_on_the_dtype,
    branches_on_the_tokens,
    branches_on_equal_shapes,
    returns_sizes,
    slices,
    pads,
    expands_its_result,
    works_on_tensors_of_its_own,
    converts,
    makes_contiguous,
    conjugates,
    sets_the_state_itself,
    looks_up,
    divides_integers,
    refuses_many_tokens,
    refuses_a_scalar,
    reshapes,
    calls_another_op,
    calls_itself,
    changes_an_argument,  # not with every flag
    returns_an_inference_tensor,  # not with every flag
    selects_by_value,  # if there are no values
    returns_an_argument,
    returns_a_number,  # not where it depends on a size that is dynamic
    returns_an_empty_list,
    returns_a_tensor_and_a_number,
    returns_what_its_schema_does_not_say,  # which the dispatcher refuses
]
COMPILED_AT_ANY_SIZE = [branches_on_the_number_of_elements, computes_with_sizes, takes_the_last_token]
NEVER_COMPILED = [
    changes_an_argument_through_a_view,
    changes_an_item,
    writes_a_gradient,
    returns_a_view,
    returns_results_that_share_memory,
    returns_nothing,
    draws_random_numbers,
    reads_an_item,
    branches_on_a_value,
    raises,
    returns_what_requires_grad,
    returns_a_parameter,
    makes_an_argument_require_grad,
]
SHIPPED = [
    dc.ops.rms_norm,
    dc.ops.fused_add_rms_norm,
    dc.ops.fused_add_rms_norm.maybe_inplace,
    dc.ops.silu_and_mul,
    dc.ops.gelu_and_mul,
    dc.ops.quant_fp8_static,
    dc.ops.quant_fp8_per_token,
    dc.ops.quant_fp8_per_group,
    dc.ops.concat_quant_fp8,
]


@dataclass(frozen=True)
class Subject:
    """An op to call.

    Attributes:
        parameters: names of its parameters, with their types.
        keyword_only: those that are given by name.
        compiles: whether it runs compiled for at least some arguments.
        any_size: whether it computes with a few elements only, however many there are.
    """

    name: str
    overload: Any
    parameters: dict[str, Any]
    keyword_only: frozenset[str]
    compiles: bool = True
    any_size: bool = False

    @staticmethod
    def of(name: str, overload: Any, native: Callable[..., Any], **properties: bool) -> Subject:
        types = get_type_hints(native)
        parameters = inspect.signature(native).parameters
        keyword_only = frozenset(p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY)
        return Subject(name, overload, {p: types[p] for p in parameters}, keyword_only, **properties)

    def __repr__(self) -> str:
        return self.name

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.name)  # Hypothesis would print every field


OF_TWO_PROVIDERS, OF_ANOTHER_LIBRARY = "doubles", "scales"
NAMES = [
    *(native.__name__ for native in [*COMPILED, *COMPILED_AT_ANY_SIZE, *NEVER_COMPILED]),
    *(str(op.torch_op) for op in SHIPPED),
    OF_TWO_PROVIDERS,
    OF_ANOTHER_LIBRARY,
]

PREFIX = "any_argument_"
CONFIG_PROVIDERS = ("native", "in_place")


def op_named(name: str) -> Any:
    """The op of a native implementation of this module, while :func:`subjects` lasts."""
    return getattr(torch.ops.dispatch_compile, PREFIX + name)


@contextmanager
def subjects() -> Iterator[dict[str, Subject]]:
    """An op for each implementation, and those that ship, by name, registered as long as the context lasts."""
    with ExitStack() as registered:

        def define(native: Callable[..., Any], **properties: Any) -> dc.IrOp:
            op = dc.register_op(name=PREFIX + native.__name__, **properties)(native)
            registered.callback(op.unregister)
            return op

        defined = [Subject.of(f.__name__, define(f).torch_op, f) for f in COMPILED]
        defined += [Subject.of(f.__name__, define(f).torch_op, f, any_size=True) for f in COMPILED_AT_ANY_SIZE]
        defined += [Subject.of(f.__name__, define(f).torch_op, f, compiles=False) for f in NEVER_COMPILED]
        defined += [Subject.of(f.__name__, define(f).torch_op, f) for f in UNNOTICED]
        defined += [Subject.of(str(op.torch_op), op.torch_op, _native_of(op)) for op in SHIPPED]
        defined.append(_with_two_providers(define))
        defined.append(registered.enter_context(_of_another_library()))
        yield {subject.name: subject for subject in defined}


def _native_of(op: Any) -> Callable[..., Any]:
    native: Callable[..., Any] = getattr(op, "op", op).impls["native"].impl_fn
    return native


def _with_two_providers(define: Callable[..., dc.IrOp]) -> Subject:
    """An op of which a provider that works in place takes every other number of tokens."""

    def doubles(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return x * 2 if weight is None else x * 2 + weight

    def even(x: Tensor, weight: Tensor | None = None) -> bool:
        return x.dim() > 0 and x.shape[0] % 2 == 0

    op = define(doubles, allow_inplace=True)

    @op.register_impl("in_place", supports_args=even, inplace=True)
    def doubles_in_place(x: Tensor, weight: Tensor | None = None) -> Tensor:
        x.mul_(2)
        return x if weight is None else x.add_(weight)

    op.set_default(["in_place", "native"])
    return Subject.of(OF_TWO_PROVIDERS, op.torch_op, doubles)


@contextmanager
def _of_another_library() -> Iterator[Subject]:
    """An op of a library that knows nothing of IR ops, with parameters that only have names."""

    def scales(x: Tensor, *, bias: Tensor | None = None, scale: float = 2.0, dims: list[int] | None = None) -> Tensor:
        y = x * scale if bias is None else x * scale + bias
        return y if dims is None else y.sum(dims)

    library = torch.library.Library("any_argument", "FRAGMENT")
    library.define("scales(Tensor x, *, Tensor? bias=None, float scale=2.0, int[]? dims=None) -> Tensor")
    library.impl("scales", scales, "CompositeExplicitAutograd")
    overload = torch.ops.any_argument.scales.default
    handle = dc.register_native(overload, scales)
    try:
        yield Subject.of(OF_ANOTHER_LIBRARY, overload, scales)
    finally:
        handle.remove()
        library._destroy()
