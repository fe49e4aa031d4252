"""Random sequences of calls on one cache: each must do what eager does, whatever was compiled before it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import EAGER, assert_same, outcome
from torch import Tensor
from torch.types import Number

import dispatch_compile as dc

pytestmark = pytest.mark.run_once


def combined(x: Tensor, x_other: Tensor | None = None, by: Number = 1, dims: list[int] | None = None) -> Tensor:
    """Does something else for nearly everything that a guard must tell apart."""
    y = x * by if not isinstance(by, bool) else x + (3 if by else 5)
    if by == 0:
        y = y + 1 / torch.full((), float(by.real if isinstance(by, complex) else by))
    if x_other is not None:
        y = y * 7 if x is x_other else y + x_other
    if x.shape and x.shape[0] > 3:
        y = y + 11
    if x.is_contiguous():
        y = y + 13
    if torch.is_grad_enabled():
        y = y + 17
    if torch.are_deterministic_algorithms_enabled():
        y = y + 19
    y = y + torch.ones(())
    return y if dims is None else y.sum(dims)


def projected(x: Tensor, x_other: Tensor | None = None, by: Number = 1, dims: list[int] | None = None) -> Tensor:
    return x @ x_other.t() if x_other is not None else x @ x.t()


SCALARS = [True, False, 1, 0, 1.0, 0.0, -0.0, 2, 0.5, float("nan"), float("inf"), -float("inf"), 1j]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


@dataclass(frozen=True)
class TensorPlan:
    """How to make a tensor; made anew for every run, so that the runs share nothing."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    kind: str = "plain"

    def make(self) -> Tensor:
        with torch.inference_mode(self.kind == "inference"):
            return self._of_kind(self._laid_out())

    def _laid_out(self) -> Tensor:
        if self.layout == "column-major" and self.shape:
            return self._values((*self.shape[1:], self.shape[0])).movedim(-1, 0)
        if self.layout == "strided rows" and self.shape:
            return self._values((*self.shape[:-1], self.shape[-1] + 3))[..., 1 : 1 + self.shape[-1]]
        if self.layout == "misaligned":
            numel = torch.Size(self.shape).numel()
            return self._values((numel + 1,))[1:].view(self.shape)
        if self.layout == "broadcast" and self.shape:
            return self._values((1, *self.shape[1:])).expand(self.shape)
        return self._values(self.shape)

    def _values(self, shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        return (torch.arange(count, dtype=torch.float64) % 5 - 1.5).view(shape).to(self.dtype)

    def _of_kind(self, tensor: Tensor) -> Tensor:
        differentiable = self.dtype.is_floating_point or self.dtype.is_complex
        if self.kind == "parameter":
            return torch.nn.Parameter(tensor, requires_grad=False)
        if self.kind == "requires grad" and differentiable:
            return tensor.detach().requires_grad_()
        if self.kind == "conjugate" and self.dtype.is_complex:
            return tensor.conj()
        return tensor


@dataclass(frozen=True)
class CallPlan:
    x: TensorPlan
    other: TensorPlan | str | None = None  # "x": the same tensor again; "alias": another view of its memory
    by: Number = 1
    dims: tuple[int, ...] | None = None
    native: int = 0
    state: frozenset[str] = field(default_factory=frozenset)

    def run(self, op: dc.IrOp, mode: dc.DispatchCompileMode | None):
        x = self.x.make()
        other = {"x": lambda: x, "alias": lambda: x.view(x.shape)}[self.other] if isinstance(self.other, str) else None
        other = other() if other else (self.other.make() if self.other else None)
        with ExitStack() as entered:
            for name in sorted(self.state):
                entered.enter_context(STATES[name]())
            if mode is not None:
                entered.enter_context(mode)
            return outcome(op, x, other, self.by, None if self.dims is None else list(self.dims))


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def matmul_precision(precision: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "matmul precision": lambda: matmul_precision("medium"),
    "no grad": torch.no_grad,
}

sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 11])
layouts = st.sampled_from(["contiguous", "contiguous", "column-major", "strided rows", "misaligned", "broadcast"])
kinds = st.sampled_from(["plain", "plain", "plain", "parameter", "requires grad", "inference", "conjugate"])
shapes = st.one_of(
    st.tuples(sizes, st.just(3)), st.tuples(sizes, sizes), st.tuples(sizes), st.tuples(sizes, sizes, sizes)
)
shapes = st.one_of(shapes, st.just(()))
dtypes = st.sampled_from([torch.float32, torch.float32, *DTYPES])
tensors = st.builds(TensorPlan, shapes, dtypes, layouts, kinds)


