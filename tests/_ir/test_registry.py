"""Reference implementations for ops of other libraries: how an op is named, schema checks, removal."""

from __future__ import annotations

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile._ir import registry as _registry
from dispatch_compile._ir.references import NativeOp


def twice(x: Tensor, bias: float = 0.0) -> Tensor:
    return x * 2 + bias


@pytest.fixture
def foreign(define_opaque):
    return define_opaque(twice)


def named(op, kind: str):
    return {
        "overload": op,
        "packet": op.overloadpacket,
        "name": op.name(),
        "name and overload": f"{op._schema.name}.default",
    }[kind]


@pytest.mark.parametrize("kind", ["overload", "packet", "name", "name and overload"])
def test_op_is_named_by(kind, foreign):
    handle = dc.register_native(named(foreign, kind), twice)
    mode, x = dc.DispatchCompileMode(config=EAGER), torch.randn(4, 3)
    with mode:
        assert_same(foreign(x, 1.0), x * 2 + 1)
    assert mode.cache.stats().hits == 1
    handle.remove()
    with mode:
        foreign(x)
    assert mode.cache.stats().hits == 1


def test_reference_is_what_runs_in_a_mode_and_the_op_itself_outside(foreign):
    def reference(x: Tensor, bias: float = 0.0) -> Tensor:
        return x * 3 + bias

    handle, x = dc.register_native(foreign, reference), torch.randn(4, 3)
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        assert_same(foreign(x), x * 3)
    assert_same(foreign(x), x * 2)
    handle.remove()
    with mode:
        assert_same(foreign(x), x * 2)


def test_registered_while_the_mode_is_entered(foreign):
    mode, x = dc.DispatchCompileMode(config=EAGER), torch.randn(4, 3)
    with mode:
        foreign(x)
        handle = dc.register_native(foreign, twice)
        foreign(x)
        handle.remove()
        foreign(x)
    assert mode.cache.stats().hits == 1


def test_registered_while_a_tracing_mode_watches_the_op(foreign):
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        foreign(torch.randn(4, 3))
        handle = dc.register_native(foreign, twice)
        foreign(torch.randn(4, 3))
    handle.remove()
    assert mode.cache.stats().hits == 1


def test_remove_may_be_repeated(foreign):
    handle = dc.register_native(foreign, twice)
    handle.remove()
    handle.remove()
    again = dc.register_native(foreign, twice)
    handle.remove()
    with pytest.raises(ValueError, match="already has a native implementation"):
        dc.register_native(foreign, twice)
    again.remove()


def test_one_overload_of_several(define_opaque):
    library = torch.library.Library("dispatch_compile_test", "FRAGMENT")
    try:
        for overload in ("first", "second"):
            library.define(f"several.{overload}(Tensor x) -> Tensor")
            library.impl(f"several.{overload}", lambda x: x * 2, "CompositeExplicitAutograd")

        def reference(x: Tensor) -> Tensor:
            return x * 2

        with pytest.raises(ValueError, match=r"has the overloads \['first', 'second'\]; name the one you mean"):
            dc.register_native("dispatch_compile_test::several", reference)
        with pytest.raises(ValueError, match="has no overload 'third'"):
            dc.register_native("dispatch_compile_test::several.third", reference)
        handle = dc.register_native("dispatch_compile_test::several.second", reference)
        mode, x = dc.DispatchCompileMode(config=EAGER), torch.randn(4, 3)
        with mode:
            torch.ops.dispatch_compile_test.several.first(x)
            assert mode.cache.stats().hits == 0
            torch.ops.dispatch_compile_test.several.second(x)
            assert mode.cache.stats().hits == 1
        handle.remove()
    finally:
        library._destroy()


def test_activations(foreign):
    with pytest.raises(ValueError, match=r"activations \['y'\] are not among the parameters \['x', 'bias'\]"):
        dc.register_native(foreign, twice, activations=["y"])
    handle = dc.register_native(foreign, twice, activations=[])
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        for tokens in (2, 3, 4):
            foreign(torch.randn(tokens, 3))
    assert mode.cache.stats().compiles == 3, "without activations every size is static"
    handle.remove()


# ---- Errors


@pytest.mark.parametrize("name", ["dispatch_compile_test::nothing", "no_namespace", "nowhere::nothing"])
def test_no_such_op(name):
    with pytest.raises(ValueError, match=f"no op '{name}'; write \"namespace::name\" of a registered op"):
        dc.register_native(name, twice)


