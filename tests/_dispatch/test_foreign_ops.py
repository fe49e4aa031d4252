"""Ops of other libraries are as without a mode in all that a caller can see: also while a tracing mode catches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shipped import tensors_in
from support import EAGER, assert_same, outcome
from torch import Tensor

import dispatch_compile as dc

NAMESPACE = "dispatch_compile_kinds"


# ---- The kinds of op that there are


def squared(x: Tensor) -> Tensor:
    return x * x


class Squared(torch.autograd.Function):
    """The gradient of the op ``autograd``, twice what it should be, so that it can be told from autograd's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops, NAMESPACE).autograd(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 4 * ctx.saved_tensors[0]


def fails(x: Tensor) -> Tensor:
    raise KeyError("mine")


def doubles(x: Tensor) -> None:
    x.mul_(2)


def takes_lists(xs, weight, dims, shift=None, how="sum", *, negated=False, dtype=None, factor=1, others=None):
    y = torch.stack(xs).sum(dims[0]) * factor + (shift or 0.0)
    y = -y if negated else y
    return (y if weight is None else y * weight).to(dtype)


def takes_everything(x, sizes, pair=0, flags=None, c=1j, names=None, device=None, layout=None, memory_format=None):
    return (x * pair[0] * c.imag + len(names)).reshape(sizes).to(device).contiguous(memory_format=memory_format)


def explicit(body: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"CompositeExplicitAutograd": body}


def one_tensor(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x,), {}


@dataclass(frozen=True)
class Kind:
    """A schema without a name, kernels by dispatch key, and how it is called."""

    schema: str
    kernels: Mapping[str, Callable[..., Any]]
    arguments: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]] = one_tensor


KINDS = {
    "cpu": Kind("(Tensor x) -> Tensor", {"CPU": squared}),
    "explicit": Kind("(Tensor x) -> Tensor", explicit(squared)),
    "implicit": Kind("(Tensor x) -> Tensor", {"CompositeImplicitAutograd": squared}),
    "autograd": Kind("(Tensor x) -> Tensor", {"CPU": squared, "Autograd": Squared.apply}),
    "selects_backend": Kind("(Tensor x) -> Tensor", {"CPU": squared, "BackendSelect": lambda x: x + 7}),
    "undefined": Kind("(Tensor x) -> Tensor", {}),
    "fails": Kind("(Tensor x) -> Tensor", explicit(fails)),
    "no_tensors": Kind("(int n) -> Tensor", explicit(torch.ones), lambda x: ((3,), {})),
    "writes": Kind("(Tensor(a!) x) -> ()", explicit(doubles)),
    "writes_and_returns": Kind("(Tensor(a!) x) -> Tensor(a!)", explicit(lambda x: x.mul_(2))),
    "views": Kind("(Tensor(a) x) -> Tensor(a)", explicit(lambda x: x[1:])),
    "returns_its_argument": Kind("(Tensor x) -> Tensor", explicit(lambda x: x)),
    "several": Kind("(Tensor x) -> (Tensor, Tensor)", explicit(lambda x: (x.sin(), x.cos()))),
    "list": Kind("(Tensor x) -> Tensor[]", explicit(lambda x: [x.sin(), x.cos()])),
    "number": Kind("(Tensor x) -> int", explicit(lambda x: x.shape[0])),
    "tensor_and_number": Kind("(Tensor x) -> (Tensor, float)", explicit(lambda x: (x * 2, 0.5))),
    "random": Kind(
        "(Tensor x, *, Generator? generator=None) -> Tensor",
        explicit(lambda x, generator=None: x + torch.rand(3, generator=generator)),
    ),
    "seeded": Kind(
        "(Tensor x, *, Generator? generator=None) -> Tensor",
        explicit(lambda x, generator=None: x + torch.rand(3, generator=generator)),
        lambda x: ((x,), {"generator": torch.Generator().manual_seed(2)}),
    ),
    "lists": Kind(
        "(Tensor[] xs, Tensor? weight, int[] dims, float? shift=None, str how='sum', *, bool negated=False, "
        "ScalarType? dtype=None, Scalar factor=1, Tensor?[]? others=None) -> Tensor",
        explicit(takes_lists),
        lambda x: (([x, x + 1], None, [0]), {"negated": True, "dtype": torch.float64, "factor": 2, "shift": 0.5}),
    ),
    "everything": Kind(
        "(Tensor x, SymInt[] sizes, int[2] pair=0, bool[]? flags=None, complex c=1j, str[]? names=None, "
        "Device? device=None, Layout? layout=None, MemoryFormat? memory_format=None) -> Tensor",
        explicit(takes_everything),
        lambda x: (
            (x, [2, 6], 3, [True, False]),
            {"names": ["a"], "device": torch.device("cpu"), "memory_format": torch.contiguous_format},
        ),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, kind in KINDS.items():
        library.define(name + kind.schema)
        for key, kernel in kind.kernels.items():
            library.impl(name, kernel, key)
    yield
    library._destroy()


# ---- What a caller can see


def seen(kind: str, context: Callable[[], AbstractContextManager[Any]], requires_grad: bool) -> list[Any]:
    """The results or the error of a call, how they hang together with the argument, its new state, and gradients."""
    torch.manual_seed(3)
    leaf = torch.linspace(-1, 1, 12).reshape(4, 3).requires_grad_(requires_grad)
    with context():
        x = leaf.sin()
        version = None if x.is_inference() else x._version
        args, kwargs = KINDS[kind].arguments(x)
        results = outcome(getattr(getattr(torch.ops, NAMESPACE), kind), *args, **kwargs)
    relations = [
        (
            result is x,
            result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(),
            result._is_view(),
            type(result.grad_fn).__name__,
        )
        for result in tensors_in(results)
    ]
    if x.requires_grad:
        loss = sum(result.double().square().sum() for result in tensors_in(results)) + x.sum()
        gradients = outcome(torch.autograd.grad, loss, leaf)
    else:
        gradients = None
    return [results, relations, x, None if version is None else x._version - version, gradients]


CONTEXTS = {
    "plain": (nullcontext, False),
    "gradients": (nullcontext, True),
    "no_grad": (torch.no_grad, True),
    "inference_mode": (torch.inference_mode, False),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), True),
}
# A tracing mode catches them all but two, of which one never comes to BackendSelect and the other has a kernel there.
CAUGHT = [kind for kind in KINDS if kind not in ("implicit", "selects_backend")]


