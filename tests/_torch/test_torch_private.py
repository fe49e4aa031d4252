"""Every private torch name that the package uses still does what the package uses it for."""

from __future__ import annotations

import ast
import functools
import gc
import inspect
import marshal
import re
import sys
import weakref
from contextlib import nullcontext
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dispatch_compile._torch import capture, dispatch, inductor, saved_code

ROOMS = (dispatch, capture, inductor, saved_code)

TESTED: set[str] = set()


def covers(*names: str):
    """Mark a test as the one for these names of ``_torch``."""
    TESTED.update(names)
    return lambda test: test


@pytest.fixture
def overload(define_opaque):
    def twice(x: Tensor) -> Tensor:
        return x * 2

    return define_opaque(twice)


@covers("profiler")
def test_profiler_flag_is_up_while_a_profiler_is_on():
    assert dispatch.profiler._is_profiler_enabled is False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert dispatch.profiler._is_profiler_enabled is True
    assert dispatch.profiler._is_profiler_enabled is False


@covers("reinterpret_tensor")
@pytest.mark.parametrize("inference", [False, True])
def test_other_strides_over_the_same_memory(inference):
    with torch.inference_mode(inference):
        x = torch.randn(4, 1)
        y = dispatch.reinterpret_tensor(x, (4, 1), (1, 7))
    assert (y.data_ptr(), y.shape, y.stride()) == (x.data_ptr(), (4, 1), (1, 7))
    assert (y.is_inference(), y._is_view(), y._version if not inference else 0) == (inference, False, 0)


@covers("torchs_modes")
def test_stack_of_modes():
    class Mode(TorchDispatchMode):
        pass

    outer, inner = Mode(), Mode()
    with outer, inner:
        assert dispatch.torchs_modes() == [outer, inner]
    assert dispatch.torchs_modes() == []


@covers("BELOW_BACKEND_SELECT")
def test_keys_below_backend_select(overload):
    for key in ("CPU", "CUDA", "Meta", "SparseCPU"):
        assert dispatch.BELOW_BACKEND_SELECT.has(getattr(torch._C.DispatchKey, key)), key
    for key in ("BackendSelect", "AutogradCPU", "Python", "Functionalize"):
        assert not dispatch.BELOW_BACKEND_SELECT.has(getattr(torch._C.DispatchKey, key)), key


@covers("BELOW_BACKEND_SELECT")
def test_a_kernel_at_backend_select_is_reached_first_and_redispatches(overload):
    seen = []

    def kernel(keyset, x):
        seen.append(keyset)
        return overload.redispatch(keyset & dispatch.BELOW_BACKEND_SELECT, x)

    library = torch.library.Library(overload.namespace, "IMPL")
    library.impl(overload.name().partition("::")[2], kernel, "BackendSelect", with_keyset=True)
    try:
        assert overload(torch.ones(2)).tolist() == [2.0, 2.0]
        assert len(seen) == 1
    finally:
        library._destroy()
    overload(torch.ones(2))
    assert len(seen) == 1, "Library._destroy takes the kernel out again"


@covers("CustomOpDef", "wrap_custom_op_kernels")
def test_custom_op_definitions():
    @torch.library.custom_op("dispatch_compile_test::private_custom_op", mutates_args=())
    def op(x: Tensor) -> Tensor:
        return x * 2

    assert isinstance(op, dispatch.CustomOpDef)
    dispatch.wrap_custom_op_kernels(op, lambda kernel: lambda x: kernel(x) + 1)
    assert op(torch.ones(2)).tolist() == [3.0, 3.0]


@covers("GlobalStateGuard", "global_state")
def test_global_state():
    guard, state = dispatch.GlobalStateGuard(), dispatch.global_state()
    assert dict(state)["grad_mode"] is True
    assert guard.check()
    assert dispatch.global_state() == state
    with torch.no_grad():
        assert not guard.check()
        assert dispatch.global_state() != state
    with torch.autocast("cpu"):
        assert not guard.check()
        assert dispatch.global_state() != state
    torch.use_deterministic_algorithms(True)
    try:
        assert not guard.check()
        assert dispatch.global_state() != state
    finally:
        torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    try:
        assert not guard.check()
        assert dispatch.global_state() != state
    finally:
        torch.set_default_dtype(torch.float32)
    assert guard.check()


@covers("inexact_matmul_precision")
def test_matmul_precision():
    expected = {"high": "tf32", "medium": "bf16", "highest": None}
    guard, states = dispatch.GlobalStateGuard(), set()
    try:
        for precision, name in expected.items():
            torch.set_float32_matmul_precision(precision)
            assert dispatch.inexact_matmul_precision() == name
            if name is not None or torch.__version__ < "2.15":  # which tells "highest" from what nobody has set
                assert guard.check() == (name is None)
            states.add(dispatch.global_state())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(states) == len(expected)


