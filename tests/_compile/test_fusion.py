"""IR ops that an implementation calls: what is fused, what stays a call, and that neither goes stale."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile import ops
from dispatch_compile._numerics.bitwise import ROUNDS_IN_CPP
from dispatch_compile.testing import assert_expected_trace

COMPOSITIONS = [name for name in ops.__all__ if "_quant_fp8_per" in name]


def kernels(mode: dc.DispatchCompileMode, op: dc.IrOp, *args: Any) -> int:
    """How many kernels the compiled code of a call has, and how many ops it calls."""
    code = mode.explain(op, *args).generated_code
    assert code is not None
    return len(re.findall(r"= async_compile\.cpp_pybinding", code)) + len(
        re.findall(r"= torch\.ops\.\w+\.\w+\.\w+\(", code)
    )


def arguments_of(name: str, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    make = torch.Generator().manual_seed(tokens)
    x, residual = (torch.randn(tokens, 256, generator=make).to(dtype) for _ in range(2))
    weight = torch.randn(256, generator=make).to(dtype)
    if name.startswith("silu"):
        return (x,)
    return (x, residual, weight, 1e-6) if "add" in name else (x, weight, 1e-6)


def of_two(define_ir_op: Callable[..., dc.IrOp], **options: Any) -> tuple[dc.IrOp, dc.IrOp]:
    """``outer(x) = 3 * inner(x)`` with ``inner(x) = x + 1``."""

    def inner(x: Tensor) -> Tensor:
        return x + 1

    inner_op = define_ir_op(inner, name="fusion_inner", **options)

    def outer(x: Tensor) -> Tensor:
        return inner_op(x) * 3

    return define_ir_op(outer, name="fusion_outer"), inner_op


@pytest.fixture
def two(define_ir_op):
    return of_two(define_ir_op)


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER, trace=True)


def ones(tokens: int = 4) -> Tensor:
    return torch.ones(tokens, 3)


def said(mode: dc.DispatchCompileMode) -> list[str]:
    """What the trace says of each call."""
    return [str(event).partition("  # ")[2] for event in mode.trace.events]


# ---- What ships


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_what_ships_is_one_kernel_and_one_call(name):
    op, mode = getattr(ops, name), dc.DispatchCompileMode(trace=True)
    for tokens in (7, 64):
        args = arguments_of(name, tokens)
        expected = op(*args)
        with mode:
            actual = op(*args)
        assert_close(actual, expected)
    assert kernels(mode, op, *args) == 1
    assert (mode.cache.stats().compiles, mode.cache.stats().hits, len(mode.trace.events)) == (1, 2, 2)
    first, _, second = name.partition("_quant_")
    assert [event.fuses for event in mode.trace.events] == [(first, f"quant_{second}")] * 2


def assert_close(actual: Any, expected: Any) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        torch.testing.assert_close(one.float(), other.float(), rtol=0.13 if one.itemsize == 1 else 1e-4, atol=1e-2)


@pytest.mark.skipif(not ROUNDS_IN_CPP, reason="this torch's C++ code does not round between two ops")
def test_what_is_given_between_rounds_as_it_does_apart():
    """Without the rounding, a scale would be that of the unrounded product."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    mode = dc.DispatchCompileMode()
    with mode:
        _, scale = ops.silu_and_mul_quant_fp8_per_group(x)
        _, apart = ops.quant_fp8_per_group(ops.silu_and_mul(x))
    unrounded = ops.quant_fp8_per_group(ops.silu_and_mul(x.float()))[1]
    largest = scale.mul(448)
    torch.testing.assert_close(largest, largest.bfloat16().float(), rtol=1e-6, atol=0)
    assert not torch.equal(scale, unrounded)
    torch.testing.assert_close(scale, apart, rtol=2**-7, atol=0)


# ---- The trace, and explain