@pytest.mark.parametrize("context", list(CONTEXTS))
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("trace", [False, True], ids=["untraced", "traced"])
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.selective
def test_a_foreign_op_is_as_without_the_mode(trace, kind, context):
    expected = seen(kind, *CONTEXTS[context])
    mode = dc.DispatchCompileMode(config=EAGER, trace=trace)
    with mode:
        actual = seen(kind, *CONTEXTS[context])
    if trace:
        registrations = torch._C._dispatch_dump(f"{NAMESPACE}::{kind}")
        assert ("_dispatch/hooks.py" in registrations) == (kind in CAUGHT)
        assert mode.trace.events == []
    assert mode.cache.stats() == dc.NativeCache().stats()
    if kind == "undefined":
        actual[0], expected[0] = without_dispatch_table(actual[0]), without_dispatch_table(expected[0])
    assert_same(actual, expected)


def without_dispatch_table(error: Exception) -> Exception:
    """Below its first paragraph torch lists the op's kernels at every key, ours among them."""
    return type(error)(str(error).partition("\n\n")[0])


# ---- Custom ops that call IR ops


@pytest.fixture(scope="module")
def scaled_norm() -> Iterator[Any]:
    """A custom op with a gradient formula, of which either calls IR ops."""

    @torch.library.custom_op(f"{NAMESPACE}::scaled_norm", mutates_args=())
    def scaled_norm(x: Tensor, weight: Tensor) -> Tensor:
        return dc.ops.rms_norm(x, weight, 1e-6) * 2

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dc.ops.rms_norm(gradient, weight, 1e-6), (gradient * dc.ops.rms_norm(x, None, 1e-6)).sum(0)

    scaled_norm.register_autograd(backward, setup_context=setup_context)
    scaled_norm.register_fake(lambda x, weight: torch.empty_like(x))
    yield scaled_norm
    scaled_norm._lib._destroy()


PASSES = "x requires grad and grad mode is on"


@pytest.mark.parametrize(
    ("create_graph", "backward_does"),
    [(False, ["compiled", "compiled"]), (True, [PASSES, PASSES])],
    ids=["gradients", "gradients of gradients"],
)
def test_ir_ops_in_a_gradient_formula(create_graph, backward_does, scaled_norm):
    """Autograd calls it on the thread of backward, with grad mode off unless the gradient is to have a graph."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def run() -> Any:
        y = scaled_norm(x.sin(), weight)
        gradients = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=create_graph)
        return [y, y.grad_fn is not None, gradients]

    expected, mode = run(), dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        assert_same(run(), expected)
    assert [event.reason or event.action for event in mode.trace.events] == ["compiled", *backward_does]
    assert [event.depth for event in mode.trace.events] == [1, 0, 0]


@pytest.mark.parametrize("trace", [False, True], ids=["untraced", "traced"])
def test_opcheck_finds_the_same(trace, scaled_norm):
    def found() -> Any:
        args = (torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True))
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        return torch.library.opcheck(scaled_norm, args, test_utils=checks, raise_exception=False)

    expected = found()
    with dc.DispatchCompileMode(config=EAGER, trace=trace):
        assert found() == expected
    assert set(expected.values()) == {"SUCCESS"}