@covers("TensorGuards")
def test_tensor_guards():
    x, weight = torch.randn(4, 3), torch.randn(3)
    guards = dispatch.TensorGuards(x, weight, dynamic_dims_sizes=[[None, 3], [3]], dynamic_dims_strides=[[3, 1], [1]])
    assert guards.check(x, weight)
    assert guards.check(torch.randn(9, 3), torch.randn(3))
    different = {
        "size": torch.randn(4, 4),
        "stride": torch.randn(3, 4).t(),
        "rank": torch.randn(4, 3, 1),
        "dtype": x.double(),
        "requires grad": x.clone().requires_grad_(),
        "device": x.to("meta"),
        "conjugate": torch.randn(4, 3, dtype=torch.complex64).conj(),
        "subclass": x.as_subclass(type("Tagged", (Tensor,), {})),
        "no tensor": 3,
    }
    for what, other in different.items():
        assert not guards.check(other, weight), what


@covers("OpOverload", "OpOverloadPacket")
def test_overloads(overload):
    assert isinstance(overload, dispatch.OpOverload)
    assert isinstance(overload.overloadpacket, dispatch.OpOverloadPacket)
    assert overload.overloadpacket.overloads() == ["default"]
    assert overload._overloadname == "default"
    assert overload.name() == overload._schema.name
    assert overload.namespace == "dispatch_compile_test"
    argument = torch.ops.aten.add_.Tensor._schema.arguments[0]
    assert (argument.name, argument.alias_info.is_write) == ("self", True)
    assert torch.Tag.nondeterministic_seeded in torch.ops.aten.rand_like.default.tags
    assert torch.Tag.data_dependent_output in torch.ops.aten._local_scalar_dense.default.tags


@covers("parse_schema", "FunctionSchema")
def test_schemas():
    schema = dispatch.parse_schema("f(Tensor(a!) x, *, int n=3) -> Tensor")
    assert isinstance(schema, dispatch.FunctionSchema)
    x, n = schema.arguments
    assert (x.name, str(x.type), x.alias_info.is_write) == ("x", "Tensor", True)
    assert (n.name, str(n.type), n.default_value, n.kwarg_only, n.alias_info) == ("n", "int", 3, True, None)
    assert [str(returned.type) for returned in schema.returns] == ["Tensor"]


