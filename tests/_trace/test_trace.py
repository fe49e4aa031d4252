"""The text of traces: golden, the same on every run, and nothing at all when tracing is off."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from support import EAGER, EAGER_OR_NATIVE
from torch import Tensor

import dispatch_compile as dc


@pytest.fixture
def tracing():
    return dc.DispatchCompileMode(config=EAGER, trace=True)


@pytest.fixture
def layer(define_ir_op, define_opaque):
    """Two opaque ops, one inside the other, with IR ops at every depth."""

    def trace_scale(x: Tensor, factor: float = 2.0, how: str = "plain") -> Tensor:
        return x * factor

    scale = define_ir_op(trace_scale, name="trace_scale")

    def trace_inner(x: Tensor) -> Tensor:
        return scale(x, 3.0)

    inner = define_opaque(trace_inner, name="trace_inner")

    def trace_outer(x: Tensor, weights: list[Tensor], how: str) -> tuple[Tensor, Tensor]:
        y = inner(scale(x)) + weights[0]
        return y, scale(y, 1.5, how)

    outer = define_opaque(trace_outer, name="trace_outer")

    def run(x: Tensor) -> Tensor:
        return scale(outer(x, [torch.ones(3)], "fast")[1])

    return run


def test_nesting_and_reuse(tracing, layer):
    with tracing:
        layer(torch.ones(4, 3))
        layer(torch.ones(5, 3, dtype=torch.bfloat16))
        layer(torch.ones(7, 3))
        layer(torch.ones(1, 3))
    assert_expected_inline(
        str(tracing.trace),
        """\
dispatch_compile_test::trace_outer(t: f32[4, 3], [t: f32[3]], 'fast')  ->  (t: f32[4, 3], t: f32[4, 3])
  dispatch_compile::trace_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
  dispatch_compile_test::trace_inner(t: f32[4, 3])  ->  t: f32[4, 3]
    dispatch_compile::trace_scale(t: f32[4, 3], 3.0)  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]; factor is 3.0, was not given
  dispatch_compile::trace_scale(t: f32[4, 3], 1.5, 'fast')  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]; factor is 1.5, was 3.0; how is 'fast', was not given
dispatch_compile::trace_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, reused: [s0, 3]
dispatch_compile_test::trace_outer(t: bf16[5, 3], [t: f32[3]], 'fast')  ->  (t: f32[5, 3], t: f32[5, 3])
  dispatch_compile::trace_scale(t: bf16[5, 3])  ->  t: bf16[5, 3]  # compiled native, new: [s0, 3]; x is bf16, was f32
  dispatch_compile_test::trace_inner(t: bf16[5, 3])  ->  t: bf16[5, 3]
    dispatch_compile::trace_scale(t: bf16[5, 3], 3.0)  ->  t: bf16[5, 3]  # compiled native, new: [s0, 3]; x is bf16, was f32
  dispatch_compile::trace_scale(t: f32[5, 3], 1.5, 'fast')  ->  t: f32[5, 3]  # compiled native, reused: [s0, 3]
dispatch_compile::trace_scale(t: f32[5, 3])  ->  t: f32[5, 3]  # compiled native, reused: [s0, 3]
dispatch_compile_test::trace_outer(t: f32[7, 3], [t: f32[3]], 'fast')  ->  (t: f32[7, 3], t: f32[7, 3])
  dispatch_compile::trace_scale(t: f32[7, 3])  ->  t: f32[7, 3]  # compiled native, reused: [s0, 3]
  dispatch_compile_test::trace_inner(t: f32[7, 3])  ->  t: f32[7, 3]
    dispatch_compile::trace_scale(t: f32[7, 3], 3.0)  ->  t: f32[7, 3]  # compiled native, reused: [s0, 3]
  dispatch_compile::trace_scale(t: f32[7, 3], 1.5, 'fast')  ->  t: f32[7, 3]  # compiled native, reused: [s0, 3]
dispatch_compile::trace_scale(t: f32[7, 3])  ->  t: f32[7, 3]  # compiled native, reused: [s0, 3]
dispatch_compile_test::trace_outer(t: f32[1, 3], [t: f32[3]], 'fast')  ->  (t: f32[1, 3], t: f32[1, 3])
  dispatch_compile::trace_scale(t: f32[1, 3])  ->  t: f32[1, 3]  # compiled native, new: [1, 3]; x's shape is [1, 3], was [s0, 3]
  dispatch_compile_test::trace_inner(t: f32[1, 3])  ->  t: f32[1, 3]
    dispatch_compile::trace_scale(t: f32[1, 3], 3.0)  ->  t: f32[1, 3]  # compiled native, new: [1, 3]; x's shape is [1, 3], was [s0, 3]
  dispatch_compile::trace_scale(t: f32[1, 3], 1.5, 'fast')  ->  t: f32[1, 3]  # compiled native, new: [1, 3]; x's shape is [1, 3], was [s0, 3]
