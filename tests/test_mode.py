"""Where a mode reaches: opaque ops at any depth, whole models, this thread; and how modes nest."""

from __future__ import annotations

import threading

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dispatch_compile as dc


def eager_mode(**options) -> dc.DispatchCompileMode:
    return dc.DispatchCompileMode(config=EAGER, **options)


@pytest.fixture
def nested(counted, define_opaque):
    """``nested(depth)``: an opaque op with ``depth - 1`` opaque ops between it and the counted IR op."""

    def build(depth: int):
        call = counted
        for _ in range(depth):
            call = _opaque_around(call, define_opaque)
        return call

    return build


def _opaque_around(call, define_opaque):
    def opaque(x: Tensor) -> Tensor:
        return call(x) * 2

    return define_opaque(opaque)


def test_is_a_torch_dispatch_mode():
    mode = eager_mode()
    assert isinstance(mode, TorchDispatchMode)
    with mode as entered:
        assert entered is mode


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_compiled_inside_opaque_ops(depth, nested, counted):
    op, x, mode = nested(depth), torch.randn(4, 3), eager_mode()
    expected = op(x)
    with mode:
        assert_same(op(x), expected)
        runs = counted.python_runs
        assert_same(op(x), expected)
    assert counted.python_runs == runs, "Python ran where compiled code should have"
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)


def test_compiled_inside_torch_library_custom_op(counted):
    @torch.library.custom_op("dispatch_compile_test::custom_op_body", mutates_args=())
    def body(x: Tensor) -> Tensor:
        return counted(x) * 2

    x, mode = torch.randn(4, 3), eager_mode()
    expected = body(x)
    with mode:
        assert_same(body(x), expected)
    assert mode.cache.stats().hits == 1


def test_compiled_inside_an_opaque_op_that_mutates(counted, define_opaque):
    def fill(x: Tensor, out: Tensor) -> None:
        out.copy_(counted(x))

    op, x, mode = define_opaque(fill, mutates_args=("out",)), torch.randn(4, 3), eager_mode()
    expected, out = torch.empty(4, 3), torch.empty(4, 3)
    op(x, expected)
    with mode:
        op(x, out)
    assert_same(out, expected)
    assert mode.cache.stats().hits == 1


def test_around_a_whole_model(nested):
    opaque = nested(2)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return opaque(self.linear(x)).relu()

    model, x, mode = nn.Sequential(Layer(), Layer()), torch.randn(4, 3), eager_mode()
    with torch.no_grad():
        expected = model(x)
        with mode:
            assert_same(model(x), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)


def test_nothing_is_caught_outside(nested, counted):
    op, x, mode = nested(1), torch.randn(4, 3), eager_mode()
    op(x)
    with mode:
        op(x)
    runs = counted.python_runs
    op(x)
    assert counted.python_runs == runs + 1
    assert mode.cache.stats().hits == 1


def test_reusable_and_reentrant(nested, counted):
    op, x, mode = nested(1), torch.randn(4, 3), eager_mode()
    for _ in range(3):
        with mode:
            op(x)
            with mode:
                op(x)
            op(x)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 9)


def test_left_when_the_body_raises(counted):
    mode, x = eager_mode(), torch.randn(4, 3)

    def fail() -> None:
        with mode:
            counted(x)
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        fail()
    counted(x)
    assert mode.cache.stats().hits == 1


@pytest.mark.parametrize("trace", [False, True])
def test_left_in_another_order(counted, trace):
    first, second, third = eager_mode(), eager_mode(trace=trace), eager_mode()
    for mode in (first, second, third):
        mode.__enter__()
    hits = []
    for mode in (second, third, first):
        mode.__exit__(None, None, None)
        counted(torch.ones(4, 3))
        hits.append([each.cache.stats().hits for each in (first, second, third)])
    assert hits == [[0, 0, 1], [1, 0, 1], [1, 0, 1]]


def test_left_without_being_entered():
    mode = eager_mode()
    with mode:
        pass
    for left in (mode, eager_mode()):
        with pytest.raises(RuntimeError, match="left where it was not entered"):
            left.__exit__(None, None, None)


def test_inner_configuration_wins(counted):
    inner_config = dc.CompileConfig(backend="aot_eager")
    outer, inner, x = eager_mode(), dc.DispatchCompileMode(config=inner_config), torch.randn(4, 3)
    with outer, inner:
        counted(x)
    assert (outer.cache.stats().hits, inner.cache.stats().hits) == (0, 1)
    with inner, outer:
        counted(x)
    assert (outer.cache.stats().hits, inner.cache.stats().hits) == (1, 1)


def test_ops_that_the_inner_mode_does_not_select_fall_to_the_outer(counted):
    outer, inner, x = eager_mode(), eager_mode(ops=[dc.ops.silu_and_mul]), torch.randn(4, 6)
    with outer, inner:
        counted(x)
        dc.ops.silu_and_mul(x)
    assert (outer.cache.stats().hits, inner.cache.stats().hits) == (1, 1)


def test_inner_mode_entered_inside_an_opaque_op(counted, define_opaque):
    outer, inner, x = eager_mode(), eager_mode(), torch.randn(4, 3)

    def body(x: Tensor) -> Tensor:
        with inner:
            y = counted(x)
        return counted(y)

    op = define_opaque(body)
    with outer:
        op(x)
    assert (outer.cache.stats().hits, inner.cache.stats().hits) == (1, 1)