def test_trace(two):
    outer, inner = two
    x = ones()
    mode = dc.DispatchCompileMode(config=EAGER)
    assert_expected_trace(
        lambda: [outer(x), outer(x), outer(ones(1))],
        """\
dispatch_compile::fusion_outer(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]; fuses fusion_inner
dispatch_compile::fusion_outer(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, reused: [s0, 3]; fuses fusion_inner
dispatch_compile::fusion_outer(t: f32[1, 3])  ->  t: f32[1, 3]  # compiled native, new: [1, 3]; fuses fusion_inner; x's shape is [1, 3], was [s0, 3]""",  # noqa: E501 - a line is a call
        mode=mode,
    )
    inner.register_impl("fast")(faster)
    with inner.set_priority(["fast"]):
        assert_expected_trace(
            lambda: outer(x),
            """\
dispatch_compile::fusion_outer(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]; not fusion_inner: provider 'fast' is not in providers ('native',); fusion_inner's call is not fused, was fused (native)
  dispatch_compile::fusion_inner(t: f32[4, 3])  ->  t: f32[4, 3]  # aside fast, provider 'fast' is not in providers ('native',)""",  # noqa: E501 - a line is a call
            mode=mode,
        )


def faster(x: Tensor) -> Tensor:
    return x + 100


def test_explain(two, mode):
    outer, inner = two
    inner.register_impl("fast")(faster)
    told = mode.explain(outer, ones())
    assert (told.fuses, told.not_fused) == (("fusion_inner",), {})
    assert "\nfuses: fusion_inner\n" in str(told)
    assert "torch.ops.aten.add.Tensor(x, 1)" in told.graph
    with inner.set_priority(["fast"]):
        told = mode.explain(outer, ones())
    assert told.fuses == ()
    assert "\ndoes not fuse fusion_inner: provider 'fast' is not in providers ('native',)\n" in str(told)
    assert "torch.ops.dispatch_compile.fusion_inner.default(x)" in told.graph
    assert len(mode.cache) == 0


# ---- Priorities


def test_each_priority_has_code_of_its_own(two, mode):
    outer, inner = two
    inner.register_impl("fast")(faster)
    runs = [([], 6), (["fast"], 303), ([], 6), (["native"], 6), (["fast", "native"], 303), (["native", "fast"], 6)]
    for _ in range(2):
        for priority, expected in runs:
            with inner.set_priority(priority), mode:
                assert outer(ones()).unique().tolist() == [expected]
    assert mode.cache.stats().compiles == 2
    assert mode.cache.stats().hits == 2 * len(runs)


def test_a_default_set_between_calls(two, mode):
    outer, inner = two
    inner.register_impl("fast")(faster)
    with mode:
        for priority, expected in ((["fast"], 303), (["native"], 6), (["fast"], 303)):
            inner.set_default(priority)
            assert outer(ones()).unique().tolist() == [expected]


def test_a_priority_changed_in_the_middle_of_a_compilation(define_ir_op):
    outer, inner = of_two(define_ir_op)
    inner.register_impl("fast")(faster)

    def backend(graph, inputs):
        inner.set_default(["fast"])
        return graph

    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend), trace=True)
    with mode:
        assert outer(ones()).unique().tolist() == [303]
        assert outer(ones()).unique().tolist() == [303]
    assert "changed while it was compiled" in mode.trace.events[0].reason
    assert mode.trace.events[-2].not_fused


def test_both_providers_may_be_compiled(two):
    outer, inner = two
    inner.register_impl("fast")(faster)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", providers=("native", "fast")), trace=True)
    with mode:
        assert outer(ones()).unique().tolist() == [6]
        with inner.set_priority(["fast"]):
            assert outer(ones()).unique().tolist() == [303]
    assert [event.fuses for event in mode.trace.events] == [("fusion_inner",)] * 2
    assert mode.trace.events[1].difference == "fusion_inner's call is fused (fast), was fused (native)"


def test_another_configuration_has_code_of_its_own(two):
    outer, inner = two
    inner.register_impl("fast")(faster)
    cache = dc.NativeCache()
    for _ in range(2):
        for providers, fuses in ((("native",), ()), (("native", "fast"), ("fusion_inner",))):
            config = dc.CompileConfig(backend="eager", providers=providers)
            mode = dc.DispatchCompileMode(config=config, cache=cache, trace=True)
            with inner.set_priority(["fast"]), mode:
                assert outer(ones()).unique().tolist() == [303]
            assert [event.fuses for event in mode.trace.events if "outer" in event.op] == [fuses]
    assert cache.stats().compiles == 2


