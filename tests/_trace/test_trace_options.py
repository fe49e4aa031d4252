"""What a trace shows on request, what it keeps, and how it says why a specialization is new."""

from __future__ import annotations

import gc
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expecttest import assert_expected_inline
from support import EAGER, EAGER_OR_NATIVE
from torch import Tensor, nn

import dispatch_compile as dc


def tracing(**options) -> dc.DispatchCompileMode:
    return dc.DispatchCompileMode(config=EAGER_OR_NATIVE, trace=dc.Trace(**options))


@pytest.fixture
def scale(define_ir_op):
    def opt_scale(x: Tensor, weight: Tensor | None = None, factor: float = 2.0) -> Tensor:
        return x * factor if weight is None else x * weight * factor

    return define_ir_op(opt_scale, name="opt_scale")


@pytest.fixture
def opaque(scale, define_opaque):
    def opt_body(x: Tensor) -> Tensor:
        return scale(x) + scale(x, x.new_ones(3))

    return define_opaque(opt_body, name="opt_body")


# ---- What is shown


def test_ids_follow_the_data(opaque, scale):
    mode, x = tracing(ids=True), torch.ones(4, 3)
    with mode:
        y = scale(x)
        opaque(y)
        scale(x, factor=3.0)
    assert_expected_inline(
        str(mode.trace),
        """\
dispatch_compile::opt_scale(t$0: f32[4, 3])  ->  t$1: f32[4, 3]  # compiled native, new: [s0, 3]
dispatch_compile_test::opt_body(t$1: f32[4, 3])  ->  t$5: f32[4, 3]
  dispatch_compile::opt_scale(t$1: f32[4, 3])  ->  t$2: f32[4, 3]  # compiled native, reused: [s0, 3]
  dispatch_compile::opt_scale(t$1: f32[4, 3], t$3: f32[3])  ->  t$4: f32[4, 3]  # compiled native, new: [s0, 3], [3]; weight is f32, was not given
dispatch_compile::opt_scale(t$0: f32[4, 3], None, 3.0)  ->  t$6: f32[4, 3]  # compiled native, new: [s0, 3]; weight is None, was f32; factor is 3.0, was not given""",  # noqa: E501
    )


def test_an_id_is_never_given_to_a_second_tensor(scale):
    mode = tracing(ids=True)
    with mode:
        for _ in range(5):
            scale(torch.ones(4, 3))  # most likely at the address of the one before
    ids = [int(part) for event in mode.trace.events for part in [event.arguments.split("$")[1].split(":")[0]]]
    assert len(set(ids)) == 5


def test_ids_keep_no_tensor_alive(scale):
    mode = tracing(ids=True)
    with mode:
        for _ in range(3):
            scale(torch.ones(4, 3))
    gc.collect()
    assert mode.trace._numbers._numbers == {}


def test_strides_where_not_contiguous(scale):
    mode, x = tracing(), torch.ones(4, 6)
    with mode:
        scale(x[:, :3])
        scale(x.t())
        scale(x[:1])
        scale(x[:, :1].expand(4, 3))
    assert_expected_inline(
        str(mode.trace),
        """\
dispatch_compile::opt_scale(t: f32[4, 3][6, 1])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
dispatch_compile::opt_scale(t: f32[6, 4][1, 6])  ->  t: f32[6, 4][1, 6]  # compiled native, new: [s0, 4]; x's shape is [s0, 4], was [s0, 3]; x's stride is [1, s0], was [6, 1]
dispatch_compile::opt_scale(t: f32[1, 6])  ->  t: f32[1, 6]  # compiled native, new: [1, 6]; x's shape is [1, 6], was [s0, 3]
dispatch_compile::opt_scale(t: f32[4, 3][6, 0])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]; x's stride is [6, 0], was [6, 1]""",  # noqa: E501
    )