dispatch_compile::trace_scale(t: f32[1, 3])  ->  t: f32[1, 3]  # compiled native, reused: [1, 3]""",  # noqa: E501
    )


def test_opaque_ops_without_ir_ops_are_left_out(tracing, define_opaque, layer):
    def trace_nothing(x: Tensor) -> Tensor:
        return x.sin()

    nothing = define_opaque(trace_nothing, name="trace_nothing")
    with tracing:
        nothing(torch.ones(2))
    assert str(tracing.trace) == ""
    assert tracing.trace.events == []


def test_events(tracing, layer):
    with tracing:
        layer(torch.ones(4, 3))
    first, second, third, fourth = tracing.trace.events
    assert (first.op, first.action, first.reason, first.depth) == (
        "dispatch_compile::trace_scale.default",
        "compiled",
        None,
        1,
    )
    assert [event.depth for event in (second, third, fourth)] == [2, 1, 0]
    assert (first.arguments, first.result) == ("t: f32[4, 3]", "t: f32[4, 3]")
    assert third.arguments == "t: f32[4, 3], 1.5, 'fast'"
    assert (first.specialization, first.new, first.provider) == ("[s0, 3]", True, "native")
    assert [event.new for event in (second, third, fourth)] == [True, True, False]
    assert len(tracing.trace) == 4