def test_an_op_that_is_gone_is_not_in_the_code(define_ir_op, mode):
    """The name is then another op's."""

    def plus(amount: float) -> Callable[..., Any]:
        def inner(x: Tensor) -> Tensor:
            return x + amount

        return inner

    def outer(x: Tensor) -> Tensor:
        return torch.ops.dispatch_compile.fusion_passing(x) * 3

    outer_op = define_ir_op(outer)
    for amount, expected in ((1.0, 6), (2.0, 9)):
        inner = dc.register_op(plus(amount), name="fusion_passing")
        with mode:
            assert outer_op(ones()).unique().tolist() == [expected]
        inner.unregister()
    assert [event.fuses for event in mode.trace.events] == [("fusion_passing",)] * 2
    with mode, pytest.raises(AttributeError, match="fusion_passing"):
        outer_op(ones())


def test_a_reference_that_is_removed_is_not_in_the_code(define_opaque, define_ir_op, mode):
    def kernel(x: Tensor) -> Tensor:
        return x + 1

    def reference(x: Tensor) -> Tensor:
        return x + 2

    opaque = define_opaque(kernel, fake=torch.empty_like)
    outer = define_ir_op(lambda_of(opaque))
    handle = dc.register_native(opaque, reference)
    with mode:
        assert outer(ones()).unique().tolist() == [9]
    handle.remove()
    with mode:
        assert outer(ones()).unique().tolist() == [6]
    handle = dc.register_native(opaque, reference)
    with mode:
        assert outer(ones()).unique().tolist() == [9]
    handle.remove()


def lambda_of(op: Any) -> Callable[..., Any]:
    def outer(x: Tensor) -> Tensor:
        return op(x) * 3

    return outer


# ---- supports_args


def test_an_implementation_for_few_tokens(two, mode):
    outer, inner = two
    inner.register_impl("fast", supports_args=lambda x: x.shape[0] <= 16)(faster)
    with inner.set_priority(["fast", "native"]), mode:
        for _ in range(2):
            for tokens in (1, 2, 16, 17, 64, 10_000, 0):
                assert set(outer(ones(tokens)).unique().tolist()) == ({303} if tokens <= 16 else {6}) - (
                    {303} if tokens == 0 else set()
                )
    assert mode.cache.stats().compiles == 4  # none, one, few and many
    assert mode.cache.stats().fallbacks == 0


@pytest.mark.parametrize("reads", ["a global", "the closure", "a helper", "a helper's global"])
def test_constants_that_change(define_ir_op, mode, reads):
    outer, inner = of_two(define_ir_op)
    scope: dict[str, Any] = {"LIMIT": 16, "helper": LIMITS[16]}
    if reads == "a global":
        exec("def supports(x): return x.shape[0] <= LIMIT", scope)
    elif reads == "a helper":
        exec("def supports(x): return x.shape[0] <= helper()", scope)
    elif reads == "a helper's global":
        exec("def limit(): return LIMIT\ndef supports(x): return x.shape[0] <= limit()", scope)
    else:
        exec("def make(limit):\n def change(): nonlocal limit; limit = 4\n"
             " return lambda x: x.shape[0] <= limit, change\nsupports, change = make(16)", scope)  # fmt: skip
    inner.register_impl("fast", supports_args=scope["supports"])(faster)
    with inner.set_priority(["fast", "native"]), mode:
        assert outer(ones(8)).unique().tolist() == [303]
        assert outer(ones(32)).unique().tolist() == [6]
        scope.update(LIMIT=4, helper=LIMITS[4])
        scope.get("change", list)()
        assert outer(ones(8)).unique().tolist() == [6]
        assert outer(ones(32)).unique().tolist() == [6]
    assert mode.trace.events[-1].fuses == ("fusion_inner",)
    assert mode.cache.stats().fallbacks == 0


LIMITS = {16: lambda: 16, 4: lambda: 4}