def test_a_stride_is_compared_with_the_nearest_shape(scale):
    """The latest specialization has another shape; the one before differs in the stride alone."""
    mode, x = tracing(), torch.ones(8, 256)
    with mode:
        scale(x.as_strided((4, 16), (64, 1)))
        scale(torch.ones(3, 8))
        scale(x.as_strided((4, 16), (128, 1)))
        scale(x.as_strided((4, 8), (64, 1)))
        scale(x.as_strided((4, 2, 4), (64, 4, 1)))
        scale(x.as_strided((4, 2, 4), (64, 1, 2)))
        scale(torch.ones(1, 16))
        scale(torch.ones(()))
        scale(torch.ones(5))
    assert_expected_inline(
        "\n".join(str(event.difference) for event in mode.trace.events),
        """\
None
x's shape is [s0, 8], was [s0, 16]; x's stride is [8, 1], was [64, 1]
x's stride is [128, 1], was [64, 1]
x's stride is [64, 1], was [8, 1]
x's shape is [s0, 2, 4], was [s0, 8]; x's stride is [64, 4, 1], was [64, 1]
x's stride is [64, 1, 2], was [64, 4, 1]
x's shape is [1, 16], was [s0, 8]
x's shape is [], was [1, 16]
x's shape is [s0], was []""",
    )


def test_a_stride_hidden_by_a_shape_is_compared_with_the_nearest(scale):
    """Contiguous tensors of other sizes have other strides for that reason alone, which is not told, but counts."""
    mode, x = tracing(), torch.ones(8, 256)
    with mode:
        scale(x.as_strided((4, 16), (64, 1)))
        scale(torch.ones(3, 8))
        scale(torch.ones(4, 16))
        scale(x.as_strided((4, 8), (128, 1)))
        scale(x.as_strided((4, 16), (128, 1)))
    assert_expected_inline(
        "\n".join(str(event.difference) for event in mode.trace.events),
        """\
None
x's shape is [s0, 8], was [s0, 16]; x's stride is [8, 1], was [64, 1]
x's stride is [16, 1], was [64, 1]
x's stride is [128, 1], was [8, 1]
x's stride is [128, 1], was [16, 1]""",
    )


def test_call_sites(opaque):
    mode = tracing(stacks=True)

    def model(x: Tensor) -> Tensor:
        return opaque(x)

    with mode:
        model(torch.ones(4, 3))
    event = mode.trace.events[0]
    names = [site.rpartition(" in ")[2] for site in event.stack]
    assert names[-3:] == ["test_call_sites", "model", "opt_body"]
    assert all(__file__ in site for site in event.stack[-3:])
    assert not any("/torch/" in site for site in event.stack)
    lines = str(mode.trace).splitlines()
    assert lines[1 + len(mode.trace.calls[0].stack)].startswith("  dispatch_compile::opt_scale(t: f32[4, 3])")
    assert any(line.startswith("      at ") and line.endswith(" in opt_body") for line in lines)


def test_symbolic_sizes_are_shown_without_adding_guards(scale):
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = tracing(all_ops=True)
    with mode:
        graph = make_fx(lambda x: (x + 1).t(), tracing_mode="symbolic")(torch.ones(4, 3))
    assert graph.shape_env.guards == []
    assert any("s" in call.arguments.partition("[")[2].partition("]")[0] for call in mode.trace.calls)


# ---- Why a specialization is new


def test_difference_to_the_nearest_specialization(scale):
    mode, x, weight = tracing(), torch.ones(4, 6), torch.ones(6)
    with mode:
        scale(x)
        scale(x, weight)
        scale(x, weight.bfloat16())
        scale(x.bfloat16(), weight.bfloat16())
        scale(x.bfloat16(), weight)
        scale(x, weight, 3.0)
        scale(x, weight, -0.0)
        scale(x[:1], weight)
        scale(torch.ones(6, 4).t(), weight)
        scale(x[:, :2])
        with torch.inference_mode():
            scale(x)
            scale(torch.ones(4, 6))
        with torch.no_grad():
            scale(x)
            scale(x, nn.Parameter(weight))
        torch.use_deterministic_algorithms(True)
        try:
            scale(x)
        finally:
            torch.use_deterministic_algorithms(False)
    assert_expected_inline(
        "\n".join(event._why() for event in mode.trace.events),
        """\
new: [s0, 6]
new: [s0, 6], [6]; weight is f32, was not given
new: [s0, 6], [6]; weight is bf16, was f32
new: [s0, 6], [6]; x is bf16, was f32
new: [s0, 6], [6]; weight is f32, was bf16
new: [s0, 6], [6]; factor is 3.0, was not given
new: [s0, 6], [6]; factor is -0.0, was 3.0
new: [1, 6], [6]; x's shape is [1, 6], was [s0, 6]
new: [s0, 6], [6]; x's stride is [1, s0], was [6, 1]
new: [s0, 2]; x's shape is [s0, 2], was [s0, 6]
new: [s0, 6]; inference mode is on, was off; grad mode is off, was on
new: [s0, 6]; x's is_inference() is True, was False
new: [s0, 6]; inference mode is off, was on
new: [s0, 6], [6]; weight is f32, was not given
new: [s0, 6]; deterministic algorithms is on, was off""",
    )