@pytest.mark.selective
def test_passed_and_why(define_ir_op):
    def trace_mul(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return x * 2 if weight is None else x * weight

    op = define_ir_op(trace_mul, name="trace_mul")
    op.register_impl("vendor")(trace_mul)
    mode, x = dc.DispatchCompileMode(config=EAGER, trace=True), torch.ones(4, 3)

    class Tagged(Tensor):
        pass

    with mode:
        op(x.clone().requires_grad_())
        op(x, torch.nn.Parameter(torch.ones(3)))
        op(x.as_subclass(Tagged))
        op(x.to_sparse())
        op(x.to("meta"))
        op(x, x)
        with torch.autocast("cpu"):
            op(x)
        with torch.autograd.forward_ad.dual_level():
            op(x)
        with op.set_priority(["vendor"]):
            op(x)
    assert_expected_inline(
        str(mode.trace),
        """\
dispatch_compile::trace_mul(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, x requires grad and grad mode is on
dispatch_compile::trace_mul(t: f32[4, 3], t: f32[3])  ->  t: f32[4, 3]  # aside native, weight requires grad and grad mode is on
dispatch_compile::trace_mul(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, x is a Tagged
dispatch_compile::trace_mul(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, x is sparse_coo
dispatch_compile::trace_mul(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, x is on the meta device
dispatch_compile::trace_mul(t: f32[4, 3], t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, weight is the same tensor as x
dispatch_compile::trace_mul(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, autocast is on for cpu
dispatch_compile::trace_mul(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, forward-mode AD is active
dispatch_compile::trace_mul(t: f32[4, 3])  ->  t: f32[4, 3]  # aside vendor, provider 'vendor' is not in providers ('native',)""",  # noqa: E501 - a line of a trace is as long as it is
    )


@pytest.mark.selective
def test_the_provider_that_ran_is_told(define_ir_op):
    def trace_twice(x: Tensor) -> Tensor:
        return x * 2

    op = define_ir_op(trace_twice, name="trace_twice")
    op.register_impl("vendor")(trace_twice)
    config = dc.CompileConfig(backend="eager", providers=("native", "vendor"))
    mode, x = dc.DispatchCompileMode(config=config, trace=True), torch.ones(4, 3)
    with mode:
        op(x)
        with op.set_priority(["vendor"]):
            op(x)
            op(x.clone().requires_grad_())
        op(x)
    assert_expected_inline(
        str(mode.trace),
        """\
dispatch_compile::trace_twice(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
dispatch_compile::trace_twice(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled vendor, new: [s0, 3]
dispatch_compile::trace_twice(t: f32[4, 3])  ->  t: f32[4, 3]  # aside vendor, x requires grad and grad mode is on
dispatch_compile::trace_twice(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, reused: [s0, 3]""",
    )
    assert_expected_inline(
        mode.trace.summary(seconds=False),
        """\
op                             provider  calls  compiled  eager  aside  specializations
dispatch_compile::trace_twice  native        2         2      0      0                1
dispatch_compile::trace_twice  vendor        2         1      0      1                1""",
    )


@pytest.mark.selective
@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_an_op_with_a_reference_runs_its_own_kernel_where_that_is_not_compiled(define_opaque):
    """`native` would be the reference, which then does not run."""

    def trace_kernel(x: Tensor) -> Tensor:
        return x.clone()

    def reference(x: Tensor) -> Tensor:
        assert x.requires_grad or x.sum() > 0, "this one looks at values, and cannot be captured"
        return x.clone()

    handle = dc.register_native(define_opaque(trace_kernel, name="trace_kernel"), reference)
    op, x = torch.ops.dispatch_compile_test.trace_kernel, torch.ones(4, 3)
    mode = dc.DispatchCompileMode(config=EAGER_OR_NATIVE, trace=True)
    others = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", providers=("vendor",)), trace=mode.trace)
    try:
        with mode:
            op(x)
            op(x.clone().requires_grad_())
        with others:
            op(x)
        explained = str(mode.explain(op, x)).splitlines()[1:]
    finally:
        handle.remove()
    assert [(event.action, event.provider) for event in mode.trace.events] == [
        ("eager", "kernel"),
        ("aside", "kernel"),
        ("aside", "kernel"),
    ]
    assert "  # eager kernel, the 'native' implementation of dispatch_compile_test::trace_kernel " in str(mode.trace)
    assert explained[0].startswith("would run eagerly: ")
    assert explained[1] == "implementation: kernel, the op's own"


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_native_and_why(define_ir_op):
    def trace_item(x: Tensor) -> Tensor:
        return x * x.sum().item()

    def trace_noise(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    def trace_write(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    def trace_view(x: Tensor) -> Tensor:
        return x[1:]

    def trace_global(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0]).add(ONE)

    mode, x = dc.DispatchCompileMode(config=EAGER_OR_NATIVE, trace=True), torch.ones(4, 3)
    with mode:
        for native in (trace_item, trace_noise, trace_write, trace_view, trace_global):
            define_ir_op(native, name=native.__name__)(x)
    assert_expected_inline(
        str(mode.trace),
        """\
dispatch_compile::trace_item(t: f32[4, 3])  ->  t: f32[4, 3]  # eager native, the 'native' implementation of dispatch_compile::trace_item cannot be captured: it depends on the values in a tensor (aten._local_scalar_dense.default)
dispatch_compile::trace_noise(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, the implementation draws random numbers (aten.rand_like.default)
dispatch_compile::trace_write(t: f32[4, 3])  ->  t: f32[4, 3]  # aside native, the implementation changes its argument x, which is not declared as mutated
dispatch_compile::trace_view(t: f32[4, 3])  ->  t: f32[3, 3]  # aside native, result 0 shares memory with argument x
dispatch_compile::trace_global(t: f32[4, 3])  ->  t: f32[4, 3]  # eager native, the 'native' implementation of dispatch_compile::trace_global cannot be captured: AssertionError: Please convert all Tensors to FakeTensors first or instantiate FakeTensorMode with 'allow_non_fake_inputs'. Found in aten.add.Tensor(FakeTensor(..., size=(3,)), tensor(1., size=()))""",  # noqa: E501 - a line of a trace is as long as it is
    )


ONE = torch.tensor(1.0)


def test_both_overloads(define_ir_op):
    def trace_half(x: Tensor) -> Tensor:
        return x / 2

    op = define_ir_op(trace_half, name="trace_half", allow_inplace=True)
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        op(torch.ones(4, 3))
        op.maybe_inplace(torch.ones(6, 3))
    assert_expected_inline(
        str(mode.trace),
        """\
dispatch_compile::trace_half(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
dispatch_compile::trace_half.maybe_inplace(t: f32[6, 3])  ->  t: f32[6, 3]  # compiled native, reused: [s0, 3]""",
    )


def test_arguments_of_every_kind(define_ir_op):
    def trace_kinds(
        xs: list[Tensor],
        weight: Tensor | None,
        dims: list[int],
        flag: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        return xs[0].to(dtype), xs[-1] + 1

    op = define_ir_op(trace_kinds, name="trace_kinds")
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        op([torch.ones(4, 3), torch.ones(4, 5, dtype=torch.int64)], None, [0, 1], True, torch.float64)
    assert_expected_inline(
        str(mode.trace),
        """dispatch_compile::trace_kinds([t: f32[4, 3], t: i64[4, 5]], None, [0, 1], True, torch.float64)  ->  (t: f64[4, 3], t: i64[4, 5])  # compiled native, new: [s0, 3], [s0, 5]""",  # noqa: E501 - a line of a trace is as long as it is
    )


def test_summary(tracing, layer):
    with tracing:
        for tokens in (4, 5, 1, 4):
            layer(torch.ones(tokens, 3))
        dc.ops.rms_norm(torch.ones(4, 8, requires_grad=True), None, 1e-6)
    assert_expected_inline(
        tracing.trace.summary(seconds=False),
        """\
op                             provider  calls  compiled  eager  aside  specializations
dispatch_compile::rms_norm     native        1         0      0      1                0
dispatch_compile::trace_scale  native       16        16      0      0                6""",
    )


def test_summary_of_nothing(tracing):
    assert_expected_inline(
        tracing.trace.summary(seconds=False), """op  provider  calls  compiled  eager  aside  specializations"""
    )


def test_the_same_text_on_every_run(layer):
    texts = set()
    for _ in range(3):
        mode = dc.DispatchCompileMode(config=EAGER, trace=True)
        with mode:
            layer(torch.randn(4, 3))
        texts.add(str(mode.trace))
    assert len(texts) == 1
    assert "0x" not in texts.pop()


def test_off_records_nothing(layer, monkeypatch):
    def fail(*args: object) -> None:
        raise AssertionError("described an argument although tracing is off")

    monkeypatch.setattr("dispatch_compile._trace.trace.summary_of", fail)
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        layer(torch.ones(4, 3))
    assert mode.trace is None
    assert mode.cache.stats().hits == 4


def test_off_again_after_a_tracing_mode(tracing, layer):
    plain = dc.DispatchCompileMode(config=EAGER)
    with tracing:
        layer(torch.ones(4, 3))
    with plain:
        layer(torch.ones(4, 3))
    assert len(tracing.trace) == 4


def test_clear(tracing, layer):
    with tracing:
        layer(torch.ones(4, 3))
        tracing.trace.clear()
        layer(torch.ones(4, 3))
    assert [event.new for event in tracing.trace.events] == [False] * 4


def test_two_tracing_modes_record_the_same(layer):
    outer = dc.DispatchCompileMode(config=EAGER, trace=True)
    inner = dc.DispatchCompileMode(config=EAGER, trace=True)
    with outer:
        with inner:
            layer(torch.ones(4, 3))
        assert str(outer.trace) == str(inner.trace) != ""
        layer(torch.ones(4, 3))
    assert (len(outer.trace), len(inner.trace)) == (8, 4)
    assert [event.new for event in outer.trace.events] == [True, True, True, False] * 2


def test_outer_trace_sees_what_a_plain_inner_mode_does(layer):
    outer = dc.DispatchCompileMode(config=EAGER, trace=True)
    inner = dc.DispatchCompileMode(config=EAGER)
    with outer, inner:
        layer(torch.ones(4, 3))
    assert len(outer.trace) == 4
    assert (outer.cache.stats().hits, inner.cache.stats().hits) == (0, 4)


def test_tracing_mode_entered_inside_an_opaque_op(tracing, counted, define_opaque):
    inner = dc.DispatchCompileMode(config=EAGER, trace=True)

    def body(x: Tensor) -> Tensor:
        with inner:
            return counted(x)

    op = define_opaque(body)
    with tracing:
        op(torch.ones(4, 3))
    assert [event.depth for event in tracing.trace.events] == [1]
    assert [event.depth for event in inner.trace.events] == [0]


def test_call_that_raises(tracing, define_ir_op, define_opaque):
    def trace_fail(x: Tensor) -> Tensor:
        raise KeyError("no")

    op = define_ir_op(trace_fail, name="trace_fail")

    def trace_calls_fail(x: Tensor) -> Tensor:
        return op(x)

    opaque = define_opaque(trace_calls_fail, name="trace_calls_fail")
    with tracing:
        with pytest.raises(KeyError):
            opaque(torch.ones(4, 3))
        dc.ops.silu_and_mul(torch.ones(4, 2))
    assert [event.depth for event in tracing.trace.events] == [1, 0]
    assert [event.result for event in tracing.trace.events] == [None, "t: f32[4, 1]"]
    assert str(tracing.trace).count("raised") == 2
    failed = tracing.trace.events[0]
    assert failed.reason, "a line says why the call was not compiled"