def test_what_may_change_unseen_is_asked_at_every_call(two, mode):
    outer, inner = two
    switched = {"on": False}
    inner.register_impl("fast", supports_args=lambda x: switched["on"])(faster)
    with inner.set_priority(["fast", "native"]), mode:
        assert outer(ones()).unique().tolist() == [6]
        switched["on"] = True
        assert outer(ones()).unique().tolist() == [303]
        switched["on"] = False
        assert outer(ones()).unique().tolist() == [6]
    event = mode.trace.events[0]
    assert event.not_fused == ("fusion_inner: supports_args of 'fast' reads switched",)
    actions = [(event.op.partition("_")[2], event.action) for event in mode.trace.events]
    inner_calls = [action for op, action in actions if "inner" in op]
    assert inner_calls == ["compiled", "aside", "compiled"]


def test_a_supports_args_that_raises_does_so_at_the_call(two, mode):
    outer, inner = two
    inner.register_impl("fast", supports_args=lambda x: x.shape[7] > 1)(faster)
    with inner.set_priority(["fast", "native"]), mode, pytest.raises(IndexError):
        outer(ones())


# ---- What stays a call


def test_an_op_that_calls_itself(define_ir_op, mode):
    def halves(x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return x * 2
        left, right = x.chunk(2, dim=1)
        return torch.cat((op(left), op(right)), dim=1)

    op = define_ir_op(halves)
    x = torch.randn(4, 8)
    expected = op(x)
    with mode:
        assert_same(op(x), expected)
    assert mode.trace.events[0].not_fused == (f"{op.name}: it calls itself",)
    assert {event.action for event in mode.trace.events} == {"compiled"}


def test_what_cannot_be_part_of_a_graph_stays_a_call(define_ir_op, mode):
    """And it runs, eagerly, when the compiled code calls it."""

    def noise(x: Tensor) -> Tensor:
        return torch.bernoulli(torch.full_like(x, 0.5))

    inner = define_ir_op(noise)
    outer = define_ir_op(lambda_of(inner))
    with mode:
        outer(ones())
        torch.manual_seed(0)
        actual = outer(ones())
    torch.manual_seed(0)
    assert_same(actual, outer(ones()))
    assert [event.action for event in mode.trace.events] == ["compiled", "aside"] * 2
    outer_event = mode.trace.events[0]
    assert "draws random numbers" in outer_event.not_fused[0]


def test_maybe_inplace(define_ir_op, mode):
    def inner(x: Tensor) -> Tensor:
        return x + 1

    def overwriting(x: Tensor) -> Tensor:
        return x.add_(100)

    inner_op = define_ir_op(inner, allow_inplace=True)
    inner_op.register_impl("inplace", inplace=True)(overwriting)

    def outer(x: Tensor) -> Tensor:
        return inner_op.maybe_inplace(x * 1) * 3

    outer_op = define_ir_op(outer)
    both = dc.CompileConfig(backend="eager", providers=("native", "inplace"))
    for priority, config, expected, fused in (
        ([], EAGER, 6, True),
        (["inplace"], EAGER, 303, False),
        (["inplace"], both, 303, False),
    ):
        mode = dc.DispatchCompileMode(config=config, trace=True)
        x = ones()
        with inner_op.set_priority(priority), mode:
            assert outer_op(x).unique().tolist() == [expected]
        assert_same(x, ones())
        assert bool(mode.trace.events[0].fuses) == fused
        assert mode.trace.events[0].action == "compiled"


def test_an_implementation_in_place_of_the_functional_op(define_ir_op):
    def inner(x: Tensor) -> Tensor:
        return x + 1

    inner_op = define_ir_op(inner, allow_inplace=True)
    inner_op.register_impl("inplace", inplace=True)(lambda_adding())

    def outer(x: Tensor) -> Tensor:
        return inner_op(x) * 3 + x

    outer_op = define_ir_op(outer)
    config = dc.CompileConfig(backend="eager", providers=("inplace", "native"))
    mode, x = dc.DispatchCompileMode(config=config, trace=True), ones()
    with inner_op.set_priority(["inplace"]), mode:
        assert outer_op(x).unique().tolist() == [304]
    assert_same(x, ones())
    assert mode.trace.events[0].fuses == (inner_op.name,)


def lambda_adding() -> Callable[..., Any]:
    def overwriting(x: Tensor) -> Tensor:
        return x.add_(100)

    return overwriting


def test_a_call_whose_result_is_laid_out_otherwise_than_promised(two):
    """Compiled code would read it wrongly."""
    outer, inner = two

    def transposed(x: Tensor) -> Tensor:
        return (x + 100).t().contiguous().t()

    inner.register_impl("fast")(transposed)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(on_failure="native"), trace=True)
    x = torch.randn(4, 3)
    with inner.set_priority(["fast"]):
        expected = outer(x)
        with mode, pytest.warns(dc.DispatchCompileWarning, match="stride"):
            assert_same(outer(x), expected)