def test_difference_in_a_list(define_ir_op):
    def opt_total(xs: list[Tensor]) -> Tensor:
        return sum(xs[1:], xs[0] * 2)

    op, mode, x = define_ir_op(opt_total, name="opt_total"), tracing(), torch.ones(4, 3)
    with mode:
        op([x])
        op([x, x + 1])
        op([x, (x + 1).double()])
    assert_expected_inline(
        "\n".join(event._why() for event in mode.trace.events),
        """\
new: [s0, 3]
new: [s0, 3], [s0, 3]; xs[1] is f32, was not given
new: [s0, 3], [s0, 3]; xs[1] is f64, was f32""",
    )


def test_difference_in_guards_on_sizes(define_ir_op):
    def opt_branch(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 64 else x * 3

    op, mode = define_ir_op(opt_branch, name="opt_branch"), tracing()
    with mode:
        op(torch.ones(100, 3))
        op(torch.ones(4, 3))
        op(torch.ones(200, 3))
    assert_expected_inline(
        "\n".join(event._why() for event in mode.trace.events),
        """\
new: [s0, 3]
new: [s0, 3]; the sizes do not satisfy 65 <= x.size(0)
reused: [s0, 3]""",
    )


def test_difference_is_logged(scale, caplog):
    mode = dc.DispatchCompileMode(config=EAGER)
    with caplog.at_level("INFO", logger="dispatch_compile"), mode:
        scale(torch.ones(4, 3))
        scale(torch.ones(4, 3).double())
    first, second = [record.getMessage() for record in caplog.records if record.name == "dispatch_compile"]
    assert first.startswith("compiled dispatch_compile::opt_scale (native) for [s0, 3] in ")
    assert second.endswith(" s: x is f64, was f32")


# ---- What is kept


def test_only_the_last_calls_are_kept(opaque, scale):
    mode = tracing(max_events=3)
    with mode:
        for tokens in (2, 3, 4):
            opaque(torch.ones(tokens, 3))
    assert mode.trace.dropped == 6
    assert_expected_inline(
        str(mode.trace),
        """\
(6 earlier calls dropped)
dispatch_compile_test::opt_body(t: f32[4, 3])  ->  t: f32[4, 3]
  dispatch_compile::opt_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, reused: [s0, 3]
  dispatch_compile::opt_scale(t: f32[4, 3], t: f32[3])  ->  t: f32[4, 3]  # compiled native, reused: [s0, 3], [3]""",
    )


def test_nothing_is_kept(opaque):
    mode = tracing(max_events=0)
    with mode:
        opaque(torch.ones(4, 3))
    assert (mode.trace.events, mode.trace.dropped) == ([], 3)


def test_clearing_forgets_what_was_dropped(scale):
    mode = tracing(max_events=1)
    with mode:
        scale(torch.ones(4, 3))
        scale(torch.ones(4, 3))
        mode.trace.clear()
        scale(torch.ones(4, 3))
    assert (len(mode.trace), mode.trace.dropped) == (1, 0)


def test_a_negative_bound():
    with pytest.raises(ValueError, match="max_events must be 0 or more, not -1"):
        dc.Trace(max_events=-1)


def test_something_else_as_a_trace():
    with pytest.raises(TypeError, match="trace must be True, False or a Trace, not 'all'"):
        dc.DispatchCompileMode(trace="all")


# ---- As it goes


def test_lines_are_printed_as_calls_end(opaque, scale):
    stream = io.StringIO()
    mode = tracing(stream=stream, max_events=0)
    with mode:
        scale(torch.ones(4, 3))
        printed = stream.getvalue()
        opaque(torch.ones(4, 3))
    assert printed.count("\n") == 1
    assert_expected_inline(
        stream.getvalue(),
        """\
dispatch_compile::opt_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
dispatch_compile_test::opt_body(t: f32[4, 3])
  dispatch_compile::opt_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, reused: [s0, 3]
  dispatch_compile::opt_scale(t: f32[4, 3], t: f32[3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3], [3]; weight is f32, was not given
""",  # noqa: E501
    )


def test_every_op_as_it_goes(opaque):
    stream = io.StringIO()
    mode = tracing(stream=stream, all_ops=True)
    with mode:
        opaque(torch.ones(4, 3))
    assert_expected_inline(
        stream.getvalue(),
        """\
aten::ones([4, 3], device=device(type='cpu'), pin_memory=False)  ->  t: f32[4, 3]
dispatch_compile_test::opt_body(t: f32[4, 3])
  dispatch_compile::opt_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
  aten::new_ones(t: f32[4, 3], [3], pin_memory=False)  ->  t: f32[3]
  dispatch_compile::opt_scale(t: f32[4, 3], t: f32[3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3], [3]; weight is f32, was not given
  aten::add.Tensor(t: f32[4, 3], t: f32[4, 3])  ->  t: f32[4, 3]
""",  # noqa: E501
    )


# ---- Shared traces


def test_threads_are_told_apart(opaque, scale):
    trace = dc.Trace()
    mode = dc.DispatchCompileMode(config=EAGER, trace=trace)
    with mode, ThreadPoolExecutor(1) as pool:
        scale(torch.ones(4, 3))
        pool.submit(dc.inherit_modes(opaque), torch.ones(4, 3)).result()
    assert_expected_inline(
        str(trace),
        """\
[0] dispatch_compile::opt_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3]
[1] dispatch_compile_test::opt_body(t: f32[4, 3])  ->  t: f32[4, 3]
[1]   dispatch_compile::opt_scale(t: f32[4, 3])  ->  t: f32[4, 3]  # compiled native, reused: [s0, 3]
[1]   dispatch_compile::opt_scale(t: f32[4, 3], t: f32[3])  ->  t: f32[4, 3]  # compiled native, new: [s0, 3], [3]; weight is f32, was not given""",  # noqa: E501
    )


def test_modes_can_share_a_trace(scale):
    trace = dc.Trace()
    for _ in range(2):
        with dc.DispatchCompileMode(config=EAGER, trace=trace):
            scale(torch.ones(4, 3))
    assert [event.new for event in trace.events] == [True, True]


def test_nested_modes_that_share_a_trace_record_a_call_once(scale):
    trace = dc.Trace()
    with dc.DispatchCompileMode(config=EAGER, trace=trace), dc.DispatchCompileMode(config=EAGER, trace=trace):
        scale(torch.ones(4, 3))
    assert len(trace.events) == 1


# ---- Tables


def test_summary_as_markdown(opaque):
    mode = tracing()
    with mode:
        opaque(torch.ones(4, 3))
        dc.ops.rms_norm(torch.ones(4, 8, requires_grad=True), None, 1e-6)
    assert_expected_inline(
        mode.trace.summary(markdown=True, seconds=False),
        """\
| op | provider | calls | compiled | eager | aside | specializations |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| dispatch_compile::opt_scale | native | 2 | 2 | 0 | 0 | 2 |
| dispatch_compile::rms_norm | native | 1 | 0 | 0 | 1 | 0 |""",
    )


def test_summary_tells_the_seconds_that_compiling_took(scale):
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        scale(torch.ones(4, 3))
        scale(torch.ones(4, 3))
    first, second = mode.trace.events
    assert first.compile_start is not None
    assert 0 < first.compile_nanoseconds < first.nanoseconds
    assert first.start < first.compile_start
    assert (second.compile_start, second.compile_nanoseconds) == (None, 0)
    assert mode.trace.summary().splitlines()[1].endswith(f"{first.compile_nanoseconds * 1e-9:.2f}")