@covers("disabled_torch_function")
def test_classes_that_leave_torchs_functions_alone():
    class Plain(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    assert Plain.__torch_function__ is dispatch.disabled_torch_function
    assert torch.nn.Parameter.__torch_function__ is dispatch.disabled_torch_function
    assert Tensor.__torch_function__ is not dispatch.disabled_torch_function


@covers("known_backends", "inductor_options")
def test_what_a_configuration_may_name():
    assert {"inductor", "eager", "aot_eager"} <= set(inductor.known_backends())
    assert {"max_autotune", "cpp.threads", "shape_padding"} <= set(inductor.inductor_options())


@covers("sym_sqrt")
def test_square_roots_of_symbols():
    fn = make_fx(lambda x: x * capture.sym_sqrt(x.size(0)), tracing_mode="symbolic")
    graph = fn(torch.ones(4, 3))
    assert any(node.target is capture.sym_sqrt for node in graph.graph.nodes)


@covers("QuietMode")
def test_functions_are_compiled_under_a_quiet_mode():
    class Quiet(dispatch.QuietMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    with Quiet():
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert len(compiled) == 1


@covers("push_mode", "pop_mode")
def test_quiet_modes_that_overlap_leave_no_flag():
    class Loud(dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    flags = torch.utils._python_dispatch.is_in_torch_dispatch_mode
    before = flags()
    loud, quiet = Loud(), dispatch.QuietMode()
    loud.__enter__()
    quiet.__enter__()
    dispatch.pop_mode(quiet)
    loud.__exit__(None, None, None)
    dispatch.push_mode(quiet)
    assert dispatch.torchs_modes() == [quiet]
    quiet.__exit__(None, None, None)
    assert (dispatch.torchs_modes(), flags()) == ([], before)


@covers("TorchDispatchMode", "dispatch_modes_active")
def test_dispatch_modes():
    class Seeing(dispatch.TorchDispatchMode):
        active: int | None = None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.active = dispatch.dispatch_modes_active()
            return func(*args, **(kwargs or {}))

    assert dispatch.TorchDispatchMode is TorchDispatchMode
    assert dispatch.dispatch_modes_active() == 0
    with Seeing() as outer, Seeing():
        assert dispatch.dispatch_modes_active() == 2
        torch.ones(1) + 1
    assert outer.active == 0, "a mode is off while it handles a call"
    assert dispatch.dispatch_modes_active() == 0


@covers("function_modes_active")
def test_function_modes():
    class Seeing(torch.overrides.TorchFunctionMode):
        active: int | None = None

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.active = dispatch.function_modes_active()
            return func(*args, **(kwargs or {}))

    assert dispatch.function_modes_active() == 0
    with Seeing() as outer, Seeing():
        assert dispatch.function_modes_active() == 2
        torch.add(torch.ones(1), 1)
    assert outer.active == 0, "a mode is off while it handles a call"
    assert dispatch.function_modes_active() == 0
    with torch.device("cpu"):
        assert dispatch.function_modes_active() == 1


@covers("is_dynamo_compiling")
def test_dynamo_takes_the_branch_for_itself():
    def asks(x: Tensor) -> Tensor:
        return x * 2 if dispatch.is_dynamo_compiling() else x * 3

    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    assert asks(torch.ones(2)).tolist() == [3.0, 3.0]
    assert torch.compile(asks, backend=counter, fullgraph=True)(torch.ones(2)).tolist() == [2.0, 2.0]
    assert counter.frame_count == 1


@covers("uncompiled")
def test_what_was_compiled():
    def twice(x: Tensor) -> Tensor:
        return x * 2

    class Scaling:
        scale = 3

        @torch.compile(backend="eager")
        def scaled(self, x: Tensor) -> Tensor:
            return x * self.scale

    compiled = torch.compile(twice, backend="eager")

    @functools.wraps(compiled)
    def around(x: Tensor) -> Tensor:
        return compiled(x) + 1

    module = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    scaling = Scaling()
    assert dispatch.uncompiled(compiled) is twice
    assert dispatch.uncompiled(torch.compiler.disable(compiled)) is twice
    assert dispatch.uncompiled(Scaling.scaled).__code__.co_varnames[:2] == ("self", "x")
    assert dispatch.uncompiled(Scaling.scaled) is not Scaling.scaled
    for other in (twice, around, module, scaling.scaled, functools.partial(compiled), 3):
        assert dispatch.uncompiled(other) is other


@covers("without_modes")
def test_without_modes():
    class Seeing(dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    with Seeing() as outer, Seeing() as inner:
        with dispatch.without_modes():
            assert dispatch.dispatch_modes_active() == 0
            torch.ones(1) + 1
        assert (outer.seen, inner.seen) == (0, 0)
        assert dispatch.torchs_modes() == [outer, inner]


@covers("without_version_counting")
def test_version_counting():
    @torch.library.custom_op("dispatch_compile_test::private_mutating_op", mutates_args=("x",))
    def op(x: Tensor) -> None:
        raise KeyboardInterrupt

    x = torch.ones(2)
    with dispatch.without_version_counting(), pytest.raises(KeyboardInterrupt):
        op(x)
    assert x._version == 0
    with pytest.raises(KeyboardInterrupt):
        op(x)
    assert x._version == 1


@covers("decomposes")
@pytest.mark.parametrize("context", [nullcontext, torch.inference_mode, torch._C._AutoDispatchBelowAutograd])
def test_decomposing_ops(context):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.add(func)
            return func(*args, **(kwargs or {}))

    ops, op = set(), torch.ops.aten.rms_norm.default
    with context():
        x = torch.ones(2)
        with Seen():
            op(x, [2])
        assert dispatch.decomposes(op) == (op not in ops)
        assert not dispatch.decomposes(torch.ops.aten.rsqrt.default)
    assert ops


@covers("all_op_names")
def test_all_op_names(overload):
    names = dispatch.all_op_names()
    assert overload.name() in names
    assert "aten::add.Tensor" in names


@covers("has_schema")
def test_has_schema(overload):
    assert dispatch.has_schema(overload.name())
    assert dispatch.has_schema("aten::add.Tensor")
    assert dispatch.has_schema("aten::relu")
    library = torch.library.Library("dispatch_compile_test", "FRAGMENT")
    library.define("defined_for_a_while(Tensor x) -> Tensor")
    assert dispatch.has_schema("dispatch_compile_test::defined_for_a_while")
    library._destroy()
    assert not dispatch.has_schema("dispatch_compile_test::defined_for_a_while")
    assert not dispatch.has_schema("dispatch_compile_test::never_defined")


@covers("has_kernel")
def test_has_kernel(overload):
    assert dispatch.has_kernel(overload, "CompositeExplicitAutograd")
    assert not dispatch.has_kernel(overload, "BackendSelect")
    assert dispatch.has_kernel(torch.ops.aten.mul.Tensor, "CPU")


@covers("dual_level")
def test_dual_level():
    assert dispatch.dual_level() == -1
    with torch.autograd.forward_ad.dual_level():
        assert dispatch.dual_level() == 0
    assert dispatch.dual_level() == -1


@covers("in_functorch_transform")
def test_functorch_transforms():
    x, seen = torch.ones(3), []

    def look(x: Tensor) -> Tensor:
        seen.append(dispatch.in_functorch_transform())
        return x.sum()

    look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.functionalize(look)(x)
    assert seen == [False, True, True, True]
    assert not dispatch.in_functorch_transform()


@covers("is_functorch_wrapped")
def test_functorch_wrappers():
    x, seen = torch.ones(3), []
    assert not dispatch.is_functorch_wrapped(x)
    torch.func.vmap(lambda x: seen.append(dispatch.is_functorch_wrapped(x)) or x)(x)
    torch.func.functionalize(lambda x: seen.append(dispatch.is_functorch_wrapped(x)) or x)(x)
    assert seen == [True, True]


@covers("is_zero_tensor")
def test_zero_tensors():
    assert not dispatch.is_zero_tensor(torch.zeros(2))
    assert dispatch.is_zero_tensor(torch._efficientzerotensor(2))


@covers("new_shape_env", "new_fake_mode", "dynamic_size", "trace", "shape_guard_names")
def test_capture_with_a_symbol():
    shape_env = capture.new_shape_env()
    size = capture.dynamic_size(shape_env, 6, "t0")
    assert not str(size).isdecimal()
    with capture.new_fake_mode(shape_env):
        x = torch.empty_strided([size, 3], [3, 1])

    def fn(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 2 == 0 else x * 3

    graph = capture.trace(fn, [x], {})
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [torch.ops.aten.mul.Tensor]
    text = shape_env.produce_guards_expression([x])
    assert "L['t0'].size()[0]" in text
    check = eval(f"lambda L: {text}", capture.shape_guard_names())
    assert [check({"t0": torch.empty(n, 3)}) for n in (2, 3, 4, 100)] == [True, False, True, True]
    assert graph(torch.ones(4, 3)).eq(2).all()


@covers("dynamic_number")
@pytest.mark.parametrize("value", [3, 2.5, 0, 1, -1.0])
def test_capture_with_the_symbol_of_a_number(value):
    shape_env = capture.new_shape_env()
    number = capture.dynamic_number(shape_env, value, "t0")
    assert isinstance(number, torch.SymInt if isinstance(value, int) else torch.SymFloat)
    with capture.new_fake_mode(shape_env):
        x = torch.empty(4)

    def fn(n: float, x: Tensor) -> Tensor:
        return x * n if n < 7 else x

    graph = capture.trace(fn, [number, x], {})
    text = shape_env.produce_guards_expression([number, x])
    check = eval(f"lambda L: {text}", capture.shape_guard_names())
    assert [check({"t0": n}) for n in (value, type(value)(-5), type(value)(8))] == [True, True, False]
    assert graph(type(value)(-5), torch.ones(4)).tolist() == [-5.0] * 4


@covers("at_least", "size_text", "size_at")
def test_sizes_with_symbols():
    shape_env = capture.new_shape_env()
    size = capture.dynamic_size(shape_env, 6, "t0")
    symbols = {str(size): "x.size(0)"}
    sizes = [3, size, 8 * size, size // 2, torch.sym_max(size, 5)]
    told = [eval(capture.size_text(one, symbols), {"x": torch.empty(9)}) for one in sizes]
    assert told == [3, 9, 72, 4, 9]
    assert [capture.size_at(one, {str(size): 9}) for one in sizes] == told
    assert [capture.at_least(one, 2) for one in (*sizes, 1)] == [True, True, True, False, True, False]
    assert capture.at_least(8 * size, size)
    assert not capture.at_least(8, size)
    assert [str(guard.expr) for guard in shape_env.guards] == []


@covers("new_fake_mode")
def test_fake_mode_refuses_real_tensors():
    with capture.new_fake_mode(capture.new_shape_env()), pytest.raises(AssertionError, match="FakeTensor"):
        torch.ones(2) + CONSTANT


CONSTANT = torch.ones(2)


@covers("new_fake_mode")
def test_fake_modes_leave_nothing_in_the_cache_that_they_share():
    before = FakeTensorMode.cache_info().size
    shape_env = capture.new_shape_env()
    size = capture.dynamic_size(shape_env, 6, "t0")
    with capture.new_fake_mode(shape_env):
        x = torch.empty_strided([size, 3], [3, 1])
    capture.trace(lambda x: x[: x.shape[0] // 2] + torch.zeros(x.shape[0] // 2, 3), [x], {})
    assert FakeTensorMode.cache_info().size == before


@covers("size_depends_on_values")
def test_sizes_that_depend_on_values():
    with capture.new_fake_mode(capture.new_shape_env()):
        x = torch.ones(4, 3)
        assert capture.size_depends_on_values(x.nonzero())
        assert capture.size_depends_on_values(x[x > 0])
        assert capture.size_depends_on_values([x, x.nonzero()])
        assert not capture.size_depends_on_values(x[torch.tensor([1, 2])])
        assert not capture.size_depends_on_values((x, None, 3))


@covers("forget_shape_envs")
def test_shape_envs_are_forgotten():
    def traced() -> weakref.ref:
        shape_env = capture.new_shape_env()
        size = capture.dynamic_size(shape_env, 4, "x")
        assert bool(size == 4)
        return weakref.ref(shape_env)

    reference = traced()
    gc.collect()
    capture.forget_shape_envs()
    gc.collect()
    assert reference() is None


@covers("compile_lock", "compile_lock_if_imported")
def test_compile_lock():
    with inductor.compile_lock(), inductor.compile_lock():
        pass  # it is re-entrant
    assert inductor.compile_lock_if_imported() is inductor.compile_lock()


@covers("NoCompiler")
def test_compiler_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(inductor, "_import_failure", None)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torch._dynamo.convert_frame", None)
        with pytest.raises(inductor.NoCompiler, match="ModuleNotFoundError: ") as first:
            inductor.compile_lock()
    with pytest.raises(inductor.NoCompiler) as second:  # torch cannot be imported halfway and then again
        inductor.compile_lock()
    assert str(first.value) == str(second.value)


@covers("causes", "missing_compiler")
def test_errors_that_inductor_wraps():
    from torch._inductor.exc import InductorError, InvalidCxxCompiler, TritonMissing

    for error, compiler in ((InvalidCxxCompiler(), "C++"), (TritonMissing(None), "Triton"), (OSError(), None)):
        wrapped = InductorError(error, None)
        outermost = ValueError()
        outermost.__cause__ = wrapped
        assert list(inductor.causes(outermost)) == [outermost, wrapped, error]
        assert inductor.missing_compiler(outermost) == inductor.missing_compiler(error) == compiler


@covers("forget_failed_compilations")
def test_failed_compilations():
    from torch._inductor.async_compile import CompiledTritonKernels
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    CppPythonBindingsCodeCache.cache["C++ code"] = CompiledTritonKernels._cache["Triton's code"] = lambda: None
    inductor.forget_failed_compilations()
    assert not CppPythonBindingsCodeCache.cache
    assert not CompiledTritonKernels._cache


@covers("forget_inductors_threads")
def test_inductors_threads():
    from torch._inductor.async_compile import AsyncCompile

    pools = [AsyncCompile.pool(), AsyncCompile.pool()]
    inductor.forget_inductors_threads()
    pools.append(AsyncCompile.pool())
    assert [pool is pools[0] for pool in pools] == [True, True, False]


@covers("InductorCode", "inductor_compile")
def test_inductor():
    from torch._inductor.codecache import PyCodeCache

    shape_env = capture.new_shape_env()
    size = capture.dynamic_size(shape_env, 6, "t0")
    with capture.new_fake_mode(shape_env):
        x = torch.empty_strided([size, 3], [3, 1])

    def fn(size: object, x: Tensor) -> list[Tensor]:
        return [x * 2 + 1]

    graph = capture.trace(fn, [size, x], {})
    variables = set(copy_context())
    code = inductor.inductor_compile(graph, [size, x], {"size_asserts": False})
    assert set(copy_context()) == variables
    assert isinstance(code, inductor.InductorCode)
    assert code.strides(shape_env) == [(3, 1)]
    for tokens in (2, 6, 9):
        (result,) = code.run([tokens, torch.ones(tokens, 3)])
        assert result.tolist() == [[3.0] * 3] * tokens
    assert "def call(" in code.source
    assert Path(code.path).read_text() == code.source
    loaded = [module for module in PyCodeCache.modules if module.__file__ == code.path]
    assert loaded
    assert sys.modules[loaded[-1].__name__] is loaded[-1]
    del code
    gc.collect()
    assert loaded[-1] not in PyCodeCache.modules
    assert sys.modules.get(loaded[-1].__name__) is not loaded[-1]


@covers("compile_node", "graph_pass")
def test_aten_is_called_for_all_that_is_not_marked():
    def mark(graph: torch.fx.Graph) -> None:
        [product] = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
        inductor.compile_node(product)
        marked.append(product.target)

    marked: list[object] = []
    graph_pass = inductor.graph_pass(mark, [__file__])
    assert graph_pass.uuid() == inductor.graph_pass(mark, [__file__]).uuid()
    assert graph_pass.uuid() != inductor.graph_pass(mark, [inductor.__file__]).uuid()
    assert graph_pass.uuid() != inductor.graph_pass(mark, [__file__], data=["aten.mul"]).uuid()

    with capture.new_fake_mode(capture.new_shape_env()):
        x = torch.empty(4, 3)
    graph = capture.trace(lambda x: [torch.nn.functional.silu(x) * 2], [x], {})
    options = {"fallback_by_default": True, "post_grad_custom_post_pass": graph_pass, "fx_graph_cache": False}
    code = inductor.inductor_compile(graph, [x], options, {torch.ops.aten.silu.default: None})
    assert marked == [torch.ops.aten.mul.Tensor]
    assert re.findall(r"torch\.ops\.aten\.\w+\.\w+\(", code.source) == ["torch.ops.aten.silu.default("]
    values = torch.randn(4, 3)
    assert torch.equal(code.run([values])[0], torch.nn.functional.silu(values) * 2)


def test_a_decomposition_of_ones_own_comes_before_inductors():
    with capture.new_fake_mode(capture.new_shape_env()):
        x = torch.empty(4, 3)
    graph = capture.trace(lambda x: [torch.nn.functional.silu(x)], [x])
    code = inductor.inductor_compile(graph, [x], {}, {torch.ops.aten.silu.default: lambda x: x * 3})
    assert code.run([torch.ones(4, 3)])[0].tolist() == [[3.0] * 3] * 4


@covers("overload_named")
def test_overload_named():
    packet = torch.ops.aten.add
    assert [dispatch.overload_named(packet, name)._overloadname for name in packet.overloads()] == packet.overloads()


@covers("is_jit_tracing")
def test_is_jit_tracing():
    def body(x: Tensor) -> Tensor:
        seen.append(dispatch.is_jit_tracing())
        return x + 1

    seen: list[bool] = []
    torch.jit.trace(body, torch.ones(2), check_trace=False)
    assert (seen, dispatch.is_jit_tracing()) == ([True], False)


@covers("functional_op")
def test_functional_op():
    aten = torch.ops.aten
    pairs = [
        (aten.expm1_.default, aten.expm1.default),
        (aten.expm1.out, aten.expm1.default),
        (aten.floor_divide_.Tensor, aten.floor_divide.default),
        (aten.div_.Tensor_mode, aten.div.Tensor_mode),
        (aten.fmod.Scalar_out, aten.fmod.Scalar),
        (aten.add.out, aten.add.Tensor),
        (aten.add.Scalar, aten.add.Scalar),
    ]
    assert [inductor.functional_op(op) for op, _ in pairs] == [functional for _, functional in pairs]


@covers("inductors_ops")
def test_ops_that_inductor_has_code_for():
    ops = inductor.inductors_ops()
    assert {torch.ops.aten.add.Tensor, torch.ops.aten.silu.default} < set(ops)
    assert len(ops) > 1000


@covers("trace", "without_early_decompositions")
@pytest.mark.parametrize("ci", ["", "true"])
def test_interpolation_stays_whole(monkeypatch, ci):
    """torch's own decompositions of it in Python apply before any table does, unless they are out of the way."""
    op = torch.ops.aten.upsample_bilinear2d.vec
    kernels = dict(op.py_kernels)
    with capture.new_fake_mode(capture.new_shape_env()):
        x = torch.empty(2, 3, 4, 5)

    def larger(x: Tensor) -> list[Tensor]:
        return [torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")]

    graph = capture.trace(larger, [x])
    assert any("upsample_bilinear2d" in str(node.target) for node in graph.graph.nodes)
    assert op.py_kernels == kernels
    monkeypatch.setenv("CI", ci)  # there Inductor is strict about the ops that it is to leave whole
    op = torch.ops.aten.upsample_bilinear2d.default
    monkeypatch.delitem(torch._inductor.lowering.lowerings, op, raising=False)
    code = inductor.inductor_compile(graph, [x], {}, {op: None})
    assert "aten.upsample_bilinear2d.default(" in code.source


@covers("hide_from_dynamo")
def test_hidden_from_dynamo():
    def hidden(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x * 2

    compiling: list[bool] = []
    dispatch.hide_from_dynamo(hidden)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    assert torch.compile(hidden, backend=counter)(torch.ones(2)).tolist() == [2.0, 2.0]
    assert counter.frame_count == 0
    assert compiling == [False]


@covers("is_compiled")
def test_functions_that_are_compiled():
    compiled = torch.compile(torch.sin), torch.compile(torch.nn.Linear(2, 2)), torch.compile(lambda x: x + 1)
    assert all(map(inductor.is_compiled, compiled))
    assert not any(map(inductor.is_compiled, (torch.sin, torch.nn.Linear(2, 2), lambda x: x + 1, 3)))


@covers("inductor_option_type")
def test_types_of_inductors_options():
    assert inductor.inductor_option_type("max_autotune") is bool
    assert inductor.inductor_option_type("cpp.threads") is int
    assert inductor.inductor_option_type("no_such_option") is None


@covers("lookup_backend")
def test_lookup_backend():
    graph = torch.fx.symbolic_trace(lambda x: x * 2)
    assert inductor.lookup_backend("eager")(graph, [torch.ones(2)])(torch.ones(2)).tolist() == [2.0, 2.0]


@covers("dtype_abbreviation")
def test_dtype_abbreviations():
    dtypes = [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn]
    assert [capture.dtype_abbreviation(dtype) for dtype in dtypes] == ["bf16", "f32", "i64", "f8e4m3fn"]


# ---- Completeness


def test_every_name_has_a_test():
    assert {name for room in ROOMS for name in room.__all__} - TESTED == set()


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_is_listed(room):
    tree = ast.parse(inspect.getsource(room))
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {name for name in defined if not name.startswith("_")} - set(room.__all__) == set()


def private_names_of_torch(source: str) -> set[str]:
    """The private names of torch that a module imports, or reads as an attribute of torch's."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        found.update(name for name in names if re.match(r"torch\.(?!ops\.)(\w+\.)*_(?!_)", name))
    return found


def test_private_names_are_found():
    assert private_names_of_torch("import torch._dynamo\nfrom torch._C import x\ntorch.a._b.c\ntorch.__version__") == {
        *("torch._dynamo", "torch._C.x", "torch.a._b", "torch.a._b.c")
    }


def test_nothing_else_uses_private_names():
    package = Path(dispatch.__file__).parents[1]
    found = {
        str(path.relative_to(package)): names
        for path in package.rglob("*.py")
        if path.parent.name != "_torch" and (names := private_names_of_torch(path.read_text()))
    }
    assert found == {}


# ---- Saved code


@pytest.fixture(scope="module")
def inductor_code():
    def fn(x: Tensor) -> tuple[Tensor]:
        return (x * 2 + 1,)

    fake_mode = capture.new_fake_mode(capture.new_shape_env())
    with fake_mode:
        x = torch.empty(6, 3)
    return inductor.inductor_compile(capture.trace(fn, [x], {}), [x], {})


@covers("inductor_overrides")
def test_inductor_overrides(monkeypatch):
    from torch._inductor import config

    assert "max_autotune" not in saved_code.inductor_overrides()
    with config.patch({"max_autotune": True, "cpp.threads": 3}):
        overrides = saved_code.inductor_overrides()
    assert (overrides["max_autotune"], overrides["cpp.threads"]) == (True, 3)
    assert "max_autotune" not in saved_code.inductor_overrides(), "a patch that is over leaves an override"
    monkeypatch.delitem(sys.modules, "torch._inductor.config")
    assert saved_code.inductor_overrides() == {}


@covers("guard_functions")
def test_guard_functions(monkeypatch):
    assert capture.guard_functions("math.floor(a0.size(0) / 2) == 3").keys() == capture.shape_guard_names().keys()

    def imported() -> None:
        raise AssertionError("SymPy takes a while to import")

    monkeypatch.setattr(capture, "shape_guard_names", imported)
    for guard in (None, "2 <= a0.size(0)", "a0.size(0) == a1_2.stride(1) and a3_0_1 % 2 == 0"):
        assert capture.guard_functions(guard) == {}


@covers("generated_module")
def test_generated_module(inductor_code):
    from torch._inductor.utils import align_inputs_from_check_idxs

    module, positions = saved_code.generated_module(inductor_code.run)
    assert "async_compile" not in module, "the kernels are compiled"
    assert module["call"] == inductor_code.run
    assert positions == ()
    aligning = align_inputs_from_check_idxs(inductor_code.run, [0, 2], set())
    assert saved_code.generated_module(aligning) == (module, (0, 2))
    assert saved_code.generated_module(lambda inputs: inductor_code.run(inputs)) is None


@covers("cpp_kernel_library", "load_cpp_kernel")
def test_cpp_kernels(inductor_code, tmp_path):
    module, _ = saved_code.generated_module(inductor_code.run)
    [kernel] = [value for name, value in module.items() if name.startswith("cpp_fused")]
    library = saved_code.cpp_kernel_library(kernel)
    assert library.startswith(b"\x7fELF")
    assert saved_code.cpp_kernel_library(lambda *args: None) is None
    (tmp_path / "library").write_bytes(library)
    loaded = saved_code.load_cpp_kernel(str(tmp_path / "library"))
    (tmp_path / "library").unlink()
    assert loaded is not kernel
    x, result = torch.randn(6, 3), torch.empty(6, 3)
    loaded(x, result)
    assert torch.equal(result, inductor_code.run([x])[0])


def _statically_launched(launcher_source: str, **attributes):
    """A kernel as Inductor leaves it on a machine with a GPU."""
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    static = StaticallyLaunchedCudaKernel.__new__(StaticallyLaunchedCudaKernel)
    vars(static).update(name="triton_poi", shared=64, num_warps=4, arg_tys="OOl")
    vars(static).update(has_global_scratch=True, has_profile_scratch=True)
    # What closes the kernel when it is freed.
    vars(static).update(module=None, function=None, modules={}, functions={}, **attributes)
    scope = {"runner": static.run}
    exec(launcher_source, scope)
    scope["launcher"].cache_hash = "HASH"
    return SimpleNamespace(launchers=[scope["launcher"]], triton_meta={"device": 1})


LAUNCHER = "def launcher(x, y, n, stream): runner(-(n // -8), max(n, 1), 1, stream, x, y, n)"


@covers("TritonLaunch", "triton_launch")
def test_triton_launch(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = _statically_launched(LAUNCHER)
    assert saved_code.triton_launch(kernel) is None, "no machine code in the cache"
    (tmp_path / "HASH").mkdir()
    (tmp_path / "HASH" / "triton_poi.cubin").write_bytes(b"cubin")
    launch = saved_code.triton_launch(kernel)
    assert launch._replace(grid=b"") == saved_code.TritonLaunch(b"cubin", "triton_poi", 1, 64, 4, "OOl", 2, b"")
    assert marshal.loads(launch.grid) == kernel.launchers[0].__code__


def test_triton_kernels_that_cannot_be_launched_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "HASH").mkdir()
    (tmp_path / "HASH" / "triton_poi.cubin").write_bytes(b"cubin")
    to_be_tuned = _statically_launched(LAUNCHER)
    to_be_tuned.launchers *= 2
    by_triton = _statically_launched(LAUNCHER)
    by_triton.launchers[0].__globals__["runner"] = print
    others = {
        "multi-kernel": object(),
        "to be tuned": to_be_tuned,
        "launched by Triton": by_triton,
        "calls more than the runner": _statically_launched(LAUNCHER.replace("max(n, 1)", "describe(n)")),
        "tensor descriptors": _statically_launched(LAUNCHER, _has_tensordesc=True),
        "scratch memory": _statically_launched(LAUNCHER, global_scratch_size=128),
    }
    for what, kernel in others.items():
        assert saved_code.triton_launch(kernel) is None, what
    assert saved_code.triton_launch(_statically_launched(LAUNCHER)) is not None


@pytest.mark.parametrize("loaded", [("function", 20, 0), ("module", "function", 20, 0)], ids=["2.11", "2.13"])
@covers("load_triton_kernel")
def test_load_triton_kernel(monkeypatch, loaded):
    calls = []

    class Launcher:
        @staticmethod
        def _load_kernel(*args):
            calls.append(args)
            return loaded

        @staticmethod
        def _launch_kernel(*args):
            calls.append(args)

    monkeypatch.setattr(torch._C, "_StaticCudaLauncher", Launcher, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    scope = {}
    exec(LAUNCHER, scope)
    grid = marshal.dumps(scope["launcher"].__code__)
    launch = saved_code.TritonLaunch(b"cubin", "triton_poi", 1, 64, 4, "OOl", 2, grid)
    kernel = saved_code.load_triton_kernel(launch, "/some/file")
    kernel.run("x", "y", 17, stream=7)
    assert calls == [
        ("/some/file", "triton_poi", 64, 1),
        ("function", 3, 17, 1, 4, 64, "OOlOO", ("x", "y", 17, None, None), 7),
    ]


@pytest.mark.cuda
def test_triton_kernels(tmp_path):
    def fn(x: Tensor) -> tuple[Tensor]:
        return (x * 2 + 1,)

    fake_mode = capture.new_fake_mode(capture.new_shape_env())
    with fake_mode:
        fake = torch.empty(600, 3, device="cuda")
    code = inductor.inductor_compile(capture.trace(fn, [fake], {}), [fake], {})
    x, result = torch.randn(600, 3, device="cuda"), torch.empty(600, 3, device="cuda")
    [expected] = code.run([x])
    module, positions = saved_code.generated_module(code.run)
    assert positions == (0,)
    [kernel] = [value for name, value in module.items() if name.startswith("triton_poi_")]
    launch = saved_code.triton_launch(kernel)
    (tmp_path / "cubin").write_bytes(launch.cubin)
    loaded = saved_code.load_triton_kernel(launch, str(tmp_path / "cubin"))
    loaded.run(x, result, x.numel(), stream=torch.cuda.current_stream().cuda_stream)
    assert torch.equal(result, expected)