@st.composite
def calls(draw) -> CallPlan:
    x = draw(tensors)
    same_shape = st.builds(TensorPlan, st.just(x.shape), dtypes, layouts, kinds)
    other = draw(st.one_of(st.none(), same_shape, tensors, st.just("x"), st.just("alias")))
    dims = draw(st.one_of(st.none(), st.just(()), st.just((0,)), st.just((0, 1)), st.just((1,))))
    states = draw(st.frozensets(st.sampled_from(list(STATES)), max_size=2))
    return CallPlan(x, other, draw(st.sampled_from(SCALARS)), dims, draw(st.sampled_from([0, 0, 1])), states)


@st.composite
def programs(draw) -> list[CallPlan]:
    """Few different calls, many times each: so that they meet what the others left in the cache."""
    different = draw(st.lists(calls(), min_size=1, max_size=5))
    return draw(st.lists(st.sampled_from(different), min_size=2, max_size=10))


def check(program: list[CallPlan], ops: list[dc.IrOp], mode: dc.DispatchCompileMode, **tolerance: float) -> None:
    for call in program:
        op = ops[call.native]
        assert_same(call.run(op, mode), call.run(op, None), **tolerance)


SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False
)


@SETTINGS
@given(programs())
def test_calls_on_a_fresh_cache(program):
    ops = [dc.register_op(name=f"guards_{native.__name__}")(native) for native in (combined, projected)]
    try:
        check(program, ops, dc.DispatchCompileMode(config=EAGER))
    finally:
        for op in ops:
            op.unregister()


def test_calls_on_a_cache_that_fills(define_ir_op):
    ops = [define_ir_op(native) for native in (combined, projected)]
    mode = dc.DispatchCompileMode(config=EAGER)

    @SETTINGS
    @given(calls())
    def one_more(call):
        check([call], ops, mode)

    one_more()
    stats = mode.cache.stats()
    assert stats.compiles > 20
    assert stats.asides > 0


def test_calls_through_inductor(define_ir_op):
    ops = [define_ir_op(native) for native in (combined, projected)]
    mode = dc.DispatchCompileMode()
    f32 = TensorPlan((5, 3))
    program = [
        CallPlan(f32),
        CallPlan(f32, by=True),
        CallPlan(f32, by=1.0),
        CallPlan(TensorPlan((3, 3)), by=1.0),
        CallPlan(TensorPlan((5, 3), layout="strided rows")),
        CallPlan(TensorPlan((11, 3), layout="misaligned")),
        CallPlan(f32, TensorPlan((5, 3), layout="column-major")),
        CallPlan(f32, "x"),
        CallPlan(f32, "alias"),
        CallPlan(f32, f32, dims=(0,)),
        CallPlan(TensorPlan((5, 3), kind="requires grad")),
        CallPlan(TensorPlan((5, 3), kind="inference"), state=frozenset({"no grad"})),
        CallPlan(f32, state=frozenset({"default dtype"})),
        CallPlan(f32, TensorPlan((2, 3)), native=1),
    ]
    check([*program, *program[::-1]], ops, mode, rtol=1e-5, atol=1e-5)
    assert mode.cache.stats().hits > len(program)
