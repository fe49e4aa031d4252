"""Compiled code lives as long as its implementation, and hooks as long as the modes that asked for them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support import EAGER, specializations
from torch import Tensor

import dispatch_compile as dc


def dispatch_table(op: torch._ops.OpOverload) -> set[str]:
    return set(torch._C._dispatch_dump_table(op.name()).splitlines())


def collected(*references: weakref.ref) -> list[bool]:
    gc.collect()
    return [reference() is None for reference in references]


def code_references(mode: dc.DispatchCompileMode, op: dc.IrOp) -> list[weakref.ref]:
    """To what the cache holds: the specialization, its code, and what Inductor returned. The module that Inductor
    generated stays in Inductor's own PyCodeCache, where torch.compile of equal code would find it."""
    references = []
    for specialization in specializations(mode, op):
        code = specialization.code
        references += [weakref.ref(held) for held in (specialization, code, code.owner) if held is not None]
    assert references
    return references


@pytest.fixture(params=["eager", "inductor"])
def mode(request):
    return dc.DispatchCompileMode(config=dc.CompileConfig(backend=request.param))


def test_unregistered_op_is_freed_with_its_code(mode):
    def short_lived(x: Tensor) -> Tensor:
        return x * 2 + 1

    op = dc.register_op(short_lived)
    with mode:
        op(torch.randn(4, 3))
        op(torch.randn(1, 3))
    assert len(mode.cache) == 1
    references = [weakref.ref(op.impls["native"]), weakref.ref(short_lived), *code_references(mode, op)]
    op.unregister()
    del op, short_lived
    assert collected(*references) == [True] * len(references)
    assert len(mode.cache) == 0


def test_removed_reference_implementation_is_freed_with_its_code(mode, define_opaque):
    def twice(x: Tensor) -> Tensor:
        return x * 2

    foreign = define_opaque(twice)

    def reference(x: Tensor) -> Tensor:
        return x * 2

    handle = dc.register_native(foreign, reference)
    (native,) = [op for op in dc._ir.registry.torch_ops() if op.torch_op is foreign]
    with mode:
        foreign(torch.randn(4, 3))
    impl = native.dispatch(torch.randn(4, 3))
    (entry,) = mode.cache.table(native, impl, mode.config).guarded
    references = [weakref.ref(item) for item in (impl, reference, entry.known, entry.known.code)]
    assert len(mode.cache) == 1
    handle.remove()
    del native, impl, reference, entry
    assert collected(*references) == [True] * len(references)
    assert len(mode.cache) == 0


def test_closure_is_freed_with_what_it_closes_over(define_opaque):
    class Factor:
        value = 3.0

    factor = Factor()

    def closure(x: Tensor) -> Tensor:
        return x * factor.value

    foreign, mode = define_opaque(closure, name="closure_op"), dc.DispatchCompileMode(config=EAGER)

    def reference(x: Tensor) -> Tensor:
        return x * factor.value

    op = dc.register_op(reference)
    with mode:
        op(torch.randn(4, 3))
    references = [weakref.ref(op.impls["native"]), weakref.ref(reference)]
    op.unregister()
    del op, reference
    assert collected(*references) == [True] * 2
    assert foreign(torch.ones(2)).tolist() == [3.0, 3.0]


def test_bound_method_does_not_keep_its_object(define_opaque):
    class Scaler:
        def __init__(self) -> None:
            self.weight = 3.0

        def scale(self, x: Tensor) -> Tensor:
            return x * self.weight

    def plain(x: Tensor) -> Tensor:
        return x * 3

    scaler, foreign, mode = Scaler(), define_opaque(plain), dc.DispatchCompileMode(config=EAGER)
    handle = dc.register_native(foreign, scaler.scale)
    with mode:
        foreign(torch.randn(4, 3))
    assert (mode.cache.stats().hits, len(mode.cache)) == (1, 1)
    reference = weakref.ref(scaler)
    handle.remove()
    del scaler
    assert collected(reference) == [True]
    assert len(mode.cache) == 0


def test_bound_method_works_although_nobody_else_holds_it(define_opaque):
    class Scaler:
        def scale(self, x: Tensor) -> Tensor:
            return x * 3

    def plain(x: Tensor) -> Tensor:
        return x * 3

    foreign, mode = define_opaque(plain), dc.DispatchCompileMode(config=EAGER)
    handle = dc.register_native(foreign, Scaler().scale)
    with mode:
        for _ in range(2):
            foreign(torch.randn(4, 3))
            gc.collect()
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)
    handle.remove()


def test_dropped_implementation_of_a_living_op(define_ir_op):
    def scale(x: Tensor) -> Tensor:
        return x * 2

    op = define_ir_op(scale)
    op.register_impl("vendor")(scale)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", providers=("native", "vendor")))
    with mode:
        op(torch.randn(4, 3))
        with op.set_priority(["vendor"]):
            op(torch.randn(4, 3))
    assert len(mode.cache) == 2
    reference = weakref.ref(op.impls["vendor"])
    del op.impls["vendor"]
    with mode:
        op(torch.randn(4, 3))
    assert collected(reference) == [True]
    assert len(mode.cache) == 1