@pytest.mark.parametrize("op", [None, 3, twice, torch.add])
def test_not_an_op(op):
    with pytest.raises(TypeError, match="op must be an OpOverload"):
        dc.register_native(op, twice)


def test_an_ir_op_has_one_already(counted):
    with pytest.raises(ValueError, match="already has a native implementation"):
        dc.register_native(counted.op.torch_op, affine)


def affine(x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor + 1


def _renamed(y: Tensor, bias: float = 0.0) -> Tensor:
    return y


def _other_default(x: Tensor, bias: float = 1.0) -> Tensor:
    return x


def _other_type(x: Tensor, bias: int = 0) -> Tensor:
    return x


def _no_bias(x: Tensor) -> Tensor:
    return x


def _other_result(x: Tensor, bias: float = 0.0) -> tuple[Tensor, Tensor]:
    return x, x


def _keyword_only(x: Tensor, *, bias: float = 0.0) -> Tensor:
    return x


@pytest.mark.parametrize("reference", [_renamed, _other_default, _other_type, _no_bias, _other_result, _keyword_only])
def test_schema_mismatch_names_both(reference, foreign):
    with pytest.raises(ValueError, match="schema differs from the op's") as error:
        dc.register_native(foreign, reference)
    inferred = torch.library.infer_schema(reference, mutates_args=())
    assert f"implementation: {inferred}" in str(error.value)
    assert str(foreign._schema) in str(error.value)


def test_signature_without_a_schema(foreign):
    with pytest.raises(ValueError, match="no schema can be made of the reference implementation") as error:
        dc.register_native(foreign, lambda x, bias=0.0: x)
    assert str(foreign._schema) in str(error.value)


def test_symbolic_int_and_int_are_the_same(define_opaque):
    library = torch.library.Library("dispatch_compile_test", "FRAGMENT")
    try:
        library.define("repeat_sym(Tensor x, SymInt times) -> Tensor")
        library.impl("repeat_sym", lambda x, times: x.repeat(times, 1), "CompositeExplicitAutograd")

        def reference(x: Tensor, times: int) -> Tensor:
            return x.repeat(times, 1)

        handle = dc.register_native("dispatch_compile_test::repeat_sym", reference)
        mode, x = dc.DispatchCompileMode(config=EAGER), torch.randn(4, 3)
        with mode:
            for times in (2, 3):
                assert_same(torch.ops.dispatch_compile_test.repeat_sym(x, times), x.repeat(times, 1))
        assert mode.cache.stats().hits == 2
        handle.remove()
    finally:
        library._destroy()


def test_op_that_selects_its_backend_from_an_argument(foreign):
    library = torch.library.Library("dispatch_compile_test", "IMPL")
    library.impl(foreign.name().partition("::")[2], lambda x, bias=0.0: x, "BackendSelect")
    try:
        with pytest.raises(ValueError, match="has a BackendSelect kernel of its own"):
            dc.register_native(foreign, twice)
    finally:
        library._destroy()


def test_an_op_that_decomposes_is_caught_in_inference_mode_only_and_says_so(define_opaque):
    def decomposing(x: Tensor) -> Tensor:
        return x * 2

    op = define_opaque(decomposing, key="CompositeImplicitAutograd")
    with pytest.warns(dc.DispatchCompileWarning, match="torch decomposes .* but in inference mode"):
        handle = dc.register_native(op, decomposing)
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        op(torch.ones(3))
        assert mode.cache.stats().hits == 0
        with torch.inference_mode():
            op(torch.ones(3))
        assert mode.cache.stats().hits == 1
    handle.remove()


def test_ops_of_a_source_that_says_nothing_are_looked_at_when_a_poll_finds_others(monkeypatch, define_opaque):
    def twice(x: Tensor) -> Tensor:
        return x * 2

    overload = define_opaque(twice)
    first, second = (NativeOp(overload, twice, ["x"]) for _ in range(2))
    listed, looks = [], []
    for sources in ("_sources", "_polled", "_quick"):
        monkeypatch.setattr(_registry, sources, [*getattr(_registry, sources)])
    _registry.add_source(lambda: looks.append(1) or listed, poll=lambda: listed)
    mode = dc.DispatchCompileMode(config=EAGER)
    for listed[:] in ([first], [second], []):  # the second comes under the name of the first
        looks.clear()
        for _ in range(3):
            with mode:
                overload(torch.ones(3))
        assert [route.op() for name, route in mode.routes.items() if name == overload.name()] == listed
        assert len(looks) == 1
    assert mode.cache.stats().hits == 6