# ---- Which ops


def _filters(op: dc.IrOp) -> dict[str, object]:
    return {
        "ir op": [op],
        "overload": [op.torch_op],
        "packet": [op.torch_op.overloadpacket],
        "qualified name": [f"dispatch_compile::{op.name}"],
        "overload name": [f"dispatch_compile::{op.name}.default"],
        "namespace": ["dispatch_compile"],
        "one item": op,
        "one string": f"dispatch_compile::{op.name}",
        "generator": (item for item in [op]),
        "several": [dc.ops.silu_and_mul, op],
    }


@pytest.mark.parametrize("kind", list(_filters(dc.ops.rms_norm)))
def test_filter_selects(kind, counted):
    mode, x = eager_mode(ops=_filters(counted.op)[kind]), torch.randn(4, 3)
    with mode:
        counted(x)
        counted(x)
    assert mode.cache.stats().hits == 2


@pytest.mark.parametrize("kind", [kind for kind in _filters(dc.ops.rms_norm) if kind not in ("namespace",)])
def test_filter_leaves_out_other_ops(kind, counted):
    mode, x = eager_mode(ops=_filters(dc.ops.rms_norm)[kind]), torch.randn(4, 3)
    with mode:
        counted(x)
    assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=0, asides=0)


def test_empty_filter_selects_nothing(counted):
    mode = eager_mode(ops=[])
    with mode:
        counted(torch.randn(4, 3))
    assert mode.cache.stats().hits == 0


def test_filter_by_namespace_of_another_library(define_opaque, counted):
    def twice(x: Tensor) -> Tensor:
        return x * 2

    op, x = define_opaque(twice), torch.randn(4, 3)
    handle = dc.register_native(op, twice)
    try:
        mode = eager_mode(ops=[op.namespace])
        with mode:
            op(x)
            counted(x)
        assert mode.cache.stats().hits == 1
    finally:
        handle.remove()


def test_filter_by_ir_op_selects_both_overloads(define_ir_op):
    def half(x: Tensor) -> Tensor:
        return x / 2

    op = define_ir_op(half, allow_inplace=True)
    mode, x = eager_mode(ops=[op]), torch.randn(4, 3)
    with mode:
        op(x)
        op.maybe_inplace(x)
    assert mode.cache.stats().hits == 2
    only_functional = eager_mode(ops=[op.torch_op])
    with only_functional:
        op(x)
        op.maybe_inplace(x)
    assert only_functional.cache.stats().hits == 1


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ("no_such_namespace", "'no_such_namespace'"),
        ("dispatch_compile::no_such_op", "'dispatch_compile::no_such_op'"),
        (torch.ops.aten.add.Tensor, "aten.add.Tensor"),
        (torch.ops.aten.add, "aten.add"),
    ],
)
def test_filter_without_an_ir_op(item, named):
    with pytest.raises(ValueError, match="no IR op is known for") as error:
        eager_mode(ops=[item])
    assert named in str(error.value)
    assert "register_native" in str(error.value)
    assert "'dispatch_compile'" in str(error.value)


@pytest.mark.parametrize("item", [3, None, torch.add, torch.ops.aten])
def test_filter_of_another_kind(item):
    with pytest.raises(TypeError, match="is not an IR op; give IrOp objects"):
        eager_mode(ops=[item])


def test_arguments_of_the_wrong_type():
    with pytest.raises(TypeError, match="config must be a CompileConfig"):
        dc.DispatchCompileMode(config={"backend": "eager"})
    with pytest.raises(TypeError, match="cache must be a NativeCache"):
        dc.DispatchCompileMode(cache={})


def test_ops_registered_later_are_caught(define_ir_op):
    mode, x = eager_mode(), torch.randn(4, 3)

    def later(x: Tensor) -> Tensor:
        return x * 2

    with mode:
        op = define_ir_op(later)
        op(x)
    assert mode.cache.stats().hits == 1


# ---- Threads


def _in_thread(fn) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fn()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_does_nothing_on_another_thread(nested, counted):
    op, x, mode = nested(1), torch.randn(4, 3), eager_mode()
    with mode:
        op(x)
        runs = counted.python_runs
        _in_thread(lambda: op(x))
        assert counted.python_runs == runs + 1
    assert mode.cache.stats().hits == 1


def test_entered_on_another_thread_only(nested, counted):
    op, x, mode = nested(1), torch.randn(4, 3), eager_mode()

    def inside() -> None:
        with mode:
            op(x)
            runs = counted.python_runs
            op(x)
            assert counted.python_runs == runs

    _in_thread(inside)
    runs = counted.python_runs
    op(x)
    assert counted.python_runs == runs + 1
    assert mode.cache.stats().hits == 2


def test_first_calls_of_many_threads_compile_once(nested):
    op, x, mode = nested(1), torch.randn(4, 3), eager_mode()
    expected, start, errors = op(x), threading.Barrier(8), []

    def work() -> None:
        try:
            start.wait()
            with mode:
                for _ in range(20):
                    assert_same(op(x), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert mode.cache.stats().compiles == 1