def test_cache_outlives_its_modes_and_is_freed_after_them(counted):
    cache = dc.NativeCache()
    mode = dc.DispatchCompileMode(config=EAGER, cache=cache)
    with mode:
        counted(torch.randn(4, 3))
    references = [weakref.ref(mode), *code_references(mode, counted.op)]
    del mode
    assert collected(references[0]) == [True]
    assert len(cache) == 1
    del cache
    assert collected(*references) == [True] * len(references)


def test_cleared_cache_frees_code_although_modes_live(counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        counted(torch.randn(4, 3))
    references = code_references(mode, counted.op)
    mode.cache.clear()
    assert collected(*references) == [True] * len(references)


def test_arguments_of_the_first_call_are_not_kept(counted):
    mode, x = dc.DispatchCompileMode(config=EAGER, trace=True), torch.randn(4, 3)
    with mode:
        result = counted(x)
    references = [weakref.ref(x), weakref.ref(result)]
    del x, result
    assert collected(*references) == [True, True]


def test_arguments_of_a_call_that_failed_are_not_kept(define_ir_op):
    def item(x: Tensor) -> Tensor:
        return x * x.sum().item()

    op, mode, x = define_ir_op(item), dc.DispatchCompileMode(config=EAGER), torch.randn(4, 3)
    with mode, pytest.raises(dc.CompileError):
        op(x)
    reference = weakref.ref(x)
    del x
    assert collected(reference) == [True]


# ---- The dispatch table


@pytest.fixture
def no_other_modes(monkeypatch):
    """Modes that other tests left alive, failed ones in their tracebacks, would keep the ops of these tests hooked."""
    monkeypatch.setattr("dispatch_compile._mode._modes", weakref.WeakSet())


def test_dispatch_table_of_an_ir_op_is_restored(no_other_modes, counted):
    overload = counted.op.torch_op
    before = dispatch_table(overload)
    first, second = dc.DispatchCompileMode(config=EAGER), dc.DispatchCompileMode(config=EAGER)
    with first, second:
        counted(torch.randn(4, 3))
        assert dispatch_table(overload) != before
    del first
    gc.collect()
    assert dispatch_table(overload) != before, "the other mode still needs the hook"
    with second:
        counted(torch.randn(4, 3))
    assert second.cache.stats().hits == 2
    del second
    gc.collect()
    assert dispatch_table(overload) == before


def test_dispatch_tables_of_others_are_never_touched(no_other_modes, counted, define_opaque):
    def opaque(x: Tensor) -> Tensor:
        return counted(x) * 2

    op = define_opaque(opaque)
    watched = [op, torch.ops.aten.mul.Tensor, torch.ops.aten.empty.memory_format, dc.ops.rms_norm.torch_op]
    before = [dispatch_table(one) for one in watched]
    mode = dc.DispatchCompileMode(ops=[counted.op], config=EAGER)
    with mode:
        op(torch.randn(4, 3))
        assert [dispatch_table(one) for one in watched] == before
    assert mode.cache.stats().hits == 1
    assert [dispatch_table(one) for one in watched] == before


def test_tracing_restores_the_opaque_ops(no_other_modes, counted, define_opaque):
    def opaque(x: Tensor) -> Tensor:
        return counted(x) * 2

    op = define_opaque(opaque)
    before, aten = dispatch_table(op), dispatch_table(torch.ops.aten.mul.Tensor)
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        op(torch.randn(4, 3))
        assert dispatch_table(torch.ops.aten.mul.Tensor) == aten
    del mode
    gc.collect()
    assert dispatch_table(op) == before


def test_ops_that_are_gone_are_let_go_of_by_a_living_tracing_mode(no_other_modes, define_opaque):
    def fleeting(x: Tensor) -> Tensor:
        return x * 2

    def named() -> list[str]:
        return [name for name in torch._C._dispatch_get_all_op_names() if "fleeting" in name]

    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    for _ in range(3):
        library = torch.library.Library("dispatch_compile_test", "FRAGMENT")
        library.define("fleeting_opaque(Tensor x) -> Tensor")
        op = dc.register_op(name="fleeting")(fleeting)
        library.impl("fleeting_opaque", lambda x, op=op: op(x), "CompositeExplicitAutograd")
        with mode:
            torch.ops.dispatch_compile_test.fleeting_opaque(torch.ones(2, 3))
        op.unregister()
        assert named() == ["dispatch_compile_test::fleeting_opaque"]
        library._destroy()
        with mode:
            assert named() == []
    assert [event.depth for event in mode.trace.events] == [1, 1, 1]
    assert mode.cache.stats().hits == 3


def test_removed_op_is_let_go_of(no_other_modes, define_opaque):
    def twice(x: Tensor) -> Tensor:
        return x * 2

    op = define_opaque(twice)
    before = dispatch_table(op)
    mode = dc.DispatchCompileMode(config=EAGER)
    handle = dc.register_native(op, twice)
    with mode:
        op(torch.randn(4, 3))
        handle.remove()
        assert dispatch_table(op) == before
        op(torch.randn(4, 3))
    assert mode.cache.stats().hits == 1