# ---- Nested


def test_compositions_of_compositions():
    @dc.register_op(name="fusion_deep")
    def deep(x: Tensor) -> Tensor:
        q, scale = ops.silu_and_mul_quant_fp8_per_token(x)
        y = ops.rms_norm(q.to(torch.float32) * scale, None, 1e-6)
        return ops.silu_and_mul(y)

    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    mode = dc.DispatchCompileMode(trace=True)
    try:
        expected = deep(x)
        with mode:
            torch.testing.assert_close(deep(x), expected, rtol=0.13, atol=0.05)
        [event] = mode.trace.events
        assert event.fuses == ("silu_and_mul_quant_fp8_per_token", "silu_and_mul", "quant_fp8_per_token", "rms_norm")
        assert kernels(mode, deep, x) <= 2
        # The innermost is not fused; what is around it is.
        ops.silu_and_mul.register_impl("fusion_test")(twice_silu)
        with ops.silu_and_mul.set_priority(["fusion_test"]):
            expected = deep(x)
            with mode:
                torch.testing.assert_close(deep(x), expected, rtol=0.13, atol=0.05)
        assert mode.trace.events[1].fuses == ("silu_and_mul_quant_fp8_per_token", "quant_fp8_per_token", "rms_norm")
        assert [event.action for event in mode.trace.events] == ["compiled", "compiled", "aside", "aside"]
    finally:
        deep.unregister()
        ops.silu_and_mul.impls.pop("fusion_test", None)


def twice_silu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up * 2


def test_an_op_of_another_library_inside(define_opaque, define_ir_op, mode):
    def kernel(x: Tensor) -> Tensor:
        return x + 1

    opaque = define_opaque(kernel, fake=torch.empty_like)
    outer = define_ir_op(lambda_of(opaque))
    handle = dc.register_native(opaque, kernel)
    with mode:
        assert outer(ones()).unique().tolist() == [6]
    handle.remove()
    assert mode.trace.events[0].fuses == (opaque._schema.name,)


# ---- Lifetime


def test_code_keeps_nothing_of_what_is_fused_alive(define_ir_op, mode):
    def inner(x: Tensor) -> Tensor:
        return x + 1

    def outer(x: Tensor) -> Tensor:
        return torch.ops.dispatch_compile.fusion_mortal(x) * 3

    outer_op = define_ir_op(outer)
    inner_op = dc.register_op(inner, name="fusion_mortal")
    inner_op.register_impl("fast", supports_args=lambda x: x.shape[0] > LIMIT)(faster)
    with mode, inner_op.set_priority(["fast", "native"]):
        outer_op(ones())
    assert mode.trace.events[0].fuses == ("fusion_mortal",)
    impls = [weakref.ref(impl) for impl in inner_op.impls.values()]
    alive = [weakref.ref(inner_op), weakref.ref(inner), *impls]
    inner_op.unregister()
    del inner_op, inner
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    assert len(mode.cache) == 1


LIMIT = 100


# ---- Many threads, and the background


def test_in_the_background(two):
    outer, _ = two
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", on_new="background"), trace=True)
    with mode:
        outer(ones())
        mode.cache.wait()
        outer(ones())
    assert [event.fuses for event in mode.trace.events if "outer" in event.op] == [(), ("fusion_inner",)]
